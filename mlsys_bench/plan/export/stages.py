"""Manifests of a plan of several stages: every stage its own Deployment, Service, scaler and promises.

Language models are started as in a plan of one model.  Of other stages a plan knows what they need and not what they are: their images are
named after scenario and component, they listen on one port and count requests as OpenTelemetry's conventions for HTTP servers say.  The
shards of a stage hold different data, so each has a Deployment and a Service of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mlsys_bench import slo
from mlsys_bench.errors import BadInput, unknown
from mlsys_bench.plan import cold_start
from mlsys_bench.plan.export import keda, kserve, kubernetes, openslo, prometheus
from mlsys_bench.plan.export.files import Document, save, yaml_of
from mlsys_bench.plan.export.metrics import HTTP, Indicator, indicator, of_http
from mlsys_bench.plan.export.release import PROMETHEUS, Release, checked_name, release
from mlsys_bench.plan.flags import Engine
from mlsys_bench.stage_fleets import StageFleet, StageSpare
from mlsys_bench.surroundings import Secured
from mlsys_bench.types import FleetItem, Limit, Plan, StagePlan

PORT = 8080
_MORE, _DOWN_S, _LEAST_SHARE = 1.2, 300, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRelease:
    """One stage about to be deployed, or one of its shards."""

    plan: Plan
    fleet: StageFleet
    stage: StagePlan
    item: FleetItem
    name: str
    engine: Release | None  # of a language model

    @property
    def spare(self) -> StageSpare | None:
        """Its replicas to spare, None where none were planned."""
        secured = self.fleet.secured
        return None if secured is None else next(s for s in secured.stages if s.stage == self.stage.stage)

    @property
    def needed(self) -> int:
        """Replicas that hold the limits at peak."""
        return self.spare.needed if self.spare else self.stage.replicas

    @property
    def least(self) -> int:
        """The fewest replicas of a day; all of steady traffic, or where an availability is promised, which is of all replicas all day."""
        scaled = self.fleet.scaled
        return self.stage.replicas if scaled is None or self.fleet.secured else max(1, min(scaled.replicas[self.stage.stage]))

    @property
    def most(self) -> int:
        """The most that a scaler may start."""
        return math.ceil(_MORE * self.stage.replicas) + 1

    @property
    def carried_per_s(self) -> float:
        """Calls per second that one replica may get, so that spares stay to spare."""
        calls_per_s = self.stage.calls * _peak(self.plan)
        if calls_per_s <= 0 or self.stage.utilisation <= 0:
            return 0.0
        capacity_per_s = calls_per_s / self.stage.utilisation / self.stage.replicas
        return self.share * capacity_per_s

    @property
    def share(self) -> float:
        """The share of a replica's capacity that it may use."""
        rule = self.fleet.scaled.rules.get(self.stage.stage) if self.fleet.scaled else None
        steep = rule.growth if rule else 1.0
        return self.fleet.carried.get(self.stage.stage, self.stage.utilisation) * self.needed / self.stage.replicas / steep

    @property
    def labels(self) -> dict[str, str]:
        """Labels that select its pods."""
        return {"app.kubernetes.io/name": self.name}

    def metadata(self) -> Document:
        """Return an object's metadata."""
        own = {"app.kubernetes.io/part-of": _system(self.plan), "app.kubernetes.io/component": checked_name(self.stage.stage)}
        return {"name": self.name, "labels": {**self.labels, **own, "app.kubernetes.io/managed-by": "mlsys"}}


def releases(plan: Plan, engine: Engine = "vllm") -> tuple[StageRelease, ...]:
    """Return every stage of a plan, shards apart.  Raises BadInput for a record of before there were exports of stages."""
    fleet = plan.stage_fleet
    if fleet is None:
        raise BadInput("the plan is an old record of several stages; plan it again to export it")
    found = []
    for stage, item in zip(plan.stages, plan.fleet, strict=True):
        for shard in range(stage.shards):
            name = checked_name(f"{_system(plan)}-{stage.stage}" + (f"-{shard}" if stage.shards > 1 else ""))
            model = None if stage.stage not in fleet.engines else _of_model(plan, fleet, stage, item, name, engine)
            found.append(StageRelease(plan=plan, fleet=fleet, stage=stage, item=item, name=name, engine=model))
    return tuple(found)


