"""Samples of gauges and counters -> values on a grid of the run's seconds, and over its window."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlsys_bench.loadtest.serverside import names, text
from mlsys_bench.loadtest.serverside.names import Reading
from mlsys_bench.loadtest.serverside.watch import Looks
from mlsys_bench.workload import counters
from mlsys_bench.workload.metrics import canonical

Floats = npt.NDArray[np.float64]
_BRIDGED = 5  # so many looks in a row may be missing; longer gaps stay gaps


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One time series of one source, in seconds of the run.  `gap_s`: samples farther apart do not belong together."""

    labels: Mapping[str, str]
    times_s: Floats
    values: Floats
    gap_s: float

    def between(self, at_s: Floats, values: Floats) -> Floats:
        """Return values at these moments, along straight lines between the samples; NaN outside and in gaps."""
        found = np.interp(at_s, self.times_s, values, left=np.nan, right=np.nan)
        after = np.clip(np.searchsorted(self.times_s, at_s), 1, max(len(self.times_s) - 1, 1))
        if len(self.times_s) > 1:
            found[self.times_s[after] - self.times_s[after - 1] > self.gap_s] = np.nan
        return np.asarray(found)

    def cumulative(self) -> Floats:
        """Return what a counter counted since its first sample, over restarts of its server."""
        series = counters.Series(name="", labels={}, times_s=self.times_s, values=self.values)
        return np.cumsum(counters.increments(series, self.times_s[0]))


Lines = dict[str, list[Line]]  # by metric


def collect(looked: Sequence[Looks], t0_unix_s: float, model: str | None) -> Lines:
    """Return every time series by its metric, those of other models left out where labels tell them apart.

    A counter that appears after the first look of its source began at zero with that look: a first request of its kind made it.
    """
    found: Lines = {}
    for number, looks in enumerate(looked):
        moments = np.array(looks.times_s) - t0_unix_s
        gap_s = _BRIDGED * float(np.median(np.diff(moments))) if len(moments) > 1 else 0.0
        for (spelled_name, spelled), (times, values) in looks.samples.items():
            labels = {**text.labels(spelled), "page": str(number)}
            line = Line(labels=labels, times_s=np.array(times) - t0_unix_s, values=np.array(values), gap_s=gap_s)
            found.setdefault(canonical(spelled_name), []).append(_from_the_start(line, moments, spelled_name))
    return {name: _of_model(lines, model) for name, lines in found.items()}


def _from_the_start(line: Line, moments: Floats, name: str) -> Line:
    missing = moments[moments < line.times_s[0]]
    if not len(missing) or not name.endswith(("_total", "_count", "_sum")):
        return line
    times_s, values = np.append(missing, line.times_s), np.append(np.zeros(len(missing)), line.values)
    return Line(labels=line.labels, times_s=times_s, values=values, gap_s=line.gap_s)


def _of_model(lines: list[Line], model: str | None) -> list[Line]:
    own = [line for line in lines if model in {line.labels.get(label) for label in names.MODEL_LABELS}]
    return own or lines


# ---------------------------------------------------------------- one reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """A reading with the lines it is made of, all of one device or of all."""

    reading: Reading
    device: str | None
    of: list[Line]
    over: list[Line]

    def on(self, edges_s: Floats) -> Floats:
        """Return a value for each step between neighbouring edges, NaN where nothing is known."""
        if self.reading.kind in ("gauge", "share"):
            value = self._gauge(self.of, edges_s)
            if self.reading.kind == "share":
                value = _ratio(value, self._gauge(self.over, edges_s))
        else:
            value = _total(self.of, edges_s, _grown)
            value = value / np.diff(edges_s) if self.reading.kind == "rate" else _ratio(value, _total(self.over, edges_s, _grown))
        return self.reading.offset + self.reading.scale * value

    def window(self, window_s: tuple[float, float]) -> float | None:
        """Return the mean over a window: of a ratio over what was counted in it."""
        known = self.on(np.array(window_s))
        return float(known[0]) if np.isfinite(known[0]) else None

    def counted(self, window_s: tuple[float, float]) -> float:
        """Return how much the counter below the line grew in a window."""
        found = _total(self.over, np.array(window_s), _grown)
        return float(found[0]) if np.isfinite(found[0]) else 0.0

    def _gauge(self, lines: Sequence[Line], edges_s: Floats) -> Floats:
        stacked = np.array([_mean(line, edges_s) for line in lines])
        if self.reading.across == "sum":
            return np.asarray(stacked.sum(axis=0))  # NaN where one is not known: half a sum is none
        known = np.isfinite(stacked)
        total = np.where(known, stacked, 0.0).sum(axis=0)
        return _ratio(total, known.sum(axis=0).astype(float))


