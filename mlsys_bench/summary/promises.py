"""An SLO held against the requests of a run: which requests kept every limit themselves, and which limits the run kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mlsys_bench import slo as limits
from mlsys_bench import stats, units
from mlsys_bench.summary.columns import OUTCOMES, Columns
from mlsys_bench.summary.intervals import worth_at
from mlsys_bench.summary.requests import share_of
from mlsys_bench.types import SLO, Limit, LoadTest

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def keeps_all(ok: Columns, slo: SLO) -> Bools:
    """Say of each answered request whether it kept every latency limit itself.  What a request does not have cannot break a limit."""
    kept = np.ones(len(ok), dtype=bool)
    for limit in limits.latencies(slo):
        with np.errstate(invalid="ignore"):
            broken = _own(ok, limit) >= limit.limit  # NaN breaks nothing
        kept &= ~(broken & _concerns(ok, limit))
    return kept


class Held(NamedTuple):
    """A limit beside what it was held against: seconds, or a share; None where there is no such figure."""

    seen: float | None
    met: bool | None  # None where the requests do not tell


def judged(inside: Columns, slo: SLO, *, independent: bool = False) -> dict[str, Held]:
    """Return each limit with what was seen and whether it was kept, for the requests of its tenant where it names one.

    A percentile of latencies is that of all requests: one that failed keeps no limit.  A mean is that of the answered.  Who was given up
    by the client on purpose says nothing.  Requests still under way at the end may be answered at once or never: a limit is decided where
    both come to the same.  So is one where requests that resemble each other (unless `independent`) are worth enough for an interval.
    """
    asked = inside.where(inside.outcome != OUTCOMES.index("cancelled"))
    return {limits.key(limit): _held(limit, asked.where(_concerns(asked, limit)), slo, independent) for limit in slo}


def _held(limit: Limit, asked: Columns, slo: SLO, independent: bool) -> Held:
    answered = _ended(limit, asked, asked.told, slo, independent)
    never = _ended(limit, asked, asked.ok, slo, independent) if asked.under_way.any() else answered
    return answered if answered.met is never.met else Held(answered.seen, None)


def _ended(limit: Limit, asked: Columns, good: Bools, slo: SLO, independent: bool) -> Held:
    """Return a limit held against requests of which these were answered and the others failed."""
    if not len(asked):
        return Held(None, None)
    answered, failed = asked.where(good), float(1 - good.mean())
    if limit.metric in limits.SHARES:
        share = float(keeps_all(answered, slo).sum() if limit.metric == "goodput" else len(answered)) / len(asked)
        return Held(share, limits.meets(limit, share))
    values, groups = _values(limit, answered)
    if limit.stat == "mean":
        mean = float(values.mean()) if len(values) >= 2 else None
        return Held(mean, None if mean is None else limits.meets(limit, mean))
    p = share_of(limit.stat)
    needed = 2 if p == 0.5 else stats.enough_for_quantile(p)
    if failed > 0 and p >= 1 - failed:
        return Held(None, False if len(asked) >= needed else None)
    if len(values) < needed or (p != 0.5 and groups < stats.enough_for_quantile(0.5)):
        return Held(None, None)
    seen = stats.quantile(values, p / (1 - failed))
    if independent or p == 0.5 or limit.metric == "itl":
        return Held(seen, limits.meets(limit, seen))
    return Held(seen, _sure(limit, values, p / (1 - failed), seen))


def _sure(limit: Limit, values: Floats, p: float, seen: float) -> bool | None:
    """Return a verdict on a percentile of a series: that of the figure where it has an interval, else of the share beyond, where sure."""
    met = limits.meets(limit, seen)
    at_figure, at_limit = worth_at(values, (seen, limit.limit), p)
    beyond = float((values >= limit.limit).mean())
    if beyond == 0 or stats.quantile_ranks(at_figure, p) is not None:
        return met
    share = stats.wilson(at_limit * beyond, at_limit) or (0.0, 1.0)
    return True if share[1] < 1 - p else False if share[0] > 1 - p else None


def _values(limit: Limit, answered: Columns) -> tuple[Floats, int]:
    """Return what a limit is about, in the order of the schedule, and how many requests have it."""
    if limit.metric == "itl":
        gaps, sizes = answered.gaps_s
        return gaps, int((sizes > 0).sum())
    values = _metric(answered, limit.metric)
    values = values[~np.isnan(values)]
    return values, len(values)


def asked(run: LoadTest) -> int:
    """Return how many requests of a run an answer was wanted of to the end: who was given up by the client on purpose says nothing."""
    return run.requests - run.errors.get("cancelled", 0)


def failures(failed: Mapping[str, int], requests: int) -> tuple[float, str]:
    """Return the share of requests that failed, by how many each way, and the sentence that says so."""
    share = sum(failed.values()) / requests if requests else 0.0
    kinds = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(failed.items(), key=lambda pair: -pair[1]))
    return share, f"{units.show_share(share)} of the requests failed ({kinds}): latencies are of the others"


def _concerns(run: Columns, limit: Limit) -> Bools:
    if limit.tenant is None:
        return np.ones(len(run), dtype=bool)
    own: Bools = run.tenant == (run.tenants.index(limit.tenant) if limit.tenant in run.tenants else len(run.tenants))
    return own


def _own(ok: Columns, limit: Limit) -> Floats:
    """Return the figure of each request that a limit is about."""
    return _of_gaps(ok, limit.stat) if limit.metric == "itl" else _metric(ok, limit.metric)


def _metric(run: Columns, metric: str) -> Floats:
    return {"ttft": run.ttft_s, "tpot": run.tpot_s, "e2e": run.e2e_s}[metric]


def _of_gaps(ok: Columns, stat: str) -> Floats:
    """Return a statistic of the gaps of each request, NaN without gaps.  Percentiles as `stats.quantile` gives them."""
    gaps, sizes = ok.gaps_s
    owner = np.repeat(np.arange(len(ok)), sizes)
    found, some = np.full(len(ok), np.nan), sizes > 0
    if stat == "mean":
        found[some] = np.bincount(owner, gaps, minlength=len(ok))[some] / sizes[some]
        return found
    ordered, starts = gaps[np.lexsort((gaps, owner))], (np.cumsum(sizes) - sizes)[some]
    at = (sizes[some] - 1) * share_of(stat)
    below = at.astype(np.int64)
    low, high = ordered[starts + below], ordered[starts + np.minimum(below + 1, sizes[some] - 1)]
    found[some] = low + (high - low) * (at - below)
    return found
