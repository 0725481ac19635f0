"""Tenants: traffic of several kinds in one fleet, each with its own limits, and fleets of their own beside it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import hardware, latency, models, record, scenario, slo, summary, workload
from mlsys_bench.batching import Limits
from mlsys_bench.errors import BadInput, Infeasible, ScenarioError, UnknownName
from mlsys_bench.journeys import planning
from mlsys_bench.plan import Request, confirm, demand, plan, sizing, tenants
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.plan.trial import after_s
from mlsys_bench.report import content
from mlsys_bench.simulate import core
from mlsys_bench.types import Plan, RequestRecord, Tenant, Validity, Workload
from tests.sample_records import machine

CHAT = Tenant(
    name="chat",
    share=0.8,
    prompt_tokens=workload.parse_lengths("lognormal:400:0.8:4096"),
    output_tokens=workload.parse_lengths("lognormal:150:0.7:600"),
)
BATCH = Tenant(
    name="batch",
    share=0.2,
    prompt_tokens=workload.parse_lengths("lognormal:4000:0.4:12000"),
    output_tokens=workload.parse_lengths("lognormal:300:0.4:900"),
)


def traffic(rate_per_s: float = 12.0, *parts: Tenant) -> Workload:
    return workload.with_tenants(workload.synthetic(rate_per_s, prompt=1, output=1), parts or (CHAT, BATCH))


def request(text: str, **changes: object) -> Request:
    base = Request(
        model="llama-3.1-8b",
        workload=traffic(),
        slo=slo.parse(text),
        gpus=("h100-sxm",),
        precisions=("bf16",),
        max_batch=64,
        max_step_tokens=2048,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@functools.cache
def shared() -> Plan:
    return plan(request("chat:ttft_p95<500ms,chat:tpot_p99<80ms,batch:e2e_p95<60s"))


@functools.cache
def apart() -> Plan:
    """Plan for a few requests in a hurry beside many long ones."""
    live = dataclasses.replace(CHAT, name="live", share=0.05)
    bulk = dataclasses.replace(BATCH, name="bulk", share=0.95)
    return plan(request("live:ttft_p99<60ms,bulk:e2e_p95<60s", workload=traffic(8.0, live, bulk)))


def test_fleets_of_their_own_share_the_tokens_of_the_mean_of_the_day() -> None:
    """The same fleets at the busiest hour of a day that is half as busy on average: every token costs twice as much."""
    steady = apart()
    live, bulk = dataclasses.replace(CHAT, name="live", share=0.05), dataclasses.replace(BATCH, name="bulk", share=0.95)
    asked = request("live:ttft_p99<60ms,bulk:e2e_p95<60s", workload=traffic(8.0, live, bulk))
    day = plan(dataclasses.replace(asked, day=traffic(4.0, live, bulk)))
    assert len(day.fleet) == 2
    assert (day.usd_per_hour, day.mean_per_s) == (steady.usd_per_hour, 4.0)
    assert day.usd_per_million_tokens == pytest.approx(2 * (steady.usd_per_million_tokens or 0.0))
    ends = [2 * end for end in steady.intervals["usd_per_million_tokens"]]
    assert day.intervals["usd_per_million_tokens"] == pytest.approx(ends)


REPLICA_LIMITS = Limits(max_seqs=32, max_step_tokens=1024, block_tokens=16, blocks=8000, max_context=16384)


@functools.cache
def replica() -> Replica:
    profile = latency.roofline(models.find("llama-3.1-8b"), hardware.find("h100-sxm"), precision="bf16")
    return Replica(profile, REPLICA_LIMITS, demand.of(traffic()).fitting(REPLICA_LIMITS), samples=256)


# ---------------------------------------------------------------- limits and traffic


def test_limits_that_name_a_tenant_are_read_back_as_they_are_printed() -> None:
    text = "chat:ttft_p95<500ms,batch:goodput>99%,tpot_p99<50ms,availability>99.9%"
    limits = slo.parse(text)
    assert [limit.tenant for limit in limits] == ["chat", "batch", None, None]
    assert slo.show(limits) == text
    assert [slo.key(limit) for limit in limits[:2]] == ["chat:ttft_p95", "batch:goodput"]


def test_availability_is_promised_to_no_tenant() -> None:
    with pytest.raises(BadInput, match="that of the fleet"):
        slo.parse("chat:availability>99%")


def test_tenants_without_limits_of_their_own_have_those_of_all() -> None:
    found = tenants.resolved(slo.parse("ttft_p95<1s,batch:e2e_p95<60s,availability>99%"), ("chat", "batch"))
    assert slo.show(found) == "chat:ttft_p95<1s,batch:e2e_p95<60s,availability>99%"
    assert tenants.resolved(found, ("chat", "batch")) == found


@pytest.mark.parametrize(
    ("given", "base", "found"),
    [
        ("chat:ttft_p95<60ms", "ttft_p95<1s,availability>99%", "chat:ttft_p95<60ms,ttft_p95<1s,availability>99%"),
        ("chat:ttft_p95<60ms", "chat:tpot_p99<50ms,batch:e2e_p95<60s", "chat:ttft_p95<60ms,batch:e2e_p95<60s"),
        ("ttft_p95<2s", "ttft_p95<1s,tpot_p99<50ms,batch:e2e_p95<60s", "ttft_p95<2s,batch:e2e_p95<60s"),
        ("availability>99.9%", "ttft_p95<1s,availability>99%", "availability>99.9%,ttft_p95<1s"),
    ],
)
def test_limits_on_the_command_line_leave_those_of_the_other_tenants(given: str, base: str, found: str) -> None:
    assert slo.show(tenants.overridden(slo.parse(given), slo.parse(base), ("chat", "batch"))) == found


def test_a_limit_for_all_that_would_bind_nobody_is_refused() -> None:
    with pytest.raises(BadInput, match=r"SLO ttft_p95<1ms: every tenant has limits of its own \(chat, batch\).* e\.g\. chat:ttft_p95<1ms"):
        asked(slo="ttft_p95<1ms")
    assert slo.show(asked(slo="batch:e2e_p95<90s").slo) == "batch:e2e_p95<90s,chat:ttft_p95<500ms,chat:tpot_p99<80ms"


def asked(**given: object) -> Request:
    found = planning.asked(**PLAIN | given)
    assert isinstance(found, Request)
    return found


PLAIN: dict[str, Any] = {
    **dict.fromkeys(("qps", "model", "gpu", "precision", "slo", "arrivals", "prompt_tokens", "output_tokens", "max_batch", "headroom")),
    "scenario": "chat-and-batch", "measured": (), "term": "on-demand", "seed": 0,
}  # fmt: skip


def test_a_limit_of_nobody_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownName, match="did you mean chat"):
        plan(request("chta:ttft_p95<1s,batch:e2e_p95<60s"))
    with pytest.raises(BadInput, match="the tenant batch has no limit"):
        plan(request("chat:ttft_p95<1s"))


def test_lengths_of_all_have_the_mean_and_spread_of_the_mixture() -> None:
    """Half 100, half 300 tokens: mean 200, standard deviation 100."""
    half = [
        Tenant(name=n, share=0.5, prompt_tokens=workload.parse_lengths(m), output_tokens=workload.parse_lengths(7))
        for n, m in (("a", 100), ("b", 300))
    ]
    found = traffic(1.0, *half)
    assert (found.prompt_tokens.mean, found.prompt_tokens.cv) == pytest.approx((200.0, 0.5))
    assert found.output_tokens == workload.parse_lengths(7)


def test_every_request_has_the_lengths_of_its_tenant() -> None:
    parts = [
        dataclasses.replace(CHAT, prompt_tokens=workload.parse_lengths(100)),
        dataclasses.replace(BATCH, prompt_tokens=workload.parse_lengths(300)),
    ]
    drawn = workload.schedule(traffic(1.0, *parts), n=20_000, seed=1)
    assert drawn.tenants == ("chat", "batch")
    assert drawn.tenant is not None
    assert set(drawn.prompt_tokens[drawn.tenant == 0].tolist()) == {100}
    assert set(drawn.prompt_tokens[drawn.tenant == 1].tolist()) == {300}
    assert abs(float((drawn.tenant == 1).mean()) - 0.2) < 4 * (0.2 * 0.8 / 20_000) ** 0.5
    whole = workload.schedule(workload.synthetic(1.0, prompt=5, output=5), n=100, seed=1)
    assert drawn.scheduled_s[:100].tolist() == whole.scheduled_s.tolist(), "whose a request is changes no arrival"


def test_requests_true_to_their_law_have_the_shares_of_their_tenants() -> None:
    met = workload.typical(traffic(4.0), 500, seed=3)
    assert met.tenant is not None
    assert np.bincount(met.tenant).tolist() == [400, 100]
    for i, tenant in enumerate((CHAT, BATCH)):
        mean = float(met.prompt_tokens[met.tenant == i].mean())
        assert mean == pytest.approx(workload.mean_tokens(tenant.prompt_tokens), rel=0.02)


def test_any_beginning_of_a_demand_has_the_shares_of_all() -> None:
    found = demand.of(traffic(1.0, dataclasses.replace(CHAT, share=0.95), dataclasses.replace(BATCH, share=0.05)))
    assert found.tenant is not None
    assert (found.tenant == 1).sum() == demand.LEAST_OF_TENANT
    for n in (100, 256, 1000):
        assert abs(float((found.tenant[:n] == 1).mean()) - 0.05) <= 1 / n
    alone = found.of_tenant("batch")
    assert alone.share == pytest.approx(0.05)
    assert alone.mean_prompt == pytest.approx(workload.mean_tokens(BATCH.prompt_tokens), rel=0.01)


def test_only_some_tenants_keep_their_rates() -> None:
    found = workload.only(traffic(10.0), ["batch"])
    assert (found.rate_per_s, found.tenants, found.prompt_tokens) == (pytest.approx(2.0), (), BATCH.prompt_tokens)


def test_shares_are_a_hundred_percent() -> None:
    with pytest.raises(BadInput, match="add up to 90 %"):
        traffic(1.0, CHAT, dataclasses.replace(BATCH, share=0.1))


# ---------------------------------------------------------------- one fleet


def test_each_tenant_has_a_row_with_its_own_figures_and_the_plan_those_of_all() -> None:
    found = shared()
    assert found.tenancy is not None
    chat, batch = found.tenancy.tenants
    assert (chat.name, chat.rate_per_s, chat.slo) == ("chat", pytest.approx(9.6), "ttft_p95<500ms,tpot_p99<80ms")
    assert chat.predicted["ttft_p95_s"] < 0.5
    assert chat.predicted["ttft_p50_s"] < found.predicted["ttft_p50_s"] < batch.predicted["ttft_p50_s"]
    assert not [key for key in (*found.predicted, *found.intervals, *found.analytic) if ":" in key]
    for row in (chat, batch):
        for key, value in row.predicted.items():
            low, high = row.intervals[key]
            assert low <= value <= high, key


def seen_by(met: workload.Schedule, name: str) -> dict[str, np.ndarray]:
    """Return TTFT and E2E of one tenant's requests on one replica."""
    tracks = core.play(met, REPLICA_LIMITS, profile=replica().profile)
    back_s = after_s(tracks, met, latency.overhead(replica().profile))
    assert met.tenant is not None
    mine = np.flatnonzero((met.tenant == met.tenants.index(name)) & (tracks.fate == 200))[30:-30]
    return {key: times[mine] - met.scheduled_s[mine] + back_s[mine] for key, times in (("ttft", tracks.first_s), ("e2e", tracks.last_s))}


