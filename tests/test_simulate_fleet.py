"""What happens around replicas: users, clients that give up, failures, autoscaling, disaggregation, routing; by hand and by theory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlsys_bench import simulate, stats, summary
from mlsys_bench.batching import Limits, Policy, StepFeatures
from mlsys_bench.errors import BadInput, UnknownName
from mlsys_bench.simulate import Autoscaling, Conditions, Disaggregation, Failures, Retries, Simulation, core, fleet, routing
from mlsys_bench.simulate.traffic import Scheduled
from mlsys_bench.types import Lengths, RequestRecord
from mlsys_bench.workload import Schedule
from tests.simulated import linear, profile, requests

ROOMY = Limits(max_seqs=8, max_step_tokens=64, block_tokens=4, blocks=1000, max_context=400)
LONE = Limits(max_seqs=1, max_step_tokens=10**6, block_tokens=10**6, blocks=1, max_context=10**6)
SURE = 0.999  # level of the intervals that a theory must fall into


def prefill_only(f: StepFeatures) -> float:
    """1 ms a prompt token."""
    return 0.001 * f.prefill_tokens


def play(
    *rows: tuple[float, int, int], limits: Limits = ROOMY, replicas: int = 1, routing: str = "least_loaded", seed: int = 0, **around: Any
) -> Simulation:
    return simulate.run(
        requests(*rows), profile(), limits, clock=linear, replicas=replicas, routing=routing, seed=seed, conditions=Conditions(**around)
    )  # fmt: skip


def by_index(s: Simulation) -> list[RequestRecord]:
    return sorted(s.requests, key=lambda r: r.index)


# ---------------------------------------------------------------- a closed loop


def test_one_user_sends_the_next_when_the_one_before_is_done() -> None:
    """Each takes a prefill of 20 ms and two decodes of 12 ms."""
    s = simulate.closed(profile(), ROOMY, concurrency=1, prompt_tokens=[10] * 4, output_tokens=[3] * 4, n=4, clock=linear, window="all")
    assert [r.scheduled_s for r in s.requests] == pytest.approx([0.0, 0.044, 0.088, 0.132])
    assert [summary.e2e_s(r) for r in s.requests] == pytest.approx([0.044] * 4)
    assert [r.in_window for r in s.requests] == [True] * 4


def test_two_users_share_the_replica_and_who_ends_first_goes_on() -> None:
    """Both prefill to 30 ms.  B is done then; its next prompt joins A's decode: 10 + 5 + 2 ms."""
    s = simulate.closed(
        profile(), ROOMY, concurrency=2, prompt_tokens=[10, 10, 5], output_tokens=[3, 1, 2], n=3, clock=linear, window="all"
    )
    a, b, c = s.requests
    assert (a.scheduled_s, b.scheduled_s) == (0.0, 0.0)
    assert b.done_s == c.scheduled_s == pytest.approx(0.030)
    assert a.token_s == pytest.approx((0.030, 0.047, 0.061))
    assert c.token_s == pytest.approx((0.047, 0.061))


def test_a_ramp_spreads_the_users_and_the_steady_window_leaves_out_their_first_and_last_round() -> None:
    s = simulate.closed(
        profile(), ROOMY, concurrency=4, prompt_tokens=Lengths(mean=10), output_tokens=Lengths(mean=5), n=40, ramp_s=2.0, clock=linear
    )
    assert [r.scheduled_s for r in s.requests if r.index in (0, 1, 2, 3)] == [0.0, 0.5, 1.0, 1.5]
    assert sorted(r.index for r in s.requests if not r.in_window) != []
    assert [r.in_window for r in s.requests] == [False] * 4 + [True] * 32 + [False] * 4


def test_as_many_are_in_the_system_as_there_are_users() -> None:
    """Little's law of a closed loop: concurrency = throughput x (response + think time)."""
    users, n = 6, 3000
    s = simulate.closed(
        profile(), ROOMY, concurrency=users, prompt_tokens=Lengths(dist="uniform", mean=20, cv=0.3), output_tokens=Lengths(mean=8), n=n,
        think_s=0.5, clock=linear,
    )  # fmt: skip
    counted = [r for r in s.requests if r.in_window]
    throughput_per_s = (len(counted) - 1) / (counted[-1].scheduled_s - counted[0].scheduled_s)
    response_s = float(np.mean([summary.e2e_s(r) for r in counted]))
    assert throughput_per_s * (response_s + 0.5) == pytest.approx(users, rel=0.04)


