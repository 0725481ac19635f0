"""How many replicas of every stage: chosen together for what users see at the end, at the least cost.

From the fewest that carry the load with headroom, the replica that buys most latency per dollar is added until theory keeps every limit.
A simulation of the whole graph then judges: where it sees more than theory, theory is scaled to it and the search goes on; where it
leaves room, replicas are taken away again, dearest first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mlsys_bench import slo, units, workload
from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.plan.graph.estimate import FAILED_S, Estimate, estimate
from mlsys_bench.plan.graph.purse import Paid, Purse, Unit
from mlsys_bench.plan.graph.work import FULL, Floats, Work, Writer, hedged, late
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.scenario import Flow, flows
from mlsys_bench.simulate import graph as simulation
from mlsys_bench.stages import StageGraph
from mlsys_bench.types import Limit

Replicas = dict[str, int]
Key = tuple[str | None, Limit]  # a stage, None for the whole, and a limit on it
BATCHES = 6  # of neighbouring requests: their spread is the simulation's uncertainty
STUDENT = 2.0150484  # its 95 % point at BATCHES - 1 degrees of freedom
VISITS = 50_000  # in one simulation, about; the last one has `LONG` times as many
LONG = 3
_LEAST, _MOST = 4000, 15_000  # requests of one simulation
LEAST_OF_TRACE = 200  # requests
_ROUNDS, _TRIMS, _STEPS = 8, 10, 300
_WARM, _LAST = 0.12, 0.02  # of the requests, not counted at the beginning and the end
_IDLE = 20  # times the fewest replicas: as good as nobody waits
_MOST_REPLICAS = 100_000  # of a stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is asked: stages with their work, traffic, and every limit on the whole and on single stages."""

    graph: StageGraph
    works: dict[str, Work]
    seed: int = 0
    flow: dict[str, Flow] = field(default_factory=dict)
    purse: Purse = field(default_factory=Purse)
    due_s: Floats | None = None  # when the requests of a trace come; None: by the law of the traffic

    @property
    def rate_per_s(self) -> float:
        """Requests per second of the scenario."""
        return self.graph.workload.rate_per_s

    @property
    def limits(self) -> tuple[Key, ...]:
        """Limits on the whole, then those on the time at single stages."""
        whole = [(None, limit) for limit in self.graph.slo if limit.metric != "availability"]
        return (*whole, *((stage.name, limit) for stage in self.graph.stages for limit in stage.slo if limit.metric == "e2e"))

    def calls_per_s(self, name: str) -> float:
        """Return the calls per second to a stage, none being lost to waits."""
        return self.rate_per_s * self.flow[name].calls

    def estimate(self, replicas: Mapping[str, int], more: float = 1.0) -> Estimate:
        """Return what theory says of so many replicas, at `more` times the traffic."""
        arrivals = workload.parse_arrivals(self.graph.workload.arrivals)
        return estimate(self.graph, self.works, replicas, self.rate_per_s * more, arrivals.cv**2)

    def utilisation(self, name: str, replicas: int) -> float:
        """Return the share of a stage's capacity that is in use."""
        return self.calls_per_s(name) / self.works[name].capacity_per_s(replicas)

    def unit(self, name: str) -> Unit:
        """Return what one replica of a stage stands on."""
        return self.works[name].unit(self.rate_per_s * self.flow[name].visits)

    def usd_per_h(self, name: str, replicas: int) -> float:
        """Return what so many replicas cost by themselves; where nothing has a price, they count instead."""
        found = self.purse.alone(self.unit(name), replicas)
        return float(replicas) if found is None else found

    def pay(self, replicas: Mapping[str, int]) -> Paid:
        """Return the bill of all stages together.  Raises Infeasible where a quota leaves too few."""
        return self.purse.pay({self.unit(name): replicas[name] for name in self.works})

    def usd_of(self, replicas: Mapping[str, int]) -> float | None:
        """Return the sum of that bill; None without a price, or beyond a quota."""
        try:
            return self.pay(replicas).usd_per_h
        except Infeasible:
            return None


