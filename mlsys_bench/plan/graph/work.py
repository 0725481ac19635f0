"""What replicas of one stage can do: their capacity, the time of a visit by theory, and the station that a simulation gives them.

Two kinds answer the same questions: `Served` works by a law of its service time, `Writer` is a language model sized token by token.
`rate_per_s` is that of all calls to the stage, `purpose` names the random numbers of a visit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlsys_bench import latency, record, simulate, workload
from mlsys_bench.batching import Limits
from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.latency import service as service_profiles
from mlsys_bench.plan import agreement
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.plan.graph.numbers import drawn, poisson, uniform
from mlsys_bench.plan.graph.purse import Purse, Unit
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.plan.planner import plan as plan_engine
from mlsys_bench.plan.request import Request
from mlsys_bench.queueing import Law, erlang_c, parse_law
from mlsys_bench.simulate.graph import Delay, Station
from mlsys_bench.stages import Stage, StageGraph
from mlsys_bench.types import SLO, LatencyProfile, Layout, Plan, Provenance, Workload

Floats = npt.NDArray[np.float64]
FULL = 0.98  # of capacity: closer to saturation no queue settles within a day
FEW = 1e-3  # of the requests: what a language model is sized for where none is expected, as at the fallback of what hardly fails
_NAMES = {"constant": "det", "exponential": "exp", "lognormal": "logn", "gamma": "gamma", "uniform": "unif"}
_TOKENS_BEFORE, _TOKENS_COUNTED = 400, 1600  # requests of one token-level run


@dataclass(frozen=True, slots=True, kw_only=True)
class Visits:
    """Times of visits by theory: one per request that might come.  Tokens only where the stage writes some."""

    e2e_s: Floats
    ttft_s: Floats | None = None
    tpot_s: Floats | None = None


# ---------------------------------------------------------------- stages with a law of service


@dataclass(frozen=True, kw_only=True)
class Served:
    """Replicas that take (fixed_s + per_item_s n) x noise for n requests at once, `concurrency` times at once."""

    stage: Stage
    fixed_s: float
    per_item_s: float
    noise: Law
    provenance: Provenance
    source: str
    measured: LatencyProfile | None = None

    @property
    def max_batch(self) -> int:
        """Requests that a replica takes at once."""
        return self.stage.batching.max if self.stage.batching else 1

    @property
    def wait_s(self) -> float:
        """The longest that a request waits for others to join its batch."""
        return self.stage.batching.wait_s if self.stage.batching else 0.0

    @property
    def service_s(self) -> float:
        """Mean time of a request alone."""
        return self.fixed_s + self.per_item_s

    def servers(self, replicas: int) -> int:
        """Return how many batches, or requests, are worked on at once."""
        return replicas * self.stage.concurrency

    def batch_s(self, n: float) -> float:
        """Return the mean time of a batch."""
        return self.fixed_s + self.per_item_s * n

    def capacity_per_s(self, replicas: int) -> float:
        """Return the rate at which all servers are busy with full batches."""
        return self.servers(replicas) * self.max_batch / self.batch_s(self.max_batch)

    def unit(self, visits_per_s: float) -> Unit:
        """Return what one replica stands on."""
        resources = self.stage.resources
        assert resources is not None
        own = Unit(
            stage=self.stage.name, device=resources.gpu[0] if resources.gpu else None, devices=resources.gpus, vcpus=resources.vcpu or 0.0,
            shards=self.stage.shards,
        )  # fmt: skip
        return _with_beside(own, self.stage, visits_per_s)

    def longer(self, time_s: float) -> float:
        """Return the share of visits that take longer than this although nobody waits; of shards the slowest counts."""
        alone_s = self.service_s * drawn(self.noise, f"{self.stage.name}/alone")
        return 1 - float((alone_s <= time_s).mean()) ** self.stage.shards

    def visits(self, replicas: int, rate_per_s: float, arrival_scv: float, purpose: str) -> Visits:
        """Return wait + service; of shards the slowest."""
        one = self._alone if self.max_batch == 1 else self._batched
        shards = [one(replicas, rate_per_s, arrival_scv, f"{purpose}/{i}") for i in range(self.stage.shards)]
        return Visits(e2e_s=np.max(shards, axis=0))

    def _alone(self, replicas: int, rate_per_s: float, arrival_scv: float, purpose: str) -> Floats:
        """Return visits that are served one by one: Erlang C's wait, stretched by (SCV of arrivals + SCV of service) / 2."""
        waits_s = self._waits_s(self.servers(replicas), rate_per_s, self.fixed_s, arrival_scv, f"{purpose}/wait")
        return np.asarray(waits_s + self.fixed_s * drawn(self.noise, f"{purpose}/work"))

    def _waits_s(self, c: int, rate_per_s: float, time_s: float, arrival_scv: float, purpose: str) -> Floats:
        offered = min(rate_per_s * time_s, FULL * c)
        p_wait = erlang_c(c, offered)
        drain_per_s = (c - offered) / time_s / self._spread(arrival_scv)
        return np.asarray(np.maximum(-np.log(uniform(purpose) / max(p_wait, 1e-300)) / drain_per_s, 0.0))

    def _spread(self, arrival_scv: float) -> float:
        """Return what multiplies the waits of exponential times: half the sum of both SCVs."""
        return max((arrival_scv + self.noise.scv) / 2, 0.02)

    def _batched(self, replicas: int, rate_per_s: float, arrival_scv: float, purpose: str) -> Floats:
        """Return visits that are served in batches.

        Who comes while no server is free waits for the next of c that ends, 1 / c of a batch at most; who finds one free waits for
        others to join.  Large batches are met more often: sizes are 1 + a Poisson number.  What is left over when batches are full queues
        as full batches would.
        """
        c, n = self.servers(replicas), self.usual_batch(replicas, rate_per_s)
        busy = erlang_c(c, min(rate_per_s / n * self.batch_s(n), FULL * c))
        met = (n - 1) * (1 + 1 / n) if n < self.max_batch else 1e3
        own_s, others_s = (self._times_s(met, f"{purpose}/{whose}") for whose in ("own", "others"))
        next_s = uniform(f"{purpose}/next") * others_s / c
        joined_s = uniform(f"{purpose}/next") * (min(self.wait_s, (n - 1) / rate_per_s) if n >= self.max_batch else self.wait_s)
        met_s = np.where(uniform(f"{purpose}/busy") < busy, np.maximum(next_s, joined_s), joined_s)
        full_s = self.batch_s(self.max_batch)
        queued_s = self._waits_s(c, rate_per_s / self.max_batch, full_s, arrival_scv / self.max_batch, f"{purpose}/wait")
        return np.asarray(met_s + queued_s + own_s)

    def _times_s(self, others: float, purpose: str) -> Floats:
        """Return times of batches in which so many others are on average."""
        sizes = np.minimum(1 + poisson(others, f"{purpose}/size"), self.max_batch)
        return np.asarray((self.fixed_s + self.per_item_s * sizes) * drawn(self.noise, f"{purpose}/work"))

    def usual_batch(self, replicas: int, rate_per_s: float) -> float:
        """Return the usual size of a batch: who joins while the first waits, or comes while a server is busy."""
        c, n = self.servers(replicas), 1.0
        for _ in range(20):
            busy = min(rate_per_s * self.batch_s(n) / n / c, 1.0)
            n = min(max(1 + rate_per_s * self.wait_s, (1 - busy) + busy * max(1.0, rate_per_s * self.batch_s(n) / c)), self.max_batch)
        return float(n)

    def blocked(self, replicas: int, rate_per_s: float, arrival_scv: float = 1.0) -> float:
        """Return about what share of calls finds the queue full.

        With t the share of the time that as many wait where any number may, (1 - rho) t / (1 - rho t): exact for M/M/c, where t is Erlang
        C's tail.  Of batches full ones queue; the tail is drawn out as waits are.  Beyond capacity at least what is too much.
        """
        if self.stage.queue is None or rate_per_s <= 0:
            return 0.0
        c, offered = self.servers(replicas), rate_per_s / self.max_batch * self.batch_s(self.max_batch)
        rho, batches = min(offered / c, FULL), self.stage.queue.limit * replicas / self.max_batch
        tail = float(erlang_c(c, rho * c)) * rho ** (batches / self._spread(arrival_scv / self.max_batch))
        return float(max((1 - rho) * tail / (1 - rho * tail), 1 - c / offered))

    def station(self, replicas: int, rate_per_s: float) -> Station:
        """Return servers and queue as they are."""
        room = None if self.stage.queue is None else self.stage.queue.limit * replicas
        return Station(
            servers=self.servers(replicas), fixed_s=self.fixed_s, per_item_s=self.per_item_s, noise=self.noise,
            max_batch=self.max_batch, max_wait_s=self.wait_s, room=room,
        )  # fmt: skip

    def profile(self) -> LatencyProfile:
        """Return the measured profile, or the assumed law as one."""
        if self.measured is not None:
            return self.measured
        resources = self.stage.resources
        device = "vcpu" if resources is None or not resources.gpu else resources.gpu[0]
        known = {"service_s": self.fixed_s} if self.max_batch == 1 else {"fixed_s": self.fixed_s, "item_s": self.per_item_s}
        terms = {name: max(value, 1e-12) for name, value in (known | {"scv": self.noise.scv}).items()}
        return LatencyProfile(
            form="service", layout=Layout(model=self.stage.component or self.stage.name, precision="", device=device),
            stage=self.stage.name, terms=tuple(terms), coefficients=tuple(terms.values()),
            covariance=tuple(tuple(0.0 for _ in terms) for _ in terms), constants={}, residual_log_sd=0.0, valid={},
            provenance=self.provenance, note=self.source,
        )  # fmt: skip


