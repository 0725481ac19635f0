"""Traffic from laws: they have the moments they are named for, and draws repeat."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate
from scipy import stats as reference

from mlsys_bench import record, slo, stats, workload
from mlsys_bench.errors import BadInput
from mlsys_bench.hardware import machine
from mlsys_bench.journeys import planning
from mlsys_bench.plan import Request, demand
from mlsys_bench.types import Lengths

LAWS = st.sampled_from(["poisson", "constant", "gamma:0.5", "gamma:1", "gamma:2.5"])
LENGTHS = st.one_of(
    st.builds(Lengths, mean=st.integers(1, 5000).map(float)),
    st.builds(Lengths, dist=st.just("lognormal"), mean=st.floats(1, 5000), cv=st.floats(0.01, 3), max=st.none() | st.integers(5000, 9000)),
    st.builds(Lengths, dist=st.just("uniform"), mean=st.floats(1, 5000), cv=st.floats(0.01, 0.57), max=st.none() | st.integers(5000, 9000)),
)
CHAT = workload.synthetic(20, arrivals="gamma:1.5", prompt="lognormal:900:1.2:8192", output="lognormal:250:1.0:1024")


# ---------------------------------------------------------------- what people write


@pytest.mark.parametrize(("text", "kind", "cv"), [("poisson", "poisson", 1), ("CONSTANT ", "constant", 0), ("gamma:1.5", "gamma", 1.5)])
def test_arrivals_are_read(text: str, kind: str, cv: float) -> None:
    law = workload.parse_arrivals(text)
    assert (law.kind, law.cv, law.modulations, law.is_steady) == (kind, cv, (), True)


@pytest.mark.parametrize(
    "text", ["", "poison", "gamma", "gamma:", "gamma:0", "gamma:-1", "gamma:nan", "gamma:inf", "gamma:1e9", "poisson:1", "constant:2"]
)
def test_arrivals_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="arrivals"):
        workload.parse_arrivals(text)


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("128", Lengths(mean=128)),
        ("lognormal:256:1.0", Lengths(dist="lognormal", mean=256, cv=1)),
        ("lognormal:256:1.0:2048", Lengths(dist="lognormal", mean=256, cv=1, max=2048)),
        ("uniform:100:0.3", Lengths(dist="uniform", mean=100, cv=0.3)),
    ],
)
def test_lengths_are_read(text: str, lengths: Lengths) -> None:
    assert workload.parse_lengths(text) == lengths


def test_a_maximum_below_the_mean_is_no_law() -> None:
    """Requests are cut to it, so that a plan for 900 tokens would be one for fewer than 512."""
    with pytest.raises(BadInput, match="a maximum of 512 tokens below the mean of 900"):
        workload.parse_lengths("lognormal:900:1.2:512")


@given(LENGTHS)
def test_printed_lengths_read_back(lengths: Lengths) -> None:
    back = workload.parse_lengths(workload.show_lengths(lengths))
    assert (back.dist, back.max) == (lengths.dist, lengths.max)
    assert (back.mean, back.cv) == pytest.approx((lengths.mean, lengths.cv), rel=1e-11)


@pytest.mark.parametrize(
    "text",
    ["", "0", "-5", "nan", "inf", "many", "0.4", "1e12", "lognormal", "lognormal:256", "lognormal:256:1:2048:9", "lognormal:256:x",
     "lognormal:256:-1", "lognormal:256:1:0", "lognormal:256:1:inf", "uniform:100:0.6", "cauchy:100:0.3", "128:2"],
)  # fmt: skip
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="lengths"):
        workload.parse_lengths(text)


@pytest.mark.parametrize("rate", [0, -1, math.nan, math.inf])
def test_a_rate_must_be_above_zero(rate: float) -> None:
    with pytest.raises(BadInput, match=r"^--qps .*: a rate must be above zero, e\.g\. --qps 20$"):
        workload.synthetic(rate, prompt="1", output="1")
    with pytest.raises(BadInput, match=r"^--qps "):
        workload.arrival_times(rate, "poisson", n=3)


# ---------------------------------------------------------------- arrivals


def test_constant_arrivals_are_a_metronome() -> None:
    assert workload.arrival_times(4, "constant", n=4).tolist() == [0, 0.25, 0.5, 0.75]
    assert workload.arrival_times(4, "constant", duration_s=1).tolist() == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("law", ["poisson", "gamma:0.3", "gamma:1.5", "gamma:2"])
def test_gaps_have_the_law_they_are_named_for(law: str) -> None:
    """Kolmogorov-Smirnov against scipy's gamma law with shape 1 / CV**2; a fixed seed, p above 0.1 %."""
    gaps = np.diff(workload.arrival_times(50, law, n=20_000, seed=11))
    shape = 1 / workload.parse_arrivals(law).cv ** 2
    assert reference.kstest(gaps, reference.gamma(shape, scale=1 / (50 * shape)).cdf).pvalue > 0.001


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0])
def test_gaps_have_the_mean_and_cv_asked_for(cv: float) -> None:
    """Within four standard errors: sd / sqrt(n) for the mean; sd of the squared deviations for the variance."""
    gaps = np.diff(workload.arrival_times(10, f"gamma:{cv}", n=200_000, seed=5)) * 10
    squares = (gaps - 1) ** 2
    assert abs(gaps.mean() - 1) < 4 * gaps.std() / math.sqrt(len(gaps))
    assert abs(squares.mean() - cv**2) < 4 * squares.std() / math.sqrt(len(gaps))


