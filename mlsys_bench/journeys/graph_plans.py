"""plan of a stage graph: from options as typed to the request."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlsys_bench import latency, record, scenario, slo, units, workload
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys import surroundings
from mlsys_bench.plan.graph import GraphRequest
from mlsys_bench.scenario import checks
from mlsys_bench.stages import StageGraph
from mlsys_bench.types import Bench, LatencyProfile

_OF_ONE_MODEL = ("model", "gpu", "precision", "prompt_tokens", "output_tokens", "max_batch", "trace")


def asked(options: Mapping[str, Any]) -> GraphRequest | None:
    """Return what is asked for where the scenario has several stages, None where it has one, or there is none."""
    found = scenario.load(options["scenario"]) if options.get("scenario") else None
    if not isinstance(found, StageGraph):
        return None
    if options.get("prices"):
        raise BadInput(f"--prices: {found.name} has several stages, and those are priced by the published catalogue today; leave it out")
    for name in (*_OF_ONE_MODEL, *surroundings.OPTIONS):
        if options.get(name):
            raise BadInput(
                f"--{name.replace('_', '-')}: {found.name} has several stages; say it in the scenario, at the stage that is meant"
            )
    return GraphRequest(
        graph=_changed(found, options), profiles=profiles(options.get("measured") or (), found), term=options["term"], seed=options["seed"]
    )


def _changed(graph: StageGraph, options: Mapping[str, Any]) -> StageGraph:
    """Return the graph with the traffic, limits and headroom that flags name."""
    qps, arrivals = options.get("qps"), options.get("arrivals")
    traffic = dataclasses.replace(
        graph.workload,
        rate_per_s=graph.workload.rate_per_s if qps is None else workload.checked_rate(qps),
        arrivals=arrivals or graph.workload.arrivals,
    )
    workload.parse_arrivals(traffic.arrivals)
    limits = slo.parse(options["slo"]) if options.get("slo") else graph.slo
    free = units.fraction(options["headroom"], "--headroom") if options.get("headroom") else graph.headroom
    if not 0 <= free < 1:
        raise BadInput(f"headroom is {free:g}: it is the share of capacity kept free, from 0 to below 1, e.g. 20%")
    changed = dataclasses.replace(graph, workload=traffic, slo=limits, headroom=free)
    checks.check_promises(changed, "--slo" if options.get("slo") else graph.name)
    return changed


def profiles(files: Sequence[Path], graph: StageGraph) -> dict[str, LatencyProfile]:
    """Return the profiles of `--from STAGE=FILE`, by stage.  Raises BadInput for a stage bound twice, or not said."""
    found: dict[str, LatencyProfile] = {}
    for given in files:
        stage, equals, file = str(given).partition("=")
        if not equals:
            raise BadInput(f"--from {given}: {graph.name} has several stages; say which one, --from {graph.stages[0].name}={given}")
        if stage in found:
            raise BadInput(f"--from {given}: the stage {stage} is bound twice")
        found[stage] = _profile(Path(file), stage)
    return found


def _profile(path: Path, stage: str) -> LatencyProfile:
    stored, value = record.load(path)
    if isinstance(value, Bench):
        return latency.fit(value)
    if isinstance(value, LatencyProfile):
        return value
    raise BadInput(f"--from {stage}={path}: holds a {stored.kind!r} record; a profile or a bench file is needed")
