"""90 % intervals of a pair: the profiles' own uncertainty, the simulation's spread, and how far theory and simulation disagree.

As for whole replicas (`plan.intervals`): the three are taken as independent and added as squares of log distances.  Both pools run one
engine on one device, so a draw moves both profiles alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlsys_bench import stats
from mlsys_bench.plan import sizing
from mlsys_bench.plan.disaggregated.pairs import Pair, Pools, of_decode, of_prefill, station
from mlsys_bench.plan.disaggregated.stations import ROUGH, Decode, Prefill
from mlsys_bench.plan.intervals import DRAWS, TAILS, last
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.trial import Trial
from mlsys_bench.pricing import Shelf
from mlsys_bench.types import LatencyProfile

Interval = tuple[float, float]
_HALVINGS = 4  # of a drawn pool's highest rate
_RATES = ("throughput_tokens_per_s", "request_rate_per_s")  # set by the traffic while the pools are stable


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draw:
    keys: dict[str, float]
    carries_per_s: tuple[float, float]  # by a replica of either pool, within its own limits and headroom
    busy: float


def of(pair: Pair, trial: Trial, analytic: Mapping[str, float], request: Request) -> dict[str, Interval]:
    """Return the intervals of replicas, of either pool and both, cost, utilisation and every predicted figure."""
    central, *draws = (_draw(pair, request, *profiles) for profiles in _profiles(pair, request.seed))
    needed = [_needed(pair, central, draw) for draw in draws]
    low, high = zip(*(stats.quantiles([n[i] for n in needed], TAILS) for i in (0, 1)), strict=True)
    at = (pair.prefill.replicas, pair.decode.replicas)
    pools = [(float(min(math.ceil(a - 1e-9), n)), float(max(math.ceil(b - 1e-9), n))) for a, b, n in zip(low, high, at, strict=True)]
    total = stats.quantiles([sum(map(math.ceil, n)) for n in needed], TAILS)
    busy = stats.quantiles([draw.busy for draw in draws], TAILS)
    found = {
        "replicas": (float(min(round(total[0]), sum(at))), float(max(round(total[1]), sum(at)))),
        "prefill_replicas": pools[0],
        "decode_replicas": pools[1],
        "utilisation": (min(busy[0], central.busy), max(busy[1], central.busy)),
        **_costs(pair, pools, request.shelf),
    }
    spread = trial.spread(request.slo)
    for key, value in trial.keys(request.slo).items():
        found[key] = _figure(key, value, central, draws, spread.get(key, 0.0), analytic.get(key))
    return found


def _profiles(pair: Pair, seed: int) -> list[tuple[LatencyProfile, LatencyProfile]]:
    """Return the profiles of both pools: their own, and drawn ones."""
    own = pair.prefill.candidate.profile, pair.decode.candidate.profile
    return [own, *zip(*(sizing.drawn(profile, DRAWS, seed) for profile in own), strict=True)]


def _draw(pair: Pair, request: Request, first: LatencyProfile, second: LatencyProfile) -> _Draw:
    whole, limits = station(pair.prefill), (pair.prefill.candidate.limits, pair.decode.candidate.limits)
    transfer_s = np.where(whole.demand.output > 1, pair.link.seconds(whole.demand.prompt), 0.0)
    prefill = Prefill(first, limits[0], whole.demand, transfer_s, ROUGH)
    decode = Decode(second, limits[1], whole.demand, ROUGH)
    both, usable = Pools(prefill, decode, (pair.prefill.replicas, pair.decode.replicas)), sizing.usable(request.headroom)
    own = ((prefill, of_prefill(request.slo)), (decode, of_decode(request.slo)))
    carried = [sizing.highest_rate(pool, slo, usable, halvings=_HALVINGS)[0] for pool, slo in own]  # type: ignore[arg-type]
    return _Draw(
        keys=both.predict(min(pair.rate_per_s, sizing.MOST * both.capacity_per_s)).keys(request.slo),
        carries_per_s=(carried[0], carried[1]),
        busy=pair.rate_per_s / both.capacity_per_s,
    )


def _needed(pair: Pair, central: _Draw, draw: _Draw) -> tuple[float, float]:
    """Return the replicas of either pool that a draw asks for, the central one asking for those planned."""
    pools = zip((pair.prefill, pair.decode), central.carries_per_s, draw.carries_per_s, strict=True)
    found = [pool.replicas * usual / drawn if drawn > 0 else math.inf for pool, usual, drawn in pools]
    most = [10.0 * pool.replicas for pool in (pair.prefill, pair.decode)]  # a draw that asks for more says no rather than a number
    return min(found[0], most[0]), min(found[1], most[1])


def _costs(pair: Pair, pools: list[Interval], shelf: Shelf) -> dict[str, Interval]:
    usd = pair.usd_per_h
    if usd is None:
        return {}
    low = pair.resized(int(pools[0][0]), int(pools[1][0]), shelf).usd_per_h
    prefill, decode = rentable(pair, pools, shelf)
    high = pair.resized(prefill, decode, shelf).usd_per_h
    return {"usd_per_hour": (min(usd if low is None else low, usd), max(usd if high is None else high, usd))}


def rentable(pair: Pair, pools: Sequence[Interval], shelf: Shelf) -> tuple[int, int]:
    """Return the upper ends of both pools, or the most on the way there from the plan that bounds let one rent in one place."""
    at = (pair.prefill.replicas, pair.decode.replicas)
    more = [int(high) - n for (_, high), n in zip(pools, at, strict=True)]
    steps = max(*more, 1)

    def pair_of(step: int) -> tuple[int, int]:
        return at[0] + more[0] * step // steps, at[1] + more[1] * step // steps

    return pair_of(last(0, steps, lambda step: pair.resized(*pair_of(step), shelf).usd_per_h is not None))


def _figure(key: str, value: float, central: _Draw, draws: list[_Draw], simulated: float, analytic: float | None) -> Interval:
    if key in _RATES:
        return value * max(0.0, 1 - simulated), value * (1 + simulated)
    if key == "goodput":
        low, high = stats.quantiles([d.keys[key] for d in draws], TAILS)
        return max(0.0, min(low, value * (1 - simulated))), min(max(high, value), 1.0)
    if value <= 0:
        return value, value
    ratios = [d.keys[key] / central.keys[key] for d in draws if d.keys.get(key, 0.0) > 0 and central.keys.get(key, 0.0) > 0]
    low, high = np.log(stats.quantiles(ratios, TAILS)) if ratios else (0.0, 0.0)
    disagreement = math.log(analytic / value) if analytic is not None and analytic > 0 else 0.0
    down = math.sqrt(min(low, 0.0) ** 2 + simulated**2 + min(disagreement, 0.0) ** 2)
    up = math.sqrt(max(high, 0.0) ** 2 + simulated**2 + max(disagreement, 0.0) ** 2)
    return value * math.exp(-down), value * math.exp(up)
