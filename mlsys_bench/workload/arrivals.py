"""When requests arrive, as a person writes it: a law of gaps, times whatever makes the rate rise and fall.

    poisson                     gaps are exponential
    constant                    a metronome
    gamma:CV                    gaps have this coefficient of variation, e.g. gamma:1.5
    mmpp:PEAK:SHARE:LENGTH      bursts: SHARE of the time the rate is PEAK times the mean, LENGTH on average, e.g. mmpp:3:20%:30s
    diurnal:PERIOD:SWING        a sine of this swing about the mean, which it leaves upwards, e.g. diurnal:24h:60%
    diurnal:PERIOD:A,B,…        levels of equal length, only their ratios count, e.g. diurnal:24h:1,1,2,5,4,2
    stages:TIME@LEVEL,…         so many times the rate for so long, the last level for ever, e.g. stages:5m@1,10m@1..3,5m@3
    series:FILE[:linear]        a rate that follows a file of times and rates, of which only the ratios count, over and over
    trace:FILE                  the arrival times of a trace, stretched to the rate, over and over

Laws are joined with *: gamma:1.5*diurnal:24h:60%.  Without a law of gaps they are Poisson.  mmpp, diurnal and series leave the mean rate
as it is; stages multiply it.  A rate that changes is a change of clock: gaps of the law, in a time that runs as fast as the rate.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from mlsys_bench import units
from mlsys_bench.errors import BadInput, did_you_mean
from mlsys_bench.types import Workload
from mlsys_bench.workload import series
from mlsys_bench.workload.schedule import Floats
from mlsys_bench.workload.series import Series

MAX_CV = 100.0
_SINE_STEPS = 288  # of a period: 5 minutes of a day
_RAMP_STEPS = 60
_BASES = ("poisson", "constant", "gamma")
_FORM = "poisson, constant, gamma:CV, mmpp:…, diurnal:…, stages:…, series:FILE or trace:FILE, e.g. gamma:1.5 or mmpp:3:20%:30s"


class Modulation(Protocol):
    """What makes the rate rise and fall: levels (multiples of the mean rate) that hold between edges."""

    @property
    def peak(self) -> float:
        """The highest level."""
        ...

    def steps(self, until_s: float, seed: np.random.SeedSequence) -> tuple[Floats, Floats]:
        """Return edges from 0 to `until_s` or beyond, and the level after each edge but the last.  One seed, one course."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Bursts:
    """A two-phase Markov-modulated Poisson process, by how high, how often and how long the bursts are."""

    peak: float
    share: float
    burst_s: float

    @property
    def calm(self) -> float:
        """The level between bursts, which makes the mean 1."""
        return max(0.0, (1 - self.share * self.peak) / (1 - self.share))

    @property
    def calm_s(self) -> float:
        """The mean time between bursts."""
        return self.burst_s * (1 - self.share) / self.share

    @property
    def variance(self) -> float:
        """Variance of the level."""
        return self.share * (1 - self.share) * (self.peak - self.calm) ** 2

    @property
    def decay_per_s(self) -> float:
        """How fast the level forgets itself: its covariance at lag u is variance * exp(-decay * u)."""
        return 1 / self.burst_s + 1 / self.calm_s

    def steps(self, until_s: float, seed: np.random.SeedSequence) -> tuple[Floats, Floats]:
        """Return phases that alternate, begun in the long run's proportion; each lasts an exponential time."""
        starts_high = bool(np.random.default_rng(_child(seed, 0)).random() < self.share)
        n = 16 + int(2 * until_s / (self.burst_s + self.calm_s) * 1.2)
        while True:
            high = (np.arange(n) % 2 == 0) == starts_high
            stays = np.random.default_rng(_child(seed, 1)).standard_exponential(n) * np.where(high, self.burst_s, self.calm_s)
            if stays.sum() >= until_s:
                edges = np.asarray(np.append(0.0, np.cumsum(stays)), dtype=np.float64)
                return edges, np.asarray(np.where(high, self.peak, self.calm), dtype=np.float64)
            n *= 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Daily:
    """Levels of mean 1 that repeat, each for an equal part of the period."""

    period_s: float
    levels: tuple[float, ...]

    @property
    def peak(self) -> float:
        """The highest level."""
        return max(self.levels)

    def steps(self, until_s: float, seed: np.random.SeedSequence) -> tuple[Floats, Floats]:
        """Return as many periods as it takes."""
        n = len(self.levels)
        periods = int(until_s / self.period_s) + 1
        edges = np.arange(periods * n + 1, dtype=np.float64) * (self.period_s / n)
        return np.asarray(edges), np.tile(np.asarray(self.levels, dtype=np.float64), periods)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Levels one after another, the last for ever."""

    lengths_s: tuple[float, ...]
    levels: tuple[float, ...]

    @property
    def peak(self) -> float:
        """The highest level."""
        return max(self.levels)

    @property
    def lasts_s(self) -> float:
        """How long the stages are together."""
        return sum(self.lengths_s)

    def steps(self, until_s: float, seed: np.random.SeedSequence) -> tuple[Floats, Floats]:
        """Return the stages, the last one prolonged."""
        edges = np.concatenate([[0.0], np.cumsum(self.lengths_s)], dtype=np.float64)
        edges[-1] = max(edges[-1], until_s)
        return edges, np.asarray(self.levels)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalLaw:
    """How requests arrive: `cv` is the coefficient of variation of the gaps while the rate stands, `modulations` multiply the rate."""

    kind: Literal["poisson", "constant", "gamma", "trace"]
    cv: float
    modulations: tuple[Modulation, ...] = ()
    file: Path | None = None

    @property
    def bursts(self) -> tuple[Bursts, ...]:
        """The bursts among the modulations."""
        return tuple(m for m in self.modulations if isinstance(m, Bursts))

    @property
    def is_steady(self) -> bool:
        """Whether every hour is like any other: bursts come and go, but no time of day, no stage and no trace."""
        return self.kind != "trace" and all(isinstance(m, Bursts) for m in self.modulations)


def parse_arrivals(text: str) -> ArrivalLaw:
    """Return the law of e.g. 'poisson', 'gamma:1.5', 'mmpp:3:20%:30s', 'gamma:2*diurnal:24h:60%' or 'trace:FILE'.  Raises BadInput."""
    where = f"arrivals {text!r}"
    if text.strip()[:6].lower() == "trace:":
        return _trace(Path(text.strip()[6:]), where)
    parts = [part.strip() if _is_series(part) else part.strip().lower() for part in text.split("*")]
    kind, cv = _base(parts[0], where) if parts[0].partition(":")[0] in _BASES else ("poisson", 1.0)
    rest = parts[1:] if parts[0].partition(":")[0] in _BASES else parts
    return ArrivalLaw(kind=kind, cv=cv, modulations=tuple(_modulation(part, where) for part in rest))


def written_rate_per_s(text: str) -> float | None:
    """Return the mean rate that a series in these arrivals was written with; None where they name no rate of their own."""
    found = [m.mean_per_s for m in parse_arrivals(text).modulations if isinstance(m, Series)]
    return found[0] if found else None


def written_duration_s(text: str) -> float | None:
    """Return how long the arrivals go on before they repeat: a series to its end, stages to the end of the last; None for other laws."""
    lasting = [m.lasts_s for m in parse_arrivals(text).modulations if isinstance(m, (Series, Stages))]
    return max(lasting) if lasting else None


def level_steps(modulations: tuple[Modulation, ...], until_s: float, seed: np.random.SeedSequence) -> tuple[Floats, Floats]:
    """Return the product of modulations as edges from 0 to `until_s` or beyond, and the level after each edge but the last."""
    courses = [m.steps(until_s, _child(seed, k)) for k, m in enumerate(modulations)]
    edges = np.unique(np.concatenate([[0.0, until_s], *(at for at, _ in courses)]))
    edges = edges[edges <= until_s]
    levels = np.ones(len(edges) - 1)
    for at, level in courses:
        levels *= level[np.minimum(np.searchsorted(at, edges[:-1], side="right") - 1, len(level) - 1)]
    return edges, levels


def show_bursts(bursts: Bursts) -> str:
    """Print bursts so that `parse_arrivals` reads them back."""
    return f"mmpp:{bursts.peak:.4g}:{100 * bursts.share:.4g}%:{bursts.burst_s:.4g}s"


def at_peak(traffic: Workload) -> Workload:
    """Return the traffic of its busiest time of day or stage, as if it lasted: what a fleet of fixed size must carry.

    Bursts stay, they are part of any hour; traffic that is steady is returned as it is.  Raises BadInput for a trace, which has no law.
    """
    law = parse_arrivals(traffic.arrivals)
    if law.is_steady:
        return traffic
    if law.kind == "trace":
        raise BadInput(
            f"arrivals {traffic.arrivals!r}: a trace is replayed, not planned for; `mlsys workload FILE -o traffic.json` finds its law"
        )
    factor = math.prod(m.peak for m in law.modulations if not isinstance(m, Bursts))
    base = {"poisson": "poisson", "constant": "constant"}.get(law.kind, f"gamma:{law.cv:.6g}")
    steady = "*".join([base, *map(show_bursts, law.bursts)])
    why = f"at its peak, {factor:.3g} times the mean of {traffic.rate_per_s:.4g}/s"
    return dataclasses.replace(
        traffic, rate_per_s=traffic.rate_per_s * factor, arrivals=steady, source=f"{traffic.source}; {why}" if traffic.source else why
    )


def in_words(text: str) -> str:
    """Return arrivals as a reader says it: 'Poisson, in bursts of 3 x the mean …'."""
    law = parse_arrivals(text)
    if law.file is not None:
        return f"the arrival times of {law.file.name}"
    base = {"poisson": "Poisson", "constant": "evenly spaced"}.get(law.kind, f"gamma gaps of cv {law.cv:.3g}")
    return ", ".join([base, *(_words(m) for m in law.modulations)])


def _words(modulation: Modulation) -> str:
    if isinstance(modulation, Bursts):
        time = units.show_s(modulation.burst_s)
        return f"in bursts of {modulation.peak:.3g} x the mean rate, {100 * modulation.share:.3g} % of the time, {time} each on average"
    if isinstance(modulation, Daily):
        return f"up to {modulation.peak:.3g} x the mean in every {units.show_s(modulation.period_s)}"
    if isinstance(modulation, Series):
        return f"at rates that follow {modulation.name}, up to {modulation.peak:.3g} x their mean"
    return f"in stages of up to {modulation.peak:.3g} x the rate"


def _base(text: str, where: str) -> tuple[Literal["poisson", "constant", "gamma"], float]:
    kind, colon, cv = text.partition(":")
    if kind == "gamma":
        value = _number(cv, where, "gamma:CV, a coefficient of variation above zero, e.g. gamma:1.5")
        if value > MAX_CV:
            raise BadInput(f"{where}: a coefficient of variation above {MAX_CV:g} leaves nothing but silence and one burst")
        return "gamma", value
    if colon:
        raise BadInput(f"{where}: {kind} takes no number; write {_FORM}")
    return ("poisson", 1.0) if kind == "poisson" else ("constant", 0.0)


def _modulation(text: str, where: str) -> Modulation:
    kind, _, rest = text.partition(":")
    if kind == "mmpp":
        return _bursts(rest, where)
    if kind == "diurnal":
        return _daily(rest, where)
    if kind == "stages":
        return _stages(rest, where)
    if kind.lower() == "series":
        return _series(rest, where)
    if kind == "trace":
        raise BadInput(f"{where}: a trace is replayed alone; write trace:FILE")
    raise BadInput(f"{where}: write {_FORM}{did_you_mean(kind, (*_BASES, 'mmpp', 'diurnal', 'stages', 'series', 'trace'))}")


def _bursts(text: str, where: str) -> Bursts:
    form = "mmpp:PEAK:SHARE:LENGTH, e.g. mmpp:3:20%:30s"
    parts = text.split(":")
    if len(parts) != 3:
        raise BadInput(f"{where}: write {form}")
    peak, share = _number(parts[0], where, form), units.fraction(parts[1], where)
    if not 0 < share < 1:
        raise BadInput(f"{where}: bursts take a share of the time between 0% and 100%, not {parts[1]}")
    if not 1 < peak <= 1 / share * 1.001:  # as far as four digits tell
        raise BadInput(f"{where}: {parts[1]} of the time at PEAK times the mean rate: PEAK lies between 1 and {1 / share:.4g}")
    return Bursts(peak=min(peak, 1 / share), share=share, burst_s=_time(parts[2], where))


def _daily(text: str, where: str) -> Daily:
    form = "diurnal:PERIOD:SWING or diurnal:PERIOD:A,B,…, e.g. diurnal:24h:60% or diurnal:24h:1,1,2,5,4,2"
    period, _, shape = text.partition(":")
    period_s = _time(period, where)
    if shape.endswith("%"):
        swing = units.fraction(shape, where)
        if not 0 < swing <= 1:
            raise BadInput(f"{where}: a swing of {shape}: it lies between 0% and 100% of the mean")
        turns = 2 * math.pi * np.arange(_SINE_STEPS + 1) / _SINE_STEPS
        levels = 1 - swing * np.diff(np.cos(turns)) * _SINE_STEPS / (2 * math.pi)  # the sine's mean over each step
        return Daily(period_s=period_s, levels=tuple(levels.tolist()))
    given = [_number(level, where, form, least=0.0) for level in shape.split(",")]
    if len(given) < 2 or not sum(given) > 0:
        raise BadInput(f"{where}: write {form}")
    return Daily(period_s=period_s, levels=tuple(level * len(given) / sum(given) for level in given))


def _stages(text: str, where: str) -> Stages:
    form = "stages:TIME@LEVEL,…, e.g. stages:5m@1,10m@1..3,5m@3"
    lengths_s: list[float] = []
    levels: list[float] = []
    for part in text.split(","):
        time, at, level = part.partition("@")
        low, ramp, high = level.partition("..")
        if not at:
            raise BadInput(f"{where}: write {form}")
        ends = [_number(x, where, form, least=0.0) for x in ((low, high) if ramp else (low, low))]
        n = _RAMP_STEPS if ramp else 1
        lengths_s += [_time(time, where) / n] * n
        levels += (ends[0] + (ends[1] - ends[0]) * (np.arange(n) + 0.5) / n).tolist()
    if not max(levels) > 0:
        raise BadInput(f"{where}: no stage has any traffic; write {form}")
    return Stages(lengths_s=tuple(lengths_s), levels=tuple(levels))


def _is_series(part: str) -> bool:
    """Say whether a part names a file, whose letters stay as they are."""
    return part.strip()[:7].lower() == "series:"


def _series(text: str, where: str) -> Series:
    name, _, kind = text.rpartition(":")
    linear = kind.lower() == "linear" and bool(name)
    path = Path(name if linear else text)
    if not path.is_file():
        raise BadInput(f"{where}: there is no file {path}; write series:FILE, a CSV of times and rates, or series:FILE:linear")
    return series.read(path, linear)


def _trace(path: Path, where: str) -> ArrivalLaw:
    if not path.is_file():
        raise BadInput(f"{where}: there is no file {path}; write trace:FILE, a CSV, JSON lines or requests file")
    return ArrivalLaw(kind="trace", cv=1.0, file=path)


def _number(text: str, where: str, form: str, least: float | None = None) -> float:
    """Return a finite number above zero, or from `least` on."""
    try:
        value = units.plain(text)
    except ValueError:
        raise BadInput(f"{where}: {text!r} is no number; write {form}") from None
    if not (math.isfinite(value) and (value > 0 if least is None else value >= least)):
        raise BadInput(f"{where}: {text} must be {'above zero' if least is None else 'zero or more'}; write {form}")
    return value


def _time(text: str, where: str) -> float:
    value = units.seconds(text, where)
    if not value > 0:
        raise BadInput(f"{where}: a time of {text} must be above zero")
    return value


def _child(seed: np.random.SeedSequence, number: int) -> np.random.SeedSequence:
    """Return the same child of a seed however often it is asked for; `spawn` would count."""
    return np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, number))
