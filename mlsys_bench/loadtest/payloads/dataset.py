"""Prompts from a file: JSON lines, a JSON list, Parquet, CSV, or plain text with a prompt per line.

| a row has                                                  | the request is                                              |
|------------------------------------------------------------|-------------------------------------------------------------|
| the column of `--field`                                    | its text, or its list of messages                           |
| `messages` of `role` and `content` (OpenAI; also in `body`)| all of them up to the last of the user                      |
| `conversations` of `from` and `value` (ShareGPT)           | the first turn of the human, as other tools take it         |
| `prompt`, `text`, `question`, `instruction`, `input`, …    | that text; an `instruction` is followed by its `input`      |

An answer is as long as `max_tokens` or `output_tokens` of the row says, else as long as the answer that the row holds, else by the law.
"""

from __future__ import annotations

import codecs
import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from mlsys_bench.errors import BadInput, did_you_mean
from mlsys_bench.loadtest.payloads.records import Row
from mlsys_bench.workload.rows import opened

MOST_ROWS = 200_000
CHARS_PER_TOKEN = 4.0  # English prose, where nothing better is known
_TEXTS = ("prompt", "text", "question", "instruction", "input", "query", "content")
_TALKS = ("messages", "conversations", "conversation")
_LENGTHS = ("max_tokens", "max_completion_tokens", "output_tokens", "output_len", "output_length")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """A file of requests as it was read."""

    name: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def read(path: Path, column: str | None = None, most: int = MOST_ROWS) -> DataSet:
    """Return the requests of a file, in its order.  Raises BadInput where none can be made of a row."""
    rows: list[Row] = []
    empty = 0
    notes = []
    for number, given in _rows(path):
        if len(rows) == most:
            notes.append(f"{path.name} has more than {most:,} rows: the first {most:,} are used")
            break
        row = _row(given, column, f"{path}: row {number}")
        if row.text.strip() or row.messages:
            rows.append(row)
        else:
            empty += 1
    if not rows:
        raise BadInput(f"{path}: holds no prompt{f'; {empty} rows are empty' if empty else ''}")
    if empty:
        notes.append(f"{empty:,} rows of {path.name} without a prompt are left out")
    return DataSet(name=path.name, rows=tuple(rows), notes=tuple(notes))


def shuffled(data: DataSet, seed: int) -> DataSet:
    """Return the rows in a random order that the seed decides."""
    rows = list(data.rows)
    random.Random(seed).shuffle(rows)
    return dataclasses.replace(data, rows=tuple(rows))


def prompt_tokens(row: Row) -> int:
    """Return about how many tokens a row asks, by its characters: before a server has counted, nobody knows."""
    chars = len(row.text) or sum(len(_words(message.get("content"))) for message in row.messages)
    return max(1, round(chars / CHARS_PER_TOKEN))


# ---------------------------------------------------------------- files


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        with path.open("rb") as file:
            start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    if start[:1] == b"[":
        return _list(path)
    if start[:4] == b"PAR1" or path.suffix.lower() == ".csv":
        return _table(path)
    return _lines(path, is_json=start[:1] == b"{")