def _with_beside(unit: Unit, stage: Stage, visits_per_s: float) -> Unit:
    """Return the unit with what a replica takes beside devices and vCPUs."""
    resources = stage.resources
    assert resources is not None
    return replace(
        unit, memory_bytes=resources.memory_bytes or 0.0, storage_bytes=resources.storage_bytes or 0.0,
        egress_bytes_per_s=(stage.egress_bytes or 0.0) * visits_per_s,
    )  # fmt: skip


def served(stage: Stage, profile: LatencyProfile | None) -> Served:
    """Return the work of a stage by its assumed law, or by a profile."""
    assert stage.service is not None
    if profile is not None:
        fixed_s, per_item_s = _by_one(stage, *_of_profile(profile, stage))
        name, _ = service_profiles.law(profile)
        return Served(
            stage=stage, fixed_s=fixed_s, per_item_s=per_item_s, noise=parse_law(name, 1.0), provenance=profile.provenance,
            source=profile.note or "measured", measured=profile,
        )  # fmt: skip
    law = stage.service.assumed
    assert law is not None
    name = _NAMES[law.dist] + (f":{law.cv**2:.12g}" if law.cv is not None else "")
    fixed_s, per_item_s = _by_one(stage, law.mean_s, law.per_item_s)
    return Served(
        stage=stage, fixed_s=fixed_s, per_item_s=per_item_s, noise=parse_law(name, 1.0), provenance=Provenance.ASSUMED,
        source=law.source,
    )  # fmt: skip


