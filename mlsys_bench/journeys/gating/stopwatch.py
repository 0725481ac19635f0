"""Run one command and write down what it used: `python -I -S stopwatch.py FD COMMAND…`.

A process of its own, and a small one.  On Linux a process's peak memory begins with that of the one which started it (fork and exec hand
it on), so a command started by the gate itself would never seem smaller than the gate.  `floor` is what this process hands on.
"""

from __future__ import annotations

import os
import signal
import sys
import time

_KIB_OF_PEAK = 1 if sys.platform == "darwin" else 1024  # getrusage(2) counts bytes on macOS, KiB on Linux


def main() -> int:
    """Run, wait, write `wall_s user_s system_s peak_bytes floor_bytes involuntary status` to the descriptor, or why nothing could run."""
    told, command = int(sys.argv[1]), sys.argv[2:]
    os.set_inheritable(told, False)
    floor_bytes = _floor_bytes()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends the command, whose end is then waited for here
    start_s = time.perf_counter()
    try:
        child = os.posix_spawnp(command[0], command, os.environ, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM])
    except OSError as error:
        os.write(told, f"error {error.strerror}".encode())
        return 127
    _, status, used = os.wait4(child, 0)
    wall_s = time.perf_counter() - start_s
    figures = (wall_s, used.ru_utime, used.ru_stime, used.ru_maxrss * _KIB_OF_PEAK, floor_bytes, used.ru_nivcsw, status)
    os.write(told, " ".join(map(repr, figures)).encode())
    return 0


def _floor_bytes() -> int:
    """Return the peak of this process's own memory, 0 where nobody tells."""
    try:
        with open("/proc/self/status", encoding="utf-8") as lines:  # noqa: PTH123  pathlib is a megabyte more
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
