"""Who gets which GPUs of a pool: an integer program, solved exactly, priority after priority.

With n(s, k) replicas of scenario s on kind k, of d(s, k) GPUs each, which carry m(s, k) requests a second within their limits, and y(s, k)
the share of its rate r(s) that they serve:

    r(s) y(s, k) <= m(s, k) n(s, k),    sum_k y(s, k) <= 1,    sum_s d(s, k) n(s, k) <= pool(k),    n whole

First the sum of the shares of all scenarios of priority 1 is made as large as can be, then, that kept, the sum of priority 2, and so on;
at last, all that kept, the cost of the GPUs in use as small as can be.  Replicas of several GPUs do not leave a node, so that those of d
GPUs or more fit in whole groups of d: sum over d' >= d of d' n <= d floor(pool / d).

Exact where replicas have queues of their own, as plans take them: what one carries then does not depend on how many there are.
Solver: HiGHS (Huangfu and Hall 2018, Math. Prog. Comp. 10), through scipy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
WHOLE = 1e-6  # of the traffic: a share that near to 1 is all of it; the solver's own tolerance
_GAVE_UP = 4  # scipy's status of a program that HiGHS stumbled over: one in a thousand, where a kept level touches that tolerance
_TRIES = tuple((slack, presolve) for slack in (0.0, WHOLE / 2, WHOLE) for presolve in (True, False))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A scenario: its rate, and which priority it has; 1 comes first."""

    name: str
    priority: int
    rate_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A replica of a scenario on one kind of GPU: how many of them it takes, what it carries, what it costs."""

    name: str
    gpu: str
    devices: int
    each_per_s: float
    usd_per_h: float


Counts = tuple[int, ...]  # replicas, by the kinds given


def allocate(asks: Sequence[Ask], kinds: Sequence[Kind], pool: Mapping[str, int]) -> Counts:
    """Return how many replicas of each kind there are.  Scenarios that ask for nothing get nothing."""
    busy = [ask for ask in asks if ask.rate_per_s > 0]
    program = _Program(asks, kinds, pool)
    for ask in busy:
        program.keep(program.shares_of([ask.name]), 1.0 - WHOLE)
    whole = program.solved(program.cost)
    if whole is not None:  # everybody in full: no level can be higher
        return whole
    program = _Program(asks, kinds, pool)
    for priority in sorted({ask.priority for ask in busy}):
        level = program.shares_of(ask.name for ask in busy if ask.priority == priority)
        best = program.solved(-level)
        assert best is not None  # nothing at all is always possible
        program.keep(level, _sum(shares(busy, kinds, best), busy, priority) - WHOLE)
    cheapest = program.solved(program.cost)
    assert cheapest is not None
    return cheapest


def shares(asks: Sequence[Ask], kinds: Sequence[Kind], counts: Sequence[int]) -> dict[str, float]:
    """Return the share of each scenario's rate that so many replicas serve; 1 for none asked."""
    carried = {ask.name: 0.0 for ask in asks}
    for kind, n in zip(kinds, counts, strict=True):
        carried[kind.name] = carried.get(kind.name, 0.0) + n * kind.each_per_s
    found = {ask.name: min(1.0, carried[ask.name] / ask.rate_per_s) if ask.rate_per_s > 0 else 1.0 for ask in asks}
    return {name: 1.0 if share > 1 - WHOLE else share for name, share in found.items()}


def more(asks: Sequence[Ask], kinds: Sequence[Kind], pool: Mapping[str, int], gpu: str, wanted: Mapping[str, float]) -> int | None:
    """Return how many GPUs more of one kind serve at least these shares; None where no number does."""
    program = _Program(asks, kinds, pool, extra=gpu)
    for name in (ask.name for ask in asks if ask.rate_per_s > 0):
        program.keep(program.shares_of([name]), wanted.get(name, 0.0) - WHOLE)
    found = program.solved(program.added)
    if found is None:
        return None
    needed = _least_pool([(kind.devices, n) for kind, n in zip(kinds, found, strict=True) if kind.gpu == gpu])
    return max(0, needed - pool.get(gpu, 0))


