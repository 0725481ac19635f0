"""What a stage graph costs: every total by hand, to the cent, from published prices and from a contract."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.journeys import planning
from mlsys_bench.plan import costs
from mlsys_bench.plan.graph import GraphRequest, plan_graph, problem, works
from mlsys_bench.plan.graph.purse import Paid, Purse, Unit
from mlsys_bench.stages import StageGraph
from mlsys_bench.types import Provenance
from tests.stage_graphs import graph, law

HEAD = "mlsys: 1\nkind: prices\nsource: our contract\ndate: 2026-11-01\n"
OFFERS = """\
catalogue: replace
offers:
  - {provider: p, instance: one, device: l4, devices: 1, region: r, on_demand: $1.00/h, spot: $0.40/h}
  - {provider: p, instance: four, device: l4, devices: 4, region: r, on_demand: $3.10/h}
"""


def contract(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "prices.yaml"
    path.write_text(HEAD + text)
    return planning.market(path)


def on_gpus(seconds: str, gpus: int) -> str:
    return law(seconds).replace("vcpu: 1", f"gpu: l4, gpus: {gpus}")


def two_on_l4() -> StageGraph:
    """3 replicas of one L4 at a, 2 of two at b."""
    return graph(f"a: {{{on_gpus('230ms', 1)}, next: b}}\nb: {{{on_gpus('150ms', 2)}}}")


def paid(g: StageGraph, replicas: dict[str, int], **more: Any) -> Paid:
    """Return the bill of so many replicas."""
    request = GraphRequest(graph=g, **more)
    return problem(g, works(request), purse=request.purse).pay(replicas)


def total(found: Paid) -> float:
    return round(sum(price.usd_per_h or 0.0 for price in found.stages.values()), 6)


def test_stages_on_the_same_device_fill_the_same_instances(tmp_path: Path) -> None:
    """7 L4: a four at $3.10 holds b's two pairs, three ones at $1.00 hold a: $6.10; two fours would be $6.20."""
    found = paid(two_on_l4(), {"a": 3, "b": 2}, market=contract(tmp_path, OFFERS))
    assert found.usd_per_h == total(found) == pytest.approx(6.10, abs=1e-9)
    assert found.stages["a"].usd_per_h == pytest.approx(6.10 * 3 / 7, abs=1e-6)
    assert [price.devices for price in found.stages.values()] == [3, 4]
    assert {line.instance: line.instances for line in found.bill.rented} == {"one": 3, "four": 1}
    assert any("share" in note and "split by devices" in note for note in found.notes)


def test_stranded_devices_of_shared_instances_are_told_once(tmp_path: Path) -> None:
    """Only fours at $3.10: 7 devices take two, one is idle."""
    fours = "".join(line for line in OFFERS.splitlines(keepends=True) if "instance: one" not in line)
    found = paid(two_on_l4(), {"a": 3, "b": 2}, market=contract(tmp_path, fours))
    assert found.usd_per_h == pytest.approx(6.20, abs=1e-9)
    assert found.bill.stranded == {"L4": 1.0}
    assert sum(price.devices or 0 for price in found.stages.values()) == 8
    assert "1 of the 8 L4 rented are used by no replica" in found.notes


def test_a_quota_is_shared_by_the_stages_of_a_device(tmp_path: Path) -> None:
    market = contract(tmp_path, OFFERS + "quotas:\n  - {device: l4, devices: 6}\n")
    with pytest.raises(Infeasible, match=r"more than may be rented \(6 L4"):
        paid(two_on_l4(), {"a": 3, "b": 2}, market=market)


def test_commitments_are_used_first_and_stand_on_the_bill(tmp_path: Path) -> None:
    """Two fours committed at $2.00 hold all seven: $4.00, nothing new."""
    more = (
        "commitments:\n  - {provider: p, instance: four, device: l4, devices: 4, region: r, price: $2.00/h, term: 12month, committed: 2}\n"
    )
    found = paid(two_on_l4(), {"a": 3, "b": 2}, market=contract(tmp_path, OFFERS + more))
    assert found.usd_per_h == pytest.approx(4.00, abs=1e-9)
    assert any("$4.00/h of L4 is committed and paid in any case; $0.00/h is new" in note for note in found.notes)