def _peak(plan: Plan) -> float:
    """Return the rate that the plan is sized for."""
    from mlsys_bench import workload

    return workload.at_peak(plan.workload).rate_per_s


def _system(plan: Plan) -> str:
    return checked_name(plan.scenario or plan.model)


def _of_model(plan: Plan, fleet: StageFleet, stage: StagePlan, item: FleetItem, name: str, engine: Engine) -> Release:
    """Return a language model's stage as a plan of one model."""
    own = fleet.engines[stage.stage]
    devices = max(item.tp * item.attention_dp, item.ep) * item.pp
    alone = replace(
        plan, model=own.model, fleet=(item,), replicas=stage.replicas, gpus=stage.replicas * devices, gpu=item.gpu,
        devices_per_replica=devices, profile=stage.profile, max_batch=own.max_batch, max_step_tokens=own.max_step_tokens,
        kv_tokens_per_replica=own.kv_tokens_per_replica, workload=replace(plan.workload, rate_per_s=_peak(plan) * stage.calls),
        predicted={f"e2e_{stat}_s": value for stat, value in stage.latencies_s.items()}, stages=(),
    )  # fmt: skip
    spare = next((s for s in fleet.secured.stages if s.stage == stage.stage), None) if fleet.secured else None
    return release(
        alone,
        engine,
        name=name,
        secured=None if spare is None else _secured(fleet, spare),
        scaled=fleet.scaled.engines.get(stage.stage) if fleet.scaled else None,
    )


def _secured(fleet: StageFleet, spare: StageSpare) -> Secured:
    """Return the spares of one stage as those of a plan of one model."""
    whole = fleet.secured
    assert whole is not None
    away = 1 - spare.availability
    return Secured(
        needed=spare.needed, replicas=spare.replicas, spare=spare.replicas - spare.needed, zones=spare.zones, spot=(),
        survives_zone=whole.survives_zone, binds=whole.binds, objective=whole.objective, availability=spare.availability,
        interval=(spare.availability, spare.availability), downtime_min_per_year=525_600 * away,
        downtime_interval=(525_600 * away, 525_600 * away), floor_availability=spare.availability,
        replica_availability=spare.replica_mtbf_s / (spare.replica_mtbf_s + spare.replica_repair_s), replica_mtbf_s=spare.replica_mtbf_s,
        replica_repair_s=spare.replica_repair_s, provenance=whole.provenance, assumptions=(),
    )  # fmt: skip


# ---------------------------------------------------------------- Kubernetes


def k8s(found: tuple[StageRelease, ...]) -> list[Document]:
    """Return Deployment, Service and PodDisruptionBudget of every stage, and a HorizontalPodAutoscaler of those on vCPUs."""
    return [document for of in found for document in (_served(of) if of.engine is None else kubernetes.documents(of.engine))]


def _served(of: StageRelease) -> Iterator[Document]:
    spare = of.stage.replicas - of.needed
    yield {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": of.metadata(),
        "spec": {
            "replicas": of.stage.replicas,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": spare, "maxSurge": 0 if spare else 1}},
            "selector": {"matchLabels": of.labels},
            "template": {"metadata": {"labels": of.labels}, "spec": _pod(of)},
        },
    }
    ports = [{"name": "http", "port": 80, "targetPort": "http"}]
    yield {"apiVersion": "v1", "kind": "Service", "metadata": of.metadata(), "spec": {"selector": of.labels, "ports": ports}}
    yield {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": of.metadata(),
        "spec": {**({"minAvailable": of.needed} if spare else {"maxUnavailable": 1}), "selector": {"matchLabels": of.labels}},
    }
    if of.item.gpu == "vcpu":
        yield _scaler(of)


