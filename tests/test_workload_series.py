"""Rates from a file, mixtures and normal laws of lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import workload
from mlsys_bench.errors import BadInput
from mlsys_bench.plan import course as courses
from mlsys_bench.types import Lengths, Workload
from mlsys_bench.workload import laws


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    """2/s for 10 s, 20/s for 10 s, 5/s for as long again: 270 requests in 30 s."""
    path = tmp_path / "Rates.csv"
    path.write_text("time_s,rate_per_s\n0,2\n10,20\n20,5\n")
    return path


def test_a_metronome_on_a_series_brings_each_piece_its_own_number(rates: Path) -> None:
    law = f"constant*series:{rates}"
    assert workload.written_rate_per_s(law) == pytest.approx(9.0)
    assert workload.written_duration_s(law) == pytest.approx(30.0)
    times = workload.arrival_times(9.0, law, duration_s=30.0)
    assert [int(((times >= a) & (times < a + 10)).sum()) for a in (0, 10, 20)] == pytest.approx([20, 200, 50], abs=1)
    within = np.diff(times[(times >= 10.1) & (times < 19.9)])
    assert within == pytest.approx(np.full(len(within), 1 / 20))


def test_a_series_begins_again_after_its_end_and_follows_another_rate(rates: Path) -> None:
    times = workload.arrival_times(18.0, f"constant*series:{rates}", duration_s=60.0)
    assert len(times) == pytest.approx(18 * 60, abs=1)
    assert int(((times >= 40) & (times < 50)).sum()) == pytest.approx(400, abs=1)


def test_a_linear_series_has_the_area_under_its_line(rates: Path) -> None:
    """(2 + 20) / 2 * 10 + (20 + 5) / 2 * 10 = 235 requests in 20 s."""
    law = f"constant*series:{rates}:linear"
    assert workload.written_duration_s(law) == pytest.approx(20.0)
    assert workload.written_rate_per_s(law) == pytest.approx(235 / 20)
    times = workload.arrival_times(235 / 20, law, duration_s=20.0)
    assert len(times) == pytest.approx(235, abs=1)
    by_5_s = 5 * (2 + (2 + 9)) / 2  # the rate is 11/s after 5 s
    assert int((times < 5).sum()) == pytest.approx(by_5_s, abs=1)


def test_a_series_of_dates_and_of_json_lines_is_the_same_as_of_seconds(tmp_path: Path) -> None:
    dates = tmp_path / "grafana.csv"
    dates.write_text("Time,Value\n2026-11-20 18:00:00,4\n2026-11-20 18:01:00,8\n")
    lines = tmp_path / "rates.jsonl"
    lines.write_text('{"t": 100, "qps": 4}\n{"t": 160, "qps": 8}\n')
    one, other = (workload.arrival_times(6.0, f"series:{path}", duration_s=120.0, seed=3) for path in (dates, lines))
    assert np.array_equal(one, other)
    assert workload.in_words(f"series:{dates}") == "Poisson, at rates that follow grafana.csv, up to 1.33 x their mean"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n2,3\n", "no column of time"),
        ("time,b\n1,2\n2,3\n", "no column of rate"),
        ("time,rate\n1,2\n", "at least two"),
        ("time,rate\n1,2\n1,3\n", "line 3: time 1 does not come after"),
        ("time,rate\n1,2\n2,-3\n", "line 3: '-3' is no rate"),
        ("time,rate\n1,2\n2,many\n", "line 3: 'many' is no rate"),
        ("time,rate\nsoon,2\n2,3\n", "line 2: 'soon' is no time"),
        ("time,rate\n1,0\n2,0\n", "all its rates are 0"),
    ],
)
def test_a_series_that_cannot_be_names_its_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "rates.csv"
    path.write_text(text)
    with pytest.raises(BadInput, match=says) as caught:
        workload.parse_arrivals(f"series:{path}")
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="there is no file"):
        workload.parse_arrivals("series:nowhere.csv")


# ---------------------------------------------------------------- lengths


def test_a_mixture_is_read_and_printed_back() -> None:
    law = workload.parse_lengths("mix:30%@lognormal:4000:1,70%@512")
    assert [part.share for part in law.parts] == pytest.approx([0.7, 0.3])  # in the order of their means
    assert law.mean == pytest.approx(0.7 * 512 + 0.3 * 4000)
    assert workload.parse_lengths(workload.show_lengths(law)) == law
    for text, says in (("mix:70%@512", "add up to 70 %"), ("mix:512", "no part of a mixture"), ("mix:70@512,30%@1", "no unit")):
        with pytest.raises(BadInput, match=says):
            workload.parse_lengths(text)


def test_a_mixture_draws_each_part_as_often_as_its_share() -> None:
    """Of 20,000 draws 70 % are 512 within four standard errors, and the others are lognormal with mean 4000."""
    law = workload.parse_lengths("mix:70%@512,30%@lognormal:4000:0.5")
    drawn = workload.draw_lengths(law, 20_000, np.random.default_rng(1))
    share = float(np.mean(drawn == 512))
    assert abs(share - 0.7) < 4 * (0.7 * 0.3 / 20_000) ** 0.5
    others = drawn[drawn != 512]
    assert abs(others.mean() - 4000) < 4 * 0.5 * 4000 / len(others) ** 0.5


@settings(max_examples=25)
@given(
    shares=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4),
    means=st.lists(st.floats(1, 5000), min_size=4, max_size=4),
    cvs=st.lists(st.floats(0.01, 2), min_size=4, max_size=4),
)
def test_the_mean_of_a_mixture_is_the_mean_of_its_parts(shares: list[float], means: list[float], cvs: list[float]) -> None:
    parts = [(share / sum(shares), Lengths(dist="lognormal", mean=m, cv=cv)) for share, m, cv in zip(shares, means, cvs, strict=False)]
    mixed = laws.mixture(parts)
    assert workload.mean_tokens(mixed) == pytest.approx(sum(share * workload.mean_tokens(law) for share, law in parts))


def test_a_normal_law_has_the_mean_and_spread_it_says() -> None:
    law = workload.parse_lengths("normal:1000:0.2:1800")
    drawn = workload.draw_lengths(law, 20_000, np.random.default_rng(2))
    assert abs(drawn.mean() - 1000) < 4 * 200 / 20_000**0.5
    assert drawn.std() == pytest.approx(200, rel=0.03)
    assert drawn.max() <= 1800
    assert workload.mean_tokens(law) == pytest.approx(1000, rel=1e-3)
    assert workload.scv(law) == pytest.approx(0.04, rel=0.01)
    assert workload.show_lengths(law) == "normal:1000:0.2:1800"


def test_correlated_lengths_of_a_mixture_are_still_that_mixture() -> None:
    law = workload.parse_lengths("mix:50%@100,50%@10000")
    traffic = Workload(rate_per_s=1.0, arrivals="poisson", prompt_tokens=law, output_tokens=law, length_correlation=0.9)
    plan = workload.schedule(traffic, n=4000, seed=4)
    assert abs(float(np.mean(plan.prompt_tokens == 100)) - 0.5) < 4 * (0.25 / 4000) ** 0.5
    assert float(np.mean(plan.prompt_tokens == plan.output_tokens)) > 0.75  # long prompts have long answers


def test_a_plan_follows_the_course_of_a_series(rates: Path) -> None:
    """Of 30 s with 2, 20 and 5/s the mean is 9/s; asked for at 18/s it is twice as high, and its peak is 40/s."""
    traffic = workload.synthetic(18.0, arrivals=f"gamma:1.5*series:{rates}", prompt="mix:50%@100,50%@300", output="10")
    course = courses.of(traffic)
    assert course.mean_per_s == pytest.approx(18.0)
    assert (course.peak_per_s, course.at(5.0), course.at(25.0)) == pytest.approx((40.0, 4.0, 10.0))
    peak = workload.at_peak(traffic)
    assert peak.rate_per_s == pytest.approx(40.0)
    assert peak.arrivals == "gamma:1.5"
