"""Results over commits -> series with their lasting changes: which figure is drawn, and which runs belong together.

Results of different days differ by 20-40 % on a noisy machine, ratios of two sides that ran side by side do not.  So where a metric was
measured in pairs, its level is the chain of those ratios: each candidate stands at its baseline's level times their ratio.
"""

from __future__ import annotations

import datetime
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from mlsys_bench.errors import BadInput, unknown
from mlsys_bench.gate import changes, history
from mlsys_bench.gate.changes import Change
from mlsys_bench.gate.history import Metric, Result
from mlsys_bench.histories import Drawn, History, HistoryChange, HistoryPoint, HistorySeries
from mlsys_bench.summary.intervals import Z_90

Key = tuple[str, str, str]  # name, parameters, class of machine


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One metric of one result, or of several that compared the same two commits."""

    result: Result
    metric: Metric
    logs: np.ndarray[tuple[int], np.dtype[np.float64]]  # log ratios of its pairs

    @property
    def ratio(self) -> float:
        return float(self.logs.mean())

    @property
    def sd(self) -> float:
        return float(self.logs.std(ddof=1)) if len(self.logs) > 1 else 0.0


def trends(
    db: Path, *, metrics: Sequence[str] = (), since: str | None = None, branch: str | None = None, now: datetime.datetime | None = None
) -> History:
    """Return the series of a database with their changes.  `metrics` are names or patterns such as 'engine.*'.  Raises BadInput.

    Changes are looked for in the whole series; `since` ('30d' or a date) then leaves out what is older.
    """
    results = history.load(db, branch=branch)
    if branch is not None and not results:
        raise BadInput(f"{db}: holds no result of branch {branch!r}; --branch is what was given when it was added")
    kept = _named([_series(entries) for entries in _grouped(results).values()], metrics)
    start = _start(since, now or datetime.datetime.now(datetime.UTC)) if since else None
    cut = [part for one in kept if (part := _since(one, start)).points]
    order = sorted(cut, key=lambda one: (not one.changes, one.name, str(one.parameters), one.machine))
    return History(
        database=db.name, results=len(results), machines=len({r.machine for r in results}), series=tuple(order), since=since,
    )  # fmt: skip


def _grouped(results: Iterable[Result]) -> dict[Key, list[_Entry]]:
    found: dict[Key, list[_Entry]] = {}
    for result in results:
        for metric in result.metrics:
            key = (metric.name, f"{sorted(metric.parameters.items())} {metric.unit} {metric.better}", result.machine)
            found.setdefault(key, []).append(_Entry(result=result, metric=metric, logs=history.log_ratios(metric)))
    return found


def _named(series: list[HistorySeries], patterns: Sequence[str]) -> list[HistorySeries]:
    for pattern in patterns:
        if not any(fnmatchcase(one.name, pattern) for one in series):
            raise unknown("metric", pattern, {one.name for one in series})
    return [one for one in series if not patterns or any(fnmatchcase(one.name, pattern) for pattern in patterns)]


def _start(since: str, now: datetime.datetime) -> str:
    """Return the time a text stands for, as results carry it: '30d' before now, or a date."""
    days = re.fullmatch(r"(\d+)d", since)
    if days:
        return (now - datetime.timedelta(days=int(days[1]))).isoformat(timespec="seconds")
    try:
        at = datetime.datetime.fromisoformat(since)
    except ValueError as error:
        raise BadInput(f"--since {since}: is no date; write 2026-11-01, or 30d for the last thirty days") from error
    return (at if at.tzinfo else at.replace(tzinfo=datetime.UTC)).astimezone(datetime.UTC).isoformat(timespec="seconds")


def _since(series: HistorySeries, start: str | None) -> HistorySeries:
    if start is None:
        return series
    first = next((i for i, p in enumerate(series.points) if p.created >= start), len(series.points))
    later = tuple(replace(c, point=c.point - first) for c in series.changes if c.point >= first)
    return replace(series, points=series.points[first:], changes=later)


# ---------------------------------------------------------------- one series


def _series(entries: list[_Entry]) -> HistorySeries:
    first = entries[0].metric
    paired = [e for e in entries if len(e.logs)]
    if first.counted or not paired:
        return _absolute(entries)
    merged = _merged(paired)
    bases = {e.result.base_commit for e in merged}
    left = len(entries) - len(paired)
    notes = (f"{left} results without a baseline are left out: what other days measured is no ratio",) if left else ()
    if len(merged) >= 3 and len(bases) == 1 and None not in bases:
        return _fixed(merged, notes)
    return _chain(merged, notes)


def _merged(entries: Sequence[_Entry]) -> list[_Entry]:
    """Join runs that compared the same two commits: more pairs of one step, not more steps."""
    found: dict[object, _Entry] = {}
    for at, e in enumerate(entries):
        r = e.result
        key = (r.base_commit, r.commit) if r.base_commit and r.commit else at
        known = found.get(key)
        found[key] = e if known is None else replace(known, logs=np.concatenate([known.logs, e.logs]))
    return list(found.values())


def _absolute(entries: list[_Entry]) -> HistorySeries:
    values = [history.middle(e.metric) for e in entries]
    points = tuple(_point(e, value, _of_launches(e.metric)) for e, value in zip(entries, values, strict=True))
    if entries[0].metric.counted:
        found = [(at, b / a if a else 1.0) for at, (a, b) in enumerate(itertools.pairwise(values), start=1) if a != b]
        exact = tuple(_change(points, at, ratio, None, entries[0].metric.better) for at, ratio in found)
        return _made(entries, "absolute", points, exact, None)
    if min(values) <= 0:
        notes = ("holds values at or below zero: no changes are looked for",)
        return _made(entries, "absolute", points, (), None, notes)
    return _with_steps(entries, "absolute", points, [math.log(v) for v in values], ())


def _fixed(entries: list[_Entry], notes: tuple[str, ...]) -> HistorySeries:
    errors = changes.errors_of([0.0] * len(entries), [e.sd for e in entries], [len(e.logs) for e in entries])
    points = tuple(_point(e, math.exp(e.ratio), _around(e.ratio, error)) for e, error in zip(entries, errors.each, strict=True))
    return _with_steps(entries, "fixed", points, [e.ratio for e in entries], notes)


def _with_steps(
    entries: list[_Entry], drawn: Drawn, points: tuple[HistoryPoint, ...], logs: list[float], notes: tuple[str, ...]
) -> HistorySeries:
    fit = changes.steps(logs)
    if fit is None:
        few = f"{len(logs)} results: from {changes.ENOUGH} on, their noise is known and lasting changes are looked for"
        return _made(entries, drawn, points, (), None, (*notes, few))
    found = tuple(_sized(points, c, entries[0].metric.better) for c in fit.changes)
    return _made(entries, drawn, points, found, fit.noise, notes)


def _chain(entries: list[_Entry], notes: tuple[str, ...]) -> HistorySeries:
    """Give each candidate the level of its baseline times their ratio; a baseline nobody measured stands where the chain stood."""
    errors = changes.errors_of([e.ratio for e in entries], [e.sd for e in entries], [len(e.logs) for e in entries])
    levels: dict[str, tuple[float, float]] = {}  # of each commit, with the variance of all steps that lead to it
    points, unknown_bases, last = [], 0, (0.0, 0.0)
    for at, (e, error) in enumerate(zip(entries, errors.each, strict=True)):
        base, commit = e.result.base_commit, e.result.commit
        unknown_bases += at > 0 and base not in levels
        level, variance = levels.get(base, last) if base else last
        last = level + e.ratio, variance + float(error) ** 2
        levels |= {commit: last} if commit else {}
        points.append(_point(e, math.exp(last[0]), _around(last[0], error)))
    if unknown_bases:
        notes = (
            *notes,
            f"{unknown_bases} runs against a baseline that no earlier run measured: it is taken to stand where the chain stood",
        )
    found = tuple(_sized(points, c, entries[0].metric.better, chained=True) for c in changes.jumps([e.ratio for e in entries], errors))
    made = _made(entries, "chain", points, found, changes.Noise(sd=float(np.median(errors.each)), drift=0.0), notes)
    return replace(made, total=math.exp(last[0]), total_interval=_around(last[0], math.sqrt(last[1])))


def _point(e: _Entry, value: float, interval: tuple[float, float] | None) -> HistoryPoint:
    r = e.result
    return HistoryPoint(
        created=r.created, label=r.label, commit=r.commit, branch=r.branch, value=value, interval=interval,
        launches=len(e.logs) if e.metric.paired else len(e.metric.cand), ratio=math.exp(e.ratio) if len(e.logs) else None,
        base_commit=r.base_commit, measured=history.middle(e.metric),
    )  # fmt: skip


def _of_launches(metric: Metric) -> tuple[float, float] | None:
    """Return the interval of the mean of launches, by Student's t; None for one launch."""
    from scipy.special import stdtrit

    n = len(metric.cand)
    if n < 2 or min(metric.cand) <= 0 or metric.counted:
        return None
    logs = np.log(metric.cand)
    half = float(stdtrit(n - 1, 0.95)) * float(logs.std(ddof=1)) / math.sqrt(n)
    return math.exp(float(logs.mean()) - half), math.exp(float(logs.mean()) + half)


