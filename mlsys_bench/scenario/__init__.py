"""Scenarios: a system, its traffic and its promises, read from YAML.

Of one stage, a language model:

    mlsys: 1                   version of this format
    name, description          text
    source                     where the numbers below come from (those of the traffic: traffic.source)
    model                      a name of the model catalogue
    precision, gpus            lists of names to choose from
    max_batch, headroom        sequences a replica runs at once, share of its capacity that stays free
    traffic                    rate, arrivals, prompt, output (tokens: a number, or dist, mean, cv and max), source
    slo                        limits, e.g. ttft_p95: 500ms

Of several stages: `entry` and `stages` in place of model, precision, gpus and max_batch, and `cost`; `mlsys_bench.stages` has the keys
of a stage, docs/scenarios.md an example of each.  Several scenarios on one pool of GPUs, a fleet: `pool` and `scenarios`; see
`mlsys_bench.scenario.fleet`.  Unknown keys are errors, and every assumed number has its source.
"""

from __future__ import annotations

from pathlib import Path

from mlsys_bench import resources
from mlsys_bench.errors import ScenarioError, unknown
from mlsys_bench.fleets import Fleet
from mlsys_bench.scenario import fleet, one_stage, staged
from mlsys_bench.scenario.flow import Flow, flows
from mlsys_bench.scenario.popularity import hit_share
from mlsys_bench.scenario.schema import schema
from mlsys_bench.scenario.values import document
from mlsys_bench.stages import StageGraph
from mlsys_bench.types import Scenario

__all__ = ["VERSION", "Flow", "check", "flows", "hit_share", "load", "names", "parse", "schema"]

VERSION = 1


def names() -> tuple[str, ...]:
    """Return the names of the scenarios that ship with mlsys."""
    return tuple(sorted(path.stem for path in resources.folder("scenarios").glob("*.yaml")))


def load(name_or_path: str | Path) -> Scenario | StageGraph | Fleet:
    """Return a scenario: a path with a suffix is a file, anything else a shipped name.  Raises BadInput."""
    path = Path(name_or_path)
    if path.suffix:
        return check(path)
    if str(name_or_path) not in names():
        raise unknown("scenario", str(name_or_path), names())
    return check(resources.folder("scenarios") / f"{name_or_path}.yaml")


def check(path: Path) -> Scenario | StageGraph | Fleet:
    """Return the scenario of a file whose every key, unit and name holds.  Raises BadInput naming file and key."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return parse(text, str(path))


def parse(text: str, where: str) -> Scenario | StageGraph | Fleet:
    """Return the scenario of YAML text."""
    top = document(text, where)
    if "mlsys" in top and (top["mlsys"] != VERSION or isinstance(top["mlsys"], bool)):
        raise ScenarioError(f"{where}: mlsys: {top['mlsys']!r} is a version this mlsys cannot read; it reads {VERSION}")
    if {"pool", "scenarios"} & set(top):
        return fleet.read(top, where, load)
    return staged.read(top, where) if {"stages", "entry"} & set(top) else one_stage.read(top, where)
