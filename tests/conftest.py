"""Settings of every test: no time is asserted, so hypothesis has no deadline either; Ctrl-C reaches the processes that tests start."""

from __future__ import annotations

import gc
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


# Files that take longest, by their processor time and what they wait: a long file that is begun last keeps everybody waiting.  What
# test_simulate_core compiles is kept on disk and makes the plans of all others faster.
FIRST = (
    "test_simulate_core", "test_bad_input", "test_bench", "test_loadtest_scale", "test_commands", "test_queueing_des_parts", "test_serve",
    "test_checkpoint", "test_stage_graphs", "test_plan_graph", "test_models_config", "test_predict_learning", "test_record",
    "test_loadtest_limits", "test_gate_outside", "test_production", "test_engine", "test_prometheus", "test_loadtest", "test_report",
    "test_queueing_events", "test_loadtest_statistics", "test_loadtest_talks", "test_loadtest_faults", "test_gate_run", "test_plan",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first, in the order above."""
    place = {f"{name}.py": i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(Path(item.path).name, len(FIRST)))


def pytest_collection_finish() -> None:
    """Collect garbage as seldom as the program does, and never look through what is imported: a tenth of the tests' processor time."""
    gc.set_threshold(50_000)
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def plans_are_not_simulated_for_longer() -> Iterator[None]:
    """Keep plans of tests short: uncertain ones would be simulated 24 times as long, of which tests/test_plan_intervals.py has one."""
    from mlsys_bench.plan import planner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "WIDE", float("inf"))
        yield
