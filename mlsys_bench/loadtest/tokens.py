"""Count the tokens of streamed text with a tokenizer of one's own: only where the server does not say how many it made."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence

from mlsys_bench.errors import BadInput

Count = Callable[[Sequence[str]], list[int]]  # texts of the events of one answer -> tokens that came with each


def counter(file: str) -> Count:
    """Return the counter of a tokenizer.json.  Raises BadInput for a file that is none, or without the `tokenizers` library."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise BadInput("--tokenizer needs the tokenizers library, which is not installed: pip install tokenizers") from error
    try:
        tokenizer = Tokenizer.from_file(file)
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"--tokenizer {file}: is no tokenizer.json: {error}") from error

    def ends(text: str) -> list[int]:
        return [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]

    return lambda texts: per_event(texts, ends)


def per_event(texts: Sequence[str], ends: Callable[[str], Sequence[int]]) -> list[int]:
    """Return how many tokens came with each event: a token belongs to the event that holds its last character.

    Counted over the whole answer, for tokens do not respect the bounds of events.  The first event with text has at least one token
    where there are any: something was seen then.
    """
    bounds = list(itertools.accumulate(len(text) for text in texts))
    counts = [0] * len(texts)
    for end in ends("".join(texts)):
        counts[min(bisect.bisect_left(bounds, max(end, 1)), len(texts) - 1)] += 1
    first = next((i for i, text in enumerate(texts) if text), None)
    counted = next((i for i, count in enumerate(counts) if count), None)
    if first is not None and counted is not None and counted > first:
        counts[counted] -= 1
        counts[first] = 1
    return counts
