"""The gate's decisions against their bars: recorded sessions, simulated jobs, tails.

`python proofs/gate.py [recorded left_out jobs edges tails]`; without names all of them, in about two minutes on one core.  What a live gate
finds on this machine is in `gate_live.py`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import _one_thread  # noqa: F401  before numpy
import gate_live
import numpy as np
import numpy.typing as npt

from mlsys_bench.backtests import Deciding
from mlsys_bench.gate import backtest, sequence, sessions
from mlsys_bench.gate.sessions import Arm, Sessions
from mlsys_bench.types import Measurement
from mlsys_bench.verdicts import Policy

Floats = npt.NDArray[np.float64]

DATA = Path(__file__).parents[2] / "shared" / "data" / "gate"
JOBS, METRICS, CHUNK = 20_000, 20, 2_000
SDS = (0.01, 0.045)  # of the log ratio of a launch pair, drawn for each metric
SUBSETS, KEPT = 12, 10  # of sessions


class Figures:
    """Prints figures beside their bars and counts the misses."""

    def __init__(self) -> None:
        self.missed = 0

    def show(self, what: str, value: float, unit: str, bar: str = "(no bar)", kept: bool = True) -> None:
        """Print one."""
        self.missed += not kept
        print(f"{value:10,.2f} {unit:10} {bar:12} {'ok    ' if kept else 'MISSED'} {what}", flush=True)

    def most(self, what: str, value: float, limit: float, unit: str = "%") -> None:
        """Print a figure that may be at most `limit`."""
        self.show(what, value, unit, f"<= {limit:g}", value <= limit)

    def least(self, what: str, value: float, limit: float, unit: str = "%") -> None:
        """Print a figure that must be at least `limit`."""
        self.show(what, value, unit, f">= {limit:g}", value >= limit)


def main() -> int:
    """Print each figure beside its bar; return 1 when one is missed."""
    parts: dict[str, Callable[[Figures], None]] = {
        "recorded": recorded, "left_out": left_out, "jobs": jobs, "edges": edges, "tails": tails, "live": live,
    }  # fmt: skip
    wanted = sys.argv[1:] or list(parts)
    unknown = set(wanted) - set(parts)
    if unknown:
        print(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
        return 2
    figures = Figures()
    for name in wanted:
        began_s = time.monotonic()
        print(f"--- {name}: {(parts[name].__doc__ or '').splitlines()[0]}")
        parts[name](figures)
        print(f"    {time.monotonic() - began_s:.0f} s", flush=True)
    print(f"missed: {figures.missed}")
    return 1 if figures.missed else 0


def live(figures: Figures) -> None:
    """Measure this machine: extra work planted in the engine's decode step is found, the same program passes, within 90 s each."""
    figures.missed += gate_live.run()


# ---------------------------------------------------------------- recorded sessions


class Bar(NamedTuple):
    """A figure of one arm, and what it must keep."""

    what: str
    value: float
    limit: float
    least: bool = False
    unit: str = "%"

    @property
    def margin(self) -> float:
        """Return how far inside its limit it is; below 0 it is missed."""
        return (self.value - self.limit) * (1 if self.least else -1)


def recorded(figures: Figures) -> None:
    """Draw launches from recorded sessions; in brackets the 90 % interval over sessions."""
    for found in _files():
        print(f"    {Path(found.source).name}: {len(found.sessions)} sessions, {len(found.disturbed)} disturbed")
        for bar in _bars(found):
            (figures.least if bar.least else figures.most)(bar.what, bar.value, bar.limit, bar.unit)


def left_out(figures: Figures) -> None:
    """Leave a third of the sessions out, as others would be others: how many such subsets keep each bar."""
    for found in _files():
        rng = np.random.default_rng(0)
        names = np.array(found.sessions)
        trials = [tuple(_bars(_subset(found, set(rng.choice(names, KEPT, replace=False))), 1000, 0)) for _ in range(SUBSETS)]
        for bars in zip(*trials, strict=True):
            worst, kept = min(bars, key=lambda bar: bar.margin), sum(bar.margin >= 0 for bar in bars)
            if kept < SUBSETS:
                what = f"{kept} of {SUBSETS} subsets of {KEPT} sessions keep it, this is the worst: {worst.what.partition(' [')[0]}"
                figures.show(what, worst.value, worst.unit, f"({'>=' if worst.least else '<='} {worst.limit:g})")
        whole = sum(min(bar.margin for bar in bars) >= 0 for bars in trials)
        figures.show(f"subsets that keep every bar, of {SUBSETS}", whole, "subsets")


