"""Theory held against simulation: one replica at one load, every figure of the analytic answer beside that of the simulated scheduler.

The simulation has the same step times and the same scheduler as the engine; what may differ is the theory.  It is a few long runs: near
saturation, short ones have not yet seen the queue that theory speaks of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mlsys_bench import latency, workload
from mlsys_bench.batching import Limits
from mlsys_bench.plan import demand
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.plan.trial import after_s
from mlsys_bench.simulate import core
from mlsys_bench.types import LatencyProfile, Workload

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
KEYS = ("ttft_p50", "ttft_p95", "ttft_p99", "itl_mean", "itl_p50", "itl_p95", "itl_p99")
RUNS, BATCHES = 4, 10  # independent runs, and batches of neighbouring requests in each
_STUDENT, _STUDENT_OF_RUNS = 2.708, 5.841  # 99.5 % points, for all batches together and for the runs
_WARM = 0.2  # of the requests of a run, before any is counted
_LAST = 0.03  # and after


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """One figure: by theory, by simulation, and the 99 % interval of the latter."""

    key: str
    analytic_s: float
    simulated_s: float
    low_s: float
    high_s: float

    @property
    def error(self) -> float:
        """Return analytic / simulated - 1."""
        return self.analytic_s / self.simulated_s - 1

    def agrees(self, within: float) -> bool:
        """Say whether theory lies within a share of the simulated value, or inside its interval."""
        return abs(self.error) <= within or self.low_s <= self.analytic_s <= self.high_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the counted requests of one run met: one value each, and of the gaps between tokens the mean and a histogram."""

    latencies: dict[str, Floats]
    gap_s: float
    gaps: Ints


def compare(
    replica: Replica, traffic: Workload, load: float, *, requests: int, seed: int = 0, keys: Sequence[str] = KEYS
) -> tuple[Agreement, ...]:
    """Return theory beside simulation at a share of the replica's capacity, `requests` in all runs together.

    A key without a value is left out.
    """
    rate_per_s = load * replica.capacity_per_s
    predicted = replica.predict(rate_per_s)
    seeds = np.random.SeedSequence(seed).generate_state(RUNS).tolist()
    runs = [simulated(replica.profile, replica.limits, replace(traffic, rate_per_s=rate_per_s), requests // RUNS, s) for s in seeds]
    found = []
    for key in keys:
        metric, _, stat = key.partition("_")
        theory, seen = predicted.value(metric, stat), _of_gaps(runs, stat) if metric == "itl" else _of_requests(runs, metric, stat)
        if theory is not None and seen is not None:
            found.append(Agreement(key=key, analytic_s=theory, simulated_s=seen[0], low_s=seen[1], high_s=seen[2]))
    return tuple(found)


def _of_gaps(runs: Sequence[Run], stat: str) -> tuple[float, float, float] | None:
    """Return a statistic of all gaps, its interval from what runs differ in.

    That of a percentile, too, reaches as far as the shares of gaps below it are uncertain: where it falls between two kinds of step, those
    with and those without a prompt, all runs may have it on one side, and the other is no less likely.
    """
    if any(math.isnan(run.gap_s) for run in runs):
        return None
    if stat == "mean":
        mean, half = _of_runs([run.gap_s for run in runs])
        return mean, mean - half, mean + half
    p, together = float(stat[1:]) / 100, np.sum([run.gaps for run in runs], axis=0)
    value = core.gap_quantile_s(together, p)
    _, half = _of_runs([core.share_of_gaps(run.gaps, value) for run in runs])
    return value, core.gap_quantile_s(together, max(p - half, 0.0)), core.gap_quantile_s(together, min(p + half, 1.0))


def _of_runs(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and half of Student's interval."""
    return float(np.mean(values)), _STUDENT_OF_RUNS * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _of_requests(runs: Sequence[Run], metric: str, stat: str) -> tuple[float, float, float] | None:
    """Return a statistic of all requests.

    The interval of a mean is Student's over batches; that of a percentile reaches as far as the shares of requests below it, batch by
    batch, are uncertain.
    """
    batches = [batch for run in runs for batch in np.array_split(run.latencies[metric], BATCHES)]
    values = np.concatenate(batches)
    if not len(values):
        return None
    if stat == "mean":
        half = _STUDENT * float(np.std([b.mean() for b in batches], ddof=1)) / math.sqrt(len(batches))
        return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half
    p = float(stat[1:]) / 100
    value = float(np.quantile(values, p))
    half = _STUDENT * float(np.std([(b <= value).mean() for b in batches], ddof=1)) / math.sqrt(len(batches))
    low, high = np.quantile(values, [max(p - half, 0.0), min(p + half, 1.0)])
    return value, float(low), float(high)


def of(profile: LatencyProfile, limits: Limits, traffic: Workload) -> Replica:
    """Return the replica that theory answers for."""
    return Replica(profile, limits, demand.of(traffic).fitting(limits), samples=4 * demand.SAMPLES)


def simulated(profile: LatencyProfile, limits: Limits, traffic: Workload, n: int, seed: int) -> Run:
    """Return one run, its beginning and end left out."""
    schedule = workload.schedule(traffic, n=n, seed=seed)
    first, last = int(n * _WARM), n - int(n * _LAST)
    tracks = core.play(schedule, limits, profile=profile, gaps_from_s=float(schedule.scheduled_s[first]))
    kept = np.arange(n)[first:last][tracks.fate[first:last] == 200]
    back_s = after_s(tracks, schedule, latency.overhead(profile))[kept]
    ttft, e2e = (times[kept] - schedule.scheduled_s[kept] + back_s for times in (tracks.first_s, tracks.last_s))
    gaps = schedule.output_tokens[kept] - 1
    some = gaps > 0
    tpot = (e2e - ttft)[some] / gaps[some]
    gap_s = float((e2e - ttft).sum() / gaps.sum()) if some.any() else math.nan
    return Run(latencies={"ttft": ttft, "tpot": tpot, "e2e": e2e}, gap_s=gap_s, gaps=np.asarray(tracks.gaps))
