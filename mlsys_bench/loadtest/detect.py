"""Which API does a server speak, and which model does it serve: what was asked for, what the URL says, else what it answers.

Tried in this order, the first that fits wins: the path of the URL; OpenAI's list of models and then completions, chat, embeddings, rerank
and responses; `/info` of Hugging Face's servers; the metadata of the Open Inference Protocol; TorchServe's ping; TensorFlow Serving's
model status.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlsys_bench import errors
from mlsys_bench.errors import BadInput, did_you_mean
from mlsys_bench.loadtest.caller import Caller, Reply, message
from mlsys_bench.loadtest.endpoints import Spec, kinds
from mlsys_bench.loadtest.form import Form

_OPENAI = {
    "completions": "/completions",
    "chat": "/chat/completions",
    "embeddings": "/embeddings",
    "rerank": "/rerank",
    "responses": "/responses",
}  # fmt: skip  in the order they are tried
_GENERATING = ("completions", "chat", "responses")
_FREE = ("http", "websocket", "torchserve")  # whose form a person describes
WITHOUT_TOKENS = ("embeddings", "rerank", "tei-embed", "tei-rerank", "kserve", "tfserving")  # in their answers
_MODEL_PATHS = {
    "kserve": "/v2/models/{model}/infer",
    "triton-generate": "/v2/models/{model}/generate",
    "triton-stream": "/v2/models/{model}/generate_stream",
    "torchserve": "/predictions/{model}",
    "tfserving": "/v1/models/{model}:predict",
}
_PATHS = {"tei-embed": "/embed", "tei-rerank": "/rerank", "tgi": "/generate_stream", "http": "/", "websocket": "/"}
_OWN_PATHS = (
    (re.compile(r"(?P<base>.*)/chat/completions"), "chat"),
    (re.compile(r"(?P<base>.*)/completions"), "completions"),
    (re.compile(r"(?P<base>.*)/responses"), "responses"),
    (re.compile(r"(?P<base>.*)/embeddings"), "embeddings"),
    (re.compile(r"(?P<base>.*/v[12])/rerank"), "rerank"),
    (re.compile(r"(?P<base>.*)/v2/models/(?P<model>[^/]+)(/versions/[^/]+)?/infer"), "kserve"),
    (re.compile(r"(?P<base>.*)/v2/models/(?P<model>[^/]+)(/versions/[^/]+)?/generate"), "triton-generate"),
    (re.compile(r"(?P<base>.*)/v2/models/(?P<model>[^/]+)(/versions/[^/]+)?/generate_stream"), "triton-stream"),
    (re.compile(r"(?P<base>.*)/predictions/(?P<model>[^/]+)(/[^/]+)?"), "torchserve"),
    (re.compile(r"(?P<base>.*)/v1/models/(?P<model>[^/:]+)(/versions/[^/]+)?:(predict|classify|regress)"), "tfserving"),
    (re.compile(r"(?P<base>.*)/embed"), "tei-embed"),
    (re.compile(r"(?P<base>.*)/rerank"), "tei-rerank"),
    (re.compile(r"(?P<base>.*)/generate_stream"), "tgi"),
)
_TF_SERVING_USUAL_MODEL = "model"  # MODEL_NAME of its container image


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a person said."""

    endpoint: str  # a kind, or auto
    model: str | None
    form: Form
    path: str  # of the URL, without a slash at the end
    query: str = ""
    is_websocket: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A URL's path taken apart."""

    base: str
    kind: str | None = None
    model: str | None = None
    full: str | None = None  # the whole path, where the URL names an endpoint itself


@dataclass(frozen=True, slots=True)
class Tried:
    """What was asked of a server and what came instead."""

    said: list[str] = field(default_factory=list)

    def note(self, reply: Reply) -> None:
        """Write an answer down that did not help."""
        self.said.append(str(reply))