def found(lines: Lines) -> Iterator[Read]:
    """Yield every reading that has data: of readings of one name, for one device, the first."""
    taken: set[tuple[str, str | None]] = set()
    for reading in names.READINGS:
        of = _selected(lines, reading.of, reading)
        over = _selected(lines, reading.over, reading) if reading.over else []
        if not of or (reading.over and not over):
            continue
        by_device = _by_device(of, reading) if reading.by_device else {None: of}
        for device, own in by_device.items():
            if (reading.name, device) not in taken:
                taken.add((reading.name, device))
                yield Read(reading=reading, device=device, of=own, over=over)


def _selected(lines: Lines, name: str, reading: Reading) -> list[Line]:
    return [
        line
        for line in lines.get(name, ())
        if all(re.fullmatch(values, line.labels.get(label, "")) for label, values in reading.where.items())
    ]


def _by_device(lines: Sequence[Line], reading: Reading) -> dict[str | None, list[Line]]:
    """Return one line for each device; host or page stands before its name where several have devices.

    DCGM's exporter repeats a GPU for each pod that shares it, and the power of a whole GPU for each of its MIG instances.
    """
    hosts = {_host(line) for line in lines}
    devices: dict[str | None, list[Line]] = {}
    for line in lines:
        number = next((line.labels[label] for label in names.DEVICE_LABELS if label in line.labels), "0")
        instance = "" if reading.name in (names.ENERGY, names.POWER) else line.labels.get("GPU_I_ID", "")
        name = f"gpu {number}{'.' if instance else ''}{instance}" if number.isdigit() else number
        devices.setdefault(f"{_host(line)} {name}" if len(hosts) > 1 else name, []).append(line)
    return {name: [max(own, key=lambda line: len(line.times_s))] for name, own in devices.items()}


def _host(line: Line) -> str:
    return line.labels.get("Hostname") or f"page {int(line.labels['page']) + 1}"


# ---------------------------------------------------------------- one line on a grid


def _mean(line: Line, edges_s: Floats) -> Floats:
    """Return a gauge's mean of the samples in each step; where there is none, its value in the middle."""
    at = np.searchsorted(edges_s, line.times_s, side="right") - 1
    inside = (at >= 0) & (at < len(edges_s) - 1)
    total = np.bincount(at[inside], weights=line.values[inside], minlength=len(edges_s) - 1)
    count = np.bincount(at[inside], minlength=len(edges_s) - 1)
    middle = line.between((edges_s[1:] + edges_s[:-1]) / 2, line.values)
    return np.where(count > 0, total / np.maximum(count, 1), middle)


def _grown(line: Line, edges_s: Floats) -> Floats:
    """Return how much a counter grew in each step, evenly between two samples."""
    return np.diff(line.between(edges_s, line.cumulative()))


def _total(lines: Sequence[Line], edges_s: Floats, of: Callable[[Line, Floats], Floats]) -> Floats:
    return np.asarray(np.array([of(line, edges_s) for line in lines]).sum(axis=0))


def _ratio(above: Floats, below: Floats) -> Floats:
    """Return a quotient, NaN where nothing was counted."""
    good = np.isfinite(above) & np.isfinite(below) & (below > 1e-9)
    return np.where(good, above / np.where(good, below, 1.0), np.nan)
