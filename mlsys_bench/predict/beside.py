"""What a profile says beside what was measured, row by row: the residuals a person reads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from mlsys_bench import latency
from mlsys_bench.checked import Check
from mlsys_bench.predict import opaque
from mlsys_bench.predict.experiment import Prediction
from mlsys_bench.predict.readers import Reading
from mlsys_bench.types import LatencyProfile

_Z90 = 1.6449  # of a two-sided normal interval


def steps(profile: LatencyProfile, residuals: Iterable[latency.Residual]) -> tuple[Check, ...]:
    """Return engine steps: each predicted time with the interval that the profile's residual gives it."""
    wide = math.exp(_Z90 * profile.residual_log_sd)
    return tuple(
        _check(f"{_size(r.features)}_s", r.predicted_s, r.predicted_s / wide, r.predicted_s * wide, r.measured_s) for r in residuals
    )


def readings(found: Sequence[Reading], predictions: Sequence[Prediction]) -> tuple[Check, ...]:
    """Return the figures of load levels that other tools measured."""
    by_key = {p.key: p.figures for p in predictions}
    rows = [
        (reading, name, value, by_key[reading.experiment.key][name])
        for reading in found
        for name, value in reading.experiment.measured.items()
        if name in by_key.get(reading.experiment.key, {})
    ]
    return tuple(_check(f"{reading.where}, {_load(reading)}: {name}", *figure, value) for reading, name, value, figure in rows)


def misfit(checks: Sequence[Check]) -> float:
    """Return by how much, as a logarithm, what was measured lies off in the median; 0 of nothing."""
    found = [abs(math.log(c.predicted / c.measured)) for c in checks if c.predicted and c.measured and c.predicted > 0 and c.measured > 0]
    return statistics.median(found) if found else 0.0


def levels(endpoint: opaque.Endpoint, found: Sequence[opaque.Level]) -> tuple[Check, ...]:
    """Return the figures of an opaque endpoint's load levels."""
    rows = [(at, opaque.predict(endpoint, at.rate_per_s, tuple(at.figures))) for at in found]
    return tuple(
        _check(f"{at.rate_per_s:.4g}/s: e2e_{name}_s", *said[name], value) for at, said in rows for name, value in at.figures.items()
    )


def _check(key: str, predicted: float, low: float, high: float, measured: float) -> Check:
    return Check(
        key=key,
        predicted=predicted,
        low=low,
        high=high if math.isfinite(high) else None,
        measured=measured,
        measured_low=None,
        measured_high=None,
        error_percent=100 * (predicted / measured - 1),
        inside=low <= measured <= high,
    )


def _load(reading: Reading) -> str:
    e = reading.experiment
    if e.rate_per_s is not None:
        return f"{e.rate_per_s:.4g}/s"
    return f"{e.concurrency} at a time" if e.concurrency else "all at once"


def _size(features: Sequence[float]) -> str:
    """Name a step by what it does."""
    decodes, kv, prefill, pairs, _ = features
    parts = [f"decode {decodes:.0f} x {kv / decodes:.0f}"] if decodes else []
    past = pairs / prefill - prefill / 2 if prefill else 0.0
    parts += [f"prefill {prefill:.0f}{f' after {past:.0f}' if past >= 1 else ''}"] if prefill else []
    return " + ".join(parts)
