"""Little servers that speak the documented shapes of other people's APIs, on real sockets of 127.0.0.1."""

# ruff: noqa: D101, D102  each class is one API, each method one of its answers

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

Answer = tuple[int, str, list[bytes]]  # status, content type, chunks; one chunk goes out with its length


def as_json(body: object, status: int = 200) -> Answer:
    return status, "application/json", [json.dumps(body).encode()]


def as_events(*events: object, end: bytes = b"") -> Answer:
    written = [event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
    return 200, "text/event-stream; charset=utf-8", [*written, *([end] if end else [])]


NOT_FOUND = as_json({"error": "not found"}, 404)
DONE = b"data: [DONE]\n\n"


class Api(http.server.ThreadingHTTPServer):
    """Routes are (method, path).  Every request is kept: (method, path, headers, body)."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        raise NotImplementedError

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that leaves is part of these tests."""

    def asked(self, path: str) -> list[Any]:
        with self.lock:
            return [json.loads(body) for _, at, _, body in self.seen if at == path]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Api
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            self.server.seen.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        status, kind, chunks = self.server.answer(self.command, self.path, body)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in self.extra.items():
            self.send_header(name, value)
        if len(chunks) == 1:
            self.send_header("Content-Length", str(len(chunks[0])))
            self.end_headers()
            self.wfile.write(chunks[0] if self.command != "HEAD" else b"")
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        self.wfile.write(b"0\r\n\r\n")

    extra: ClassVar[dict[str, str]] = {"x-compute-tokens": "9"}  # TEI says the tokens it worked through in a header

    do_GET = do_POST = do_OPTIONS = do_PUT = do_HEAD = _any  # noqa: N815  http.server's names

    def log_message(self, *_: Any) -> None:
        """Keep the terminal quiet."""


@contextmanager
def serving(api: Api) -> Iterator[Any]:
    thread = threading.Thread(target=api.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield api
    finally:
        api.shutdown()
        api.server_close()
        thread.join()


# ---------------------------------------------------------------- OpenAI's API reference


MODELS = as_json({"object": "list", "data": [{"id": "tiny", "object": "model", "created": 1, "owned_by": "me"}]})


def chunk(delta: dict[str, Any], finish: str | None = None, usage: dict[str, int] | None = None) -> dict[str, Any]:
    """Return OpenAI's chat.completion.chunk."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "choices": [choice], "usage": usage}


def spent(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class ChatOnly(Api):
    """Chat, and neither completions nor anything else: as OpenAI's own newer models."""

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        if (method, path) == ("GET", "/v1/models"):
            return MODELS
        if path != "/v1/chat/completions":
            return as_json({"error": {"message": f"no {path}", "type": "invalid_request_error", "param": None, "code": None}}, 404)
        asked = json.loads(body)
        usage = spent(sum(len(m["content"]) for m in asked["messages"]), asked["max_tokens"])
        if not asked.get("stream"):
            message = {"role": "assistant", "content": "a" * asked["max_tokens"], "refusal": None}
            choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": None}
            return as_json({
                "id": "c", "object": "chat.completion", "created": 1, "model": "tiny", "choices": [choice], "usage": usage,
            })  # fmt: skip
        said = [chunk({"content": "a"}) for _ in range(asked["max_tokens"])]
        last = {**chunk({}), "choices": [], "usage": usage}
        return as_events(chunk({"role": "assistant", "content": ""}), *said, chunk({}, "length"), last, end=DONE)


def response(status: str, text: str = "", usage: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return OpenAI's response object."""
    part = {"type": "output_text", "text": text, "annotations": []}
    item = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [part]}
    return {
        "id": "r", "object": "response", "created_at": 1, "status": status, "model": "tiny", "output": [item] if text else [],
        "usage": usage, "error": None, "incomplete_details": None, "instructions": None, "metadata": {},
        "parallel_tool_calls": True, "temperature": 0,
        "tool_choice": "auto", "tools": [], "top_p": 1,
    }  # fmt: skip


def response_events(tokens: int, prompt: int) -> list[bytes]:
    """Return the stream that OpenAI's reference shows for a text: created, item and part added, deltas, done, completed."""
    usage = {
        "input_tokens": prompt, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}, "output_tokens": tokens,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt + tokens,
    }  # fmt: skip
    part = {"type": "output_text", "text": "", "annotations": []}
    at = {"item_id": "m", "output_index": 0, "content_index": 0}
    item = {"type": "message", "id": "m", "role": "assistant", "status": "in_progress", "content": []}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": response("in_progress")},
        {"type": "response.in_progress", "response": response("in_progress")},
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        {"type": "response.content_part.added", **at, "part": part},
        *({"type": "response.output_text.delta", **at, "delta": "a", "logprobs": []} for _ in range(tokens)),
        {"type": "response.output_text.done", **at, "text": "a" * tokens, "logprobs": []},
        {"type": "response.content_part.done", **at, "part": {**part, "text": "a" * tokens}},
        {"type": "response.output_item.done", "output_index": 0, "item": {**item, "status": "completed"}},
        {"type": "response.completed", "response": response("completed", "a" * tokens, usage)},
    ]
    named = [{**event, "sequence_number": i} for i, event in enumerate(events)]
    return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in named]


