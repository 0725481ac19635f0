"""Who multiplies fastest here, for each number format and number of rows: measured once a machine, and kept in a file.

A matrix is packed for one backend, as two packings would take twice the memory, and a step is computed by one.  So the backend of a
precision is the one that is faster over all numbers of rows (geometric mean); torch must be so by MARGIN, as a step in C also spares
torch's small operators, a seventh of a step at a billion parameters and more below (docs/adr/0030-who-multiplies.md).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from mlsys_bench import hardware
from mlsys_bench.engine.native import build, library

FORMATS = ("fp32", "bf16", "int8", "w8a8", "int4g32", "w4a8g32")
ROWS = (1, 8, 64, 256)
MARGIN = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The CPU time of one product by one thread of each backend: a matrix of `format` times so many rows."""

    format: str
    rows: int
    native_s: float
    torch_s: float


def file() -> Path:
    """Return where this machine's timings are kept: another processor, torch or source has another file."""
    hard = sorted((name, str(value)) for name, value in hardware.machine().hard.items())
    about = json.dumps(["CPU time", hard, build.source_digest(), os.environ.get("MLSYS_NATIVE_LEVEL")])
    return build.cache_folder() / f"linears-{hashlib.sha256(about.encode()).hexdigest()[:20]}.json"


def read(path: Path) -> tuple[Timing, ...] | None:
    """Return the timings of a file, None where there is none, or one of another make."""
    try:
        found = tuple(Timing(**entry) for entry in json.loads(path.read_text()))
        return found if found and all(t.native_s > 0.0 and t.torch_s > 0.0 for t in found) else None
    except (OSError, ValueError, TypeError):
        return None


def write(path: Path, timings: tuple[Timing, ...]) -> None:
    """Keep timings; whoever reads meanwhile sees all of them or none.  A cache that cannot be written is done without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="timing-") as folder:
            fresh = Path(folder) / path.name
            fresh.write_text(json.dumps([asdict(t) for t in timings], indent=1))
            fresh.replace(path)
    except OSError:
        return


def known(measure: Callable[[], tuple[Timing, ...]]) -> tuple[Timing, ...]:
    """Return the timings of this machine, measured now if nobody has yet.  None at all without the C kernels: there is no choice."""
    return _known(file(), measure) if library.load() is not None else ()


@functools.cache
def _known(path: Path, measure: Callable[[], tuple[Timing, ...]]) -> tuple[Timing, ...]:
    found = read(path)
    if found is None:
        found = measure()
        write(path, found)
    return found


def best(timings: tuple[Timing, ...], name: str) -> str:
    """Return the backend for matrices of a format; int4 of any group is as int4g32.  Torch where nothing was measured."""
    ratios = [t.native_s / t.torch_s for t in timings if t.format == name]
    return "native" if ratios and math.prod(ratios) ** (1 / len(ratios)) <= MARGIN else "torch"


def told(timings: tuple[Timing, ...]) -> str:
    """Return the timings as a line: per format who gets its matrices, and how much faster that is at how many rows."""
    return "; ".join(_told(name, [t for t in timings if t.format == name], best(timings, name)) for name in FORMATS)


def _told(name: str, timings: list[Timing], chosen: str) -> str:
    ratios = (t.torch_s / t.native_s if chosen == "native" else t.native_s / t.torch_s for t in timings)
    return f"{name} {chosen} " + "/".join(f"{ratio:.1f}" for ratio in ratios) + "x"