def _by_one(stage: Stage, fixed_s: float, per_item_s: float) -> tuple[float, float]:
    """Return the times of a batch, all of it fixed where batches are of one: such a stage queues like any other."""
    return (fixed_s + per_item_s, 0.0) if stage.batching is not None and stage.batching.max == 1 else (fixed_s, per_item_s)


def _of_profile(profile: LatencyProfile, stage: Stage) -> tuple[float, float]:
    """Return the time of a batch of n as fixed + item x n, at the concurrency the stage works with."""
    slow = service_profiles.slowdown(service_profiles.coefficients(profile), stage.concurrency)
    one, two = (service_profiles.service_s(profile, batch=n) * slow for n in (1, 2))
    return (one, 0.0) if stage.batching is None else (max(2 * one - two, 0.0), two - one)


def profile_of(stage: Stage, bound: LatencyProfile | None) -> LatencyProfile | None:
    """Return the measured profile of a stage: bound on the command line, or named by the scenario; None where there is none."""
    if bound is None and stage.service is not None and stage.service.measured is not None:
        path = Path(stage.service.measured.file)
        _, value = record.load(path)
        if not isinstance(value, LatencyProfile):
            raise BadInput(f"stages.{stage.name}.service.measured.file: {path} is no latency profile; `mlsys fit` writes one")
        bound = value
    if bound is not None:
        if (bound.form == "step") != (stage.engine is not None):
            needed = "of engine steps" if stage.engine is not None else "of a service"
            raise BadInput(f"stage {stage.name}: the profile is one of form {bound.form!r}; a profile {needed} is needed")
        (latency.check if bound.form == "step" else service_profiles.check)(bound)
    return bound


