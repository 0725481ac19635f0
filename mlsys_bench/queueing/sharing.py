"""Processor sharing: everybody present is served at once, at equal speed, and nobody waits."""

from __future__ import annotations

import math

import numpy as np

from mlsys_bench.errors import Overload
from mlsys_bench.queueing import tagged
from mlsys_bench.queueing.contour import Contour
from mlsys_bench.queueing.mmc import birth_death, check_load, check_service, erlang_c
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.times import Complexes, Zero


def mm1ps(rate_per_s: float, service_s: float) -> Queue:
    """Return the M/M/1 queue under processor sharing: with n present each is served at rate mu / n.  See `mmcps`."""
    return mmcps(rate_per_s, service_s, servers=1)


def mmcps(rate_per_s: float, service_s: float, servers: int) -> Queue:
    """Return the M/M/c queue under processor sharing: with n present each is served at speed min(1, c / n).

    The number present has the law of M/M/c, first come first served, and so the mean sojourn is the same; its law is not.  It is that
    of the chain a tagged customer sees: finding n others with the stationary law, it ends at rate mu min(1, c / N) with N present.
    By a contour integral; exact for exponential service.  The wait is 0 by definition.  Raises Overload at or above saturation.
    Checked against truth.csv: worst relative error 6e-10 over 24 rows of M/M/1-PS (those that are 0 but for a truncation: absolute).
    """
    check_service(service_s)
    offered = rate_per_s * service_s
    p_all_busy = erlang_c(servers, offered)
    rho, mu = offered / servers, 1 / service_s
    n = np.arange(1.0, servers + tagged.enough(rho) + 1)
    total, own = mu * np.minimum(n, servers), mu * np.minimum(1.0, servers / n)
    found = birth_death(offered, np.minimum(n[:-1], servers))
    mean_s = service_s + p_all_busy / (servers * mu - rate_per_s)

    def transform(s: Complexes) -> Complexes:
        return tagged.transform_of_survival(s, rate_per_s, total, own) @ found

    second_s2 = float(found @ tagged.moments(rate_per_s, total, own)[1])
    sojourn = Contour(transform, p_positive=1.0, mean_s=mean_s, variance_s2=second_s2 - mean_s**2)
    return Queue(utilisation=rho, p_wait=0.0, wait=Zero(), sojourn=sojourn, throughput_per_s=rate_per_s)


def mg1ps_mean_s(rate_per_s: float, service_s: float, work_s: float | None = None) -> float:
    """Return the mean sojourn under processor sharing of one server: service / (1 - rho), whatever the law of service.

    Given `work_s`, that of a customer who brings this much work: work / (1 - rho).  Poisson arrivals.
    Checked against the M/M/1-PS rows of truth.csv (relative error 1e-15) and, for other laws, in the tests by simulation.
    Raises Overload at or above saturation.
    """
    check_service(service_s)
    offered = rate_per_s * service_s
    check_load(1, offered)
    if offered >= 1:
        raise Overload(offered, 1, enough=math.floor(offered) + 1)
    return (service_s if work_s is None else work_s) / (1 - offered)
