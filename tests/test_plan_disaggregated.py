"""Prefill and decode on pools of their own: known queues, theory beside simulation, two simulators alike, pairs, prices, exports."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import hardware, latency, models, plan, record, report, simulate, slo, workload
from mlsys_bench.batching import Limits
from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.journeys import costing, deploying, graph_plans, surroundings, verify
from mlsys_bench.plan import candidates, command, confirm, costs, disaggregated, export, search
from mlsys_bench.plan.demand import Demand, of_trace
from mlsys_bench.plan.demand import of as demand_of
from mlsys_bench.plan.disaggregated import answer, deployed, link, pairs, played, spread
from mlsys_bench.plan.disaggregated import confirm as confirming
from mlsys_bench.plan.disaggregated.stations import Decode, Prefill, decoding, together
from mlsys_bench.pricing import Market, Quota, Shelf, offers, pack
from mlsys_bench.pricing.market import Reservation
from mlsys_bench.provenance import Provenance
from mlsys_bench.queueing.des import recursion
from mlsys_bench.queueing.mdc import mdc
from mlsys_bench.types import Plan

LONG = workload.synthetic(12, prompt="lognormal:3000:0.5:6000", output="lognormal:120:0.7:500")
SINGLE = latency.roofline(models.find("llama-3-8b"), hardware.find("h100-sxm"), precision="bf16")
SINGLE_OFFER = next(o for o in offers("H100-SXM", "on-demand") if o.devices == 1)
H100_USD = min(o.usd_per_h for o in offers("H100-SXM", "on-demand") if o.devices == 1)


def request(limits: str = "ttft_p95<2s,itl_p99<15ms", **changes: Any) -> plan.Request:
    """Return long prompts on single H100s, engine settings given, so that a plan takes a second or two."""
    base = plan.Request(
        model="llama-3-8b", workload=LONG, slo=slo.parse(limits), profiles=(SINGLE,), max_batch=32, max_step_tokens=4096,
        disaggregate="auto",
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def one() -> plan.Candidate:
    """One H100 per replica."""
    return candidates.every(request())[0][0]


@pytest.fixture(scope="module")
def apart() -> Plan:
    """Return a plan that two pools win."""
    return plan.plan(request())


# ---------------------------------------------------------------- known queues


@pytest.mark.parametrize(("steps", "load"), [(1, 0.3), (1, 0.6), (1, 0.8), (2, 0.6), (2, 0.8)])
def test_prompts_that_fill_whole_steps_are_the_queue_m_d_1(one: plan.Candidate, steps: int, load: float) -> None:
    """Prompts of one budget each, or two, wait as the textbook says, as closely as 1,024 samples tell a percentile, and 3 %."""
    budget = 2048
    demand = Demand(prompt=np.full(1024, float(steps * budget)), output=np.full(1024, 2.0))
    pool = Prefill(one.profile, one.limits._replace(max_step_tokens=budget), demand)
    seen = pool.predict(load * pool.capacity_per_s)
    service_s = steps * pool.full_s
    overhead_s = latency.overhead(one.profile).seconds(steps * budget)
    queue = mdc(load / service_s, service_s, 1)
    for p in (0.5, 0.95, 0.99):
        found = seen.value("ttft", f"p{100 * p:g}")
        assert found is not None
        two_sd = 2 * (p * (1 - p) / 1024) ** 0.5
        low_s, high_s = (queue.sojourn.quantile_s(q) for q in (p - two_sd, p + two_sd))
        assert 0.97 * low_s <= found - overhead_s <= 1.03 * high_s


@settings(max_examples=8, deadline=None)
@given(servers=st.integers(1, 4), load=st.floats(0.2, 0.95), seed=st.integers(0, 99))
def test_a_pool_taken_in_turns_with_constant_prompts_is_the_queue_m_d_c_itself(servers: int, load: float, seed: int) -> None:
    """Customers of a shared queue with constant service start in turns, so every wait is that of Kiefer and Wolfowitz's recursion."""
    step_s = 0.05
    limits = Limits(max_seqs=8, max_step_tokens=100, block_tokens=10, blocks=1000, max_context=1000)
    rng = np.random.default_rng(seed)
    arrive_s = np.cumsum(rng.exponential(step_s / (load * servers), 150))
    schedule = workload.Schedule(scheduled_s=arrive_s, prompt_tokens=np.full(150, 100), output_tokens=np.ones(150, dtype=np.int64))
    tracks = simulate.core.play(schedule, limits, clock=lambda _: step_s, replicas=servers, routing="round_robin")
    wait_s = recursion.waits(arrive_s[None], np.full((1, 150), step_s), servers)[0]
    assert tracks.last_s - arrive_s - step_s == pytest.approx(wait_s, abs=1e-9)


