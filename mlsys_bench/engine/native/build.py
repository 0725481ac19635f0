"""Compile the C source once per source, compiler and processor, into a cache folder that processes share."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mlsys_bench.errors import BadInput

SOURCE = Path(__file__).parent / "csrc"
# no contraction: a * b + c is rounded the same wherever the compiler puts it
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread", "-Wall")
EMULATED = "-DMLSYS_EMULATE_TILES"  # AMX's instructions as plain C functions, to test what surrounds them on any machine
OLD_ASSEMBLER = "-DMLSYS_OLD_ASSEMBLER"  # one that knows neither tiles nor pairs of bf16


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """Where the compiled library lies, or why there is none."""

    path: Path | None
    detail: str  # the compiler and the file, or the reason


def built(*options: str) -> Built:
    """Return the library for this processor, compiled now if it has not been yet.  Nothing is raised: the engine can do without."""
    if os.environ.get("MLSYS_NATIVE") == "0":
        return Built(path=None, detail="turned off by MLSYS_NATIVE=0")
    compiler = find_compiler()
    if compiler is None:
        return Built(path=None, detail="no C compiler (cc, gcc or clang) on PATH")
    try:
        path = cache_folder() / f"kernels-{digest(compiler, *options)}.so"
    except BadInput as error:
        return Built(path=None, detail=str(error))
    if _is_whole(path):
        return Built(path=path, detail=f"{compiler}, {path}")
    wrong = compile_to(path, compiler, *options) and compile_to(path, compiler, *options, OLD_ASSEMBLER)
    return Built(path=None if wrong else path, detail=wrong or f"{compiler}, {path}")


def find_compiler() -> str | None:
    """Return the path of a C compiler: the one that CC names, else the first of cc, gcc and clang."""
    return next((found for found in map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang")) if found), None)


def cache_folder() -> Path:
    """Return where compiled kernels and measured choices are kept: $MLSYS_CACHE, else the user's cache.  Raises BadInput without a home."""
    chosen = os.environ.get("MLSYS_CACHE")
    if chosen:
        return Path(chosen)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    except RuntimeError:  # a user that the system does not know, as containers have them
        raise BadInput("this user has no home to keep compiled kernels in; set MLSYS_CACHE to a folder that can be written") from None
    return Path(base) / "mlsys"


def _is_whole(path: Path) -> bool:
    """Whether a library lies there whole: one that a crash cut off ends the process that reads it."""
    try:
        with path.open("rb") as file:
            head, size = file.read(64), path.stat().st_size
    except OSError:
        return False
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":
        return len(head) == 64 and head[:4] != b"\x7fELF"  # of a system with other libraries
    order = "<" if head[5] == 1 else ">"
    (table,), (each, count) = struct.unpack_from(f"{order}Q", head, 0x28), struct.unpack_from(f"{order}HH", head, 0x3A)
    return bool(size >= table + each * count > 0)  # linkers put the table of sections last


def sources() -> list[Path]:
    """Return the files that are compiled."""
    return sorted(SOURCE.glob("*.c"))


def source_digest() -> str:
    """Return a hash of all that is compiled."""
    content = hashlib.sha256()
    for path in sorted(SOURCE.glob("*.[ch]")):
        content.update(path.name.encode() + b"\0" + path.read_bytes())
    return content.hexdigest()[:16]


def digest(compiler: str, *options: str) -> str:
    """Return a hash of source, compiler, flags and processor."""
    parts = (source_digest(), _version(compiler), " ".join((*flags(), *options)), platform.machine(), _processor_flags())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def compile_to(path: Path, compiler: str, *options: str) -> str | None:
    """Compile under a name of its own, then rename: whoever comes meanwhile sees all of it or nothing.  Return what went wrong."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as folder:
            return _compile_in(Path(folder), path, compiler, options)
    except OSError as error:
        return f"{path.parent}: {error}; set MLSYS_CACHE to a folder that can be written"


def _compile_in(folder: Path, path: Path, compiler: str, options: tuple[str, ...]) -> str | None:
    objects = {source: str(folder / f"{source.stem}.o") for source in sources()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_call, compiler, *flags(), *options, "-c", str(source), "-o", made) for source, made in objects.items()]
    wrong = next((job.result() for job in jobs if job.result()), None)
    fresh = folder / path.name
    wrong = wrong or _call(compiler, "-shared", "-pthread", *objects.values(), "-o", str(fresh), "-lm")
    if wrong is None:
        fresh.replace(path)
    return wrong


def _call(compiler: str, *arguments: str) -> str | None:
    try:
        done = subprocess.run([compiler, *arguments], capture_output=True, text=True)
    except OSError as error:
        return f"{compiler} cannot be run: {error.strerror}"
    return f"{compiler} failed on the engine's kernels: {_first_error(done.stderr)}" if done.returncode else None


def flags() -> tuple[str, ...]:
    """Return the compiler's options on this kind of processor."""
    return (*FLAGS, "-march=native") if platform.machine() in ("x86_64", "AMD64") else FLAGS


def _first_error(text: str) -> str:
    lines = text.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line), lines[-1])


@functools.cache
def _version(compiler: str) -> str:
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    except OSError:  # compiling says so
        return compiler
    return done.stdout or compiler


def _processor_flags() -> str:
    """Return what the system says this processor can do, as its words in order."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text().splitlines()
    return " ".join(sorted(next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])))
