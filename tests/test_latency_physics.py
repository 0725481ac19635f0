"""What a layout's profile counts beside bytes and FLOPs: whole tiles of experts, and kernels that bring activations into few bits."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mlsys_bench import hardware, latency, models
from mlsys_bench.latency import coefficients, kernel


@pytest.mark.parametrize(
    ("model", "precision", "device", "kernels"),
    [
        ("llama-3-8b", "fp8", "H100", 2 * 32 + 2 * 32),  # attention and MLP
        ("llama-3-8b", "bf16", "H100", 0),
        ("llama-3-8b", "int8", "H100", 0),  # weights alone
        ("llama-3-8b", "fp8", "A100-80GB-SXM", 0),  # a GPU that cannot multiply in fp8 reads it and widens it
        ("mixtral-8x7b", "fp8", "H100", 2 * 32 + 2 * 32),  # attention and experts
        ("llama-4-scout-17b-16e", "fp8", "H100", 2 * 48 + 2 * 48),  # experts and the shared one; its attention stays in 16 bit
        ("deepseek-v3", "fp8", "H200-SXM", 2 * (61 + 3 + 58 + 58)),  # attention, three plain MLPs, shared and routed experts
    ],
)
def test_activations_are_quantized_before_each_product_in_few_bits(model: str, precision: str, device: str, kernels: int) -> None:
    found = latency.shares(models.find(model), hardware.find(device), precision=precision)
    assert found["quantizing"] == kernels
    learned = coefficients.stored()[coefficients.OPEN]["coefficients"]
    profile = latency.roofline(models.find(model), hardware.find(device), precision=precision)
    host_s = dict(zip(profile.terms, profile.coefficients, strict=True))["step_s"]
    assert host_s >= learned["step_s"] + kernels * learned["quantize_s"]


def test_hit_experts_compute_about_as_many_whole_tiles_as_random_loads_need() -> None:
    """The rows of an expert that gets Poisson(r) tokens, if any: E[ceil(X / T) T | X > 0].  The step's formula is near it on average."""
    misses = []
    for tile in (8, 16, 32, 64, 128):
        for rate in np.geomspace(0.05, 1000, 40):
            loads = np.arange(1, 4000)
            chance = stats.poisson.pmf(loads, rate)
            exact = float((chance * np.ceil(loads / tile) * tile).sum() / chance.sum())
            misses.append(abs(rows_of_one(rate, tile) / exact - 1))
    assert float(np.mean(misses)) < 0.04  # 0.066 where tiles fill up half as fast


def rows_of_one(rate: float, tile: float) -> float:
    """Return the rows that each expert computes which is hit, of 1,000 that get so many tokens each, by the clock of a step."""
    experts = 1000.0
    table = [0.0] * kernel.SIZE
    table[kernel.MISSED], table[kernel.TILE] = 1 - 1 / experts, tile
    table[kernel.EXPERT_READ], table[kernel.EXPERT_FLOPS] = 1e-12, 1.0  # one second a row and chosen expert
    tokens = rate * experts
    hit = 1 - (1 - 1 / experts) ** tokens
    return kernel.seconds(table, tokens, 0.0, 0.0, 0.0, 0.0) / (hit * experts)
