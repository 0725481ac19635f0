"""Every statistic against a figure worked out by hand, and the rules for what is counted where."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import slo, stats, summary
from mlsys_bench.types import LoadTest, RequestRecord, Validity

VALID = Validity(verdict="valid")


def request(index: int = 0, scheduled_s: float = 0.0, token_s: tuple[float, ...] = (), **more: object) -> RequestRecord:
    """Return an answered request; one token per event unless said otherwise."""
    fields: dict[str, object] = {
        "sent_s": scheduled_s,
        "tokens_per_event": (1,) * len(token_s),
        "output_tokens": len(token_s),
        "done_s": token_s[-1] if token_s else None,
        **more,
    }
    return RequestRecord(index=index, scheduled_s=scheduled_s, token_s=token_s, **fields)  # type: ignore[arg-type]


def summarise(*records: RequestRecord, limits: str | None = None, window: tuple[float, float] | None = None) -> LoadTest:
    return summary.summarise(
        records,
        source="loadtest",
        target="here",
        arrivals="constant",
        offered_rate_per_s=1.0,
        slo=slo.parse(limits) if limits else None,
        validity=VALID,
        window=window,
    )


# ---------------------------------------------------------------- one request


def test_latencies_of_one_request_worked_out_by_hand() -> None:
    """Due at 1.0, sent late at 1.2, tokens at 1.5, 1.7 and 2.1: TTFT 0.5, E2E 1.1, TPOT 0.3, gaps 0.2 and 0.4."""
    r = request(scheduled_s=1.0, sent_s=1.2, token_s=(1.5, 1.7, 2.1))
    assert summary.ttft_s(r) == pytest.approx(0.5)
    assert summary.e2e_s(r) == pytest.approx(1.1)
    assert summary.tpot_s(r) == pytest.approx(0.3)
    assert summary.itl_s(r) == pytest.approx([0.2, 0.4])
    assert summary.lateness_s(r) == pytest.approx(0.2)


def test_a_single_token_has_no_tpot_and_no_gap() -> None:
    r = request(token_s=(0.4,))
    assert summary.tpot_s(r) is None
    assert len(summary.itl_s(r)) == 0
    assert summary.e2e_s(r) == summary.ttft_s(r) == pytest.approx(0.4)


def test_an_event_of_four_tokens_is_four_gaps_of_a_quarter() -> None:
    """Events of 4 tokens every 80 ms, as a server that bundles sends them: ITL is 20 ms, TPOT 240 ms / 15."""
    r = request(token_s=(0.1, 0.18, 0.26, 0.34), tokens_per_event=(4, 4, 4, 4), output_tokens=16)
    assert summary.itl_s(r) == pytest.approx([0.02] * 12)
    assert summary.tpot_s(r) == pytest.approx(0.24 / 15)


def test_lateness_leaves_out_the_time_to_connect() -> None:
    r = request(scheduled_s=1.0, sent_s=1.5, token_s=(2.0,), stage_s={"connect": 0.4})
    assert summary.lateness_s(r) == pytest.approx(0.1)


@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=40), st.lists(st.integers(1, 6), min_size=41, max_size=41))
def test_gaps_add_up_to_the_stream(gaps: list[float], tokens: list[int]) -> None:
    stamps = tuple(np.cumsum([0.5, *gaps]).tolist())
    r = request(token_s=stamps, tokens_per_event=tuple(tokens[: len(stamps)]), output_tokens=sum(tokens[: len(stamps)]))
    assert summary.itl_s(r).sum() == pytest.approx(stamps[-1] - stamps[0])
    assert len(summary.itl_s(r)) == sum(tokens[1 : len(stamps)])


# ---------------------------------------------------------------- a run


def test_counts_rates_and_errors_of_a_small_run_worked_out_by_hand() -> None:
    """Ten seconds: two answers of 2 and 3 tokens, one rejected, one timed out after a token."""
    found = summarise(
        request(0, 0.0, (1.0, 2.0)),
        request(1, 1.0, (2.0, 3.0, 4.0)),
        request(2, 2.0, outcome="rejected", done_s=2.1),
        request(3, 3.0, (4.0,), outcome="timeout", done_s=9.0),
        window=(0.0, 10.0),
    )
    assert (found.requests, found.ok, found.errors) == (4, 2, {"rejected": 1, "timeout": 1})
    assert found.duration_s == 10.0
    assert found.request_rate_per_s == pytest.approx(0.2)
    assert found.output_tokens_per_s == pytest.approx(0.6)  # the token of the timed-out request was made too
    assert found.ttft_s.count == 2
    assert found.ttft_s.mean == pytest.approx(1.0)
    assert found.e2e_s.mean == pytest.approx(2.5)
    assert found.tpot_s.mean == pytest.approx(1.0)
    assert found.itl_s.count == 3
    assert (found.goodput_per_s, found.goodput_ratio, found.slo, found.slo_met) == (None, None, None, {})


def test_a_failed_request_is_in_no_latency() -> None:
    slow = request(1, 0.0, (50.0, 60.0), outcome="reset")
    assert summarise(request(0, 0.0, (1.0, 2.0)), request(2, 0.0, (1.0, 2.0)), slow).ttft_s.mean == pytest.approx(1.0)


def test_warm_up_counts_in_nothing_but_the_throughput_of_the_window() -> None:
    """A request sent before the window whose tokens come inside it is the server's work there, but not one of the window's users."""
    early = request(0, 0.5, (1.5, 2.5), in_window=False)
    found = summarise(early, request(1, 1.0, (2.0, 3.0)), window=(1.0, 5.0))
    assert (found.requests, found.ttft_s.count) == (1, 1)
    assert found.request_rate_per_s == pytest.approx(2 / 4)
    assert found.output_tokens_per_s == pytest.approx(4 / 4)


def test_an_overloaded_server_is_not_flattered_by_the_drain() -> None:
    """Answers that come after the window do not count as done in it, however many requests were sent."""
    done_in_time = [request(i, i * 0.1, (i * 1.0 + 0.5, i * 1.0 + 1.0)) for i in range(100)]
    assert summarise(*done_in_time, window=(0.0, 10.0)).request_rate_per_s == pytest.approx(1.0)


def test_a_window_not_given_spans_the_run() -> None:
    found = summarise(request(0, 2.0, (3.0, 4.0)), request(1, 3.0, (5.0, 6.0)))
    assert found.duration_s == pytest.approx(4.0)
    assert found.output_tokens_per_s == pytest.approx(1.0)


def test_a_run_without_requests_is_empty_and_not_an_error() -> None:
    found = summarise(limits="ttft_p95<1s,goodput>50%")
    assert (found.requests, found.duration_s, found.request_rate_per_s, found.goodput_ratio) == (0, 0.0, 0.0, None)
    assert found.slo_met == {"ttft_p95": None, "goodput": None}


def test_a_simulation_has_no_lateness() -> None:
    found = summary.summarise(
        [request(0, 0.0, (1.0, 2.0))], source="simulation", target="t", arrivals="poisson", offered_rate_per_s=None, slo=None,
        validity=VALID, window=None,
    )  # fmt: skip
    assert found.lateness_s is None
    assert "scheduled" in found.formulas["ttft_s"]


# ---------------------------------------------------------------- percentiles and intervals


@pytest.mark.parametrize(
    ("count", "too_few"),
    [
        (0, ("mean", "p50", "p90", "p95", "p99")),
        (1, ("mean", "p50", "p90", "p95", "p99")),
        (2, ("p90", "p95", "p99")),
        (200, ("p99",)),
        (500, ()),
    ],
)
def test_a_percentile_the_sample_is_too_small_for_is_not_given(count: int, too_few: tuple[str, ...]) -> None:
    """p99 of 200: the largest value itself lies under the 99th percentile with a chance of 0.99**200 = 13 %."""
    found = summary.summary(np.arange(count, dtype=float))
    assert found.too_few == too_few
    assert all(getattr(found, name) is None for name in too_few)


@given(st.integers(0, 600))
def test_a_tail_percentile_is_given_exactly_where_its_interval_is(count: int) -> None:
    values = np.arange(count, dtype=float)
    found = summary.summary(values)
    for name in ("p90", "p95", "p99"):
        interval = stats.quantile_interval(values, summary.QUANTILES[name])
        assert found.intervals.get(name) == interval
        assert (getattr(found, name) is None) == (interval is None) == (name in found.too_few)


def test_percentiles_of_known_values() -> None:
    found = summary.summary(np.arange(1001) / 1000)
    assert (found.p50, found.p90, found.p95, found.p99, found.mean) == pytest.approx((0.5, 0.9, 0.95, 0.99, 0.5))
    assert found.intervals["p95"] == stats.quantile_interval(np.arange(1001) / 1000, 0.95)
    assert set(found.intervals) == {"mean", "p50", "p90", "p95", "p99"}


def test_intervals_of_gaps_know_that_gaps_of_one_request_go_together() -> None:
    """Forty requests, each with its own pace: a hundred equal gaps are one piece of evidence, so the interval is wide."""
    rng = np.random.default_rng(1)
    paces = rng.uniform(0.01, 0.03, 40)
    together = summary.pooled_summary([np.full(100, pace) for pace in paces])
    apart = summary.summary(np.repeat(paces, 100))
    low, high = together.intervals["p50"]
    naive_low, naive_high = apart.intervals["p50"]
    assert together.p50 == apart.p50
    assert high - low > 3 * (naive_high - naive_low)


def test_the_bootstrap_of_gaps_agrees_with_theory_when_gaps_are_independent() -> None:
    """One gap per request: the bootstrap's 90 % interval of the mean is 1.645 standard errors to each side, within its own noise."""
    values = np.random.default_rng(2).exponential(1.0, 180)
    low, high = summary.pooled_summary([np.array([v]) for v in values]).intervals["mean"]
    half = 1.645 * values.std() / np.sqrt(180)
    # a bootstrap quantile of 200 resamples has a standard error of about 0.15 of the standard error it estimates
    assert low == pytest.approx(values.mean() - half, abs=4 * 0.15 * half / 1.645)
    assert high == pytest.approx(values.mean() + half, abs=4 * 0.15 * half / 1.645)


