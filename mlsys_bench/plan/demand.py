"""The lengths of requests as a planner needs them: a stratified sample, and the moments that decide memory and step time."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mlsys_bench import workload
from mlsys_bench.batching import Limits
from mlsys_bench.types import Lengths, Workload
from mlsys_bench.workload import Schedule

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
SAMPLES = 1024
MOST_SAMPLES, LEAST_OF_TENANT = 4096, 200  # pairs of several tenants: so many that even the smallest has some
_PER_STRATUM = 128
_SEED = 20_240_229  # fixed: one workload has one analytic answer, whatever the seed of the simulation


@dataclass(frozen=True, kw_only=True)  # without slots, so that moments are worked out once
class Demand:
    """Pairs of prompt and output lengths, equally likely.  `share` of all requests are of this kind, the others can never be served.

    Where there are several tenants, `tenants[tenant[i]]` is the one whose pair i is; where they have priorities, lower ranks go first.
    """

    prompt: Floats
    output: Floats
    share: float = 1.0
    tenant: Ints | None = None
    tenants: tuple[str, ...] = ()
    rank: Ints | None = None

    @cached_property
    def mean_prompt(self) -> float:
        """Tokens."""
        return float(self.prompt.mean())

    @cached_property
    def mean_output(self) -> float:
        """Tokens."""
        return float(self.output.mean())

    @cached_property
    def held_tokens(self) -> tuple[float, float]:
        """Mean and sd of the KV tokens that a running request holds, over its decode steps and over requests.

        A request of i in and o out holds i + j tokens in its j-th step: long ones are met more often.  The mean is
        E[i o] / E[o] + E[o^2] / (2 E[o]), memory being taken on demand.
        """
        i, o = self.prompt, self.output
        steps = o.sum()
        mean = float((i * o + o * o / 2).sum() / steps)
        square = float((i * i * o + i * o * o + o**3 / 3).sum() / steps)
        return mean, max(square - mean * mean, 0.0) ** 0.5

    def fitting(self, limits: Limits) -> Demand:
        """Return the demand without the requests that one replica can never hold."""
        most = min(limits.max_context, limits.blocks * limits.block_tokens)
        return self.where(self.prompt + self.output <= most)

    def where(self, kept: npt.NDArray[np.bool_]) -> Demand:
        """Return the demand of these requests alone."""
        tenant, rank = (None if column is None else column[kept] for column in (self.tenant, self.rank))
        share = self.share * float(kept.mean())
        return Demand(prompt=self.prompt[kept], output=self.output[kept], share=share, tenant=tenant, tenants=self.tenants, rank=rank)

    def of_tenant(self, name: str | None) -> Demand:
        """Return the demand of one tenant; of all where none is named."""
        if name is None or self.tenant is None or name not in self.tenants:
            return self
        return self.where(self.tenant == self.tenants.index(name))


def of(traffic: Workload) -> Demand:
    """Return the demand of a workload, prompts and outputs paired at random, or by ranks of normal scores where they are correlated.

    Each length is the mean of a stratum of equal probability, so the sample's moments are those of a law drawn 131,072 times.
    """
    if traffic.tenants:
        return _of_tenants(traffic)
    return _of_one(traffic, SAMPLES)


def _of_one(traffic: Workload, count: int, seed: int = _SEED) -> Demand:
    rng = np.random.default_rng(seed)
    prompt, output = (rng.permutation(_strata(lengths, rng, count)) for lengths in (traffic.prompt_tokens, traffic.output_tokens))
    if traffic.length_correlation:
        prompt, output = _paired(np.sort(prompt), np.sort(output), traffic.length_correlation, rng)
    return Demand(prompt=prompt, output=output)


def _of_tenants(traffic: Workload) -> Demand:
    """Return the demand of several tenants, each with pairs in proportion to its share, so mixed that any beginning has the same shares."""
    tenants = traffic.tenants
    total = min(MOST_SAMPLES, max(SAMPLES, math.ceil(LEAST_OF_TENANT / min(tenant.share for tenant in tenants))))
    counts = [max(1, round(total * tenant.share)) for tenant in tenants]
    own = [
        _of_one(dataclasses.replace(traffic, prompt_tokens=t.prompt_tokens, output_tokens=t.output_tokens, tenants=()), n, _SEED + i)
        for i, (t, n) in enumerate(zip(tenants, counts, strict=True))
    ]
    order = np.argsort(np.concatenate([(np.arange(n) + 0.5) / n for n in counts]), kind="stable")
    label, ranks = np.repeat(np.arange(len(tenants)), counts)[order], workload.ranks(tenants)
    return Demand(
        prompt=np.concatenate([each.prompt for each in own])[order],
        output=np.concatenate([each.output for each in own])[order],
        tenant=label,
        tenants=tuple(tenant.name for tenant in tenants),
        rank=None if ranks is None else np.array(ranks)[label],
    )


def of_trace(trace: Schedule) -> Demand:
    """Return the demand of a trace: pairs of one in each stratum of equally many requests, by the length of the prompt."""
    rng = np.random.default_rng(_SEED)
    ordered = np.argsort(trace.prompt_tokens, kind="stable")
    strata = np.array_split(ordered, min(SAMPLES, len(ordered)))
    chosen = rng.permutation([int(rng.choice(rows)) for rows in strata])
    return Demand(
        prompt=trace.prompt_tokens[chosen].astype(np.float64),
        output=trace.output_tokens[chosen].astype(np.float64),
        tenant=None if trace.tenant is None else trace.tenant[chosen].astype(np.int64),
        tenants=trace.tenants,
    )


def _paired(prompt: Floats, output: Floats, rank_correlation: float, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Return sorted lengths paired as the ranks of normal scores of this correlation are; see `workload.schedule`."""
    r = 2 * math.sin(math.pi * rank_correlation / 6)
    x, z = rng.standard_normal((2, len(prompt)))
    y = r * x + math.sqrt(1 - r**2) * z
    return prompt[np.argsort(np.argsort(x))], output[np.argsort(np.argsort(y))]


def _strata(lengths: Lengths, rng: np.random.Generator, count: int = SAMPLES) -> Floats:
    drawn = np.sort(workload.draw_lengths(lengths, count * _PER_STRATUM, rng))
    return np.asarray(drawn.reshape(count, _PER_STRATUM).mean(axis=1), dtype=np.float64)
