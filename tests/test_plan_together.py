"""Spares of several groups chosen together: exact where it can be counted by hand, as cheap as the cheapest of all allocations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.plan.given import measured
from mlsys_bench.plan.reliability import Reliability, Zones
from mlsys_bench.plan.together import Group, Standing, Usd, secure
from mlsys_bench.pricing import spread

SURE = Zones(mtbf=measured(1e12, "t"), mttr=measured(0, "t"))
DAY_S = 86_400.0


def fails(days: float, repair_s: float) -> Reliability:
    """Return a process that fails every so many days; GPUs never do."""
    return Reliability(
        gpu_mtbf=measured(1e15, "t"), process_mtbf=measured(days * DAY_S, "t"), repair=measured(repair_s, "t"),
        restart=measured(repair_s, "t"),
    )  # fmt: skip


def group(name: str, needed: int, days: float = 10, repair_s: float = 600, shards: int = 1) -> Group:
    return Group(name=name, needed=needed, reliability=fails(days, repair_s), shards=shards)


def standing(*groups: Group, cuts: tuple[tuple[str, ...], ...] | None = None, zones: Zones = SURE) -> Standing:
    return Standing(groups=groups, cuts=cuts or tuple((g.name,) for g in groups), zones=zones)


def up(days: float, repair_s: float) -> float:
    return days * DAY_S / (days * DAY_S + repair_s)


def test_a_series_is_the_product_of_binomials_by_hand() -> None:
    """2 of 3 at a, 1 of 1 at b, each of b's two shards: (a^3 + 3 a^2 (1 - a)) b^2."""
    found = standing(group("a", 2, 10, 3600), group("b", 1, 20, 7200, shards=2)).held({"a": 3, "b": 1})
    a, b = up(10, 3600), up(20, 7200)
    assert found == pytest.approx((a**3 + 3 * a**2 * (1 - a)) * b**2, abs=1e-12)


def test_what_stands_in_for_another_makes_their_cut_a_product_of_absences() -> None:
    """A in line with (b or c): a (1 - (1 - b)(1 - c)); two of three in every pair of cuts: a b + a c + b c - 2 a b c."""
    a, b, c = up(10, 3600), up(1, 7200), up(2, 5400)
    groups = (group("a", 1, 10, 3600), group("b", 1, 1, 7200), group("c", 1, 2, 5400))
    one = {"a": 1, "b": 1, "c": 1}
    assert standing(*groups, cuts=(("a",), ("b", "c"))).held(one) == pytest.approx(a * (1 - (1 - b) * (1 - c)), abs=1e-12)
    two_of_three = standing(*groups, cuts=(("a", "b"), ("a", "c"), ("b", "c")))
    assert two_of_three.held(one) == pytest.approx(a * b + a * c + b * c - 2 * a * b * c, abs=1e-12)
    assert two_of_three.whole(one) == pytest.approx(a * b * c, abs=1e-12)


def test_zones_take_all_groups_with_them() -> None:
    """Two zones, each up z of the time, replicas that never fail: both groups need one, and have one in each zone, or in the first only."""
    z = 0.99
    zones = Zones(count=2, mtbf=measured(99.0, "t"), mttr=measured(1.0, "t"))
    stands = standing(group("a", 1, 1e9, 0), group("b", 1, 1e9, 0), zones=zones)
    assert stands.held({"a": 2, "b": 2}) == pytest.approx(1 - (1 - z) ** 2, abs=1e-9)
    assert stands.held({"a": 1, "b": 2}) == pytest.approx(z, abs=1e-9)
    assert stands.held({"a": 1, "b": 1}) == pytest.approx(z, abs=1e-9)  # the same zone: not z squared


def cheapest(stands: Standing, objective: float, usd: Usd, most: int) -> float:
    """Return the price of the cheapest of all allocations."""
    ranges = [range(g.needed, g.needed + most) for g in stands.groups]
    names = [g.name for g in stands.groups]
    fleets = (dict(zip(names, counts, strict=True)) for counts in itertools.product(*ranges))
    kept = (f for f in fleets if all(stands.survives(g, f[g.name]) for g in stands.groups) and stands.held(f) >= objective)
    return min(map(usd, kept))


@settings(max_examples=25, deadline=None)
@given(
    needed=st.tuples(*[st.integers(1, 4)] * 3),
    days=st.tuples(*[st.floats(0.5, 60)] * 3),
    prices=st.tuples(*[st.sampled_from([0.1, 0.25, 1.0, 2.95, 7.3])] * 3),
    nines=st.sampled_from([0.99, 0.999, 0.9999]),
    area=st.sampled_from([(1, False), (2, False), (3, True)]),
    stands_in=st.booleans(),
)
def test_the_allocation_costs_what_the_best_of_all_costs(
    needed: tuple[int, ...], days: tuple[float, ...], prices: tuple[float, ...], nines: float, area: tuple[int, bool], stands_in: bool
) -> None:
    groups = tuple(group(name, n, d, 900) for name, n, d in zip("abc", needed, days, strict=True))
    cuts = (("a",), ("b", "c")) if stands_in else (("a",), ("b",), ("c",))
    zones = Zones(count=area[0], survive=area[1], mtbf=measured(730 * DAY_S, "t"), mttr=measured(4 * 3600.0, "t"))
    if area[0] == 1:
        zones = SURE
    stands = standing(*groups, cuts=cuts, zones=zones)

    def usd(fleet: Mapping[str, int]) -> float:
        return math.fsum(p * fleet[name] for p, name in zip(prices, "abc", strict=True))

    found, _ = secure(stands, nines, usd)
    assert stands.held(found) >= nines
    assert usd(found) <= cheapest(stands, nines, usd, 7) + min(prices) + 1e-9


def test_each_group_outlives_the_zone_that_may_go() -> None:
    zones = Zones(count=3, survive=True)
    stands = standing(group("a", 10), group("b", 1), zones=zones)
    found, binds = secure(stands, 0.9, lambda f: float(sum(f.values())))
    assert (found, binds) == ({"a": 15, "b": 2}, "zone")
    assert all(n - max(spread(n, 3)) >= g.needed for g, n in zip(stands.groups, found.values(), strict=True))


def test_a_group_of_which_some_is_always_away_is_no_error() -> None:
    """A hundred thousand, each away one day of eleven, are all up e^-9531 of the time, which no float tells from never."""
    many = standing(group("many", 100_000, days=10, repair_s=DAY_S))
    assert many.held({"many": 100_000}) == 0
    assert -40 < many.guide({"many": 100_000}) < -30  # ln of what is just above 0


def test_what_zones_cannot_keep_is_refused_and_so_are_too_many_of_them() -> None:
    with pytest.raises(Infeasible, match=r"zone\(s\) are all away"):
        secure(standing(group("a", 1), zones=Zones(count=1)), 0.99999, lambda f: 1.0)
    with pytest.raises(BadInput, match="at most 8"):
        standing(group("a", 1), zones=Zones(count=9))
    with pytest.raises(BadInput, match="between 0 % and 100 %"):
        secure(standing(group("a", 1)), 1.0, lambda f: 1.0)


def test_worse_figures_never_hold_longer() -> None:
    zones = Zones(count=2)
    stands = standing(group("a", 2), group("b", 1), zones=zones)
    fleet = {"a": 3, "b": 2}
    assert stands.at("low").held(fleet) <= stands.held(fleet) <= stands.at("high").held(fleet)
