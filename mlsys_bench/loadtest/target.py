"""Look at the target before loading it: is it there, which API does it speak, which model, how many characters make a token."""

from __future__ import annotations

import dataclasses
import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from mlsys_bench.askings import Asked
from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest import detect, endpoints, prompts
from mlsys_bench.loadtest.answers import Answer
from mlsys_bench.loadtest.caller import Caller, Reply, message, shown
from mlsys_bench.loadtest.client import Client, Proxy, proxy_for, tls_context
from mlsys_bench.loadtest.endpoints import Ask, Spec
from mlsys_bench.loadtest.form import Form
from mlsys_bench.loadtest.wire import Response, WireError

_PROBE_ROUNDS = (2, 14)  # 300 and 2,000 characters; the difference is free of what a chat template or a begin-of-text token adds
_SHORT_CHARS = (140, 16)  # in place of those that do not fit; of a context of 256 bytes, say
_USUAL_CHARS_PER_TOKEN = 4.0  # English prose; only for servers that report no usage
_TEXTLESS = ("kserve", "locustfile")  # what they are asked is no text of some length


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
    endpoint: Spec
    is_websocket: bool = False
    proxy: Proxy | None = None  # on the way; `address` is its address then

    def chars(self, tokens: int) -> int:
        """Return how long a text must be to make a prompt of so many tokens."""
        return max(1, round((tokens - self.extra_tokens) * self.chars_per_token))

    @property
    def found(self) -> str:
        """Say in a line what is there."""
        if self.endpoint.name == "locustfile":
            return f"users of {self.model}; the target was not looked at"
        model = f", model {self.model}" if self.model else ""
        how = "streamed" if self.endpoint.streams else "not streamed"
        return f"{self.endpoint.name} at {shown(self.path)}{model}, {how}"

    @property
    def label(self) -> str:
        """Name the model, and the kind of endpoint where it is not the usual one."""
        return ", ".join(filter(None, (self.model, self.endpoint.name if self.endpoint.name != "completions" else "")))

    def as_sent(self, asked: Asked) -> Asked:
        """Return what requests of this kind really asked: several texts, numbers in place of words, no answer of some length."""
        kind, batch = self.endpoint.name, self.endpoint.form.batch
        if kind not in detect.WITHOUT_TOKENS:
            return asked
        texts = batch if kind in ("embeddings", "tei-embed") else None  # of the drawn length each; a rerank has a query beside
        return dataclasses.replace(
            asked,
            what=f"{'made-up numbers' if kind in _TEXTLESS else asked.what}, {batch} in each request",
            prompt_tokens=asked.prompt_tokens * texts if asked.prompt_tokens is not None and texts is not None else None,
            output_tokens=None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """What a server answered to the first texts."""

    spec: Spec
    counts: list[tuple[int, int | None]]  # (characters, prompt tokens by the server's count)


def probe(
    url: str,
    *,
    endpoint: str,
    model: str | None,
    api_key: str | None,
    timeout_s: float,
    seed: int,
    headers: Sequence[tuple[str, str]] = (),
    form: Form | None = None,
    client: Client | None = None,
) -> Target:
    """Return what is behind a URL.  Raises BadInput saying what came instead."""
    parts, url = parse(url), shown(url)
    is_websocket = parts.scheme in ("ws", "wss")
    scheme: Literal["http", "https"] = "https" if parts.scheme in ("https", "wss") else "http"
    host, port = parts.hostname or "", parts.port or (443 if scheme == "https" else 80)
    client = client or Client()
    proxy = proxy_for(client, scheme, host)
    address = _reach(url, host, port, timeout_s) if proxy is None else _reach(f"the proxy of {url}", proxy.host, proxy.port, timeout_s)
    key = [("Authorization", f"Bearer {api_key}")] if api_key and not any(name.lower() == "authorization" for name, _ in headers) else []
    caller = Caller(
        url=url, scheme=scheme, host=host, port=port, headers=(*key, *headers), timeout_s=timeout_s,
        tls=tls_context(client) if scheme == "https" else None, proxy=proxy,
    )  # fmt: skip
    wanted = detect.Wanted(
        endpoint=endpoint, model=model, form=form or Form(), path=parts.path.rstrip("/"), query=parts.query, is_websocket=is_websocket
    )
    sample = _first_that_answers(caller, detect.candidates(caller, wanted), _texts(seed))
    ratio, extra, notes = _chars_per_token(sample)
    spec = sample.spec
    refuses = not spec.ignore_eos and spec.name in ("completions", "chat", "responses")
    return Target(
        scheme=scheme, host=host, address=address, port=port, path=spec.path, model=spec.model, ignore_eos=spec.ignore_eos,
        chars_per_token=ratio, extra_tokens=extra, endpoint=spec, is_websocket=is_websocket, proxy=proxy,
        notes=(*notes, "the server refuses ignore_eos: answers may be shorter than asked") if refuses else notes,
    )  # fmt: skip


def parse(url: str) -> SplitResult:
    """Return the parts of an address.  Raises BadInput where it is none."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        _ = parts.port
    except ValueError as error:
        raise BadInput(f"{url!r} is no URL: {error}; write it like http://127.0.0.1:8000") from error
    if parts.scheme not in ("http", "https", "ws", "wss") or not parts.hostname:
        raise BadInput(f"{url!r} is no http URL; write it like http://127.0.0.1:8000")
    return parts


def _reach(url: str, host: str, port: int, timeout_s: float) -> str:
    """Return the numeric address that answers: in a run no request waits for a resolver."""
    try:
        with socket.create_connection((host, port), timeout=min(timeout_s, 10)) as sock:
            return str(sock.getpeername()[0])
    except (OSError, UnicodeError) as error:  # a name such as a..b is no name: Python's codec for names says so
        raise BadInput(f"{url}: cannot be reached: {getattr(error, 'strerror', None) or error}; is the server running?") from error


def _texts(seed: int) -> list[Ask]:
    text = prompts.Text(seed ^ 0x5EED)  # another text than the run's, so that no prefix is warm
    short = (text.prompt(i, chars) for i, chars in enumerate(_SHORT_CHARS, 2))
    return [Ask(text=words, output_tokens=1) for words in (*map(text.rounds, _PROBE_ROUNDS), *short)]


def _first_that_answers(caller: Caller, specs: Sequence[Spec], asks: Sequence[Ask]) -> _Sample:
    refusals = []
    for spec in specs:
        tried = _sample(caller, spec, asks)
        if isinstance(tried, _Sample):
            return tried
        refusals.append(tried)
    if len(refusals) == 1:
        raise BadInput(f"{caller.url}: {refusals[0]}")
    raise BadInput(f"{caller.url}: {len(refusals)} endpoints were tried and none answers: {'; '.join(refusals)}")


def _sample(caller: Caller, spec: Spec, asks: Sequence[Ask]) -> _Sample | str:
    """Ask for a little and see that it can be read; or say what came instead.  Raises where another endpoint would not help either.

    Asked and read by the very code of the run.  A WebSocket cannot be asked like this: it is taken as it is.
    """
    if spec.name == "websocket":
        endpoints.make(spec).body(asks[0])
        return _Sample(spec=spec, counts=[])
    counts: list[tuple[int, int | None]] = []
    refusal, too_long = "", math.inf
    for ask in asks if spec.name not in _TEXTLESS else asks[:1]:
        if len(counts) == len(_PROBE_ROUNDS) or len(ask.text) >= too_long:
            continue
        reply = _asked(caller, spec, ask)
        for way in _ways(spec) if reply.status in (400, 422) and not counts else ():
            retried = _asked(caller, way, ask)
            if retried.status == 200:
                reply, spec = retried, way
                break
        answer = _understood(caller, spec, reply)
        if isinstance(answer, Answer):
            counts.append((len(ask.text), answer.prompt_tokens))
        elif reply.status in (400, 413, 422):  # maybe it is longer than this model's context
            refusal, too_long = refusal or answer, len(ask.text)
        else:
            return answer
    if not counts:
        return refusal
    if spec.form.batch > 1 and spec.name not in _TEXTLESS:
        fits = next(ask for ask in asks if len(ask.text) == counts[0][0])
        answer = _understood(caller, spec, _asked(caller, spec, fits, batch=spec.form.batch))
        if isinstance(answer, str):
            return f"a request of {spec.form.batch}: {answer}"
    return _Sample(spec=spec, counts=counts)


def _ways(spec: Spec) -> list[Spec]:
    """Return how else to ask."""
    from mlsys_bench.loadtest.endpoints import openai

    if spec.name in ("completions", "chat", "responses"):
        return openai.variants(spec)
    return [dataclasses.replace(spec, ignore_eos=False)] if spec.ignore_eos else []


def _asked(caller: Caller, spec: Spec, ask: Ask, batch: int = 1) -> Reply:
    """Return what comes back for one small request, not streamed where that can be had."""
    form = spec.form if spec.name in _TEXTLESS else dataclasses.replace(spec.form, batch=batch)
    body = endpoints.make(_short(dataclasses.replace(spec, form=form))).body(ask)
    return caller.patiently(form.method, spec.path, body, spec.content_type, dict(spec.headers))


def _short(spec: Spec) -> Spec:
    return dataclasses.replace(spec, streams=spec.streams and spec.name not in ("completions", "chat", "responses"))


def _understood(caller: Caller, spec: Spec, reply: Reply) -> Answer | str:
    """Return the answer, or what is wrong with it."""
    if not endpoints.is_answer(spec, reply.status):
        if reply.status in (401, 403, 429) or (reply.status >= 500 and reply.status != 501):
            caller.refuse(reply)
        if reply.status == 404:
            return f"{reply}: there is no such endpoint or model; try another --endpoint or --model"
        return f"{reply}: {message(reply.json() or reply.data[:80])}"
    response = Response()
    response.status, response.headers, response.headers_at = 200, reply.headers, 0.0
    response.pieces = [(0.0, reply.data)] if reply.data else []
    try:
        return endpoints.make(_short(spec)).read(response)
    except WireError as error:
        return f"{reply}, but {error}"


def _chars_per_token(sample: _Sample) -> tuple[float, float, tuple[str, ...]]:
    """Return characters per token, tokens beside the text, and what to know about them."""
    known = sorted((chars, tokens) for chars, tokens in sample.counts if tokens)
    if len(known) == 2 and known[1][1] > known[0][1]:
        ratio = (known[1][0] - known[0][0]) / (known[1][1] - known[0][1])
        extra = known[0][1] - known[0][0] / ratio
        return ratio, extra if math.isfinite(extra) else 0.0, ()
    if len(known) == 1:
        return known[0][0] / known[0][1], 0.0, ()
    if sample.spec.name in _TEXTLESS:
        return _USUAL_CHARS_PER_TOKEN, 0.0, ()
    note = f"the server does not count prompt tokens: prompts are built with {_USUAL_CHARS_PER_TOKEN:g} characters per token"
    return _USUAL_CHARS_PER_TOKEN, 0.0, (note,)
