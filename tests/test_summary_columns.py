"""Requests as columns: the same figures as one request at a time, from records and from files; timeline, curves and repeats by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import record, slo, stats, summary
from mlsys_bench.report import rows
from mlsys_bench.summary import columns, course, promises
from mlsys_bench.types import LoadTest, Machine, RequestRecord, Requests, Validity

MACHINE = Machine(hard={"cores": 2}, soft={})


def requests(seed: int) -> list[RequestRecord]:
    """Return up to a dozen requests with everything that may be missing missing now and then."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(rng.integers(0, 13)):
        due, events = float(rng.uniform(0, 10)), int(rng.integers(0, 6))
        stamps = tuple((due + np.cumsum(rng.exponential(0.1, events))).tolist())
        found.append(
            RequestRecord(
                index=i,
                scheduled_s=due,
                sent_s=due + 0.01 * i if rng.random() < 0.8 else None,
                token_s=stamps,
                tokens_per_event=tuple(rng.integers(0, 4, events).tolist()),
                done_s=due + 9.0 if rng.random() < 0.7 else None,
                prompt_tokens=int(rng.integers(1, 99)) if rng.random() < 0.7 else None,
                output_tokens=int(rng.integers(0, 30)) if rng.random() < 0.6 else None,
                token_source=(None, "usage", "chunks")[i % 3],
                outcome="ok" if rng.random() < 0.7 else "timeout",
                tenant=(None, "a", "b")[int(rng.integers(0, 3))],
                stage_s={"connect": 0.25} if rng.random() < 0.3 else {},
                in_window=bool(rng.random() < 0.7),
            )
        )  # fmt: skip
    return sorted(found, key=lambda r: r.scheduled_s)


SEEDS = st.integers(0, 2**32 - 1)


def numbers(values: list[float | None]) -> np.ndarray:
    return np.array(values, dtype=np.float64)


@given(SEEDS)
def test_columns_say_of_every_request_what_the_record_says(seed: int) -> None:
    ordered = requests(seed)
    run = columns.of(ordered[::-1])
    for ours, of in (
        (run.ttft_s, summary.ttft_s), (run.e2e_s, summary.e2e_s), (run.tpot_s, summary.tpot_s), (run.lateness_s, summary.lateness_s),
        (run.last_s - run.sent_s, summary.service_s),
    ):  # fmt: skip
        np.testing.assert_allclose(ours, numbers([of(r) for r in ordered]))
    gaps, sizes = run.gaps_s
    alone = [summary.itl_s(r) for r in ordered]
    np.testing.assert_allclose(gaps, np.concatenate([np.zeros(0), *alone]), atol=1e-12)
    assert sizes.tolist() == [len(each) for each in alone]


@given(SEEDS, st.sampled_from(["ttft_p95<500ms", "tpot_p50<100ms,e2e_p99<1s", "itl_p90<200ms", "itl_mean<300ms", "a:ttft_p50<1s"]))
def test_requests_keep_a_promise_alone_as_they_do_together(seed: int, limits: str) -> None:
    ordered = requests(seed)
    kept = promises.keeps_all(columns.of(ordered), slo.parse(limits))
    assert kept.tolist() == [summary.meets_all(r, slo.parse(limits)) for r in ordered]


@given(SEEDS, st.integers(0, 2**12 - 1))
def test_a_part_of_the_columns_is_the_columns_of_that_part(seed: int, bits: int) -> None:
    ordered = requests(seed)
    chosen = [bool(bits >> i & 1) for i in range(12)]
    part = columns.of(ordered).where(np.array(chosen[: len(ordered)], dtype=bool))
    again = columns.of([r for r, kept in zip(ordered, chosen, strict=False) if kept])
    np.testing.assert_array_equal(part.offsets, again.offsets)
    np.testing.assert_array_equal(part.token_s, again.token_s)
    np.testing.assert_array_equal(part.e2e_s, again.e2e_s)


def run_of(n: int = 400) -> list[RequestRecord]:
    rng = np.random.default_rng(0)
    found = []
    for i, due in enumerate(np.sort(rng.uniform(0, 20, n)).tolist()):
        stamps = tuple((due + 0.1 + 0.02 * np.arange(4) + rng.uniform(0, 0.005)).tolist())
        found.append(
            RequestRecord(
                index=i,
                scheduled_s=due,
                sent_s=due + 1e-4,
                headers_s=due + 0.001,
                token_s=stamps,
                tokens_per_event=(1, 1, 2, 1),
                done_s=stamps[-1],
                prompt_tokens=12,
                output_tokens=5,
                token_source="usage" if i % 4 else "chunks",
                http_status=200,
                outcome="ok" if i % 20 else "reset",
                tenant="a" if i % 2 else "b",
                stage_s={"connect": 0.01} if i % 50 == 0 else {},
            )
        )  # fmt: skip
    return found


