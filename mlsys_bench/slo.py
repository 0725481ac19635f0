"""Parse, print and check limits: `ttft_p95<500ms,tpot_p99<50ms,goodput>99%`.

The clauses are marginal, each on its own; `goodput>99%` is the joint one: the share of requests that meet all of them.
`chat:ttft_p95<500ms` is promised to the tenant `chat` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mlsys_bench import units
from mlsys_bench.errors import BadInput, did_you_mean
from mlsys_bench.types import SLO, Limit

LATENCIES = ("ttft", "tpot", "itl", "e2e")
SHARES = ("goodput", "availability")
_STAT = re.compile(r"^(mean|p(?:50|[5-9]\d(?:\.\d+)?))$")
TENANT = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
_CLAUSE = re.compile(r"^\s*(?:([A-Za-z0-9][A-Za-z0-9_.-]*)\s*:\s*)?([a-z0-9_.]+)\s*(<=|>=|<|>)\s*(\S.*?)\s*$")


def parse(text: str) -> SLO:
    """Return the limits of a comma-separated line.  Raises BadInput naming the clause."""
    return check_unique(tuple(_clause(part) for part in text.split(",") if part.strip()), text)


def from_mapping(limits: Mapping[str, object], where: str = "slo", tenant: str | None = None) -> SLO:
    """Return the limits of a YAML mapping: {ttft_p95: 500ms, availability: 99.9%}."""
    found = (_limit(key, _text(value, f"{where}.{key}"), f"{where}.{key}", tenant) for key, value in limits.items())
    return check_unique(tuple(found), where)


def show(slo: SLO) -> str:
    """Print limits so that `parse` reads them back."""
    return ",".join(show_limit(limit) for limit in slo)


def show_limit(limit: Limit) -> str:
    """Print one limit: 'ttft_p95<500ms', 'goodput>99%'."""
    if limit.metric in SHARES:
        return f"{key(limit)}>{_exact(limit.limit * 100)}%"
    value, unit = (limit.limit * 1e3, "ms") if limit.limit < 1 else (limit.limit, "s")
    return f"{key(limit)}<{_exact(value)}{unit}"


def key(limit: Limit) -> str:
    """Return the name a limit goes by in records: 'ttft_p95', 'goodput', 'chat:ttft_p95'."""
    figure = limit.metric if limit.metric in SHARES else f"{limit.metric}_{limit.stat}"
    return figure if limit.tenant is None else f"{limit.tenant}:{figure}"


def meets(limit: Limit, value: float) -> bool:
    """Say whether a value keeps the promise."""
    return value > limit.limit if limit.metric in SHARES else value < limit.limit


def latencies(slo: SLO) -> SLO:
    """Return only the limits on latencies."""
    return tuple(limit for limit in slo if limit.metric in LATENCIES)


def of_all(slo: SLO) -> SLO:
    """Return only the limits that name no tenant."""
    return tuple(limit for limit in slo if limit.tenant is None)


def check_unique(slo: SLO, where: str) -> SLO:
    """Return the SLO, or raise when it is empty or limits one figure twice."""
    keys = [key(limit) for limit in slo]
    if not keys:
        raise BadInput(f"{where!r} holds no limit; write it like ttft_p95<500ms,tpot_p99<50ms")
    twice = sorted({k for k in keys if keys.count(k) > 1})
    if twice:
        raise BadInput(f"{where!r} limits {', '.join(twice)} twice")
    return slo


def _clause(text: str) -> Limit:
    found = _CLAUSE.match(text)
    if found is None:
        raise BadInput(f"SLO clause {text.strip()!r} is not METRIC_STAT<LIMIT, e.g. ttft_p95<500ms")
    tenant, name, operator, value = found.groups()
    wanted = ">" if name in SHARES else "<"
    if operator[0] != wanted:
        raise BadInput(f"SLO clause {text.strip()!r}: {name} takes {wanted}, not {operator}")
    return _limit(name, value, f"SLO clause {text.strip()!r}", tenant)


def _limit(name: str, value: str, where: str, tenant: str | None = None) -> Limit:
    metric, _, stat = name.partition("_")
    if metric == "availability" and tenant is not None:
        raise BadInput(f"{where}: availability is that of the fleet, not of a tenant; promise it to all")
    if metric in SHARES and not stat:
        share = units.fraction(value, where)
        if not 0 < share < 1:
            raise BadInput(f"{where}: {value} must lie between 0% and 100%")
        return Limit(metric=metric, stat="ratio", limit=share, tenant=tenant)  # type: ignore[arg-type]
    if metric not in LATENCIES:
        raise BadInput(f"{where}: unknown metric {metric!r}{did_you_mean(metric, (*LATENCIES, *SHARES))}")
    if not _STAT.match(stat):
        raise BadInput(f"{where}: {metric} needs a statistic, one of mean, p50 … p99.9, e.g. {metric}_p95")
    limit_s = units.seconds(value, where)
    if limit_s <= 0:
        raise BadInput(f"{where}: a limit of {value} can never be met; it must be above zero")
    return Limit(metric=metric, stat=stat, limit=limit_s, tenant=tenant)  # type: ignore[arg-type]


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{where}: {value} has no unit; did you mean {value}ms?")
    return value


def _exact(value: float) -> str:
    """Twelve digits, so that reading back gives the same float for any limit a person writes."""
    return f"{value:.12g}"
