"""The process that measures: `python -m mlsys_bench.bench.worker`, options as JSON on stdin, one JSON message a line on stdout.

    {"say": text}                                       a line to show
    {"planned": [spec, …]}                              what there is to measure
    {"cores": [0, …]}                                   where it computes; none: not pinned
    {"sampled": spec, "of": planned spec, "round": …}   one round of samples; its features as the engine reported them
    {"checked": planned spec, "error": …, "tolerance": …}  how far an operator's output is from the reference's
    {"skipped": planned spec, "why": text}              not measured in this launch
    {"settled": n, "of": n, "left_s": …}                how far it is
    {"unread": text}                                    what this machine lacks or does not tell
    {"error": class, "text": …}  {"done": true, "involuntary": n}  how it ended

It ends by itself when nobody reads any more.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from mlsys_bench import errors, hardware, models
from mlsys_bench.bench import coldstart, companion, energy
from mlsys_bench.bench.harness import Sampled, Spec, Task, visit_all
from mlsys_bench.bench.options import SUITES, Options, wants
from mlsys_bench.bench.telemetry import Core, Disturbances
from mlsys_bench.engine import schemes
from mlsys_bench.errors import BadInput, MlsysError
from mlsys_bench.types import Scalar

if TYPE_CHECKING:
    from mlsys_bench.bench import kernels, steps
    from mlsys_bench.engine import Engine

ENGINE = ("engine.step", "engine.part", "engine.host", "engine.policy", "engine.coldstart", "engine.load")
KERNELS_SHARE = 0.5  # of what is left after the start, at most, goes to what lies below the engine
END_S = 0.3  # of the budget: to let go of what was made
TELL_S = 0.2  # between two lines of progress


def main() -> int:
    """Measure one launch and return the exit status."""
    request = json.loads(sys.stdin.read())
    options = msgspec.convert(request["options"], Options)
    phases = coldstart.Phases(request["spawned_s"])
    phases.end("process")
    try:
        _launch(options, launch=request["launch"], spawned_s=request["spawned_s"], phases=phases)
    except MlsysError as error:
        say(error=type(error).__name__, text=str(error))
        return error.exit_status
    say(done=True, involuntary=resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)
    os._exit(0)  # all is said; to take torch apart in order costs a second


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


def _launch(options: Options, *, launch: int, spawned_s: float, phases: coldstart.Phases) -> None:
    deadline = time.monotonic() + options.launch_budget_s - (time.time() - spawned_s) - END_S
    allowed = companion.allowed()
    cores = pin(options.threads) if options.pin and not options.device.startswith("cuda") else None
    neighbour = companion.spare(cores, allowed) if options.companion else ()
    pinned = tuple(int(core) for core in cores.split(",")) if cores else ()
    say(cores=pinned)
    device = _device(options)
    common: dict[str, Scalar] = {"device": _device_name(device), "threads": options.threads, "pinned_cores": cores}
    rng = np.random.default_rng([options.seed, launch])
    benches = _engines(options, device, common | {"companion": bool(neighbour)}, phases) if _wants_engine(options) else []
    offered = _kernels(options, device, common, allowed)
    _tell_lacking(options, device, has_neighbour=bool(neighbour))
    kernel_tasks = [*offered.tasks, *(task for bench in benches for task in _parts(bench, options))]
    step_tasks = [task for bench in benches for task in _step_tasks(bench, options, phases)]
    say(planned=[msgspec.to_builtins(spec) for task in (*kernel_tasks, *step_tasks) for spec in task.specs])
    for spec, why in offered.lacking:
        say(skipped=msgspec.to_builtins(spec), why=why)
    now, hearer = time.monotonic(), _Teller(deadline)
    kernels_end = now + KERNELS_SHARE * (deadline - now) if step_tasks else deadline
    for tasks, end, beside in ((kernel_tasks, kernels_end, ()), (step_tasks, deadline, neighbour if step_tasks else ())):
        watch = Disturbances(pinned, cuda=device != "cpu", core=_core(options, device, beside))
        with companion.beside(beside):
            missed = visit_all(tasks, rounds=options.rounds_each, deadline=end, rng=rng, hearer=hearer, watch=watch)
        _tell_missed(missed, f"not measured within the budget of {options.launch_budget_s:g} s per launch")
    for note in offered.notes():
        say(unread=note)


def _wants_engine(options: Options) -> bool:
    return any(wants(options.only, name) for name in ENGINE)


def _kernels(options: Options, device: str, common: dict[str, Scalar], allowed: Sequence[int]) -> kernels.Offered:
    """Return what is measured below the engine, and what this machine lacks for it."""
    from mlsys_bench.bench import kernels

    return kernels.offered(options, device=device, common=common, cores=allowed)


def _engines(options: Options, device: str, common: dict[str, Scalar], phases: coldstart.Phases) -> list[steps.Bench]:
    """Return one engine per precision, warm.  The first one's start is the cold start."""
    from mlsys_bench.bench import steps

    coldstart.load_program()
    phases.end("import")
    found: list[steps.Bench] = []
    for precision in options.precisions:
        make = _maker(options, precision, device)
        parameters = common | {"model": options.model, "precision": precision}
        if found:
            engine = make()
        else:
            checkpoint = schemes.checkpoint_of(options.model)
            engine, _ = coldstart.start(make, phases, checkpoint)
            for spec, samples in coldstart.sampled(phases, engine, parameters, checkpoint):
                if wants(options.only, spec.name):
                    _emit(spec, (spec, samples))
        bench = steps.Bench(engine, parameters | _limits(engine), SUITES[options.suite], one_thread=options.threads == 1, seed=options.seed)
        say(say=f"{options.model} {precision}: warming up")
        steps.warm(bench)
        found.append(bench)
    return found


