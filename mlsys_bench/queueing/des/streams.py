"""What every event simulator draws and how its kernel is run: arrivals, classes merged in time, one call of a kernel per run.

Each simulator splits its generator in the same order (arrivals, services, choices), so two systems simulated from one seed meet the
same customers with the same work: common random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsys_bench.errors import BadInput
from mlsys_bench.queueing.laws import Law
from mlsys_bench.queueing.station import Bursts
from mlsys_bench.queueing.times import Floats

Integers = npt.NDArray[np.int64]


def at_least_one(count: int, of: str) -> None:
    """Raise BadInput for a system without servers, queues, branches …"""
    if count < 1:
        raise BadInput(f"{count} {of}: at least one is needed")


def beyond(n: int) -> int:
    """Return how many customers to draw beyond n, where later ones delay earlier ones: the last of n must not meet an empty street."""
    return n // 20 + 200


def arrival_times(arrivals: Law | Bursts, rng: np.random.Generator, runs: int, n: int) -> Floats:
    """Return the times of the first n arrivals of each run, [runs, n]."""
    if isinstance(arrivals, Bursts):
        return np.stack([_burst_times(arrivals, one, n) for one in rng.spawn(runs)])
    return np.cumsum(arrivals.sample(rng, (runs, n)), axis=1)


def _burst_times(bursts: Bursts, rng: np.random.Generator, n: int) -> Floats:
    """Return the first n arrivals of a Markov-modulated Poisson stream that starts in its stationary phase.

    Unit-rate arrivals are laid on the integral of the rate, which is linear within each stay of a phase: exact.
    """
    ends_s, counted = _stays(bursts, rng, n)
    return np.interp(np.cumsum(rng.exponential(1.0, n)), counted, ends_s)


def _stays(bursts: Bursts, rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
    """Return when phases end (from 0), and the expected arrivals up to then, enough for n arrivals with a wide margin."""
    shares, rates = np.array(bursts.shares), np.array(bursts.rates_per_s)
    moves = np.array(bursts.switches_per_s, dtype=np.float64)
    np.fill_diagonal(moves, 0.0)
    leave = np.maximum(moves.sum(axis=1), 1e-300)  # a phase never left: a stay without end
    cumulative = np.cumsum(moves / leave[:, None], axis=1)
    wanted, last = n + 10 * np.sqrt(n) + 50, len(rates) - 1
    phase = min(int(np.searchsorted(np.cumsum(shares), rng.random())), last)
    ends_s, counted = [0.0], [0.0]
    while counted[-1] < wanted:
        u, stay = rng.random(), rng.exponential(1.0) / leave[phase]
        ends_s.append(ends_s[-1] + stay)
        counted.append(counted[-1] + rates[phase] * stay)
        phase = min(int(np.searchsorted(cumulative[phase], u)), last)
    return np.array(ends_s), np.array(counted)


def merged(classes: Sequence[Law], rng: np.random.Generator, n: int) -> tuple[Floats, Integers]:
    """Return the first n arrivals of several streams together: times in order, and the class of each."""
    rates = np.array([1 / law.mean_s for law in classes])
    streams, horizon_s = [np.zeros(0) for _ in classes], 0.0
    generators = rng.spawn(len(classes))
    while sum(int(np.searchsorted(times, horizon_s, side="right")) for times in streams) < n:
        more = np.ceil(n * rates / rates.sum() + 4 * np.sqrt(n * rates / rates.sum())).astype(int) + 10
        streams = [_longer(times, law, one, k) for times, law, one, k in zip(streams, classes, generators, more, strict=True)]
        horizon_s = min(float(times[-1]) for times in streams)
    times = np.concatenate(streams)
    order = np.argsort(times, kind="stable")[:n]
    kinds = np.repeat(np.arange(len(classes)), [len(stream) for stream in streams])
    return times[order], kinds[order]


def _longer(times: Floats, law: Law, rng: np.random.Generator, more: int) -> Floats:
    start = float(times[-1]) if len(times) else 0.0
    return np.concatenate([times, start + np.cumsum(law.sample(rng, more))])


def by_class(laws: Sequence[Law], kinds: Integers, rng: np.random.Generator) -> Floats:
    """Return a service time for each customer, by the law of its class; each class draws from a stream of its own."""
    services = np.empty(kinds.shape)
    for k, (law, one) in enumerate(zip(laws, rng.spawn(len(laws)), strict=True)):
        own = kinds == k
        services[own] = law.sample(one, int(own.sum()))
    return services


def each_run(
    kernel: Callable[..., Any],
    made: Sequence[npt.NDArray[Any]],
    given: Sequence[npt.NDArray[Any]],
    rooms: Sequence[npt.NDArray[Any]],
    *settings: float,
) -> list[Any]:
    """Run a kernel once per run and return what it returned: it fills a row of each of `made`, reads a row of each of `given`,
    works in fresh copies of `rooms`, and is given `settings` last.
    """
    answers = []
    for r in range(len(made[0])):
        rows = [array[r] for array in made]
        inputs, working = [array[r] for array in given], [room.copy() for room in rooms]
        if not isinstance(kernel, FunctionType):  # compiled
            answers.append(kernel(*rows, *inputs, *working, *settings))
            continue
        lists = [row.tolist() for row in rows]
        answers.append(kernel(*lists, *[x.tolist() for x in inputs], *[x.tolist() for x in working], *settings))
        for row, filled in zip(rows, lists, strict=True):
            row[:] = filled
    return answers
