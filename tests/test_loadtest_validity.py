"""The verdict of a load test on itself: each row of its table, from both sides of the line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlsys_bench.loadtest import job, validity
from mlsys_bench.timelines import Steadiness
from mlsys_bench.types import RequestRecord, Validity
from tests.synthetic_runs import station


def sent(drift: float = 0.0, late_s: float = 0.0, n: int = 400, **more: Any) -> list[RequestRecord]:
    """Return requests due every 50 ms, each sent `late_s` late and the clock of the sends `drift` too slow."""
    due = [i * 0.05 for i in range(n)]
    return [
        RequestRecord(index=i, scheduled_s=t, sent_s=t * (1 + drift) + late_s, prompt_tokens=100, output_tokens=10, **more)
        for i, t in enumerate(due)
    ]


def done(**more: Any) -> job.Done:
    fields: dict[str, Any] = {
        "cpu_share": 0.1, "stopped": False, "ran_s": 20.0, "sent": 400, "locust_requests": 400, "locust_failures": 0, "connections": 50,
        "late_connections": 0, **more,
    }  # fmt: skip
    return job.Done(**fields)


def judged(records: list[RequestRecord], **more: Any) -> Validity:
    return validity.judge(records, **{"cpu_share": 0.1, "asked_prompt_tokens": 100, "asked_output_tokens": 10, "open_loop": True, **more})


@pytest.mark.parametrize(("drift", "verdict"), [(0.0, "valid"), (-0.001, "valid"), (-0.003, "degraded"), (-0.0056, "invalid")])
def test_a_rate_that_is_not_the_asked_one_is_no_answer(drift: float, verdict: str) -> None:
    """Sends that run ahead of their schedule are late by nothing: the rate alone is wrong, and is named."""
    found = judged(sent(drift))
    assert found.verdict == verdict
    assert [f"{1 / (1 + drift):.2%} of the rate" in reason for reason in found.reasons] == [True] * (verdict != "valid")


def test_a_rate_that_falls_behind_is_named_beside_the_lateness() -> None:
    found = judged(sent(0.0056))
    assert found.verdict == "invalid"
    assert any("99.44% of the rate that was asked: lower the rate" in reason for reason in found.reasons)


def test_a_few_late_sends_leave_the_rate_what_it_was() -> None:
    """One in a hundred sent 40 ms late moves the slope by nothing that matters, and only the lateness is named."""
    records = [r if r.index % 101 else sent(late_s=0.04)[r.index] for r in sent()]
    assert not [reason for reason in judged(records).reasons if "of the rate" in reason]


def test_a_constant_lateness_is_no_other_rate() -> None:
    found = judged(sent(late_s=0.02))
    assert not [reason for reason in found.reasons if "of the rate" in reason]
    assert found.verdict == "invalid"  # every send more than 1 ms late


def test_a_closed_loop_has_no_rate_to_hold() -> None:
    assert judged(sent(drift=-0.01), open_loop=False).verdict == "valid"


@pytest.mark.parametrize(
    ("loop", "verdict", "says"),
    [
        ({"lag_p99_s": 0.004}, "valid", ""),
        ({"lag_p99_s": 0.006}, "degraded", "loop lagged"),
        ({"lag_p99_s": 0.06}, "invalid", "--processes"),
        ({"gc_pause_max_s": 0.03}, "degraded", "garbage collector"),
        ({"gc_pause_max_s": 0.3}, "invalid", "300 ms"),
        ({"late_connections": 4}, "valid", ""),
        ({"late_connections": 40}, "degraded", "10.0 % of the requests waited for a connection"),
        ({"retries": 7}, "valid", "7 attempts were retries"),
    ],
)
def test_what_a_worker_saw_of_itself_counts(loop: dict[str, Any], verdict: str, says: str) -> None:
    found = judged(sent(), loops=[done(), done(**loop)])
    assert found.verdict == verdict
    assert says in " | ".join(found.reasons)


@pytest.mark.parametrize(
    ("state", "verdict"), [("steady", "valid"), ("too_short", "valid"), ("not_steady", "degraded"), ("over_saturated", "degraded")]
)
def test_a_run_that_did_not_settle_is_degraded(state: Any, verdict: str) -> None:
    found = judged(sent(), steadiness=Steadiness(verdict=state, warmup_s=0.0, decided_by="nothing", reasons=("because of it",)))
    assert found == Validity(verdict=verdict, reasons=("because of it",))  # type: ignore[arg-type]


def test_the_worst_reason_comes_first() -> None:
    found = judged(sent(), notes=["a note"], flaws=["a flaw"], breaks=["a break"])
    assert found == Validity(verdict="invalid", reasons=("a break", "a flaw", "a note"))


def test_requests_that_say_little_are_counted_as_what_they_are_worth() -> None:
    """M/M/4 at 95 % load for a minute: 1,200 requests of a few long busy spells."""
    found = validity.judge(station(np.random.default_rng(1), 20, 60, 4, 0.19), cpu_share=0.1, asked_prompt_tokens=10, asked_output_tokens=2)
    assert found.verdict == "valid"
    assert "independent ones" in found.reasons[0]