def candidates(caller: Caller, wanted: Wanted) -> list[Spec]:
    """Return the endpoints to try, the best first: one where a person or the URL named it.  Raises BadInput."""
    found = _found(caller, wanted)
    unfit = [_unfit(spec) for spec in found]
    if all(unfit):
        raise BadInput(f"{caller.url}: {unfit[0]}")
    query = f"?{wanted.query}" if wanted.query else ""  # Azure's API has its version there, some gateways their key
    fit = (spec for spec, why in zip(found, unfit, strict=True) if why is None)
    return [dataclasses.replace(spec, path=f"{spec.path}{query}") for spec in fit]


def _unfit(spec: Spec) -> str | None:
    """Say which option an endpoint has no use for: nobody should believe it was heeded."""
    name, form = spec.name, spec.form
    if form.batch > 1 and name not in (*WITHOUT_TOKENS, *_FREE):
        return f"--batch {form.batch}: {name} takes one prompt a request"
    if form.streams is not None and form.streams != spec.streams:
        return f"--{'stream' if form.streams else 'no-stream'}: {name} {'always' if spec.streams else 'never'} streams"
    if (form.inputs and name not in ("kserve", "tfserving")) or (form.binary and name != "kserve"):
        return f"--input and --binary: {name} takes no tensors"
    if (form.template is not None or form.response_path is not None) and name not in _FREE:
        return f"--body-template and --response-path: {name} has a form of its own; use --endpoint http"
    return None


def _found(caller: Caller, wanted: Wanted) -> list[Spec]:
    if wanted.endpoint not in ("auto", *kinds()):
        raise errors.unknown("endpoint", wanted.endpoint, ["auto", *kinds()])
    place = taken_apart(wanted.path)
    kind = wanted.endpoint if wanted.endpoint != "auto" else _implied(wanted, place)
    if kind == "tei-rerank" and wanted.endpoint == "auto":  # vLLM has this path too, and asks in another way
        return [_named(caller, "tei-rerank", wanted, place), _spec("rerank", wanted.path, wanted.model or "", wanted.form)]
    if kind is not None:
        return [_named(caller, kind, wanted, place)]
    tried = Tried()
    for look in (_openai, _hugging_face, _inference_protocol, _torchserve, _tf_serving):
        found = look(caller, wanted, place, tried)
        if found:
            return found
    if wanted.model is not None:  # a server without any list: asking is the last way to find out
        return [_spec(name, f"{_v1(place.base)}{path}", wanted.model, wanted.form) for name, path in _OPENAI.items()]
    raise BadInput(
        f"{caller.url}: speaks no API known here ({'; '.join(tried.said)}): name one with --endpoint, or describe yours with "
        "--endpoint http and --body-template"
    )


def taken_apart(path: str) -> Place:
    """Return what a URL's path says by itself."""
    for pattern, kind in _OWN_PATHS:
        found = pattern.fullmatch(path)
        if found is not None:
            return Place(base=found["base"], kind=kind, model=found.groupdict().get("model"), full=path)
    return Place(base=path)


def _implied(wanted: Wanted, place: Place) -> str | None:
    if wanted.is_websocket:
        return "websocket"
    if wanted.form.template is not None and place.kind != "torchserve":
        return "http"
    return place.kind


def _named(caller: Caller, kind: str, wanted: Wanted, place: Place) -> Spec:
    """Return the endpoint that was named, with the model that is served where nobody named one."""
    form, own = wanted.form, place.full if place.kind == kind else None
    if kind in _OPENAI:
        model = _listed(caller, f"{_v1(place.base)}/models", wanted.model, is_needed=own is None)
        return _spec(kind, own or f"{_v1(place.base)}{_OPENAI[kind]}", model, form)
    if kind in ("tei-embed", "tei-rerank", "tgi"):
        return _spec(kind, own or place.base + _PATHS[kind], wanted.model or _info_model(caller, place.base), form)
    if kind in _PATHS:
        return _spec(kind, wanted.path or "/", wanted.model or "", form)
    model = wanted.model or place.model or _guessed_model(caller, kind, place)
    return _of_model(caller, kind, model, place, form)