def summarised(records: list[RequestRecord] | summary.Columns) -> LoadTest:
    return summary.summarise(
        records, source="loadtest", target="here", arrivals="poisson", offered_rate_per_s=20.0, slo=slo.parse("ttft_p95<500ms"),
        validity=Validity(verdict="valid"), window=(0.0, 20.0),
    )  # fmt: skip


def test_files_of_requests_are_summarised_as_the_records_they_hold(tmp_path: Path) -> None:
    """Two shards of every other request, read without a record in between, give the same load test to the last digit."""
    records = run_of()
    shards = [record.write(tmp_path / f"{i}.parquet", Requests(t0_unix_s=1.0, requests=tuple(records[i::2])), MACHINE) for i in range(2)]
    assert summarised(columns.read(shards)) == summarised(records)


def test_a_file_of_requests_opens_in_one_line_of_anybody_else(tmp_path: Path) -> None:
    """What pandas.read_parquet calls: a plain table with a column a field and lists of stamps."""
    import pyarrow.parquet as pq

    path = record.write(tmp_path / "run.parquet", Requests(t0_unix_s=1.0, requests=tuple(run_of(5))), MACHINE)
    table = pq.read_table(path)
    assert table.num_rows == 5
    assert table.column_names == [f.name for f in dataclasses.fields(RequestRecord)]
    assert len(table["token_s"].to_pylist()[0]) == 4


def test_a_load_test_tells_more_than_a_simulation_does() -> None:
    found = summarised(run_of())
    assert found.token_sources == {"usage": 300, "chunks": 80}
    assert {t.name: t.requests for t in found.tenants} == {"a": 200, "b": 200}
    assert found.mean_output_tokens == 5
    assert found.prompt_tokens_per_s == pytest.approx(380 * 12 / 20)
    assert found.service_s is not None
    assert found.service_s.p50 == pytest.approx(found.e2e_s.p50, abs=2e-4)
    assert found.chunk_gap_s is not None
    assert found.chunk_gap_s.p50 == pytest.approx(0.02)
    assert found.chunk_gap_s.count == 380 * 3
    assert found.itl_s.count == 380 * 4
    assert set(found.curves) == {"ttft", "tpot", "itl", "e2e", "service"}
    assert found.formulas["service_s"].startswith("last token - own send")
    again = summary.summarise(
        run_of(), source="simulation", target="here", arrivals="poisson", offered_rate_per_s=20.0, slo=None,
        validity=Validity(verdict="valid"), window=(0.0, 20.0),
    )  # fmt: skip
    assert (again.timeline, again.service_s, again.curves) == (None, None, {})


def test_a_load_test_survives_its_file(tmp_path: Path) -> None:
    run = columns.of(run_of())
    found = dataclasses.replace(summarised(run_of()), steadiness=summary.settled(run, duration_s=20.0, warmup_s=None))
    assert record.read(record.write(tmp_path / "run.json", found, MACHINE), LoadTest) == found


# ---------------------------------------------------------------- timeline


def test_a_timeline_worked_out_by_hand() -> None:
    """Three requests in steps of a fifth of a second: one answered, one of two tokens in one event, one that failed."""
    run = columns.of([
        RequestRecord(index=0, scheduled_s=0.0, sent_s=0.1, token_s=(1.0, 2.0), tokens_per_event=(1, 1), done_s=2.0),
        RequestRecord(index=1, scheduled_s=0.5, sent_s=0.5, token_s=(1.5,), tokens_per_event=(2,), done_s=1.5),
        RequestRecord(index=2, scheduled_s=3.0, sent_s=3.0, done_s=9.9, outcome="timeout"),
    ])  # fmt: skip
    found = course.timeline(run, (0.0, 4.0))
    assert found is not None
    assert found.step_s == 0.2  # the longest with at least twenty steps in 9.9 s
    assert (sum(found.offered), sum(found.completed), {k: sum(v) for k, v in found.failed.items()}) == (3, 2, {"timeout": 1})
    assert [i for i, n in enumerate(found.offered) if n] == [0, 2, 15]
    assert sum(found.in_flight) * found.step_s == pytest.approx(2.0 + 1.0 + 6.9)
    assert sum(found.output_tokens_per_s) * found.step_s == pytest.approx(4)
    assert (found.ttft_p50_s[0], found.e2e_p95_s[0], found.lateness_max_s[0]) == pytest.approx((1.0, 2.0, 0.1))
    assert found.ttft_p50_s[15] is None
    assert found.lateness_max_s[15] == 0.0


