"""Pairs of pools by theory: the least that one can cost, and the fewest replicas of both that keep all limits together.

TTFT is the prefill pool's alone, TPOT and ITL are the decode pool's, so each pool is first sized for its own limits.  E2E and goodput are
of both: from there replicas are added to either, prefill by prefill, with the fewest that decode needs beside them, until the cheapest
pair that keeps them is found.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np

from mlsys_bench.plan import candidates, screen, sizing
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.plan.candidates import Candidate
from mlsys_bench.plan.demand import SAMPLES, Demand
from mlsys_bench.plan.disaggregated import link as links
from mlsys_bench.plan.disaggregated.link import Link
from mlsys_bench.plan.disaggregated.stations import ROUGH, Decode, Prefill, decoding, together
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.search import SURELY, WORTHWHILE, Bound
from mlsys_bench.plan.sizing import Design, Rank
from mlsys_bench.pricing import Fleet, Market, Shelf, packing
from mlsys_bench.types import SLO, Limit

_MORE = 16  # replicas added to a pool for limits on both, at most
Station = Prefill | Decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two pools of one device and precision, and the link between them."""

    prefill: Design
    decode: Design
    link: Link

    @property
    def replicas(self) -> int:
        """Replicas of both pools."""
        return self.prefill.replicas + self.decode.replicas

    @property
    def devices(self) -> int:
        """Devices in use."""
        return self.prefill.devices + self.decode.devices

    @property
    def rate_per_s(self) -> float:
        """Requests of the fleet."""
        return self.prefill.rate_per_s

    @property
    def usd_per_h(self) -> float | None:
        """What both pools cost."""
        prices = self.prefill.price, self.decode.price
        return None if None in prices else round(math.fsum(price.usd_per_h for price in prices if price is not None), 6)

    @property
    def name(self) -> str:
        """Such as '2 x H100-SXM bf16 + 1 x H100-SXM bf16 tp 4'."""
        return " + ".join(f"{pool.replicas} x {pool.candidate.name}" for pool in (self.prefill, self.decode))

    def sort_key(self) -> Rank:
        """Cheapest first, the unpriced last and by devices; of equals the one that keeps more of the model."""
        return _rank(self.prefill.candidate, self.prefill.price, self.decode.price, self.devices)

    def resized(self, prefill: int, decode: int, shelf: Shelf) -> Pair:
        """Return the pair with other numbers of replicas."""
        first, second = dataclasses.replace(self.prefill, replicas=prefill), dataclasses.replace(self.decode, replicas=decode)
        return bought(dataclasses.replace(self, prefill=first, decode=second), shelf)


class Pools:
    """A pair as a station of its own: `capacity_per_s` and `predict` are of all its traffic."""

    def __init__(self, prefill: Station, decode: Station, replicas: tuple[int, int]) -> None:
        """Keep them."""
        self.prefill, self.decode, self.replicas = prefill, decode, replicas

    @cached_property
    def capacity_per_s(self) -> float:
        """Requests per second at which the first of the pools saturates."""
        return min(self.replicas[0] * self.prefill.capacity_per_s, self.replicas[1] * self.decode.capacity_per_s)

    def predict(self, rate_per_s: float) -> Latencies:
        """Return what users see at this rate of the fleet."""
        return together(self.prefill.predict(rate_per_s / self.replicas[0]), self.decode.predict(rate_per_s / self.replicas[1]))


def station(design: Design) -> Station:
    """Return a pool's model: a design of one pool holds it in place of a whole replica's."""
    return cast(Station, design.replica)


def fleet(pair: Pair) -> Pools:
    """Return a pair as a station of its own."""
    return Pools(station(pair.prefill), station(pair.decode), (pair.prefill.replicas, pair.decode.replicas))


def of_prefill(limits: SLO) -> SLO:
    """Return the limits that the prefill pool keeps alone."""
    return tuple(x for x in limits if x.metric == "ttft")


def of_decode(limits: SLO) -> SLO:
    """Return the limits that the decode pool keeps alone."""
    return tuple(x for x in limits if x.metric in ("tpot", "itl"))


