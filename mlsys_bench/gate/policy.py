"""What a build may and may not do: the `gate:` section of a YAML file, options of the command line above it, and which rule a metric has.

    gate:
      tolerance: 5%
      metrics: {engine.step: 3%, 'memory.*': 10%, loss: report, 'planner.*': 8% report}
      budgets: [ttft_p95<500ms]
      tails: report          # or fail
      counters: 1%

Names are those of metrics; a trailing * stands for the rest.  The longest match decides, and a whole name beats any beginning.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args, get_type_hints

from mlsys_bench import documents, units
from mlsys_bench.documents import Node
from mlsys_bench.errors import BadInput
from mlsys_bench.gate import budgets as absolute
from mlsys_bench.verdicts import Policy

KEYS = ("tolerance", "metrics", "budgets", "tails", "counters")
REPORT = "report"
DERIVED = (".cpu", ".p99")  # endings of metrics that come from the samples of another
TAILS: tuple[str, ...] = get_args(get_type_hints(Policy)["tails"])


def load(path: Path) -> Policy:
    """Return the policy in the `gate:` section of a YAML file; other sections are not the gate's.  Raises BadInput."""
    return of_document(documents.read(path))


def of_document(document: Node) -> Policy:
    """Return the policy of a document that has been read."""
    if not isinstance(document.value, dict):
        raise document.complaint("where a section `gate:` is needed")
    if "gate" not in document.value:
        near = difflib.get_close_matches("gate", map(str, document.value), n=1)
        raise BadInput(f"{document.where}: has no section `gate:`" + (f"; did you mean gate for {near[0]}?" if near else ""))
    return _section(Node(document.value["gate"], document.file, "gate"))


def given(
    path: Path | None = None,
    *,
    tolerance: str | None = None,
    metrics: Sequence[str] = (),
    budgets: Sequence[str] = (),
    tails: str | None = None,
    counters: str | None = None,
) -> Policy:
    """Return the policy of a file, or the defaults, with what the command line says above it.

    `metrics` are NAME=3%, NAME=report or NAME='3% report'; each replaces what the file says of that name.  `budgets` replace the file's.
    """
    found = load(path) if path is not None else Policy()
    changed: dict[str, Any] = {}
    if tolerance is not None:
        changed["tolerance"] = _share(Node(tolerance, "--tolerance"))
    if counters is not None:
        changed["counter_tolerance"] = _share(Node(counters, "--counters"))
    if tails is not None:
        changed["tails"] = Node(tails, "--tails").choice(TAILS)
    if budgets:
        changed["budgets"] = _budgets(Node(text, "--slo") for text in budgets)
    if metrics:
        changed |= _rules((*_rules_of(found), *(_assignment(text) for text in metrics)))
    return dataclasses.replace(found, **changed)


def tolerance_of(policy: Policy, name: str) -> float:
    """Return the slowdown that a metric may have and pass, as a share."""
    tolerances = policy.tolerances or {}
    rule = _rule_about(tolerances, name)
    return policy.tolerance if rule is None else tolerances[rule]


def may_fail(policy: Policy, name: str) -> bool:
    """Say whether a metric may fail the build: the longest rule about it does not say `report`."""
    return _rule_about((*(policy.tolerances or {}), *policy.reported), name) not in policy.reported


def counter_tolerance_of(policy: Policy, name: str) -> float:
    """Return the share by which a counter may grow and pass."""
    tolerances = policy.tolerances or {}
    rule = _rule_about(tolerances, name)
    return policy.counter_tolerance if rule is None else tolerances[rule]


def _rule_about(patterns: Iterable[str], name: str) -> str | None:
    """Return the rule that decides about a name.  CPU time and the tail of a metric go by its own rule where they have none."""
    patterns = tuple(patterns)
    found = _longest(patterns, name)
    parent = next((name.removesuffix(ending) for ending in DERIVED if name.endswith(ending)), None)
    return _longest(patterns, parent) if found is None and parent is not None else found


def idle(policy: Policy, names: Iterable[str]) -> tuple[str, ...]:
    """Return the rules that are about none of these metrics: a mistyped one does nothing."""
    names = tuple(names)
    rules = dict.fromkeys((*(policy.tolerances or {}), *policy.reported))
    return tuple(rule for rule in rules if not any(_longest((rule,), name) for name in names))


def told(policy: Policy) -> str:
    """Print what a policy says in a line."""
    named = [f"{name} {100 * share:g}%" for name, share in (policy.tolerances or {}).items()]
    only = [f"{name} only reported" for name in policy.reported]
    tails = "tails may fail the build" if policy.tails == "fail" else "tails are reported"
    figures = [
        f"tolerance {100 * policy.tolerance:g}%",
        *named,
        *only,
        *policy.budgets,
        tails,
        f"counters {100 * policy.counter_tolerance:g}%",
    ]
    return ", ".join(figures)


