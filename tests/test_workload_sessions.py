"""Sessions of several turns: drawn, written, read back, cut and described."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsys_bench import loadtest, workload
from mlsys_bench import plan as planner
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys import planning
from mlsys_bench.types import Lengths
from mlsys_bench.workload import trace
from mlsys_bench.workload.schedule import nominal_s
from tests.test_workload_traces import blocks, described, written

AGENT = workload.Sessions(
    turns=Lengths(dist="uniform", mean=5, cv=0.3),
    new_tokens=Lengths(dist="lognormal", mean=80, cv=1),
    output_tokens=Lengths(dist="lognormal", mean=40, cv=1),
    gap_mean_s=3.0,
    gap_cv=0.5,
    shared_tokens=100,
    block_tokens=16,
)


def test_each_turn_begins_with_all_that_was_said_before() -> None:
    plan = workload.sessions(AGENT, rate_per_s=10, n=50, seed=2)
    assert plan.session is not None
    assert plan.turn is not None
    assert plan.gap_s is not None
    for row in range(1, len(plan)):
        if plan.turn[row]:
            assert plan.session[row] == plan.session[row - 1]
            assert plan.turn[row] == plan.turn[row - 1] + 1
            assert plan.prompt_tokens[row] > plan.prompt_tokens[row - 1] + plan.output_tokens[row - 1]
            assert blocks(plan, row)[: len(blocks(plan, row - 1))] == blocks(plan, row - 1)
            assert math.isnan(plan.scheduled_s[row])
            assert plan.gap_s[row] > 0
        else:
            assert plan.scheduled_s[row] >= 0
        assert len(blocks(plan, row)) == plan.prompt_tokens[row] // 16
        assert blocks(plan, row)[:6] == [0, 1, 2, 3, 4, 5]  # 100 shared tokens are six full blocks


def test_sessions_share_their_beginning_and_nothing_else() -> None:
    plan = workload.sessions(AGENT, rate_per_s=10, n=50, seed=2)
    assert plan.session is not None
    own: list[set[int]] = [set() for _ in range(50)]
    for row in range(len(plan)):
        own[plan.session[row]] |= set(blocks(plan, row)[6:])
    assert sum(map(len, own)) == len(set().union(*own))


def test_sessions_bring_the_rate_asked_for() -> None:
    """2,000 sessions of five turns on average at 10 requests/s start at 2/s, within four standard errors; gaps have their mean."""
    plan = workload.sessions(AGENT, rate_per_s=10, n=2000, seed=3)
    starts = plan.scheduled_s[np.isfinite(plan.scheduled_s)]
    assert len(starts) == 2000
    assert workload.rate_per_s(plan) == pytest.approx(10, rel=4 * 1.1 / math.sqrt(2000))
    assert plan.gap_s is not None
    later = plan.gap_s[plan.turn > 0]  # type: ignore[operator]
    assert abs(later.mean() - 3.0) < 4 * 1.5 / math.sqrt(len(later))


def test_sessions_written_as_a_trace_are_read_back_whole(tmp_path: Path) -> None:
    plan = workload.sessions(AGENT, rate_per_s=10, n=60, seed=5)
    back = trace.from_trace(trace.write(plan, tmp_path / "sessions.csv"))
    assert back.gap_s is not None
    assert plan.gap_s is not None
    for mine, theirs in zip((plan.scheduled_s, plan.gap_s), (back.scheduled_s, back.gap_s), strict=True):
        assert theirs.tolist() == pytest.approx(
            (mine - (plan.scheduled_s[0] if mine is plan.scheduled_s else 0)).tolist(), abs=2e-6, nan_ok=True
        )
    for name in ("prompt_tokens", "output_tokens", "session", "turn", "prefix_offsets", "prefix_hashes"):
        assert getattr(back, name).tolist() == getattr(plan, name).tolist()
    assert back.prefix_block_tokens == 16


def test_a_load_test_replays_sessions_that_wait(tmp_path: Path) -> None:
    """Those that arrive by themselves come first, in order of time; the others have no time of their own."""
    path = trace.write(workload.sessions(AGENT, rate_per_s=10, n=5, seed=5), tmp_path / "sessions.csv")
    plan = loadtest.dry_run(loadtest.Options(url="http://127.0.0.1:9", trace=workload.from_trace(path)))
    assert (np.diff(plan.scheduled_s[:5]) >= 0).all()
    assert np.isnan(plan.scheduled_s[5:]).all()
    assert np.isfinite(workload.arrival_times(3.0, f"trace:{path}", n=50)).all()


def test_what_sessions_bring_is_described_as_if_answers_took_no_time(tmp_path: Path) -> None:
    path = trace.write(workload.sessions(AGENT, rate_per_s=10, n=2000, seed=6), tmp_path / "sessions.csv")
    found = described(path)
    assert found.observed is not None
    assert found.observed.sessions == 2000
    assert found.rate_per_s == pytest.approx(10, rel=0.12)  # 2,000 starts in 1,000 s, and a minute for the last to end
    assert found.prefix_hit_share is not None
    assert found.prefix_hit_share > 0.5
    assert set(found.observed.dispersion) == {"1s", "10s", "60s"}
    plan = trace.from_trace(path)
    assert plan.gap_s is not None
    by_hand = np.empty(len(plan))
    for row in range(len(plan)):
        by_hand[row] = plan.scheduled_s[row] if plan.turn[row] == 0 else by_hand[row - 1] + plan.gap_s[row]  # type: ignore[index]
    assert nominal_s(plan).tolist() == pytest.approx(by_hand.tolist())


def test_turns_that_wait_for_an_answer_are_planned_at_times_of_their_own(tmp_path: Path) -> None:
    """Those without a time all came after the last that has one: a fleet was planned for a single request."""
    path = trace.write(workload.sessions(AGENT, rate_per_s=10, n=50, seed=5), tmp_path / "sessions.csv")
    read = workload.from_trace(path)
    given = workload.opened(read)
    assert (np.diff(given.scheduled_s) >= 0).all()
    assert sorted(given.scheduled_s) == pytest.approx(sorted(nominal_s(read)))
    assert len(given) == len(read)
    assert given.gap_s is None
    assert f"{len(read) - 50:,} of {len(read):,} requests are turns that follow an answer" in given.notes[-1]
    assert workload.opened(given) is given


def test_a_plan_for_sessions_counts_every_turn(tmp_path: Path) -> None:
    path = trace.write(workload.sessions(AGENT, rate_per_s=2, n=60, seed=5), tmp_path / "sessions.csv")
    asked = planning.asked(
        scenario=None, qps=None, measured=[], model="llama-3-8b", gpu="l4", precision="fp8", slo="ttft_p95<2s,tpot_p95<80ms", arrivals=None,
        prompt_tokens=None, output_tokens=None, max_batch=None, headroom=None, term="on-demand", seed=0, trace=path,
    )  # fmt: skip
    made = planning.plan(asked)  # type: ignore[arg-type]
    assert made.predicted["ttft_p50_s"] < made.predicted["ttft_p99_s"], "percentiles of one request are all the same"
    assert any("turns that follow an answer" in note for note in made.notes)
    assert any("is not computed again" in line for line in made.assumptions)
    with pytest.raises(BadInput, match="turns without a time"):
        planner.plan(dataclasses.replace(asked, trace=workload.from_trace(path)))  # type: ignore[arg-type, type-var]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("time_s,input_tokens,output_tokens,gap_s\n1,9,9,\n,9,9,2\n", "name it with --session-column"),
        (
            "time_s,input_tokens,output_tokens,gap_s,session_id\n1,9,9,,a\n,9,9,2,b\n,9,9,2,b\n",
            "the first request of a session has no time",
        ),
    ],
)
def test_a_session_without_a_beginning_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        trace.read(written(tmp_path, text))


@pytest.mark.parametrize("cut", [lambda p: workload.sliced(p, 2.0, 30.0), lambda p: workload.sped_up(p, 2.0)])
def test_sessions_that_wait_for_answers_are_cut_whole_and_keep_their_gaps(cut: Callable[[workload.Schedule], workload.Schedule]) -> None:
    plan = workload.sessions(AGENT, rate_per_s=10, n=200, seed=4)
    part = cut(plan)
    assert part.session is not None
    assert part.gap_s is not None
    assert plan.session is not None
    assert plan.gap_s is not None
    for session in np.unique(part.session)[:20]:
        assert part.gap_s[part.session == session].tolist() == plan.gap_s[plan.session == session].tolist()


@pytest.mark.parametrize("changes", [{"gap_mean_s": -1.0}, {"gap_mean_s": math.nan}, {"shared_tokens": -1}, {"block_tokens": 0}])
def test_sessions_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="none may be below zero"):
        workload.sessions(dataclasses.replace(AGENT, **changes), rate_per_s=1, n=2)
