"""One replica in virtual time: `batching` decides what a step computes, the clock says how long that takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlsys_bench import batching
from mlsys_bench.batching import Calm, Limits, StepFeatures

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
    done_s: float | None = None


class Replica:
    """An engine whose time is virtual.  `advance` and `offer` must be called with times that never go back.

    What a step computes is settled when it begins: in between, requests only arrive, and they wait for the next one.
    """

    def __init__(self, limits: Limits, clock: Clock) -> None:
        """Start idle at time 0."""
        self.limits, self.clock = limits, clock
        self.state = batching.new_state(limits)
        self.jobs: dict[int, Job] = {}  # by row
        self.index = np.zeros(64, dtype=np.int32)  # of the job, by row
        self.ended: list[int] | None = None  # rows that end with the step in flight, itself ending at `at_s`
        self.at_s = 0.0  # without one: when the next may begin
        self.busy_s = 0.0
        self.preemptions = 0
        self.steps: list[tuple[float, int, int, int]] = []
        self.sampled: list[npt.NDArray[np.int32]] = []  # by step, the jobs that got a token

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
        if row >= len(self.index):
            self.index = np.resize(self.index, 2 * row)
        self.index[row] = job.index

    def advance(self, until_s: float) -> None:
        """End every step that ends by `until_s`; begin those that begin before it.

        A step due exactly at `until_s` is not begun yet, so that whoever arrives at that moment is in it.
        """
        while True:
            if self.ended is not None:
                if self.at_s > until_s:
                    return
                self._end(self.ended)
            if not self.jobs or self.at_s >= until_s:
                return
            calm = batching.calm(self.state, self.limits)
            if calm.steps:
                self._decode(calm, until_s)
            else:
                self._begin()

    def timeline(self) -> Timeline:
        """Return the steps so far."""
        end_s, batch, kv_tokens, waiting = zip(*self.steps, strict=True) if self.steps else ((),) * 4
        return Timeline(end_s=np.array(end_s, dtype=np.float64), batch=_ints(batch), kv_tokens=_ints(kv_tokens), waiting=_ints(waiting))

    def tokens(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
        """Return the index of the job and the time of every token, in order of time.  Those of the step in flight are in the future."""
        if not self.sampled:
            return np.zeros(0, dtype=np.int32), np.zeros(0)
        end_s = np.array([step[0] for step in self.steps])
        return np.concatenate(self.sampled), np.repeat(end_s, [len(jobs) for jobs in self.sampled])

    def _begin(self) -> None:
        """Begin the next step, whatever it holds."""
        state, limits = self.state, self.limits
        plan = batching.schedule(state, limits)
        features = batching.features(state, plan)
        for row in plan.rows[plan.start == 0].tolist():
            job = self.jobs[row]
            if job.started_s is None:
                job.started_s = self.at_s
        self._take(features)
        self.preemptions += len(plan.preempted)
        self.steps.append((self.at_s, len(plan.rows), self._kv_tokens(), batching.waiting(state)))
        self.sampled.append(self.index[plan.rows[plan.samples]])
        self.ended = batching.update(state, limits, plan).tolist()

    def _decode(self, calm: Calm, until_s: float) -> None:
        """End the steps of a calm that end before `until_s`, and begin the one that ends later or is the last."""
        n, reads = len(calm.rows), calm.kv_tokens
        end_s: list[float] = []
        while len(end_s) < calm.steps and self.at_s < until_s:
            end_s.append(self._take(StepFeatures(n, reads, 0, 0.0, n)))
            reads += n
        kv_tokens, waiting = self._kv_tokens(), batching.waiting(self.state)
        ended, taken = batching.decode(self.state, self.limits, calm, len(end_s))
        for at_s, blocks in zip(end_s, taken, strict=True):
            kv_tokens += blocks * self.limits.block_tokens
            self.steps.append((at_s, n, kv_tokens, waiting))
        self.sampled.extend([self.index[calm.rows]] * len(end_s))
        self.ended = ended.tolist()

    def _take(self, features: StepFeatures) -> float:
        """Let the time of a step pass; return when it ends."""
        step_s = self.clock(features)
        if not (step_s > 0 and math.isfinite(step_s)):
            raise AssertionError(f"the clock gives {step_s} s for {features}")
        self.at_s += step_s
        self.busy_s += step_s
        return self.at_s

    def _kv_tokens(self) -> int:
        """Return the memory of the blocks held, in tokens."""
        return (self.limits.blocks - batching.free_blocks(self.state)) * self.limits.block_tokens

    def _end(self, ended: list[int]) -> None:
        """End the step in flight."""
        for row in ended:
            batching.remove(self.state, row)
            self.jobs.pop(row).done_s = self.at_s
        self.ended = None


def _ints(values: tuple[int, ...]) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)
