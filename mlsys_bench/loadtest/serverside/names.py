"""What the metrics of each server mean in common words.

The names of vLLM, SGLang and our own server are those of `workload.metrics`; beside them stand what only a load test asks for, and the
names of TGI (its reference/metrics page), Triton with its TensorRT-LLM backend (docs/user_guide/metrics.md, tensorrtllm_backend's
README) and the DCGM exporter (etc/default-counters.csv), as documented by them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mlsys_bench.hardware.devices import THROTTLES as THROTTLES
from mlsys_bench.workload.metrics import ENGINES, Engine

Across = Literal["sum", "mean", "most"]
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How one common quantity is read from one server's metrics.

    gauge: `of` as it is.  share: gauge `of` / gauge `over`.  rate: growth of the counter `of` a second.  ratio: growth of the counter
    `of` / growth of the counter `over`, such as the sum and the count of a histogram.  Among readings of one name the first with data is
    taken.
    """

    name: str
    unit: str
    kind: Literal["gauge", "share", "rate", "ratio"]
    server: str
    of: str
    over: str | None = None
    scale: float = 1.0
    offset: float = 0.0
    across: Across = "sum"  # how the gauges of several label sets become one
    where: Mapping[str, str] = field(default_factory=dict)  # label -> the values that count, by regular expression
    by_device: bool = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names this reads."""
        return (self.of,) if self.over is None else (self.of, self.over)


COUNT_AT_END = frozenset({"mlsys"})  # servers that count a request's TTFT when it ends
MODEL_LABELS = ("model_name", "model")
DEVICE_LABELS = ("gpu", "gpu_uuid", "device", "UUID")
ENERGY = "energy"  # counters of joules, read over the window as a whole
POWER = "power"


def _histogram(name: str, server: str, of: str, scale: float = 1.0, where: Mapping[str, str] | None = None) -> Reading:
    return Reading(
        name=name, unit="s", kind="ratio", server=server, of=f"{of}_sum", over=f"{of}_count", scale=scale, where=where or {}
    )  # fmt: skip


def _engine(e: Engine, *, queue: str | None, preempted: tuple[str, ...]) -> Iterator[Reading]:
    """Yield the readings of a server that `workload.metrics` knows."""

    def gauge(name: str, unit: str, of: str, across: Across = "sum") -> Reading:
        return Reading(name=name, unit=unit, kind="gauge", server=e.name, of=of, across=across, where=e.selector)

    def rate(name: str, unit: str, of: str) -> Reading:
        return Reading(name=name, unit=unit, kind="rate", server=e.name, of=of, where=e.selector)

    yield gauge("running", "requests", e.running)
    for name in e.waiting:
        yield gauge("waiting", "requests", name)
    for name in e.kv:
        yield gauge("kv_cache", "share", name, "mean")
    for hits, asked in e.hits:
        yield Reading(name="prefix_hits", unit="share", kind="ratio", server=e.name, of=hits, over=asked, where=e.selector)
    for name in e.hit_gauges:
        yield gauge("prefix_hits", "share", name, "mean")
    yield rate("prompt_tokens", "tokens_per_s", e.prompt_total)
    yield rate("generation_tokens", "tokens_per_s", e.output_total)
    for name in preempted:
        yield rate("preemptions", "per_s", name)
    latencies = (("ttft", e.ttft), *((("tpot", e.tpot),) if e.tpot else ()), *(("itl", n) for n in e.itl), ("e2e", e.e2e))
    for name, of in latencies:
        yield _histogram(name, e.name, of, where=e.selector)
    if queue:
        yield _histogram("queue", e.name, queue, where=e.selector)


def _mlsys_blocks() -> Reading:
    free, blocks = "mlsys_kv_blocks_free", "mlsys_kv_blocks"
    return Reading(name="kv_cache", unit="share", kind="share", server="mlsys", of=free, over=blocks, scale=-1.0, offset=1.0, across="mean")


def _tgi() -> Iterator[Reading]:
    """TGI counts tokens when a request ends, and has no time to the first token; its mean time per token holds the prompt's, too."""
    for name, of in (("running", "tgi_batch_current_size"), ("waiting", "tgi_queue_size")):
        yield Reading(name=name, unit="requests", kind="gauge", server="tgi", of=of)
    for name, of in (("prompt_tokens", "tgi_request_input_length_sum"), ("generation_tokens", "tgi_request_generated_tokens_sum")):
        yield Reading(name=name, unit="tokens_per_s", kind="rate", server="tgi", of=of)
    yield _histogram("e2e", "tgi", "tgi_request_duration")
    yield _histogram("queue", "tgi", "tgi_request_queue_duration")
    yield _histogram("time_per_token", "tgi", "tgi_request_mean_time_per_token_duration")


