"""Evaluate a step profile: its time, its physics floor, its uncertainty, and where it does not apply."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from mlsys_bench.errors import BadInput, NotComparable
from mlsys_bench.latency import kernel
from mlsys_bench.types import LatencyProfile, Layout

FEATURES = ("decode_seqs", "decode_kv_tokens", "prefill_tokens", "prefill_pairs", "sampled_tokens")
Features = Sequence[float]  # the five of FEATURES, in this order; `batching.StepFeatures` is one
SECONDS = ("step_s", "sequence_s", "pack_s", "pass_s", "link_s")  # coefficients that are times
MULTIPLIERS = (
    "weights",
    "linear",
    "attention_linear",
    "head_linear",
    "experts",
    "expert_linear",
    "kv",
    "attention",
    "link",
)  # coefficients that stretch the time at full speed
TERMS = (*SECONDS, *MULTIPLIERS)
NEEDED = ("step_s", "sequence_s", "weights", "linear", "kv", "attention")  # coefficients without which no step has a time
NEEDED_CONSTANTS = (
    "bandwidth_bytes_per_s",
    "peak_flops_per_s",
    "dense_bytes",
    "flops_per_token",
    "head_flops",
    "expert_bytes",
    "experts",
    "experts_per_token",
    "kv_bytes_per_token",
    "attention_flops_per_pair",
)
Array = npt.NDArray[np.float64]


@overload
def step_s(profile: LatencyProfile, features: Sequence[float]) -> float: ...
@overload
def step_s(profile: LatencyProfile, features: Sequence[Array]) -> Array: ...
def step_s(profile: LatencyProfile, features: Sequence[float] | Sequence[Array]) -> float | Array:
    """Return the time of a step in seconds, or of many when the features are arrays."""
    return kernel.seconds(table(profile).tolist(), *features) if _scalar(features) else many(table(profile), features)


def _scalar(features: Sequence[float] | Sequence[Array]) -> bool:
    return all(isinstance(f, float | int | np.number) for f in features)


def many(t: Sequence[Any] | Array, features: Sequence[Any] | Array) -> Array:
    """Return what `kernel.seconds` gives, for arrays of features; the entries of `t` may be arrays beside them."""
    D, K, P, Q, S = (np.asarray(f, dtype=float) for f in features)
    n = D + P
    norm = _norm(t[kernel.NORM])
    if _any(t[kernel.STAIR]):
        stride = np.maximum(t[kernel.STAIR], 1.0)
        padded = (P == 0) & (n > t[kernel.STAIR]) & (n <= t[kernel.STAIR_END]) & (np.asarray(t[kernel.STAIR]) > 0)
        n = np.where(padded, stride * np.ceil(n / stride), n)
    read, compute, head = t[kernel.DENSE_READ], t[kernel.DENSE_FLOPS] * n, t[kernel.HEAD_FLOPS] * S
    if _any(t[kernel.PACK]):
        read = read + t[kernel.PACK] * (n > t[kernel.PACK_TOKENS])
    if _any(t[kernel.PASS]):
        read = read + t[kernel.PASS] * (n > t[kernel.PASS_TOKENS])
    if _any(t[kernel.HEAD_READ]):
        apart = np.asarray(t[kernel.HEAD_READ]) > 0
        busy = roof(read, compute + np.where(apart, 0.0, head), norm)
        busy = busy + np.where(apart & (S > 0), roof(t[kernel.HEAD_READ], head, norm), 0.0)
    else:
        busy = roof(read, compute + head, norm)
    if _any(t[kernel.ATTENTION_READ]):
        busy = busy + roof(t[kernel.ATTENTION_READ], t[kernel.ATTENTION_FLOPS] * n, norm)
    if _any(t[kernel.EXPERT_READ]):
        missed, tile = np.asarray(t[kernel.MISSED]), np.maximum(t[kernel.TILE], 1e-9)
        hit, chosen = 1.0 - missed**n, 1.0 - missed
        with np.errstate(divide="ignore", invalid="ignore"):  # dense layouts, and steps without tokens
            more = 0.5 * tile * hit / chosen * (1.0 + np.exp(-2.0 * n * chosen / (hit * tile)))
        rows = n + np.where((hit > 0) & (chosen > 0), more, 0.0)
        busy = busy + roof(t[kernel.EXPERT_READ] * hit, t[kernel.EXPERT_FLOPS] * rows, norm)
    busy = busy + np.maximum(t[kernel.KV], t[kernel.KV_FLOPS]) * K + t[kernel.PAIR] * Q
    busy = busy + t[kernel.PER_DECODE] * D + t[kernel.PER_TOKEN] * n
    if _any(t[kernel.WINDOW]):
        busy = busy + t[kernel.KV_WINDOW] * np.minimum(K, t[kernel.WINDOW] * D)
        busy = busy + t[kernel.PAIR_WINDOW] * np.minimum(Q, t[kernel.WINDOW] * P)
    return np.asarray(t[kernel.FIXED] + t[kernel.PER_SAMPLE] * S + np.maximum(busy, t[kernel.HIDDEN]))


def _norm(entry: Any) -> Any:
    """Return the norm of `roof`: None where all are sharp, one number where all are alike, else each layout's own."""
    if isinstance(entry, float):
        return entry or None
    return np.asarray(entry) if np.ptp(entry) else float(np.max(entry)) or None


