"""Predictions beside what was measured: of one replica (`verify`), of the whole loop (`demo`), and what their errors are made of."""

from __future__ import annotations

from dataclasses import dataclass

from mlsys_bench.types import LoadTest, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One prediction beside its measurement.  `inside` is None where nothing could be measured."""

    key: str
    predicted: float
    low: float | None
    high: float | None
    measured: float | None
    measured_low: float | None
    measured_high: float | None
    error_percent: float | None
    inside: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """What the error of one figure is made of, all in percent of what was measured.  The three parts add up to the error.

    `arrivals_percent`: the prediction, of hours of such traffic, less a simulation of this run's very arrivals and lengths.
    `steps_percent`: that simulation less the same with steps as long as this run's own were: the machine has changed since it was measured,
    or was measured wrongly, and single steps scatter.
    `rest_percent`: what then remains: the simulator, HTTP and the client.
    """

    key: str
    error_percent: float
    arrivals_percent: float
    steps_percent: float
    rest_percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Causes:
    """Where the errors of a prediction come from, by the log of the server's own steps.

    `steps_longer`: by how much longer they took than the profile says of them, as a share (-0.1 for a tenth shorter): `all` steps, `decode`
    those of decodes alone, which mostly read memory, `prompt` those with prompt tokens, which mostly compute.
    `others_share`: of their time, in which others had the engine's core.
    """

    steps_longer: dict[str, float]
    others_share: float
    figures: tuple[Cause, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """A plan held against a load test of one replica.  `causes`: where its steps could be seen, that is of a replica started here.

    `missed`: the plan's limits that the replica broke for sure, failed requests counted as keeping none.
    """

    plan_file: str
    target: str
    rate_per_s: float
    checks: tuple[Check, ...]
    holds: bool
    measured: LoadTest
    notes: tuple[str, ...] = ()
    causes: Causes | None = None
    missed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """The whole loop on one machine: the plan, what was measured, how far apart they are and why."""

    plan: Plan
    measured: LoadTest
    prediction_error_percent: dict[str, float]
    checks: tuple[Check, ...]
    files: dict[str, str]
    took_s: dict[str, float]
    causes: Causes | None = None
