"""Load tests of a real server, as their statistics tell them: warm-up, over-saturation, repeats, files of every kind."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mlsys_bench import loadtest, record, summary
from mlsys_bench.journeys import compare as comparing
from mlsys_bench.journeys import load
from mlsys_bench.loadtest import truth
from mlsys_bench.loadtest.truth import client
from mlsys_bench.loadtests import LoadTests
from mlsys_bench.types import LoadTest, Requests, Validity

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="needs locust"),
]


@pytest.fixture
def server() -> Iterator[str]:
    with client.serving(truth.Behaviour(ttft_s=0.02, itl_s=0.002)) as found:
        yield found.url


def options(url: str, **more: object) -> loadtest.Options:
    return loadtest.Options(**{"url": url, "qps": 60.0, "duration_s": 3.0, "metrics": ("off",), **more})  # type: ignore[arg-type]


def test_repeats_keep_each_run_and_say_how_far_they_lie_apart(server: str, tmp_path: Path) -> None:
    """Two runs with the seeds after the first: other arrivals, the same server, every file that was asked for."""
    short, files = options(server, seed=7, duration_s=1.5), {"csv": tmp_path / "run.csv", "png": tmp_path / "run.png"}
    found = load.run(short, out=tmp_path / "run.json", quiet=True, repeats=2, **files)
    assert isinstance(found, LoadTests)
    assert found == record.read(tmp_path / "run.json", LoadTests)
    assert found.seeds == (7, 8)
    assert found.spread["ttft_p50_s"].mean == pytest.approx(np.mean([run.ttft_s.p50 for run in found.runs]))
    drawn = [loadtest.dry_run(dataclasses.replace(short, seed=seed)).scheduled_s for seed in (7, 8)]
    for at, expected in enumerate(drawn, start=1):
        rows = record.read(tmp_path / f"run.{at}.parquet", Requests).requests
        np.testing.assert_allclose([r.scheduled_s for r in rows], expected)
        assert len((tmp_path / f"run.{at}.csv").read_text().splitlines()) == len(rows) + 1
    assert (tmp_path / "run.png").stat().st_size > 10_000
    assert set(json.loads((tmp_path / "run.json").read_text())["inputs"]) == {"run.1.parquet", "run.2.parquet"}


def test_a_summary_is_what_its_file_of_requests_says(server: str, tmp_path: Path) -> None:
    """Read without a record in between, the Parquet file gives the very figures of the JSON beside it, warm-up left out."""
    found = load.run(options(server), out=tmp_path / "run.json", quiet=True)
    assert isinstance(found, LoadTest)
    assert found.steadiness is not None
    assert found.timeline is not None
    assert [series.name for series in found.timeline.extra] == ["CPU of worker 0"]
    assert any(share is not None and 0 < share < 1.1 for share in found.timeline.extra[0].values)
    run = summary.columns.read([tmp_path / "run.parquet"])
    assert float(run.scheduled_s[run.in_window].min()) >= found.steadiness.warmup_s == found.timeline.window_s[0]
    again = summary.summarise(
        run, source="loadtest", target="", arrivals=found.arrivals, offered_rate_per_s=60.0, slo=None, validity=Validity(verdict="valid"),
        window=found.timeline.window_s,
    )  # fmt: skip
    assert again.timeline == dataclasses.replace(found.timeline, extra=())
    for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s", "service_s", "lateness_s", "curves", "requests", "token_sources"):
        assert getattr(again, name) == getattr(found, name), name
    same = comparing.compare(tmp_path / "run.json", tmp_path / "run.json", "5%")
    assert same.verdict in ("pass", "inconclusive", "not_comparable")
    assert all(f.ratio in (None, pytest.approx(1.0)) for f in same.findings)


def test_a_table_in_place_of_the_record(server: str, tmp_path: Path) -> None:
    load.run(options(server, duration_s=1.0), out=tmp_path / "run.csv", quiet=True)
    assert (tmp_path / "run.csv").read_text().startswith("index,tenant")
    assert [path.name for path in tmp_path.iterdir()] == ["run.csv"]


@pytest.mark.measures
def test_an_over_saturated_server_is_called_so(tmp_path: Path) -> None:
    """Two slots of 50 ms are 40/s; 100/s are offered: latency counts from the schedule, and the verdict says what to do."""
    with client.serving(truth.Behaviour(ttft_s=0.05, itl_s=0.0, tokens=2, slots=2)) as server:
        found, _ = loadtest.run(options(server.url, qps=100.0, duration_s=4.0, drain_s=0.2))
    assert found.steadiness is not None
    assert found.steadiness.verdict == "over_saturated"
    assert found.steadiness.served_share == pytest.approx(0.4, rel=0.15)
    assert found.validity.verdict != "valid"
    assert any("lower the rate" in reason for reason in found.validity.reasons)
    assert found.e2e_s.mean is not None
    assert found.e2e_s.mean > 1.0  # the wait of the schedule, twenty times what a request takes


@pytest.mark.measures
def test_a_start_that_is_slow_is_left_out(tmp_path: Path) -> None:
    """Answers of a second: nothing is whole in the first second, which is found without being told."""
    with client.serving(truth.Behaviour(ttft_s=0.5, itl_s=0.5, tokens=2)) as server:
        found, _ = loadtest.run(options(server.url, qps=100.0, duration_s=4.0, arrivals="constant"))
    assert found.steadiness is not None
    assert found.steadiness.verdict == "steady"
    assert 0.5 < found.steadiness.warmup_s <= 1.5
    assert found.request_rate_per_s == pytest.approx(100, rel=0.05)
