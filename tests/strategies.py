"""Hypothesis strategies for any of our types, built from their annotations."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Any

from hypothesis import strategies as st

from mlsys_bench.types import LatencyProfile, TrafficSummary

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
INTS = st.integers(-(2**63), 2**63 - 1)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
_LEAVES: dict[Any, st.SearchStrategy[Any]] = {float: FLOATS, int: INTS, str: TEXTS, bool: st.booleans(), type(None): st.none()}


def of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type as annotated: dataclasses, enums, literals, unions, tuples and dicts of them, at most three long."""
    if hint in _LEAVES:
        return _LEAVES[hint]
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return st.deferred(lambda: _instances(hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from(list(hint))
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(of, args))
    if origin is dict:
        return st.dictionaries(of(args[0]), of(args[1]), max_size=3)
    assert origin is tuple, f"no strategy for {hint}"
    if args[-1] is Ellipsis:
        return st.lists(of(args[0]), max_size=3).map(tuple)
    return st.tuples(*map(of, args))


def _instances(cls: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    if cls is LatencyProfile:
        return st.integers(0, 3).flatmap(lambda terms: _profiles(terms, hints))
    if cls is TrafficSummary:
        return st.sets(st.sampled_from(["1s", "0.25s", "1e+06s"])).flatmap(lambda windows: _summaries(windows, hints))
    return st.builds(cls, **{field.name: of(hints[field.name]) for field in dataclasses.fields(cls)})


def _profiles(terms: int, hints: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Profiles of so many terms: a coefficient each, and their covariances."""
    row = st.tuples(*[FLOATS] * terms)
    fitting = {
        "terms": st.lists(TEXTS, min_size=terms, max_size=terms, unique=True).map(tuple),
        "coefficients": row,
        "covariance": st.tuples(*[row] * terms),
    }
    return st.builds(LatencyProfile, **{name: fitting.get(name, of(hint)) for name, hint in hints.items()})


def _summaries(windows: set[str], hints: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Summaries of traffic in these windows."""
    fitting = {
        "dispersion": st.fixed_dictionaries(dict.fromkeys(sorted(windows), FLOATS)),
        "dispersion_intervals": st.fixed_dictionaries({}, optional=dict.fromkeys(sorted(windows), st.tuples(FLOATS, FLOATS))),
    }
    return st.builds(TrafficSummary, **{name: fitting.get(name, of(hint)) for name, hint in hints.items()})