@given(st.floats(0.05, 1e6))
def test_a_timeline_has_at_most_three_hundred_steps(length_s: float) -> None:
    step_s = course.step_of(length_s)
    assert length_s / step_s < course.MOST_STEPS
    assert step_s <= 1 or length_s / 1.0 >= course.LEAST_STEPS


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 20)), min_size=1, max_size=40))
def test_in_flight_is_conserved(spans: list[tuple[float, float]]) -> None:
    """Little's law on paper: the area under the requests in flight is the sum of their times."""
    starts, lengths = (np.array(each) for each in zip(*spans, strict=True))
    edges = np.linspace(0, 71, 30)
    area = float((course.in_flight(starts, starts + lengths, edges) * np.diff(edges)).sum())
    assert area == pytest.approx(float(lengths.sum()), abs=1e-6)


def test_samples_of_a_server_fall_on_the_axis_of_the_run() -> None:
    found = course.timeline(columns.of(run_of()), (0.0, 20.0))
    assert found is not None
    seen = course.resampled([0.1, 0.2, 2.5, 99.0, -1.0], [1.0, 3.0, 7.0, 100.0, 100.0], found)
    assert len(seen) == len(found.offered)
    assert (seen[0], seen[1], seen[2]) == (2.0, None, 7.0)
    assert sum(v is not None for v in seen) == 2


@given(st.lists(st.floats(0, 100), min_size=2, max_size=200))
def test_a_histogram_counts_every_value(values: list[float]) -> None:
    found = course.curve(np.array(values))
    assert found is not None
    assert sum(found.counts) == len(values)
    assert list(found.quantiles_s) == sorted(found.quantiles_s)
    assert found.quantiles_s[found.shares.index(0.5)] == pytest.approx(stats.quantile(values, 0.5), abs=1e-8)


# ---------------------------------------------------------------- repeats, tables


def test_repeats_by_hand() -> None:
    """Means of 1, 2 and 3: sd 1, Student's 2.92 / sqrt(3) to each side."""
    runs = [dataclasses.replace(summarised(run_of()), request_rate_per_s=rate) for rate in (1.0, 2.0, 3.0)]
    runs[1] = dataclasses.replace(runs[1], validity=Validity(verdict="degraded", reasons=("late",)))
    found = summary.repeated(runs, range(7, 10))
    rate = found.spread["request_rate_per_s"]
    assert (rate.mean, rate.sd) == pytest.approx((2.0, 1.0))
    assert rate.interval == pytest.approx((2 - 2.91999 / 3**0.5, 2 + 2.91999 / 3**0.5), rel=1e-4)
    assert found.seeds == (7, 8, 9)
    assert found.validity == Validity(verdict="degraded", reasons=("run 2: late",))
    assert found.spread["ttft_p50_s"].sd == 0.0


def test_one_run_has_no_spread() -> None:
    found = summary.repeated([summarised(run_of())], [0])
    assert (found.spread["ttft_p50_s"].sd, found.spread["ttft_p50_s"].interval) == (None, None)


def test_a_table_of_requests_has_a_row_each_and_empty_cells_for_nothing(tmp_path: Path) -> None:
    records = (*run_of(2), RequestRecord(index=9, scheduled_s=5.0, outcome="connect"))
    rows.write_csv(tmp_path / "run.csv", Requests(t0_unix_s=1.0, requests=records))
    _, *lines = [cells for _, cells in record.csv_lines(tmp_path / "run.csv")]
    named = [dict(zip(rows.COLUMNS, line, strict=True)) for line in lines]
    assert [each["index"] for each in named] == ["0", "1", "9"]
    assert float(named[1]["ttft_s"]) == pytest.approx(records[1].token_s[0] - records[1].scheduled_s, abs=1e-9)
    assert (named[2]["ttft_s"], named[2]["sent_s"], named[2]["outcome"]) == ("", "", "connect")