def of_both(limits: SLO) -> SLO:
    """Return the limits that no pool keeps alone."""
    return tuple(x for x in limits if x.metric in ("e2e", "goodput"))


def _rank(candidate: Candidate, first: Fleet | None, second: Fleet | None, devices: int) -> Rank:
    usd = round(first.new_usd_per_h + second.new_usd_per_h, 6) if first is not None and second is not None else None
    return usd is None, usd or 0.0, devices, sizing.rank(candidate, None, 0)[-1]


# ---------------------------------------------------------------- what a pair costs at least


@dataclass(frozen=True, slots=True, kw_only=True)
class Least:
    """Two candidates of one device and precision, and what their pools cost at least."""

    prefill: Bound
    decode: Bound
    key: Rank


def promising(request: Request, bounds: Sequence[Bound], below: Rank | None) -> list[Least]:
    """Return the pairs that could cost less than `below`, all where there is nothing to beat, by the least they can cost.

    Capacity is bounded as `screen` does it, of prompts without answers and of answers without prompts, headroom kept and latencies aside;
    a layout on which a request alone misses a limit has no part in the pool that keeps it.
    """
    usable = [bound for bound in bounds if _can_be_half(bound)]
    prefill = _leasts(request, usable, of_prefill(request.slo), _prompts)
    decode = _leasts(request, usable, of_decode(request.slo), decoding)
    found = []
    for alike in prefill.keys() & decode.keys():
        for (p, n, p_price), (d, m, d_price) in itertools.product(prefill[alike], decode[alike]):
            key = _rank(p.candidate, p_price, d_price, n * p.candidate.devices + m * d.candidate.devices)
            if below is None or key < below:
                found.append(Least(prefill=p, decode=d, key=key))
    return sorted(found, key=lambda least: (least.key, least.prefill.candidate.name, least.decode.candidate.name))


def _can_be_half(bound: Bound) -> bool:
    """Say whether a candidate is a GPU, and its requests have answers of more than one token."""
    device = bound.candidate.device
    return device is not None and device.kind == "gpu" and bool((bound.demand.output > 1).any())


def _leasts(
    request: Request, bounds: Sequence[Bound], limits: SLO, part: Callable[[Demand], Demand]
) -> dict[tuple[str, str], list[tuple[Bound, int, Fleet | None]]]:
    """Return the least replicas of each candidate for its part of the requests, and their price, by device and precision."""
    kept: dict[int, list[Bound]] = {}
    for bound in bounds:
        if sizing.worst(bound.alone, limits)[0] <= SURELY:
            kept.setdefault(id(bound.demand), []).append(bound)  # candidates that hold the same requests share their demand
    found: dict[tuple[str, str], list[tuple[Bound, int, Fleet | None]]] = {}
    prices: dict[tuple[str, int, int, int], Fleet | None] = {}
    for group in kept.values():
        own, clocks = part(group[0].demand), screen.Clocks([bound.candidate.profile for bound in group])
        own_limits = [bound.candidate.limits for bound in group]
        widest = [candidates.widest(request, bound.candidate) for bound in group]
        most_per_s = np.maximum(clocks.most_per_s(own_limits, own), clocks.most_per_s(widest, own)).tolist()
        for bound, most in zip(group, most_per_s, strict=True):
            candidate = bound.candidate
            replicas = sizing.fewest(most, request.workload.rate_per_s * own.share, request.headroom)
            rented = (candidate.gpu, candidate.devices, candidate.layout.pp, replicas)
            if rented not in prices:
                prices[rented] = sizing.price(candidate, replicas, request.shelf)
            found.setdefault((candidate.gpu, candidate.precision), []).append((bound, replicas, prices[rented]))
    return found


def _prompts(demand: Demand) -> Demand:
    """Return the demand of a prefill pool: one token each."""
    return Demand(prompt=demand.prompt, output=np.ones(len(demand.output)), share=demand.share)


