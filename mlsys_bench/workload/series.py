"""A rate that somebody wrote down: a file of times and rates, as a course that the rate of arrivals follows.

A CSV (or JSON lines, or Parquet) with a column of times and one of rates, in order of time.  `series:FILE` holds each rate until the next
time, the last for as long as the one before; `series:FILE:linear` goes straight from one to the next and ends at the last time.  After the
end it begins again.
"""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlsys_bench.errors import BadInput
from mlsys_bench.workload.rows import Table, opened
from mlsys_bench.workload.schedule import Floats

TIMES = ("time_s", "time", "t", "timestamp", "seconds", "date")
RATES = ("rate_per_s", "rate", "qps", "rps", "requests_per_s", "req/s", "value")
_STEPS = 60  # of a straight line between two rates, each at its mean
_FORM = "a file of two columns, time and rate, e.g. a CSV that begins with time_s,rate_per_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Rates between edges as multiples of their mean over time, played over and over."""

    name: str
    edges_s: tuple[float, ...]  # from 0
    levels: tuple[float, ...]  # one fewer
    mean_per_s: float  # what the file says, before it became a level of 1

    @property
    def peak(self) -> float:
        """The highest level."""
        return max(self.levels)

    @property
    def lasts_s(self) -> float:
        """How long it plays before it begins again."""
        return self.edges_s[-1]

    def steps(self, until_s: float, seed: np.random.SeedSequence) -> tuple[Floats, Floats]:
        """Return as many rounds as it takes."""
        rounds = int(until_s / self.lasts_s) + 1
        inner = np.asarray(self.edges_s[:-1])
        edges = (np.arange(rounds)[:, None] * self.lasts_s + inner[None, :]).ravel()
        return np.append(edges, rounds * self.lasts_s), np.tile(np.asarray(self.levels), rounds)


def read(path: Path, linear: bool) -> Series:
    """Return the course that a file holds.  Raises BadInput naming the line that cannot be."""
    times_s, rates = _columns(path)
    if len(times_s) < 2:
        raise BadInput(f"{path}: {len(times_s)} rate(s); a series needs at least two times with a rate each")
    edges, levels = _straight(times_s, rates) if linear else _held(times_s, rates)
    mean = float(np.sum(levels * np.diff(edges)) / (edges[-1] - edges[0]))
    if not mean > 0:
        raise BadInput(f"{path}: all its rates are 0; nothing would arrive")
    return Series(name=path.name, edges_s=tuple((edges - edges[0]).tolist()), levels=tuple((levels / mean).tolist()), mean_per_s=mean)


def _held(times_s: Floats, rates: Floats) -> tuple[Floats, Floats]:
    return np.append(times_s, 2 * times_s[-1] - times_s[-2]), rates


def _straight(times_s: Floats, rates: Floats) -> tuple[Floats, Floats]:
    """Return each straight line as steps that hold its mean, so that as many requests are expected by each edge as under the line."""
    pieces = np.where(np.diff(rates) == 0, 1, _STEPS)
    edges = [np.linspace(a, b, n, endpoint=False) for a, b, n in zip(times_s[:-1], times_s[1:], pieces, strict=True)]
    levels = [a + (b - a) * (np.arange(n) + 0.5) / n for a, b, n in zip(rates[:-1], rates[1:], pieces, strict=True)]
    return np.append(np.concatenate(edges), times_s[-1]), np.concatenate(levels)


def _columns(path: Path) -> tuple[Floats, Floats]:
    times: list[float] = []
    rates: list[float] = []
    with opened(path) as table:
        names = [_column(path, table, "time", TIMES), _column(path, table, "rate", RATES)]
        for line, (time, rate) in table.rows(names):
            times.append(_seconds(time, path, line))
            rates.append(_rate(rate, path, line))
            if len(times) > 1 and not times[-1] > times[-2]:
                raise BadInput(f"{path}: line {line}: time {time} does not come after the one before it; sort the file by time")
    return np.asarray(times), np.asarray(rates)


def _column(path: Path, table: Table, what: str, known: tuple[str, ...]) -> str:
    present = {name.strip().lower(): name for name in table.columns}
    for name in known:
        if name in present:
            return present[name]
    raise BadInput(f"{path}: no column of {what} ({', '.join(known[:4])}, …); it has {', '.join(table.columns)}; write {_FORM}")


def _seconds(given: object, path: Path, line: int) -> float:
    """Return a time as a number, or a date as seconds since 1970: only differences matter."""
    try:
        value = float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        try:
            moment = datetime.datetime.fromisoformat(str(given))
        except ValueError:
            raise BadInput(f"{path}: line {line}: {given!r} is no time; write seconds or a date like 2026-11-20T18:00") from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
    if not math.isfinite(value):
        raise BadInput(f"{path}: line {line}: {given!r} is no time; write seconds or a date like 2026-11-20T18:00")
    return value


def _rate(given: object, path: Path, line: int) -> float:
    try:
        value = float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise BadInput(f"{path}: line {line}: {given!r} is no rate; write requests per second, zero or more")
    return value
