"""A fleet file: several scenarios on one pool of GPUs, with priorities.

mlsys: 1
name, description, source    text
pool                         GPUs there are, by name: {h100-sxm: 64, l40s: 32}
scenarios                    a list; of each
  scenario                     a shipped name, or a file beside this one
  name                         how it is called here; the scenario's own name where left out
  priority                     1 (where left out) is served before 2, 2 before 3
  rate, arrivals, slo          in place of the scenario's
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlsys_bench import hardware, slo, units, workload
from mlsys_bench.errors import ScenarioError
from mlsys_bench.fleets import Fleet, Want
from mlsys_bench.scenario.values import mapping, named, section, shown, text, whole
from mlsys_bench.stages import StageGraph
from mlsys_bench.types import Scenario

KEYS = ("mlsys", "name", "description", "source", "pool", "scenarios")
WANT_KEYS = ("scenario", "name", "priority", "rate", "arrivals", "slo")
Load = Callable[[str], object]


def read(document: Mapping[str, Any], where: str, load: Load) -> Fleet:
    """Return the fleet of a document; `load` reads the scenarios it names."""
    top = section(document, KEYS, where, "")
    pool = _pool(top["pool"], f"{where}: pool")
    given = top["scenarios"]
    if not isinstance(given, list) or not given:
        raise ScenarioError(f"{where}: scenarios: {shown(given)} where a list is needed, e.g. - {{scenario: llm-chat, priority: 1}}")
    wants = tuple(_want(each, where, f"scenarios[{i}]", pool, load) for i, each in enumerate(given))
    names = [want.name for want in wants]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ScenarioError(
            f"{where}: scenarios: {', '.join(twice)} stands there twice; give each a name of its own, e.g. name: {twice[0]}-2"
        )
    return Fleet(
        name=text(top["name"], f"{where}: name"),
        description=text(top["description"], f"{where}: description"),
        source=text(top["source"], f"{where}: source"),
        pool=pool,
        wants=wants,
    )


def _pool(value: object, where: str) -> dict[str, int]:
    """Return GPUs by catalogue id."""
    found: dict[str, int] = {}
    for name, count in mapping(value, where).items():
        gpu = named(hardware.find, name, where).id
        if gpu in found:
            raise ScenarioError(f"{where}: {gpu} stands there twice, by two of its names")
        found[gpu] = whole(count, f"{where}.{name}")
    if not found:
        raise ScenarioError(f"{where}: holds no GPU; write it like {{h100-sxm: 8}}")
    return found


def _want(value: object, where: str, path: str, pool: Mapping[str, int], load: Load) -> Want:
    here = f"{where}: {path}"
    given = section(value, WANT_KEYS, where, path, optional=WANT_KEYS[1:])
    which = _beside(text(given["scenario"], f"{here}.scenario"), where)
    found = named(load, which, f"{here}.scenario")
    gpus = _gpus(found)
    if gpus is None:
        raise ScenarioError(f"{here}.scenario: {which} is not of one model; a fleet shares its GPUs between scenarios of one model each")
    if not set(gpus) & set(pool):
        raise ScenarioError(f"{here}.scenario: {which} runs on {', '.join(gpus)}, and the pool has {', '.join(pool)}; add one of them")
    arrivals = text(given["arrivals"], f"{here}.arrivals") if "arrivals" in given else None
    if arrivals is not None:
        named(workload.parse_arrivals, arrivals, f"{here}.arrivals")
    rate = units.per_s(given["rate"], f"{here}.rate") if "rate" in given else None
    return Want(
        name=text(given["name"], f"{here}.name") if "name" in given else str(getattr(found, "name", which)),
        scenario=which,
        priority=whole(given["priority"], f"{here}.priority") if "priority" in given else 1,
        rate_per_s=None if rate is None else workload.checked_rate(rate, f"{here}.rate"),
        arrivals=arrivals,
        slo=slo.from_mapping(mapping(given["slo"], f"{here}.slo"), f"{here}.slo") if "slo" in given else (),
    )


def _gpus(found: object) -> tuple[str, ...] | None:
    """Return the GPUs that a scenario with one language model may run on, None for any other."""
    if isinstance(found, Scenario):
        return found.gpus
    if isinstance(found, StageGraph) and len(found.engines) == 1:
        resources = found.engines[0].resources
        return resources.gpu if resources else None
    return None


def _beside(name: str, where: str) -> str:
    """Return a name as it is, and a file as a path from here."""
    return str(Path(where).parent / name) if Path(name).suffix else name
