"""A calibration with realistic numbers."""

from __future__ import annotations

import dataclasses

from mlsys_bench.calibrations import Calibration, Client, Held, Step
from mlsys_bench.loadtests import Spread


def held(**changes: float) -> Held:
    """Return a run at 500/s that keeps every limit."""
    usual = Held(
        requests=1350, ttft_p50_error=0.0016, ttft_p99_error=0.0042, itl_p50_error=0.0001, bias_s=0.00016, lateness_p50_s=0.00006,
        lateness_p99_s=0.00031, achieved=1.0002, gap_cv=1.01, client_cpu_share=0.21, server_cpu_share=0.24, server_lateness_p99_s=0.0004,
    )  # fmt: skip
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]


def spread(*values: float) -> Spread:
    mean = sum(values) / len(values)
    return Spread(values=values, mean=mean, sd=0.1 * mean, interval=(0.9 * mean, 1.1 * mean))


def calibration() -> Calibration:
    """Two cores: one process holds 1,600/s, above it the server is the narrow point."""
    late = held(ttft_p99_error=0.061, server_cpu_share=0.97, server_lateness_p99_s=0.0061)
    client = Client(
        processes=1,
        trusted_rate_per_s=1600.0,
        limited_by="server",
        ttft_bias_s=spread(0.00016, 0.00018, 0.00017),
        lateness_p50_s=spread(0.00006, 0.00007, 0.00006),
        lateness_p99_s=spread(0.0003, 0.0004, 0.0005),
        requests_per_s=spread(21_000.0, 20_500.0, 21_400.0),
        streams_per_s=spread(6_900.0, 7_100.0, 7_000.0),
        ceiling_limited_by="client",
        steps=(
            Step(rate_per_s=800.0, runs=(held(),), missed=()),
            Step(rate_per_s=1600.0, runs=(held(), held(), held()), missed=()),
            Step(rate_per_s=3200.0, runs=(late,), missed=("TTFT p99 +6.1 % off the truth",), limit="server"),
        ),
    )
    return Calibration(clients=(client,), arrivals="poisson", tokens=32, ttft_s=0.1, itl_s=0.02, repeats=3, took_s=57.2)
