"""Any HTTP API: the body from a Jinja template, the text of answers by JSONPath; and the same over WebSocket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest import answers, tokens
from mlsys_bench.loadtest.answers import Answer, Emitted, Usage
from mlsys_bench.loadtest.endpoints import Ask, Spec, texts
from mlsys_bench.loadtest.endpoints.reading import CUT, as_text, decoded, finder, is_event_stream, json_values, refuse_errors
from mlsys_bench.loadtest.wire import Response, WireError

_JSON_LINES = ("application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines", "application/json-seq")
_OVER = b"[DONE]"


class Http:
    """Whatever a person describes.  Without a template the body is the text itself."""

    def __init__(self, spec: Spec) -> None:
        self._render = _template(spec) if spec.form.template is not None else None
        self._sends = spec.form.method not in ("GET", "HEAD")
        self._streams = spec.form.streams
        self._mark = Mark(spec)
        self._count = tokens.counter(spec.form.tokenizer) if spec.form.tokenizer else None

    def body(self, ask: Ask) -> bytes:
        """Return the body of a request.  Raises BadInput where the template asks for what this request does not have."""
        if not self._sends:
            return b""
        return self._render(ask) if self._render is not None else ask.text.encode()

    def read(self, response: Response) -> Answer:
        """Return the tokens of a stream by its form, or the moment of a whole answer."""
        if is_event_stream(response):
            return self._mark.answer(((at, data) for at, _, data in answers.sse(response.pieces)), self._count)
        kind = response.headers.get("content-type", "").split(";")[0].strip().lower()
        streams = self._streams or (self._streams is None and kind in _JSON_LINES)
        if streams and (self._mark.reads or kind in _JSON_LINES):
            return self._mark.parsed(json_values(response.pieces), self._count)
        if streams:
            emitted: list[Emitted] = [(at, True, data.decode(errors="replace"), None) for at, data in response.pieces]
            return answers.assemble(emitted, usage=Usage(), is_whole=True, count=self._count)
        return self._whole(response)

    def _whole(self, response: Response) -> Answer:
        if not self._mark.reads:
            came = response.pieces or [(response.headers_at or 0.0, b"")]  # where there is no body the head is all there is
            return answers.whole(came, usage=Usage())
        document = decoded(response.body(), object, "JSON")
        refuse_errors(document)
        text, spent = self._mark.text(document), self._mark.spent(document)
        if text is None:
            raise WireError(f"nothing at {self._mark.path}: {response.body()[:60]!r}")
        return answers.whole(response.pieces, usage=Usage(output_tokens=spent), text=text, count=self._count)


class WebSocket(Http):
    """A message asks, messages answer: JSON each, its text and its end by JSONPath; messages without a path count as one event each.

    The transport hands the messages over as the events of a stream.
    """

    def is_end(self, message: bytes) -> bool:
        """Say whether a message is the last of its answer; without a path for it, only [DONE] and the server's close end one."""
        return message.strip() == _OVER or (self._mark.ends is not None and self._mark.is_end(_value(message)))


class Mark:
    """Where in an event its text, its end and its tokens stand."""

    def __init__(self, spec: Spec) -> None:
        form = spec.form
        self.path = form.response_path
        self._find = finder(form.response_path) if form.response_path else None
        self.ends = finder(form.finish_path) if form.finish_path else None
        self._spent = finder(form.usage_path) if form.usage_path else None
        self.reads = any((form.response_path, form.finish_path, form.usage_path))

    def text(self, document: Any) -> str | None:
        """Return the text in a document, or None."""
        return as_text(self._find(document)) if self._find is not None else ""

    def is_end(self, document: Any) -> bool:
        """Say whether a document is the last: what the path finds is there, and neither null nor false."""
        return self.ends is not None and any(value is not None and value is not False for value in self.ends(document))

    def spent(self, document: Any) -> int | None:
        """Return the output tokens so far, by the server's count."""
        found = self._spent(document) if self._spent is not None else []
        return found[-1] if found and type(found[-1]) is int else None

    def answer(self, events: Iterator[tuple[float, bytes]] | list[tuple[float, bytes]], count: tokens.Count | None) -> Answer:
        """Return the answer of events that are JSON each, where a path wants to know what is in them."""
        return self.parsed(((at, None if data.strip() == _OVER else self._document(data)) for at, data in events), count)

    def parsed(self, values: Iterator[tuple[float, Any]], count: tokens.Count | None) -> Answer:
        """Return the answer of documents; None stands for an end that says nothing."""
        emitted: list[Emitted] = []
        spent: int | None = None
        is_whole = is_cut = False
        for at, document in values:
            if document is None or document is CUT:
                is_whole, is_cut = is_whole or document is None, is_cut or document is CUT
                continue
            refuse_errors(document)
            text, ends, sofar = self.text(document), self.is_end(document), self.spent(document)
            is_whole, spent = is_whole or ends, spent if sofar is None else sofar
            if text or (text is not None and not ends):
                emitted.append((at, True, text, sofar))
        whole = (is_whole or (self.ends is None and bool(emitted))) and not is_cut
        return answers.assemble(emitted, usage=Usage(output_tokens=spent), is_whole=whole, count=count)

    def _document(self, data: bytes) -> Any:
        return _value(data) if self.reads else data


def _value(data: bytes) -> Any:
    return decoded(data, object, "JSON in an event")


def _template(spec: Spec) -> Callable[[Ask], bytes]:
    """Return what renders a body.  A template sees the request and nothing else: it runs in Jinja's sandbox."""
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    source = spec.form.template or ""
    try:
        template = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False).from_string(source)
    except TemplateError as error:
        raise BadInput(f"--body-template: {error}") from error
    batch, model = spec.form.batch, spec.model

    def render(ask: Ask) -> bytes:
        try:
            return template.render(
                model=model, text=ask.text, prompt=ask.text, output_tokens=ask.output_tokens, max_tokens=ask.output_tokens,
                messages=ask.messages or ({"role": "user", "content": ask.text},), images=ask.images, row=ask.row, batch=batch,
                texts=texts(ask, batch),
            ).encode()  # fmt: skip
        except (TemplateError, TypeError, ArithmeticError) as error:
            known = "text, texts, output_tokens, messages, images, row, model, batch"
            raise BadInput(f"--body-template: {error}; it may use {known}") from error

    return render
