"""Two load tests side by side: what is compared with what, and what one run a side may decide."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mlsys_bench import record, summary
from mlsys_bench.gate import exit_status, loadtests
from mlsys_bench.journeys import compare as journey
from mlsys_bench.loadtests import LoadTests
from mlsys_bench.types import LoadTest, RequestRecord, Requests, Validity
from mlsys_bench.verdicts import Finding, Verdict
from tests.sample_records import head, machine


def requests(seed: int, times: float = 1.0, n: int = 1500, failed: int = 0, sd: float = 0.3) -> list[RequestRecord]:
    """Return answers whose TTFT is lognormal about 100 ms times a factor."""
    rng = np.random.default_rng(seed)
    due = np.sort(rng.uniform(0, 60, n)).tolist()
    ttft = (0.1 * times * rng.lognormal(0, sd, n)).tolist()
    return [
        RequestRecord(
            index=i, scheduled_s=d, sent_s=d, token_s=(d + t, d + t + 0.02, d + t + 0.04), tokens_per_event=(1, 1, 1), done_s=d + t + 0.04,
            prompt_tokens=100, output_tokens=3, outcome="ok" if i >= failed else "reset",
        )
        for i, (d, t) in enumerate(zip(due, ttft, strict=True))
    ]  # fmt: skip


def run(records: list[RequestRecord], **more: object) -> LoadTest:
    found = summary.summarise(
        records, source="loadtest", target="http://a:1 (m)", arrivals="poisson", offered_rate_per_s=25.0, slo=None,
        validity=Validity(verdict="valid"), window=(0.0, 60.0),
    )  # fmt: skip
    return dataclasses.replace(found, **more)  # type: ignore[arg-type]


def side(found: LoadTest | LoadTests, *records: list[RequestRecord]) -> loadtests.Side:
    return loadtests.Side(envelope=head(found), record=found, requests=tuple(summary.columns.of(rows) for rows in records))


def against(base: list[RequestRecord], cand: list[RequestRecord], with_requests: bool = True) -> Verdict:
    return loadtests.compare(*(side(run(rows), *([rows] if with_requests else [])) for rows in (base, cand)))


def of(verdict: Verdict, name: str) -> Finding:
    return next(f for f in verdict.findings if f.name == name)


@pytest.mark.parametrize("with_requests", [True, False])
def test_a_run_against_itself_passes(with_requests: bool) -> None:
    found = against(requests(0, sd=0.05), requests(0, sd=0.05), with_requests)
    assert found.verdict == "pass"
    assert all(f.ratio in (None, pytest.approx(1.0)) for f in found.findings)


@pytest.mark.parametrize("with_requests", [True, False])
def test_a_server_that_became_half_as_slow_again_is_a_regression(with_requests: bool) -> None:
    found = against(requests(0), requests(1, times=1.5), with_requests)
    assert found.verdict == "regression"
    ttft = of(found, "ttft_p50")
    assert ttft.verdict == "regression"
    assert ttft.interval is not None
    assert ttft.interval[0] < 1.5 < ttft.interval[1]
    assert of(found, "tpot_p50").verdict == "pass"


def test_a_faster_server_is_improved() -> None:
    assert of(against(requests(0), requests(1, times=0.7)), "ttft_p95").verdict == "improved"


def test_what_two_runs_may_differ_by_is_at_most_suspect() -> None:
    """8 % in a long quiet run is beyond the chance inside it, and not beyond what runs of one program differ by."""
    rows = requests(0, n=6000)
    slower = [dataclasses.replace(r, token_s=tuple(t + 0.08 * (r.token_s[0] - r.scheduled_s) for t in r.token_s)) for r in rows]
    assert of(against(rows, slower), "ttft_p50").verdict == "suspect"


def test_a_degraded_run_convicts_nobody() -> None:
    degraded = run(requests(1, times=1.5), validity=Validity(verdict="degraded", reasons=("late",)))
    found = loadtests.compare(side(run(requests(0))), side(degraded))
    assert of(found, "ttft_p50").verdict == "suspect"
    assert found.verdict == "suspect"


def test_the_resampled_error_is_what_runs_of_the_same_server_differ_by() -> None:
    """The standard error of log p50 of one run, against the standard deviation over 40 runs: 40 runs know it to 11 %, so within 40 %."""
    runs = [summary.columns.of(requests(seed, n=400)) for seed in range(40)]
    seen = float(np.std([np.log(np.median(rows.ttft_s)) for rows in runs], ddof=1))
    told = float(np.mean([loadtests.errors(rows)["ttft_p50"] for rows in runs[:10]]))
    assert told == pytest.approx(seen, rel=0.4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"offered_rate_per_s": 26.0}, "offered rate"),
        ({"offered_rate_per_s": None}, "offered rate"),
        ({"arrivals": "constant"}, "arrivals: poisson -> constant"),
        ({"mean_prompt_tokens": 120.0}, "prompt tokens: 100 -> 120"),
        ({"mean_output_tokens": 6.0}, "output tokens"),
        ({"target": "http://a:1 (other)"}, "model: m -> other"),
        ({"validity": Validity(verdict="invalid", reasons=("the client was late",))}, "the candidate is invalid: the client was late"),
    ],
)
def test_another_load_is_not_compared(change: dict[str, object], says: str) -> None:
    base = run(requests(0))
    found = loadtests.compare(side(base), side(dataclasses.replace(base, **change)))  # type: ignore[arg-type]
    assert (found.verdict, exit_status(found)) == ("not_comparable", 4)
    assert any(says in line for line in found.fingerprint_differences)


def test_a_sample_too_small_for_the_tolerance_is_inconclusive() -> None:
    assert of(against(requests(0), requests(0)), "ttft_p99").verdict == "inconclusive"


def test_the_same_model_behind_another_address_is_compared_and_said() -> None:
    base = run(requests(0, sd=0.05))
    found = loadtests.compare(side(base), side(dataclasses.replace(base, target="http://b:2 (m)")))
    assert found.verdict == "pass"
    assert any("http://a:1 -> http://b:2" in reason for reason in found.reasons)


def test_another_client_machine_is_not_compared() -> None:
    base = side(run(requests(0)))
    other = dataclasses.replace(machine(), hard={**machine().hard, "cores": 64})
    found = loadtests.compare(base, dataclasses.replace(base, envelope=dataclasses.replace(base.envelope, machine=other)))
    assert found.verdict == "not_comparable"
    assert any("cores" in line for line in found.fingerprint_differences)


def test_more_failures_are_a_regression_whatever_the_others_took() -> None:
    found = against(requests(0), requests(0, failed=100))
    assert of(found, "failed").verdict == "regression"
    assert of(found, "failed").candidate == pytest.approx(100 / 1500)


def test_six_runs_a_side_are_decided_run_by_run() -> None:
    """Runs that differ by 2 % among themselves: 10 % more is a regression, and the reason names the runs."""
    rng = np.random.default_rng(0)
    one = run(requests(0, n=400))

    def repeated(times: float) -> loadtests.Side:
        runs = [
            dataclasses.replace(one, ttft_s=dataclasses.replace(one.ttft_s, p50=0.1 * times * float(rng.lognormal(0, 0.02))))
            for _ in range(8)
        ]
        return side(summary.repeated(runs, range(8)))

    found = loadtests.compare(repeated(1.0), repeated(1.1))
    assert of(found, "ttft_p50").verdict == "regression"
    assert "8 against 8 runs" in of(found, "ttft_p50").reason
    assert of(found, "e2e_p50").verdict == "pass"


def test_a_closed_loop_is_also_compared_by_its_rate() -> None:
    base = run(requests(0), offered_rate_per_s=None)
    slower = dataclasses.replace(base, request_rate_per_s=0.5 * base.request_rate_per_s)
    found = of(loadtests.compare(side(base), side(slower)), "request_rate_per_s")
    assert found.better == "higher"
    assert found.ratio == pytest.approx(0.5)


def test_files_are_compared_with_their_requests_unless_these_have_changed(tmp_path: Path) -> None:
    """The interval from the requests is used where the file beside the record is the one it was made from."""
    files = []
    for name, rows in (("base", requests(0)), ("cand", requests(1))):
        beside = record.write(tmp_path / f"{name}.parquet", Requests(t0_unix_s=0.0, requests=tuple(rows)), machine())
        found = run(rows, requests_file=str(beside))
        files.append(record.write(tmp_path / f"{name}.json", found, machine(), [beside]))
    with_requests = journey.compare(files[0], files[1], "5%")
    assert with_requests == loadtests.compare(
        *(loadtests.Side(envelope=record.load(file)[0], record=record.read(file, LoadTest),
                         requests=(summary.columns.read([file.with_suffix(".parquet")]),)) for file in files)
    )  # fmt: skip
    record.write(tmp_path / "cand.parquet", Requests(t0_unix_s=0.0, requests=tuple(requests(2))), machine())
    without = journey.compare(files[0], files[1], "5%")
    assert of(without, "ttft_p50").ratio == of(with_requests, "ttft_p50").ratio
    assert of(without, "ttft_p50").interval != of(with_requests, "ttft_p50").interval
