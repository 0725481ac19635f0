"""Tenants of a scenario: each a share of the traffic, or a rate, with lengths and limits of its own where it names them.

    tenants:
      chat:  {share: 90%, slo: {ttft_p95: 500ms}}
      batch: {share: 10%, prompt: 6000, output: 300, slo: {e2e_p95: 60s}}

Lengths that a tenant leaves out are those of `traffic`, limits that it leaves out those of `slo`; naming one limit it names all of its own.
Requests of `priority: 1` go before those of 2, and so on; 1 where it is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlsys_bench import slo, units, workload
from mlsys_bench.errors import ScenarioError
from mlsys_bench.scenario.traffic import NO_TOKENS, TENANT_KEYS, lengths
from mlsys_bench.scenario.values import mapping, named, section, whole
from mlsys_bench.types import SLO, Lengths, Tenant, Workload

CLOSE = 1e-3  # how far rates of tenants may add up beside that of the traffic: people round


def tenants(value: object, traffic: Workload, limits: SLO, where: str) -> tuple[Workload, SLO]:
    """Return the traffic with its tenants, and the limits with theirs."""
    here = f"{where}: tenants"
    given = {name: section(each, TENANT_KEYS, where, f"tenants.{name}", TENANT_KEYS) for name, each in mapping(value, here).items()}
    if not given:
        raise ScenarioError(f"{here}: holds no tenant")
    for name in given:
        if not slo.TENANT.match(name):
            raise ScenarioError(f"{here}: {name!r} is no name of a tenant: letters, digits, dots, dashes and underscores")
    shares = _shares(given, traffic.rate_per_s, here)
    found = [
        Tenant(
            name=name,
            share=shares[name],
            prompt_tokens=_lengths(each, "prompt", traffic.prompt_tokens, where, name),
            output_tokens=_lengths(each, "output", traffic.output_tokens, where, name),
            priority=whole(each["priority"], f"{here}.{name}.priority") if "priority" in each else 1,
        )
        for name, each in given.items()
    ]
    own = tuple(limit for name, each in given.items() for limit in _own(each, name, here))
    bare = [name for name in given if not any(limit.tenant == name for limit in own)]
    if bare and not any(limit.metric != "availability" for limit in limits):
        raise ScenarioError(f"{here}.{bare[0]}: has no slo, and the scenario has none for all; write it like slo: {{ttft_p95: 500ms}}")
    return named(lambda _: workload.with_tenants(traffic, found), "", here), (*limits, *own)


def _own(given: dict[str, Any], name: str, here: str) -> SLO:
    return slo.from_mapping(mapping(given["slo"], f"{here}.{name}.slo"), f"{here}.{name}.slo", tenant=name) if "slo" in given else ()


def _lengths(given: dict[str, Any], key: str, common: Lengths, where: str, name: str) -> Lengths:
    if key in given:
        return lengths(given[key], where, f"tenants.{name}.{key}")
    if common == NO_TOKENS:
        raise ScenarioError(f"{where}: tenants.{name}: has no {key}, and traffic.{key} is not there either; give one of them")
    return common


def _shares(given: dict[str, dict[str, Any]], rate_per_s: float, here: str) -> dict[str, float]:
    """Return the share of each tenant: all give one, or all give a rate."""
    for name, each in given.items():
        if ("share" in each) == ("rate" in each):
            raise ScenarioError(f"{here}.{name}: needs a share or a rate{', not both' if 'share' in each else ''}, e.g. share: 30%")
    if all("share" in each for each in given.values()):
        return {name: _above_zero(units.fraction, each["share"], f"{here}.{name}.share") for name, each in given.items()}
    if any("share" in each for each in given.values()):
        raise ScenarioError(f"{here}: some give a share and some a rate; give all of them the same")
    rates = {name: _above_zero(units.per_s, each["rate"], f"{here}.{name}.rate") for name, each in given.items()}
    total = sum(rates.values())
    if abs(total / rate_per_s - 1) > CLOSE:
        raise ScenarioError(f"{here}: rates add up to {units.show_rate(total)}, traffic.rate says {units.show_rate(rate_per_s)}")
    return {name: rate / total for name, rate in rates.items()}


def _above_zero(read: Callable[[Any, str], float], given: object, where: str) -> float:
    value = read(given, where)
    if not value > 0:
        raise ScenarioError(f"{where}: {given} must be above zero; leave out a tenant that sends nothing")
    return value