def _of_model(caller: Caller, kind: str, model: str, place: Place, form: Form) -> Spec:
    """Return an endpoint whose path names a model."""
    path = place.full if place.kind == kind and place.full else place.base + _MODEL_PATHS[kind].format(model=model)
    settings: dict[str, Any] = {}
    if kind == "kserve" and not form.inputs:
        settings = {"inputs": described_inputs(caller, f"{place.base}/v2/models/{model}", form)}
    return _spec(kind, path, model, form, settings)


def _spec(name: str, path: str, model: str, form: Form, settings: Mapping[str, Any] | None = None) -> Spec:
    """Return an endpoint with the head that its API wants."""
    from mlsys_bench.loadtest.endpoints import kserve

    always = name in ("triton-stream", "tgi", "websocket")
    can = name in (*_GENERATING, "http", "torchserve")
    streams = always or (can and (form.streams if form.streams is not None else name in _GENERATING))
    plain = name in ("http", "torchserve") and form.template is None
    spec = Spec(
        name=name, path=form.path or path, model=model, streams=streams, ignore_eos=name in _GENERATING or name.startswith("triton"),
        settings=dict(settings or {}), form=form, content_type="text/plain" if plain else "application/json",
    )  # fmt: skip
    if name != "kserve" or not form.binary:
        return spec
    head = (("Inference-Header-Content-Length", str(kserve.binary_head_bytes(spec))),)
    return dataclasses.replace(spec, content_type="application/octet-stream", headers=head)


# ---------------------------------------------------------------- one look at each kind of server


def _openai(caller: Caller, wanted: Wanted, place: Place, tried: Tried) -> list[Spec]:
    reply = caller.call("GET", f"{_v1(place.base)}/models")
    document = reply.json()
    if reply.status == 200 and isinstance(document, dict) and isinstance(document.get("data"), list):
        model = _chosen(caller, reply.path, document, wanted.model)
        return [_spec(name, f"{_v1(place.base)}{path}", model, wanted.form) for name, path in _OPENAI.items()]
    if reply.status in (401, 403, 429) or (reply.status >= 500 and reply.status != 501):
        caller.refuse(reply)
    tried.note(reply)
    return []


def _hugging_face(caller: Caller, wanted: Wanted, place: Place, tried: Tried) -> list[Spec]:
    reply = caller.call("GET", f"{place.base}/info")
    info = reply.json()
    if reply.status != 200 or not isinstance(info, dict) or "model_id" not in info:
        tried.note(reply)
        return []
    model = wanted.model or str(info["model_id"])
    of = info.get("model_type")  # {"embedding": …}, {"reranker": …} or {"classifier": …}; text-generation-inference has none
    kind = "tgi" if of is None else "tei-rerank" if "reranker" in of else "tei-embed"
    return [_spec(kind, place.base + _PATHS[kind], model, wanted.form)]


def _inference_protocol(caller: Caller, wanted: Wanted, place: Place, tried: Tried) -> list[Spec]:
    reply = caller.call("GET", f"{place.base}/v2")
    said = reply.json()
    if reply.status != 200 or not isinstance(said, dict) or "name" not in said:
        tried.note(reply)
        ready = caller.call("GET", f"{place.base}/v2/health/ready")  # what a server without metadata must have
        if ready.status != 200 or ready.kind == "text/html":  # a web site has a page for every path
            tried.note(ready)
            return []
    model = wanted.model or _repository_model(caller, place.base)
    inputs = {str(entry.get("name")) for entry in _metadata(caller, f"{place.base}/v2/models/{model}").get("inputs", [])}
    kind = "triton-stream" if "text_input" in inputs else "kserve"
    return [_of_model(caller, kind, model, place, wanted.form)]


def _torchserve(caller: Caller, wanted: Wanted, place: Place, tried: Tried) -> list[Spec]:
    reply = caller.call("GET", f"{place.base}/ping")
    said = reply.json()
    if reply.status != 200 or not isinstance(said, dict) or not {"health", "status"} & set(said):
        tried.note(reply)
        return []
    model = wanted.model or _guessed_model(caller, "torchserve", place)
    return [_of_model(caller, "torchserve", model, place, wanted.form)]


