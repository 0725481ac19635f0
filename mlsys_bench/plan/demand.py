"""The lengths of requests as a planner needs them: a stratified sample, and the moments that decide memory and step time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlsys_bench import workload
from mlsys_bench.batching import Limits
from mlsys_bench.types import Lengths, Workload
from mlsys_bench.workload import Schedule

Floats = npt.NDArray[np.float64]
SAMPLES = 1024
_PER_STRATUM = 128
_SEED = 20_240_229  # fixed: one workload has one analytic answer, whatever the seed of the simulation


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Pairs of prompt and output lengths, equally likely.  `share` of all requests are of this kind, the others can never be served."""

    prompt: Floats
    output: Floats
    share: float = 1.0

    @property
    def mean_prompt(self) -> float:
        """Tokens."""
        return float(self.prompt.mean())

    @property
    def mean_output(self) -> float:
        """Tokens."""
        return float(self.output.mean())

    @property
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
        fits = self.prompt + self.output <= most
        return Demand(prompt=self.prompt[fits], output=self.output[fits], share=self.share * float(fits.mean()))


def of(traffic: Workload) -> Demand:
    """Return the demand of a workload, prompts and outputs paired at random, or by ranks of normal scores where they are correlated.

    Each length is the mean of a stratum of equal probability, so the sample's moments are those of a law drawn 131,072 times.
    """
    rng = np.random.default_rng(_SEED)
    prompt, output = (rng.permutation(_strata(lengths, rng)) for lengths in (traffic.prompt_tokens, traffic.output_tokens))
    if traffic.length_correlation:
        prompt, output = _paired(np.sort(prompt), np.sort(output), traffic.length_correlation, rng)
    return Demand(prompt=prompt, output=output)


def of_trace(trace: Schedule) -> Demand:
    """Return the demand of a trace: pairs of one in each stratum of equally many requests, by the length of the prompt."""
    rng = np.random.default_rng(_SEED)
    ordered = np.argsort(trace.prompt_tokens, kind="stable")
    strata = np.array_split(ordered, min(SAMPLES, len(ordered)))
    chosen = rng.permutation([int(rng.choice(rows)) for rows in strata])
    return Demand(prompt=trace.prompt_tokens[chosen].astype(np.float64), output=trace.output_tokens[chosen].astype(np.float64))


def _paired(prompt: Floats, output: Floats, rank_correlation: float, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Return sorted lengths paired as the ranks of normal scores of this correlation are; see `workload.schedule`."""
    r = 2 * math.sin(math.pi * rank_correlation / 6)
    x, z = rng.standard_normal((2, len(prompt)))
    y = r * x + math.sqrt(1 - r**2) * z
    return prompt[np.argsort(np.argsort(x))], output[np.argsort(np.argsort(y))]


def _strata(lengths: Lengths, rng: np.random.Generator) -> Floats:
    drawn = np.sort(workload.draw_lengths(lengths, SAMPLES * _PER_STRATUM, rng))
    return np.asarray(drawn.reshape(SAMPLES, _PER_STRATUM).mean(axis=1), dtype=np.float64)
