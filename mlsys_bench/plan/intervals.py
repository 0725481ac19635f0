"""90 % intervals of a plan: where its figures lie, over long, were the engine one that its profile's own uncertainty allows.

A figure is what many such engines would show on average over hours, not what one load test shows: that has an interval of its own.

    centre   simulation and, where it applies, theory as two witnesses, each weighed by its own uncertainty: of the simulation the spread of
             batches (`EVENED`), of theory what was measured against long simulations (`THEORY`).  Where they contradict each other by
             more than both allow, both are believed less
    outside  what a profile that was not measured on a server is unsure of outside a request's own steps (`latency.overhead`)
    profile  theory with profiles drawn from the profile's uncertainty (`plan.draws`); it is asymmetric.  Steps of many kinds make a figure:
             part of the residual of the profile's form averages out, but not of the usual gap between tokens, which is one kind of step
    all      squares of log distances added

Replicas: the rate that one carries within limits and headroom, for each draw, and as far as the simulation of the binding limit is
uncertain.  A smaller fleet that may be enough is inside the interval.  Of a trace theory knows the mean only:
`plan.replays`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mlsys_bench import latency, slo, workload
from mlsys_bench.errors import Infeasible
from mlsys_bench.plan import confirm, draws
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.plan.draws import TAILS, Draws
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.sizing import HALVINGS, IDLE, MOST, Beyond, Design, highest_rate, order, price, usable
from mlsys_bench.plan.trial import Trial
from mlsys_bench.pricing import Shelf
from mlsys_bench.types import SLO, LatencyProfile

__all__ = ["DRAWS", "TAILS", "Interval", "Spread", "of"]

DRAWS = 12  # where profiles are drawn at random
SHARES = (0.05, 0.18, 0.31, 0.44, 0.56, 0.69, 0.82, 0.95)  # of engines that are faster than each of those worked out here
# sd of the log of theory over a long simulation, at p50, p95 and p99
THEORY = {"ttft": (0.03, 0.07, 0.10), "tpot": (0.02, 0.07, 0.14), "itl": (0.03, 0.05, 0.05), "e2e": (0.02, 0.03, 0.04)}
_SENSIBLE = 10  # times the replicas planned; a draw that asks for more says no rather than a number
_RATES = ("throughput_tokens_per_s", "request_rate_per_s")  # set by the traffic while the replicas are stable
_Z = 1.645
# A run of even requests (`plan.evened`) differs from one of hours so many times as its batches do, at p50, p95 and p99: measured, for short
# runs (ADR 0037), which miss the waves of load of hours that show in the tails of TTFT and TPOT, and for `confirm.SURER` times as long
# ones (ADR 0039).
EVENED = {"ttft": (0.7, 1.2, 1.5), "tpot": (0.7, 1.3, 1.6), "itl": (0.8, 0.9, 1.0), "e2e": (0.7, 0.8, 0.8)}
EVENED_LONG = {"ttft": (0.7, 1.0, 1.2), "tpot": (0.7, 1.0, 1.1), "itl": (0.8, 0.9, 1.0), "e2e": (0.7, 0.8, 0.8)}
EVENED_FLEET = 0.5  # the same where a limit says how many replicas are needed, whole ones
_WHOLE = 0.9  # of what drawn profiles spread a fleet: rounded up to whole replicas, an interval holds more than it must (ADR 0039)
_HALVINGS = 7  # of the highest rate with a drawn profile: to a percent
_ALIKE = 0.1  # of the SCV of gaps from 1
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What the draws gave, and what they could not."""

    intervals: dict[str, Interval]
    overloaded: int  # draws in which the replicas planned would be overloaded
    infeasible: int  # draws in which no number of replicas keeps the limits
    draws: int = len(SHARES)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    """What theory says with one profile."""

    keys: dict[str, float]
    capacity_per_s: float
    most_per_s: float  # within limits and headroom


@dataclass(frozen=True, slots=True, kw_only=True)
class Centre:
    """Log of a figure as its witnesses have it, its sd, and the sd that counts for a fleet."""

    log: float
    sd: float
    fleet_sd: float

    @property
    def high(self) -> float:
        """Return the figure at the upper end of what counts for a fleet."""
        return math.exp(self.log + _Z * self.fleet_sd)


