"""The words of HTTP around a request: its head, names of hosts, when to come again."""

from __future__ import annotations

from email.utils import parsedate_to_datetime

from mlsys_bench.loadtest import job
from mlsys_bench.loadtest.client import authority, authorization


def head(work: job.Job) -> bytes | None:
    """Return the head of a request up to what changes with each; None where there is none, on a WebSocket."""
    if work.transport == "websocket":
        return None
    path, there = work.endpoint.path, host_and_port(work)
    is_through_proxy = work.proxy is not None and work.scheme == "http"
    usual = [
        ("Host", host_header(work)),
        ("Content-Type", work.endpoint.content_type),
        ("Accept", "text/event-stream" if work.endpoint.streams else "application/json"),
        *([] if work.client.keep_alive else [("Connection", "close")]),
        *(authorization(work.proxy) if is_through_proxy else []),
    ]
    own = job.own_headers(work)
    set_by_hand = {name.lower() for name, _ in own}
    headers = [*((name, value) for name, value in usual if name.lower() not in set_by_hand), *own]
    first = f"{work.endpoint.form.method} {f'http://{there}{path}' if is_through_proxy else path} HTTP/1.1"
    return "\r\n".join([first, *(f"{name}: {value}" for name, value in headers), ""]).encode("latin-1")


def host_and_port(work: job.Job) -> str:
    """Return the server as a tunnel names it."""
    return authority(work.host, work.port)


def host_header(work: job.Job) -> str:
    """Return the server as a Host header names it: gateways know their names without the usual port."""
    return host_and_port(work).removesuffix(":443" if work.scheme == "https" else ":80")


def retry_after_s(header: str | None, now_unix_s: float) -> float | None:
    """Return the seconds that a Retry-After header asks for, given in seconds or as a date; None where it says nothing of use."""
    if not header:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - now_unix_s)
    except ValueError:
        return None
