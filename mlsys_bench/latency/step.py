"""Evaluate a step profile: its time, its physics floor, its uncertainty, and where it does not apply."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from mlsys_bench.errors import BadInput, NotComparable
from mlsys_bench.types import LatencyProfile, Layout

FEATURES = ("decode_seqs", "decode_kv_tokens", "prefill_tokens", "prefill_pairs", "sampled_tokens")
Features = Sequence[float]  # the five of FEATURES, in this order; `batching.StepFeatures` is one
SECONDS = ("step_s", "sequence_s", "pack_s", "link_s")  # coefficients that are times
MULTIPLIERS = ("weights", "linear", "kv", "attention", "link")  # coefficients that stretch the time at full speed
TERMS = (*SECONDS, *MULTIPLIERS)
Array = npt.NDArray[np.float64]


@overload
def step_s(profile: LatencyProfile, features: Sequence[float]) -> float: ...
@overload
def step_s(profile: LatencyProfile, features: Sequence[Array]) -> Array: ...
def step_s(profile: LatencyProfile, features: Sequence[float] | Sequence[Array]) -> float | Array:
    """Return the time of a step in seconds, or of many when the features are arrays."""
    D, K, P, Q, S = features
    c = coefficients(profile)
    k = profile.constants
    tokens = D + P
    memory_s = c["weights"] * weights_s(k, tokens)
    if "pack_s" in c:
        memory_s = memory_s + c["pack_s"] * packed(k, tokens)
    compute_s = c["linear"] * linear_s(k, tokens, S)
    link_s = c.get("link_s", 0.0) + c.get("link", 0.0) * tokens * k.get("link_s_per_token", 0.0)
    host_s = c["step_s"] + c["sequence_s"] * S
    matrices_s: float | Array = roof(memory_s, compute_s, k.get("roof_norm"))
    return host_s + matrices_s + c["kv"] * K * kv_s(k) + c["attention"] * Q * pair_s(k) + link_s


def clock(profile: LatencyProfile) -> Callable[[Features], float]:
    """Return `step_s` of one profile as a fast closure over plain floats, for a simulator's inner loop."""
    c, k = coefficients(profile), profile.constants
    link_per_token = c.get("link", 0.0) * k.get("link_s_per_token", 0.0)
    fixed = c["step_s"] + c.get("link_s", 0.0)
    per_sequence, per_kv, per_pair = c["sequence_s"], c["kv"] * kv_s(k), c["attention"] * pair_s(k)
    pack, pack_tokens = c.get("pack_s", 0.0), k.get("pack_tokens", 1.0)
    dense = c["weights"] * k["dense_bytes"] / k["bandwidth_bytes_per_s"]
    expert = c["weights"] * k["expert_bytes"] / k["bandwidth_bytes_per_s"]
    missed = _missed(k)
    per_token = c["linear"] * k["flops_per_token"] / k["peak_flops_per_s"]
    per_head = c["linear"] * k["head_flops"] / k["peak_flops_per_s"]
    norm = k.get("roof_norm")

    def seconds(features: Features) -> float:
        D, K, P, Q, S = features
        tokens = D + P
        low = dense + expert * (1.0 - missed**tokens)
        if pack:
            low += pack * -math.expm1(-((tokens / pack_tokens) ** 4))
        high = per_token * tokens + per_head * S
        if low > high:
            low, high = high, low
        if norm is not None and high > 0.0:
            high *= (1.0 + (low / high) ** norm) ** (1.0 / norm)
        return fixed + link_per_token * tokens + per_sequence * S + high + per_kv * K + per_pair * Q

    return seconds


@overload
def floor_s(profile: LatencyProfile, features: Sequence[float]) -> float: ...
@overload
def floor_s(profile: LatencyProfile, features: Sequence[Array]) -> Array: ...
def floor_s(profile: LatencyProfile, features: Sequence[float] | Sequence[Array]) -> float | Array:
    """Return the least time physics allows: every byte at full bandwidth or every FLOP at full peak, whichever is longer."""
    D, K, P, Q, S = features
    k = profile.constants
    moved_s = weights_s(k, D + P) + K * k["kv_bytes_per_token"] / k["bandwidth_bytes_per_s"]
    computed_s = linear_s(k, D + P, S) + Q * pair_s(k)
    least_s: float | Array = roof(moved_s, computed_s, None)
    return least_s


