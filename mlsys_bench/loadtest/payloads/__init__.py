"""What requests carry: one `Ask` per row of the schedule.  Pure: the same spec and index give the same words, in every process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mlsys_bench.loadtest import prompts
from mlsys_bench.loadtest.endpoints import Ask


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What requests carry, as parent and worker agree on it.  Lists go row by row; a closed loop walks through them again and again."""

    prompt_chars: list[int]
    output_tokens: list[int]
    seed: int


class Source(Protocol):
    """Where what is asked comes from."""

    def ask(self, index: int) -> Ask:
        """Return what request `index` of the whole run asks."""
        ...


def make(spec: Spec) -> Source:
    """Return the source of a spec."""
    return Synthetic(spec)


class Synthetic:
    """Made-up words of the lengths that were drawn, no two prompts with the same beginning."""

    def __init__(self, spec: Spec) -> None:
        self._spec, self._text = spec, prompts.Text(spec.seed)

    def ask(self, index: int) -> Ask:
        """Return what request `index` asks."""
        row = index % len(self._spec.prompt_chars)
        return Ask(text=self._text.prompt(index, self._spec.prompt_chars[row]), output_tokens=self._spec.output_tokens[row])
