"""One live line on stderr, only where that is a terminal."""

from __future__ import annotations

import sys


class Line:
    """A line that overwrites itself.  Silent unless stderr is a terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self._on = sys.stderr.isatty() and not quiet

    def show(self, text: str) -> None:
        """Replace the line."""
        if self._on:
            sys.stderr.write(f"\r\x1b[2K{text[:110]}")
            sys.stderr.flush()

    def clear(self) -> None:
        """Leave the terminal as it was."""
        if self._on:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