def _pod(of: StageRelease) -> Document:
    zones = of.fleet.secured.zones if of.fleet.secured else 1
    must = {"minDomains": zones} if zones > 1 else {}
    selector = {"labelSelector": {"matchLabels": of.labels}}
    otherwise = "DoNotSchedule" if zones > 1 else "ScheduleAnyway"
    zoned = {"maxSkew": 1, "topologyKey": kubernetes.ZONE, "whenUnsatisfiable": otherwise, **must, **selector}
    apart = {"maxSkew": 1, "topologyKey": kubernetes.HOST, "whenUnsatisfiable": "ScheduleAnyway", **selector}
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {
        "terminationGracePeriodSeconds": max(30, math.ceil(2 * of.stage.latencies_s.get("p99", 0.0))),
        **({} if of.item.gpu == "vcpu" else {"tolerations": tolerations}),
        "topologySpreadConstraints": [zoned, apart],
        "containers": [_container(of)],
    }


def _container(of: StageRelease) -> Document:
    component = of.fleet.components.get(of.stage.stage, of.stage.stage)
    probe = {"httpGet": {"path": "/health", "port": "http"}, "timeoutSeconds": 5}
    start_s = cold_start.of_service(of.fleet.memory_bytes.get(of.stage.stage, 0.0)).total_s
    return {
        "name": "stage",
        "image": f"{_system(of.plan)}/{checked_name(component)}:latest",
        "env": [{"name": "STAGE", "value": of.stage.stage}, *_shard(of)],
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": _resources(of),
        "startupProbe": {**probe, "periodSeconds": 10, "failureThreshold": max(3, math.ceil(2 * start_s / 10))},
        "readinessProbe": {**probe, "periodSeconds": 5, "failureThreshold": 2},
        "livenessProbe": {**probe, "periodSeconds": 10, "failureThreshold": 6},
    }


def _shard(of: StageRelease) -> list[Document]:
    if of.stage.shards == 1:
        return []
    return [{"name": "SHARD", "value": of.name.rpartition("-")[2]}, {"name": "SHARDS", "value": str(of.stage.shards)}]


def _resources(of: StageRelease) -> Document:
    """Return what a pod asks for; memory is a limit too, vCPUs are not: a limit throttles before they are used up."""
    memory = of.fleet.memory_bytes.get(of.stage.stage, 0.0)
    held = {"memory": f"{math.ceil(memory / 1e6)}M"} if memory else {}
    if of.item.gpu != "vcpu":
        gpus = {"nvidia.com/gpu": str(of.item.tp)}
        return {"limits": {**gpus, **held}, "requests": {**gpus, **held}}
    vcpus = float((of.item.instance or "1").split()[0])
    cpu = f"{vcpus:g}" if vcpus == int(vcpus) else f"{math.ceil(1000 * vcpus)}m"
    return {**({"limits": held} if held else {}), "requests": {"cpu": cpu, **held}}


def _scaler(of: StageRelease) -> Document:
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": of.metadata(),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": of.name},
            "minReplicas": of.least,
            "maxReplicas": of.most,
            "metrics": [
                {
                    "type": "Resource",
                    "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": _percent(of.share)}},
                }
            ],
            "behavior": {
                "scaleUp": {"stabilizationWindowSeconds": 0, "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}]},
                "scaleDown": {"stabilizationWindowSeconds": _DOWN_S, "policies": [{"type": "Percent", "value": 10, "periodSeconds": 60}]},
            },
        },
    }


def _percent(share: float) -> int:
    return max(round(100 * max(share, _LEAST_SHARE)), 1)


# ---------------------------------------------------------------- KEDA, KServe


