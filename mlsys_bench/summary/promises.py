"""An SLO held against the requests of a run: which requests kept every limit themselves, and which limits the run kept."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from mlsys_bench import slo as limits
from mlsys_bench import stats, units
from mlsys_bench.summary.columns import OUTCOMES, Columns
from mlsys_bench.summary.requests import share_of
from mlsys_bench.types import SLO, Limit

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


def judged(inside: Columns, slo: SLO) -> dict[str, bool | None]:
    """Return whether each limit was kept, for the requests of its tenant where it names one; None where the sample is too small.

    A percentile of latencies is that of all requests: one that failed keeps no limit.  A mean is that of the answered.
    """
    return {limits.key(limit): _kept(limit, inside.where(_concerns(inside, limit)), slo) for limit in slo}


def _kept(limit: Limit, inside: Columns, slo: SLO) -> bool | None:
    ok = inside.where(inside.ok)
    if limit.metric in limits.SHARES:
        good = int(keeps_all(ok, slo).sum()) if limit.metric == "goodput" else len(ok)
        return limits.meets(limit, good / len(inside)) if len(inside) else None
    values = ok.gaps_s[0] if limit.metric == "itl" else _metric(ok, limit.metric)
    values = values[~np.isnan(values)]
    needed = 2 if limit.stat in ("mean", "p50") else stats.enough_for_quantile(share_of(limit.stat))
    if limit.stat == "mean":
        return limits.meets(limit, float(values.mean())) if len(values) >= needed else None
    failed = failed_share(inside)
    if failed > 0 and share_of(limit.stat) >= 1 - failed:
        return False if len(inside) >= needed else None
    if len(values) < needed:
        return None
    return limits.meets(limit, stats.quantile(values, share_of(limit.stat) / (1 - failed)))


def failed_share(inside: Columns) -> float:
    """Return the share of failed requests among those that failed or were answered: they come after all latencies of the others.

    Who was cancelled by the client or was under way at the end has not failed.
    """
    ok, other = int(inside.ok.sum()), [OUTCOMES.index(name) for name in ("ok", "cancelled", "unfinished")]
    failed = int((~np.isin(inside.outcome, other)).sum())
    return failed / (ok + failed) if failed else 0.0


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
