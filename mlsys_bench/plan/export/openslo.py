"""OpenSLO v1 objects of a plan's promises: each limit as a ratio of good events.

Source: OpenSLO/OpenSLO README.md (v1), read 2026-11-21.  `ttft p95 < 500 ms` becomes: 95 % of requests within 0.5 s, by occurrences.
"""

from __future__ import annotations

from typing import Any

from mlsys_bench import slo, units
from mlsys_bench.plan.export.metrics import Indicator, indicator
from mlsys_bench.plan.export.prometheus import enough
from mlsys_bench.plan.export.release import Release, checked_name

Document = dict[str, Any]
WINDOW = "30d"


def documents(of: Release) -> list[Document]:
    """Return the Service, and one SLO for every limit that counters can tell."""
    found = [each for limit in slo.latencies(of.limits) if (each := indicator(limit, of.deployment.engine, of.name)) is not None]
    objectives = [latency(of.name, of.plan.model, each) for each in found]
    for limit in of.limits:
        if limit.metric == "availability":
            told = f"at least {of.needed} replicas up, which hold the limits at peak, {100 * limit.limit:g} % of the time"
            objectives.append(available(of.name, of.plan.model, round(limit.limit, 9), told, enough(of.name, of.needed)))
    return [service(of.name, f"{of.plan.model} on {of.replicas} replicas; limits {of.plan.slo}"), *objectives]


def service(name: str, told: str) -> Document:
    """Return a Service."""
    return {"apiVersion": "openslo/v1", "kind": "Service", "metadata": {"name": name}, "spec": {"description": told}}


def latency(name: str, title: str, each: Indicator) -> Document:
    """Return the SLO of a limit on a latency."""
    near = "" if each.is_exact else f"; counted at {units.show_s(each.bucket_s)}, the nearest bucket below"
    ratio = {"counter": True, "good": _source(f"sum({each.good})"), "total": _source(f"sum({each.total})")}
    told = f"{100 * each.target:g} % of requests within {units.show_s(each.limit_s)}{near}"
    return _slo(name, title, each.key, told, ratio, each.target)


def available(name: str, title: str, target: float, told: str, held: str) -> Document:
    """Return the SLO of an availability: the share of time in which `held`, PromQL, is 1."""
    return _slo(name, title, "availability", told, {"rawType": "success", "raw": _source(held)}, target)


def _slo(service_name: str, title: str, key: str, told: str, ratio: Document, target: float) -> Document:
    name = checked_name(f"{service_name}-{key}")
    return {
        "apiVersion": "openslo/v1",
        "kind": "SLO",
        "metadata": {"name": name, "displayName": f"{title} {key}"},
        "spec": {
            "description": told,
            "service": service_name,
            "indicator": {"metadata": {"name": name}, "spec": {"ratioMetric": ratio}},
            "timeWindow": [{"duration": WINDOW, "isRolling": True}],
            "budgetingMethod": "Occurrences",
            "objectives": [{"displayName": told[:60], "target": target}],
        },
    }


def _source(query: str) -> Document:
    return {"metricSource": {"type": "Prometheus", "spec": {"query": query}}}
