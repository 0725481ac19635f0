"""What can be asked about: stations and small systems of stations, as plain data.  `solve` says how each is answered.

Arrivals are a `Law` of the time between them (an exponential law is a Poisson stream) or `Bursts`; service is a `Law`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlsys_bench.queueing.laws import Law

Policy = Literal["random", "round_robin", "jsq", "power_of_d", "least_work"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bursts:
    """A Markov-modulated Poisson stream (MMPP): `rates_per_s[i]` arrivals in phase i, which goes to j at `switches_per_s[i][j]`."""

    rates_per_s: tuple[float, ...]
    switches_per_s: tuple[tuple[float, ...], ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of time in each phase: pi Q = 0, pi 1 = 1."""
        n = len(self.rates_per_s)
        Q = np.array(self.switches_per_s, dtype=np.float64)
        np.fill_diagonal(Q, 0.0)
        Q -= np.diag(Q.sum(axis=1))
        balance = np.vstack([Q.T, np.ones(n)])
        return tuple(float(x) for x in np.linalg.lstsq(balance, np.append(np.zeros(n), 1.0), rcond=None)[0])

    @property
    def rate_per_s(self) -> float:
        """Mean arrivals per second."""
        return sum(share * rate for share, rate in zip(self.shares, self.rates_per_s, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """One queue before equal servers, first come first served; or, `sharing`, all present served at equal speed."""

    arrivals: Law | Bursts
    service: Law
    servers: int = 1
    capacity: int | None = None  # most customers held, those in service included; None: no limit
    patience: Law | None = None  # how long a customer waits before it gives up; None: for ever
    sharing: bool = False  # processor sharing


@dataclass(frozen=True, slots=True, kw_only=True)
class Priorities:
    """Classes before equal servers, the first class first; `preemptive`: it interrupts, and the interrupted resume."""

    arrivals: tuple[Law, ...]
    services: tuple[Law, ...]
    servers: int = 1
    preemptive: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Balanced:
    """One stream dealt to `queues` servers with a queue each."""

    arrivals: Law
    service: Law
    queues: int
    policy: Policy
    choices: int = 2  # d of power_of_d


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """Servers that take a batch of up to `max_batch` waiting requests at once: a batch of n takes (fixed_s + per_request_s n) x noise.

    An idle server starts when `max_batch` wait or the oldest has waited `max_wait_s`, whichever is first.
    """

    arrivals: Law
    fixed_s: float
    per_request_s: float
    max_batch: int | None
    max_wait_s: float = 0.0
    noise: Law | None = None  # mean 1; None: always 1
    servers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """A replica that works on up to B requests at once, completing r(n) per second with n of them: `completions_per_s` is r(1) … r(B)."""

    rate_per_s: float
    completions_per_s: tuple[float, ...]
    capacity: int | None = None  # most requests held, waiting ones included


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Continuous batching step by step: a step with n sequences holding kv tokens and admitting `prompt` tokens takes
    fixed_s + per_sequence_s n + per_kv_token_s kv + per_prompt_token_s prompt.

    First come first served; a request is admitted when a slot is free and prompt + output tokens fit the KV pool, which it reserves.
    """

    arrivals: Law
    prompt_tokens: Law
    output_tokens: Law
    prompt_range: tuple[int, int]
    output_range: tuple[int, int]
    fixed_s: float
    per_sequence_s: float
    per_kv_token_s: float
    per_prompt_token_s: float
    max_batch: int
    kv_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkJoin:
    """Every job sends one task to each of `branches` single-server queues and is done when all are."""

    arrivals: Law
    service: Law
    branches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One station of a network: its service law and servers."""

    service: Law
    servers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Stages with random routing: a customer leaving stage i goes to j with probability `routing[i][j]`, otherwise out.

    `entry[i]` is the share of outside arrivals that start at stage i.  `tandem` builds the straight line.
    """

    arrivals: Law
    stages: tuple[Stage, ...]
    entry: tuple[float, ...]
    routing: tuple[tuple[float, ...], ...]


System = Station | Priorities | Balanced | Batches | Slots | Tokens | ForkJoin | Network


def tandem(arrivals: Law, stages: tuple[Stage, ...]) -> Network:
    """Return stages one after another."""
    n = len(stages)
    routing = tuple(tuple(1.0 if j == i + 1 else 0.0 for j in range(n)) for i in range(n))
    return Network(arrivals=arrivals, stages=stages, entry=(1.0,) + (0.0,) * (n - 1), routing=routing)
