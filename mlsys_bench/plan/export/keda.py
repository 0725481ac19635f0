"""A KEDA ScaledObject (keda.sh/v1alpha1, 2.10 and later) that follows the load with the rule of the plan.

Source: keda.sh, ScaledObject specification and Prometheus scaler, read 2026-11-21.  KEDA hands the query to a HorizontalPodAutoscaler as an
external metric of type AverageValue: desired = ceil(value / threshold), whatever the number of pods, so starting pods count.
"""

from __future__ import annotations

import math
from typing import Any

from mlsys_bench.plan.export.metrics import of_engine
from mlsys_bench.plan.export.release import Release
from mlsys_bench.surroundings import Autoscaled

Document = dict[str, Any]
_DOWN_S, _MOST_DOWN_S = 300, 3600  # the HorizontalPodAutoscaler's default, and the longest it takes


def documents(of: Release) -> list[Document]:
    """Return the ScaledObject.

    Without an autoscaling rule replicas follow the rate of requests, each taking what it is planned for.
    """
    least, most = _bounds(of)
    rule = of.scaled.rule if of.scaled else None
    return [
        {
            "apiVersion": "keda.sh/v1alpha1",
            "kind": "ScaledObject",
            "metadata": of.metadata(),
            "spec": {
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": of.name},
                "pollingInterval": math.ceil(rule.interval_s) if rule else 15,
                "minReplicaCount": least,
                "maxReplicaCount": most,
                "fallback": {"failureThreshold": 3, "replicas": of.replicas},
                "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behavior(of)}},
                "triggers": [_trigger(of)],
            },
        }
    ]


def threshold(of: Release) -> tuple[str, float]:
    """Return the metric that is followed, and what one replica should carry of it."""
    if of.scaled is not None:
        return of.scaled.rule.metric, of.scaled.rule.target
    return "rate", of.plan.workload.rate_per_s / of.needed


def query(of: Release, metric: str) -> str:
    """Return the fleet's load as PromQL: requests that run or wait, or requests per second."""
    names, job = of_engine(of.deployment.engine), f'job="{of.name}"'
    if metric == "rate":
        return f"sum(rate({names.arrived}{{{job}}}[1m]))"
    labels = ",".join(filter(None, (job, names.selector)))
    return f"sum({names.running}{{{labels}}}) + sum({names.waiting}{{{labels}}})"


def _trigger(of: Release) -> Document:
    metric, target = threshold(of)
    return {
        "type": "prometheus",
        "name": metric.replace("_", "-"),
        "metricType": "AverageValue",
        "metadata": {
            "serverAddress": of.prometheus,
            "query": query(of, metric),
            "threshold": f"{target:.6g}",
            "ignoreNullValues": "false",  # a series that is gone is no load of zero
        },
    }


def _bounds(of: Release) -> tuple[int, int]:
    """Return the fewest and the most replicas.  Without a rule the plan's own: it holds the peak.  An availability is of all, all day."""
    rule = of.scaled.rule if of.scaled else None
    least = of.replicas if of.secured else max(1, rule.least) if rule else 1
    return least, max(rule.most, of.replicas) if rule else of.replicas


def _behavior(of: Release) -> Document:
    scaled: Autoscaled | None = of.scaled
    delay_s = min(_MOST_DOWN_S, math.ceil(max(scaled.rule.down_delay_s, scaled.lead_s) if scaled else max(_DOWN_S, of.start_s)))
    return {
        "scaleUp": {"stabilizationWindowSeconds": 0, "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}]},
        "scaleDown": {"stabilizationWindowSeconds": delay_s, "policies": [{"type": "Percent", "value": 10, "periodSeconds": 60}]},
    }
