"""Probing a server of some API, asking it once, and reading its answer in pieces."""

from __future__ import annotations

import itertools
import socket
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from mlsys_bench.loadtest import endpoints, target, wire
from mlsys_bench.loadtest.endpoints import Ask

ASK = Ask(text="so what is it that you would like to know about this", output_tokens=3)


def probe(url: str, **more: Any) -> target.Target:
    usual: dict[str, Any] = {"endpoint": "auto", "model": None, "api_key": None, "timeout_s": 5.0, "seed": 0}
    return target.probe(url, **{**usual, **more})


def answer_bytes(url: str, found: target.Target, ask: Ask = ASK) -> bytes:
    """Return the whole HTTP response to one request of the run's own making."""
    spec, place = found.endpoint, urlsplit(url)
    body = endpoints.make(spec).body(ask)
    lines = [f"{spec.form.method} {spec.path} HTTP/1.1", f"Host: {place.netloc}", f"Content-Type: {spec.content_type}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in (*spec.headers, ("Content-Length", str(len(body))))]
    with closing(socket.create_connection((place.hostname, place.port), timeout=5)) as sock:
        sock.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        return b"".join(iter(lambda: sock.recv(65536), b""))


def fed(data: bytes, cuts: list[int] | None = None) -> wire.Response:
    """Return a response that was read in pieces, each stamped with the number of bytes that had come by then."""
    response, bounds = wire.Response(), sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts or [])})
    for start, end in itertools.pairwise(bounds):
        response.feed(data[start:end], float(end))
    return response