def scaled_objects(found: tuple[StageRelease, ...]) -> list[Document]:
    """Return a ScaledObject of every stage that anybody comes to."""
    return [document for of in found for document in (_triggered(of) if of.engine is None else keda.documents(of.engine))]


def _triggered(of: StageRelease) -> Iterator[Document]:
    if of.carried_per_s <= 0:
        return
    trigger = {
        "type": "prometheus",
        "name": "rate",
        "metricType": "AverageValue",
        "metadata": {
            "serverAddress": PROMETHEUS,
            "query": f'sum(rate({HTTP}_count{{job="{of.name}"}}[1m]))',
            "threshold": f"{of.carried_per_s:.6g}",
            "ignoreNullValues": "false",
        },
    }
    yield {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": of.metadata(),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": of.name},
            "pollingInterval": 15,
            "minReplicaCount": of.least,
            "maxReplicaCount": of.most,
            "fallback": {"failureThreshold": 3, "replicas": of.stage.replicas},
            "triggers": [trigger],
        },
    }


def inference_services(found: tuple[StageRelease, ...]) -> list[Document]:
    """Return the InferenceService of every language model.  Raises BadInput where there is none."""
    models = [of.engine for of in found if of.engine is not None]
    if not models:
        raise BadInput(f"{found[0].plan.scenario} has no language model, and KServe serves models; take --export k8s")
    return [document for of in models for document in kserve.documents(of)]


# ---------------------------------------------------------------- promises


def indicators(found: tuple[StageRelease, ...]) -> Iterator[tuple[str, Indicator]]:
    """Yield the limits that counters can tell, each with the service it is promised of: the whole at its entry, and stages on their own."""
    plan, fleet = found[0].plan, found[0].fleet
    door = next((of.name for of in found if of.stage.stage == fleet.entry), _system(plan))
    for limit in slo.latencies(slo.parse(plan.slo)):
        each = of_http(limit, door)
        if each is not None:
            yield _system(plan), each
    for of in found:
        promised = fleet.promises.get(of.stage.stage, "")
        for limit in slo.latencies(slo.parse(promised)) if promised else ():
            each = of_http(limit, of.name) if of.engine is None else indicator(limit, of.engine.deployment.engine, of.name)
            if each is not None:
                yield of.name, each


def held(found: tuple[StageRelease, ...]) -> str:
    """Return PromQL that is 1 while no cut is wholly away: stages that stand in for each other are added up to 1, cuts multiplied."""
    fleet = found[0].fleet
    assert fleet.secured is not None
    up: dict[str, str] = {}
    for of in found:
        one = f"({prometheus.enough(of.name, of.needed)})"
        up[of.stage.stage] = f"{up[of.stage.stage]} * {one}" if of.stage.stage in up else one
    cuts = [up[cut[0]] if len(cut) == 1 else f"clamp_max({' + '.join(up[name] for name in cut)}, 1)" for cut in fleet.secured.cuts]
    return " * ".join(cuts)


def _promised(found: tuple[StageRelease, ...]) -> Limit | None:
    limits = slo.parse(found[0].plan.slo)
    return next((limit for limit in limits if limit.metric == "availability"), None) if found[0].fleet.secured else None


def _told(target: float) -> str:
    return f"every request gets an answer within the limits {100 * target:g} % of the time: enough replicas up, or what stands in for them"


def open_slos(found: tuple[StageRelease, ...]) -> list[Document]:
    """Return a Service of the whole and of each stage that promises something, and their SLOs."""
    plan = found[0].plan
    title, told = plan.scenario or plan.model, list(indicators(found))
    documents = [openslo.service(name, f"{title}: {plan.slo}") for name in dict.fromkeys([_system(plan), *(name for name, _ in told)])]
    documents += [openslo.latency(name, title, each) for name, each in told]
    limit = _promised(found)
    if limit is not None:
        target = round(limit.limit, 9)
        documents.append(openslo.available(_system(plan), title, target, _told(target), held(found)))
    return documents


