"""Replicas to spare: N + k over zones, so that those left hold the limits at peak for the share of time an objective asks for.

A replica is up or down.  It stands on its GPUs, any of which takes it down, and on its own process: failure rates add,

    1 / MTBF = gpus / MTBF_gpu + 1 / MTBF_process,      MTTR = (sum of rate x time away) / (sum of rates).

With a repair crew for each (a new node in a cloud) replicas are up independently with probability A = MTBF / (MTBF + MTTR), whatever the
laws of both times: the number up is binomial.  With fewer crews it is the machine-repair chain, n replicas failing at 1 / MTBF each and
min(down, crews) repairs at 1 / MTTR, exact for exponential times.  Zones fail as a whole, independently of each other; the sum over which
zones are up is taken exactly.  Spare replicas run and fail like the others, and nothing is launched elsewhere while a zone is away.
Source: R. E. Barlow, F. Proschan, Mathematical Theory of Reliability (1965), the repairman problem: derived here, not copied.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mlsys_bench import units
from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.plan.reliability import Reliability, Spot, Zones
from mlsys_bench.pricing.packing import spread
from mlsys_bench.queueing.mmc import least
from mlsys_bench.surroundings import Secured
from mlsys_bench.types import Provenance

Floats = npt.NDArray[np.float64]
Law = dict[int, float]  # how many, with which probability
Fewest = Callable[[float], int]

YEAR_MIN = 365 * 24 * 60.0
MOST_SPARE = 10_000


def up_law(replicas: int, mtbf_s: float, repair_s: float, crews: int | None = None) -> Floats:
    """Return P(j of the replicas are up), j = 0 … n.  `crews` repair one each at a time; None: one for every replica.

    d down: up to d + 1 at (n - d) / MTBF, back to d - 1 at min(d, crews) / MTTR.
    """
    if not (replicas >= 0 and mtbf_s > 0 and repair_s >= 0) or (crews is not None and crews < 1):
        raise BadInput(f"{replicas} replicas, MTBF {mtbf_s:g} s, repair {repair_s:g} s, {crews} crews: no such fleet")
    down = np.arange(replicas)
    at_work = down + 1 if crews is None else np.minimum(down + 1, crews)
    if repair_s == 0:
        return np.asarray(np.eye(replicas + 1)[-1])
    logs = np.concatenate([[0.0], np.cumsum(np.log((replicas - down) * repair_s / (at_work * mtbf_s)))])
    weights = np.exp(logs - logs.max())[::-1]
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def standing(zones: Sequence[Law]) -> Law:
    """Return the law of how many replicas stand in zones that are up, from that of each zone: the zones fail independently."""
    law = {0: 1.0}
    for zone in zones:
        grown: Law = {}
        for (n, p), (more, q) in itertools.product(law.items(), zone.items()):
            grown[n + more] = grown.get(n + more, 0.0) + p * q
        law = grown
    return law


def zone_law(steady: int, up: float, spot: int = 0, spot_up: float = 1.0) -> Law:
    """Return how many replicas a zone offers: none when it is away, its spot replicas all or not at all."""
    law = {0: 1 - up}
    for n, p in ((steady, up * (1 - spot_up)), (steady + spot, up * spot_up)):
        law[n] = law.get(n, 0.0) + p
    return law


def share_held(needed: int, zones: Sequence[Law], law: Callable[[int], Floats]) -> float:
    """Return P(at least `needed` replicas are up): over the zones that are up, then over the replicas in them."""
    return min(1.0, math.fsum(p * float(law(n)[needed:].sum()) for n, p in standing(zones).items() if n >= needed))


def secured(
    objective: float,
    peak_per_s: float,
    fewest: Fewest,
    *,
    gpus: int,
    reliability: Reliability,
    zones: Zones | None = None,
    crews: int | None = None,
    spot: Spot | None = None,
    course_per_s: Sequence[float] = (),
) -> Secured:
    """Return the fewest replicas that keep the objective: the share of time in which those up hold the limits at peak.

    `fewest(rate)` says how many replicas hold the limits at a rate.  `gpus` of a replica.  With a `course_per_s` (rates at equal
    steps of a day) the share is of that course, each time with what it needs, instead of peak all day.  Raises Infeasible when no number
    of replicas does, because of the zones.
    """
    if not 0 < objective < 1:
        raise BadInput(f"an availability of {100 * objective:g} %: it lies between 0 % and 100 %, e.g. 99.9%")
    area = zones or Zones()
    needs = _needs(peak_per_s, fewest, course_per_s)
    needed = max(need for need, _ in needs)
    check_reachable(objective, area)
    case = Case(needs=needs, objective=objective, gpus=gpus, reliability=reliability, zones=area, crews=crews)
    if spot is None or spot.floor is None or spot.floor == 1:
        return of(case, needed, case.fewest(needed), ())
    floor_needs = _needs(spot.floor * peak_per_s, fewest, [min(r, spot.floor * peak_per_s) for r in course_per_s])
    steady = replace(case, needs=floor_needs).fewest(max(need for need, _ in floor_needs))
    return of(case, needed, steady, _spot(needed, steady, area), spot, replace(case, needs=floor_needs))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is asked: needs with the share of time they last, and all that fails."""

    needs: tuple[tuple[int, float], ...]
    objective: float
    gpus: int
    reliability: Reliability
    zones: Zones
    crews: int | None

    def held(self, replicas: int, spot: Sequence[int] = (), spot_up: float = 1.0) -> float:
        """Return the share of time in which so many replicas do, spread over the zones, with `spot` ones beside them in each."""
        laws: dict[int, Floats] = {}
        mtbf_s, repair_s = self.reliability.mtbf_s(self.gpus), self.reliability.repair_s(self.gpus)

        def law(n: int) -> Floats:
            if n not in laws:
                laws[n] = up_law(n, mtbf_s, repair_s, self.crews)
            return laws[n]

        sizes = spread(replicas, self.zones.count)
        zones = [zone_law(n, self.zones.up, s, spot_up) for n, s in itertools.zip_longest(sizes, spot, fillvalue=0)]
        return math.fsum(share * share_held(need, zones, law) for need, share in self.needs)

    def survives(self, needed: int, replicas: int) -> bool:
        """Say whether any one zone may go."""
        sizes = spread(replicas, self.zones.count)
        return not self.zones.survive or replicas - max(sizes) >= needed

    def fewest(self, needed: int) -> int:
        """Return the fewest replicas that keep the objective and outlive a zone where that is asked for."""
        return least(lambda n: self.survives(needed, n) and self.held(n) >= self.objective, first=max(needed, 1), most=needed + MOST_SPARE)


