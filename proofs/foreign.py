"""A server that is not ours: llama.cpp's from PyPI with a random model, loaded and held against a plain client.  `nox -s bench -- foreign`.

Optional: it needs an interpreter that has `llama-cpp-python[server]` and `gguf` (a virtual environment of its own will do; the first
compiles llama.cpp), named with --python or MLSYS_LLAMA_PYTHON.  Without one the proof says so and proves nothing.

The plain client is the standard library's, one request after another; the load test's single user must see the same times, and its tokens
must be as many as the server itself counts.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mlsys_bench import loadtest
from mlsys_bench.types import Lengths, LoadTest, RequestRecord, Requests

TIME_BAR = 0.15  # of the median E2E of one user, beside that of the plain client
TOKENS, PROMPT = 24, 40
ROUNDS = 3
START_S = 60.0
NEEDED = "import gguf, llama_cpp.server.app"

# a llama of two layers with random weights.  The row of </s> in the output matrix is zero: no answer ends before its time.
MODEL = """
import sys
import gguf
import numpy as np
rng, dim, layers, heads, hidden = np.random.default_rng(1), 64, 2, 4, 128
names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(chr(c) for c in range(97, 123)), "\\u2581"]
kinds = [2, 3, 3, *([6] * 256), *([1] * 27)]
out = gguf.GGUFWriter(sys.argv[1], "llama")
out.add_name("random"); out.add_context_length(2048); out.add_embedding_length(dim); out.add_block_count(layers)
out.add_feed_forward_length(hidden); out.add_head_count(heads); out.add_head_count_kv(heads); out.add_rope_dimension_count(dim // heads)
out.add_layer_norm_rms_eps(1e-5); out.add_file_type(0); out.add_tokenizer_model("llama"); out.add_token_list(names)
out.add_token_scores([0.0] * len(names)); out.add_token_types(kinds)
out.add_bos_token_id(1); out.add_eos_token_id(2); out.add_unk_token_id(0)
def put(name, *shape):
    out.add_tensor(name, np.ones(shape, np.float32) if len(shape) == 1 else (rng.standard_normal(shape) * 0.1).astype(np.float32))
put("token_embd.weight", len(names), dim); put("output_norm.weight", dim)
last = (rng.standard_normal((len(names), dim))).astype(np.float32); last[:3] = 0.0; last[3:259] *= 0.01
out.add_tensor("output.weight", last)
for i in range(layers):
    for part in ("attn_norm", "ffn_norm"):
        put(f"blk.{i}.{part}.weight", dim)
    for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
        put(f"blk.{i}.{part}.weight", dim, dim)
    put(f"blk.{i}.ffn_gate.weight", hidden, dim); put(f"blk.{i}.ffn_up.weight", hidden, dim); put(f"blk.{i}.ffn_down.weight", dim, hidden)
out.write_header_to_file(); out.write_kv_data_to_file(); out.write_tensors_to_file(); out.close()
"""


def main() -> int:
    """Load llama.cpp's server; print every figure beside its bar; return how many missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--python", default=os.environ.get("MLSYS_LLAMA_PYTHON", sys.executable), help="an interpreter with llama-cpp-python"
    )
    asked = parser.parse_args()
    lacks = subprocess.run([asked.python, "-c", NEEDED], capture_output=True, text=True, check=False)
    if lacks.returncode:
        said = (lacks.stderr.strip().splitlines() or ["no word"])[-1]
        print(f"skipped: {asked.python} cannot serve llama.cpp ({said}); pip install 'llama-cpp-python[server]' gguf, or name a --python")
        return 0
    with tempfile.TemporaryDirectory() as folder, _serving(asked.python, Path(folder)) as url:
        return sum(_held(url, kind) for kind in ("auto", "chat"))


