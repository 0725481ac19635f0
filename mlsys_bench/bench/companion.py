"""A neighbour for the engine under measurement: `python -m mlsys_bench.bench.companion CORES`.

A served engine never has the machine for itself: on the core beside it one process turns its tokens into HTTP and another reads them, which
costs it cache and memory bandwidth, 4 to 10 % on the small machines tried.  Steps measured alone would promise what nobody gets.  This
process does such work at such a pace: tokens as JSON events through a socket, parsed again, for 2 of every 5 ms.  It ends when its standard
input does, so that it outlives nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

WORK_S, REST_S = 2e-3, 3e-3


@contextlib.contextmanager
def beside(cores: Sequence[int]) -> Iterator[bool]:
    """Have a companion on these cores meanwhile; give whether there is one, which without a core to spare there is not."""
    if not cores:
        yield False
        return
    command = [sys.executable, "-m", "mlsys_bench.bench.companion", ",".join(map(str, cores))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdout.readline()  # it works now
            yield True
        finally:
            child.stdin.close()


def allowed() -> tuple[int, ...]:
    """Return the cores this process may use."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def spare(pinned: str | None, cores: Sequence[int]) -> tuple[int, ...]:
    """Return the first of these cores after those of an engine pinned to '0,1', where `serve` puts HTTP; none where nothing is pinned."""
    taken = set() if pinned is None else {int(core) for core in pinned.split(",")}
    return tuple(core for core in cores if taken and core not in taken)[:1]


def shares_a_core(cpu: int, root: Path = Path("/sys/devices/system/cpu")) -> bool:
    """Say whether this CPU is a hyperthread beside others of one core, as far as the system tells."""
    try:
        return not (root / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="utf-8").strip().isdigit()
    except OSError:
        return False


def main(argv: Sequence[str]) -> int:
    """Work until standard input ends."""
    os.sched_setaffinity(0, {int(core) for core in argv[0].split(",")})
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        while not select.select([sys.stdin], [], [], REST_S)[0]:
            end_s = time.perf_counter() + WORK_S
            while time.perf_counter() < end_s:
                pass_on(ours, theirs, 65)
    return 0


def pass_on(ours: socket.socket, theirs: socket.socket, token: int) -> str:
    """Send one token as an event of a stream, receive and parse it; return its text."""
    choice = {"index": 0, "text": chr(token), "token_ids": [token], "finish_reason": None}
    ours.sendall(
        b"data: " + json.dumps({"id": "cmpl-1", "object": "text_completion", "created": 0, "choices": [choice]}).encode() + b"\n\n"
    )
    event = theirs.recv(4096).removeprefix(b"data: ")
    return str(json.loads(event)["choices"][0]["text"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
