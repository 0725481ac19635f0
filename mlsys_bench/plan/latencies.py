"""What requests see, as samples: the common form of the analytic answer and of the simulated one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mlsys_bench import slo, stats
from mlsys_bench.types import SLO, Limit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
STATS = ("p50", "p95", "p99")  # of every metric, beside those the SLO names


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Samples in seconds, one per request; `tpot_s` is NaN where there is no second token.  ITL has one per token, perhaps weighted.

    Where there are several tenants, `tenants[tenant[i]]` is the one whose request i is, and likewise the gap i; without `itl_tenant` the
    gaps of all tenants follow one law, as in theory.
    """

    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats
    itl_s: Floats
    itl_weights: Floats | None = None
    tenant: Ints | None = None
    tenants: tuple[str, ...] = ()
    itl_tenant: Ints | None = None

    def value(self, metric: str, stat: str, tenant: str | None = None) -> float | None:
        """Return a statistic ('mean', 'p95', 'p99.9') of a metric, or None where no request has the metric; of all, or of one tenant."""
        return self.of_tenant(tenant)._values(metric, [stat]).get(stat)

    def of_tenant(self, name: str | None) -> Latencies:
        """Return what the requests of one tenant see; of all where none is named, or none are told apart."""
        if name is None or self.tenant is None:
            return self
        at = self.tenants.index(name) if name in self.tenants else -1
        mine, gaps = self.tenant == at, slice(None) if self.itl_tenant is None else self.itl_tenant == at
        return Latencies(
            ttft_s=self.ttft_s[mine],
            tpot_s=self.tpot_s[mine],
            e2e_s=self.e2e_s[mine],
            itl_s=self.itl_s[gaps],
            itl_weights=None if self.itl_weights is None else self.itl_weights[gaps],
        )

    def _values(self, metric: str, wanted: Sequence[str]) -> dict[str, float]:
        """Return statistics of a metric by name, none where no request has the metric."""
        samples: Floats = getattr(self, f"{metric}_s")
        weights = self.itl_weights if metric == "itl" else None
        if metric == "tpot":
            samples = samples[~np.isnan(samples)]
        if len(samples) == 0 or (weights is not None and not weights.sum() > 0):
            return {}
        ranks = [stat for stat in wanted if stat != "mean"]
        values = dict(zip(ranks, _quantiles(samples, [float(stat[1:]) / 100 for stat in ranks], weights), strict=True))
        return values if "mean" not in wanted else {**values, "mean": float(np.average(samples, weights=weights))}

    def keys(self, limits: SLO) -> dict[str, float]:
        """Return `ttft_p50_s` … `e2e_p99_s`, the statistics that limits name, and `goodput` where one is asked for.

        Tenants that limits name have the same keys of their own, such as `chat:ttft_p95_s`.
        """
        found = self._keys(slo.of_all(limits))
        for name in dict.fromkeys(limit.tenant for limit in limits if limit.tenant is not None):
            own = tuple(replace(limit, tenant=None) for limit in limits if limit.tenant == name)
            found |= {f"{name}:{key}": value for key, value in self.of_tenant(name)._keys(own).items()}
        return found

    def _keys(self, limits: SLO) -> dict[str, float]:
        named = [(limit.metric, limit.stat) for limit in slo.latencies(limits)]
        found: dict[str, float] = {}
        for metric in slo.LATENCIES:
            wanted = dict.fromkeys([*STATS, *(stat for m, stat in named if m == metric)])
            found |= {f"{metric}_{stat}_s": value for stat, value in self._values(metric, list(wanted)).items()}
        if any(limit.metric == "goodput" for limit in limits):
            found["goodput"] = self.goodput(limits)
        return found

    def goodput(self, limits: SLO) -> float:
        """Return the share of requests that keep every limit on TTFT, TPOT and E2E themselves."""
        if not len(self.ttft_s):
            return 1.0
        kept = np.ones(len(self.ttft_s), dtype=bool)
        for limit in slo.latencies(limits):
            if limit.metric != "itl":
                samples: Floats = getattr(self, f"{limit.metric}_s")
                kept &= np.isnan(samples) | (samples < limit.limit)
        return float(kept.mean())

    def excesses(self, limits: SLO) -> list[tuple[float, Limit]]:
        """Return value / limit of each limit, for goodput shortfall / allowance: below 1 it is kept.  Availability is not seen here."""
        whose = list(dict.fromkeys(limit.tenant for limit in limits))
        return [found for name in whose for found in self.of_tenant(name)._excesses(tuple(x for x in limits if x.tenant == name))]

    def _excesses(self, limits: SLO) -> list[tuple[float, Limit]]:
        found = []
        for limit in slo.latencies(limits):
            value = self._values(limit.metric, [limit.stat]).get(limit.stat)
            found.append((0.0 if value is None else value / limit.limit, limit))
        return found + [((1 - self.goodput(limits)) / (1 - limit.limit), limit) for limit in limits if limit.metric == "goodput"]


def _quantiles(samples: Floats, probabilities: list[float], weights: Floats | None) -> list[float]:
    if weights is None:
        return stats.quantiles(samples, probabilities)
    order = np.argsort(samples)
    reached = np.cumsum(weights[order])
    at = np.minimum(np.searchsorted(reached, np.array(probabilities) * reached[-1]), len(order) - 1)
    return samples[order[at]].tolist()  # type: ignore[no-any-return]


def key_of(limit: Limit) -> str:
    """Return the key under which `Latencies.keys` holds a limit's figure."""
    return limit.metric if limit.metric == "goodput" else f"{limit.metric}_{limit.stat}_s"