def test_the_bootstrap_covers_the_true_median_of_dependent_gaps() -> None:
    """True median 1 of lognormal paces: 60 runs of 50 requests must cover it in 75 % at least (90 % less four standard errors)."""
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(60):
        groups = [pace * rng.uniform(0.99, 1.01, 30) for pace in np.exp(rng.normal(0, 0.5, 50))]
        low, high = summary.pooled_summary(groups).intervals["p50"]
        covered += low <= 1.0 <= high
    assert covered >= 60 * (0.9 - 4 * np.sqrt(0.09 / 60))


def test_many_gaps_are_binned_without_moving_the_interval_off_the_figure() -> None:
    rng = np.random.default_rng(4)
    groups = [rng.exponential(0.02, 100) for _ in range(1000)]
    found = summary.pooled_summary(groups)
    for stat in ("mean", "p50", "p90", "p95", "p99"):
        low, high = found.intervals[stat]
        assert low < getattr(found, stat) < high
        assert (high - low) / getattr(found, stat) < 0.05


def test_gaps_of_too_few_requests_have_no_tail() -> None:
    found = summary.pooled_summary([np.full(1000, 0.02)] * 3)
    assert found.p50 == pytest.approx(0.02)
    assert found.too_few == ("p90", "p95", "p99")
    assert found.intervals == {}


