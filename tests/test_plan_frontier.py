"""Cost against latency: no point is beaten, all keep the limits, the plan is the cheapest, and brute force finds no better one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import plan as planner
from mlsys_bench import slo, workload
from mlsys_bench.plan import candidates, demand, sizing
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.plan.frontier import _fleets, frontier
from mlsys_bench.report import content, figures
from mlsys_bench.types import FrontierPoint, Plan

REQUEST = planner.Request(
    model="llama-3-8b",
    workload=workload.synthetic(120, prompt="lognormal:512:1.0:4096", output="lognormal:128:1.0:1024"),
    slo=slo.parse("ttft_p95<500ms,tpot_p99<50ms"),
    gpus=("h100-sxm", "l4"),
    precisions=("fp8",),
    max_batch=128,
    max_step_tokens=2048,
)


def point(usd: float, latency_s: float) -> FrontierPoint:
    return FrontierPoint(
        gpu="H100-SXM", precision="fp8", devices_per_replica=1, replicas=1, usd_per_hour=usd, figure="ttft_p95_s", latency_s=latency_s
    )


@pytest.fixture(scope="module")
def made() -> Plan:
    return planner.plan(REQUEST)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=30))
def test_what_is_kept_is_not_beaten_and_what_is_dropped_is(drawn: list[tuple[int, int]]) -> None:
    """A dropped point costs no less than one kept, which is as fast but for 3 %."""
    kept = frontier([point(usd, ms / 1e3) for usd, ms in drawn])
    for i, a in enumerate(kept):
        assert all(b.usd_per_hour > a.usd_per_hour and b.latency_s < a.latency_s for b in kept[i + 1 :])
    for usd, ms in drawn:
        assert any(a.usd_per_hour <= usd and a.latency_s <= ms / 1e3 / 0.97 + 1e-12 for a in kept)


def test_the_plan_is_where_the_frontier_begins(made: Plan) -> None:
    first = made.frontier[0]
    assert (first.usd_per_hour, first.replicas) == (made.usd_per_hour, made.replicas)
    assert first.latency_s == pytest.approx(made.predicted[first.figure])  # as simulated
    assert len(made.frontier) > 2


def test_a_plan_that_another_of_its_price_outruns_stands_beside_the_frontier(made: Plan) -> None:
    """Blue is the plan: the first of the frontier was, whatever had been chosen."""
    bits = replace(made, fleet=(replace(made.fleet[0], precision="bf16"),), predicted={**made.predicted, made.frontier[0].figure: 0.214})
    notes = [next(t.note for t in content.describe(p)[0].tables if t.title.startswith("What a shorter")) for p in (made, bits)]
    assert notes == ["", f"the plan itself, {made.replicas} replicas on H100-SXM (bf16), takes 214 ms for ${made.usd_per_hour:.2f}/h"]
    pictures = [figures.frontier.__wrapped__(p, "") for p in (made, bits)]  # type: ignore[attr-defined]
    blue = [[len(c.get_offsets()) for c in page.axes[0].collections] for page in pictures]
    assert blue == [[len(made.frontier)], [len(made.frontier), 1]]


def test_what_is_shown_is_what_is_paid_for() -> None:
    """With an availability a fleet is rented with its spares: its count costs its price, ones at one price each, and it says so."""
    limits = slo.parse("ttft_p95<500ms,tpot_p99<50ms,availability>99.9%")
    found = planner.plan(replace(REQUEST, slo=limits, gpus=("h100-sxm",), zones=3, survive_zone=True))
    assert found.secured is not None
    assert found.secured.spare > 0
    first = found.frontier[0]
    assert (first.replicas, first.spare, first.usd_per_hour) == (found.replicas, found.secured.spare, found.usd_per_hour)
    each_usd = first.usd_per_hour / first.replicas
    singles = [p for p in found.frontier if p.devices_per_replica == 1]
    assert [p.usd_per_hour for p in singles] == pytest.approx([each_usd * p.replicas for p in singles])
    table = next(t for t in content.describe(found)[0].tables if t.title.startswith("What a shorter"))
    assert table.title.endswith("with its spares away")
    assert table.rows[0][0].sub == f"{found.secured.needed} + {found.secured.spare} to spare"


def test_no_fleet_of_one_kind_beats_it(made: Plan) -> None:
    """Every number of replicas of every candidate, by theory: none cheaper and faster by more than a step of the fleets looked at."""
    metric, stat, _ = made.frontier[0].figure.split("_")
    theory = made.analytic[made.frontier[0].figure] / made.predicted[made.frontier[0].figure]
    served = demand.of(REQUEST.workload)
    for candidate in candidates.every(REQUEST)[0]:
        replica = Replica(candidate.profile, candidate.limits, served, samples=256)
        least = sizing.fewest(replica.capacity_per_s, REQUEST.workload.rate_per_s, REQUEST.headroom)
        for replicas in range(least, 3 * least + 1, max(1, least // 4)):
            price = sizing.price(candidate, replicas, REQUEST.shelf)
            seen = replica.predict(REQUEST.workload.rate_per_s / replicas)
            latency_s = seen.value(metric, stat)
            dear = price is None or price.usd_per_h > 3 * made.frontier[0].usd_per_hour
            if dear or price is None or latency_s is None or any(excess >= 1 for excess, _ in seen.excesses(REQUEST.slo)):
                continue
            affordable = [p.latency_s * theory for p in made.frontier if p.usd_per_hour <= 1.5 * price.usd_per_h]
            assert min(affordable, default=0.0) <= latency_s * 1.1, (candidate.name, replicas)


def test_a_bound_that_promises_too_much_begins_with_the_first_fleet_that_can_carry_the_traffic() -> None:
    """What is passed over is known by a bound on its capacity: with little headroom its replicas may be too few."""
    candidate = candidates.every(REQUEST)[0][0]
    served = demand.of(REQUEST.workload)
    capacity_per_s = Replica(candidate.profile, candidate.limits, served, samples=256).capacity_per_s
    far = replace(REQUEST, slo=slo.parse("e2e_p95<1000s"), workload=replace(REQUEST.workload, rate_per_s=10.7 * capacity_per_s))
    (first, *_) = _fleets(far, candidate, served, 10, far.slo[0], math.inf, 1.0)
    assert first.replicas == 11


def test_a_trace_has_none(made: Plan) -> None:
    """Theory knows a trace's mean rate only, which says nothing of its tail."""
    calm = workload.schedule(replace(REQUEST.workload, rate_per_s=4.0), n=400, seed=1)
    assert planner.plan(replace(REQUEST, trace=calm, gpus=("h100-sxm",))).frontier == ()
    assert made.frontier
