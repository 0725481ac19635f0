"""A server whose clients hang up gets everything back: blocks, files, seats."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from mlsys_bench import serve
from mlsys_bench.serve import Options

PATIENCE_S = 60.0
BLOCKS = 48
OPTIONS = Options(
    model="nano", port=0, max_batch=4, max_context=256, kv_tokens=16 * BLOCKS, prefix_cache=True, preempt="swap", speculate="ngram:3"
)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system does not say which files a process has open"),
]


def ask(url: str, body: dict[str, object], lines: int) -> bool:
    """Stream an answer and hang up after so many lines; return whether it had come to its end."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE_S)
    try:
        text = json.dumps({"model": "nano", "stream": True, **body})
        connection.request("POST", "/v1/completions", text, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return any(not answer.readline() for _ in range(lines))
    finally:
        connection.close()


def processes(pid: int) -> Iterator[int]:
    """Yield a process and all those below it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from processes(int(child))


def open_files(pid: int) -> int:
    """Return how many files a process and those below it have open."""
    return sum(len(list(Path(f"/proc/{p}/fd").iterdir())) for p in processes(pid))


def is_quiet(server: serve.ServerProcess, files: int) -> bool:
    """Say whether, before patience ends, all blocks are free and no more files open than so many."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        if server.health()["free_blocks"] == BLOCKS and open_files(server.process.pid) <= files:
            return True
    return False


def counted(server: serve.ServerProcess, name: str) -> float:
    """Return a counter of the server."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=PATIENCE_S)
    try:
        connection.request("GET", "/metrics")
        found = re.search(rf"^{name}_total (\S+)$", connection.getresponse().read().decode(), re.MULTILINE)
    finally:
        connection.close()
    assert found is not None, name
    return float(found[1])


def test_clients_that_hang_up_leave_nothing_behind() -> None:
    """Sixty clients with prompts that begin alike, most of which leave before the end of their answer."""
    rng = np.random.default_rng(0)
    with serve.start(OPTIONS) as server:
        assert ask(server.url, {"prompt": "ab" * 30, "max_tokens": 3}, 100)
        assert is_quiet(server, 10_000)
        files = open_files(server.process.pid)
        ended = [
            ask(
                server.url,
                {"prompt": "ab" * 30 + "c" * int(rng.integers(1, 30)), "max_tokens": int(rng.integers(1, 120))},
                int(rng.integers(1, 40)),
            )
            for _ in range(60)
        ]
        assert 0 < sum(ended) < 40
        assert is_quiet(server, files), f"{server.health()}, {open_files(server.process.pid)} files, {files} before"
        queries, hits = counted(server, "mlsys_prefix_cache_queries"), counted(server, "mlsys_prefix_cache_hits")
        assert 0 < hits < queries
        drafted = counted(server, "mlsys_spec_decode_num_draft_tokens")
        assert 0 <= counted(server, "mlsys_spec_decode_num_accepted_tokens") <= drafted
        assert drafted > 0
