"""Fleets of several kinds, short prompts on one and long ones on another: a small integer program.

The idea is Mélange's (Griggs et al. 2024, arXiv:2404.14527).  Prompts fall into buckets of about equally many tokens; a router sees their
length, not that of the answer to come.  A replica of candidate g that gets bucket b alone carries m(g, b) requests per second within all
limits, so one request a second takes 1 / m(g, b) of it.  Wanted are pools p, each a run of neighbouring buckets with a candidate g(p) and
whole replicas n(p) of its own, that cost least:

    min  sum_p usd(g(p)) n(p)    with    sum_(b in p) rate(b) / m(g(p), b) <= n(p),    every b in one p

Loads of buckets that share a replica are taken to add up, so the pools found are worked out anew as what they are.  A limit is one on all
requests: a bucket whose own percentile misses it even on an idle replica, as the longest few prompts may, is held to `RELAXED` times its
idle value instead, and the fleet is taken only where all pools' requests together keep the limits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mlsys_bench import slo
from mlsys_bench.plan import screen, sizing
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.plan.candidates import Candidate
from mlsys_bench.plan.demand import Demand
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.search import Bound
from mlsys_bench.plan.sizing import Design
from mlsys_bench.pricing import Shelf
from mlsys_bench.types import SLO

BUCKETS = 6
KINDS = 6  # devices the program chooses from
RELAXED = 1.3
LARGE = 64  # replicas of a fleet in which rounding to instances no longer shows
_HALVINGS = 6
_TOGETHER, _MOST_TOGETHER = 8192, 131_072  # requests of all pools that are looked at together
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Replicas of one kind for prompts of `above` < tokens <= `most`, by theory; `share` of all requests are such."""

    design: Design
    above_tokens: float
    most_tokens: float
    share: float
    limits: SLO  # of its own requests: those of all, or what they can keep


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """A fleet of pools, and what it costs."""

    pools: tuple[Pool, ...]
    usd_per_h: float


def mixed(request: Request, bounds: Sequence[Bound], single: Design) -> Mixed | None:
    """Return the cheapest fleet of several kinds; None where one kind, `single`, is as cheap.

    Of each device the candidate that can cost least takes part, of equals the one that carries most; priced ones only.  A pool is one run
    of neighbouring buckets: buckets of one candidate that others separate become pools of their own.
    """
    kinds = _kinds(bounds, request.shelf)
    if len({candidate.gpu for candidate, _ in kinds}) < 2 or single.price is None:
        return None
    traffic = single.replica.demand  # all that one kind can hold
    edges = _edges(traffic.prompt)
    parts = [_between(traffic, low, high) for low, high in itertools.pairwise(edges)]
    carried = np.array([[_carries(request, candidate, part) for part in parts] for candidate, _ in kinds])
    rates = np.array([request.workload.rate_per_s * part.share for part in parts])
    most = _most_of_each([candidate.gpu for candidate, _ in kinds], carried, rates)
    kinds, carried = [kinds[i] for i in most], carried[most]
    chosen = assign(np.array([usd for _, usd in kinds]), carried, rates)
    if chosen is None:
        return None
    pools = [_pool(request, kinds[kind][0], traffic, edges[first], edges[end]) for kind, first, end in _runs(chosen)]
    found = tuple(pool for pool in pools if pool is not None)
    usd = sum(pool.design.price.usd_per_h for pool in found if pool.design.price is not None)
    if len(found) < max(2, len(pools)) or usd >= single.price.usd_per_h * (1 - 1e-9) or not _keeps(found, request.slo):
        return None
    return Mixed(pools=found, usd_per_h=usd)


def _kinds(bounds: Sequence[Bound], shelf: Shelf) -> list[tuple[Candidate, float]]:
    """Return for each priced device the candidates of the lowest bound, and dollars an hour of one of its replicas in a large fleet."""
    priced = [(bound.candidate, bound.price.usd_per_h) for bound in bounds if bound.price is not None]
    least = {candidate.gpu: usd for candidate, usd in reversed(priced)}
    devices = list(dict.fromkeys(candidate.gpu for candidate, _ in priced))[:KINDS]
    found = []
    for candidate in [c for c, usd in priced if c.gpu in devices and usd <= least[c.gpu] * (1 + 1e-9)]:
        price = sizing.price(candidate, LARGE, shelf)
        if price is not None:
            found.append((candidate, price.usd_per_h / LARGE))
    return found


def _most_of_each(gpus: Sequence[str], carried: Floats, rates: Floats) -> list[int]:
    """Return of each device the candidate that the traffic keeps least busy, the first among equals."""
    load = np.where(carried > 0, rates / np.where(carried > 0, carried, 1.0), np.inf).sum(axis=1)
    first: dict[str, int] = {}
    for i in np.argsort(load, kind="stable"):
        first.setdefault(gpus[i], int(i))
    return sorted(first.values())


def _keeps(pools: Sequence[Pool], limits: SLO) -> bool:
    """Say whether the requests of all pools together keep the limits, by theory."""
    seen = [pool.design.replica.predict(pool.design.each_per_s) for pool in pools]
    everybody = together(seen, [pool.share for pool in pools], [pool.design.replica.demand.mean_output for pool in pools])
    return all(excess < 1 for excess, _ in everybody.excesses(limits))


