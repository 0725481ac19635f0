"""Which function reads which model of the table, and the answer to one row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mlsys_bench.errors import MlsysError, Overload, unknown
from mlsys_bench.journeys.truth import day, systems
from mlsys_bench.journeys.truth.known import Known
from mlsys_bench.journeys.truth.parameters import Parameters
from mlsys_bench.journeys.truth.stations import KENDALL, station
from mlsys_bench.queueing.answer import EXACT, Effort

Reader = Callable[[str, Parameters, Effort], Known]
READERS: dict[str, Reader] = {
    "M/M/1-PS": station,
    "LLM-BD": systems.slots,
    "LLM-BD inferno README": systems.inferno,
    "LLM": systems.tokens,
    "TANDEM M/M/1": systems.in_line,
    "TANDEM M/M/c": systems.in_line,
    "JACKSON feedback": systems.feedback,
    "FORKJOIN": systems.forkjoin,
    "MAX of N iid exp (split, no queue)": systems.slowest,
    "PRIO M/M/c": systems.priorities,
    "PRIO M/M/1": systems.priorities,
    "PRIO-PR M/M/1": systems.priorities,
    "PRIO-PR M/M/c": systems.priorities,
    "LB": systems.balanced,
    "BATCH": systems.batches,
    "Mt/M/c": day.waves,
    "Mt/M/inf": day.unlimited,
    "COLDSTART Mt/M/ct": day.cold,
}


@dataclass(frozen=True, slots=True)
class Prediction:
    """One row's answer, or why there is none.  `expected_error` is relative; `name` is the method's, without the reason."""

    value: float | None
    expected_error: float | None
    method: str
    name: str


def known(model: str, parameters: str, effort: Effort) -> Known:
    """Return the system of a row, solved.  Raises MlsysError: what it has no answer for, and why."""
    reader = READERS.get(model) or (station if KENDALL.fullmatch(model) else None)
    if reader is None:
        raise unknown("model", model, [*READERS, "M/M/c", "M/G/c", "GI/G/c", "M/M/c/K"])
    return reader(model, Parameters(parameters), effort)


def predict(model: str, parameters: str, quantities: list[str], effort: Effort) -> list[Prediction]:
    """Return the answers to all rows about one system, which is solved once."""
    try:
        system = known(model, parameters, effort)
    except Overload as error:
        return [_overloaded(error, quantity) for quantity in quantities]
    except MlsysError as error:
        return [_none(str(error))] * len(quantities)
    except (ArithmeticError, ValueError) as error:  # one row's numerics must not cost the others theirs
        return [_none(f"the numerics failed with {type(error).__name__}: {error}")] * len(quantities)
    return [_read(system, quantity) for quantity in quantities]


def _read(system: Known, quantity: str) -> Prediction:
    try:
        value, error = system.read(quantity)
    except MlsysError as problem:
        return _none(str(problem))
    except (ArithmeticError, ValueError) as problem:
        return _none(f"the numerics failed with {type(problem).__name__}: {problem}")
    if not math.isfinite(value):
        return _none(f"{system.method} gives {value}")
    return Prediction(value, error, f"{system.method}: {system.why}", system.method)


def _overloaded(error: Overload, quantity: str) -> Prediction:
    """Return what can be said at or above saturation: that it is not stable, and nothing else."""
    if quantity == "stable":
        return Prediction(0.0, EXACT, f"stability: {error}", "stability")
    return _none(f"overload: {error}")


def _none(why: str) -> Prediction:
    return Prediction(None, None, f"not answered: {why}", "")
