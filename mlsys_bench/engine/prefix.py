"""Hashes of the blocks of a text: equal ones stand for equal K and V."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


class Hashes:
    """The hashes of one request's full blocks, made as they fill.

    A block's hash is that of the hash before it and its own tokens, so it stands for all tokens up to its end, and its K and V depend on
    nothing else once `world` says which model and which cache they are of.  64 bits of BLAKE2b (RFC 7693): among a million blocks two
    different ones get the same with a probability of 3e-8.
    """

    __slots__ = ("_block_tokens", "_last", "count")

    def __init__(self, world: str, block_tokens: int) -> None:
        """Begin a text of this model."""
        self._block_tokens, self._last = block_tokens, hashlib.blake2b(world.encode(), digest_size=8).digest()
        self.count = 0  # blocks that have one

    def more(self, tokens: Sequence[int]) -> list[int]:
        """Return the hashes of blocks that have filled since.  tokens: all of the text so far."""
        size, new = self._block_tokens, []
        while (self.count + 1) * size <= len(tokens):
            block = np.array(tokens[self.count * size : (self.count + 1) * size], dtype="<i4").tobytes()
            self._last = hashlib.blake2b(self._last + block, digest_size=8).digest()
            new.append(int.from_bytes(self._last, "little"))
            self.count += 1
        return new
