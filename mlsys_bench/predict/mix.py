"""Which steps a closed loop consists of: their sizes, and how many of each a token and a first token wait for.

With a fixed number of clients that ask again as soon as they are answered, who is in which step does not depend on how long steps take:
arrivals follow completions.  So one pass over the schedule gives weights by which any clock's step times add up to TTFT and TPOT, and
coefficients can be learned by the thousand evaluations.  The schedule is that of `batching` (continuous, chunked prefill; or whole prompts
first, as SGLang does), with seats in place of blocks; `tests/test_predict_mix.py` holds it against the simulator.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mlsys_bench.types import Lengths

Array = npt.NDArray[np.float64]
BINS_PER_OCTAVE = 4  # of batch size and of prefill tokens; steps that share a bin are averaged


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Kinds of steps: `features` [m, 5] as in `latency`, and how many of each a first token and a further token wait for on average.

    `later` is `first` of the later half of requests alone, when the loop no longer feels that all began at once.
    """

    features: Array
    first: Array
    later: Array
    further: Array


@dataclass(slots=True)
class _Bins:
    """Sums over steps by kind: weight of first tokens, of later ones, of further tokens, and features by weight."""

    sums: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    def add(self, steps: float, counts: list[float], features: tuple[float, float, float, float, float]) -> None:
        """Count so many equal steps; `counts`: who waits for a first token, later ones of them, and the sum of 1 / gaps of the others."""
        waiting, later, flowing = counts
        decodes, _, prefill, _, _ = features
        kind = (_octave(prefill), _octave(decodes))
        row = self.sums.setdefault(kind, [0.0] * 9)
        weight = steps * (waiting + flowing * 64 + 1e-12)
        row[0] += steps * waiting
        row[1] += steps * later
        row[2] += steps * flowing
        row[3] += weight
        for i, value in enumerate(features):
            row[4 + i] += weight * value

    def mix(self) -> Mix:
        """Return the mix; the weights of all requests add up to 1."""
        table = np.array(list(self.sums.values()))
        first, later = table[:, 0], table[:, 1]
        return Mix(features=table[:, 4:] / table[:, 3:4], first=first, later=later if later.any() else first, further=table[:, 2])


def closed(
    concurrency: int,
    prompt_tokens: Lengths,
    output_tokens: Lengths,
    *,
    max_step_tokens: int,
    seats: int,
    prefill_first: bool = False,
    requests: int | None = None,
    seed: int = 0,
) -> Mix:
    """Return the steps of a closed loop of `requests`, ten for each client where nothing is said.

    All clients begin at once, and their first requests count as those after them: that is how benchmarks of closed loops are run.
    Of the later ones a sample is followed and counted for all.  `seats`: requests that run at once, by the engine's limit or by KV memory;
    the others wait.
    """
    rng = np.random.default_rng(seed)
    every = max(requests or 10 * concurrency, concurrency)
    total = max(min(every, 6 * concurrency, concurrency + 3000), concurrency + 8)
    prompts, outputs = _draw(prompt_tokens, total, rng), np.maximum(_draw(output_tokens, total, rng), 2)
    return _Loop(concurrency, every, prompts.tolist(), outputs.tolist(), max_step_tokens, max(seats, 1), prefill_first).run()


def decode_only(mix: Mix) -> Mix:
    """Return the same steps without their prefill, as a decode pool runs them."""
    features = mix.features.copy()
    features[:, 2:4], features[:, 4] = 0.0, features[:, 0]
    keep = (features[:, 0] > 0) & (mix.further > 0)
    further = mix.further[keep]
    nobody = np.zeros(len(further))
    return Mix(features=features[keep], first=nobody, later=nobody, further=further / further.sum())


