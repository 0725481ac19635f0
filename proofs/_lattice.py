"""Bounds of M/G/1 by arithmetic alone: no transform, no inversion, nothing of `mlsys_bench`.

A customer of M/G/1 waits for a geometric number of independent remainders of a service (Pollaczek and Khinchine; Feller 1971, vol. II,
XII.5).  Each remainder rounded up to a lattice makes every wait longer, each rounded down every wait shorter; on a lattice the sum is a
recursion of positive terms (Panjer 1981, ASTIN Bulletin 12, 22-26).  So the true distribution lies between the two, whatever the step of
the lattice, and with it each quantile.

The truth table's M/G/1, uniform service, load 0.8, has a median sojourn outside: an Euler sum (Abate and Whitt 1995) settles slowly near
the corner that this service ends with (15, 30, 50, 100 and 1,000 terms give 2.7346, 2.7333, 2.7327, 2.7325 and 2.73261).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import _one_thread  # noqa: F401  before numpy
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Law = Callable[[Floats], Floats]
STEP = 2e-4  # of a mean service
ROUNDING = 1e-9  # of a probability: what sums of some 1e5 positive floats may be off by


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A service time of mean 1: its distribution function, and that of what is left of one met by chance."""

    done: Law
    left: Law


def _uniform(t: Floats) -> Floats:
    return np.clip(t / 2, 0.0, 1.0)


def _left_of_uniform(t: Floats) -> Floats:
    within = np.clip(t, 0.0, 2.0)
    return within - within**2 / 4


SERVICES = {"unif": Service(done=_uniform, left=_left_of_uniform)}


def sojourn_bounds(service: Service, rho: float, p: float, near: float) -> tuple[float, float]:
    """Return an interval that holds the p-quantile of the sojourn, in mean services, if it lies below twice `near`."""
    longer, shorter = (_waits(service, rho, 2 * near, up) for up in (True, False))
    return _crossing(service, shorter, p - ROUNDING, 2 * near), _crossing(service, longer, p + ROUNDING, 2 * near)


def _waits(service: Service, rho: float, until: float, up: bool) -> Floats:
    """Return the probability of each multiple of the step as a wait, remainders rounded up or down."""
    from scipy.signal import lfilter

    n = int(until / STEP) + 2
    cells = np.diff(service.left(np.arange(n + 1, dtype=np.float64) * STEP))
    remainder = np.concatenate([[0.0], cells[:-1]]) if up else cells
    recursion = -rho * np.trim_zeros(remainder, "b")
    recursion[0] += 1.0
    first = np.zeros(n)
    first[0] = 1 - rho
    return np.asarray(lfilter([1.0], recursion, first))


def _crossing(service: Service, waits: Floats, p: float, until: float) -> float:
    """Return when the share p of sojourns is over, the wait having this law."""
    at, low, high = np.arange(len(waits), dtype=np.float64) * STEP, 0.0, until
    for _ in range(60):
        middle = (low + high) / 2
        over = float(waits @ service.done(middle - at))
        low, high = (middle, high) if over < p else (low, middle)
    return (low + high) / 2
