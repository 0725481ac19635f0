"""What one device of a layout moves and computes in a step: bytes and FLOPs by operator class, counted from the model's shape.

| class | bytes read | FLOPs | shared by |
|---|---|---|---|
| attention matrices | once a step | per token of the rank | tensor parallelism; copied on each rank of attention DP |
| MLPs, shared experts, router | once a step | per token | all devices |
| experts | of those hit: 1 - (1 - k/E)^tokens | k per token | all devices |
| output head | once a step | per sampled token | all devices |
| KV cache | context, at most window or top k; a state in linear layers | per cached token | KV heads; a latent cache is whole on each |
| prefill attention | | per (query, key) pair | heads |
| activations | PASSES values of the hidden size a layer and token | | ranks of attention DP |

All-reduces: two a layer over the devices of a replica; with data-parallel attention an all-to-all of k hidden values a token instead.
Devices beyond those that one link joins are reached over the network.
"""

from __future__ import annotations

import math

from mlsys_bench import hardware, models
from mlsys_bench.errors import BadInput

PASSES = 12  # times a layer's hidden values are written or read outside the matrix kernels; scaled by a learned coefficient
PCIE_BYTES_PER_S = 25e9  # a PCIe 4.0 x16 slot in one direction, less protocol: where the catalogue knows no link
NETWORK_BYTES_PER_S = 50e9  # 400 Gbit/s for each device, between boards that their own link does not join
NETWORK_ROUNDS = 7  # that one between boards takes as long as: 8.5 against 1.25 us in the table of NCCL's tuning (trees, LL128)
FP8_CACHE = ("trtllm", "sglang", "atom")  # engines that are run with an fp8 cache beside fp8 and fp4 weights; vLLM keeps 16 bit
ROUTED_HIDDEN, ROUTED_INNER = 10, 12  # the same of each copy of a token among experts, in hidden values and in inner ones: `_routed`
SLOWER_READS = {"Ampere": 1.11}  # of matrix kernels, over those of others: 1.23 (A100 and A40 in `proofs/operators.py`) over 1.11
_FORMS = {"fp32": "fp32", "bf16": "bf16", "fp16": "bf16", "fp8": "fp8", "int8": "int8", "fp4": "fp4", "nvfp4": "fp4", "mxfp4": "fp4"}


