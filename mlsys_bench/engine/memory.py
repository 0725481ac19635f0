"""Refuse what does not fit before it is allocated."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mlsys_bench import units
from mlsys_bench.errors import BadInput, MlsysError

_M_MMAP_THRESHOLD = -3  # of malloc.h
_CGROUPS = Path("/sys/fs/cgroup")


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
    """Return the memory that may still be taken, None where the system does not say: a container's limit counts as the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    whole, groups = _machine_bytes(Path("/proc/meminfo")), _group_bytes(Path("/proc/self/cgroup"), _CGROUPS)
    return min(groups, default=None) if whole is None else min(whole, *groups)


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


def _machine_bytes(meminfo: Path) -> int | None:
    if not meminfo.exists():
        return None
    line = next((line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")), None)
    return int(line.split()[1]) * 1024 if line else None


def _group_bytes(own: Path, root: Path) -> Iterator[int]:
    """Yield what each control group that this process is in leaves it: its limit less what is used and cannot be dropped.

    own: /proc/self/cgroup, lines of `number:controllers:path`; a container often sees its own group as the root.
    """
    lines = own.read_text().splitlines() if own.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        base = root if not controllers else root / "memory"
        if controllers and "memory" not in controllers.split(","):
            continue
        names = ("memory.max", "memory.current") if not controllers else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        inner = Path(path.lstrip("/"))
        for group in dict.fromkeys((base / inner, *(base / parent for parent in inner.parents), base)):
            limit, used = (_number(group / name) for name in names)
            if limit is not None and used is not None:
                yield limit - used + _reclaimable(group / "memory.stat")


def _number(file: Path) -> int | None:
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdigit() else None


def _reclaimable(stat: Path) -> int:
    """Return the file pages that the system drops when somebody needs the memory."""
    lines = stat.read_text().splitlines() if stat.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "total_inactive_file "))), 0)