def _maker(options: Options, precision: str, device: str) -> Callable[[], Engine]:
    from mlsys_bench.bench import steps

    return lambda: steps.engine_of(models.find(options.model), options, precision, device)


def _limits(engine: Engine) -> dict[str, Scalar]:
    limits = engine.limits
    return {
        "max_batch": limits.max_seqs, "max_step_tokens": limits.max_step_tokens, "block_tokens": limits.block_tokens,
        "kv_tokens": limits.blocks * limits.block_tokens, "max_context": limits.max_context, "backend": engine.backend, "kv": engine.kv,
    }  # fmt: skip


def _step_tasks(bench: steps.Bench, options: Options, phases: coldstart.Phases) -> list[Task]:
    """Return what is measured of one engine: steps, ways of batching, and loading its checkpoint again."""
    from mlsys_bench.bench import policies, steps

    engine = bench.engine
    again = coldstart.reloading(
        _maker(options, engine.precision, engine.device), engine, bench.parameters, schemes.checkpoint_of(options.model),
        cost_s=phases.seconds["weights"],
    )  # fmt: skip
    counted = energy.counter(engine.device)
    every = [*steps.tasks(bench), *policies.tasks(bench, bench.suite.policy_requests, counted), *again]
    return [task for task in every if any(wants(options.only, spec.name) for spec in task.specs)]


def _parts(bench: steps.Bench, options: Options) -> list[Task]:
    """Return what a step is made of: measured among operators, and like them without a neighbour."""
    from mlsys_bench.bench import anatomy

    return [task for task in anatomy.tasks(bench) if wants(options.only, task.specs[0].name)]


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


def _core(options: Options, device: str, beside: Sequence[int]) -> Callable[[], Core] | None:
    """Return what looks at the measuring cores: where this process stays on them, and it is not we who crowd them."""
    from mlsys_bench.bench import alone

    is_ours_to_tell = options.pin and device == "cpu" and not any(map(companion.shares_a_core, beside))
    return alone.core(options.threads) if is_ours_to_tell else None


def _tell_lacking(options: Options, device: str, *, has_neighbour: bool) -> None:
    """Say what this machine does without."""
    from mlsys_bench.engine.native import library

    if device != "cpu":
        return
    if options.companion and not has_neighbour:
        say(unread="steps beside a neighbour, as a served engine has one: this process may use no core beyond those that measure")
    if options.backend != "torch" and library.load() is None:
        say(unread=f"the engine's C kernels ({library.why_not()}): its portable ones were measured")


def _emit(planned: Spec, sampled: Sampled) -> None:
    spec, samples = sampled
    say(sampled=msgspec.to_builtins(spec), of=msgspec.to_builtins(planned), round=msgspec.to_builtins(samples))


class _Teller:
    """Passes on to the parent what happens."""

    def __init__(self, deadline: float) -> None:
        self._deadline, self._told_s = deadline, 0.0

    def sampled(self, planned: Spec, sampled: Sampled) -> None:
        """Pass on a round of samples."""
        _emit(planned, sampled)

    def checked(self, planned: Spec, error: float, tolerance: float | None) -> None:
        """Pass on an error, None for one that is not a number: JSON has none."""
        say(checked=msgspec.to_builtins(planned), error=error if math.isfinite(error) else None, tolerance=tolerance)

    def refused(self, planned: Spec, why: str) -> None:
        """Pass on why something is not measured."""
        say(skipped=msgspec.to_builtins(planned), why=why)

    def progressed(self, done: int, of: int, left_s: float) -> None:
        """Pass on how far this part is, a few times a second."""
        now = time.monotonic()
        if now - self._told_s >= TELL_S:
            self._told_s = now
            say(settled=done, of=of, left_s=round(max(0.0, self._deadline - now), 1))


def _tell_missed(tasks: Sequence[Task], why: str) -> None:
    for task in tasks:
        for spec in task.specs:
            say(skipped=msgspec.to_builtins(spec), why=why)


if __name__ == "__main__":
    sys.exit(main())
