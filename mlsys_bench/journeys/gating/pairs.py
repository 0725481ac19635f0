"""The loop of a gate: launch both sides, take turns, look, go on until it is decided or time is up.

    pair k    for each contest, in random order: a fresh launch of each side; 20 rounds; in each round one turn per side in random order
    after it  gate.judge on all pairs so far: it decides, or says at which pair to look next

Never do both sides compute at once.  What may not be open beside the other takes whole launches by turns instead.  Only whole pairs count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from mlsys_bench.errors import MeasurementFailed, NotComparable
from mlsys_bench.gate import fingerprint
from mlsys_bench.gate.judge import Standing, judge
from mlsys_bench.journeys.gating import conditions as surroundings
from mlsys_bench.journeys.gating import interrupts
from mlsys_bench.journeys.gating.source import Launched, Metric, Sampled, Source
from mlsys_bench.types import Bench, Launch, Machine, Measurement, Round
from mlsys_bench.verdicts import Conditions, Policy

Name = Literal["base", "cand"]
SIDES: tuple[Name, Name] = ("base", "cand")
_SLACK = 1.1  # pairs are not all alike
Ended = Literal["decided", "last_look", "budget", "interrupted", "failed"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """Two sources of the same metrics.  None: that side has nothing of the kind; the other is launched once, to say what is new or gone."""

    base: Source | None
    cand: Source | None
    most_pairs: int | None = None  # where launches cannot be repeated

    def of(self, side: Name) -> Source | None:
        """Return the source of a side."""
        return self.base if side == "base" else self.cand

    @property
    def is_whole(self) -> bool:
        """Say whether both sides are there."""
        return self.base is not None and self.cand is not None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How a gate stands after a pair."""

    standing: Standing
    pairs: int
    pair_s: float  # what one takes
    spent_s: float
    budget_s: float

    @property
    def left_s(self) -> float:
        """Return the time to the next look, or what is left of the budget where that is less."""
        ahead = (self.standing.next_look or self.pairs) - self.pairs
        return max(0.0, min(ahead * self.pair_s, self.budget_s - self.spent_s))


@dataclasses.dataclass(slots=True)
class _Cell:
    metric: Metric
    launches: list[Launch] = dataclasses.field(default_factory=list)


Look = Callable[[Bench, Bench, Policy], Standing]
_Taken = list[tuple[Name, Metric, Launch]]