def _needs(peak_per_s: float, fewest: Fewest, course_per_s: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """Return replicas needed and the share of time they are, most needed last."""
    rates = list(course_per_s) or [peak_per_s]
    needs = [max(1, fewest(min(rate, peak_per_s))) if rate > 0 else 1 for rate in rates]
    return tuple((need, needs.count(need) / len(needs)) for need in sorted(set(needs)))


def check_reachable(objective: float, zones: Zones) -> None:
    """Raise Infeasible where zones alone are away too long, however many replicas there are."""
    best = 1 - (1 - zones.up) ** zones.count
    if best < objective:
        raise Infeasible(
            f"no number of replicas is available {100 * objective:g} %: {zones.count} zone(s) are all away {100 * (1 - best):.2g} % of "
            "the time; spread over more zones, or ask for less"
        )


def _spot(needed: int, steady: int, zones: Zones) -> tuple[int, ...]:
    """Return the spot replicas by zone that bring the fleet to its peak, and outlive the loss of one pool where there are several."""
    missing = max(0, needed - steady)
    if not missing:
        return ()
    pools = zones.count
    return spread(missing + (math.ceil(missing / (pools - 1)) if pools > 1 else 0), pools)


def of(
    case: Case, needed: int, steady: int, spot: tuple[int, ...], market: Spot | None = None, floor: Case | None = None
) -> Secured:  # fmt: skip
    """Return what so many replicas keep, with spot ones by zone beside them; `floor` is what those on demand were chosen for."""
    reliability, gpus = case.reliability, case.gpus
    availability, low, high = (_held(case, steady, spot, market, end) for end in (None, "low", "high"))
    mtbf_s, repair_s = reliability.mtbf_s(gpus), reliability.repair_s(gpus)
    replicas = steady + sum(spot)
    return Secured(
        needed=needed,
        replicas=replicas,
        spare=replicas - needed,
        zones=spread(steady, case.zones.count),
        spot=spot,
        survives_zone=case.zones.survive,
        binds=_binds(case, needed, steady, floor),
        objective=case.objective,
        availability=availability,
        interval=(low, high),
        downtime_min_per_year=(1 - availability) * YEAR_MIN,
        downtime_interval=((1 - high) * YEAR_MIN, (1 - low) * YEAR_MIN),
        floor_availability=floor.held(steady) if floor else availability,
        replica_availability=mtbf_s / (mtbf_s + repair_s),
        replica_mtbf_s=mtbf_s,
        replica_repair_s=repair_s,
        provenance=reliability.provenance if case.zones.count == 1 else Provenance.weakest(reliability.provenance, Provenance.ASSUMED),
        assumptions=tuple(_assumptions(case, market if spot else None)),
    )


def _binds(case: Case, needed: int, steady: int, floor: Case | None) -> str:
    if floor is not None:
        return "floor"
    if steady == needed:
        return "peak"
    return "objective" if case.held(steady - 1) < case.objective else "zone"


def _held(case: Case, steady: int, spot: tuple[int, ...], market: Spot | None, end: str | None) -> float:
    """Return the share of time held, with every figure at the end of its interval where fleets fail more ('low') or less ('high')."""
    if end is None:
        return case.held(steady, spot, market.up if market else 1.0)
    there = replace(case, reliability=case.reliability.at(end), zones=case.zones.at(end))
    rented = market.at(end) if market else None
    return there.held(steady, spot, rented.up if rented else 1.0)


def _assumptions(case: Case, market: Spot | None) -> Iterator[str]:
    for name, given in case.reliability.figures():
        yield f"{name} {units.show_s(given.value)} ({given.provenance}): {given.source}"
    if case.zones.count > 1 or case.zones.up < 1:
        yield f"a zone is away {units.show_s(case.zones.mttr.value)} every {units.show_s(case.zones.mtbf.value)}: {case.zones.mttr.source}"
    if case.crews is not None:
        yield f"{case.crews} repair(s) at a time, the others wait; while a zone is away, as if the rest were in balance"
    if market is not None:
        life, away = units.show_s(market.life.value), units.show_s(market.away_s)
        yield f"spot pools, one in each zone, live {life} and are back after {away}, each as a whole: {market.life.source}"
