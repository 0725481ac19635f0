"""Refuse what does not fit before it is allocated."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mlsys_bench import units
from mlsys_bench.errors import BadInput, MlsysError
from mlsys_bench.hardware import memory

_M_MMAP_THRESHOLD = -3  # of malloc.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a model takes on its device, and what its preempted requests may take on the host."""

    name: str
    precision: str
    weights_bytes: int
    token_bytes: int  # of a token in the KV cache, scales included
    tokens: int
    host_tokens: int = 0

    @property
    def device_bytes(self) -> int:
        """Return weights and KV cache."""
        return self.weights_bytes + self.tokens * self.token_bytes

    @property
    def host_bytes(self) -> int:
        """Return what may be swapped out."""
        return self.host_tokens * self.token_bytes


def device_of(name: str) -> torch.device:
    """Return the device of a name, 'cpu' or 'cuda:0'.  Raises MlsysError where this machine has none of that kind."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"device {name!r}: the engine runs on cpu or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MlsysError(f"device {name!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here; use --device cpu")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device  # as tensors name it


def available_bytes(device: torch.device) -> int | None:
    """Return the memory that may still be taken, None where the system does not say."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.available_bytes()


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """Have every large piece of memory that is freed inside go back to the system at once.

    The C library keeps what is freed below a threshold, which it raises up to 32 MB by itself: loading matrix by matrix would leave holes
    half as large as the model.  Afterwards the threshold is those 32 MB, so that a step's tensors are kept from step to step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 18)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)


def refuse_misfit(need: Need, device: torch.device) -> None:
    """Raise BadInput, with the arithmetic, when weights and caches are more than is free."""
    host = available_bytes(torch.device("cpu"))
    if device.type == "cpu":
        _refuse(need, need.device_bytes + need.host_bytes, host, " of memory")
    else:
        _refuse(need, need.device_bytes, available_bytes(device), f" on {device}")
        if host is not None and need.host_bytes > host:
            raise BadInput(
                f"{need.name}: room for {need.host_tokens:,} preempted tokens is {units.show_bytes(need.host_bytes)},"
                f" and {units.show_bytes(host)} of host memory are free; give fewer host blocks, or preempt by recompute"
            )


def _refuse(need: Need, total: int, available: int | None, where: str) -> None:
    if available is None or total <= available:
        return
    token = units.show_bytes(need.token_bytes)
    swapped = f" + as much for {need.host_tokens:,} preempted ones" if need.host_tokens and total > need.device_bytes else ""
    raise BadInput(
        f"{need.name} in {need.precision} does not fit: weights {units.show_bytes(need.weights_bytes)}"
        f" + KV cache of {need.tokens:,} tokens x {token}{swapped} = {units.show_bytes(total)},"
        f" and {units.show_bytes(available)}{where} are free;"
        " take fewer KV tokens, a smaller model, a lower precision or --kv int8"
    )
