"""What a metrics server would hold of a fleet that was simulated: counters, histograms with vLLM's buckets, gauges."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlsys_bench import latency, workload
from mlsys_bench.batching import Limits
from mlsys_bench.simulate import core
from mlsys_bench.types import Plan, Workload
from mlsys_bench.workload.counters import Series

T0 = 1_700_006_400.0
SCRAPE_S = 15.0
SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
LONG_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000)


def fleet(plan: Plan, traffic: Workload, *, replicas: int, seconds: float, slower: float = 1.0, seed: int = 5) -> list[Series]:
    """Return the series of so many replicas under this traffic of one of them, each with arrivals of its own; all times `slower`."""
    return [
        series
        for i in range(replicas)
        for series in _replica(plan, traffic, seconds, slower, seed + i, {"instance": f"10.0.0.{i}:8000", "model_name": "m"})
    ]


def limits(plan: Plan) -> Limits:
    step_tokens = plan.max_step_tokens
    assert step_tokens is not None
    return Limits(plan.max_batch, step_tokens, 16, plan.kv_tokens_per_replica // 16, 8192)


def _replica(plan: Plan, traffic: Workload, seconds: float, slower: float, seed: int, labels: dict[str, str]) -> list[Series]:
    schedule = workload.schedule(traffic, duration_s=seconds, seed=seed)
    tracks = core.play(schedule, limits(plan), profile=plan.profile)
    inside = dataclasses.replace(latency.overhead(plan.profile), prompt_token_s=0.0)  # of what comes on top, steps planned ahead
    ahead_s = tracks.late_s(schedule.prompt_tokens, inside) - tracks.arrived_s
    first_s, last_s = (tracks.arrived_s + slower * (made_s + ahead_s) for made_s in (tracks.first_s, tracks.last_s))
    several = tracks.tokens > 1
    tpot_s = (last_s - first_s)[several] / (tracks.tokens[several] - 1)
    ends = (
        ("vllm:time_to_first_token_seconds", SECONDS, first_s, first_s - tracks.arrived_s),
        ("vllm:request_time_per_output_token_seconds", TOKEN_S, last_s[several], tpot_s),
        ("vllm:e2e_request_latency_seconds", LONG_S, last_s, last_s - tracks.arrived_s),
        ("vllm:request_prompt_tokens", TOKENS, last_s, schedule.prompt_tokens.astype(float)),
        ("vllm:request_generation_tokens", TOKENS, last_s, tracks.tokens.astype(float)),
    )
    scrapes_s = np.arange(0.0, seconds + SCRAPE_S / 2, SCRAPE_S)
    found = [s for name, edges, at_s, values in ends for s in histogram(name, edges, at_s, values, scrapes_s, labels)]
    found.append(_series("vllm:generation_tokens_total", np.array([float(tracks.tokens[last_s <= t].sum()) for t in scrapes_s]), labels))
    held = np.array([float(((tracks.arrived_s <= t) & (last_s > t)).sum()) for t in scrapes_s])
    found += [_series("vllm:num_requests_running", held, labels), _series("vllm:num_requests_waiting", 0 * held, labels)]
    return [*found, _series("vllm:kv_cache_usage_perc", held / plan.max_batch, labels)]


def histogram(name: str, edges: Sequence[float], at_s: object, values: object, scrapes_s: object, labels: dict[str, str]) -> list[Series]:
    """Return a histogram's series of values that were observed at these times, at every scrape."""
    when, what, asked = (np.asarray(v, dtype=float) for v in (at_s, values, scrapes_s))
    order = np.argsort(when)
    when, what = when[order], what[order]
    counts = np.searchsorted(when, asked, side="right")

    def at(cumulative: np.ndarray) -> np.ndarray:
        return np.append(0.0, cumulative)[counts]

    made = [_series(f"{name}_bucket", at(np.cumsum(what <= edge)), {**labels, "le": f"{edge:g}"}) for edge in edges]
    made.append(_series(f"{name}_bucket", counts.astype(float), {**labels, "le": "+Inf"}))
    return [*made, _series(f"{name}_sum", at(np.cumsum(what)), labels), _series(f"{name}_count", counts.astype(float), labels)]


def _series(name: str, values: np.ndarray, labels: dict[str, str]) -> Series:
    return Series(name=name, labels=dict(labels), times_s=T0 + SCRAPE_S * np.arange(float(len(values))), values=values)


def write(path: Path, held: Sequence[Series]) -> Path:
    """Write series as one answer of query_range."""
    rows = [
        {"metric": dict(s.labels, __name__=s.name), "values": [[t, f"{v:.10g}"] for t, v in zip(s.times_s, s.values, strict=True)]}
        for s in held
    ]
    path.write_text(json.dumps({"status": "success", "data": {"resultType": "matrix", "result": rows}}))
    return path


def each(plan: Plan, factor: float = 1.0) -> Workload:
    """Return the traffic of one replica of the plan, at so many times its rate."""
    return dataclasses.replace(plan.workload, rate_per_s=factor * plan.workload.rate_per_s / plan.replicas)
