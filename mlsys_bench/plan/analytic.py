"""One replica by queueing theory: its capacity, and what users see at a rate.

Three chains, each solved for its stationary law, no random number drawn:

    n    requests that decode (or hold a seat), by the load-dependent birth-death chain with r(n) = n / ((E[out] - 1) it(n)), arrivals
         in the clusters that prefill makes of them (`queueing.clusters`)
    W    prompt tokens that wait for the next step beside n decodes (`queueing.backlog`): they decide how long it lasts, it(n) = E[T(n, W)]
    W'   the same while all slots are taken, when each completion admits one prompt: it gives the capacity

From them come, on a fixed sample of requests, the same for every rate and candidate:

    TTFT = wait for a slot, or else for the step in progress, as met by chance (long steps are met more often)
           + the steps that are planned by then (`latency.overhead`), unless the replica is idle
           + the steps until its own last prompt token, those that came before it first
           + the time outside the engine
    ITL  = T(n, W), as often as tokens meet it
    TPOT = the mean of ITL over a life: n as averaged over it, and a gamma law for the prefills met
    E2E  = TTFT + (output tokens - 1) x TPOT

The wait, given that all slots are taken, is the rest of the shortest of B services and, for each request ahead, the rest of one met by
chance, B times as fast (the law of M/G/c of Tijms, van Hoorn and Federgruen 1981, Adv. Appl. Prob. 13, 186-206).  Service is the time
that a request takes of the replica: long answers hold more KV too.

Where requests have ranks, lower ones wait less and others more (`plan.priority`), for a slot and for the step that reads their prompt.

Of a replica whose memory is full `plan.crowded` tells how many are seated, and how much is read again: that is in its capacity.

Approximate: arrivals are taken as Poisson and preemption below saturation as absent.  Where `binds` is not "slots", simulate, as plans do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from mlsys_bench import latency
from mlsys_bench.batching import Limits
from mlsys_bench.plan import crowded, priority
from mlsys_bench.plan.demand import SAMPLES, Demand, Floats
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.queueing.backlog import Parcels, flooded, settled
from mlsys_bench.queueing.clusters import Clustered, births, with_births
from mlsys_bench.types import LatencyProfile

Ints = npt.NDArray[np.int64]
Binding = Literal["slots", "memory", "budget"]
_FINE, _COARSE = (256, 9), (128, 3)  # points of the lattice of backlogs, batch sizes it is solved at; the second for small samples
_STAGES = 60  # steps that one prompt may take
_CROWDED = 1.25  # times as many as may be seated find memory on average: with fewer, chance fills it at times
_SLACK = 0.85  # of the full budget: closer to it the queue is one of prompt tokens as much as of slots


@dataclass(frozen=True, slots=True)
class Randoms:
    """Numbers by request, each column stratified: uniform over (0, 1), the last two standard normal."""

    batch: Floats
    node: Floats
    step: Floats
    phase: Floats
    ahead: Floats
    behind: Floats
    between: Floats
    life: Floats
    service: Floats
    met: Floats


@cache
def randoms(count: int) -> Randoms:
    """Return the numbers every analytic answer of so many samples uses."""
    rng = np.random.default_rng(7)
    columns = [(rng.permutation(count) + 0.5) / count for _ in range(10)]
    normal = np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
    return Randoms(*columns[:8], *(normal[(u * count).astype(np.int64)] for u in columns[8:]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Steps by decodes (rows: `Replica.nodes`) and by backlog (columns): law, length, prompts and decodes in them, room for prompts."""

    law: Floats
    step_s: Floats
    requests: Floats
    decodes: Floats
    room: Floats


