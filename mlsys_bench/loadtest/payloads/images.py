"""Images as data URLs: from files, or made up, each different from the last so that no server has seen it before."""

from __future__ import annotations

import base64
import dataclasses
import random
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest.endpoints import Ask

if TYPE_CHECKING:
    from mlsys_bench.loadtest.payloads import Source, Spec

KINDS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".gif": "gif"}
MOST_BYTES = 1 << 30  # of all files together: every worker holds them
MOST_PIXELS = 1 << 26
_COLOURS = 256


class WithImages:
    """Another source's requests, each with the next images."""

    def __init__(self, spec: Spec, source: Source) -> None:
        self._source, self._images, self._each = source, spec.images, spec.images_each
        self._made = None if spec.image_pixels is None else MadeUp(*spec.image_pixels, seed=spec.seed)

    def ask(self, index: int, said: Sequence[str] = ()) -> Ask:
        """Return what request `index` asks."""
        numbers = range(index * self._each, (index + 1) * self._each)
        images = tuple(self._made.url(n) if self._made else self._images[n % len(self._images)] for n in numbers)
        return dataclasses.replace(self._source.ask(index, said), images=images)


class MadeUp:
    """Valid PNG files of one size that all look different: their pixels are the same numbers, their palette is another each time.

    So only 780 bytes of an image are made when it is asked for, whatever its size.  Source: W3C PNG specification, third edition, 11.2.
    """

    def __init__(self, width: int, height: int, seed: int) -> None:
        self._seed = seed
        head = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))  # 8 bits, palette
        rest = _chunk(b"IDAT", zlib.compress(_pixels(width, height, seed), 6)) + _chunk(b"IEND", b"")
        self._head, self._rest = (base64.b64encode(part).decode() for part in (head, rest))  # 33 bytes and 780 are whole groups of 3

    def url(self, number: int) -> str:
        """Return image so and so as a data URL."""
        colours = random.Random(self._seed * 1_000_003 + number).randbytes(3 * _COLOURS)
        return f"data:image/png;base64,{self._head}{base64.b64encode(_chunk(b'PLTE', colours)).decode()}{self._rest}"


def _pixels(width: int, height: int, seed: int) -> bytes:
    """Return rows of waves with some noise: about as hard to compress as a photograph with few colours."""
    rng = random.Random(seed)
    rows = []
    for y in range(height):
        noise = int.from_bytes(rng.randbytes(width), "big") & int.from_bytes(b"\x03" * width, "big")
        wave = bytes((x + y) // 4 % 64 * 4 for x in range(width))
        rows.append(b"\0" + (int.from_bytes(wave, "big") | noise).to_bytes(width, "big"))
    return b"".join(rows)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def parse_size(text: str) -> tuple[int, int]:
    """Return the width and height of e.g. '512x512'.  Raises BadInput."""
    found = re.fullmatch(r"\s*(\d{1,6})\s*[xX×]\s*(\d{1,6})\s*", text)
    width, height = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < width * height <= MOST_PIXELS:
        raise BadInput(f"--image-size {text}: write WIDTHxHEIGHT in pixels, e.g. 512x512, {MOST_PIXELS:,} pixels at most")
    return width, height


def read(path: Path) -> list[str]:
    """Return an image, or all those of a folder in order of their names, as data URLs.  Raises BadInput."""
    if not path.exists():
        raise BadInput(f"--images {path}: there is no such file or folder")
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in KINDS) if path.is_dir() else [path]
    if not files or any(p.suffix.lower() not in KINDS for p in files):
        raise BadInput(f"--images {path}: no image there; known are files that end in {', '.join(KINDS)}")
    if sum(p.stat().st_size for p in files) > MOST_BYTES:
        raise BadInput(f"--images {path}: more than {MOST_BYTES >> 30} GiB of images; every load process holds them all: take fewer")
    return [f"data:image/{KINDS[p.suffix.lower()]};base64,{base64.b64encode(p.read_bytes()).decode()}" for p in files]
