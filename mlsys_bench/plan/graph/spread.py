"""90 % intervals of a stage graph: what the stage times may really be, how a simulation scatters, and how far theory lies from it.

Stage times are drawn, each stage by itself, and the whole is estimated and sized anew with each draw:

    assumed     time x exp(N(0, ln(spread) / 1.645)): at 90 % between time / spread and time x spread.  The scenario says the spread;
                where it does not it is `ASSUMED`: such times are a small measurement times a factor of two to four, guessed for what was
                not measured (a network, a larger index), and a guess of two to four is sure to a factor of two
    measured    the profile's own coefficients from their covariance, and the residual of its form as a factor
    a model     the profile of its engine steps likewise, measured, calibrated or roofline

The three parts are taken as independent: logarithms of their distances are added as squares.  Replicas and cost are those that the draws
ask for, 5 % to 95 % of them, and those that the ends of the simulation's own scatter ask for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from mlsys_bench import pricing, stats, workers
from mlsys_bench.latency import service as service_profiles
from mlsys_bench.plan import sizing
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.plan.graph import allocation
from mlsys_bench.plan.graph.allocation import STUDENT, Allocation, Problem, Replicas
from mlsys_bench.plan.graph.estimate import FAILED_S
from mlsys_bench.plan.graph.work import FULL, Served, Work, Writer, served
from mlsys_bench.plan.latencies import Latencies, key_of
from mlsys_bench.scenario import checks
from mlsys_bench.stage_fleets import NO_END_S
from mlsys_bench.stages import Stage

DRAWS = 32
ASSUMED = 2.0
TAILS = (0.05, 0.95)
SENSIBLE = 10  # times the replicas planned; a draw of an engine that asks for more says no rather than a number
_SAMPLES = 256  # requests per draw of an engine: only ratios to the same sample of the central profile are used
_AT_95 = 1.6448536269514722
Interval = tuple[float, float]
Rented = Callable[[Replicas], Replicas]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The intervals, of replicas by stage too, and what the draws could not do."""

    intervals: dict[str, Interval]
    replicas: dict[str, Interval]
    overloaded: dict[str, int]  # draws in which the replicas planned of a stage would be overloaded
    overloads: int  # draws in which those of any stage would be
    unanswered: tuple[float, ...]  # share of the requests without an answer, by draw
    infeasible: int  # draws in which no number of replicas keeps the limits


def of(
    asked: Problem, made: Allocation, whole: Allocation, predicted: Mapping[str, float], rented: Rented, executor: Executor | None = None
) -> Spread:  # fmt: skip
    """Return the intervals of a plan: `made` holds the limits, `whole` is what is rented, and `rented` adds the replicas to spare.

    An executor takes the draws; the result is the same.
    """
    central, drawn = small(asked), draws(asked)
    ratios, unanswered = _ratios(central, drawn, whole.replicas)
    analytic = whole.estimate.whole.keys(asked.graph.slo)
    simulated = _scatter(asked, whole, predicted)
    found = {
        key: _figure(key, value, ratios.get(key, []), simulated[key], analytic.get(key))
        for key, value in predicted.items()
        if key in simulated
    }
    fleets = workers.each(_fleet, drawn, shared=made.corrections, executor=executor)
    known = [rented(fleet) for fleet in fleets if fleet is not None]
    ends = [whole.replicas, *map(rented, _ends(asked, made, simulated, predicted))]
    full = {name: [draw.utilisation(name, n) >= FULL for draw in drawn] for name, n in whole.replicas.items()}
    found |= {key: (found[key][0], NO_END_S) for key in found if _has_no_end(key, asked, full)}
    return Spread(
        intervals=found | _totals(asked, known, ends),
        replicas={name: _between([f[name] for f in known], [f[name] for f in ends]) for name in whole.replicas},
        overloaded={name: sum(each) for name, each in full.items() if any(each)},
        overloads=sum(map(any, zip(*full.values(), strict=True))),
        unanswered=tuple(unanswered),
        infeasible=len(fleets) - len(known),
    )


