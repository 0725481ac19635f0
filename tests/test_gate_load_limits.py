"""Absolute limits on load tests: which the runs keep, which they break, and which they leave open."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mlsys_bench import summary
from mlsys_bench.errors import BadInput
from mlsys_bench.gate import load_limits, loadtests
from mlsys_bench.types import LoadTest, RequestRecord, Validity
from mlsys_bench.verdicts import Finding, Policy, Verdict
from tests.sample_records import head


def requests(seed: int = 0, slow: float = 0.02, n: int = 2000, failed: int = 0) -> list[RequestRecord]:
    """Return answers with a TTFT of 100 ms, but for a share that takes 300."""
    rng = np.random.default_rng(seed)
    due, slow_ones = np.sort(rng.uniform(0, 60, n)).tolist(), rng.permutation(n) < round(slow * n)
    return [
        RequestRecord(
            index=i, scheduled_s=d, sent_s=d, token_s=(d + t, d + t + 0.02), tokens_per_event=(1, 1), done_s=d + t + 0.02,
            prompt_tokens=100, output_tokens=2, outcome="ok" if i >= failed else "reset",
        )
        for i, (d, t) in enumerate(zip(due, np.where(slow_ones, 0.3, 0.1).tolist(), strict=True))
    ]  # fmt: skip


def side(records: list[RequestRecord], with_requests: bool = True, verdict: str = "valid") -> loadtests.Side:
    found = summary.summarise(
        records, source="loadtest", target="http://a:1 (m)", arrivals="poisson", offered_rate_per_s=33.0, slo=None,
        validity=Validity(verdict=verdict, reasons=("late",)), window=(0.0, 60.0),  # type: ignore[arg-type]
    )  # fmt: skip
    return loadtests.Side(envelope=head(found), record=found, requests=(summary.columns.of(records),) if with_requests else ())


def said(base: loadtests.Side, cand: loadtests.Side, *limits: str) -> Verdict:
    return loadtests.compare(base, cand, policy=Policy(budgets=limits, reported=("ttft*", "e2e*", "tpot*", "itl*")))


def of(verdict: Verdict, name: str) -> Finding:
    return next(f for f in verdict.findings if f.name == name and f.kind == "budget")


@pytest.mark.parametrize(
    ("slow", "limit", "verdict"),
    [
        (0.02, "ttft_p95<200ms", "pass"),  # 2 % beyond, 5 % may be
        (0.15, "ttft_p95<200ms", "regression"),
        (0.05, "ttft_p95<200ms", "inconclusive"),
        (0.15, "goodput>80%", "pass"),  # 85 % keep ttft_p95<200ms themselves
        (0.15, "goodput>90%", "suspect"),  # a share has no distance that two runs may differ by
        (0.15, "availability>99%", "pass"),
    ],
)
def test_requests_beyond_a_limit_are_counted(slow: float, limit: str, verdict: str) -> None:
    limits = (limit,) if limit.startswith("ttft") else ("ttft_p95<200ms", limit)
    one = side(requests(slow=slow))
    found = of(said(one, one, *limits), limit.partition("<")[0].partition(">")[0])
    assert (found.verdict, found.kind) == (verdict, "budget")


def test_a_limit_that_two_runs_may_miss_by_chance_is_only_suspect() -> None:
    """300 ms are 0.3 % beyond a limit of 299 ms: runs of one server differ by more."""
    one = side(requests(slow=0.15))
    assert of(said(one, one, "ttft_p95<299ms"), "ttft_p95").verdict == "suspect"
    assert of(said(one, one, "ttft_p95<250ms"), "ttft_p95").verdict == "regression"


def test_a_degraded_run_breaks_no_limit_for_sure() -> None:
    one = side(requests(slow=0.15), verdict="degraded")
    found = of(said(one, one, "ttft_p95<200ms"), "ttft_p95")
    assert (found.verdict, found.reason.endswith("but a run is degraded")) == ("suspect", True)


@pytest.mark.parametrize(
    ("limit", "verdict"),
    [("ttft_p95<200ms", "regression"), ("ttft_p50<200ms", "pass"), ("ttft_mean<500ms", "pass"), ("goodput>80%", "inconclusive")],
)
def test_without_requests_the_summaries_decide(limit: str, verdict: str) -> None:
    one = side(requests(slow=0.15), with_requests=False)
    found = of(said(one, one, limit), limit.partition("<")[0].partition(">")[0])
    assert found.verdict == verdict


def test_a_broken_limit_decides_the_build_and_one_that_is_only_reported_does_not() -> None:
    one = side(requests(slow=0.15))
    rest = ("e2e*", "tpot*", "itl*", "failed")
    assert loadtests.compare(one, one, policy=Policy(budgets=("ttft_p95<200ms",), reported=rest)).verdict == "regression"
    assert (
        of(loadtests.compare(one, one, policy=Policy(budgets=("ttft_p95<200ms",), reported=("ttft*", *rest))), "ttft_p95").may_fail is False
    )


@pytest.mark.parametrize(
    ("limit", "cure"),
    [("loss<2", "unknown metric of a load test 'loss'"), ("ttft<200ms", "needs a statistic"), ("ttft_p95<2GB", "ttft is in 's'")],
)
def test_a_limit_that_no_load_test_has_is_refused(limit: str, cure: str) -> None:
    one = side(requests())
    with pytest.raises(BadInput, match=cure):
        said(one, one, limit)


def test_runs_together_say_more_than_the_worst_of_them() -> None:
    """Three runs with 3, 5 and 7 % beyond a p95: of the intervals the middle ones decide, and leave it open."""
    runs = [
        run for slow in (0.03, 0.05, 0.07) for run in [side(requests(slow=slow), with_requests=False).record] if isinstance(run, LoadTest)
    ]
    (found,) = load_limits.findings(runs, runs, (), Policy(budgets=("ttft_p95<200ms",)), enough=True, slack=0.0)
    assert found.verdict == "inconclusive"


def failing(every: int, outcome: str = "rejected", n: int = 2000) -> list[RequestRecord]:
    """Return answers of 100 ms, of which every so-manyth request failed."""
    rows = requests(slow=0.0, n=n)
    return [dataclasses.replace(r, outcome=outcome, token_s=()) if i % every == 0 else r for i, r in enumerate(rows)]  # type: ignore[arg-type]


@pytest.mark.parametrize("with_requests", [True, False])
@pytest.mark.parametrize(("every", "verdict"), [(10, "regression"), (20, "inconclusive"), (100, "pass")])
def test_requests_that_failed_lie_beyond_every_limit(every: int, verdict: str, with_requests: bool) -> None:
    """As in the verdict of the load test itself: where 10 % fail no p95 is kept, whatever the others took."""
    one = side(failing(every), with_requests)
    found = of(said(one, one, "ttft_p95<200ms"), "ttft_p95")
    assert (found.verdict, found.candidate) == (verdict, pytest.approx(0.1))
    if with_requests:
        assert found.reason.startswith(f"{1 / every:.2%} of 2,000 beyond the limit, failed ones among them")


def test_gaps_of_requests_that_failed_are_as_many_as_usual() -> None:
    one = side(failing(10))
    found = of(said(one, one, "itl_p95<200ms"), "itl_p95")
    assert (found.verdict, found.reason.partition(",")[0]) == ("regression", "10.00% of 2")


def test_requests_given_up_on_purpose_are_no_failures() -> None:
    gone = side(failing(10, "cancelled"))
    verdict = said(side(failing(10**6)), gone, "ttft_p95<200ms", "availability>99%")
    assert [of(verdict, name).verdict for name in ("ttft_p95", "availability")] == ["pass", "pass"]
    assert next(f for f in verdict.findings if f.name == "failed").verdict == "pass"
