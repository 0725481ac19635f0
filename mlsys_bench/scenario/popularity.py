"""How often a cache is hit when what is asked for follows Zipf's law."""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

from mlsys_bench.stages import Cache, Popularity

Floats = npt.NDArray[np.float64]
EXACT = 4096


def hit(cache: Cache) -> float:
    """Return the share of the visits that a cache answers."""
    if cache.popularity is not None:
        return hit_share(cache.popularity)
    assert cache.hit is not None  # checked when the scenario was read
    return cache.hit


@functools.lru_cache(maxsize=256)
def hit_share(popularity: Popularity) -> float:
    """Return the hit share of a cache that drops what was least recently used, requests independent of each other.

    Che's approximation: item i is in the cache with 1 - exp(-p_i t), t such that these add up to its size.
    Source: H. Che, Y. Tung, Z. Wang, Hierarchical Web caching systems, IEEE JSAC 20 (2002); C. Fricker, P. Robert, J. Roberts,
    A versatile and accurate approximation for LRU cache performance, ITC 24 (2012), arXiv 1202.3974.
    """
    if popularity.size >= popularity.items:
        return 1.0
    p, count = _law(popularity)
    low, high = 0.0, popularity.size / float(p[-1])
    while count @ -np.expm1(-p * high) < popularity.size:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if count @ -np.expm1(-p * middle) < popularity.size else (low, middle)
    return float((count * p) @ -np.expm1(-p * high))


def _law(popularity: Popularity) -> tuple[Floats, Floats]:
    """Return probabilities and how many items have each; beyond the first 4,096, items within 1 % of a rank stand together."""
    if popularity.items <= EXACT:
        edges = np.arange(1, popularity.items + 2, dtype=np.float64)
    else:
        steps = math.ceil(math.log(popularity.items / EXACT) / 0.01)
        edges = np.unique(
            np.concatenate([np.arange(1, EXACT + 1), np.rint(np.geomspace(EXACT, popularity.items, steps)), [popularity.items + 1]])
        )
    count = np.diff(edges).astype(np.float64)
    weight = ((edges[:-1] + edges[1:] - 1) / 2) ** -popularity.zipf  # at the middle rank of each group
    return weight / float(count @ weight), count
