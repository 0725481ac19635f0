"""What engines call the metrics that rules and triggers need, and where the buckets of their histograms end.

vLLM: vllm-project/vllm vllm/v1/metrics/loggers.py; SGLang: sgl-project/sglang python/sglang/srt/metrics/collector.py; both read 2026-11-21.
OpenTelemetry: semantic conventions for HTTP metrics, the buckets that they advise, read 2026-11-21.
vLLM's `request_time_per_output_token_seconds` and `inter_token_latency_seconds` are of 0.11 and later, with the old buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlsys_bench.errors import BadInput
from mlsys_bench.types import Limit

_VLLM_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_VLLM_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_VLLM_E2E = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_SGLANG_TTFT = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 20.0, 40.0, 60.0, 80.0, 100.0, 200.0, 400.0)
_SGLANG_ITL = (
    0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0,
)  # fmt: skip
HTTP = "http_server_request_duration_seconds"  # http.server.request.duration, as exporters for Prometheus name it
_HTTP = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_SGLANG_E2E = (*_SGLANG_TTFT, 600.0, 1200.0, 1800.0, 2400.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """One engine's names."""

    running: str
    waiting: str
    arrived: str
    histograms: dict[str, tuple[str, tuple[float, ...]]]  # by latency
    selector: str = ""  # more labels that gauges need, so that ranks of one replica count once


METRICS: dict[str, Metrics] = {
    "vllm": Metrics(
        running="vllm:num_requests_running",
        waiting="vllm:num_requests_waiting",
        arrived="vllm:time_to_first_token_seconds_count",
        histograms={
            "ttft": ("vllm:time_to_first_token_seconds", _VLLM_TTFT),
            "tpot": ("vllm:request_time_per_output_token_seconds", _VLLM_TOKEN),
            "itl": ("vllm:inter_token_latency_seconds", _VLLM_TOKEN),
            "e2e": ("vllm:e2e_request_latency_seconds", _VLLM_E2E),
        },
    ),
    "sglang": Metrics(
        running="sglang:num_running_reqs",
        waiting="sglang:num_queue_reqs",
        arrived="sglang:time_to_first_token_seconds_count",
        histograms={
            "ttft": ("sglang:time_to_first_token_seconds", _SGLANG_TTFT),
            "itl": ("sglang:inter_token_latency_seconds", _SGLANG_ITL),
            "e2e": ("sglang:e2e_request_latency_seconds", _SGLANG_E2E),
        },
        selector='tp_rank=~"0|"',
    ),
}


def of_engine(engine: str) -> Metrics:
    """Return the names of an engine.  Raises BadInput where nobody has read them."""
    if engine not in METRICS:
        raise BadInput(f"the metrics of {engine} are not known here: export rules and triggers for {' or '.join(METRICS)}")
    return METRICS[engine]


def bucket_at(limit_s: float, buckets: Sequence[float]) -> float | None:
    """Return the largest bucket that ends at or below a limit: what it counts kept the limit for sure.  None below the first."""
    return max((b for b in buckets if b <= limit_s * (1 + 1e-9)), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Indicator:
    """A limit as a ratio of good events: `target` of those counted by `total` are among those counted by `good`."""

    key: str  # ttft_p95
    target: float
    good: str  # counters, to be put into rate(…)
    total: str
    bucket_s: float
    limit_s: float

    @property
    def is_exact(self) -> bool:
        """Whether a bucket ends at the limit."""
        return abs(self.bucket_s - self.limit_s) <= 1e-9 * self.limit_s


def indicator(limit: Limit, engine: str, job: str) -> Indicator | None:
    """Return a latency limit at a percentile as a ratio of good events: `ttft p95 < 0.5 s` is 95 % of requests within 0.5 s.

    None for what counters cannot tell: means, the joint goodput, latencies without a histogram, limits below its first bucket.
    """
    if limit.metric not in of_engine(engine).histograms:
        return None
    return _of(limit, *of_engine(engine).histograms[limit.metric], job)


def of_http(limit: Limit, job: str) -> Indicator | None:
    """Return a limit on the time at a service that counts its requests as OpenTelemetry's conventions for HTTP servers say."""
    return _of(limit, HTTP, _HTTP, job) if limit.metric == "e2e" else None


def _of(limit: Limit, name: str, buckets: Sequence[float], job: str) -> Indicator | None:
    if not limit.stat.startswith("p"):
        return None
    bucket_s = bucket_at(limit.limit, buckets)
    if bucket_s is None:
        return None
    return Indicator(
        key=f"{limit.metric}_{limit.stat.replace('.', '_')}",
        target=round(float(limit.stat[1:]) / 100, 6),
        good=f'{name}_bucket{{job="{job}",le="{bucket_s!r}"}}',
        total=f'{name}_count{{job="{job}"}}',
        bucket_s=bucket_s,
        limit_s=limit.limit,
    )