def _tf_serving(caller: Caller, wanted: Wanted, place: Place, tried: Tried) -> list[Spec]:
    model = wanted.model or _TF_SERVING_USUAL_MODEL
    reply = caller.call("GET", f"{place.base}/v1/models/{model}")
    said = reply.json()
    if reply.status != 200 or not isinstance(said, dict) or "model_version_status" not in said:
        tried.note(reply)
        return []
    return [_of_model(caller, "tfserving", model, place, wanted.form)]


# ---------------------------------------------------------------- models


def _v1(base: str) -> str:
    return base if base.endswith(("/v1", "/v2")) else f"{base}/v1"


def _listed(caller: Caller, path: str, model: str | None, *, is_needed: bool) -> str:
    """Return the model to ask for.  A server without a list is asked for what was named; the probe will tell."""
    reply = caller.call("GET", path)
    if reply.status == 404 and (model is not None or not is_needed):
        return model or ""
    return _chosen(caller, path, caller.checked(reply), model)


def _chosen(caller: Caller, path: str, document: Mapping[str, Any], model: str | None) -> str:
    data = document.get("data")
    names = [str(entry["id"]) for entry in data if isinstance(entry, dict) and "id" in entry] if isinstance(data, list) else []
    if not names:
        raise BadInput(f"{caller.url}: GET {path} lists no model; name one with --model")
    if model is not None and model not in names:
        raise BadInput(f"{caller.url}: serves no model {model!r}{did_you_mean(model, names)}")
    return model or names[0]


def _info_model(caller: Caller, base: str) -> str:
    info = caller.call("GET", f"{base}/info").json()
    return str(info.get("model_id", "")) if isinstance(info, dict) else ""


def _guessed_model(caller: Caller, kind: str, place: Place) -> str:
    guess: Callable[[Caller, str], str] = {"torchserve": _described_model, "tfserving": lambda _c, _b: _TF_SERVING_USUAL_MODEL}.get(
        kind, _repository_model
    )
    return guess(caller, place.base)


def _repository_model(caller: Caller, base: str) -> str:
    """Return the first model that is ready, by Triton's model repository extension."""
    reply = caller.call("POST", f"{base}/v2/repository/index", b"{}")
    listed = reply.json() if reply.status == 200 else None
    ready = (
        [str(m["name"]) for m in listed if isinstance(m, dict) and m.get("state", "READY") == "READY"] if isinstance(listed, list) else []
    )
    if not ready:
        raise BadInput(f"{caller.url}: {reply}, which lists no model; name one with --model")
    return ready[0]


def _described_model(caller: Caller, base: str) -> str:
    """Return the first model in TorchServe's description of its API."""
    reply = caller.call("OPTIONS", f"{base}/")
    described = reply.json()
    paths = described.get("paths", {}) if isinstance(described, dict) else {}
    names = [str(path).removeprefix("/predictions/") for path in paths if str(path).startswith("/predictions/") and "{" not in str(path)]
    if not names:
        raise BadInput(f"{caller.url}: {reply}, which lists no model; name one with --model")
    return names[0]


def _metadata(caller: Caller, path: str) -> dict[str, Any]:
    reply = caller.call("GET", path)
    said = reply.json()
    if reply.status != 200 or not isinstance(said, dict):
        raise BadInput(f"{caller.url}: {reply}: {message(said)}; is the model named as the server names it?")
    return said


def described_inputs(caller: Caller, path: str, form: Form) -> list[dict[str, Any]]:
    """Return the inputs of a model, by the server's metadata.  Raises BadInput where one has a dimension that nobody can guess."""
    import msgspec

    from mlsys_bench.loadtest.endpoints import kserve

    inputs = _metadata(caller, path).get("inputs")
    if not isinstance(inputs, list) or not inputs:
        raise BadInput(f"{caller.url}: GET {path} names no inputs; say what they are with --input NAME:DATATYPE:SHAPE")
    sized = [kserve.sized(str(t["name"]), str(t["datatype"]), [int(n) for n in t["shape"]], form.batch) for t in inputs]
    return [msgspec.to_builtins(tensor) for tensor in sized]