def test_a_decode_replica_that_nobody_shares_reads_weights_and_one_cache_per_token(one: plan.Candidate) -> None:
    demand = Demand(prompt=np.full(1024, 1000.0), output=np.full(1024, 101.0))
    pool = Decode(one.profile, one.limits, demand)
    alone_s = float(latency.step_s(one.profile, (1.0, 1050.0, 0.0, 0.0, 1.0)))
    assert pool.predict(1e-3 * pool.capacity_per_s).value("tpot", "mean") == pytest.approx(alone_s, rel=0.01)


def test_the_capacity_of_a_decode_pool_is_its_seats_over_a_full_life(one: plan.Candidate) -> None:
    """No prompt is computed there: 32 seats, 100 steps each, all of 32 decodes."""
    demand = Demand(prompt=np.full(1024, 1000.0), output=np.full(1024, 101.0))
    full_s = float(latency.step_s(one.profile, (32.0, 32 * 1050.0, 0.0, 0.0, 32.0)))
    assert Decode(one.profile, one.limits, demand).capacity_per_s == pytest.approx(32 / (100 * full_s), rel=0.01)


def test_answers_of_one_token_do_not_reach_the_decode_pool(one: plan.Candidate) -> None:
    demand = Demand(prompt=np.full(1000, 500.0), output=np.tile([1.0, 51.0], 500))
    pool = Decode(one.profile, one.limits, demand)
    assert decoding(demand).share == pytest.approx(0.5)
    assert pool.capacity_per_s == pytest.approx(2 * Decode(one.profile, one.limits, demand.where(demand.output > 1)).capacity_per_s)
    seen = pool.predict(0.3 * pool.capacity_per_s)
    assert np.isnan(seen.tpot_s).mean() == pytest.approx(0.5)
    assert (seen.e2e_s[np.isnan(seen.tpot_s)] == 0).all()


# ---------------------------------------------------------------- the link


def test_a_cache_takes_its_bytes_over_the_link_and_the_narrower_pool_sets_the_pace() -> None:
    """llama-3-8b: 32 layers x 8 heads x 128 x 2 x 2 B = 131,072 B a token; tp 4 has a quarter of it on each device."""
    wide = link.Link(
        bytes_per_s=10e9, latency_s=0.001, source="here", provenance=Provenance.ASSUMED, model="llama-3-8b", precision="bf16",
        shards=((4, 1), (4, 1)),
    )  # fmt: skip
    prompts = np.array([1000.0, 3000.0])
    assert wide.seconds(prompts) == pytest.approx(0.001 + prompts * 131_072 / 4 / 10e9)
    mixed = dataclasses.replace(wide, shards=((1, 1), (4, 1)))
    assert mixed.seconds(prompts) == pytest.approx(0.001 + prompts * 131_072 / 10e9)


def test_caches_of_models_with_windows_grow_no_further_than_these() -> None:
    arch = next(a for a in models.every() if a.window_tokens and a.window_layers)
    over = link.Link(
        bytes_per_s=1.0, latency_s=0.0, source="", provenance=Provenance.ASSUMED, model=arch.id, precision="bf16", shards=((1, 1),)
    )
    lengths = [10.0, float(arch.window_tokens or 0), 3.0 * (arch.window_tokens or 0), 9000.0]
    assert over.bytes_of(np.array(lengths)).tolist() == pytest.approx([models.kv_bytes(arch, "bf16", n) for n in lengths])


