"""Made-up words of the lengths that were drawn: blocks that prompts share first, then what is this request's alone."""

from __future__ import annotations

from collections.abc import Sequence

from mlsys_bench.loadtest import prompts
from mlsys_bench.loadtest.endpoints import Ask
from mlsys_bench.loadtest.payloads import Spec


class Synthetic:
    """Prompts of which no two begin alike, save where they share blocks: equal chains of hashes are equal text, character for character."""

    def __init__(self, spec: Spec) -> None:
        self._text = prompts.Text(spec.seed)
        self._chars, self._tokens, self._rows = spec.prompt_chars, spec.output_tokens, len(spec.prompt_chars)
        self._block_chars, self._offsets, self._blocks = spec.block_chars, spec.block_offsets, spec.blocks

    def ask(self, index: int, said: Sequence[str] = ()) -> Ask:
        """Return what request `index` asks."""
        row = index % self._rows
        return Ask(text=self.text(index, row), output_tokens=self._tokens[row])

    def text(self, index: int, row: int) -> str:
        """Return the prompt of a row: the last block is cut where the prompt ends."""
        chars = self._chars[row]
        if not self._blocks:
            return self._text.prompt(index, chars)
        first, last = self._offsets[row], self._offsets[row + 1]
        ends = [round(k * self._block_chars) for k in range(last - first + 1)]
        shared = "".join([self._text.block(self._blocks[first + k], ends[k + 1] - ends[k]) for k in range(last - first)])[:chars]
        return shared + self._text.prompt(index, chars - len(shared)) if len(shared) < chars else shared
