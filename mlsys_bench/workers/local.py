"""Worker processes of this machine that never outlive the one they work for."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


class Processes(ProcessPoolExecutor):
    """Worker processes with one BLAS thread each.  None outlives the block it was made for, nor this process, however these end.

    Each holds the end of a pipe, its leash, and ends with it.  Ctrl-C reaches this process alone: workers are born with it blocked.
    """

    def __init__(self, count: int) -> None:
        spawning = multiprocessing.get_context("spawn")  # a fork would copy locks and BLAS pools in whatever state they are
        self._end, self._leash = spawning.Pipe(duplex=False)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._shared = 0
        super().__init__(count, mp_context=spawning, initializer=_put_on_leash, initargs=(self._end,))

    def submit(self, function: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        """Hand out a piece; the process for it may be born here."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(_on_leash, function, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def share(self, value: Any) -> Any:
        """Keep a value in a file that each worker reads once."""
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="mlsys-shared-")
        self._shared += 1
        path = Path(self._folder.name) / str(self._shared)
        path.write_bytes(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
        return InFile(path)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Wait for the processes to end; after an error or an interrupt they end at once, with what they were doing."""
        if kind is not None:
            self._leash.close()
        self.shutdown(wait=True, cancel_futures=True)
        self._leash.close()
        self._end.close()
        if self._folder is not None:
            self._folder.cleanup()


class InFile:
    """A value that waits in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def value(self) -> Any:
        """Return the value, read once in each process."""
        return _read(self.path)


@functools.lru_cache(maxsize=2)
def _read(path: Path) -> Any:
    return pickle.loads(path.read_bytes())  # noqa: S301  our own bytes


# ---------------------------------------------------------------- in the worker

_AT_WORK = threading.Lock()  # held while a piece is computed, not while its result is sent


def _put_on_leash(end: Connection) -> None:
    """Begin a worker."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # before numpy comes with the first piece
    threading.Thread(target=_follow, args=(end,), daemon=True).start()


def _follow(end: Connection) -> None:
    """End this process when the leash is let go: at once while it computes, else with the pool or the parent.

    Never while a result is being sent: the pool would wait for its other half.
    """
    wait([end])
    if not _AT_WORK.acquire(blocking=False):
        os._exit(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _on_leash(function: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Result:
    """Do a piece, unless the leash was let go before."""
    if not _AT_WORK.acquire(blocking=False):
        os._exit(1)
    try:
        return function(*args, **kwargs)
    finally:
        _AT_WORK.release()
