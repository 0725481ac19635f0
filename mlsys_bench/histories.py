"""The record of `mlsys gate history show`: results over commits, and where they changed for good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlsys_bench.types import Scalar

Drawn = Literal["chain", "fixed", "absolute"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryPoint:
    """One result.  `value` is what is drawn: a level with the first result's baseline at 1, or what was measured, in the series' unit."""

    created: str  # ISO 8601
    label: str  # of the candidate, as the person wrote it
    commit: str | None
    branch: str | None
    value: float
    interval: tuple[float, float] | None  # 90 %, of this result's own launches
    launches: int  # or pairs of them
    ratio: float | None = None  # candidate over baseline, where both ran side by side
    base_commit: str | None = None
    measured: float | None = None  # the candidate's figure itself, in the series' unit


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryChange:
    """A lasting change: `point` is the first result after it, `after_commit` the last measured before it."""

    point: int
    created: str
    commit: str | None
    after_commit: str | None
    ratio: float  # after over before
    interval: tuple[float, float] | None  # 90 %; None: counted, so exact
    worse: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HistorySeries:
    """One metric on one class of machine over time.

    `drawn` is 'chain' (each level is its baseline's times the ratio of the two, which ran side by side), 'fixed' (ratios to the one
    baseline that all share) or 'absolute' (what was measured, day by day).
    """

    name: str
    parameters: dict[str, Scalar]
    unit: str
    better: Literal["lower", "higher"]
    machine: str  # digest of the hard fields
    machine_name: str
    drawn: Drawn
    points: tuple[HistoryPoint, ...]
    changes: tuple[HistoryChange, ...]
    noise: float | None  # sd of the logarithm from result to result; None: too few results, or counted
    total: float | None = None  # of ratios: the last level, the first result's baseline being 1
    total_interval: tuple[float, float] | None = None  # 90 %, all steps' errors together
    drift: float | None = None  # sd of what the machine wanders by from one result to the next, as a logarithm
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a database of results says, by metric and class of machine."""

    database: str
    results: int  # in the database
    machines: int  # classes of them
    series: tuple[HistorySeries, ...]
    since: str | None = None
