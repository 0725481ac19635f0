"""The one entry: which method it chooses and why, what it refuses, and what must hold whatever it chose."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench.errors import BadInput, Infeasible, Overload
from mlsys_bench.queueing import Answer, Target, servers_for, solve
from mlsys_bench.queueing.laws import (
    BoundedPareto,
    Deterministic,
    Empirical,
    Erlang,
    Exponential,
    Law,
    Lognormal,
    TwoPoint,
    balanced,
    parse_law,
)
from mlsys_bench.queueing.sizing import search
from mlsys_bench.queueing.station import (
    Balanced,
    Batches,
    Bursts,
    ForkJoin,
    Network,
    Priorities,
    Slots,
    Stage,
    Station,
    System,
    Tokens,
    tandem,
)

FORMULA = math.inf  # a tolerance that takes any formula


def station(rate: float, service: Law, servers: int, arrivals: Law | None = None) -> Station:
    return Station(arrivals=arrivals or Exponential(1 / rate), service=service, servers=servers)


METHODS: list[tuple[System, str]] = [
    (station(0.8, Exponential(1.0), 1), "M/M/c"),
    (station(3.0, Deterministic(1.0), 4), "M/D/c"),
    (station(0.8, Lognormal(2.0, 1.0), 1), "M/G/1"),
    (station(3.0, balanced(4.0), 4), "M/PH/c"),
    (station(3.0, Exponential(1.0), 4, Erlang(2, 1 / 3)), "GI/M/c"),
    (station(0.8, Lognormal(1.0), 1, Lognormal(0.5, 1 / 0.8)), "GI/G/1"),
    (station(3.0, Lognormal(4.0), 4), "M/G/c"),
    (Station(arrivals=Exponential(0.2), service=Exponential(1.0), servers=4, capacity=8), "M/M/c/K"),
    (Station(arrivals=Exponential(0.2), service=Lognormal(1.0), servers=4, capacity=4), "M/G/c/c"),
    (Station(arrivals=Exponential(0.2), service=Exponential(1.0), servers=4, patience=Exponential(1.0)), "M/M/c+M"),
    (Station(arrivals=Exponential(0.2), service=Exponential(1.0), servers=4, patience=Deterministic(1.0)), "M/M/c+D"),
    (Station(arrivals=Exponential(0.5), service=Exponential(1.0), servers=4, sharing=True), "M/M/c-PS"),
    (
        Station(arrivals=Bursts(rates_per_s=(2.0, 6.0), switches_per_s=((0.0, 0.1), (0.2, 0.0))), service=Exponential(1.0), servers=4),
        "MMPP/M/c",
    ),
    (Slots(rate_per_s=1.0, completions_per_s=(1.0, 1.8, 2.4)), "load-dependent chain"),
    (Balanced(arrivals=Exponential(0.4), service=Exponential(1.0), queues=4, policy="random"), "M/G/1 each"),
    (Balanced(arrivals=Exponential(0.4), service=Exponential(1.0), queues=4, policy="round_robin"), "E_N/G/1 each"),
    (Batches(arrivals=Exponential(2.0), fixed_s=4.0, per_request_s=1.0, max_batch=8), "M/D[b]/1 batches"),
    (tandem(Exponential(2.0), (Stage(service=Exponential(1.0)), Stage(service=Exponential(1.5)))), "product form"),
    (
        Priorities(arrivals=(Exponential(2.0), Exponential(4.0)), services=(Exponential(1.0), Exponential(1.0))),
        "M/M/c, non-preemptive priorities",
    ),
    (
        Priorities(arrivals=(Exponential(4.0), Exponential(4.0)), services=(Deterministic(1.0), Exponential(1.0)), preemptive=True),
        "M/G/1, preemptive priorities",
    ),
]


@pytest.mark.parametrize(("system", "method"), METHODS, ids=[m for _, m in METHODS])
def test_the_method_is_the_expected_one_and_says_why(system: System, method: str) -> None:
    answer = solve(system, tolerance=FORMULA)
    assert answer.method == method
    assert answer.why
    assert 0 < answer.expected_error < 1
    assert answer.queue.sojourn_quantile_s(0.99) >= answer.queue.sojourn_quantile_s(0.5) > 0


STABLE = st.tuples(
    st.sampled_from(["exp", "det", "erl:3", "gamma:0.3", "logn:2", "h2:3", "cox2:0.8", "unif", "mix:0.7:1:4"]),
    st.integers(1, 12),
    st.floats(0.3, 0.95),
)


def answer_to(law: str, servers: int, rho: float, scale: float = 1.0) -> Answer:
    service = parse_law(law, scale)
    return solve(station(rho * servers / scale, service, servers), tolerance=FORMULA)


@given(STABLE)
@settings(max_examples=25, deadline=None)
def test_littles_law_and_conservation_hold(case: tuple[str, int, float]) -> None:
    """Requests present = rate x sojourn, busy servers = rate x service, sojourn = wait + service: to 1e-9."""
    law, servers, rho = case
    queue = answer_to(law, servers, rho).queue
    assert queue.utilisation == pytest.approx(rho, rel=1e-9)
    assert queue.sojourn_s == pytest.approx(queue.wait_s + 1.0, rel=1e-9)
    assert queue.mean_requests == pytest.approx(queue.mean_waiting + rho * servers, rel=1e-9)


@given(STABLE, st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_the_unit_of_time_does_not_matter(case: tuple[str, int, float], scale: float) -> None:
    one, other = answer_to(*case), answer_to(*case, scale=scale)
    assert other.queue.p_wait == pytest.approx(one.queue.p_wait, rel=1e-6)
    assert other.queue.wait_s == pytest.approx(scale * one.queue.wait_s, rel=1e-5)
    assert other.queue.sojourn_quantile_s(0.95) == pytest.approx(scale * one.queue.sojourn_quantile_s(0.95), rel=1e-4)


@given(STABLE, st.floats(0.5, 0.98))
@settings(max_examples=20, deadline=None)
def test_less_load_or_more_servers_never_make_it_worse(case: tuple[str, int, float], less: float) -> None:
    law, servers, rho = case
    busy, calm = answer_to(law, servers, rho), answer_to(law, servers, rho * less)
    wider = solve(station(rho * servers, parse_law(law), servers + 1), tolerance=FORMULA)
    for easier in (calm, wider):
        slack = max(busy.expected_error, easier.expected_error, 1e-6)
        assert easier.queue.p_wait <= busy.queue.p_wait * (1 + slack)
        assert easier.queue.wait_s <= busy.queue.wait_s * (1 + slack)
        assert easier.queue.sojourn_quantile_s(0.99) <= busy.queue.sojourn_quantile_s(0.99) * (1 + slack)


@pytest.mark.parametrize(
    "system",
    [
        station(4.0, Exponential(1.0), 4),
        station(4.4, Lognormal(4.0), 4),
        station(4.4, Exponential(1.0), 4, Deterministic(1 / 4.4)),
        Station(arrivals=Exponential(0.2), service=Exponential(1.0), servers=4, sharing=True),
        ForkJoin(arrivals=Exponential(0.9), service=Exponential(1.0), branches=3),
        Balanced(arrivals=Exponential(0.2), service=Exponential(1.0), queues=4, policy="jsq"),
        Batches(arrivals=Exponential(0.5), fixed_s=4.0, per_request_s=1.0, max_batch=8),
        Slots(rate_per_s=2.5, completions_per_s=(1.0, 1.8, 2.4)),
        tandem(Exponential(2.0), (Stage(service=Exponential(1.0)), Stage(service=Exponential(2.5)))),
    ],
    ids=lambda system: type(system).__name__,
)
def test_an_overloaded_system_gives_no_number_but_says_what_would_do(system: System) -> None:
    with pytest.raises(Overload, match=r"utilisation is \d+\.\d+ .*would do") as caught:
        solve(system)
    assert caught.value.utilisation >= 1
    assert caught.value.enough is not None
    assert caught.value.enough > caught.value.servers


def test_customers_who_may_leave_need_no_stability() -> None:
    queue = solve(Station(arrivals=Exponential(0.1), service=Exponential(1.0), servers=4, patience=Exponential(1.0))).queue
    assert queue.p_abandoned > 0.5
    assert queue.throughput_per_s == pytest.approx(10 * (1 - queue.p_abandoned))


def test_a_formula_outside_the_tolerance_is_confirmed_by_simulation() -> None:
    asked = station(3.2, TwoPoint(0.9, 1.0, 10.0).scaled(1.0), 4)  # tolerance 0 trusts no formula
    formula, confirmed = solve(asked, tolerance=FORMULA), solve(asked, tolerance=0.0, budget_s=1.0)
    assert formula.simulated is None
    assert confirmed.simulated is not None
    low, high = confirmed.interval_s(0.99)
    assert low < confirmed.queue.sojourn_quantile_s(0.99) < high
    value = formula.queue.sojourn_quantile_s(0.99)
    assert low - formula.expected_error * value < value < high + formula.expected_error * value


def test_raw_samples_are_a_law() -> None:
    """A thousand draws of an exponential law, one server: the wait of M/G/1 with their first two moments, by Pollaczek and Khinchine."""
    samples = np.random.default_rng(3).exponential(1.0, 1000)
    service = Empirical(samples)
    queue = solve(station(0.7 / service.mean_s, service, 1)).queue
    expected = 0.7 / service.mean_s * (service.variance_s2 + service.mean_s**2) / (2 * 0.3)
    assert queue.wait_s == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tolerance", [-0.1, math.nan])
def test_a_tolerance_that_makes_no_sense_is_refused(tolerance: float) -> None:
    with pytest.raises(BadInput, match="tolerance"):
        solve(station(0.5, Exponential(1.0), 1), tolerance=tolerance)


# ---------------------------------------------------------------- sizing


@pytest.mark.parametrize("law", ["exp", "det", "logn:4", "erl:3", "h2:4"])
@pytest.mark.parametrize("of", ["wait", "sojourn"])
def test_sizing_agrees_with_trying_every_number_of_servers(law: str, of: str) -> None:
    service = parse_law(law)
    limit = 0.3 if of == "wait" else service.quantile_s(0.95) * 1.1
    target = Target(station=station(6.0, service, 1), limit_s=limit, p=0.95, of=of)  # type: ignore[arg-type]
    sized = servers_for(target)

    def misses(servers: int) -> bool:
        try:
            queue = solve(station(6.0, service, servers), tolerance=FORMULA).queue
        except Overload:
            return True
        return (queue.wait_quantile_s(0.95) if of == "wait" else queue.sojourn_quantile_s(0.95)) > limit

    brute = next(c for c in range(1, 60) if not misses(c))
    assert sized.servers == brute
    assert sized.low <= sized.servers <= sized.high


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 200))
def test_the_search_finds_the_least_whatever_the_start(answer: int, start: int, least_below: int) -> None:
    least = max(1, answer - least_below)
    assert search(lambda c: c >= answer, least=least, start=max(start, least), most=1000) == answer


def test_sizing_with_many_erlangs_gives_the_known_staffing() -> None:
    """100 erlangs, wait at most half a service time: 102 for the mean's sake, 108 for p99 with exponential service."""
    target = Target(station=station(100.0, Exponential(1.0), 1), limit_s=0.5, p=0.99, of="wait")
    assert servers_for(target).servers == 108


