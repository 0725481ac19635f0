"""Several scenarios on one pool of GPUs: what each needs on each kind, and who gets what, hour by hour.

Each scenario is planned on each kind of GPU alone, at its peak and confirmed by simulation.  That gives the rate that one replica carries
within limits and headroom; replicas have queues of their own, so it holds for any number of them, and `allocation` shares out the pool.
Traffic with a time of day is shared out for each hour anew, so that peaks at different hours use the same GPUs.  A replica takes a while to
start: an hour asks for the highest rate until that long after its end, so whoever grows has its GPUs before it needs them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlsys_bench import pricing, slo, units, workload
from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.fleets import FleetPlan, Hour, Option, Placed, Served
from mlsys_bench.plan import candidates, cold_start, course, planner, sizing, tenants
from mlsys_bench.plan.allocation import Ask, Counts, Kind, allocate, more, shares
from mlsys_bench.plan.around import weights_bytes
from mlsys_bench.plan.course import DAY_S, Course
from mlsys_bench.plan.request import Request, check
from mlsys_bench.plan.trial import corrections
from mlsys_bench.stages import Roofline, Stage, StageGraph
from mlsys_bench.types import SLO, Offer, Provenance, Workload

if TYPE_CHECKING:
    from mlsys_bench.plan.graph import GraphRequest

HOUR_S = 3600.0
MOST_HOURS = 168  # of courses that together repeat more slowly than a week, the first week counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One scenario: what is asked of a plan for it, and on which kinds of GPU of the pool; `scenario` says where it is from."""

    name: str
    scenario: str
    priority: int
    request: Request | GraphRequest  # its traffic with its time of day
    gpus: tuple[str, ...]

    @property
    def workload(self) -> Workload:
        """Its traffic."""
        return self.request.workload if isinstance(self.request, Request) else self.request.graph.workload

    @property
    def slo(self) -> SLO:
        """What it is promised."""
        return self.request.slo if isinstance(self.request, Request) else self.request.graph.slo

    @property
    def model(self) -> str:
        """The language model."""
        return self.request.model if isinstance(self.request, Request) else engine_of(self.request.graph).model


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetRequest:
    """Scenarios, and GPUs by catalogue id."""

    name: str
    pool: Mapping[str, int]
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """Everything an allocation is made of; `kinds[i]` is option `options[i]` of an entry."""

    entries: tuple[Entry, ...]
    pool: Mapping[str, int]
    kinds: tuple[Kind, ...]
    priced: bool

    def asks(self, rates: Sequence[float]) -> list[Ask]:
        """Return what each scenario asks for at these rates."""
        return [Ask(name=e.name, priority=e.priority, rate_per_s=r) for e, r in zip(self.entries, rates, strict=True)]

    def gpus(self, counts: Counts) -> dict[str, dict[str, int]]:
        """Return the GPUs in use, by kind and scenario."""
        found: dict[str, dict[str, int]] = {gpu: {} for gpu in self.pool}
        for kind, n in zip(self.kinds, counts, strict=True):
            if n:
                found[kind.gpu][kind.name] = n * kind.devices
        return found

    def load(self, counts: Counts) -> float:
        """Return what the GPUs in use cost, or how many they are where they have no price."""
        return math.fsum(kind.usd_per_h * n for kind, n in zip(self.kinds, counts, strict=True))

    def usd_per_h(self, counts: Counts) -> float | None:
        """Return what the GPUs in use cost, None without prices."""
        return self.load(counts) if self.priced else None


