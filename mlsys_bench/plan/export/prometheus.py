"""Prometheus rules of a plan's promises: error ratios over several windows, and alerts on how fast the error budget burns.

Each alert needs a long window, so that it matters, and a twelfth of it, so that it is still going on: 14.4 times the budget's pace over 1 h
and 5 min and 6 times over 6 h and 30 min page, once over 3 d and 6 h makes a ticket; they spend 2 %, 5 % and 10 % of a 30-day budget.
Source: The Site Reliability Workbook (Google), ch. 5, table 5-8, sre.google/workbook/alerting-on-slos, as quoted in documents read
2026-11-21.  A pace that no ratio of errors can reach (14.4 times 10 % is above 1) is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlsys_bench import slo, units
from mlsys_bench.plan.export.metrics import Indicator, indicator
from mlsys_bench.plan.export.release import Release

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Burn:
    """One alert: burning the budget so many times too fast over both windows."""

    pace: float
    long: str
    short: str
    severity: str


BURNS = (Burn(14.4, "1h", "5m", "page"), Burn(6.0, "6h", "30m", "page"), Burn(1.0, "3d", "6h", "ticket"))
WINDOWS = tuple(dict.fromkeys(window for burn in BURNS for window in (burn.short, burn.long)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A share of errors allowed, and the share seen over a window as PromQL."""

    key: str
    budget: float
    told: str
    errors: str  # with WINDOW
    first: tuple[Document, ...] = ()  # records it stands on


def documents(of: Release) -> list[Document]:
    """Return the rule file: one group of records and one of alerts for every promise that counters can tell."""
    found = list(objectives(of))
    fewer = too_few(of.name, of.needed, f"limits: {of.plan.slo} at {of.plan.workload.rate_per_s:g}/s")
    return [{"groups": [*groups_of(of.name, found), {"name": f"{of.name}-fleet", "rules": [fewer]}]}]


def groups_of(name: str, found: Sequence[Objective]) -> list[Document]:
    """Return the groups of records and of alerts of a service's objectives."""
    groups = [{"name": f"{name}-{each.key}-records", "rules": list(_records(name, each))} for each in found]
    return groups + [{"name": f"{name}-{each.key}-alerts", "rules": list(_alerts(name, each))} for each in found]


def objectives(of: Release) -> Iterator[Objective]:
    """Yield the promises of the plan."""
    for limit in slo.latencies(of.limits):
        each = indicator(limit, of.deployment.engine, of.name)
        if each is not None:
            yield latency(each)
    for limit in of.limits:
        if limit.metric == "availability":
            told = f"at least {of.needed} replicas up {100 * limit.limit:g} % of the time"
            yield available(of.name, limit.limit, told, enough(of.name, of.needed))


def latency(each: Indicator) -> Objective:
    """Return a limit on a latency as an objective."""
    near = "" if each.is_exact else f" (counted at {units.show_s(each.bucket_s)}, the nearest bucket below)"
    return Objective(
        key=each.key,
        budget=round(1 - each.target, 9),
        told=f"{100 * each.target:g} % of requests within {units.show_s(each.limit_s)}{near}",
        errors=f"1 - sum(rate({each.good}[WINDOW])) / sum(rate({each.total}[WINDOW]))",
    )


def available(name: str, target: float, told: str, held: str) -> Objective:
    """Return an availability as an objective: `held` is PromQL that is 1 while it is kept and 0 else."""
    kept = f"{name.replace('-', '_')}:availability_held:bool"
    return Objective(
        key="availability", budget=round(1 - target, 9), told=told, errors=f"1 - avg_over_time({kept}[WINDOW])",
        first=({"record": kept, "expr": held},),
    )  # fmt: skip


def enough(job: str, needed: int) -> str:
    """Return PromQL that is 1 while so many replicas are up and 0 else, when none reports too."""
    return f'(sum(up{{job="{job}"}}) or vector(0)) >= bool {needed}'


def record(name: str, key: str, window: str) -> str:
    """Return the name of a recorded error ratio, level:metric:operation."""
    return f"{name.replace('-', '_')}:{key}_errors:ratio_{window}"


def _records(name: str, each: Objective) -> Iterator[Document]:
    yield from each.first
    for window in WINDOWS:
        yield {"record": record(name, each.key, window), "expr": each.errors.replace("WINDOW", window), "labels": {"slo": each.key}}


def _alerts(name: str, each: Objective) -> Iterator[Document]:
    for burn in BURNS:
        most = burn.pace * each.budget
        if most >= 1:
            continue
        short, long = record(name, each.key, burn.short), record(name, each.key, burn.long)
        yield {
            "alert": f"{_camel(each.key)}BudgetBurns{burn.severity.capitalize()}{_camel(burn.long)}",
            "expr": f"{long} > {most:.6g} and {short} > {most:.6g}",
            "labels": {"severity": burn.severity, "service": name, "slo": each.key},
            "annotations": {
                "summary": f"{name}: the error budget of {each.key} burns {burn.pace:g} times too fast",
                "description": f"promise: {each.told}; errors over {burn.long} are {{{{ $value | humanizePercentage }}}}",
            },
        }


def too_few(name: str, needed: int, told: str, alert: str = "TooFewReplicas") -> Document:
    """Return the alert on fewer replicas than hold the limits at peak."""
    return {
        "alert": alert,
        "expr": f'sum(up{{job="{name}"}}) < {needed} or absent(up{{job="{name}"}})',
        "for": "5m",
        "labels": {"severity": "page", "service": name},
        "annotations": {"summary": f"{name}: fewer than the {needed} replicas that hold the limits at peak", "description": told},
    }


def _camel(text: str) -> str:
    return "".join(part.capitalize() for part in text.replace("-", "_").split("_"))
