"""Replications of continuous batching until the asked half-width or the end of a budget: TTFT, E2E, TPOT and ITL with intervals."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlsys_bench.errors import Overload
from mlsys_bench.queueing.des.tokens import BINS, WIDTH, TokenVisits, saturated, simulate
from mlsys_bench.queueing.station import Tokens
from mlsys_bench.queueing.times import Floats, Time, check_share
from mlsys_bench.stats import mean_interval

RUNS = 16
LEVEL = 0.95
WARM_UP = 0.2  # of every run
LONGEST_START = 40_000  # requests left out of a first try; nearer saturation runs must grow longer before their start is forgotten


class Counted(Time):
    """A time known by counts in bins of 0.1 % relative width, one row per run; its mean is exact, its percentiles to half a bin."""

    def __init__(self, counts: Floats, edges_s: Floats, means_s: Floats) -> None:
        self.counts, self.edges_s, self.means_s = counts, edges_s, means_s
        self._pooled = counts.sum(axis=0)
        middles_s = np.sqrt(edges_s[:-1] * edges_s[1:])
        weights = counts.sum(axis=1) / counts.sum()
        self.mean_s = float(weights @ means_s)
        self.variance_s2 = float(self._pooled @ (middles_s - self.mean_s) ** 2 / self._pooled.sum())

    def survival(self, t_s: Floats) -> Floats:
        """Return the share of times above t, as if they lay evenly within a bin."""
        below = np.concatenate([[0.0], np.cumsum(self._pooled)]) / self._pooled.sum()
        return np.asarray(1 - np.interp(t_s, self.edges_s, below), dtype=np.float64)

    def quantile_s(self, p: float) -> float:
        """Return the p-quantile of all runs together."""
        return _quantile(self._pooled, self.edges_s, check_share(p))

    def interval_s(self, p: float, level: float = LEVEL) -> tuple[float, float]:
        """Return Student's interval of the p-quantile from the runs' own quantiles, around the pooled one."""
        own = [_quantile(row, self.edges_s, p) for row in self.counts]
        return _around(self.quantile_s(p), own, level)

    def mean_interval_s(self, level: float = LEVEL) -> tuple[float, float]:
        """Return Student's interval of the mean."""
        return _around(self.mean_s, self.means_s, level)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensSimulated:
    """One replica in steady state, simulated: its times with intervals, its batch, and how near saturation it is."""

    ttft: Counted
    e2e: Counted
    tpot: Counted | None  # None where no request has a second token; likewise itl
    itl: Counted | None
    mean_batch: float  # sequences in a step, mean over time, idle time included
    mean_batch_interval: tuple[float, float]
    saturated_per_s: float  # requests per second it ends when one is always waiting
    utilisation: float  # arrivals over that
    runs: int
    requests: int  # in each run, warm-up included
    seconds: float
    half_width: float  # widest relative half-width among the percentiles asked for
    reached: bool  # whether that is what was asked for


def replicate_tokens(
    system: Tokens, *, seed: int = 0, p: Sequence[float] = (0.5, 0.9, 0.95, 0.99), half_width: float = 0.02, budget_s: float = 2.0
) -> TokensSimulated:
    """Return TTFT, E2E, TPOT and ITL of a replica, simulated in runs that double until every percentile's interval is narrow enough.

    95 % intervals over 16 independent runs, the first fifth of each left out, by which time an empty start is forgotten.  Where KV
    memory binds, one long request at the head of the queue holds up all behind it: TTFT percentiles then need millions of requests.
    Checked against truth.csv (LLM, 48 rows) in runs of 0.3 to 1.9 million requests, 8 s each with numba, two seeds: errors up to 1.06 of
    max(2 %, 1.5 x the table's precision); in 2 s, with TTFT percentiles known to 10 % or so, up to 1.6 of it.
    Raises Overload when requests come faster than the replica ends them with one always waiting.
    """
    simulate(system, np.random.default_rng(seed), 1, 1)  # compiling is not part of the budget
    start = time.perf_counter()
    limit_per_s = saturation(system, seed=seed)
    forgotten = _forgotten(system, 1 / (system.arrivals.mean_s * limit_per_s))
    requests = int(min(forgotten, LONGEST_START) / WARM_UP)
    while True:
        began = time.perf_counter()
        found = _measure(system, seed, requests, limit_per_s, p)
        last_s, spent_s = time.perf_counter() - began, time.perf_counter() - start
        enough = found.half_width <= half_width and WARM_UP * requests >= forgotten
        more = min(max(2.0, (found.half_width / half_width) ** 2), 8.0, (budget_s - spent_s) / last_s)
        if enough or more < 1.5:
            return replace(found, seconds=spent_s, reached=enough)
        requests = int(requests * more)


