"""Doubly linked lists over integer arrays: those who wait, idle prefix blocks, blocks in host memory.

A list is two entries of `counts`, `first` and `last`, and who comes before and after each member; NOBODY ends it on both sides.
"""

from __future__ import annotations

from typing import Any

from mlsys_bench.batching.arrays import NOBODY


def append(counts: Any, before: Any, after: Any, first: int, last: int, item: int) -> None:
    """Put an item at the end of a list."""
    end = counts[last]
    before[item], after[item] = end, NOBODY
    if end == NOBODY:
        counts[first] = item
    else:
        after[end] = item
    counts[last] = item


def remove(counts: Any, before: Any, after: Any, first: int, last: int, item: int) -> None:
    """Take an item out of a list."""
    earlier, later = before[item], after[item]
    if earlier == NOBODY:
        counts[first] = later
    else:
        after[earlier] = later
    if later == NOBODY:
        counts[last] = earlier
    else:
        before[later] = earlier