def _files() -> Iterator[Sessions]:
    for name in ("decode_bf16_visible.csv", "http_visible.csv"):
        if (DATA / name).exists():
            yield sessions.read(DATA / name)
        else:
            print(f"    skipped: {DATA / name} is not here; recorded sessions lie beside the checkout, not in it")


def _subset(found: Sessions, kept: set[str]) -> Sessions:
    """Return the file with some sessions only."""

    def some(arm: Arm, m: Measurement) -> Measurement:
        return replace(m, launches=tuple(x for x, session in zip(m.launches, arm.sessions, strict=True) if session in kept))

    arms = tuple(
        replace(arm, sessions=tuple(s for s in arm.sessions if s in kept), base=some(arm, arm.base), cand=some(arm, arm.cand))
        for arm in found.arms
    )
    return replace(found, sessions=tuple(s for s in found.sessions if s in kept), arms=arms)


def _bars(found: Sessions, jobs: int = backtest.JOBS, draws: int = backtest.DRAWS) -> Iterator[Bar]:
    """Yield what must hold at each tolerance, of all metrics together and of each alone."""
    for tolerance in (0.03, 0.05, 0.015):
        for d in backtest.replay(found, Policy(tolerance=tolerance), jobs=jobs, draws=draws):
            if d.metric is None or not d.metric.endswith(".p99"):
                yield from _of_arm(d)


def _of_arm(d: Deciding) -> Iterator[Bar]:
    name = f"{d.arm}, {d.metric or 'all'} at {100 * d.tolerance:g} %"

    def said(what: str, share: float, interval: tuple[float, float], limit: float, least: bool = False) -> Bar:
        return Bar(f"{name}: {what} [{100 * interval[0]:.1f} to {100 * interval[1]:.1f}]", 100 * share, limit, least)

    true = int("".join(c for c in d.arm if c.isdigit())) if d.arm[0] in "BM" else 0
    at = round(100 * d.tolerance, 1)
    if d.same and at in (3, 5):
        yield said("regressions", d.regression, d.regression_interval, 0.5)
    if d.same and at == 3:
        yield said("inconclusive", d.inconclusive, d.inconclusive_interval, 2)
    if true == 5 and at == 3:
        yield said("found", d.regression, d.regression_interval, 95, least=True)
    if true == 10 and at == 3:
        yield said("found", d.regression, d.regression_interval, 99, least=True)
        yield Bar(f"{name}: launches [{d.pairs_interval[0]:.1f} to {d.pairs_interval[1]:.1f}]", d.pairs, 6.5, unit="launches")
    if true == 2 and at == 5:
        yield said("fails", d.regression, d.regression_interval, 8)
    if true == 2 and at == 1.5:
        yield said("passes", d.passed + d.improved, d.passed_interval, 1)


# ---------------------------------------------------------------- simulated jobs


def jobs(figures: Figures) -> None:
    """Simulate jobs of 20 metrics whose two programs are the same: how many fail; and how many see +10 % in one metric."""
    for tolerance in (0.03, 0.05):
        for law, draw in LAWS.items():
            failed, pairs = _jobs(draw, tolerance, 0.0)
            at = f"{JOBS:,} jobs, {law}, at {100 * tolerance:g} %"
            figures.most(f"fail: {at}; {pairs:.1f} launches", 100 * failed, 2)
    found, pairs = _jobs(LAWS["normal"], 0.03, math.log(1.10), jobs=CHUNK)
    figures.show(f"found: +10 % in one metric of {METRICS}, {CHUNK:,} jobs, normal, at 3 %; {pairs:.1f} launches", 100 * found, "%")


