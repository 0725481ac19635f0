"""A scenario of several stages: read by the types of `stages`, then checked as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlsys_bench.scenario import checks, reader
from mlsys_bench.scenario.traffic import headroom, promises, traffic
from mlsys_bench.scenario.values import mapping, section, text
from mlsys_bench.stages import Cost, Service, Stage, StageGraph

KEYS = ("mlsys", "name", "description", "source", "entry", "stages", "headroom", "traffic", "slo", "cost")


def read(document: Mapping[str, Any], where: str) -> StageGraph:
    """Return the stage graph of a document, its measured files as paths from here."""
    top = section(document, KEYS, where, "", optional=("cost",))
    stages = tuple(_stage(name, given, where) for name, given in mapping(top["stages"], f"{where}: stages").items())
    tokens = any(s.engine is not None and (s.engine.prompt is None or s.engine.output is None) for s in stages)
    graph = StageGraph(
        name=text(top["name"], f"{where}: name"),
        description=text(top["description"], f"{where}: description"),
        source=text(top["source"], f"{where}: source"),
        workload=traffic(top["traffic"], where, tokens=tokens),
        slo=promises(top["slo"], f"{where}: slo"),
        headroom=headroom(top["headroom"], f"{where}: headroom"),
        entry=text(top["entry"], f"{where}: entry"),
        stages=stages,
        cost=reader.read(Cost, top["cost"], where, "cost") if "cost" in top else None,
    )
    checks.check(graph, where)
    return dataclasses.replace(graph, stages=tuple(checks.normal(stage) for stage in stages))


def _stage(name: str, given: object, where: str) -> Stage:
    if isinstance(given, dict) and isinstance(given.get("join"), str) and given["join"] == "all":
        given = {key: value for key, value in given.items() if key != "join"}  # `join: all` says what is meant without it
    stage = reader.read(Stage, given, where, f"stages.{name}", name=name)
    if stage.service is None or stage.service.measured is None:
        return stage
    beside = Path(where).parent / stage.service.measured.file
    return dataclasses.replace(stage, service=Service(measured=dataclasses.replace(stage.service.measured, file=str(beside))))
