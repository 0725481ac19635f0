"""Traffic: when requests arrive and how long they are, drawn from laws or read from traces."""

from __future__ import annotations

from mlsys_bench.workload.draw import Schedule, arrival_times, draw_lengths, schedule
from mlsys_bench.workload.laws import (
    ArrivalLaw,
    checked_lengths,
    checked_rate,
    interarrival_scv,
    parse_arrivals,
    parse_lengths,
    show_lengths,
    synthetic,
)
from mlsys_bench.workload.moments import mean_tokens, scv
from mlsys_bench.workload.trace import LengthSummary, TrafficSummary, from_csv, read_trace, summarise_trace

__all__ = [
    "ArrivalLaw",
    "LengthSummary",
    "Schedule",
    "TrafficSummary",
    "arrival_times",
    "checked_lengths",
    "checked_rate",
    "draw_lengths",
    "from_csv",
    "interarrival_scv",
    "mean_tokens",
    "parse_arrivals",
    "parse_lengths",
    "read_trace",
    "schedule",
    "scv",
    "show_lengths",
    "summarise_trace",
    "synthetic",
]