def test_the_link_is_the_catalogues_within_a_rack_and_assumed_between_instances(one: plan.Candidate) -> None:
    rack = next(d for d in hardware.every() if d.link_devices > 8)
    racked = dataclasses.replace(one, device=rack)
    within = link.between(racked, racked)
    assert (within.bytes_per_s, within.provenance) == (rack.interconnect_bytes_per_s, Provenance.ROOFLINE)
    boards = link.between(one, one)
    assert (boards.bytes_per_s, boards.provenance) == (link.NETWORK_BYTES_PER_S, Provenance.ASSUMED)
    plain = dataclasses.replace(one, device=hardware.find("L4"))
    assert link.between(plain, plain).bytes_per_s == link.PLAIN_BYTES_PER_S
    assert link.between(one, one, 5e9).bytes_per_s == 5e9


# ---------------------------------------------------------------- two simulators, and theory


def _conditions(first: plan.Candidate, over: link.Link, replicas: int) -> simulate.Conditions:
    each = float(over.bytes_of(np.array([1000.0]))[0]) / 1000
    return simulate.Conditions(
        disaggregation=simulate.Disaggregation(
            prefill_replicas=replicas, kv_bytes_per_token=each, link_bytes_per_s=over.bytes_per_s, latency_s=over.latency_s,
            profile=first.profile, limits=first.limits,
        )
    )  # fmt: skip


@pytest.mark.parametrize("routing", ["random", "round_robin", "least_loaded"])
def test_pools_played_one_after_the_other_are_those_played_event_by_event(routing: str) -> None:
    """Three prefill replicas of one GPU and two decode replicas of two: every token at the same time."""
    first, second = candidates.every(request(profiles=(), gpus=("h100-sxm",), precisions=("bf16",)))[0][:2]
    over = link.between(first, second)
    traffic = dataclasses.replace(LONG, rate_per_s=25.0, output_tokens=workload.parse_lengths("lognormal:40:1:200"))
    schedule = workload.schedule(traffic, n=250, seed=4)
    schedule.output_tokens[::7] = 1
    seen = simulate.run(
        schedule, second.profile, second.limits, replicas=2, routing=routing, seed=7, conditions=_conditions(first, over, 3)
    )
    prefilled = played.prefilled(first, schedule, over, 3, routing, 7)
    tracks = played.decoded(second, prefilled, np.ones(250, dtype=bool), 2, "least_loaded", 7)
    outside = latency.overhead(second.profile)
    assert tracks.token_s is not None
    assert tracks.token_at is not None
    for r in sorted(seen.requests, key=lambda r: r.index):
        at = tracks.token_at[r.index]
        made_s = np.array(r.token_s) - outside.seconds(r.prompt_tokens or 0)
        assert made_s == pytest.approx(tracks.token_s[at : at + tracks.tokens[r.index]], abs=1e-9)


@pytest.mark.parametrize(
    ("prompt", "output", "load", "pools"),
    [
        ("lognormal:2000:0.8:7000", "lognormal:60:0.7:300", 0.6, (2, 1)),
        ("lognormal:300:1:3000", "80", 0.7, (1, 1)),
        ("3000", "50", 0.5, (3, 1)),
    ],
)
def test_theory_agrees_with_the_simulator_of_the_house(
    one: plan.Candidate, prompt: str, output: str, load: float, pools: tuple[int, int]
) -> None:
    """Percentiles within 15 % and the mean within 8 %, as one run of 1,000 requests can tell."""
    traffic = workload.synthetic(1.0, prompt=prompt, output=output)
    demand, over = demand_of(traffic).fitting(one.limits), link.between(one, one)
    first = Prefill(one.profile, one.limits, demand, over.seconds(demand.prompt))
    second = Decode(one.profile, one.limits, demand)
    both = pairs.Pools(first, second, pools)
    rate = load * both.capacity_per_s
    schedule = workload.schedule(dataclasses.replace(traffic, rate_per_s=rate), n=1000, seed=2)
    seen = simulate.run(
        schedule, one.profile, one.limits, replicas=pools[1], routing="random", seed=1, conditions=_conditions(one, over, pools[0])
    )
    ok = [r for r in seen.requests if r.in_window]
    ttft = np.array([r.token_s[0] - r.scheduled_s for r in ok])
    tpot = np.array([(r.token_s[-1] - r.token_s[0]) / (len(r.token_s) - 1) for r in ok if len(r.token_s) > 1])
    told = both.predict(rate)
    for samples, metric in ((ttft, "ttft"), (tpot, "tpot")):
        assert told.value(metric, "mean") == pytest.approx(samples.mean(), rel=0.08)
        assert told.value(metric, "p95") == pytest.approx(np.quantile(samples, 0.95), rel=0.15)


