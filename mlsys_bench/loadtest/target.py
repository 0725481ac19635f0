"""Look at the target before loading it: is it there, does it speak the API, which model, how many characters make a token."""

from __future__ import annotations

import http.client
import json
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

from mlsys_bench.errors import BadInput, MeasurementFailed, did_you_mean
from mlsys_bench.loadtest import prompts

_PROBE_CHARS = (64, 512)  # the difference is free of what a chat template or a begin-of-text token adds
_USUAL_CHARS_PER_TOKEN = 4.0  # English prose; only for servers that report no usage
_BUSY_TRIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where requests go and what they must look like."""

    scheme: Literal["http", "https"]
    host: str
    address: str
    port: int
    path: str
    model: str
    ignore_eos: bool
    chars_per_token: float
    extra_tokens: float  # of every prompt, beside its text
    notes: tuple[str, ...]

    def chars(self, tokens: int) -> int:
        """Return how long a text must be to make a prompt of so many tokens."""
        return max(1, round((tokens - self.extra_tokens) * self.chars_per_token))


def probe(
    url: str, *, endpoint: Literal["completions", "chat"], model: str | None, api_key: str | None, timeout_s: float, seed: int
) -> Target:
    """Return what is behind a URL.  Raises BadInput saying what came instead."""
    parts, base = _parse(url)
    scheme: Literal["http", "https"] = "https" if parts.scheme == "https" else "http"
    host, port = parts.hostname or "", parts.port or (443 if scheme == "https" else 80)
    address = _reach(url, host, port, timeout_s)
    caller = _Caller(url=url, scheme=scheme, host=host, port=port, api_key=api_key, timeout_s=timeout_s)
    name = _model(caller, f"{base}/models", model)
    path = f"{base}/chat/completions" if endpoint == "chat" else f"{base}/completions"
    text = prompts.Text(seed ^ 0x5EED)  # another text than the run's, so that no prefix is warm
    asked = [text.prompt(i, chars) for i, chars in enumerate(_PROBE_CHARS)]
    counts, ignore_eos = _count_tokens(caller, path, name, endpoint, asked)
    ratio, extra, notes = _chars_per_token(counts)
    return Target(
        scheme=scheme, host=host, address=address, port=port, path=path, model=name, ignore_eos=ignore_eos, chars_per_token=ratio,
        extra_tokens=extra, notes=notes if ignore_eos else (*notes, "the server refuses ignore_eos: answers may be shorter than asked"),
    )  # fmt: skip


def _parse(url: str) -> tuple[SplitResult, str]:
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        _ = parts.port
    except ValueError as error:
        raise BadInput(f"{url!r} is no URL: {error}; write it like http://127.0.0.1:8000") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(f"{url!r} is no http URL; write it like http://127.0.0.1:8000")
    base = parts.path.rstrip("/").removesuffix("/chat/completions").removesuffix("/completions")
    return parts, base if base.endswith("/v1") else f"{base}/v1"


def _reach(url: str, host: str, port: int, timeout_s: float) -> str:
    """Return the numeric address that answers: in a run no request waits for a resolver."""
    try:
        with socket.create_connection((host, port), timeout=min(timeout_s, 10)) as sock:
            return str(sock.getpeername()[0])
    except OSError as error:
        raise BadInput(f"{url}: cannot be reached: {error.strerror or error}; is the server running?") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Caller:
    """Plain requests of the standard library; no proxy, as in the run."""

    url: str
    scheme: Literal["http", "https"]
    host: str
    port: int
    api_key: str | None
    timeout_s: float

    def call(self, method: str, path: str, body: Mapping[str, object] | None = None) -> tuple[int, str, bytes]:
        """Return status, content type and body.  Raises BadInput when no HTTP comes back."""
        kind = http.client.HTTPSConnection if self.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=self.timeout_s)
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        try:
            connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json", **key})
            response = connection.getresponse()
            return response.status, response.headers.get_content_type(), response.read()
        except TimeoutError as error:
            raise BadInput(f"{self.url}: {method} {path} was not answered within {self.timeout_s:g} s") from error
        except (http.client.HTTPException, OSError) as error:
            raise BadInput(f"{self.url}: {method} {path} gave no HTTP answer: {error!r}") from error
        finally:
            connection.close()

    def read_json(self, method: str, path: str, answer: tuple[int, str, bytes]) -> dict[str, Any]:
        """Return the JSON object of an answer.  Raises BadInput naming what came instead."""
        status, kind, data = answer
        what = f"{self.url}: {method} {path} answers {status} {kind}"
        if status in (401, 403):
            raise BadInput(f"{what}: the server wants an API key, or another one")
        try:
            document = json.loads(data)
        except ValueError:
            raise BadInput(f"{what}, not JSON: is this an OpenAI-compatible server?") from None
        if not isinstance(document, dict):
            raise BadInput(f"{what}, but no JSON object: is this an OpenAI-compatible server?")
        if status == 404:
            raise BadInput(f"{what}: there is no such endpoint or model; try another --endpoint or --model")
        if status in (429, 503) or status >= 500:
            raise MeasurementFailed(f"{what} to a single probe: {_message(document)}")
        if status != 200:
            raise BadInput(f"{what}: {_message(document)}")
        return document


def _model(caller: _Caller, path: str, model: str | None) -> str:
    answer = caller.call("GET", path)
    if answer[0] == 404 and model is not None:
        return model  # a server without a list; the probe will tell
    data = caller.read_json("GET", path, answer).get("data")
    names = [str(entry["id"]) for entry in data if isinstance(entry, dict) and "id" in entry] if isinstance(data, list) else []
    if not names:
        raise BadInput(f"{caller.url}: GET {path} lists no model; name one with --model")
    if model is not None and model not in names:
        raise BadInput(f"{caller.url}: serves no model {model!r}{did_you_mean(model, names)}")
    return model or names[0]


def _count_tokens(caller: _Caller, path: str, model: str, endpoint: str, texts: list[str]) -> tuple[list[tuple[int, int | None]], bool]:
    """Return (characters, prompt tokens by the server's count) of each text, and whether ignore_eos is understood."""
    counts: list[tuple[int, int | None]] = []
    ignore_eos = True
    for text in texts:
        prompt = {"messages": [{"role": "user", "content": text}]} if endpoint == "chat" else {"prompt": text}
        body: dict[str, object] = {"model": model, "max_tokens": 1, "temperature": 0, **prompt}
        answer = _try(caller, path, {**body, "ignore_eos": True} if ignore_eos else body)
        if answer[0] in (400, 422) and ignore_eos:
            retried = _try(caller, path, body)
            if retried[0] == 200:
                answer, ignore_eos = retried, False
        if answer[0] in (400, 422) and counts:
            break  # the longer text does not fit this model; one figure must do
        usage = caller.read_json("POST", path, answer).get("usage")
        tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        counts.append((len(text), tokens if isinstance(tokens, int) else None))
    return counts, ignore_eos


def _try(caller: _Caller, path: str, body: Mapping[str, object]) -> tuple[int, str, bytes]:
    """Ask again when the server fails or is busy: one bad answer in a hundred must not end the run before it starts."""
    for _ in range(_BUSY_TRIES):
        answer = caller.call("POST", path, body)
        if answer[0] not in (429, 503) and answer[0] < 500:
            break
    return answer


def _chars_per_token(counts: list[tuple[int, int | None]]) -> tuple[float, float, tuple[str, ...]]:
    """Return characters per token, tokens beside the text, and what to know about them."""
    known = [(chars, tokens) for chars, tokens in counts if tokens]
    if len(known) == 2 and known[1][1] > known[0][1]:
        ratio = (known[1][0] - known[0][0]) / (known[1][1] - known[0][1])
        extra = known[0][1] - known[0][0] / ratio
        return ratio, extra if math.isfinite(extra) else 0.0, ()
    if len(known) == 1:
        return known[0][0] / known[0][1], 0.0, ()
    note = f"the server does not count prompt tokens: prompts are built with {_USUAL_CHARS_PER_TOKEN:g} characters per token"
    return _USUAL_CHARS_PER_TOKEN, 0.0, (note,)


def _message(document: Mapping[str, Any]) -> str:
    error = document.get("error", document)
    return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
