"""plan of a stage graph: from options as typed to the request."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlsys_bench import latency, record, scenario, slo, units, workload
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys import planning, surroundings
from mlsys_bench.plan.graph import GraphRequest
from mlsys_bench.scenario import checks
from mlsys_bench.stages import StageGraph
from mlsys_bench.types import Bench, LatencyProfile

# what a graph takes from the command line; every other option that is given is refused, so that none is ever passed over in silence
_TAKEN = (
    "scenario", "qps", "measured", "slo", "arrivals", "headroom", "term", "seed", "prices", "availability", "zones", "survive", "autoscale",
    "growth",
)  # fmt: skip
_LEFT_OUT = {"speed": (1.0,), "routing": ("random",), "disaggregate": ("auto", "never")}  # said where nobody gave the option
_WHY = {
    "trace": "a trace has the lengths of one model's requests, and bursts that stages see one by one; say --qps and --arrivals, "
    "or plan the language model's stage alone with --trace",
    "speed": "it plays a trace faster, and a graph takes none",
    "routing": "the replicas of a stage share one queue, and engines are routed to at random",
    "disaggregate": "the engine of a stage is planned as whole replicas; plan that stage alone with --disaggregate",
    "mixed": "kinds are mixed by prompt length for one model; plan that stage alone with --mixed",
}


def asked(options: Mapping[str, Any]) -> GraphRequest | None:
    """Return what is asked for where the scenario has several stages, None where it has one, or there is none."""
    found = scenario.load(options["scenario"]) if options.get("scenario") else None
    if not isinstance(found, StageGraph):
        return None
    for name, value in options.items():
        if name not in _TAKEN and value not in (None, False, "", (), [], *_LEFT_OUT.get(name, ())):
            why = _WHY.get(name, "say it in the scenario, at the stage that is meant")
            raise BadInput(f"--{name.replace('_', '-')}: {found.name} has several stages; {why}")
    around = surroundings.asked(options.get("zones"), bool(options.get("survive")), bool(options.get("autoscale")), options.get("growth"))
    return GraphRequest(
        graph=_changed(found, options),
        profiles=profiles(options.get("measured") or (), found),
        term=options["term"],
        seed=options["seed"],
        market=planning.market(options["prices"]) if options.get("prices") else None,
        **around,
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
    limits = surroundings.promised(slo.parse(options["slo"]) if options.get("slo") else graph.slo, options.get("availability"))
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
