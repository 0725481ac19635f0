"""Text that every machine has: the source of the running Python's standard library, some files of it held out."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from mlsys_bench.errors import BadInput

HELD_OUT = 0.05  # of the bytes
# of no use as prose (tables), not on every machine (tests), or not the library's own
SKIPPED = frozenset(
    ("test", "tests", "idle_test", "idlelib", "encodings", "lib2to3", "site-packages", "dist-packages", "__pycache__", "_bundled")
)
LEAST_BYTES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Bytes to learn from and bytes to be judged by.  No file is in both."""

    train: bytes
    held_out: bytes
    files: int
    digest: str  # of names and contents: Python versions differ


def corpus(root: Path | None = None) -> Corpus:
    """Return the standard library's source, or that of all *.py below a folder.  Raises BadInput where there is too little.

    Which files are held out follows from hashes of their names, so it hardly changes between Python versions.
    """
    folder = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    texts = {name: path.read_bytes() for name, path in _sources(folder)}
    total = sum(map(len, texts.values()))
    if total < LEAST_BYTES:
        raise BadInput(
            f"{folder}: {total:,} bytes of Python source are too few to learn from; use a Python with its standard library in files"
        )
    chosen = _held_out(texts, HELD_OUT * total)
    content = hashlib.sha256()
    for name, text in sorted(texts.items()):
        content.update(f"{name}\0{len(text)}\0".encode() + text)
    return Corpus(
        train=b"".join(text for name, text in sorted(texts.items()) if name not in chosen),
        held_out=b"".join(texts[name] for name in sorted(chosen)),
        files=len(texts),
        digest=content.hexdigest()[:16],
    )


def _sources(folder: Path) -> list[tuple[str, Path]]:
    paths = ((path.relative_to(folder), path) for path in folder.rglob("*.py") if path.is_file())
    return [(name.as_posix(), path) for name, path in paths if SKIPPED.isdisjoint(name.parts)]


def _held_out(texts: dict[str, bytes], wanted: float) -> set[str]:
    """Return names in the order of their hashes, each whose text still fits into what is wanted."""
    chosen, room = set[str](), wanted
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if len(texts[name]) <= room:
            chosen.add(name)
            room -= len(texts[name])
    return chosen