def plan_fleet(asked: FleetRequest, executor: Executor | None = None) -> FleetPlan:
    """Return who gets which GPUs, what is served of each scenario, and what is missing; an executor simulates designs side by side.

    Raises BadInput for an entry that asks for what no kind of GPU allows.
    """
    prices = {gpu: _price(gpu, asked.entries[0].request) for gpu in asked.pool}
    found = {entry.name: _options(entry, prices, executor) for entry in asked.entries}
    options = {name: tuple(option for option, _ in each) for name, each in found.items()}
    lead_s = max((lead for each in found.values() for _, lead in each), default=0.0)
    case = _case(asked, options, all(price is not None for price in prices.values()))
    hours = _hours(asked.entries, lead_s)
    counts = _by_rates(hours, lambda rates: allocate(case.asks(rates), case.kinds, case.pool))
    rows = tuple(_hour(case, hour, rates, counts[rates]) for hour, rates in enumerate(hours))
    busiest = max(range(len(rows)), key=lambda i: (-_worth(asked.entries, rows[i]), case.load(counts[hours[i]])))
    peaks = tuple(max(rates[i] for rates in hours) for i in range(len(asked.entries)))
    at_once = allocate(case.asks(peaks), case.kinds, case.pool)
    low, high = (_stretched(asked, options, case.priced, end) for end in (1, 0))
    served = tuple(
        _served(entry, i, case, options[entry.name], hours, counts, rows, busiest, (low, high)) for i, entry in enumerate(asked.entries)
    )
    whole = all(each.share == 1.0 for each in served)
    costs = [case.usd_per_h(counts[rates]) for rates in hours]
    ends = [end.usd_per_h(allocate(end.asks(hours[busiest]), end.kinds, end.pool)) for end in (low, high)]
    return FleetPlan(
        name=asked.name,
        pool=dict(asked.pool),
        served=served,
        hours=rows,
        busiest=busiest,
        is_whole=whole,
        needs={} if whole else {gpu: _needs(case, hours, rows, gpu, None) for gpu in asked.pool},
        peaks_together=_peaks_together(case, peaks, at_once),
        usd_per_hour=_mean(costs),
        busiest_usd_per_hour=costs[busiest],
        busiest_usd_interval=_interval(costs[busiest], ends),
        pool_usd_per_hour=None if not case.priced else math.fsum(n * _usd(prices[gpu]) for gpu, n in asked.pool.items()),
        lead_s=lead_s,
        provenance=_provenance(options, prices),
        assumptions=tuple(_assumptions(asked, len(hours) > 1, lead_s, prices)),
        notes=tuple(_notes(asked, options)),
    )


# ---------------------------------------------------------------- one scenario on one kind of GPU


def _options(entry: Entry, prices: Mapping[str, Offer | None], executor: Executor | None) -> list[tuple[Option, float]]:
    """Return what a scenario needs on each kind of GPU, and how long a replica takes to start there.

    Raises BadInput where no kind allows what it asks for, such as a limit below the physics floor of all.
    """
    request = entry.request
    plan_on = (
        functools.partial(_of_model, _at_peak(request), executor) if isinstance(request, Request) else functools.partial(_of_graph, request)
    )
    found: list[tuple[Option, float]] = []
    refused: list[BadInput] = []
    for gpu in entry.gpus:
        try:
            found.append(plan_on(gpu, prices[gpu]))
        except Infeasible as error:
            found.append((Option(gpu=gpu, why_not=str(error)), 0.0))
        except BadInput as error:  # of this kind of GPU; another may do
            refused.append(error)
            found.append((Option(gpu=gpu, why_not=str(error)), 0.0))
    if len(refused) == len(found):
        raise BadInput(f"{entry.name}: {refused[0]}")
    return found


def _at_peak(request: Request) -> Request:
    """Return what is asked of a plan for the busiest time, with limits that each name a tenant where there are some."""
    peak, limits = workload.at_peak(request.workload), request.slo
    if peak.tenants or any(limit.tenant is not None for limit in limits):
        limits = tenants.resolved(limits, [tenant.name for tenant in peak.tenants])
    return check(dataclasses.replace(request, workload=peak, slo=limits, disaggregate="never"))


