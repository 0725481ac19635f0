"""From YAML to the classes of `stages`: the fields say which keys there are, their types say how each value is written."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mlsys_bench import units
from mlsys_bench.errors import ScenarioError, did_you_mean
from mlsys_bench.scenario.traffic import lengths, promises
from mlsys_bench.scenario.values import mapping, number, section, shown, text, unique, whole
from mlsys_bench.types import Lengths, Limit

T = TypeVar("T")
UNITS = ("_per_h", "_s", "_bytes")  # endings of field names that the YAML key leaves out
KEYS = {"usd_per_vcpu_h": "vcpu", "is_async": "async"}  # keys that are no such field name


@functools.cache
def fields_of(cls: Any) -> dict[str, tuple[str, Any, bool]]:
    """Return, by YAML key, the name of the field, its type, and whether the key must be there."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        key_of(f.name): (f.name, hints[f.name], f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING)
        for f in dataclasses.fields(cls)
    }


def key_of(name: str) -> str:
    """Return the YAML key of a field: its name without the unit."""
    if name in KEYS:
        return KEYS[name]
    return next((name.removesuffix(ending) for ending in UNITS if name.endswith(ending)), name)


def read(cls: type[T], value: object, where: str, path: str, **given: Any) -> T:
    """Return an object of a dataclass from a mapping; `given` are fields that do not come from it."""
    hashable: Any = cls  # a class is, and mypy does not see it
    fields = {key: field for key, field in fields_of(hashable).items() if field[0] not in given}
    optional = tuple(key for key, (_, _, needed) in fields.items() if not needed)
    found = section(value, tuple(fields), where, path, optional=optional)
    return cls(**given, **{fields[key][0]: of(fields[key][1], item, where, f"{path}.{key}") for key, item in found.items()})


def of(kind: Any, value: object, where: str, path: str) -> Any:
    """Return a value of a type as it is written in a scenario."""
    kind, here = without_none(kind), f"{where}: {path}"
    if get_origin(kind) is Annotated:
        return QUANTITIES[get_args(kind)[1]](value, here)
    if get_origin(kind) is Literal:
        return _one_of(get_args(kind), value, here)
    if get_origin(kind) is dict:
        inner = get_args(kind)[1]
        return {key: of(inner, item, where, f"{path}.{key}") for key, item in _filled(mapping(value, here), here).items()}
    if get_origin(kind) is tuple:
        return promises(value, here) if get_args(kind)[0] is Limit else _texts(value, here)
    if kind is Lengths:
        return lengths(value, where, path)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return read(kind, value, where, path)
    if kind is bool:
        return _truth(value, here)
    assert kind is str, f"{path}: no way to read a {kind}"
    return text(value, here)


def without_none(kind: Any) -> Any:
    """Return the type without `| None`."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(part for part in get_args(kind) if part is not type(None))
    return kind


def _one_of(names: tuple[str, ...], value: object, here: str) -> str:
    if value not in names:
        raise ScenarioError(f"{here}: unknown name {shown(value)}{did_you_mean(str(value), names)}")
    return str(value)


def _filled(value: dict[str, Any], here: str) -> dict[str, Any]:
    if not value:
        raise ScenarioError(f"{here}: holds nothing")
    return value


def _texts(value: object, here: str) -> tuple[str, ...]:
    """Return a list of texts; one text alone is a list of one."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ScenarioError(f"{here}: an empty list where names are needed")
    return unique(tuple(text(item, here) for item in items), here)


def _truth(value: object, here: str) -> bool:
    if not isinstance(value, bool):
        raise ScenarioError(f"{here}: {shown(value)} where true or false is needed")
    return value


def _above_zero(value: object, here: str) -> float:
    found = number(value, here)
    if not (found > 0 and math.isfinite(found)):
        raise ScenarioError(f"{here}: {value} where a number above zero is needed")
    return found


def _share(value: object, here: str) -> float:
    """Return a share: '30%' or 0.3."""
    found = units.fraction(value, here) if isinstance(value, str) else number(value, here)
    if not 0 <= found <= 1:
        raise ScenarioError(f"{here}: {value} is no share; it must lie between 0 and 1, or 0% and 100%")
    return found


def _not_negative(parse: Callable[[Any, str], float]) -> Callable[[object, str], float]:
    def parsed(value: object, here: str) -> float:
        if (found := parse(value, here)) < 0:
            raise ScenarioError(f"{here}: {value} is below zero")
        return found

    return parsed


QUANTITIES: dict[str, Callable[[object, str], Any]] = {
    "duration": _not_negative(units.seconds),
    "size": _not_negative(units.size_bytes),
    "price": _not_negative(units.usd_per_h),
    "share": _share,
    "number": _above_zero,
    "count": whole,
    "stage": text,
}
EXAMPLES = {"duration": "20ms", "size": "40GB", "price": "$6.88/h", "share": "30%", "stage": "rank"}
