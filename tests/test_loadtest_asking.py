"""`mlsys loadtest` from options as typed to the schedule, and the schedule as a person sees it."""

from __future__ import annotations

import contextlib
import csv
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsys_bench import loadtest, workload
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys import asking, dry, load
from mlsys_bench.loadtest import endpoints, parent, payloads, target
from mlsys_bench.loadtest.content import Content
from mlsys_bench.types import Lengths
from mlsys_bench.workload import trace as trace_files
from mlsys_cli.headings import LOADTEST
from mlsys_cli.loadtest import loadtest as command

URL = "http://127.0.0.1:9"
CARRIED = ("lengths_from", "shared_prefix", "turns", "gap", "tenants", "dataset", "field", "shuffle", "images", "image_size", "same_words")


def options(**typed: Any) -> loadtest.Options:
    """Return what the command makes of options as typed."""
    carried = {name: typed.pop(name) for name in CARRIED if name in typed}
    traced = {name: typed.pop(name) for name in ("file", "start", "end", "speed", "columns", "time_unit") if name in typed}
    usual: dict[str, Any] = {
        "target": URL, "qps": None, "users": None, "arrivals": None, "prompt_tokens": None, "output_tokens": None, "model": None,
        "endpoint": "completions", "duration": None, "warmup": "auto", "timeout": "60s", "slo": None, "seed": 0,
    }  # fmt: skip
    return load.options(**{**usual, **typed}, traced=asking.Traced(**traced), carried=asking.Carried(**carried))


def drawn(**typed: Any) -> workload.Schedule:
    return loadtest.dry_run(options(**typed))


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    path = tmp_path / "rates.csv"
    path.write_text("time,rate\n0,4\n30,12\n60,8\n")
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "odd.csv"
    path.write_text("when,in,out,who\n0,10,20,a\n250,30,40,b\n1000,50,60,b\n1500,70,80,a\n")
    return path


# ---------------------------------------------------------------- arrivals


@pytest.mark.parametrize(
    ("arrivals", "qps", "lasts_s", "count", "scv"),
    [
        ("constant", 20.0, 60.0, 1200, 0.0),
        ("poisson", 20.0, 60.0, 1200, 1.0),
        ("gamma:2", 20.0, 60.0, 1200, 4.0),
        ("constant*stages:10s@1,20s@1..3,10s@3", 10.0, 40.0, 100 + 400 + 300, None),
        ("constant*diurnal:30s:60%", 20.0, 60.0, 1200, None),
        ("constant*mmpp:3:20%:5s", 20.0, 60.0, None, None),
    ],
)
def test_every_law_lasts_and_brings_what_it_says(arrivals: str, qps: float, lasts_s: float, count: int | None, scv: float | None) -> None:
    """Counts of a metronome are exact but for its first; those of a renewal process lie within four standard deviations, sqrt(n scv)."""
    found = dry.figures(plan := options(arrivals=arrivals, qps=qps, seed=4), loadtest.dry_run(plan))
    assert found["lasts_s"] == pytest.approx(lasts_s)
    if count is not None:
        assert abs(found["arrivals"] - count) <= 2 + 4 * (count * (scv or 0.0)) ** 0.5
    if scv is not None:
        assert found["gap_scv"] == pytest.approx(scv, rel=0.5, abs=1e-6)


def test_a_series_brings_its_own_rate_and_time_unless_told_otherwise(rates: Path) -> None:
    own = options(arrivals=f"constant*series:{rates}")
    assert own.qps == pytest.approx(8.0)
    assert own.duration_s == pytest.approx(90.0)
    times = loadtest.dry_run(own).scheduled_s
    assert [int(((times >= a) & (times < a + 30)).sum()) for a in (0, 30, 60)] == pytest.approx([120, 360, 240], abs=1)
    told = options(arrivals=f"series:{rates}", qps=2.0, duration="5s")
    assert (told.qps, told.duration_s) == (2.0, 5.0)


def test_a_trace_is_named_cut_and_sped_up(trace: Path) -> None:
    columns = {"time": "when", "prompt": "in", "output": "out", "tenant": "who"}
    plan = drawn(file=trace, columns=columns, time_unit="ms", start="0.1s", speed=2.0)
    assert plan.scheduled_s.tolist() == pytest.approx([0.075, 0.45, 0.7])
    assert plan.prompt_tokens.tolist() == [30, 50, 70]
    assert [plan.tenants[i] for i in (plan.tenant if plan.tenant is not None else [])] == ["b", "b", "a"]
    to_rate = drawn(file=trace, columns=columns, time_unit="ms", qps=10.0)
    assert np.diff(to_rate.scheduled_s).mean() == pytest.approx(0.1)


# ---------------------------------------------------------------- MLPerf


