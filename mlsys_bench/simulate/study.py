"""Several independent runs of one design, and intervals over them."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np

from mlsys_bench import stats, summary, workers, workload
from mlsys_bench.batching import Limits, StepFeatures
from mlsys_bench.errors import BadInput, unknown
from mlsys_bench.simulate.fleet import run
from mlsys_bench.simulate.simulation import Simulation
from mlsys_bench.types import LatencyProfile, RequestRecord, Workload

LATENCIES: dict[str, Callable[[RequestRecord], float | None]] = {"ttft": summary.ttft_s, "tpot": summary.tpot_s, "e2e": summary.e2e_s}
THROUGHPUT = "throughput_tokens_per_s"


def run_many(
    traffic: Workload,
    profile: LatencyProfile,
    limits: Limits,
    *,
    replicas: int,
    runs: int = 5,
    requests_per_run: int = 1000,
    routing: str = "least_loaded",
    seed: int = 0,
    queue_limit: int | None = None,
    clock: Callable[[StepFeatures], float] | None = None,
    executor: Executor | workers.Local | None = None,
) -> list[Simulation]:
    """Return independent simulations of the same design, each with traffic of its own drawn from `seed`."""
    rest = {"replicas": replicas, "routing": routing, "queue_limit": queue_limit, "clock": clock}
    shared = (traffic, requests_per_run, profile, limits, rest)
    return workers.each(_one_of_many, seeds(seed, runs), shared=shared, executor=executor)


def _one_of_many(shared: tuple[Workload, int, LatencyProfile, Limits, dict[str, Any]], seed: int) -> Simulation:
    traffic, n, profile, limits, rest = shared
    return run(workload.schedule(traffic, n=n, seed=seed), profile, limits, seed=seed, **rest)


def seeds(seed: int, runs: int) -> list[int]:
    """Return the seeds of independent runs."""
    found: list[int] = np.random.SeedSequence(seed).generate_state(runs).tolist()
    return found


def percentiles(simulations: Sequence[Simulation], keys: Iterable[str]) -> dict[str, tuple[float, float, float]]:
    """Return (point, low, high) of each key: the mean of the runs' own figures and Student's 90 % interval of it.

    Keys: `{ttft,tpot,e2e}_{mean,p50,p95,...}_s` of the answered requests in the window, and `throughput_tokens_per_s`.
    A key for which some run has no value (no answer, or single tokens only) is left out.
    """
    if len(simulations) < 2:
        raise BadInput(f"{len(simulations)} run(s): an interval over runs takes at least 2")
    found = {key: [figure(s, key) for s in simulations] for key in keys}
    return {key: _with_interval([v for v in values if v is not None]) for key, values in found.items() if None not in values}


def figure(simulation: Simulation, key: str) -> float | None:
    """Return one figure of one run, or None when it has no value."""
    if key == THROUGHPUT:
        return throughput_tokens_per_s(simulation)
    metric, _, rest = key.partition("_")
    stat = rest.removesuffix("_s")
    if metric not in LATENCIES or not re.fullmatch(r"(mean|p\d\d(\.\d+)?)_s", rest):
        raise unknown("figure", key, [THROUGHPUT, *(f"{m}_{s}_s" for m in LATENCIES for s in ("mean", "p50", "p95", "p99"))])
    values = [v for r in simulation.requests if r.in_window and r.outcome == "ok" and (v := LATENCIES[metric](r)) is not None]
    if not values:
        return None
    return float(np.mean(values)) if stat == "mean" else stats.quantile(values, float(stat[1:]) / 100)


def throughput_tokens_per_s(simulation: Simulation) -> float | None:
    """Return the output tokens per second of the window, whoever they belong to."""
    start_s, end_s = simulation.window
    if end_s <= start_s:
        return None
    return sum(_between(r, start_s, end_s) for r in simulation.requests) / (end_s - start_s)


def _between(record: RequestRecord, start_s: float, end_s: float) -> int:
    """Return how many tokens of a request came in a window."""
    times = record.token_s
    if len(times) == record.output_tokens:
        return bisect.bisect_right(times, end_s) - bisect.bisect_left(times, start_s)
    return sum(k for t, k in zip(times, record.tokens_per_event, strict=True) if start_s <= t <= end_s)


def _with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    interval = stats.mean_interval(values)
    assert interval is not None
    return float(np.mean(values)), *interval
