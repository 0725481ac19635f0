"""Laws of time: each agrees with itself and with what is known by hand; two phases have the moments they are asked for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench.errors import BadInput
from mlsys_bench.queueing import fit
from mlsys_bench.queueing.laws import (
    BoundedPareto,
    Deterministic,
    Empirical,
    Erlang,
    Exponential,
    Gamma,
    Hyperexponential,
    Law,
    Lognormal,
    PhaseType,
    TwoPoint,
    Uniform,
    balanced,
    marie,
    parse_law,
)
from mlsys_bench.queueing.times import Samples, Zero, quantile_of, total

NAMES = [
    "exp",
    "det",
    "unif",
    "erl:3",
    "gamma:0.3",
    "gamma:4",
    "logn:0.05",
    "logn:4",
    "h2:10",
    "cox2:0.7",
    "cox2:3",
    "mix:0.9:1:10",
    "bp:1.5:0.2:100",
    "bp:1:1:1000",
    "bp:0.5:0.01:10",
    "hyper:0.3:1:0.7:2",
]
MEASURED = Empirical(np.random.default_rng(3).gamma(2.0, 1.0, 400))
CYCLE = PhaseType([0.5, 0.5, 0.0], [[-3.0, 1.0, 1.0], [0.5, -2.0, 0.5], [0.0, 1.0, -1.0]])
LAWS = [parse_law(name) for name in NAMES] + [MEASURED, CYCLE]
by_name = pytest.mark.parametrize("law", LAWS, ids=str)


def panels(law: Law, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return Gauss-Legendre nodes and weights between `ends` and the points where the law jumps."""
    jumps = [t for t, _ in law.atoms] + (list(law.samples_s) if isinstance(law, Empirical) else [])
    kinks = [law.low_s, law.high_s] if isinstance(law, BoundedPareto | Uniform) else []
    edges = np.unique(np.clip(np.concatenate([ends, jumps, kinks]), ends[0], ends[-1]))
    x, w = np.polynomial.legendre.leggauss(16)
    half = np.diff(edges) / 2
    return (edges[:-1, None] + half[:, None] * (1 + x)).ravel(), (half[:, None] * w).ravel()


def far(law: Law) -> float:
    return float(law.quantiles(np.array([1 - 1e-14]))[0])


@by_name
def test_quantiles_undo_the_tail(law: Law) -> None:
    """P(X > t) at the u-quantile is 1 - u where the law has no jumps, and no more than that where it has."""
    u = np.concatenate([np.linspace(0.001, 0.999, 99), [1e-6, 1 - 1e-7]])
    over, below = law.survival(law.quantiles(u)), law.survival(law.quantiles(u) * (1 - 1e-9))
    if law.atoms or isinstance(law, Empirical):
        assert np.all(over <= 1 - u + 1e-12)
        assert np.all(below >= 1 - u - 1e-12)
    else:
        assert over == pytest.approx(1 - u, rel=1e-8)
    assert law.quantile_s(0.5) == law.quantiles(np.array([0.5]))[0]


@by_name
def test_moments_are_those_of_the_tail(law: Law) -> None:
    """E[X^k] is the integral of k t^{k-1} P(X > t)."""
    t, w = panels(law, np.append(0.0, np.geomspace(1e-9, 1, 90) * far(law)))
    first, second, third = (float(w @ (k * t ** (k - 1) * law.survival(t))) for k in (1, 2, 3))
    assert first == pytest.approx(law.mean_s, rel=1e-6)
    assert second - first**2 == pytest.approx(law.variance_s2, rel=1e-5, abs=1e-9)
    assert third / first**3 == pytest.approx(law.third, rel=1e-3)


@by_name
def test_stop_loss_is_the_integral_of_the_tail(law: Law) -> None:
    """E[(X - t)+] starts at the mean and is what is left of the integral from t on."""
    assert law.stop_loss_s(np.array([0.0]))[0] == pytest.approx(law.mean_s, rel=1e-12)
    for start in (0.4, 1.0, 3.0):
        t, w = panels(law, start * law.mean_s + np.append(0.0, np.geomspace(1e-9, 1, 90) * far(law)))
        assert law.stop_loss_s(np.array([start * law.mean_s]))[0] == pytest.approx(
            float(w @ law.survival(t)), rel=1e-6, abs=1e-9 * law.mean_s
        )


