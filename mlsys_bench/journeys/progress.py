"""One live line on stderr, only where that is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


class Line:
    """A line that overwrites itself.  Silent unless stderr is a terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self._on = sys.stderr.isatty() and not quiet
        self._quiet = quiet

    def show(self, text: str) -> None:
        """Replace the line."""
        if self._on:
            sys.stderr.write(f"\r\x1b[2K{text[:110]}")
            sys.stderr.flush()

    def note(self, text: str) -> None:
        """Write a line that stays, terminal or not."""
        if not self._quiet:
            self.clear()
            sys.stderr.write(f"{text}\n")

    def counted(self, what: str, clock: Callable[[], float] = time.monotonic) -> Callable[[int, int], None]:
        """Return what shows how many pieces of a long job are done and, from the second on, about how long the others take."""
        first: list[tuple[float, int]] = []

        def tell(done: int, of: int) -> None:
            now_s = clock()
            begun_s, before = first[0] if first else (now_s, done)
            first[:] = [(begun_s, before)]
            left_s = (now_s - begun_s) / max(done - before, 1) * (of - done)
            left = f", about {left_s:.0f} s left" if left_s < 100 else f", about {left_s / 60:.0f} min left"
            self.show(f"{done:,} of {of:,} {what}{left if before < done < of else ''}")

        return tell

    def clear(self) -> None:
        """Leave the terminal as it was."""
        if self._on:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