# ---------------------------------------------------------------- language models


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Replicas of a language model: the layout that the planner chose for it alone, at any number of replicas."""

    stage: Stage
    alone: Plan
    traffic: Workload  # of one second at the stage
    limits: Limits
    replica: Replica
    promised: SLO  # what it must keep whatever the other stages take
    seed: int
    least: int  # replicas that it needs alone

    @property
    def provenance(self) -> Provenance:
        """That of its latency profile."""
        return self.alone.profile.provenance

    @property
    def source(self) -> str:
        """What its step times rest on."""
        return self.alone.profile.note or self.alone.profile.provenance.value

    @property
    def service_s(self) -> float:
        """Mean time of an answer that nobody else is in the way of."""
        return self.replica.predict(1e-3 * self.replica.capacity_per_s).value("e2e", "mean") or 0.0

    def capacity_per_s(self, replicas: int) -> float:
        """Return the rate at which the replicas saturate."""
        return replicas * self.replica.capacity_per_s

    def unit(self, visits_per_s: float) -> Unit:
        """Return what one replica stands on; stages of a pipeline may be nodes apart."""
        item, devices = self.alone.fleet[0], self.alone.devices_per_replica
        own = Unit(stage=self.stage.name, device=item.gpu, devices=devices // item.pp, nodes=item.pp)
        return _with_beside(own, self.stage, visits_per_s)

    def longer(self, time_s: float) -> float:
        """Return the share of visits that take longer than this on the replicas that it needs alone."""
        return float((self._predicted(self.traffic.rate_per_s / self.least).e2e_s > time_s).mean())

    def visits(self, replicas: int, rate_per_s: float, arrival_scv: float, purpose: str) -> Visits:
        """Return the analytic answer of one replica at its share of the rate, as many samples as there are draws.

        Where nobody is expected, as at some fallbacks, it is that of the traffic it is sized for.
        """
        found = self._predicted((rate_per_s or self.traffic.rate_per_s) / replicas)
        at = (uniform(f"{purpose}/work") * len(found.e2e_s)).astype(np.int64)
        return Visits(e2e_s=found.e2e_s[at], ttft_s=found.ttft_s[at], tpot_s=found.tpot_s[at])

    def _predicted(self, each_per_s: float) -> Latencies:
        rate = min(each_per_s, FULL * self.replica.capacity_per_s)
        if rate not in self._answers:
            self._answers[rate] = self.replica.predict(rate)
        return self._answers[rate]

    @cached_property
    def _answers(self) -> dict[float, Latencies]:
        return {}

    def station(self, replicas: int, rate_per_s: float) -> Delay:
        """Return what requests met in a token-level run of one replica at its share of the rate; routed at random."""
        each_per_s = (rate_per_s or self.traffic.rate_per_s) / replicas
        key = round(each_per_s, 9)
        if key not in self._runs:
            self._runs[key] = self._run(each_per_s)
        return self._runs[key]

    @cached_property
    def _runs(self) -> dict[float, Delay]:
        return {}

    def _run(self, each_per_s: float) -> Delay:
        schedule = workload.schedule(replace(self.traffic, rate_per_s=each_per_s), n=_TOKENS_BEFORE + _TOKENS_COUNTED, seed=self.seed)
        ran = simulate.run(schedule, self.alone.profile, self.limits, seed=self.seed)
        met = [r for r in ran.requests[_TOKENS_BEFORE:] if r.outcome == "ok"]
        if not met:
            raise Infeasible(f"stage {self.stage.name}: a replica on {self.alone.gpu} holds none of the requests")
        due, first, last = (np.array(x) for x in zip(*((r.scheduled_s, r.token_s[0], r.token_s[-1]) for r in met), strict=True))
        gaps = np.array([len(r.token_s) - 1 for r in met])
        tpot = np.where(gaps > 0, (last - first) / np.maximum(gaps, 1), np.nan)
        return Delay(ttft_s=first - due, tpot_s=tpot, e2e_s=last - due)

    def profile(self) -> LatencyProfile:
        """Return the profile of engine steps."""
        return self.alone.profile


def writer(stage: Stage, graph: StageGraph, share: float, limits: SLO, profile: LatencyProfile | None, purse: Purse, seed: int) -> Writer:
    """Return the language model of a stage on the layout that serves it alone for the least: `share` calls per request of the scenario."""
    engine, resources, whole = stage.engine, stage.resources, graph.workload
    assert engine is not None
    assert resources is not None
    traffic = replace(
        whole, rate_per_s=whole.rate_per_s * share, prompt_tokens=engine.prompt or whole.prompt_tokens,
        output_tokens=engine.output or whole.output_tokens,
    )  # fmt: skip
    profiles = (profile,) if profile is not None else ()
    request = Request(
        model=engine.model, workload=traffic, slo=limits, gpus=() if profiles else resources.gpu,
        precisions=() if profiles else engine.precision, profiles=profiles, max_batch=engine.max_batch, headroom=graph.headroom,
        term=purse.term, market=purse.market, seed=seed,
    )  # fmt: skip
    try:
        alone = plan_engine(request)
    except Infeasible as error:
        raise Infeasible(f"stage {stage.name}: {error}") from error
    except BadInput as error:  # such as a limit below its physics floor: one that the whole's limits leave to those who come here
        raise BadInput(f"stage {stage.name}, called {share:.3g} times a request: {error}") from error
    held = _limits(alone)
    replica = agreement.of(alone.profile, held, traffic)
    return Writer(stage=stage, alone=alone, traffic=traffic, limits=held, replica=replica, promised=limits, seed=seed, least=alone.replicas)


def _limits(alone: Plan) -> Limits:
    constants = alone.profile.constants
    block = int(constants.get("block_tokens", 16))
    steps = alone.max_step_tokens or int(constants.get("max_step_tokens", 2048))
    context = int(constants.get("max_context", 131_072))
    return Limits(alone.max_batch, steps, block, math.floor(alone.kv_tokens_per_replica / block), context)


Work = Served | Writer


# ---------------------------------------------------------------- calls that come of each other


def late(works: Mapping[str, Work]) -> dict[str, float]:
    """Return, by stage, the share of attempts that time out although nobody waits: retries and fallbacks get at least so many."""
    return {name: found for name, work in works.items() if (found := _late(work)) > 0}


def _late(work: Work) -> float:
    timeout_s, hedge = work.stage.timeout_s, work.stage.hedge
    if timeout_s is None:
        return 0.0
    second = work.longer(timeout_s - hedge.after_s) if hedge is not None and hedge.after_s < timeout_s else 1.0
    return work.longer(timeout_s) * second


def hedged(works: Mapping[str, Work]) -> dict[str, float]:
    """Return, by stage, the share of attempts that are sent a second time although nobody waits."""
    given = ((name, work, work.stage.hedge) for name, work in works.items())
    return {name: work.longer(hedge.after_s) for name, work, hedge in given if hedge is not None and not _is_over_by(work, hedge.after_s)}


def _is_over_by(work: Work, time_s: float) -> bool:
    return work.stage.timeout_s is not None and work.stage.timeout_s <= time_s
