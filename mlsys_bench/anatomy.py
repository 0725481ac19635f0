"""Where a decode step's time goes: operators timed alone, times how often a step runs them, beside the step itself.

    tables(measurements)   one `Anatomy` per decode step of a bench record that there are operators for; pure arithmetic
    Anatomy.rows           operators, each with its share of the step; what they leave over is `residual_s`: launch and Python overhead
    Anatomy.parts          the same step by the engine's own clock (`engine.part`): the second way, measured inside the step

A step beside others' work (`engine.step` has a neighbour on the next core where there is one) would not be the sum of operators that had
the machine for themselves; so the step is that of `engine.part`, which was measured among them, and `engine.step` only without it.

Rows and residual add up to the step exactly.  An operator that was not measured at the step's very batch or context is interpolated
between its neighbours, and its row says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlsys_bench import models
from mlsys_bench.errors import UnknownName
from mlsys_bench.samples import count, flagged, kept
from mlsys_bench.types import Measurement, Scalar

STEP, PART, HOST, READ = "engine.step", "engine.part", "engine.host", "memory.read"
WHOLE = "step"  # the part that is all of it
RESIDUAL = "launch/Python overhead"
OF_A_RUN = ("device", "threads", "pinned_cores", "model", "precision", "kv", "backend")  # what an operator and its step must share
FARTHEST = 2.0  # times the longest context measured: beyond, attention is not guessed
Group = Literal["linears", "between", "host"]
Points = Mapping[float, Measurement]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One class of operators in a step.  `is_measured`: at this very batch and context, not between neighbours."""

    operator: str
    group: Group  # whether the engine's clock counts it among products with weights, or between them, or outside its model
    count: int
    each_s: float
    total_s: float
    share: float  # of the step
    bytes_per_s: float | None
    of_read: float | None  # share of what this machine reads from memory at best
    is_measured: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """A decode step taken apart."""

    model: str
    precision: str
    batch: int
    context_tokens: float  # mean of the batch
    step_s: float
    rows: tuple[Row, ...]  # from the longest to the shortest
    residual_s: float  # of the step, in no row; below 0 where operators take longer alone than in the step
    missing: tuple[str, ...]  # operators of a step that the record has no time of: theirs is in the residual
    interrupted: float = 0.0  # share of the step's samples in which others had its core: the residual then holds their time too
    parts: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds by the engine's own clock: linears, between, host

    @property
    def predicted_s(self) -> float:
        """Return what the operators alone say the step takes."""
        return self.step_s - self.residual_s

    @property
    def explained(self) -> float:
        """Return the share of the step that the operators account for."""
        return self.predicted_s / self.step_s

    def group_s(self, group: Group) -> float:
        """Return what the rows of a group take together."""
        return sum(row.total_s for row in self.rows if row.group == group)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operator:
    """A class of operators: where its times are, and how often a step runs it."""

    name: str
    group: Group
    count: int
    measured: str  # name of the benchmark
    such: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)  # its parameters
    includes: str | None = None  # an operator of its own row that was timed with it


def tables(measurements: Sequence[Measurement]) -> tuple[Anatomy, ...]:
    """Return every decode step that the engine's clock took apart; of a record without, each model's and precision's longest at batch 1."""
    measured = [m for m in measurements if m.launches and not m.skipped]
    parts = _parts(measured)
    wanted = [m for m in measured if _is_whole(m)] or _longest_alone(measured)
    found = [_table(m, measured, parts.get(_cell(m), {})) for m in sorted(wanted, key=lambda m: _cell(m)[-2:])]
    return tuple(table for table in found if table is not None and table.rows)


def _table(step: Measurement, measured: Sequence[Measurement], parts: dict[str, float]) -> Anatomy | None:
    model, precision = (str(step.parameters[name]) for name in ("model", "precision"))
    try:
        a = models.find(model)
    except UnknownName:
        return None
    mine = [m for m in measured if _is_of(m, step)]
    batch, kv_tokens = float(step.parameters["decode_seqs"] or 0), float(step.parameters["decode_kv_tokens"] or 0)
    step_s, read = _seconds(step), _ceiling(mine)
    every: dict[str, Row | None] = {}
    for o in _operators(a):
        every[o.name] = _row(o, mine, batch, kv_tokens / batch, step_s, read, without=every.get(o.includes or ""))
    rows = tuple(sorted((row for row in every.values() if row is not None), key=lambda row: -row.total_s))
    return Anatomy(
        model=model, precision=precision, batch=round(batch), context_tokens=kv_tokens / batch, step_s=step_s, rows=rows,
        residual_s=step_s - sum(row.total_s for row in rows), parts=parts,
        missing=tuple(name for name, row in every.items() if row is None), interrupted=flagged(step) / max(1, count(step)),
    )  # fmt: skip


def _operators(a: models.Architecture) -> list[_Operator]:
    """Return what a decode step of a dense decoder runs.  Norms: two a layer and one before the head."""
    each = a.layers
    linears = [_linear(layer, each) for layer in ("qkv", "out", "gate_up", "down")]
    return [
        *linears,
        _linear("head", 1),
        _Operator(name="attention", group="between", count=each, measured="op.attention.decode"),
        _Operator(name="norm", group="between", count=2 * each + 1, measured="op.norm"),
        _Operator(name="rope_append", group="between", count=each, measured="op.rope_append"),
        _Operator(name="swiglu", group="between", count=each, measured="op.swiglu"),
        _Operator(name="embedding", group="between", count=1, measured="op.embedding"),
        _Operator(name="sample", group="host", count=1, measured="op.sample", such={"policy": "argmax"}),
        _Operator(name="scheduler", group="host", count=1, measured=HOST, includes="sample"),
    ]


