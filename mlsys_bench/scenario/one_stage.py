"""A scenario of one stage, a language model: what most plans start from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlsys_bench import hardware, models
from mlsys_bench.errors import ScenarioError, did_you_mean
from mlsys_bench.scenario.tenants import tenants
from mlsys_bench.scenario.traffic import headroom, promises, traffic
from mlsys_bench.scenario.values import named, names_of, section, text, unique, whole
from mlsys_bench.types import Scenario

KEYS = ("mlsys", "name", "description", "source", "model", "precision", "gpus", "max_batch", "headroom", "traffic", "slo", "tenants")


def read(document: Mapping[str, Any], where: str) -> Scenario:
    """Return the scenario of a document."""
    top = section(document, KEYS, where, "", optional=("tenants", "slo") if "tenants" in document else ("tenants",))
    precision = precisions(top["precision"], f"{where}: precision")
    gpus = devices(top["gpus"], f"{where}: gpus")
    check_precisions(precision, gpus, where)
    demand = traffic(top["traffic"], where, tokens="tenants" not in top)
    limits = promises(top["slo"], f"{where}: slo") if "slo" in top else ()
    if "tenants" in top:
        demand, limits = tenants(top["tenants"], demand, limits, where)
    return Scenario(
        name=text(top["name"], f"{where}: name"),
        description=text(top["description"], f"{where}: description"),
        model=named(models.find, text(top["model"], f"{where}: model"), f"{where}: model").id,
        precision=precision,
        gpus=gpus,
        workload=demand,
        slo=limits,
        max_batch=whole(top["max_batch"], f"{where}: max_batch"),
        headroom=headroom(top["headroom"], f"{where}: headroom"),
        source=text(top["source"], f"{where}: source"),
    )


def devices(value: object, where: str) -> tuple[str, ...]:
    """Return catalogue ids of devices."""
    return unique(tuple(named(hardware.find, name, where).id for name in names_of(value, where)), where)


def precisions(value: object, where: str) -> tuple[str, ...]:
    """Return names of precisions."""
    found = names_of(value, where)
    for name in found:
        if name not in models.PRECISIONS:
            raise ScenarioError(f"{where}: unknown precision {name!r}{did_you_mean(name, models.PRECISIONS)}")
    return unique(found, where)


def check_precisions(found: tuple[str, ...], gpus: tuple[str, ...], where: str) -> None:
    """Raise when no device listed computes in any of the precisions."""
    if not any(hardware.supports(hardware.find(gpu), name) for gpu in gpus for name in found):
        raise ScenarioError(f"{where}: none of {', '.join(gpus)} computes in {' or '.join(found)}; add another precision, e.g. fp16")
