"""This project's own benchmarks of the gate, by name, each made only in the process that measures it."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from mlsys_bench import errors
from mlsys_bench.bench import turns
from mlsys_bench.bench.harness import Spec
from mlsys_bench.bench.options import GATED
from mlsys_bench.bench.turns import Benchmark
from mlsys_bench.types import Scalar


def names() -> list[str]:
    """Return the benchmarks `gate run` knows of this project."""
    return [name for name, _ in GATED]


def work(name: str) -> int:
    """Be the worker of a benchmark until standard input ends; return the exit status.  Raises UnknownName."""
    if name not in names():
        raise errors.unknown("benchmark of the gate", name, names())
    return turns.serve(name, _maker(name))


def _maker(name: str) -> Callable[[], Benchmark]:
    """Return what makes a benchmark.  Those of the engine import torch, so their module is named here and imported there."""
    if name.startswith("engine."):
        return lambda: _of_engine(name.removeprefix("engine."))
    return {"planner.plan": planner, "loadtest.sender": _sender}[name]


def _of_engine(name: str) -> Benchmark:
    try:
        made: Benchmark = getattr(importlib.import_module("mlsys_bench.bench.gated"), name)()
    except ModuleNotFoundError as error:
        raise errors.MeasurementFailed(
            f"engine.{name} needs {error.name}, which is not installed; pip install 'mlsys-bench[engine]'"
        ) from error
    return made


def _sender() -> Benchmark:
    from mlsys_bench.journeys.gating import sending

    return sending.sender()


# ---------------------------------------------------------------- the planner

_PLANNED: dict[str, Scalar] = {"model": "llama-3-8b", "gpus": "h100-sxm", "rate_per_s": 40}


def planner() -> Benchmark:
    """Return one plan of a fixed workload: how long it takes, and what it costs."""
    from mlsys_bench import plan, slo, workload

    request = plan.Request(
        model=str(_PLANNED["model"]),
        workload=workload.synthetic(40, prompt="lognormal:256:1:2048", output="lognormal:64:1:512"),
        slo=slo.parse("ttft_p95<1s,tpot_p95<60ms"),
        gpus=("h100-sxm",),
        precisions=("bf16",),
        max_batch=64,
        max_step_tokens=2048,
    )
    spec = Spec(name="planner.plan", unit="s", better="lower", parameters=_PLANNED)
    cost = Spec(name="planner.plan.usd_per_hour", unit="$/h", better="lower", parameters=_PLANNED, deterministic=True)
    replicas = Spec(name="planner.plan.replicas", unit="replicas", better="lower", parameters=_PLANNED, deterministic=True)

    def figures() -> list[tuple[Spec, float]]:
        made = plan.plan(request)
        found = [(replicas, float(made.replicas))]
        return found if made.usd_per_hour is None else [*found, (cost, made.usd_per_hour)]

    return Benchmark(spec=spec, work=lambda: plan.plan(request), turns=8, counted=figures)
