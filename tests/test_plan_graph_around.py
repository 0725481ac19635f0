"""What surrounds the plan of a stage graph: intervals from stage times, spares of all stages, hours, months, manifests; no flag unheard."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from mlsys_bench import record
from mlsys_bench.errors import BadInput, UnknownName
from mlsys_bench.hardware import machine
from mlsys_bench.journeys import graph_plans
from mlsys_bench.plan.export import stages as exports
from mlsys_bench.plan.graph import GraphRequest, allocation, cuts, plan_graph, problem, works
from mlsys_bench.plan.graph.spread import DRAWS, draws, spread_of
from mlsys_bench.plan.graph.times import Fleets, full_at
from mlsys_bench.plan.growth import Growth
from mlsys_bench.report import content, terminal
from mlsys_bench.stage_fleets import NO_END_S
from mlsys_bench.stages import StageGraph
from mlsys_bench.types import LatencyProfile, Layout, Limit, Plan, Provenance
from tests import manifest_schemas
from tests.stage_graphs import graph, law, written

PROMTOOL = shutil.which("promtool")


def searching() -> StageGraph:
    """Two indexes of which one is enough, a ranker that may be skipped, a log nobody waits for; twice as many at noon as at night."""
    return graph(f"""
        a: {{component: http.door, {law('20ms')}, next: find}}
        find: {{parallel: [dense, sparse], join: {{k: 1, of: 2, by: 60ms}}, next: rank}}
        dense: {{{law('10ms')}, shards: 2, slo: {{e2e_p99: 500ms}}}}
        sparse: {{{law('30ms')}}}
        rank: {{{law('80ms').replace('vcpu: 1', 'vcpu: 2, memory: 4GB')}, timeout: 2s, fallback: {{to: log}}, next: log}}
        log: {{{law('1ms')}, async: true}}
    """, rate=20, arrivals="'poisson*diurnal:24h:1,2'", slo="{e2e_p95: 1s, e2e_p99: 2s, availability: 99.99%}", headroom="20%")  # fmt: skip


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Return the plan of all of it, by shorter simulations than those of a user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "_MOST", 2000)
        return plan_graph(GraphRequest(graph=searching(), zones=2, growth=Growth(per_month=0.1)))


# ---------------------------------------------------------------- intervals


def test_an_assumed_time_is_drawn_within_its_spread() -> None:
    """Nine of ten draws lie within mean / spread and mean x spread, half of them below the mean; 2 where nothing is said."""
    stages = f"a: {{{law('100ms')}, next: b}}\nb: {{{law('10ms').replace('mean: 10ms', 'mean: 10ms, spread: 1.2')}}}"
    g = graph(stages)
    asked = problem(g, works(GraphRequest(graph=g)))
    assert [spread_of(work) for work in asked.works.values()] == [2.0, 1.2]  # type: ignore[arg-type]
    drawn = draws(asked, 200)
    for name, mean, spread in (("a", 0.1, 2.0), ("b", 0.01, 1.2)):
        times = sorted(draw.works[name].service_s for draw in drawn)
        inside = sum(mean / spread <= t <= mean * spread for t in times)
        assert 178 <= inside <= 182
        assert times[99] < mean < times[100]
        assert math.sqrt(times[99] * times[100]) == pytest.approx(mean, rel=0.01)
    with pytest.raises(BadInput, match=r"spread: 0\.5; the true time lies between"):
        graph(f"a: {{{law('10ms').replace('mean: 10ms', 'mean: 10ms, spread: 0.5')}}}")


def test_a_measured_time_is_drawn_from_its_own_covariance() -> None:
    g = graph(f"a: {{{law('1s')}}}")
    known = LatencyProfile(
        form="service", layout=Layout(model="a", precision="", device="vcpu"), stage="a", terms=("service_s", "scv"),
        coefficients=(2.0, 1.0), covariance=((1e-4, 0.0), (0.0, 0.0)), constants={}, residual_log_sd=0.0, valid={},
        provenance=Provenance.CALIBRATED,
    )  # fmt: skip
    asked = problem(g, works(GraphRequest(graph=g, profiles={"a": known})))
    logs = [math.log(draw.works["a"].service_s / 2.0) for draw in draws(asked, 200)]
    assert math.sqrt(sum(x * x for x in logs) / 200) == pytest.approx(0.01, rel=0.2)


def test_replicas_of_a_stage_lie_where_the_load_of_the_drawn_times_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Headroom binds: n = ceil(rate x time / 0.9), at time / 2 and time x 2 from half to twice, as near as 32 draws tell."""
    monkeypatch.setattr(allocation, "_MOST", 2000)
    plan = plan_graph(GraphRequest(graph=graph(f"a: {{{law('1s')}}}", rate=36, headroom="10%")))
    assert plan.stage_fleet is not None
    low, high = plan.stage_fleet.replicas["a"]
    assert (plan.replicas, plan.intervals["replicas"]) == (40, (low, high))
    assert 18 <= low <= 24
    assert 66 <= high <= 82
    assert plan.intervals["usd_per_hour"][0] == pytest.approx(0.1 * low, rel=0.1)
    assert plan.intervals["usd_per_hour"][1] == pytest.approx(0.1 * high, rel=0.1)


