"""A plan beside a baseline, and under changes: what it saves or adds, and why."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlsys_bench import plan as planner
from mlsys_bench import record, slo, workload
from mlsys_bench.errors import BadInput, Infeasible, RecordError
from mlsys_bench.journeys import comparing, deploying, planning
from mlsys_bench.plan import sensitivity
from mlsys_bench.plan.difference import Figures, Inputs
from mlsys_bench.plan.request import Request
from mlsys_bench.report import comparisons, markdown, pictures
from mlsys_bench.report.terminal import show
from mlsys_bench.types import Plan, Provenance, StagePlan
from tests import sample_records

NOW = dataclasses.replace(
    sample_records.plan(), replicas=4, usd_per_hour=40.0, usd_per_month=29_200.0, intervals={"usd_per_month": (21_900.0, 36_500.0)}
)
THEN = dataclasses.replace(
    NOW, replicas=3, usd_per_hour=36.0, usd_per_month=26_280.0, intervals={"usd_per_month": (26_280.0, 26_280.0)},
    workload=dataclasses.replace(NOW.workload, rate_per_s=NOW.workload.rate_per_s / 2),
)  # fmt: skip


def replanned(inputs: Inputs, given: Request | None = None) -> Figures:
    """Return six replicas at the new rate, at the old price of $12 each."""
    assert inputs.workload.rate_per_s == NOW.workload.rate_per_s
    return Figures(replicas=6, gpus=6, usd_per_hour=72.0)


def test_a_plan_beside_its_baseline_says_what_it_adds_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """$26,280 became $29,200: +$2,920, 11.1 %.  Twice the traffic adds 36 x 730 = $26,280, the rest saves 32 x 730 = $23,360."""
    monkeypatch.setattr(deploying, "replanned", replanned)
    found = comparing.beside(NOW, THEN, "old.json")
    assert found.change_usd_per_month == pytest.approx(2920.0)
    assert found.change == pytest.approx(1 / 9)
    assert found.change_interval == pytest.approx((21_900 - 26_280, 36_500 - 26_280))
    assert {cause.cause: cause.usd_per_month for cause in found.causes} == pytest.approx({"traffic": 26_280.0, "remainder": -23_360.0})
    assert sum(cause.replicas for cause in found.causes) == 1
    assert found.per_request_usd_per_month == pytest.approx(29_200 - 2 * 26_280)
    assert [line.split(":")[0] for line in found.differences] == ["the traffic differs"]


def test_steps_are_the_same_whoever_plans_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploying, "replanned", replanned)
    with ThreadPoolExecutor(2) as crew:
        assert deploying.compared(THEN, NOW, None, crew) == deploying.compared(THEN, NOW)


def test_the_new_requests_headroom_and_prices_go_into_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []

    def planned(request: Request) -> Plan:
        asked.append(request)
        return NOW

    monkeypatch.setattr(planner, "plan", planned)
    given = Request(model=NOW.model, workload=NOW.workload, slo=(), headroom=0.35, term="reserved", seed=7)
    comparing.beside(NOW, THEN, "old.json", given)
    assert [(r.headroom, r.term, r.seed) for r in asked] == [(0.35, "reserved", 7)]


def test_a_plan_without_a_price_is_compared_by_replicas_alone() -> None:
    unpriced = dataclasses.replace(THEN, usd_per_hour=None, usd_per_month=None, prices=(), intervals={})
    found = comparing.beside(NOW, dataclasses.replace(unpriced, workload=NOW.workload), "old.json")
    assert (found.change_usd_per_month, found.change, found.change_interval) == (None, None, None)
    (section,) = comparisons.sections(dataclasses.replace(NOW, baseline=found))
    assert section.lead == "One of the two has no price, so only their replicas can be compared."


def test_stage_graphs_differ_by_stage_and_other_systems_by_cost_alone() -> None:
    """The writer takes a replica and $4 more, the ranker is new at $2: the rest of the $4 between the totals is shared, -$2."""
    stage = StagePlan(
        stage="writer", visits=1.0, calls=1.0, replicas=3, shards=1, servers=0, service_s=1.0, utilisation=0.5, latencies_s={},
        usd_per_hour=36.0, binds="", provenance=Provenance.ASSUMED, source="", profile=NOW.profile,
    )  # fmt: skip
    more = dataclasses.replace(stage, replicas=4, usd_per_hour=40.0, service_s=1.1)
    ranker = dataclasses.replace(stage, stage="ranker", replicas=1, usd_per_hour=2.0)
    found = comparing.beside(dataclasses.replace(NOW, stages=(more, ranker)), dataclasses.replace(THEN, stages=(stage,)), "old.json")
    assert {cause.cause: cause.usd_per_month for cause in found.causes} == pytest.approx(
        {"writer": 2920.0, "ranker": 1460.0, "remainder": -1460.0}
    )
    assert found.causes[1].changes == ("a stage that was not there",)
    other = comparing.beside(NOW, dataclasses.replace(THEN, stages=(stage,)), "old.json")
    assert other.causes == ()
    assert other.change_usd_per_month == pytest.approx(2920.0)
    assert "cost alone" in other.method


def test_a_record_that_is_no_plan_is_refused_before_anything_is_planned(tmp_path: Path) -> None:
    file = record.write(tmp_path / "traffic.json", sample_records.traffic(), sample_records.machine())
    with pytest.raises(RecordError, match=r"traffic\.json"):
        comparing.planned(REQUEST, baseline=file)
    with pytest.raises(BadInput, match="--small nano answers first"):
        comparing.planned(REQUEST, small="nano")
    with pytest.raises(BadInput, match="--small llama-3-70b: llama-3-70b is no smaller than llama-3-70b, which it answers before"):
        comparing.planned(REQUEST, changes=True, small="llama-3-70b")


# ---------------------------------------------------------------- changes

REQUEST = Request(model="llama-3-70b", workload=NOW.workload, slo=slo.parse("ttft_p95<500ms"), precisions=("bf16",))


def by_load(request: Request) -> Plan:
    """Return a replica, at $10, for every ten requests a second or, of long prompts, every twenty thousand tokens."""
    load = request.workload.rate_per_s / 10 * request.workload.prompt_tokens.mean / NOW.workload.prompt_tokens.mean
    replicas = max(1, round(load))
    usd = 10.0 * replicas
    return dataclasses.replace(NOW, model=request.model, replicas=replicas, usd_per_hour=usd, intervals={"usd_per_hour": (usd, usd + 10)})


def test_changes_are_the_same_whoever_plans_them_and_say_how() -> None:
    plan = by_load(REQUEST)
    rows = sensitivity.sensitivity(REQUEST, plan, by_load, sensitivity.smaller(REQUEST.model))
    with ThreadPoolExecutor(3) as crew:
        assert sensitivity.sensitivity(REQUEST, plan, by_load, sensitivity.smaller(REQUEST.model), crew) == rows
    what = {row.what: row for row in rows}
    assert set(what) == {
        "ttft_p95 1 ms later", "ttft_p95 10 % later", "INT8 weights", "10 % more traffic", "a cache that answers 30 %",
        "30 % of each prompt cached", "llama-3-8b first, 30 % passed on",
    }  # fmt: skip
    assert all(row.method.startswith("planned again and simulated") and row.provenance is plan.provenance for row in rows)
    cached = what["30 % of each prompt cached"]
    assert cached.replicas == round(0.7 * plan.replicas)
    assert "at most" in cached.method
    cascade = what["llama-3-8b first, 30 % passed on"]
    large = max(1, round(0.3 * REQUEST.workload.rate_per_s / 10))
    assert cascade.replicas == plan.replicas + large
    assert cascade.usd_interval == (10.0 * cascade.replicas, 10.0 * cascade.replicas + 20)  # of both fleets, who err together


def test_a_trace_is_played_faster_thinned_and_shortened() -> None:
    """A tenth faster, seven of ten requests, prompts of 70 %: the requests of the trace itself, not a law like them."""
    traffic = dataclasses.replace(NOW.workload, rate_per_s=50.0)
    trace = workload.schedule(traffic, n=2000, seed=1)
    made = {v.what: v.requests[0].trace for v in sensitivity.variants(dataclasses.replace(REQUEST, workload=traffic, trace=trace))}
    faster, fewer, shorter = (made[w] for w in ("10 % more traffic", "a cache that answers 30 %", "30 % of each prompt cached"))
    assert faster is not None
    assert fewer is not None
    assert shorter is not None
    assert faster.scheduled_s[-1] == pytest.approx(trace.scheduled_s[-1] / 1.1)
    assert len(fewer) == pytest.approx(1400, abs=4 * (2000 * 0.3 * 0.7) ** 0.5)
    assert set(fewer.scheduled_s) <= set(trace.scheduled_s)
    assert abs(shorter.prompt_tokens - 0.7 * trace.prompt_tokens).max() <= 0.5
    assert (shorter.output_tokens == trace.output_tokens).all()


@pytest.mark.parametrize(
    ("model", "small"),
    [("llama-3-70b", "llama-3-8b"), ("qwen2.5-72b", "qwen2.5-14b"), ("llama-3-8b", "llama-3.2-3b"), ("llama-3.2-1b", None)],
)
def test_a_cascade_begins_with_a_smaller_model_of_the_same_makers(model: str, small: str | None) -> None:
    assert sensitivity.smaller(model) == small


def test_a_plan_carries_both_into_its_record_and_every_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(planning, "plan", lambda request, executor=None: by_load(request))
    monkeypatch.setattr(deploying, "replanned", replanned)
    rows = sensitivity.sensitivity(REQUEST, by_load(REQUEST), impossible_in_int8, "llama-3-8b")
    made = dataclasses.replace(NOW, baseline=comparing.beside(NOW, THEN, "old.json"), sensitivity=rows)
    again = record.loads(record.dumps(made, sample_records.machine()), "here")[1]
    assert again == made
    show(made)
    text = capsys.readouterr().out
    assert "The plan adds $2,920 a month, +11.1 %" in text
    page = markdown.render([("plan.json", record.envelope(made, sample_records.machine(), []), made)])
    assert "What a change would save or cost" in page
    assert "old.json" in page
    assert "no device computes in int8" in page


def impossible_in_int8(request: Request) -> Plan:
    if request.precisions == ("int8",):
        raise Infeasible("no device computes in int8")
    return by_load(request)


def test_the_picture_of_changes_needs_a_price() -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    from mlsys_bench.report import figures

    rows = sensitivity.sensitivity(REQUEST, by_load(REQUEST), impossible_in_int8, None)
    page = figures.tornado(dataclasses.replace(NOW, sensitivity=rows), "here")
    assert page is not None
    labels = [label.get_text() for label in page.axes[0].get_yticklabels()]
    assert set(labels) == {row.what for row in rows if row.usd_per_hour is not None}
    assert figures.tornado(NOW, "here") is None
    unpriced = dataclasses.replace(rows[0], change_usd_per_month=None)
    assert figures.tornado(dataclasses.replace(NOW, sensitivity=(unpriced,)), "here") is None
    assert pictures.CHANGES


def test_a_pool_of_scenarios_refuses_what_it_would_pass_over() -> None:
    pool = planning.asked(
        scenario="chat-fleet", qps=None, measured=[], model=None, gpu=None, precision=None, slo=None, arrivals=None,
        prompt_tokens=None, output_tokens=None, max_batch=None, headroom=None, term="on-demand", seed=0,
    )  # fmt: skip
    with pytest.raises(BadInput, match="--sensitivity is for the plan of one scenario; several scenarios on one pool are planned"):
        comparing.planned(pool, changes=True)
    with pytest.raises(BadInput, match="--cluster is for the plan of one scenario"):
        comparing.planned(pool, cluster="tcp://127.0.0.1:9")


def test_workloads_keep_their_law_when_scaled() -> None:
    (more,) = next(v for v in sensitivity.variants(REQUEST) if v.what == "10 % more traffic").requests
    assert more.workload.arrivals == NOW.workload.arrivals
    assert more.workload.rate_per_s == pytest.approx(1.1 * NOW.workload.rate_per_s)
