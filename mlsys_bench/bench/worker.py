"""The process that measures: `python -m mlsys_bench.bench.worker`, options as JSON on stdin, one JSON message a line on stdout.

    {"say": text}                                       a line to show
    {"planned": [spec, …]}                              what there is to measure
    {"sampled": spec, "of": planned spec, "round": …}   one round of samples; its features as the engine reported them
    {"skipped": planned spec, "why": text}              not measured in this launch
    {"error": class, "text": …}  {"done": true}         how it ended

It ends by itself when nobody reads any more.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from mlsys_bench import errors, hardware, models
from mlsys_bench.bench import companion
from mlsys_bench.bench.harness import Sampled, Spec, Task, visit_all
from mlsys_bench.bench.options import SUITES, Options, wants
from mlsys_bench.errors import BadInput, MlsysError
from mlsys_bench.types import Round, Scalar

if TYPE_CHECKING:
    from mlsys_bench.bench import steps

KERNELS_SHARE = 0.25  # of the budget, at most, goes to the kernels


def main() -> int:
    """Measure one launch and return the exit status."""
    request = json.loads(sys.stdin.read())
    options = msgspec.convert(request["options"], Options)
    try:
        _launch(options, launch=request["launch"], spawned_s=request["spawned_s"])
    except MlsysError as error:
        say(error=type(error).__name__, text=str(error))
        return error.exit_status
    say(done=True)
    return 0


def say(**message: Any) -> None:
    """Write one message.  When the reader is gone the process ends with it."""
    try:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(1)


def pin(threads: int) -> str | None:
    """Keep this process to the first cores it may use, one per thread; return them as '0,1', or None where that cannot be done."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))[:threads]
    if len(cores) < threads:
        raise BadInput(f"{threads} threads asked for, this process may use {len(cores)} core(s)")
    os.sched_setaffinity(0, cores)
    return ",".join(map(str, cores))


def _launch(options: Options, *, launch: int, spawned_s: float) -> None:
    deadline = time.monotonic() + options.launch_budget_s - (time.time() - spawned_s)
    allowed = companion.allowed()
    cores = pin(options.threads) if options.pin and not options.device.startswith("cuda") else None
    neighbour = companion.spare(cores, allowed) if options.companion else ()
    device = _device(options)
    common: dict[str, Scalar] = {"device": _device_name(device), "threads": options.threads, "pinned_cores": cores}
    rng = np.random.default_rng([options.seed, launch])
    benches = _engines(options, device, common | {"companion": bool(neighbour)}, spawned_s) if _wants_engine(options) else []
    kernels_end = min(deadline, time.monotonic() + KERNELS_SHARE * options.launch_budget_s) if benches else deadline
    kernel_tasks = _kernel_tasks(options, device, common)
    step_tasks = [task for bench in benches for task in _step_tasks(bench)] if wants(options.only, "engine.step") else []
    say(planned=[msgspec.to_builtins(spec) for task in (*kernel_tasks, *step_tasks) for spec in task.specs])
    for tasks, end, beside in ((kernel_tasks, kernels_end, ()), (step_tasks, deadline, neighbour if step_tasks else ())):
        with companion.beside(beside):
            missed = visit_all(tasks, rounds=options.rounds_each, deadline=end, rng=rng, emit=_emit)
        _tell_missed(missed, f"not measured within the budget of {options.launch_budget_s:g} s per launch")


def _wants_engine(options: Options) -> bool:
    return wants(options.only, "engine.step") or wants(options.only, "engine.coldstart")


def _kernel_tasks(options: Options, device: str, common: dict[str, Scalar]) -> list[Task]:
    from mlsys_bench.bench import kernels

    suite = SUITES[options.suite]
    a = models.find(options.model)
    return kernels.tasks(
        a, device=device, common=common, precisions=options.precisions, size=suite.gemm, only=options.only, visits=suite.prefill_steps
    )


def _engines(options: Options, device: str, common: dict[str, Scalar], spawned_s: float) -> list[steps.Bench]:
    """Return one engine per precision, warm.  The first one's first token is the cold start."""
    from mlsys_bench.bench import steps

    found: list[steps.Bench] = []
    for precision in options.precisions:
        engine = steps.engine_of(models.find(options.model), options, precision, device)
        limits = engine.limits
        parameters = common | {"model": options.model, "precision": precision}
        if not found and wants(options.only, "engine.coldstart"):
            engine.add(list(b"Once"), max_tokens=1, ignore_eos=True)
            engine.step()
            spec = Spec(name="engine.coldstart", unit="s", better="lower", parameters=parameters)
            _emit(spec, (spec, Round(values=(time.time() - spawned_s,))))
        parameters = parameters | {
            "max_batch": limits.max_seqs, "max_step_tokens": limits.max_step_tokens, "block_tokens": limits.block_tokens,
            "kv_tokens": limits.blocks * limits.block_tokens, "max_context": limits.max_context, "backend": engine.backend, "kv": engine.kv,
        }  # fmt: skip
        bench = steps.Bench(engine, parameters, SUITES[options.suite], one_thread=options.threads == 1, seed=options.seed)
        say(say=f"{options.model} {precision}: warming up")
        steps.warm(bench)
        found.append(bench)
    return found


def _step_tasks(bench: steps.Bench) -> list[Task]:
    from mlsys_bench.bench import steps

    return steps.tasks(bench)


def _device(options: Options) -> str:
    """Return torch's name of the device, threads set."""
    import torch

    torch.set_num_threads(options.threads)
    torch.set_num_interop_threads(1)
    if options.device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise BadInput(f"{options.device}: torch {torch.__version__} finds no CUDA device here; use --device cpu")
    return options.device


def _device_name(device: str) -> str:
    """Return 'cpu', or the catalogue's name of a GPU, or the driver's where the catalogue has none."""
    import torch

    if device == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(device)
    try:
        return hardware.find(name).id
    except errors.UnknownName:
        return name


def _emit(planned: Spec, sampled: Sampled) -> None:
    spec, samples = sampled
    say(sampled=msgspec.to_builtins(spec), of=msgspec.to_builtins(planned), round=msgspec.to_builtins(samples))


def _tell_missed(tasks: Sequence[Task], why: str) -> None:
    for task in tasks:
        for spec in task.specs:
            say(skipped=msgspec.to_builtins(spec), why=why)


if __name__ == "__main__":
    sys.exit(main())
