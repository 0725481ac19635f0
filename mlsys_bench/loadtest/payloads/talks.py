"""Sessions: each turn carries all that was said before it, the server's real answers included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlsys_bench.loadtest.endpoints import Ask
from mlsys_bench.loadtest.payloads import Spec
from mlsys_bench.loadtest.payloads.synthetic import Synthetic


class Talks:
    """Conversations.  A first turn is a prompt like any other; a later one adds new words to what was asked and answered."""

    def __init__(self, spec: Spec) -> None:
        self._words, self._tokens, self._rows = Synthetic(spec), spec.output_tokens, len(spec.prompt_chars)
        self._before = {after: row for row, after in enumerate(spec.after) if after >= 0}

    def ask(self, index: int, said: Sequence[str] = ()) -> Ask:
        """Return what request `index` asks: as a conversation, and as one text that begins with the prompt before it and its answer."""
        row, base = index % self._rows, index - index % self._rows
        asked = [self._words.text(base + at, at) for at in self._turns(row)]
        messages: list[Mapping[str, str]] = []
        for question, answer in zip(asked, said, strict=False):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": asked[-1]})
        return Ask(text="".join(m["content"] for m in messages), output_tokens=self._tokens[row], messages=tuple(messages))

    def _turns(self, row: int) -> list[int]:
        """Return the rows of a session up to this one."""
        turns = [row]
        while (before := self._before.get(turns[-1])) is not None:
            turns.append(before)
        return turns[::-1]