@by_name
def test_the_transform_is_that_of_the_tail(law: Law) -> None:
    """E[e^{-sX}] = 1 - s int e^{-st} P(X > t) dt, on and off the real axis, and 1 at 0."""
    s = np.array([1e-9, 0.3, 1 + 2j, 0.2 + 2.4j], dtype=np.complex128) / law.mean_s
    t, w = panels(
        law, np.unique(np.concatenate([[0.0], np.geomspace(1e-9, 1, 60) * far(law), np.linspace(0, min(far(law), 200 * law.mean_s), 1500)]))
    )
    expected = [1 - x * (w @ (np.exp(-x * t) * law.survival(t))) for x in s]
    assert law.lst(s) == pytest.approx(np.array(expected), abs=1e-7)
    assert law.lst(np.zeros((2, 2), dtype=complex)) == pytest.approx(np.ones((2, 2)), abs=1e-14)


@by_name
def test_draws_follow_the_law(law: Law) -> None:
    """A sample of 20,000 keeps within the 1e-6 bound of Kolmogorov-Smirnov, in any shape."""
    draws = law.sample(np.random.default_rng(7), (100, 200))
    assert draws.shape == (100, 200)
    points = law.quantiles(np.linspace(0.01, 0.99, 99))
    assert Samples(draws.ravel()).survival(points) == pytest.approx(law.survival(points), abs=2.7 / math.sqrt(20_000))


@by_name
def test_scaling_keeps_the_shape(law: Law) -> None:
    """A law scaled to another mean has that mean, the same SCV and third moment, and quantiles in proportion; scaled back, it is itself."""
    twice = law.scaled(2 * law.mean_s)
    assert (twice.mean_s, twice.scv, twice.third) == pytest.approx((2 * law.mean_s, law.scv, law.third), rel=1e-9)
    assert twice.quantile_s(0.9) == pytest.approx(2 * law.quantile_s(0.9), rel=1e-9)
    assert law.scaled(law.mean_s) == law
    assert len({law, law.scaled(law.mean_s)}) == 1


@by_name
def test_phases_are_the_law_itself(law: Law) -> None:
    """Where a law has a phase-type form, moments, tail and transform are the same."""
    phases = law.phases()
    if phases is None:
        assert not isinstance(law, Exponential | Erlang | Hyperexponential | PhaseType)
        return
    t, s = np.array([0.0, 0.3, 1.0, 4.0, 20.0]), np.array([0.5 + 1j, 3.0])
    assert (phases.mean_s, phases.scv, phases.third) == pytest.approx((law.mean_s, law.scv, law.third), rel=1e-9)
    assert phases.survival(t) == pytest.approx(law.survival(t), rel=1e-9)
    assert phases.lst(s) == pytest.approx(law.lst(s), rel=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("hyper")])
def test_a_name_comes_back_as_it_went(name: str) -> None:
    assert str(parse_law(name)) == name
    assert parse_law(str(parse_law(name, 3.0)), 3.0) == parse_law(name, 3.0)


def test_names_mean_what_the_truth_table_means() -> None:
    """Mean 1 by default; a bounded Pareto keeps its own ends; `erl2` is `erl:2`."""
    assert parse_law("erl2") == Erlang(2)
    assert parse_law("mix:0.9:1:10") == TwoPoint(0.9, 1 / 1.9, 10 / 1.9)
    assert parse_law("bp:1.5:0.2:100") == BoundedPareto(1.5, 0.2, 100)
    assert parse_law("unif", 3.0) == Uniform(0.0, 6.0)
    assert [parse_law(name).scv for name in ("exp", "det", "unif", "erl:4", "logn:4", "h2:4", "cox2:0.7")] == pytest.approx(
        [1, 0, 1 / 3, 0.25, 4, 4, 0.7]
    )


