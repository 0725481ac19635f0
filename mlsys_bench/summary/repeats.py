"""Several runs of one load test -> one record: every run, and how far they lie apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlsys_bench import slo, stats
from mlsys_bench.loadtests import LoadTests, Spread
from mlsys_bench.types import LoadTest, Validity

STATS = ("mean", "p50", "p90", "p95", "p99")
RATES = ("request_rate_per_s", "output_tokens_per_s", "goodput_per_s", "goodput_ratio")


def repeated(runs: Sequence[LoadTest], seeds: Sequence[int]) -> LoadTests:
    """Return the record of repeated runs.  Raises ValueError without any."""
    worst = max(runs, key=lambda r: ("valid", "degraded", "invalid").index(r.validity.verdict)).validity
    reasons = dict.fromkeys(f"run {i}: {reason}" for i, r in enumerate(runs, start=1) for reason in r.validity.reasons)
    return LoadTests(
        runs=tuple(runs),
        seeds=tuple(seeds),
        spread={key: spread([figures(run).get(key) for run in runs]) for key in figures(runs[0])},
        validity=Validity(verdict=worst.verdict, reasons=tuple(reasons)),
    )


def figures(run: LoadTest) -> dict[str, float | None]:
    """Return every figure of a run that runs are compared by: 'ttft_p95_s', 'request_rate_per_s' …"""
    latencies = {
        f"{name}_{stat}_s": getattr(getattr(run, f"{name}_s"), stat, None) for name in (*slo.LATENCIES, "service") for stat in STATS
    }
    return {**latencies, **{name: getattr(run, name) for name in RATES}}


def spread(values: Sequence[float | None]) -> Spread:
    """Return mean, standard deviation and Student's interval of one figure over runs."""
    known = np.array([v for v in values if v is not None], dtype=np.float64)
    return Spread(
        values=tuple(values),
        mean=float(known.mean()) if len(known) else None,
        sd=float(known.std(ddof=1)) if len(known) > 1 else None,
        interval=stats.mean_interval(known),
    )