@settings(max_examples=8, deadline=None)
@given(low=st.floats(0.05, 0.9), high=st.floats(0.05, 0.9))
def test_more_traffic_never_shortens_what_users_see(low: float, high: float) -> None:
    candidate = candidates.every(request())[0][0]
    demand = demand_of(LONG)
    first = Prefill(candidate.profile, candidate.limits, demand, samples=256)
    second = Decode(candidate.profile, candidate.limits, demand, samples=256)
    for pool, metric in ((first, "ttft"), (second, "tpot")):
        less, more = (pool.predict(load * pool.capacity_per_s).value(metric, "mean") for load in sorted((low, high)))
        assert less is not None
        assert more is not None
        assert less <= more * 1.01


def test_end_to_end_is_the_first_token_and_the_rest(one: plan.Candidate) -> None:
    demand = demand_of(LONG)
    first, second = Prefill(one.profile, one.limits, demand).predict(2.0), Decode(one.profile, one.limits, demand).predict(2.0)
    seen = together(first, second)
    several = ~np.isnan(seen.tpot_s)
    assert seen.e2e_s[several] - seen.ttft_s[several] == pytest.approx((seen.tpot_s * (demand.output - 1))[several])


# ---------------------------------------------------------------- the search over pairs


def test_the_least_a_pair_can_cost_is_a_bound() -> None:
    """No pair sized by theory has fewer replicas of either pool, or costs less, than the bound said."""
    asked = request("ttft_p95<3s,itl_p99<30ms", profiles=(), gpus=("h100-sxm",), precisions=("bf16",), max_step_tokens=None)
    traffic = demand_of(asked.workload)
    bounds, _ = search.bounds(asked, candidates.every(asked)[0], traffic)
    every = pairs.promising(asked, bounds, None)
    assert [x.key for x in every] == sorted(x.key for x in every)
    for least in every[:3]:
        pair = pairs.sized(asked, least, traffic)
        assert pair is not None
        assert pair.sort_key() >= least.key
        assert pair.prefill.replicas >= pair.prefill.fewest
    assert pairs.promising(asked, bounds, (False, 0.0, 0, 0.0)) == []


def test_limits_on_both_pools_are_kept_by_the_cheapest_pair_of_all() -> None:
    """By theory the pair found is no dearer than any of the pairs around it that keep the limit on E2E."""
    asked = request("ttft_p95<3s,e2e_p95<3s", max_batch=None)
    traffic = demand_of(asked.workload)
    bounds, _ = search.bounds(asked, candidates.every(asked)[0], traffic)
    pair = pairs.sized(asked, pairs.promising(asked, bounds, None)[0], traffic)
    assert pair is not None

    def keeps(n: int, m: int) -> bool:
        both = pairs.Pools(pairs.station(pair.prefill), pairs.station(pair.decode), (n, m))
        return all(excess < 1 for excess, _ in both.predict(pair.rate_per_s).excesses(asked.slo))

    assert keeps(pair.prefill.replicas, pair.decode.replicas)
    around = [(n, m) for n in range(pair.prefill.fewest, pair.replicas + 1) for m in range(pair.decode.fewest, pair.replicas + 1)]
    assert all(n + m >= pair.replicas for n, m in around if keeps(n, m))


