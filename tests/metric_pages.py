"""Pages of metrics as servers write them, by their documented names, at any point of a made-up life."""

from __future__ import annotations


def vllm(tokens: float, *, running: float = 3, waiting: float = 1, kv: float = 0.25, model: str = "tiny", hits: float = 0.0) -> str:
    """Write vLLM after so many tokens: 10 a request, the first after 40 ms (10 ms of it in the queue), the others 5 ms apart."""
    requests = tokens / 10
    own = f'{{engine="0",model_name="{model}"}}'
    return f"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{own} {running}
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{own} {waiting}
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{own} {kv}
# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total{own} {20 * requests}
vllm:prefix_cache_hits_total{own} {hits * requests}
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{own} {requests / 100}
# TYPE vllm:prompt_tokens counter
vllm:prompt_tokens_total{own} {20 * requests}
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{own} {tokens}
vllm:generation_tokens_created{own} 1.7e+09
# TYPE vllm:request_success counter
vllm:request_success_total{{engine="0",finished_reason="length",model_name="{model}"}} {requests}
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.1",model_name="{model}"}} {requests}
vllm:time_to_first_token_seconds_bucket{{engine="0",le="+Inf",model_name="{model}"}} {requests}
vllm:time_to_first_token_seconds_count{own} {requests}
vllm:time_to_first_token_seconds_sum{own} {0.04 * requests}
# TYPE vllm:request_time_per_output_token_seconds histogram
vllm:request_time_per_output_token_seconds_count{own} {requests}
vllm:request_time_per_output_token_seconds_sum{own} {0.005 * requests}
# TYPE vllm:request_queue_time_seconds histogram
vllm:request_queue_time_seconds_count{own} {requests}
vllm:request_queue_time_seconds_sum{own} {0.01 * requests}
"""


def sglang(tokens: float) -> str:
    """SGLang with two ranks that count the same requests."""
    requests = tokens / 10
    lines = []
    for rank in ("0", "1"):
        own = f'{{engine_type="unified",model_name="tiny",tp_rank="{rank}"}}'
        lines += [
            f"sglang:num_running_reqs{own} 4.0",
            f"sglang:num_queue_reqs{own} 2.0",
            f"sglang:token_usage{own} 0.28",
            f"sglang:prompt_tokens_total{own} {20 * requests}",
            f"sglang:generation_tokens_total{own} {tokens}",
            f"sglang:cached_tokens_total{own} {5 * requests}",
            f"sglang:time_to_first_token_seconds_sum{own} {0.03 * requests}",
            f"sglang:time_to_first_token_seconds_count{own} {requests}",
            f"sglang:inter_token_latency_seconds_sum{own} {0.004 * tokens}",
            f"sglang:inter_token_latency_seconds_count{own} {tokens}",
            f"sglang:queue_time_seconds_sum{own} {0.02 * requests}",
            f"sglang:queue_time_seconds_count{own} {requests}",
            f"sglang:num_retracted_requests_total{own} {requests / 50}",
        ]
    return "\n".join(lines) + "\n"


def tgi(tokens: float) -> str:
    """Text Generation Inference, whose Rust exporter writes no HELP."""
    requests = tokens / 10
    return f"""# TYPE tgi_queue_size gauge
tgi_queue_size 6

# TYPE tgi_batch_current_size gauge
tgi_batch_current_size 8

# TYPE tgi_request_generated_tokens histogram
tgi_request_generated_tokens_bucket{{le="+Inf"}} {requests}
tgi_request_generated_tokens_sum {tokens}
tgi_request_generated_tokens_count {requests}
tgi_request_input_length_sum {20 * requests}
tgi_request_input_length_count {requests}
tgi_request_queue_duration_sum {0.1 * requests}
tgi_request_queue_duration_count {requests}
tgi_request_duration_sum {0.5 * requests}
tgi_request_duration_count {requests}
tgi_request_mean_time_per_token_duration_sum {0.02 * requests}
tgi_request_mean_time_per_token_duration_count {requests}
"""


def triton(requests: float) -> str:
    """Triton with two models, TensorRT-LLM's batch manager, and one GPU that has drawn 100 J a request."""
    tiny = 'model="tiny",version="1"'
    return f"""# HELP nv_inference_request_success Number of successful inference requests, all batch sizes
# TYPE nv_inference_request_success counter
nv_inference_request_success{{{tiny}}} {requests}
nv_inference_request_success{{model="other",version="1"}} 77
nv_inference_count{{{tiny}}} {requests}
nv_inference_exec_count{{{tiny}}} {requests / 4}
nv_inference_request_duration_us{{{tiny}}} {250_000 * requests}
nv_inference_queue_duration_us{{{tiny}}} {50_000 * requests}
nv_inference_pending_request_count{{{tiny}}} 9
nv_inference_first_response_histogram_ms_count{{{tiny}}} {requests}
nv_inference_first_response_histogram_ms_sum{{{tiny}}} {60 * requests}
nv_trt_llm_request_metrics{{{tiny},request_type="waiting"}} 5
nv_trt_llm_request_metrics{{{tiny},request_type="scheduled"}} 7
nv_trt_llm_request_metrics{{{tiny},request_type="max"}} 512
nv_trt_llm_kv_cache_block_metrics{{kv_cache_block_type="fraction",{tiny}}} 0.5
nv_trt_llm_kv_cache_block_metrics{{kv_cache_block_type="max",{tiny}}} 6239
nv_gpu_utilization{{gpu_uuid="GPU-1f"}} 0.9
nv_gpu_power_usage{{gpu_uuid="GPU-1f"}} 300
nv_energy_consumption{{gpu_uuid="GPU-1f"}} {100 * requests}
nv_gpu_memory_used_bytes{{gpu_uuid="GPU-1f"}} 40000000000
"""


def dcgm(joules: float, *, watts: float = 400, throttle: int = 0) -> str:
    """DCGM's exporter on a machine with one busy GPU and one that idles at 60 W."""

    def of(gpu: int) -> str:
        return f'{{gpu="{gpu}",UUID="GPU-{gpu}f",device="nvidia{gpu}",modelName="NVIDIA H100 80GB HBM3",Hostname="node"}}'

    return f"""# HELP DCGM_FI_DEV_SM_CLOCK SM clock frequency (in MHz).
# TYPE DCGM_FI_DEV_SM_CLOCK gauge
DCGM_FI_DEV_SM_CLOCK{of(0)} 1755
DCGM_FI_DEV_SM_CLOCK{of(1)} 345
DCGM_FI_DEV_MEM_CLOCK{of(0)} 2619
DCGM_FI_DEV_GPU_TEMP{of(0)} 61
DCGM_FI_DEV_POWER_USAGE{of(0)} {watts}
DCGM_FI_DEV_POWER_USAGE{of(1)} 60
# TYPE DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION counter
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{of(0)} {1e12 + 1000 * joules}
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{of(1)} {5e11 + 150 * joules}
DCGM_FI_DEV_GPU_UTIL{of(0)} 97
DCGM_FI_DEV_GPU_UTIL{of(1)} 0
DCGM_FI_DEV_FB_USED{of(0)} 70000
DCGM_FI_DEV_CLOCK_THROTTLE_REASONS{of(0)} {throttle}
"""
