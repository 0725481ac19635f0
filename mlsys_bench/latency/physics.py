"""A latency profile for hardware nobody measured: physics of two catalogue entries, and coefficients learned on other hardware.

`coefficients.LEARNED` names the coefficients, `data/coefficients.json` holds their values and the spread between models and GPUs that
measured rows showed.  `predict.learn` narrows both as soon as one point of this hardware is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Required, TypedDict

import numpy as np
import numpy.typing as npt

from mlsys_bench import hardware, models
from mlsys_bench.errors import BadInput
from mlsys_bench.latency import coefficients, step, ways
from mlsys_bench.latency.shares import formats, shares
from mlsys_bench.types import LatencyProfile, Layout, Provenance

_NUDGE = 1e-4  # of a log-coefficient, for slopes
RESIDUAL_LOG_SD = 0.05  # of the form itself, beside its coefficients
Array = npt.NDArray[np.float64]


def roofline(
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
) -> LatencyProfile:
    """Return the step profile that physics and the coefficients learned on other hardware give one replica.

    Raises BadInput for a precision the device cannot compute in.  A model nobody measured on a known GPU is off by 3 % on average, a
    GPU nobody measured by 7 % (`docs/predictions.md`); the interval says so.
    """
    spread = Spread(precision=precision, tp=tp, pp=pp, ep=ep, moe_tp=moe_tp, attention_dp=attention_dp, engine=engine)
    (found,) = rooflines(arch, [(device, spread)])
    return found


class Spread(TypedDict, total=False):
    """How a replica is spread over devices: the arguments of `roofline`."""

    precision: Required[str]
    tp: int
    pp: int
    ep: int
    moe_tp: int | None
    attention_dp: int
    engine: str


def rooflines(arch: models.Architecture, wanted: Sequence[tuple[hardware.Device, Spread]]) -> list[LatencyProfile]:
    """Return the profiles of several layouts of one model, as `roofline` gives each: hundreds in the time of some ten one by one."""
    if not wanted:
        return []
    for device, spread in wanted:
        hardware.compute_flops_per_s(device, spread["precision"])
    constants = [layout_constants(arch, device, **spread) for device, spread in wanted]
    logs, own = coefficients.learned_log(), np.diag(coefficients.spread_log() ** 2)
    found, slopes = _terms_and_slopes(logs, {name: np.array([k[name] for k in constants])[:, None] for name in constants[0]})
    values = np.array(list(found.values())).T.tolist()
    outside = ways.constants(logs, coefficients.spread_log())
    return [
        _profile(arch, device, spread, dict(zip(found, own_values, strict=True)), slope @ own @ slope.T, k | outside)
        for (device, spread), own_values, slope, k in zip(wanted, values, slopes, constants, strict=True)
    ]


def _profile(
    arch: models.Architecture, device: hardware.Device, spread: Spread, found: dict[str, float], covariance: Array, k: dict[str, float]
) -> LatencyProfile:
    degrees = {name: spread.get(name, 1) for name in ("tp", "pp", "ep", "attention_dp")}
    return LatencyProfile(
        form="step",
        layout=Layout(model=arch.id, precision=spread["precision"], device=device.id, **degrees),  # type: ignore[arg-type]
        stage=None,
        terms=tuple(found),
        coefficients=tuple(found.values()),
        covariance=tuple(map(tuple, covariance.tolist())),
        constants=k,
        residual_log_sd=RESIDUAL_LOG_SD,
        valid={},
        provenance=Provenance.ROOFLINE,
        note=_note(device, int(k["devices"]), found),
    )


def layout_constants(
    arch: models.Architecture, device: hardware.Device, *, precision: str, sorts_vocabulary: bool = False, **spread: Any
) -> dict[str, float]:
    """Return the constants of a layout's profile.  `sorts_vocabulary`: sampling with top-p or top-k by an engine that sorts for it."""
    found = shares(arch, device, precision=precision, **spread)
    sampler_s = coefficients.SAMPLER_S * arch.vocab / device.bandwidth_bytes_per_s if sorts_vocabulary else 0.0
    kinds = coefficients.indicators(formats(arch, device, precision))
    return found | kinds | {"sampler_s": sampler_s, "roof_norm": coefficients.ROOF_NORM}


def terms_of(logs: Array, k: dict[str, float]) -> tuple[dict[str, float], Array]:
    """Return a layout's terms, none below its floor, and the derivatives of their logarithms by the log-coefficients."""
    found, slopes = _terms_and_slopes(logs, k)
    return {name: float(v) for name, v in found.items()}, slopes


def _terms_and_slopes(logs: Array, k: Mapping[str, Any]) -> tuple[dict[str, Array], Array]:
    """Return the same of one layout, or of several where constants are columns: slopes are then [layouts, terms, log-coefficients]."""
    moved = np.vstack([logs, logs + _NUDGE * np.eye(len(logs))])  # the point, and one step along each coefficient
    found = coefficients.floored(coefficients.terms(dict(zip(coefficients.NAMES, np.exp(moved).T, strict=True)), k), step.MULTIPLIERS)
    shape = np.broadcast_shapes(*(np.shape(v) for v in found.values()))
    values = np.array([np.broadcast_to(v, shape) for v in found.values()])
    rise = np.moveaxis(np.log(values), 0, -2)
    return dict(zip(found, values[..., 0], strict=True)), (rise[..., 1:] - rise[..., :1]) / _NUDGE


def constants_of(arch: models.Architecture, precision: str, tp: int = 1) -> dict[str, float]:
    """Return the bytes and FLOPs of one device's share of a step, as `step` reads them."""
    if tp < 1:
        raise BadInput(f"tp is {tp}; tensor parallelism takes at least 1 device")
    one, all_experts = (models.step_weight_bytes(arch, precision, tokens) for tokens in (1, math.inf))
    expert_bytes = (all_experts - one) / (1 - arch.experts_per_token / arch.experts) if arch.experts > arch.experts_per_token else 0.0
    expert_flops = 2.0 * sum(part.active for part in models.parts(arch) if part.group == "experts") if expert_bytes else 0.0
    kv_shards = min(tp, arch.kv_heads) if not arch.attention.startswith("mla") else 1  # a latent cache is held whole on every device
    return {
        "dense_bytes": (all_experts - expert_bytes) / tp,
        "expert_bytes": expert_bytes / tp,
        "experts": float(arch.experts),
        "experts_per_token": float(arch.experts_per_token),
        "flops_per_token": (models.linear_flops_per_token(arch) - expert_flops) / tp,
        "expert_flops_per_token": expert_flops / tp,
        "head_flops": models.head_flops(arch) / tp,
        "kv_bytes_per_token": models.kv_bytes_per_token(arch, precision) / kv_shards,
        "attention_flops_per_pair": models.attention_flops_per_pair(arch) / tp,
    }


def _note(device: hardware.Device, devices: int, found: dict[str, float]) -> str:
    read, link = (
        f"weights at {100 / found['weights']:.0f} % of bandwidth",
        "its link" if device.interconnect_bytes_per_s else "PCIe 4.0 x16",
    )
    note = f"coefficients learned on other hardware: {read}, {1e3 * found['step_s']:.1f} ms a step beside bytes and FLOPs"
    return note if devices == 1 else f"{note}; all-reduce over {link}" + ("" if device.interconnect_bytes_per_s else ", assumed")
