"""The fewest replicas of one candidate, by theory: the highest rate one replica carries within all limits, and its price."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mlsys_bench import latency, models, pricing, slo
from mlsys_bench.errors import Infeasible
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.plan.candidates import Candidate
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.pricing import Fleet, Shelf
from mlsys_bench.types import SLO, LatencyProfile, Limit

MOST = 0.98  # of capacity: closer to saturation no queue settles within a day, whatever headroom is asked for
HALVINGS = 8  # of the bracket around the highest rate: to half a percent
IDLE = 1e-3  # of capacity: a replica that as good as nobody uses
_CLOSE = 0.004  # of a fleet: a step of large ones that is not worth another look


Rank = tuple[bool, float, int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """A candidate with its number of replicas.  `binds` is the limit that one fewer misses."""

    candidate: Candidate
    replica: Replica
    rate_per_s: float  # of the fleet
    replicas: int
    fewest: int  # below which headroom is gone, whatever the latencies
    binds: Limit | None  # None: capacity less headroom
    price: Fleet | None
    above_tokens: float = 0.0  # of the prompts it gets
    most_tokens: float = math.inf

    @property
    def each_per_s(self) -> float:
        """Rate of one replica, the fleet's split at random."""
        return self.rate_per_s / self.replicas

    @property
    def devices(self) -> int:
        """Devices in use."""
        return self.replicas * self.candidate.devices

    def sort_key(self) -> Rank:
        """Cheapest first, the unpriced last and by devices; of equals the one that keeps more of the model."""
        return rank(self.candidate, self.price, self.replicas)


def rank(candidate: Candidate, price: Fleet | None, replicas: int) -> Rank:
    """Return what designs are ordered by: price, devices, and bytes a weight, for nobody narrows weights for nothing."""
    bits = models.bytes_per_param(candidate.precision)
    return (price is None, price.new_usd_per_h if price else 0.0, replicas * candidate.devices, -bits)


def price(candidate: Candidate, replicas: int, shelf: Shelf) -> Fleet | None:
    """Return the cheapest way to rent so many replicas and the spares they need, None without a price or quota: see `order`."""
    try:
        return order(candidate, replicas, shelf)
    except Infeasible:  # a larger quota would do: such a fleet comes last, and whoever must take it orders it and is told
        return None


