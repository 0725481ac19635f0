"""Uniform random numbers by purpose: the same ones whenever they are asked for, so that two fleets differ by what they are."""

from __future__ import annotations

import functools
import math
import zlib

import numpy as np
import numpy.typing as npt

from mlsys_bench.queueing import Law

Floats = npt.NDArray[np.float64]
SAMPLES = 8192


@functools.lru_cache(maxsize=4096)
def uniform(purpose: str) -> Floats:
    """Return stratified numbers over (0, 1) in random order."""
    rng = np.random.default_rng(zlib.crc32(purpose.encode()))
    return np.asarray((rng.permutation(SAMPLES) + rng.random(SAMPLES)) / SAMPLES)


@functools.lru_cache(maxsize=1024)
def drawn(law: Law, purpose: str) -> Floats:
    """Return draws of a law, stratified likewise."""
    return law.quantiles(np.clip(uniform(purpose), 1e-12, 1 - 1e-12))


def poisson(mean: float, purpose: str) -> Floats:
    """Return Poisson numbers, stratified likewise."""
    most = int(mean + 10 * math.sqrt(mean) + 10)
    logs = np.arange(1, most + 1) * math.log(max(mean, 1e-300)) - np.cumsum(np.log(np.arange(1, most + 1)))
    law = np.exp(np.concatenate([[0.0], logs]) - mean)
    return np.asarray(np.searchsorted(np.cumsum(law), uniform(purpose)).astype(np.float64))
