"""Event simulators against the truth table, runs worked by hand, naive simulators, and each other."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench.errors import BadInput
from mlsys_bench.jit import compiled
from mlsys_bench.queueing.chain import Batching
from mlsys_bench.queueing.des.events import simulator
from mlsys_bench.queueing.des.priorities_sim import simulate as priorities
from mlsys_bench.queueing.des.replicate import Visits
from mlsys_bench.queueing.des.streams import arrival_times, merged
from mlsys_bench.queueing.laws import Deterministic, Exponential, Gamma, Law, Lognormal, balanced, parse_law
from mlsys_bench.queueing.mmc import mmc
from mlsys_bench.queueing.station import (
    Balanced,
    Batches,
    Bursts,
    ForkJoin,
    Network,
    Policy,
    Priorities,
    Slots,
    Stage,
    Station,
    System,
    Tokens,
    tandem,
)
from mlsys_bench.queueing.times import Floats

FAST = hasattr(compiled(lambda: 0), "py_func")
RUNS = 16
POLICIES: tuple[Policy, ...] = ("random", "round_robin", "jsq", "power_of_d", "least_work")


def run(system: System, *, runs: int = 1, n: int = 1000, seed: int = 0) -> Visits:
    return simulator(system)(np.random.default_rng(seed), runs, n)


# ---------------------------------------------------------------- the truth table


Row = tuple[str, float, float]


def balanced_system(p: dict[str, str]) -> System | None:
    if p["N"] == "inf":
        return None
    queues = int(p["N"])
    arrivals = Exponential(1 / (float(p["rho"]) * queues))
    policy = next(known for known in POLICIES if known == p["policy"].replace("po2", "power_of_d"))
    return Balanced(arrivals=arrivals, service=parse_law(p["service"]), queues=queues, policy=policy)


def batches_system(p: dict[str, str]) -> System:
    return Batches(
        arrivals=Exponential(1 / float(p["lambda"])),
        fixed_s=float(p["beta"]),
        per_request_s=float(p["alpha"]),
        max_batch=None if p["max_batch"] == "inf" else int(p["max_batch"]),
        max_wait_s=float(p["max_wait"]),
        noise=None if p["X"] == "det" else parse_law(p["X"]),
        servers=int(p["c"]),
    )


def two_classes(p: dict[str, str], *, preemptive: bool) -> System:
    arrivals = (Exponential(1 / float(p["lambda1"])), Exponential(1 / float(p["lambda2"])))
    return Priorities(arrivals=arrivals, services=(Exponential(), Exponential()), servers=int(p.get("c", 1)), preemptive=preemptive)


def line(p: dict[str, str]) -> System:
    stages = [stage.split(":") for stage in (p.get("mu") or p["stages(mu:c)"]).split("|")]
    return tandem(
        Exponential(1 / float(p["lambda"])), tuple(Stage(service=Exponential(1 / float(mu)), servers=int(*c or (1,))) for mu, *c in stages)
    )


def losing(p: dict[str, str]) -> System:
    rate = float(p["a"]) if "a" in p else float(p["rho"]) * int(p["c"])
    patience: Law | None = Exponential(1 / float(p["theta"])) if "theta" in p else None
    if "patience" in p:
        patience = Deterministic(float(p["patience"]))
    capacity = int(p["K"]) if "K" in p else None
    return Station(arrivals=Exponential(1 / rate), service=Exponential(), servers=int(p["c"]), capacity=capacity, patience=patience)


SYSTEMS: dict[str, Callable[[dict[str, str]], System | None]] = {
    "BATCH": batches_system,
    "FORKJOIN": lambda p: ForkJoin(arrivals=Exponential(1 / float(p["rho"])), service=Exponential(), branches=int(p["N"])),
    "LB": balanced_system,
    "PRIO M/M/c": lambda p: two_classes(p, preemptive=False),
    "PRIO-PR M/M/1": lambda p: two_classes(p, preemptive=True),
    "TANDEM M/M/1": line,
    "TANDEM M/M/c": line,
    "M/M/1-PS": lambda p: Station(arrivals=Exponential(1 / float(p["rho"])), service=Exponential(), sharing=True),
    "M/M/c/K": losing,
    "M/M/c+M": losing,
    "M/M/c+D": losing,
}


@functools.cache
def truth(model: str) -> dict[str, list[Row]]:
    """Return (quantity, value, precision) of one model's rows, by parameters."""
    from tests import truth_table  # here: `checksum` runs in a process that finds another package called tests

    return truth_table.by_parameters(model)


