"""Fleets of several kinds: pools simulated at their own requests, everybody together held against the limits, shown with their cost."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from mlsys_bench import record, slo, workload
from mlsys_bench.plan import confirm, plan, pools
from mlsys_bench.plan import mixed as program
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.plan.request import Request
from mlsys_bench.report import content
from mlsys_bench.types import Plan
from tests import sample_records

LIMITS = slo.parse("ttft_p95<1s,tpot_p95<100ms")
TRAFFIC = workload.synthetic(30.0, arrivals="poisson", prompt="lognormal:1000:2:30000", output="lognormal:200:1:1024")


def request(**changes: Any) -> Request:
    asked = Request(model="llama-3-8b", workload=TRAFFIC, slo=LIMITS, gpus=("H100", "L40S"), mixed=True)
    return dataclasses.replace(asked, **changes)


@functools.cache
def planned() -> Plan:
    return plan(request())


def test_pools_share_the_traffic_and_cost_what_their_instances_do() -> None:
    found = planned().mixed
    assert found is not None
    assert len(found.pools) == 2
    assert found.pools[0].most_tokens == found.pools[1].above_tokens
    assert found.pools[1].most_tokens is None
    held = _sizing()[1].replica.demand.share  # of all requests: longer ones than the model's context are refused, and the plan says so
    assert sum(pool.share for pool in found.pools) == pytest.approx(held)
    assert found.usd_per_hour == pytest.approx(sum(pool.usd_per_hour for pool in found.pools))
    assert found.saving == pytest.approx(1 - found.usd_per_hour / planned().usd_per_hour)  # type: ignore[operator]
    assert found.saving > 0
    served = sum(pool.predicted["request_rate_per_s"] * pool.replicas for pool in found.pools)
    assert served == pytest.approx(30.0, rel=0.15)  # a simulated sample of a few hundred requests


def test_all_requests_together_keep_the_limits() -> None:
    found = planned().mixed
    assert found is not None
    for limit in LIMITS:
        assert found.predicted[f"{slo.key(limit)}_s"] < limit.limit
    for key in ("ttft_p95_s", "tpot_p95_s", "e2e_p95_s"):
        each = [pool.predicted[key] for pool in found.pools]
        assert min(each) <= found.predicted[key] <= max(each)


def test_a_pool_is_simulated_with_the_prompts_it_gets() -> None:
    asked = request()
    design = _pools(asked)[0].design
    schedule = confirm.of_sample(design, asked.workload, 1, 300, seed=1)
    assert schedule.prompt_tokens.max() <= design.most_tokens
    assert len(schedule.prompt_tokens) == 300
    rate = len(schedule.scheduled_s) / float(schedule.scheduled_s[-1] - schedule.scheduled_s[0])
    assert rate == pytest.approx(design.each_per_s, rel=4 / 300**0.5)


@functools.cache
def _sizing() -> tuple[Any, ...]:
    from mlsys_bench.plan import candidates, demand, search

    asked = request()
    bounds, _ = search.bounds(asked, candidates.every(asked)[0], demand.of(asked.workload))
    return tuple(bounds), search.search(asked, bounds, (), 3).designs[0]


def _pools(asked: Request) -> tuple[program.Pool, ...]:
    found = program.mixed(asked, *_sizing())
    assert found is not None
    return found.pools


def test_two_halves_of_one_sample_together_are_the_sample() -> None:
    rng = np.random.default_rng(5)

    def drawn(scale: float) -> Latencies:
        times = scale * rng.exponential(size=4000)
        return Latencies(ttft_s=times, tpot_s=times / 10, e2e_s=2 * times, itl_s=times / 10)

    first, second = drawn(1.0), drawn(3.0)
    both = program.together([first, second], [0.25, 0.75], [10.0, 10.0])
    assert len(both.ttft_s) == pytest.approx(16_000, abs=2)
    assert float(both.ttft_s.mean()) == pytest.approx(0.25 * first.ttft_s.mean() + 0.75 * second.ttft_s.mean(), rel=0.01)
    assert both.value("itl", "mean") == pytest.approx(0.25 * first.itl_s.mean() + 0.75 * second.itl_s.mean(), rel=0.01)


def test_it_is_listed_told_and_kept() -> None:
    found = planned()
    assert found.mixed is not None
    first = found.alternatives[0]
    assert first.usd_per_hour == found.mixed.usd_per_hour
    assert first.why_not == pools.in_words(found.mixed)
    assert "2 kinds" in first.why_not
    assert "% cheaper" in first.why_not
    assert "split by prompt length" in content.describe(found)[-1].title
    assert record.loads(record.dumps(found, sample_records.machine()), "plan")[1] == found


def test_where_one_kind_is_as_cheap_the_plan_says_so() -> None:
    found = plan(request(workload=dataclasses.replace(TRAFFIC, rate_per_s=2.0)))
    assert found.mixed is None
    assert any("no fleet of several kinds" in note for note in found.notes)


def test_every_pool_has_its_spares_and_all_of_them_keep_the_objective() -> None:
    """Two zones, any one may go: each pool outlives it; the whole is the product over pools, given the zones."""
    from mlsys_bench.plan import cold_start
    from mlsys_bench.plan.reliability import Zones, replaced
    from mlsys_bench.plan.together import Group, Standing

    asked = request(slo=(*LIMITS, *slo.parse("availability>99.9%")), zones=2, survive_zone=True)
    judged = pools.confirmed(program.Mixed(pools=tuple(_pools(request())), usd_per_h=1.0), asked)
    assert judged is not None
    found = pools.fleet_of(judged, asked)
    assert found is not None
    needed = [pool.replicas - pool.spare for pool in found.pools]
    assert needed == [design.replicas for _, design, _ in judged]
    assert all(pool.replicas // 2 >= n for pool, n in zip(found.pools, needed, strict=True))
    groups = tuple(
        Group(
            name=str(k), needed=design.replicas, gpus=design.candidate.devices,
            reliability=replaced(cold_start.of(design.candidate.weights_bytes)),
        )
        for k, (_, design, _) in enumerate(judged)
    )  # fmt: skip
    stands = Standing(groups=groups, cuts=(("0",), ("1",)), zones=Zones(count=2, survive=True))
    assert found.availability == pytest.approx(stands.held({str(k): pool.replicas for k, pool in enumerate(found.pools)}))
    assert found.availability is not None
    assert found.availability >= 0.999
    assert found.usd_per_hour == pytest.approx(sum(pool.usd_per_hour for pool in found.pools))
