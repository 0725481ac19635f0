"""Scenarios of several stages from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mlsys_bench import record
from mlsys_bench.stages import StageGraph
from mlsys_bench.types import Plan

if TYPE_CHECKING:
    from conftest import Cli

pytestmark = pytest.mark.e2e


def test_a_platform_is_planned_stage_by_stage(mlsys: Cli, tmp_path: Path) -> None:
    """`mlsys plan rag-support-bot`: fleet, visits, utilisation, bottleneck and the percentile at the end, with an interval."""
    said = mlsys("plan", "rag-support-bot", "-o", "rag.json", "--html", "rag.html")
    assert (said.returncode, said.stderr) == (0, "")
    for words in ("replicas of 10 stages", "Bottleneck", "busy", "visits", "E2E", "below each figure its 90 % interval", "generate"):
        assert words in said.stdout
    _, plan = record.load(tmp_path / "rag.json")
    assert isinstance(plan, Plan)
    assert plan.predicted["e2e_p95_s"] < 15
    assert plan.predicted["ttft_p95_s"] < 0.9
    low, high = plan.intervals["e2e_p95_s"]
    assert low <= plan.predicted["e2e_p95_s"] <= high
    assert plan.bottleneck in {stage.stage for stage in plan.stages}
    assert sum(item.usd_per_hour or 0 for item in plan.fleet) == pytest.approx(plan.usd_per_hour)
    assert "<html" in (tmp_path / "rag.html").read_text()


def test_a_scenario_is_shown_as_a_drawing_and_written_as_a_page(mlsys: Cli, tmp_path: Path) -> None:
    said = mlsys("scenario", "show", "recsys-feed", "--html", "feed.html", "--md", "feed.md")
    assert (said.returncode, said.stderr) == (0, "")
    assert "Scenario: recsys-feed" in said.stdout
    assert "data:image/svg+xml;base64," in (tmp_path / "feed.html").read_text()
    assert "two_tower" in (tmp_path / "feed.md").read_text()
    _, shown = record.loads(mlsys("scenario", "show", "recsys-feed", "--json").stdout, "standard output")
    assert isinstance(shown, StageGraph)


def test_the_format_is_printed_as_json_schema(mlsys: Cli) -> None:
    said = mlsys("scenario", "schema")
    assert said.returncode == 0
    assert json.loads(said.stdout)["$schema"].endswith("2020-12/schema")


def test_what_one_model_takes_is_refused_for_many(mlsys: Cli) -> None:
    for options, says in (
        (("plan", "recsys-feed", "--gpu", "l4"), "--gpu: recsys-feed has several stages"),
        (("simulate", "recsys-feed"), "recsys-feed has several stages"),
        (("plan", "recsys-feed", "--slo", "ttft_p95<1s"), "ttft needs a stage that writes tokens"),
    ):
        said = mlsys(*options)
        assert (said.returncode, says in said.stderr) == (2, True), said.stderr


def test_a_platform_that_cannot_be_fast_enough_says_why(mlsys: Cli) -> None:
    said = mlsys("plan", "recsys-feed", "--slo", "e2e_p95<10ms")
    assert said.returncode == 1
    assert "e2e_p95<10ms is missed by" in said.stderr
    assert "als" in said.stderr