def problem(
    graph: StageGraph, works: Mapping[str, Work], seed: int = 0, purse: Purse | None = None, due_s: Floats | None = None
) -> Problem:  # fmt: skip
    """Return the problem of a graph: calls are those of requests that time out, and are hedged, although nobody waits."""
    flow = flows(graph.stages, graph.entry, late(works), hedged(works))
    return Problem(graph=graph, works=dict(works), seed=seed, flow=flow, purse=purse or Purse(cost=graph.cost), due_s=due_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One simulation of the graph: what users saw, by batch of neighbouring requests, and at each stage."""

    batches: tuple[Latencies, ...]
    stages: dict[str, Floats]
    played: simulation.Played

    @property
    def all(self) -> Latencies:
        """All batches as one sample."""
        ttft_s, tpot_s, e2e_s, itl_s = (
            np.concatenate([getattr(batch, f"{metric}_s") for batch in self.batches]) for metric in ("ttft", "tpot", "e2e", "itl")
        )
        return Latencies(ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=e2e_s, itl_s=itl_s)

    @property
    def failed(self) -> float:
        """Share of the requests without an answer."""
        return float((self.all.e2e_s >= FAILED_S).mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The replicas, what theory and simulation say of them, and the limit that each could not do with fewer for; None for headroom."""

    replicas: Replicas
    estimate: Estimate
    trial: Trial
    corrections: dict[Key, float]
    binds: dict[str, Key | None]
    simulated: int


def allocate(asked: Problem) -> Allocation:
    """Return the cheapest replicas found that keep every limit in simulation.  Raises Infeasible."""
    _possible(asked)
    least = fewest(asked)
    found = greedy(asked, least, {})
    if found is None:
        raise Infeasible(_missed(asked, {name: n * _IDLE for name, n in least.items()}, {}))
    found, corrections, count = _repaired(asked, found, {}, long=False)
    found, trims = _trimmed(asked, found, least, corrections)
    found, corrections, more = _repaired(asked, found, corrections, long=True)
    trial = simulate(asked, found, LONG)
    return Allocation(
        replicas=found, estimate=asked.estimate(found), trial=trial, corrections=corrections,
        binds=_binding(asked, found, least, corrections), simulated=count + trims + more,
    )  # fmt: skip


# ---------------------------------------------------------------- by theory


def fewest(asked: Problem) -> Replicas:
    """Return the replicas that every stage needs for load and headroom, latencies aside; of a language model what it needs alone."""
    usable = min(1 - asked.graph.headroom, FULL)
    found = {}
    for name, work in asked.works.items():
        carried = max(1, math.ceil(asked.calls_per_s(name) / (usable * work.capacity_per_s(1)) - 1e-9))
        found[name] = max(carried, work.least) if isinstance(work, Writer) else carried
    return found


def excesses(asked: Problem, whole: Latencies, stages: Mapping[str, Floats]) -> dict[Key, float]:
    """Return value / limit of every limit: below 1 it is kept.  A stage that nobody comes to keeps its own."""
    found: dict[Key, float] = {(None, limit): excess for excess, limit in whole.excesses(asked.graph.slo) if limit.metric != "availability"}
    for name, limit in asked.limits:
        if name is not None:
            times = stages.get(name, np.empty(0))
            alone = Latencies(ttft_s=times, tpot_s=times, e2e_s=times, itl_s=times)
            value = alone.value("e2e", limit.stat) if len(times) else 0.0
            found[name, limit] = (value or 0.0) / limit.limit
    return found


def _corrected(found: Mapping[Key, float], corrections: Mapping[Key, float]) -> dict[Key, float]:
    return {key: excess * corrections.get(key, 1.0) for key, excess in found.items()}


def judged(asked: Problem, replicas: Mapping[str, int], corrections: Mapping[Key, float], more: float = 1.0) -> dict[Key, float]:
    """Return value / limit by theory, scaled to what simulation saw."""
    made = asked.estimate(replicas, more)
    return _corrected(excesses(asked, made.whole, made.stages), corrections)


def greedy(asked: Problem, start: Replicas, corrections: Mapping[Key, float]) -> Replicas | None:
    """Return the start with as many replicas added as keep every limit by theory, None where none do.

    Each step adds, of all stages, the one that takes most off the limits' logarithms per dollar.
    """
    now, step = dict(start), 12
    over = _over(judged(asked, now, corrections))
    for _ in range(_STEPS):
        if over <= 0:
            return _lean(asked, now, start, corrections)
        tries = []
        for name, n in now.items():
            more = {**now, name: n + max(1, n // step)}
            usd = max(asked.usd_per_h(name, more[name]) - asked.usd_per_h(name, n), 1e-6)
            tries.append(((over - _over(judged(asked, more, corrections))) / usd, name, more))
        gain, _, best = max(tries, key=lambda t: t[:2])
        if gain <= 1e-9:
            if step == 1:
                return None
            step = max(step // 4, 1)
            continue
        now, over = best, _over(judged(asked, best, corrections))
    return None


def _lean(asked: Problem, now: Replicas, start: Replicas, corrections: Mapping[Key, float]) -> Replicas:
    """Return what was added without what large steps added too much, the dearest stage first."""
    for name in sorted(now, key=lambda s: -asked.usd_per_h(s, now[s])):
        step = max(1, now[name] // 12) if now[name] > start[name] else 0
        while step:
            fewer = {**now, name: now[name] - step}
            if fewer[name] >= start[name] and _over(judged(asked, fewer, corrections)) <= 0:
                now = fewer
            else:
                step //= 2
    return now


def _over(found: Mapping[Key, float]) -> float:
    """Return how far all limits together are missed: 0 when all are kept."""
    return sum(math.log(min(excess, 1e6)) for excess in found.values() if excess >= 1) + sum(1e-9 for e in found.values() if e >= 1)


def _possible(asked: Problem) -> None:
    """Raise Infeasible where a limit is missed even when nobody waits anywhere, BadInput where a load is a slip of a unit."""
    least = fewest(asked)
    for name, n in least.items():
        if n > _MOST_REPLICAS:
            rate, time = units.show_rate(asked.calls_per_s(name)), units.show_s(asked.works[name].service_s)
            raise BadInput(
                f"stage {name}: {rate} of {time} each ask for {n:,} replicas, and {_MOST_REPLICAS:,} can be planned for; check units"
            )
    idle = {name: n * _IDLE for name, n in least.items()}
    found = judged(asked, idle, {})
    if max(found.values(), default=0.0) >= 1:
        raise Infeasible(_missed(asked, idle, {}))


def _missed(asked: Problem, replicas: Mapping[str, int], corrections: Mapping[Key, float]) -> str:
    """Return which limit is missed by how much, what takes the time, and what would help."""
    made = asked.estimate(replicas)
    found = _corrected(excesses(asked, made.whole, made.stages), corrections)
    (name, limit), excess = max(found.items(), key=lambda item: item[1])
    slow = max(made.stages, key=lambda s: float(np.mean(made.stages[s])) * len(made.stages[s]), default=asked.graph.entry)
    where = f"stage {name}: " if name else ""
    if limit.metric == "goodput":
        return f"{where}{slo.show_limit(limit)} is missed {excess:.2f} times over with any number of replicas; allow more failures"
    if limit.limit * excess >= FAILED_S / 2:
        return f"{where}{slo.show_limit(limit)}: too many requests get no answer at all; loosen a timeout, or give a fallback or a retry"
    value = limit.limit * excess
    return (
        f"{where}{slo.show_limit(limit)} is missed by {100 * (excess - 1):.0f} % with any number of replicas: it is {units.show_s(value)}, "
        f"most of it at {slow}; allow {units.show_s(value * 1.05)}, or make {slow} faster"
    )


# ---------------------------------------------------------------- by simulation


def simulate(asked: Problem, replicas: Mapping[str, int], long: int = 1) -> Trial:
    """Return one run of the whole graph.  The same replicas and seed give the same run."""
    per_request = sum(flow.calls for flow in asked.flow.values())
    n = long * int(min(max(VISITS / max(per_request, 1e-9), _LEAST), _MOST))
    due_s, busier, first, last = _arrivals(asked, n)
    stations = {name: work.station(replicas[name], busier * asked.calls_per_s(name)) for name, work in asked.works.items()}
    played = simulation.play(asked.graph, stations, due_s, asked.seed)
    batches = [_latencies(played, rows) for rows in np.array_split(np.arange(first, last), BATCHES)]
    stages = {name: use.sojourn_s[(use.requests >= first) & (use.requests < last)] for name, use in played.stages.items()}
    return Trial(batches=tuple(batches), stages=stages, played=played)


def _arrivals(asked: Problem, n: int) -> tuple[Floats, float, int, int]:
    """Return when requests come, how many times as fast as the law says, and which of them count.

    Of a trace they are its busiest stretch of n requests, all of them where there are fewer, and all count.
    """
    if asked.due_s is None:
        due_s = workload.arrival_times(asked.rate_per_s, asked.graph.workload.arrivals, n=n, seed=asked.seed)
        return due_s, 1.0, int(n * _WARM), n - int(n * _LAST)
    n = min(n, len(asked.due_s))
    first = int(np.argmin(asked.due_s[n - 1 :] - asked.due_s[: len(asked.due_s) - n + 1]))
    due_s = asked.due_s[first : first + n] - asked.due_s[first]
    return due_s, (n - 1) / max(float(due_s[-1]), 1e-9) / asked.rate_per_s, 0, n


def _latencies(played: simulation.Played, rows: np.ndarray) -> Latencies:
    took_s = np.minimum(played.done_s[rows] - played.due_s[rows], FAILED_S)
    first_s = np.minimum(played.first_s[rows] - played.due_s[rows], took_s)
    tpot_s = played.tpot_s[rows]
    return Latencies(ttft_s=first_s, tpot_s=tpot_s, e2e_s=took_s, itl_s=tpot_s[~np.isnan(tpot_s)])


def _repaired(asked: Problem, start: Replicas, corrections: dict[Key, float], *, long: bool) -> tuple[Replicas, dict[Key, float], int]:
    """Return the start, or more replicas, that keep every limit in simulation; theory scaled to it; and the simulations it took."""
    now = start
    for count in range(1, _ROUNDS + 1):
        trial = simulate(asked, now, LONG if long else 1)
        seen = excesses(asked, trial.all, trial.stages)
        theory = judged(asked, now, {})
        corrections = {key: seen[key] / theory[key] for key in seen if theory[key] > 0 and seen[key] > 0}
        if max(seen.values(), default=0.0) < 1:
            return now, corrections, count
        more = greedy(asked, now, corrections)
        if more is None:
            more = _grown(asked, now, trial, corrections)
        now = more if more != now else {name: n + 1 for name, n in now.items()}
    raise Infeasible(f"no fleet keeps {slo.show(asked.graph.slo)} in {_ROUNDS} simulations; loosen the limit nearest to breaking")


def _grown(asked: Problem, now: Replicas, trial: Trial, corrections: Mapping[Key, float]) -> Replicas:
    """Return half as many replicas more where requests wait longest, for theory to be scaled anew.

    Theory that is scaled to bursts exaggerates what is left when nobody waits: only a simulation without waits tells that no fleet helps.
    """
    plenty = {name: n * _IDLE for name, n in now.items()}
    idle = simulate(asked, plenty)
    if max(excesses(asked, idle.all, idle.stages).values(), default=0.0) >= 1:
        raise Infeasible(_missed(asked, plenty, corrections))
    waited = {
        name: float(trial.stages[name].mean() - idle.stages[name].mean())
        for name in now
        if len(trial.stages[name]) and len(idle.stages[name])
    }
    name = max(waited, key=lambda stage: waited[stage] * asked.flow[stage].visits)
    return {**now, name: now[name] + max(1, now[name] // 2)}


def _trimmed(asked: Problem, start: Replicas, least: Replicas, corrections: Mapping[Key, float]) -> tuple[Replicas, int]:
    """Return the start without the replicas that simulation can do without, those that save most first."""
    now, count, refused = dict(start), 0, set()
    while count < _TRIMS:
        could = [name for name, n in now.items() if n > least[name] and name not in refused]
        could.sort(key=lambda name: asked.usd_per_h(name, now[name] - 1) - asked.usd_per_h(name, now[name]))
        name = next((s for s in could if max(judged(asked, {**now, s: now[s] - 1}, corrections).values()) < 1.02), None)
        if name is None:
            break
        fewer = {**now, name: now[name] - 1}
        trial, count = simulate(asked, fewer), count + 1
        if max(excesses(asked, trial.all, trial.stages).values(), default=0.0) < 1:
            now = fewer
        else:
            refused.add(name)
    return now, count


def _binding(asked: Problem, replicas: Replicas, least: Replicas, corrections: Mapping[Key, float]) -> dict[str, Key | None]:
    """Return, by stage, the limit that breaks first with one replica fewer; None where the load, or the headroom over it, asks for all."""
    found: dict[str, Key | None] = {}
    for name, n in replicas.items():
        if n <= least[name]:
            found[name] = None
            continue
        fewer = judged(asked, {**replicas, name: n - 1}, corrections)
        found[name] = max(fewer, key=lambda key: fewer[key])
    return found