def _has_no_end(key: str, asked: Problem, full: Mapping[str, list[bool]]) -> bool:
    """Say whether a latency grows without end in more than 5 % of the draws: a stage is overloaded that enough requests wait for.

    Queue limits and timeouts end a wait; what they refuse is counted among those without an answer.
    """
    stat = key.split("_")[1] if key.endswith("_s") and key.count("_") == 2 else ""
    if not stat.startswith("p"):
        return False
    late = 1 - float(stat[1:]) / 100  # only some requests come by a stage: it decides the percentiles that they reach
    there = checks.waited_for(asked.graph)
    waited = [name for name in full if name in there and _waits(asked.works[name].stage) and min(asked.flow[name].calls, 1.0) > late]
    endless = sum(map(any, zip(*(full[name] for name in waited), strict=True))) if waited else 0
    return endless > (1 - TAILS[1]) * len(next(iter(full.values())))


def _waits(stage: Stage) -> bool:
    return stage.queue is None and stage.timeout_s is None


# ---------------------------------------------------------------- draws


def _fleet(corrections: dict[allocation.Key, float], draw: Problem) -> Replicas | None:
    return allocation.greedy(draw, allocation.fewest(draw), corrections)


def draws(asked: Problem, count: int = DRAWS) -> list[Problem]:
    """Return the problem with stage times drawn so many times: spread evenly over each stage's law, in random order."""
    rng = np.random.default_rng([asked.seed, 11])
    normal = NormalDist()
    levels = np.array([normal.inv_cdf((k + 0.5) / count) for k in range(count)])
    by_stage = {name: _drawn(work, asked, rng.permutation(levels), rng) for name, work in asked.works.items()}
    return [dataclasses.replace(asked, works={name: each[k] for name, each in by_stage.items()}) for k in range(count)]


def _drawn(work: Work, asked: Problem, z: np.ndarray, rng: np.random.Generator) -> list[Work]:
    if isinstance(work, Writer):
        central, limits = _replica(work, work.replica.profile), work.promised
        most_per_s = sizing.highest_rate(central, limits, sizing.usable(asked.graph.headroom), halvings=5)[0]
        profiles = sizing.drawn(work.replica.profile, len(z), asked.seed)
        return [_writer(work, asked, _replica(work, profile), most_per_s) for profile in profiles]
    return [_served(work, float(at), rng) for at in z]


def _served(work: Served, z: float, rng: np.random.Generator) -> Served:
    if work.measured is not None:
        own = served(work.stage, service_profiles.draw(work.measured, rng))
        factor = math.exp(work.measured.residual_log_sd * z)
    else:
        own, factor = work, math.exp(z * math.log(spread_of(work)) / _AT_95)
    return dataclasses.replace(own, fixed_s=own.fixed_s * factor, per_item_s=own.per_item_s * factor)


def spread_of(work: Served) -> float:
    """Return the factor within which an assumed time is taken to lie, at 90 %."""
    assumed = work.stage.service.assumed if work.stage.service else None
    return ASSUMED if assumed is None or assumed.spread is None else assumed.spread


def _replica(work: Writer, profile: object) -> Replica:
    return Replica(profile, work.replica.limits, work.replica.demand, samples=_SAMPLES)  # type: ignore[arg-type]


def _writer(work: Writer, asked: Problem, replica: Replica, central_per_s: float) -> Writer:
    """Return the model on another profile, with the replicas it then needs alone: in proportion to what one carries."""
    most_per_s = sizing.highest_rate(replica, work.promised, sizing.usable(asked.graph.headroom), halvings=5)[0]
    slack = max(1.0, central_per_s * work.least / work.traffic.rate_per_s)  # what rounding up to whole replicas left over
    needed = work.least * central_per_s / max(most_per_s, 1e-12) / slack
    least = max(1, math.ceil(min(needed, SENSIBLE * work.least) - 1e-9))
    return dataclasses.replace(work, replica=replica, least=least)


def small(asked: Problem) -> Problem:
    """Return the problem with samples of engines as small as those of the draws."""
    works = {
        name: dataclasses.replace(work, replica=_replica(work, work.replica.profile)) if isinstance(work, Writer) else work
        for name, work in asked.works.items()
    }
    return dataclasses.replace(asked, works=works)


def _ratios(central: Problem, drawn: list[Problem], replicas: Replicas) -> tuple[dict[str, list[float]], list[float]]:
    """Return each figure with drawn times over the same with the central ones, and the share of requests without an answer by draw.

    Latencies are those of answered requests, in all draws alike; of the joint share the figures themselves, of all requests.
    """
    usual, _ = _answered(central, replicas)
    seen = [_answered(draw, replicas) for draw in drawn]
    ratios = {
        key: [keys[key] / (1.0 if key == "goodput" else value) for keys, _ in seen if keys.get(key, 0.0) > 0]
        for key, value in usual.items()
        if value > 0
    }
    return ratios, [failed for _, failed in seen]


