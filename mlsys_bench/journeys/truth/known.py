"""What is known of one system, under the names the table gives to its quantities."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from mlsys_bench.errors import UnknownName, unknown
from mlsys_bench.queueing.answer import EXACT, Answer, Effort
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.solve import solve
from mlsys_bench.queueing.station import System
from mlsys_bench.queueing.times import Time

QUANTILE = re.compile(r"(?:(?P<law>\w+)_)?p(?P<percent>\d\d+(?:\.\d+)?)")
MEAN = re.compile(r"(?:(?P<law>\w+)_)?mean")


class Number(NamedTuple):
    """A number of a system and its expected relative error; a function where it is costly and not every row asks for it."""

    value: float | Callable[[], float]
    expected_error: float = EXACT


@runtime_checkable
class Simulated(Protocol):
    """A simulated time: its quantiles and its mean have intervals."""

    def interval_s(self, p: float) -> tuple[float, float]:
        """Return the interval of the p-quantile."""

    def mean_interval_s(self) -> tuple[float, float]:
        """Return the interval of the mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A solved system: the laws of its times, its other numbers, how they were found, and how far off its laws may be (relative)."""

    laws: Mapping[str, Time]
    numbers: Mapping[str, Number]  # asked first: a mean that is exact where percentiles are simulated stands here
    method: str
    why: str
    expected_error: float

    def read(self, quantity: str) -> tuple[float, float]:
        """Return the value of a quantity and its expected relative error: `wait_p99`, `sojourn_mean`, `blocking` …

        Raises UnknownName for a quantity that this system does not have.
        """
        name = quantity.removesuffix("_published")
        if name in self.numbers:
            value, error = self.numbers[name]
            return value() if callable(value) else value, error
        if (found := QUANTILE.fullmatch(name)) and (found["law"] or "") in self.laws:
            return self._quantile(self.laws[found["law"] or ""], share_of(found["percent"]))
        if (found := MEAN.fullmatch(name)) and (found["law"] or "") in self.laws:
            return self._mean(self.laws[found["law"] or ""])
        raise self._unknown(quantity)

    def _quantile(self, time: Time, p: float) -> tuple[float, float]:
        value = time.quantile_s(p)
        return value, relative(time.interval_s(p), value) if isinstance(time, Simulated) else self.expected_error

    def _mean(self, time: Time) -> tuple[float, float]:
        return time.mean_s, relative(time.mean_interval_s(), time.mean_s) if isinstance(time, Simulated) else self.expected_error

    def _unknown(self, quantity: str) -> UnknownName:
        names = [f"{law}_{stat}".strip("_") for law in self.laws for stat in ("mean", "p50", "p90", "p95", "p99")]
        return unknown("quantity", quantity, [*self.numbers, *names])


def relative(interval: tuple[float, float], value: float) -> float:
    """Return half an interval's width as a share of the value, 0 where the value is 0."""
    return (interval[1] - interval[0]) / 2 / value if value else 0.0


def share_of(percent: str) -> float:
    """Return the share that a percentile's name means: '95' and '99.9' as they stand, '999' as 99.9."""
    return float(percent) / 100 if "." in percent or len(percent) == 2 else float(f"0.{percent}")


def solved(system: System, effort: Effort) -> Known:
    """Return a system answered by `queueing.solve`."""
    return of_answer(solve(system, tolerance=effort.tolerance, budget_s=effort.budget_s, seed=effort.seed))


def of_answer(answer: Answer) -> Known:
    """Return an answer under the table's names: its queue's, and those of each class (`wait1`, `sojourn2` …)."""
    laws: dict[str, Time] = {"wait": answer.queue.wait, "sojourn": answer.queue.sojourn}
    for i, queue in enumerate(answer.classes, start=1):
        laws |= {f"wait{i}": queue.wait, f"sojourn{i}": queue.sojourn}
    return Known(
        laws=laws,
        numbers=numbers_of(answer.queue, answer.expected_error),
        method=answer.method,
        why=answer.why,
        expected_error=answer.expected_error,
    )


def numbers_of(queue: Queue, error: float = EXACT) -> dict[str, Number]:
    """Return the numbers of a station that has a steady state, by all the names in use for them."""
    return {
        "stable": Number(1.0),
        "utilisation": Number(queue.utilisation),
        "throughput": Number(queue.throughput_per_s, error),
        "p_delay": Number(queue.p_wait, error),
        "wait_p_delay": Number(queue.p_wait, error),
        "blocking": Number(queue.p_blocked, error),
        "p_abandon": Number(queue.p_abandoned, error),
        "Lq_mean": Number(lambda: queue.mean_waiting, error),
        "mean_waiting": Number(lambda: queue.mean_waiting, error),
        "L_mean": Number(lambda: queue.mean_requests, error),
        "mean_in_system": Number(lambda: queue.mean_requests, error),
        "mean_in_service": Number(lambda: queue.throughput_per_s * (queue.sojourn_s - queue.wait_s), error),
    }
