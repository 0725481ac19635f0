"""The first steps of a process that imports Locust and was started by another one of ours."""

from __future__ import annotations

import logging
import signal
import sys
from typing import Any

from gevent.fileobject import FileObject


def commands() -> Any:
    """Return where the parent's lines come in.  Ctrl-C is the parent's to handle, and stdout is for our lines only."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    sys.stdout = sys.stderr  # what Locust or a person's own users print goes there
    return FileObject(sys.stdin.fileno(), "rb", closefd=False)
