"""Traffic and promises of a scenario: the parts that every scenario has, whatever serves it."""

from __future__ import annotations

from typing import Any

from mlsys_bench import slo, units, workload
from mlsys_bench.errors import ScenarioError, did_you_mean
from mlsys_bench.scenario.values import mapping, named, number, section, text, whole
from mlsys_bench.types import SLO, Lengths, Workload

KEYS = ("rate", "arrivals", "prompt", "output", "source")
LENGTH_KEYS = ("dist", "mean", "cv", "max")
TENANT_KEYS = ("share", "rate", "prompt", "output", "slo", "priority")
DISTS = ("constant", "lognormal", "uniform")
NO_TOKENS = Lengths(mean=0)


def traffic(value: object, where: str, *, tokens: bool = True) -> Workload:
    """Return the traffic; without `tokens` its requests need not carry any."""
    given = section(value, KEYS, where, "traffic", optional=() if tokens else ("prompt", "output"))
    arrivals = text(given["arrivals"], f"{where}: traffic.arrivals")
    named(workload.parse_arrivals, arrivals, f"{where}: traffic.arrivals")
    return Workload(
        rate_per_s=workload.checked_rate(units.per_s(given["rate"], f"{where}: traffic.rate"), f"{where}: traffic.rate"),
        arrivals=arrivals,
        prompt_tokens=lengths(given["prompt"], where, "traffic.prompt") if "prompt" in given else NO_TOKENS,
        output_tokens=lengths(given["output"], where, "traffic.output") if "output" in given else NO_TOKENS,
        source=text(given["source"], f"{where}: traffic.source"),
    )


def lengths(value: object, where: str, path: str) -> Lengths:
    """Return token counts: 128, or {dist: lognormal, mean: 900, cv: 1.2, max: 8192}; cv and max as the law needs them."""
    here = f"{where}: {path}"
    if not isinstance(value, dict):
        return workload.checked_lengths(Lengths(mean=number(value, here)), here)
    law = section(value, LENGTH_KEYS, where, path, optional=("cv", "max"))
    if law["dist"] not in DISTS:
        raise ScenarioError(f"{here}.dist: unknown law {law['dist']!r}{did_you_mean(str(law['dist']), DISTS)}")
    if (law["dist"] == "constant") == ("cv" in law):
        raise ScenarioError(f"{here}: a {law['dist']} law {'has no' if 'cv' in law else 'needs a'} cv (coefficient of variation)")
    found = Lengths(
        dist=law["dist"],
        mean=number(law["mean"], f"{here}.mean"),
        cv=number(law["cv"], f"{here}.cv") if "cv" in law else 0.0,
        max=whole(law["max"], f"{here}.max") if "max" in law else None,
    )
    return workload.checked_lengths(found, here)


def promises(value: object, where: str) -> SLO:
    """Return limits, at least one."""
    limits = mapping(value, where)
    if not limits:
        raise ScenarioError(f"{where}: holds no limit; write it like ttft_p95: 500ms")
    return slo.from_mapping(limits, where)


def headroom(value: Any, where: str) -> float:
    """Return the share of capacity that stays free."""
    share = units.fraction(value, where)
    if not 0 <= share < 1:
        raise ScenarioError(f"{where}: {value} must lie between 0% and 100%")
    return share