def _any(entry: Any) -> bool:
    """Say whether an entry of a table counts anywhere.  numpy takes 3 µs to look at a plain number, as long as at all the steps."""
    return bool(entry) if isinstance(entry, float) else bool(np.any(entry))


def table(profile: LatencyProfile) -> Array:
    """Return all that `kernel.seconds` needs to time a step, as one array."""
    return np.array(entries(coefficients(profile), profile.constants), dtype=float)


def tables(profiles: Sequence[LatencyProfile]) -> Array:
    """Return the tables of several profiles, one in each column, as `many` takes them."""
    return np.array([entries(coefficients(p), p.constants) for p in profiles], dtype=float).T


def entries(c: Mapping[str, Any], k: Mapping[str, Any]) -> list[Any]:
    """Return the entries of a table: the times at full speed of constants `k`, stretched by terms `c`; floats, or arrays over layouts."""
    t: list[Any] = [0.0] * kernel.SIZE
    bandwidth, peak = k["bandwidth_bytes_per_s"], k["peak_flops_per_s"]
    t[kernel.FIXED] = c["step_s"] + c.get("link_s", 0.0)
    t[kernel.PER_TOKEN] = (
        c.get("link", 0.0) * k.get("link_s_per_token", 0.0)
        + c.get("activation", 0.0) * k.get("activation_bytes_per_token", 0.0) / bandwidth
    )
    t[kernel.PER_SAMPLE] = c["sequence_s"]
    t[kernel.PER_DECODE] = c["kv"] * k.get("state_bytes", 0.0) / bandwidth
    t[kernel.DENSE_READ] = c["weights"] * k["dense_bytes"] / bandwidth
    t[kernel.DENSE_FLOPS] = c["linear"] * k["flops_per_token"] / peak
    t[kernel.HEAD_FLOPS] = c.get("head_linear", c["linear"]) * k["head_flops"] / k.get("head_peak_flops_per_s", peak)
    t[kernel.HEAD_READ] = c["weights"] * k.get("head_bytes", 0.0) / bandwidth
    t[kernel.ATTENTION_READ] = c["weights"] * k.get("attention_bytes", 0.0) / bandwidth
    t[kernel.ATTENTION_FLOPS] = (
        c.get("attention_linear", c["linear"]) * k.get("attention_flops_per_token", 0.0) / k.get("attention_peak_flops_per_s", peak)
    )
    t[kernel.EXPERT_READ] = c.get("experts", c["weights"]) * k["expert_bytes"] / bandwidth
    expert_peak = k.get("expert_peak_flops_per_s", peak)
    t[kernel.EXPERT_FLOPS] = c.get("expert_linear", c["linear"]) * k.get("expert_flops_per_token", 0.0) / expert_peak
    t[kernel.MISSED], t[kernel.TILE] = _missed(k), c.get("expert_tile", 0.0)
    pair_peak = k.get("pair_peak_flops_per_s", peak)
    t[kernel.KV] = c["kv"] * k["kv_bytes_per_token"] / bandwidth
    t[kernel.KV_FLOPS] = c["kv"] * k.get("decode_flops_per_pair", k["attention_flops_per_pair"]) / pair_peak
    t[kernel.PAIR] = c["attention"] * k["attention_flops_per_pair"] / pair_peak
    t[kernel.WINDOW] = k.get("window_tokens", 0.0)
    t[kernel.KV_WINDOW] = c["kv"] * k.get("window_kv_bytes_per_token", 0.0) / bandwidth
    t[kernel.PAIR_WINDOW] = c["attention"] * k.get("window_flops_per_pair", 0.0) / pair_peak
    t[kernel.PACK], t[kernel.PACK_TOKENS] = c.get("pack_s", 0.0), k.get("pack_tokens", 1.0)
    t[kernel.PASS], t[kernel.PASS_TOKENS] = c.get("pass_s", 0.0), k.get("pass_tokens", 1.0)
    t[kernel.NORM] = k.get("roof_norm", 0.0)
    t[kernel.STAIR], t[kernel.STAIR_END] = k.get("graph_stride", 0.0), k.get("graph_end", 0.0)
    t[kernel.HIDDEN] = c.get("hidden_s", 0.0)
    return t


def clock(profile: LatencyProfile) -> Callable[[Features], float]:
    """Return `step_s` of one profile as a fast closure over plain floats, for a simulator's inner loop."""
    values = table(profile).tolist()
    return lambda features: kernel.seconds(values, *features)


