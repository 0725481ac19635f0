"""Memory: what models, caches and vectors take, and what fits on which device."""

from __future__ import annotations

import dataclasses

from mlsys_bench import hardware, models, pricing
from mlsys_bench.claims import Claim
from mlsys_bench.types import Provenance

GB = 1e9
CONTEXT = 8192
MAX_SEQS, MAX_STEP_TOKENS = 256, 2048  # as engines are started by default
VECTORS, DIMENSIONS = 10_000_000, 1536


def _weights_70b() -> Claim:
    llama3, llama2 = (models.weight_bytes(models.find(f"llama-{n}-70b"), "fp16") / GB for n in (3, 2))
    return Claim(
        key="70b-fp16",
        topic="memory",
        claim="A 70B model in FP16 needs 140 GB",
        quoted="140 GB",
        recomputed=f"{llama3:.1f} GB (Llama-3-70B); {llama2:.1f} GB (Llama-2-70B)",
        value=llama3,
        unit="GB",
        low=llama2,
        high=llama3,
        verdict="holds",
        because="for the weights alone: cache, activations and buffers come on top",
        formula="parameters x 2 B",
        provenance=Provenance.ROOFLINE,
    )


def _h200() -> Claim:
    h200, b200 = (hardware.find(name).memory_bytes / GB for name in ("H200", "B200"))
    return Claim(
        key="h200-192gb",
        topic="memory",
        claim="An H200 has 192 GB",
        quoted="192 GB",
        recomputed=f"{h200:.0f} GB",
        value=h200,
        unit="GB",
        verdict="wrong",
        because=f"192 GB is what a B200 has built in ({b200:.0f} GB of it can be used) and what an MI300X has",
        formula="device catalogue",
        provenance=Provenance.ROOFLINE,
    )


def _kv_8k() -> Claim:
    """Recompute 2 x layers x hidden x tokens x bytes for 128 layers of 12,288: every head with keys and values of its own."""
    llama = models.find("llama-3-70b")
    quoted_shape = dataclasses.replace(llama, layers=128, hidden=12288, heads=96, kv_heads=96, head_dim=128)
    full, grouped = (models.kv_bytes(shape, "fp16", CONTEXT) / GB for shape in (quoted_shape, llama))
    gpt3 = models.kv_bytes(models.find("gpt3-175b"), "fp16", CONTEXT) / GB
    shapes = models.every()
    own = [m for m in shapes if m.heads == m.kv_heads and not m.is_mla]
    return Claim(
        key="kv-8k-52gb",
        topic="memory",
        claim="The KV cache of a large model at 8K context takes 52 GB a request",
        quoted="52 GB",
        recomputed=f"{full:.1f} GB for 128 layers of 12,288; GPT-3 {gpt3:.1f} GB; Llama-3-70B {grouped:.2f} GB",
        value=full,
        unit="GB",
        low=grouped,
        high=full,
        verdict="holds only if",
        because=f"every head has keys and values of its own: {len(own)} of the {len(shapes)} models known here do",
        formula="2 x layers x KV heads x head size x tokens x bytes",
        provenance=Provenance.ROOFLINE,
    )


def _grouped_queries() -> Claim:
    llama = models.find("llama-3-70b")
    full = models.kv_bytes(dataclasses.replace(llama, kv_heads=llama.heads), "fp16", CONTEXT) / GB
    grouped = models.kv_bytes(llama, "fp16", CONTEXT) / GB
    latent = models.kv_bytes(models.find("deepseek-v3"), "fp16", CONTEXT) / GB
    shapes = [m for m in models.every() if m.heads > m.kv_heads and not m.is_mla]
    ratios = sorted(m.heads / m.kv_heads for m in shapes)
    return Claim(
        key="gqa-saves",
        topic="memory",
        claim="Grouped-query attention makes the KV cache of Llama-3-70B 8 times smaller",
        quoted="8x",
        recomputed=f"{full:.1f} -> {grouped:.2f} GB at 8K: {full / grouped:.0f}x; DeepSeek-V3 (MLA) {latent:.2f} GB",
        value=full / grouped,
        unit="x",
        low=ratios[0],
        high=ratios[-1],
        verdict="holds",
        because=f"64 heads share 8 sets of keys and values; {len(shapes)} models known here save {ratios[0]:.3g}x to {ratios[-1]:.3g}x",
        formula="heads / KV heads",
        provenance=Provenance.ROOFLINE,
    )


