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
from mlsys_bench.types import Bench, LatencyProfile, Workload
from mlsys_bench.workload.schedule import Floats, starts_s

# what a graph takes from the command line; every other option that is given is refused, so that none is ever passed over in silence
_TAKEN = (
    "scenario", "qps", "measured", "slo", "arrivals", "headroom", "term", "seed", "prices", "availability", "zones", "survive", "autoscale",
    "growth", "trace", "speed",
)  # fmt: skip
_LEFT_OUT = {"speed": (1.0,), "routing": ("random",), "disaggregate": ("auto", "never")}  # said where nobody gave the option
_WHY = {
    "routing": "the replicas of a stage share one queue, and engines are routed to at random",
    "disaggregate": "the engine of a stage is planned as whole replicas; plan that stage alone with --disaggregate",
    "spot": "no stage stands on spot capacity for an availability; plan one model on it, or leave both out",
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
    due_s, traffic, trace_notes = _replayed(options)
    return GraphRequest(
        graph=_changed(found, options, traffic),
        due_s=due_s,
        trace_notes=trace_notes,
        profiles=profiles(options.get("measured") or (), found),
        term=options["term"],
        seed=options["seed"],
        market=planning.market(options["prices"]) if options.get("prices") else None,
        **around,
    )


def _replayed(options: Mapping[str, Any]) -> tuple[Floats | None, Workload | None, tuple[str, ...]]:
    """Return when the requests of `--trace` come, the law that stands for them, and what to know of them; nothing without one."""
    trace, qps, speed = options.get("trace"), options.get("qps"), options.get("speed") or 1.0
    seen, _ = planning.traffic_files((), trace)
    played = planning.replays(trace, seen, qps, speed)
    if played is None or seen is None:
        return None, None, ()
    if options.get("arrivals"):
        raise BadInput("--arrivals is a law, and --trace has times of its own; give one of them")
    due_s = starts_s(played)
    return due_s - due_s[0], dataclasses.replace(seen, rate_per_s=qps or seen.rate_per_s * speed, observed=None), played.notes


def _changed(graph: StageGraph, options: Mapping[str, Any], seen: Workload | None) -> StageGraph:
    """Return the graph with the traffic, limits and headroom that flags name, or with that of a trace."""
    traffic = _flagged(graph.workload, options) if seen is None else _of_trace(graph.workload, seen)
    workload.parse_arrivals(traffic.arrivals)
    limits = surroundings.promised(slo.parse(options["slo"]) if options.get("slo") else graph.slo, options.get("availability"))
    usual = 0.0 if seen is not None else graph.headroom  # the peaks of a trace are in it
    free = units.fraction(options["headroom"], "--headroom") if options.get("headroom") else usual
    if not 0 <= free < 1:
        raise BadInput(f"headroom is {free:g}: it is the share of capacity kept free, from 0 to below 1, e.g. 20%")
    changed = dataclasses.replace(graph, workload=traffic, slo=limits, headroom=free)
    checks.check_promises(changed, "--slo" if options.get("slo") else graph.name)
    return changed


def _flagged(traffic: Workload, options: Mapping[str, Any]) -> Workload:
    qps, arrivals = options.get("qps"), options.get("arrivals")
    rate_per_s = traffic.rate_per_s if qps is None else workload.checked_rate(qps)
    return dataclasses.replace(traffic, rate_per_s=rate_per_s, arrivals=arrivals or traffic.arrivals)


def _of_trace(traffic: Workload, seen: Workload) -> Workload:
    """Return the law of a trace; the lengths are those of the scenario where its requests carry no tokens."""
    if traffic.prompt_tokens.mean:
        return seen
    return dataclasses.replace(seen, prompt_tokens=traffic.prompt_tokens, output_tokens=traffic.output_tokens)


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
