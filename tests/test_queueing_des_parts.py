"""Parts of the simulation core: kernels, counts, warm-up, quantile tables, corrections by known stations, and whether intervals cover."""

from __future__ import annotations

import math
import subprocess
import sys
from types import FunctionType

import numpy as np
import pytest

from mlsys_bench import jit
from mlsys_bench.errors import BadInput
from mlsys_bench.queueing.des import recursion
from mlsys_bench.queueing.des.control import confirm
from mlsys_bench.queueing.des.corrected import Corrected, regress
from mlsys_bench.queueing.des.replicate import Visits, replicate
from mlsys_bench.queueing.des.runs import WINDOWS, Batches, warm_up
from mlsys_bench.queueing.des.tables import Drawn
from mlsys_bench.queueing.des.tally import BINS, EDGES, GROUPS, Tally, around, bins, share_interval
from mlsys_bench.queueing.des.twins import Twin, known, stand_ins, twins_of
from mlsys_bench.queueing.fit import two_moments
from mlsys_bench.queueing.gimc import gimc
from mlsys_bench.queueing.laws import Exponential, Law, PhaseType, parse_law
from mlsys_bench.queueing.mmc import mmc
from mlsys_bench.queueing.qbd import mmpp_mc, mphc
from mlsys_bench.queueing.station import Bursts, Station
from mlsys_bench.queueing.times import Floats
from tests import truth_table

NAMES = ("exp", "unif", "gamma:0.1", "logn:4", "h2:4", "bp:1.5:1:1000", "mix:0.9:1:10")
needs_numba = pytest.mark.skipif(not jit.HAVE_NUMBA, reason="numba is not installed (extra `fast`)")


def station(arrivals: str, service: str, servers: int, rho: float) -> Station:
    return Station(arrivals=parse_law(arrivals, 1 / (rho * servers)), service=parse_law(service, 1.0), servers=servers)


