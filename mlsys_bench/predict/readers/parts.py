"""What every reader of other tools' results gives, and the little they share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlsys_bench import stats
from mlsys_bench.types import Lengths

STATS = ("p50", "p90", "p95", "p99")
_CONSTANT_CV = 0.01  # lengths that vary by less are called constant
_TEN_TO_NINETY = 2.563  # standard deviations between the 10th and the 90th percentile of a normal law
_ITL_APART = 0.15  # beyond this a tool's gaps are between chunks, not tokens
_ALL_SEATS = 0.9  # of the allowed concurrency in use: the cap, not the rate, sets the load
UNTOLD = "the file does not say under which load; its latencies are left out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One load level as a tool reports it.  `design` holds what the file says of the system: model, device, tp, …"""

    prompt_tokens: Lengths
    output_tokens: Lengths
    rate_per_s: float | None = None
    arrivals: str = "poisson"
    concurrency: int | None = None
    sent: int | None = None  # requests in all, where that is known of a closed loop: it starts from an empty system
    measured: Mapping[str, float]
    requests: int | None  # answered; None where the file does not say
    failed: int = 0
    duration_s: float | None = None  # from the first send to the last answer
    uneven: str | None = None  # why no one load stands for the run: its rate rose, it followed a trace
    design: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def at(document: Any, *path: str | int) -> Any:
    """Return what lies at a path of keys and places in JSON, or None where there is nothing."""
    for step in path:
        try:
            document = document[step]
        except (KeyError, IndexError, TypeError):  # no such key or place, or nothing to look into
            return None
    return document


def number(value: Any) -> float | None:
    """Return a finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def whole(value: Any, what: str) -> int:
    """Return a whole number as JSON has it.  Raises ValueError for anything else: a text, a fraction, infinity."""
    found = number(value)
    if found is None or found != int(found):
        raise ValueError(f"{what} is {value!r}, no whole number")
    return int(found)


def whole_or_none(value: Any, what: str) -> int | None:
    """Return the same, None where there is nothing."""
    return None if value is None else whole(value, what)


def under_cap(rate_per_s: float | None, cap: int | None, in_flight: float) -> tuple[float | None, int | None, tuple[str, ...]]:
    """Return rate and users of a run with a rate and a cap on requests in flight: one of the two was the load, and the notes say why."""
    if rate_per_s is not None and rate_per_s <= 0:
        raise ValueError(f"the rate is {rate_per_s:g}/s")
    if cap is not None and cap < 1:
        raise ValueError(f"the cap is {cap} requests in flight")
    if rate_per_s is None or cap is None:
        return rate_per_s, cap, ()
    if in_flight < _ALL_SEATS * cap:
        return rate_per_s, None, ()
    return None, cap, (f"{cap} requests were in flight nearly all the time: the cap, not {rate_per_s:g}/s, was the load",)


def first(*values: Any) -> Any:
    """Return the first value that is there."""
    return next((v for v in values if v is not None), None)


def lengths(mean: float, sd: float | None = None, longest: float | None = None) -> Lengths:
    """Return the law of token counts with this mean and spread; lognormal where they vary, for want of more."""
    cv = sd / mean if sd and mean > 0 else 0.0
    if cv < _CONSTANT_CV:
        return Lengths(mean=mean)
    return Lengths(dist="lognormal", mean=mean, cv=cv, max=math.ceil(longest) if longest else None)


def lengths_of(counts: Sequence[float]) -> Lengths:
    """Return the law of these token counts."""
    return lengths(float(np.mean(counts)), float(np.std(counts)), max(counts))


def lengths_from_tails(mean: float, p10: float | None, p90: float | None, longest: float | None) -> Lengths:
    """Return the law of token counts of which mean and tails are known."""
    sd = (p90 - p10) / _TEN_TO_NINETY if p10 is not None and p90 is not None else None
    return lengths(mean, sd, longest)


def figures(metric: str, values_s: Sequence[float]) -> dict[str, float]:
    """Return mean and percentiles of samples, under the names of `Experiment.measured`."""
    if not len(values_s):
        return {}
    found = {f"{metric}_mean_s": float(np.mean(values_s))}
    for name, value in zip(STATS, stats.quantiles(values_s, [float(p[1:]) / 100 for p in STATS]), strict=True):
        if len(values_s) >= 1 / (1 - float(name[1:]) / 100):  # a percentile beyond the sample is its maximum
            found[f"{metric}_{name}_s"] = value
    return found


def without_chunk_gaps(measured: dict[str, float]) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return the figures without inter-token latencies that are gaps between chunks, and what there is to say about it."""
    itl, tpot = measured.get("itl_mean_s"), measured.get("tpot_mean_s")
    if itl is None or tpot is None or abs(itl / tpot - 1) <= _ITL_APART:
        return measured, ()
    note = f"its inter-token latency is {itl / tpot:.2f} of the time per token: gaps between chunks, not tokens; left out"
    return {k: v for k, v in measured.items() if not k.startswith("itl_")}, (note,)
