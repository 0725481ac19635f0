"""Counters and histograms of servers become rates, bursts, lengths and prefix hits: known answers and recovered laws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import workload
from mlsys_bench.types import Lengths, LengthSummary, Provenance
from mlsys_bench.workload import burstiness, counters, metrics
from mlsys_bench.workload.counters import Series
from tests.scraped_series import T0, series

# ---------------------------------------------------------------- counters


def test_a_counter_that_falls_has_started_again_from_zero() -> None:
    assert counters.increments(series([5, 8, 2, 2, 6]), T0).tolist() == [0, 3, 2, 0, 4]


def test_a_counter_born_in_the_range_began_at_zero_and_one_found_running_did_not() -> None:
    late = T0 + 600
    assert counters.increments(series([4, 6], start_s=late), T0).tolist() == [4, 2]
    assert counters.increments(series([4, 6]), T0).tolist() == [0, 2]
    assert counters.increments(series([90_000, 90_007], start_s=late), T0).tolist() == [0, 7]


def test_replicas_are_summed_and_jitter_of_scrapes_moves_nothing() -> None:
    """Two replicas at other phases, each with 10 requests a scrape, scraped up to 2 s early or late: 20 a step, whatever the phase."""
    rng = np.random.default_rng(1)
    steady = 10.0 * np.arange(100)
    one, other = series(steady, pod="a"), series(steady, start_s=T0 + 7.1, pod="b")
    late = Series(name=other.name, labels=other.labels, times_s=other.times_s + rng.uniform(-2, 2, 100), values=other.values)
    found, total = counters.counted([one, late], T0, T0 + 1500, 15.0)
    assert total == 2 * 990
    assert found.counts[2:98].tolist() == [20.0] * 96


def test_a_missed_scrape_is_bridged_and_a_long_silence_is_a_gap() -> None:
    whole = series(4.0 * np.arange(40))
    one_missing = np.delete(np.arange(40), 20)
    many_missing = np.delete(np.arange(40), np.s_[15:30])
    for kept, known in ((one_missing, 39), (many_missing, 39 - 16)):
        part = Series(name=whole.name, labels={}, times_s=whole.times_s[kept], values=whole.values[kept])
        found, total = counters.counted([part], T0, T0 + 600, 15.0)
        assert total == 4 * 39  # nothing is lost
        assert np.isfinite(found.counts).sum() == known
        assert set(found.counts[np.isfinite(found.counts)]) == {4.0}


def test_pieces_of_a_range_are_joined_and_what_two_of_them_hold_counts_once() -> None:
    first, second = series([1, 2, 3], pod="a"), series([3, 5], start_s=T0 + 30, pod="a")
    joined = counters.merged([first, second, series([7, 8], pod="b")])
    assert [s.values.tolist() for s in joined] == [[1, 2, 3, 5], [7, 8]]


# ---------------------------------------------------------------- histograms


def buckets(lengths: Any, edges: tuple[float, ...], **labels: str) -> dict[str, list[Series]]:
    """Return what a server would say after these lengths, and nothing before."""
    lengths = np.asarray(lengths, dtype=float)
    counts = {edge: float((lengths <= edge).sum()) for edge in (*edges, math.inf)}
    made = {"bucket": [series([0, n], le="+Inf" if math.isinf(edge) else f"{edge:g}", **labels) for edge, n in counts.items()]}
    return made | {"sum": [series([0, lengths.sum()], **labels)], "count": [series([0, len(lengths)], **labels)]}


def lengths_of(lengths: Any, edges: tuple[float, ...]) -> LengthSummary:
    made = buckets(lengths, edges)
    found = counters.histogram(made["bucket"], made["sum"], made["count"], T0)
    assert found is not None
    return found


ONE_TWO_FIVE = tuple(m * 10.0**e for e in range(6) for m in (1, 2, 5))


@given(st.lists(st.integers(1, 100_000), min_size=2, max_size=60))
def test_the_mean_from_buckets_is_exact_and_the_true_cv_lies_within_its_bounds(lengths: list[int]) -> None:
    found = lengths_of(lengths, ONE_TWO_FIVE)
    cv = float(np.std(lengths) / np.mean(lengths))
    assert found.mean == pytest.approx(np.mean(lengths))
    assert found.cv_bounds is not None
    assert found.cv_bounds[0] - 1e-6 <= cv <= found.cv_bounds[1] + 1e-6
    assert found.cv_bounds[0] <= found.cv <= found.cv_bounds[1]
    assert found.max is not None
    assert found.max >= max(lengths)
    assert found.p50 <= found.p90 <= found.p99 <= found.max


def test_bounds_of_the_cv_by_hand() -> None:
    """Two of (0, 10], two of (10, 30], mean 12: between points 4, 20 at the least spread possible and ends 0, 4 x 12 / … at the most.

    Least: E[X^2] is smallest with both buckets at 10 -> mean 10 < 12, so the upper bucket moves to 14: (100 + 196) / 2 = 148.
    Most: lower ends 0 and 10 give mean 5; the missing 7 go to the upper bucket first (it can take 10): 50 + 7 * 40 = 330.
    """
    made = lengths_of([4, 8, 12, 24], (10, 30))
    assert made.mean == 12
    assert made.cv_bounds == pytest.approx((math.sqrt(148 / 144 - 1), math.sqrt(330 / 144 - 1)))


def test_a_drawn_law_is_recovered_from_its_buckets() -> None:
    drawn = workload.draw_lengths(Lengths(dist="lognormal", mean=900, cv=1.2, max=8192), 200_000, np.random.default_rng(3))
    found = lengths_of(drawn, ONE_TWO_FIVE)
    assert found.cv == pytest.approx(drawn.std() / drawn.mean(), rel=0.05)
    assert found.p50 == pytest.approx(np.median(drawn), rel=0.05)
    assert found.p99 == pytest.approx(np.quantile(drawn, 0.99), rel=0.1)


def test_lengths_beyond_the_last_bucket_have_no_bounds() -> None:
    found = lengths_of([5, 50, 500], (10, 100))
    assert found.cv_bounds is None
    assert found.max is None


def test_servers_with_other_buckets_are_one_histogram() -> None:
    """Of 90 lengths on a server whose buckets end at 2,000 and 10 on one whose end at 20,000, all is known up to every edge.

    Added edge by edge, only 5 lengths lay up to 5,000 where 90 lay up to 2,000: the ten were taken to be beyond the last bucket.
    """
    short, long = [100] * 60 + [1500] * 30, [1500] * 2 + [4000] * 3 + [9000] * 5
    near = tuple(e for e in ONE_TWO_FIVE if e <= 2000)
    far = tuple(e for e in ONE_TWO_FIVE if e <= 20_000)
    one, other = buckets(short, near, pod="a"), buckets(long, far, pod="b")
    found = counters.histogram(one["bucket"] + other["bucket"], one["sum"] + other["sum"], one["count"] + other["count"], T0)
    assert found == lengths_of(short + long, far)
    assert found.max == 10_000


def test_an_edge_that_a_server_cannot_know_is_left_out() -> None:
    """Lengths of 30 lie between the edges 10 and 100 of one server; how many of them are up to 50, only the other could say."""
    one, other = buckets([30] * 4, (10, 100), pod="a"), buckets([30, 60], (10, 50, 100), pod="b")
    found = counters.histogram(one["bucket"] + other["bucket"], one["sum"] + other["sum"], one["count"] + other["count"], T0)
    assert found == lengths_of([30] * 5 + [60], (10, 100))


def test_buckets_of_another_version_in_the_range_do_not_empty_those_beside_them() -> None:
    """A server counted up to 50 for the first half, was restarted with edges at 20 and 100, and went on: only +Inf was always there."""
    before = [series([0, n], le=le, pod="a") for le, n in (("50", 8), ("+Inf", 10))]
    late = T0 + 30
    after = [series([0, n], start_s=late, le=le, pod="a") for le, n in (("20", 3), ("100", 9), ("+Inf", 10))]
    found = counters.histogram(counters.merged(before + after), [series([0, 800])], [series([0, 20])], T0)
    assert found is not None
    assert (found.mean, found.cv_bounds, found.max) == (40, None, None)
    assert found.p50 < 100  # beyond which 11 of 20 lay, where 9 were added up to 100


# ---------------------------------------------------------------- what counters tell of traffic


def scraped(times_s: Any, every_s: float, hours: float, name: str = "vllm:time_to_first_token_seconds_count", **labels: str) -> Series:
    """Return a counter of these arrivals (from T0 on) as a scraper sees it."""
    at_s = np.arange(0, hours * 3600 + 1e-6, every_s)
    return Series(name=name, labels=labels, times_s=T0 + at_s, values=np.searchsorted(times_s, at_s).astype(float))


def seen(*arrived: Series, others: dict[str, tuple[Series, ...]] | None = None) -> metrics.Metrics:
    lengths = others or {
        f"vllm:request_{what}_tokens_{kind}": tuple(found)
        for what, mean in (("prompt", 300), ("generation", 80))
        for kind, found in buckets([mean, mean / 2, mean * 1.5], ONE_TWO_FIVE).items()
    }
    return metrics.Metrics(
        engine=metrics.ENGINES[0],
        start_s=float(arrived[0].times_s[0]),
        end_s=float(arrived[0].times_s[-1]),
        arrived_name=arrived[0].name,
        arrived_at="at the first token",
        arrived=arrived,
        others=lengths,
    )


def test_bursts_come_back_from_counters_scraped_every_15_s() -> None:
    """Ten hours of known bursts: the dispersion by formula lies in each window's interval, and the law found has it as well."""
    law = workload.parse_arrivals("mmpp:3:20%:60s")
    times_s = workload.arrival_times(8, "mmpp:3:20%:60s", duration_s=36_000, seed=2)
    found = metrics.workload(seen(scraped(times_s, 15.0, 10)), "here")
    assert found.observed is not None
    assert "15s" in found.observed.dispersion
    assert "1s" not in found.observed.dispersion
    back = workload.parse_arrivals(found.arrivals)
    for name in ("15s", "60s", "120s"):
        low, high = found.observed.dispersion_intervals[name]
        assert low <= 1 + burstiness.excess(law.bursts, 8, float(name[:-1])) <= high
        assert low <= 1 + burstiness.excess(back.bursts, found.rate_per_s, float(name[:-1])) <= high
    assert abs(found.rate_per_s - 8) < 4 * math.sqrt(8 * (1 + burstiness.excess(law.bursts, 8, 36_000)) / 36_000)
    assert "shorter bursts are not seen" in found.observed.notes[0]