def statistic(name: str, values: Floats) -> float:
    return float(values.mean()) if name == "mean" else float(np.quantile(values, int(name[1:]) / 100))


def read(quantity: str, wait: Floats, sojourn: Floats, kind: np.ndarray, *, labels: str) -> float | None:
    """Return one quantity of one run, None for what a simulation of customers does not give.  `labels` says what kinds mean."""
    if quantity == "sojourn_mean_batch":
        return float(1 / (1 / kind).mean())
    if labels == "fate" and quantity in {"blocking", "p_abandon"}:
        return float((kind == (1 if quantity == "blocking" else 2)).mean())
    if labels == "fate" and quantity == "p_delay":
        return float(((wait > 0) & (kind != 1)).mean())
    found = re.fullmatch(r"(wait|sojourn)(_all|_served|\d)?_(mean|p\d\d)", quantity)
    if found is None:
        return None
    values, which = wait if found[1] == "wait" else sojourn, found[2] or ""
    if which.isdigit():
        values = values[kind == int(which) - 1]
    elif labels == "fate":
        values = values[kind != 1] if which == "_all" else values[kind == 0]
    return statistic(found[3], values)


@pytest.mark.parametrize("model", SYSTEMS)
def test_simulators_reproduce_the_truth_table(model: str) -> None:
    """Each figure over 16 runs within 1.5 times the table's precision and 4.5 standard errors of its own; short runs are biased too."""
    n, bias = (40_000, 0.0) if FAST else (8_000, 0.1)
    checked, wrong = 0, []
    for parameters, rows in truth(model).items():
        system = SYSTEMS[model](dict(part.split("=", 1) for part in parameters.split(";")))
        if system is None:
            continue
        visits = run(system, runs=RUNS, n=n, seed=2026)
        wait, sojourn = visits.wait_s[:, n // 4 :], visits.sojourn_s[:, n // 4 :]
        kind = np.zeros(wait.shape, dtype=np.int64) if visits.kind is None else visits.kind[:, n // 4 :]
        labels = "fate" if isinstance(system, Station) else "label"
        for quantity, value, precision in rows:
            quantity = quantity.removesuffix("_published")
            each = [read(quantity, wait[r], sojourn[r], kind[r], labels=labels) for r in range(RUNS)]
            own = np.array([x for x in each if x is not None])
            if len(own) < RUNS:
                continue
            checked += 1
            allowed = 1.5 * precision + 4.5 * own.std(ddof=1) / RUNS**0.5 + bias * value + 1e-9
            if abs(own.mean() - value) > allowed:
                wrong.append((parameters, quantity, value, own.mean(), allowed))
    assert checked >= len([row for rows in truth(model).values() for row in rows]) * 0.5
    assert wrong == []


# ---------------------------------------------------------------- by hand


def test_a_batch_starts_when_it_is_full_or_its_first_has_waited_enough() -> None:
    full = run(Batches(arrivals=Deterministic(1.0), fixed_s=1.0, per_request_s=0.5, max_batch=3, max_wait_s=9.0), n=6)
    assert full.wait_s[0] == pytest.approx([2, 1, 0, 2, 1, 0])
    assert full.sojourn_s[0] == pytest.approx([4.5, 3.5, 2.5] * 2)
    late = run(Batches(arrivals=Deterministic(1.0), fixed_s=0.1, per_request_s=0.1, max_batch=9, max_wait_s=1.5), n=4)
    assert late.wait_s[0] == pytest.approx([1.5, 0.5] * 2)
    assert late.kind is not None
    assert late.kind[0].tolist() == [2] * 4


def test_a_busy_server_takes_all_that_came_meanwhile() -> None:
    """Arrivals each second, batches of 2.5 s: the first rides alone, at 3.5 two more have come, at 6 three."""
    visits = run(Batches(arrivals=Deterministic(1.0), fixed_s=2.5, per_request_s=0.0, max_batch=None), n=6)
    assert visits.kind is not None
    assert visits.kind[0].tolist() == [1, 2, 2, 3, 3, 3]
    assert visits.wait_s[0] == pytest.approx([0, 1.5, 0.5, 2, 1, 0])


# ---------------------------------------------------------------- against naive simulators


def drawn(n: int, seed: int, rate: float) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.exponential(1 / rate, n)), rng.exponential(1.0, n)


def naive_sojourns(arrive: Floats, work: Floats, speeds: Callable[[list[int]], dict[int, float]]) -> Floats:
    """Return sojourns when those present, listed in order of arrival, are served at `speeds`: event by event, all work kept."""
    left, t, at, ends = dict[int, float](), 0.0, 0, np.zeros(len(arrive))
    while left or at < len(arrive):
        speed = speeds(sorted(left))
        step = min([left[i] / s for i, s in speed.items() if s > 0] + ([arrive[at] - t] if at < len(arrive) else []))
        t += step
        for i, s in speed.items():
            left[i] -= s * step
        for i in [i for i in left if left[i] <= 1e-12]:
            ends[i] = t
            del left[i]
        if at < len(arrive) and arrive[at] - t <= 1e-12:
            left[at], at = work[at], at + 1
    return ends - arrive


@pytest.mark.parametrize("servers", [1, 3])
def test_preemption_serves_the_most_urgent_first(servers: int) -> None:
    system = Priorities(
        arrivals=(Exponential(3.0 / servers),) * 3,
        services=(Exponential(0.9), Lognormal(4.0, 0.8), Deterministic(1.0)),
        servers=servers,
        preemptive=True,
    )
    n = 3000
    visits, work, kinds, arrive = recovered(system, n)
    urgent = lambda present: dict.fromkeys(sorted(present, key=lambda i: (kinds[i], i))[:servers], 1.0)  # noqa: E731
    assert visits.sojourn_s[0, : n // 2] == pytest.approx(naive_sojourns(arrive, work, urgent)[: n // 2], abs=1e-7)


def recovered(system: Priorities, n: int) -> tuple[Visits, Floats, np.ndarray, Floats]:
    """Return a run with the service, the class and the arrival of each of its customers."""
    visits = priorities(system, np.random.default_rng(4), 1, n)
    assert visits.kind is not None
    arrive, kinds = merged(system.arrivals, np.random.default_rng(4).spawn(3)[0].spawn(1)[0], n + n // 20 + 200)
    assert (kinds[:n] == visits.kind[0]).all()
    return visits, visits.sojourn_s[0] - visits.wait_s[0], visits.kind[0], arrive[:n]


@pytest.mark.parametrize("servers", [1, 3])
def test_sharing_serves_all_present_alike(servers: int) -> None:
    n, seed = 2000, 5
    system = Station(arrivals=Exponential(1.3 / servers), service=Gamma(2.0), servers=servers, sharing=True)
    visits = run(system, n=n, seed=seed)
    first, second, _ = np.random.default_rng(seed).spawn(3)
    size = (1, n + n // 20 + 200)
    arrive, work = arrival_times(system.arrivals, first, *size)[0], system.service.sample(second, size)[0]
    alike = lambda present: dict.fromkeys(present, min(1.0, servers / max(len(present), 1)))  # noqa: E731
    assert visits.sojourn_s[0] == pytest.approx(naive_sojourns(arrive, work, alike)[:n], abs=1e-7)


def test_the_shortest_queue_is_always_joined_and_ties_fall_evenly() -> None:
    queues, n = 5, 4000
    visits = run(Balanced(arrivals=Exponential(0.25), service=Exponential(), queues=queues, policy="jsq"), n=n)
    assert visits.kind is not None
    arrive = arrival_times(Exponential(0.25), np.random.default_rng(0).spawn(3)[0], 1, n)[0]
    leave, joined = arrive + visits.sojourn_s[0], visits.kind[0]
    for i in range(n):
        present = np.bincount(joined[:i][leave[:i] > arrive[i]], minlength=queues)
        assert present[joined[i]] == present.min()
    assert np.bincount(joined) == pytest.approx(np.full(queues, n / queues), rel=0.1)


# ---------------------------------------------------------------- against theory


def near(values: Floats, expected: float, standard_errors: float = 4.5) -> bool:
    """Return whether the mean over runs agrees with what theory says."""
    each = values.mean(axis=1)
    return bool(abs(each.mean() - expected) <= standard_errors * each.std(ddof=1) / len(each) ** 0.5)


def test_urgent_customers_see_only_each_other_and_the_rest_pay_for_it() -> None:
    """Preemptive M/M/4: the first class is an M/M/4 of its own, all together are one too."""
    system = Priorities(arrivals=(Exponential(1 / 1.6), Exponential(1 / 1.8)), services=(Exponential(),) * 2, servers=4, preemptive=True)
    visits = run(system, runs=RUNS, n=20_000)
    assert visits.kind is not None
    urgent = np.array([[visits.sojourn_s[r][visits.kind[r] == 0].mean()] for r in range(RUNS)])
    assert near(urgent, mmc(1.6, 1.0, 4).sojourn_s)
    assert near(visits.sojourn_s, mmc(3.4, 1.0, 4).sojourn_s)


def test_a_plain_station_is_simulated_by_its_recursion() -> None:
    visits = run(Station(arrivals=Exponential(1 / 2.4), service=Exponential(), servers=3), runs=RUNS, n=20_000)
    assert near(visits.sojourn_s, mmc(2.4, 1.0, 3).sojourn_s)


@pytest.mark.parametrize("service", ["det", "h2:4", "logn:2"])
def test_the_mean_under_sharing_depends_on_the_mean_service_alone(service: str) -> None:
    visits = run(Station(arrivals=Exponential(1 / 0.7), service=parse_law(service), sharing=True), runs=RUNS, n=20_000)
    assert near(visits.sojourn_s, 1 / 0.3)


def test_slots_follow_their_chain() -> None:
    rates = tuple(n / (2.0 + 0.3 * n) for n in range(1, 9))
    visits = run(Slots(rate_per_s=1.5, completions_per_s=rates, capacity=20), runs=RUNS, n=20_000)
    chain = Batching(1.5, rates, 20)
    assert visits.kind is not None
    served = visits.kind == 0
    sojourn = np.array([[visits.sojourn_s[r][served[r]].mean()] for r in range(RUNS)])
    assert near(sojourn, chain.sojourn_s)
    assert near((~served).astype(np.float64), chain.p_blocked)


def test_a_network_with_feedback_and_a_fork_in_the_road_is_a_product_of_queues() -> None:
    """Jackson: stage rates solve the traffic equations, each stage is then an M/M/c."""
    routing = ((0.2, 0.5, 0.1), (0.0, 0.0, 0.6), (0.0, 0.0, 0.0))
    stages = (Stage(service=Exponential(0.5)), Stage(service=Exponential(2.0), servers=3), Stage(service=Exponential(1.0), servers=2))
    visits = run(Network(arrivals=Exponential(), stages=stages, entry=(0.8, 0.0, 0.2), routing=routing), runs=RUNS, n=20_000)
    rates = np.linalg.solve(np.eye(3) - np.array(routing).T, [0.8, 0.0, 0.2])
    present = sum(mmc(float(rate), stage.service.mean_s, stage.servers).mean_requests for rate, stage in zip(rates, stages, strict=True))
    assert near(visits.sojourn_s, present)
    assert visits.kind is not None
    assert near(visits.kind.astype(np.float64), rates.sum())


def test_bursts_come_at_their_mean_rate_in_clumps() -> None:
    bursts = Bursts(rates_per_s=(10.0, 1.0), switches_per_s=((0.0, 0.05), (0.025, 0.0)))
    times = arrival_times(bursts, np.random.default_rng(0), 8, 40_000)
    assert 40_000 / times[:, -1].mean() == pytest.approx(4.0, rel=0.05)
    gaps = np.diff(times, axis=1)
    assert gaps.var() / gaps.mean() ** 2 > 2
    lone = arrival_times(Bursts(rates_per_s=(2.0,), switches_per_s=((0.0,),)), np.random.default_rng(0), 1, 10_000)
    assert 10_000 / lone[0, -1] == pytest.approx(2.0, rel=0.04)


# ---------------------------------------------------------------- what must always hold


def few_tokens() -> Tokens:
    return Tokens(
        arrivals=Exponential(250.0), prompt_tokens=Lognormal(1.0, 300.0), output_tokens=Lognormal(1.0, 60.0), prompt_range=(1, 1200),
        output_range=(1, 500), fixed_s=8.0, per_sequence_s=0.25, per_kv_token_s=0.001, per_prompt_token_s=0.02, max_batch=8,
        kv_tokens=3000.0,
    )  # fmt: skip


def one_of_each() -> tuple[System, ...]:
    work, poisson = balanced(3.0), Exponential(0.4)
    deals = tuple(Balanced(arrivals=poisson, service=work, queues=4, policy=policy) for policy in POLICIES)
    classes = tuple(
        Priorities(arrivals=(Exponential(1.0), Gamma(2.0, 0.9)), services=(Exponential(), work), servers=3, preemptive=preemptive)
        for preemptive in (False, True)
    )
    stations = (
        Station(arrivals=poisson, service=work, servers=3, capacity=7, patience=Gamma(0.5, 2.0)),
        Station(arrivals=poisson, service=work, servers=3, sharing=True, capacity=30),
        Slots(rate_per_s=2.5, completions_per_s=(1.0, 1.8, 2.4, 2.8)),
    )
    routed = Network(
        arrivals=poisson,
        stages=(Stage(service=work, servers=4), Stage(service=Exponential(0.5), servers=2)),
        entry=(1.0, 0.0),
        routing=((0.1, 0.5), (0.2, 0.0)),
    )
    batches = Batches(arrivals=poisson, fixed_s=1.0, per_request_s=0.2, max_batch=6, max_wait_s=0.5, noise=Gamma(0.3), servers=2)
    fork = ForkJoin(arrivals=Exponential(1.4), service=work, branches=3)
    return (*deals, *classes, *stations, routed, batches, fork, few_tokens())


EACH = pytest.mark.parametrize("system", one_of_each(), ids=lambda s: getattr(s, "policy", type(s).__name__))


@EACH
def test_no_time_is_negative_and_no_wait_longer_than_its_sojourn(system: System) -> None:
    visits = run(system, runs=2, n=3000)
    assert visits.wait_s.shape == visits.sojourn_s.shape == (2, 3000)
    assert visits.wait_s.min() >= 0
    assert (visits.sojourn_s >= visits.wait_s).all()
    assert np.isfinite(visits.sojourn_s).all()
    assert visits.sojourn_s[0].mean() != visits.sojourn_s[1].mean()


@EACH
def test_the_same_seed_gives_the_same_customers_and_a_longer_run_begins_like_a_shorter(system: System) -> None:
    first, again, other = run(system, n=500, seed=1), run(system, n=500, seed=1), run(system, n=500, seed=2)
    assert (first.sojourn_s == again.sojourn_s).all()
    assert (first.sojourn_s != other.sojourn_s).any()


@pytest.mark.parametrize("policy", ["random", "round_robin", "least_work", "power_of_d"])
def test_policies_are_compared_on_the_same_customers(policy: Policy) -> None:
    one, other = (
        run(Balanced(arrivals=Exponential(0.3), service=balanced(4.0), queues=4, policy=p), runs=2, n=2000) for p in ("jsq", policy)
    )
    assert one.sojourn_s - one.wait_s == pytest.approx(other.sojourn_s - other.wait_s, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(queues=st.integers(1, 6), load=st.floats(0.2, 0.95), scv=st.floats(0.1, 5.0), seed=st.integers(0, 10**6))
def test_no_customer_waits_longer_for_one_server_more(queues: int, load: float, scv: float, seed: int) -> None:
    """Least work with any number of queues is one queue before as many servers: pathwise monotone."""
    arrivals = Exponential(1 / (load * queues))
    few, more = (
        run(Balanced(arrivals=arrivals, service=Gamma(scv), queues=k, policy="least_work"), n=300, seed=seed) for k in (queues, queues + 1)
    )
    assert (more.wait_s <= few.wait_s + 1e-9).all()


@settings(max_examples=25, deadline=None)
@given(branches=st.integers(1, 6), load=st.floats(0.2, 0.95), seed=st.integers(0, 10**6))
def test_no_job_ends_sooner_with_one_branch_more(branches: int, load: float, seed: int) -> None:
    few, more = (
        run(ForkJoin(arrivals=Exponential(1 / load), service=Exponential(), branches=k), n=300, seed=seed) for k in (branches, branches + 1)
    )
    assert (more.sojourn_s >= few.sojourn_s).all()


@settings(max_examples=25, deadline=None)
@given(power=st.integers(-20, 20), preemptive=st.booleans(), seed=st.integers(0, 10**6))
def test_another_unit_of_time_is_only_another_unit(power: int, preemptive: bool, seed: int) -> None:
    """Powers of two are exact in binary, so every wait is scaled to the last bit."""
    scale = 2.0**power
    systems = [
        Priorities(
            arrivals=(Exponential(u), Exponential(2 * u)), services=(Exponential(0.5 * u), Gamma(2.0, 0.5 * u)), preemptive=preemptive
        )
        for u in (1.0, scale)
    ]
    plain, scaled = (run(system, n=200, seed=seed) for system in systems)
    assert (plain.wait_s * scale == scaled.wait_s).all()


def test_work_is_neither_made_nor_lost_by_the_order_of_service() -> None:
    """One server, three disciplines, the same customers: the same busy periods, hence the same share of arrivals that find it idle."""
    arrivals, services = (Exponential(2.0), Exponential(2.5)), (Exponential(), Exponential())
    idle = []
    for preemptive in (False, True):
        visits = run(Priorities(arrivals=arrivals, services=services, preemptive=preemptive), n=5000)
        arrive, _ = merged(arrivals, np.random.default_rng(0).spawn(3)[0].spawn(1)[0], 5450)
        last = np.maximum.accumulate(arrive[:5000] + visits.sojourn_s[0])
        idle.append(int((arrive[1:5000] >= last[:-1]).sum()))
    assert idle[0] == idle[1] > 100


def checksum() -> str:
    """Return a digest of a small run of everything."""
    digest = hashlib.sha256()
    for system in one_of_each():
        visits = run(system, n=400)
        digest.update(np.round(visits.sojourn_s, 9).tobytes() + np.round(visits.wait_s, 9).tobytes())
    return digest.hexdigest()


@pytest.mark.skipif(not FAST, reason="numba is not installed: there is one way only")
def test_compiled_kernels_and_plain_python_give_the_same_runs() -> None:
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_queueing_events as t; print(t.checksum())"
    plain = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True, check=True
    )
    assert plain.stdout.strip() == checksum()


# ---------------------------------------------------------------- what cannot be simulated


@pytest.mark.parametrize(
    ("system", "says"),
    [
        (Balanced(arrivals=Exponential(), service=Exponential(), queues=0, policy="jsq"), "0 queues"),
        (Balanced(arrivals=Exponential(), service=Exponential(), queues=2, policy="power_of_d", choices=0), "0 choices"),
        (Balanced(arrivals=Exponential(), service=Exponential(), queues=2, policy="jqs"), "did you mean jsq"),  # type: ignore[arg-type]
        (Batches(arrivals=Exponential(), fixed_s=0.1, per_request_s=0.1, max_batch=0), "0 requests in a batch"),
        (ForkJoin(arrivals=Exponential(), service=Exponential(), branches=0), "0 branches"),
        (Priorities(arrivals=(Exponential(),), services=(), servers=1), "each class needs both"),
        (Station(arrivals=Exponential(), service=Exponential(), sharing=True, patience=Exponential()), "nobody waits there"),
        (Network(arrivals=Exponential(), stages=(Stage(service=Exponential()),), entry=(1.0,), routing=((1.0,),)), "for ever"),
        (Network(arrivals=Exponential(), stages=(Stage(service=Exponential()),), entry=(0.5,), routing=((0.0,),)), "entry shares to 1"),
        (
            Network(arrivals=Exponential(), stages=(Stage(service=Exponential()),), entry=(1.0,), routing=((0.0, 0.0),)),
            "a row and a column",
        ),
    ],
)
def test_systems_that_cannot_run_are_refused_in_words(system: System, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        run(system, n=10)