def test_a_mixture_is_two_independent_streams_that_meet_in_one_replica() -> None:
    """Labelled requests of one stream, as plans draw them, are served as those of two streams drawn apart; theory is near both.

    Ranks of the two samples are compared: a share p of either lies below the p-quantile of the other, give or take four standard errors,
    three times as wide for requests that queue together.
    """
    rate, n = 0.6 * replica().capacity_per_s, 3000
    both = dataclasses.replace(traffic(), rate_per_s=rate)
    apart_ = {t.name: workload.schedule(workload.only(both, [t.name]), duration_s=n / rate, seed=3 + i) for i, t in enumerate(both.tenants)}
    theory = replica().predict(rate)
    for name in ("chat", "batch"):
        one, other = seen_by(workload.schedule(both, n=n, seed=2), name), seen_by(workload.merged(apart_), name)
        for metric in ("ttft", "e2e"):
            for p in (0.5, 0.9):
                below = float((other[metric] <= np.quantile(one[metric], p)).mean())
                assert abs(below - p) < 12 * (p * (1 - p) / len(other[metric])) ** 0.5, (name, metric, p)
                value = theory.value(metric, f"p{100 * p:.0f}", name)
                assert value == pytest.approx(float(np.quantile(other[metric], p)), rel=0.25), (name, metric, p)


