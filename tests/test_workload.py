"""Traffic: laws have the moments they are named for, draws repeat, traces are read as they are."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate
from scipy import stats as reference

from mlsys_bench import stats, workload
from mlsys_bench.errors import BadInput
from mlsys_bench.types import Lengths, Provenance, Workload

TRACES = Path(__file__).parent.parent.parent / "shared" / "data" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason=f"the traces are not beside this checkout ({TRACES.name}/)")
LAWS = st.sampled_from(["poisson", "constant", "gamma:0.5", "gamma:1", "gamma:2.5"])
LENGTHS = st.one_of(
    st.builds(Lengths, mean=st.integers(1, 5000).map(float)),
    st.builds(Lengths, dist=st.just("lognormal"), mean=st.floats(1, 5000), cv=st.floats(0.01, 3), max=st.none() | st.integers(1, 9000)),
    st.builds(Lengths, dist=st.just("uniform"), mean=st.floats(1, 5000), cv=st.floats(0.01, 0.57), max=st.none() | st.integers(1, 9000)),
)
CHAT = workload.synthetic(20, arrivals="gamma:1.5", prompt="lognormal:900:1.2:8192", output="lognormal:250:1.0:1024")


# ---------------------------------------------------------------- what people write


@pytest.mark.parametrize(("text", "kind", "cv"), [("poisson", "poisson", 1), ("CONSTANT ", "constant", 0), ("gamma:1.5", "gamma", 1.5)])
def test_arrivals_are_read(text: str, kind: str, cv: float) -> None:
    law = workload.parse_arrivals(text)
    assert (law.kind, law.cv) == (kind, cv)
    assert workload.interarrival_scv(text) == cv**2


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


@given(LENGTHS)
def test_printed_lengths_read_back(lengths: Lengths) -> None:
    back = workload.parse_lengths(workload.show_lengths(lengths))
    assert (back.dist, back.max) == (lengths.dist, lengths.max)
    assert (back.mean, back.cv) == pytest.approx((lengths.mean, lengths.cv), rel=1e-11)


@pytest.mark.parametrize(
    "text",
    ["", "0", "-5", "nan", "inf", "many", "0.4", "1e12", "lognormal", "lognormal:256", "lognormal:256:1:2048:9", "lognormal:256:x",
     "lognormal:256:-1", "lognormal:256:1:0", "lognormal:256:1:inf", "uniform:100:0.6", "normal:100:0.3", "128:2"],
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
    shape = 1 / workload.interarrival_scv(law)
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
    import dataclasses

    if lengths.dist != "constant":
        cut = dataclasses.replace(lengths, max=min(cap, lengths.max or cap))
        assert 1 <= workload.mean_tokens(cut) <= workload.mean_tokens(lengths) * (1 + 1e-9)


def test_a_schedule_repeats_and_its_streams_are_apart() -> None:
    """Another arrival law leaves the lengths as they were, another prompt law the outputs."""
    import dataclasses

    first, again = workload.schedule(CHAT, n=100, seed=4), workload.schedule(CHAT, n=100, seed=4)
    calmer = workload.schedule(dataclasses.replace(CHAT, arrivals="constant"), n=100, seed=4)
    shorter = workload.schedule(dataclasses.replace(CHAT, prompt_tokens=Lengths(mean=5)), n=100, seed=4)
    assert first.scheduled_s.tolist() == again.scheduled_s.tolist() == shorter.scheduled_s.tolist()
    assert first.prompt_tokens.tolist() == again.prompt_tokens.tolist() == calmer.prompt_tokens.tolist()
    assert first.output_tokens.tolist() == again.output_tokens.tolist() == calmer.output_tokens.tolist() == shorter.output_tokens.tolist()
    assert first.scheduled_s.tolist() != calmer.scheduled_s.tolist()
    assert first.prompt_tokens.tolist() != first.output_tokens.tolist()


def test_a_schedule_of_a_duration_ends_in_time() -> None:
    drawn = workload.schedule(CHAT, duration_s=10, seed=1)
    assert drawn.scheduled_s.max() < 10
    assert len(drawn.scheduled_s) == len(drawn.prompt_tokens) == len(drawn.output_tokens) > 0


# ---------------------------------------------------------------- traces


@needs_traces
def test_the_azure_trace_is_as_published() -> None:
    """Gap SCV 1.2; dispersion 1.39, 3.87, 16.4 in full windows of 1, 10, 60 s, counted here a second way."""
    traffic, seen = workload.from_csv(TRACES / "azure_llm_2023_conv.csv")
    times_s, _, _ = workload.read_trace(TRACES / "azure_llm_2023_conv.csv")
    assert (seen.requests, round(seen.rate_per_s, 2), round(seen.gap_scv, 2)) == (19366, 5.53, 1.2)
    assert [round(seen.dispersion[w], 2) for w in ("1s", "10s", "60s")] == [1.39, 3.87, 16.41]
    for window_s in (1, 10, 60):
        counts, _ = np.histogram(times_s, np.arange(0, times_s[-1] // window_s + 1) * window_s)
        assert seen.dispersion[f"{window_s}s"] == pytest.approx(counts.var(ddof=1) / counts.mean())
    assert (round(seen.prompt_tokens.mean), round(seen.output_tokens.mean)) == (1155, 211)
    assert (seen.prompt_tokens.max, seen.output_tokens.max) == (14050, 1000)
    assert traffic.provenance is Provenance.MEASURED
    assert traffic.source == "azure_llm_2023_conv.csv: 19,366 requests in 3,502 s"


@needs_traces
def test_the_last_window_that_is_not_full_would_add_dispersion() -> None:
    """With it the Azure trace has 4.0 and 20.6 at 10 and 60 s (population variance), as it is sometimes quoted."""
    times_s, _, _ = workload.read_trace(TRACES / "azure_llm_2023_conv.csv")
    for window_s, quoted in ((10, 4.0), (60, 20.6)):
        counts = np.bincount((times_s // window_s).astype(int))
        assert round(float(counts.var() / counts.mean()), 1) == quoted


@needs_traces
def test_the_mooncake_trace_is_read_in_milliseconds() -> None:
    _, seen = workload.from_csv(TRACES / "mooncake_conversation.csv")
    assert (seen.requests, round(seen.duration_s)) == (12031, 3537)
    assert (round(seen.prompt_tokens.mean), round(seen.output_tokens.mean)) == (12035, 343)


def trace(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


def test_a_small_trace_by_hand(tmp_path: Path) -> None:
    """Gaps 1, 3: mean 2, variance 2, SCV 0.5; three requests in 4 s are two gaps, 0.5 per second; the file is not in order."""
    traffic, seen = workload.from_csv(trace(tmp_path, "timestamp,prompt_tokens,output_tokens\n14,30,5\n10,10,5\n11,20,5\n"))
    assert [seen.rate_per_s, seen.gap_scv, seen.duration_s] == pytest.approx([0.5, 0.5, 4.0])
    assert (seen.prompt_tokens.mean, seen.prompt_tokens.cv, seen.prompt_tokens.p50, seen.prompt_tokens.max) == (20, 0.5, 20, 30)
    assert seen.dispersion == {"1s": pytest.approx((0.25 * 2 + 0.25 * 2) / 3 / 0.5)}
    assert traffic == Workload(
        rate_per_s=0.5,
        arrivals="gamma:0.7071",
        prompt_tokens=Lengths(dist="lognormal", mean=20, cv=0.5, max=30),
        output_tokens=Lengths(mean=5, max=5),
        provenance=Provenance.MEASURED,
        source="trace.csv: 3 requests in 4 s",
    )


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = trace(tmp_path, "when_ms,in,out\n0,1,2\n500,3,4\n")
    times_s, prompts, outputs = workload.read_trace(path, time_column="when_ms", prompt_column="in", output_column="OUT")
    assert (times_s.tolist(), prompts.tolist(), outputs.tolist()) == ([0, 0.5], [1, 3], [2, 4])


def test_a_drawn_trace_comes_back_as_its_workload(tmp_path: Path) -> None:
    """Write what a workload draws, read it again: rate, burstiness and lengths within sampling error (20,000 requests)."""
    drawn = workload.schedule(CHAT, n=20_000, seed=9)
    rows = zip(drawn.scheduled_s.tolist(), drawn.prompt_tokens.tolist(), drawn.output_tokens.tolist(), strict=True)
    _, seen = workload.from_csv(trace(tmp_path, "time_s,prompt_tokens,output_tokens\n" + "".join(f"{t!r},{p},{o}\n" for t, p, o in rows)))
    assert seen.rate_per_s == pytest.approx(20, rel=4 * 1.5 / math.sqrt(20_000))
    assert math.sqrt(seen.gap_scv) == pytest.approx(1.5, rel=0.06)
    for summary, law in ((seen.prompt_tokens, CHAT.prompt_tokens), (seen.output_tokens, CHAT.output_tokens)):
        assert summary.mean == pytest.approx(workload.mean_tokens(law), rel=4 * summary.cv / math.sqrt(20_000))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty; a trace has a header line"),
        ("time,prompt_tokens,output_tokens\n", "0 request"),
        ("time,prompt_tokens,output_tokens\n1,2,3\n", "1 request"),
        ("time,prompt_tokens\n1,2\n2,2\n", "no column of output that is known"),
        ("a,b\n1,2\n", "it has a, b; name one with --time-column"),
        ("time,prompt_tokens,output_tokens\n1,2,3\nnoon,2,3\n", "line 3: time is 'noon'"),
        ("time,prompt_tokens,output_tokens\n1,2,3\nnan,2,3\n", "line 3: time is 'nan'"),
        ("time,prompt_tokens,output_tokens\n1,2,3\n2,-2,3\n", "line 3: prompt_tokens is '-2'"),
        ("time,prompt_tokens,output_tokens\n1,2,3\n2,2,3.5\n", "line 3: output_tokens is '3.5'"),
        ("time,prompt_tokens,output_tokens\n1,2,3\n2,2\n", "line 3: output_tokens is None"),
        ("time,prompt_tokens,output_tokens\n1,2,3\n1,2,3\n", "all requests arrive at the same time"),
    ],
)
def test_a_broken_trace_says_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(BadInput) as caught:
        workload.from_csv(trace(tmp_path, text))
    assert says in str(caught.value)
    assert "trace.csv: " in str(caught.value)


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = trace(tmp_path, "time,prompt_tokens,output_tokens\n1,2,3\n2,2,3\n")
    with pytest.raises(BadInput, match=r"no column 'tokens_in'; it has time, prompt_tokens, output_tokens; name one with --prompt-column"):
        workload.from_csv(path, prompt_column="tokens_in")


@pytest.mark.parametrize("data", [b"\xff\xfe\x00\x01", b"PAR1\x00\xff"])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=r"trace\.csv: "):
        workload.from_csv(path)


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"gone\.csv: cannot be read as CSV: No such file or directory"):
        workload.from_csv(tmp_path / "gone.csv")
