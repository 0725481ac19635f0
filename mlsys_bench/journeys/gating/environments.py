"""What a side's program needs, installed once by digest: its own dependencies where the two sides ask for different ones.

Where both ask for the same, both run in the environment of this process: that is faster, and leaves one difference less.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.parser
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mlsys_bench.errors import BadInput, MeasurementFailed

EXTRAS = ("engine", "serve", "load", "fast", "bench")  # of a project, where it has them: what its benchmarks may need
_READY = "ready"  # written last: an environment without it was cut off


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a program asks for: requirements as pip reads them, and files that hold more of them, or bounds, by content."""

    python: str | None = None
    requirements: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()  # requirements*.txt
    constraints: tuple[Path, ...] = ()

    def digest(self) -> str:
        """Return what tells one environment from another."""
        said = hashlib.sha256("\n".join((sys.version, _torch() or "", self.python or "", *self.requirements)).encode())
        for path in (*self.files, *self.constraints):
            said.update(path.name.encode() + b"\0" + path.read_bytes())
        return said.hexdigest()[:16]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """A Python to run a side with."""

    python: str
    words: str  # how it came about
    made_s: float = 0.0  # just now


HERE = Environment(python=sys.executable, words="this environment")


def of_folder(root: Path) -> Needs:
    """Return what the project in a folder asks for."""
    constraints, files = tuple(sorted(root.glob("constraints*.txt"))), tuple(sorted(root.glob("requirements*.txt")))
    path = root / "pyproject.toml"
    if not path.is_file():
        return Needs(files=files, constraints=constraints)
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: is no TOML: {error}") from error
    optional = project.get("optional-dependencies", {})
    requirements = [*project.get("dependencies", ()), *(need for extra in EXTRAS for need in optional.get(extra, ()))]
    return Needs(python=project.get("requires-python"), requirements=tuple(requirements), files=files, constraints=constraints)


def of_wheel(path: Path) -> Needs:
    """Return what a wheel asks for.  Raises BadInput for a file that is none."""
    try:
        with zipfile.ZipFile(path) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
            said = email.parser.HeaderParser().parsestr(wheel.read(name).decode())
    except (OSError, zipfile.BadZipFile, StopIteration) as error:
        raise BadInput(f"{path}: is no wheel that can be read: {error or 'it has no METADATA'}") from error
    asked = tuple(need for need in said.get_all("Requires-Dist", []) if _is_wanted(need))
    return Needs(python=said.get("Requires-Python"), requirements=tuple(need.partition(";")[0].strip() for need in asked))


def _is_wanted(requirement: str) -> bool:
    extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", requirement)
    return extra is None or extra[1] in EXTRAS


def cached() -> Path:
    """Return the folder where environments are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "mlsys" / "gate"


def provide(needs: Needs, note: Callable[[str], None]) -> Environment:
    """Return an environment with just this, made now where there is none yet.  Raises MeasurementFailed with pip's last words."""
    folder = cached() / needs.digest()
    python = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    if (folder / _READY).exists():
        return Environment(python=python, words=f"own environment {folder.name}")
    start_s = time.monotonic()
    note(f"making an environment in {folder}: once, then it is found there")
    try:
        _run([sys.executable, "-m", "venv", str(folder)], folder)
        for arguments in _installs(needs):
            _run([python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *arguments], folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    (folder / _READY).touch()
    made_s = time.monotonic() - start_s
    note(f"made in {made_s:.0f} s, which the budget does not count")
    return Environment(python=python, words=f"own environment {folder.name}, made in {made_s:.0f} s", made_s=made_s)


def _installs(needs: Needs) -> Iterator[list[str]]:
    """Yield pip's arguments.  torch goes first and alone: any looser request, made beside other packages, can pull gigabytes of CUDA."""
    bounds = [word for path in needs.constraints for word in ("-c", str(path))]
    torch = _torch()
    if torch and any(re.match(r"torch\b(?!-)", need) for need in needs.requirements):
        yield torch.split()
    if needs.requirements:
        yield [*bounds, *needs.requirements]
    for path in needs.files:
        yield [*bounds, "-r", str(path)]


def _torch() -> str | None:
    """Return which torch to install: what MLSYS_TORCH says, else the version of this environment."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return os.environ.get("MLSYS_TORCH") or f"torch=={importlib.metadata.version('torch').partition('+')[0]}"
    return os.environ.get("MLSYS_TORCH")


def unpack(wheel: Path, folder: Path) -> None:
    """Unpack the modules of a wheel into a folder, and nothing of what it asks for.  Source: the binary distribution format, PEP 427."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    for library in (path for kind in ("purelib", "platlib") for path in folder.glob(f"*.data/{kind}")):
        shutil.copytree(library, folder, dirs_exist_ok=True)


def _run(command: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        raise MeasurementFailed(f"{' '.join(command[2:4])} … failed: {lines[-1] if lines else f'exit {done.returncode}'}")