# ---------------------------------------------------------------- promises


def test_goodput_counts_requests_that_keep_every_limit_themselves() -> None:
    """Of six in ten seconds: two keep both limits, one breaks TTFT, one TPOT, one fails, one has a single token and no TPOT to break."""
    found = summarise(
        request(0, 0.0, (0.4, 0.44)),
        request(1, 1.0, (1.4, 1.44)),
        request(2, 2.0, (2.6, 2.64)),
        request(3, 3.0, (3.4, 3.46)),
        request(4, 4.0, (4.4, 4.44), outcome="reset"),
        request(5, 5.0, (5.4,)),
        limits="ttft_p95<500ms,tpot_p95<50ms",
        window=(0.0, 10.0),
    )
    assert found.goodput_ratio == pytest.approx(3 / 6)
    assert found.goodput_per_s == pytest.approx(0.3)
    assert found.goodput_interval == stats.wilson(3, 6)


def test_an_itl_limit_holds_for_that_statistic_of_the_requests_own_gaps() -> None:
    """Gaps of 10, 10 and 100 ms: the median keeps 50 ms, the mean of 40 ms does, the p99 does not."""
    r = request(token_s=(1.0, 1.01, 1.02, 1.12))
    assert summary.meets_all(r, slo.parse("itl_p50<50ms"))
    assert summary.meets_all(r, slo.parse("itl_mean<50ms"))
    assert not summary.meets_all(r, slo.parse("itl_p99<50ms"))