def schema() -> dict[str, Any]:
    """Return the format of the section as JSON Schema (draft 2020-12), for editors that check as one types."""
    share = {"type": "string", "pattern": r"^\s*[0-9.eE+_]+\s*%\s*$", "examples": ["5%"]}
    rule = {"type": "string", "pattern": rf"^\s*([0-9.eE+_]+\s*%)?\s*({REPORT})?\s*$", "minLength": 2, "examples": ["3%", REPORT]}
    limit = {"type": "string", "pattern": r"[<>]", "examples": ["ttft_p95<500ms"]}
    gate = {
        "description": (Policy.__doc__ or "").strip(),
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "tolerance": share,
            "metrics": {"type": "object", "propertyNames": {"pattern": r"^[^*]*\*?$", "minLength": 1}, "additionalProperties": rule},
            "budgets": {"type": "array", "items": limit, "uniqueItems": True},
            "tails": {"enum": list(TAILS)},
            "counters": share,
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "policy of mlsys gate", "type": "object",
        "required": ["gate"], "properties": {"gate": gate},
    }  # fmt: skip


# ---------------------------------------------------------------- reading


class _Rule(NamedTuple):
    """A name, its tolerance where it has one of its own, and whether it is only reported."""

    name: str
    tolerance: float | None
    only_reported: bool


def _section(node: Node) -> Policy:
    found = node.section((), KEYS)
    changed: dict[str, Any] = {}
    if "tolerance" in found:
        changed["tolerance"] = _share(found["tolerance"])
    if "counters" in found:
        changed["counter_tolerance"] = _share(found["counters"])
    if "tails" in found:
        changed["tails"] = cast(Literal["report", "fail"], found["tails"].choice(TAILS))
    if "budgets" in found:
        changed["budgets"] = _budgets(found["budgets"].items())
    if "metrics" in found:
        changed |= _rules(_metrics(found["metrics"]))
    return Policy(**changed)


def _metrics(node: Node) -> list[_Rule]:
    if not isinstance(node.value, dict) or not node.value:
        raise node.complaint("where metrics and their tolerances are needed, e.g. {engine.step: 3%}")
    return [_rule(name, Node(value, node.file, f"{node.path}.{name}")) for name, value in node.value.items()]


def _assignment(text: str) -> _Rule:
    name, equals, value = text.partition("=")
    if not equals:
        raise BadInput(f"--metric: {text!r} is not NAME=TOLERANCE, e.g. engine.step=3%")
    return _rule(name.strip(), Node(value, f"--metric {name.strip()}"))


def _rule(name: object, node: Node) -> _Rule:
    if not isinstance(name, str) or not name or "*" in name[:-1]:
        raise BadInput(f"{node.where}: {name!r} is no name of a metric; a * may only stand at its end, e.g. 'memory.*'")
    words = node.value.split() if isinstance(node.value, str) else []
    if words and words[-1] == REPORT:
        shares = " ".join(words[:-1])
        return _Rule(name, _share(Node(shares, node.file, node.path)) if shares else None, True)
    return _Rule(name, _share(node), False)


def _rules(rules: Iterable[_Rule]) -> dict[str, Any]:
    """Return the fields of a policy; a name that comes twice goes by its last rule."""
    last = {rule.name: rule for rule in rules}.values()
    return {
        "tolerances": {rule.name: rule.tolerance for rule in last if rule.tolerance is not None} or None,
        "reported": tuple(rule.name for rule in last if rule.only_reported),
    }


def _rules_of(policy: Policy) -> list[_Rule]:
    tolerances = policy.tolerances or {}
    return [_Rule(name, tolerances.get(name), name in policy.reported) for name in dict.fromkeys((*tolerances, *policy.reported))]


def _share(node: Node) -> float:
    share = node.quantity(units.fraction)
    if not 0 < share < 1:
        raise BadInput(f"{node.where}: a tolerance of {node.value} cannot be used; give a share between 0% and 100%, e.g. 5%")
    return share


def _budgets(nodes: Iterable[Node]) -> tuple[str, ...]:
    """Return limits as they are printed, each checked where it stands."""
    limits: dict[str, str] = {}
    for node in nodes:
        for text in filter(str.strip, node.text().split(",")):
            name, limit = _limit(text, node)
            if name in limits:
                raise BadInput(f"{node.where}: limits {name} twice: {limits[name]} and {limit}")
            limits[name] = limit
    return tuple(limits.values())


def _limit(text: str, node: Node) -> tuple[str, str]:
    """Return what a limit is on, and how it is printed."""
    try:
        return absolute.parse(text).name, absolute.check(text)
    except BadInput as error:
        raise type(error)(f"{node.where}: {error}") from error


def _longest(patterns: Iterable[str], name: str) -> str | None:
    """Return the pattern that decides about a name: itself, else the longest beginning; None where none is about it."""
    about = [p for p in patterns if p == name or (p.endswith("*") and name.startswith(p[:-1]))]
    return max(about, key=lambda p: (p == name, len(p)), default=None)