def _least_pool(replicas: Sequence[tuple[int, int]]) -> int:
    """Return the fewest GPUs that hold these replicas: the larger ones first, each group of d begun is whole."""
    used = 0
    for devices, n in sorted(replicas, reverse=True):
        used = -(-used // devices) * devices + devices * n if n else used
    return used


def _sum(found: Mapping[str, float], asks: Sequence[Ask], priority: int) -> float:
    return sum(found[ask.name] for ask in asks if ask.priority == priority)


class _Program:
    """The program: columns are replicas, then shares, then GPUs to add, then groups of d GPUs; rows grow as levels are kept."""

    def __init__(self, asks: Sequence[Ask], kinds: Sequence[Kind], pool: Mapping[str, int], extra: str | None = None) -> None:
        self.kinds, rates = kinds, {ask.name: ask.rate_per_s for ask in asks}
        self.names = [kind.name for kind in kinds]
        sizes = sorted({(kind.gpu, kind.devices) for kind in kinds})
        self.count, self.width = len(kinds), 2 * len(kinds) + 1 + len(sizes)
        self.rows: list[Floats] = []
        self.low: list[float] = []
        self.high: list[float] = []
        for j, kind in enumerate(kinds):  # y <= m / r n, or nothing where nothing is asked
            per_replica = kind.each_per_s / rates[kind.name] if rates[kind.name] > 0 else 0.0
            self._add(self._row({self.count + j: 1.0, j: -per_replica}), high=0.0)
        for name in rates:
            self._add(self.shares_of([name]), high=1.0)
        for g, (gpu, devices) in enumerate(sizes):
            group = 2 * self.count + 1 + g
            held = {j: float(kind.devices) for j, kind in enumerate(kinds) if kind.gpu == gpu and kind.devices >= devices}
            self._add(self._row({**held, group: -float(devices)}), high=0.0)
            self._add(self._row({group: float(devices), 2 * self.count: -1.0 if gpu == extra else 0.0}), high=float(pool.get(gpu, 0)))
        self.cost = self._row({j: kind.usd_per_h for j, kind in enumerate(kinds)})
        self.added = self._row({2 * self.count: 1.0})
        self.most_added = np.inf if extra else 0.0

    def _row(self, values: Mapping[int, float]) -> Floats:
        row = np.zeros(self.width)
        for at, value in values.items():
            row[at] = value
        return row

    def _add(self, row: Floats, low: float = -np.inf, high: float = np.inf) -> None:
        self.rows.append(row)
        self.low.append(low)
        self.high.append(high)

    def shares_of(self, names: Iterable[str]) -> Floats:
        """Return the row that adds up the shares of some scenarios."""
        wanted = set(names)
        return self._row({self.count + j: 1.0 for j, name in enumerate(self.names) if name in wanted})

    def keep(self, row: Floats, low: float) -> None:
        """Add a row that must not fall below a value."""
        self._add(row, low=low)

    def solved(self, objective: Floats) -> Counts | None:
        """Return the replicas that make the objective least; None where no numbers keep all rows."""
        if not self.kinds:
            return () if all(low <= 0 for low in self.low) else None
        from scipy.optimize import Bounds, LinearConstraint, milp

        whole = np.ones(self.width, dtype=np.int64)
        whole[self.count : 2 * self.count] = 0
        top = np.full(self.width, np.inf)
        top[2 * self.count] = self.most_added
        for slack, presolve in _TRIES:
            found: Any = milp(
                objective, integrality=whole, bounds=Bounds(0.0, top), options={"mip_rel_gap": 0.0, "presolve": presolve},
                constraints=LinearConstraint(np.array(self.rows), np.array(self.low) - slack, self.high),
            )  # fmt: skip
            if found.status != _GAVE_UP:
                break
        return None if found.x is None else tuple(round(float(n)) for n in found.x[: self.count])
