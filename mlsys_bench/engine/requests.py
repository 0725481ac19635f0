"""A request as the engine knows it, and what a step tells of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from mlsys_bench.batching import StepFeatures
from mlsys_bench.engine import prefix
from mlsys_bench.engine.sampler import Logprobs, Sampling
from mlsys_bench.engine.stops import TextStream

Reason = Literal["stop", "length"]


class StepReport(NamedTuple):
    """What one step did.  `step_s` is its whole wall time: schedule, compute, sample and update.

    A request may get several tokens in a step that speculates; the reason of its end belongs to the last one.
    """

    features: StepFeatures
    step_s: float
    tokens: tuple[tuple[int, int], ...]  # (request id, token)
    finished: tuple[tuple[int, Reason], ...]
    preempted: tuple[int, ...]  # ids that lost their seat; they go on later
    logprobs: tuple[Logprobs | None, ...] = ()  # of `tokens`, in their order; empty where no request wants any
    drafted: int = 0  # tokens that were guessed
    accepted: int = 0  # and right
    swapped: int = 0  # of those preempted, how many kept their cache in host memory
    prefix_queries: int = 0  # tokens that those who got a seat looked for in the prefix cache
    prefix_hits: int = 0  # and found


@dataclass(slots=True, kw_only=True)
class Sequence:
    """A request in the engine; `batching` knows it by its row."""

    id: int
    row: int
    tokens: list[int]  # given and generated
    given: int
    sampling: Sampling
    seed: int
    ignore_eos: bool
    text: TextStream | None  # where stop strings are looked for
    hashes: prefix.Hashes | None  # of its blocks, where they are shared

    def until_end(self, tokens: list[int], ends: frozenset[int]) -> tuple[int, bool]:
        """Return how many of these new tokens belong to the answer, and whether the last of them ends it."""
        for i, token in enumerate(tokens):
            if token in ends and not self.ignore_eos:
                return i + 1, True
            if self.text is not None and self.text.feed(token)[1]:
                return i + 1, True
        return len(tokens), False
