"""Speed: tokens a second, FLOPs, bytes that must be read, and what a change can give at best."""

from __future__ import annotations

import math

from mlsys_bench import hardware, latency, models
from mlsys_bench.claims import Claim
from mlsys_bench.types import Provenance

PROMPT_TOKENS = 250
LAYOUTS = (("fp16", 8), ("fp8", 2))


def _without_cache() -> Claim:
    """Count the FLOPs of N tokens one by one, with and without a KV cache, and the power of N they grow with."""
    model = models.find("llama-3-8b")
    bare, cached = (_power(model, 100_000, kept) for kept in (False, True))
    times = _flops(model, 1000, False) / _flops(model, 1000, True)
    return Claim(
        key="no-kv-cache",
        topic="speed",
        claim="Without a KV cache generating N tokens is O(N^2), with it O(N)",
        quoted="N^2",
        recomputed=f"N^{bare:.1f} without, N^{cached:.1f} with, near N = 100,000; {times:.0f}x the FLOPs at N = 1,000",
        value=bare,
        unit="power",
        low=cached,
        high=bare,
        verdict="wrong",
        because="each step redoes all pairs: attention is O(N^3) in all without a cache, O(N^2) with it; O(N) is one step with a cache",
        formula="sum over i of (i linear + i^2 / 2 attention) against sum of (linear + i attention), Llama-3-8B",
        provenance=Provenance.ROOFLINE,
    )


def _hundred_requests() -> Claim:
    """Load eight H100 with as many sequences as fit, up to 256 a replica, prompts computed between: FP16 over all eight, FP8 over pairs."""
    short, long = ([requests_per_s(precision, tp, output) for precision, tp in LAYOUTS] for output in (250, 1000))
    most = max(physics for _, physics in short)
    return Claim(
        key="8xh100-100-rps",
        topic="speed",
        claim="8 x H100 serve a 70B model at 100 requests/s",
        quoted="100/s",
        recomputed=(
            f"{short[0][0]:.0f}/s (FP16, TP 8) to {short[1][0]:.0f}/s (FP8, 4 x TP 2) at {PROMPT_TOKENS} in, 250 out; "
            f"{long[0][0]:.0f} to {long[1][0]:.0f}/s at 1,000 out"
        ),
        value=short[1][0],
        unit="1/s",
        low=long[0][0],
        high=most,
        verdict="wrong" if most < 100 else "holds only if",
        because=f"answers stay below 250 tokens and the engine nears the {most:.0f}/s that the hardware allows: say tokens, not requests",
        formula="replicas / (prefill + out x step / batch); the hardware's: every byte and FLOP at full speed",
        provenance=Provenance.ROOFLINE,
    )


def _flat_index() -> Claim:
    """Divide the bytes of all vectors, which a flat index reads, by the bandwidth of the catalogue's CPU: the least it can take."""
    cpu = hardware.find("cpu-2core")
    small, large = (1000 * 100_000 * d * 4 / cpu.bandwidth_bytes_per_s for d in (384, 1536))
    return Claim(
        key="flat-100k-10ms",
        topic="speed",
        claim="Below 100K vectors a flat index answers within 10 ms",
        quoted="<10 ms",
        recomputed=f"at least {small:.1f} ms for 384 dimensions, {large:.1f} ms for 1,536 ({cpu.bandwidth_bytes_per_s / 1e9:.1f} GB/s)",
        value=large,
        unit="ms",
        low=small,
        high=large,
        verdict="holds only if",
        because=f"vectors are short: up to {int(0.01 * cpu.bandwidth_bytes_per_s / 4 / 100_000)} dimensions on two cores",
        formula="vectors x dimensions x 4 B / bandwidth",
        provenance=Provenance.ROOFLINE,
    )


def _int8_compute() -> Claim:
    """Tell apart: weight-only INT8 halves what is read and computes in 16 bit as before; only INT8 matrices halve the computing."""
    h100, model = hardware.find("H100"), models.find("llama-3-70b")
    read = models.weight_bytes(model, "int8") / models.weight_bytes(model, "fp16")
    weight_only = hardware.compute_flops_per_s(h100, "int8") / hardware.compute_flops_per_s(h100, "bf16")
    matrices = h100.flops_per_s["int8"] / h100.flops_per_s["bf16"]
    return Claim(
        key="int8-half-compute",
        topic="speed",
        claim="INT8 needs 50 % of the compute",
        quoted="50 %",
        recomputed=f"bytes {read:.0%}; compute {1 / weight_only:.0%} weight-only, {1 / matrices:.0%} with INT8 matrices (H100)",
        value=1 / weight_only,
        unit="share",
        low=1 / matrices,
        high=1 / weight_only,
        verdict="holds only if",
        because="activations are INT8 too; weight-only INT8 saves memory and bandwidth, not FLOPs",
        formula="peak rate of the format that is computed in",
        provenance=Provenance.ROOFLINE,
    )


def _amdahl() -> Claim:
    share = 0.6
    return Claim(
        key="60-percent-tokenizing",
        topic="speed",
        claim="60 % of the time is tokenization: a faster tokenizer will fix it",
        quoted="fixed",
        recomputed=f"at most {1 / (1 - share):.1f}x faster, and {1 / (1 - share + share / 10):.2f}x with a tokenizer ten times as fast",
        value=1 / (1 - share),
        unit="x",
        verdict="holds only if",
        because="2.5 times is enough: the other 40 % stay",
        formula="Amdahl: 1 / (1 - p + p / s)",
        provenance=Provenance.ASSUMED,
    )


# ---------------------------------------------------------------- arithmetic


def requests_per_s(precision: str, tp: int, output_tokens: int) -> tuple[float, float]:
    """Return the requests per second of 8 x H100 with Llama-3-70B at full batches, as an engine does them and as physics allows."""
    model, device = models.find("llama-3-70b"), hardware.find("H100")
    profile = latency.roofline(model, device, precision=precision, tp=tp)
    budget = models.kv_budget_tokens(model, device, precision=precision, tp=tp, max_seqs=256, max_step_tokens=2048)
    held = PROMPT_TOKENS + output_tokens / 2
    batch = min(256.0, math.floor(budget.tokens / held))
    decode = (batch, batch * held, 0.0, 0.0, batch)
    prefill = (0.0, 0.0, float(PROMPT_TOKENS), PROMPT_TOKENS**2 / 2, 1.0)
    engine, physics = (
        8 / tp / (step(profile, prefill) + output_tokens * step(profile, decode) / batch) for step in (latency.step_s, latency.floor_s)
    )
    return engine, physics


def _flops(model: models.Architecture, tokens: int, cached: bool) -> float:
    """Return the FLOPs of generating so many tokens: each step the new one alone, or all so far again."""
    linear, pair = models.linear_flops_per_token(model), models.attention_flops_per_pair(model)
    n, n2, n3 = float(tokens), tokens**2 / 2, tokens**3 / 3
    return linear * n + pair * n2 if cached else linear * n2 + pair * n3 / 2


def _power(model: models.Architecture, tokens: int, cached: bool) -> float:
    """Return the power of N that the FLOPs grow with around N tokens: the slope in a log-log plot."""
    return math.log2(_flops(model, 2 * tokens, cached) / _flops(model, tokens, cached))


CLAIMS = {
    "no-kv-cache": _without_cache,
    "8xh100-100-rps": _hundred_requests,
    "flat-100k-10ms": _flat_index,
    "int8-half-compute": _int8_compute,
    "60-percent-tokenizing": _amdahl,
}
