"""Limits: what is printed reads back, what cannot be promised is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import slo
from mlsys_bench.errors import BadInput, MlsysError
from mlsys_bench.types import Limit

STATS = ("mean", "p50", "p75", "p90", "p95", "p99", "p99.9")
KEYS = st.tuples(st.sampled_from(slo.LATENCIES), st.sampled_from(STATS))
LATENCY_LIMITS = st.builds(
    lambda key, limit: Limit(metric=key[0], stat=key[1], limit=limit),
    KEYS,
    st.integers(1, 10**7).map(lambda us: us / 1e6),
)
SHARE_LIMITS = st.builds(
    lambda metric, limit: Limit(metric=metric, stat="ratio", limit=limit),
    st.sampled_from(slo.SHARES),
    st.integers(1, 9999).map(lambda n: n / 1e4),
)


def limits(text: str) -> list[tuple[str, str, float]]:
    return [(limit.metric, limit.stat, limit.limit) for limit in slo.parse(text)]


@given(st.lists(LATENCY_LIMITS | SHARE_LIMITS, min_size=1, max_size=6, unique_by=slo.key))
def test_printed_limits_read_back(written: list[Limit]) -> None:
    back = slo.parse(slo.show(tuple(written)))
    assert [(b.metric, b.stat) for b in back] == [(w.metric, w.stat) for w in written]
    assert [b.limit for b in back] == pytest.approx([w.limit for w in written], rel=1e-11)


def test_the_example_of_the_manual() -> None:
    assert limits("ttft_p95<500ms,tpot_p99<50ms,goodput>99%") == [
        ("ttft", "p95", 0.5),
        ("tpot", "p99", 0.05),
        ("goodput", "ratio", 0.99),
    ]


def test_yaml_and_the_line_say_the_same() -> None:
    assert slo.from_mapping({"ttft_p95": "500ms", "availability": "99.9%"}) == slo.parse("ttft_p95<500ms, availability>99.9%")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no limit"),
        (",,", "holds no limit"),
        ("ttft_p95", "is not METRIC_STAT<LIMIT"),
        ("ttft_p95<500", "has no unit"),
        ("ttft_p95<5MB", "has the unit 'MB'"),
        ("ttft_p95>500ms", "ttft_p95 takes <, not >"),
        ("goodput<99%", "goodput takes >, not <"),
        ("goodput>100%", "must lie between 0% and 100%"),
        ("goodput>0%", "must lie between 0% and 100%"),
        ("ttft<500ms", "ttft needs a statistic"),
        ("ttft_p42<500ms", "ttft needs a statistic"),
        ("tfft_p95<500ms", "unknown metric 'tfft'; did you mean ttft"),
        ("ttft_p95<0ms", "it must be above zero"),
        ("ttft_p95<-3ms", "it must be above zero"),
        ("ttft_p95<500ms,ttft_p95<400ms", "limits ttft_p95 twice"),
    ],
)
def test_what_cannot_be_promised_is_refused(text: str, says: str) -> None:
    with pytest.raises(BadInput) as caught:
        slo.parse(text)
    assert says in str(caught.value)


def test_a_number_without_unit_in_yaml_is_refused_where_it_stands() -> None:
    with pytest.raises(BadInput, match=r"^chat\.yaml: slo\.ttft_p95: 500 has no unit; did you mean 500ms\?$"):
        slo.from_mapping({"ttft_p95": 500}, "chat.yaml: slo")


def test_a_limit_is_met_strictly() -> None:
    latency, share = slo.parse("ttft_p95<500ms,goodput>99%")
    assert [slo.meets(latency, v) for v in (0.4, 0.5, 0.6)] == [True, False, False]
    assert [slo.meets(share, v) for v in (0.98, 0.99, 0.995)] == [False, False, True]


def test_latencies_leaves_the_shares_out() -> None:
    assert [slo.key(limit) for limit in slo.latencies(slo.parse("goodput>99%,e2e_mean<3s"))] == ["e2e_mean"]


@given(st.text(max_size=20))
def test_any_line_is_limits_or_refused(text: str) -> None:
    try:
        read = slo.parse(text)
    except MlsysError as error:
        assert str(error)  # noqa: PT017  (both outcomes are right)
        return
    assert slo.parse(slo.show(read))
