"""What a server is started with, and where its two processes run."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal

from mlsys_bench import errors, models
from mlsys_bench.batching import Limits
from mlsys_bench.engine import schemes, spec
from mlsys_bench.models.precision import ENGINE_ALIASES, ENGINE_PRECISIONS

ENCODERS = ("bert", "roberta", "xlm-roberta")
BUILT_IN = ("nano", "small-160m", "tinyllama-1.1b")  # shapes the engine can fill with random weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One server: a model in one layout, its limits, and its address.

    `port=0` takes any free port.  `threads` is 1 unless given.  `engine_cores` and `http_cores` pin the two processes: None takes
    the default (on a CPU: as many cores as threads from the first one on, and the core after them for HTTP), () leaves them free.
    """

    model: str = "nano"  # a built-in shape, or a folder with a checkpoint
    precision: str = "auto"  # auto: that of the checkpoint, fp32 for built-in shapes
    device: str = "cpu"  # cpu, cuda:0, or auto
    max_batch: int = 8
    max_step_tokens: int = 256
    block_tokens: int = 16
    kv_tokens: int | None = None  # None: as many as `max_batch` sequences of `max_context`
    max_context: int = 1024
    queue_limit: int = 64
    host: str = "127.0.0.1"
    port: int = 8000
    threads: int | None = None
    engine_cores: tuple[int, ...] | None = None
    http_cores: tuple[int, ...] | None = None
    seed: int = 0
    backend: str = "auto"  # who computes, what the KV cache is kept in, and the rest: see `Engine`
    kv: str = "auto"
    deterministic: bool = False
    prefix_cache: bool = False
    preempt: Literal["recompute", "swap"] = "recompute"
    speculate: str | None = None  # ngram, ngram:6, or a model and how many tokens: nano:3
    stop_with_stdin: bool = False  # end when standard input closes: a server started by a program must not outlive it
    step_log: str | None = None  # a file for one line per engine step, see `serve.steplog`


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Threads of the engine, and the cores of each process; None is not pinned."""

    threads: int
    engine_cores: tuple[int, ...] | None
    http_cores: tuple[int, ...] | None


def is_encoder(model: str) -> bool:
    """Return whether a model makes vectors of texts, and not text."""
    return models.find(model).family in ENCODERS


def check(options: Options) -> None:
    """Raise BadInput for the first option that cannot work, before anything is started."""
    folder = schemes.checkpoint_of(options.model)
    if folder is not None:
        if not is_encoder(options.model):  # whose engine process says so itself
            spec.of_config(folder)  # what is not computed says so
    elif options.model not in BUILT_IN and models.find(options.model).id not in BUILT_IN:  # a name nobody knows says so first
        raise errors.BadInput(
            f"{options.model}: no weights: give the folder of a checkpoint, or one of {', '.join(BUILT_IN)}, which have random weights"
        )
    if options.precision not in ("auto", *ENGINE_PRECISIONS, *ENGINE_ALIASES):
        raise errors.unknown("precision", options.precision, ("auto", *ENGINE_PRECISIONS, *ENGINE_ALIASES))
    for name in ("max_batch", "max_step_tokens", "block_tokens"):
        if getattr(options, name) < 1:
            raise errors.BadInput(f"{name.replace('_', '-')} {getattr(options, name)}: give at least 1")
    if options.queue_limit < 0 or not 0 <= options.port <= 65535:
        raise errors.BadInput(f"queue-limit {options.queue_limit}, port {options.port}: one is out of range (0 and up; 0 to 65535)")
    if options.kv_tokens is not None and options.kv_tokens < options.block_tokens:
        raise errors.BadInput(f"kv-tokens {options.kv_tokens} is less than one block of {options.block_tokens}")
    own = models.find(options.model).max_context
    if is_encoder(options.model):
        return  # a text is as long as the model takes it
    if options.max_context < 2 or (own is not None and options.max_context > own):
        raise errors.BadInput(f"max-context {options.max_context}: {options.model} takes 2 to {own or 'any number of'} tokens")


def settled(options: Options) -> Options:
    """Return the options with `auto` resolved to the precision that is served."""
    if options.precision != "auto":
        return options
    folder = schemes.checkpoint_of(options.model)
    return replace(options, precision="fp32" if folder is None else schemes.own_precision(folder))


def limits(options: Options) -> Limits:
    """Return the engine's limits."""
    kv_tokens = options.max_batch * options.max_context if options.kv_tokens is None else options.kv_tokens
    return Limits(
        max_seqs=options.max_batch,
        max_step_tokens=options.max_step_tokens,
        block_tokens=options.block_tokens,
        blocks=max(kv_tokens // options.block_tokens, 1),
        max_context=options.max_context,
    )


def placement(options: Options) -> Placement:
    """Return threads and cores.  Engine and HTTP never share a core unless there is only one.

    A two-thread engine on two cores slows by 1.66x as soon as anything runs beside it, hence one thread by default.
    """
    threads = 1 if options.threads is None else options.threads
    allowed = _allowed_cores()
    if not 1 <= threads <= len(allowed):
        raise errors.BadInput(f"threads {threads}: this process may use 1 to {len(allowed)}")
    engine, http = options.engine_cores, options.http_cores
    if engine is None:
        engine = allowed[:threads] if options.device == "cpu" else ()
    if http is None:
        rest = tuple(core for core in allowed if core not in engine)
        http = rest[:1] if engine else ()
    for core in (*engine, *http):
        if core not in allowed:
            raise errors.BadInput(f"core {core}: this process may use only {', '.join(map(str, allowed))}")
    return Placement(threads=threads, engine_cores=engine or None, http_cores=http or None)


def pin(cores: tuple[int, ...] | None) -> None:
    """Keep this process on these cores, where the system can."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def _allowed_cores() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))