def check(profile: LatencyProfile) -> LatencyProfile:
    """Return the profile, or raise BadInput where it predicts below its physics floor or is no step profile.

    A multiplier below 1 is a speed above the hardware's: some step is then predicted below bytes / bandwidth or FLOPs / peak.
    """
    for name, value in coefficients(profile).items():
        if not value > 0.0:
            raise BadInput(f"latency profile: coefficient {name} is {value}; it must be a positive number")
        if name in MULTIPLIERS and value < 1.0 - 1e-9:
            raise BadInput(
                f"latency profile: {name} = {value:.3g} is below its physics floor of 1 (faster than the hardware); fit it again"
            )
    return profile


def draw(profile: LatencyProfile, rng: np.random.Generator) -> LatencyProfile:
    """Return a profile with coefficients drawn from their uncertainty: exp of a normal law, never below the physics floor."""
    logs = rng.multivariate_normal(np.log(profile.coefficients), np.asarray(profile.covariance), method="eigh")
    drawn = [max(1.0, float(v)) if name in MULTIPLIERS else float(v) for name, v in zip(profile.terms, np.exp(logs), strict=True)]
    return dataclasses.replace(profile, coefficients=tuple(drawn))


def check_layout(profile: LatencyProfile, layout: Layout) -> None:
    """Raise NotComparable, naming what differs, when the profile belongs to another layout."""
    ours, theirs = dataclasses.asdict(profile.layout), dataclasses.asdict(layout)
    differ = [f"{name} {ours[name]} against {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    if differ:
        raise NotComparable(
            f"the latency profile is of another layout: {', '.join(differ)}; measure and fit this one (mlsys bench gpu, mlsys fit)"
        )


def outside(profile: LatencyProfile, features: Features) -> list[str]:
    """Return one warning for each feature beyond the range the profile was measured in."""
    found = []
    for name, value in zip(FEATURES, features, strict=True):
        low, high = profile.valid.get(name, (0.0, float("inf")))
        if not low - 1e-9 <= value <= high + 1e-9:
            found.append(f"{name} = {value:,.0f} is outside the measured {low:,.0f} to {high:,.0f}: extrapolated")
    return found


# ---------------------------------------------------------------- the parts


def coefficients(profile: LatencyProfile) -> dict[str, float]:
    """Return the coefficients by name.  Raises BadInput for a profile of requests instead of steps."""
    if profile.form != "step":
        raise BadInput(f"a latency profile of form 'step' is needed here, this one is {profile.form!r}")
    return dict(zip(profile.terms, profile.coefficients, strict=True))


def roof(memory_s: Any, compute_s: Any, norm: float | None) -> Any:
    """Return the longer of two times that overlap, or their p-norm where the change-over is gradual."""
    scalar = isinstance(memory_s, float | int) and isinstance(compute_s, float | int)
    high = max(memory_s, compute_s) if scalar else np.maximum(memory_s, compute_s)
    if norm is None:
        return high
    low = min(memory_s, compute_s) if scalar else np.minimum(memory_s, compute_s)
    return high * (1.0 + (low / high) ** norm) ** (1.0 / norm)


def weights_s(constants: dict[str, float], tokens: Any) -> Any:
    """Return the time to read the weights a step of so many tokens touches, at full bandwidth."""
    touched = constants["dense_bytes"]
    if constants["expert_bytes"]:
        touched = touched + constants["expert_bytes"] * (1.0 - _missed(constants) ** tokens)
    return touched / constants["bandwidth_bytes_per_s"]


def packed(constants: dict[str, float], tokens: Any) -> Any:
    """Return how far a step has left the kernels for a few tokens: 0 well below `pack_tokens`, 1 well above."""
    return -np.expm1(-((np.asarray(tokens, dtype=float) / constants.get("pack_tokens", 1.0)) ** 4))


def linear_s(constants: dict[str, float], tokens: Any, sampled: Any) -> Any:
    """Return the time of the matrix products and of the output head at full peak."""
    return (tokens * constants["flops_per_token"] + sampled * constants["head_flops"]) / constants["peak_flops_per_s"]


def kv_s(constants: dict[str, float]) -> float:
    """Return the time decode attention takes per cached token at full speed: reading it, or its FLOPs."""
    read_s = constants["kv_bytes_per_token"] / constants["bandwidth_bytes_per_s"]
    return max(read_s, pair_s(constants))


def pair_s(constants: dict[str, float]) -> float:
    """Return the time of attention's FLOPs per (query, key) pair at full peak."""
    return constants["attention_flops_per_pair"] / constants["peak_flops_per_s"]


def _missed(constants: dict[str, float]) -> float:
    """Return the chance that one token leaves a given expert untouched; 0 for a dense model."""
    experts = constants["experts"]
    return 1.0 - constants["experts_per_token"] / experts if experts else 0.0
