"""`python -m mlsys_bench.loadtest.truth --port 9001 --ttft 100ms --itl 20ms`: serve until interrupted."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import math
import os
import select
import socket
import sys
import typing
from collections.abc import Sequence
from typing import Any

from mlsys_bench import units
from mlsys_bench.errors import BadInput, MlsysError
from mlsys_bench.loadtest import truth
from mlsys_bench.loadtest.truth.loop import Server

_PR_SET_TIMERSLACK = 29
_HELP = {
    "ttft_s": "first token after the request was read",
    "itl_s": "between tokens; 0: all at once",
    "tokens": "of every answer; left out: as many as are asked",
    "tokens_per_event": "tokens in one event",
    "role": "chat: the event that names the role comes with token 1, early (on arrival) or never (none)",
    "headers": "of streams: early (on arrival) or late (with token 1)",
    "whole_s": "what an answer that is not streamed takes",
    "slots": "requests in service at once; the others wait",
    "stall_every_s": "the server freezes so often",
    "stall_s": "for so long",
    "error_share": "of the requests, answered 500",
    "seed": "of the errors",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve.  Prints one line with the URL once it listens."""
    try:
        given = _parser().parse_args(arguments)
        how = _behaviour({name: value for name, value in vars(given).items() if name in _HELP and value is not None})
        listener = _listen(given.port)
    except MlsysError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    if given.core is not None:
        os.sched_setaffinity(0, {given.core})
    _be_punctual()
    server = Server(how, listener)
    sys.stdout.write(f"truth server on http://127.0.0.1:{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sys.stdin.fileno() if given.until_stdin_closes else None)
    server.close()
    return 0


def flags(how: truth.Behaviour) -> list[str]:
    """Return the flags that make a server behave so."""
    values = {f.name: getattr(how, f.name) for f in dataclasses.fields(how)}
    return [f"--{_flag(name)}={value}{'s' if name.endswith('_s') else ''}" for name, value in values.items() if value is not None]


def _flag(name: str) -> str:
    return name.removesuffix("_s").replace("_", "-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mlsys_bench.loadtest.truth", description=truth.__doc__)
    parser.add_argument("--port", type=int, default=9001, help="on 127.0.0.1; 0: any free one")
    parser.add_argument("--core", type=int, help="run on this core alone")
    parser.add_argument("--until-stdin-closes", action="store_true", help="end when the process that started it does")
    for f in dataclasses.fields(truth.Behaviour):
        parser.add_argument(f"--{_flag(f.name)}", dest=f.name, metavar=_flag(f.name).upper(), help=f"{_HELP[f.name]} ({f.default})")
    return parser


def _behaviour(given: dict[str, str]) -> truth.Behaviour:
    """Return the behaviour that flags describe.  Raises BadInput."""
    wanted = typing.get_type_hints(truth.Behaviour)
    how = truth.Behaviour(**{name: _value(name, text, wanted[name]) for name, text in given.items()})
    counts = [n for n in (how.tokens, how.tokens_per_event, how.slots) if n is not None]
    if min(counts) < 1 or not 0 <= how.error_share <= 1:
        raise BadInput("tokens, tokens per event and slots are 1 or more, an error share lies between 0 and 1")
    return how


def _value(name: str, text: str, kind: Any) -> Any:
    options = typing.get_args(kind)
    if name.endswith("_s"):
        return units.seconds("0s" if text == "0" else text, f"--{_flag(name)}")
    if isinstance(options[0] if options else None, str):
        if text not in options:
            raise BadInput(f"--{_flag(name)} {text}: it is one of {', '.join(options)}")
        return text
    try:
        number = float(text) if kind is float else int(text)
    except ValueError:
        raise BadInput(f"--{_flag(name)} {text}: is no number") from None
    if not math.isfinite(number):
        raise BadInput(f"--{_flag(name)} {text}: is no finite number")
    return number


def _listen(port: int) -> socket.socket:
    if not hasattr(select, "epoll"):
        raise BadInput("the truth server needs Linux: it waits with epoll")
    sock = socket.socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        sock.listen(4096)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise BadInput(f"port {port} cannot be listened on: {error.strerror or error}; try --port 0") from error
    return sock


def _be_punctual() -> None:
    """Ask for timers without slack (the kernel's default groups them within 50 µs) and for as many sockets as may be had."""
    import resource

    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
