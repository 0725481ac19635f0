"""Rotary position embedding: by which angle a pair of dimensions turns per position, and how long contexts stretch it.

| kind | angle per position | source |
|---|---|---|
| default | theta^(-2i/d) | Su et al. (2021), arXiv 2104.09864 |
| linear | the same / factor | Chen et al. (2023), arXiv 2306.15595 |
| dynamic | as default up to the trained context; beyond it angles would depend on the length, and the engine refuses such contexts | |
| llama3 | long waves / factor, short ones as they are, a ramp between | the Llama 3.1 release |
| yarn | the same by turns within the trained context, and a factor on cos and sin | Peng et al. (2023), arXiv 2309.00071 |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from mlsys_bench import errors
from mlsys_bench.errors import BadInput

Kind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """How positions turn queries and keys.  `dim` of a head's dimensions turn, the first ones; pair i is (i, i + dim / 2)."""

    dim: int
    theta: float = 10_000.0
    kind: Kind = "default"
    factor: float = 1.0
    trained_context: int = 0  # llama3 and yarn: the context before it was stretched
    low_freq: float = 1.0  # llama3: waves longer than trained_context / low_freq are stretched whole
    high_freq: float = 4.0  # llama3: waves shorter than trained_context / high_freq are not
    beta_fast: float = 32.0  # yarn: pairs with more turns than this in the trained context keep their angle
    beta_slow: float = 1.0  # yarn: pairs with fewer turns than this are stretched whole
    truncate: bool = True  # yarn: the ramp begins and ends at whole pairs
    amplitude: float = 1.0  # cos and sin are multiplied by it

    def angles(self) -> npt.NDArray[np.float64]:
        """Return the angle per position of each pair, [dim / 2]."""
        plain = self.theta ** -(np.arange(0, self.dim, 2) / self.dim)
        if self.kind == "linear":
            return np.asarray(plain / self.factor)
        if self.kind == "llama3":
            return _mix(plain, self.factor, self._llama3_kept(plain))
        if self.kind == "yarn":
            return _mix(plain, self.factor, self._yarn_kept())
        return np.asarray(plain)

    def tables(self, positions: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return cos and sin, [positions, dim / 2] each, amplitude included."""
        angle = np.outer(np.arange(positions), self.angles())
        return (self.amplitude * np.cos(angle)).astype(np.float32), (self.amplitude * np.sin(angle)).astype(np.float32)

    def _llama3_kept(self, plain: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        turns = self.trained_context * plain / (2 * math.pi)
        return np.asarray(np.clip((turns - self.low_freq) / (self.high_freq - self.low_freq), 0, 1))

    def _yarn_kept(self) -> npt.NDArray[np.float64]:
        def pair_with(turns: float) -> float:
            return self.dim * math.log(self.trained_context / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = pair_with(self.beta_fast), pair_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        return np.asarray(1 - np.clip((np.arange(self.dim // 2) - low) / max(high - low, 1e-3), 0, 1))


def of_parameters(keys: Mapping[str, Any], *, head_dim: int, theta: float, share: float, context: int, where: str) -> Rope:
    """Return the rope of a config's `rope_parameters` or `rope_scaling`.  Raises BadInput for a kind that is not computed.

    theta, share: what holds where `keys` do not say (share: the part of a head that turns); context: of the model as it is published.
    """
    theta, share = float(keys.get("rope_theta") or theta), float(keys.get("partial_rotary_factor") or share)
    kind = str(keys.get("rope_type") or keys.get("type") or "default")
    if kind not in get_args(Kind):
        raise errors.unknown(f"{where}: rope_type", kind, get_args(Kind))
    rope = Rope(dim=int(head_dim * share), theta=theta, kind=kind)  # type: ignore[arg-type]
    return rope if kind in ("default", "dynamic") else _stretched(rope, keys, context, where)


def _stretched(rope: Rope, keys: Mapping[str, Any], context: int, where: str) -> Rope:
    def number(key: str, default: float | None = None) -> float:
        value = keys.get(key) if keys.get(key) is not None else default
        if not isinstance(value, int | float) or value <= 0:
            raise BadInput(f"{where}: {key} is {value!r}; rope_type {rope.kind} needs a positive number")
        return float(value)

    trained = int(number("original_max_position_embeddings", context)) if rope.kind != "linear" else 0
    factor = number("factor", context / trained if trained else None)
    common: dict[str, Any] = {"dim": rope.dim, "theta": rope.theta, "kind": rope.kind, "factor": factor, "trained_context": trained}
    if rope.kind == "llama3":
        return Rope(**common, low_freq=number("low_freq_factor", 1.0), high_freq=number("high_freq_factor", 4.0))
    if rope.kind == "linear":
        return Rope(**common)
    return Rope(
        **common, beta_fast=number("beta_fast", 32.0), beta_slow=number("beta_slow", 1.0), truncate=bool(keys.get("truncate", True)),
        amplitude=number("attention_factor", _yarn_amplitude(factor, keys.get("mscale"), keys.get("mscale_all_dim"))),
    )  # fmt: skip


def _yarn_amplitude(factor: float, mscale: float | None, mscale_all: float | None) -> float:
    """Return 0.1 ln(factor) + 1, the paper's eq. 22; DeepSeek's configs give two coefficients, whose ratio counts."""

    def grown(coefficient: float) -> float:
        return 0.1 * coefficient * math.log(factor) + 1.0 if factor > 1 else 1.0

    return grown(mscale) / grown(mscale_all) if mscale and mscale_all else grown(1.0)


def _mix(plain: npt.NDArray[np.float64], factor: float, kept: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return kept * plain + (1 - kept) * plain / factor."""
    return np.asarray(plain * (kept + (1 - kept) / factor))
