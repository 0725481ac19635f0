"""`mlsys cost`: a plan record priced from every side, as its parts are by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlsys_bench import hardware, latency, models, pricing, record
from mlsys_bench import plan as planner
from mlsys_bench.billing import Costs
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys import costing, planning
from mlsys_bench.plan import costs
from mlsys_bench.report.content import describe
from mlsys_bench.types import Plan
from mlsys_cli.main import app
from tests import sample_records

PRICES = """\
mlsys: 1
kind: prices
source: contract 4711
date: 2026-10-01
catalogue: merge
commitments:
  - {provider: aws, instance: p5.48xlarge, device: H100, devices: 8, region: us-west-2, price: $20.00/h, term: 1y, committed: 1}
rates: {storage: $0.10/GB/month}
"""


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    """Eight replicas on one p5.48xlarge at $55.04 an hour for 200 requests a second."""
    made = sample_records.plan()
    item = dataclasses.replace(made.fleet[0], gpu="H100-SXM")
    offer = next(o for o in pricing.offers("H100-SXM", "on-demand") if o.instance == "p5.48xlarge")
    profile = latency.roofline(models.find("llama-3-8b"), hardware.find("H100"), precision="bf16")
    made = dataclasses.replace(made, fleet=(item,), gpu="H100-SXM", prices=(offer,), profile=profile)
    return record.write(tmp_path / "plan.json", made, sample_records.machine())


@pytest.fixture
def prices_file(tmp_path: Path) -> Path:
    file = tmp_path / "prices.yaml"
    file.write_text(PRICES)
    return file


def test_a_plan_is_priced_from_every_side(plan_file: Path, prices_file: Path) -> None:
    """The committed instance: $20; storage of 61.44 GB twice at $0.10: $12.29 a month; eight vCPUs at $0.0248: $0.1984; egress has none."""
    found = costing.cost(
        plan_file, prices=prices_file, apis=["gpt-4o-mini"], vectors="10000000x1536x2", egress="20kB", vcpus=8, baseline=plan_file
    )
    assert found.bill is not None
    assert found.bill.usd_per_h == pytest.approx(20 + 12.288 / 730 + 0.1984)
    assert found.bill.unpriced == ("network egress",)
    assert [c.change for c in found.comparison] == [0.0] * len(found.comparison)
    assert (found.saving_usd_per_month, found.differences) == (0.0, ())
    assert found.apis[0].model == "gpt-4o-mini"
    assert found.energy is not None


def test_a_fleet_is_billed_and_held_against_an_api_on_the_prices_that_are_named(plan_file: Path, prices_file: Path) -> None:
    """Eight replicas on one p5.48xlarge: $55.04 listed, $20 committed.  One replica takes the whole of it: $480 a day, over $/request."""
    listed, ours = costing.cost(plan_file, apis=["gpt-4o-mini"]), costing.cost(plan_file, prices=prices_file, apis=["gpt-4o-mini"])
    assert listed.bill is not None
    assert ours.bill is not None
    assert (listed.bill.usd_per_h, ours.bill.usd_per_h) == (55.04, 20.0)
    assert (ours.bill.lines[0].what, ours.bill.lines[0].source) == ("1 x aws p5.48xlarge (generate), reserved", "contract 4711")
    assert f"bought on {prices_file} the fleet costs $20.00 an hour; the plan's record says $55.04" in ours.notes
    assert ours.apis[0].idle_usd_per_day == 480.0
    assert ours.apis[0].from_per_day == pytest.approx(480 / ours.apis[0].api_usd_per_request)


def test_a_plan_bought_on_a_contract_breaks_even_on_it_whether_its_file_is_there_or_not(plan_file: Path, prices_file: Path) -> None:
    """The record holds the contract's offer: what eight cost for capacity blocks in 2024, $39.33, is nobody's price."""
    made = costs.rebought(record.read(plan_file, Plan), planning.market(prices_file))
    assert made is not None
    file = record.write(plan_file.with_name("ours.json"), made, sample_records.machine())
    for prices in (None, prices_file):
        assert costing.cost(file, prices=prices, apis=["gpt-4o-mini"]).apis[0].idle_usd_per_day == 480.0
    assert costs.term_of(made, planning.market(prices_file)) == "on-demand"
    with pytest.raises(BadInput, match="--hours: the plan's prices are not the catalogue's"):
        costing.cost(file, hours="8x8,16x16")


def test_a_plan_whose_order_is_not_all_in_its_record_is_billed_as_it_was_bought(plan_file: Path, prices_file: Path) -> None:
    made = record.read(plan_file, Plan)
    file = record.write(plan_file.with_name("two.json"), dataclasses.replace(made, fleet=made.fleet * 2), sample_records.machine())
    assert any("are billed as they were bought; plan again with --prices" in note for note in costing.cost(file, prices=prices_file).notes)


def test_a_withdrawn_api_says_so_and_one_that_writes_no_answers_is_refused(plan_file: Path) -> None:
    gone, sold = "together_ai/meta-llama/Meta-Llama-3.1-70B-Instruct-Turbo", "claude-sonnet-4-6"
    notes = costing.cost(plan_file, apis=[gone, sold]).notes
    assert next(note for note in notes if note.startswith(gone)).endswith("it was withdrawn on 2026-02-25: nobody sells it any more")
    assert next(note for note in notes if note.startswith(sold)).endswith("read 2026-11-20")
    with pytest.raises(BadInput, match=r"rerank-v3\.5 is sold for rerank and writes no answers"):
        costing.cost(plan_file, apis=["rerank-v3.5"])


def test_what_the_traffic_of_the_plan_costs_at_an_api_stands_beside_the_fleet(plan_file: Path) -> None:
    found = costing.cost(plan_file, apis=["gpt-4o-mini"])
    there = found.apis[0].api_usd_per_request * 200 * 3600 * 730
    said = next(fact.detail for fact in describe(found)[0].facts if fact.label == "API")
    assert f": ${there:,.0f} a month for this traffic, $40,179 by the fleet" in said


def test_a_request_of_a_cheap_fleet_does_not_cost_nothing(plan_file: Path, tmp_path: Path) -> None:
    """A feed of 5,000 requests a second on $2.58 an hour cost $0.000000 each."""
    made = record.read(plan_file, Plan)
    item = dataclasses.replace(made.fleet[0], usd_per_hour=2.58)
    cheap = dataclasses.replace(made, fleet=(item,), usd_per_hour=2.58, workload=dataclasses.replace(made.workload, rate_per_s=5000.0))
    found = costing.cost(record.write(tmp_path / "cheap.json", cheap, sample_records.machine()))
    request = next(fact for fact in describe(found)[0].facts if fact.label == "Request")
    assert (request.text, request.detail) == ("$0.00000014", "$0.00014 a thousand, idle time included")


def test_the_rate_asked_for_shares_the_energy_too(plan_file: Path) -> None:
    whole, half = costing.cost(plan_file), costing.cost(plan_file, requests_per_s=100.0)
    assert whole.energy is not None
    assert half.energy is not None
    idle_w = 0.17 * 700 * 8 * 1.58
    assert half.energy.watts - idle_w == pytest.approx((whole.energy.watts - idle_w) / 2)


def test_the_mean_of_the_day_is_the_rate_unless_another_is_given(plan_file: Path, tmp_path: Path) -> None:
    made = dataclasses.replace(record.read(plan_file, Plan), day_mean_per_s=50.0)
    file = record.write(tmp_path / "day.json", made, sample_records.machine())
    day, peak = costing.cost(file), costing.cost(file, requests_per_s=200.0)
    assert (day.requests_per_s, peak.requests_per_s) == (50.0, 200.0)
    assert day.bill is not None
    assert peak.bill is not None
    assert day.bill.usd_per_request == pytest.approx(4 * peak.bill.usd_per_request)


def test_hours_are_bought_on_the_terms_of_the_plans_instance(plan_file: Path, prices_file: Path) -> None:
    """A p5.48xlarge holds eight replicas: 8, 16 and 32 are one, two and four instances.  One is committed at $20.

    Above it one wanted for a third of the day and three for another: working ceil(1 / 0.986) = 2 and ceil(3 / 0.986) = 4, held over three
    pools 3 ceil(2 / 2) = 3 and 3 ceil(4 / 2) = 6, on average three at $16.13 x 36 / 37: $47.08.  With the $20 that is $67.08; a second
    reserved would leave six at a third of the day, $31.39, and $40: $71.39; all on demand 7 / 3 x 55.04 = $128.43.
    """
    reclaims = "life=6h,pools=3,start=5min,refill=10min"
    found = costing.cost(plan_file, prices=prices_file, hours="8x8,16x8,32x8", floor=8, spot=reclaims).mix
    assert found is not None
    assert (found.reserved, found.firm, found.spot, found.spot_spares) == (1, 1, 6, 3)
    assert (round(found.usd_per_h, 2), round(found.all_on_demand_usd_per_h, 2)) == (67.08, 128.43)


def test_the_floor_is_the_whole_plan_where_none_is_named(plan_file: Path) -> None:
    found = costing.cost(plan_file, hours="8,8", spot="life=6h,pools=3,start=5min,refill=10min").mix
    assert found is not None
    assert (found.firm, found.spot) == (1, 0)


def test_changes_are_planned_again_on_the_plans_own_device(plan_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planner that needs a replica for 25 requests a second: eight for 200, nine for 220, six for 140, a small model eight and three."""
    asked = []

    def planned(request: planner.Request) -> Plan:
        asked.append(request)
        replicas = -int(-round(request.workload.rate_per_s, 6) // 25)
        return dataclasses.replace(record.read(plan_file, Plan), replicas=replicas, usd_per_hour=6.88 * replicas)

    monkeypatch.setattr(planner, "plan", planned)
    rows = {row.what: row.replicas for row in costing.cost(plan_file, what_if=True, small="llama-3.2-1b").sensitivity}
    assert rows["10 % more traffic"] == 9
    assert rows["a cache that answers 30 %"] == 6
    assert rows["llama-3.2-1b first, 30 % passed on"] == 8 + 3
    assert {request.gpus for request in asked} == {("H100-SXM",)}
    several = dataclasses.replace(record.read(plan_file, Plan), gpu=None)
    with pytest.raises(BadInput, match="--what-if: the plan is of several stages or kinds"):
        costing.changes(several, pricing.published(), None)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"vectors": "10Mx1536"}, "--vectors 10Mx1536: write count x dimensions"),
        ({"egress": "20"}, "--egress: '20' has no unit"),
        ({"hours": "2;4"}, "--hours 2;4: write replicas hour by hour"),
        ({"hours": "2", "spot": "life=6h"}, "--spot life=6h: write life=6h,pools=3"),
        ({"apis": ["gpt-4oo"]}, "did you mean gpt-4o"),
        ({"apis": ["gpt-4"], "cached": "50%"}, "publishes no price for cached input"),
        ({"site": costing.site(0.5, None, None, None)}, "PUE of 0.5"),
    ],
)
def test_what_cannot_be_priced_is_said_in_a_line(plan_file: Path, options: dict[str, object], complaint: str) -> None:
    with pytest.raises(BadInput) as error:
        costing.cost(plan_file, **options)  # type: ignore[arg-type]
    assert complaint in str(error.value)


def test_the_command_shows_and_records(plan_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    done = CliRunner().invoke(app, ["cost", str(plan_file), "--api", "gpt-4o", "--grid-g", "400", "--pue", "1.2", "-o", str(out)])
    assert done.exit_code == 0
    assert "$55.04 an hour, $40,179 a month, $482,150 a year" in " ".join(done.stdout.split())
    kept = record.read(out, Costs)
    assert kept.energy is not None
    assert kept.energy.co2_kg_per_month == pytest.approx(kept.energy.kwh_per_month * 0.4)
