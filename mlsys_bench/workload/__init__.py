"""Traffic: when requests arrive and how long they are, drawn from laws, read from traces or from production metrics."""

from __future__ import annotations

from mlsys_bench.types import LengthSummary, TrafficSummary
from mlsys_bench.workload.arrivals import ArrivalLaw, Bursts, at_peak, in_words, parse_arrivals, written_duration_s, written_rate_per_s
from mlsys_bench.workload.draw import arrival_times, draw_lengths, resampled, schedule, typical
from mlsys_bench.workload.laws import (
    checked_lengths,
    checked_rate,
    parse_lengths,
    show_lengths,
    synthetic,
)
from mlsys_bench.workload.moments import mean_tokens, scv
from mlsys_bench.workload.schedule import Schedule, merged, opened, rate_per_s, scaled_to_rate, sliced, sped_up, spread, starts_s, take
from mlsys_bench.workload.sessions import Sessions, sessions
from mlsys_bench.workload.tenants import first_come, only, ranks, with_tenants
from mlsys_bench.workload.trace import Trace, from_trace, resolution_s

__all__ = [
    "ArrivalLaw",
    "Bursts",
    "LengthSummary",
    "Schedule",
    "Sessions",
    "Trace",
    "TrafficSummary",
    "arrival_times",
    "at_peak",
    "checked_lengths",
    "checked_rate",
    "draw_lengths",
    "first_come",
    "from_trace",
    "in_words",
    "mean_tokens",
    "merged",
    "only",
    "opened",
    "parse_arrivals",
    "parse_lengths",
    "ranks",
    "rate_per_s",
    "resampled",
    "resolution_s",
    "scaled_to_rate",
    "schedule",
    "scv",
    "sessions",
    "show_lengths",
    "sliced",
    "sped_up",
    "spread",
    "starts_s",
    "synthetic",
    "take",
    "typical",
    "with_tenants",
    "written_duration_s",
    "written_rate_per_s",
]