def test_an_impossible_limit_names_its_tenant() -> None:
    with pytest.raises(BadInput, match=r"batch:ttft_p50<1ms is below the physics floor"):
        plan(request("chat:ttft_p95<500ms,batch:ttft_p50<1ms"))
    with pytest.raises(Infeasible, match=r"keeps batch:ttft_p99<\d+ms at any replica count"):
        plan(request("chat:ttft_p95<500ms,batch:ttft_p99<60ms"))


CLAUSES = st.lists(
    st.tuples(
        st.sampled_from(["chat", "batch"]),
        st.sampled_from(["ttft", "tpot", "e2e"]),
        st.sampled_from(["p50", "p95", "p99"]),
        st.floats(0.2, 3.0),
    ),
    min_size=2,
    max_size=4,
    unique_by=lambda clause: clause[:3],
)
USUAL_S = {"ttft": 0.5, "tpot": 0.03, "e2e": 8.0}


@settings(max_examples=10, deadline=None)
@given(clauses=CLAUSES)
def test_a_limit_more_never_makes_the_fleet_smaller(clauses: list[tuple[str, str, str, float]]) -> None:
    """One replica carries no more within more limits, to the step that the search resolves, so the fleet is no smaller."""
    limits = slo.parse(",".join(f"{who}:{metric}_{stat}<{USUAL_S[metric] * factor:.4g}s" for who, metric, stat, factor in clauses))
    without, _ = sizing.highest_rate(replica(), limits[:-1], 0.8)
    with_all, binds = sizing.highest_rate(replica(), limits, 0.8)
    assert with_all <= without + 1.01 * 0.8 * replica().capacity_per_s / 2**sizing.HALVINGS
    assert binds is None or binds in limits


