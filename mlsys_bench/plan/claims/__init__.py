"""The numbers that people quote in system design, each recomputed with the functions that plans are made with.

memory.py      weights, KV caches, vectors: what fits where
waiting.py     workers, shards, percentiles, batches that wait
speed.py       tokens per second, FLOPs, what a change of precision gives
money.py       APIs against own fleets, caches, routing
statistics.py  samples, tests, rates

A claim holds, is wrong, or holds only if something is added that people leave out; then that is said.  Claims that only a measurement can
settle (recall of an index, false hits of a semantic cache, the quality lost to quantization) are not here: docs/claims.md lists them.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlsys_bench.claims import Claims
from mlsys_bench.errors import unknown
from mlsys_bench.plan.claims import memory, money, speed, statistics, waiting

ROOMS = (memory, waiting, speed, money, statistics)


def recompute(keys: Sequence[str] = ()) -> Claims:
    """Return the claims of these keys, or all.  Raises UnknownName for a key that is none."""
    known = {key: claim for room in ROOMS for key, claim in room.CLAIMS.items()}
    for key in keys:
        if key not in known:
            raise unknown("claim", key, known)
    return Claims(claims=tuple(known[key]() for key in keys or known))
