"""The format of scenarios as JSON Schema (draft 2020-12), made from the types that read them."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any, Literal, get_args, get_origin

from mlsys_bench import models, slo
from mlsys_bench.scenario import fleet, one_stage, staged, traffic
from mlsys_bench.scenario.reader import EXAMPLES, fields_of, without_none
from mlsys_bench.stages import Cost, Stage
from mlsys_bench.types import Lengths, Limit

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "pattern": r"\S"}
SHARE: Schema = {"type": "string", "pattern": r"^\s*[0-9.eE+_]+\s*%\s*$"}
_UNITS = {"duration": "ns|us|µs|ms|s|min|m|h|d", "size": "B|KB|kB|MB|GB|TB|KiB|MiB|GiB|TiB"}


def schema() -> Schema:
    """Return the schema of a scenario file: of one stage, or of several."""
    definitions: dict[str, Schema] = {}
    several = _object(staged.KEYS, {"cost"}, _top(definitions) | {
        "entry": _named("a stage"), "stages": {"type": "object", "minProperties": 1, "additionalProperties": _of(Stage, definitions)},
        "cost": _of(Cost, definitions),
        "traffic": _object(traffic.KEYS, {"prompt", "output"}, _traffic()),
    })  # fmt: skip
    one = _object(one_stage.KEYS, {"tenants", "slo"}, _top(definitions) | {
        "model": TEXT, "precision": _list({"enum": list(models.PRECISIONS)}), "gpus": _list(TEXT), "max_batch": _quantity("count"),
        "traffic": _object(traffic.KEYS, {"prompt", "output"}, _traffic()),
        "tenants": {
            "type": "object", "minProperties": 1, "propertyNames": {"pattern": slo.TENANT.pattern}, "additionalProperties": _tenant(),
        },
    })  # fmt: skip
    one["anyOf"] = [{"required": ["tenants"]}, {"required": ["slo"], "properties": {"traffic": {"required": ["prompt", "output"]}}}]
    one_or_several = {"if": {"anyOf": [{"required": ["stages"]}, {"required": ["entry"]}]}, "then": several, "else": one}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mlsys scenario",
        "description": "A system, its traffic and its promises, or several on one pool of GPUs.  `mlsys scenario check` says more: what "
        "must hold between the parts.",
        "if": {"anyOf": [{"required": ["pool"]}, {"required": ["scenarios"]}]},
        "then": _fleet(),
        "else": one_or_several,
        "$defs": definitions,
    }


def _top(definitions: dict[str, Schema]) -> dict[str, Schema]:
    definitions["Lengths"] = _lengths()
    definitions["Promises"] = _promises()
    return {
        "mlsys": {"const": 1}, "name": TEXT, "description": TEXT, "source": TEXT, "headroom": SHARE, "slo": {"$ref": "#/$defs/Promises"},
    }  # fmt: skip


def _traffic() -> dict[str, Schema]:
    lengths = {"$ref": "#/$defs/Lengths"}
    return {
        "rate": {"type": "string", "pattern": r"/(s|min|m|h|d)\s*$", "examples": ["20/s"]},
        "arrivals": TEXT, "prompt": lengths, "output": lengths, "source": TEXT,
    }  # fmt: skip


def _fleet() -> Schema:
    """Return a fleet: a pool of GPUs, and the scenarios that share it."""
    want = _object(fleet.WANT_KEYS, set(fleet.WANT_KEYS[1:]), {
        "scenario": TEXT, "name": TEXT, "priority": _quantity("count"), "rate": _traffic()["rate"], "arrivals": TEXT,
        "slo": {"$ref": "#/$defs/Promises"},
    })  # fmt: skip
    return _object(fleet.KEYS, set(), {
        "mlsys": {"const": 1}, "name": TEXT, "description": TEXT, "source": TEXT,
        "pool": {"type": "object", "minProperties": 1, "additionalProperties": _quantity("count")},
        "scenarios": {"type": "array", "items": want, "minItems": 1},
    })  # fmt: skip


def _tenant() -> Schema:
    """Return a tenant: a share or a rate, and what of lengths and limits is its own."""
    own, all_ = _traffic(), set(traffic.TENANT_KEYS)
    found = _object(traffic.TENANT_KEYS, all_, {
        "share": SHARE, "rate": own["rate"], "prompt": own["prompt"], "output": own["output"], "slo": {"$ref": "#/$defs/Promises"},
        "priority": _quantity("count"),
    })  # fmt: skip
    return found | {"oneOf": [{"required": ["share"]}, {"required": ["rate"]}]}


def _lengths() -> Schema:
    tokens = {"type": "number", "minimum": 1}
    law = _object(traffic.LENGTH_KEYS, {"cv", "max"}, {
        "dist": {"enum": list(traffic.DISTS)}, "mean": tokens, "cv": {"type": "number", "minimum": 0}, "max": _quantity("count"),
    })  # fmt: skip
    return {"description": (Lengths.__doc__ or "").strip(), "anyOf": [tokens, law]}


def _promises() -> Schema:
    """Return limits: a metric and a statistic, or a share."""
    latency = f"^({'|'.join(slo.LATENCIES)})_(mean|p50|p[5-9][0-9](\\.[0-9]+)?)$"
    return {
        "type": "object",
        "minProperties": 1,
        "patternProperties": {latency: _quantity("duration"), f"^({'|'.join(slo.SHARES)})$": SHARE},
        "additionalProperties": False,
    }


# ---------------------------------------------------------------- from types


def _of(kind: Any, definitions: dict[str, Schema]) -> Schema:
    """Return the schema of a type; dataclasses go to the definitions."""
    kind = without_none(kind)
    if get_origin(kind) is Annotated:
        return _quantity(get_args(kind)[1])
    if get_origin(kind) is Literal:
        return {"enum": list(get_args(kind))}
    if get_origin(kind) is dict:
        return {"type": "object", "minProperties": 1, "additionalProperties": _of(get_args(kind)[1], definitions)}
    if get_origin(kind) is tuple:
        return {"$ref": "#/$defs/Promises"} if get_args(kind)[0] is Limit else {"anyOf": [TEXT, _list(TEXT)]}
    if kind is Lengths:
        return {"$ref": "#/$defs/Lengths"}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}  # so that a class may hold itself
            definitions[kind.__name__] = _class(kind, definitions)
        reference: Schema = {"$ref": f"#/$defs/{kind.__name__}"}
        return {"anyOf": [{"const": "all"}, reference]} if kind.__name__ == "Join" else reference
    return {"type": "boolean"} if kind is bool else TEXT


def _class(kind: Any, definitions: dict[str, Schema]) -> Schema:
    fields = {key: field for key, field in fields_of(kind).items() if not (kind is Stage and key == "name")}
    made = _object(
        tuple(fields), {key for key, (_, _, needed) in fields.items() if not needed}, {k: _of(f[1], definitions) for k, f in fields.items()}
    )
    if kind.__name__ == "Service":
        made |= {"minProperties": 1, "maxProperties": 1}
    return {"description": re.sub(r"\s+", " ", kind.__doc__ or "").strip(), **made}


def _quantity(unit: str) -> Schema:
    """Return the schema of a quantity as people write it."""
    if unit == "share":
        return {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, SHARE]}
    if unit == "number":
        return {"type": "number", "exclusiveMinimum": 0}
    if unit == "count":
        return {"type": "integer", "minimum": 1}
    if unit == "stage":
        return _named("a stage, or done")
    pattern = r"^\s*\$" if unit == "price" else rf"^\s*[0-9.eE+_-]+\s*({_UNITS[unit]})\s*$"
    return {"type": "string", "pattern": pattern, "examples": [EXAMPLES[unit]]}


def _named(what: str) -> Schema:
    return TEXT | {"description": what}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of, "minItems": 1, "uniqueItems": True}


def _object(keys: tuple[str, ...], optional: set[str], properties: dict[str, Schema]) -> Schema:
    return {
        "type": "object",
        "properties": {key: properties[key] for key in keys},
        "required": [key for key in keys if key not in optional],
        "additionalProperties": False,
    }