class Replica:
    """A replica of one candidate under one demand.  `capacity_per_s` is the rate at which it saturates, `binds` what saturates."""

    def __init__(self, profile: LatencyProfile, limits: Limits, demand: Demand, samples: int = SAMPLES) -> None:
        """Work out the steps of a full replica, and so its capacity."""
        self.profile, self.limits, self.demand = profile, limits, demand
        self._table = latency.table(profile).tolist()
        self.randoms = randoms(samples if demand.tenant is None or samples < SAMPLES else max(samples, len(demand.prompt)))
        self.context_tokens = demand.held_tokens[0]
        self._overhead = latency.overhead(profile)
        self.memory_slots = memory_slots(limits, demand)
        self.slots, again = max(1, min(limits.max_seqs, self.memory_slots)), 0.0
        self.steps_per_request = demand.mean_output - 1 + float(np.ceil(demand.prompt / limits.max_step_tokens).mean())
        self.admitted_per_step = self.slots / self.steps_per_request  # of a full replica
        if self.memory_slots < _CROWDED * limits.max_seqs:
            crowd = crowded.of(limits, demand)
            self.slots, self.admitted_per_step = max(1, round(crowd.seats)), crowd.answered_per_step
            again = crowd.again_tokens / demand.mean_prompt
        self.read_per_step = self.admitted_per_step * (1 + again)  # prompts, with those whose cache was lost
        cells, nodes = _FINE if samples >= SAMPLES else _COARSE
        self.nodes = np.array(sorted({float(round(1 + (self.slots - 1) * (i / (nodes - 1)) ** 1.5)) for i in range(nodes)}))
        self.parcels = Parcels(demand.prompt, _reach(limits, demand, self.read_per_step), cells)
        n = np.arange(self.slots + 1, dtype=np.float64)
        self.decode_s = np.where(n > 0, self._time_s(n, 0 * n, 0 * n, n), 0.0)
        self.full = self._full()
        self.full_s = float(self.full.law[0] @ self.full.step_s[0])
        by_slots, by_budget = self.admitted_per_step / self.full_s, self._full_budget_per_s()
        self.capacity_per_s = min(by_slots, by_budget)
        self.binds: Binding = self._binding(by_slots, by_budget)
        work_s = self._work_s()
        self.rest_mean, self.rest_scv = _rest(work_s)
        self.order = None if demand.rank is None else priority.of(demand.rank, work_s, demand.prompt)

    @cached_property
    def step_s(self) -> Floats:
        """Mean time of a step with n = 0 … B decodes near capacity."""
        return self._by_batch(self._steps(0.9 * self.capacity_per_s))

    # ------------------------------------------------------------ steps

    def _time_s(self, decodes: Floats, tokens: Floats, pairs: Floats, sampled: Floats) -> Floats:
        features = (decodes, decodes * self.context_tokens, tokens, pairs, sampled)
        return latency.many(self._table, features)

    def _by_backlog(self, seats: Floats, mu: Floats, is_full: bool = False) -> Steps:
        """Return steps by backlog, one row per number of decodes, the backlog being Poisson(mu) prompts.

        In a full replica whoever prefills has one of the seats, and does not decode; else prompts come beside those that decode.
        """
        total = self.parcels.total(mu)
        requests, pairs = self.parcels.given_total(mu, total)
        decodes = np.maximum(seats[:, None] - requests, 0.0) if is_full else np.broadcast_to(seats[:, None], requests.shape)
        room = np.maximum(self.limits.max_step_tokens - decodes, 1.0)
        free = requests if is_full else np.maximum(self.slots - seats, max(0.2 * self.slots, 1.0))[:, None]
        tokens = np.minimum(self.parcels.at * np.minimum(free / np.maximum(requests, 1.0), 1.0), room)  # the rest waits for a seat
        share = np.where(self.parcels.at > 0, tokens / np.maximum(self.parcels.at, 1e-9), 0.0)
        step_s = self._time_s(decodes, tokens, pairs * share, decodes + requests * share)
        return Steps(law=total, step_s=step_s, requests=requests, decodes=decodes, room=room)

    def _full(self) -> Steps:
        """Return the steps of a replica with all slots taken and requests waiting: each that ends admits one, whatever time it took."""
        steps = self._by_backlog(np.array([float(self.slots)]), np.array([self.read_per_step]), is_full=True)
        return replace(steps, law=flooded(self.parcels, self.read_per_step, steps.room))

    def _steps(self, rate_per_s: float) -> Steps:
        """Return the steps at a rate, by number of decodes."""
        decode_s = self.decode_s[self.nodes.astype(np.int64)]
        each_s = (self.full_s - self.decode_s[-1]) / self.read_per_step
        mean_s = decode_s / max(1 - rate_per_s * each_s, 0.05)  # a first guess: prefill takes rate x each_s of the time
        steps = self._by_backlog(self.nodes, rate_per_s * mean_s)
        return replace(steps, law=settled(self.parcels, rate_per_s, steps.step_s, steps.room, steps.law))

    def _by_batch(self, steps: Steps) -> Floats:
        """Return the mean time of a step with n = 0 … B decodes."""
        return self._between((steps.law * steps.step_s).sum(axis=1))

    def _between(self, at_nodes: Floats) -> Floats:
        """Return a value for each n = 0 … B, 0 for none."""
        found = np.interp(np.arange(self.slots + 1), self.nodes, at_nodes)
        found[0] = 0.0
        return np.asarray(found)

    def _full_budget_per_s(self) -> float:
        """Return the rate at which every step is full: no replica computes more tokens than its budget per step."""
        demand, budget = self.demand, float(self.limits.max_step_tokens)
        tokens = demand.mean_prompt + demand.mean_output - 1
        requests = budget / tokens  # finished per full step
        decodes = np.minimum(requests * (demand.mean_output - 1), self.slots)
        pairs = requests * float((demand.prompt**2).mean()) / 2
        step = self._time_s(np.asarray(decodes), np.asarray(requests * demand.mean_prompt), np.asarray(pairs), decodes + requests)
        return float(requests / step)

    def _binding(self, by_slots: float, by_budget: float) -> Binding:
        if by_slots > _SLACK * by_budget:
            return "budget"
        return "memory" if self.memory_slots < self.limits.max_seqs else "slots"

    def _work_s(self) -> Floats:
        """Return the service of each request, the time it takes of a full replica: its share of each step, its KV, its prefill."""
        seats = np.full(len(self.demand.prompt), float(self.slots))
        none, p, gaps = 0 * seats, self.demand.prompt, self.demand.output - 1
        without_kv, usual = (
            latency.seconds(self._table, self.slots, self.slots * c, 0.0, 0.0, self.slots) for c in (0.0, self.context_tokens)
        )
        per_kv_token = (usual - without_kv) / (self.slots * self.context_tokens)
        prefill = self._time_s(seats, p, p**2 / 2, seats + 1) - self._time_s(seats, none, none, seats)
        return np.asarray(gaps * without_kv / self.slots + per_kv_token * gaps * (p + gaps / 2) + prefill)

    # ------------------------------------------------------------ what users see

    def utilisation(self, rate_per_s: float) -> float:
        """Return offered load over capacity."""
        return rate_per_s / self.capacity_per_s

    def predict(self, rate_per_s: float) -> Latencies:
        """Return what users see at this rate.  Raises Overload at or above capacity."""
        steps = self._steps(min(rate_per_s, self.capacity_per_s))
        step_s = self._by_batch(steps)
        decode_s, seated_s = (self.demand.mean_output - 1) * step_s, self.steps_per_request * step_s
        rises = self._births(rate_per_s, step_s)
        seats = self._chain(rate_per_s, rises, step_s, seated_s)
        rough = len(self.randoms.batch) < SAMPLES  # then the two chains are alike enough
        decodes = seats if rough else self._chain(rate_per_s, rises, step_s, decode_s)
        rows = np.arange(len(self.randoms.batch)) % len(self.demand.prompt)  # there are fewer pairs where some can never be served
        prompt, output = self.demand.prompt[rows], self.demand.output[rows]
        order = None if self.order is None else self.order.rows(rows)
        ttft = self._first_token(rate_per_s, seats, decodes, steps, prompt, order)
        tpot = self._per_token(decodes, steps, output)
        itl, weights = self._gaps(decodes, steps)
        e2e = ttft + np.where(output > 1, (output - 1) * np.nan_to_num(tpot), 0.0)
        tenant = None if self.demand.tenant is None else self.demand.tenant[rows]
        return Latencies(ttft_s=ttft, tpot_s=tpot, e2e_s=e2e, itl_s=itl, itl_weights=weights, tenant=tenant, tenants=self.demand.tenants)

    def _births(self, rate_per_s: float, step_s: Floats) -> Floats:
        """Return the rates at which requests come in clusters, by how many are present."""
        prefilling = np.clip(1 - self.decode_s[:-1] / np.maximum(step_s[:-1], 1e-300), 0.0, 1.0)
        prefilling[0] = 0.0  # nobody's step is longer for it
        return births(rate_per_s, prefilling, *self._members)

    def _chain(self, rate_per_s: float, rises: Floats, step_s: Floats, stay_s: Floats) -> Clustered:
        """Return the law of the number of requests that stay so long with n of them present, and of those that wait for a slot."""
        n = np.arange(1.0, self.slots + 1)
        completions = n / np.maximum(stay_s[1:], 1e-3 * step_s[1:])  # answers of one token do not stay
        completions[-1] = self.capacity_per_s
        return with_births(rate_per_s, completions, rises)

    @cached_property
    def _members(self) -> tuple[float, float]:
        """SCV of the prompts of a cluster, and the chance that of two members the first to leave finds the other."""
        prompt = self.demand.prompt
        return float(prompt.var() / prompt.mean() ** 2), _together(self.demand.output)

    def _node(self, seated: Floats, u: Floats) -> Ints:
        """Return, for each number seated, one of the two nodes beside it, the nearer one more often."""
        place = np.interp(seated, self.nodes, np.arange(len(self.nodes)))
        return np.asarray((place + u).astype(np.int64).clip(0, len(self.nodes) - 1))

    def _first_token(
        self, rate: float, seats: Clustered, found: Clustered, steps: Steps, prompt: Floats, order: priority.Order | None
    ) -> Floats:
        """Return TTFT by request.  seats: the law of seats taken; found: that of decodes."""
        u, slots = self.randoms, self.slots
        decoding = np.minimum(np.searchsorted(np.cumsum(found.batch_law), u.batch), slots - 1).astype(np.float64)
        waits, idle = u.batch > 1 - seats.p_wait, u.batch < seats.batch_law[0]
        node = self._node(decoding, u.node)
        by_time = steps.law * steps.step_s
        cell = _inverse(np.cumsum(by_time, axis=1), node, u.step)
        alone = (decoding == 0) & ~idle  # somebody prefills and nobody decodes
        cell[alone] = _inverse(np.cumsum(by_time[:1] * (self.parcels.at > 0), axis=1), node[alone] * 0, u.step[alone])
        met_s = np.where(idle | waits, 0.0, steps.step_s[node, cell])
        rest_s = (1 - u.phase) * met_s
        together = np.where(waits, self.admitted_per_step / 2, 0.0)  # admitted in the same step, before it and after it
        before, after = together + rate * (met_s - rest_s), together + rate * rest_s
        left = np.where(idle | waits, 0.0, np.maximum(self.parcels.at[cell] - steps.room[node, cell], 0.0))
        if order is not None:
            before, after = order.prompts_upto * before + order.prompts_before * after, before + after
            after = after - before
        ahead, behind = self._arrived(before, u.ahead), self._arrived(after, u.behind)
        if order is not None:  # who is being read has a seat already
            under_way = np.minimum(left, float((self.demand.prompt**2).mean()) / (2 * self.demand.mean_prompt))
            passed = (1 - order.prompts_upto) * (left - under_way)
            left, behind = left - passed, behind + passed
        decodes = np.where(idle, 0.0, np.where(waits, slots - 1.0, steps.decodes[node, cell]))
        mine_s = self._prefill_s(rate, decodes, left + ahead, prompt, behind, 0.0 if order is None else order.prompts_before)
        usual_s = (steps.law * steps.step_s).sum(axis=1)[node]
        planned_s = self._overhead.planned_steps * np.where(idle, 0.0, np.where(waits, self.full_s, usual_s))
        return np.asarray(self._waited_s(seats, order) + rest_s + planned_s + mine_s + self._overhead.seconds(prompt))

    def _waited_s(self, chain: Clustered, order: priority.Order | None) -> Floats:
        """Return the wait for a slot: until the first completion, and for each request ahead until one more."""
        u = self.randoms
        late = (u.batch - (1 - chain.p_wait)) / max(chain.p_wait, 1e-300)  # uniform among those that wait
        waits, found = late > 0, np.zeros(len(late))
        if waits.any():
            ahead = chain.queued(late[waits]) / self.rest_scv
            others = _gamma(np.maximum(ahead, 1e-9), u.service[waits], u.between[waits]) * self.rest_scv * self.rest_mean
            found[waits] = (-np.log(u.phase[waits]) + others) / self.capacity_per_s
        if order is None:
            return found
        ratio, scv = priority.stretched(chain.utilisation, order)
        shape = 1 / np.maximum(scv, 1e-6)
        return np.asarray(found * ratio * _gamma(shape, u.met, u.life) / shape)

    def _arrived(self, mu: Floats, u: Floats) -> Floats:
        """Return the tokens of Poisson(mu) prompts at each probability, mu being rounded at random to one of a few."""
        grid = np.linspace(0, 1, 12) ** 1.5 * max(float(mu.max()), 1e-9)
        row = (np.interp(mu, grid, np.arange(len(grid))) + self.randoms.between).astype(np.int64).clip(0, len(grid) - 1)
        return np.asarray(self.parcels.at[_inverse(np.cumsum(self.parcels.total(grid), axis=1), row, u)])

    def _prefill_s(self, rate: float, decodes: Floats, ahead: Floats, prompt: Floats, behind: Floats, jumps: Floats | float) -> Floats:
        """Return the time of the steps until a prompt is read, those ahead of it first; whoever comes behind it fills up its last step.

        Of the tokens that come before it is begun, the share `jumps` goes before it.
        """
        mean, squares = self.demand.mean_prompt, float((self.demand.prompt**2).mean()) / 2
        others = ahead + behind
        backlog, todo = ahead + prompt + behind, ahead + prompt
        pairs = prompt**2 / 2 + np.minimum(others / mean * squares, others**2 / 2)
        requests = 1 + others / mean
        room = np.maximum(self.limits.max_step_tokens - decodes, 1.0)
        total_s, rows, share_jumps = np.zeros(len(prompt)), np.flatnonzero(todo > 0), np.broadcast_to(jumps, prompt.shape)
        for _ in range(_STAGES):
            share = np.minimum(room / backlog, 1.0)
            step_s = self._time_s(decodes, backlog * share, pairs * share, decodes + requests * share)
            total_s[rows] += step_s
            came = rate * step_s
            todo = todo - room
            todo = np.where(todo > prompt, todo + came * mean * share_jumps, todo)
            if not (left := todo > 0).any():
                break
            backlog, pairs = np.maximum(backlog - room, 0.0) + came * mean + 1e-9, pairs * (1 - share) + came * squares
            requests = requests * (1 - share) + came
            if not left.all():  # few prompts take many steps
                rows = rows[left]
                decodes, todo, room, backlog, pairs, requests = (x[left] for x in (decodes, todo, room, backlog, pairs, requests))
                prompt, share_jumps = prompt[left], share_jumps[left]
        return total_s

    def _per_token(self, chain: Clustered, steps: Steps, output: Floats) -> Floats:
        """Return TPOT by request, NaN where there is one token.

        The batch is averaged over a request's life: its autocorrelation is taken as exp(-r'(n) t), the chain made linear at its
        mean, so that long answers see the mean.  Steps beside each other are alike, as prompts beget prompts: their sum has
        (1 + b) / (1 - b) times the variance of as many steps drawn alone; its excess over decode steps is taken as gamma.
        """
        law, sizes = chain.batch_law_of_tokens, np.arange(1, self.slots + 1, dtype=np.float64)
        step_s = self._by_batch(steps)
        spread_s2 = np.interp(sizes, self.nodes, (steps.law * steps.step_s**2).sum(axis=1)) - step_s[1:] ** 2
        mean, gaps = float(law @ sizes), np.maximum(output - 1, 1.0)
        now = sizes[np.minimum(np.searchsorted(np.cumsum(law), self.randoms.life), self.slots - 1)]
        rates = np.append(chain.completions_per_s, chain.completions_per_s[-1])
        pull_per_s = float(np.interp(mean, sizes, np.gradient(rates)[:-1]))
        lives = np.maximum(gaps * np.interp(mean, sizes, step_s[1:]) * max(pull_per_s, 0.0), 1e-6)
        batch = mean + (now - mean) * np.sqrt(2 * (lives - 1 + np.exp(-lives))) / lives
        decode = np.interp(batch, sizes, self.decode_s[1:])
        added = np.maximum(np.interp(batch, sizes, step_s[1:]) - decode, 1e-15)
        alike = np.clip(added / (added + decode), 0.0, 0.9)
        spread = np.maximum(np.interp(batch, sizes, spread_s2), 1e-30) * (1 + alike) / (1 - alike)
        shape = np.maximum(gaps * added**2 / spread, 1e-3)
        total = _gamma(shape, self.randoms.met, self.randoms.phase) / shape * added
        return np.where(output > 1, decode + total, np.nan)

    def _gaps(self, chain: Clustered, steps: Steps) -> tuple[Floats, Floats]:
        """Return steps and how many tokens meet each."""
        if self.demand.mean_output <= 1:
            return np.zeros(0), np.zeros(0)
        n = np.arange(1.0, self.slots)
        tokens_per_s = chain.batch_law[1:-1] * n / np.maximum(self._by_batch(steps)[1:-1], 1e-300)
        place = np.interp(n, self.nodes, np.arange(len(self.nodes)))
        low = place.astype(np.int64)
        nodes = np.bincount(low, tokens_per_s * (1 - place + low), minlength=len(self.nodes) + 1)
        nodes += np.bincount(low + 1, tokens_per_s * (place - low), minlength=len(self.nodes) + 1)
        full = chain.p_wait / self.full_s * self.full.law[0] * self.full.decodes[0]
        every = np.concatenate([steps.step_s.ravel(), self.full.step_s[0]])
        weight = np.concatenate([(nodes[:-1, None] * steps.law).ravel(), full])
        kept = weight > 1e-9 * weight.max()
        return every[kept], weight[kept]


