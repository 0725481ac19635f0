"""Ctrl-C and SIGTERM while a gate measures: they end it, but never between a start and the note of it, or half way through an end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Take SIGTERM, as runners send it to a cancelled job, for a Ctrl-C: what was started is ended, what was made is removed."""
    if not _may_set():
        yield
        return

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    usual = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold an interrupt back until the block has ended.  A signal that is ignored, or ends the process at once, stays as it is."""
    came: list[int] = []
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if _may_set() else {}
    replaced = {number: handler for number, handler in usual.items() if callable(handler)}
    try:
        for number in replaced:
            signal.signal(number, lambda number, _frame: came.append(number))
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def _may_set() -> bool:
    return threading.current_thread() is threading.main_thread()
