"""Priorities between tenants: the scheduler's order, the wait by class as the textbooks have it, and the fleet they save."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import batching, hardware, jit, latency, models, record, scenario, slo, workload
from mlsys_bench.batching import Limits, Policy
from mlsys_bench.errors import BadInput
from mlsys_bench.plan import Request, candidates, command, confirm, demand, plan, priority, search, sizing
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.queueing import priorities
from mlsys_bench.report import content
from mlsys_bench.simulate import core
from mlsys_bench.tenancy import Precedence
from mlsys_bench.types import Plan, Scenario, Tenant, Workload
from tests.sample_records import machine

ROOMY = Limits(max_seqs=2, max_step_tokens=64, block_tokens=4, blocks=100, max_context=200)
CHAT = Tenant(
    name="chat",
    share=0.7,
    prompt_tokens=workload.parse_lengths("lognormal:800:0.9:4096"),
    output_tokens=workload.parse_lengths("lognormal:150:0.7:600"),
)
BATCH = Tenant(
    name="batch",
    share=0.3,
    prompt_tokens=workload.parse_lengths("lognormal:3000:0.5:12000"),
    output_tokens=workload.parse_lengths("lognormal:300:0.4:900"),
    priority=2,
)


def traffic(rate_per_s: float, *parts: Tenant) -> Workload:
    return workload.with_tenants(workload.synthetic(rate_per_s, prompt=1, output=1), parts or (CHAT, BATCH))


# ---------------------------------------------------------------- the scheduler


def served(ranks: list[int], limits: Limits = ROOMY) -> list[int]:
    """Return requests of 4 + 2 tokens, all there at once, in the order in which they end."""
    state, ended = batching.new_state(limits), list[int]()
    rows = [batching.add(state, limits, 4, 2, rank=rank) for rank in ranks]
    while batching.running(state) + batching.waiting(state):
        step = batching.schedule(state, limits)
        for row in batching.update(state, limits, step).tolist():
            batching.remove(state, row)
            ended.append(rows.index(row))
        batching.check(state, limits)
    return ended


def test_lower_ranks_are_seated_first_and_within_one_it_is_first_come_first_served() -> None:
    assert served([1, 0, 1, 0, 2, 0]) == [1, 3, 5, 0, 2, 4]
    assert served([0, 0, 0, 0]) == [0, 1, 2, 3]


def test_nobody_loses_a_seat_to_one_that_waits() -> None:
    limits = ROOMY._replace(max_seqs=1)
    state = batching.new_state(limits)
    slow = batching.add(state, limits, 4, 3, rank=1)
    batching.update(state, limits, batching.schedule(state, limits))
    batching.add(state, limits, 4, 3, rank=0)
    assert batching.schedule(state, limits).rows.tolist() == [slow]


def test_the_last_of_the_highest_rank_gives_way_when_memory_is_full() -> None:
    """Six blocks of two tokens: three prompts of 3 tokens fit, and the fifth token of each needs one block more than there is."""
    limits = Limits(max_seqs=4, max_step_tokens=16, block_tokens=2, blocks=6, max_context=12)
    state = batching.new_state(limits)
    low, high, low_too = (batching.add(state, limits, 3, 6, rank=rank) for rank in (1, 0, 1))
    lost: list[int] = []
    while not lost:
        step = batching.schedule(state, limits)
        lost = step.preempted.tolist()
        batching.update(state, limits, step)
        batching.check(state, limits)
    assert lost[0] == low_too
    assert high in step.rows
    assert low not in lost


@settings(max_examples=30, deadline=None)
@given(
    asked=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=25),
    blocks=st.integers(9, 40),
)
def test_ranks_keep_every_invariant_and_everybody_is_served(asked: list[tuple[int, int, int, int]], blocks: int) -> None:
    """Requests come at random steps; the state is checked after each."""
    limits = Limits(max_seqs=3, max_step_tokens=8, block_tokens=4, blocks=blocks, max_context=36)
    state, left = batching.new_state(limits), sorted(asked, key=lambda request: request[3])
    ended = now = 0
    while left or batching.running(state) + batching.waiting(state):
        while left and left[0][3] <= now:
            prompt, output, rank, _ = left.pop(0)
            batching.add(state, limits, prompt, output, rank=rank)
        step = batching.schedule(state, limits)
        batching.check(state, limits)
        for row in batching.update(state, limits, step).tolist():
            batching.remove(state, row)
            ended += 1
        now += 1
    assert ended == len(asked)


@pytest.mark.skipif(not jit.HAVE_NUMBA, reason="nothing to compare: simulation is compiled by numba, which is not installed")
def test_compiled_and_plain_runs_with_ranks_are_the_same_to_the_last_bit() -> None:
    profile = latency.roofline(models.find("llama-3.1-8b"), hardware.find("h100-sxm"), precision="bf16")
    limits = Limits(max_seqs=16, max_step_tokens=512, block_tokens=16, blocks=900, max_context=16384)
    met = workload.schedule(traffic(14.0), n=300, seed=4)
    compiled, plain = (core.play(met, limits, profile=profile, compiled=way) for way in (True, False))
    assert compiled.preemptions == plain.preemptions > 0
    assert compiled.first_s.tobytes() == plain.first_s.tobytes()
    assert compiled.last_s.tobytes() == plain.last_s.tobytes()


def test_a_scheduler_that_knows_no_priorities_is_refused() -> None:
    met = workload.schedule(traffic(1.0), n=5, seed=1)
    with pytest.raises(BadInput, match="requests have priorities"):
        core.play(met, ROOMY, clock=lambda _: 0.01, policy=Policy(prefill_first=1))


# ---------------------------------------------------------------- the wait by class


def test_one_server_waits_as_cobham_says() -> None:
    """M/M/1, mu = 1, 0.3 before 0.4: W0 = 0.7; W1 = 0.7 / 0.7 = 1, W2 = 0.7 / (0.7 x 0.3) = 3.33; first come, first served 0.7 / 0.3."""
    order = priority.of(np.array([0, 1]), np.array([0.3, 0.4]), np.ones(2))
    ratio, _ = priority.stretched(0.7, order)
    assert (0.7 / 0.3 * ratio).tolist() == pytest.approx([1.0, 0.7 / (0.7 * 0.3)])


@settings(max_examples=25, deadline=None)
@given(rates=st.lists(st.floats(0.2, 4.0), min_size=2, max_size=4), servers=st.integers(1, 40), load=st.floats(0.3, 0.95))
def test_several_servers_wait_as_davis_says(rates: list[float], servers: int, load: float) -> None:
    """Means and variances of the wait of those who wait are those of `queueing.priorities`, for any number of classes."""
    rates = [rate * load * servers / sum(rates) for rate in rates]
    exact = priorities.nonpreemptive(rates, 1.0, servers)
    work = np.array(rates)
    ratio, scv = priority.stretched(load, priority.of(np.arange(len(rates)), work, work))
    fifo_s = 1 / (servers * (1 - load))  # exponential
    for k, found in enumerate(exact):
        assert fifo_s * ratio[k] == pytest.approx(found.wait.mean_s / found.p_wait, rel=1e-9)
        second = (found.wait.variance_s2 + found.wait.mean_s**2) / found.p_wait
        assert 2 * fifo_s**2 * ratio[k] ** 2 * (1 + scv[k]) == pytest.approx(second, rel=1e-9)


def test_work_is_conserved_whoever_goes_first() -> None:
    """Kleinrock: the mean wait weighed by work is that of first come, first served, in M/M/c."""
    rank, work = np.array([0, 1, 2]), np.array([0.5, 0.2, 0.3])
    ratio, _ = priority.stretched(0.9, priority.of(rank, work, work))
    assert float(ratio @ work) == pytest.approx(1.0)


def test_the_simulated_engine_is_davis_station_where_steps_are_all_alike() -> None:
    """Steps of one length, geometric answers, four slots: M/M/4 with two classes, but for the half step that everybody waits."""
    step_s, mean_tokens, n, seats = 0.01, 40, 16_000, 4
    rng = np.random.default_rng(11)
    rank = (rng.random(n) < 0.5).astype(np.int32)
    service_s = mean_tokens * step_s
    rate = 0.85 * seats / service_s
    met = workload.Schedule(
        scheduled_s=np.cumsum(rng.exponential(1 / rate, n)), prompt_tokens=np.ones(n, dtype=np.int64),
        output_tokens=rng.geometric(1 / mean_tokens, n), rank=rank,
    )  # fmt: skip
    limits = Limits(max_seqs=seats, max_step_tokens=64, block_tokens=16, blocks=10_000, max_context=4096)
    seen = core.play(met, limits, clock=lambda _: step_s)
    exact = priorities.nonpreemptive([rate / 2, rate / 2], service_s, seats)
    for k in (0, 1):
        waits = (seen.first_s - met.scheduled_s - step_s)[rank == k][500:]
        batches = waits[: len(waits) // 20 * 20].reshape(20, -1).mean(axis=1)
        half_width_s = 2.09 * float(batches.std(ddof=1)) / 20**0.5
        assert abs(float(waits.mean()) - exact[k].wait.mean_s) < 1.5 * half_width_s + step_s, k


@functools.cache
def replica(first: int = 1, second: int = 2) -> Replica:
    profile = latency.roofline(models.find("llama-3.1-8b"), hardware.find("h100-sxm"), precision="bf16")
    limits = Limits(max_seqs=32, max_step_tokens=1024, block_tokens=16, blocks=12_000, max_context=16384)
    asked = traffic(1.0, dataclasses.replace(CHAT, priority=first), dataclasses.replace(BATCH, priority=second))
    return Replica(profile, limits, demand.of(asked).fitting(limits))


def test_theory_lets_the_first_class_wait_less_the_last_more_and_moves_nobody_elses_capacity() -> None:
    fifo, ranked, turned = replica(1, 1), replica(1, 2), replica(2, 1)
    assert fifo.capacity_per_s == ranked.capacity_per_s == turned.capacity_per_s
    rate = 0.85 * fifo.capacity_per_s
    for stat in ("mean", "p95", "p99"):
        chat, batch = (
            [each.predict(rate).value("ttft", stat, name) or 0.0 for each in (ranked, fifo, turned)] for name in ("chat", "batch")
        )
        assert 0 < chat[0] < chat[1] < chat[2]
        assert 0 < batch[2] < batch[1] < batch[0]


# ---------------------------------------------------------------- the fleet


def request(text: str = "chat:ttft_p99<400ms,batch:e2e_p95<60s", **changes: object) -> Request:
    base = Request(
        model="llama-3.1-8b", workload=traffic(60.0), slo=slo.parse(text), gpus=("h100-sxm",), precisions=("bf16",), max_batch=64,
        max_step_tokens=2048, headroom=0.05,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@functools.cache
def made() -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(confirm, "SURER", 1)  # the longer run would take ten seconds and changes nothing that is asserted here
        return plan(request())


def worth() -> Precedence:
    tenancy = made().tenancy
    assert tenancy is not None
    assert tenancy.precedence is not None
    return tenancy.precedence


def test_priorities_save_replicas_and_the_plan_says_how_many() -> None:
    order = worth()
    assert order.classes == (("chat",), ("batch",))
    assert order.fifo_replicas is not None
    assert order.fifo_replicas > made().replicas == order.replicas
    assert order.usd_per_hour == made().usd_per_hour
    assert order.fifo_usd_per_hour == pytest.approx(made().usd_per_hour / order.replicas * order.fifo_replicas, abs=0.005)  # type: ignore[operator]
    assert "to keep chat:ttft_p99<400ms" in order.why


def test_the_planned_fleet_keeps_every_class_by_priority_and_not_as_they_come() -> None:
    """The same requests, once with ranks and once without, on as many replicas as the plan has."""
    asked = request()
    bounds = search.bounds(asked, candidates.every(asked)[0], demand.of(asked.workload))
    design = next(d for d in search.search(asked, *bounds, 1).designs if d.candidate.devices == 1)
    design = sizing.resized(design, made().replicas, asked.shelf)
    first_come = dataclasses.replace(asked, workload=workload.first_come(asked.workload))
    kept, missed = ({slo.show_limit(x): e for e, x in confirm.trial(r, design).all.excesses(r.slo)} for r in (asked, first_come))
    assert max(kept.values()) < 1
    assert missed["chat:ttft_p99<400ms"] > 1


def test_in_a_surge_the_first_class_is_served_and_the_last_waits_without_end() -> None:
    order = worth()
    surge = order.surges[-1]
    assert surge.utilisation > 1
    assert surge.excess["batch"] is None
    assert surge.excess["chat"] is not None
    assert surge.fifo_excess == {"chat": None, "batch": None}


def test_equal_priorities_are_none() -> None:
    assert workload.ranks((CHAT, dataclasses.replace(BATCH, priority=1))) is None
    assert workload.ranks((dataclasses.replace(CHAT, priority=5), BATCH)) == (1, 0)
    assert workload.schedule(traffic(1.0, CHAT, dataclasses.replace(BATCH, priority=1)), n=3, seed=0).rank is None


def test_the_plan_is_kept_shown_and_started_with_its_priorities(tmp_path: Path) -> None:
    kept = record.read(record.write(tmp_path / "plan.json", made(), machine()), Plan)
    assert kept == made()
    section = content.describe(kept)[0]
    fact = next(fact for fact in section.facts if fact.label == "Priorities")
    assert fact.text == "chat, then batch"
    assert any(table.title.startswith("When more comes") for table in section.tables)
    own = command.of_plan(kept, "vllm")
    assert "--scheduling-policy priority" in command.command(own)
    assert any("priority 0 of chat, priority 1 of batch" in note for note in command.notes(kept, own))
    assert "who goes first: fcfs -> priority (--scheduling-policy)" in command.difference(dataclasses.replace(own, scheduling=None), own)


def test_priorities_are_read_from_a_scenario() -> None:
    text = (Path(__file__).parent.parent / "scenarios" / "chat-and-batch.yaml").read_text()
    found = scenario.parse(text.replace("share: 15%", "share: 15%\n    priority: 2"), "my.yaml")
    assert isinstance(found, Scenario)
    assert [tenant.priority for tenant in found.workload.tenants] == [1, 2]