def _rest(work_s: Floats) -> tuple[float, float]:
    """Return mean, in services, and SCV of the rest of a service met by chance: E[S^2] / (2 E[S]^2), 4 E[S] E[S^3] / (3 E[S^2]^2) - 1."""
    first, second, third = (float((work_s**k).mean()) for k in (1, 2, 3))
    # among several servers one very long service holds up nobody else: its rest counts as exponential at most
    return second / (2 * first**2), min(4 * first * third / (3 * second**2) - 1, 1.0)


def _reach(limits: Limits, demand: Demand, per_step: float) -> float:
    """Return the largest backlog worth telling apart: what comes in a long step, or a few full budgets."""
    several = max(per_step, 1.0)
    by_arrivals = 2 * float(demand.prompt.max()) + demand.mean_prompt * (several + 6 * several**0.5)
    return float(min(by_arrivals, float(demand.prompt.max()) + 3 * limits.max_step_tokens))


def _inverse(cumulative: Floats, row: Ints, u: Floats) -> Ints:
    """Return the first cell of a row at which its cumulative weight reaches the share u of the row's total."""
    rows, cells = cumulative.shape
    total = cumulative[:, -1:]
    share = np.where(total > 0, cumulative / np.where(total > 0, total, 1.0), 1.0)
    reached = share + np.arange(rows)[:, None]  # all rows in one, each over its own unit
    return np.asarray(np.clip(np.searchsorted(reached.ravel(), u + row) - row * cells, 0, cells - 1))


