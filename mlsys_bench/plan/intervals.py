"""90 % intervals of a plan: the profile's own uncertainty, the simulation's spread, and how far theory and simulation disagree.

The three are taken as independent and added as squares of log distances; the profile's part is asymmetric and comes from the
analytic model with drawn profiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mlsys_bench import stats
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.plan.sizing import MOST, Design, drawn, fewest, highest_rate, price, usable
from mlsys_bench.plan.trial import Trial
from mlsys_bench.pricing import Shelf
from mlsys_bench.types import SLO

DRAWS = 12
TAILS = (0.05, 0.95)
_SAMPLES = 256  # requests per draw: only ratios to the same sample with the central profile are used
SENSIBLE = 10  # times the replicas planned; a draw that asks for more says no rather than a number
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What the draws gave, and what they could not."""

    intervals: dict[str, Interval]
    overloaded: int  # draws in which the replicas planned would be overloaded
    infeasible: int  # draws in which no number of replicas keeps the limits


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draw:
    keys: dict[str, float]
    most_per_s: float
    capacity_per_s: float
    fewest: int


def of(design: Design, trial: Trial, analytic: Mapping[str, float], limits: SLO, headroom: float, shelf: Shelf, seed: int) -> Spread:
    """Return the intervals of replicas, cost, utilisation and every predicted figure."""
    profile = design.candidate.profile
    central = _draw(_replica(design, profile), design, limits, headroom)
    draws = [_draw(_replica(design, p), design, limits, headroom) for p in drawn(profile, DRAWS, seed)]
    feasible = [d for d in draws if d.most_per_s * SENSIBLE > central.most_per_s]
    replicas = _replicas(design, central, feasible)
    predicted, spread = trial.keys(limits), trial.spread(limits)
    intervals = {"replicas": replicas, "utilisation": _around(design.each_per_s / np.array([d.capacity_per_s for d in draws]), design)}
    if design.price is not None:
        intervals |= _costs(design, replicas, shelf)
    for key, value in predicted.items():
        if key in ("throughput_tokens_per_s", "request_rate_per_s"):  # set by the traffic while the replica is stable
            intervals[key] = (value * (1 - spread[key]), value * (1 + spread[key]))
        else:
            intervals[key] = _figure(key, value, central, draws, spread.get(key, 0.0), analytic.get(key))
    overloaded = sum(d.capacity_per_s * MOST < design.each_per_s for d in draws)
    return Spread(intervals=intervals, overloaded=overloaded, infeasible=DRAWS - len(feasible))


def _replica(design: Design, profile: object) -> Replica:
    return Replica(profile, design.replica.limits, design.replica.demand, samples=_SAMPLES)  # type: ignore[arg-type]


def _draw(replica: Replica, design: Design, limits: SLO, headroom: float) -> _Draw:
    rate = min(design.each_per_s, MOST * replica.capacity_per_s)
    return _Draw(
        keys=replica.predict(rate).keys(limits),
        most_per_s=highest_rate(replica, limits, usable(headroom), halvings=5)[0],
        capacity_per_s=replica.capacity_per_s,
        fewest=fewest(replica.capacity_per_s, design.rate_per_s, headroom),
    )


def _replicas(design: Design, central: _Draw, feasible: list[_Draw]) -> Interval:
    """Return the replicas that the drawn profiles ask for, scaled so that the central one asks for those planned."""
    if not feasible or central.most_per_s <= 0:
        return float(design.replicas), float(design.replicas)
    carried = design.rate_per_s / design.replicas * np.array([d.most_per_s for d in feasible]) / central.most_per_s
    scale = max(1.0, central.most_per_s * design.replicas / design.rate_per_s)  # what rounding up to whole replicas left over
    low, high = stats.quantiles(design.rate_per_s / (carried * scale), TAILS)
    return float(min(max(1, math.ceil(low - 1e-9)), design.replicas)), float(max(math.ceil(high - 1e-9), design.replicas))


def _costs(design: Design, replicas: Interval, shelf: Shelf) -> dict[str, Interval]:
    """Return the price of the fewest and of the most replicas, by hour, month and million tokens alike."""
    assert design.price is not None
    usd = design.price.usd_per_h
    prices = [price(design.candidate, int(n), shelf) for n in replicas]
    low, high = (p.usd_per_h if p is not None else usd for p in prices)
    return {"usd_per_hour": (min(low, usd), max(high, usd))}


def _around(values: np.ndarray, design: Design) -> Interval:
    """Return the 5 % and 95 % points, stretched to hold the central value."""
    low, high = stats.quantiles(values, TAILS)
    central = design.replica.utilisation(design.each_per_s)
    return min(low, central), max(high, central)


def _figure(key: str, value: float, central: _Draw, draws: list[_Draw], simulated: float, analytic: float | None) -> Interval:
    if key == "goodput":
        drawn_low, drawn_high = stats.quantiles([d.keys[key] for d in draws], TAILS)
        return min(drawn_low, value * (1 - simulated)), min(max(drawn_high, value), 1.0)
    if value <= 0:
        return value, value
    ratios = [d.keys[key] / central.keys[key] for d in draws if d.keys.get(key, 0.0) > 0 and central.keys.get(key, 0.0) > 0]
    low, high = np.log(stats.quantiles(ratios, TAILS)) if ratios else (0.0, 0.0)
    disagreement = math.log(analytic / value) if analytic is not None and analytic > 0 else 0.0
    down = math.sqrt(min(low, 0.0) ** 2 + simulated**2 + min(disagreement, 0.0) ** 2)
    up = math.sqrt(max(high, 0.0) ** 2 + simulated**2 + max(disagreement, 0.0) ** 2)
    return value * math.exp(-down), value * math.exp(up)
