"""OpenSLO v1 objects of a plan's promises: each limit as a ratio of good events.

Source: OpenSLO/OpenSLO README.md (v1), read 2026-11-21.  `ttft p95 < 500 ms` becomes: 95 % of requests within 0.5 s, by occurrences.
"""

from __future__ import annotations

from typing import Any

from mlsys_bench import slo, units
from mlsys_bench.plan.export.metrics import Indicator, indicator
from mlsys_bench.plan.export.release import Release, checked_name

Document = dict[str, Any]
WINDOW = "30d"


def documents(of: Release) -> list[Document]:
    """Return the Service, and one SLO for every limit that counters can tell."""
    found = [each for limit in slo.latencies(of.limits) if (each := indicator(limit, of.deployment.engine, of.name)) is not None]
    shares = [_availability(of, round(limit.limit, 9)) for limit in of.limits if limit.metric == "availability"]
    return [_service(of), *(_latency(of, each) for each in found), *shares]


def _service(of: Release) -> Document:
    return {
        "apiVersion": "openslo/v1",
        "kind": "Service",
        "metadata": {"name": of.name},
        "spec": {"description": f"{of.plan.model} on {of.replicas} replicas; limits {of.plan.slo}"},
    }


def _latency(of: Release, each: Indicator) -> Document:
    near = "" if each.is_exact else f"; counted at {units.show_s(each.bucket_s)}, the nearest bucket below"
    ratio = {
        "counter": True,
        "good": _source(f"sum({each.good})"),
        "total": _source(f"sum({each.total})"),
    }
    told = f"{100 * each.target:g} % of requests within {units.show_s(each.limit_s)}{near}"
    return _slo(of, each.key, told, ratio, each.target)


def _availability(of: Release, target: float) -> Document:
    """Return the share of time in which enough replicas are up to hold the limits at peak."""
    ratio = {"rawType": "success", "raw": _source(f'(sum(up{{job="{of.name}"}}) or vector(0)) >= bool {of.needed}')}
    told = f"at least {of.needed} replicas up, which hold the limits at peak, {100 * target:g} % of the time"
    return _slo(of, "availability", told, ratio, target)


def _slo(of: Release, key: str, told: str, ratio: Document, target: float) -> Document:
    name = checked_name(f"{of.name}-{key}")
    return {
        "apiVersion": "openslo/v1",
        "kind": "SLO",
        "metadata": {"name": name, "displayName": f"{of.plan.model} {key}"},
        "spec": {
            "description": told,
            "service": of.name,
            "indicator": {"metadata": {"name": name}, "spec": {"ratioMetric": ratio}},
            "timeWindow": [{"duration": WINDOW, "isRolling": True}],
            "budgetingMethod": "Occurrences",
            "objectives": [{"displayName": told[:60], "target": target}],
        },
    }


def _source(query: str) -> Document:
    return {"metricSource": {"type": "Prometheus", "spec": {"query": query}}}