def _of_model(request: Request, executor: Executor | None, gpu: str, price: Offer | None) -> tuple[Option, float]:
    """Return what a scenario of one model needs on one kind of GPU, confirmed by simulation, and how long a replica takes to start."""
    made, design, _ = planner.planned(dataclasses.replace(request, gpus=(gpu,)), executor)
    each_per_s = sizing.carried_per_s(design, request.slo, request.headroom, corrections(made.predicted, made.analytic, request.slo))
    devices = design.candidate.devices
    option = Option(
        gpu=gpu, precision=design.candidate.precision, devices_per_replica=devices, replicas=made.replicas,
        replicas_interval=made.intervals["replicas"], each_per_s=each_per_s,
        usd_per_replica_h=None if price is None else devices * _usd(price), predicted=made.predicted, binds=made.binding_constraint,
        provenance=made.profile.provenance,
    )  # fmt: skip
    return option, cold_start.of(weights_bytes(made)).total_s


def engine_of(graph: StageGraph) -> Roofline:
    """Return the language model of a stage graph that has one."""
    (stage,) = graph.engines
    assert stage.engine is not None
    return stage.engine


def _of_graph(request: GraphRequest, gpu: str, price: Offer | None) -> tuple[Option, float]:
    """Return the same of a stage graph with one language model: replicas of its stage, the others rented beside the pool in proportion."""
    from mlsys_bench.plan.graph import plan_graph

    graph = request.graph
    stages = tuple(_on(stage, gpu) if stage.engine is not None else stage for stage in graph.stages)
    peak = dataclasses.replace(graph, stages=stages, workload=workload.at_peak(graph.workload))
    made = plan_graph(dataclasses.replace(request, graph=peak))
    item = next(item for item in made.fleet if item.stage == graph.engines[0].name)
    devices = max(item.tp * item.attention_dp, item.ep) * item.pp
    interval = made.stage_fleet.replicas.get(item.stage) if made.stage_fleet else None
    option = Option(
        gpu=gpu, precision=item.precision, devices_per_replica=devices, replicas=item.replicas, replicas_interval=interval,
        each_per_s=peak.workload.rate_per_s / item.replicas, usd_per_replica_h=None if price is None else devices * _usd(price),
        predicted=made.predicted, binds=made.binding_constraint, provenance=made.provenance,
    )  # fmt: skip
    stage = next(stage for stage in made.stages if stage.stage == item.stage)
    return option, cold_start.of(candidates.weights_bytes(stage.profile, devices)).total_s


def _on(stage: Stage, gpu: str) -> Stage:
    """Return a stage that may run on one kind of GPU only."""
    assert stage.resources is not None
    return dataclasses.replace(stage, resources=dataclasses.replace(stage.resources, gpu=(gpu,)))


def _price(gpu: str, request: Request | GraphRequest) -> Offer | None:
    """Return the offer with the lowest price of one GPU."""
    offers = (request.market or pricing.published()).of(gpu, request.term)
    return min(offers, key=_usd, default=None)


def _usd(offer: Offer | None) -> float:
    """Return dollars an hour of one GPU."""
    return 0.0 if offer is None else offer.usd_per_h / offer.devices


def _case(asked: FleetRequest, options: Mapping[str, Sequence[Option]], priced: bool) -> _Case:
    """Return the program's kinds: what costs nothing is counted by its GPUs."""
    kinds = tuple(
        Kind(
            name=name, gpu=option.gpu, devices=option.devices_per_replica or 0, each_per_s=option.each_per_s or 0.0,
            usd_per_h=float(option.usd_per_replica_h or 0.0) if priced else float(option.devices_per_replica or 0),
        )
        for name, each in options.items() for option in each if option.why_not is None
    )  # fmt: skip
    return _Case(entries=asked.entries, pool=asked.pool, kinds=kinds, priced=priced)


def _stretched(asked: FleetRequest, options: Mapping[str, Sequence[Option]], priced: bool, end: int) -> _Case:
    """Return the case in which replicas carry what they would, were as many needed as one end of the interval says."""
    return _case(asked, {name: [_at_end(option, end) for option in each] for name, each in options.items()}, priced)


