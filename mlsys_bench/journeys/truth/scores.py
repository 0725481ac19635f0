"""What a prediction may be off by, and by how much it is."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from mlsys_bench.backtests import Score
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys.truth.parameters import Parameters

EXACT = 1e-4
LEAST = 1e-5  # errors are relative to at least this: 1e-4 of it, 1e-9, is as exact as a value of 0 can be
SIMULATED = 0.02
BY_SCV = ((1.0, 0.02), (4.0, 0.05), (float("inf"), 0.10))  # M/G/c and GI/G/c, by the larger SCV of arrivals and service
GENERAL = ("M/G/1", "M/G/c", "GI/G/1", "GI/G/c")
ALWAYS_SIMULATED = ("M/G/c", "GI/G/1", "GI/G/c", "LLM")  # where the table does not name its source
SMALL_WAIT = 0.01  # of a service time: below it, a wait is compared in service times


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """A prediction beside a value: what it is off by and what it may be off by, both relative, and their ratio."""

    model: str
    quantity: str
    parameters: str
    error: float | None  # None: no prediction
    of_bar: float | None
    bar: float


def compare(row: dict[str, str], value: float, precision: float, predicted: float | None) -> Miss:
    """Return how far a prediction lies from its value."""
    model, quantity, parameters = row["model"], row["quantity"], row["parameters"]
    bar, half_widths = allowance(row, precision)
    scale = max(abs(value), LEAST)
    service_s, _ = _station(parameters)
    if bar > EXACT and quantity.startswith("wait_p") and abs(value) < SMALL_WAIT * service_s:
        scale = service_s
    error = None if predicted is None else abs(predicted - value)
    return Miss(
        model=model,
        quantity=quantity,
        parameters=parameters,
        error=None if error is None else error / scale,
        of_bar=None if error is None else error / max(bar * scale, half_widths),
        bar=bar,
    )


def allowance(row: dict[str, str], precision: float) -> tuple[float, float]:
    """Return what a row may be off by, relative, and the absolute error that its own precision excuses.

    Exact values: 1e-4.  Simulated ones: 2 %, more for stations with general laws of SCV above 1.  Of all: 1.5 times the precision the
    table gives, for nobody can be nearer to a value than it is to the truth.
    """
    model, source = row["model"], row.get("source", "").lower()
    simulated = "simulation" in source or (not source and (precision >= 1e-6 or model in ALWAYS_SIMULATED)) or model in ALWAYS_SIMULATED[:3]
    relative = EXACT if not simulated else _general(row["parameters"]) if model in GENERAL else SIMULATED
    return relative, 1.5 * precision


def _general(parameters: str) -> float:
    """Return the bar for general laws of arrivals and service."""
    _, scv = _station(parameters)
    return next(bar for most, bar in BY_SCV if scv <= most * (1 + 1e-9))


@functools.cache
def _station(parameters: str) -> tuple[float, float]:
    """Return the mean service time and the larger SCV of arrivals and service, as far as they can be read: strict bars otherwise."""
    try:
        p = Parameters(parameters)
        return p.number("mean_service", 1.0), max([p.law(name, 1.0).scv for name in ("arrival", "service") if p.has(name)], default=0.0)
    except BadInput:  # such a row has no prediction, and its method says why
        return 1.0, 0.0


def scores(misses: Iterable[Miss]) -> tuple[tuple[Score, ...], tuple[Score, ...]]:
    """Return the scores by model, and by model and quantity, in the order of the table."""
    by_model: dict[str, list[Miss]] = {}
    by_quantity: dict[tuple[str, str], list[Miss]] = {}
    for miss in misses:
        by_model.setdefault(miss.model, []).append(miss)
        by_quantity.setdefault((miss.model, miss.quantity), []).append(miss)
    ordered = sorted(by_quantity, key=lambda key: list(by_model).index(key[0]))
    return tuple(_score(m, None, rows) for m, rows in by_model.items()), tuple(_score(m, q, by_quantity[m, q]) for m, q in ordered)


def _score(model: str, quantity: str | None, rows: list[Miss]) -> Score:
    errors = [row.error for row in rows if row.error is not None]
    worst = max(rows, key=lambda row: -1.0 if row.of_bar is None else row.of_bar)
    return Score(
        model=model,
        quantity=quantity,
        rows=len(rows),
        answered=len(errors),
        within=sum(row.of_bar is not None and row.of_bar <= 1 for row in rows),
        median_error=statistics.median(errors) if errors else None,
        worst_error=max(errors) if errors else None,
        worst_of_bar=worst.of_bar,
        bars=(min(row.bar for row in rows), max(row.bar for row in rows)),
        worst_parameters=worst.parameters,
    )
