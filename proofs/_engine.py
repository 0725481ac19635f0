"""Our engine in a process of its own, for `proofs/engine.py`: it says hello with what it loaded, then answers each line of standard input.

    decode BATCH STEPS     one token for each of so many sequences, so often: tokens a second
    prefill TOKENS         one prompt in one chunk: tokens a second
    rest STEPS             one sequence: time of a step, and of its linears
    closed SECONDS BATCH PROMPT OUTPUT   a closed loop of requests: tokens a second, time outside the model

Options are one JSON object: the arguments of `Engine`, and `cores` to stay on.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT, ROOM, LONGEST = 16, 128, 512  # as in `_llamacpp`
BATCH = 32


def command(**options: object) -> list[str]:
    """Return the command of a process with such an engine."""
    return [sys.executable, __file__, json.dumps(options)]


class Ours:
    """An engine, and what can be asked of it."""

    def __init__(
        self,
        *,
        model: str = "tinyllama-1.1b",
        cores: list[int] | None = None,
        max_batch: int = BATCH,
        max_step_tokens: int = LONGEST,
        checkpoint: str | None = None,
        **how: Any,
    ) -> None:
        if cores:
            os.sched_setaffinity(0, cores)
        from mlsys_bench import models
        from mlsys_bench.batching import Limits
        from mlsys_bench.engine import Engine, spec

        folder = None if checkpoint is None else Path(checkpoint)
        self.shape = models.find(model) if folder is None else spec.of_config(folder).shape
        longest = LONGEST + 2 * PROMPT
        blocks = max(max_batch * ROOM, longest) // 16
        limits = Limits(max_seqs=max_batch, max_step_tokens=max_step_tokens, block_tokens=16, blocks=blocks, max_context=longest)
        before = held_bytes()
        self.engine = Engine(self.shape, limits=limits, seed=0, checkpoint=folder, **how)
        self.loaded = {"before_bytes": before, "peak_bytes": peak_bytes(), "kv_bytes": self.engine.kv_bytes}

    def hello(self) -> dict[str, object]:
        """Return what was loaded: bytes of the weights, those a step reads, and their bits."""
        from mlsys_bench import models

        held = self.engine.weight_bytes
        table = self.engine._model.weights.embedding
        read = held if self.shape.tied_embeddings else held - table.numel() * table.element_size()
        return {"step_bytes": read, "weight_bytes": held, "bits": 8 * read / models.linear_params(self.shape), **self.loaded}

    def decode(self, batch: int, steps: int) -> dict[str, object]:
        """Return the rate of so many steps of a batch whose sequences have had a prompt and two steps before."""
        ids = self._seated(batch, PROMPT, steps + 4)
        self._steps(2)
        took_s = self._steps(steps)
        self._leave(ids)
        return {"rate": batch * steps / took_s, "step_s": took_s / steps}

    def prefill(self, tokens: int) -> dict[str, object]:
        """Return the rate of a prompt in one chunk, after a short one."""
        self._leave(self._seated(1, PROMPT, 2))
        asked = self.engine.add([7 + i % 64 for i in range(tokens)], max_tokens=2, ignore_eos=True)
        took_s = self._steps(1)
        self._leave([asked])
        return {"rate": tokens / took_s, "step_s": took_s}

    def rest(self, steps: int) -> dict[str, object]:
        """Return the median step of one sequence and what of it was not spent in linears, by the engine's own clock."""
        model: Any = self.engine._model
        if not hasattr(model, "linears_s"):
            return {"step_s": None, "rest_s": None}
        ids = self._seated(1, PROMPT, steps + 4)
        self._steps(2)
        whole, rest = [], []
        for _ in range(steps):
            before = model.linears_s
            whole.append(self._steps(1))
            rest.append(whole[-1] - (model.linears_s - before))
        self._leave(ids)
        return {"step_s": statistics.median(whole), "rest_s": statistics.median(rest)}

    def closed(self, seconds: int, batch: int, prompt: int, output: int) -> dict[str, object]:
        """Return the tokens a second of so many users without HTTP, and the share of their time that is not the model's."""
        model: Any = self.engine._model
        forward, inside = model.forward, [0.0]

        def timed(*given: Any) -> Any:
            began = time.perf_counter()
            result = forward(*given)
            inside[0] += time.perf_counter() - began
            return result

        self.engine._model = _Timed(model, timed)
        try:
            return self._circulated(seconds, batch, prompt, output, inside)
        finally:
            self.engine._model = model

    def _circulated(self, seconds: int, batch: int, prompt: int, output: int, inside: list[float]) -> dict[str, object]:
        made, asked = 0, 0
        ids: set[int] = set()

        def ask() -> None:
            nonlocal asked
            asked += 1
            ids.add(self.engine.add([7 + (asked * 31 + i) % 200 for i in range(prompt)], max_tokens=output, ignore_eos=True))

        for _ in range(batch):
            ask()
        self._steps(2)
        inside[0], began = 0.0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            report = self.engine.step()
            made += len(report.tokens)
            for ended, _ in report.finished:
                ids.remove(ended)
                ask()
        took_s = time.perf_counter() - began
        self._leave(list(ids))
        return {"rate": made / took_s, "outside": 1 - inside[0] / took_s}

    def _seated(self, batch: int, prompt: int, output: int) -> list[int]:
        """Return so many new requests whose prompts are computed."""
        ids = [self.engine.add([7 + (i + n) % 200 for i in range(prompt)], max_tokens=output, ignore_eos=True) for n in range(batch)]
        told: set[int] = set()
        while told != set(ids):
            told |= {request for request, _ in self.engine.step().tokens}
        return ids

    def _steps(self, steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            self.engine.step()
        return time.perf_counter() - began

    def _leave(self, ids: list[int]) -> None:
        for request in ids:
            self.engine.cancel(request)


class _Timed:
    """A model whose `forward` is another function."""

    def __init__(self, model: Any, forward: Any) -> None:
        self._inner, self.forward = model, forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def held_bytes() -> int:
    """Return the memory this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Return the most memory this process has had at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Load, say hello, answer lines."""
    ours = Ours(**json.loads(sys.argv[1]))
    answer(ours.hello())
    asked: dict[str, Callable[..., dict[str, object]]] = {
        "decode": ours.decode, "prefill": ours.prefill, "rest": ours.rest, "closed": ours.closed,
    }  # fmt: skip
    for line in sys.stdin:
        kind, *numbers = line.split()
        answer(asked[kind](*map(int, numbers)))


def answer(said: dict[str, object]) -> None:
    """Print a line of JSON."""
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