def _fp32_one_node() -> Claim:
    model = models.find("llama-3-70b")
    weights = models.weight_bytes(model, "fp32") / GB
    left = [_budget("fp32", name, 8).tokens for name in ("A100-40GB", "A100-80GB")]
    return Claim(
        key="fp32-one-node",
        topic="memory",
        claim="70B in FP32 takes 280 GB, impossible on a single node",
        quoted="impossible",
        recomputed=f"{weights:.0f} GB; 8 x 40 GB leave {left[0]:,} KV tokens, 8 x 80 GB {left[1]:,}",
        value=weights,
        unit="GB",
        verdict="wrong",
        because="a node has eight devices: 320 or 640 GB",
        formula="parameters x 4 B against 8 x memory, less working memory",
        provenance=Provenance.CALIBRATED,
    )


def _fp16_two_a100() -> Claim:
    return _fits("fp16-2xa100", "70B in FP16 fits on two A100-80GB", "fp16", "A100-80GB", 2)


def _int8_one_a100() -> Claim:
    return _fits("int8-1xa100", "70B in INT8 fits on one A100-80GB", "int8", "A100-80GB", 1)


def _int4_consumer() -> Claim:
    model = models.find("llama-3-70b")
    weights = models.weight_bytes(model, "int4") / GB
    server, consumer = (hardware.find(name) for name in ("A100-40GB", "RTX-4090"))
    fits = [_budget("int4", name, 1).fits for name in ("A100-40GB", "RTX-4090")]
    return Claim(
        key="int4-35gb",
        topic="memory",
        claim="70B in INT4 takes 35 GB and runs on an A100-40GB or a consumer GPU",
        quoted="35 GB",
        recomputed=f"{weights:.1f} GB; fits 40 GB: {_yes(fits[0])}, 24 GB: {_yes(fits[1])}",
        value=weights,
        unit="GB",
        verdict="wrong" if not any(fits) else "holds only if",
        because=(
            "scales add 0.125 bit a weight, embeddings and head stay in 16 bit; "
            f"of {server.memory_bytes / GB:.0f} GB an engine takes 90 %, "
            f"and an {consumer.id} lacks {weights - consumer.memory_bytes / GB:.0f} GB"
        ),
        formula="quantized x (4 bit + 16 bit / 128) + the rest x 16 bit",
        provenance=Provenance.ROOFLINE,
    )


def _vectors() -> Claim:
    plain = pricing.vector_bytes(VECTORS, DIMENSIONS) / GB
    return Claim(
        key="10m-vectors",
        topic="memory",
        claim="10 million vectors of 1,536 floats take about 60 GB",
        quoted="60 GB",
        recomputed=f"{plain:.2f} GB ({plain * GB / 2**30:.1f} GiB)",
        value=plain,
        unit="GB",
        verdict="holds",
        because="without an index, for one copy",
        formula="vectors x dimensions x 4 B",
        provenance=Provenance.ROOFLINE,
    )


