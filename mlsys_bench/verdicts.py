"""What the gate says of two sets of measurements, as its records hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlsys_bench.types import Bench, Machine, Scalar

Word = Literal["regression", "improved", "pass", "inconclusive", "suspect", "not_comparable"]
Kind = Literal["relative", "tail", "budget", "counter"]
WORST_FIRST: tuple[Word, ...] = ("regression", "not_comparable", "suspect", "inconclusive", "improved", "pass")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One metric of a comparison.  `ratio` is candidate over baseline; > 1 is worse when `better` is 'lower'."""

    name: str
    parameters: dict[str, Scalar]
    unit: str
    better: Literal["lower", "higher"]
    baseline: float | None
    candidate: float | None
    ratio: float | None
    interval: tuple[float, float] | None
    verdict: Word
    reason: str
    kind: Kind = "relative"
    may_fail: bool = True  # the build; what may not is reported only
    tolerance: float | None = None  # None: that of the verdict
    limit: float | None = None  # of a budget, in its unit
    pairs: int | None = None  # launch pairs that decided, or launches of the shorter side
    launch_sd: float | None = None  # of the log ratio, from pair to pair
    detectable: float | None = None  # the slowdown these would have found nine times in ten, as a share
    pairs_needed: int | None = None  # to find a slowdown of the tolerance nine times in ten; None: unknown, or more than anybody runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gate says of two sets of measurements."""

    verdict: Word
    findings: tuple[Finding, ...]
    tolerance: float
    reasons: tuple[str, ...]
    fingerprint_differences: tuple[str, ...] = ()


# ---------------------------------------------------------------- a gate that measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a build may and may not do.  Names are those of metrics, a trailing * stands for the rest; the longest match decides."""

    tolerance: float = 0.05
    tolerances: dict[str, float] | None = None  # per metric
    budgets: tuple[str, ...] = ()  # absolute limits, e.g. 'ttft_p95<500ms'
    reported: tuple[str, ...] = ()  # metrics that never fail the build
    tails: Literal["report", "fail"] = "report"
    counter_tolerance: float = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One side: what was measured."""

    kind: Literal["ref", "command", "wheel", "url", "file"]
    label: str  # as the person wrote it
    commit: str | None = None
    environment: str | None = None  # how its dependencies were found


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What surrounded one launch.  None: this machine does not tell."""

    pair: int
    side: Literal["base", "cand"]
    started_s: float  # since the run's start
    wall_s: float
    cpu_s: float | None = None
    involuntary: int | None = None
    steal_share: float | None = None  # of the machine's CPU time
    load: float | None = None  # mean over a minute
    other_cpu_share: float | None = None  # of the machine's CPU time that neither side used
    gpu: dict[str, Scalar] | None = None  # sm_clock_mhz, memory_clock_mhz, power_w, temperature_c, throttle


@dataclass(frozen=True, slots=True, kw_only=True)
class Contention:
    """Whether others disturbed the run."""

    verdict: Literal["quiet", "contended", "unknown"]
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRun:
    """Launches of both sides in pairs (`Launch.pair`), and the verdict, which `gate compare` decides again from them bit for bit."""

    base: Subject
    cand: Subject
    base_bench: Bench
    cand_bench: Bench
    base_machine: Machine
    cand_machine: Machine
    policy: Policy
    conditions: tuple[Conditions, ...]
    contention: Contention
    ended: Literal["decided", "last_look", "budget", "interrupted", "failed"]
    wall_s: float
    verdict: Verdict
    remarks: tuple[str, ...] = ()  # what was seen on the way


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What a runner can see of one metric: from pairs of launches of the same program."""

    name: str
    parameters: dict[str, Scalar]
    unit: str
    pairs: int
    launch_sd: float  # of the log ratio of a pair
    sd_interval: tuple[float, float]  # 90 %
    false_alarms: float  # share of gate runs on the same program that would fail, signs of pairs flipped
    false_alarm_interval: tuple[float, float]
    detectable: float  # the smallest slowdown found nine times in ten within the budget, as a share
    finest_tolerance: float  # below it the runner cannot decide within the budget


@dataclass(frozen=True, slots=True, kw_only=True)
class GateCalibration:
    """This runner's own noise: the same program on both sides."""

    run: GateRun
    budget_s: float
    pair_s: float  # median time of one pair of launches
    resolutions: tuple[Resolution, ...]