# ---------------------------------------------------------------- sized by theory


def sized(request: Request, least: Least, traffic: Demand) -> Pair | None:
    """Return the cheapest pair of two candidates that keeps the limits by theory; None where none does."""
    link = links.between(least.prefill.candidate, least.decode.candidate, request.link_bytes_per_s)
    first, second = _held_by_both(least.prefill.candidate, least.decode.candidate)
    demand = traffic.fitting(first.limits)
    prefill = _pool(request, first, demand, of_prefill(request.slo), lambda c, n: _prefill(c, demand, link, n), batches=False)
    if prefill is None:
        return None
    decode = _pool(request, second, demand, of_decode(request.slo), lambda c, n: Decode(c.profile, c.limits, demand, n), batches=True)
    if decode is None:
        return None
    return _for_both(request, bought(Pair(prefill=prefill, decode=decode, link=link), request.shelf))


def _held_by_both(prefill: Candidate, decode: Candidate) -> tuple[Candidate, Candidate]:
    """Return the candidates with the longest context that either can hold: a request that one pool cannot hold is refused by both."""
    most = min(min(c.limits.max_context, c.limits.blocks * c.limits.block_tokens) for c in (prefill, decode))
    a, b = (dataclasses.replace(c, limits=c.limits._replace(max_context=most)) for c in (prefill, decode))
    return a, b


def _prefill(candidate: Candidate, demand: Demand, link: Link, samples: int) -> Prefill:
    transfer_s = np.where(demand.output > 1, link.seconds(demand.prompt), 0.0)
    return Prefill(candidate.profile, candidate.limits, demand, transfer_s, samples)


def _pool(
    request: Request, candidate: Candidate, demand: Demand, limits: SLO, build: Callable[[Candidate, int], Station], *, batches: bool
) -> Design | None:
    """Return the fewest replicas of a pool in the setting that needs fewest at a rough look, None where even idle ones miss a limit."""
    rate_per_s = request.workload.rate_per_s * demand.share
    best: Candidate | None = None
    most: int | None = None
    for setting in [candidate, *_settings(request, candidate, batches=batches)]:
        rough = _needed(request, cast(Replica, build(setting, ROUGH)), limits, rate_per_s, most)
        if rough is not None:
            best, most = setting, min(rough[0] - 1, int(rough[0] / WORTHWHILE))
            if rough[1] is None and batches:
                break  # no limit binds: larger batches would carry more only by holding more
    if best is None:
        return None
    full = cast(Replica, build(best, max(SAMPLES, len(demand.prompt))))
    found = _needed(request, full, limits, rate_per_s)
    return None if found is None else Design(
        candidate=best, replica=full, rate_per_s=rate_per_s, replicas=found[0], binds=found[1],
        fewest=sizing.fewest(full.capacity_per_s, rate_per_s, request.headroom), price=sizing.price(best, found[0], request.shelf),
    )  # fmt: skip


def _needed(request: Request, replica: Replica, limits: SLO, rate_per_s: float, most: int | None = None) -> tuple[int, Limit | None] | None:
    least = sizing.fewest(replica.capacity_per_s, rate_per_s, request.headroom)
    return sizing.needed(replica, limits, rate_per_s, least, most)


def _settings(request: Request, candidate: Candidate, *, batches: bool) -> Iterator[Candidate]:
    """Yield the candidate with other batches or steps, its longest context kept."""
    for setting in candidates.settings(request, candidate, batches):
        if setting.limits.blocks * setting.limits.block_tokens >= candidate.limits.max_context:
            yield dataclasses.replace(setting, limits=setting.limits._replace(max_context=candidate.limits.max_context))