def together(seen: Sequence[Latencies], shares: Sequence[float], mean_outputs: Sequence[float]) -> Latencies:
    """Return what the requests of all pools see, each pool's sample repeated or cut to its share of the requests, gaps to its tokens'."""
    most = min(_MOST_TOGETHER, max(_TOGETHER, *(len(x.ttft_s) / share for x, share in zip(seen, shares, strict=True))))
    counts = [max(1, round(most * share)) for share in shares]

    def all_of(name: str) -> Floats:
        return np.concatenate([np.resize(getattr(x, name), n) for x, n in zip(seen, counts, strict=True)])

    gaps = [x.itl_weights if x.itl_weights is not None else np.ones(len(x.itl_s)) for x in seen]
    tokens = [share * output for share, output in zip(shares, mean_outputs, strict=True)]
    return Latencies(
        ttft_s=all_of("ttft_s"), tpot_s=all_of("tpot_s"), e2e_s=all_of("e2e_s"), itl_s=np.concatenate([x.itl_s for x in seen]),
        itl_weights=np.concatenate([w * n / max(float(w.sum()), 1e-300) for w, n in zip(gaps, tokens, strict=True)]),
    )  # fmt: skip


def _edges(prompt: Floats) -> list[float]:
    """Return the borders of buckets that hold about equally many prompt tokens each."""
    ordered = np.sort(prompt)
    tokens = np.cumsum(ordered) / ordered.sum()
    inner = [float(ordered[np.searchsorted(tokens, k / BUCKETS)]) for k in range(1, BUCKETS)]
    return [0.0, *sorted({edge for edge in inner if edge < ordered[-1]}), float("inf")]


def _between(traffic: Demand, above: float, most: float) -> Demand:
    """Return the requests whose prompts lie in a bucket, and their share of all."""
    kept = (traffic.prompt > above) & (traffic.prompt <= most)
    return Demand(prompt=traffic.prompt[kept], output=traffic.output[kept], share=traffic.share * float(kept.mean()))


def _carries(request: Request, candidate: Candidate, part: Demand) -> float:
    """Return the rate of a bucket that a replica carries within all limits; 0 where it misses one, or cannot hold it all."""
    served = part.fitting(candidate.limits)
    if served.share < part.share * (1 - 1e-9):
        return 0.0
    replica = Replica(candidate.profile, candidate.limits, served, samples=256)
    limits = _relaxed(request.slo, screen.alone(candidate.profile, candidate.limits, served))
    return sizing.highest_rate(replica, limits, sizing.usable(request.headroom), halvings=_HALVINGS)[0]


def _relaxed(limits: SLO, alone: Latencies) -> SLO:
    """Return the limits, those that requests alone on a replica miss or nearly miss set to what they can keep."""
    least = {limit: max(1.0, RELAXED * excess) for excess, limit in alone.excesses(limits) if limit.metric != "goodput"}
    return tuple(replace(limit, limit=limit.limit * least[limit]) for limit in slo.latencies(limits))


def assign(usd: Floats, carried: Floats, rates: Floats) -> list[int] | None:
    """Return the candidate of each bucket in the cheapest fleet; None where some bucket has none.

    `usd[g]` a replica, `carried[g, b]` requests per second of bucket b that one carries, 0 for none, `rates[b]`.  The program is
    small enough to look at every assignment, some 47,000: exact, and sooner done than a solver is loaded.
    """
    kinds, buckets = carried.shape
    load = np.where(carried > 0, rates / np.where(carried > 0, carried, 1.0), np.inf)
    paid, open_load, last = np.zeros(kinds), load[:, 0], np.arange(kinds)  # by assignment: pools behind, and the pool that goes on
    for b in range(1, buckets):  # every assignment of the buckets so far, times every kind for this one
        goes_on = last[:, None] == np.arange(kinds)[None, :]
        paid = np.where(goes_on, paid[:, None], (paid + _whole(open_load) * usd[last])[:, None]).ravel()
        open_load = np.where(goes_on, open_load[:, None] + load[None, :, b], load[None, :, b]).ravel()
        last = np.tile(np.arange(kinds), len(last))
    cost = paid + _whole(open_load) * usd[last]
    best = int(np.argmin(cost))
    return [best // kinds ** (buckets - 1 - b) % kinds for b in range(buckets)] if np.isfinite(cost[best]) else None


def _whole(load: Floats) -> Floats:
    """Return whole replicas, at least one."""
    return np.maximum(np.ceil(load - 1e-9), 1.0)


def _runs(chosen: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (kind, first bucket, bucket after the last) of each run of neighbouring buckets."""
    starts = [b for b in range(len(chosen)) if b == 0 or chosen[b] != chosen[b - 1]]
    return [(chosen[b], b, end) for b, end in zip(starts, [*starts[1:], len(chosen)], strict=True)]


def _pool(request: Request, candidate: Candidate, traffic: Demand, above: float, most: float) -> Pool | None:
    """Return a pool sized for the requests it gets; None where it turns out to miss a limit."""
    part = _between(traffic, above, most)
    replica = Replica(candidate.profile, candidate.limits, part.fitting(candidate.limits))
    limits = _relaxed(request.slo, screen.alone(candidate.profile, candidate.limits, replica.demand))
    design = sizing.size(candidate, replica, limits, request.workload.rate_per_s * part.share, request.headroom, request.shelf)
    if design is None or design.price is None:
        return None
    own = replace(design, above_tokens=above, most_tokens=most)
    return Pool(design=own, above_tokens=above, most_tokens=most, share=part.share, limits=limits)
