"""Two pools by queueing theory: prompts that wait for a step with room, and answers that decode beside each other and nothing else.

**Prefill.**  A step takes up to B tokens of what waits, first come first served, prompts being cut to fit; it lasts the longer the more it
takes.  The backlog W at the start of a step is a Markov chain on a lattice (`queueing.backlog`)

    W' = max(W - B, 0) + the prompts that come during T(W);      where that is 0, the next step begins with the next prompt

and gives the law of the step that an arrival meets (Poisson arrivals see time averages).  TTFT is the rest of that step, the steps until
its own last token, those before it first, and the transfer of its cache behind those of the prompts that end in the same step.  With
prompts of B tokens each this is M/D/1.

**Decode.**  The chain of `plan.analytic` with answers one token shorter, whose "prompt" is the one token they bring: the first step of a
request makes its second token.  The KV cache they hold is that of the real prompts.

    TPOT = (wait for a seat + all its steps) / (output tokens - 1),    E2E = TTFT + (output tokens - 1) TPOT

Approximate: caches are taken to arrive at the decode pool as a Poisson stream, and preemption as absent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from mlsys_bench import latency
from mlsys_bench.batching import Limits
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.plan.demand import SAMPLES, Demand, Floats
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.queueing.backlog import Parcels
from mlsys_bench.queueing.clusters import clustered
from mlsys_bench.types import LatencyProfile

ROUGH = 256  # samples of a first look
_CELLS, _ROUGH_CELLS = 320, 128  # of the lattice of backlogs
_LENGTHS = 12  # of step that are told apart
_BUSY = 0.98  # the load up to which the lattice holds the backlog
_STAGES = 400  # steps that a prompt waits and takes at most
_POINTS, _SHARES = (-(3**0.5), 0.0, 3**0.5), (1 / 6, 2 / 3, 1 / 6)  # of a normal law: its first five moments
_DUST = 1e-6  # tokens: what rounding leaves of none


@cache
def _uniforms(count: int) -> Floats:
    """Return stratified numbers by column and request: the same for every candidate and rate."""
    rng = np.random.default_rng(11)
    return np.array([(rng.permutation(count) + 0.5) / count for _ in range(6)])


class Prefill:
    """One prefill replica under the prompts of a demand.  `capacity_per_s` is the rate at which it saturates."""

    def __init__(
        self, profile: LatencyProfile, limits: Limits, demand: Demand, transfer_s: Floats | None = None, samples: int = SAMPLES
    ) -> None:
        """Work out full steps.  `transfer_s`: of each prompt of the demand; None for no transfer at all."""
        self.profile, self.limits, self.demand = profile, limits, demand
        self._table = latency.table(profile).tolist()
        self.mean = demand.mean_prompt
        self._halves = float((demand.prompt**2).mean()) / 2
        self.room = float(min(limits.max_step_tokens, max(1.0, limits.max_seqs * self.mean)))
        rows = np.arange(samples) % len(demand.prompt)
        self.prompt = demand.prompt[rows]
        self.transfer_s = np.zeros(samples) if transfer_s is None else transfer_s[rows]
        each = self.room / self.mean  # prompts of a full step
        self.full_s = float(self._time_s(np.array(self.room), np.array(each * self._halves), np.array(each)))
        self.capacity_per_s = each / self.full_s
        self._overhead_s = latency.overhead(profile).seconds(self.prompt)
        self._cells = _CELLS if samples >= SAMPLES else _ROUGH_CELLS

    def utilisation(self, rate_per_s: float) -> float:
        """Return offered load over capacity."""
        return rate_per_s / self.capacity_per_s

    @cached_property
    def parcels(self) -> Parcels:
        """Prompts on a lattice that holds what waits at high load: ten times the mean of an M/G/1 queue."""
        scv = 2 * self._halves / self.mean**2 - 1
        waits = self.mean * (1 + scv) / 2 * _BUSY / (1 - _BUSY) / 5
        top = float(self.demand.prompt.max()) + 3 * self.room + 10 * waits
        unit = self.room / max(math.floor(self.room * (self._cells - 2) / top), 1)  # a full step ends on a point of the lattice
        return Parcels(self.demand.prompt, unit * (self._cells - 2), self._cells)

    def _time_s(self, tokens: Floats, pairs: Floats, prompts: Floats) -> Floats:
        return latency.many(self._table, (0 * tokens, 0 * tokens, tokens, pairs, prompts))

    def _steps_s(self, rate_per_s: float) -> Floats:
        """Return the time of a step by its backlog."""
        parcels = self.parcels
        mu = np.array([rate_per_s * self.full_s])
        prompts, pairs = (x[0] for x in parcels.given_total(mu, parcels.total(mu)))
        share = np.minimum(self.room / np.maximum(parcels.at, 1e-9), 1.0)
        return self._time_s(parcels.at * share, pairs * share, np.maximum(prompts * share, 1e-9))

    def _settle(self, rate_per_s: float, step_s: Floats) -> tuple[Floats, float]:
        """Return the law of the backlog at the start of a step, and the share of steps before which nobody was there.

        Solved as linear equations: iterating takes long near saturation, and for ever where all prompts take two steps.
        """
        parcels, (hats, nodes) = self.parcels, _hats(step_s)
        came = hats @ parcels.total(rate_per_s * nodes)  # what comes during a step, by its backlog
        cells, room = len(parcels.at), round(self.room / parcels.unit)
        start, more = np.arange(cells), np.arange(cells)
        to = np.minimum(np.maximum(start - room, 0)[:, None] + more, cells - 1)
        flat = np.bincount((start[:, None] * cells + to).ravel(), came.ravel(), minlength=cells * cells)
        moves: Floats = flat.reshape(cells, cells).astype(np.float64)
        first = parcels.law.copy()
        first[1], first[0] = first[1] + first[0], 0.0
        emptied = moves[:, 0].copy()
        moves += emptied[:, None] * first
        moves[:, 0] -= emptied
        moves /= moves.sum(axis=1, keepdims=True)
        equations, right = moves.T - np.eye(cells), np.zeros(cells)
        equations[-1], right[-1] = 1.0, 1.0
        law = np.maximum(np.linalg.solve(equations, right), 0.0)
        law /= law.sum()
        return law, float(law @ emptied)

    def ttft_s(self, rate_per_s: float) -> Floats:
        """Return the time to the first token of each request, the transfer of its cache and the overheads included."""
        step_s = self._steps_s(rate_per_s)
        law, idle = self._settle(rate_per_s, step_s)
        state, cell, phase, before, after, between = _uniforms(len(self.prompt))
        by_time = law * step_s
        busy = by_time.sum() / (by_time.sum() + idle / rate_per_s)
        alone = state > busy
        reached = np.cumsum(by_time)
        at = np.minimum(np.searchsorted(reached, cell * reached[-1]), len(law) - 1)
        met_s = np.where(alone, 0.0, step_s[at])
        rest_s = (1 - phase) * met_s
        left = np.where(alone, 0.0, np.maximum(self.parcels.at[at] - self.room, 0.0))
        ahead = left + self._came(rate_per_s * (met_s - rest_s), before, between)
        behind = self._came(rate_per_s * rest_s, after, between)
        return np.asarray(rest_s + self._until_read_s(rate_per_s, ahead, behind) + self._overhead_s)

    def _came(self, mu: Floats, u: Floats, between: Floats) -> Floats:
        """Return the tokens of Poisson(mu) prompts at each probability, mu being rounded at random to one of a few."""
        grid = np.linspace(0, 1, 12) ** 1.5 * max(float(mu.max()), 1e-9)
        row = (np.interp(mu, grid, np.arange(len(grid))) + between).astype(np.int64).clip(0, len(grid) - 1)
        found = np.zeros(len(mu))
        for r, weights in enumerate(np.cumsum(self.parcels.total(grid), axis=1)):
            mine = row == r
            cells = np.minimum(np.searchsorted(weights, u[mine] * weights[-1]), len(weights) - 1)
            found[mine] = self.parcels.at[cells]
        return found

    def _until_read_s(self, rate: float, ahead: Floats, behind: Floats) -> Floats:
        """Return the time of the steps until a prompt is read, those ahead first, and of the transfers that come before its own and it."""
        prompt, mean = self.prompt, self.mean
        others = ahead + behind
        backlog, todo = others + prompt, ahead + prompt
        pairs, requests = prompt**2 / 2 + others / mean * self._halves, 1 + others / mean
        total_s = np.zeros(len(prompt))
        sent_s = self.transfer_s
        for _ in range(_STAGES):
            share = np.minimum(self.room / backlog, 1.0)
            step_s = self._time_s(backlog * share, pairs * share, requests * share)
            total_s += np.where(todo > _DUST, step_s, 0.0)
            ends = (todo > _DUST) & (todo <= self.room + _DUST)
            sent_s = sent_s + np.where(ends, np.maximum(todo - prompt, 0.0) / mean * self.transfer_s.mean(), 0.0)
            todo = todo - self.room
            if not (todo > _DUST).any():
                break
            came = rate * step_s
            backlog, pairs = np.maximum(backlog - self.room, 0.0) + came * mean + 1e-9, pairs * (1 - share) + came * self._halves
            requests = requests * (1 - share) + came
        return total_s + sent_s

    def predict(self, rate_per_s: float) -> Latencies:
        """Return what users see of this pool: TTFT alone.  Never asked at or above capacity."""
        none = np.full(len(self.prompt), np.nan)
        ttft = self.ttft_s(rate_per_s)
        return Latencies(ttft_s=ttft, tpot_s=none, e2e_s=ttft, itl_s=np.zeros(0))


def _hats(step_s: Floats) -> tuple[Floats, Floats]:
    """Return the weight of each of a few lengths of step for each step, and these lengths."""
    low, high = float(step_s[1:].min()), float(step_s[1:].max())
    nodes = low + (high - low) * np.linspace(0, 1, _LENGTHS) ** 1.5
    place = np.interp(step_s, nodes, np.arange(_LENGTHS)) if high > low else np.zeros(len(step_s))
    return np.maximum(1 - np.abs(place[:, None] - np.arange(_LENGTHS)), 0.0), nodes


# ---------------------------------------------------------------- decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding(Demand):
    """What a decode pool gets of a demand: answers one token shorter, after a "prompt" of one, holding the cache of the real ones."""

    held: tuple[float, float]

    @property
    def held_tokens(self) -> tuple[float, float]:
        """Mean and sd of the KV tokens that a running request holds."""
        return self.held

    def fitting(self, limits: Limits) -> Decoding:
        """Return the same: the pair was asked for what both pools hold."""
        return self


def decoding(demand: Demand) -> Decoding:
    """Return what a decode pool gets of a demand, some of whose answers have a second token."""
    several = demand.output > 1
    prompt, output = demand.prompt[several], demand.output[several]
    held = Demand(prompt=prompt, output=output).held_tokens
    return Decoding(prompt=np.ones(len(prompt)), output=output - 1, share=demand.share * float(several.mean()), held=held)


class Decode:
    """One decode replica.  It gets `share` of the requests: answers of one token are complete without it."""

    def __init__(self, profile: LatencyProfile, limits: Limits, demand: Demand, samples: int = SAMPLES) -> None:
        """Work out the capacity; `demand` is that of whole requests."""
        self.demand, self.limits, self.profile = demand, limits, profile
        several = decoding(demand)
        self.share = several.share / demand.share
        self.inner = Replica(latency.engine_only(profile), limits, several, samples=samples)
        rows = np.arange(samples) % len(demand.output)
        self.output = demand.output[rows]
        self.slots, self.step_s = self.inner.slots, self.inner.step_s
        self.capacity_per_s = self.inner.capacity_per_s / self.share

    def utilisation(self, rate_per_s: float) -> float:
        """Return offered load over capacity."""
        return rate_per_s / self.capacity_per_s

    def predict(self, rate_per_s: float) -> Latencies:
        """Return what users see of this pool, TTFT left out: E2E is the time after the first token."""
        own_per_s = rate_per_s * self.share
        seen = self.inner.predict(own_per_s)
        several = self.output > 1
        after = np.zeros(len(self.output))
        after[several] = seen.e2e_s[: int(several.sum())]  # both go through the requests in the same order
        tpot = np.where(several, after / np.maximum(self.output - 1, 1), np.nan)
        gaps, weights = self._gaps(own_per_s)
        return Latencies(
            ttft_s=np.zeros(len(self.output)), tpot_s=tpot, e2e_s=after, itl_s=np.concatenate([gaps, seen.ttft_s]),
            itl_weights=np.concatenate([weights, np.full(len(seen.ttft_s), 1 / len(seen.ttft_s))]),
        )  # fmt: skip

    def _gaps(self, rate_per_s: float) -> tuple[Floats, Floats]:
        """Return the gaps between tokens after the second one, and how many of them a request meets.

        By number n of decodes, weighed by tokens; the caches read differ by chance, too: their sum has sqrt(n) times the spread of one.
        """
        gaps = self.inner.demand.mean_output - 1  # a request's, beside the first
        if gaps <= 0:
            return np.zeros(0), np.zeros(0)
        n, (held, sd) = np.arange(1.0, self.slots + 1), self.inner.demand.held_tokens
        step_s = self.inner.decode_s[1:]
        completions = np.append(n[:-1] / (self.inner.demand.mean_output * step_s[:-1]), self.inner.capacity_per_s)
        weights = clustered(rate_per_s, completions, np.zeros(self.slots)).batch_law_of_tokens
        table = latency.table(self.profile).tolist()
        more_s = latency.many(table, (n, n * held + np.sqrt(n) * sd, 0 * n, 0 * n, n)) - step_s
        found = np.concatenate([step_s + z * more_s for z in _POINTS])
        return found, gaps * np.concatenate([weights * share for share in _SHARES])


def together(first: Latencies, rest: Latencies) -> Latencies:
    """Return what users see of both pools, request by request."""
    return Latencies(
        ttft_s=first.ttft_s, tpot_s=rest.tpot_s, e2e_s=first.ttft_s + rest.e2e_s, itl_s=rest.itl_s, itl_weights=rest.itl_weights
    )