def test_a_trace_is_played_on_both_pools_whole_and_no_cheaper_pair_keeps_its_limits() -> None:
    """E2E binds, which no pool keeps alone: every smaller pair of the grid is played, and misses a limit."""
    schedule = workload.schedule(LONG, n=100, seed=9)
    asked = request("ttft_p95<2s,e2e_p95<3s", trace=schedule, headroom=0.0, link_bytes_per_s=40e9)
    traffic = of_trace(schedule)
    bounds, _ = search.bounds(asked, candidates.every(asked)[0], traffic)
    found = disaggregated.look(asked, bounds, traffic, None).confirmed
    assert found is not None
    best, trial = found
    assert confirm.worst(trial, asked.slo) < 1
    for n, m in itertools.product(range(best.prefill.fewest, best.replicas), range(best.decode.fewest, best.replicas)):
        if n + m < best.replicas:
            assert confirm.worst(confirming.played(best.resized(n, m, asked.shelf), asked), asked.slo) >= 1
    made = answer.plan(asked, best, trial, (), ())
    assert made.apart is not None
    assert made.apart.link_bytes_per_s == 40e9
    assert made.analytic == {}  # theory knows a trace's mean only
    assert made.headroom >= 0


# ---------------------------------------------------------------- plans


def test_two_pools_win_where_steps_with_prompts_break_a_tight_limit(apart: Plan) -> None:
    """Long prompts stretch every step of a whole replica: it keeps ITL p99 only as good as empty; pools decode undisturbed."""
    whole = apart.alternatives[0]
    assert [item.stage for item in apart.fleet] == ["prefill", "decode"]
    assert apart.usd_per_hour is not None
    assert whole.usd_per_hour is not None
    assert apart.usd_per_hour < whole.usd_per_hour / 2
    assert apart.predicted["itl_p99_s"] < 0.015
    assert apart.predicted["ttft_p95_s"] < 2
    assert whole.replicas is not None
    assert whole.usd_per_hour == pytest.approx(whole.replicas * H100_USD)
    assert whole.why_not == f"prefill and decode in one: ${whole.usd_per_hour - apart.usd_per_hour:.2f}/h more"


def test_the_totals_of_two_pools_are_their_sums(apart: Plan) -> None:
    """Cost by hand: one GPU an instance, so many of each at the cheapest published price."""
    assert apart.apart is not None
    assert apart.replicas == sum(item.replicas for item in apart.fleet)
    assert apart.gpus == sum(item.replicas * item.tp for item in apart.fleet)
    assert apart.usd_per_hour == pytest.approx(apart.replicas * H100_USD)
    assert apart.usd_per_hour == pytest.approx(sum(item.usd_per_hour or 0.0 for item in apart.fleet))
    assert apart.usd_per_month == pytest.approx(730 * apart.replicas * H100_USD)
    assert apart.utilisation == max(pool.utilisation for pool in apart.apart.pools)
    busy = apart.workload.rate_per_s / apart.apart.prefill.replicas / apart.apart.prefill.capacity_per_replica_per_s
    assert apart.apart.prefill.utilisation == pytest.approx(busy)
    for key in ("ttft_p95_s", "itl_p99_s", "tpot_p95_s", "e2e_p95_s"):
        low, high = apart.intervals[key]
        assert low <= apart.predicted[key] <= high
    assert apart.intervals["replicas"][0] <= apart.replicas <= apart.intervals["replicas"][1]
    assert apart.headroom > 0
    assert apart.provenance is Provenance.ASSUMED  # as the link is


def test_whole_replicas_win_where_limits_are_loose() -> None:
    loose = request("ttft_p95<2s,tpot_p95<60ms", max_batch=128, max_step_tokens=2048)
    made = plan.plan(loose)
    assert made.apart is None
    assert made.usd_per_hour is not None
    assert made.notes[-1].startswith("prefill and decode on pools of their own cost $")
    assert float(made.notes[-1].split("$")[1].split("/h")[0]) >= made.usd_per_hour


def test_two_pools_are_planned_where_whole_replicas_cannot_do_it_at_all() -> None:
    """Four GPUs are all that may be rented: too few for replicas that stay almost empty, enough for a pair."""
    offer = next(o for o in offers("H100-SXM", "on-demand") if o.devices == 1)
    four = Market(offers=(offer,), quotas=(Quota(devices=4, device="H100-SXM"),))
    made = plan.plan(request(market=four))
    assert made.apart is not None
    assert made.gpus <= 4
    assert made.notes[-1].startswith("no fleet of whole replicas will do: ")
    assert "quota" in made.notes[-1]