class ResponsesOnly(Api):
    def answer(self, method: str, path: str, body: bytes) -> Answer:
        if (method, path) == ("GET", "/v1/models"):
            return MODELS
        if path != "/v1/responses":
            return NOT_FOUND
        asked = json.loads(body)
        if asked.get("stream"):
            return as_events(*response_events(asked["max_output_tokens"], len(asked["input"])))
        usage = {"input_tokens": len(asked["input"]), "output_tokens": 1, "total_tokens": len(asked["input"]) + 1}
        return as_json(response("completed", "a", usage))


class Embedder(Api):
    """A vLLM that serves an embedding model: completions and chat are there and refuse."""

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        if (method, path) == ("GET", "/v1/models"):
            return MODELS
        if path in ("/v1/completions", "/v1/chat/completions"):
            return as_json({"error": {"message": "The model does not support this API", "type": "BadRequestError", "code": 400}}, 400)
        if path != "/v1/embeddings":
            return NOT_FOUND
        texts = json.loads(body)["input"]
        data = [{"object": "embedding", "index": i, "embedding": [0.1, 0.2]} for i in range(len(texts))]
        tokens = sum(map(len, texts))
        return as_json({"object": "list", "data": data, "model": "tiny", "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})


class Reranker(Api):
    """Jina's and vLLM's /v1/rerank."""

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        if (method, path) == ("GET", "/v1/models"):
            return MODELS
        if path != "/v1/rerank":
            return NOT_FOUND
        asked = json.loads(body)
        tokens = sum(len(text) + len(asked["query"]) for text in asked["documents"])
        results = [{"index": i, "document": {"text": d}, "relevance_score": 0.5} for i, d in enumerate(asked["documents"])]
        return as_json({"id": "rerank-1", "model": "tiny", "usage": {"total_tokens": tokens}, "results": results})


# ---------------------------------------------------------------- text-embeddings-inference and text-generation-inference: openapi.json


class TextEmbeddings(Api):
    model_type: ClassVar[dict[str, Any]] = {"embedding": {"pooling": "cls"}}

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        if (method, path) == ("GET", "/info"):
            return as_json({"model_id": "thenlper/gte-base", "model_type": self.model_type, "max_input_length": 512, "version": "1.7.1"})
        if path == "/embed":
            return as_json([[0.1, 0.2] for _ in json.loads(body)["inputs"]])
        if path == "/rerank":
            return as_json([{"index": i, "score": 0.5} for i in range(len(json.loads(body)["texts"]))])
        return NOT_FOUND


class TextRanks(TextEmbeddings):
    model_type: ClassVar[dict[str, Any]] = {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}


class TextGeneration(Api):
    def answer(self, method: str, path: str, body: bytes) -> Answer:
        if (method, path) == ("GET", "/info"):
            return as_json({"model_id": "org/llm", "max_concurrent_requests": 128, "max_input_tokens": 1024, "version": "3.3.5"})
        if path != "/generate_stream":
            return NOT_FOUND
        asked = json.loads(body)
        n = asked["parameters"]["max_new_tokens"]
        token = {"id": 5, "text": "a", "logprob": -0.1, "special": False}
        details = {"finish_reason": "length", "generated_tokens": n, "seed": None, "input_length": len(asked["inputs"])}
        events = [{"index": i + 1, "token": token, "generated_text": None, "details": None} for i in range(n)]
        events[-1] |= {"generated_text": "a" * n, "details": details}
        return as_events(*(b"data:" + json.dumps(event).encode() + b"\n\n" for event in events))


# ---------------------------------------------------------------- the Open Inference Protocol, Triton's generate extension


class Triton(Api):
    """Triton's docs: "v2/models/NAME", "v2/repository/index", inputs with datatype and shape."""

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        if path == "/v2":
            return as_json({"name": "triton", "version": "2.60.0", "extensions": ["classification", "model_repository", "generate"]})
        if path == "/v2/repository/index":
            return as_json([{"name": "broken", "state": "UNAVAILABLE"}, {"name": "resnet", "version": "1", "state": "READY"}])
        if path == "/v2/models/resnet":
            inputs = [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 4]}, {"name": "flip", "datatype": "BOOL", "shape": [-1, 1]}]
            outputs = [{"name": "scores", "datatype": "FP32", "shape": [-1, 2]}]
            return as_json({"name": "resnet", "versions": ["1"], "platform": "onnxruntime_onnx", "inputs": inputs, "outputs": outputs})
        if path == "/v2/models/resnet/infer":
            return self.infer(body)
        return as_json({"error": f"unexpected {path}"}, 400)

    def infer(self, body: bytes) -> Answer:
        asked, _ = json.JSONDecoder().raw_decode(body.decode("latin-1"))  # binary tensors may follow
        rows = asked["inputs"][0]["shape"][0]
        scores = {"name": "scores", "datatype": "FP32", "shape": [rows, 2], "data": [0.5] * (2 * rows)}
        return as_json({"model_name": "resnet", "model_version": "1", "outputs": [scores]})