def _around(log: float, error: float) -> tuple[float, float]:
    return math.exp(log - Z_90 * error), math.exp(log + Z_90 * error)


def _sized(points: Sequence[HistoryPoint], c: Change, better: str, *, chained: bool = False) -> HistoryChange:
    found = _change(points, c.at, math.exp(c.size), _around(c.size, c.error), better)
    return replace(found, after_commit=points[c.at].base_commit) if chained else found


def _change(points: Sequence[HistoryPoint], at: int, ratio: float, interval: tuple[float, float] | None, better: str) -> HistoryChange:
    here, before = points[at], points[at - 1].commit
    return HistoryChange(
        point=at, created=here.created, commit=here.commit, after_commit=before, ratio=ratio, interval=interval,
        worse=(ratio > 1) == (better == "lower"),
    )  # fmt: skip


def _made(
    entries: Sequence[_Entry], drawn: Drawn, points: Sequence[HistoryPoint], found: tuple[HistoryChange, ...],
    noise: changes.Noise | None, notes: tuple[str, ...] = (),
) -> HistorySeries:  # fmt: skip
    m, r = entries[0].metric, entries[0].result
    return HistorySeries(
        name=m.name, parameters=m.parameters, unit=m.unit, better=m.better, machine=r.machine, machine_name=r.machine_name, drawn=drawn,
        points=tuple(points), changes=found, noise=noise.sd if noise else None, drift=(noise.drift or None) if noise else None, notes=notes,
    )  # fmt: skip
