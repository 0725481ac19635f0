"""Plans on one's own prices: they buy what the contract sells, use what is committed, and keep to quotas."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from mlsys_bench import hardware, plan, slo, workload
from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.plan import costs, intervals, planner
from mlsys_bench.pricing import Market, Shelf, contract
from mlsys_bench.report import content
from mlsys_cli.main import app

HEAD = "mlsys: 1\nkind: prices\nsource: contract 4711\ndate: 2026-10-01\ncatalogue: replace\n"
EIGHT = "{provider: p, instance: eight, device: H100, devices: 8, region: r, on_demand: $40.00/h}"
ONE = "{provider: p, instance: one, device: H100, devices: 1, region: r, on_demand: $6.00/h}"
COMMITTED = "{provider: p, instance: two, device: H100, devices: 2, region: r, price: $9.00/h, term: 1y, committed: 1, at_most: 1}"


def market(text: str) -> Market:
    return contract.parse(HEAD + text, "prices.yaml", lambda name: hardware.find(name).id, "2026-11-21")


def request(prices: Market, rate_per_s: float = 150.0) -> plan.Request:
    return plan.Request(
        model="llama-3-8b",
        workload=workload.synthetic(rate_per_s, arrivals="poisson", prompt="512", output="128", source="test"),
        slo=slo.parse("ttft_p95<500ms,tpot_p95<50ms"),
        gpus=("H100",),
        precisions=("bf16",),
        max_batch=128,
        market=prices,
    )


def test_a_plan_costs_what_the_contract_asks() -> None:
    """So many replicas of one device on ones at $6.00, or on an eight at $40.00 from seven on; to the cent."""
    made = plan.plan(request(market(f"offers: [{EIGHT}, {ONE}]")))
    devices = made.replicas * made.devices_per_replica
    assert made.devices_per_replica == 1
    assert made.usd_per_hour == min(40.0 * n + 6.0 * max(devices - 8 * n, 0) for n in range(devices + 1))
    assert {o.source for o in made.prices} == {"contract 4711"}


def test_what_is_committed_is_used_before_anything_is_bought() -> None:
    """Two devices at $9.00 are paid for: one replica fewer is bought for each, and the plan says what is new."""
    made = plan.plan(request(market(f"offers: [{ONE}]\ncommitments: [{COMMITTED}]")))
    assert made.usd_per_hour == pytest.approx(9.0 + 6.0 * (made.replicas * made.devices_per_replica - 2))
    assert any(note.startswith("$9.00/h of it is committed and paid in any case") for note in made.notes)
    assert any(note.startswith("instances: 1 x p two + ") for note in made.notes)


def test_a_fleet_on_spot_says_that_it_promises_nothing() -> None:
    """A third of the price read like the same promise."""
    sold = market(f"offers: [{ONE.replace('on_demand: $6.00/h', 'on_demand: $6.00/h, spot: $2.00/h')}]")
    firm, spot = (plan.plan(dataclasses.replace(request(sold), term=term)) for term in ("on-demand", "spot"))
    told = [[note for note in made.notes if "this plan promises nothing while they are away" in note] for made in (firm, spot)]
    assert [len(notes) for notes in told] == [0, 1]
    lines = [costs.fleet_lines(made) for made in (firm, spot)]
    assert [line[0].what.endswith("(llm), spot") for line in lines if line] == [False, True]
    details = [next(fact.detail for fact in content.describe(made)[0].facts if fact.label == "Cost") for made in (firm, spot)]
    assert ["spot price: 2026-10-01" in detail for detail in details] == [False, True]


def test_a_quota_that_holds_too_few_is_the_reason() -> None:
    with pytest.raises(Infeasible, match=r"are more than may be rented \(1 H100-SXM at p\)"):
        plan.plan(request(market(f"offers: [{ONE}]\nquotas: [{{device: H100, devices: 1, provider: p}}]")))


def test_the_upper_end_of_the_cost_is_that_of_the_most_that_may_be_rented() -> None:
    """Ones at $6: of 12 replicas that may be needed a quota lets one rent 3 more than are planned, which cost $18 more."""
    asked = request(market(f"offers: [{ONE}]"))
    made, design, _ = planner.planned(asked)
    needed = (float(made.replicas), made.replicas + 8.0)
    for quota, more in ((made.replicas + 3, 3), (made.replicas, 0), (made.replicas + 8, 8)):
        shelf = Shelf(market=market(f"offers: [{ONE}]\nquotas: [{{device: H100, devices: {quota}, provider: p}}]"))
        assert intervals.costs(design, needed, shelf)["usd_per_hour"] == (made.usd_per_hour, 6.0 * (made.replicas + more))
        told = list(intervals.beyond(design, needed, shelf))
        assert bool(told) is (more < 8)
        assert all(f"raise the quota to {made.replicas + 8} or more devices" in line for line in told)
        assert all(line.endswith(f"the upper end of the cost is that of {made.replicas + more} replicas") for line in told)


def test_a_plan_says_that_more_may_be_needed_than_may_be_rented() -> None:
    free = plan.plan(request(market(f"offers: [{ONE}]")))
    assert free.intervals["replicas"][1] > free.replicas
    made = plan.plan(request(market(f"offers: [{ONE}]\nquotas: [{{device: H100, devices: {free.replicas}, provider: p}}]")))
    assert made.intervals["usd_per_hour"][1] == made.usd_per_hour
    assert any(note.startswith(f"up to {made.intervals['replicas'][1]:g} may be needed: ") for note in made.notes)
    assert not any("may be rented" in note for note in free.notes)


@given(st.integers(0, 50), st.integers(0, 60), st.integers(0, 60))
def test_the_last_that_may_be_is_found(holds: int, more: int, bound: int) -> None:
    assert intervals.last(holds, holds + more, lambda n: n <= holds + bound) == holds + min(more, bound)


def test_devices_that_no_replica_uses_are_said() -> None:
    made = plan.plan(request(market(f"offers: [{EIGHT}]"), rate_per_s=5.0))
    assert made.replicas == 1
    assert made.usd_per_hour == 40.0
    assert any("of the 8 devices rented are used by no replica" in note for note in made.notes)


def test_the_command_reads_a_contract_or_names_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(HEAD + f"offers: [{ONE.replace('$6.00/h', '6.00')}]")
    done = CliRunner().invoke(app, ["plan", "--qps", "5", "--model", "llama-3-8b", "--gpu", "h100", "--prices", str(file)])
    assert isinstance(done.exception, BadInput)
    assert "prices.yaml: offers[0].on_demand: 6.0 has no unit" in str(done.exception)
    file.write_text(HEAD + f"offers: [{ONE}]")
    done = CliRunner().invoke(app, ["plan", "--qps", "5", "--model", "llama-3-8b", "--gpu", "h100", "--prices", str(file), "--json"])
    assert done.exit_code == 0
    assert '"usd_per_hour": 6.0' in done.stdout
    assert "prices.yaml" in done.stdout  # among the files it was made from
