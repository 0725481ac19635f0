"""The memory that this process may use, and the caches before it.  A container's limit counts as the machine's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

UNKNOWN_CACHE_BYTES = 64 * 2**20

_MEMINFO, _OWN, _CGROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")


def available_bytes() -> int | None:
    """Return the memory that may still be taken, None where the system does not say."""
    left = [limit - used + dropped for limit, used, dropped in group_limits(_OWN, _CGROUPS)]
    return min((*_told("MemAvailable"), *left), default=None)


def total_bytes() -> int | None:
    """Return all the memory there is, however much of it is taken, None where the system does not say."""
    return min((*_told("MemTotal"), *(limit for limit, _, _ in group_limits(_OWN, _CGROUPS))), default=None)


def _told(name: str) -> Iterator[int]:
    lines = _MEMINFO.read_text(encoding="utf-8").splitlines() if _MEMINFO.exists() else []
    return (int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def group_limits(own: Path, root: Path) -> Iterator[tuple[int, int, int]]:
    """Yield (limit, used, of that droppable) of each control group with a limit that this process is in.

    own: /proc/self/cgroup, lines of `number:controllers:path`; a container often sees its own group as the root.
    """
    lines = own.read_text(encoding="utf-8").splitlines() if own.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        base = root if not controllers else root / "memory"
        if controllers and "memory" not in controllers.split(","):
            continue
        names = ("memory.max", "memory.current") if not controllers else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        inner = Path(path.lstrip("/"))
        for group in dict.fromkeys((base / inner, *(base / parent for parent in inner.parents), base)):
            limit, used = (_number(group / name) for name in names)
            if limit is not None and used is not None:
                yield limit, used, _reclaimable(group / "memory.stat")


def _number(file: Path) -> int | None:
    text = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    return int(text) if text.isdigit() else None


def _reclaimable(stat: Path) -> int:
    """Return the file pages that the system drops when somebody needs the memory."""
    lines = stat.read_text(encoding="utf-8").splitlines() if stat.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "total_inactive_file "))), 0)


# ---------------------------------------------------------------- caches


def cache_bytes(cpus: frozenset[int] | None = None, root: Path = _CPUS) -> int:
    """Return the last-level caches of these CPUs together, by default of those this process may use; one that they share counts once.

    At least 64 MiB where no cache of level 3 is told: some machines list inner ones alone.
    """
    cpus = _allowed() if cpus is None else cpus
    last: dict[tuple[str, str], int] = {}  # by level and by the CPUs that share it
    is_told = False
    for cpu in sorted(cpus):
        found = {_word(index / "level"): index for index in sorted((root / f"cpu{cpu}" / "cache").glob("index*"))}
        if not found:
            continue
        outer = max(found)
        is_told |= outer in ("3", "4")
        last[outer, _word(found[outer] / "shared_cpu_list") or str(cpu)] = _sized(found[outer] / "size")
    together = sum(last.values())
    return together if is_told else max(together, UNKNOWN_CACHE_BYTES)


def _allowed() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset({0})


def _word(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def _sized(file: Path) -> int:
    """Return bytes of what the system writes as 2048K or 32M."""
    text = _word(file)
    scale = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
    digits = text.rstrip("KMG")
    return int(digits) * scale if digits.isdigit() else 0