def test_every_stage_is_rented_on_the_term_and_what_is_not_sold_so_says_it(tmp_path: Path) -> None:
    """Spot: three ones at $0.40; a pair needs two in one instance, which nobody sells on spot: unpriced."""
    market = contract(tmp_path, OFFERS)
    assert paid(graph(f"a: {{{on_gpus('230ms', 1)}}}"), {"a": 3}, market=market, term="spot").usd_per_h == pytest.approx(1.20, abs=1e-9)
    both = paid(two_on_l4(), {"a": 3, "b": 2}, market=market, term="spot")
    assert both.usd_per_h is None
    assert any("no spot price is known for L4" in note for note in both.notes)
    with pytest.raises(BadInput, match="unknown term 'sport'"):
        plan_graph(GraphRequest(graph=two_on_l4(), term="sport"))


def test_machines_on_a_term_nobody_sells_them_on_are_rented_on_demand() -> None:
    """One AWS m7g.xlarge on spot is $0.0713; reserved there is none, and the plan says so."""
    unit = {Unit(stage="a", vcpus=1.0): 3}
    assert Purse(term="spot").pay(unit).usd_per_h == pytest.approx(0.0713, abs=1e-9)
    reserved = Purse(term="reserved").pay(unit)
    assert reserved.usd_per_h == pytest.approx(0.0992, abs=1e-9)
    assert any("rented on demand" in note for note in reserved.notes)


def test_vcpus_storage_and_traffic_are_the_contracts(tmp_path: Path) -> None:
    """3 vCPU at $0.02; 3 copies of 100 GB at $0.073/GB/month = $0.03/h; 10/s x 3600 x 1 MB = 36 GB at $0.05 = $1.80: $1.89."""
    stage = law("230ms").replace("vcpu: 1", "vcpu: 1, storage: 100GB")
    g = graph(f"a: {{{stage}, egress: 1MB}}")
    market = contract(tmp_path, "catalogue: merge\nrates: {vcpu: $0.02/h, storage: $0.073/GB/month, egress: $0.05/GB}\n")
    plan = plan_graph(GraphRequest(graph=g, market=market))
    assert plan.stages[0].replicas == 3
    assert plan.usd_per_hour == pytest.approx(0.06 + 0.03 + 1.80, abs=1e-6)
    assert plan.usd_per_month == pytest.approx(1.89 * 730, abs=1e-3)
    lines = costs.fleet_lines(plan)
    assert lines is not None
    assert sum(line.usd_per_h for line in lines) == pytest.approx(1.89, abs=1e-6)
    own = paid(g, {"a": 3})
    assert own.usd_per_h == pytest.approx(0.30, abs=1e-9)  # the scenario's own $0.10 a vCPU
    assert own.bill.unpriced == ("storage of a, 100 GB x 3", "traffic that leaves, 10.0 MB/s, of a")


def test_without_a_price_of_a_vcpu_whole_machines_are_bought_by_vcpus_and_memory() -> None:
    """Nebius 4 vCPU, 16 GiB at $0.0992: 5 vCPU take two.  Five times 12 GB: one AWS r5a.2xlarge of 64 GiB at $0.452."""
    purse = Purse()
    plain = purse.pay({Unit(stage="a", vcpus=1.0): 3, Unit(stage="b", vcpus=2.0): 1})
    assert plain.usd_per_h == total(plain) == pytest.approx(2 * 0.0992, abs=1e-9)
    hungry = purse.pay({Unit(stage="a", vcpus=1.0, memory_bytes=12e9): 5})
    assert hungry.usd_per_h == pytest.approx(0.452, abs=1e-9)
    assert [offer.provenance for offer in hungry.offers] == [Provenance.MEASURED]
    too_large = purse.pay({Unit(stage="a", vcpus=1.0, memory_bytes=1e15): 1})
    assert too_large.usd_per_h is None
    assert too_large.bill.unpriced == ("replicas of a",)


def test_zones_have_machines_of_their_own() -> None:
    """Four replicas of 1 vCPU fit one machine, over two zones they take two."""
    assert Purse(zones=2).pay({Unit(stage="a", vcpus=1.0): 4}).usd_per_h == pytest.approx(2 * 0.0992, abs=1e-9)


def test_the_parts_of_a_bill_add_up_to_the_last_digit() -> None:
    g = dataclasses.replace(graph(f"a: {{{law('230ms')}, next: b}}\nb: {{{law('10ms')}, next: c}}\nc: {{{law('1ms')}}}"), cost=None)
    found = paid(g, {"a": 3, "b": 1, "c": 1})
    assert found.usd_per_h == total(found) == pytest.approx(2 * 0.0992, abs=1e-9)