def test_users_of_a_lone_server_wait_as_machines_for_their_repairman() -> None:
    """M/M/1//N: N users think 2 s, one server takes 1 s, both exponential.  P(idle) = 1 / sum N!/(N-k)! (1/2)^k."""
    users, think_s = 5, 2.0
    weights = [math.perm(users, k) / think_s**k for k in range(users + 1)]
    throughput_per_s = 1 - 1 / sum(weights)

    def simulated(seed: int) -> float:
        prompts = np.ceil(np.random.default_rng(seed).exponential(1000, 1200)).astype(np.int64)
        s = simulate.closed(
            profile(), LONE, concurrency=users, prompt_tokens=prompts, output_tokens=[1] * 1200, n=1200, think_s=think_s, seed=seed,
            clock=prefill_only,
        )  # fmt: skip
        done_s = [r.done_s for r in s.requests if r.in_window and r.done_s is not None]
        return (len(done_s) - 1) / (max(done_s) - min(done_s))

    low, high = stats.mean_interval([simulated(seed) for seed in range(10)], SURE) or (0.0, 0.0)
    assert low < throughput_per_s < high
    assert high - low < 0.1


@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 3), st.sampled_from([0.0, 0.03]), st.integers(0, 9))
@example(2, 12, 2, 0.0, 4)  # one is preempted, and the other gets on faster than the two would have
@settings(max_examples=60, deadline=None)
def test_a_closed_loop_is_the_same_in_one_call_and_event_by_event(users: int, n: int, seats: int, way_s: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompts, outputs = rng.integers(1, 60, n), rng.integers(1, 20, n)
    own, limits = profile(request_overhead_s=way_s, token_overhead_s=2 * way_s), ROOMY._replace(max_seqs=seats, blocks=30)
    loop: dict[str, Any] = {
        "concurrency": users,
        "prompt_tokens": prompts,
        "output_tokens": outputs,
        "n": n,
        "window": "all",
        "clock": linear,
    }
    once = simulate.closed(own, limits, **loop)
    events = simulate.closed(own, limits, conditions=Conditions(timeout_s=1e9), **loop)  # patience without end goes event by event
    assert [r.index for r in once.requests] == [r.index for r in events.requests]
    for a, b in zip(once.requests, events.requests, strict=True):
        assert (a.outcome, a.http_status, a.output_tokens) == (b.outcome, b.http_status, b.output_tokens)
        assert (a.scheduled_s, a.done_s, *a.token_s) == pytest.approx((b.scheduled_s, b.done_s, *b.token_s))
        assert a.stage_s == pytest.approx(b.stage_s)
    assert (once.steps, once.attempts) == (events.steps, events.attempts)
    assert once.busy_s == pytest.approx(events.busy_s)


def test_a_closed_loop_refuses_what_makes_no_sense() -> None:
    def loop(**change: Any) -> Simulation:
        asked: dict[str, Any] = {"concurrency": 1, "prompt_tokens": [1], "output_tokens": [1], "n": 1}
        return simulate.closed(profile(), ROOMY, clock=linear, **(asked | change))

    for change, why in (
        ({"concurrency": 0}, "at least 1 user"),
        ({"n": 2}, "1 lengths for 2"),
        ({"window": "stedy"}, "steady"),
        ({"think_s": -1.0}, "think"),
    ):
        with pytest.raises(BadInput, match=why):
            loop(**change)


# ---------------------------------------------------------------- sessions


def test_a_turn_is_sent_after_the_answer_before_and_its_gap() -> None:
    """The first turn ends at 44 ms; the tool takes 100 ms; the second turn is due at 144 ms and alone again."""
    schedule = requests(
        (0.0, 10, 3), (0.0, 20, 2), (math.nan, 20, 1),
        session=np.array([0, 1, 0]), turn=np.array([0, 0, 1]), gap_s=np.array([0.0, 0.0, 0.1]),
    )  # fmt: skip
    s = simulate.run(schedule, profile(), ROOMY, replicas=2, clock=linear)
    a, b, c = by_index(s)
    assert a.done_s == pytest.approx(0.044)
    assert c.scheduled_s == pytest.approx(0.144)
    assert summary.ttft_s(c) == pytest.approx(0.030)
    assert (a.session, b.session, c.session) == ("0", "1", "0")
    assert [r.index for r in s.requests] == [0, 1, 2]


def test_a_session_that_breaks_cancels_what_was_left_of_it() -> None:
    schedule = requests(
        (0.0, 900, 3), (math.nan, 20, 1), (math.nan, 20, 1),
        session=np.array([0, 0, 0]), turn=np.array([0, 1, 2]), gap_s=np.array([0.0, 0.1, 0.1]),
    )  # fmt: skip
    s = simulate.run(schedule, profile(), ROOMY, clock=linear)
    assert [(r.outcome, r.http_status, r.sent_s) for r in s.requests] == [
        ("rejected", 400, 0.0),
        ("cancelled", None, None),
        ("cancelled", None, None),
    ]


def test_a_run_that_is_stopped_leaves_the_turns_to_come_unfinished() -> None:
    schedule = requests((0.0, 10, 3), (math.nan, 20, 1), session=np.array([0, 0]), turn=np.array([0, 1]), gap_s=np.array([0.0, 9.0]))
    a, b = simulate.run(schedule, profile(), ROOMY, clock=linear, until_s=1.0).requests
    assert (a.outcome, b.outcome, b.sent_s, b.token_s) == ("ok", "unfinished", None, ())


def test_turns_out_of_order_are_refused() -> None:
    schedule = requests((0.0, 10, 3), (math.nan, 20, 1), session=np.array([0, 0]), turn=np.array([0, 2]), gap_s=np.array([0.0, 9.0]))
    with pytest.raises(BadInput, match="turn 2 does not follow turn 1"):
        simulate.run(schedule, profile(), ROOMY, clock=linear)


def test_a_conversation_that_stays_on_its_replica_finds_its_prefix_there() -> None:
    """Ten turns, each with all before it: 4, 8, … blocks of 16 tokens, all but the last four known from the turn before."""
    turns, sessions, width = 10, 12, 4
    n = turns * sessions
    session = np.repeat(np.arange(sessions, dtype=np.int32), turns)
    turn = np.tile(np.arange(turns, dtype=np.int32), sessions)
    blocks = width * (turn.astype(np.int64) + 1)
    hashes = np.concatenate([1000 * s + np.arange(b) for s, b in zip(session.tolist(), blocks.tolist(), strict=True)])
    talk = Schedule(
        scheduled_s=np.where(turn == 0, 0.01 * session, np.nan), prompt_tokens=blocks * 16 + 1, output_tokens=np.full(n, 5),
        prefix_offsets=np.concatenate([[0], np.cumsum(blocks)]), prefix_hashes=hashes, prefix_block_tokens=16,
        session=session, turn=turn, gap_s=np.full(n, 0.5),
    )  # fmt: skip
    limits = Limits(max_seqs=8, max_step_tokens=512, block_tokens=16, blocks=1000, max_context=4000)
    found = {how: simulate.run(talk, profile(), limits, clock=linear, replicas=3, routing=how) for how in simulate.ROUTINGS}
    share = {how: s.prefix_hit_tokens / s.prefix_asked_tokens for how, s in found.items()}
    asked = width * 16 * turns * (turns + 1) / 2 * sessions
    known = width * 16 * turns * (turns - 1) / 2 * sessions
    assert found["session_affinity"].prefix_hit_tokens == known
    assert share["session_affinity"] == pytest.approx(known / asked, rel=0.01)
    assert share["prefix_aware"] > 0.95 * share["session_affinity"]
    assert max(share["random"], share["round_robin"], share["least_loaded"]) < 0.8 * share["session_affinity"]
    waits = {how: np.mean([summary.ttft_s(r) for r in s.requests]) for how, s in found.items()}
    assert waits["session_affinity"] < waits["random"]


# ---------------------------------------------------------------- clients that give up and try again


def test_a_client_that_gives_up_frees_its_seat() -> None:
    """A holds the only seat for 0.02 + 49 x 0.012 s = 0.608 s.  B, in it then, gives up at 0.71 s; C goes on."""
    seat = ROOMY._replace(max_seqs=1)
    a, b, c = play((0.0, 10, 50), (0.01, 10, 50), (0.05, 10, 1), limits=seat, timeout_s=0.7).requests
    assert (a.outcome, b.outcome, c.outcome) == ("ok", "timeout", "ok")
    assert b.done_s == pytest.approx(0.71)
    assert len(b.token_s) == 7  # 0.608 + 0.020, then every 12 ms until 0.71
    assert c.token_s[0] == pytest.approx(0.712 + 0.020)  # B's last step was under way


def test_a_request_that_never_got_a_seat_gives_up_too() -> None:
    seat = ROOMY._replace(max_seqs=1)
    a, b, c = play((0.0, 10, 20), (0.01, 10, 50), (0.011, 10, 1), limits=seat, timeout_s=0.3).requests
    assert (a.outcome, b.outcome) == ("ok", "timeout")
    assert (c.outcome, c.token_s, c.stage_s) == ("timeout", (), {})


def test_a_refused_request_comes_back_after_the_backoff() -> None:
    """One seat and no queue.  B is refused at 0.1 and 0.6, and gets in at 1.6, when A (0.02 + 99 x 0.012 = 1.208 s) is done."""
    seat = ROOMY._replace(max_seqs=1)
    s = simulate.run(
        requests((0.0, 10, 100), (0.1, 10, 1)), profile(), seat, clock=linear, queue_limit=0,
        conditions=Conditions(retries=Retries(attempts=4, first_s=0.5, jitter=0.0)),
    )  # fmt: skip
    a, b = s.requests
    assert (a.attempt, b.attempt, b.outcome) == (1, 3, "ok")
    assert summary.ttft_s(b) == pytest.approx(1.5 + 0.020)  # counts from when it was first due
    assert s.attempts == 4


def test_retries_end_with_the_attempts_or_the_budget_and_never_follow_a_bad_request() -> None:
    seat = ROOMY._replace(max_seqs=1)
    rows = [(0.0, 10, 300), *((0.01 * i, 10, 1) for i in range(1, 11))]

    def sent(retries: Retries) -> int:
        return simulate.run(requests(*rows), profile(), seat, clock=linear, queue_limit=0, conditions=Conditions(retries=retries)).attempts

    assert sent(Retries(attempts=3)) == 11 + 2 * 10
    assert sent(Retries(attempts=3, budget=0.0, reserve=4)) == 11 + 4
    s = play((0.0, 900, 1), retries=Retries())
    assert (s.attempts, s.requests[0].http_status) == (1, 400)


def test_backoff_doubles_up_to_its_most_and_jitter_only_shortens_it() -> None:
    rule = Retries(first_s=0.5, most_s=8.0, jitter=0.25)
    assert [rule.wait_s(k, 0.0) for k in (1, 2, 5, 9)] == [0.5, 1.0, 8.0, 8.0]
    assert rule.wait_s(2, 1.0) == pytest.approx(0.75)


# ---------------------------------------------------------------- failures


def test_a_failure_loses_what_runs_and_the_retry_goes_elsewhere() -> None:
    """A runs on replica 0, which fails at 100 ms and is back 1 s later; A comes back at 0.6 s and finds replica 1; B was never touched."""
    rows = [(0.0, 10, 40), (0.001, 10, 40)]
    failing = Failures(repair_s=1.0, times=((0.1, 0),))
    s = play(*rows, replicas=2, failures=failing, retries=Retries(jitter=0.0))
    a, b = s.requests
    assert (a.outcome, a.attempt, a.http_status, b.attempt) == ("ok", 2, 200, 1)
    assert a.token_s[0] > 0.6
    assert len(a.token_s) == 40
    assert [(life.slot, life.launched_s, life.ready_s, life.why) for life in s.lives] == [
        (0, 0.0, 0.0, "failed"),
        (1, 0.0, 0.0, None),
        (0, 0.1, 1.1, None),
    ]
    lost, kept = play(*rows, replicas=2, failures=failing).requests
    assert (lost.outcome, lost.done_s, kept.outcome) == ("reset", 0.1, "ok")
    assert len(lost.token_s) == 7  # at 20 ms, then every 12 ms until 100 ms


def test_a_fleet_without_a_replica_answers_503_until_one_is_back() -> None:
    s = play((0.0, 10, 1), (0.6, 10, 1), (1.7, 10, 1), failures=Failures(repair_s=1.0, times=((0.5, 0),)))
    assert [(r.outcome, r.http_status) for r in s.requests] == [("ok", 200), ("rejected", 503), ("ok", 200)]
    assert s.replica_s == pytest.approx(s.end_s)  # a repair is paid for


def test_replicas_are_up_as_often_as_failures_and_repairs_say() -> None:
    """MTBF / (MTBF + MTTR) = 80 % of the lone requests, sent now and then, find the replica up."""
    n = 4000
    rows = [(5.0 * i, 1, 1) for i in range(n)]
    s = play(*rows, failures=Failures(mtbf_s=40.0, repair_s=10.0), seed=3)
    up = np.array([r.http_status == 200 for r in s.requests], dtype=float)
    batches = up.reshape(20, -1).mean(axis=1).tolist()
    low, high = stats.mean_interval(batches, SURE) or (0.0, 0.0)
    assert low < 0.8 < high
    assert high - low < 0.1


# ---------------------------------------------------------------- autoscaling


def test_the_autoscaler_does_what_can_be_worked_out_by_hand() -> None:
    """Ten long requests at 0.1 s, two wanted per replica, looks every second, 3 s to start, 2 s of delay on the way down.

    1 s: ten in flight ask for five; four are launched, ready at 4 s.  2 s, 3 s: still ten, and five there or coming: nothing.
    One request at 4.5 s goes to a new replica.  All are done before 10 s; the most wanted within 2 s falls to one, and four leave.
    """
    rows = [(0.1, 10, 400)] * 10 + [(4.5, 10, 1), (20.0, 10, 1)]
    wide = ROOMY._replace(max_seqs=10, max_context=1000)
    rule = Autoscaling(target=2.0, most=8, interval_s=1.0, cold_start_s=3.0, down_delay_s=2.0)
    s = play(*rows, limits=wide, autoscaling=rule)
    assert {r.outcome for r in s.requests} == {"ok"}
    starts = [(life.slot, life.launched_s, life.ready_s) for life in s.lives]
    assert starts == [(0, 0.0, 0.0), *((slot, 1.0, 4.0) for slot in (1, 2, 3, 4))]
    assert summary.ttft_s(s.requests[10]) == pytest.approx(0.020)  # alone on a new replica
    last_s = max(r.done_s for r in s.requests[:10] if r.done_s is not None)
    ended = sorted(life.ended_s for life in s.lives if life.ended_s is not None)
    assert ended == [math.floor(last_s) + 3.0] * 4  # wanted at the last look before, and for 2 s after that
    assert s.replica_s == pytest.approx(s.end_s + 4 * (ended[0] - 1.0))


def test_a_replica_that_leaves_finishes_what_it_holds() -> None:
    """Rate as the load: busy in the first second, silent after it; the second replica drains."""
    rows = [(0.01 * i, 10, 200) for i in range(1, 5)]
    rule = Autoscaling(metric="rate", target=2.0, most=2, interval_s=1.0, cold_start_s=0.0, down_delay_s=0.0)
    s = play(*rows, replicas=2, autoscaling=rule)
    assert {r.outcome for r in s.requests} == {"ok"}
    (gone,) = [life for life in s.lives if life.why == "scaled down"]
    assert gone.ended_s is not None
    assert gone.ended_s > 2.0
    assert gone.ended_s == pytest.approx(max(r.done_s for r in s.requests if r.done_s is not None), abs=0.05)


def test_a_slow_start_does_not_cascade() -> None:
    """Whatever the cold start, the same load never asks for more than its share."""
    rows = [(0.1, 10, 300)] * 12
    wide = ROOMY._replace(max_seqs=12, max_context=1000)
    for cold_start_s in (0.5, 30.0):
        rule = Autoscaling(target=4.0, most=50, interval_s=0.5, cold_start_s=cold_start_s)
        assert len(play(*rows, limits=wide, autoscaling=rule).lives) == 3


@pytest.mark.parametrize(
    ("load", "there", "wanted"),
    [(10.0, 5, 5), (10.9, 5, 5), (11.1, 5, 6), (8.9, 5, 5), (8.0, 5, 4), (0.0, 5, 1), (99.0, 5, 8), (20.0, 0, 8)],
)
def test_the_wanted_replicas_follow_the_load_with_a_tolerance(load: float, there: int, wanted: int) -> None:
    assert Autoscaling(target=2.0, most=8, cold_start_s=0.0).desired(load, there) == wanted


# ---------------------------------------------------------------- prefill and decode apart


def test_the_first_token_comes_with_the_cache() -> None:
    """Prefill 10 + 10 ms, 10 tokens x 1 kB over 100 kB/s = 100 ms and 5 ms of latency; then a decode of 12 ms a token."""
    apart = Disaggregation(prefill_replicas=1, kv_bytes_per_token=1e3, link_bytes_per_s=1e5, latency_s=0.005)
    (r,) = play((0.0, 10, 3), disaggregation=apart).requests
    assert r.token_s == pytest.approx((0.125, 0.137, 0.149))
    assert (r.output_tokens, r.outcome) == (3, "ok")
    assert r.stage_s == pytest.approx({"queue": 0.0, "transfer": 0.105})


def test_transfers_of_one_prefill_replica_follow_each_other_and_one_token_needs_none() -> None:
    apart = Disaggregation(prefill_replicas=1, kv_bytes_per_token=1e3, link_bytes_per_s=1e5)
    a, b, c = play((0.0, 10, 2), (0.0, 10, 2), (0.0, 10, 1), disaggregation=apart).requests
    assert [r.token_s[0] for r in (a, b, c)] == pytest.approx([0.140, 0.240, 0.040])


def test_decodes_never_wait_for_a_prefill_when_they_are_apart() -> None:
    rows = [(0.0, 10, 60), *((0.05 * i, 60, 2) for i in range(1, 10))]
    apart = Disaggregation(prefill_replicas=1, kv_bytes_per_token=0.0, link_bytes_per_s=1.0)
    together, split = (by_index(s)[0] for s in (play(*rows, replicas=2, routing="round_robin"), play(*rows, disaggregation=apart)))
    assert np.diff(together.token_s).max() > 0.050
    assert np.diff(split.token_s[1:]).max() < 0.015


def test_a_preempted_request_is_computed_again_where_it_is_decoded() -> None:
    tight = Limits(max_seqs=8, max_step_tokens=64, block_tokens=4, blocks=20, max_context=80)
    apart = Disaggregation(prefill_replicas=1, kv_bytes_per_token=1.0, link_bytes_per_s=1e9)
    s = play(*[(0.001 * i, 10, 40) for i in range(12)], limits=tight, disaggregation=apart)
    assert s.preemptions > 0
    assert {(r.outcome, len(r.token_s)) for r in s.requests} == {("ok", 40)}


# ---------------------------------------------------------------- routing


class Spot:
    """A place to route to, as a router sees it."""

    def __init__(self, slot: int, in_system: int = 0, capacity: int = 100) -> None:
        self.slot, self.in_system, self.recorded = slot, in_system, routing.Record(capacity)

    def advance(self, until_s: float) -> None:
        """Is always at the present."""
        assert until_s >= 0


def chosen(name: str, spots: Sequence[Spot], *asks: routing.Ask) -> list[int]:
    choose = routing.policy(name, requests=len(asks), replicas=len(spots), seed=1)
    return [choose(ask, spots, 0.0).slot for ask in asks]


def test_a_prefix_goes_where_it_was_unless_the_load_is_out_of_balance() -> None:
    spots = [Spot(0), Spot(1), Spot(2)]
    ask = routing.Ask
    found = chosen(
        "prefix_aware",
        spots,
        ask(0, 0, (1, 2, 3)),
        ask(1, 1, (7, 8, 9)),
        ask(2, 2, (1, 2, 4)),
        ask(3, 3, (7, 5, 5, 5)),
        ask(4, 4, (7, 8, 9)),
    )
    assert found[0] != found[1]
    assert found[2] == found[0]  # two of three blocks match
    assert found[3] not in found[:2]  # a quarter is too little: the smallest record
    assert found[4] == found[1]
    spots[found[1]].in_system = 65
    assert chosen("prefix_aware", spots, ask(5, 5, (7, 8, 9))) != [found[1]]


def test_a_record_forgets_the_ends_of_the_prefixes_used_longest_ago() -> None:
    record = routing.Record(4)
    record.add((1, 2, 3))
    record.add((5, 6))
    assert record.matching((1, 2, 3)) == 2
    assert record.matching((5, 6, 7)) == 2


def test_sessions_stay_and_only_those_of_a_lost_replica_move() -> None:
    spots = [Spot(i) for i in range(4)]
    asks = [routing.Ask(i, session, ()) for i, session in enumerate([*range(200), *range(200)])]
    found = chosen("session_affinity", spots, *asks)
    assert found[:200] == found[200:]
    assert min(np.bincount(found[:200])) > 25
    fewer = chosen("session_affinity", [spots[0], spots[1], spots[3]], *asks[:200])
    assert all(b == a for a, b in zip(found[:200], fewer, strict=True) if a != 2)


def test_two_choices_wait_less_than_one_and_more_than_the_best_of_all() -> None:
    """At 80 % load, 8 lone servers: random, power of two, least loaded."""

    def waits_s(seed: int) -> list[float]:
        rng = np.random.default_rng(seed)
        n = 1500
        schedule = Schedule(
            scheduled_s=np.cumsum(rng.exponential(1 / 6.4, n)), prompt_tokens=np.ceil(rng.exponential(1000, n)).astype(np.int64),
            output_tokens=np.ones(n, dtype=np.int64),
        )  # fmt: skip
        runs = [
            simulate.run(schedule, profile(), LONE, replicas=8, routing=how, seed=seed, clock=prefill_only)
            for how in ("random", "power_of_two", "least_loaded")
        ]
        return [float(np.mean([r.stage_s["queue"] for r in s.requests if r.in_window])) for s in runs]

    found = np.array([waits_s(seed) for seed in range(5)])
    for worse, better in itertools.pairwise(range(3)):
        low, _ = stats.mean_interval(found[:, worse] - found[:, better], 0.99) or (0.0, 0.0)
        assert low > 0


def test_an_unknown_policy_or_metric_is_named() -> None:
    with pytest.raises(UnknownName, match="power_of_two"):
        play((0.0, 1, 1), routing="power_of_tow")
    with pytest.raises(UnknownName, match="in_flight"):
        Autoscaling(metric="in_fligt", target=1.0, most=2, cold_start_s=0.0)  # type: ignore[arg-type]


# ---------------------------------------------------------------- whatever comes


@st.composite
def designs(draw: st.DrawFn) -> tuple[Schedule, Limits, dict[str, Any]]:
    n = draw(st.integers(1, 20))
    rows = [(draw(st.floats(0, 0.5)), draw(st.integers(1, 40)), draw(st.integers(1, 30))) for _ in range(n)]
    limits = Limits(
        max_seqs=draw(st.integers(1, 6)), max_step_tokens=draw(st.integers(1, 40)), block_tokens=4, blocks=draw(st.integers(10, 40)),
        max_context=60,
    )  # fmt: skip
    options = {"replicas": draw(st.integers(1, 3)), "seed": draw(st.integers(0, 9)), "queue_limit": draw(st.none() | st.integers(0, 3))}
    return requests(*sorted(rows)), limits, options


RULES = (
    Policy(), Policy(prefill_first=1), Policy(prefill_first=1, mixed=1), Policy(reserve=1.0), Policy(swap=1, move_s=1e-4),
    Policy(drafts=2, acceptance=0.6),
)  # fmt: skip


@given(designs(), st.sampled_from(tuple(core.ROUTINGS)), st.none() | st.floats(0, 1), st.sampled_from([0.0, 0.03]), st.sampled_from(RULES))
@settings(max_examples=60, deadline=None)
def test_event_by_event_gives_what_arrival_by_arrival_gives(
    design: tuple[Schedule, Limits, dict[str, Any]], how: str, until_s: float | None, way_s: float, rules: Policy
) -> None:
    schedule, limits, options = design
    own = profile(request_overhead_s=way_s, token_overhead_s=2 * way_s)
    plain = simulate.run(schedule, own, limits, clock=linear, routing=how, until_s=until_s, policy=rules, **options)
    events = fleet.play(
        Scheduled(schedule), own, limits, linear, policy=rules, routing=how, until_s=until_s, conditions=Conditions(),
        counted=lambda due_s: [i >= len(due_s) // 10 for i in range(len(due_s))], **options,
    )  # fmt: skip
    assert events.requests == plain.requests  # to the last bit
    assert (events.busy_s, events.steps, events.preemptions, events.attempts) == (
        plain.busy_s,
        plain.steps,
        plain.preemptions,
        plain.attempts,
    )
    assert [t.end_s.tolist() for t in events.timelines] == [t.end_s.tolist() for t in plain.timelines]


@st.composite
def troubles(draw: st.DrawFn) -> Conditions:
    """Any of them, at times and sizes that matter for runs of a second."""
    retries = st.builds(Retries, attempts=st.integers(1, 3), first_s=st.floats(0, 0.2), budget=st.none() | st.floats(0, 1))
    failures = st.builds(
        Failures, repair_s=st.floats(0, 0.3), mtbf_s=st.none() | st.floats(0.05, 1.0), times=st.floats(0, 0.5).map(lambda t: ((t, 0),))
    )
    autoscaling = st.builds(
        Autoscaling, metric=st.sampled_from(simulate.METRICS), target=st.floats(0.1, 3.0), most=st.integers(1, 4),
        interval_s=st.floats(0.03, 0.3), cold_start_s=st.floats(0, 0.3), down_delay_s=st.floats(0, 0.3),
    )  # fmt: skip
    apart = st.builds(
        Disaggregation, prefill_replicas=st.integers(1, 2), kv_bytes_per_token=st.floats(0, 10), link_bytes_per_s=st.just(1e3)
    )
    around: dict[str, Any] = {"timeout_s": draw(st.none() | st.floats(0.01, 0.5)), "retries": draw(st.none() | retries)}
    if draw(st.booleans()):
        return Conditions(disaggregation=draw(apart), **around)
    return Conditions(failures=draw(st.none() | failures), autoscaling=draw(st.none() | autoscaling), **around)


@given(designs(), st.sampled_from(simulate.ROUTINGS), troubles(), st.none() | st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_whatever_happens_every_request_ends_once_and_the_same_seed_gives_the_same_bits(
    design: tuple[Schedule, Limits, dict[str, Any]], how: str, conditions: Conditions, until_s: float | None
) -> None:
    schedule, limits, options = design

    def run() -> Simulation:
        return simulate.run(schedule, profile(), limits, clock=linear, routing=how, until_s=until_s, conditions=conditions, **options)

    s = run()
    assert sorted(r.index for r in s.requests) == list(range(len(schedule.scheduled_s)))
    assert sum(r.attempt for r in s.requests if r.sent_s is not None) <= s.attempts + len(s.requests)
    for r in s.requests:
        assert all(b > a for a, b in itertools.pairwise((r.scheduled_s, *r.token_s)))
        asked = int(schedule.output_tokens[r.index])
        assert (len(r.token_s) == asked) if r.outcome == "ok" else (len(r.token_s) <= asked)
        assert r.outcome in ("ok", "rejected", "timeout", "reset", "unfinished")
        if until_s is None:
            assert r.outcome != "unfinished"
        if r.outcome == "ok":
            assert r.done_s == r.token_s[-1]
    if conditions.timeout_s is None:
        assert not any(r.outcome == "timeout" for r in s.requests)
    assert 0 <= s.utilisation <= 1 + 1e-9
    again = run()
    assert (again.requests, again.busy_s, again.lives) == (s.requests, s.busy_s, s.lives)
