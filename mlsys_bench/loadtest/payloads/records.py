"""Requests that somebody else wrote: the rows of a data set, one after another, over again when they are used up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from mlsys_bench.loadtest.endpoints import Ask
from mlsys_bench.loadtest.payloads import Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One request of a data set.  `fields` are what else the row holds, for templates."""

    text: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)
    output_tokens: int | None = None


_decode = msgspec.json.Decoder(Row).decode


class Records:
    """Rows are decoded as they are asked for: most of a large file never is."""

    def __init__(self, spec: Spec) -> None:
        self._records, self._tokens = spec.records, spec.output_tokens

    def ask(self, index: int, said: Sequence[str] = ()) -> Ask:
        """Return what request `index` asks."""
        row = _decode(self._records[index % len(self._records)])
        return Ask(
            text=row.text,
            output_tokens=self._tokens[index % len(self._tokens)],
            messages=tuple(row.messages),
            images=tuple(row.images),
            row=row.fields,
        )