def of(design: Design, trial: Trial, analytic: Mapping[str, float], request: Request) -> Spread:
    """Return the intervals of replicas, cost, utilisation and every predicted figure."""
    if request.trace is not None:
        from mlsys_bench.plan import replays

        return replays.of(design, trial, request)
    limits, profile = request.slo, design.candidate.profile
    found = draws.of(profile, usual_step(design.replica), bare_step(design), SHARES, request.seed)
    predicted, sampled = trial.keys(limits), trial.spread(limits)
    trusted = _applies(design, request)
    centres = {
        key: centre(key, value, sampled[key], analytic.get(key) if trusted else None, outside_sd(key, design, predicted), trial.effort)
        for key, value in predicted.items()
        if value > 0 and key in sampled
    }
    scaling = _scaling(centres, analytic, limits)
    central, *drawn = [_with(p, design, request, scaling) for p in (profile, *found.profiles)]
    crowds = _of_crowds(design, central, limits)
    feasible = [d for d in drawn if d.most_per_s * _SENSIBLE > central.most_per_s > 0]
    replicas = _replicas(design, request, found, central, drawn if len(feasible) == len(drawn) else [], centres, scaling)
    intervals = {"replicas": replicas, "utilisation": _utilisation(design, found, drawn)} | costs(design, replicas, request.shelf)
    for key, value in predicted.items():
        if key.endswith("goodput"):  # of all, or of one tenant: chat:goodput
            intervals[key] = _share(value, sampled.get(key, 0.0), found.band([d.keys[key] - central.keys[key] for d in drawn]))
        elif key in _RATES or key not in centres:
            intervals[key] = (value * max(0.0, 1 - sampled.get(key, 0.0)), value * (1 + sampled.get(key, 0.0)))
        else:
            low, high = _band(key, found, central, drawn)
            if key.rpartition(":")[2] == "itl_p50_s":  # of one kind of step, whose share in the usual step the draws were not ordered by
                low, high = min(low, found.bare[0]), max(high, found.bare[1])
            high = math.hypot(max(high, 0.0), _Z * crowds.get(key, 0.0))
            intervals[key] = around(value, centres[key].log, _Z * centres[key].sd, (low, high))
    overloaded = sum(d.capacity_per_s * MOST < design.each_per_s for d in drawn)
    return Spread(intervals=intervals, overloaded=overloaded, infeasible=len(drawn) - len(feasible))


def usual_step(replica: Replica) -> tuple[float, ...]:
    """Return the features of the average step of a full replica: what decides how many requests it answers."""
    demand, admitted = replica.demand, replica.admitted_per_step
    decodes, read = admitted * (demand.mean_output - 1), replica.read_per_step
    pairs = read * float((demand.prompt**2).mean()) / 2
    return decodes, decodes * replica.context_tokens, read * demand.mean_prompt, pairs, decodes + read


def bare_step(design: Design) -> tuple[float, ...]:
    """Return the features of a step that decodes only, with as many sequences as are usual: what the usual gap between tokens is."""
    replica = design.replica
    seated = max(replica.utilisation(design.each_per_s) * replica.slots, 1.0)
    return seated, seated * replica.context_tokens, 0.0, 0.0, seated


def _applies(design: Design, request: Request) -> bool:
    """Say whether theory is a witness: it knows neither bursts, nor routers that look at load, nor preemption.

    Gaps of a law of its own are all but Poisson's once a fleet has thinned them at random: the SCV is then 1 + (cv^2 - 1) / replicas.
    """
    law = workload.parse_arrivals(request.workload.arrivals)
    scv = {"poisson": 1.0, "constant": 0.0}.get(law.kind, law.cv**2)
    alike = abs(scv - 1) / design.replicas <= _ALIKE and law.kind != "trace" and not law.modulations
    return alike and request.routing == "random" and design.replica.binds == "slots"


def _with(profile: LatencyProfile, design: Design, request: Request, scaling: Mapping[str, float]) -> _Drawn:
    replica = _replica(profile, design)
    rate = min(design.each_per_s, MOST * replica.capacity_per_s)
    most_per_s = _carried(replica, request, scaling, _HALVINGS)
    return _Drawn(keys=replica.predict(rate).keys(request.slo), capacity_per_s=replica.capacity_per_s, most_per_s=most_per_s)


def _replica(profile: LatencyProfile, design: Design) -> Replica:
    """Return a replica with another profile, as closely looked at as the plan's own: a p99 of fewer requests jumps from rate to rate."""
    if profile is design.candidate.profile:
        return design.replica
    return Replica(profile, design.replica.limits, design.replica.demand)


# ---------------------------------------------------------------- two witnesses


