"""Terms mixed hour by hour: against trying every mix, and what spot really costs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench.errors import BadInput
from mlsys_bench.pricing import mix, spot
from mlsys_bench.pricing.mix import Mix, Terms
from mlsys_bench.pricing.spot import Reclaims

DAY = [2] * 8 + [4] * 8 + [10] * 8  # a night, a morning, a busy evening
SIX_HOURS = Reclaims(mean_life_s=6 * 3600, pools=3, start_s=300, refill_s=600, waste_s=0, source="assumed")


def test_the_base_is_reserved_and_the_peak_is_not() -> None:
    """Two at all hours, two more for two thirds, six for a third of the day; reserved at 60 % of $10 on demand.

    All hours: 6 < 10; two thirds: 6 < 6.67; a third: 6 > 3.33.  Four reserved at $6 are $24, six on demand for a third $20: $44.00.
    All on demand: (2 + 4 + 10) / 3 x 10 = $53.33.
    """
    found = mix.best(DAY, 10, Terms(on_demand_usd_per_h=10.0, reserved_usd_per_h=6.0))
    assert (found.reserved, found.firm, found.spot) == (4, 10, 0)
    assert (found.reserved_usd_per_h, found.on_demand_usd_per_h) == pytest.approx((24.0, 20.0))
    assert found.usd_per_h == pytest.approx(44.0)
    assert found.all_on_demand_usd_per_h == pytest.approx(160 / 3)
    assert found.saving == pytest.approx(0.175)


def test_spot_carries_what_lies_above_the_floor_with_its_spares() -> None:
    """Floor 4, spot at $2: six wanted above it for a third of the day.

    Useful: 1 - 300 s / 6 h = 98.61 %: six take ceil(6.08) = 7; to survive one of three pools 3 ceil(7 / 2) = 12.  They are billed
    6 h / (6 h + 10 min) = 36 / 37 of the time: 12 / 3 x 2 x 36 / 37 = $7.78 beside $24 for four reserved: $31.78.
    """
    terms = Terms(on_demand_usd_per_h=10.0, reserved_usd_per_h=6.0, spot_usd_per_h=2.0)
    found = mix.best(DAY, 4, terms, SIX_HOURS)
    assert (found.reserved, found.firm, found.spot, found.spot_spares) == (4, 4, 12, 6)
    assert round(found.spot_usd_per_h, 2) == 7.78
    assert round(found.usd_per_h, 2) == 31.78
    assert "6 h over 3 pools" in found.notes[0]
    assert mix.best(DAY, 10, terms, SIX_HOURS).spot == 0  # the floor is the peak: nothing may stand on spot


def test_one_pool_holds_nothing() -> None:
    """All of a pool goes at once, so with a single one spot carries nothing at any price."""
    alone = Reclaims(mean_life_s=1e6, pools=1, start_s=0, refill_s=0)
    assert mix.best(DAY, 2, Terms(on_demand_usd_per_h=10.0, spot_usd_per_h=0.01), alone).spot == 0
    assert spot.instances_to_hold(5, 1) is None


def test_without_reclaims_no_spot_is_bought() -> None:
    assert mix.best(DAY, 0, Terms(on_demand_usd_per_h=10.0, spot_usd_per_h=0.01)).spot == 0


def brute_force(wanted: list[int], floor: int, terms: Terms, reclaims: Reclaims | None) -> float:
    """Return the least dollars an hour over every number reserved and every firm fleet, hour by hour."""
    best, top = math.inf, max(*wanted, terms.committed)
    for reserved in range(terms.committed, top + 1):
        for firm in range(reserved, top + 1):
            bought = reserved - terms.committed
            if bought and (terms.reserved_usd_per_h is None or reserved > (terms.reserved_at_most or top)):
                continue
            if firm < min(floor, max(wanted)):
                continue
            usd = 0.0
            for d in wanted:
                above = max(d - firm, 0)
                usd += (terms.reserved_usd_per_h or 0.0) * reserved + terms.on_demand_usd_per_h * max(min(d, firm) - reserved, 0)
                if above and (terms.spot_usd_per_h is None or reclaims is None or reclaims.pools < 2):
                    usd = math.inf
                elif above:
                    assert reclaims is not None
                    working = math.ceil(above / (1 - (reclaims.start_s + reclaims.waste_s) / reclaims.mean_life_s) - 1e-9)
                    held = reclaims.pools * math.ceil(working / (reclaims.pools - 1))
                    usd += held * (terms.spot_usd_per_h or 0.0) * reclaims.mean_life_s / (reclaims.mean_life_s + reclaims.refill_s)
            best = min(best, usd / len(wanted))
    return best


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8),
    st.integers(0, 9),
    st.tuples(st.floats(1, 9), st.none() | st.floats(0.5, 9), st.none() | st.floats(0.1, 5)),
    st.tuples(st.integers(0, 4), st.integers(1, 5)),
    st.none() | st.builds(Reclaims, mean_life_s=st.just(7200.0), pools=st.integers(1, 4), start_s=st.just(400.0), refill_s=st.just(900.0)),
)
def test_no_other_mix_is_cheaper(
    wanted: list[int],
    floor: int,
    usd: tuple[float, float | None, float | None],
    bounds: tuple[int, int],
    reclaims: Reclaims | None,
) -> None:
    committed = bounds[0] if usd[1] is not None else 0
    terms = Terms(
        on_demand_usd_per_h=usd[0],
        reserved_usd_per_h=usd[1],
        spot_usd_per_h=usd[2],
        committed=committed,
        reserved_at_most=committed + bounds[1],
    )
    found = mix.best(wanted, floor, terms, reclaims)
    assert found.usd_per_h == pytest.approx(brute_force(wanted, floor, terms, reclaims))
    assert found.firm >= min(floor, max(wanted))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=48), st.integers(0, 40), st.floats(0.05, 1.0))
def test_a_mix_never_costs_more_than_all_on_demand(wanted: list[int], floor: int, ratio: float) -> None:
    terms = Terms(on_demand_usd_per_h=3.0, reserved_usd_per_h=3.0 * ratio, spot_usd_per_h=0.4)
    assert (
        mix.best(wanted, floor, terms, SIX_HOURS).usd_per_h
        <= mix.best(wanted, max(wanted), Terms(on_demand_usd_per_h=3.0)).usd_per_h + 1e-9
    )


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(BadInput, match="hour by hour"):
        mix.best([], 0, Terms(on_demand_usd_per_h=1.0))
    with pytest.raises(BadInput, match="2 committed instances need the price"):
        mix.best([1], 0, Terms(on_demand_usd_per_h=1.0, committed=2))
    with pytest.raises(BadInput, match="none may be below zero"):
        Reclaims(mean_life_s=0.0, pools=2, start_s=1, refill_s=1)
    with pytest.raises(BadInput, match="notice from 0 up"):
        spot.wasted_s([1.0], -1.0)


# ---------------------------------------------------------------- spot


def test_a_reclaim_without_notice_loses_the_age_of_what_runs() -> None:
    """Requests of 10 s all alike: the one that is met has run 5 s on average; with a notice of 10 s or more none is lost.

    At 10 s of notice the place stands idle for the 5 s that the rest does not fill; at 4 s, rests are uniform on 0 … 10: 40 % end within
    it (2 s idle on average), 60 % are lost with 3 s of age and 4 s of notice: 0.4 x 2 + 0.6 x 7 = 5.0 s.
    """
    assert spot.wasted_s([10.0], 0.0) == pytest.approx(5.0)
    assert spot.wasted_s([10.0], 10.0) == pytest.approx(5.0)
    assert spot.wasted_s([10.0], 4.0) == pytest.approx(5.0)


@given(st.lists(st.floats(0.1, 30.0), min_size=1, max_size=5), st.floats(0.0, 40.0))
def test_waste_is_what_walking_through_every_moment_gives(lengths: list[float], notice: float) -> None:
    """Each request is met at each of its moments equally often: the midpoint rule over ages, long requests met more often."""
    steps, waste = 400, 0.0
    for length in lengths:
        for i in range(steps):
            age = length * (i + 0.5) / steps
            rest = length - age
            waste += length / steps * (notice - rest if rest <= notice else age + notice)
    assert spot.wasted_s(lengths, notice) == pytest.approx(waste / sum(lengths), rel=0.02, abs=0.02)


def test_an_hour_that_counts_costs_more_than_an_hour() -> None:
    """Lives of 2 h, 6 minutes to start and 6 wasted: 90 % counts, $3.60 an hour is $4.00 a useful one."""
    reclaims = Reclaims(mean_life_s=7200, pools=2, start_s=360, refill_s=0, waste_s=360)
    assert spot.usd_per_useful_h(3.6, reclaims) == pytest.approx(4.0)
    hopeless = Reclaims(mean_life_s=100, pools=2, start_s=360, refill_s=0)
    assert spot.usd_per_useful_h(3.6, hopeless) == math.inf
    assert mix.best([3], 0, Terms(on_demand_usd_per_h=10.0, spot_usd_per_h=0.01), hopeless).spot == 0


def test_two_pools_are_gone_at_once_as_the_binomial_says() -> None:
    """A pool is gone (600 + 300) / (3000 + 600) = 25 % of the time: of three, two or more 3 x 1/16 x 3/4 + 1/64 = 15.625 %."""
    reclaims = Reclaims(mean_life_s=3000, pools=3, start_s=300, refill_s=600)
    assert reclaims.gone_share == 0.25
    assert spot.share_short(reclaims) == pytest.approx(0.15625)


def test_a_thousand_instances_are_mixed_at_once() -> None:
    """A week of hours, each level its own: the answer stays a threshold, one reserved more is no better."""
    wanted = [500 + 3 * h for h in range(168)]
    terms = Terms(on_demand_usd_per_h=10.0, reserved_usd_per_h=6.0)
    found = mix.best(wanted, 10**6, terms)
    used = sum(w > found.reserved - 1 for w in wanted) / 168, sum(w > found.reserved for w in wanted) / 168
    assert used[0] > 0.6 >= used[1]
    assert isinstance(found, Mix)
