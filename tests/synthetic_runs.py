"""Runs of stations whose law is known, as columns: what the statistics of load tests are held against."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter

from mlsys_bench.summary.columns import Columns

Floats = npt.NDArray[np.float64]


def columns(scheduled_s: Floats, ttft_s: Floats, e2e_s: Floats) -> Columns:
    """Return answered requests of two tokens each."""
    n = len(scheduled_s)
    stamps = np.empty(2 * n)
    stamps[0::2] = scheduled_s + ttft_s
    stamps[1::2] = scheduled_s + np.maximum(e2e_s, ttft_s)
    nothing, first = np.zeros(n), np.zeros(n, dtype=np.int64)
    return Columns(
        scheduled_s=scheduled_s, sent_s=scheduled_s, connect_s=nothing, done_s=stamps[1::2], prompt_tokens=nothing + 10,
        output_tokens=nothing + 2, in_window=np.ones(n, dtype=bool), outcome=first, source=first,
        tenant=np.full(n, -1), tenants=(), offsets=2 * np.arange(n + 1), token_s=stamps, tokens=np.ones(2 * n, dtype=np.int64),
    )  # fmt: skip


def poisson(rng: np.random.Generator, rate_per_s: float, duration_s: float) -> Floats:
    """Return the times of a Poisson process."""
    return np.sort(rng.uniform(0, duration_s, rng.poisson(rate_per_s * duration_s)))


def autoregressive(rng: np.random.Generator, n: int, phi: float) -> Floats:
    """Return a stationary AR(1) series of variance 1."""
    noise = rng.normal(size=n + 300)
    return np.asarray(lfilter([np.sqrt(1 - phi**2)], [1, -phi], noise))[300:]


def sojourns(rng: np.random.Generator, n: int, rho: float) -> Floats:
    """Return the times in an M/M/1 station of service time 1, from its stationary state (Lindley)."""
    settle = 5000
    steps = rng.exponential(1, n + settle)[:-1]
    walk = np.concatenate([[0.0], np.cumsum(steps - rng.exponential(1 / rho, n + settle - 1))])
    waits = walk - np.minimum.accumulate(walk)
    return (waits + np.append(steps, rng.exponential()))[settle:]


def station(rng: np.random.Generator, rate_per_s: float, duration_s: float, servers: int, mean_s: float, before_s: float = 0.0) -> Columns:
    """Return a run against an M/M/c station that was empty `before_s` ahead of its start."""
    due_s = poisson(rng, rate_per_s, duration_s + before_s) - before_s
    work_s = rng.exponential(mean_s, len(due_s))
    free_s = [-before_s] * servers
    began_s = np.empty(len(due_s))
    for i, (due, work) in enumerate(zip(due_s, work_s, strict=True)):
        began_s[i] = max(due, heapq.heappop(free_s))
        heapq.heappush(free_s, began_s[i] + work)
    kept = due_s >= 0
    wait_s = (began_s - due_s)[kept]
    return columns(due_s[kept], wait_s + 0.05, wait_s + work_s[kept] + 0.05)


def decaying(rng: np.random.Generator, phi: float, times: float, decay_s: float, duration_s: float = 60.0) -> Columns:
    """Return 20 requests/s whose TTFT of 100 ms starts `1 + times` as long and decays, with AR(1) noise of a fifth."""
    due_s = poisson(rng, 20.0, duration_s)
    ttft_s = 0.1 * (1 + 0.2 * autoregressive(rng, len(due_s), phi) + times * np.exp(-due_s / decay_s))
    return columns(due_s, ttft_s, ttft_s + 0.5)
