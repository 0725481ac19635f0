"""Settings of every test: no time is asserted, so hypothesis has no deadline either; Ctrl-C reaches the processes that tests start."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a background job has it: every child would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # two hundred processes are started: each would compile this package anew, for 0.2 s


@pytest.fixture(scope="session", autouse=True)
def plans_are_not_simulated_for_longer() -> Iterator[None]:
    """Keep plans of tests short: uncertain ones would be simulated 24 times as long, of which tests/test_plan_intervals.py has one."""
    from mlsys_bench.plan import planner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "WIDE", float("inf"))
        yield
