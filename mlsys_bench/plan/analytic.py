"""One replica by queueing theory: its capacity, and what users see at a rate.

Requests in the replica follow the birth-death chain of `queueing.Batching` with r(n) = n / (steps per request x it(n)); it(n) is
the time of a step with n requests seated, their prefill included.  Latencies follow from the chain by a fixed quasi-random
sample of requests (the same one for every rate and every candidate, so that answers are comparable and smooth):

    TTFT = wait for a slot (chain, times (1 + SCV of outputs) / 2 as Allen and Cunneen scale M/M/c)
           + rest of the step in progress + own prefill step, shared with prompts that came meanwhile
    TPOT = decode step at the batch during the request's life + prefills of others met on the way, spread over its tokens
    ITL  = a decode step, or a step with prefill, weighted by how often a token meets them
    E2E  = TTFT + (output tokens - 1) x TPOT

Approximate: arrivals are taken as Poisson, prompts beyond the step budget as serving the budget alone, preemption as absent.
The simulation is the judge; this is the guess that tells it where to look.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from mlsys_bench import latency
from mlsys_bench.batching import Limits
from mlsys_bench.plan.demand import SAMPLES, Demand, Floats
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.queueing import Batching
from mlsys_bench.types import LatencyProfile

Ints = npt.NDArray[np.int64]
_PROMPT_STRATA = 32
_OTHERS = 24  # prompts that may join a prefill step before they are counted by their mean
_ROUNDS = 3  # of the fixed point of prefill steps; the third changes p99 by less than 1 % below 90 % load


@dataclass(frozen=True, slots=True)
class Randoms:
    """Uniform numbers by request, each column stratified over (0, 1), and arrival times of others at unit rate."""

    batch: Floats
    phase: Floats
    kind: Floats
    which: Floats
    life: Floats
    others: Floats  # [samples, _OTHERS] cumulative


@cache
def randoms(count: int) -> Randoms:
    """Return the numbers every analytic answer of so many samples uses."""
    rng = np.random.default_rng(7)
    batch, phase, kind, which, life = ((rng.permutation(count) + 0.5) / count for _ in range(5))
    others = np.cumsum(rng.standard_exponential((count, _OTHERS)), axis=1)
    return Randoms(batch, phase, kind, which, life, others)


class Replica:
    """A replica of one candidate under one demand.  `capacity_per_s` is the rate at which it saturates."""

    def __init__(self, profile: LatencyProfile, limits: Limits, demand: Demand, samples: int = SAMPLES) -> None:
        """Work out step times and the completion rate of every batch size."""
        self.profile, self.limits, self.demand = profile, limits, demand
        self.randoms = randoms(samples)
        self.context_tokens = demand.held_tokens[0]
        self._overhead_s = profile.constants.get("request_overhead_s", 0.0) + profile.constants.get("token_overhead_s", 0.0)
        self.memory_slots = memory_slots(limits, demand)
        self.slots = max(1, min(limits.max_seqs, self.memory_slots))
        steps = demand.mean_output - 1 + float(np.ceil(demand.prompt / limits.max_step_tokens).mean())
        self.steps_per_request = steps
        self.decode_share = (demand.mean_output - 1) / steps
        self.wait_factor = (1 + float(demand.output.var()) / demand.mean_output**2) / 2
        n = np.arange(self.slots + 1, dtype=np.float64)
        self.decode_s = self._decode_s(n)
        self.prefill_mean_s, self.prefill_sd_s = self._prefill_moments(n)
        self.step_s = self.decode_s + n / steps * self.prefill_mean_s  # of an average step with n seated
        rates = np.minimum(n[1:] / (steps * self.step_s[1:]), self._full_budget_per_s())
        self.completions_per_s = np.maximum.accumulate(rates)
        self.capacity_per_s = float(self.completions_per_s[-1])

    # ------------------------------------------------------------ step times

    def _decode_s(self, seated: Floats) -> Floats:
        """Return the time of a step in which those seated decode and nobody prefills; 0 for an empty replica."""
        decodes = np.where(seated > 0, np.maximum(self.decode_share * seated, 1.0), 0.0)
        return np.where(seated > 0, self._time_s(decodes, 0 * decodes, 0 * decodes, decodes), 0.0)

    def _time_s(self, decodes: Floats, tokens: Floats, pairs: Floats, sampled: Floats) -> Floats:
        features = (decodes, decodes * self.context_tokens, tokens, pairs, sampled)
        return np.asarray(latency.step_s(self.profile, features))

    def _with_prefill_s(self, seated: Floats, tokens: Floats, pairs: Floats, requests: Floats) -> tuple[Floats, Floats]:
        """Return the time to prefill so much beside those seated, and the number of steps that takes."""
        decodes = self.decode_share * seated
        chunks = np.ceil(tokens / self._chunk(seated) - 1e-9)
        return chunks * self._time_s(decodes, tokens / chunks, pairs / chunks, decodes + requests / chunks), chunks

    def _chunk(self, seated: Floats | Ints) -> Floats:
        """Return the tokens of prefill that a step has room for beside those seated."""
        return np.asarray(np.maximum(self.limits.max_step_tokens - self.decode_share * seated, 1.0))

    def _prefill_moments(self, seated: Floats) -> tuple[Floats, Floats]:
        """Return mean and sd, over prompts, of the time that one prefill adds to the decode steps of those seated.

        As many share a step as a prompt meets on average: itself and those due per step.
        """
        together = 1 + seated[:, None] / self.steps_per_request
        prompts = _strata(self.demand.prompt, _PROMPT_STRATA)[None, :]
        time_s, chunks = self._with_prefill_s(seated[:, None], together * prompts, together * prompts**2 / 2, together)
        added = (time_s - chunks * self.decode_s[:, None]) / together
        return added.mean(axis=1), added.std(axis=1)

    def _full_budget_per_s(self) -> float:
        """Return the rate at which every step is full: no replica computes more tokens than its budget per step."""
        demand, budget = self.demand, float(self.limits.max_step_tokens)
        tokens = demand.mean_prompt + demand.mean_output - 1
        requests = budget / tokens  # finished per full step
        decodes = np.minimum(requests * (demand.mean_output - 1), self.slots)
        pairs = requests * float((demand.prompt**2).mean()) / 2
        step = self._time_s(decodes, np.asarray(requests * demand.mean_prompt), np.asarray(pairs), decodes + requests)
        return float(requests / step)

    # ------------------------------------------------------------ what users see

    def utilisation(self, rate_per_s: float) -> float:
        """Return offered load over capacity."""
        return rate_per_s / self.capacity_per_s

    def predict(self, rate_per_s: float) -> Latencies:
        """Return what users see at this rate.  Raises Overload at or above capacity."""
        chain = Batching(rate_per_s, self.completions_per_s)
        u = self.randoms
        rows = np.arange(len(u.batch)) % len(self.demand.prompt)  # there are fewer pairs where some can never be served
        prompt, output = self.demand.prompt[rows], self.demand.output[rows]
        seated = np.minimum(np.searchsorted(np.cumsum(chain.batch_law), u.batch), self.slots)
        ttft, prefill_s, steps, joined = self._first_token(rate_per_s, chain, seated, prompt)
        tpot = self._per_token(rate_per_s, chain, output)
        itl, weights = self._gaps(rate_per_s, chain, prefill_s / steps, steps / (1 + joined))
        e2e = ttft + np.where(output > 1, (output - 1) * np.nan_to_num(tpot), 0.0)
        return Latencies(ttft_s=ttft, tpot_s=tpot, e2e_s=e2e, itl_s=itl, itl_weights=weights)

    def _first_token(self, rate: float, chain: Batching, seated: Ints, prompt: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """Return TTFT; then of the prefill a request is part of: its time, its steps, and how many prompts joined it.

        Prompts that arrive during one step are prefilled together in the next, which so lasts longer and gathers more: a fixed
        point, found by iteration on the sample.
        """
        u, mean = self.randoms, self.demand.mean_prompt
        wait_s = _waits(chain, u.batch) * self.wait_factor
        joined, ahead, rest_s = (np.zeros(len(prompt)) for _ in range(3))
        prefill_s, steps = self._shared_prefill_s(seated, prompt, prompt, joined)
        for _ in range(_ROUNDS):
            in_progress_s = self._step_in_progress(rate, chain, seated, prefill_s, joined)
            in_progress_s[wait_s > 0] = 0.0  # a slot is free only when a step has ended
            rest_s = u.phase * in_progress_s
            joined, ahead = _arrivals(u.others, rate * in_progress_s), _arrivals(u.others, rate * (in_progress_s - rest_s))
            prefill_s, steps = self._shared_prefill_s(seated, prompt, prompt + joined * mean, joined)
        until_mine = (prompt + ahead * mean) / self._chunk(seated)
        in_my_steps = np.minimum(prompt + joined * mean, np.ceil(until_mine - 1e-9) * self._chunk(seated))
        mine_s, _ = self._shared_prefill_s(seated, prompt, in_my_steps, (in_my_steps - prompt) / mean)
        return wait_s + rest_s + mine_s + self._overhead_s, prefill_s, steps, joined

    def _shared_prefill_s(self, seated: Ints, prompt: Floats, tokens: Floats, others: Floats) -> tuple[Floats, Floats]:
        """Return time and steps to prefill a prompt together with others of average length, `tokens` in all."""
        pairs = prompt**2 / 2 + others * float((self.demand.prompt**2).mean()) / 2
        return self._with_prefill_s(seated.astype(np.float64), tokens, pairs, 1 + others)

    def _step_in_progress(self, rate: float, chain: Batching, seated: Ints, prefill_s: Floats, joined: Floats) -> Floats:
        """Return the length of the step an arrival falls into: none when idle, else decode or, by its share of time, prefill."""
        u = self.randoms
        by_time = prefill_s / (1 + joined)  # a step with k prompts appears k times in the sample
        busy = 1 - chain.p(0)
        prefilling = min(rate * float(by_time.mean()) / busy, 1.0) if busy > 0 else 0.0
        longer = prefill_s[np.searchsorted(np.cumsum(by_time), u.which * by_time.sum())]
        step = np.where(u.kind < prefilling, longer, self.decode_s[seated])
        return np.where(seated > 0, step, 0.0)

    def _per_token(self, rate: float, chain: Batching, output: Floats) -> Floats:
        """Return TPOT by request, NaN where there is one token.

        The batch is averaged over a request's life: its autocorrelation is taken as exp(-r'(n) t), the chain made linear at its
        mean, so that long answers see the mean.  Prefills met are Poisson, their total gamma with the right mean and variance.
        """
        u = self.randoms
        rng = np.random.default_rng(11)
        law = chain.batch_law_of_tokens
        sizes = np.arange(1, self.slots + 1, dtype=np.float64)
        mean = float(law @ sizes)
        now = sizes[np.minimum(np.searchsorted(np.cumsum(law), u.life), self.slots - 1)]
        gaps = np.maximum(output - 1, 1.0)
        pull_per_s = float(np.interp(mean, sizes, np.gradient(np.append(chain.completions_per_s, chain.completions_per_s[-1]))[:-1]))
        lives = np.maximum(gaps * self._at(mean, self.step_s) * max(pull_per_s, 0.0), 1e-6)
        batch = mean + (now - mean) * np.sqrt(2 * (lives - 1 + np.exp(-lives))) / lives
        added, spread = self._at(batch, self.prefill_mean_s), self._at(batch, self.prefill_sd_s)
        decode = self._at(batch, self.decode_s)
        met = rng.poisson(rate * gaps * self._at(batch, self.step_s)).astype(np.float64)
        total = _gamma(rng, met * added, met * spread**2)
        return np.where(output > 1, decode + total / gaps, np.nan)

    def _at(self, batch: Floats | float, by_size: Floats) -> Floats:
        return np.asarray(np.interp(batch, np.arange(self.slots + 1), by_size))

    def _gaps(self, rate: float, chain: Batching, prefill_step_s: Floats, steps_each: Floats) -> tuple[Floats, Floats]:
        """Return gaps between tokens and their weights: a step with prefill as often as there are such steps."""
        if self.decode_share <= 0:
            return np.zeros(0), np.zeros(0)
        law = chain.batch_law_of_tokens
        seen = np.minimum(np.searchsorted(np.cumsum(law), self.randoms.batch), self.slots - 1) + 1
        beside = np.minimum(rate * float(steps_each.mean()) * self.step_s[seen], 1.0)
        weights = np.concatenate([1 - beside, beside.mean() * steps_each / steps_each.mean()])
        return np.concatenate([self.decode_s[seen], prefill_step_s]), weights


def memory_slots(limits: Limits, demand: Demand) -> int:
    """Return how many requests the KV pool holds at once.

    n requests hold n mean + sqrt(n) sd tokens with one standard deviation kept for chance, each half a block more by rounding.
    """
    mean, sd = demand.held_tokens
    mean += limits.block_tokens / 2
    pool = limits.blocks * limits.block_tokens
    root = (-sd + (sd * sd + 4 * mean * pool) ** 0.5) / (2 * mean)
    return int(root * root + 1e-9)


def _strata(values: Floats, count: int) -> Floats:
    """Return the means of `count` strata of equal probability, as far as there are values."""
    parts = np.array_split(np.sort(values), min(count, len(values)))
    return np.array([part.mean() for part in parts])


def _waits(chain: Batching, u: Floats) -> Floats:
    """Return the wait for a slot at each probability: 0 up to P(no wait), exponential beyond."""
    if chain.p_wait <= 0:
        return np.zeros(len(u))
    drain = float(chain.completions_per_s[-1]) - chain.rate_per_s
    return np.maximum(np.log(chain.p_wait / (1 - u)) / drain, 0.0)


def _arrivals(times: Floats, expected: Floats) -> Floats:
    """Return how many of the unit-rate arrivals come within each expected number; beyond the sample, that number."""
    counted = (times <= expected[:, None]).sum(axis=1).astype(np.float64)
    return np.asarray(np.where(counted == times.shape[1], np.maximum(expected, counted), counted))


def _gamma(rng: np.random.Generator, mean: Floats, variance: Floats) -> Floats:
    """Draw positive totals with these means and variances; a total without variance is its mean."""
    random = (mean > 0) & (variance > 1e-12 * mean**2)
    shape = np.where(random, mean**2 / np.where(random, variance, 1.0), 1.0)
    return np.asarray(np.where(random, rng.standard_gamma(shape) * mean / shape, mean))