def rules(found: tuple[StageRelease, ...]) -> list[Document]:
    """Return the rule file: records and alerts of every promise, and an alert on each stage with too few replicas."""
    plan, limit = found[0].plan, _promised(found)
    services: dict[str, list[prometheus.Objective]] = {_system(plan): []}
    for name, each in indicators(found):
        services.setdefault(name, []).append(prometheus.latency(each))
    if limit is not None:
        services[_system(plan)].append(prometheus.available(_system(plan), limit.limit, _told(limit.limit), held(found)))
    groups = [group for name, each in services.items() for group in prometheus.groups_of(name, each)]
    told = f"limits: {plan.slo} at {_peak(plan):g}/s"
    fewer = [prometheus.too_few(of.name, of.needed, told, f"TooFewReplicas{_camel(of.name, _system(plan))}") for of in found]
    return [{"groups": [*groups, {"name": f"{_system(plan)}-fleet", "rules": fewer}]}]


def _camel(name: str, system: str) -> str:
    return "".join(part.capitalize() for part in name.removeprefix(system).split("-"))


# ---------------------------------------------------------------- the file

KINDS: dict[str, Callable[[tuple[StageRelease, ...]], list[Document]]] = {
    "k8s": k8s,
    "keda": scaled_objects,
    "kserve": inference_services,
    "openslo": open_slos,
    "prometheus-rules": rules,
}


def documents(kind: str, found: tuple[StageRelease, ...]) -> list[Document]:
    """Return the documents of one kind.  Raises UnknownName for another."""
    if kind not in KINDS:
        raise unknown("export", kind, KINDS)
    return KINDS[kind](found)


def heading(kind: str, found: tuple[StageRelease, ...]) -> Iterator[str]:
    """Yield the lines that say what the manifest rests on, and what must be done to it."""
    plan = found[0].plan
    stages = len(plan.stages)
    yield f"mlsys plan: {plan.scenario}, {plan.replicas} replicas of {stages} stages, {_peak(plan):g}/s within {plan.slo}"
    yield f"provenance of the figures: {plan.provenance}"
    served = [of for of in found if of.engine is None]
    if kind == "k8s" and served:
        yield "images of stages that are no language model are named after scenario and component: put yours; they answer /health"
    if kind == "keda":
        yield "KEDA makes HorizontalPodAutoscalers of its own: apply these or those of --export k8s, not both"
    if kind == "kserve" and served:
        yield f"not here, as KServe serves models: {', '.join(dict.fromkeys(of.stage.stage for of in served))}; see --export k8s"
    if kind in ("keda", "openslo", "prometheus-rules") and served:
        yield f"stages that are no language model count their requests as {HTTP}, as OpenTelemetry's conventions say"
    if kind in ("openslo", "prometheus-rules"):
        told = {each.key for _, each in indicators(found)}
        for limit in slo.latencies(slo.parse(plan.slo)):
            if f"{limit.metric}_{limit.stat.replace('.', '_')}" not in told:
                yield f"left out, as no usual counter tells it of the whole: {slo.show_limit(limit)}"
    for of in found:
        if of.engine is not None and kind in ("k8s", "kserve"):
            yield from (f"{of.stage.stage}: {line}" for line in list(of.engine.heading())[2:])


def text(kind: str, plan: Plan, engine: Engine = "vllm") -> str:
    """Return the manifest as YAML, with where it comes from on top."""
    found = releases(plan, engine)
    return yaml_of(documents(kind, found), heading(kind, found))


def write(asked: str, plan: Plan, engine: Engine = "vllm") -> Path:
    """Write what `--export KIND[:DIR]` asks for, as SCENARIO-KIND.yaml, and return the file."""
    kind, _, folder = asked.partition(":")
    return save(asked, folder, f"{_system(plan)}-{kind}.yaml", text(kind, plan, engine))