def _together(lengths: Floats) -> float:
    """Return the integral of P(L > x)^2 over the mean: the mean of the shorter of two, as a share."""
    ordered = np.sort(lengths)
    share = 1 - np.arange(len(ordered)) / len(ordered)
    return float((np.diff(ordered, prepend=0.0) * share**2).sum() / ordered.mean())


def _gamma(shape: Floats, normal: Floats, u: Floats) -> Floats:
    """Return gamma variates of scale 1: by Wilson and Hilferty's cube for shape + 1, times u^(1 / shape), which takes the one away."""
    k = shape + 1
    one_more = k * np.maximum(1 - 1 / (9 * k) + normal / (3 * np.sqrt(k)), 0.0) ** 3
    return np.asarray(one_more * u ** (1 / shape))


def memory_slots(limits: Limits, demand: Demand) -> int:
    """Return how many requests the KV pool holds at once.

    n requests hold n mean + sqrt(n) sd tokens with one standard deviation kept for chance, each half a block more by rounding.
    """
    mean, sd = demand.held_tokens
    mean += limits.block_tokens / 2
    pool = limits.blocks * limits.block_tokens
    root = (-sd + (sd * sd + 4 * mean * pool) ** 0.5) / (2 * mean)
    return int(root * root + 1e-9)
