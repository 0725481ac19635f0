"""What kinds of endpoints share when they read: JSON of a known shape, JSON values in a stream, JSONPath."""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest.answers import Piece
from mlsys_bench.loadtest.wire import Response, WireError

T = TypeVar("T")
CUT = object()
Find = Callable[[Any], list[Any]]

_STEP = re.compile(r"\.([A-Za-z_][A-Za-z0-9_]*)|\[\s*(-?\d+)\s*\]|\[\s*'([^'\\]*)'\s*\]|\[\s*\"([^\"\\]*)\"\s*\]")
_decode_scan = json.JSONDecoder().raw_decode


def decoded(data: bytes, kind: type[T], what: str) -> T:
    """Return JSON as a type of ours.  Raises WireError naming what it should have been."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise WireError(f"no {what}: {data[:60]!r}") from error


def refuse_errors(document: object) -> None:
    """Raise WireError for an object that says {"error": …}: servers send it after a head that said all is well."""
    if isinstance(document, dict) and document.get("error") not in (None, "", False):
        raise WireError(f"the server says: {str(document['error'])[:80]}")


def is_event_stream(response: Response) -> bool:
    """Say whether an answer is a stream of server-sent events, by its head."""
    return response.headers.get("content-type", "").lower().startswith("text/event-stream")


def json_values(pieces: Sequence[Piece]) -> Iterator[tuple[float, Any]]:
    """Yield each JSON value of a body with the moment its last byte came: one a line, or one after another without any line.

    What is left at the end and is no whole value is yielded as CUT.  Raises WireError for a whole line that is no JSON.
    """
    body = b"".join(data for _, data in pieces)
    ends = list(itertools.accumulate(len(data) for _, data in pieces))
    text = body.decode("utf-8", errors="replace")
    is_ascii = len(text) == len(body)
    position, at_byte = 0, 0
    while True:
        start = position
        while position < len(text) and text[position] in " \t\r\n\x1e":  # RS is what RFC 7464 puts before each value
            position += 1
        if position == len(text):
            return
        try:
            value, position = _decode_scan(text, position)
        except ValueError as error:
            if "\n" not in text[position:]:
                yield pieces[-1][0], CUT
                return
            raise WireError(f"no JSON: {text[position : position + 60]!r}") from error
        at_byte = position if is_ascii else at_byte + len(text[start:position].encode())
        yield pieces[bisect.bisect_left(ends, at_byte)][0], value


def finder(path: str) -> Find:
    """Return a function that gives all values at a JSONPath.  Raises BadInput for what is no JSONPath.

    Names and indices, which is nearly every path there is, are followed here; for the rest of RFC 9535 a library is imported.
    """
    steps = _steps(path)
    if steps is not None:
        return lambda document: _follow(document, steps)
    try:
        import jsonpath
    except ImportError as error:
        raise BadInput(f"JSONPath {path}: needs the library python-jsonpath: pip install python-jsonpath") from error
    try:
        compiled = jsonpath.compile(path)
    except jsonpath.JSONPathError as error:
        raise BadInput(f"JSONPath {path}: {str(error).splitlines()[0]}; write it like $.choices[0].text") from error
    return lambda document: list(compiled.findall(document)) if isinstance(document, dict | list) else []  # it would parse a text


def _steps(path: str) -> list[str | int] | None:
    """Return names and indices, or None for a path that has more than these."""
    steps: list[str | int] = []
    position = 1
    while position < len(path):
        step = _STEP.match(path, position)
        if step is None:
            return None
        name, index, single, double = step.groups()
        steps.append(int(index) if index is not None else name or single or double or "")
        position = step.end()
    return steps


def _follow(document: Any, steps: Sequence[Any]) -> list[Any]:
    try:
        for step in steps:
            if not isinstance(document, list if isinstance(step, int) else dict):
                return []
            document = document[step]
    except (KeyError, IndexError):
        return []
    return [document]


def as_text(values: Sequence[Any]) -> str | None:
    """Return what was found as text; None where nothing was found, or null."""
    said = [value if isinstance(value, str) else json.dumps(value) for value in values if value is not None]
    return "".join(said) if said else None
