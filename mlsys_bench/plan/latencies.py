"""What requests see, as samples: the common form of the analytic answer and of the simulated one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlsys_bench import slo
from mlsys_bench.types import SLO, Limit

Floats = npt.NDArray[np.float64]
STATS = ("p50", "p95", "p99")  # of every metric, beside those the SLO names


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Samples in seconds, one per request; `tpot_s` is NaN where there is no second token.  ITL has one per token, perhaps weighted."""

    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats
    itl_s: Floats
    itl_weights: Floats | None = None

    def value(self, metric: str, stat: str) -> float | None:
        """Return a statistic ('mean', 'p95', 'p99.9') of a metric, or None where no request has the metric."""
        samples: Floats = getattr(self, f"{metric}_s")
        weights = self.itl_weights if metric == "itl" else None
        if metric == "tpot":
            samples = samples[~np.isnan(samples)]
        if len(samples) == 0 or (weights is not None and not weights.sum() > 0):
            return None
        if stat == "mean":
            return float(np.average(samples, weights=weights))
        return _quantile(samples, float(stat[1:]) / 100, weights)

    def keys(self, limits: SLO) -> dict[str, float]:
        """Return `ttft_p50_s` … `e2e_p99_s`, the statistics that limits name, and `goodput` where one is asked for."""
        named = [(limit.metric, limit.stat) for limit in slo.latencies(limits)]
        wanted = dict.fromkeys([*((m, s) for m in slo.LATENCIES for s in STATS), *named])
        values = {f"{metric}_{stat}_s": self.value(metric, stat) for metric, stat in wanted}
        found = {key: value for key, value in values.items() if value is not None}
        if any(limit.metric == "goodput" for limit in limits):
            found["goodput"] = self.goodput(limits)
        return found

    def goodput(self, limits: SLO) -> float:
        """Return the share of requests that keep every limit on TTFT, TPOT and E2E themselves."""
        kept = np.ones(len(self.ttft_s), dtype=bool)
        for limit in slo.latencies(limits):
            if limit.metric != "itl":
                samples: Floats = getattr(self, f"{limit.metric}_s")
                kept &= np.isnan(samples) | (samples < limit.limit)
        return float(kept.mean())

    def excesses(self, limits: SLO) -> list[tuple[float, Limit]]:
        """Return value / limit of each limit, for goodput shortfall / allowance: below 1 it is kept.  Availability is not seen here."""
        found = []
        for limit in slo.latencies(limits):
            value = self.value(limit.metric, limit.stat)
            found.append((0.0 if value is None else value / limit.limit, limit))
        return found + [((1 - self.goodput(limits)) / (1 - limit.limit), limit) for limit in limits if limit.metric == "goodput"]


def _quantile(samples: Floats, p: float, weights: Floats | None) -> float:
    if weights is None:
        return float(np.quantile(samples, p))
    order = np.argsort(samples)
    reached = np.cumsum(weights[order])
    at = int(np.searchsorted(reached, p * reached[-1]))
    return float(samples[order[min(at, len(order) - 1)]])


def key_of(limit: Limit) -> str:
    """Return the key under which `Latencies.keys` holds a limit's figure."""
    return limit.metric if limit.metric == "goodput" else f"{limit.metric}_{limit.stat}_s"
