"""Who goes first: what priorities between tenants make of a wait that all would share, first come, first served.

A replica serves lower ranks first and takes no seat back, so it is a station with non-preemptive priorities.  With sigma the load of a
class and of those before it, sigma_h that of those before it alone, and rho that of all, the wait of those who wait is in M/M/c

    n + 1 busy periods that higher classes prolong, n geometric with parameter sigma:      mean  1 / (c mu (1 - sigma_h) (1 - sigma)),

against 1 / (c mu (1 - rho)) first come, first served.  The ratio of the two means is that of Cobham's formula, where it is exact for one
server and any laws of service (A. Cobham 1954, Operations Research 2, 70-76); for several it is taken to hold as well, as A. B. Bondi and
J. P. Buzen (1984, SIGMETRICS, 115-122) propose.  Each wait is multiplied by that ratio and by a gamma factor of mean 1 that brings the
spread of the law to that of the busy periods; for the first class the factor is 1 and the law exact in M/M/c.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """By request, the share of all work that is of the ranks before its own, and with its own: of service, and of prompt tokens."""

    before: Floats
    upto: Floats
    prompts_before: Floats
    prompts_upto: Floats

    def rows(self, at: Ints) -> Order:
        """Return that of these requests."""
        return Order(before=self.before[at], upto=self.upto[at], prompts_before=self.prompts_before[at], prompts_upto=self.prompts_upto[at])


def of(rank: Ints, work: Floats, prompt: Floats) -> Order:
    """Return the order of requests of these ranks, each with its service and its prompt."""
    before, upto = _shares(rank, work)
    prompts_before, prompts_upto = _shares(rank, prompt)
    return Order(before=before, upto=upto, prompts_before=prompts_before, prompts_upto=prompts_upto)


def _shares(rank: Ints, work: Floats) -> tuple[Floats, Floats]:
    by_rank = np.cumsum(np.bincount(rank, work)) / work.sum()
    return np.append(0.0, by_rank)[rank], by_rank[rank]


def stretched(rho: float, order: Order) -> tuple[Floats, Floats]:
    """Return by request what multiplies the mean wait of first come, first served, and the SCV of a factor of mean 1 that does the rest.

    With b, v mean and variance of a busy period and n geometric: mean (n + 1) b, variance b^2 sigma / (1 - sigma)^2 + v / (1 - sigma).
    """
    higher, sigma = rho * order.before, rho * order.upto
    ratio = (1 - rho) / ((1 - higher) * (1 - sigma))
    scv = sigma + (1 - sigma) * (1 + higher) / (1 - higher)
    return ratio, np.maximum((scv - 1) / 2, 0.0)