def test_latencies_hold_the_spread_of_stage_times(plan: Plan) -> None:
    for key, value in plan.predicted.items():
        low, high = plan.intervals[key]
        assert low <= value <= high
    low, high = plan.intervals["e2e_p50_s"]
    assert high / low > 1.3
    assert any(f"of {DRAWS} draws" in note for note in plan.notes) or plan.utilisation < 0.5


def test_a_latency_that_may_grow_without_end_has_no_upper_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 80 % load three assumed stages are overloaded in half of the draws: the end is open, unless a timeout ends every wait."""
    monkeypatch.setattr(allocation, "_MOST", 2000)
    stages = [f"a: {{{law('40ms')}%s, next: b}}", f"b: {{{law('20ms')}%s, next: c}}", f"c: {{{law('30ms')}%s}}"]
    open_, ended = (
        plan_graph(GraphRequest(graph=graph("\n".join(stage % more for stage in stages), rate=200, headroom="20%")))
        for more in ("", ", timeout: 2s")
    )
    assert all(open_.intervals[key][1] == NO_END_S for key in open_.predicted)
    assert all(ended.intervals[key][1] < 100 for key in ended.predicted)
    assert any("'and more' stands for an upper end that nobody knows" in note for note in open_.notes)
    table = next(t for section in content.describe(open_) for t in section.tables if "predicted" in [c.title for c in t.columns])
    assert any("and more" in cell.sub for row in table.rows for cell in row)


# ---------------------------------------------------------------- availability


def test_cuts_know_fallbacks_joins_and_what_nobody_waits_for() -> None:
    g = searching()
    assert cuts.minimal(g, lambda stage: True) == (("a",), ("dense", "sparse"))
    assert cuts.minimal(g, lambda stage: False) == (("a",), ("rank",), ("dense", "sparse"))
    loop = graph(f"a: {{{law('1ms')}, escalate: {{to: a, p: 10%, source: x}}, next: b}}\nb: {{{law('1ms')}}}")
    assert cuts.minimal(loop, lambda stage: True) == (("a",), ("b",))


def test_a_fallback_that_cannot_carry_the_load_stands_in_for_nobody() -> None:
    g = graph(f"a: {{{law('50ms')}, timeout: 1s, fallback: {{to: b}}}}\nb: {{{law('300ms')}}}", rate=10)
    assert cuts.carried_without(g, "a", {"a": 100.0, "b": 3.0}) is False
    assert cuts.carried_without(g, "a", {"a": 100.0, "b": 10.5}) is True


def test_spares_of_all_stages_keep_the_objective_together(plan: Plan) -> None:
    assert plan.stage_fleet is not None
    found = plan.stage_fleet.secured
    assert found is not None
    assert found.availability >= 0.9999
    assert found.interval[0] <= found.availability <= found.interval[1]
    assert found.whole < found.availability  # a ranker that is away is a fallback in use, and an answer
    spare = {s.stage: s.replicas - s.needed for s in found.stages}
    assert spare["a"] >= 1
    assert spare["log"] == 0  # nobody waits for it
    assert plan.replicas == sum(s.replicas * s.shards for s in found.stages) == sum(item.replicas for item in plan.fleet)
    assert plan.predicted["availability"] == found.availability
    assert plan.predicted["e2e_p95_s"] <= plan.survivors["e2e_p95_s"] * 1.02
    assert "availability>99.99%" in plan.binding_constraint
    assert plan.usd_per_hour == pytest.approx(sum(0.1 * (2 if i.stage == "rank" else 1) * i.replicas for i in plan.fleet), abs=1e-9)


def test_zones_need_an_availability_and_spot_promises_none() -> None:
    bare = graph(f"a: {{{law('10ms')}}}")
    with pytest.raises(BadInput, match="zones are planned for an availability"):
        plan_graph(GraphRequest(graph=bare, zones=3))
    promised = dataclasses.replace(bare, slo=(*bare.slo, Limit(metric="availability", stat="ratio", limit=0.999)))
    with pytest.raises(BadInput, match="reclaimed together"):
        plan_graph(GraphRequest(graph=promised, term="spot"))


# ---------------------------------------------------------------- hours and months


def test_replicas_by_the_hour_are_those_of_the_busiest_and_fewer_at_night(plan: Plan) -> None:
    assert plan.stage_fleet is not None
    found = plan.stage_fleet.scaled
    assert found is not None
    assert len(found.start_s) == 24
    planned = {s.stage: s.replicas for s in plan.stages}
    assert {name: max(hours) for name, hours in found.replicas.items()} == planned
    assert min(found.replicas["rank"]) < planned["rank"]
    assert found.scheduled_replica_h < found.static_replica_h == 24 * plan.replicas
    assert found.scheduled_usd is not None
    assert found.scheduled_usd < (found.static_usd or 0.0) == pytest.approx(24 * (plan.usd_per_hour or 0.0), abs=1e-6)
    for rule in found.rules.values():
        assert 0 < rule.share <= 1
        assert rule.least <= rule.most


def test_the_first_stage_to_be_full_is_the_one_that_holds_least(plan: Plan) -> None:
    """A stage that headroom sized to u of its capacity saturates at 0.98 / u; growth of 10 % a month takes ln / ln 1.1 months."""
    assert plan.stage_fleet is not None
    found = plan.stage_fleet.outlook
    assert found is not None
    full = {name: month for name, month in found.stages.items() if month is not None}
    assert found.first == min(full, key=lambda name: full[name])
    assert found.full_month is not None
    assert found.full_month <= full[found.first] + 1e-9
    counts = [month.replicas[found.first] for month in found.months]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]
    assert [month.usd_per_h for month in found.months] == sorted(month.usd_per_h or 0.0 for month in found.months)


def test_one_stage_is_full_where_its_queue_theory_says() -> None:
    """M/M/1 with p95 of the sojourn limited to t: full at 1 / s - ln 20 / t; elsewhere it saturates."""
    g = graph(f"a: {{{law('20ms')}}}", rate=20, slo="{e2e_p95: 200ms}")
    asked = problem(g, works(GraphRequest(graph=g)))
    from mlsys_bench.plan.graph.allocation import Allocation

    made = Allocation(replicas={"a": 1}, estimate=asked.estimate({"a": 1}), trial=None, corrections={}, binds={"a": None}, simulated=0)  # type: ignore[arg-type]
    more, why = full_at(Fleets(asked=asked, made=made, spared=lambda fleet: fleet), "a")
    assert more * 20 == pytest.approx(50 - math.log(20) / 0.2, rel=0.03)
    assert why == "e2e_p95<200ms"


# ---------------------------------------------------------------- as read and written


def test_the_record_is_read_back_and_reads_well(plan: Plan, tmp_path: Path) -> None:
    back = record.read(record.write(tmp_path / "plan.json", plan, machine()), Plan)
    assert back == plan
    printed = Console(width=120, file=io.StringIO(), record=True)
    terminal.show(plan, printed)
    text = printed.export_text()
    assert "The bill" in text
    titles = [section.title for section in content.describe(plan)]
    assert [title.split(":")[0].split(" of ")[0] for title in titles] == ["Plan", "Availability", "Autoscaling", "Growth"]
    assert not re.search(r"\bnan\b|\binf\b", text)


@pytest.mark.parametrize("kind", [kind for kind in exports.KINDS if kind != "kserve"])
def test_every_manifest_is_read_back_and_fits_its_schema(plan: Plan, kind: str) -> None:
    read = list(yaml.safe_load_all(exports.text(kind, plan)))
    assert read == exports.documents(kind, exports.releases(plan))
    assert [line for document in read for line in manifest_schemas.wrong(document, manifest_schemas.schema_of(document))] == []


def by_kind(plan: Plan, kind: str, of: str) -> dict[str, Any]:
    return {d["metadata"]["name"]: d["spec"] for d in exports.documents(kind, exports.releases(plan)) if d["kind"] == of}


def test_every_stage_is_deployed_with_what_it_needs(plan: Plan) -> None:
    found = by_kind(plan, "k8s", "Deployment")
    assert set(found) == {"small-a", "small-dense-0", "small-dense-1", "small-sparse", "small-rank", "small-log"}
    planned = {s.stage: s.replicas for s in plan.stages}
    assert {name: spec["replicas"] for name, spec in found.items() if "dense" not in name} == {
        f"small-{name}": n for name, n in planned.items() if name != "dense"
    }
    (rank,) = found["small-rank"]["template"]["spec"]["containers"]
    assert rank["resources"] == {"limits": {"memory": "4000M"}, "requests": {"cpu": "2", "memory": "4000M"}}
    (shard,) = found["small-dense-1"]["template"]["spec"]["containers"]
    assert {e["name"]: e["value"] for e in shard["env"]} == {"STAGE": "dense", "SHARD": "1", "SHARDS": "2"}
    (door,) = found["small-a"]["template"]["spec"]["containers"]
    assert door["image"] == "small/http-door:latest"
    scaler = by_kind(plan, "k8s", "HorizontalPodAutoscaler")["small-rank"]
    assert plan.stage_fleet is not None
    assert plan.stage_fleet.scaled is not None
    assert min(plan.stage_fleet.scaled.replicas["rank"]) < planned["rank"]
    assert scaler["minReplicas"] == planned["rank"], "an availability is promised, which counts against the peak all day"
    assert scaler["maxReplicas"] > planned["rank"]
    assert set(by_kind(plan, "keda", "ScaledObject")) == set(found)


def test_promises_are_counted_at_the_entry_and_at_their_stages(plan: Plan) -> None:
    """e2e_p95 < 1 s at a's histogram; dense's own p99 at both of its shards; availability as the product of cuts."""
    found = by_kind(plan, "openslo", "SLO")
    good = found["small-e2e-p95"]["indicator"]["spec"]["ratioMetric"]["good"]["metricSource"]["spec"]["query"]
    assert good == 'sum(http_server_request_duration_seconds_bucket{job="small-a",le="1.0"})'
    assert {"small-dense-0-e2e-p99", "small-dense-1-e2e-p99", "small-e2e-p99"} <= set(found)
    raw = found["small-availability"]["indicator"]["spec"]["ratioMetric"]["raw"]["metricSource"]["spec"]["query"]
    assert raw.count("clamp_max(") == 1
    assert 'up{job="small-rank"}' not in raw
    with pytest.raises(BadInput, match="no language model, and KServe"):
        exports.text("kserve", plan)
    with pytest.raises(UnknownName, match="k8s"):
        exports.text("k9s", plan)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian package prometheus)")
def test_promtool_accepts_the_rules_and_plays_an_outage(plan: Plan, tmp_path: Path) -> None:
    """Everything up: held.  One of two indexes away: still held.  Both: not."""
    assert PROMTOOL is not None
    path = exports.write(f"prometheus-rules:{tmp_path}", plan)
    checked = subprocess.run(
        [PROMTOOL, "check", "rules", "--lint=all", "--lint-fatal", str(path)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    counts = {of.name: of.stage.replicas for of in exports.releases(plan)}
    gone = {"small-sparse": "1x10 0x20", "small-dense-0": "1x20 0x10"}
    series = [
        {"series": f'up{{job="{name}",instance="{k}"}}', "values": gone.get(name, "1x30")} for name, n in counts.items() for k in range(n)
    ]
    expected = [(5, 1), (15, 1), (25, 0)]
    test = {
        "rule_files": [str(path)],
        "evaluation_interval": "1m",
        "tests": [{
            "interval": "1m", "input_series": series,
            "promql_expr_test": [
                {"expr": "small:availability_held:bool", "eval_time": f"{at}m",
                 "exp_samples": [{"labels": "small:availability_held:bool", "value": value}]} for at, value in expected
            ],
        }],
    }  # fmt: skip
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    done = subprocess.run([PROMTOOL, "test", "rules", str(tmp_path / "test.yaml")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def talking() -> Plan:
    """Return the plan of a door before a language model, twice as many requests at noon as at night."""
    model = (
        "service: {roofline: {model: llama-3.1-8b, precision: [fp8], max_batch: 32, prompt: {dist: constant, mean: 500}, "
        "output: {dist: constant, mean: 100}, source: x}}, resources: {gpu: [h100-sxm]}"
    )
    g = graph(f"a: {{{law('5ms')}, next: write}}\nwrite: {{{model}}}", rate=9, arrivals="'poisson*diurnal:24h:1,2'", slo="{ttft_p95: 1s}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "_MOST", 2000)
        return plan_graph(GraphRequest(graph=g))


def test_a_language_model_is_exported_as_a_plan_of_its_own(talking: Plan) -> None:
    deployment = by_kind(talking, "k8s", "Deployment")["small-write"]
    (container,) = deployment["template"]["spec"]["containers"]
    assert container["command"] + container["args"][:1] == ["vllm", "serve", "meta-llama/Llama-3.1-8B"]
    assert "--max-num-seqs" in container["args"]
    assert container["args"][container["args"].index("--max-num-seqs") + 1] == "32"
    assert deployment["replicas"] == talking.stages[1].replicas
    (service,) = exports.documents("kserve", exports.releases(talking))
    assert manifest_schemas.wrong(service, manifest_schemas.schema_of(service)) == []
    assert service["metadata"]["name"] == "small-write"
    text = exports.text("openslo", talking)
    assert "# left out, as no usual counter tells it of the whole: ttft_p95<1s" in text.splitlines()
    query = by_kind(talking, "keda", "ScaledObject")["small-write"]["triggers"][0]["metadata"]["query"]
    assert 'job="small-write"' in query


def test_a_million_tokens_cost_what_they_do_at_the_average_load(talking: Plan) -> None:
    """9 requests a second of 100 tokens on average, whatever the peak: dollars an hour / (900 x 3600) x 1e6; all to the cent."""
    assert talking.usd_per_hour == pytest.approx(2.95 * talking.gpus + 0.10, abs=1e-9)
    assert talking.usd_per_million_tokens == pytest.approx((talking.usd_per_hour or 0.0) / (900 * 3600) * 1e6)


# ---------------------------------------------------------------- flags


def test_no_flag_is_passed_over_in_silence(tmp_path: Path) -> None:
    """Every option of the command either changes what is asked for, or is refused with its name and a reason."""
    path = tmp_path / "g.yaml"
    path.write_text(written(f"a: {{{law('10ms')}}}"))
    usual: dict[str, Any] = {
        "scenario": str(path), "qps": None, "measured": [], "model": None, "gpu": None, "precision": None, "slo": None, "arrivals": None,
        "prompt_tokens": None, "output_tokens": None, "max_batch": None, "headroom": None, "term": "on-demand", "seed": 0, "trace": None,
        "speed": 1.0, "routing": "random", "prices": None, "availability": None, "zones": None, "survive": False, "autoscale": False,
        "growth": None, "mixed": False, "disaggregate": "auto", "spot": None,
    }  # fmt: skip
    base = graph_plans.asked(usual)
    assert base is not None
    refused = {
        "model": "m", "gpu": "l4", "precision": "fp8", "prompt_tokens": "5", "output_tokens": "5", "max_batch": 4,
        "routing": "round_robin", "mixed": True, "spot": "life=6h",
        "disaggregate": "only", "something_new": 1,
    }  # fmt: skip
    for name, value in refused.items():
        with pytest.raises(BadInput, match=f"--{name.replace('_', '-')}: small has several stages; "):
            graph_plans.asked({**usual, name: value})
    heard = {
        "qps": 5.0, "slo": "e2e_p95<1s", "arrivals": "constant", "headroom": "30%", "term": "spot", "seed": 3, "availability": "99%",
        "zones": 2, "survive": True, "autoscale": True, "growth": "5%",
    }  # fmt: skip
    for name, value in heard.items():
        assert graph_plans.asked({**usual, name: value}) != base, name