def test_moments_known_by_hand() -> None:
    """E[X^3] of an exponential is 6 means cubed, of a uniform on 0 to 2 it is 2, of a lognormal (1 + SCV)^3."""
    assert [law.third for law in (Exponential(3.0), Uniform(0.0, 2.0), Lognormal(4.0), Deterministic(7.0))] == pytest.approx([6, 2, 125, 1])
    assert Hyperexponential((0.5, 0.5), (1.0, 3.0)).variance_s2 == pytest.approx(2 * (0.5 + 4.5) - 4)
    half = balanced(3.0)
    assert half.shares[0] * half.means_s[0] == pytest.approx(0.5)
    assert marie(0.5) == Erlang(2).phases()
    assert Gamma(1.0).survival(np.array([2.0]))[0] == pytest.approx(math.exp(-2))


@pytest.mark.parametrize(("scv", "turned"), [(0.05, 0.0), (4.0, 0.9), (10.0, 0.9)])
def test_the_lognormal_transform_is_right_to_thirteen_digits(scv: float, turned: float) -> None:
    """Against 20-digit quadrature in the normal variable, on a line turned most of the way to where e^{-sx} does not oscillate."""
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 20
    sigma = mpmath.sqrt(mpmath.log(1 + mpmath.mpf(scv)))
    for s in (0.02 + 0.5j, 1 + 5j):
        z = mpmath.mpmathify(s)
        off = 1j * mpmath.arg(z) / sigma * turned

        def density(x: Any, z: Any = z, off: Any = off) -> Any:
            at = x - off
            return mpmath.exp(-z * mpmath.exp(sigma * at - sigma**2 / 2) - at**2 / 2) / mpmath.sqrt(2 * mpmath.pi)

        value = complex(mpmath.quad(density, [mpmath.mpf(k) for k in range(-12, 11)]))
        assert Lognormal(scv).lst(np.array([s], dtype=complex))[0] == pytest.approx(value, rel=1e-13)


def test_the_bounded_pareto_transform_is_an_incomplete_gamma_function() -> None:
    """E[e^{-sX}] = alpha L^alpha s^alpha (G(-alpha, sL) - G(-alpha, sH)) / (1 - (L/H)^alpha)."""
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 25
    for alpha, low, high in ((1.5, 0.2, 100.0), (0.5, 0.01, 10.0), (2.5, 0.3, 30.0)):
        for s in (1e-5, 0.01, 1 + 5j, 90 + 1400j):
            z, power = mpmath.mpmathify(s), mpmath.mpf(alpha)
            tails = z**power * (mpmath.gammainc(-power, z * low) - mpmath.gammainc(-power, z * high))
            value = complex(power * mpmath.mpf(low) ** power * tails / (1 - (mpmath.mpf(low) / high) ** power))
            assert BoundedPareto(alpha, low, high).lst(np.array([s], dtype=complex))[0] == pytest.approx(value, abs=1e-12)


