"""What /proc says of CPU time: of the machine, of processes and all they started.  Source of the fields: proc(5)."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
_LISTENING = "0A"  # of /proc/net/tcp: TCP_LISTEN


class Times(NamedTuple):
    """CPU time of the machine since boot, in clock ticks of all its CPUs together."""

    total: int
    idle: int
    steal: int  # taken by the hypervisor


class Shares(NamedTuple):
    """Parts of the machine's CPU time in a window; None where the window had no tick."""

    steal: float | None
    other: float | None  # that ran, and not for us


class Process(NamedTuple):
    """One process: who started it, and its CPU time with that of the children it has waited for, in ticks."""

    parent: int
    ticks: int


def times(root: Path = PROC) -> Times | None:
    """Return the machine's CPU time, None where nothing tells it.  Guests' time is inside `user` already."""
    try:
        return times_of((root / "stat").read_text(encoding="utf-8").partition("\n")[0])
    except OSError:
        return None


def times_of(line: str) -> Times | None:
    """Return the CPU time in one line of /proc/stat: of the machine, or of one CPU."""
    try:
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, line.split()[1:9])
    except ValueError:
        return None
    total = user + nice + system + idle + iowait + irq + softirq + steal
    return Times(total, idle + iowait, steal) if total else None


def shares(before: Times | None, after: Times | None, ours_ticks: float) -> Shares:
    """Return what the hypervisor and other processes took of a window in which ours used so many ticks."""
    if before is None or after is None or after.total <= before.total:
        return Shares(None, None)
    total = after.total - before.total
    idle, steal = max(0, after.idle - before.idle), max(0, after.steal - before.steal)
    return Shares(min(1.0, steal / total), min(1.0, max(0.0, total - idle - steal - ours_ticks) / total))


def processes(root: Path = PROC) -> dict[int, Process]:
    """Return every process there is now.  One that ends meanwhile is left out."""
    found = {}
    for folder in root.iterdir() if root.is_dir() else ():
        if folder.name.isdecimal() and (process := _process(folder)) is not None:
            found[int(folder.name)] = process
    return found


def _process(folder: Path) -> Process | None:
    try:
        fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return Process(parent=int(fields[1]), ticks=sum(map(int, fields[11:15])))
    except (OSError, ValueError, IndexError):
        return None


def below(pids: Iterable[int], every: Mapping[int, Process]) -> set[int]:
    """Return these processes, those they started, and so on."""
    found = {pid for pid in pids if pid in every}
    while more := {pid for pid, process in every.items() if process.parent in found} - found:
        found |= more
    return found


def cpu_s(pids: Iterable[int]) -> float | None:
    """Return the CPU time of these processes and all below them, waited children included; None where /proc has none of them."""
    every = processes()
    known = below(pids, every)
    return sum(every[pid].ticks for pid in known) / ticks_per_s() if known else None


def ours_s(pids: Sequence[int] = ()) -> float:
    """Return the CPU time of this process, of what it started, ended or not, and of these processes and all below them."""
    every = processes()
    live = below((os.getpid(), *pids), every) - {os.getpid()}
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage) + sum(every[pid].ticks for pid in live) / ticks_per_s()


def involuntary(pids: Iterable[int], root: Path = PROC) -> int | None:
    """Return how often threads of these processes, and of all below them, had to leave a CPU they still wanted; None: nobody tells."""
    counts = [
        count for pid in below(pids, processes(root)) for task in _listed(root / str(pid) / "task") if (count := _forced(task)) is not None
    ]
    return sum(counts) if counts else None


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []  # ended meanwhile


def _forced(task: Path) -> int | None:
    try:
        lines = (task / "status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("nonvoluntary_ctxt_switches")), None)


def listeners(port: int, root: Path = PROC) -> tuple[int, ...]:
    """Return the processes of this machine that listen on a TCP port, as far as we may look into them."""
    wanted = {f"socket:[{inode}]" for name in ("tcp", "tcp6") for inode in _inodes(root / "net" / name, port)}
    return tuple(sorted(pid for pid in processes(root) if wanted and wanted & _sockets(root / str(pid) / "fd")))


def _inodes(table: Path, port: int) -> set[str]:
    try:
        rows = [line.split() for line in table.read_text(encoding="utf-8").splitlines()[1:]]
    except OSError:
        return set()
    return {row[9] for row in rows if row[3] == _LISTENING and int(row[1].rpartition(":")[2], 16) == port}


def _sockets(folder: Path) -> set[str]:
    found = set()
    for handle in _listed(folder):
        try:
            found.add(str(handle.readlink()))
        except OSError:
            continue  # closed meanwhile
    return found


def ticks_per_s() -> int:
    """Return how many clock ticks the kernel counts in a second."""
    return os.sysconf("SC_CLK_TCK")