def saturation(system: Tokens, *, seed: int = 0, runs: int = 8) -> float:
    """Return the requests per second a replica ends when one is always waiting; raise Overload when more come than that."""
    limit_per_s = float(saturated(system, np.random.default_rng(seed), runs, 2000 + 20 * system.max_batch).mean())
    utilisation = 1 / (system.arrivals.mean_s * limit_per_s)
    if utilisation >= 1:
        raise Overload(utilisation, 1, enough=math.floor(utilisation) + 1)
    return limit_per_s


def _forgotten(system: Tokens, utilisation: float) -> float:
    """Return after how many requests a run that began empty looks like one that never began.

    Ten times the batch it fills, and ten relaxation times of a queue in heavy traffic, (1 + SCV) / (1 - utilisation)^2 arrivals each.
    """
    return 10 * (min(system.max_batch, 200) + (1 + system.output_tokens.scv) / (1 - utilisation) ** 2)


def _measure(system: Tokens, seed: int, requests: int, limit_per_s: float, p: Sequence[float]) -> TokensSimulated:
    skip = int(WARM_UP * requests)
    rows = [_run(simulate(system, one, 1, requests, skip), skip) for one in np.random.default_rng(seed).spawn(RUNS)]
    edges_s = rows[0].edges_s
    ttft, e2e, tpot, itl = (_counted(np.stack([r.counts[k] for r in rows]), edges_s, [r.means_s[k] for r in rows]) for k in range(4))
    assert ttft is not None
    assert e2e is not None
    batches = [r.batch for r in rows]
    widest = max(_half_width(law, share) for law in (ttft, e2e, tpot, itl) if law is not None for share in p)
    return TokensSimulated(
        ttft=ttft,
        e2e=e2e,
        tpot=tpot,
        itl=itl,
        mean_batch=float(np.mean(batches)),
        mean_batch_interval=_around(float(np.mean(batches)), batches, LEVEL),
        saturated_per_s=limit_per_s,
        utilisation=1 / (system.arrivals.mean_s * limit_per_s),
        runs=RUNS,
        requests=requests,
        seconds=0.0,
        half_width=widest,
        reached=False,
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """One run after its warm-up: counts and means of TTFT, E2E, TPOT and ITL."""

    counts: tuple[Floats, ...]
    means_s: tuple[float, ...]
    edges_s: Floats
    batch: float


def _run(visits: TokenVisits, skip: int) -> _Row:
    tpot_s = visits.tpot_s[0, skip:]
    laws = (visits.ttft_s[0, skip:], visits.sojourn_s[0, skip:], tpot_s[~np.isnan(tpot_s)])
    counts = (*(_binned(x, visits.itl_edges_s[0]) for x in laws), visits.itl_counts[0])
    means_s = (*(float(x.mean()) if len(x) else 0.0 for x in laws), float(visits.itl_mean_s[0]))
    return _Row(counts, means_s, visits.itl_edges_s, float(visits.batch[0]))


def _binned(times_s: Floats, least_s: float) -> Floats:
    return np.bincount(np.clip((np.log(times_s / least_s) / WIDTH).astype(np.int64), 0, BINS - 1), minlength=BINS).astype(np.float64)


def _counted(counts: Floats, edges_s: Floats, means_s: Sequence[float]) -> Counted | None:
    some = counts.sum(axis=1) > 0
    return Counted(counts[some], edges_s, np.array(means_s)[some]) if some.any() else None


def _quantile(counts: Floats, edges_s: Floats, p: float) -> float:
    """Return the point below which a share p of the counts lies, evenly within its bin."""
    upto = np.cumsum(counts)
    b = int(np.searchsorted(upto, p * upto[-1]))
    share = 1 - (upto[b] - p * upto[-1]) / counts[b]
    return float(edges_s[b] * (edges_s[b + 1] / edges_s[b]) ** share)


def _around(middle: float, own: Sequence[float] | Floats, level: float) -> tuple[float, float]:
    """Return Student's interval over runs, moved to the pooled estimate, which has the smaller bias."""
    interval = mean_interval(own, level)
    half = math.inf if interval is None else (interval[1] - interval[0]) / 2
    return middle - half, middle + half


def _half_width(law: Counted, p: float) -> float:
    low, high = law.interval_s(p)
    return (high - low) / 2 / law.quantile_s(p)