def test_poisson_counts_are_poisson() -> None:
    """In windows of 1 s: variance / mean is one, by the chi-squared law of the dispersion."""
    times = workload.arrival_times(20, "poisson", duration_s=2000, seed=3)
    windows = int((times[-1] - times[0]) // 1)
    low, high = reference.chi2.interval(0.9999, windows - 1)
    assert low <= stats.index_of_dispersion(times, 1.0) * (windows - 1) <= high


@given(LAWS, st.floats(0.5, 200), st.integers(0, 2**31), st.integers(1, 300))
def test_one_seed_is_one_process_however_much_of_it_is_asked_for(law: str, rate: float, seed: int, n: int) -> None:
    longer = workload.arrival_times(rate, law, n=2 * n, seed=seed)
    shorter = workload.arrival_times(rate, law, n=n, seed=seed)
    within = workload.arrival_times(rate, law, duration_s=float(shorter[-1]) or 1e-9, seed=seed)
    assert shorter.tolist() == longer[:n].tolist()
    assert within.tolist() == [t for t in shorter if t < (float(shorter[-1]) or 1e-9)]
    assert (np.diff(longer) >= 0).all()


def test_another_seed_is_another_process() -> None:
    assert workload.arrival_times(5, "poisson", n=5, seed=1).tolist() != workload.arrival_times(5, "poisson", n=5, seed=2).tolist()


def test_no_request_is_an_empty_schedule() -> None:
    assert len(workload.arrival_times(5, "poisson", n=0)) == 0
    assert len(workload.arrival_times(0.001, "poisson", duration_s=1e-6)) == 0


@pytest.mark.parametrize(
    "amount",
    [{}, {"n": 1, "duration_s": 1.0}, {"n": -1}, {"duration_s": 0.0}, {"duration_s": math.nan}, {"n": 10**12}, {"duration_s": 1e12}],
)
def test_an_amount_that_is_none_is_refused(amount: dict[str, float]) -> None:
    with pytest.raises(BadInput, match=r"requests|duration"):
        workload.arrival_times(5, "poisson", **amount)  # type: ignore[arg-type]


# ---------------------------------------------------------------- lengths


@given(LENGTHS, st.integers(0, 2**31))
def test_lengths_stay_within_one_and_max(lengths: Lengths, seed: int) -> None:
    drawn = workload.draw_lengths(lengths, 200, np.random.default_rng(seed))
    assert drawn.dtype == np.int64
    assert drawn.min() >= 1
    assert lengths.max is None or drawn.max() <= lengths.max


@pytest.mark.parametrize(
    "text",
    [
        "lognormal:900:1.2:8192",
        "lognormal:3:1.0",
        "lognormal:250:1.0:1024",
        "uniform:100:0.3",
        "uniform:2:0.5",
        "lognormal:90000:2:200000",
        "uniform:50:0.5:60",
    ],
)
def test_the_moments_are_those_of_what_is_drawn(text: str) -> None:
    """Exact sums against 400,000 draws, within four standard errors."""
    lengths = workload.parse_lengths(text)
    drawn = workload.draw_lengths(lengths, 400_000, np.random.default_rng(7)).astype(float)
    mean = workload.mean_tokens(lengths)
    squares = (drawn - mean) ** 2
    assert abs(drawn.mean() - mean) < 4 * drawn.std() / math.sqrt(len(drawn))
    assert abs(squares.mean() / mean**2 - workload.scv(lengths)) < 4 * squares.std() / mean**2 / math.sqrt(len(drawn))


def test_a_long_tail_is_integrated_as_well() -> None:
    """Lognormal, mean 30,000, CV 2, cut at 500,000: against scipy's own law, integrated numerically."""
    variance = math.log(1 + 2**2)
    law = reference.lognorm(math.sqrt(variance), scale=30_000 * math.exp(-variance / 2))
    mean = integrate.quad(law.sf, 0, 500_000, limit=500)[0]
    second = integrate.quad(lambda x: 2 * x * law.sf(x), 0, 500_000, limit=500)[0]
    lengths = workload.parse_lengths("lognormal:30000:2:500000")
    assert workload.mean_tokens(lengths) == pytest.approx(mean, rel=1e-5)
    assert workload.scv(lengths) == pytest.approx(second / mean**2 - 1, rel=1e-4)


def test_an_uncut_law_keeps_its_mean_and_cv() -> None:
    lengths = workload.parse_lengths("lognormal:5000:1.5")
    assert workload.mean_tokens(lengths) == pytest.approx(5000, rel=1e-6)
    assert workload.scv(lengths) == pytest.approx(1.5**2, rel=1e-5)


@given(LENGTHS, st.integers(1, 9000))
def test_a_lower_maximum_never_raises_the_mean(lengths: Lengths, cap: int) -> None:
    if lengths.dist != "constant":
        cut = dataclasses.replace(lengths, max=min(cap, lengths.max or cap))
        assert 1 <= workload.mean_tokens(cut) <= workload.mean_tokens(lengths) * (1 + 1e-9)


def test_a_schedule_repeats_and_its_streams_are_apart() -> None:
    """Another arrival law leaves the lengths as they were, another prompt law the outputs."""
    first, again = workload.schedule(CHAT, n=100, seed=4), workload.schedule(CHAT, n=100, seed=4)
    calmer = workload.schedule(dataclasses.replace(CHAT, arrivals="constant"), n=100, seed=4)
    shorter = workload.schedule(dataclasses.replace(CHAT, prompt_tokens=Lengths(mean=5)), n=100, seed=4)
    assert first.scheduled_s.tolist() == again.scheduled_s.tolist() == shorter.scheduled_s.tolist()
    assert first.prompt_tokens.tolist() == again.prompt_tokens.tolist() == calmer.prompt_tokens.tolist()
    assert first.output_tokens.tolist() == again.output_tokens.tolist() == calmer.output_tokens.tolist() == shorter.output_tokens.tolist()
    assert first.scheduled_s.tolist() != calmer.scheduled_s.tolist()
    assert first.prompt_tokens.tolist() != first.output_tokens.tolist()


@given(st.sampled_from(("poisson", "constant", "gamma:2", "mmpp:4:20%:6s")), LENGTHS, LENGTHS, st.integers(1, 400), st.integers(0, 9))
def test_typical_requests_come_at_their_rate_and_in_order(arrivals: str, prompt: Lengths, output: Lengths, n: int, seed: int) -> None:
    traffic = dataclasses.replace(CHAT, arrivals=arrivals, prompt_tokens=prompt, output_tokens=output)
    drawn = workload.typical(traffic, n, seed)
    assert len(drawn) == len(drawn.prompt_tokens) == len(drawn.output_tokens) == n
    assert (np.diff(drawn.scheduled_s) >= 0).all()
    assert ((drawn.scheduled_s >= 0) & (drawn.scheduled_s < n / CHAT.rate_per_s * (1 + 1e-12))).all()


def test_typical_lengths_are_those_of_their_law_far_more_closely_than_free_draws() -> None:
    """Over 40 seeds of 300 requests: each mean within half a per cent or so, and a tenth of the spread of free draws."""
    wanted = workload.mean_tokens(CHAT.output_tokens)
    drawn = {
        "typical": [workload.typical(CHAT, 300, seed) for seed in range(40)],
        "free": [workload.schedule(CHAT, n=300, seed=seed) for seed in range(40)],
    }
    means = {name: np.array([requests.output_tokens.mean() / wanted - 1 for requests in each]) for name, each in drawn.items()}
    assert means["typical"].std() < 0.2 * means["free"].std()
    assert abs(means["typical"].mean()) < 4 * means["typical"].std() / math.sqrt(40) + 2e-3  # of whole tokens
    tied = workload.typical(dataclasses.replace(CHAT, length_correlation=0.6), 4000, 1)
    assert reference.spearmanr(tied.prompt_tokens, tied.output_tokens).statistic == pytest.approx(0.6, abs=4 / math.sqrt(4000))


def test_typical_poisson_arrivals_are_uniform_points() -> None:
    """Given how many fall into a time, the points of a Poisson process are uniform there: Kolmogorov and Smirnov agree over all seeds."""
    calm = dataclasses.replace(CHAT, arrivals="poisson")
    points = np.concatenate([workload.typical(calm, 50, seed).scheduled_s for seed in range(60)]) * CHAT.rate_per_s / 50
    assert reference.kstest(points, "uniform").pvalue > 1e-3


def test_lengths_are_tied_as_much_as_asked() -> None:
    """Spearman's rho of 20,000 pairs within four standard errors; each law alone stays what it was."""
    apart = workload.schedule(CHAT, n=20_000, seed=4)
    for rho in (-0.6, 0.3, 0.9):
        drawn = workload.schedule(dataclasses.replace(CHAT, length_correlation=rho), n=20_000, seed=4)
        assert reference.spearmanr(drawn.prompt_tokens, drawn.output_tokens).statistic == pytest.approx(rho, abs=4 / math.sqrt(20_000))
        assert drawn.prompt_tokens.tolist() == apart.prompt_tokens.tolist()
        assert drawn.output_tokens.mean() == pytest.approx(workload.mean_tokens(CHAT.output_tokens), rel=0.04)
    with pytest.raises(BadInput, match="between -1 and 1"):
        workload.schedule(dataclasses.replace(CHAT, length_correlation=1.5), n=3)


def test_a_schedule_of_a_duration_ends_in_time() -> None:
    drawn = workload.schedule(CHAT, duration_s=10, seed=1)
    assert drawn.scheduled_s.max() < 10
    assert len(drawn.scheduled_s) == len(drawn.prompt_tokens) == len(drawn.output_tokens) > 0


# ---------------------------------------------------------------- planning for traffic that was seen


def asked(files: list[Path], **changes: object) -> Request:
    given_: dict[str, Any] = dict.fromkeys(
        ("scenario", "qps", "gpu", "precision", "slo", "arrivals", "prompt_tokens", "output_tokens", "max_batch", "headroom", "trace")
    )
    return planning.ask(**given_ | {"measured": files, "model": "llama-3-8b", "term": "on-demand", "seed": 0} | changes)


def test_a_plan_takes_its_traffic_from_a_workload_record_and_flags_override_it(tmp_path: Path) -> None:
    seen = dataclasses.replace(CHAT, length_correlation=0.3, source="seen")
    record.write(tmp_path / "traffic.json", seen, machine())
    assert asked([tmp_path / "traffic.json"]).workload == seen
    faster = asked([tmp_path / "traffic.json"], qps=50.0, prompt_tokens="128").workload
    assert (faster.rate_per_s, faster.prompt_tokens, faster.output_tokens) == (50, Lengths(mean=128), CHAT.output_tokens)
    with pytest.raises(BadInput, match="the traffic is given 2 times"):
        asked([tmp_path / "traffic.json", tmp_path / "traffic.json"])
    with pytest.raises(BadInput, match="--from a workload record"):
        asked([])


def test_a_plan_takes_its_traffic_from_a_trace(tmp_path: Path) -> None:
    drawn = workload.schedule(CHAT, n=500, seed=1)
    rows = zip(drawn.scheduled_s.tolist(), drawn.prompt_tokens.tolist(), drawn.output_tokens.tolist(), strict=True)
    path = tmp_path / "trace.csv"
    path.write_text("time_s,prompt_tokens,output_tokens\n" + "".join(f"{t},{p},{o}\n" for t, p, o in rows))
    found = asked([], trace=path).workload
    assert found.rate_per_s == pytest.approx(workload.rate_per_s(drawn))
    assert found.prompt_tokens.mean == pytest.approx(drawn.prompt_tokens.mean())
    assert found.observed is None
    with pytest.raises(BadInput, match=r"--trace brings its own traffic; --arrivals and --prompt-tokens would change it"):
        asked([], trace=path, prompt_tokens="8000", arrivals="constant")
    with pytest.raises(BadInput, match=r"--output-tokens would change it"):
        asked([], trace=path, output_tokens="8000")


def test_an_option_that_names_nothing_is_refused() -> None:
    for name, given_ in (("gpu", ""), ("gpu", ","), ("precision", " ")):
        with pytest.raises(BadInput, match=f"--{name} '{given_}' names none"):
            asked([], qps=1.0, **{name: given_})


@pytest.mark.parametrize("name", ["slo", "headroom", "prompt_tokens", "availability"])
def test_an_option_that_says_nothing_is_refused(name: str) -> None:
    """`--slo "$SLO"` of a variable that is not set: the plan was made for limits that nobody gave."""
    with pytest.raises(BadInput, match=f"--{name.replace('_', '-')} '' says nothing; write a value, or leave the option out"):
        planning.asked(scenario=None, **{name: ""})


def test_a_plan_is_for_the_busiest_time_of_day_and_says_so() -> None:
    """A day whose peak is twice the mean costs as much as that peak all day long."""
    day = workload.synthetic(10, arrivals="diurnal:24h:1,1,4,2", prompt="300", output="60")
    steady = workload.synthetic(20, prompt="300", output="60")
    request = Request(model="llama-3-8b", workload=day, slo=slo.parse("ttft_p95<1s"), gpus=("l4",))
    planned, flat = planning.plan(request), planning.plan(dataclasses.replace(request, workload=steady))
    assert (planned.replicas, planned.workload.rate_per_s) == (flat.replicas, 20)
    assert any("sized for the busiest time of day or stage: 20/s where the mean is 10/s" in a for a in planned.assumptions)
    assert not any("busiest" in a or "bursts" in a for a in flat.assumptions)
    stages = planning.plan(dataclasses.replace(request, workload=dataclasses.replace(day, rate_per_s=1, arrivals="stages:10m@20,10m@0")))
    assert any("stage: 20/s where the mean is 10/s" in a for a in stages.assumptions), "the rate of 1/s is what stages are multiples of"
    bursty = planning.plan(dataclasses.replace(request, workload=dataclasses.replace(steady, arrivals="mmpp:2:25%:30s")))
    assert any(a.startswith("bursts come every 2.00 min on average") for a in bursty.assumptions)


def test_correlated_lengths_reach_the_planner() -> None:
    """Stratified pairs have the rank correlation asked for within four standard errors, and each side its own lengths still."""
    apart, tied = demand.of(CHAT), demand.of(dataclasses.replace(CHAT, length_correlation=0.5))
    assert reference.spearmanr(tied.prompt, tied.output).statistic == pytest.approx(0.5, abs=4 / math.sqrt(len(tied.prompt)))
    assert sorted(tied.prompt) == sorted(apart.prompt)
    assert sorted(tied.output) == sorted(apart.output)
    assert tied.held_tokens[0] > apart.held_tokens[0]
