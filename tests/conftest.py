"""Settings of every test: no time is asserted, so hypothesis has no deadline either; Ctrl-C reaches the processes that tests start."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a background job has it: every child would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # two hundred processes are started: each would compile this package anew, for 0.2 s


# Files that are begun first.  What the first of them compiles is kept on disk and makes the plans of all others faster; and a long file
# that is begun last keeps everybody waiting.
FIRST = ("test_simulate_core", "test_bad_input", "test_loadtest_scale", "test_bench", "test_predict_learning", "test_queueing_des_parts")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first, in the order above."""
    place = {f"{name}.py": i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(Path(item.path).name, len(FIRST)))


@pytest.fixture(scope="session", autouse=True)
def plans_are_not_simulated_for_longer() -> Iterator[None]:
    """Keep plans of tests short: uncertain ones would be simulated 24 times as long, of which tests/test_plan_intervals.py has one."""
    from mlsys_bench.plan import planner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "WIDE", float("inf"))
        yield
