"""One replica in virtual time: `batching` decides what a step computes, the clock says how long that takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mlsys_bench import batching
from mlsys_bench.batching import Limits, StepFeatures, StepPlan

Clock = Callable[[StepFeatures], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What one replica did, step by step.

    `end_s`: when the step ended.  `batch`: sequences in it.  `kv_tokens`: memory of the blocks held, in tokens.
    `waiting`: requests without a seat when it began.
    """

    end_s: npt.NDArray[np.float64]
    batch: npt.NDArray[np.int64]
    kv_tokens: npt.NDArray[np.int64]
    waiting: npt.NDArray[np.int64]


@dataclass(slots=True)
class Job:
    """One request inside a replica."""

    index: int
    arrived_s: float
    started_s: float | None = None
    token_s: list[float] = field(default_factory=list)
    done_s: float | None = None


class Replica:
    """An engine whose time is virtual.  `advance` and `offer` must be called with times that never go back."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        """Start idle at time 0."""
        self.limits, self.clock = limits, clock
        self.state = batching.new_state(limits)
        self.jobs: dict[int, Job] = {}  # by row
        self.plan: StepPlan | None = None  # the step in flight, which ends at `at_s`
        self.at_s = 0.0  # without one: when the next may begin
        self.busy_s = 0.0
        self.preemptions = 0
        self.steps: list[tuple[float, int, int, int]] = []

    @property
    def in_system(self) -> int:
        """Requests that run or wait."""
        return len(self.jobs)

    def offer(self, job: Job, prompt_tokens: int, output_tokens: int) -> None:
        """Take in a request at `job.arrived_s`, to which `advance` has brought this replica.  It joins the next step."""
        row = batching.add(self.state, self.limits, prompt_tokens, output_tokens)
        if not self.jobs:
            self.at_s = job.arrived_s
        self.jobs[row] = job

    def advance(self, until_s: float) -> None:
        """End every step that ends by `until_s`; begin those that begin before it.

        A step due exactly at `until_s` is not begun yet, so that whoever arrives at that moment is in it.
        """
        while True:
            if self.plan is not None:
                if self.at_s > until_s:
                    return
                self._end(self.plan)
            if not self.jobs or self.at_s >= until_s:
                return
            self._begin()

    def timeline(self) -> Timeline:
        """Return the steps so far."""
        end_s, batch, kv_tokens, waiting = zip(*self.steps, strict=True) if self.steps else ((),) * 4
        return Timeline(end_s=np.array(end_s, dtype=np.float64), batch=_ints(batch), kv_tokens=_ints(kv_tokens), waiting=_ints(waiting))

    def _begin(self) -> None:
        state, limits = self.state, self.limits
        plan = batching.schedule(state, limits)
        step_s = self.clock(batching.features(state, plan))
        if not (step_s > 0 and math.isfinite(step_s)):
            raise AssertionError(f"the clock gives {step_s} s for {batching.features(state, plan)}")
        for row in plan.rows[plan.start == 0].tolist():
            job = self.jobs[row]
            if job.started_s is None:
                job.started_s = self.at_s
        self.plan, self.at_s = plan, self.at_s + step_s
        self.busy_s += step_s
        self.preemptions += len(plan.preempted)
        kv_tokens = (limits.blocks - batching.free_blocks(state)) * limits.block_tokens
        self.steps.append((self.at_s, len(plan.rows), kv_tokens, batching.waiting(state)))

    def _end(self, plan: StepPlan) -> None:
        at_s, jobs = self.at_s, self.jobs
        for row in plan.rows[plan.samples].tolist():
            jobs[row].token_s.append(at_s)
        for row in batching.update(self.state, self.limits, plan).tolist():
            batching.remove(self.state, row)
            jobs.pop(row).done_s = at_s
        self.plan = None


def _ints(values: tuple[int, ...]) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)