class TritonText(Triton):
    """A decoupled model behind Triton's generate extension."""

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        if path == "/v2/models/resnet":
            inputs = [{"name": "text_input", "datatype": "BYTES", "shape": [1]}, {"name": "stream", "datatype": "BOOL", "shape": [1]}]
            return as_json({"name": "resnet", "versions": ["1"], "platform": "vllm", "inputs": inputs, "outputs": []})
        if path == "/v2/models/resnet/generate_stream":
            n = json.loads(body)["max_tokens"]
            return as_events(*({"model_name": "resnet", "model_version": "1", "text_output": "a"} for _ in range(n)))
        if path == "/v2/models/resnet/generate":
            return as_json({"model_name": "resnet", "model_version": "1", "text_output": "aaa"})
        return super().answer(method, path, body)


# ---------------------------------------------------------------- TorchServe: docs/inference_api.md; TensorFlow Serving: api_rest.md


class TorchServe(Api):
    def answer(self, method: str, path: str, body: bytes) -> Answer:
        if path == "/ping":
            return as_json({"status": "Healthy"})
        if method == "OPTIONS":
            return as_json({"openapi": "3.0.1", "paths": {"/": {}, "/ping": {}, "/predictions/{model_name}": {}, "/predictions/bert": {}}})
        if path == "/predictions/bert":
            return 200, "text/plain", [b"so ", b"it ", b"is"]
        return NOT_FOUND


class TFServing(Api):
    def answer(self, method: str, path: str, body: bytes) -> Answer:
        if path == "/v1/models/model":
            status = {"version": "123", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
            return as_json({"model_version_status": [status]})
        if path == "/v1/models/model:predict":
            asked = json.loads(body)
            rows = asked.get("instances") or next(iter(asked["inputs"].values()))
            return as_json({"predictions" if "instances" in asked else "outputs": [0.5] * len(rows)})
        return as_json({"error": "Malformed request: GET " + path}, 400)


# ---------------------------------------------------------------- an API of one's own


class Plain(Api):
    """What is said of a resource: the path names the status.  204 and /empty have no body."""

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        status = 200 if path == "/empty" else int(path[1:])
        return status, "application/json", [b"" if path in ("/empty", "/204") else b'{"id": 1}']


class Homemade(Api):
    """JSON lines: an event a line, its end and the tokens so far in fields of their own."""

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        if path.split("?")[0] != "/say":
            return NOT_FOUND
        n = json.loads(body)["length"]
        events = [{"out": {"words": "ab"}, "made": 2 * (i + 1), "last": i + 1 == n} for i in range(n)]
        return 200, "application/x-ndjson", [json.dumps(event).encode() + b"\n" for event in events]