def _for_both(request: Request, pair: Pair) -> Pair | None:
    """Return the cheapest pair, each pool no smaller than it is, that keeps the limits on both; None where none does."""
    limits = of_both(request.slo)
    if not limits:
        return pair
    least, most = pair.decode.replicas, 2 * pair.decode.replicas + _MORE
    best: Pair | None = None
    for n in range(pair.prefill.replicas, pair.prefill.replicas + _MORE):
        wider = pair.resized(n, least, request.shelf)
        if best is not None and wider.sort_key() >= best.sort_key():
            break
        enough = _fewest_decoding(wider, limits, most)
        if enough is None:
            continue
        found = pair.resized(n, enough, request.shelf)
        best = found if best is None or found.sort_key() < best.sort_key() else best
        most = enough
        if enough == least:
            break
    return best


def _fewest_decoding(pair: Pair, limits: SLO, most: int) -> int | None:
    """Return the fewest decode replicas, from those of the pair to `most`, that keep limits on both; None where they do not."""
    first = station(pair.prefill).predict(pair.prefill.each_per_s)

    def meets(n: int) -> bool:
        return sizing.worst(together(first, station(pair.decode).predict(pair.rate_per_s / n)), limits)[0] < 1

    low, high = pair.decode.replicas, most
    if meets(low):
        return low
    if not meets(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high


# ---------------------------------------------------------------- bought together


def bought(pair: Pair, shelf: Shelf) -> Pair:
    """Return the pair as two node pools in one place, where the cache goes from one to the other; unpriced where no place holds both.

    Where the cheapest offers of each pool are in one region anyway, these it is; else every region is tried for both.
    """
    found = _in_market(pair, shelf)
    if found.usd_per_h is None and not (shelf.market.reservations or shelf.market.quotas):
        return found  # a device that nobody prices
    if found.usd_per_h is not None and len(_places(found, shelf)) == 1:
        return found
    offers = packing.groups(shelf.market.of(pair.decode.candidate.gpu), shelf.within)
    here = [dataclasses.replace(shelf, market=dataclasses.replace(shelf.market, offers=tuple(group))) for group in offers]
    return min((_in_market(pair, place) for place in here), key=Pair.sort_key, default=found)


def _places(pair: Pair, shelf: Shelf) -> set[tuple[str, ...]]:
    """Return where the instances of both pools stand."""
    fleets = [pool.price for pool in (pair.prefill, pair.decode) if pool.price is not None]
    return {packing.place(lot.offer, shelf.within) for fleet in fleets for lot in fleet.lots}


def _in_market(pair: Pair, shelf: Shelf) -> Pair:
    """Return the pair at the least price of each pool; where they share commitments or quotas, the cheaper order of the two goes first."""
    if shelf.market.reservations or shelf.market.quotas:
        return min((_in_order(pair, shelf, prefill_first) for prefill_first in (True, False)), key=Pair.sort_key)
    first, second = (sizing.resized(pool, pool.replicas, shelf) for pool in (pair.prefill, pair.decode))
    return dataclasses.replace(pair, prefill=first, decode=second)


def _in_order(pair: Pair, shelf: Shelf, prefill_first: bool) -> Pair:
    first, second = (pair.prefill, pair.decode) if prefill_first else (pair.decode, pair.prefill)
    first = sizing.resized(first, first.replicas, shelf)
    left = shelf if first.price is None else dataclasses.replace(shelf, market=left_over(shelf.market, first.price))
    second = sizing.resized(second, second.replicas, left)
    prefill, decode = (first, second) if prefill_first else (second, first)
    return dataclasses.replace(pair, prefill=prefill, decode=decode)


def left_over(market: Market, used: Fleet) -> Market:
    """Return what a market still offers beside a fleet: less of each quota, and of what is committed or bounded."""
    instances = {lot.offer: lot for lot in used.lots}
    quotas = [
        dataclasses.replace(q, devices=q.devices - sum(lot.devices for lot in used.lots if q.covers(lot.offer))) for q in market.quotas
    ]
    reservations = {
        offer: held if (lot := instances.get(offer)) is None else dataclasses.replace(
            held, committed=held.committed - lot.committed, at_most=None if held.at_most is None else held.at_most - lot.instances
        )
        for offer, held in market.reservations.items()
    }  # fmt: skip
    return dataclasses.replace(market, quotas=tuple(quotas), reservations=reservations)
