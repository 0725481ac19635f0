"""Doubly linked lists over integer arrays: those who wait, idle prefix blocks, blocks in host memory.

A list is two entries of `counts`, `first` and `last`, and who comes before and after each member; NOBODY ends it on both sides.
"""

from __future__ import annotations

from typing import Any

from mlsys_bench.batching.arrays import NOBODY


def append(counts: Any, before: Any, after: Any, first: int, last: int, item: int) -> None:
    """Put an item at the end of a list."""
    insert(counts, before, after, first, last, item, counts[last])


def insert(counts: Any, before: Any, after: Any, first: int, last: int, item: int, earlier: int) -> None:
    """Put an item behind `earlier`; at the beginning where that is NOBODY."""
    later = counts[first] if earlier == NOBODY else after[earlier]
    before[item], after[item] = earlier, later
    if earlier == NOBODY:
        counts[first] = item
    else:
        after[earlier] = item
    if later == NOBODY:
        counts[last] = item
    else:
        before[later] = item


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
