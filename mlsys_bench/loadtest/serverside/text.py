"""The text that Prometheus scrapes: the lines of the names that are wanted, and nothing of the rest.

Reads the text format 0.0.4 and OpenMetrics alike.  A page of a large server is two thousand lines, nine tenths of them buckets of
histograms that nobody wants here: a line costs a third of a microsecond then, a hundredth of what a full parser takes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

Key = tuple[str, str]  # a name and its labels as they are spelled
_LABELS = r'\{((?:[^"{}]|"(?:[^"\\]|\\.)*")*)\}'
_REST = re.compile(rf"(?:{_LABELS})?[ \t]+(\S+)")  # value; a timestamp or an exemplar may follow
_LINE = re.compile(rf"(?m)^[A-Za-z_:][\w:]*(?:{_LABELS})?[ \t]+(?:[-+]?[0-9.]|[-+]?Inf|NaN)")
_LABEL = re.compile(r'([A-Za-z_]\w*)\s*=\s*"((?:[^"\\]|\\.)*)"')
_ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


def is_page(text: str) -> bool:
    """Say whether a text holds a sample at all: a page of HTML or JSON does not."""
    return _LINE.search(text) is not None


def samples(text: str, wanted: Collection[str]) -> dict[Key, float]:
    """Return the finite values of the names wanted.  Lines that are none are left out; a line that comes twice counts as it came last."""
    found: dict[Key, float] = {}
    for line in text.split("\n"):
        name = line.partition("{")[0].partition(" ")[0]
        if name not in wanted:
            continue
        rest = _REST.match(line, len(name))
        value = _number(rest[2]) if rest else None
        if rest and value is not None:
            found[name, rest[1] or ""] = value
    return found


def labels(spelled: str) -> Mapping[str, str]:
    """Return labels by name."""
    return {name: re.sub(r'\\[\\n"]', lambda m: _ESCAPES[m[0]], value) for name, value in _LABEL.findall(spelled)}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
