"""The caches of preempted requests in host memory: moved there, and back into other blocks when the request goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mlsys_bench.engine.kv import Blocks


class Host:
    """Room for so many blocks of several caches that share block numbers: a model's, and that of one that drafts for it."""

    def __init__(self, caches: Sequence[Blocks], blocks: int) -> None:
        """Start empty."""
        self._caches, self.blocks, self.free = tuple(caches), blocks, blocks
        self._saved: dict[int, tuple[int, list[tuple[torch.Tensor, ...]]]] = {}

    def __contains__(self, row: int) -> bool:
        """Say whether a row's cache is here."""
        return row in self._saved

    def out(self, row: int, blocks: list[int]) -> bool:
        """Copy a row's blocks here; return False, and copy nothing, where there is no room."""
        if len(blocks) > self.free:
            return False
        self._saved[row] = (len(blocks), [cache.copy_out(blocks) for cache in self._caches])
        self.free -= len(blocks)
        return True

    def back(self, row: int, blocks: list[int]) -> None:
        """Copy what is kept of a row into these blocks, and forget it here."""
        for cache, saved in zip(self._caches, self._saved[row][1], strict=True):
            cache.copy_in(blocks[: self._saved[row][0]], saved)
        self.drop(row)

    def drop(self, row: int) -> None:
        """Forget a row, if it is here."""
        if row in self._saved:
            self.free += self._saved.pop(row)[0]

    def clear(self) -> None:
        """Forget all."""
        for row in list(self._saved):
            self.drop(row)