def _jobs(draw: Callable[..., Floats], tolerance: float, change: float, jobs: int = JOBS) -> tuple[float, float]:
    """Return the share of jobs that fail, and their mean launches."""
    rng, failed, pairs = np.random.default_rng(7), 0, 0
    for _ in range(jobs // CHUNK):
        sds = rng.uniform(*SDS, (CHUNK, METRICS, 1))
        d = sds * draw(rng, (CHUNK, METRICS, sequence.MOST_PAIRS))
        d[:, 0] += change
        track = _followed(d, tolerance)
        failed += int((track.state == sequence.REGRESSION).any(axis=1).sum())
        pairs += int(track.pairs.max(axis=1).sum())
    return failed / jobs, pairs / jobs


def _followed(d: Floats, tolerance: float, may_pass: bool = True) -> sequence.Track:
    d1 = np.full(d.shape[:2], math.log1p(tolerance))

    def look(start: int, stop: int, level: float, which: sequence.Ints) -> sequence.Evidence:
        seen = sequence.bounds(d[which, :, start:stop], d1[which] / 5, level)
        return seen if may_pass else seen._replace(high=np.full_like(seen.high, np.inf))

    return sequence.follow(look, d.shape[2], d1, np.ones(d1.shape, dtype=bool))


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    return rng.standard_normal(shape)


def _student(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    return rng.standard_t(3, shape) / math.sqrt(3)


def _disturbed(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Set one launch in ten five times as far off, then scale to sd 1."""
    wide = np.where(rng.random(shape) < 0.1, 5.0, 1.0)
    return rng.standard_normal(shape) * wide / math.sqrt(0.9 + 0.1 * 25)


def _skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Draw the difference of two sides that are slow now and then: exponential."""
    return (rng.exponential(size=shape) - rng.exponential(size=shape)) / math.sqrt(2)


def _together(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Let the metrics of a launch move together: correlation 0.7."""
    shared = rng.standard_normal((shape[0], 1, shape[2]))
    return math.sqrt(0.7) * shared + math.sqrt(0.3) * rng.standard_normal(shape)


LAWS: dict[str, Callable[..., Floats]] = {
    "normal": _normal, "Student's t with 3 degrees": _student, "one launch in ten disturbed": _disturbed,
    "exponential sides": _skewed, "correlated 0.7": _together,
}  # fmt: skip


def edges(figures: Figures) -> None:
    """Make one metric exactly as much slower as may pass, or as nobody minds: a wrong word is rare at every sd."""
    rng = np.random.default_rng(3)
    for tolerance in (0.015, 0.03, 0.05):
        wrong_pass, wrong_fail = [], []
        for sd in (0.003, 0.006, 0.012, 0.025, 0.045):
            noise = sd * rng.standard_normal((8_000, 1, sequence.MOST_PAIRS))
            d1 = math.log1p(tolerance)
            wrong_pass.append(100 * float((_followed(noise + d1, tolerance).state == sequence.PASS).mean()))
            wrong_fail.append(100 * float((_followed(noise + d1 / 5, tolerance).state == sequence.REGRESSION).mean()))
        figures.most(f"called a pass: slower by the whole tolerance of {100 * tolerance:g} %, worst of sd 0.3 to 4.5 %", max(wrong_pass), 3)
        figures.most(f"called a regression: slower by a fifth of {100 * tolerance:g} %, worst of sd 0.3 to 4.5 %", max(wrong_fail), 2)


# ---------------------------------------------------------------- tails


def tails(figures: Figures) -> None:
    """Slow the slow requests only: found, or at least never a pass.  Simulated launches of 1,500 requests, and recorded P arms."""
    for slower, most_pass in ((1.5, 0.0), (1.2, 1.0), (1.0, None)):
        state = _followed(_tail_logs(slower), 0.05).state
        found, passed = 100 * float((state == sequence.REGRESSION).mean()), 100 * float((state == sequence.PASS).mean())
        what = f"p99 alone x {slower:g}, 1,500 requests a launch, at 5 %"
        if slower == 1.5:
            figures.least(f"found: {what}", found, 99)
        elif most_pass is None:
            figures.most(f"found (a false alarm): {what}", found, 2)
        else:
            figures.show(f"found: {what}", found, "%")
        if most_pass is not None:
            figures.most(f"passes: {what}", passed, most_pass)
    for source in _files():
        for d in backtest.replay(source, Policy(), draws=0):
            if d.arm in ("P20", "P50") and d.metric is not None and d.metric.endswith(".p99"):
                if d.arm == "P50":
                    figures.least(f"found: {d.arm}, {d.metric}, recorded", 100 * d.regression, 95)
                else:
                    figures.show(f"found: {d.arm}, {d.metric}, recorded", 100 * d.regression, "%")
                figures.most(f"passes: {d.arm}, {d.metric}, recorded", 100 * (d.passed + d.improved), 0)


def _tail_logs(slower: float, jobs: int = 300, requests: int = 1500) -> Floats:
    """Return log ratios of p99: one request in forty takes ten times as long; launches differ by 2 %, in their slow ones by 10 %."""
    rng = np.random.default_rng(11)

    def side(factor: float) -> Floats:
        shape = (jobs, sequence.MOST_PAIRS)
        bulk, slow = np.exp(0.02 * rng.standard_normal(shape)), factor * np.exp(0.1 * rng.standard_normal(shape))
        found = np.empty(shape)
        for job in range(jobs):
            times = bulk[job, :, None] * np.exp(0.05 * rng.standard_normal((shape[1], requests)))
            is_slow = rng.random(times.shape) < 0.025
            times = np.where(is_slow, slow[job, :, None] * 10 * np.exp(0.3 * rng.standard_normal(times.shape)), times)
            found[job] = np.quantile(times, 0.99, axis=1)
        return found

    return np.asarray(np.log(side(slower) / side(1.0)))[:, None, :]


if __name__ == "__main__":
    raise SystemExit(main())
