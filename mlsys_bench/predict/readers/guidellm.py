"""GuideLLM's `benchmarks.json`: a list of benchmarks, one a load level.

As in guidellm/benchmark/schemas: the strategy stands in `config.strategy` (before 0.4: `args.strategy`), the figures in
`metrics.NAME.successful` as mean, std_dev and percentiles.  Trap: `time_per_output_token_ms` counts the first token in; what it calls
`inter_token_latency_ms` is (last token - first token) / (output tokens - 1), our TPOT, where a request counts by its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlsys_bench.errors import BadInput
from mlsys_bench.predict.readers.parts import STATS, Run, at, first, lengths, number, under_cap, whole, whole_or_none

NAME = "guidellm"
_METRICS = {"time_to_first_token_ms": ("ttft", 1e-3), "inter_token_latency_ms": ("tpot", 1e-3), "request_latency": ("e2e", 1.0)}


def knows(document: Any) -> bool:
    """Say whether this is such a report."""
    return isinstance(at(document, "benchmarks", 0, "metrics"), Mapping)


def runs(document: Mapping[str, Any], where: str) -> list[Run]:
    """Return the runs of a report, in its order."""
    return [_run(document, benchmark, where) for benchmark in document["benchmarks"]]


def _run(document: Mapping[str, Any], benchmark: Mapping[str, Any], where: str) -> Run:
    metrics = benchmark["metrics"]
    totals = first(metrics.get("request_totals"), at(benchmark, "scheduler_metrics", "requests_made"), benchmark.get("request_totals"), {})
    done = first(totals.get("successful"), at(metrics, "request_latency", "successful", "count"), 0)
    done = whole(done, "successful requests")
    rate, arrivals, cap = _load(benchmark, where)
    rate, concurrency, notes = under_cap(rate, cap, number(at(metrics, "request_concurrency", "successful", "mean")) or 0.0)
    return Run(
        prompt_tokens=_lengths(metrics, "prompt_token_count", done, where),
        output_tokens=_lengths(metrics, "output_token_count", done, where),
        rate_per_s=rate,
        arrivals=arrivals,
        concurrency=concurrency,
        measured=_measured(metrics),
        requests=done,
        failed=whole(first(totals.get("errored"), 0), "errored requests"),
        duration_s=number(benchmark.get("duration")),
        design=_design(document, benchmark),
        notes=notes,
    )


def _load(benchmark: Mapping[str, Any], where: str) -> tuple[float | None, str, int | None]:
    """Return rate, arrivals and the most requests in flight of one strategy.

    `throughput` without `max_concurrency` has neither: how many were in flight is a setting of guidellm that the file does not hold.
    """
    strategy = first(*(at(benchmark, *path) for path in (("config", "strategy"), ("args", "strategy"), ("scheduler", "strategy"))))
    kind = at(strategy, "type_")
    match kind:
        case "synchronous":
            return None, "poisson", 1
        case "concurrent":
            return None, "poisson", whole(strategy["streams"], "streams")
        case "throughput":
            return None, "poisson", whole_or_none(strategy.get("max_concurrency"), "max_concurrency")
        case "constant" | "poisson":
            return float(strategy["rate"]), kind, whole_or_none(strategy.get("max_concurrency"), "max_concurrency")
        case _:
            raise BadInput(f"{where}: a guidellm strategy of type {kind!r}; known: synchronous, concurrent, throughput, constant, poisson")


def _measured(metrics: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric, (name, scale) in _METRICS.items():
        values = at(metrics, metric, "successful") or {}
        figures = {"mean": values.get("mean"), **{p: at(values, "percentiles", p) for p in STATS}}
        found |= {f"{name}_{stat}_s": float(v) * scale for stat, v in figures.items() if number(v)}
    return found


def _lengths(metrics: Mapping[str, Any], metric: str, answered: int, where: str) -> Any:
    values = at(metrics, metric, "successful") or {}
    if answered and not values.get("mean"):
        raise BadInput(f"{where}: {metric} is 0 or missing: nobody counted tokens; let the server say its usage and run guidellm again")
    return lengths(float(values.get("mean") or 1.0), number(values.get("std_dev")), number(values.get("max")))


def _design(document: Mapping[str, Any], benchmark: Mapping[str, Any]) -> dict[str, Any]:
    paths = (("config", "backend", "model"), ("worker", "backend_model"), ("args", "backend", "model"))
    model = first(*(at(benchmark, *path) for path in paths), at(document, "args", "model"), at(document, "args", "backend_kwargs", "model"))
    model = first(model, at(document, "config", "backend", "model"), at(document, "config", "model"))
    return {"model": model} if isinstance(model, str) else {}
