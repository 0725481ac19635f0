"""The numbers people quote: each recomputed value against a second way to reach it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mlsys_bench import record
from mlsys_bench.claims import Claim, Claims
from mlsys_bench.errors import UnknownName
from mlsys_bench.plan import claims
from mlsys_bench.plan.claims import waiting
from mlsys_bench.queueing import parse_law
from mlsys_cli.main import app
from tests import claims_page

PAGE = Path(__file__).parent.parent / "docs" / "claims.md"


@pytest.fixture(scope="module")
def every() -> dict[str, Claim]:
    return {claim.key: claim for claim in claims.recompute().claims}


def test_a_claim_is_listed_under_its_key(every: dict[str, Claim]) -> None:
    assert list(every) == [key for room in claims.ROOMS for key in room.CLAIMS]


BY_HAND = {
    "70b-fp16": 70_553_706_496 * 2 / 1e9,
    "h200-192gb": 141.0,
    "kv-8k-52gb": 2 * 128 * 12288 * 8192 * 2 / 1e9,  # 51.54
    "gqa-saves": 64 / 8,
    "fp32-one-node": 70_553_706_496 * 4 / 1e9 + 0.0,
    "10m-vectors": 61.44,
    "hnsw-100-150gb": 64.0,  # 10 M x (6,144 + 256) B
    "hnsw-o-nm": 6272.0,
    "chunk-overlap": 512 / 412 - 1,
    "80-percent": 4.0,
    "p95s-add": 629.58,  # half the 95 % quantile of chi-squared with six degrees of freedom, 12.5916 / 2, of 100 ms
    "continuous-batching": sum(1 / k for k in range(1, 9)),  # the longest of eight exponential lengths: 2.718
    "60-per-minute": 120.0,
    "flat-100k-10ms": 100_000 * 1536 * 4 / 32.1e9 * 1e3,  # 19.14
    "int8-half-compute": 1.0,
    "60-percent-tokenizing": 2.5,
    "gpt4-90k-a-day": 45_000.0,
    "self-hosted-0.003": 30_000 / (100 * 86_400 * 30),
    "break-even-10k": 30_000 / 30 / 0.09,  # 11,111
    "8xh100-30k-month": 10.0 * 730,  # Nebius, spot
    "prefix-47-percent": 2000 / 4250,
    "prefix-saves-money": 1 - 5750 / 8250,
    "routing-60-80": 0.7 * (1 - (0.15 + 0.18) / (2.5 + 3.0)),
    "distillation-10-50x": 20.0,
    "three-nines": 43.2,
    "errors-0.1-percent": 2995.0,
    "mean-20-p95-200": 10.0,
    "ab-samples": 31_234.0,
}


@pytest.mark.parametrize("key", BY_HAND)
def test_a_claim_is_recomputed_as_by_hand(key: str, every: dict[str, Claim]) -> None:
    assert every[key].value == pytest.approx(BY_HAND[key], rel=1e-4)


def test_ten_workers_by_the_law_of_one(every: dict[str, Claim]) -> None:
    """One M/M/1 worker: the sojourn is exponential with mu - lambda, so p95 <= 0.5 s asks for lambda = 10 - ln 20 / 0.5 = 4.009/s."""
    claim = every["10-workers-100-qps"]
    assert claim.low == pytest.approx(10 * (10 - math.log(20) / 0.5), rel=1e-6)
    assert 90 < claim.value < 95
    assert claim.verdict == "wrong"


def test_ten_pooled_workers_by_walking_through_a_queue(every: dict[str, Claim]) -> None:
    """A plain simulation at the rate found: its p95 is the limit, within the noise of 200,000 customers of a queue at 92 %."""
    rng = np.random.default_rng(7)
    rate = every["10-workers-100-qps"].value
    arrivals = np.cumsum(rng.exponential(1 / rate, 200_000))
    work = rng.exponential(0.1, len(arrivals))
    free = [0.0] * 10
    sojourn = np.empty(len(arrivals))
    for i, (at, takes) in enumerate(zip(arrivals, work, strict=True)):
        first = min(range(10), key=free.__getitem__)
        free[first] = max(at, free[first]) + takes
        sojourn[i] = free[first] - at
    parts = [float(np.quantile(part, 0.95)) for part in np.array_split(sojourn[10_000:], 10)]
    assert abs(np.mean(parts) - 0.5) < 3 * np.std(parts, ddof=1) / math.sqrt(len(parts))


def test_twenty_shards_are_slower_than_one_and_faster_than_strangers(every: dict[str, Claim]) -> None:
    """Queues fed by the same arrivals are associated: the slowest of 20 lies below that of 20 independent ones, ln(1 / 0.00256) / ln 20."""
    apart = math.log(1 / (1 - 0.95 ** (1 / 20))) / math.log(20)
    assert 1 < every["20-shards"].value < apart
    assert "p99.74" in every["20-shards"].because
    assert "p96.6" in every["20-shards"].recomputed


@pytest.mark.parametrize(
    ("law", "n", "gain"),
    [("det", 8, 1.0), ("unif", 8, 16 / 9), ("exp", 4, 25 / 12), ("exp", 64, sum(1 / k for k in range(1, 65))), ("unif", 1, 1.0)],
)
def test_the_longest_of_a_batch_by_closed_form(law: str, n: int, gain: float) -> None:
    assert waiting.mean_of_max(parse_law(law), n) == pytest.approx(gain, rel=2e-4)


def test_the_longest_of_lognormal_answers_by_drawing_them() -> None:
    law, rng = parse_law("logn:4"), np.random.default_rng(3)
    drawn = law.sample(rng, (200_000, 8)).max(axis=1)
    half_width = 3 * drawn.std() / math.sqrt(len(drawn))
    assert abs(waiting.mean_of_max(law, 8) - drawn.mean()) < half_width


def test_waiting_to_fill_a_batch_costs_at_every_load(every: dict[str, Claim]) -> None:
    """Nobody is there to share with at 5/s, so a request waits the whole 20 ms or nearly."""
    low, high = every["wait-10-20ms"].low, every["wait-10-20ms"].high
    assert low is not None
    assert high is not None
    assert 0 < low < high < 20


def test_what_fits_is_what_memory_leaves(every: dict[str, Claim]) -> None:
    """0.9 x 2 x 85.9 GB - 141.1 GB - working memory: between 5 and 9 GB; at 327,680 B a token some 21,000 tokens."""
    assert 15_000 < every["fp16-2xa100"].value < 27_000
    assert 0 < every["int8-1xa100"].value < 20_000
    assert "fits 40 GB: no, 24 GB: no" in every["int4-35gb"].recomputed
    assert every["fp32-one-node"].verdict == "wrong"


def test_flops_without_a_cache_grow_with_the_third_power_in_the_end(every: dict[str, Claim]) -> None:
    claim = every["no-kv-cache"]
    assert claim.low is not None
    assert 2 < claim.value < 3
    assert 1 < claim.low < 2
    assert claim.value - claim.low == pytest.approx(1.0, abs=0.2)


def test_eight_h100_stay_below_what_the_hardware_allows(every: dict[str, Claim]) -> None:
    """Reading 70 GB of FP8 weights over two devices takes 10.5 ms a step at least: 256 / (250 x 10.5 ms) x 4 = 390/s, before any prompt."""
    claim = every["8xh100-100-rps"]
    assert claim.low is not None
    assert claim.high is not None
    assert claim.low < claim.value < claim.high < 390


def test_the_pooled_test_is_the_textbooks(every: dict[str, Claim]) -> None:
    """The z is -1.8938 and p = 0.0583, as statsmodels gives for 500 and 560 of 10,000."""
    assert "z = -1.8938, p = 0.0583" in every["ab-500-560"].recomputed


def test_every_claim_says_all_that_a_reader_needs(every: dict[str, Claim]) -> None:
    assert len(every) >= 30
    for claim in every.values():
        assert all((claim.claim, claim.quoted, claim.recomputed, claim.because, claim.formula, claim.unit)), claim.key
        assert (claim.low is None) == (claim.high is None), claim.key
        if claim.low is not None and claim.high is not None:
            assert claim.low <= claim.value * (1 + 1e-9), claim.key
            assert claim.value <= claim.high * (1 + 1e-9), claim.key


def test_the_page_is_what_is_recomputed(every: dict[str, Claim]) -> None:
    """`docs/claims.md` as it would be written today; MLSYS_UPDATE_GOLDEN=1 writes it."""
    text = claims_page.page(Claims(claims=tuple(every.values())))
    if os.environ.get("MLSYS_UPDATE_GOLDEN"):
        PAGE.write_text(text, encoding="utf-8")
    assert text == PAGE.read_text(encoding="utf-8")


def test_claims_are_found_by_key() -> None:
    assert [c.key for c in claims.recompute(["three-nines", "70b-fp16"]).claims] == ["three-nines", "70b-fp16"]
    with pytest.raises(UnknownName, match="did you mean 20-shards"):
        claims.recompute(["20-shard"])


def test_the_command_prints_a_table_that_fits_and_a_record_that_reads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shown = CliRunner().invoke(app, ["claims"])
    assert shown.exit_code == 0
    assert max(map(len, shown.stdout.splitlines())) <= 100
    assert "One worker does 10 QPS, so ten do 100" in shown.stdout
    told = CliRunner().invoke(app, ["claims", "three-nines", "--json"])
    kept = record.loads(told.stdout, "stdout")[1]
    assert isinstance(kept, Claims)
    assert [c.key for c in kept.claims] == ["three-nines"]
    assert json.loads(told.stdout)["kind"] == "claims"