def test_small_tenants_are_simulated_longer() -> None:
    small = dataclasses.replace(BATCH, share=0.2)
    assert confirm.times(workload.synthetic(1.0, prompt=5, output=5)) == 1
    assert confirm.times(traffic(1.0, dataclasses.replace(CHAT, share=0.5), dataclasses.replace(small, share=0.5))) == 1
    assert confirm.times(traffic(1.0, CHAT, small)) == 3
    assert (
        confirm.times(traffic(1.0, dataclasses.replace(CHAT, share=0.99), dataclasses.replace(small, share=0.01)))
        == confirm.MOST_FOR_TENANTS
    )


# ---------------------------------------------------------------- fleets of their own


def test_tenants_share_a_fleet_where_apart_each_would_round_up() -> None:
    found = shared().tenancy
    assert found is not None
    assert found.is_shared
    own, other = found.divisions
    assert own.fleets[0].tenants == ("chat", "batch")
    assert [fleet.tenants for fleet in other.fleets] == [("chat",), ("batch",)]
    assert other.usd_per_hour is not None
    assert own.usd_per_hour is not None
    assert other.usd_per_hour > own.usd_per_hour
    assert "each fleet rounds up" in other.why


def test_a_few_requests_in_a_hurry_are_cheaper_apart() -> None:
    """Each fleet is then the plan of its tenants alone, and the plan is their sum."""
    found = apart()
    assert found.tenancy is not None
    assert not found.tenancy.is_shared
    live, bulk = found.fleet
    alone = plan(tenants.only(request("live:ttft_p99<60ms,bulk:e2e_p95<60s", workload=found.workload), ("live",)))
    assert (live.stage, live.replicas, live.usd_per_hour) == ("live", alone.replicas, alone.usd_per_hour)
    assert found.tenancy.tenants[0].predicted["ttft_p99_s"] == alone.predicted["ttft_p99_s"]
    assert found.replicas == live.replicas + bulk.replicas
    assert found.usd_per_hour == pytest.approx((live.usd_per_hour or 0.0) + (bulk.usd_per_hour or 0.0), abs=0.005)
    assert found.intervals["replicas"][1] == found.intervals["live_replicas"][1] + found.intervals["bulk_replicas"][1]
    dearer = next(way for way in found.tenancy.divisions[1:] if len(way.fleets) == 1)
    assert "live:ttft_p99<60ms then binds for all requests" in dearer.why
    for key, value in found.predicted.items():
        low, high = found.intervals[key]
        assert low <= value <= high, key


