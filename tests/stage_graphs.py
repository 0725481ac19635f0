"""Stage graphs for tests, written as a person would."""

from __future__ import annotations

import textwrap

from mlsys_bench import scenario
from mlsys_bench.stages import StageGraph

HEAD = """\
mlsys: 1
name: small
description: A graph for tests.
source: assumed for this test
headroom: {headroom}
traffic: {{rate: {rate}/s, arrivals: {arrivals}, source: assumed for this test}}
slo: {slo}
cost: {{vcpu: $0.10/h, source: assumed for this test}}
entry: {entry}
stages:
"""
ON = "resources: {vcpu: 1}"


def law(mean: str, dist: str = "exponential", cv: float | None = None, per_item: str = "") -> str:
    """Return a service as YAML."""
    more = (f", cv: {cv}" if cv is not None else "") + (f", per_item: {per_item}" if per_item else "")
    return f"service: {{assumed: {{dist: {dist}, mean: {mean}{more}, source: assumed}}}}, {ON}"


def written(
    stages: str, *, rate: float = 10, arrivals: str = "poisson", slo: str = "{e2e_p95: 60s}", entry: str = "a", headroom: str = "10%"
) -> str:
    """Return the text of a scenario with these stages."""
    head = HEAD.format(rate=rate, arrivals=arrivals, slo=slo, entry=entry, headroom=headroom)
    return head + textwrap.indent(textwrap.dedent(stages).strip(), "  ") + "\n"


def graph(
    stages: str, *, rate: float = 10, arrivals: str = "poisson", slo: str = "{e2e_p95: 60s}", entry: str = "a", headroom: str = "10%"
) -> StageGraph:
    """Return the graph of these stages."""
    read = scenario.parse(written(stages, rate=rate, arrivals=arrivals, slo=slo, entry=entry, headroom=headroom), "here")
    assert isinstance(read, StageGraph)
    return read