def _linear(layer: str, count: int) -> _Operator:
    return _Operator(name=layer, group="linears", count=count, measured="op.linear", such={"layer": layer})


# ---------------------------------------------------------------- one operator


def _row(
    o: _Operator, mine: Iterable[Measurement], batch: float, context: float, step_s: float, read: float | None, without: Row | None
) -> Row | None:
    such = [m for m in mine if m.name == o.measured and all(m.parameters.get(k) == v for k, v in o.such.items())]
    took = _attention(such, batch, context) if o.name == "attention" else _by_rows(such, batch)
    if took is None:
        return None
    each_s, moved, is_measured = took
    if without is not None:
        each_s = max(0.0, each_s - without.each_s)
    rate = moved / each_s if moved else None
    return Row(
        operator=o.name, group=o.group, count=o.count, each_s=each_s, total_s=o.count * each_s, share=o.count * each_s / step_s,
        bytes_per_s=rate, of_read=rate / read if rate and read else None, is_measured=is_measured,
    )  # fmt: skip


def _by_rows(such: Iterable[Measurement], batch: float) -> tuple[float, float, bool] | None:
    """Return seconds and bytes of an operator on so many rows, and whether that was measured."""
    return _between({_number(m, "m"): m for m in such}, batch)


def _attention(such: Sequence[Measurement], batch: float, context: float) -> tuple[float, float, bool] | None:
    """Return seconds and bytes of attention: along contexts at this batch, or else along the tokens of all sequences together.

    What is attended to is read once, so that time grows with it, from nothing at no context.
    """
    alike = {_number(m, "context_tokens"): m for m in such if _number(m, "batch") == batch}
    if alike:
        return _between(alike, context, from_zero=True)
    found = _between({_number(m, "context_tokens") * _number(m, "batch"): m for m in such}, context * batch, from_zero=True)
    return None if found is None else (*found[:2], False)


def _between(points: Points, at: float, *, from_zero: bool = False) -> tuple[float, float, bool] | None:
    """Return seconds and bytes at a place: those measured there, or between its neighbours on a line; None beyond them."""
    if not points:
        return None
    places = sorted(points)
    near = min(places, key=lambda place: abs(place - at))
    if at > places[-1] * (FARTHEST if from_zero else 1) or (at < places[0] and not from_zero):
        return None
    seconds, moved = (_line(points, places, at, value, from_zero) for value in (_seconds, _bytes))
    return seconds, moved, abs(near - at) <= 0.02 * at


def _line(points: Points, places: Sequence[float], at: float, value: Callable[[Measurement], float], from_zero: bool) -> float:
    x, y = list(places), [value(points[place]) for place in places]
    if from_zero:
        x, y = [0.0, *x], [0.0, *y]
    if at > x[-1]:
        return y[-1] * at / x[-1]
    return float(np.interp(at, x, y))


# ---------------------------------------------------------------- reading measurements


def _seconds(m: Measurement) -> float:
    """Return the median time of one call, whatever its unit."""
    median = float(np.median(kept(m)))
    if m.unit == "s":
        return median
    assert m.work is not None, f"{m.name} is a rate of work"
    return (m.work.bytes if m.unit == "B/s" else m.work.flops) / median


def _bytes(m: Measurement) -> float:
    return m.work.bytes if m.work else 0.0


def _number(m: Measurement, name: str) -> float:
    return float(m.parameters.get(name) or 0)


def _ceiling(measured: Iterable[Measurement]) -> float | None:
    return max((float(np.median(kept(m))) for m in measured if m.name == READ), default=None)


def _is_whole(m: Measurement) -> bool:
    return m.name == PART and m.parameters["part"] == WHOLE


def _is_decode(m: Measurement) -> bool:
    return m.name == STEP and _number(m, "decode_seqs") > 0 and not _number(m, "prefill_tokens")


def _is_of(m: Measurement, step: Measurement) -> bool:
    """Say whether an operator was measured in the step's model, precision and layout, as far as it says."""
    return all(_same(m.parameters[name], step.parameters[name]) for name in OF_A_RUN if name in m.parameters and name in step.parameters)


def _same(a: Scalar, b: Scalar) -> bool:
    return models.ENGINE_ALIASES.get(str(a), str(a)) == models.ENGINE_ALIASES.get(str(b), str(b))


def _cell(m: Measurement) -> tuple[str, str, float, float]:
    p = m.parameters
    return str(p.get("model")), str(p.get("precision")), _number(m, "decode_seqs"), _number(m, "decode_kv_tokens")


def _parts(measured: Iterable[Measurement]) -> dict[tuple[str, str, float, float], dict[str, float]]:
    found: dict[tuple[str, str, float, float], dict[str, float]] = {}
    for m in measured:
        if m.name == PART and not _is_whole(m):
            found.setdefault(_cell(m), {})[str(m.parameters["part"])] = _seconds(m)
    return found


def _longest_alone(measured: Iterable[Measurement]) -> list[Measurement]:
    longest: dict[tuple[str, str], Measurement] = {}
    alone = (m for m in measured if _is_decode(m) and _number(m, "decode_seqs") == 1)
    for m in sorted(alone, key=lambda m: _number(m, "decode_kv_tokens")):
        longest[_cell(m)[:2]] = m
    return list(longest.values())
