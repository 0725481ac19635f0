"""MLPerf's scenarios: the numbers their rules publish, and figures counted by hand."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import slo
from mlsys_bench.askings import Asked
from mlsys_bench.errors import UnknownName
from mlsys_bench.loadtest import mlperf
from mlsys_bench.report import askings
from mlsys_bench.types import Outcome, RequestRecord
from tests import sample_records


def test_the_least_queries_are_those_of_the_rules() -> None:
    """64 queries of single stream (p90) and 662 of multi stream and server (p99) with one over: the figures that LoadGen itself uses."""
    assert mlperf.least_queries(0.90, 1) == 64
    assert mlperf.least_queries(0.99, 1) == 662
    assert [mlperf.most_over(n, 0.9) for n in (63, 64)] == [0, 1]


@settings(max_examples=30)
@given(st.integers(0, 40), st.sampled_from([0.9, 0.95, 0.99]))
def test_the_least_queries_keep_99_percent_confidence_and_one_fewer_does_not(over: int, p: float) -> None:
    """The binomial sum itself, the other way round: P(at most t of n over) <= 1 % at n, above it at n - 1."""
    from scipy.special import bdtr  # the binomial's distribution function

    n = mlperf.least_queries(p, over)
    assert float(bdtr(over, n, 1 - p)) <= 0.01 < float(bdtr(over, n - 1, 1 - p))
    if over:
        assert mlperf.most_over(n, p) == over


def test_the_estimate_leaves_the_slowest_but_one_out() -> None:
    """Of 64 queries one may be over: none is left out.  Of 93 two may: the slowest is left out."""
    assert mlperf.least_queries(0.9, 2) == 81
    assert mlperf.early_stopping_s([float(i) for i in range(64)], 0.9) == 63.0
    assert mlperf.early_stopping_s([float(i) for i in range(81)], 0.9) == 79.0
    assert mlperf.early_stopping_s([1.0] * 63, 0.9) is None


def record(index: int, done_s: float, scheduled_s: float = 0.0, outcome: Outcome = "ok") -> RequestRecord:
    return RequestRecord(index=index, scheduled_s=scheduled_s, sent_s=scheduled_s, done_s=done_s, outcome=outcome)


def test_a_query_of_multi_stream_takes_as_long_as_its_last_sample() -> None:
    records = [record(8 * q + k, scheduled_s=10.0 * q, done_s=10.0 * q + 1 + 0.1 * k) for q in range(700) for k in range(8)]
    found = mlperf.judge(mlperf.named("multi-stream"), records, offered_per_s=None, slo=None, lasted_s=7000.0)
    assert (found.queries, found.samples_per_query, found.shortfalls) == (700, 8, ())
    assert found.value == pytest.approx(1.7)
    without_one = mlperf.judge(mlperf.named("multi-stream"), records[1:], offered_per_s=None, slo=None, lasted_s=7000.0)
    assert without_one.queries == 699  # a query of seven answers is none


def test_offline_is_samples_over_the_time_of_all_of_them() -> None:
    records = [record(i, done_s=(i + 1) / 50) for i in range(100)]
    found = mlperf.judge(mlperf.named("offline"), records, offered_per_s=None, slo=None, lasted_s=2.0)
    assert found.value == pytest.approx(50.0)
    assert len(found.shortfalls) == 2
    assert "24,576" in found.shortfalls[1]


def test_server_holds_a_rate_when_few_enough_were_over_every_limit() -> None:
    """One of 662 over is as many as 99 % confidence in p99 allows, by the rules' own table; of 661 it is one too many."""
    limits = slo.parse("e2e_p99<1s,ttft_p99<300ms")
    scenario = mlperf.named("server")
    quick = [dataclasses.replace(record(i, done_s=0.5), token_s=(0.2, 0.5), tokens_per_event=(1, 1), output_tokens=2) for i in range(661)]
    slow = dataclasses.replace(quick[0], index=661, done_s=2.0, token_s=(0.2, 2.0))
    held = mlperf.judge(scenario, [*quick, slow], offered_per_s=20.0, slo=limits, lasted_s=600.0)
    assert (held.value, held.shortfalls) == (20.0, ())
    missed = mlperf.judge(scenario, [*quick[:-1], slow], offered_per_s=20.0, slo=limits, lasted_s=600.0)
    assert missed.value is None
    assert missed.shortfalls == ("1 of 661 queries had an E2E above 1.00 s; with so many over, 662 queries are needed",)
    late = dataclasses.replace(slow, done_s=0.5, token_s=(0.4, 0.5))
    assert (
        "had a TTFT above 300 ms"
        in mlperf.judge(scenario, [*quick[:-1], late], offered_per_s=20.0, slo=limits, lasted_s=600.0).shortfalls[0]
    )
    failed = mlperf.judge(scenario, [*quick, record(661, 0.1, outcome="rejected"), record(662, 0.1, outcome="timeout")],
                          offered_per_s=20.0, slo=limits, lasted_s=600.0)  # fmt: skip
    assert failed.value is None
    assert failed.shortfalls[1].startswith("2 of 663 queries had an E2E above 1.00 s, or failed; with so many over")
    unlimited = mlperf.judge(scenario, quick, offered_per_s=20.0, slo=None, lasted_s=600.0)
    assert unlimited.value is None
    assert "no latency limit" in unlimited.shortfalls[0]


def test_a_short_run_with_failures_says_what_it_is_short_of() -> None:
    records = [*(record(i, done_s=0.1) for i in range(100)), record(100, done_s=0.1, outcome="timeout")]
    found = mlperf.judge(mlperf.named("single-stream"), records, offered_per_s=None, slo=None, lasted_s=5.0)
    assert found.value == pytest.approx(0.1)
    assert [text.split(":")[0] for text in found.shortfalls] == [
        "1 of 101 requests failed", "the run lasted 5.00 s, the rules ask for 10.0 min",
    ]  # fmt: skip
    with pytest.raises(UnknownName, match="did you mean offline"):
        mlperf.named("ofline")


def test_the_report_sets_asked_beside_counted_and_says_what_a_run_falls_short_of() -> None:
    asked = Asked(
        what="made-up words", prompt_tokens=512.0, prompt_tokens_counted=509.6, output_tokens=64.0, output_tokens_counted=None,
        shared_prefix=0.25, sessions=7, images=2, notes=("its 5 rows were used 3 times",),
    )  # fmt: skip
    records = [record(i, done_s=0.25) for i in range(64)]
    scenario = mlperf.judge(mlperf.named("single-stream"), records, offered_per_s=None, slo=None, lasted_s=16.0)
    sample = sample_records.loadtest()
    first, second = askings.facts(dataclasses.replace(sample, asked=asked, scenario=scenario))
    assert first.text == "512 prompt tokens (counted 510), 64.0 output tokens (not counted by the server)"
    details = ["made-up words", "2 images each", "7 sessions", "an endless prefix cache would have 25.0 % of the prompts"]
    assert first.detail == "; ".join([*details, *asked.notes])
    assert (second.label, second.text) == ("MLPerf single-stream", "p90 latency, early-stopping estimate: 250 ms")
    assert "the run lasted 16.0 s, the rules ask for 10.0 min: --duration 600s" in second.detail
    assert second.tone == "unsure"
    assert askings.facts(dataclasses.replace(sample, asked=None, scenario=None)) == []
