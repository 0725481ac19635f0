"""A latency profile for hardware nobody measured: physics of two catalogue entries, and efficiencies that are assumed.

What is assumed, as central value and relative sd (the sd of its logarithm), and what it leans on:

| coefficient | value | sd | leans on |
|---|---|---|---|
| `weights`   | 1 / 0.75 | 0.20 | published batch-1 decode: 37-78 % of peak bandwidth on datacentre GPUs, to 97 % on others |
| `linear`    | 1 / 0.60 | 0.20 | large bf16 products reach 60-75 % of the dense peak that vendors state; serving-sized ones less |
| `kv`        | 1 / 0.60 | 0.30 | paged reads are shorter than weight reads |
| `attention` | 1 / 0.40 | 0.30 | fused attention reaches 35-75 % of peak in prefill |
| `step_s`    | 0.3 ms + 20 µs a layer | 0.40 | launches and Python of a serving engine, partly hidden by CUDA graphs |
| `sequence_s`| 10 µs | 0.50 | sampling, detokenizing and scheduling on the host |
| `link_s`    | 2 all-reduces a layer of 10 µs | 0.40 | alpha of an alpha-beta law; 25 µs without NVLink |
| `link`      | 1 / 0.70 | 0.25 | beta: a ring moves 2 (tp - 1) / tp of the message at 70 % of the link |
"""

from __future__ import annotations

import math

import numpy as np

from mlsys_bench import hardware, models
from mlsys_bench.errors import BadInput
from mlsys_bench.types import LatencyProfile, Layout, Provenance

_ASSUMED = {"weights": (1 / 0.75, 0.20), "linear": (1 / 0.60, 0.20), "kv": (1 / 0.60, 0.30), "attention": (1 / 0.40, 0.30)}
_STEP_S, _LAYER_S, _STEP_SD = 0.3e-3, 20e-6, 0.40
_SEQUENCE_S, _SEQUENCE_SD = 10e-6, 0.50
_ALPHA_S, _ALPHA_WITHOUT_LINK_S, _ALPHA_SD = 10e-6, 25e-6, 0.40
_LINK, _LINK_SD = 1 / 0.70, 0.25
_PCIE_BYTES_PER_S = 25e9  # a PCIe 4.0 x16 slot in one direction, less protocol: where the catalogue knows no link
RESIDUAL_LOG_SD = 0.15  # of the form itself, beside its coefficients


def roofline(arch: models.Architecture, device: hardware.Device, *, precision: str, tp: int = 1) -> LatencyProfile:
    """Return the step profile that physics and assumed efficiencies give one replica of `tp` devices.

    Good to about a factor of 1.5 before anything was measured; the interval says so.
    """
    assumed = {**_host(arch), **_ASSUMED, **(_link(arch, device) if tp > 1 else {})}
    constants = constants_of(arch, precision, tp) | {
        "bandwidth_bytes_per_s": device.bandwidth_bytes_per_s,
        "peak_flops_per_s": hardware.compute_flops_per_s(device, precision),
    }
    if tp > 1:
        constants["link_s_per_token"] = _link_s_per_token(arch, device, tp)
    return LatencyProfile(
        form="step",
        layout=Layout(model=arch.id, precision=precision, device=device.id, tp=tp),
        stage=None,
        terms=tuple(assumed),
        coefficients=tuple(value for value, _ in assumed.values()),
        covariance=_diagonal([sd for _, sd in assumed.values()]),
        constants=constants,
        residual_log_sd=RESIDUAL_LOG_SD,
        valid={},
        provenance=Provenance.ROOFLINE,
        note=_note(device, tp),
    )


def constants_of(arch: models.Architecture, precision: str, tp: int = 1) -> dict[str, float]:
    """Return the bytes and FLOPs of one device's share of a step, as `step` reads them."""
    if tp < 1:
        raise BadInput(f"tp is {tp}; tensor parallelism takes at least 1 device")
    one, all_experts = (models.step_weight_bytes(arch, precision, tokens) for tokens in (1, math.inf))
    expert_bytes = (all_experts - one) / (1 - arch.experts_per_token / arch.experts) if arch.experts > arch.experts_per_token else 0.0
    kv_shards = min(tp, arch.kv_heads) if not arch.attention.startswith("mla") else 1  # a latent cache is held whole on every device
    return {
        "dense_bytes": (all_experts - expert_bytes) / tp,
        "expert_bytes": expert_bytes / tp,
        "experts": float(arch.experts),
        "experts_per_token": float(arch.experts_per_token),
        "flops_per_token": models.linear_flops_per_token(arch) / tp,
        "head_flops": models.head_flops(arch) / tp,
        "kv_bytes_per_token": models.kv_bytes_per_token(arch, precision) / kv_shards,
        "attention_flops_per_pair": models.attention_flops_per_pair(arch) / tp,
    }


def _host(arch: models.Architecture) -> dict[str, tuple[float, float]]:
    return {"step_s": (_STEP_S + _LAYER_S * arch.layers, _STEP_SD), "sequence_s": (_SEQUENCE_S, _SEQUENCE_SD)}


def _link(arch: models.Architecture, device: hardware.Device) -> dict[str, tuple[float, float]]:
    alpha_s = _ALPHA_S if device.interconnect_bytes_per_s else _ALPHA_WITHOUT_LINK_S
    return {"link_s": (2 * arch.layers * alpha_s, _ALPHA_SD), "link": (_LINK, _LINK_SD)}


def _link_s_per_token(arch: models.Architecture, device: hardware.Device, tp: int) -> float:
    """Return what one token's two all-reduces a layer take at full link speed: hidden values of 2 bytes, 2 (tp - 1) / tp of them sent."""
    sent_bytes = 2 * arch.layers * arch.hidden * 2 * 2 * (tp - 1) / tp
    return sent_bytes / (device.interconnect_bytes_per_s or _PCIE_BYTES_PER_S)


def _diagonal(sds: list[float]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in np.diag(np.square(sds)).tolist())


def _note(device: hardware.Device, tp: int) -> str:
    note = "assumed efficiencies: 75 % of bandwidth, 60 % of peak FLOP/s (40 % in attention), 0.3 ms + 20 µs a layer on the host"
    if tp == 1:
        return note
    link = "its link at 70 %" if device.interconnect_bytes_per_s else "a PCIe 4.0 x16 link at 70 % (the catalogue knows none)"
    return f"{note}; assumed all-reduce: 2 a layer, {'10' if device.interconnect_bytes_per_s else '25'} µs each, over {link}"
