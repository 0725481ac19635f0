"""Settings of every test: no time is asserted, so hypothesis has no deadline either; Ctrl-C reaches the processes that tests start."""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a background job has it: every child would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # two hundred processes are started: each would compile this package anew, for 0.2 s