def test_a_law_never_changes() -> None:
    law = Exponential(2.0)
    with pytest.raises(AttributeError, match="never changes"):
        law.mean_s = 3.0
    with pytest.raises(ValueError, match="read-only"):
        MEASURED.samples_s[0] = 0.0


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: parse_law("gama:2"), "unknown kind"),
        (lambda: parse_law("gamma"), "takes 1 number"),
        (lambda: parse_law("gamma:x"), "gamma:2.5"),
        (lambda: Gamma(0.0), "`det`"),
        (lambda: balanced(0.5), "at least 1"),
        (lambda: marie(0.4), "at least 0.5"),
        (lambda: Exponential(-1.0), "positive, finite mean"),
        (lambda: Erlang(0), "whole number of phases"),
        (lambda: Hyperexponential((0.5, 0.6), (1, 2)), "add up to 1"),
        (lambda: PhaseType([1.0, 0.0], [[-1.0, 1.0], [1.0, -1.0]]), "phase-type"),
        (lambda: TwoPoint(1.5, 1, 2), "between 0 and 1"),
        (lambda: BoundedPareto(1.0, 2, 1), "low < high"),
        (lambda: Uniform(2, 1), "low < high"),
        (lambda: Empirical([]), "at least one"),
        (lambda: Empirical([1.0, -1.0]), "negative"),
        (lambda: fit.fit2(Uniform(0, 2)), "at least 0.5"),
    ],
)
def test_what_is_no_law_is_refused(build: object, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        build()  # type: ignore[operator]


# ---------------------------------------------------------------- sums and quantiles


def test_a_sum_of_two_times_by_three_ways() -> None:
    """Erlang 2 + exponential: as phases, by quadrature over quantiles, and in closed form (Erlang 3)."""
    t = np.array([0.5, 2.0, 6.0])
    closed = Erlang(3, 3.0).survival(t)
    assert total(Erlang(2, 2.0).phases().time, Exponential(1.0)).survival(t) == pytest.approx(closed, rel=1e-12)
    assert total(Erlang(2, 2.0), Exponential(1.0)).survival(t) == pytest.approx(closed, abs=1e-6)


def test_a_sum_with_few_possible_times_is_exact() -> None:
    """Exponential + (1 or 3, even odds): the two shifted tails, averaged."""
    t = np.array([0.5, 2.0, 5.0])
    sojourn = total(Exponential(1.0), TwoPoint(0.5, 1.0, 3.0))
    assert sojourn.survival(t) == pytest.approx([1.0, (math.exp(-1) + 1) / 2, (math.exp(-4) + math.exp(-2)) / 2])
    assert sojourn.mean_s == 3.0
    assert total(Zero(), Deterministic(2.0)).quantile_s(0.3) == 2.0


@given(st.floats(0.01, 0.99), st.floats(0.1, 10), st.floats(1e-6, 1e6))
def test_the_quantile_search_finds_the_point(p: float, scv: float, scale_s: float) -> None:
    law = Gamma(scv)
    found = quantile_of(law.p_over, p, scale_s)
    assert found == pytest.approx(law.quantile_s(p), rel=1e-10, abs=1e-12)


@given(st.floats(0.01, 0.99))
def test_the_quantile_search_is_not_lost_on_jumps(p: float) -> None:
    law = TwoPoint(0.3, 1.0, 5.0)
    assert quantile_of(law.p_over, p, 1.0) == pytest.approx(law.quantile_s(p), rel=1e-11)


# ---------------------------------------------------------------- two phases


@settings(deadline=None)
@given(st.floats(0.5, 20), st.floats(0, 1), st.floats(1e-3, 1e3))
def test_two_phases_have_the_three_moments_asked_for(scv: float, where: float, mean_s: float) -> None:
    """Anywhere between the bounds (to ten times the lower one where there is no upper), in any unit of time."""
    low, high = fit.bounds(scv)
    third = low + (0.001 + 0.998 * where) * (min(high, 10 * low) - low)
    law = fit.three_moments(mean_s, scv, third)
    assert len(law.alpha) == 2
    assert (law.mean_s, law.scv) == pytest.approx((mean_s, scv), rel=1e-6)
    if abs(scv - 1) > 1e-3:
        assert law.third == pytest.approx(third, rel=1e-6)


def test_moments_out_of_reach_are_clipped() -> None:
    """Below and above what two phases can have, the nearest."""
    assert fit.three_moments(1.0, 4.0, 1.0).third == pytest.approx(1.5 * 25, rel=1e-6)
    assert fit.three_moments(1.0, 0.6, 99.0).third == pytest.approx(3.6, rel=1e-6)


def test_the_fit_follows_its_rule() -> None:
    """Phases stay; gamma and two points keep their third moment; lognormal lies between the pair that brackets it."""
    assert fit.fit2(balanced(4.0)) == balanced(4.0).phases()
    for law in (Gamma(4.0), TwoPoint(0.9, 1.0, 10.0), BoundedPareto(1.5, 0.2, 100)):
        assert fit.fit2(law).third == pytest.approx(law.third, rel=1e-6)
    low, high = fit.pair(Lognormal(4.0))
    assert (low.third, high.third) == pytest.approx((60, 125))
    assert fit.fit2(Lognormal(4.0)).third == pytest.approx(math.sqrt(60 * 125))


def test_what_is_no_number_makes_no_law() -> None:
    with pytest.raises(BadInput, match="numbers"):
        Empirical(["a"])  # type: ignore[list-item]
    for phases in (math.nan, math.inf):
        with pytest.raises(BadInput, match="whole number"):
            Erlang(phases)  # type: ignore[arg-type]