def test_what_is_worked_out_for_one_fleet_is_not_compared() -> None:
    found = plan(request("chat:ttft_p95<500ms,batch:e2e_p95<60s,availability>99%"))
    assert found.secured is not None
    assert any("fleets of their own were not compared" in note for note in found.notes)


# ---------------------------------------------------------------- what people read


def test_plans_of_tenants_are_kept_and_shown(tmp_path: Path) -> None:
    for made in (shared(), apart()):
        kept = record.read(record.write(tmp_path / "plan.json", made, machine()), Plan)
        assert kept == made
        section = content.describe(kept)[0]
        assert section.tone == "good"
        table = next(t for t in section.tables if t.title == "Tenants")
        assert [row[0].text for row in table.rows if row[0].text] == [t.name for t in kept.tenancy.tenants] if kept.tenancy else False
        assert any(fact.label == "Tenants" for fact in section.facts)


def test_a_run_judges_each_limit_by_the_requests_of_its_tenant() -> None:
    """Chat's 30 answers take 0.1 s to begin, batch's 2 s."""
    rows = tuple(
        RequestRecord(
            index=i,
            scheduled_s=float(i),
            token_s=(i + (0.1 if i % 2 else 2.0),),
            tokens_per_event=(1,),
            output_tokens=1,
            tenant="chat" if i % 2 else "batch",
        )
        for i in range(60)
    )
    limits = slo.parse("chat:ttft_p50<200ms,batch:ttft_p50<200ms,chat:goodput>99%")
    found = summary.summarise(
        rows,
        source="simulation",
        target="x",
        arrivals="poisson",
        offered_rate_per_s=1.0,
        slo=limits,
        validity=Validity(verdict="valid"),
        window=None,
    )
    assert found.slo_met == {"chat:ttft_p50": True, "batch:ttft_p50": False, "chat:goodput": True}
    assert found.goodput_ratio == 0.5


# ---------------------------------------------------------------- scenarios

SCENARIO = Path(__file__).parent.parent / "scenarios" / "chat-and-batch.yaml"


def test_the_shipped_scenario_has_two_tenants() -> None:
    found = scenario.load("chat-and-batch")
    assert [tenant.name for tenant in found.workload.tenants] == ["chat", "batch"]
    assert {limit.tenant for limit in found.slo} == {"chat", "batch"}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("share: 85%", "shre: 85%", r"unknown key tenants.chat.shre; did you mean share"),
        ("share: 85%", "share: 80%", r"add up to 95 %"),
        ("share: 85%", "share: 0%", r"tenants.chat.share: 0% must be above zero"),
        ("share: 85%", "share: -50%", r"tenants.chat.share: -50% must be above zero"),
        ("share: 85%", "rate: 17/s", r"some give a share and some a rate"),
        ("share: 85%", "share: 85%\n    rate: 17/s", r"tenants.chat: needs a share or a rate, not both"),
        ("  chat:", "  my chat:", r"no name of a tenant"),
        ("slo: {e2e_p95: 60s}", "prio: 1", r"unknown key tenants.batch.prio; did you mean priority"),
        ("slo: {e2e_p95: 60s}", "slo: {e2e_p95: 60s}\n    priority: 0", r"tenants.batch.priority: 0 where a whole number above zero"),
        ("    slo: {e2e_p95: 60s}\n", "", r"tenants.batch: has no slo"),
    ],
)
def test_mistakes_in_tenants_are_told_with_their_place(old: str, new: str, says: str) -> None:
    text = SCENARIO.read_text()
    assert old in text
    with pytest.raises(BadInput, match=says):
        scenario.parse(text.replace(old, new, 1), "my.yaml")


def test_rates_of_tenants_must_be_those_of_the_traffic() -> None:
    text = SCENARIO.read_text().replace("share: 85%", "rate: 17/s").replace("share: 15%", "rate: 3/s")
    assert [tenant.share for tenant in scenario.parse(text, "my.yaml").workload.tenants] == pytest.approx([0.85, 0.15])
    with pytest.raises(ScenarioError, match=r"rates add up to 21.0/s, traffic.rate says 20.0/s"):
        scenario.parse(text.replace("rate: 3/s", "rate: 4/s"), "my.yaml")