def test_the_presets_are_what_the_rules_say() -> None:
    single, multi = options(preset="single-stream"), options(preset="multi-stream")
    assert (single.users, single.at_once, single.duration_s, single.warmup_s) == (1, 1, 600.0, 0.0)
    assert (multi.users, multi.at_once) == (1, 8)
    server = options(preset="server", qps=5.0, slo="e2e_p99<2s")
    assert (server.qps, server.arrivals, server.duration_s) == (5.0, "poisson", 600.0)
    offline = options(preset="offline")
    assert offline.offline == 24_576
    plan = loadtest.dry_run(options(preset="offline", requests=10))
    assert (len(plan), plan.scheduled_s.max()) == (10, 0.0)


# ---------------------------------------------------------------- what they carry


def test_sessions_start_within_the_run_and_their_requests_have_the_rate() -> None:
    plan = drawn(qps=30.0, turns="3", gap="1s", duration="100s", shared_prefix="160:2", prompt_tokens="50", output_tokens="10")
    starts = plan.scheduled_s[~np.isnan(plan.scheduled_s)]
    assert len(plan) == 3 * len(starts)
    assert abs(len(starts) - 1000) < 4 * 1000**0.5
    assert starts.max() < 100
    assert plan.prefix_hashes is not None
    assert plan.prefix_offsets is not None
    firsts = {int(plan.prefix_hashes[plan.prefix_offsets[i]]) for i in range(len(starts))}
    assert len(firsts) == 2, "one beginning for each group"


def test_users_walk_through_whole_sessions() -> None:
    plan = drawn(users=3, turns="4", gap="1s", duration="10s")
    assert np.isnan(plan.scheduled_s).sum() == 3 * len(plan) / 4
    assert not plan.scheduled_s[~np.isnan(plan.scheduled_s)].any()


def test_lengths_go_together_as_in_a_trace(tmp_path: Path) -> None:
    path = trace_files.write(
        workload.Schedule(scheduled_s=np.arange(3.0), prompt_tokens=np.array([1, 2, 3]), output_tokens=np.array([10, 20, 30])),
        tmp_path / "pairs.csv",
    )
    plan = drawn(qps=100.0, duration="5s", lengths_from=path)
    assert set(zip(plan.prompt_tokens.tolist(), plan.output_tokens.tolist(), strict=True)) == {(1, 10), (2, 20), (3, 30)}


def test_answers_are_as_long_as_the_rows_say_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "abcdefgh", "max_tokens": 9}\n{"prompt": "abcd"}\n')
    plan = drawn(users=1, dataset=path)
    assert plan.prompt_tokens[:4].tolist() == [2, 1, 2, 1]
    assert plan.output_tokens[:4].tolist() == [9, 32, 9, 32]
    assert drawn(users=1, dataset=path, output_tokens="5").output_tokens[:2].tolist() == [5, 5]


