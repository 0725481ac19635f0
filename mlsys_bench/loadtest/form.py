"""What a person says about the form of requests and answers, beyond the kind of endpoint and the lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlsys_bench.errors import BadInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How requests are written and answers read, as a person asked for it.  What is None follows the kind of endpoint."""

    path: str | None = None
    method: str = "POST"
    streams: bool | None = None
    batch: int = 1  # texts, documents or rows of a tensor in one request
    template: str | None = None  # Jinja, of the body
    response_path: str | None = None  # JSONPath of the text in an answer, or in each of its events
    finish_path: str | None = None  # JSONPath of what only the last event has
    usage_path: str | None = None  # JSONPath of the output tokens so far, by the server's count
    inputs: tuple[str, ...] = ()  # tensors, NAME:DATATYPE:SHAPE
    binary: bool = False  # tensors as Triton's binary extension writes them
    usage_per_event: bool = False  # ask for `continuous_usage_stats`
    tokenizer: str | None = None  # tokenizer.json, absolute: counts where the server does not


def checked(
    *,
    path: str | None = None,
    method: str = "POST",
    streams: bool | None = None,
    batch: int = 1,
    body_template: Path | None = None,
    response_path: str | None = None,
    finish_path: str | None = None,
    usage_path: str | None = None,
    inputs: tuple[str, ...] = (),
    binary: bool = False,
    usage_per_event: bool = False,
    tokenizer: Path | None = None,
) -> Form:
    """Return a form from options as typed.  Raises BadInput naming the option."""
    if path is not None and not path.startswith("/"):
        raise BadInput(f"--path {path}: begins with a slash, like /v1/chat/completions")
    if not (method.isascii() and method.isalpha()):
        raise BadInput(f"--method {method!r}: is a word like POST or GET")
    if batch < 1:
        raise BadInput(f"--batch {batch}: at least one text, document or row")
    for option, jsonpath in (("--response-path", response_path), ("--finish-path", finish_path), ("--usage-path", usage_path)):
        if jsonpath is not None and not jsonpath.startswith("$"):
            raise BadInput(f"{option} {jsonpath}: a JSONPath begins with $, like $.choices[0].text")
    return Form(
        path=path,
        method=method.upper(),
        streams=streams,
        batch=batch,
        template=_text(body_template),
        response_path=response_path,
        finish_path=finish_path,
        usage_path=usage_path,
        inputs=inputs,
        binary=binary,
        usage_per_event=usage_per_event,
        tokenizer=_tokenizer_file(tokenizer),
    )


def _text(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--body-template {file}: cannot be read: {error}") from error


def _tokenizer_file(given: Path | None) -> str | None:
    if given is None:
        return None
    file = given / "tokenizer.json" if given.is_dir() else given
    if not file.is_file():
        raise BadInput(f"--tokenizer {given}: there is no {file.name}; give a tokenizer.json or the folder that holds one")
    return str(file.resolve())