def shares(
    arch: models.Architecture,
    device: hardware.Device,
    *,
    precision: str,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    moe_tp: int | None = None,
    attention_dp: int = 1,
    engine: str = "vllm",
    kv_precision: str | None = None,
) -> dict[str, float]:
    """Return a device's share of a step, in bytes and FLOPs, with the rates of the device.  Pipeline stages add up, so `pp` adds hops only.

    Raises BadInput for degrees below 1.
    """
    if min(tp, pp, ep, attention_dp) < 1:
        raise BadInput(f"tp {tp}, pp {pp}, ep {ep}, attention dp {attention_dp}: each degree of parallelism is at least 1")
    devices = max(tp * attention_dp, (moe_tp or 1) * ep)
    per_param, kept = models.group_bytes(arch, precision), models.formats(arch, precision)
    bytes_of = dict.fromkeys(("attention", "dense", "experts", "head"), 0.0)
    flops_of = dict(bytes_of)
    for part in models.parts(arch):
        group = {"mlp": "dense", "shared": "dense", "router": "dense"}.get(part.group, part.group)
        if group == "embedding":
            continue
        share = part.share(tp, devices) if group == "attention" else part.share(devices, devices)
        bytes_of[group] += part.total * per_param[part.group] * share
        flops_of[group] += 2.0 * part.active * share / (attention_dp if group == "attention" else 1)
    mlp = kept["shared" if arch.experts else "mlp"]
    kv_precision = kv_precision or kv_format(engine, precision)
    return {
        "devices": float(devices),
        "attention_bytes": bytes_of["attention"],
        "attention_flops_per_token": flops_of["attention"],
        "attention_peak_flops_per_s": _peak(device, kept["attention"]),
        "dense_bytes": bytes_of["dense"],
        "flops_per_token": flops_of["dense"],
        "peak_flops_per_s": _peak(device, mlp),
        "expert_bytes": bytes_of["experts"],
        "expert_flops_per_token": flops_of["experts"],
        "expert_peak_flops_per_s": _peak(device, kept["experts"]),
        "experts": float(arch.experts),
        "experts_per_token": float(arch.experts_per_token),
        "head_bytes": bytes_of["head"],
        "head_flops": flops_of["head"],
        "head_peak_flops_per_s": _peak(device, kept["head"]),
        "bandwidth_bytes_per_s": device.bandwidth_bytes_per_s,
        "slower_reads": SLOWER_READS.get(device.arch, 1.0),
        **_attention(arch, device, precision, kv_precision, tp, attention_dp),
        "activation_bytes_per_token": PASSES * arch.layers * arch.hidden * 2.0 / attention_dp + _routed(arch, devices, ep),
        "attention_dp": float(attention_dp),
        "layers": float(arch.layers),
        "moe_layers": float(arch.moe_layers),
        "expert_per_depth": (2 / arch.hidden + max(devices // ep, 1) / arch.ffn) / 3,
        "latent_layers": float(arch.layers if arch.kv_lora_rank else 0),
        "quantizing": _quantizing(arch, device, precision),
        **_links(arch, device, devices, pp, attention_dp),
    }


def _quantizing(arch: models.Architecture, device: hardware.Device, precision: str) -> float:
    """Return the kernels a step that bring activations into the format of the matrices they meet, where that is 8 or 4 bit.

    Two a layer of each kind: attention multiplies what comes in and what comes out of it, an MLP the hidden values and the inner ones.
    """
    kept = models.formats(arch, precision)
    layers = (
        (kept["attention"], arch.layers),
        (kept["mlp"], arch.dense_layers if arch.experts else arch.layers),
        (kept["shared"], arch.moe_layers if arch.shared_ffn else 0),
        (kept["experts"], arch.moe_layers),
    )
    return 2.0 * sum(count for form, count in layers if _width(_form(device, form)) != "16")


def _routed(arch: models.Architecture, devices: int, ep: int) -> float:
    """Return the bytes of copies of a token on their way through its experts, on one of so many devices.

    Hidden values are read and written when copies are gathered and added up again, read by the first product and written by the second:
    5 times, whole on each device that splits an expert.  Inner values, which those devices share: gate and up written, read, their product
    written and read: 6 times.  Counted twice, for the coefficient `activation` is assumed to be a half.
    """
    hidden, inner = ROUTED_HIDDEN * arch.hidden / ep, ROUTED_INNER * arch.ffn / devices
    return arch.moe_layers * arch.experts_per_token * 2.0 * (hidden + inner)


def kv_format(engine: str, precision: str) -> str | None:
    """Return the format of the KV cache that an engine is run with beside weights of a precision; None: 16 bit."""
    return "fp8" if engine in FP8_CACHE and precision in ("fp8", "fp4") else None


def formats(arch: models.Architecture, device: hardware.Device, precision: str) -> dict[str, str]:
    """Return the number format that each class of matrices is multiplied in on this device: 16, 8 or 4."""
    kept = models.formats(arch, precision)
    names = {"attention": kept["attention"], "dense": kept["shared" if arch.experts else "mlp"], "experts": kept["experts"]}
    return {group: _width(_form(device, name)) for group, name in names.items()}


def _attention(
    arch: models.Architecture, device: hardware.Device, precision: str, kv_precision: str | None, tp: int, attention_dp: int
) -> dict[str, float]:
    """Return the cache and the FLOPs of attention.  Per token of context over all sequences of the replica."""
    value = models.bytes_per_param(kv_precision) if kv_precision else 4.0 if precision == "fp32" else 2.0
    found = dict.fromkeys(
        ("kv_bytes_per_token", "attention_flops_per_pair", "decode_flops_per_pair", "window_kv_bytes_per_token",
         "window_flops_per_pair", "window_tokens", "state_bytes"), 0.0
    )  # fmt: skip
    for kind in models.attention_kinds(arch):
        held = kind.layers * kind.kv_values_per_token * value / min(tp, kind.kv_heads or tp) / attention_dp
        work, heads = kind.layers * kind.flops_per_pair / tp / attention_dp, tp * attention_dp
        found["state_bytes"] += 2.0 * kind.layers * kind.state_bytes / heads  # read and written
        bound = kind.window_tokens or kind.topk
        if bound is None:
            found["kv_bytes_per_token"] += held
            found["attention_flops_per_pair"] += work
            found["decode_flops_per_pair"] += kind.layers * kind.decode_flops_per_pair / heads
            continue
        found["window_tokens"] = float(bound)
        found["window_kv_bytes_per_token"] += held
        found["window_flops_per_pair"] += work
        found["kv_bytes_per_token"] += kind.layers * kind.index_bytes_per_token / attention_dp
        found["attention_flops_per_pair"] += kind.layers * kind.index_flops_per_pair / heads
        found["decode_flops_per_pair"] += kind.layers * kind.index_flops_per_pair / heads
    return found | {"pair_peak_flops_per_s": _peak(device, "fp32" if precision == "fp32" else "bf16")}


def _links(arch: models.Architecture, device: hardware.Device, devices: int, pp: int, attention_dp: int) -> dict[str, float]:
    """Return the rounds of small messages a step waits for, and the bytes a token sends over the link."""
    link = device.interconnect_bytes_per_s or PCIE_BYTES_PER_S
    hidden_bytes, hops = arch.hidden * 2.0, (pp - 1) * arch.hidden * 2.0 / link
    if devices == 1:
        return {"rounds": float(pp - 1), "link_s_per_token": hops, "has_link": float(bool(device.interconnect_bytes_per_s))}
    joined = min(devices, max(device.link_devices, 1)) if device.interconnect_bytes_per_s else devices
    nodes = math.ceil(devices / joined)
    if attention_dp > 1:
        sent = arch.moe_layers * 2 * hidden_bytes * arch.experts_per_token / devices
        far = sent * (nodes - 1) / nodes
        near = sent - far
    else:
        near = 2 * arch.layers * hidden_bytes * 2 * (joined - 1) / joined
        far = 2 * arch.layers * hidden_bytes * 2 * (nodes - 1) / nodes / joined  # each device carries its share of the sum on
    return {
        "rounds": 2 * arch.layers * (math.log2(joined) + NETWORK_ROUNDS * math.log2(nodes)) + pp - 1,
        "link_s_per_token": near / link + far / NETWORK_BYTES_PER_S + hops,
        "has_link": float(bool(device.interconnect_bytes_per_s)),
    }


def _form(device: hardware.Device, kept: str) -> str:
    """Return the format a device computes a stored format in: its own if it has it, else 16 bit (32 on a CPU without them)."""
    wanted = _FORMS.get(kept, "bf16")
    if wanted == "int8" or wanted not in device.flops_per_s:
        wanted = "bf16"  # weight-only: widened first
    return wanted if wanted in device.flops_per_s else "fp16" if "fp16" in device.flops_per_s else "fp32"


def _width(form: str) -> str:
    return {"fp4": "4", "fp8": "8"}.get(form, "16")


def _peak(device: hardware.Device, kept: str) -> float:
    if kept == "fp32" and "fp32" in device.flops_per_s:
        return device.flops_per_s["fp32"]
    return device.flops_per_s[_form(device, kept)]