def test_pools_alone_are_refused_when_they_cannot_keep_a_limit() -> None:
    with pytest.raises(Infeasible, match="--disaggregate only"):
        plan.plan(request("ttft_p95<2s,e2e_p50<600ms", disaggregate="only"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"disaggregate": "perhaps"}, "way to disaggregate"),
        ({"link_bytes_per_s": 0.0}, "link"),
        ({"disaggregate": "only", "around": True}, "autoscaling"),
        ({"disaggregate": "only", "mixed": True}, "several kinds"),
        ({"disaggregate": "only", "slo": slo.parse("ttft_p95<1s,availability>99.9%")}, "availability"),
    ],
)
def test_what_cannot_be_planned_together_is_refused_in_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        plan.check(request(**changes))


def test_beside_autoscaling_whole_replicas_are_planned_and_it_is_said() -> None:
    made = plan.plan(request("ttft_p95<2s,tpot_p95<60ms", max_batch=128, around=True))
    assert made.apart is None
    assert made.notes[-1] == "prefill and decode on pools of their own are not weighed together with autoscaling"


def test_options_are_read() -> None:
    assert surroundings.pools_apart("auto") == {"disaggregate": "auto", "link_bytes_per_s": None}
    assert surroundings.pools_apart("only,link=50GB/s") == {"disaggregate": "only", "link_bytes_per_s": 50e9}
    with pytest.raises(BadInput, match="unknown setting"):
        surroundings.pools_apart("only,speed=3")
    with pytest.raises(BadInput, match="several stages"):
        graph_plans.asked({"scenario": "rag-support-bot", "disaggregate": "only"})


# ---------------------------------------------------------------- prices


def test_two_pools_share_quotas_and_commitments() -> None:
    """Of 10 GPUs in quota and 4 committed instances a pool of 3 leaves 7 and 1."""
    offer = next(o for o in offers("H100-SXM", "on-demand") if o.devices == 1)
    market = Market(
        offers=(offer,),
        reservations={offer: Reservation(term_months=12, committed=4, at_most=8)},
        quotas=(Quota(devices=10, device="H100-SXM"),),
    )
    used = pack("H100-SXM", 1, 3, "on-demand", market)
    assert used is not None
    left = pairs.left_over(market, used)
    assert left.quotas[0].devices == 7
    assert (left.reservations[offer].committed, left.reservations[offer].at_most) == (1, 5)


def test_a_quota_on_both_pools_together_is_kept(apart: Plan) -> None:
    """As many GPUs as the pair needs are enough; one fewer and it has no price."""
    offer = next(o for o in offers("H100-SXM", "on-demand") if o.devices == 1)
    asked = request()
    traffic = demand_of(asked.workload)
    bounds, _ = search.bounds(asked, candidates.every(asked)[0], traffic)
    pair = pairs.sized(asked, pairs.promising(asked, bounds, None)[0], traffic)
    assert pair is not None
    for devices, priced in ((pair.devices, True), (pair.devices - 1, False)):
        market = Market(offers=(offer,), quotas=(Quota(devices=devices, device="H100-SXM"),))
        bought = pair.resized(pair.prefill.replicas, pair.decode.replicas, Shelf(market=market))
        assert (bought.usd_per_h is not None) is priced


def test_both_pools_are_rented_in_one_region() -> None:
    """At $2.00 in one region, as far as its quota goes, and at $2.95 in another: a quota for one pool alone brings nothing."""
    cheap, dear = (
        dataclasses.replace(SINGLE_OFFER, provider="p", instance="x1", region=region, usd_per_h=usd)
        for region, usd in (("r2", 2.0), ("r1", 2.95))
    )
    asked = request()
    traffic = demand_of(asked.workload)
    bounds, _ = search.bounds(asked, candidates.every(asked)[0], traffic)
    pair = pairs.sized(asked, pairs.promising(asked, bounds, None)[0], traffic)
    assert pair is not None
    for devices, usd in ((pair.decode.devices, 2.95), (pair.devices, 2.0)):
        market = Market(offers=(dear, cheap), quotas=(Quota(devices=devices, device="H100-SXM", region="r2"),))
        bought = pair.resized(pair.prefill.replicas, pair.decode.replicas, Shelf(market=market))
        assert bought.usd_per_h == pytest.approx(usd * pair.devices)
    both = tuple(Quota(devices=pair.devices - 1, device="H100-SXM", region=region) for region in ("r1", "r2"))
    apart = pair.resized(pair.prefill.replicas, pair.decode.replicas, Shelf(market=Market(offers=(dear, cheap), quotas=both)))
    assert apart.usd_per_h is None