def centre(key: str, simulated: float, half: float, analytic: float | None, unseen: float = 0.0, effort: int = 1) -> Centre:
    """Return the mean of simulation and theory weighed by their precision; contradictions widen it (Birge 1932, Phys. Rev. 40, 207).

    `unseen`: sd of the log of what both took from the profile as it is, and neither can know better.  `effort`: of the simulation.
    """
    evened = EVENED_LONG if effort >= confirm.SURER else EVENED
    theory, differs = _tabled(THEORY, key), _tabled(evened, key) or EVENED_FLEET
    sampled, for_fleet = (max(factor * half, 1e-3) / _Z for factor in (differs, EVENED_FLEET))
    apart = math.log(analytic / simulated) if theory is not None and analytic is not None and analytic > 0 else None
    weight, sd = _weighed(sampled, theory, apart)
    fleet_sd = _weighed(for_fleet, theory, apart)[1]
    return Centre(log=math.log(simulated) + weight * (apart or 0.0), sd=math.hypot(sd, unseen), fleet_sd=math.hypot(fleet_sd, unseen))


def _weighed(sampled: float, theory: float | None, apart: float | None) -> tuple[float, float]:
    """Return the weight of theory, and the sd of both together."""
    if theory is None or apart is None:
        return 0.0, sampled
    both = math.hypot(sampled, theory)
    return sampled**2 / both**2, sampled * theory / both * max(1.0, abs(apart) / (_Z * both))


def outside_sd(key: str, design: Design, predicted: Mapping[str, float]) -> float:
    """Return the sd of the log of a TTFT or E2E for what is uncertain of the time outside a request's own steps, else 0."""
    if key.rpartition(":")[2].partition("_")[0] not in ("ttft", "e2e"):
        return 0.0
    outside = latency.overhead(design.candidate.profile)
    return outside.spread_s(design.replica.demand.mean_prompt, predicted.get("itl_p50_s", 0.0)) / predicted[key]


def _tabled(table: Mapping[str, tuple[float, float, float]], key: str) -> float | None:
    """Return what a table says of a key such as 'ttft_p95_s' or 'chat:ttft_p95_s', by its percentile; None for other metrics."""
    metric, _, rest = key.rpartition(":")[2].partition("_")
    if metric not in table:
        return None
    stat = rest.removesuffix("_s")
    return float(np.interp(float(stat[1:]) if stat.startswith("p") else 50.0, (50.0, 95.0, 99.0), table[metric]))


def _of_crowds(design: Design, central: _Drawn, limits: SLO) -> dict[str, float]:
    """Return by how much the log of each TTFT may lie higher as requests now and then hold more memory than usual.

    A pool that runs full stays so for long, and a short run hardly meets it: theory at a load one sd of what the seated hold higher.
    """
    replica = design.replica
    if replica.binds != "memory":
        return {}
    mean, sd = replica.demand.held_tokens
    rate = min(design.each_per_s * (1 + sd / mean / math.sqrt(replica.slots)), MOST * replica.capacity_per_s)
    seen = replica.predict(rate).keys(limits)
    late = {key: central.keys[key] for key in seen if key.rpartition(":")[2].startswith("ttft") and central.keys.get(key, 0.0) > 0}
    return {key: max(math.log(seen[key] / value), 0.0) for key, value in late.items() if seen[key] > 0}


def _scaling(centres: Mapping[str, Centre], analytic: Mapping[str, float], limits: SLO) -> dict[str, float]:
    """Return what to multiply theory by, limit by limit, so that it says the centre at the rate planned."""
    keys = {slo.key(limit): f"{slo.key(limit)}_s" for limit in slo.latencies(limits)}
    return {name: math.exp(centres[key].log) / analytic[key] for name, key in keys.items() if key in centres and analytic.get(key, 0.0) > 0}


def _band(key: str, found: Draws, central: _Drawn, drawn: list[_Drawn]) -> Interval:
    """Return the 5 % and 95 % points of the log of a figure over that of the central profile."""
    seen = [d.keys.get(key, 0.0) for d in (central, *drawn)]
    return found.band(np.log(np.array(seen[1:]) / seen[0]).tolist()) if min(seen) > 0 else (0.0, 0.0)


def around(value: float, log: float, half: float, band: Interval) -> Interval:
    """Return the interval about a centre, stretched to hold the value that the plan shows."""
    low = log - math.hypot(half, min(band[0], 0.0))
    high = log + math.hypot(half, max(band[1], 0.0))
    return min(math.exp(low), value), max(math.exp(high), value)


def _share(value: float, half: float, band: Interval) -> Interval:
    down, up = math.hypot(half * value, min(band[0], 0.0)), math.hypot(half * value, max(band[1], 0.0))
    return max(value - down, 0.0), min(value + up, 1.0)


def _utilisation(design: Design, found: Draws, drawn: list[_Drawn]) -> Interval:
    low, high = found.band([math.log(design.each_per_s / d.capacity_per_s) for d in drawn])
    central = design.replica.utilisation(design.each_per_s)
    return min(math.exp(low), central), max(math.exp(high), central)


# ---------------------------------------------------------------- replicas and cost