def test_a_promise_kept_broken_and_not_decidable() -> None:
    records = [request(i, i * 1.0, (i + 0.1005 + i / 1000, i + 0.5)) for i in range(100)]  # TTFT 100.5 … 199.5 ms
    found = summarise(*records, limits="ttft_p50<150ms,ttft_p95<150ms,ttft_p99<1s,e2e_mean<1s,goodput>40%,availability>99%")
    assert found.slo_met == {
        "ttft_p50": True, "ttft_p95": False, "ttft_p99": None, "e2e_mean": True, "goodput": True, "availability": True,
    }  # fmt: skip
    assert found.slo == "ttft_p50<150ms,ttft_p95<150ms,ttft_p99<1s,e2e_mean<1s,goodput>40%,availability>99%"
    assert found.goodput_ratio == pytest.approx(0.5)  # TTFT of 100.5 … 149.5 ms


def test_a_failed_request_keeps_no_percentile() -> None:
    """Of 100, TTFT of 90 is 100 to 189 ms: with ten failed p90 is missed whatever the others took, and p80 is their 89th percentile."""
    records = scrambled(90)
    failed = [request(i, i * 1.0, outcome="timeout") for i in range(90, 100)]
    kept = summarise(*records, *failed, limits="ttft_p80<180ms,ttft_p90<10s,itl_p90<10s,ttft_mean<1s,e2e_p50<1s").slo_met
    assert kept == {"ttft_p80": True, "ttft_p90": False, "itl_p90": False, "ttft_mean": True, "e2e_p50": True}
    assert summarise(*records, *failed, limits="ttft_p80<179ms").slo_met == {"ttft_p80": False}
    assert summarise(*failed[:3], limits="ttft_p90<1s").slo_met == {"ttft_p90": None}


def scrambled(n: int) -> list[RequestRecord]:
    """Return requests of TTFT 100 ms, 101 ms …, in an order in which neighbours tell nothing of each other, and E2E of 0.5 s."""
    return [request(i, i * 1.0, (i + 0.1 + at / 1000, i + 0.5)) for i, at in enumerate(np.random.default_rng(1).permutation(n).tolist())]


def test_who_was_given_up_on_purpose_is_in_no_share_and_no_percentile() -> None:
    """Ten of 100 users close the window: the others were all answered in time."""
    away = [request(i, i * 1.0, outcome="cancelled", done_s=i + 0.2) for i in range(90, 100)]
    found = summarise(*scrambled(90), *away, limits="ttft_p90<181.5ms,goodput>98%,availability>99%,ttft_p50<1s")
    assert set(found.slo_met.values()) == {True, False}
    assert found.slo_met == {"ttft_p90": True, "goodput": False, "availability": True, "ttft_p50": True}
    assert found.goodput_ratio == pytest.approx(82 / 90)  # TTFT of 100 … 181 ms
    assert found.slo_seen["availability"] == 1.0