def test_the_upper_end_of_two_pools_costs_what_may_be_rented() -> None:
    """Of two replicas more in each pool a quota leaves one in each: two at $2."""
    asked = request()
    traffic = demand_of(asked.workload)
    bounds, _ = search.bounds(asked, candidates.every(asked)[0], traffic)
    found = pairs.sized(asked, pairs.promising(asked, bounds, None)[0], traffic)
    assert found is not None
    market = Market(
        offers=(dataclasses.replace(SINGLE_OFFER, usd_per_h=2.0),), quotas=(Quota(devices=found.devices + 2, device="H100-SXM"),)
    )
    pair = found.resized(found.prefill.replicas, found.decode.replicas, Shelf(market=market))
    pools = [(float(n), n + 2.0) for n in (pair.prefill.replicas, pair.decode.replicas)]
    assert spread._costs(pair, pools, Shelf(market=market)) == {"usd_per_hour": (2.0 * pair.devices, 2.0 * pair.devices + 4.0)}
    ends = {"prefill_replicas": pools[0], "decode_replicas": pools[1]}
    (told,) = answer._beyond(dataclasses.replace(asked, market=market), pair, ends)
    assert told.endswith(f"the upper end of the cost is that of {pair.prefill.replicas + 1} + {pair.decode.replicas + 1}")


def test_sizes_that_are_cheapest_far_from_each_other_are_rented_where_both_are_sold() -> None:
    """Ones at $2 here, eights at $16 there: a single device and two replicas of four go where both sizes cost $3 a device."""
    here, there, both_one, both_eight = (
        dataclasses.replace(SINGLE_OFFER, provider="p", instance=f"x{n}", region=region, devices=n, usd_per_h=n * usd)
        for n, region, usd in ((1, "r1", 2.0), (8, "r2", 2.0), (1, "r3", 3.0), (8, "r3", 3.0))
    )
    asked = request()
    traffic = demand_of(asked.workload)
    bounds, _ = search.bounds(asked, candidates.every(asked)[0], traffic)
    found = pairs.sized(asked, pairs.promising(asked, bounds, None)[0], traffic)
    assert found is not None
    profile = found.decode.candidate.profile
    wide = dataclasses.replace(
        found.decode.candidate, profile=dataclasses.replace(profile, layout=dataclasses.replace(profile.layout, tp=4))
    )
    pair = dataclasses.replace(found, decode=dataclasses.replace(found.decode, candidate=wide))
    bought = pair.resized(1, 2, Shelf(market=Market(offers=(here, there, both_one, both_eight))))
    assert bought.prefill.price is not None
    assert bought.decode.price is not None
    assert (bought.prefill.price.offer, bought.decode.price.offer) == (both_one, both_eight)
    assert bought.usd_per_h == 3.0 + 24.0  # two eights there would be $32


def test_no_cheaper_and_none_that_keeps_the_limits_are_told_apart() -> None:
    """Loose limits: a pair costs no less than the fleet.  Over a link of 10 MB/s no prompt is there in time, whatever a pair costs."""
    loose = plan.plan(request("ttft_p95<10s,tpot_p99<100ms", workload=workload.synthetic(1, prompt="512", output="64")))
    usd = f"${2 * H100_USD:.2f}/h"
    assert any(note.endswith(f"of their own cost {usd} at least: no cheaper") for note in loose.notes)
    slow = plan.plan(request("ttft_p95<2s,itl_p99<40ms", link_bytes_per_s=1e7))
    told = [note for note in slow.notes if "pools of their own" in note]
    assert slow.apart is None
    assert told
    assert all(note.endswith("at least, but no pair that was looked at keeps the limits by theory") for note in told)


