"""Whether a server falls behind the rate it is offered: a test that may be looked at every second and still errs as seldom as it says.

A server that keeps up completes what it is offered, so what is offered and not completed has no drift; one that falls behind has it.
Wald's sequential probability ratio test of 'no drift' against 'one part in ten of the rate is left over', with completions that
scatter like a Poisson stream (a server under full load scatters less; critical load is the worst case of 'keeps up').
Source: A. Wald (1945), Sequential Tests of Statistical Hypotheses, Annals of Mathematical Statistics 16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

DRIFT = 0.1  # share of the rate that is left over, against which 'none' is tested
ERROR = 0.01  # of a false alarm at critical load, over all looks together
_LEAST_S = 2.0  # of watching


class Look(NamedTuple):
    """How a level stands at a moment: requests that ended, however, and those that are still waited for."""

    t_s: float
    ended: int
    in_flight: int


def falls_behind(rate_per_s: float, looks: Sequence[Look], settle_s: float, burstiness: float = 1.0) -> bool:
    """Say whether completions fall behind the rate since `settle_s`, with more and more requests in flight.

    `settle_s` is how long the first answers take; `burstiness` the squared coefficient of variation of the gaps between arrivals.
    """
    since = [look for look in looks if look.t_s >= settle_s]
    if len(since) < 2 or since[-1].t_s - since[0].t_s < _LEAST_S:
        return False
    first, last = since[0], since[-1]
    if last.in_flight <= max(first.in_flight, sum(look.in_flight for look in since) / len(since)):
        return False
    return log_ratio(rate_per_s, last.t_s - first.t_s, last.ended - first.ended, burstiness) >= math.log(1 / ERROR)


def log_ratio(rate_per_s: float, span_s: float, ended: int, burstiness: float = 1.0) -> float:
    """Return the log of how much likelier so few completions are when the server falls behind by `DRIFT` than when it keeps up."""
    drift, left_over = DRIFT * rate_per_s, rate_per_s * span_s - ended
    return (drift * left_over - drift**2 * span_s / 2) / (rate_per_s * max(1.0, burstiness))