def order(candidate: Candidate, replicas: int, shelf: Shelf) -> Fleet | None:
    """Return the cheapest instances for so many replicas and their spares, None where nothing has a price.

    Stages of a pipeline may be nodes apart.

    Raises Infeasible, naming the quota, where too few may be rented.
    """
    stages = candidate.layout.pp
    if shelf.mix is not None:
        return shelf.mix(candidate.gpu, candidate.devices, stages, candidate.weights_bytes, replicas)
    fleet = rented(candidate, replicas, shelf)
    zones = [n * stages for n in pricing.spread(fleet, shelf.zones) if n] if shelf.zones > 1 else []
    return pricing.pack(candidate.gpu, candidate.devices // stages, fleet * stages, shelf.term, shelf.market, shelf.within, zones)


def rented(candidate: Candidate, replicas: int, shelf: Shelf) -> int:
    """Return how many replicas are rented where so many are needed: those to spare included."""
    if shelf.mix is not None:
        mixed = order(candidate, replicas, shelf)
        return mixed.replicas // candidate.layout.pp if mixed else replicas
    return replicas if shelf.rented is None else shelf.rented(candidate.devices, candidate.weights_bytes, replicas)


def fewest(capacity_per_s: float, rate_per_s: float, headroom: float) -> int:
    """Return the replicas of such a capacity that keep the headroom, latencies aside."""
    return max(1, math.ceil(rate_per_s / (usable(headroom) * capacity_per_s) - 1e-9))


def usable(headroom: float) -> float:
    """Return the share of a replica's capacity that may be used."""
    return min(1 - headroom, MOST)


def size(candidate: Candidate, replica: Replica, limits: SLO, rate_per_s: float, headroom: float, shelf: Shelf) -> Design | None:
    """Return the fewest replicas that keep limits and headroom, or None where even an idle replica misses a limit."""
    least = fewest(replica.capacity_per_s, rate_per_s, headroom)
    found = needed(replica, limits, rate_per_s, least)
    if found is None:
        return None
    replicas, binds = found
    return Design(
        candidate=candidate,
        replica=replica,
        rate_per_s=rate_per_s,
        replicas=replicas,
        fewest=least,
        binds=binds,
        price=price(candidate, replicas, shelf),
    )


def needed(replica: Replica, limits: SLO, rate_per_s: float, least: int, most: int | None = None) -> tuple[int, Limit | None] | None:
    """Return the fewest replicas that keep all limits, each with its share of the rate, and the limit that one fewer misses.

    There are at least `least` of them; exactly as many as are enough, in fleets of hundreds to half a percent.  Latencies rise with the
    rate, so a few counts decide: see `_Bracket`.  None where an idle replica misses a limit, or `most` replicas do.
    """
    if most is not None and most < least:
        return None
    excess, limit = worst(replica.predict(rate_per_s / least), limits)
    if excess < 1:
        return least, None
    at_rest_per_s = IDLE * replica.capacity_per_s if most is None else rate_per_s / most
    rest, missed = (excess, limit) if most == least else worst(replica.predict(at_rest_per_s), limits)
    if rest >= 1:
        return None
    bracket = _Bracket(at_rest_per_s, rest, rate_per_s / least, excess)
    few, enough = least, math.floor(rate_per_s / at_rest_per_s + 1e-9)
    while enough - few > max(1, _CLOSE * few):
        n = min(max(math.ceil(rate_per_s / bracket.next_per_s()), few + 1), enough - 1)
        excess, missed = worst(replica.predict(rate_per_s / n), limits)
        few, enough = (few, n) if excess < 1 else (n, enough)
        limit = limit if excess < 1 else missed
        bracket.narrow(rate_per_s / n, excess)
    return enough, limit


class _Bracket:
    """A rate that is carried and one that is not, and where between them the limit may lie.

    The logarithm of value / limit is taken as a straight line between the two (regula falsi); an end that stays twice counts half, as in
    the Illinois method, and every fifth step halves, so that no bend of the curve holds it up.
    """

    def __init__(self, low_per_s: float, low: float, high_per_s: float, high: float) -> None:
        self.low_per_s, self.high_per_s = low_per_s, high_per_s
        self._low, self._high = math.log(max(low, 1e-9)), math.log(high)
        self._steps, self._moved = 0, 0

    def next_per_s(self) -> float:
        """Return the rate to look at next."""
        if self._steps % 5 == 4:
            return (self.low_per_s + self.high_per_s) / 2
        return self.low_per_s + (self.high_per_s - self.low_per_s) * self._low / (self._low - self._high - 1e-12)

    def narrow(self, rate_per_s: float, excess: float) -> None:
        """Take in what was found at a rate: value / limit."""
        keeps, log = excess < 1, math.log(max(excess, 1e-9))
        if keeps:
            self.low_per_s, self._low = rate_per_s, log
            self._high *= 0.5 if self._moved < 0 else 1.0
        else:
            self.high_per_s, self._high = rate_per_s, log
            self._low *= 0.5 if self._moved > 0 else 1.0
        self._steps, self._moved = self._steps + 1, -1 if keeps else 1


def resized(design: Design, replicas: int, shelf: Shelf) -> Design:
    """Return the design with another number of replicas."""
    return dataclasses.replace(design, replicas=replicas, price=price(design.candidate, replicas, shelf))


def highest_rate(
    replica: Replica, limits: SLO, share: float, corrections: Mapping[str, float | Beyond] | None = None, halvings: int = HALVINGS
) -> tuple[float, Limit | None]:
    """Return the highest rate of one replica up to `share` of its capacity that keeps all limits, and the limit that stops it.

    Latencies rise with the rate; it does not depend on the fleet's rate.  Found as closely as so many halvings of the bracket find it.
    `corrections` multiplies a limit's value, or what load adds to it.  (0, limit) where an idle replica misses it.
    """
    low, high = IDLE * replica.capacity_per_s, share * replica.capacity_per_s
    excess, limit = worst(replica.predict(high), limits, corrections)
    if excess < 1:
        return high, None
    at_rest, missed = worst(replica.predict(low), limits, corrections)
    if at_rest >= 1:
        return 0.0, missed
    bracket, close = _Bracket(low, at_rest, high, excess), (high - low) / 2**halvings
    while bracket.high_per_s - bracket.low_per_s > 1.01 * close:
        edge = 0.4 * close
        middle = min(max(bracket.next_per_s(), bracket.low_per_s + edge), bracket.high_per_s - edge)
        excess, missed = worst(replica.predict(middle), limits, corrections)
        limit = limit if excess < 1 else missed
        bracket.narrow(middle, excess)
    return bracket.low_per_s, limit


def carried_per_s(design: Design, limits: SLO, headroom: float, corrections: Mapping[str, float] | None = None) -> float:
    """Return the rate one replica carries within limits and headroom, between what makes the design's replicas needed and enough."""
    most_per_s, _ = highest_rate(design.replica, slo.latencies(limits), usable(headroom), corrections)
    too_much = design.rate_per_s / (design.replicas - 1) if design.replicas > 1 else math.inf
    return min(max(most_per_s, design.each_per_s), too_much * (1 - 1e-6))


class Beyond(NamedTuple):
    """Multiplies what load adds to a value that an idle replica has anyway; both as shares of the limit."""

    idle: float
    factor: float


def worst(latencies: Latencies, limits: SLO, corrections: Mapping[str, float | Beyond] | None = None) -> tuple[float, Limit | None]:
    """Return the largest value / limit, corrected, and its limit."""
    found = latencies.excesses(limits)
    if corrections:
        found = [(_corrected(excess, corrections.get(slo.key(limit), 1.0)), limit) for excess, limit in found]
    return max(found, key=lambda e: e[0], default=(0.0, None))


def _corrected(excess: float, by: float | Beyond) -> float:
    return by.idle + by.factor * max(excess - by.idle, 0.0) if isinstance(by, Beyond) else by * excess


def bottleneck(design: Design) -> str:
    """Return what sets the capacity of a replica: 'slots', 'memory (KV)', 'compute', 'bandwidth', 'host' or 'links'.

    Each is relieved by a tenth in turn; the one that raises capacity most binds.
    """
    replica = design.replica
    limits, constants = replica.limits, replica.profile.constants
    more_slots = limits._replace(max_seqs=max(limits.max_seqs + 1, round(limits.max_seqs * 1.1)))
    more_memory = limits._replace(blocks=max(limits.blocks + 1, round(limits.blocks * 1.1)))
    faster_memory = {"bandwidth_bytes_per_s": constants["bandwidth_bytes_per_s"] * 1.1}
    faster_compute = {name: value * 1.1 for name, value in constants.items() if name.endswith("peak_flops_per_s")}  # experts' own too
    relieved = {
        "compute": Replica(_with(replica.profile, faster_compute), limits, replica.demand, samples=1),
        "bandwidth": Replica(_with(replica.profile, faster_memory), limits, replica.demand, samples=1),
        "slots": Replica(replica.profile, more_slots, replica.demand, samples=1),
        "memory (KV)": Replica(replica.profile, more_memory, replica.demand, samples=1),
        "host": Replica(_faster(replica.profile, ("step_s", "sequence_s")), limits, replica.demand, samples=1),
        "links": Replica(_faster(replica.profile, ("link_s", "link")), limits, replica.demand, samples=1),
    }
    return max(relieved, key=lambda name: relieved[name].capacity_per_s)


def _with(profile: LatencyProfile, constants: Mapping[str, float]) -> LatencyProfile:
    return dataclasses.replace(profile, constants={**profile.constants, **constants})


def _faster(profile: LatencyProfile, terms: tuple[str, ...]) -> LatencyProfile:
    scaled = [value / 1.1 if name in terms else value for name, value in zip(profile.terms, profile.coefficients, strict=True)]
    return dataclasses.replace(profile, coefficients=tuple(scaled))


def drawn(profile: LatencyProfile, count: int, seed: int) -> list[LatencyProfile]:
    """Return profiles from the profile's own uncertainty: its coefficients', and the residual of its form as a factor on all of them."""
    import numpy as np

    rng = np.random.default_rng(seed)
    factors = np.exp(profile.residual_log_sd * rng.standard_normal(count))
    return [_stretched(latency.draw(profile, rng), float(factor)) for factor in factors]


def _stretched(profile: LatencyProfile, factor: float) -> LatencyProfile:
    """Return the profile with all times multiplied; multipliers of full speed stay at or above the physics floor of 1."""
    times = zip(profile.terms, profile.coefficients, strict=True)
    return dataclasses.replace(
        profile, coefficients=tuple(c * factor if name.endswith("_s") else max(1.0, c * factor) for name, c in times)
    )