@pytest.mark.parametrize(
    ("missed", "beyond", "committed", "said"),
    [
        (0, 0, 0, "cost $3.00/h at least: no cheaper"),
        (0, 0, 1, "cost $3.00/h of new money at least: no cheaper"),
        (2, 0, 0, "cost $3.00/h at least, but no pair that was looked at keeps the limits by theory"),
        (0, 1, 0, "cost $3.00/h at least, but no pair that was looked at may be rented in one region"),
        (1, 1, 0, "but no pair that was looked at keeps the limits by theory and may be rented in one region"),
    ],
)
def test_why_there_is_no_pair_is_said(missed: int, beyond: int, committed: int, said: str) -> None:
    held = {SINGLE_OFFER: Reservation(term_months=12, committed=committed)}
    asked = request(market=Market(offers=(SINGLE_OFFER,), reservations=held))
    looked = disaggregated.Looked(least_usd_per_h=3.0, missed=missed, beyond=beyond)
    assert disaggregated._none_cheaper(looked, 3.0, asked).endswith(said)


# ---------------------------------------------------------------- what becomes of such a plan


def test_a_plan_of_two_pools_survives_its_record(apart: Plan, tmp_path: Path) -> None:
    record.write(tmp_path / "plan.json", apart, hardware.machine())
    assert record.read(tmp_path / "plan.json", Plan) == apart


def test_the_report_tells_the_pools_and_the_link(apart: Plan, tmp_path: Path) -> None:
    record.write(tmp_path / "plan.json", apart, hardware.machine())
    text = report.write_markdown(tmp_path / "plan.md", report.load([tmp_path / "plan.json"])).read_text()
    for said in ("for prefill", "for decode", "KV transfer", "Prefill pool", "assumed", "prefill and decode in one"):
        assert said in " ".join(text.split())


def test_either_pool_has_the_command_line_of_its_role(apart: Plan) -> None:
    first, second = deployed.deployments(apart)
    assert '--kv-transfer-config \'{"kv_connector":"NixlConnector","kv_role":"kv_producer"}\'' in command.command(first)
    assert '"kv_role":"kv_consumer"' in command.command(second)
    assert first.max_step_tokens == 4096
    assert command.parse(command.command(first)).other == first.other
    sglang = deployed.deployments(apart, "sglang")
    assert [command.command(d).split("--disaggregation-mode ")[1].split()[0] for d in sglang] == ["prefill", "decode"]
    with pytest.raises(BadInput, match="from a file"):
        deployed.deployments(apart, "trtllm")
    said = deploying.beside(apart, "vllm serve meta-llama/Meta-Llama-3-8B")
    assert any("kv_consumer" in line for line in said)
    assert any("router" in line for line in said)


def test_kubernetes_gets_two_deployments_and_other_exports_are_refused(apart: Plan, tmp_path: Path) -> None:
    releases = export.pools(apart)
    found = [document for release in releases for document in export.documents("k8s", release)]
    sets = [d for d in found if d["kind"] == "Deployment"]
    assert [d["metadata"]["name"] for d in sets] == ["llama-3-8b-prefill", "llama-3-8b-decode"]
    assert [d["spec"]["replicas"] for d in sets] == [item.replicas for item in apart.fleet]
    env = [e["name"] for e in sets[0]["spec"]["template"]["spec"]["containers"][0]["env"]]
    assert "VLLM_NIXL_SIDE_CHANNEL_HOST" in env
    assert deploying.exported(apart, f"k8s:{tmp_path}").endswith("llama-3-8b-k8s.yaml")
    for kind in ("keda", "kserve", "openslo", "prometheus-rules"):
        with pytest.raises(BadInput, match="two deployments"):
            deploying.exported(apart, f"{kind}:{tmp_path}")
    with pytest.raises(BadInput, match="a pool for prefill"):
        export.release(apart)


def test_what_knows_one_kind_of_replica_says_so(apart: Plan) -> None:
    with pytest.raises(BadInput, match="replicas differ"):
        verify.check_testable(apart)
    with pytest.raises(BadInput, match="--what-if"):
        costing.changes(apart, request().shelf.market, None)
    assert costs.versus_api(apart, "gpt-4o") is None
    assert deploying.compared(apart, apart).steps == ()
