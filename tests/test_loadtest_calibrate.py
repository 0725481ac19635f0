"""Calibration: the search on clients of known worth, runs held against known truths, and what later runs are told."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import hardware, loadtest, record, report
from mlsys_bench.calibrations import Calibration, Held
from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.loadtest import calibrate, held, trust
from mlsys_bench.loadtest.truth import Behaviour, Row
from mlsys_bench.loadtest.truth.client import serving
from mlsys_bench.senders import Sender
from mlsys_bench.types import LatencySummary, LoadTest, Machine, RequestRecord, Requests
from tests import sample_records
from tests.sample_calibrations import calibration
from tests.sample_calibrations import held as run_that_holds

# ---------------------------------------------------------------- the search


def client(good_for_per_s: float) -> calibrate.Attempt:
    """Return a client that keeps every limit up to a rate and is late above it."""
    return lambda rate: run_that_holds(lateness_p99_s=0.0003 if rate <= good_for_per_s else 0.004)


@given(st.floats(13.0, 50_000.0))
def test_the_search_ends_just_below_what_a_client_is_good_for(good_for_per_s: float) -> None:
    """With time enough: never above, not more than the closeness below, and three runs there."""
    found, steps = calibrate.search(client(good_for_per_s), lambda _: True)
    assert found is not None
    assert found <= good_for_per_s <= calibrate.CLOSE_ENOUGH * found
    (best,) = (step for step in steps if step.rate_per_s == found)
    assert (len(best.runs), best.missed, best.limit) == (3, (), None)
    assert all(step.missed and step.limit == "client" for step in steps if step.rate_per_s > good_for_per_s)
    assert [step.rate_per_s for step in steps] == sorted({step.rate_per_s for step in steps})


@given(st.floats(13.0, 50_000.0), st.integers(0, 40))
def test_a_search_without_time_never_trusts_a_rate_it_has_not_repeated(good_for_per_s: float, runs: int) -> None:
    left = itertools.count(runs, -1)
    now = [runs]

    def attempt(rate: float) -> Held:
        next(left)
        now[0] -= 1
        return client(good_for_per_s)(rate)

    found, steps = calibrate.search(attempt, lambda n: now[0] >= n)
    assert sum(len(step.runs) for step in steps) == runs - now[0]
    assert now[0] >= 0
    if found is not None:
        assert found <= good_for_per_s
        assert len(next(step for step in steps if step.rate_per_s == found).runs) >= 3


def test_a_rate_that_fails_when_repeated_is_given_up_for_a_lower_one() -> None:
    """400/s holds once in two runs; 200/s always: what is trusted lies below 400."""
    seen = itertools.count()
    found, steps = calibrate.search(
        lambda rate: run_that_holds(lateness_p99_s=0.004 if rate > 400 or (rate > 340 and next(seen) % 2) else 0.0003), lambda _: True
    )
    assert found is not None
    assert 200 <= found < 400
    assert any(step.missed and len(step.runs) > 1 for step in steps)


def test_a_client_that_holds_at_no_rate_is_trusted_at_none() -> None:
    found, steps = calibrate.search(client(0.0), lambda _: True)
    assert found is None
    assert [step.rate_per_s for step in steps] == [12.5, 25.0, 50.0, 100.0]


@pytest.mark.parametrize(
    ("change", "missed", "who"),
    [
        ({}, 0, None),
        ({"ttft_p50_error": 0.051}, 1, "client"),
        ({"ttft_p50_error": -0.051, "ttft_p99_error": 0.3}, 2, "client"),
        ({"ttft_p99_error": 0.0499, "lateness_p99_s": 0.0015, "achieved": 0.9951}, 0, None),
        ({"lateness_p99_s": 0.00151, "server_cpu_share": 0.99}, 1, "client"),
        ({"achieved": 0.99, "server_cpu_share": 0.99}, 1, "server"),
        ({"ttft_p99_error": 0.06, "server_lateness_p99_s": 0.002}, 1, "server"),
        ({"achieved": 1.006}, 1, "client"),
    ],
)
def test_each_limit_is_held_at_its_own_figure_and_the_narrow_point_is_named(change: dict[str, float], missed: int, who: str | None) -> None:
    run = run_that_holds(**change)
    assert len(calibrate.misses(run)) == missed
    if who is not None:
        assert calibrate.blame(run) == who


def test_a_budget_that_is_too_short_is_refused() -> None:
    with pytest.raises(BadInput, match=r"20\.0 s at least"):
        calibrate.run(5.0)


# ---------------------------------------------------------------- held against the truth


def answered(index: int, scheduled_s: float, first_s: float, **more: object) -> RequestRecord:
    usual = RequestRecord(
        index=index, scheduled_s=scheduled_s, sent_s=scheduled_s + 0.0002, headers_s=None, token_s=(first_s, first_s + 0.02),
        tokens_per_event=(1, 1), done_s=first_s + 0.02, prompt_tokens=1, output_tokens=2, token_source="usage", outcome="ok",
        http_status=200, in_window=True,
    )  # fmt: skip
    return dataclasses.replace(usual, **more)  # type: ignore[arg-type]


def told(stats: float = 20.0) -> dict[str, object]:
    return {"itl_ms": {"p50": stats}, "cpu_share": 0.3, "server_late_ms": {"p99": 0.5}}


def result(*, itl_p50_s: float = 0.0202) -> LoadTest:
    base = sample_records.loadtest()
    itl = LatencySummary(count=10, mean=itl_p50_s, p50=itl_p50_s, p90=None, p95=None, p99=None, intervals={})
    sender = Sender(share=0, host="here", core=None, sent=10, cpu_share=0.4, lateness_p99_s=0.0002, ended="done")
    return dataclasses.replace(base, itl_s=itl, senders=(sender,))


def test_a_run_is_held_against_the_truth_request_by_request() -> None:
    """Due every 100 ms; the server took 100 ms, and 110 ms were reported: 10 % off, 10 ms of bias, whatever the order of its rows."""
    t0 = 1.7e9
    records = [answered(i, 0.1 * i, 0.1 * i + 0.11) for i in range(11)]
    rows = [Row(due_unix_s=t0 + 0.1 * i, arrived_unix_s=t0 + 0.1 * i + 0.001, first_s=0.1, done_s=0.12, tokens=2) for i in range(11)]
    probe = Row(due_unix_s=None, arrived_unix_s=t0 - 1, first_s=0.5, done_s=0.6, tokens=1)
    found = held.hold(result(), Requests(t0_unix_s=t0, requests=tuple(records)), [probe, *reversed(rows)], told())
    assert found.requests == 11
    assert (found.ttft_p50_error, found.ttft_p99_error) == (pytest.approx(0.1), pytest.approx(0.1))
    assert found.bias_s == pytest.approx(0.01)
    assert found.itl_p50_error == pytest.approx(0.01)
    assert (found.lateness_p50_s, found.lateness_p99_s) == (pytest.approx(2e-4), pytest.approx(2e-4))
    assert found.achieved == pytest.approx(1.0, abs=1e-5)
    assert found.gap_cv == pytest.approx(0.0, abs=1e-4)
    assert (found.client_cpu_share, found.server_cpu_share, found.server_lateness_p99_s) == (0.4, 0.3, 0.0005)


def test_what_never_came_lowers_the_rate_and_what_lies_outside_the_window_does_not_count() -> None:
    t0 = 1.7e9
    records = [answered(i, 0.1 * i, 0.1 * i + 0.1) for i in range(11)] + [answered(11, 1.1, 1.9, in_window=False)]
    rows = [Row(due_unix_s=t0 + 0.1 * i, arrived_unix_s=t0 + 0.1 * i, first_s=0.1, done_s=0.1, tokens=2) for i in range(12) if i != 5]
    found = held.hold(result(), Requests(t0_unix_s=t0, requests=tuple(records)), rows, told())
    assert (found.requests, found.achieved) == (10, pytest.approx(10 / 11, abs=1e-5))
    assert found.bias_s == pytest.approx(0.0, abs=1e-9)


def test_a_run_of_which_the_server_knows_nothing_is_no_measurement() -> None:
    with pytest.raises(MeasurementFailed, match="too few"):
        held.hold(result(), Requests(t0_unix_s=1.7e9, requests=(answered(0, 0.0, 0.1),)), [], told())


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=40), st.randoms())
def test_every_request_finds_its_own_row_even_where_moments_coincide(micros: list[int], rng: object) -> None:
    """Arrivals may fall on the same microsecond: each row is used once and none is left over."""
    t0 = 1.7e9
    records = tuple(answered(i, us * 1e-6, us * 1e-6 + 0.1) for i, us in enumerate(micros))
    rows = [
        Row(due_unix_s=float(f"{t0 + us * 1e-6:.6f}"), arrived_unix_s=t0 + us * 1e-6, first_s=0.1, done_s=0.1, tokens=1) for us in micros
    ]
    rng.shuffle(rows)  # type: ignore[attr-defined]
    pairs = held.match(Requests(t0_unix_s=t0, requests=records), rows)
    assert len(pairs) == len(micros)
    assert len({id(row) for _, row in pairs}) == len(micros)
    assert max(abs((row.due_unix_s or 0) - t0 - r.scheduled_s) for r, row in pairs) < 5e-6


def test_the_interval_over_runs_is_students() -> None:
    """Three runs 1, 2, 3: mean 2, sd 1, t(2, 95 %) = 2.920: 2 +- 1.686."""
    found = held.spread_of([1.0, 2.0, 3.0])
    assert (found.mean, found.sd) == (2.0, 1.0)
    assert found.interval == (pytest.approx(2 - 1.6859, abs=1e-3), pytest.approx(2 + 1.6859, abs=1e-3))
    assert held.spread_of([4.0]).interval is None


# ---------------------------------------------------------------- what later runs are told


def known(**changes: object) -> trust.Trust:
    return trust.Trust(calibration=dataclasses.replace(calibration(), **changes), where="cal.json, 2026-01-15")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("open_loop", "rate", "tokens", "processes", "says"),
    [
        (True, 1600.0, 1600 * 32.0, 1, ""),
        (True, 1601.0, 10.0, 1, "1,601/s is more than this machine's client was found trustworthy at: up to 1,600/s"),
        (True, 800.0, 800 * 100.0, 2, "80,000 tokens/s are more"),
        (True, 99_999.0, 10.0, 0, ""),  # fewer processes than were ever calibrated: nothing is known
        (False, 15_000.0, 0.0, 1, ""),
        (False, 18_000.0, 0.0, 1, "85.9 % of what it can do"),
        (False, 6_500.0, 6_500 * 32.0, 1, "92.9 % of what it can do"),
    ],
)
def test_a_run_faster_than_the_calibration_is_told_so(open_loop: bool, rate: float, tokens: float, processes: int, says: str) -> None:
    notes = trust.notes(known(), open_loop=open_loop, rate_per_s=rate, tokens_per_s=tokens, processes=processes)
    assert len(notes) == bool(says)
    assert says in "".join(notes)
    assert trust.notes(None, open_loop=open_loop, rate_per_s=rate, tokens_per_s=tokens, processes=processes) == ()


def test_the_rate_of_a_closed_loop_is_what_was_answered() -> None:
    records = [answered(i, 0.0, 0.1) for i in range(18_000)]
    (note,) = trust.notes_on(known(), records, offered_per_s=None, window_s=1.0, processes=1)
    assert "in a closed loop" in note
    assert trust.notes_on(known(), records, offered_per_s=100.0, window_s=1.0, processes=1) == ()
    assert trust.notes_on(known(), [], offered_per_s=None, window_s=1.0, processes=1) == ()


def test_the_cached_calibration_counts_only_on_its_own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = trust.cached()
    assert file == tmp_path / "mlsys" / "calibration.json"
    assert trust.load(None) is None
    here = hardware.machine()
    record.write(file, calibration(), here)
    found = trust.load(None)
    assert found is not None
    assert found.calibration == calibration() == record.read(file, Calibration)
    elsewhere = Machine(hard={**here.hard, "cpu_name": "another", "gpu": "H100"}, soft=here.soft)
    record.write(file, calibration(), elsewhere)
    assert trust.load(None) is None
    with pytest.raises(BadInput, match=r"another machine .cpu_name another"):
        trust.load(file)
    record.write(file, calibration(), Machine(hard={**here.hard, "gpu": "H100", "torch": "9"}, soft={}))
    assert trust.load(None) is not None  # a GPU makes no other client
    file.write_text("{")
    assert trust.load(None) is None
    record.write(tmp_path / "other.json", sample_records.claims(), here)
    with pytest.raises(BadInput, match="holds a 'claims' record"):
        trust.load(tmp_path / "other.json")


def test_a_calibration_reads_as_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_all([("c.json", sample_records.head(calibration()), calibration())])
    text = " ".join(capsys.readouterr().out.split())
    assert "can be trusted up to 1,600/s (1 process); the truth server was the limit" in text
    assert "TTFT p99 +6.1 % off the truth (server)" in text
    nothing = dataclasses.replace(calibration().clients[0], trusted_rate_per_s=None, steps=calibration().clients[0].steps[2:])
    report.print_all([("c.json", sample_records.head(calibration()), dataclasses.replace(calibration(), clients=(nothing,)))])
    assert "cannot be trusted at any rate that was tried" in " ".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------- for real


@pytest.mark.measures
def test_a_calibration_of_this_machine_is_a_record_and_a_faster_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One short run of each kind, in place of a minute: what comes out is complete, whatever this machine is worth."""
    monkeypatch.setattr(calibrate, "FIRST_PER_S", 25.0)
    monkeypatch.setattr(calibrate, "MOST_PER_S", 25.0)
    monkeypatch.setattr(calibrate, "REPEATS", 1)
    monkeypatch.setattr(calibrate, "LEAST_BUDGET_S", 1.0)
    monkeypatch.setattr(calibrate, "LEAST_RUN_S", 0.9)
    monkeypatch.setattr(calibrate, "CEILING_RUN_S", 0.3)
    said: list[str] = []
    found = calibrate.run(6.0, say=said.append)
    (client_,) = found.clients
    assert found.repeats == 1
    assert client_.steps[0].rate_per_s == 25.0
    assert client_.steps[0].runs[0].requests >= 5
    assert np.isfinite(client_.steps[0].runs[0].bias_s)
    assert client_.requests_per_s is not None
    assert client_.streams_per_s is not None
    assert (client_.requests_per_s.mean or 0) > 50
    assert said[0] == "1 process at 25/s"
    slow = dataclasses.replace(client_, trusted_rate_per_s=12.5)
    file = record.write(tmp_path / "slow.json", dataclasses.replace(found, clients=(slow,)), hardware.machine())
    with serving(Behaviour(ttft_s=0.0, itl_s=0.0)) as server:
        result, _ = loadtest.run(loadtest.Options(url=server.url, qps=40.0, duration_s=0.5, warmup_s=0.0, calibration=file))
    assert any(reason.startswith("40.0/s is more than this machine's client was found") for reason in result.validity.reasons)
