"""Tables predicted row by row, and how far off: the record of `mlsys backtest`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mlsys_bench.types import Scalar


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How far the predictions of one quantity of one model lie from the values given.  Errors and bars are relative."""

    model: str
    quantity: str | None  # None: all quantities of the model
    rows: int  # with a value
    answered: int
    within: int  # answered, and no further off than the row's bar
    median_error: float | None  # None where nothing was answered
    worst_error: float | None
    worst_of_bar: float | None  # the worst error as a share of what its row allows; above 1 is a miss
    bars: tuple[float, float]  # least and largest bar of these rows
    worst_parameters: str  # of the row that comes closest to its bar, or misses it most


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """How far predictions of one result column lie from what was measured, for the rows of one kind.  All are relative.

    Rows that were measured together err together: intervals (90 %) are drawn over such groups, and the coverage counts groups.
    """

    split: str  # what the rows have in common: gpu, model, engine, seen, …
    value: str
    column: str
    rows: int
    groups: int
    mape: float
    mape_interval: tuple[float, float] | None
    median: float
    p90: float
    bias: float
    coverage: float
    coverage_interval: tuple[float, float] | None
    interval_score: float
    band_score: float  # what a constant band of ± mape would have scored
    peers: dict[str, tuple[float, float, int]] = field(
        default_factory=dict
    )  # another's mape, ours on the same rows, and how many those are


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """How fleets planned by prediction compare with those that measurements show to be needed.  Counts of rows.

    A fleet is `within` where it is off by one replica of ten at most, and the limit is `kept` where no fewer are rented than needed.
    `safe` is the same for the upper end of the interval.  Sizes are rented over needed, medians.
    """

    split: str
    value: str
    limit: str
    rows: int
    groups: int
    within: int
    kept: int
    safe: int
    size: float
    safe_size: float
    median_error: float  # of replicas, not rounded
    p90_error: float
    coverage: float
    coverage_interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choosing:
    """What the cheapest configuration by prediction truly costs more than the truly cheapest, over many limits that were drawn."""

    table: str
    options: int
    groups: int
    decisions: int
    median: float
    median_interval: tuple[float, float] | None
    p90: float
    p90_interval: tuple[float, float] | None
    mean: float
    missed: float  # share of first choices that truly miss the limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Deciding:
    """What the gate says of one recorded arm beside the baseline when sessions are drawn as launch pairs.  Shares of jobs.

    Intervals (90 %) are drawn over sessions, those are what is independent, and no narrower than so many jobs allow.
    `metric` is None where all that may fail decide together.
    """

    source: str
    arm: str
    metric: str | None
    tolerance: float
    same: bool  # the arm is the same program, and pairs are turned round at random
    sessions: int
    change: float  # geometric mean over sessions, candidate over baseline, less 1
    sd: float  # of the log ratio of a pair
    regression: float
    regression_interval: tuple[float, float]
    improved: float
    improved_interval: tuple[float, float]
    passed: float
    passed_interval: tuple[float, float]
    inconclusive: float
    inconclusive_interval: tuple[float, float]
    pairs: float  # mean launches of each side
    pairs_interval: tuple[float, float]
    may_fail: bool = True  # a build; what may not is reported only


@dataclass(frozen=True, slots=True, kw_only=True)
class Backtest:
    """A table predicted row by row, and its errors where the table gives results."""

    table: Literal["queueing", "llm", "plan", "gate"]
    source: str
    rows: int
    answered: int
    by_model: tuple[Score, ...] = ()
    scores: tuple[Score, ...] = ()  # by model and quantity
    methods: dict[str, int]  # rows answered by each method
    unanswered: dict[str, int]  # rows by the reason why there is no prediction
    predictions: tuple[dict[str, Scalar], ...]  # the table's columns, then what was predicted
    errors: tuple[Errors, ...] = ()
    notes: tuple[str, ...] = ()
    sizing: tuple[Sizing, ...] = ()
    choosing: tuple[Choosing, ...] = ()
    deciding: tuple[Deciding, ...] = ()
