"""A model that launches, on a CPU: any other one behind a queue, as a device works one off, and as late as it may."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from mlsys_bench.engine import Engine
from mlsys_bench.engine.engine import only_text
from mlsys_bench.engine.flight import Picks, greedy
from mlsys_bench.engine.gpu.graphs import RING
from mlsys_bench.engine.kv import Blocks
from mlsys_bench.engine.runner import Int32, Step
from mlsys_bench.engine.sampler import Sampling, sample, sampling
from tests import steps


class Asked(NamedTuple):
    """What the sampler needs to know of a row."""

    sampling: Sampling
    seed: int
    tokens: range
    given: int


@dataclass(slots=True)
class Handle:
    """A step in the queue."""

    model: Launched
    work: tuple[Step, Any, Picks, Int32 | None]
    number: int
    chosen: list[int] | None = None
    is_read: bool = False

    def tokens(self) -> list[int]:
        """Work off the queue as far as this step."""
        self.model.catch_up(self)
        self.is_read = True
        assert self.chosen is not None
        assert self.model.launched - self.number < RING, "a device has chosen others meanwhile, in the same memory"
        return self.chosen


class Launched:
    """Computes a step when its tokens are read, when logits are wanted, or when the cache is: everything in the order of launches."""

    def __init__(self, engine: Engine, rng: np.random.Generator) -> None:
        """Take the place of an engine's model."""
        self.model, self.tokenizer, self.rng = engine._model, engine.tokenizer, rng
        self.backend, self.weights = self.model.backend, self.model.weights
        self.queue: deque[Handle] = deque()
        self.last: list[int] = []
        self.overlapping = self.launched = 0
        self.newest: Handle | None = None
        engine._model = self
        engine._host._caches = tuple(Ordered(cache, self) for cache in engine._host._caches)  # type: ignore[misc]

    def forward(self, step: Step, cache: Any) -> Tensor:
        """Compute logits at once, after all that was launched."""
        self.catch_up()
        return self.model.forward(step, cache)

    def launch(self, step: Step, cache: Any, how: Picks | None = None, feed: Int32 | None = None) -> Handle:
        """Put a step into the queue; now and then it is worked off at once."""
        self.launched += 1
        self.overlapping += self.newest is not None and not self.newest.is_read
        handle = self.newest = Handle(self, (step, cache, how or greedy(len(step.sampled)), feed), self.launched)
        self.queue.append(handle)
        if self.rng.random() < 0.3:
            self.catch_up()
        return handle

    def choose(self, logits: Tensor, how: Picks) -> list[int]:
        """Choose as the sampler does."""
        rows = [
            Asked(sampling(temperature=float(t)), int(np.uint64(np.int64(seed))), range(place), 0)
            for t, seed, place in zip(how.temperature, how.seeds, how.places.tolist(), strict=True)
        ]
        return sample(logits, rows).tokens if rows else []

    def catch_up(self, until: Handle | None = None) -> None:
        """Compute what waits."""
        while self.queue and (until is None or until.chosen is None):
            handle = self.queue.popleft()
            step, cache, how, feed = handle.work
            tokens = step.tokens.copy()
            for at in np.flatnonzero(feed >= 0) if feed is not None else ():
                tokens[at] = self.last[feed[at]]  # type: ignore[index]
            logits = only_text(self.model.forward(steps.changed(step, tokens=tokens), cache), self.tokenizer)
            handle.chosen = self.last = self.choose(logits, how)


class Ordered:
    """A cache that is read and written when its turn comes."""

    def __init__(self, cache: Blocks, model: Launched) -> None:
        """Wrap it."""
        self.cache, self.model = cache, model

    def copy_out(self, blocks: list[int]) -> Any:
        """Copy after all that was launched."""
        self.model.catch_up()
        return self.cache.copy_out(blocks)

    def copy_in(self, blocks: list[int], saved: Any) -> None:
        """Copy after all that was launched."""
        self.model.catch_up()
        self.cache.copy_in(blocks, saved)
