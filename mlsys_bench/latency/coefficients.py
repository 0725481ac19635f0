"""The coefficients that all layouts share, and the terms of one layout's profile that follow from them.

A step's time is a sum over operator classes of max(bytes / bandwidth, FLOPs / peak), smoothed, each stretched by a coefficient; then what
launches, collectives and the host take.  `LEARNED` names them with what is assumed before anything was measured: a central value and the
sd of its logarithm.  `data/coefficients.json` holds what measured rows made of them (`proofs/learn.py` writes it).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsys_bench import resources

Array = npt.NDArray[np.float64]
OPEN, CLOSED = "open", "closed"  # loads whose rows are learned from apart: their clients differ in more than a coefficient can say

ROOF_NORM = 1.4  # max(a, b) is smoothed to (a^p + b^p)^(1/p): reads and products overlap in part; fitted by `proofs/operators.py`

LEARNED: dict[str, tuple[float, float]] = {
    "memory": (1.11, 0.20),  # time of reading weights over bytes / bandwidth: a plain copy's, 0.90 of it; `shares.SLOWER_READS` beside
    "kv": (1.4, 0.40),  # the same of the cache: paged, shorter reads
    "compute16": (1.37, 0.30),  # matrix products over FLOPs / peak; 1.41 and 1.34 there
    "compute8": (1.8, 0.40),  # the same in 8 bit
    "compute4": (2.2, 0.50),  # the same in 4 bit
    "attention": (2.5, 0.50),  # prefill attention over FLOPs / 16-bit peak
    "activation": (0.5, 0.60),  # reads and writes outside matrix kernels, in units of `shares.PASSES`
    "expert_memory": (1.0, 0.30),  # experts over other weights: fewer bytes a kernel, but uneven routing hits fewer of them
    "expert_compute": (1.5, 0.40),  # of experts over other matrix products: many smaller ones, uneven
    "expert_depth": (512.0, 0.70),  # what start and end of a tile cost, in values of the dimension that its product sums over
    "expert_tile": (32.0, 0.70),  # rows that a hit expert's products are padded to: trtllm-gen 8 to 128, Triton 16 to 128, DeepGEMM 64
    "expert_tile16": (16.0, 0.70),  # the same where products are in 16 bit: 8 to 64 in Marlin
    "layer_s": (25e-6, 0.50),  # a layer's kernels that neither bytes nor FLOPs explain
    "moe_layer_s": (30e-6, 0.70),  # routing, sorting, combining
    "latent_layer_s": (15e-6, 0.70),  # the more kernels of latent attention (MLA): down and up projections, products with absorbed weights
    "quantize_s": (4e-6, 0.70),  # a kernel that brings activations into 8 or 4 bit: published 2 to 7 µs (`docs/adr/0040`)
    "round_s": (6e-6, 0.60),  # one round of a small collective
    "link": (1.5, 0.60),  # the bytes of collectives over the link's rate
    "step_s": (0.4e-3, 0.70),  # host, per step
    "sequence_s": (4e-6, 0.80),  # host and sampling, per sequence
    "sampler": (1.0, 0.50),  # sorting the vocabulary for top-p or top-k, in ms per 100,000 entries
    "first_s": (8e-3, 0.80),  # per request outside the engine: HTTP, tokenizer, way to the client
    "prompt_token_s": (2e-6, 0.80),  # per prompt token outside the engine: tokenizer, body of the request
    "client_s": (15e-3, 1.00),  # per request of a closed loop: until a client that was answered has its next one there
    "wait_steps": (1.5, 0.50),  # steps that pass before a new request's own begins: half a running one, and one planned already
    "uncached": (0.05, 1.00),  # share of a prompt that prefix caching leaves to compute, where prompts are repeated: a last block
    "draft_tokens": (2.5, 0.20),  # tokens a step brings a sequence with three proposed
    "transfer_s": (60e-3, 1.0),  # per request between prefill and decode pool
}
NAMES = tuple(LEARNED)
ASSUMED_LOG = np.log([value for value, _ in LEARNED.values()])
ASSUMED_SD = np.array([sd for _, sd in LEARNED.values()])
SAMPLER_S = 1e-3 / 1e5 * 3.35e12  # `sampler` 1: 1 ms per 100,000 entries at 3.35 TB/s; sorting is bound by memory


@functools.cache
def stored() -> dict[str, dict[str, dict[str, float]]]:
    """Return what was learned from published measurements, by load: `coefficients` and the `scales` of `predict.field`."""
    with resources.catalogue("coefficients.json").open(encoding="utf-8") as file:
        found: dict[str, dict[str, dict[str, float]]] = json.load(file)["loads"]
    return found


def learned_log(load: str = OPEN) -> Array:
    """Return the logarithms of the learned coefficients, in the order of `NAMES`."""
    return np.log([stored()[load]["coefficients"][name] for name in NAMES])


def spread_log(load: str = OPEN) -> Array:
    """Return the sd of the logarithms for hardware and models nobody measured: what they have with all others, and what is their own."""
    scales = stored()[load]["scales"]
    own = [value for name, value in scales.items() if not name.startswith(("smooth", "per", "noise", "ttft"))]
    return np.asarray(ASSUMED_SD * float(np.sqrt(np.sum(np.square(own)))))


def floored(found: Mapping[str, Any], multipliers: tuple[str, ...]) -> dict[str, Any]:
    """Return the terms with no multiplier below 1: nothing is faster than the hardware."""
    return {name: np.maximum(value, 1.0) if name in multipliers else value for name, value in found.items()}


def terms(c: Mapping[str, Any], k: Mapping[str, Any]) -> dict[str, Any]:
    """Return the terms of a layout's profile: `c` by learned name, `k` the layout's constants; floats, or arrays over layouts."""
    compute = {width: np.maximum(c[f"compute{width}"], 1.0) for width in ("16", "8", "4")}

    def of(group: str) -> Any:
        return sum(share * k[f"{group}_is_{width}"] for width, share in compute.items())

    host_s = c["step_s"] + c["layer_s"] * k["layers"] + c["moe_layer_s"] * k["moe_layers"] + c["round_s"] * k["rounds"]
    host_s = host_s + c["latent_layer_s"] * k["latent_layers"] + c["quantize_s"] * k["quantizing"]
    memory = c["memory"] * k.get("slower_reads", 1.0)
    return {
        "step_s": host_s + c["sampler"] * k["sampler_s"],
        "sequence_s": c["sequence_s"] / k.get("attention_dp", 1.0),  # each rank of data-parallel attention schedules its own
        "weights": memory,
        "linear": of("dense"),
        "attention_linear": of("attention"),
        "head_linear": c["compute16"],
        "experts": memory * c["expert_memory"],
        "expert_linear": of("experts") * c["expert_compute"] * (1 + c["expert_depth"] * k["expert_per_depth"]),
        "expert_tile": c["expert_tile"] + (c["expert_tile16"] - c["expert_tile"]) * k["experts_is_16"],
        "kv": c["kv"],
        "attention": c["attention"],
        "activation": c["activation"],
        "link": c["link"],
    }


def indicators(formats: Mapping[str, str]) -> dict[str, float]:
    """Return which compute coefficient each class of matrices takes, as constants of a layout."""
    return {f"{group}_is_{width}": float(width == found) for group, found in formats.items() for width in ("16", "8", "4")}
