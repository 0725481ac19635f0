"""Deployment, Service and PodDisruptionBudget of a plan (Kubernetes 1.27 and later)."""

from __future__ import annotations

import math
from typing import Any

from mlsys_bench.errors import UnknownName
from mlsys_bench.hardware import aliases, find
from mlsys_bench.plan import command
from mlsys_bench.plan.export.release import Release, one_node, startup_failures
from mlsys_bench.plan.flags import STARTS

Document = dict[str, Any]
ZONE, HOST = "topology.kubernetes.io/zone", "kubernetes.io/hostname"
_GRACE_LEAST_S = 30
_LABELLED = ("aws", "gcp", "azure")  # clouds whose nodes carry the name of the instance that price lists use


def documents(of: Release) -> list[Document]:
    """Return Deployment, Service and PodDisruptionBudget."""
    one_node(of)
    return [_deployment(of), _service(of), _budget(of)]


def pod(of: Release) -> Document:
    """Return the pod of one replica: the container, where it may run and how long it may take to stop."""
    return {
        "terminationGracePeriodSeconds": max(_GRACE_LEAST_S, math.ceil(2 * of.plan.predicted.get("e2e_p99_s", 0.0))),
        **({"nodeSelector": selector} if (selector := _nodes(of)) else {}),
        "tolerations": [{"key": of.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}],
        "topologySpreadConstraints": _spread(of),
        "containers": [container(of)],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}}],
    }


def container(of: Release, name: str = "engine") -> Document:
    """Return the engine's container."""
    words = command.arguments(of.deployment)
    start = len(STARTS[of.deployment.engine])
    gpus = {of.gpu_resource: str(of.plan.devices_per_replica)}
    return {
        "name": name,
        "image": of.deployment.image,
        "command": words[:start],
        "args": words[start:],
        "env": [
            {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf-token", "key": "token", "optional": True}}},
            *_transfer_env(of),
        ],
        "ports": [{"name": "http", "containerPort": of.port}],
        "resources": {"limits": gpus, "requests": gpus},
        "startupProbe": {**_probe(of), "periodSeconds": 10, "failureThreshold": startup_failures(of)},
        "readinessProbe": {**_probe(of), "periodSeconds": 5, "failureThreshold": 2},
        "livenessProbe": {**_probe(of), "periodSeconds": 10, "failureThreshold": 6},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],  # noqa: S108  tensor parallel ranks share it
    }


def _transfer_env(of: Release) -> list[Document]:
    """Return where vLLM's connector is reached for its handshake: other pods must find it, the default is this host only."""
    if "--kv-transfer-config" not in of.deployment.other:
        return []
    return [{"name": "VLLM_NIXL_SIDE_CHANNEL_HOST", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]


def _probe(of: Release) -> Document:
    return {"httpGet": {"path": "/health", "port": "http"}, "timeoutSeconds": 5}


def _deployment(of: Release) -> Document:
    spare = of.replicas - of.needed
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": of.metadata(),
        "spec": {
            "replicas": of.replicas,
            "progressDeadlineSeconds": max(600, math.ceil(3 * of.start_s)),
            # spare replicas make way for new ones; without any a new one comes first, on a GPU that must be free
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": spare, "maxSurge": 0 if spare else 1}},
            "selector": {"matchLabels": of.labels},
            "template": {"metadata": {"labels": of.labels}, "spec": pod(of)},
        },
    }


def _service(of: Release) -> Document:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": of.metadata(),
        "spec": {"selector": of.labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
    }


def _budget(of: Release) -> Document:
    """Return how many replicas a drain may take: those to spare; where there are none one at a time, or no node could be drained."""
    spare = of.replicas - of.needed
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": of.metadata(),
        "spec": {**({"minAvailable": of.needed} if spare else {"maxUnavailable": 1}), "selector": {"matchLabels": of.labels}},
    }


def _spread(of: Release) -> list[Document]:
    """Return zones first: a must where one of them may be lost, else a wish; then nodes, a wish."""
    zoned = of.secured is not None and len(of.secured.zones) > 1
    must = {"minDomains": len(of.secured.zones)} if zoned and of.secured else {}
    return [
        _constraint(of, ZONE, "DoNotSchedule" if zoned else "ScheduleAnyway", must),
        _constraint(of, HOST, "ScheduleAnyway", {}),
    ]


def _constraint(of: Release, key: str, otherwise: str, more: Document) -> Document:
    return {"maxSkew": 1, "topologyKey": key, "whenUnsatisfiable": otherwise, **more, "labelSelector": {"matchLabels": of.labels}}


def _nodes(of: Release) -> dict[str, str]:
    """Return the nodes a pod may run on: of the instance rented where its cloud labels nodes so, else by the GPU."""
    offer = of.offer
    if offer is not None and offer.provider in _LABELLED:
        return {"node.kubernetes.io/instance-type": offer.instance}
    try:
        names = [name for name in aliases(find(of.plan.fleet[0].gpu)) if name.startswith("NVIDIA ")]
    except UnknownName:
        return {}
    return {"nvidia.com/gpu.product": names[0].replace(" ", "-")} if names else {}
