"""Instructions of a command through `perf stat`: a figure that neighbours cannot disturb.  Source of the format: perf-stat(1), -x."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

EVENT = "instructions:u"  # of user space: the kernel's share depends on what else happens
_MOST_SKIPPED = 0.999  # of the time that the counter must have run; less is an extrapolation
PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")


def counting(command: Sequence[str], file: Path) -> list[str]:
    """Return a command that counts the instructions of another one, of all its processes, into a file."""
    return ["perf", "stat", "-x,", "-e", EVENT, "-o", str(file), "--", *command]


@functools.cache
def missing() -> str | None:
    """Return why instructions cannot be counted here, None where they can: tried once on a command that does nothing."""
    if shutil.which("perf") is None:
        return "perf is not installed (Debian: linux-perf)"
    with tempfile.TemporaryDirectory(prefix="mlsys-gate-") as folder:
        file = Path(folder) / "perf"
        tried = subprocess.run(counting(["true"], file), capture_output=True, text=True, check=False)
        said = file.read_text(encoding="utf-8") if file.is_file() else ""
    if tried.returncode == 0 and read(said) is not None:
        return None
    if "<not supported>" in said:
        return "this machine has no such counter, as most virtual machines"
    level = PARANOID.read_text(encoding="utf-8").strip() if PARANOID.is_file() else "unknown"
    return f"perf may not count here (perf_event_paranoid is {level}; 2 or less is needed)"


def read(text: str) -> int | None:
    """Return the instructions in what `perf stat -x,` wrote, those of all kinds of core together; None where it did not count them all."""
    rows = [line.split(",") for line in text.splitlines() if line and not line.startswith("#")]
    counted = [row for row in rows if len(row) >= 5 and "instructions" in row[2]]
    if not counted or any(not row[0].isdecimal() or float(row[4]) < 100 * _MOST_SKIPPED for row in counted if row[0] != "<not counted>"):
        return None
    known = [int(row[0]) for row in counted if row[0].isdecimal()]
    return sum(known) if known else None