class _Loop:
    """One pass over a schedule, jumping over steps in which only decodes happen."""

    def __init__(
        self, clients: int, every: int, prompts: list[int], outputs: list[int], budget: int, seats: int, prefill_first: bool
    ) -> None:
        self.prompts, self.outputs, self.budget, self.seats, self.prefill_first = prompts, outputs, budget, seats, prefill_first
        self.clients, self.sent = clients, min(clients, len(prompts))
        later = max(len(prompts) - clients // 2, clients + 1) - clients  # followed and counted; the last of them run in a loop that empties
        self.share = (1 / every, (every - clients) / every / later)  # what a first and a later request of the sample stand for
        self.queue = deque((i, 0) for i in range(self.sent))  # request and tokens of it computed
        self.ends: list[tuple[int, int]] = []  # (decode steps made by then, request)
        self.ticks = 0  # decode steps so far
        self.cached = 0  # tokens in the cache of those that decode
        self.bins = _Bins()
        self.settled = clients + later // 2  # from here on
        self.later = 1 / (later - later // 2)  # what such a request stands for among its kind
        self.counts = [0.0, 0.0, 0.0]  # waiting, waiting of later ones, and flowing, by share
        for i in range(self.sent):
            self._count(i)

    def run(self) -> Mix:
        """Return the mix."""
        while self.queue or self.ends:
            if self.queue and len(self.ends) < self.seats:
                self._mixed()
            else:
                self._decode()
        return self.bins.mix()

    def _weight(self, i: int) -> float:
        """Return the share of all requests that this one stands for."""
        if i < self.clients:
            return self.share[0]
        return self.share[1] if i < max(len(self.prompts) - self.clients // 2, self.clients + 1) else 0.0

    def _count(self, i: int, sign: int = 1) -> None:
        weight = self._weight(i)
        self.counts[0] += sign * weight
        self.counts[1] += sign * self.later * (i >= self.settled and weight > 0)

    def _decode(self) -> None:
        """Make decode steps until the next request ends."""
        steps = self.ends[0][0] - self.ticks
        n = len(self.ends)
        if steps:
            reads = self.cached + n * (steps + 1) / 2
            self.bins.add(steps, self.counts, (n, reads, 0.0, 0.0, n))
            self.ticks += steps
            self.cached += n * steps
        self._end()

    def _mixed(self) -> None:
        """Make one step with prefill, beside the decodes unless whole prompts go first."""
        n = 0 if self.prefill_first else len(self.ends)
        budget, seats = self.budget - n, self.seats - len(self.ends)
        tokens, pairs = 0, 0.0
        begun: list[int] = []
        while self.queue and budget > 0 and len(begun) < seats:
            i, past = self.queue[0]
            chunk = min(budget, self.prompts[i] - past)
            tokens, pairs, budget = tokens + chunk, pairs + chunk * (past + chunk / 2), budget - chunk
            if past + chunk < self.prompts[i]:
                self.queue[0] = (i, past + chunk)
                break
            begun.append(self.queue.popleft()[0])
        self.bins.add(1, self.counts, (n, self.cached + n, tokens, pairs, n + len(begun)))
        if n:
            self.ticks += 1
            self.cached += n
        for i in begun:
            self._begin(i)
        self._end()

    def _begin(self, i: int) -> None:
        """Let a request whose prompt is computed decode."""
        heapq.heappush(self.ends, (self.ticks + self.outputs[i] - 1, i))
        self.cached += self.prompts[i]
        self._count(i, -1)
        self.counts[2] += self._weight(i) / (self.outputs[i] - 1)

    def _end(self) -> None:
        """Take out those that have all their tokens, and let their clients ask again."""
        while self.ends and self.ends[0][0] <= self.ticks:
            _, i = heapq.heappop(self.ends)
            self.cached -= self.prompts[i] + self.outputs[i] - 1
            self.counts[2] -= self._weight(i) / (self.outputs[i] - 1)
            if self.sent < len(self.prompts):
                self.queue.append((self.sent, 0))
                self._count(self.sent)
                self.sent += 1


def _draw(lengths: Lengths, n: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return so many lengths."""
    from mlsys_bench import workload

    return np.maximum(np.asarray(workload.draw_lengths(lengths, n, rng), dtype=np.int64), 1)


def _octave(value: float) -> int:
    return 0 if value <= 0 else 1 + round(BINS_PER_OCTAVE * math.log2(value))
