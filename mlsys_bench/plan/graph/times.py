"""A stage graph over hours and months: replicas of each stage by the hour of a day, and the month in which the first stage is full.

fleet(rate)    what the search finds at another rate, with theory scaled as at the peak; never fewer at a higher rate
full           the rate at which a stage breaks a limit or saturates while all the others have more than enough replicas
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from mlsys_bench import slo
from mlsys_bench.plan import autoscale
from mlsys_bench.plan import course as courses
from mlsys_bench.plan.autoscale import HOUR_S, INTERVAL_S, Serving, steepest
from mlsys_bench.plan.course import Course
from mlsys_bench.plan.graph import allocation, spares
from mlsys_bench.plan.graph.allocation import Allocation, Problem, Replicas
from mlsys_bench.plan.graph.spread import small
from mlsys_bench.plan.graph.work import FULL, Work, Writer
from mlsys_bench.plan.growth import Growth, full_month, told
from mlsys_bench.plan.reliability import Zones
from mlsys_bench.simulate.conditions import TOLERANCE
from mlsys_bench.stage_fleets import StageMonth, StageRule, StagesOutlook, StagesScaled
from mlsys_bench.surroundings import Autoscaled
from mlsys_bench.types import Plan, Workload

LEVELS = 24  # of the rate, from 0 to the peak, at which the fleet of a day is looked for
_PLENTY = 8  # times the replicas planned: as good as nobody waits
_HALVINGS = 7
_FARTHEST = 32.0  # times the rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleets:
    """The fleet at other rates.  `spared` adds the replicas to spare."""

    asked: Problem
    made: Allocation
    spared: Callable[[Replicas], Replicas]

    def needed(self, more: float) -> Replicas:
        """Return the replicas of each stage at so many times the peak."""
        if abs(more - 1) < 1e-9:
            return self.made.replicas
        there = at_rate(self.asked, more)
        least = allocation.fewest(there)
        found = allocation.greedy(there, least, self.made.corrections) or least
        ends = max if more > 1 else min
        return {name: ends(n, found[name]) for name, n in self.made.replicas.items()}

    def rented(self, more: float) -> Replicas:
        """Return the same with the replicas to spare."""
        return self.spared(self.needed(more))


def at_rate(asked: Problem, more: float) -> Problem:
    """Return the problem at so many times its rate; language models need replicas in proportion."""
    traffic = asked.graph.workload
    graph = dataclasses.replace(asked.graph, workload=dataclasses.replace(traffic, rate_per_s=traffic.rate_per_s * more))
    works: dict[str, Work] = {
        name: dataclasses.replace(work, least=max(1, math.ceil(work.least * more - 1e-9))) if isinstance(work, Writer) else work
        for name, work in asked.works.items()
    }
    return dataclasses.replace(asked, graph=graph, works=works)


def surrounded(plan: Plan, asked: Problem, made: Allocation, day: Workload, *, grows: Growth | None, asks: bool) -> Plan:
    """Return the plan with its hours, and its months where a growth is given."""
    fleets = Fleets(asked=small(asked), made=_corrected(asked, made), spared=_spared(plan, asked))
    course = courses.of(day)
    follows = course.varies
    told = ["autoscaling: the traffic is the same all day, so a fleet that follows it is the static one"] if asks and not follows else []
    brief = autoscale.too_brief(course, max(spares.start_of(work).total_s for work in asked.works.values()))
    if follows and brief:
        follows = False
        told.append(brief)
    fleet = plan.stage_fleet
    assert fleet is not None
    found = dataclasses.replace(
        fleet, scaled=scaled(fleets, course) if follows else None, outlook=None if grows is None else outlook(fleets, grows, plan.headroom)
    )
    return dataclasses.replace(plan, stage_fleet=found, notes=(*plan.notes, *told))


def _corrected(asked: Problem, made: Allocation) -> Allocation:
    """Return the allocation with corrections for small samples of engines: a day and two years ask for many rates."""
    seen = allocation.excesses(asked, made.trial.all, made.trial.stages)
    theory = allocation.judged(small(asked), made.replicas, {})
    return dataclasses.replace(made, corrections={key: seen[key] / theory[key] for key in seen if theory[key] > 0 and seen[key] > 0})


def _spared(plan: Plan, asked: Problem) -> Callable[[Replicas], Replicas]:
    found = plan.stage_fleet.secured if plan.stage_fleet else None
    if found is None:
        return lambda needed: needed
    zones = Zones(count=found.zones, survive=found.survives_zone)
    return lambda needed: spares.rented(asked, needed, found.objective, zones)[1]


# ---------------------------------------------------------------- hours


def scaled(fleets: Fleets, course: Course) -> StagesScaled:
    """Return the replicas of each stage by the hour, and the rule each may follow."""
    asked, peak = fleets.asked, course.peak_per_s
    at = _rising([fleets.rented((k + 1) / LEVELS * peak / asked.rate_per_s) for k in range(LEVELS)])

    def fleet(rate_per_s: float) -> Replicas:
        return at[min(max(math.ceil(rate_per_s / peak * LEVELS - 1e-9), 1), LEVELS) - 1]

    hours = round(course.period_s / HOUR_S)
    n = hours if 1 < hours <= len(course.rates_per_s) and abs(hours * HOUR_S - course.period_s) < 1e-6 else len(course.rates_per_s)
    length_s = course.period_s / n
    rates = tuple(course.highest(k * length_s, (k + 1) * length_s) for k in range(n))
    planned = [fleet(rate) for rate in rates]
    most = fleet(peak)
    starts = {name: spares.start_of(work).total_s for name, work in asked.works.items()}
    rules, played = {}, {}
    for name, work in asked.works.items():
        if (serving := _serving(fleets, name)) is None:
            continue
        spare = most[name] - fleets.made.replicas[name]
        if isinstance(work, Writer):
            own = _course_of(course, asked.flow[name].calls)
            played[name] = _played(own, serving, lambda rate, s=name: fleet(rate / asked.flow[s].calls)[s], work, spare, asked.seed)  # type: ignore[misc]
            rules[name] = _rule_of(played[name])
        else:
            rules[name] = _rule(course, serving, starts[name], min(f[name] for f in at), most[name], spare)
    static, scheduled = (_replica_h(asked, fleet, length_s) for fleet in ([most] * n, planned))
    return StagesScaled(
        start_s=tuple(k * length_s for k in range(n)),
        rates_per_s=rates,
        replicas={name: tuple(f[name] for f in planned) for name in asked.works},
        rules=rules,
        engines=played,
        period_s=course.period_s,
        static_replica_h=static,
        scheduled_replica_h=scheduled + _launches_h(asked, planned, starts),
        static_usd=_usd(asked, [most] * n, length_s, {}),
        scheduled_usd=_usd(asked, planned, length_s, starts),
    )


def _rising(fleets: list[Replicas]) -> list[Replicas]:
    """Return fleets for rising rates of which none has fewer than one before: searches differ by one here and there."""
    found = fleets[:1]
    for fleet in fleets[1:]:
        found.append({name: max(n, found[-1][name]) for name, n in fleet.items()})
    return found


def _course_of(course: Course, calls: float) -> Course:
    return dataclasses.replace(course, rates_per_s=tuple(rate * calls for rate in course.rates_per_s))


def _serving(fleets: Fleets, name: str) -> Serving | None:
    """Return what one replica of a stage carries; None where hardly anybody comes."""
    asked, work = fleets.asked, fleets.asked.works[name]
    calls_per_s, times = asked.calls_per_s(name), fleets.made.trial.stages[name]
    if calls_per_s <= 0 or not len(times):
        return None
    each = calls_per_s / fleets.made.replicas[name]
    if fleets.made.binds[name] is None and not isinstance(work, Writer):  # load and headroom alone: it carries all that these leave
        each = max(each, min(1 - asked.graph.headroom, FULL) * work.capacity_per_s(1))
    return Serving(most_per_s=each, capacity_per_s=max(work.capacity_per_s(1), each), stay_s=max(float(times.mean()), 1e-9))


def _played(course: Course, serving: Serving, fewest: Callable[[float], int], work: Writer, spare: int, seed: int) -> Autoscaled:
    """Return the rule of a language model, played over the day.  `fewest` holds the spares already."""
    return autoscale.autoscaled(
        course, serving, lambda rate: max(1, fewest(rate) - spare), spares.start_of(work), least=1 + spare, spare=spare, seed=seed, runs=4
    )


def _rule_of(played: Autoscaled) -> StageRule:
    rule = played.rule
    return StageRule(
        metric=rule.metric, target=rule.target, share=played.threshold, least=rule.least, most=rule.most, lead_s=played.lead_s,
        growth=played.growth,
    )  # fmt: skip


def _rule(course: Course, serving: Serving, start_s: float, least: int, most: int, spare: int) -> StageRule:
    """Return the rule by rate that keeps up with the steepest hour: 1 / growth within a lead, less the tolerance, spares apart."""
    lead_s = INTERVAL_S + start_s
    growth = steepest(course, lead_s)
    share = 1 / growth / (1 + TOLERANCE) * (most - spare) / most
    return StageRule(
        metric="rate", target=serving.most_per_s * share, share=share, least=least, most=math.ceil(1.2 * most) + 1, lead_s=lead_s,
        growth=growth,
    )  # fmt: skip


def _replica_h(asked: Problem, planned: list[Replicas], length_s: float) -> float:
    return sum(n * asked.works[name].stage.shards for fleet in planned for name, n in fleet.items()) * length_s / HOUR_S


def _launches_h(asked: Problem, planned: list[Replicas], starts: dict[str, float]) -> float:
    return sum(n * asked.works[name].stage.shards * starts[name] / HOUR_S for name, n in _launched(planned).items())


def _launched(planned: list[Replicas]) -> Replicas:
    """Return the replicas of each stage that a period launches, its first hour after its last."""
    before = [planned[-1], *planned[:-1]]
    return {name: sum(max(0, now[name] - then[name]) for then, now in zip(before, planned, strict=True)) for name in planned[0]}


def _usd(asked: Problem, planned: list[Replicas], length_s: float, starts: dict[str, float]) -> float | None:
    """Return what a period costs; launched replicas are paid from a cold start ahead, by their own price."""
    known = {tuple(fleet.values()): fleet for fleet in planned}
    usd = {key: asked.usd_of(fleet) for key, fleet in known.items()}
    found = [usd[tuple(fleet.values())] for fleet in planned]
    paid = [x for x in found if x is not None]
    if len(paid) < len(found):
        return None
    ahead = sum(asked.usd_per_h(name, 1) * n * starts.get(name, 0.0) for name, n in _launched(planned).items())
    return round((math.fsum(paid) * length_s + ahead) / HOUR_S, 6)


# ---------------------------------------------------------------- months


def outlook(fleets: Fleets, grows: Growth, headroom: float) -> StagesOutlook:
    """Return when each stage is full, and what each month takes."""
    asked, g = fleets.asked, grows.per_month
    rate_per_s = asked.rate_per_s
    full = {name: full_at(fleets, name) for name in asked.works}
    first = min(full, key=lambda name: full[name][0])
    together = min(1 + headroom, full[first][0])
    planned = [fleets.rented((1 + g) ** month) for month in told(grows)]
    months = [
        StageMonth(month=month, rate_per_s=rate_per_s * (1 + g) ** month, replicas=fleet, usd_per_h=asked.usd_of(fleet))
        for month, fleet in enumerate(_rising(planned) if g >= 0 else planned)
    ]
    return StagesOutlook(
        per_month=g,
        full_at_per_s=rate_per_s * together,
        full_month=full_month(rate_per_s, g, rate_per_s * together),
        first=first,
        why=full[first][1],
        stages={name: full_month(rate_per_s, g, rate_per_s * more) for name, (more, _) in full.items()},
        months=tuple(months),
    )


def full_at(fleets: Fleets, name: str) -> tuple[float, str]:
    """Return how many times the peak one stage holds while the others have plenty, and what breaks beyond."""
    asked, made = fleets.asked, fleets.made
    used = asked.utilisation(name, made.replicas[name])
    most = min(FULL / used if used > 0 else _FARTHEST, _FARTHEST)
    fleet = {stage: n if stage == name else n * _PLENTY for stage, n in made.replicas.items()}

    def worst(more: float) -> tuple[float, str]:
        plenty = {stage: n if stage == name else math.ceil(n * max(more, 1.0)) for stage, n in fleet.items()}
        found = allocation.judged(asked, plenty, made.corrections, more)
        (stage, limit), excess = max(found.items(), key=lambda item: item[1], default=((None, asked.graph.slo[0]), 0.0))
        return excess, slo.show_limit(limit) + (f" at {stage}" if stage else "")

    if worst(most)[0] < 1:
        return most, f"{name} saturates"
    low, high = 1.0, most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if worst(middle)[0] < 1 else (low, middle)
    return low, worst(high)[1]