def _at_end(option: Option, end: int) -> Option:
    if option.each_per_s is None or option.replicas is None or option.replicas_interval is None:
        return option
    return dataclasses.replace(option, each_per_s=option.each_per_s * option.replicas / max(option.replicas_interval[end], 1.0))


# ---------------------------------------------------------------- hours

Rates = tuple[float, ...]  # of the scenarios, in their order


def _hours(entries: Sequence[Entry], lead_s: float) -> list[Rates]:
    """Return what is asked for in each hour until all courses repeat, growth within the lead counted early; one hour if steady."""
    courses = [course.of(entry.workload) for entry in entries]
    if not any(each.varies for each in courses):
        return [tuple(each.peak_per_s for each in courses)]
    count = min(MOST_HOURS, max(round(DAY_S / HOUR_S), _repeat_hours(courses)))
    return [tuple(_highest(each, hour, lead_s) for each in courses) for hour in range(count)]


def _repeat_hours(courses: Sequence[Course]) -> int:
    """Return after how many hours courses repeat together: the least common multiple of their periods, to the millisecond."""
    periods_ms = [max(1, round(each.period_s * 1000)) for each in courses if each.varies]
    hour_ms = round(HOUR_S * 1000)
    return math.lcm(hour_ms, *periods_ms) // hour_ms


def _highest(each: Course, hour: int, lead_s: float) -> float:
    return each.highest(hour * HOUR_S, (hour + 1) * HOUR_S + lead_s)


def _by_rates(hours: Sequence[Rates], solve: Callable[[Rates], Counts]) -> dict[Rates, Counts]:
    """Return an allocation for each combination of rates, worked out once."""
    return {rates: solve(rates) for rates in dict.fromkeys(hours)}


def _hour(case: _Case, hour: int, rates: Rates, counts: Counts) -> Hour:
    names = [entry.name for entry in case.entries]
    return Hour(
        start_s=hour * HOUR_S,
        rates_per_s=dict(zip(names, rates, strict=True)),
        shares=shares(case.asks(rates), case.kinds, counts),
        gpus=case.gpus(counts),
    )


def _worth(entries: Sequence[Entry], hour: Hour) -> float:
    """Return how well an hour is served: what is missing of priority 1 counts most."""
    return math.fsum(hour.shares[entry.name] * 1e3 ** -float(entry.priority) for entry in entries)


# ---------------------------------------------------------------- the answer


def _served(
    entry: Entry, i: int, case: _Case, options: tuple[Option, ...], hours: Sequence[Rates], counts: Mapping[Rates, Counts],
    rows: Sequence[Hour], busiest: int, ends: tuple[_Case, _Case],
) -> Served:  # fmt: skip
    worst = min(range(len(rows)), key=lambda h: rows[h].shares[entry.name])
    share = rows[worst].shares[entry.name]
    low, high = (
        shares(end.asks(hours[worst]), end.kinds, allocate(end.asks(hours[worst]), end.kinds, end.pool))[entry.name] for end in ends
    )
    asked = math.fsum(rates[i] for rates in hours)
    return Served(
        name=entry.name,
        scenario=entry.scenario,
        model=entry.model,
        priority=entry.priority,
        slo=slo.show(entry.slo),
        rate_per_s=max(rates[i] for rates in hours),
        share=share,
        share_interval=(min(low, share), max(high, share)),
        share_of_requests=math.fsum(rates[i] * row.shares[entry.name] for rates, row in zip(hours, rows, strict=True)) / asked,
        placed=tuple(_placed(case, entry.name, hours[busiest][i], counts[hours[busiest]])),
        options=options,
        needs={} if share == 1.0 else {gpu: _needs(case, hours, rows, gpu, entry.name) for gpu in entry.gpus},
    )