def customers(runs: int, n: int, servers: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Return arrival and service times of M/M/c at 90 %."""
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.exponential(1 / (0.9 * servers), (runs, n)), axis=1), rng.exponential(1.0, (runs, n))


# ---------------------------------------------------------------- the recursion


def test_two_servers_by_hand() -> None:
    """At 1, 2, 3, 4 come jobs of 10, 1, 5, 1: the third starts at once on the second server, the fourth waits for it until 8."""
    waits = recursion.waits(np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[10.0, 1.0, 5.0, 1.0]]), 2)
    assert waits.tolist() == [[0.0, 0.0, 0.0, 4.0]]


# ---------------------------------------------------------------- compiling


def test_importing_queueing_does_not_import_numba() -> None:
    code = "import sys, mlsys_bench.queueing; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_numba
def test_a_kernel_without_a_file_is_compiled_but_not_kept() -> None:
    namespace: dict[str, FunctionType] = {}
    exec("def double(x):\n    return x + x", namespace)
    assert jit.compiled(namespace["double"])(21) == 42


def test_without_numba_kernels_stay_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "HAVE_NUMBA", False)

    def double(x: int) -> int:
        return x + x

    assert jit.compiled(double) is double


# ---------------------------------------------------------------- counting


def test_bins_are_a_seventh_of_a_percent_wide_and_hold_what_lies_between_their_edges() -> None:
    assert float(np.max(EDGES[1:] / EDGES[:-1])) <= 1 + 1 / 512
    values = np.random.default_rng(0).lognormal(0, 2, 10_000)
    at = bins(values)
    assert (EDGES[at - 1] <= values).all()
    assert (values < EDGES[at]).all()
    assert bins(np.array([0.0, 1e-300, 1e300])).tolist() == [0, 0, BINS]


@pytest.mark.parametrize("fast", [True, False])
def test_counts_give_back_percentiles_and_moments(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "HAVE_NUMBA", fast and jit.HAVE_NUMBA)
    times = np.maximum(np.random.default_rng(1).exponential(3.0, (16, 20_000)) - 1.0, 0.0)
    tally = Tally(2.0)
    tally.add(times, np.arange(16))
    measured = tally.measured()
    assert measured.customers == times.size
    assert measured.mean_s == pytest.approx(times.mean())
    assert measured.variance_s2 == pytest.approx(times.var())
    assert measured.p_over(0.0) == pytest.approx((times > 0).mean(), abs=1e-5)
    for p in (0.1, 0.5, 0.9, 0.99):
        assert measured.quantile_s(p) == pytest.approx(np.quantile(times, p), rel=1e-3)
        assert p < 0.2 or measured.p_over(measured.quantile_s(p)) == pytest.approx(1 - p)


@needs_numba
def test_compiled_and_numpy_counts_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    times, groups = np.random.default_rng(2).exponential(1.0, (8, 3000)), np.array([0, 1, 2, 3, 0, 1, 2, 3])
    fast, slow = Tally(1.7), Tally(1.7)
    fast.add(times, groups)
    monkeypatch.setattr(jit, "HAVE_NUMBA", False)
    slow.add(times, groups)
    assert np.array_equal(fast.counts, slow.counts)
    assert fast.sums == pytest.approx(slow.sums)
    assert fast.squares == pytest.approx(slow.squares)


def test_only_those_asked_for_are_counted() -> None:
    tally = Tally(1.0)
    tally.add(np.array([[1.0, 5.0], [2.0, 7.0]]), np.array([0, 1]), np.array([[True, False], [True, False]]))
    assert (tally.measured().customers, tally.measured().mean_s) == (2, 1.5)


def test_nobody_counted_has_no_law() -> None:
    with pytest.raises(BadInput):
        Tally(1.0).measured()


def test_the_interval_of_two_groups_by_hand() -> None:
    """Sums 1 and 3 of one customer each: mean 2, standard error 1, Student's 12.706 with one degree of freedom, a tenth wider."""
    mean, half = share_interval(np.array([1.0, 3.0]), np.array([1.0, 1.0]))
    assert (mean, half) == pytest.approx((2.0, 1.1 * 12.7062), rel=1e-4)
    assert share_interval(np.array([1.0]), np.array([1.0]))[1] == math.inf
    assert around(0.01, 1e-5) == pytest.approx((0.00999, 0.01001), rel=1e-6)
    assert around(0.01, math.inf) == (0.0, 1.0)


# ---------------------------------------------------------------- replications


@pytest.mark.parametrize(("servers", "rho", "seeds"), [(1, 0.8, 20), (16, 0.95, 7)])
def test_intervals_cover_the_exact_percentile_as_often_as_they_say(servers: int, rho: float, seeds: int) -> None:
    """Of 20 intervals of 95 % fewer than 15 cover by chance in one of a thousand, of 7 fewer than 4."""
    exact, simulator = mmc(rho * servers, 1.0, servers), recursion.simulator(station("exp", "exp", servers, rho))
    truth, covered = exact.wait.quantile_s(0.99), 0
    for seed in range(seeds):
        run = replicate(simulator, seed=seed, p=(0.9, 0.99), half_width=0.2, budget_s=60.0)
        low, high = run.wait.interval_s(0.99)
        covered += low <= truth <= high
        assert run.reached
        assert run.settled
    assert covered >= {20: 15, 7: 4}[seeds]


def test_a_short_budget_is_kept_and_told() -> None:
    run = replicate(recursion.simulator(station("exp", "logn:4", 4, 0.9)), seed=0, half_width=1e-4, budget_s=0.3)
    assert (run.reached, run.stopped_by) == (False, "clock")
    assert run.wait.interval_s(0.99)[1] > run.wait.quantile_s(0.99)


def test_labels_are_counted_apart() -> None:
    """Customers with odd numbers wait 1, even ones 2."""

    def simulator(rng: np.random.Generator, runs: int, n: int) -> Visits:
        kind = np.broadcast_to(np.arange(n) % 2, (runs, n))
        wait = np.where(kind == 1, 1.0, 2.0) * rng.uniform(0.99, 1.01, (runs, n))
        return Visits(wait, wait + 1, kind)

    run = replicate(simulator, seed=0, half_width=0.05, budget_s=60.0)
    assert (run.kinds[0].share, run.kinds[1].share) == (0.5, 0.5)
    assert (run.kinds[0].wait.mean_s, run.kinds[1].wait.mean_s) == pytest.approx((2.0, 1.0), rel=1e-3)


def test_the_warm_up_is_eight_times_what_the_mean_takes_to_arrive() -> None:
    """Rising straight to its end in 8 windows, the mean of windows m … 2m is within a tenth of it from m = 7 on."""
    n = 4 * WINDOWS
    rise = np.broadcast_to(np.minimum(np.arange(n) / (8 * 4), 1.0), (GROUPS, n))
    expected = next(m for m in range(1, 9) if rise[0].reshape(-1, 4).mean(axis=1)[m : 2 * m].mean() >= 0.9)
    assert warm_up([Visits(rise, rise + 1)]) == 8 * expected * 4


def test_a_run_too_short_to_settle_says_so() -> None:
    """A queue that grows all along never comes near its end in time."""
    growing = np.broadcast_to(np.arange(float(2 * WINDOWS)), (GROUPS, 2 * WINDOWS))
    assert 4 * warm_up([Visits(growing, growing)]) > 2 * WINDOWS


def test_batches_come_in_order_whatever_the_threads_do() -> None:
    def first_number(rng: np.random.Generator, runs: int, n: int) -> float:
        return float(rng.random())

    batches = Batches(first_number, seed=5, until=math.inf)
    drawn = [x for x, _ in zip(batches.stream(2**14), range(6), strict=False)]
    assert drawn == [np.random.default_rng(s).random() for s in np.random.SeedSequence(5).spawn(6)]


@pytest.mark.parametrize("asked", [{"half_width": -1.0}, {"p": (1.0,)}])
def test_an_impossible_precision_is_refused(asked: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        replicate(recursion.simulator(station("exp", "exp", 1, 0.5)), seed=0, **asked)  # type: ignore[arg-type]


# ---------------------------------------------------------------- services from uniform numbers


@pytest.mark.parametrize(
    "name", ["exp", "logn:4", "gamma:0.1", "gamma:4", "h2:4", "cox2:0.7", "erl:3", "bp:1.5:1:1000", "mix:0.9:1:10", "unif"]
)
def test_tables_draw_the_law(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    law, u = parse_law(name), (np.arange(5000) + 0.5) / 5000
    drawn = Drawn(law)(u)
    assert np.abs(drawn - law.quantiles(u)).mean() <= 2e-5 * law.mean_s
    assert (np.diff(drawn) >= 0).all()
    monkeypatch.setattr(jit, "HAVE_NUMBA", False)
    assert np.allclose(Drawn(law)(u), drawn, rtol=1e-12)


# ---------------------------------------------------------------- beside stations that are known


def test_a_control_that_explains_everything_leaves_the_truth() -> None:
    n, luck = np.full(8, 10.0), np.array([3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, 6.0])
    fit = regress(7.0 * n + 2 * luck, n, [luck])
    assert (fit.value, fit.error) == pytest.approx((7.0, 0.0), abs=1e-12)


def test_a_control_that_has_nothing_to_do_with_it_changes_little() -> None:
    rng = np.random.default_rng(4)
    n, x, other = np.full(GROUPS, 100.0), rng.normal(500.0, 10.0, GROUPS), rng.normal(0.0, 1.0, GROUPS)
    alone, beside = regress(x, n, []), regress(x, n, [other])
    assert alone.value == pytest.approx(x.sum() / n.sum())
    assert beside.value == pytest.approx(alone.value, rel=0.01)
    assert beside.error == pytest.approx(alone.error, rel=0.1)


def test_phases_before_and_behind_the_door_agree_with_exponential_service() -> None:
    """PH/PH/c with one phase of service is GI/M/c, computed another way."""
    arrivals = two_moments(0.3, 3.0)
    chain, closed = known(arrivals, PhaseType([1.0], [[-1.0]]), 4), gimc(arrivals, 1.0, 4)
    assert chain.wait.quantile_s(0.99) == pytest.approx(closed.wait.quantile_s(0.99), rel=1e-7)
    assert chain.p_wait == pytest.approx(closed.p_wait, rel=1e-7)


@pytest.mark.parametrize(
    "name", ["det", "unif", "gamma:0.1", "logn:1", "logn:4", "gamma:10", "bp:1.5:1:1000", "mix:0.9:1:10", "exp", "h2:4"]
)
def test_stand_ins_are_no_more_than_three_and_keep_the_mean(name: str) -> None:
    law = parse_law(name)
    laws: tuple[Law, ...] = stand_ins(law)
    assert 1 <= len(laws) <= 3
    assert [one.mean_s for one in laws] == pytest.approx([law.mean_s] * len(laws))


def test_beside_its_own_twin_a_station_is_exact() -> None:
    bursts = Bursts(rates_per_s=(1.0, 6.0), switches_per_s=((0.0, 0.5), (0.5, 0.0)))
    asked = Station(arrivals=bursts, service=Exponential(1.0), servers=5)
    run, exact = confirm(asked, seed=0, p=(0.9,), half_width=0.1, budget_s=60.0), mmpp_mc(bursts, 1.0, 5)
    assert run.wait.quantile_s(0.99) == pytest.approx(exact.wait.quantile_s(0.99), rel=3e-3)
    assert run.wait.mean_s == pytest.approx(exact.wait.mean_s, rel=1e-5)
    assert run.twins == ("same arrivals, exp",)


def test_twins_narrow_the_intervals_and_these_still_cover() -> None:
    """M/M/c beside M/PH/c: figures are exact elsewhere; of 8 intervals of 95 % fewer than 5 cover by chance in one of a thousand."""
    servers, rho = 16, 0.9
    exact, asked = mmc(rho * servers, 1.0, servers), station("exp", "exp", servers, rho)
    twins = [Twin(service=law, exact=mphc(rho * servers, law, servers)) for law in (two_moments(1.0, 0.7), two_moments(1.0, 1.5))]
    covered = np.zeros(4)
    for seed in range(8):
        run = confirm(asked, seed=seed, p=(0.9, 0.99), half_width=0.08, budget_s=60.0, twins=twins)
        estimates = [run.wait.interval_s(0.9), run.wait.interval_s(0.99), run.sojourn.interval_s(0.99), run.wait.mean_interval_s()]
        truth = [exact.wait.quantile_s(0.9), exact.wait.quantile_s(0.99), exact.sojourn.quantile_s(0.99), exact.wait.mean_s]
        covered += [low <= value <= high for (low, high), value in zip(estimates, truth, strict=True)]
        assert isinstance(run.wait, Corrected)
        assert run.wait.gain(0.9) > 2
    assert (covered >= 5).all()


def test_a_corrected_law_is_a_law_and_its_percentiles_are_its_own() -> None:
    run = confirm(station("exp", "logn:1", 4, 0.8), seed=1, half_width=0.05, budget_s=60.0)
    t = np.linspace(0.0, 12.0, 200)
    for time in (run.wait, run.sojourn):
        over = time.survival(t)
        assert (np.diff(over) <= 1e-12).all()
        for p in (0.9, 0.95, 0.99):
            low, high = time.interval_s(p)
            assert low <= time.quantile_s(p) <= high
            assert float(time.survival(np.array([time.quantile_s(p)]))[0]) == pytest.approx(1 - p, rel=0.01)
    assert run.p_wait_interval[0] <= run.p_wait <= run.p_wait_interval[1]


def test_nobody_waits_where_nothing_varies() -> None:
    run = confirm(station("det", "det", 3, 0.9), seed=0, half_width=0.02, budget_s=60.0)
    assert (run.wait.quantile_s(0.99), run.p_wait) == (0.0, 0.0)
    assert run.sojourn.mean_s == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("model", "arrivals", "service", "servers", "rho"),
    [("M/G/c", "exp", "logn:4", 4, 0.8), ("M/G/c", "exp", "logn:0.25", 16, 0.7), ("GI/G/c", "gamma:4", "logn:4", 4, 0.8)],
)
def test_the_truth_table_is_met(model: str, arrivals: str, service: str, servers: int, rho: float) -> None:
    """Within the bar of its rows (2 or 5 %, or 1.5 times their own precision) and of our interval."""
    asked = f"c={servers};rho={rho};mean_service=1;arrival={arrivals};service={service}"
    rows = [row for row in truth_table.rows() if row["model"] == model and row["parameters"] == asked]
    assert rows
    run = confirm(station(arrivals, service, servers, rho), seed=0, half_width=0.02, budget_s=60.0)
    for row in rows:
        kind, _, what = row["quantity"].partition("_")
        time = run.wait if kind == "wait" else run.sojourn
        p = int(what[1:]) / 100 if what[1:].isdigit() else 0.0
        ours = time.mean_s if what == "mean" else run.p_wait if what == "p_delay" else time.quantile_s(p)
        value = float(row["value"])
        bar = max((0.05 if service == "logn:4" else 0.02) * value, 1.5 * float(row["precision_abs"]), 0.01 if value < 0.01 else 0.0)
        assert abs(ours - value) <= bar, row["quantity"]


def test_the_rule_finds_twins_for_every_kind_of_arrivals() -> None:
    assert [str(twin) for twin in twins_of(station("exp", "unif", 4, 0.7))] == [
        "same arrivals, det",
        "same arrivals, cox2:0.55",
        "same arrivals, cox2:0.75",
    ]
    assert [str(twin.arrivals) for twin in twins_of(station("det", "unif", 4, 0.7))] == ["None", "erl:5", "erl:5"]
    assert all(twin.arrivals is None for twin in twins_of(station("h2:4", "logn:4", 4, 0.7)))


# ---------------------------------------------------------------- others, given the very same customers


def test_ciw_waits_the_same() -> None:
    ciw = pytest.importorskip("ciw")
    arrive_s, service_s = (x[0] for x in customers(1, 3000, 8))
    gaps = np.diff(arrive_s, prepend=0.0).tolist()
    network = ciw.create_network(
        arrival_distributions=[ciw.dists.Sequential([*gaps, math.inf])],
        service_distributions=[ciw.dists.Sequential(service_s.tolist())],
        number_of_servers=[8],
    )
    simulation = ciw.Simulation(network)
    simulation.simulate_until_max_time(float(arrive_s[-1]) + 1000.0)
    records = sorted(simulation.get_all_records(), key=lambda record: record.arrival_date)
    assert len(records) == len(arrive_s)
    assert recursion.waits(arrive_s[None], service_s[None], 8)[0] == pytest.approx([r.waiting_time for r in records], abs=1e-9)