def _list(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        document = msgspec.json.decode(path.read_bytes().removeprefix(codecs.BOM_UTF8), type=list[Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadInput(f"{path}: is no list of JSON objects: {error}") from error
    for number, given in enumerate(document, 1):
        yield number, _object(given, f"{path}: row {number}")


def _table(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with opened(path) as table:
        for number, values in table.rows(table.columns):
            yield number, dict(zip(table.columns, values, strict=True))


def _lines(path: Path, is_json: bool) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open("rb") as file:
        for number, given in enumerate(file, 1):
            line = given.removeprefix(codecs.BOM_UTF8) if number == 1 else given  # as programs of Windows begin a text
            if line.strip():
                yield number, _json(line, f"{path}: line {number}") if is_json else {"prompt": _utf8(line, f"{path}: line {number}")}


def _json(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        return _object(msgspec.json.decode(line), where)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadInput(f"{where}: is not JSON: {error}; a data set has one object per line, or is one list") from error


def _object(given: object, where: str) -> Mapping[str, Any]:
    if isinstance(given, str):
        return {"prompt": given}
    if not isinstance(given, dict):
        raise BadInput(f"{where}: is no JSON object and no text")
    return given


def _utf8(line: bytes, where: str) -> str:
    try:
        return line.decode().strip()
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: is no UTF-8 text: {error.reason}") from error


# ---------------------------------------------------------------- rows


def _row(given: Mapping[str, Any], column: str | None, where: str) -> Row:
    body = given.get("body")
    source = {**given, **body} if isinstance(body, dict) else dict(given)  # a line of OpenAI's batch files
    name = _column(source, column, where)
    value = source[name]
    fields = {key: v for key, v in source.items() if key not in _TALKS and isinstance(v, (str, int, float, bool, list, dict))}
    length = _length(source)
    if isinstance(value, list):
        messages = [_message(one, f"{where}: {name}") for one in value]
        asked, answer = _first_turn(messages) if "from" in (value[0] if value else {}) else _up_to_the_user(messages)
        return Row(messages=asked, text=_joined(asked), fields=fields, output_tokens=length or _tokens_of(answer))
    text = "" if value is None else str(value)
    if name == "instruction" and isinstance(source.get("input"), str) and source["input"]:
        text = f"{text}\n\n{source['input']}"
    answers = (source.get(key) for key in ("output", "completion", "response", "answer"))
    answer = next((a for a in answers if isinstance(a, str) and a), None)
    return Row(text=text, fields=fields, output_tokens=length or _tokens_of(answer))


def _column(source: Mapping[str, Any], column: str | None, where: str) -> str:
    if column is not None:
        if column not in source:
            raise BadInput(f"{where}: has no field {column!r}{did_you_mean(column, source)}")
        return column
    for name in (*_TALKS, *_TEXTS):
        if name in source:
            return name
    raise BadInput(f"{where}: has no field that is known to hold a prompt; it has {', '.join(source)}; name it with --field")


def _message(given: object, where: str) -> dict[str, Any]:
    """Return a message as OpenAI writes it."""
    if isinstance(given, dict) and "role" in given and "content" in given:
        return {"role": _ROLES.get(str(given["role"]), given["role"]), "content": given["content"]}
    if isinstance(given, dict) and "from" in given and "value" in given:
        return {"role": _ROLES.get(str(given["from"]), given["from"]), "content": given["value"]}
    raise BadInput(f"{where}: a message needs role and content, or from and value")


def _first_turn(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
    """Return what the user says first, with what the system said before, and the answer."""
    at = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if at is None:
        return [], None
    answer = messages[at + 1] if at + 1 < len(messages) and messages[at + 1]["role"] == "assistant" else None
    system = [message for message in messages[:at] if message["role"] == "system"]
    return [*system, messages[at]], _words(answer["content"]) if answer else None


def _up_to_the_user(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
    """Return the conversation up to what the user said last, and the answer to it."""
    last = max((i for i, message in enumerate(messages) if message["role"] != "assistant"), default=-1)
    answer = messages[last + 1] if last + 1 < len(messages) else None
    return list(messages[: last + 1]), _words(answer["content"]) if answer else None


def _joined(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(_words(message["content"]) for message in messages)


def _words(content: object) -> str:
    """Return the text of a message's content, which may have parts."""
    if isinstance(content, list):
        return "\n".join(str(part.get("text") or "") for part in content if isinstance(part, dict) and "text" in part)
    return "" if content is None else str(content)


def _length(source: Mapping[str, Any]) -> int | None:
    for name in _LENGTHS:
        value = source.get(name)
        if isinstance(value, (int, float)) and value >= 1:
            return int(value)
    return None


def _tokens_of(answer: str | None) -> int | None:
    return max(1, round(len(answer) / CHARS_PER_TOKEN)) if answer else None