def test_a_limit_that_service_alone_breaks_is_infeasible() -> None:
    with pytest.raises(Infeasible, match="service alone takes"):
        servers_for(Target(station=station(5.0, BoundedPareto(1.5, 0.1, 100.0), 1), limit_s=0.2, p=0.99))


def tokens(**changed: object) -> Tokens:
    given: dict[str, object] = {"arrivals": Exponential(0.5), "prompt_tokens": Lognormal(1.0, 30.0), "output_tokens": Lognormal(1.0, 15.0)}
    given |= {"prompt_range": (1, 99), "output_range": (1, 99), "fixed_s": 0.01, "per_sequence_s": 0.001, "per_kv_token_s": 0.0}
    given |= {"per_prompt_token_s": 1e-4, "max_batch": 4, "kv_tokens": 1e6}
    return Tokens(**{**given, **changed})  # type: ignore[arg-type]


def bursts(rates: tuple[float, ...], switches: tuple[tuple[float, ...], ...]) -> Station:
    return Station(arrivals=Bursts(rates_per_s=rates, switches_per_s=switches), service=Exponential(0.1))


ONE = Exponential(1.0)
NAN = math.nan
SENSELESS: list[object] = [
    Station(arrivals=Exponential(2.0), service=ONE, servers=1.5),  # type: ignore[arg-type]
    Station(arrivals=Exponential(2.0), service=ONE, servers=NAN),  # type: ignore[arg-type]
    Station(arrivals=Exponential(2.0), service=ONE, capacity=2.5),  # type: ignore[arg-type]
    Station(arrivals=2.0, service=ONE),  # type: ignore[arg-type]
    Station(arrivals=Exponential(2.0), service=1.0),  # type: ignore[arg-type]
    Station(arrivals=Exponential(2.0), service=ONE, patience=1.0),  # type: ignore[arg-type]
    bursts((), ()),
    bursts((1.0, 2.0), ((0.0, 1.0),)),
    bursts((1.0, NAN), ((0.0, 1.0), (1.0, 0.0))),
    bursts((1.0, 2.0), ((0.0, -1.0), (1.0, 0.0))),
    bursts((0.1, 0.2), ((0.0, 0.0), (0.0, 0.0))),
    Priorities(arrivals=(Exponential(2.0),), services=(ONE,), servers=0),
    Balanced(arrivals=Exponential(2.0), service=ONE, queues=1.5, policy="jsq"),  # type: ignore[arg-type]
    ForkJoin(arrivals=Exponential(2.0), service=ONE, branches=1.5),  # type: ignore[arg-type]
    Batches(arrivals=Exponential(2.0), fixed_s=0.1, per_request_s=0.1, max_batch=4, servers=0),
    Batches(arrivals=Exponential(2.0), fixed_s=0.1, per_request_s=0.1, max_batch=4, noise=Exponential(2.0)),
    Network(arrivals=ONE, stages=(Stage(service=Exponential(0.5)),), entry=(NAN,), routing=((0.0,),)),
    tokens(prompt_range=(10, 1)),
    tokens(per_kv_token_s=NAN),
    tokens(per_prompt_token_s=-1.0),
    None,
]