def _answered(asked: Problem, replicas: Replicas) -> tuple[dict[str, float], float]:
    """Return what users see who get an answer, and the share of those who do not."""
    made = asked.estimate(replicas)
    whole, limits = made.whole, asked.graph.slo
    there = whole.e2e_s < FAILED_S / 2
    if there.all():
        return whole.keys(limits), 0.0
    tpot_s = whole.tpot_s[there]
    kept = Latencies(ttft_s=whole.ttft_s[there], tpot_s=tpot_s, e2e_s=whole.e2e_s[there], itl_s=tpot_s[~np.isnan(tpot_s)])
    keys = kept.keys(limits) if there.any() else {}
    return keys | {key: value for key, value in whole.keys(limits).items() if key == "goodput"}, made.failed


# ---------------------------------------------------------------- simulation


def _scatter(asked: Problem, made: Allocation, predicted: Mapping[str, float]) -> dict[str, float]:
    """Return half the width of each figure's interval between batches of the simulation, relative to it."""
    batches = [batch.keys(asked.graph.slo) for batch in made.trial.batches]
    found = {}
    for key, value in predicted.items():
        values = np.array([batch[key] for batch in batches if key in batch])
        if len(values) > 1 and value > 0:
            found[key] = STUDENT * float(values.std(ddof=1)) / math.sqrt(len(values)) / value
    return found


def _figure(key: str, value: float, ratios: list[float], simulated: float, analytic: float | None) -> Interval:
    if key == "goodput":
        low, high = stats.quantiles(ratios, TAILS) if ratios else (value, value)
        return max(min(low, value * (1 - simulated)), 0.0), min(max(high, value * (1 + simulated)), 1.0)
    low, high = np.log(stats.quantiles(ratios, TAILS)) if ratios else (0.0, 0.0)
    apart = math.log(analytic / value) if analytic is not None and analytic > 0 else 0.0
    down = math.sqrt(min(low, 0.0) ** 2 + simulated**2 + min(apart, 0.0) ** 2)
    up = math.sqrt(max(high, 0.0) ** 2 + simulated**2 + max(apart, 0.0) ** 2)
    return value * math.exp(-down), value * math.exp(up)


def _ends(asked: Problem, made: Allocation, simulated: Mapping[str, float], predicted: Mapping[str, float]) -> list[Replicas]:
    """Return the fleets that keep the limits if latencies were those at the ends of the simulation's scatter."""
    fleets = []
    for sign in (-1, 1):
        corrections = dict(made.corrections)
        for name, limit in asked.limits:
            key = key_of(limit)
            if name is None and key in simulated and predicted.get(key, 0.0) > 0:
                corrections[name, limit] = corrections.get((name, limit), 1.0) * math.exp(sign * simulated[key])
        other = allocation.greedy(asked, allocation.fewest(asked), corrections)
        if other is not None:
            fleets.append(other)
    return fleets


# ---------------------------------------------------------------- totals


def _between(drawn: list[int], others: list[int]) -> Interval:
    """Return 5 % to 95 % of what the draws ask for, stretched to hold the others."""
    ends = [float(n) for n in others]
    low, high = stats.quantiles([float(n) for n in drawn], TAILS) if drawn else (ends[0], ends[0])
    return min(float(math.floor(low + 1e-9)), *ends), max(float(math.ceil(high - 1e-9)), *ends)


def _totals(asked: Problem, drawn: list[Replicas], ends: list[Replicas]) -> dict[str, Interval]:
    """Return the intervals of all replicas and of what they cost."""
    counts, sure = [[sum(n * asked.works[name].stage.shards for name, n in f.items()) for f in fleets] for fleets in (drawn, ends)]
    found = {"replicas": _between(counts, sure)}
    costs = [asked.usd_of(fleet) for fleet in (*ends, *drawn)]
    usd = [x for x in costs if x is not None]
    if len(usd) < len(costs):
        return found
    low, high = stats.quantiles(usd[len(ends) :] or usd, TAILS)
    found["usd_per_hour"] = (min(low, *usd[: len(ends)]), max(high, *usd[: len(ends)]))
    month = tuple(pricing.usd_per_month(x) for x in found["usd_per_hour"])
    return found | {"usd_per_month": (month[0], month[1])}