class Race:
    """A gate that runs.  `outcome` can be asked for at any time: whole pairs are kept."""

    def __init__(
        self, contests: Sequence[Contest], *, policy: Policy, budget_s: float, seed: int = 0, began_s: float | None = None,
        show: Callable[[Progress], None] = lambda _: None, look: Look = judge,
    ) -> None:  # fmt: skip
        """Be ready.  The budget counts from `began_s` of the monotonic clock, which may lie before; `look` says when to stop."""
        self._look = look
        self._contests, self._policy, self._budget_s, self._seed, self._show = contests, policy, budget_s, seed, show
        self._began_s = time.monotonic() if began_s is None else began_s
        self._t0_s = time.monotonic()
        self._due = list(contests)  # that another pair would tell more of
        self._timed: set[int] = set()  # contests with more than counters
        self._cells: dict[Name, dict[str, _Cell]] = {"base": {}, "cand": {}}
        self._took_s: list[float] = []
        self.machines: dict[Name, Machine] = {}
        self.conditions: list[Conditions] = []
        self.standing: Standing | None = None
        self.ended: Ended = "failed"

    @property
    def pairs(self) -> int:
        """Return the whole pairs so far."""
        return len(self._took_s)

    @property
    def pair_s(self) -> float:
        """Return what a pair takes, the first one with what only the first does left out when there are others."""
        return statistics.median(self._took_s[1:] or self._took_s or [0.0])

    @property
    def wall_s(self) -> float:
        """Return the time since the budget began."""
        return time.monotonic() - self._began_s

    def bench(self, side: Name) -> Bench:
        """Return what a side measured."""
        return Bench(measurements=tuple(_measurement(cell) for cell in self._cells[side].values()))

    def run(self) -> Ended:
        """Measure until it is decided, the last look was taken, or the next pair would exceed the budget; return which.

        Raises NotComparable, MeasurementFailed and KeyboardInterrupt as they come; the pairs before stay.
        """
        try:
            while self._goes_on():
                self._pair()
        except KeyboardInterrupt:
            self.ended = "interrupted"
            raise
        return self.ended

    # ------------------------------------------------------------ when to stop

    def _goes_on(self) -> bool:
        """Look, and say whether another pair is wanted and affordable."""
        if not self.pairs:
            return True
        self.standing = standing = self._look(self.bench("base"), self.bench("cand"), self._policy)
        spent_s = self.wall_s
        self._show(
            Progress(standing=standing, pairs=self.pairs, pair_s=self.pair_s, spent_s=spent_s, budget_s=self._budget_s)
        )  # fmt: skip
        most = min((c.most_pairs for c in self._contests if c.most_pairs is not None), default=None)
        if standing.decided:
            self.ended = "decided"
        elif standing.next_look is None or (most is not None and self.pairs >= most) or not self._due:
            self.ended = "last_look"
        elif spent_s + _SLACK * max(self.pair_s, self._took_s[-1]) > self._budget_s:
            self.ended = "budget"
        else:
            return True
        return False

    # ------------------------------------------------------------ a pair

    def _pair(self) -> None:
        number = self.pairs + 1
        rng = np.random.default_rng([self._seed, number])
        start_s = time.monotonic()
        taken: _Taken = []
        seen: list[Conditions] = []
        for at in rng.permutation(len(self._due)):
            self._contest(self._due[at], number, rng, taken, seen)
        if not taken:
            raise MeasurementFailed("nothing was measured: no launch gave a sample")
        for side, metric, launch in taken:
            self._cell(side, metric).launches.append(launch)
        self._due = [c for c in self._due if c.is_whole and self._is_timed(c)]
        self.conditions += seen
        self._took_s.append(time.monotonic() - start_s)

    def _contest(self, contest: Contest, pair: int, rng: np.random.Generator, taken: _Taken, seen: list[Conditions]) -> None:
        """Measure one pair of launches, side by side where they may be, else one after the other."""
        sides = [side for side in SIDES if contest.of(side) is not None]
        sides = [sides[i] for i in rng.permutation(len(sides))]
        together = contest.is_whole and all(source.together for source in (contest.base, contest.cand) if source is not None)
        for group in [sides] if together else [[side] for side in sides]:
            with self._open(contest, group, pair) as launched:
                self._turns(contest, launched, pair, rng, taken, seen)

    @contextlib.contextmanager
    def _open(self, contest: Contest, sides: Sequence[Name], pair: int) -> Iterator[dict[Name, Launched]]:
        """Give launches that are ready, and end them whatever happens."""
        with contextlib.ExitStack() as stack:
            launched: dict[Name, Launched] = {}
            for side in sides:
                source = contest.of(side)
                assert source is not None
                launched[side] = started(source, pair, stack)
            for side, launch in launched.items():
                self._check_machine(side, launch.hello())
            yield launched

    def _check_machine(self, side: Name, machine: Machine) -> None:
        """Remember what a side runs on.  Raises NotComparable where the two must not be set side by side."""
        self.machines.setdefault(side, machine)
        if len(self.machines) == len(SIDES):
            different = fingerprint.differences(self.machines["base"], self.machines["cand"])
            if different:
                raise NotComparable(f"base and candidate run on different ground: {'; '.join(different)}")

    def _turns(
        self, contest: Contest, launched: dict[Name, Launched], pair: int, rng: np.random.Generator, taken: _Taken, seen: list[Conditions]
    ) -> None:  # fmt: skip
        """Take all turns of launches that are open together."""
        rounds: dict[Name, dict[str, tuple[Metric, list[Round]]]] = {side: {} for side in launched}
        sides, pids = list(launched), [pid for launch in launched.values() for pid in launch.pids]
        started_s, start_s = time.time(), time.monotonic()
        watch = surroundings.begin(pids)
        try:
            for turn in range(1, _turns_of(contest) + 1):
                for at in rng.permutation(len(sides)):
                    _keep(rounds[sides[at]], launched[sides[at]].turn(turn))
        finally:
            surroundings.stop(watch)
        wall_s = time.monotonic() - start_s
        for side, launch in launched.items():
            seen.append(
                surroundings.end(watch, pair=pair, side=side, started_s=start_s - self._t0_s, wall_s=wall_s, pids=launch.pids)
            )  # fmt: skip
            if any(not metric.deterministic for metric, _ in rounds[side].values()):
                self._timed.add(id(contest))
            taken += [
                (side, metric, Launch(started_s=started_s, rounds=tuple(found), pair=pair)) for metric, found in rounds[side].values()
            ]

    def _is_timed(self, contest: Contest) -> bool:
        """Say whether a contest has metrics that differ from launch to launch; counters need one."""
        return id(contest) in self._timed

    def _cell(self, side: Name, metric: Metric) -> _Cell:
        return self._cells[side].setdefault(_key(metric), _Cell(metric))


def started(source: Source, pair: int, stack: contextlib.ExitStack) -> Launched:
    """Return a launch that the stack closes, whenever a Ctrl-C comes: one that nobody knew of would go on."""

    def close() -> None:
        with interrupts.held():
            launched.close()

    with interrupts.held():
        launched = source.launch(pair)
        stack.callback(close)
    return launched


def _turns_of(contest: Contest) -> int:
    return max(source.turns for source in (contest.base, contest.cand) if source is not None)


def _keep(rounds: dict[str, tuple[Metric, list[Round]]], sampled: Sequence[Sampled]) -> None:
    for metric, taken in sampled:
        rounds.setdefault(_key(metric), (metric, []))[1].append(taken)


def _key(metric: Metric) -> str:
    return json.dumps([metric.name, metric.parameters], sort_keys=True)


def _measurement(cell: _Cell) -> Measurement:
    m = cell.metric
    return Measurement(
        name=m.name, unit=m.unit, better=m.better, parameters=m.parameters, launches=tuple(cell.launches), deterministic=m.deterministic
    )  # fmt: skip