@pytest.mark.parametrize("system", SENSELESS, ids=[f"{i}" for i in range(len(SENSELESS))])
def test_a_senseless_system_is_refused_in_words(system: System) -> None:
    with pytest.raises(BadInput):
        solve(system, budget_s=0.1)


def test_the_interval_of_a_simulated_bounded_queue_is_that_of_the_served() -> None:
    """Those turned away do not wait: counted in, they would pull the interval away from the percentile it belongs to."""
    answer = solve(Station(arrivals=Exponential(1 / 2.4), service=Lognormal(2.0), servers=2, capacity=6), budget_s=0.5)
    assert answer.queue.p_blocked > 0.05
    for p in (0.5, 0.9, 0.99):
        low, high = answer.interval_s(p)
        assert low <= answer.queue.sojourn_quantile_s(p) <= high
        assert low > 0


def test_turning_callers_away_is_no_way_to_meet_a_limit() -> None:
    """9 erlangs, two places to wait: two servers would keep p99 under six for the few they take; the promise is for nearly all."""
    room = Station(arrivals=Exponential(1 / 9), service=Exponential(1.0), capacity=3)
    sized = servers_for(Target(station=room, limit_s=6.0, p=0.99))
    assert sized.answer.queue.p_blocked <= 0.01 < solve(Station(
        arrivals=Exponential(1 / 9), service=Exponential(1.0), servers=sized.servers - 1, capacity=sized.servers + 1
    )).queue.p_blocked  # fmt: skip
    assert servers_for(Target(station=room, limit_s=6.0, p=0.99, loss=1.0)).servers < sized.servers
