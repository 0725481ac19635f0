"""One replica in virtual time, for callers that decide between its steps what happens next: the kernels of whole runs, a call at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsys_bench import jit
from mlsys_bench.batching import Limits, Policy, check_limits, check_policy, check_ranks, misfit
from mlsys_bench.batching.arrays import (
    ASKED_TOKENS,
    BLOCKS,
    HASH_AT,
    HASH_END,
    HIT_TOKENS,
    KNOWN,
    LUCK,
    PREEMPTIONS,
    PREFIX_TOKENS,
    PROMPT,
    QUEUED,
    RANK,
    TOKEN_AT,
    fresh,
)
from mlsys_bench.errors import BadInput
from mlsys_bench.simulate import kernel
from mlsys_bench.simulate.core import AHEAD, VLLM, Clock, Timeline, clocks, lengthen, luck, short_lines, timeline, told_by

__all__ = ["Clock", "Job", "Replica", "Timeline"]


@dataclass(slots=True)
class Job:
    """One request inside a replica."""

    index: int
    arrived_s: float
    done_s: float | None = None
    row: int = -1  # in the replica that has it
    begun_s: list[float] = field(default_factory=list, repr=False)  # that replica's, by row; negative before the first step

    came_s: list[float] = field(default_factory=list, repr=False)  # likewise first tokens; 0 before

    @property
    def first_s(self) -> float | None:
        """When its first token came."""
        return self.came_s[self.row] if self.came_s and self.came_s[self.row] > 0 else None

    @property
    def started_s(self) -> float | None:
        """When its first step began."""
        return self.begun_s[self.row] if self.begun_s and self.begun_s[self.row] >= 0 else None


class Replica:
    """An engine whose time is virtual.  `advance` and `offer` must be called with times that never go back.

    What a step computes is settled when it begins: in between, requests only arrive, and they wait for the next one.
    """

    def __init__(
        self, limits: Limits, clock: Clock, policy: Policy = VLLM, *, prefix_tokens: int = 0, seed: int = 0, number: int = 0
    ) -> None:
        """Start idle at time 0.  `prefix_tokens`: of the blocks whose hashes requests bring; drafts' luck is by `seed` and `number`."""
        check_limits(limits)
        check_policy(policy)
        self.limits, self.clock, self.policy = limits, clock, policy
        self.jobs: dict[int, Job] = {}  # in the system, by row
        self.done: list[Job] = []  # ended, until somebody takes them
        self._all: list[Job] = []  # by row
        self._known: list[int] = []  # by row, the tokens it came with
        self._numbers: dict[int, int] = {}  # of prefix blocks, by hash
        self._advance, self._coming_s = _kernels(clock)
        self._s = kernel.Station(
            a=fresh(limits, _lists, rows=0, prefix_tokens=prefix_tokens if policy.prefix_cache else 0), times=clocks(),
            needs=[0] * min(limits.block_tokens, AHEAD), ends_s=[0.0] * AHEAD, gaps=[0] * kernel.BINS,
            lines=short_lines(), books=[[] for _ in range(kernel.BOOKS)], done=[0] * limits.max_seqs, token_s=[],
        )  # fmt: skip
        self._s.a.counts[kernel.STRIDE], self._s.a.counts[LUCK] = 1, luck(seed, number)

    @property
    def in_system(self) -> int:
        """Requests that run or wait."""
        return len(self.jobs)

    @property
    def waiting(self) -> int:
        """Requests without a seat."""
        return int(self._s.a.counts[QUEUED])

    @property
    def free_kv_tokens(self) -> int:
        """Memory nobody holds on to, in tokens."""
        return int(self._s.a.counts[BLOCKS]) * self.limits.block_tokens

    @property
    def at_s(self) -> float:
        """End of the step in flight; without one, when the next may begin."""
        return float(self._s.times[kernel.AT])

    @property
    def in_flight(self) -> bool:
        """Whether a step has begun that has not ended."""
        return bool(self._s.a.counts[kernel.FLYING])

    @property
    def busy_s(self) -> float:
        """Time of all steps so far, that in flight included."""
        return float(self._s.times[kernel.BUSY])

    @property
    def steps(self) -> int:
        """Steps so far."""
        return int(self._s.a.counts[kernel.STEPS])

    @property
    def preemptions(self) -> int:
        """Sequences that lost their seat so far."""
        return int(self._s.a.counts[PREEMPTIONS])

    @property
    def sequence_s(self) -> float:
        """Sum over steps of batch times duration: over `busy_s`, the mean batch."""
        return float(self._s.times[kernel.SEQS_S])

    @property
    def kv_token_s(self) -> float:
        """Likewise of the memory held, in tokens."""
        return float(self._s.times[kernel.KV_S])

    @property
    def in_step(self) -> tuple[float, float]:
        """Sequences of the last step, and the memory then held, in tokens."""
        return float(self._s.times[kernel.LAST_SEQS]), float(self._s.times[kernel.LAST_KV])

    def is_full(self, places: int) -> bool:
        """Say whether so many wait without a seat in the next step."""
        return kernel.is_full(self._s, self.limits, self.policy, places)

    @property
    def hit_tokens(self) -> int:
        """Tokens of prompts that were found in the prefix cache."""
        return int(self._s.a.counts[HIT_TOKENS])

    @property
    def asked_tokens(self) -> int:
        """Tokens of prompts that were looked for."""
        return int(self._s.a.counts[ASKED_TOKENS])

    def offer(
        self, job: Job, prompt_tokens: int, output_tokens: int, *, hashes: Sequence[int] = (), cached_tokens: int = 0,
        known_tokens: int = 0, rank: int = 0,
    ) -> None:  # fmt: skip
        """Take in a request at `job.arrived_s`, to which `advance` has brought this replica.  It joins the next step.

        `hashes` are of its prefix blocks.  One that was begun elsewhere brings `known_tokens` of its answer and `cached_tokens` of KV.
        """
        refused = misfit(self.limits, self.policy, prompt_tokens, output_tokens)
        if refused:
            raise BadInput(refused)
        check_ranks(self.policy, rank > 0)
        s, row = self._s, len(self._all)
        for values in (*s.a.rows, *s.books):
            values.append(0)
        s.books[kernel.STARTED][row] = -1.0
        s.a.rows[TOKEN_AT][row], s.a.rows[RANK][row] = len(s.token_s), rank
        s.token_s.extend([0.0] * output_tokens)
        self._bring(row, hashes, prompt_tokens, output_tokens)
        kernel.offer(s, row, job.arrived_s, prompt_tokens, output_tokens, cached_tokens)
        s.a.rows[KNOWN][row] += known_tokens
        s.books[kernel.LAST_S][row] = job.arrived_s
        job.row, job.begun_s, job.came_s, self.jobs[row] = row, s.books[kernel.STARTED], s.books[kernel.FIRST_S], job
        self._all.append(job)
        self._known.append(known_tokens)

    def _bring(self, row: int, hashes: Sequence[int], prompt_tokens: int, output_tokens: int) -> None:
        """Give numbers to the prefix blocks of a request; those not of its prompt only count where they go on into its answer."""
        a, block_tokens = self._s.a, self._s.a.counts[PREFIX_TOKENS]
        if not block_tokens:
            return
        beyond = len(hashes) > -(-prompt_tokens // block_tokens)
        full = min(len(hashes), (prompt_tokens + output_tokens - 1 if beyond else prompt_tokens) // block_tokens)
        numbers = [self._numbers.setdefault(h, len(self._numbers)) for h in hashes[:full]]
        for values in a.prefixes:
            values.extend([0] * (len(self._numbers) - len(values)))
        a.rows[HASH_AT][row] = len(a.hashes[0])
        a.rows[HASH_END][row] = len(a.hashes[0]) + full
        a.hashes[0].extend(numbers)
        a.hashes[1].extend([0] * full)

    def advance(self, until_s: float) -> None:
        """End every step that ends by `until_s`; begin those that begin before it.

        A step due exactly at `until_s` is not begun yet, so that whoever arrives at that moment is in it.
        """
        ended = -1
        while ended:
            ended = self._advance(self._s, self.limits, self.policy, None, until_s, True)
            counts = self._s.a.counts
            for k in range(counts[kernel.DONE] - ended, counts[kernel.DONE]):
                job = self.jobs.pop(self._s.done[k % len(self._s.done)])
                job.done_s = self.at_s
                self.done.append(job)

    def cancel(self, job: Job) -> None:
        """Forget a request at the present; the step in flight still takes its time."""
        kernel.withdraw(self._s, self.policy, job.row)
        del self.jobs[job.row]

    def next_s(self) -> float:
        """Return a time before which no request ends unless others come; advancing there gets on.  Infinite when idle."""
        if self._s.a.counts[kernel.ENDING]:
            return self.at_s  # and no later: who follows an answer joins the next step
        if not self.jobs:
            return math.inf
        return math.nextafter(self._coming_s(self._s, self.limits, self.policy, None), math.inf)

    def timeline(self) -> Timeline:
        """Return the steps so far."""
        return timeline(self._s)

    def tokens(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return the index of the job and the time of every token, job by job.  Those of the step in flight are in the future."""
        rows, token_s = self._s.a.rows, self._s.token_s
        spans = [
            (job.index, token_s[at + begun : at + known - prompt])
            for job, begun, at, known, prompt in zip(self._all, self._known, rows[TOKEN_AT], rows[KNOWN], rows[PROMPT], strict=True)
        ]
        who = np.repeat([index for index, _ in spans], [len(span) for _, span in spans]).astype(np.int64)
        return who, np.array([t for _, span in spans for t in span], dtype=np.float64)


def _lists(count: int, size: int) -> Any:
    return [[0] * size for _ in range(count)]


@functools.lru_cache(maxsize=16)
def _kernels(clock: Clock) -> tuple[Callable[..., int], Callable[..., float]]:
    """Return the kernels that read this clock."""
    seconds = told_by(clock)
    return jit.plain(kernel.advance, thin=lengthen, seconds=seconds), jit.plain(kernel.coming_s, seconds=seconds)