def _triton() -> Iterator[Reading]:
    asked = "nv_inference_request_success"
    for name, state in (("running", "scheduled"), ("waiting", "waiting")):
        where = {"request_type": state}
        yield Reading(name=name, unit="requests", kind="gauge", server="triton", of="nv_trt_llm_request_metrics", where=where)
    yield Reading(name="waiting", unit="requests", kind="gauge", server="triton", of="nv_inference_pending_request_count")
    where = {"kv_cache_block_type": "fraction"}
    yield Reading(
        name="kv_cache", unit="share", kind="gauge", server="triton", of="nv_trt_llm_kv_cache_block_metrics", where=where, across="mean"
    )
    yield Reading(name="requests", unit="per_s", kind="rate", server="triton", of=asked)
    yield Reading(name="batch", unit="requests", kind="ratio", server="triton", of="nv_inference_count", over="nv_inference_exec_count")
    yield _histogram("ttft", "triton", "nv_inference_first_response_histogram_ms", 1e-3)
    for name, of in (("e2e", "nv_inference_request_duration_us"), ("queue", "nv_inference_queue_duration_us")):
        yield Reading(name=name, unit="s", kind="ratio", server="triton", of=of, over=asked, scale=1e-6)


def _device(server: str, name: str, unit: str, of: str, scale: float = 1.0, *, grows: bool = False) -> Reading:
    kind: Literal["gauge", "rate"] = "rate" if grows else "gauge"
    return Reading(name=name, unit=unit, kind=kind, server=server, of=of, scale=scale, by_device=True)


def _devices() -> Iterator[Reading]:
    """Yield NVML's first: it is asked once a second, while DCGM's exporter may answer with what it knew 30 s ago."""
    for name, unit in (
        ("utilisation", "share"),
        ("sm_clock", "hz"),
        ("memory_clock", "hz"),
        ("memory", "bytes"),
        ("temperature", "celsius"),
    ):
        yield _device("nvml", name, unit, f"nvml_{name}")
    yield _device("nvml", POWER, "w", "nvml_power")
    yield _device("nvml", ENERGY, "w", "nvml_energy", grows=True)
    yield _device("nvml", "throttle", "bits", "nvml_throttle")
    yield _device("dcgm", POWER, "w", "DCGM_FI_DEV_POWER_USAGE")
    yield _device("dcgm", ENERGY, "w", "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", 1e-3, grows=True)
    yield _device("dcgm", "utilisation", "share", "DCGM_FI_DEV_GPU_UTIL", 0.01)
    yield _device("dcgm", "sm_active", "share", "DCGM_FI_PROF_SM_ACTIVE")
    yield _device("dcgm", "tensor_active", "share", "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE")
    yield _device("dcgm", "memory_active", "share", "DCGM_FI_PROF_DRAM_ACTIVE")
    yield _device("dcgm", "sm_clock", "hz", "DCGM_FI_DEV_SM_CLOCK", 1e6)
    yield _device("dcgm", "memory_clock", "hz", "DCGM_FI_DEV_MEM_CLOCK", 1e6)
    yield _device("dcgm", "memory", "bytes", "DCGM_FI_DEV_FB_USED", _MIB)
    yield _device("dcgm", "temperature", "celsius", "DCGM_FI_DEV_GPU_TEMP")
    yield _device("dcgm", "throttle", "bits", "DCGM_FI_DEV_CLOCK_THROTTLE_REASONS")
    yield _device("dcgm", "throttle", "bits", "DCGM_FI_DEV_CLOCKS_EVENT_REASONS")
    yield _device("triton", POWER, "w", "nv_gpu_power_usage")
    yield _device("triton", ENERGY, "w", "nv_energy_consumption", grows=True)
    yield _device("triton", "utilisation", "share", "nv_gpu_utilization")
    yield _device("triton", "memory", "bytes", "nv_gpu_memory_used_bytes")
    yield _device("rapl", ENERGY, "w", "rapl_energy", grows=True)


def _all() -> Iterator[Reading]:
    vllm, sglang, mlsys = ENGINES
    yield from _engine(vllm, queue="vllm:request_queue_time_seconds", preempted=("vllm:num_preemptions_total",))
    yield from _engine(sglang, queue="sglang:queue_time_seconds", preempted=("sglang:num_retracted_requests_total",))
    yield from _engine(mlsys, queue=None, preempted=("mlsys_preemptions_total",))
    yield _mlsys_blocks()
    yield from _tgi()
    yield from _triton()
    yield from _devices()


READINGS = tuple(_all())
WANTED = frozenset(name for reading in READINGS for name in reading.metrics)
