"""What the flags of engines are called, and what they set.

As documented: vLLM docs.vllm.ai engine arguments (0.8 to 0.15), SGLang docs.sglang.io server arguments (0.5), TensorRT-LLM
nvidia.github.io/TensorRT-LLM trtllm-serve (0.18 to 1.2); all read 2026-11-21.  Images are of the versions the presets describe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Engine = Literal["vllm", "sglang", "trtllm"]
Kind = Literal["whole", "number", "text", "on", "off"]
ENGINES: tuple[Engine, ...] = ("vllm", "sglang", "trtllm")
STARTS: dict[Engine, tuple[str, ...]] = {
    "vllm": ("vllm", "serve"),
    "sglang": ("python3", "-m", "sglang.launch_server"),
    "trtllm": ("trtllm-serve",),
}
PRESETS: dict[Engine, str] = {"vllm": "vllm-v1", "sglang": "sglang", "trtllm": "trtllm"}
IMAGES: dict[Engine, str] = {
    "vllm": "vllm/vllm-openai:v0.15.0",
    "sglang": "lmsysorg/sglang:v0.5.12-cu130",
    "trtllm": "nvcr.io/nvidia/tensorrt-llm/release:1.0.0",
}
PORTS: dict[Engine, int] = {"vllm": 8000, "sglang": 30000, "trtllm": 8000}


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag by its names, the first of which is written; it sets `field`, or is kept under `other` where there is none."""

    field: str
    kind: Kind
    names: tuple[str, ...]


def _flag(field: str, kind: Kind, *names: str) -> Flag:
    return Flag(field, kind, names)


FLAGS: dict[Engine, tuple[Flag, ...]] = {
    "vllm": (
        _flag("tp", "whole", "--tensor-parallel-size", "-tp"),
        _flag("pp", "whole", "--pipeline-parallel-size", "-pp"),
        _flag("dp", "whole", "--data-parallel-size", "-dp"),
        _flag("ep", "on", "--enable-expert-parallel"),
        _flag("dtype", "text", "--dtype"),
        _flag("quantization", "text", "--quantization", "-q"),
        _flag("kv_dtype", "text", "--kv-cache-dtype"),
        _flag("max_seqs", "whole", "--max-num-seqs"),
        _flag("max_step_tokens", "whole", "--max-num-batched-tokens"),
        _flag("max_context", "whole", "--max-model-len"),
        _flag("memory_share", "number", "--gpu-memory-utilization"),
        _flag("block_tokens", "whole", "--block-size"),
        _flag("scheduling", "text", "--scheduling-policy"),
        _flag("prefix_cache", "on", "--enable-prefix-caching"),
        _flag("prefix_cache", "off", "--no-enable-prefix-caching"),
        _flag("chunked", "on", "--enable-chunked-prefill"),
        _flag("chunked", "off", "--no-enable-chunked-prefill"),
        _flag("port", "whole", "--port"),
        _flag("", "text", "--host"),
        _flag("", "text", "--served-model-name"),
        _flag("", "text", "--tokenizer"),
        _flag("", "text", "--revision"),
        _flag("", "text", "--download-dir"),
        _flag("", "text", "--load-format"),
        _flag("", "text", "--api-key"),
        _flag("", "text", "--chat-template"),
        _flag("", "text", "--tool-call-parser"),
        _flag("", "text", "--reasoning-parser"),
        _flag("", "text", "--distributed-executor-backend"),
        _flag("", "whole", "--seed"),
        _flag("", "whole", "--api-server-count"),
        _flag("", "text", "--kv-transfer-config"),
        _flag("", "on", "--trust-remote-code"),
        _flag("", "on", "--enable-auto-tool-choice"),
        _flag("", "on", "--disable-log-requests"),
        _flag("", "on", "--no-enable-log-requests"),
    ),
    "sglang": (
        _flag("tp", "whole", "--tp-size", "--tp", "--tensor-parallel-size"),
        _flag("pp", "whole", "--pp-size", "--pp", "--pipeline-parallel-size"),
        _flag("dp", "whole", "--dp-size", "--dp", "--data-parallel-size"),
        _flag("ep", "whole", "--ep-size", "--ep", "--expert-parallel-size"),
        _flag("dtype", "text", "--dtype"),
        _flag("quantization", "text", "--quantization"),
        _flag("kv_dtype", "text", "--kv-cache-dtype"),
        _flag("max_seqs", "whole", "--max-running-requests"),
        _flag("max_step_tokens", "whole", "--chunked-prefill-size"),
        _flag("max_context", "whole", "--context-length"),
        _flag("memory_share", "number", "--mem-fraction-static"),
        _flag("block_tokens", "whole", "--page-size"),
        _flag("prefix_cache", "off", "--disable-radix-cache"),
        _flag("port", "whole", "--port"),
        _flag("", "text", "--host"),
        _flag("", "text", "--served-model-name"),
        _flag("", "text", "--tokenizer-path"),
        _flag("", "text", "--attention-backend"),
        _flag("", "text", "--disaggregation-mode"),
        _flag("", "text", "--disaggregation-transfer-backend"),
        _flag("", "text", "--api-key"),
        _flag("", "whole", "--random-seed"),
        _flag("", "on", "--enable-dp-attention"),
        _flag("", "on", "--enable-metrics"),
        _flag("", "on", "--trust-remote-code"),
    ),
    "trtllm": (
        _flag("tp", "whole", "--tp_size"),
        _flag("pp", "whole", "--pp_size"),
        _flag("ep", "whole", "--ep_size"),
        _flag("max_seqs", "whole", "--max_batch_size"),
        _flag("max_step_tokens", "whole", "--max_num_tokens"),
        _flag("max_context", "whole", "--max_seq_len"),
        _flag("memory_share", "number", "--kv_cache_free_gpu_memory_fraction", "--free_gpu_memory_fraction"),
        _flag("port", "whole", "--port"),
        _flag("", "text", "--host"),
        _flag("", "text", "--backend"),
        _flag("", "text", "--tokenizer"),
        _flag("", "text", "--extra_llm_api_options"),
        _flag("", "text", "--config"),
        _flag("", "text", "--served_model_name"),
        _flag("", "on", "--trust_remote_code"),
    ),
}
MODEL_FLAGS: dict[Engine, tuple[str, ...]] = {"vllm": ("--model",), "sglang": ("--model-path", "--model"), "trtllm": ()}
