"""How long a replica takes from nothing to its first token, phase by phase, and how fast its weights come into place.

    process       from the parent's call to the first line of this program: the interpreter and what every command imports
    import        torch, the engine and its compiled kernels (which are compiled now where this machine has never had them)
    weights       reading a checkpoint, or drawing random weights, packed as the kernels want them; the KV cache is reserved
    first_token   a prompt of four tokens in, one token out
    total         all of these: what scaling up waits for
    steady        from the first token to the end of the first steps that take no longer than later ones

A process starts cold once, so each launch gives one sample of each.  A checkpoint's files are first dropped from the system's page cache:
a new replica finds them on disk.  `engine.load` is that phase as a rate, and once more with the files in memory.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlsys_bench.bench.harness import Sampled, Spec, Task
from mlsys_bench.types import Round, Scalar, Work

if TYPE_CHECKING:
    from mlsys_bench.engine import Engine

COLD, LOAD = "engine.coldstart", "engine.load"
PROMPT = b"Once"
BLOCK, NEAR, MOST_STEPS, PATIENCE_S = 4, 1.1, 64, 2.0  # of the search for a steady step
RELOADS = 3


class Phases:
    """A clock that is read at the end of each phase."""

    def __init__(self, spawned_s: float) -> None:
        """Begin with the parent's call, by the wall clock that both share."""
        self._began = self._last = spawned_s
        self.seconds: dict[str, float] = {}

    def end(self, phase: str) -> None:
        """End a phase now."""
        now = time.time()
        self.seconds[phase], self._last = now - self._last, now

    def end_total(self) -> None:
        """Say that all is there."""
        self.seconds["total"] = self._last - self._began


def load_program() -> None:
    """Import torch and the engine, and load its kernels."""
    from mlsys_bench.engine import Engine  # noqa: F401
    from mlsys_bench.engine.native import library

    library.load()


def start(make: Callable[[], Engine], phases: Phases, checkpoint: Path | None) -> tuple[Engine, list[float]]:
    """Return a new engine that has given its first token, and what its next steps took.  Ends the phases from weights on."""
    if checkpoint is not None:
        drop_cached(checkpoint)
    engine = make()
    phases.end("weights")
    prompt = list(PROMPT)
    steps = min(MOST_STEPS, engine.limits.max_context - len(prompt) - 1)
    request = engine.add(prompt, max_tokens=steps + 1, ignore_eos=True)
    engine.step()
    phases.end("first_token")
    phases.end_total()
    took_s = list(_steps(engine, steps))
    engine.cancel(request)
    phases.seconds["steady"] = steady_s(took_s)
    return engine, took_s


def _steps(engine: Engine, most: int) -> Iterator[float]:
    deadline = time.perf_counter() + PATIENCE_S
    for i in range(most):
        begun_s = time.perf_counter()
        if i >= 2 * BLOCK and begun_s > deadline:
            return
        engine.step()
        yield time.perf_counter() - begun_s


def steady_s(took_s: Sequence[float]) -> float:
    """Return the time to the end of the first block of steps whose median is within 10 % of the later half's."""
    later = statistics.median(took_s[len(took_s) // 2 :])
    ends = range(min(BLOCK, len(took_s)), len(took_s) + 1)
    end = next((end for end in ends if statistics.median(took_s[end - BLOCK if end > BLOCK else 0 : end]) <= NEAR * later), len(took_s))
    return sum(took_s[:end])


def sampled(phases: Phases, engine: Engine, parameters: dict[str, Scalar], checkpoint: Path | None) -> list[Sampled]:
    """Return the phases of this launch, and the rate at which weights came into place."""
    cold = [
        (Spec(name=COLD, unit="s", better="lower", parameters=parameters | {"phase": phase}), Round(values=(took_s,)))
        for phase, took_s in phases.seconds.items()
    ]
    moved = bytes_of(engine, checkpoint)
    spec = load_spec(parameters, checkpoint, moved, cache="dropped")
    return [*cold, (spec, Round(values=(moved / phases.seconds["weights"],)))]


# ---------------------------------------------------------------- loading


def reloading(
    make: Callable[[], object], engine: Engine, parameters: dict[str, Scalar], checkpoint: Path | None, cost_s: float
) -> list[Task]:
    """Return the task of loading a checkpoint whose files are in memory already; none of random weights, which have no files."""
    if checkpoint is None:
        return []
    moved = bytes_of(engine, checkpoint)
    spec = load_spec(parameters, checkpoint, moved, cache="kept")

    def visit() -> list[Sampled]:
        begun_s = time.perf_counter()
        make()
        return [(spec, Round(values=(moved / (time.perf_counter() - begun_s),)))]

    return [Task(specs=(spec,), visit=visit, cost_s=cost_s)]


def load_spec(parameters: dict[str, Scalar], checkpoint: Path | None, moved: float, *, cache: str) -> Spec:
    """Return what is measured: where weights come from, and of a checkpoint what was done with the system's page cache before."""
    how: dict[str, Scalar] = {"source": "random"} if checkpoint is None else {"source": "checkpoint", "page_cache": cache}
    return Spec(name=LOAD, unit="B/s", better="higher", parameters=parameters | how, work=Work(bytes=moved))


def bytes_of(engine: Engine, checkpoint: Path | None) -> float:
    """Return the bytes of a checkpoint's files, or those that random weights take in memory."""
    return float(engine.weight_bytes if checkpoint is None else sum(file.stat().st_size for file in files(checkpoint)))


def files(checkpoint: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights."""
    return sorted(checkpoint.glob("*.safetensors"))


def drop_cached(checkpoint: Path) -> None:
    """Ask the system to forget what it keeps of a checkpoint's files in memory, where it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files(checkpoint):
        with contextlib.suppress(OSError), file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
