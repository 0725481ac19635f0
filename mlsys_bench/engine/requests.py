"""A request as the engine knows it, and what a step tells of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlsys_bench.batching import StepFeatures
from mlsys_bench.engine import prefix
from mlsys_bench.engine.sampler import Logprobs, Sampling
from mlsys_bench.engine.stops import TextStream

Reason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
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