@overload
def floor_s(profile: LatencyProfile, features: Sequence[float]) -> float: ...
@overload
def floor_s(profile: LatencyProfile, features: Sequence[Array]) -> Array: ...
def floor_s(profile: LatencyProfile, features: Sequence[float] | Sequence[Array]) -> float | Array:
    """Return the least time physics allows: every byte at full bandwidth or every FLOP at full peak, whichever is longer."""
    D, K, P, Q, S = features
    k = profile.constants
    n, bandwidth, window = D + P, k["bandwidth_bytes_per_s"], k.get("window_tokens", 0.0)
    apart = (k.get("attention_bytes", 0.0) + k.get("head_bytes", 0.0) * np.sign(S)) / bandwidth
    cached = (
        K * k["kv_bytes_per_token"] + np.minimum(K, window * D) * k.get("window_kv_bytes_per_token", 0.0) + D * k.get("state_bytes", 0.0)
    )
    moved_s = weights_s(k, n) + apart + cached / bandwidth
    least_s: float | Array = roof(moved_s, linear_s(k, n, S) + Q * pair_s(k), None)
    return float(least_s) if _scalar(features) else least_s


def check(profile: LatencyProfile) -> LatencyProfile:
    """Return the profile, or raise BadInput where it predicts below its physics floor, cannot time a step, or is no step profile.

    A multiplier below 1 is a speed above the hardware's: some step is then predicted below bytes / bandwidth or FLOPs / peak.
    """
    known = coefficients(profile)
    missing = [name for name in NEEDED if name not in known] + [name for name in NEEDED_CONSTANTS if name not in profile.constants]
    if missing:
        raise BadInput(f"latency profile: has no {' and no '.join(missing)}; no step can be timed without: fit it again")
    _check_layout_counts(profile.layout)
    for name, value in profile.constants.items():
        speed = name.endswith(("bytes_per_s", "flops_per_s"))
        if value < 0 or (speed and value == 0):
            least = "above zero" if speed else "from 0 up"
            raise BadInput(f"latency profile: constant {name} is {value:g}; it must be {least}: fit it again")
    for name, value in known.items():
        if not value > 0.0:
            raise BadInput(f"latency profile: coefficient {name} is {value}; it must be a positive number")
        if name in MULTIPLIERS and value < 1.0 - 1e-9:
            raise BadInput(
                f"latency profile: {name} = {value:.3g} is below its physics floor of 1 (faster than the hardware); fit it again"
            )
    return profile


def _check_layout_counts(layout: Layout) -> None:
    for name in ("tp", "pp", "ep", "attention_dp"):
        if getattr(layout, name) < 1:
            raise BadInput(f"latency profile: layout.{name} is {getattr(layout, name)}; a replica is split over at least 1 device")


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


def roof(memory_s: Any, compute_s: Any, norm: Any) -> Any:
    """Return the longer of two times that overlap, or their p-norm where the change-over is gradual; 0 or None stands for no norm."""
    scalar = isinstance(memory_s, float | int) and isinstance(compute_s, float | int)
    high = max(memory_s, compute_s) if scalar else np.maximum(memory_s, compute_s)
    if norm is None:
        return high
    low = min(memory_s, compute_s) if scalar else np.minimum(memory_s, compute_s)
    ratio = low / max(high, 1e-300) if scalar else low / np.maximum(high, 1e-300)
    if isinstance(norm, np.ndarray):
        p = np.maximum(norm, 1.0)
        return np.where(norm > 0, high * (1.0 + ratio**p) ** (1.0 / p), high)
    return high * (1.0 + ratio**norm) ** (1.0 / norm)


def weights_s(constants: dict[str, float], tokens: Any) -> Any:
    """Return the time to read the weights a step of so many tokens touches, at full bandwidth."""
    touched = constants["dense_bytes"]
    if constants["expert_bytes"]:
        touched = touched + constants["expert_bytes"] * (1.0 - _missed(constants) ** tokens)
    return touched / constants["bandwidth_bytes_per_s"]


def linear_s(constants: dict[str, float], tokens: Any, sampled: Any) -> Any:
    """Return the time of all matrix products, experts' and the output head's among them, at full peak."""
    peak = constants["peak_flops_per_s"]
    of_token_s = constants["flops_per_token"] / peak
    for group in ("attention", "expert"):
        of_token_s += constants.get(f"{group}_flops_per_token", 0.0) / constants.get(f"{group}_peak_flops_per_s", peak)
    return tokens * of_token_s + sampled * constants["head_flops"] / constants.get("head_peak_flops_per_s", peak)


def pair_s(constants: dict[str, float]) -> float:
    """Return the time of attention's FLOPs per (query, key) pair at full peak."""
    return constants["attention_flops_per_pair"] / constants.get("pair_peak_flops_per_s", constants["peak_flops_per_s"])


def _missed(constants: Mapping[str, Any]) -> Any:
    """Return the chance that one token leaves a given expert untouched; 0 for a dense model."""
    if isinstance(constants["experts"], float):
        return 1.0 - constants["experts_per_token"] / constants["experts"] if constants["experts"] > 0 else 0.0
    return np.where(np.asarray(constants["experts"]) > 0, 1.0 - constants["experts_per_token"] / np.maximum(constants["experts"], 1.0), 0.0)