def _placed(case: _Case, name: str, rate_per_s: float, counts: Counts) -> list[Placed]:
    """Return the replicas of one scenario, all of them as busy as each other."""
    own = [(kind, n) for kind, n in zip(case.kinds, counts, strict=True) if kind.name == name and n]
    carried = math.fsum(kind.each_per_s * n for kind, n in own)
    busy = min(1.0, rate_per_s / carried) if carried else 0.0
    return [
        Placed(
            gpu=kind.gpu, replicas=n, gpus=n * kind.devices, rate_per_s=busy * kind.each_per_s * n,
            usd_per_hour=kind.usd_per_h * n if case.priced else None,
        )
        for kind, n in own
    ]  # fmt: skip


def _needs(case: _Case, hours: Sequence[Rates], rows: Sequence[Hour], gpu: str, name: str | None) -> int | None:
    """Return how many more GPUs of a kind make one scenario whole, the others served as they are; or all, where none is named."""
    short = {
        rates: row for rates, row in zip(hours, rows, strict=True) if (min(row.shares.values()) if name is None else row.shares[name]) < 1
    }
    most = 0
    for rates, row in short.items():
        wanted = {each: 1.0 if name in (None, each) else share for each, share in row.shares.items()}
        missing = more(case.asks(rates), case.kinds, case.pool, gpu, wanted)
        if missing is None:
            return None
        most = max(most, missing)
    return most


def _peaks_together(case: _Case, peaks: Rates, counts: Counts) -> dict[str, int] | None:
    """Return the GPUs in use were all peaks to come at once, None where the pool could not serve them."""
    if min(shares(case.asks(peaks), case.kinds, counts).values()) < 1:
        return None
    return {gpu: sum(by.values()) for gpu, by in case.gpus(counts).items()}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) else None


def _interval(value: float | None, ends: Sequence[float | None]) -> tuple[float, float] | None:
    known = [end for end in (*ends, value) if end is not None]
    return (min(known), max(known)) if value is not None else None


def _provenance(options: Mapping[str, Sequence[Option]], prices: Mapping[str, Offer | None]) -> Provenance:
    used = [option.provenance for each in options.values() for option in each if option.why_not is None]
    return Provenance.weakest(Provenance.MEASURED, *used, *(price.provenance for price in prices.values() if price is not None))


def _assumptions(asked: FleetRequest, by_hour: bool, lead_s: float, prices: Mapping[str, Offer | None]) -> list[str]:
    lines = ["each replica has its own queue, and what one carries does not depend on how many there are"]
    lines.append("a replica of several GPUs does not leave its node; nodes hold a multiple of its GPUs")
    if by_hour:
        lines.append(
            f"replicas of one scenario are released for another by the hour; one takes {units.show_s(lead_s)} to start (assumed: node, "
            "image, weights, graphs, warm-up), so each hour holds the highest rate until that long after it"
        )
        lines.append("requests in flight on a replica that is released are finished first, within that time")
    priced = (
        f"{gpu} at {units.show_usd(_usd(p))}/h ({p.provider} {p.instance}, {p.date}, {p.provenance})" for gpu, p in prices.items() if p
    )
    market = asked.entries[0].request.market
    of_whom = "published" if market is None else "of your prices, without what is committed"
    return [*lines, f"GPUs are priced one by one at the lowest {of_whom}: {'; '.join(priced)}", "the size of the pool is as given"]


def _notes(asked: FleetRequest, options: Mapping[str, Sequence[Option]]) -> list[str]:
    bursty = [e.name for e in asked.entries if workload.parse_arrivals(e.workload.arrivals).bursts]
    staged = [e.name for e in asked.entries if not isinstance(e.request, Request)]
    beside = [f"the other stages of {name} are rented beside the pool, in proportion to what is served" for name in staged]
    together = _repeat_hours([course.of(entry.workload) for entry in asked.entries])
    cut = f"the courses repeat together after {together:,} hours; planned are the first {MOST_HOURS}, so later hours may ask for more"
    found = [f"{name} on {option.gpu}: {option.why_not}" for name, each in options.items() for option in each if option.why_not]
    return [
        *beside,
        *found,
        *([cut] if together > MOST_HOURS else ()),
        *(f"bursts of {name} are part of every hour; scenarios are taken not to burst at the same time" for name in bursty),
    ]
