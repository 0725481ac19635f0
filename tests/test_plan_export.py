"""Manifests of a plan: parsed back, held against schemas of their formats, rules tried with promtool itself."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlsys_bench.errors import BadInput, UnknownName
from mlsys_bench.plan import autoscale, cold_start, command, course, export, manifests
from mlsys_bench.plan.availability import secured
from mlsys_bench.plan.export import keda
from mlsys_bench.plan.export.metrics import METRICS, bucket_at, indicator
from mlsys_bench.plan.export.prometheus import BURNS
from mlsys_bench.plan.given import measured
from mlsys_bench.plan.reliability import Reliability, Zones
from mlsys_bench.surroundings import Autoscaled, Secured
from mlsys_bench.types import Limit, Plan
from tests import manifest_schemas, sample_records

ENGINES = ("vllm", "sglang", "trtllm")


def a_plan(**changes: Any) -> Plan:
    return dataclasses.replace(sample_records.plan(), slo="ttft_p95<500ms,tpot_p99<60ms,e2e_mean<9s,availability>99.9%", **changes)


def spare() -> Secured:
    """8 needed, 12 in three zones."""
    steady = Reliability(
        gpu_mtbf=measured(1e7, "t"), process_mtbf=measured(1e7, "t"), repair=measured(600, "t"), restart=measured(300, "t")
    )
    return secured(0.999, 200, lambda rate: 8, gpus=1, reliability=steady, zones=Zones(count=3, survive=True))


def followed() -> Autoscaled:
    traffic = course.Course(step_s=900, rates_per_s=(40.0, 80.0, 60.0, 50.0))
    serving = autoscale.Serving(most_per_s=10, capacity_per_s=14, stay_s=6)
    cold = cold_start.ColdStart(
        node=measured(60, "t"), image=measured(20, "t"), weights=measured(20, "t"), graphs=measured(10, "t"), warm_up=measured(10, "t")
    )
    return autoscale.autoscaled(traffic, serving, lambda rate: max(1, round(rate / 10)), cold, runs=1, least=4)


def back(kind: str, of: export.Release) -> list[dict[str, Any]]:
    """Return the documents as a reader of the file gets them."""
    return list(yaml.safe_load_all(export.text(kind, of)))


# ---------------------------------------------------------------- every format


@pytest.mark.parametrize("kind", export.KINDS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("around", [False, True])
def test_every_manifest_is_read_back_and_fits_its_schema(kind: str, engine: Any, around: bool) -> None:
    more = {"secured": spare(), "scaled": followed(), "namespace": "llm"} if around else {}
    of = export.release(a_plan(), engine, **more)  # type: ignore[arg-type]
    if engine == "trtllm" and kind in ("keda", "openslo", "prometheus-rules"):
        if kind != "keda" or not around:
            with pytest.raises(BadInput, match="metrics of trtllm are not known"):
                export.text(kind, of)
        return
    read = back(kind, of)
    assert read == json.loads(json.dumps(export.documents(kind, of)))
    assert [line for document in read for line in manifest_schemas.wrong(document, manifest_schemas.schema_of(document))] == []
    assert "&id" not in export.text(kind, of)


def test_the_schemas_and_their_checker_agree_with_jsonschema() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    of = export.release(a_plan(), secured=spare(), scaled=followed())
    for kind in export.KINDS:
        for document in back(kind, of):
            jsonschema.validate(document, manifest_schemas.schema_of(document))
            broken = {**document, "surprise": 1}
            assert manifest_schemas.wrong(broken, manifest_schemas.schema_of(document)) == ["$: unknown key surprise"]
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(broken, manifest_schemas.schema_of(document))


def test_unknown_kinds_and_fleets_across_nodes_are_refused(tmp_path: Path) -> None:
    of = export.release(a_plan())
    with pytest.raises(UnknownName, match="k8s"):
        export.text("k8", of)
    wide = export.release(a_plan(devices_per_replica=16))
    with pytest.raises(BadInput, match="spans nodes of 8"):
        export.text("k8s", wide)
    written = export.write(f"k8s:{tmp_path / 'out'}", of)
    assert written == tmp_path / "out" / "llama-3-8b-k8s.yaml"
    assert written.read_text() == export.text("k8s", of)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is no folder"):
        export.write(f"k8s:{tmp_path / 'file'}", of)
    assert export.release(a_plan(), name="Llama 3.1/8B!").name == "llama-3-1-8b"
    with pytest.raises(BadInput, match="leaves nothing"):
        export.release(a_plan(), name="///")


# ---------------------------------------------------------------- Kubernetes


def test_the_deployment_runs_the_plans_command_on_the_plans_gpus() -> None:
    of = export.release(a_plan(devices_per_replica=2), secured=spare())
    deployment, service, budget = back("k8s", of)
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert [*container["command"], *container["args"]] == command.arguments(of.deployment)
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert deployment["spec"]["replicas"] == 12
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 4, "maxSurge": 0}
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == {"app.kubernetes.io/name": "llama-3-8b"}
    assert budget["spec"]["minAvailable"] == 8
    zones, hosts = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert (zones["topologyKey"], zones["whenUnsatisfiable"], zones["minDomains"]) == ("topology.kubernetes.io/zone", "DoNotSchedule", 3)
    assert (hosts["topologyKey"], hosts["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    assert container["startupProbe"]["failureThreshold"] * 10 >= 2 * of.start_s
    assert deployment["spec"]["template"]["spec"]["nodeSelector"] == {"node.kubernetes.io/instance-type": "p5.48xlarge"}


def test_where_a_cloud_does_not_label_instances_the_gpu_is_asked_for() -> None:
    plan = sample_records.plan()
    rented = dataclasses.replace(plan.prices[0], provider="nebius", instance="gpu-h100-sxm_8gpu")
    item = dataclasses.replace(plan.fleet[0], instance="nebius gpu-h100-sxm_8gpu")
    deployment, _, _ = back("k8s", export.release(dataclasses.replace(plan, fleet=(item,), prices=(rented,))))
    assert deployment["spec"]["template"]["spec"]["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}


def test_without_spares_a_new_replica_comes_first_and_one_may_be_drained() -> None:
    deployment, _, budget = back("k8s", export.release(a_plan()))
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert budget["spec"]["maxUnavailable"] == 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["k8s", "kserve"])
def test_a_manifest_is_read_back_as_the_deployment_it_was_made_from(tmp_path: Path, engine: Any, kind: str) -> None:
    of = export.release(a_plan(), engine)
    path = export.write(f"{kind}:{tmp_path}", of)
    (found,) = manifests.read(str(path))
    assert command.difference(of.deployment, found) == []
    assert (found.replicas, found.gpus, found.unknown) == (8, 1, ())


# ---------------------------------------------------------------- KEDA


def test_the_trigger_carries_the_rule_of_the_plan() -> None:
    scaled = followed()
    (found,) = back("keda", export.release(a_plan(), scaled=scaled))
    spec = found["spec"]
    assert spec["scaleTargetRef"]["name"] == "llama-3-8b"
    assert spec["minReplicaCount"] == 4
    assert spec["maxReplicaCount"] >= scaled.rule.most
    trigger = spec["triggers"][0]
    assert float(trigger["metadata"]["threshold"]) == pytest.approx(scaled.rule.target, rel=1e-5)
    assert trigger["metricType"] == "AverageValue"
    assert "vllm:num_requests_running" in trigger["metadata"]["query"]
    assert "vllm:num_requests_waiting" in trigger["metadata"]["query"]
    down = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    assert down["stabilizationWindowSeconds"] >= max(scaled.rule.down_delay_s, scaled.lead_s)


@pytest.mark.parametrize("scaled", [None, followed()])
def test_where_an_availability_is_promised_all_replicas_stay(scaled: Autoscaled | None) -> None:
    """The rule file counts fewer than the 8 needed as an outage at any hour, so 12 stay whatever the load."""
    of = export.release(a_plan(), secured=spare(), scaled=scaled)
    (keda_,), (kserve,) = back("keda", of), back("kserve", of)
    assert keda_["spec"]["minReplicaCount"] == kserve["spec"]["predictor"]["minReplicas"] == 12
    assert keda_["spec"]["maxReplicaCount"] >= 12
    assert ("12 replicas stay" in export.text("keda", of)) == (scaled is not None)
    (free,) = back("keda", export.release(a_plan()))
    assert free["spec"]["minReplicaCount"] == 1


def test_without_a_rule_replicas_follow_the_rate_each_is_planned_for() -> None:
    of = export.release(a_plan())
    assert keda.threshold(of) == ("rate", 25.0)
    assert "rate(vllm:time_to_first_token_seconds_count" in keda.query(of, "rate")
    assert 'tp_rank=~"0|"' in keda.query(export.release(a_plan(), "sglang"), "in_flight")


# ---------------------------------------------------------------- promises as ratios


def test_a_percentile_is_a_share_of_requests_at_or_below_a_bucket() -> None:
    exact = indicator(Limit(metric="ttft", stat="p95", limit=0.5), "vllm", "x")
    assert exact is not None
    assert (exact.target, exact.bucket_s, exact.is_exact) == (0.95, 0.5, True)
    assert exact.good == 'vllm:time_to_first_token_seconds_bucket{job="x",le="0.5"}'
    below = indicator(Limit(metric="tpot", stat="p99.9", limit=0.06), "vllm", "x")
    assert below is not None
    assert (below.key, below.target, below.bucket_s, below.is_exact) == ("tpot_p99_9", 0.999, 0.05, False)
    assert indicator(Limit(metric="ttft", stat="mean", limit=0.5), "vllm", "x") is None
    assert indicator(Limit(metric="tpot", stat="p95", limit=0.05), "sglang", "x") is None
    assert indicator(Limit(metric="itl", stat="p95", limit=0.001), "sglang", "x") is None
    assert all(list(b) == sorted(b) for m in METRICS.values() for _, b in m.histograms.values())
    assert bucket_at(2.4, (1.0, 2.5)) == 1.0


def test_openslo_says_the_same_as_the_plan() -> None:
    service, ttft, tpot, available = back("openslo", export.release(a_plan(), secured=spare()))
    assert service["kind"] == "Service"
    assert ttft["spec"]["objectives"][0]["target"] == 0.95
    assert tpot["spec"]["objectives"][0]["target"] == 0.99
    assert "nearest bucket below" in tpot["spec"]["description"]
    assert available["spec"]["objectives"][0]["target"] == 0.999
    assert ">= bool 8" in available["spec"]["indicator"]["spec"]["ratioMetric"]["raw"]["metricSource"]["spec"]["query"]
    assert {d["spec"]["service"] for d in (ttft, tpot, available)} == {service["metadata"]["name"]}


def test_paces_no_ratio_can_reach_are_left_out() -> None:
    """A median leaves half of the requests as budget: only once its pace is below 1."""
    (rules,) = back("prometheus-rules", export.release(dataclasses.replace(sample_records.plan(), slo="ttft_p50<500ms")))
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    assert alerts == ["TtftP50BudgetBurnsTicket3d", "TooFewReplicas"]
    assert [round(b.pace * hours / 720, 3) for b, hours in zip(BURNS, (1, 6, 72), strict=True)] == [0.02, 0.05, 0.1]


# ---------------------------------------------------------------- promtool

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian package prometheus)")


def promtool(*words: str) -> subprocess.CompletedProcess[str]:
    assert PROMTOOL is not None
    return subprocess.run([PROMTOOL, *words], capture_output=True, text=True, check=False)


@needs_promtool
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_promtool_accepts_the_rules(tmp_path: Path, engine: Any) -> None:
    path = export.write(f"prometheus-rules:{tmp_path}", export.release(a_plan(), engine, secured=spare()))
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


@needs_promtool
def test_the_alerts_fire_on_a_bad_hour_and_on_lost_replicas_and_not_on_a_good_one(tmp_path: Path) -> None:
    """Promtool plays series: good until 2 h, then 80 % late; 8 of 12 targets up until 3 h, then 7."""
    path = export.write(f"prometheus-rules:{tmp_path}", export.release(a_plan(), secured=spare()))
    ttft = "vllm:time_to_first_token_seconds"
    series = [
        (f'{ttft}_count{{job="llama-3-8b"}}', "0+60x400"),
        (f'{ttft}_bucket{{job="llama-3-8b",le="0.5"}}', "0+60x120 7212+12x280"),
        *((f'up{{job="llama-3-8b",instance="{k}"}}', "1x400" if k else "1x180 0x220") for k in range(8)),
    ]

    def alerts(minute: int, name: str, expected: int) -> dict[str, Any]:
        found = [{"exp_labels": labels[name], "exp_annotations": notes[name]}] * expected
        return {"eval_time": f"{minute}m", "alertname": name, **({"exp_alerts": found} if found else {})}

    rules = {rule["alert"]: rule for g in yaml.safe_load(path.read_text())["groups"] for rule in g["rules"] if "alert" in rule}
    page, few = "TtftP95BudgetBurnsPage1h", "TooFewReplicas"
    labels = {name: rules[name]["labels"] for name in (page, few)}
    notes = {name: dict(rules[name]["annotations"]) for name in (page, few)}
    notes[page]["description"] = notes[page]["description"].replace("{{ $value | humanizePercentage }}", "80%")
    test = {
        "rule_files": [str(path)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series],
                "alert_rule_test": [
                    alerts(110, page, 0),
                    alerts(110, few, 0),
                    alerts(190, page, 1),
                    alerts(181, few, 0),
                    alerts(190, few, 1),
                ],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    done = promtool("test", "rules", str(tmp_path / "test.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