def _replicas(
    design: Design, request: Request, found: Draws, central: _Drawn, drawn: list[_Drawn],
    centres: Mapping[str, Centre], scaling: Mapping[str, float],
) -> Interval:  # fmt: skip
    """Return the replicas needed, rounded up: by the centre, with drawn profiles, and as far as the binding limit's value is uncertain."""
    at, usual = float(design.replicas), central.most_per_s
    if usual <= 0 or not drawn:
        return at, at * (1 if drawn else _SENSIBLE)
    carried = _carried(design.replica, request, scaling)
    if carried <= 0:
        return at, at * _SENSIBLE
    slower = _moved(scaling, centres, _Z) | _beyond(design, request, centres)
    most, least = (_carried(design.replica, request, moved) for moved in (_moved(scaling, centres, -_Z), slower))
    less = math.log(max(most, carried) / carried)
    more = math.log(carried / min(least, carried)) if least > 0 else math.log(_SENSIBLE)
    band = tuple(_WHOLE * end for end in found.band([math.log(usual / d.most_per_s) for d in drawn]))
    needed = math.log(design.rate_per_s / carried)
    low, high = needed - math.hypot(less, min(band[0], 0.0)), needed + math.hypot(more, max(band[1], 0.0))
    return min(max(1.0, float(math.ceil(math.exp(low) - 1e-9))), at), max(float(math.ceil(math.exp(high) - 1e-9)), at)


def _carried(replica: Replica, request: Request, scaling: Mapping[str, float | Beyond], halvings: int = HALVINGS) -> float:
    """Return the highest rate of a replica within limits and headroom."""
    return highest_rate(replica, request.slo, usable(request.headroom), scaling, halvings)[0]


def _moved(scaling: Mapping[str, float], centres: Mapping[str, Centre], sds: float) -> dict[str, float | Beyond]:
    """Return what to multiply theory by if every limit's value were so many of its sd from the centre."""
    return {name: factor * math.exp(sds * centres[f"{name}_s"].fleet_sd) for name, factor in scaling.items()}


def _beyond(design: Design, request: Request, centres: Mapping[str, Centre]) -> dict[str, float | Beyond]:
    """Return what to multiply of theory if every limit's value were as high as its centre may be: what load adds to a request alone.

    That is what a simulation is unsure of.  A request alone takes its own steps, and the profile says how long these are: were the whole
    value multiplied, no rate would keep a limit that is near it.
    """
    replica = design.replica
    rest, loaded = (
        {slo.key(limit): excess for excess, limit in replica.predict(rate).excesses(request.slo)}
        for rate in (IDLE * replica.capacity_per_s, min(design.each_per_s, MOST * replica.capacity_per_s))
    )
    highest = {slo.key(x): centres[f"{slo.key(x)}_s"].high / x.limit for x in slo.latencies(request.slo) if f"{slo.key(x)}_s" in centres}
    return {
        name: Beyond(rest[name], (high - rest[name]) / (loaded[name] - rest[name]))
        for name, high in highest.items()
        if min(high, loaded[name]) > rest[name]
    }


def costs(design: Design, replicas: Interval, shelf: Shelf) -> dict[str, Interval]:
    """Return the price of the fewest and of the most replicas, as many of these as may be rented; nothing where there is no price."""
    if design.price is None:
        return {}
    usd = design.price.usd_per_h
    fewest, most = price(design.candidate, int(replicas[0]), shelf), price(design.candidate, rentable(design, replicas, shelf), shelf)
    low, high = (p.usd_per_h if p is not None else usd for p in (fewest, most))
    return {"usd_per_hour": (min(low, usd), max(high, usd))}


def rentable(design: Design, replicas: Interval, shelf: Shelf) -> int:
    """Return the upper end of an interval of replicas, or the most below it that quotas and other bounds let one rent."""
    return last(design.replicas, int(replicas[1]), lambda n: price(design.candidate, n, shelf) is not None)


def last(holds: int, most: int, does: Callable[[int], bool]) -> int:
    """Return the last number up to `most` for which something is so, where it is for `holds` and all up to that last one."""
    if most <= holds or does(most):
        return max(holds, most)
    fails = most
    while fails - holds > 1:
        middle = (holds + fails) // 2
        holds, fails = (middle, fails) if does(middle) else (holds, middle)
    return holds


def beyond(design: Design, replicas: Interval, shelf: Shelf) -> Iterator[str]:
    """Yield that the upper end of the replicas is more than may be rented, and so the upper end of the cost is that of fewer."""
    most = 0 if design.price is None else rentable(design, replicas, shelf)
    if design.price is None or most >= replicas[1]:
        return
    try:
        order(design.candidate, int(replicas[1]), shelf)
    except Infeasible as error:
        yield f"up to {replicas[1]:g} may be needed: {error}; the upper end of the cost is that of {most} replicas"
