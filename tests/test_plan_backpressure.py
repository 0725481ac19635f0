"""Queue and rate limits: by hand, against simulations of the queue and the bucket, and on the simulated engine at twice its capacity."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import simulate, stats
from mlsys_bench.batching import Limits
from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.plan.backpressure import Tail, backpressure, queue_limit, refused_by_bucket, wait_in_place_s
from mlsys_bench.queueing.mmc import mmck
from mlsys_bench.types import LatencyProfile, Layout, Provenance
from mlsys_bench.workload import Schedule

TAIL = Tail(slots=8, service_s=2.0, limit_s=3.0, p=0.95, first_s=0.2)  # ends 4 requests a second when full


def test_places_by_hand() -> None:
    """The first in line waits an exponential time: p95 ln(20) / 4 = 0.749 s.  Ends like clockwork at 4/s: 11 places in 2.8 s."""
    assert wait_in_place_s(TAIL, 1) == pytest.approx(math.log(20) / 4)
    assert wait_in_place_s(TAIL, 0) == 0
    assert queue_limit(Tail(slots=8, service_s=2.0, limit_s=3.0, p=0.95, first_s=0.2, scv=0.0)) == 11
    assert queue_limit(Tail(slots=8, service_s=2.0, limit_s=0.9, p=0.95, first_s=0.2)) == 0
    with pytest.raises(Infeasible, match="no queue limit helps"):
        queue_limit(Tail(slots=8, service_s=2.0, limit_s=0.1, p=0.95, first_s=0.2))
    with pytest.raises(BadInput, match="percentile between"):
        Tail(slots=8, service_s=2.0, limit_s=0.1, p=95, first_s=0.2)


@settings(max_examples=40)
@given(st.integers(1, 64), st.floats(0.1, 20), st.floats(0.1, 30), st.floats(0.5, 0.999), st.floats(0.05, 4))
def test_the_last_place_keeps_the_limit_and_the_next_does_not(slots: int, service: float, limit: float, p: float, scv: float) -> None:
    tail = Tail(slots=slots, service_s=service, limit_s=limit, p=p, first_s=0.0, scv=scv)
    places = queue_limit(tail)
    assert wait_in_place_s(tail, places) <= tail.wait_s
    assert wait_in_place_s(tail, places + 1) > tail.wait_s


def simulated_queue(rate: float, tail: Tail, places: int, n: int, seed: int) -> tuple[float, list[float], list[float]]:
    """Return the share turned away, the waits of those admitted, and of those who took the last place, in M/M/c/c+K one by one."""
    rng = np.random.default_rng(seed)
    now, busy, waiting, turned, waits, last = 0.0, list[float](), list[float](), 0, list[float](), list[float]()
    for gap, service in zip(rng.exponential(1 / rate, n), rng.exponential(tail.service_s, n), strict=True):
        now += gap
        while busy and busy[0] <= now:
            heapq.heappop(busy)
        waiting = [s for s in waiting if s > now]
        if len(waiting) >= places and len(busy) >= tail.slots:
            turned += 1
            continue
        start = now if len(busy) < tail.slots else heapq.heappop(busy)
        if start > now:
            waiting.append(start)
            if len(waiting) == places:
                last.append(start - now)
        waits.append(start - now)
        heapq.heappush(busy, start + service)
    return turned / n, waits, last


def test_a_simulated_queue_keeps_the_limit_at_twice_its_capacity() -> None:
    """8/s on 4/s: half is turned away, the rest keeps the limit, the last place in 95 % of cases and a little more."""
    found = backpressure(TAIL, replicas=1, peak_per_s=4.0, most_per_s=3.2)
    double = next(o for o in found.loads if o.load == 2.0)
    runs = [simulated_queue(8.0, TAIL, found.queue_limit, 8_000, seed) for seed in range(5)]
    turned = stats.mean_interval([r[0] for r in runs], 0.999)
    assert turned is not None
    assert turned[0] <= double.rejected_by_queue <= turned[1]
    late = [w > TAIL.wait_s for r in runs for w in r[2]]
    assert np.mean(late) <= 0.05 + 3 * math.sqrt(0.05 / len(late) * 10)  # neighbours resemble each other
    p95 = [float(np.quantile(r[1], 0.95)) + TAIL.first_s for r in runs]
    interval = stats.mean_interval(p95, 0.999)
    assert interval is not None
    assert interval[0] <= double.first_token_s <= interval[1]
    assert double.first_token_s <= TAIL.limit_s
    assert found.last_place_s <= TAIL.limit_s


def test_more_load_is_refused_more_and_never_breaks_the_limit() -> None:
    found = backpressure(TAIL, replicas=10, peak_per_s=32.0, most_per_s=3.4, tokens_per_request=900)
    assert [o.load for o in found.loads] == [1.0, 1.2, 2.0]
    shares = [o.rejected_by_queue for o in found.loads]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(mmck(3.2, 2.0, 8, 8 + found.queue_limit).p_blocked)
    assert shares[2] == pytest.approx(1 - 40 / 64, abs=0.01)  # beyond capacity the excess goes
    assert all(o.first_token_s <= TAIL.limit_s for o in found.loads)
    assert found.burst == 10 * found.queue_limit
    assert found.rate_per_s == pytest.approx(34)
    assert found.tokens_per_min == pytest.approx(34 * 60 * 900)
    assert found.loads[2].rejected_by_rate == pytest.approx(1 - 34 / 64, abs=0.01)
    assert any("first token within 3.00 s" in note for note in found.notes)
    tight = backpressure(TAIL, replicas=10, peak_per_s=40.0, most_per_s=3.4)
    assert any("rate limiter refuses" in note for note in tight.notes)


@pytest.mark.parametrize(("rate", "burst"), [(0.9, 5), (1.2, 3), (2.0, 8)])
def test_a_simulated_bucket_refuses_as_many(rate: float, burst: int) -> None:
    """Tokens come one a second up to `burst`; an arrival that finds less than one is refused."""
    shares = []
    for seed in range(6):
        tokens, refused, n = float(burst), 0, 20_000
        for gap in np.random.default_rng(seed).exponential(1 / rate, n):
            tokens = min(burst, tokens + gap)
            if tokens >= 1:
                tokens -= 1
            else:
                refused += 1
        shares.append(refused / n)
    interval = stats.mean_interval(shares, 0.999)
    assert interval is not None
    assert interval[0] <= refused_by_bucket(rate, 1.0, burst) <= interval[1]


def test_a_large_bucket_refuses_the_excess() -> None:
    assert refused_by_bucket(2.0, 1.0, 10_000) == 0.5
    assert refused_by_bucket(0.5, 1.0, 10_000) == 0
    assert refused_by_bucket(2.0, 1.0, 200) == pytest.approx(0.5, abs=1e-6)


def test_the_simulated_engine_keeps_its_first_token_at_twice_the_load() -> None:
    """Steps of 0.1 s, 8 slots, answers of 20 tokens on average with a geometric law: 4 ends a second, offered 8."""
    tail = Tail(slots=8, service_s=2.05, limit_s=3.0, p=0.95, first_s=0.2)
    found = backpressure(tail, replicas=1, peak_per_s=4.0, most_per_s=3.2)
    rng, n = np.random.default_rng(1), 4000
    rows = Schedule(scheduled_s=np.cumsum(rng.exponential(1 / 8, n)), prompt_tokens=np.full(n, 16), output_tokens=rng.geometric(1 / 20, n))
    profile = LatencyProfile(
        form="step", layout=Layout(model="nano", precision="fp32", device="cpu"), stage=None, terms=(), coefficients=(), covariance=(),
        constants={}, residual_log_sd=0.0, valid={}, provenance=Provenance.ASSUMED,
    )  # fmt: skip
    limits = Limits(max_seqs=8, max_step_tokens=4096, block_tokens=16, blocks=10_000, max_context=4096)
    run = simulate.run(rows, profile, limits, clock=lambda _: 0.1, queue_limit=found.queue_limit)
    ttft = [r.token_s[0] - r.scheduled_s for r in run.requests if r.outcome == "ok" and r.in_window]
    interval = stats.quantile_interval(ttft, 0.95)
    assert interval is not None
    assert interval[0] <= tail.limit_s
    turned = sum(r.outcome == "rejected" for r in run.requests) / n
    assert turned == pytest.approx(found.loads[-1].rejected_by_queue, abs=0.05)
    unbounded = simulate.run(rows, profile, limits, clock=lambda _: 0.1)
    late = [r.token_s[0] - r.scheduled_s for r in unbounded.requests if r.outcome == "ok" and r.in_window]
    assert np.quantile(late, 0.5) > 10 * tail.limit_s