def test_poisson_traffic_with_a_time_of_day_is_poisson_with_a_time_of_day() -> None:
    """Three days of a known daily course: its hours come back within four standard errors, and it is not taken for bursts."""
    levels = [1 + 0.6 * math.sin(2 * math.pi * (h + 0.5) / 24) for h in range(24)]
    text = "diurnal:24h:" + ",".join(f"{x:.4f}" for x in levels)
    times_s = workload.arrival_times(2, text, duration_s=3 * 86_400, seed=4)
    found = metrics.workload(seen(scraped(times_s, 30.0, 72)), "here")
    law = workload.parse_arrivals(found.arrivals)
    assert (law.kind, law.bursts, law.is_steady) == ("poisson", (), False)
    back = np.array(law.modulations[0].levels)  # type: ignore[attr-defined]
    assert np.all(np.abs(back - levels) < 4 * np.sqrt(np.array(levels) / (2 * 3 * 3600)) + 0.005)
    assert found.observed is not None
    assert all(low < 1.1 for low, _ in found.observed.dispersion_intervals.values())
    assert workload.at_peak(found).rate_per_s == pytest.approx(2 * 1.6, rel=0.06)


def test_a_server_without_histograms_gives_means_and_says_what_is_assumed() -> None:
    totals = {
        "vllm:prompt_tokens_total": (series([0, 5000], every_s=3600),),
        "vllm:generation_tokens_total": (series([0, 900], every_s=3600),),
    }
    found = metrics.workload(seen(series(np.linspace(0, 100, 241)), others=totals), "here")
    assert found.prompt_tokens == Lengths(dist="lognormal", mean=50, cv=1)
    assert found.output_tokens == Lengths(dist="lognormal", mean=9, cv=1)
    assert found.provenance is Provenance.ASSUMED
    assert found.observed is not None
    assert "no histogram of prompt lengths: their mean is exact, a cv of 1 is assumed" in found.observed.notes


def test_prefix_hits_are_those_of_the_servers_whatever_their_version() -> None:
    grown = (series([0, 400]),), (series([0, 1000]),)
    for hits, queries in metrics.ENGINES[0].hits:
        assert metrics._hit_share(seen(series([0, 9]), others=dict(zip((hits, queries), grown, strict=True)))) == 0.4
    old = {"vllm:gpu_prefix_cache_hit_rate": (series([-1, 0.2, 0.4]),)}  # -1 where the cache was off
    assert metrics._hit_share(seen(series([0, 9]), others=old)) == pytest.approx(0.3)
    assert metrics._hit_share(seen(series([0, 9]), others={"x": ()})) is None


def test_a_queue_is_told_because_counts_then_show_the_servers_pace() -> None:
    waiting = {"vllm:num_requests_waiting": (series([0, 3, 3, 0]),)}
    busy = seen(series(np.linspace(0, 100, 241)), others=dict(seen(series([0, 1])).others) | waiting)
    found = metrics.workload(busy, "here")
    assert found.observed is not None
    assert found.observed.notes[-1].startswith("requests waited in 50 % of the samples")
