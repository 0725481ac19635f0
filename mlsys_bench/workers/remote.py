"""The workers of a Dask scheduler (extra `cluster`)."""

from __future__ import annotations

import contextlib
import logging
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from mlsys_bench.errors import BadInput, NotComparable

Result = TypeVar("Result")

ANSWERS_S = 5.0  # that a scheduler has to answer, and its first worker to be there
LIBRARIES = ("mlsys-bench", "numpy", "scipy", "numba")  # whose versions decide the last bit of a result


@contextlib.contextmanager
def cluster(address: str) -> Iterator[Executor]:
    """Give the workers of the Dask scheduler at an address such as tcp://host:8786.  They are not ours to end: pieces begun are finished.

    Raises BadInput where Dask is missing, nobody answers or there is no worker; NotComparable where workers run other versions.
    """
    client = _client(address)
    try:
        _check_workers(client, address)
        yield _Cluster(client)
    finally:
        client.close()


def _client(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError:
        raise BadInput(f"--cluster {address}: Dask is not installed; install mlsys-bench with its extra: mlsys-bench[cluster]") from None
    if "://" not in address:
        raise BadInput(f"--cluster {address}: write the scheduler's address with its protocol, e.g. tcp://{address or 'host:8786'}")
    for name in ("distributed", "distributed.client"):  # what goes wrong is told in a line of our own, without tracebacks beside it
        logging.getLogger(name).setLevel(logging.CRITICAL)
    connect: Any = Client  # its types say little
    try:
        return connect(address, timeout=ANSWERS_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"--cluster {address}: no Dask scheduler answers there: {error}") from None


class _Cluster(Executor):
    """A Dask client as an executor."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._executor = client.get_executor(pure=False)

    def submit(self, function: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        """Hand out a piece."""
        future: Future[Result] = self._executor.submit(function, *args, **kwargs)
        return future

    def share(self, value: Any) -> Any:
        """Send a value to every worker; pieces get it in place of what is returned."""
        return self._client.scatter([value], broadcast=True, hash=False)[0]


def _check_workers(client: Any, address: str) -> None:
    """Raise where there is no worker, or one whose results may differ from ours in their last bits."""
    try:
        client.wait_for_workers(1, timeout=ANSWERS_S)
    except TimeoutError:
        raise BadInput(f"--cluster {address}: the scheduler has no worker; start some with `dask worker {address} --nthreads 1`") from None
    try:
        found = {"the scheduler": client.run_on_scheduler(versions), **client.run(versions)}  # the scheduler reads pieces, too
    except ImportError as error:
        raise BadInput(f"--cluster {address}: its processes cannot run mlsys ({error}); install mlsys-bench there as here") from None
    here = versions()
    for who, there in found.items():
        differing = [f"{name} {there.get(name)} where here it is {own}" for name, own in here.items() if there.get(name) != own]
        if differing:
            raise NotComparable(f"--cluster {address}: {who} has {', '.join(differing)}: results would depend on who computes them")


def versions() -> dict[str, str]:
    """Return the versions that decide the bits of a result."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, "machine": platform.machine()} | {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