@contextlib.contextmanager
def _serving(python: str, folder: Path) -> Iterator[str]:
    """Write a model, serve it, give the URL."""
    model = folder / "random.gguf"
    subprocess.run([python, "-c", MODEL, str(model)], check=True)
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [
        python, "-m", "llama_cpp.server", "--model", str(model), "--model_alias", "random", "--host", "127.0.0.1", "--port", str(port),
        "--n_ctx", "512", "--n_threads", "1", "--interrupt_requests", "false",  # else a second request ends the first
    ]  # fmt: skip
    with (folder / "server.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            _wait(port, server, folder / "server.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _wait(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the server answers."""
    until = time.monotonic() + START_S
    while time.monotonic() < until and server.poll() is None:
        with contextlib.suppress(OSError), contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=2)) as connection:
            connection.request("GET", "/v1/models")
            connection.getresponse().read()
            return
        time.sleep(0.2)
    raise SystemExit(f"llama.cpp's server does not answer: {log.read_text(errors='replace').strip()[-300:]}")


def _held(url: str, endpoint: str) -> int:
    """Load one endpoint and hold it against the plain client."""
    chat = endpoint == "chat"
    plain, requests = list[float](), list[RequestRecord]()
    for _ in range(ROUNDS):  # by turns: whatever else the machine does meets both
        plain += _plain(url, chat)
        alone, seen = _loaded(url, endpoint, users=1)
        requests += seen.requests
    ours = [r.token_s[-1] - r.scheduled_s for r in requests if r.outcome == "ok" and r.in_window]
    plain_s, found_s = statistics.median(plain), statistics.median(ours)
    off = found_s / plain_s - 1
    counts = sorted({r.output_tokens or 0 for r in requests if r.outcome == "ok"})
    sources = sorted({r.token_source or "none" for r in requests if r.outcome == "ok"})
    failed = sum(r.outcome != "ok" for r in requests)
    flood, _ = _loaded(url, endpoint, qps=0.5 / plain_s)
    print(
        f"{alone.target}: {len(requests) - failed} of {len(requests)} answered to one user, {flood.ok} of {flood.requests} in an open loop"
    )
    print(f"  the client of itself: {alone.validity.verdict}; {'; '.join(alone.validity.reasons)}")
    print(f"  tokens {counts} by {sources}, asked {TOKENS}, by the server's own count {_usage(url, chat)}")
    print(f"  E2E p50 {1e3 * found_s:.2f} ms, plain client {1e3 * plain_s:.2f} ms: {off:+.1%} (bar {TIME_BAR:.0%})")
    print(f"  open loop at half its speed: TTFT p50 {1e3 * (flood.ttft_s.p50 or 0):.2f} ms, E2E p50 {1e3 * (flood.e2e_s.p50 or 0):.2f} ms")
    return sum((
        failed > 0, flood.ok != flood.requests, counts != [TOKENS], _usage(url, chat) != TOKENS, abs(off) > TIME_BAR,
    ))  # fmt: skip


def _loaded(url: str, endpoint: str, **how: float) -> tuple[LoadTest, Requests]:
    return loadtest.run(loadtest.Options(
        url=url, endpoint=endpoint, duration_s=5.0, warmup_s=1.0, prompt_tokens=Lengths(mean=PROMPT), output_tokens=Lengths(mean=TOKENS),
        metrics=("off",), **how,  # type: ignore[arg-type]
    ))  # fmt: skip


def _plain(url: str, chat: bool) -> list[float]:
    """Return the seconds that streamed requests take, one after another over one connection."""
    took = []
    with contextlib.closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)) as connection:
        for i in range(40):
            began = time.perf_counter()
            connection.request("POST", *_request(chat, f"{i} words ", stream=True))
            connection.getresponse().read()
            took.append(time.perf_counter() - began)
    return took


def _usage(url: str, chat: bool) -> int:
    with contextlib.closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)) as connection:
        connection.request("POST", *_request(chat, "so it is ", stream=False))
        return int(json.loads(connection.getresponse().read())["usage"]["completion_tokens"])


def _request(chat: bool, text: str, *, stream: bool) -> tuple[str, str, dict[str, str]]:
    """Return path, body and head of a request as its users send it."""
    prompt = (text * PROMPT)[:PROMPT]
    asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    body = json.dumps({"model": "m", "max_tokens": TOKENS, "temperature": 0, "stream": stream, **asked})
    return "/v1/chat/completions" if chat else "/v1/completions", body, {"Content-Type": "application/json"}


if __name__ == "__main__":
    sys.exit(main())
