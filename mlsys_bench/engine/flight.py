"""Steps under way: launched by a model that chooses tokens itself, their tokens not read yet (docs/adr/0033-one-step-in-flight.md)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mlsys_bench.batching import StepFeatures, StepPlan
from mlsys_bench.engine.backend import Computes
from mlsys_bench.engine.requests import Reason, StepReport
from mlsys_bench.engine.requests import Sequence as Request
from mlsys_bench.engine.runner import Int32, Ints, Step
from mlsys_bench.engine.sampling import Sampling

COLDEST = 1e-3


class Picks(NamedTuple):
    """How the tokens of a step are chosen, one entry per row that samples; all zeros is greedy."""

    temperature: npt.NDArray[np.float32]
    seeds: npt.NDArray[np.int64]
    places: Int32  # of the token in its answer


def greedy(rows: int) -> Picks:
    """Return picks of the likeliest tokens."""
    return Picks(np.zeros(rows, dtype=np.float32), np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int32))


def picks(requests: Sequence[Request], places: Sequence[int] | Ints) -> Picks:
    """Return picks of requests for which `is_simple` holds.  places: of the token in each answer."""
    return Picks(
        np.array([r.sampling.temperature for r in requests], dtype=np.float32),
        np.array([r.seed for r in requests], dtype=np.uint64).astype(np.int64),
        np.array(places, dtype=np.int32),
    )


def is_simple(s: Sampling) -> bool:
    """Whether a model that launches can choose a request's tokens: the likeliest, or by temperature alone, from its own logits.

    Logits divided by less than COLDEST would leave fp32 no room for the noise; the sampler of the host takes the largest away first.
    """
    is_too_cold = 0.0 < s.temperature < COLDEST
    return not (is_too_cold or s.logprobs is not None or s.changes_logits or s.has_filter)


class Handle(Protocol):
    """A step under way."""

    def tokens(self) -> list[int]:
        """Wait for the step and return the token of each row that samples."""
        ...


class Launches(Computes, Protocol):
    """A model that starts a step and returns at once.  What it is told to do, it does in that order, `forward` included."""

    def launch(self, step: Step, cache: Any, how: Picks | None = None, feed: Int32 | None = None) -> Handle:
        """Start a step that chooses a token for each of `step.sampled`, and return what will hold them.

        feed: by token of the step, which of the tokens that the launch before chooses stands in its place, -1 for the step's own.  At
        most two launches may be unread.
        """
        ...

    def choose(self, logits: Tensor, how: Picks) -> list[int]:
        """Return the tokens that a launch would choose from these logits."""
        ...


def launches(model: Computes) -> TypeGuard[Launches]:
    """Whether a model starts steps without waiting for them."""
    return hasattr(model, "launch")


class Planned(NamedTuple):
    """A step that the scheduler has decided on."""

    plan: StepPlan  # in the order of a step
    features: StepFeatures
    preempted: tuple[int, ...]  # ids
    swapped: int
    prefix_queries: int
    prefix_hits: int

    def report(
        self, began: float, tokens: tuple[tuple[int, int], ...], finished: tuple[tuple[int, Reason], ...], **more: Any
    ) -> StepReport:
        """Return what came of it.  began: when the call did that tells of it, by `time.perf_counter`."""
        return StepReport(
            features=self.features, step_s=time.perf_counter() - began, tokens=tokens, finished=finished, preempted=self.preempted,
            swapped=self.swapped, prefix_queries=self.prefix_queries, prefix_hits=self.prefix_hits, **more,
        )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Flight:
    """A step that was launched."""

    planned: Planned
    sequences: list[Request]  # of the plan's rows
    handle: Handle
    ended: set[int] | None = None  # ids that this step takes to their last token; None until the scheduler knows that it is computed
    is_last: bool = False  # nothing is launched before its tokens are read

    @property
    def plan(self) -> StepPlan:
        """Return who computes what."""
        return self.planned.plan

    @property
    def sampled(self) -> list[Request]:
        """Return the sequences that get a token, in the order of their tokens."""
        return [s for s, samples in zip(self.sequences, self.plan.samples.tolist(), strict=True) if samples]
