"""A sweep and a search with realistic numbers, for tests of what people read."""

from __future__ import annotations

import dataclasses

from mlsys_bench import summary
from mlsys_bench.loadlimits import Knee, LoadMax, LoadSweep, Probe, Shown, SweptLevel
from mlsys_bench.types import LatencySummary, LoadTest, Validity


def latencies(p95_s: float, n: int = 900) -> LatencySummary:
    """Return a latency with half its p95 as median."""
    return LatencySummary(
        count=n, mean=0.55 * p95_s, p50=0.5 * p95_s, p90=0.9 * p95_s, p95=p95_s, p99=None,
        intervals={"p50": (0.45 * p95_s, 0.55 * p95_s), "p95": (0.9 * p95_s, 1.15 * p95_s)}, too_few=("p99",),
    )  # fmt: skip


def level(rate_per_s: float, p95_s: float) -> SweptLevel:
    """Return a level with this p95 of E2E."""
    test = LoadTest(
        source="loadtest", target="http://127.0.0.1:8000 (tiny)", arrivals="poisson", offered_rate_per_s=rate_per_s,
        requests=round(10 * rate_per_s), ok=round(10 * rate_per_s), errors={}, duration_s=10.0, request_rate_per_s=0.99 * rate_per_s,
        output_tokens_per_s=32 * rate_per_s, goodput_per_s=0.98 * rate_per_s, goodput_ratio=0.98, goodput_interval=(0.96, 0.99),
        slo="ttft_p99<500ms", slo_met={"ttft_p99": True}, lateness_s=None, ttft_s=latencies(0.4 * p95_s), tpot_s=latencies(0.002),
        itl_s=latencies(0.002), e2e_s=latencies(p95_s), formulas=dict(summary.FORMULAS),
        validity=Validity(verdict="degraded", reasons=(f"p99 {rate_per_s:g} ms late: lower the rate",)),
    )  # fmt: skip
    return SweptLevel(rate_per_s=rate_per_s, over=False, in_flight=3, test=test)


def sweep() -> LoadSweep:
    """Return four levels, the last of which falls behind."""
    return LoadSweep(
        target="http://127.0.0.1:8000 (tiny)", arrivals="poisson", slo="ttft_p99<500ms", seed=0,
        levels=(level(10.0, 0.1), level(50.0, 0.11), level(90.0, 0.25), dataclasses.replace(level(100.0, 2.0), over=True, in_flight=88)),
        knee=Knee(figure="e2e_p95", factor=2.0, rate_per_s=79.2, interval_per_s=(71.5, 88.0), value_s=0.2), capacity_per_s=97.5,
        ended="saturated", took_s=95.0, notes=("levels of 10 s",),
    )  # fmt: skip


def loadmax() -> LoadMax:
    """Return a search of three levels with two limits."""
    return LoadMax(
        target="http://127.0.0.1:8000 (tiny)", arrivals="poisson", slo="ttft_p99<500ms,goodput>99%", seed=0, rate_per_s=92.7,
        interval_per_s=(90.6, 95.1), binding="ttft_p99", ended="narrow", idle=(shown(0.021, 0), shares(0)), capacity_per_s=97.5, users=64,
        probes=(
            probe(83.3, 5.0, (79.9, 101.0), 0.098), probe(101.0, 3.0, (87.0, 99.1), None, over=True), probe(93.0, 15.0, (90.6, 95.1), 0.41),
        ),
        needed_requests=299, budget_s=120.0, took_s=61.0, notes=("1 of 3 levels were left out: the client itself sent late",),
    )  # fmt: skip


def shown(value: float | None, misses: int) -> Shown:
    """Return a TTFT."""
    return Shown(limit="ttft_p99", value=value, misses=misses, requests=400, effective=36.0)


def shares(misses: int) -> Shown:
    """Return a goodput."""
    return Shown(limit="goodput", value=1 - misses / 400, misses=misses, requests=400, effective=36.0)


def probe(rate_per_s: float, duration_s: float, interval: tuple[float, float], ttft_s: float | None, over: bool = False) -> Probe:
    """Return a level of the search."""
    return Probe(
        rate_per_s=rate_per_s, duration_s=duration_s, completed_per_s=0.97 * rate_per_s, over=over, trusted=True,
        shown=(shown(ttft_s, 90 if over else 0), shares(90 if over else 0)), highest_per_s=sum(interval) / 2, interval_per_s=interval,
    )  # fmt: skip