def test_what_a_trace_brings_itself_is_refused_beside_it(trace: Path) -> None:
    columns = {"time": "when", "prompt": "in", "output": "out"}
    for typed in ({"arrivals": "constant"}, {"prompt_tokens": "5"}, {"turns": "3"}, {"tenants": ["a=100%@1/1"]}):
        with pytest.raises(BadInput, match="does nothing beside --trace"):
            drawn(file=trace, columns=columns, time_unit="ms", **typed)
    with pytest.raises(BadInput, match="does nothing beside --users"):
        drawn(users=2, arrivals="constant")
    assert len(drawn(file=trace, columns=columns, time_unit="ms", duration="1s")) == 2


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ({}, "exactly one of --qps"),
        ({"qps": 1.0, "users": 2}, "exactly one of --qps"),
        ({"qps": 1.0, "think": "2s"}, "--think belongs to --users"),
        ({"qps": 1.0, "start": "2s"}, "--start belongs to --trace"),
        ({"qps": 1.0, "columns": {"time": "when"}}, "--time-column belongs to --trace"),
        ({"qps": 1.0, "requests": 5}, "--requests belongs to --preset offline"),
        ({"preset": "server"}, "needs --qps"),
        ({"preset": "server", "qps": 1.0}, "needs the limits of its latencies"),
        ({"preset": "offline", "qps": 1.0}, "has no rate"),
        ({"preset": "multi-stream", "users": 2}, "says itself how requests arrive"),
        ({"preset": "singel-stream"}, "did you mean single-stream"),
        ({"qps": 1.0, "gap": "2s"}, "--gap belongs to --turns"),
        ({"qps": 1.0, "field": "x"}, "--field belongs to --dataset"),
        ({"qps": 1.0, "tenants": ["a=100%@1/1"], "prompt_tokens": "5"}, "--tenant brings lengths"),
        ({"qps": 1.0, "tenants": ["a=60%@1/1"]}, "add up to 60 %"),
        ({"qps": 1.0, "turns": "3", "shared_prefix": "100:1:50%"}, "leave the share out"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(typed: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says) as caught:
        drawn(**typed)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- the schedule as text and as files


def test_a_terminal_shows_the_beginning_and_the_end_a_pipe_everything() -> None:
    plan = options(qps=50.0, arrivals="constant", duration="4s")
    schedule = loadtest.dry_run(plan)
    short, full = (dry.text(plan, schedule, in_full=in_full).splitlines() for in_full in (False, True))
    assert full[0].split() == ["scheduled_s", "prompt_tokens", "output_tokens"]
    assert full.index("") == 1 + 200
    assert short.index("") == 1 + 20 + 1 + 5
    assert "175 more" in short[21]
    assert full[-3:] == short[-3:] == [
        "200 arrivals in 4.00 s: 50/s, SCV of the gaps 0, 50 in the busiest second",
        "prompt tokens: 128 each, 25,600 in all",
        "output tokens: 32 each, 6,400 in all",
    ]  # fmt: skip


def test_the_file_of_a_dry_run_is_replayed_as_the_same_schedule(tmp_path: Path) -> None:
    plan = options(qps=5.0, turns="uniform:3:0.3", gap="1s", duration="20s", shared_prefix="100")
    schedule = loadtest.dry_run(plan)
    dry.write(plan, schedule, tmp_path / "s.csv")
    back = loadtest.dry_run(options(file=tmp_path / "s.csv"))
    assert back.scheduled_s == pytest.approx(schedule.scheduled_s - schedule.scheduled_s[0], abs=2e-6, nan_ok=True)
    assert back.prompt_tokens.tolist() == schedule.prompt_tokens.tolist()
    assert back.prefix_hashes is not None
    assert schedule.prefix_hashes is not None
    assert np.array_equal(back.prefix_hashes, schedule.prefix_hashes)
    with (tmp_path / "s.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(schedule)


def test_a_trace_of_sessions_lasts_as_long_as_asked_so_that_real_answers_have_time(tmp_path: Path) -> None:
    plan = options(qps=5.0, turns="3", gap="1s", duration="20s")
    dry.write(plan, schedule := loadtest.dry_run(plan), tmp_path / "s.csv")
    replay = options(file=tmp_path / "s.csv", duration="90s")
    assert loadtest.sends_for_s(replay) == 90.0
    assert len(loadtest.dry_run(replay)) == len(schedule)


def test_the_json_of_a_dry_run_holds_every_request_and_the_figures(tmp_path: Path) -> None:
    plan = options(qps=20.0, duration="5s", tenants=["chat=70%@30/5", "batch=30%@400/9"])
    schedule = loadtest.dry_run(plan)
    path = dry.write(plan, schedule, tmp_path / "s.json")
    found = json.loads(path.read_text())
    assert found == json.loads(dry.as_json(plan, schedule))
    assert len(found["requests"]) == found["summary"]["requests"] == len(schedule)
    assert {r["tenant"] for r in found["requests"]} == {"chat", "batch"}
    assert found["requests"][0]["scheduled_s"] == schedule.scheduled_s[0]
    assert sum(found["summary"]["tenants"].values()) == pytest.approx(1)
    assert found["summary"]["prompt_tokens"] == sum(r["prompt_tokens"] for r in found["requests"])


def test_the_busiest_second_is_counted_by_hand() -> None:
    trace = workload.Schedule(
        scheduled_s=np.array([0.1, 0.2, 1.0, 1.5, 1.9, 3.0]),
        prompt_tokens=np.ones(6, dtype=np.int64),
        output_tokens=np.ones(6, dtype=np.int64),
    )
    plan = loadtest.Options(url=URL, trace=trace, content=Content(), prompt_tokens=Lengths(mean=1))
    assert dry.figures(plan, loadtest.dry_run(plan))["peak_1s"] == 3


def test_every_heading_of_the_help_is_about_options_that_exist() -> None:
    """An option under no heading is shown as another one; a heading of options that are gone would hide a mistake."""
    named = [name for names in LOADTEST.values() for name in names]
    assert set(named) <= set(inspect.signature(command).parameters)
    assert len(named) == len(set(named))


def test_no_run_sends_the_words_of_another_unless_asked_to() -> None:
    """A prefix cache keeps what it has seen: a second run with the same seed would be told better than it is."""
    found = target.Target(
        scheme="http", host="127.0.0.1", address="127.0.0.1", port=9, path="/v1/completions", model="m", ignore_eos=True,
        chars_per_token=2.0, extra_tokens=0.0, notes=(), endpoint=endpoints.Spec(name="completions", path="/v1/completions", model="m"),
    )  # fmt: skip

    def prompts_of(plan: loadtest.Options) -> set[str]:
        with contextlib.ExitStack() as given:
            source = payloads.make(parent._payload(plan, loadtest.dry_run(plan), found, given))
            return {source.ask(i).text[:30] for i in range(200)}

    fresh, kept = options(users=1), options(users=1, same_words=True)
    assert not prompts_of(fresh) & prompts_of(fresh)
    assert prompts_of(kept) == prompts_of(kept)