def _index_overhead() -> Claim:
    plain = pricing.vector_bytes(VECTORS, DIMENSIONS) / GB
    linked = [pricing.vector_bytes(VECTORS, DIMENSIONS, links=m) / GB for m in (16, 32)]
    more = [size / plain - 1 for size in linked]
    return Claim(
        key="hnsw-100-150gb",
        topic="memory",
        claim="With its HNSW index that becomes 100 to 150 GB",
        quoted="100-150 GB",
        recomputed=f"{linked[0]:.1f} GB (M = 16) to {linked[1]:.1f} GB (M = 32): {more[0]:.0%} to {more[1]:.0%} more",
        value=linked[1],
        unit="GB",
        low=linked[0],
        high=linked[1],
        verdict="wrong",
        because=f"links are small beside vectors of 6 kB; only a second copy brings {2 * linked[0]:.0f} GB",
        formula="vectors x (dimensions x 4 B + 2 M x 4 B)",
        provenance=Provenance.ROOFLINE,
    )


def _index_order() -> Claim:
    per_vector = [pricing.vector_bytes(1, DIMENSIONS, value_bytes=v, links=16) for v in (0.0, 4.0)]
    return Claim(
        key="hnsw-o-nm",
        topic="memory",
        claim="HNSW needs O(N M) memory",
        quoted="N M",
        recomputed=f"links {per_vector[0]:.0f} B a vector (M = 16) of {per_vector[1]:,.0f} B: {per_vector[0] / per_vector[1]:.1%}",
        value=per_vector[1],
        unit="B",
        verdict="wrong",
        because="that counts the links and leaves out the vectors, which are nearly all of it",
        formula="N (4 d + 8 M) B",
        provenance=Provenance.ROOFLINE,
    )


def _overlap() -> Claim:
    least, most = (512 / (512 - shared) for shared in (50, 100))
    return Claim(
        key="chunk-overlap",
        topic="memory",
        claim="Chunks of 512 tokens overlap by 50 to 100: that costs next to nothing",
        quoted="0 %",
        recomputed=f"{least - 1:.0%} to {most - 1:.0%} more vectors to embed, store and search",
        value=most - 1,
        unit="share",
        low=least - 1,
        high=most - 1,
        verdict="wrong",
        because="every overlapping token is embedded twice; on 61 GB of vectors it is 7 to 15 GB",
        formula="chunk / (chunk - overlap) - 1",
        provenance=Provenance.ROOFLINE,
    )


def _fits(key: str, claim: str, precision: str, device: str, tp: int) -> Claim:
    """Return whether it fits, and what is left to serve with."""
    budget, memory_gb = _budget(precision, device, tp), hardware.find(device).memory_bytes / GB
    return Claim(
        key=key,
        topic="memory",
        claim=claim,
        quoted="fits",
        recomputed=f"{budget.tokens:,} KV tokens are left: {budget.tokens / CONTEXT:.1f} requests of 8K",
        value=float(budget.tokens),
        unit="tokens",
        verdict="holds only if" if budget.fits else "wrong",
        because=f"that is enough for you: {budget.pool_bytes * tp / GB:.1f} GB remain of {tp} x {memory_gb:.0f} GB",
        formula="(memory x 0.9 - weights - activations - communication) / bytes per token",
        provenance=Provenance.CALIBRATED,
    )


def _budget(precision: str, device: str, tp: int) -> models.KvBudget:
    model, gpu = models.find("llama-3-70b"), hardware.find(device)
    return models.kv_budget_tokens(model, gpu, precision=precision, tp=tp, max_seqs=MAX_SEQS, max_step_tokens=MAX_STEP_TOKENS)


def _yes(fits: bool) -> str:
    return "yes" if fits else "no"


CLAIMS = {
    "70b-fp16": _weights_70b,
    "h200-192gb": _h200,
    "kv-8k-52gb": _kv_8k,
    "gqa-saves": _grouped_queries,
    "fp32-one-node": _fp32_one_node,
    "fp16-2xa100": _fp16_two_a100,
    "int8-1xa100": _int8_one_a100,
    "int4-35gb": _int4_consumer,
    "10m-vectors": _vectors,
    "hnsw-100-150gb": _index_overhead,
    "hnsw-o-nm": _index_order,
    "chunk-overlap": _overlap,
}