def test_a_request_still_under_way_at_the_end_is_longer_than_it_has_waited() -> None:
    """Of 100, ten are on their way for 30 s, two of them with a first token: that breaks limits below it and leaves those above open."""
    late = {i: request(i, i * 1.0, (i + 0.1,) if i > 80 else (), outcome="unfinished", done_s=i + 30.0) for i in range(3, 100, 10)}
    rows = [late.get(r.index, r) for r in scrambled(100)]
    found = summarise(*rows, limits="e2e_p95<1s,e2e_p80<1s,e2e_p97<40s,ttft_p95<1s,ttft_p90<1s,e2e_mean<2s,goodput>89%,availability>95%")
    assert found.slo_met == {
        "e2e_p95": False, "e2e_p80": True, "e2e_p97": None, "ttft_p95": False, "ttft_p90": None, "e2e_mean": None, "goodput": True,
        "availability": None,
    }  # fmt: skip
    assert (found.e2e_s.count, found.ttft_s.count, found.tpot_s.count) == (100, 100, 90)
    assert found.e2e_s.p95 == pytest.approx(30.0)
    assert found.e2e_s.p50 == pytest.approx(0.5)
    assert found.service_s is not None
    assert found.service_s.p95 == pytest.approx(30.0)
    assert found.errors == {"unfinished": 10}


def test_a_percentile_of_requests_that_are_alike_is_kept_only_where_it_has_an_interval() -> None:
    """1,000 waits in five long waves are worth a handful: a limit that a few break is open, one that half break is missed for sure."""
    waves = [request(i, i * 1.0, (i + 0.1 + 0.05 * (1 + np.sin(i / 32)), i + 0.5)) for i in range(1000)]
    found = summarise(*waves, limits="ttft_p95<199.9ms,ttft_p90<150ms,ttft_p99<300ms")
    assert found.ttft_s.p95 is not None
    assert "p95" not in found.ttft_s.intervals
    assert found.slo_met == {"ttft_p95": None, "ttft_p90": False, "ttft_p99": True}  # none was beyond 300 ms


def test_failures_break_availability() -> None:
    records = [request(i, i * 1.0, (i + 0.1, i + 0.2), outcome="ok" if i < 98 else "reset") for i in range(100)]
    assert summarise(*records, limits="availability>99%").slo_met == {"availability": False}


def test_the_keys_a_plan_is_compared_by() -> None:
    records = [request(i, i * 0.1, (i * 0.1 + 0.2, i * 0.1 + 0.3)) for i in range(100)]
    keys = summary.predicted_keys(summarise(*records, window=(0.0, 10.05)))
    assert keys["ttft_p50_s"] == pytest.approx(0.2)
    assert keys["tpot_p95_s"] == pytest.approx(0.1)
    assert keys["e2e_p95_s"] == pytest.approx(0.3)
    assert keys["throughput_tokens_per_s"] == pytest.approx((99 + 98) / 10.05)  # first and second tokens up to 10.05 s
    assert not [key for key in keys if "p99" in key]  # a hundred requests say nothing of it
    assert {key.split("_")[0] for key in keys} == {"ttft", "tpot", "itl", "e2e", "throughput"}


def test_the_token_rate_of_poisson_traffic_varies_as_a_compound_poisson_law() -> None:
    """Four requests of 2, 4, 4 and 6 tokens in 2 s: 8 +- 1.645 sqrt(sum of squares about n E[X^2]) / 2."""
    tokens = [2, 4, 4, 6]
    half = 1.6449 * (4 * (8 / 3 + 16)) ** 0.5 / 2
    assert summary.token_rate_interval(tokens, "poisson", 2.0) == pytest.approx((8 - half, 8 + half))
    assert summary.token_rate_interval([4, 4], "constant", 1.0) == pytest.approx((8, 8))
    assert summary.token_rate_interval(tokens, "trace", 2.0) is None


def test_the_token_rate_interval_covers_the_long_run_rate() -> None:
    """Simulated Poisson windows: the share that covers lies inside the binomial 99.9 % range around 90 %."""
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(600):
        tokens = np.maximum(1, rng.lognormal(3.5, 0.55, rng.poisson(200))).round().astype(int)
        found = summary.token_rate_interval(tokens.tolist(), "poisson", 50.0)
        assert found is not None
        covered += found[0] <= 4.0 * np.exp(3.5 + 0.55**2 / 2) <= found[1]
    assert abs(covered - 540) < 3.3 * (600 * 0.9 * 0.1) ** 0.5
