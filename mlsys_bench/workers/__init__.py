"""Work spread over workers: a map over any `concurrent.futures.Executor`, with the same results whoever does the work.

    each(), as_done()   the map, in order or as results come; what all pieces share is sent to a worker once
    hired()             who does the work, as `--cluster` says: one of the two below
    Local               processes of this machine (`local.py`), started only where the work left would take longer than starting them
    cluster()           the workers of a Dask scheduler (`remote.py`), where one machine is not enough

A piece is a function of what is shared and of its item alone.  Its randomness comes from a seed that belongs to the item, so neither the
number of workers nor their order shows in a result.  Functions are sent by name: they stand at the top of a module.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, as_completed
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from mlsys_bench.errors import MeasurementFailed

if TYPE_CHECKING:
    from mlsys_bench.workers.local import Processes

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")
Told = Callable[[int, int], object]  # so many pieces are done, of so many

STARTING_S = 2.0  # of work left from which on processes are worth their start: about a second of CPU each


def each(
    function: Callable[[Shared, Item], Result],
    items: Sequence[Item],
    *,
    shared: Shared,
    executor: Executor | Local | None = None,
    told: Told | None = None,
) -> list[Result]:
    """Return `function(shared, item)` of each item, in their order; in this process without an executor.

    An error of a piece comes back as itself, that of the first item if several have one, and nothing more is begun.
    """
    found = dict(as_done(function, items, shared=shared, executor=executor, told=told))
    return [found[i] for i in range(len(items))]


def as_done(
    function: Callable[[Shared, Item], Result],
    items: Sequence[Item],
    *,
    shared: Shared,
    executor: Executor | Local | None = None,
    told: Told | None = None,
) -> Iterator[tuple[int, Result]]:
    """Yield (index, result) as results come; what was not begun is called off when the caller stops or is interrupted."""
    spent_s = 0.0
    for i, item in enumerate(items):
        crew = executor.worth(spent_s, i, len(items)) if isinstance(executor, Local) else executor
        if crew is not None:
            yield from _handed_out(crew, function, items, i, shared, told)
            return
        begun = time.perf_counter()
        result = function(shared, item)
        spent_s += time.perf_counter() - begun
        if told is not None:
            told(i + 1, len(items))
        yield i, result


def _handed_out(
    crew: Executor, function: Callable[[Shared, Item], Result], items: Sequence[Item], first: int, shared: Shared, told: Told | None
) -> Iterator[tuple[int, Result]]:
    """Yield the results of the items from `first` on."""
    given = crew.share(shared) if isinstance(crew, Sharing) else shared
    futures: dict[Future[Result], int] = {}
    try:
        for i in range(first, len(items)):
            futures[crew.submit(piece, function, given, items[i])] = i
        for done, future in enumerate(as_completed(futures), first + 1):
            if future.exception() is not None:  # an item before it may fail, too: the first error is the one to be told
                raise next(error for error in (earlier.exception() for earlier in futures) if error is not None)
            if told is not None:
                told(done, len(items))
            yield futures[future], future.result()
    except (BrokenExecutor, CancelledError) as error:
        why = "a worker went before it answered, as one does whose memory runs out, or the scheduler did"
        raise MeasurementFailed(f"{why}; run again with more memory or fewer workers") from error
    finally:
        for future in futures:
            future.cancel()


def piece(function: Callable[[Any, Any], Result], given: Any, item: Any) -> Result:
    """Return the result of one piece, on a worker."""
    try:
        return function(given.value() if isinstance(given, Kept) else given, item)
    except Exception as error:
        raise sendable(error) from None


def sendable(error: Exception) -> Exception:
    """Return an error as it is if it survives the way between processes, else its words."""
    try:
        same = type(pickle.loads(pickle.dumps(error))) is type(error)  # noqa: S301  our own bytes
    except Exception:  # whatever its own constructor raises
        same = False
    return error if same else RuntimeError(f"{type(error).__name__}: {error}")


@runtime_checkable
class Sharing(Protocol):
    """An executor that brings a value to each worker once."""

    def share(self, value: Any) -> Any:
        """Return what stands for a value among the arguments of a piece."""


@runtime_checkable
class Kept(Protocol):
    """What stands for a value until a worker asks for it."""

    def value(self) -> Any:
        """Return the value."""


# ---------------------------------------------------------------- who works


@contextlib.contextmanager
def hired(address: str | None, threads: int = 1) -> Iterator[Executor | Local]:
    """Give what works: a cluster where one is named, else this machine, whose pieces may use so many threads each."""
    if address is None:
        with Local(threads) as local:
            yield local
        return
    from mlsys_bench.workers.remote import cluster

    with cluster(address) as crew:
        yield crew


class Local:
    """Processes of this machine, as many as there are cores for, started when there is enough to do for them."""

    def __init__(self, threads: int = 1, count: int | None = None) -> None:
        """Leave room for pieces that use so many threads themselves."""
        self._count = len(os.sched_getaffinity(0)) // threads if count is None else count
        self._crew: Processes | None = None

    def worth(self, spent_s: float, done: int, of: int) -> Executor | None:
        """Return the processes if what is left, at the mean time of a piece so far, would take longer than starting them."""
        left = of - done
        if self._crew is None and self._count > 1 and left > 1 and done and spent_s * left > STARTING_S * done:
            from mlsys_bench.workers.local import Processes

            self._crew = Processes(self._count)
        return self._crew if left > 1 else None

    def __enter__(self) -> Local:
        """Start nothing yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """End the processes, if there are any."""
        if self._crew is not None:
            self._crew.__exit__(kind, error, trace)
