"""The bill of a plan, its energy, its break-even, and what changes make of it: by hand on a plan of round figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from mlsys_bench import hardware, latency, models, pricing, slo
from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.plan import costs, planner, sensitivity
from mlsys_bench.plan.request import Request
from mlsys_bench.pricing import Rates, compare
from mlsys_bench.pricing.energy import Site
from mlsys_bench.types import Lengths, Plan, Workload
from tests.sample_records import plan as sample

PROFILE = latency.roofline(models.find("llama-3-8b"), hardware.find("H100"), precision="bf16")
TRAFFIC = Workload(rate_per_s=100.0, arrivals="poisson", prompt_tokens=Lengths(mean=1000.0), output_tokens=Lengths(mean=200.0))


def plan(**changes: object) -> Plan:
    """Eight replicas on one instance of eight H100 at $55.04 an hour, 100 requests a second of 1,000 tokens in and 200 out."""
    made = sample()
    item = dataclasses.replace(made.fleet[0], gpu="H100-SXM")
    offer = next(o for o in pricing.offers("H100-SXM", "on-demand") if o.instance == "p5.48xlarge")
    made = dataclasses.replace(made, profile=PROFILE, workload=TRAFFIC, fleet=(item,), gpu="H100-SXM", prices=(offer,), utilisation=0.5)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


# ---------------------------------------------------------------- bill


def test_the_bill_of_a_plan_adds_up() -> None:
    """$55.04 an hour: $40,179.20 a month, $482,150.40 a year, 55.04 / 360,000 a request; 432 M tokens an hour: $0.127 a million."""
    found = costs.bill(plan())
    assert found is not None
    assert (found.usd_per_h, round(found.usd_per_month, 2), round(found.usd_per_year, 2)) == (55.04, 40_179.20, 482_150.40)
    assert found.usd_per_request == pytest.approx(55.04 / 360_000)
    assert found.usd_per_million_tokens == pytest.approx(55.04 / 432)
    assert found.usd_per_million_input_tokens is not None
    assert found.usd_per_million_output_tokens is not None
    spent = 360 * found.usd_per_million_input_tokens + 72 * found.usd_per_million_output_tokens
    assert spent == pytest.approx(55.04)
    assert found.lines[0].source.startswith("skypilot-org")


def test_an_output_token_takes_the_longer_machine_time() -> None:
    """Some forty sequences share a decode step that reads 16 GB of weights; a thousand prompt tokens share one step of 16 TFLOP."""
    input_s, output_s = costs.token_s(plan())
    step_s = latency.step_s(PROFILE, (46.0, 46 * 1100.0, 0.0, 0.0, 46.0)) / 46.0  # 12.5/s x 200 x 18.4 ms
    assert output_s == pytest.approx(step_s)
    assert input_s == pytest.approx(latency.step_s(PROFILE, (0.0, 0.0, 1000.0, 500_000.0, 1.0)) / 1000)
    assert output_s > input_s


def test_a_day_below_its_peak_makes_requests_dearer() -> None:
    peak, day = costs.bill(plan()), costs.bill(plan(), requests_per_s=40.0)
    assert peak is not None
    assert day is not None
    assert day.usd_per_request == pytest.approx(2.5 * peak.usd_per_request)


def test_the_bill_of_a_day_is_shared_by_its_mean() -> None:
    """A peak of 100/s over a day of 25/s on average: each request costs four times as much, and nobody has to say the rate again."""
    peak, day = costs.bill(plan()), costs.bill(plan(day_mean_per_s=25.0))
    assert peak is not None
    assert day is not None
    assert day.usd_per_request == pytest.approx(4 * peak.usd_per_request) == pytest.approx(55.04 / 90_000)
    assert compare.usd_per_request(plan(day_mean_per_s=25.0)) == pytest.approx(55.04 / 90_000)


def test_tokens_of_a_day_are_counted_at_its_mean() -> None:
    """A fleet for 100/s at the busiest of a day of 25/s on average: 25 x 200 tokens a second share its price, and its interval."""
    asked = dataclasses.replace(REQUEST, gpus=("H100",), max_batch=64, max_step_tokens=2048)
    made = planner.plan(dataclasses.replace(asked, day=dataclasses.replace(TRAFFIC, rate_per_s=25.0)))
    assert made.usd_per_hour is not None
    assert (made.workload.rate_per_s, made.day_mean_per_s, made.mean_per_s) == (100.0, 25.0, 25.0)
    assert made.usd_per_million_tokens == pytest.approx(made.usd_per_hour / (25 * 200 * 3600) * 1e6)
    hourly, million = made.intervals["usd_per_hour"], made.intervals["usd_per_million_tokens"]
    assert million == pytest.approx(tuple(usd / (25 * 200 * 3600) * 1e6 for usd in hourly))
    stages = dataclasses.replace(asked, day=dataclasses.replace(TRAFFIC, arrivals="stages:10m@50,10m@0"))
    assert stages.day_mean_per_s == pytest.approx(TRAFFIC.rate_per_s * 25)  # levels times the rate: its mean is theirs
    steady = planner.plan(asked)
    assert (steady.day_mean_per_s, steady.mean_per_s) == (None, 100.0)
    assert steady.usd_per_million_tokens == pytest.approx(made.usd_per_million_tokens / 4)


def test_a_fleet_that_is_used_less_draws_less() -> None:
    """Eight H100 used to 50 % at 100/s and 20 % at 40/s: 8 x (119 + 581 x 0.2) = 1,881.6 W, over 40 requests a second."""
    for drawn in (
        costs.draw(plan(), Site(pue=1.0), requests_per_s=40.0),
        costs.draw(plan(day_mean_per_s=40.0), Site(pue=1.0)),
    ):
        assert drawn is not None
        assert drawn.watts == pytest.approx(1881.6)
        assert drawn.wh_per_request == pytest.approx(1881.6 / 3600 / 40)


def test_what_is_beside_devices_goes_on_the_bill() -> None:
    """61.44 GB twice at $0.10 a GB and month: $12.288 / 730 an hour more."""
    rates = Rates(storage_usd_per_byte_month=1e-10, source="contract", date="2026-10-01")
    extra = [pricing.storage(rates, 61.44e9, 2), pricing.network(rates, 100.0, 1e4)]
    found = costs.bill(plan(), extra, ["network egress"])
    assert found is not None
    assert found.usd_per_h == pytest.approx(55.04 + 12.288 / 730)
    assert (len(found.lines), found.unpriced) == (2, ("network egress",))


def test_an_order_of_several_sizes_is_one_line_and_one_draw() -> None:
    """Nine on an eight and a one: nothing idle, 9 x 700 x 0.585 = 3,685.5 W, and the line says the order as it is."""
    order = "1 x lambda gpu_8x + 1 x lambda gpu_1x"
    item = dataclasses.replace(plan().fleet[0], replicas=9, instances=2, instance=order, devices=9)
    found, drawn = costs.bill(plan(fleet=(item,), replicas=9)), costs.draw(plan(fleet=(item,), replicas=9), Site(pue=1.0))
    assert found is not None
    assert drawn is not None
    assert found.lines[0].what == f"{order} (generate)"
    assert drawn.watts == pytest.approx(3685.5)


def test_an_unpriced_fleet_has_no_bill() -> None:
    item = dataclasses.replace(plan().fleet[0], usd_per_hour=None)
    assert costs.bill(plan(fleet=(item,))) is None
    service = costs.bill(plan(profile=dataclasses.replace(PROFILE, form="service")))
    assert service is not None
    assert (service.usd_per_million_tokens, service.usd_per_request) == (None, pytest.approx(55.04 / 360_000))
    with pytest.raises(BadInput, match="have no steps"):
        costs.token_s(plan(profile=dataclasses.replace(PROFILE, form="service")))


# ---------------------------------------------------------------- energy


def test_stranded_devices_idle() -> None:
    """Six replicas on eight H100 at half load: 6 x 700 x 0.585 + 2 x 119 = 2,695 W; a PUE of 1.2 makes it 3,234 W."""
    item = dataclasses.replace(plan().fleet[0], replicas=6)
    found = costs.draw(plan(fleet=(item,), replicas=6, gpus=6), Site(pue=1.2))
    assert found is not None
    assert found.watts == pytest.approx(3234.0)
    both = costs.draw(plan(fleet=(item, item)), Site(pue=1.2, co2_g_per_kwh=100.0))
    assert both is not None
    assert both.watts == pytest.approx(6468.0)
    assert both.co2_kg_per_month == pytest.approx(6468.0 * 0.73 / 10)
    vcpu = dataclasses.replace(item, gpu="vcpu")
    mixed = costs.draw(plan(fleet=(item, vcpu)), Site(pue=1.2))
    assert mixed is not None
    assert mixed.watts == pytest.approx(3234.0)
    assert "vcpu counts for nothing: nobody publishes its watts" in mixed.assumed
    assert costs.draw(plan(fleet=(vcpu,))) is None


# ---------------------------------------------------------------- against an API


def test_the_break_even_against_gpt_4o_mini_by_hand() -> None:
    """1,000 in and 200 out at gpt-4o-mini: 150 + 120 = 270 millionths of a dollar.  A replica carries 100 x 1.21 / 8 = 15.125/s.

    One H100 at $2.95 is $70.80 a day: 262,222 requests; it carries 1.3 million.  Two at least: $141.60, 524,444.
    """
    one, two = (costs.versus_api(plan(), "gpt-4o-mini", least=n) for n in (1, 2))
    assert one is not None
    assert two is not None
    assert (one.from_per_day, two.from_per_day) == pytest.approx((70.8 / 270e-6, 141.6 / 270e-6))
    assert (one.api_usd_per_request, two.idle_usd_per_day) == pytest.approx((270e-6, 141.6))


def test_cache_and_batches_move_it_up() -> None:
    """All input cached: 75 + 120 = 195 millionths; all by batch: 75 + 60 = 135."""
    cached = costs.versus_api(plan(), "gpt-4o-mini", cached_share=1.0)
    batched = costs.versus_api(plan(), "gpt-4o-mini", batch_share=1.0)
    assert cached is not None
    assert batched is not None
    assert (cached.from_per_day, batched.from_per_day) == pytest.approx((70.8 / 195e-6, 70.8 / 135e-6))
    assert costs.versus_api(plan(prices=()), "gpt-4o-mini") is None


def test_beyond_a_quota_there_is_no_fleet_to_compare_with() -> None:
    """Two instances may be rented: three replicas on a third are none, and nothing is said of rates for good."""
    offer = dataclasses.replace(plan().prices[0], devices=1, usd_per_h=2.95)
    market = pricing.Market(offers=(offer,), quotas=(pricing.Quota(devices=2, device="H100-SXM"),))
    found = costs.versus_api(plan(), "gpt-4o-mini", market=market)
    assert found is not None
    assert (found.from_per_day, found.for_good_per_day) == (pytest.approx(70.8 / 270e-6), None)


# ---------------------------------------------------------------- a baseline


def test_a_plan_beside_a_baseline() -> None:
    """The baseline: sixteen replicas at $110.08 for the same traffic; a month of the difference is 55.04 x 730 = $40,179.20."""
    old = plan(usd_per_hour=110.08, usd_per_month=80_358.4, replicas=16, gpus=16)
    rows = {row.what: row for row in compare.compare(old, plan())}
    assert rows["usd_per_hour"].change == -0.5
    assert rows["replicas"].change == -0.5
    assert rows["usd_per_request"].change == pytest.approx(-0.5)
    assert compare.saving_usd_per_month(old, plan()) == pytest.approx(40_179.20)
    assert compare.incomparable(old, plan()) == ()


def test_plans_of_other_traffic_are_compared_per_request() -> None:
    """Half the traffic at half the price saves nothing; a reader is told what differs."""
    half = plan(usd_per_hour=27.52, workload=dataclasses.replace(TRAFFIC, rate_per_s=50.0), slo="e2e_p95<9s", model="llama-3-70b")
    assert compare.saving_usd_per_month(half, plan()) == pytest.approx(0.0)
    said = compare.incomparable(half, plan())
    assert [line.split(":")[0] for line in said] == ["the models differ", "the limits differ", "the traffic differs"]
    assert compare.saving_usd_per_month(plan(usd_per_hour=None), plan()) is None
    assert {r.what: r.change for r in compare.compare(plan(usd_per_hour=None), plan())}["usd_per_hour"] is None


# ---------------------------------------------------------------- changes


REQUEST = Request(model="llama-3-8b", workload=TRAFFIC, slo=slo.parse("ttft_p95<500ms,tpot_p99<50ms"), precisions=("bf16",))


def by_rate(per_replica: float) -> Callable[[Request], Plan]:
    """Return a planner of one replica, at $10, for so many requests a second; half as many of INT8; none below 40 ms of TPOT."""

    def replan(request: Request) -> Plan:
        if request.slo[1].limit < 0.04:
            raise Infeasible("no design meets tpot_p99 < 40 ms")
        each = per_replica * (2 if request.precisions == ("int8",) else 1) * (4 if request.model == "llama-3.2-1b" else 1)
        replicas = -int(-round(request.workload.rate_per_s, 6) // each)
        return plan(replicas=replicas, usd_per_hour=10.0 * replicas, binding_constraint="ttft_p95 < 500 ms")

    return replan


def test_what_each_change_saves_or_costs() -> None:
    """Ten a second each: ten replicas; 110/s take eleven, 70/s seven, INT8 five; a cascade 100 / 40 = 3 small and 30 / 10 = 3 large."""
    replan = by_rate(10.0)
    base = dataclasses.replace(replan(REQUEST), intervals={"usd_per_hour": (90.0, 110.0)})
    rows = {row.what: row for row in sensitivity.sensitivity(REQUEST, base, replan, "llama-3.2-1b")}
    assert {what: row.replicas for what, row in rows.items()} == {
        "ttft_p95 1 ms later": 10,
        "ttft_p95 10 % later": 10,
        "tpot_p99 1 ms later": 10,
        "tpot_p99 10 % later": 10,
        "INT8 weights": 5,
        "10 % more traffic": 11,
        "a cache that answers 30 %": 7,
        "30 % of each prompt cached": 10,
        "llama-3.2-1b first, 30 % passed on": 6,
    }
    assert rows["10 % more traffic"].change_usd_per_month == pytest.approx(7300.0)
    assert (rows["10 % more traffic"].clear, rows["a cache that answers 30 %"].clear) == (False, True)
    assert rows["a cache that answers 30 %"].change == pytest.approx(-0.3)
    assert rows["INT8 weights"].change_usd_per_month == pytest.approx(-36_500.0)


def test_a_change_moves_one_limit_alone() -> None:
    changed = [v.requests[0].slo for v in sensitivity.variants(REQUEST) if "later" in v.what]
    assert [s[0].limit for s in changed] == pytest.approx([0.501, 0.55, 0.5, 0.5])
    assert [s[1].limit for s in changed] == pytest.approx([0.05, 0.05, 0.051, 0.055])


def test_what_cannot_be_done_says_why() -> None:
    tight = dataclasses.replace(REQUEST, slo=slo.parse("ttft_p95<500ms,tpot_p99<30ms"))
    rows = sensitivity.sensitivity(tight, plan(), by_rate(10.0))
    assert all(row.usd_per_hour is None and row.why_not == "no design meets tpot_p99 < 40 ms" for row in rows)


def test_a_price_that_is_not_known_makes_no_difference_up() -> None:
    unpriced = sensitivity.sensitivity(REQUEST, plan(), lambda _: plan(usd_per_hour=None))
    assert {(row.change_usd_per_month, row.change, row.clear) for row in unpriced} == {(None, None, None)}
    int8 = dataclasses.replace(REQUEST, precisions=("int8",))
    assert "INT8 weights" not in [v.what for v in sensitivity.variants(int8)]
