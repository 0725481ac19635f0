"""Classes of customers before the same servers, the first class first: what each class waits, with or without preemption.

Notation, for class k: higher classes come at rate l in all, sigma_h is their load per server, sigma that of classes 1 … k,
m = c mu the rate at which a full station completes.  B(s) is the transform of a busy period that one customer starts and higher
classes prolong; to a class below, every service it must sit out is such a busy period.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.queueing.contour import Contour
from mlsys_bench.queueing.laws import Law
from mlsys_bench.queueing.mmc import erlang_c, mmc
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.times import Complexes, Floats, Formula, Time, Transform, invert


def nonpreemptive(rates_per_s: Sequence[float], service_s: float, servers: int) -> tuple[Queue, ...]:
    """Return each class of an M/M/c queue where a free server takes the first class first and nobody is interrupted.

    Every class waits with the same probability, Erlang's C of the whole load.  Then it sits out n + 1 busy periods, n geometric with
    parameter sigma: E e^{-sW} = 1 - C + C (1 - sigma) B / (1 - sigma B), E[W] = C / (m (1 - sigma_h)(1 - sigma)).  The first class's
    delay is exponential.  Holds for one exponential service law for all classes, first come first served within a class.
    Percentiles by inversion on Talbot's contour (contour.py); checked against the truth table (truth.csv): worst relative error 2.7e-10
    over the 30 rows of PRIO M/M/c.
    Source: R. H. Davis, "Waiting-time distribution of a multi-server, priority queuing system", Operations Research 14 (1966) 133-136
    (doi 10.1287/opre.14.1.133; the abstract read: any number of classes and servers, one service rate); derived here as above.
    """
    mu, offered = _check(rates_per_s, service_s, servers)
    p_wait, m = erlang_c(servers, offered), servers / service_s

    def of_class(rate: float, higher: float) -> Queue:
        sigma = (higher + rate) / m
        period = BusyPeriod(higher, m)
        mean_s, variance_s2 = _moments(p_wait, _geometric_sum(sigma, period.mean_s, period.variance_s2))

        def over(s: Complexes) -> Complexes:
            return np.asarray(p_wait * period.over(s) / (1 - sigma * period.lst(s)))

        wait = Contour(over, p_positive=p_wait, mean_s=mean_s, variance_s2=variance_s2)
        both = {"mean_s": mean_s + service_s, "variance_s2": variance_s2 + service_s**2}
        sojourn = Contour(lambda s: (1 + mu * over(s)) / (mu + s), p_positive=1.0, **both)
        return Queue(utilisation=offered / servers, p_wait=p_wait, wait=wait, sojourn=sojourn, throughput_per_s=rate)

    return tuple(of_class(rate, higher) for rate, higher in zip(rates_per_s, _above(rates_per_s), strict=True))


def preemptive(rates_per_s: Sequence[float], service_s: float, servers: int) -> tuple[Queue, ...]:
    """Return each class of an M/M/c queue where an arrival takes a server from the lowest class in service, which is resumed later.

    A class sees only itself and those above: x customers ahead, falling at rate min(x, c) mu, rising at rate l; it is served while
    x < c.  The transform of its sojourn solves a tridiagonal system over x = 0 … c - 1 that busy periods close from above; its wait
    counts all time not in service, interruptions too.  Within a class first come first served, the last come being interrupted first;
    mean sojourns are the same for any such rule.  Holds for one exponential service law; exact, percentiles too, to about 1e-10.
    Checked against the truth table (truth.csv), both rows of PRIO-PR M/M/1, to 1e-14, against M/M/c for the first class, and a dense chain.
    """
    mu, offered = _check(rates_per_s, service_s, servers)

    def of_class(rate: float, higher: float) -> Queue:
        if higher == 0:
            return mmc(rate, service_s, servers)
        ahead = _Ahead(higher, higher + rate, mu, servers)
        wait, sojourn = ahead.wait(), ahead.sojourn()
        return Queue(utilisation=offered / servers, p_wait=wait.p_over(0.0), wait=wait, sojourn=sojourn, throughput_per_s=rate)

    return tuple(of_class(rate, higher) for rate, higher in zip(rates_per_s, _above(rates_per_s), strict=True))


def nonpreemptive_mg1(rates_per_s: Sequence[float], services: Sequence[Law]) -> tuple[Queue, ...]:
    """Return each class of an M/G/1 queue without preemption, every class with a service law of its own.

    Cobham's mean E[W] = (sum lambda E[S^2] / 2) / ((1 - sigma_h)(1 - sigma)).  The law: the work a class must see done is that of an
    M/G/1 queue of classes 1 … k plus, when a lower class is in service, the rest of that service; higher arrivals stretch it,
    s -> w(s) = s + l (1 - B(s)): E e^{-sW} = ((1 - rho) w + l_low (1 - G_low(w))) / (s - lambda + lambda G(w)).
    Means and variances exact; percentiles by Euler inversion, about 1e-7 for smooth laws and up to 3e-3 where a constant service puts
    a kink.  Checked: equal to `nonpreemptive` for exponential services, to Pollaczek and Khinchine for one class, and to simulation.
    """
    rho = _check_mg1(rates_per_s, services)
    return tuple(_waits_its_turn(k, rates_per_s, services, rho) for k in range(len(services)))


def preemptive_mg1(rates_per_s: Sequence[float], services: Sequence[Law]) -> tuple[Queue, ...]:
    """Return each class of an M/G/1 queue with preemptive-resume priority, every class with a service law of its own.

    A class sees the work V of classes 1 … k as if alone, adds its own service, and higher arrivals stretch both:
    E[T] = (E[S] + E[V]) / (1 - sigma_h), E e^{-sT} = V(w) S(w) with w(s) = s + l (1 - B(s)); the wait, all time not in service, has
    V(w) S(w - s).  Means and variances exact; percentiles by Euler inversion, about 1e-7 for smooth laws; up to a few per cent near
    a value that a constant service of a higher class makes likely.
    Checked: equal to `preemptive` for exponential services to 1e-9, and within the noise of a simulation of three different laws.
    """
    rho = _check_mg1(rates_per_s, services)
    return tuple(_interrupts(k, rates_per_s, services, rho) for k in range(len(services)))


class BusyPeriod:
    """The time an M/M/1 queue with arrivals l and services m > l needs to become empty, from one customer on."""

    def __init__(self, arrivals_per_s: float, services_per_s: float) -> None:
        self.l, self.m = arrivals_per_s, services_per_s
        self.mean_s = 1 / (self.m - self.l)
        self.variance_s2 = (self.m + self.l) / (self.m - self.l) ** 3

    def _root(self, s: Complexes) -> Complexes:
        """Return sqrt((m + l + s)^2 - 4 l m), cut along the negative axis only."""
        near, far = (math.sqrt(self.m) - math.sqrt(self.l)) ** 2, (math.sqrt(self.m) + math.sqrt(self.l)) ** 2
        return np.asarray(np.sqrt(s + near) * np.sqrt(s + far))

    def lst(self, s: Complexes) -> Complexes:
        """Return B(s), the root of B (m + l + s - l B) = m that is 1 at 0."""
        return np.asarray(2 * self.m / (self.m + self.l + s + self._root(s)))

    def over(self, s: Complexes) -> Complexes:
        """Return (1 - B(s)) / s, the transform of P(> t), free of cancellation."""
        return np.asarray(2 / (self.m - self.l + s + self._root(s)))


class _Ahead:
    """The customers x ahead of one of class k under preemption: x falls at min(x, c) mu, rises at l; he is served while x < c."""

    def __init__(self, higher_per_s: float, rate_per_s: float, mu: float, servers: int) -> None:
        self.l, self.mu, self.c = higher_per_s, mu, servers
        offered = rate_per_s / mu
        self.sigma, self.p_full = offered / servers, erlang_c(servers, offered)
        self.period = BusyPeriod(higher_per_s, servers * mu)
        x = np.arange(servers, dtype=np.float64)
        logs = np.concatenate([[0.0], np.cumsum(np.log(offered / x[1:]))])
        weights = np.exp(logs - logs.max())
        self.found = (1 - self.p_full) * weights / weights.sum()  # P(x ahead on arrival), x < c

    def _over(self, s: Complexes, clock: float) -> Complexes:
        """Return the transform of P(time > t); the clock runs at `clock` in service, 1 or 0, and always while waiting.

        (l + (x + 1) mu + clock s) u_x = clock + l u_{x+1} + x mu u_{x-1}, and from c up a busy period leads back to c - 1.
        """
        period, full = self.period.lst(s), self.period.over(s)
        own, up = np.empty((self.c, len(s)), dtype=np.complex128), np.empty((self.c, len(s)), dtype=np.complex128)
        before_own, before_up = np.zeros_like(s), np.zeros_like(s)
        for x in range(self.c):  # u_x = own + up u_{x+1}
            pivot = self.l + (x + 1) * self.mu + clock * s - x * self.mu * before_up
            own[x] = before_own = (clock + x * self.mu * before_own) / pivot
            up[x] = before_up = self.l / pivot
        u = last = (own[-1] + up[-1] * full) / (1 - up[-1] * period)
        sum_u = self.found[-1] * u
        for x in range(self.c - 2, -1, -1):
            u = own[x] + up[x] * u
            sum_u = sum_u + self.found[x] * u
        stays = (full + (1 - self.sigma) * period * last) / (1 - self.sigma * period)
        return np.asarray(sum_u + self.p_full * stays)

    def sojourn(self) -> Time:
        """Return the time from arrival to the end of service."""
        mean_s, variance_s2 = self._moments(1.0)
        return Contour(lambda s: self._over(s, 1.0), p_positive=1.0, mean_s=mean_s, variance_s2=variance_s2)

    def wait(self) -> Time:
        """Return the time not in service."""
        fast = np.array([1e12 * self.c * self.mu], dtype=np.complex128)
        p_wait = float((self._over(fast, 0.0) * fast).real[0])
        mean_s, variance_s2 = self._moments(0.0)
        return Contour(lambda s: self._over(s, 0.0), p_positive=p_wait, mean_s=mean_s, variance_s2=variance_s2)

    def _moments(self, clock: float) -> tuple[float, float]:
        """Return mean and variance from the transform of P(T > t) around 0: E[T] = F(0), E[T^2] = -2 F'(0), by Cauchy's formula."""
        circle = np.exp(2j * np.pi * (np.arange(32) + 0.5) / 32)
        reach = self.c * self.mu * (1 - math.sqrt(self.l / (self.c * self.mu))) ** 2  # the cut begins here,
        slow = (1 - self.sigma) * (self.c * self.mu - self.l / self.sigma)  # the pole of the customers found lies here,
        radius = min(reach, slow if slow > 0 else reach, self.mu) / 4  # and own service ends at rate mu
        values = self._over(radius * circle, clock)
        mean = float(values.mean().real)
        return mean, -2 * float((values / circle).mean().real) / radius - mean**2


def _geometric_sum(sigma: float, mean_s: float, variance_s2: float) -> tuple[float, float]:
    """Return mean and second moment of n + 1 independent times, n geometric with P(n >= j) = sigma^j."""
    terms, spread = 1 / (1 - sigma), sigma / (1 - sigma) ** 2
    return terms * mean_s, terms * variance_s2 + (spread + terms**2) * mean_s**2


def _moments(p: float, given: tuple[float, float]) -> tuple[float, float]:
    """Return mean and variance of a time that is 0 but with probability p, then having this mean and second moment."""
    return p * given[0], p * given[1] - (p * given[0]) ** 2


# ------------------------------------------------------------------------------------------------ one server, a law per class


class _Classes:
    """Some classes of an M/G/1 queue taken together: rate, load, and the moments of the work they keep in the system when alone."""

    def __init__(self, rates_per_s: Sequence[float], services: Sequence[Law]) -> None:
        self.parts = tuple(zip(rates_per_s, services, strict=True))
        self.rate = math.fsum(rates_per_s)
        self.load = math.fsum(r * s.mean_s for r, s in self.parts)
        self.square = math.fsum(r * (s.variance_s2 + s.mean_s**2) for r, s in self.parts)  # rate E[S^2]
        self.cube = math.fsum(r * s.third * s.mean_s**3 for r, s in self.parts)  # rate E[S^3]

    def jumps(self, s: Complexes) -> Complexes:
        """Return rate (1 - G(s)), G the transform of the mixed service."""
        return np.asarray(sum((r * (1 - law.lst(s)) for r, law in self.parts), np.zeros_like(s)))

    def work(self) -> tuple[float, float]:
        """Return the first two moments of the work in the system."""
        mean = self.square / (2 * (1 - self.load))
        return mean, 2 * mean**2 + self.cube / (3 * (1 - self.load))

    def stretched(self, s: Complexes) -> Complexes:
        """Return w = s + rate (1 - B(s)), where B(s) = G(w): w = s + rate (1 - G(w)), by Steffensen's steps on the contraction."""
        w = s + self.rate * self.load / (1 + self.load)
        for _ in range(200):
            once = s + self.jumps(w)
            twice = s + self.jumps(once)
            change, bend = once - w, twice - 2 * once + w
            better = np.where(np.abs(bend) > 1e-14 * np.abs(once), w - change**2 / np.where(bend == 0, 1.0, bend), twice)
            w = np.where(better.real >= s.real, better, twice)
            if np.all(np.abs(twice - once) <= 1e-13 * np.abs(once)):
                break
        return np.asarray(w)

    def stretch(self, mean_s: float, second: float) -> tuple[float, float]:
        """Return mean and variance of the time a work with these two moments takes when arrivals of these classes go first."""
        free = 1 - self.load
        return mean_s / free, second / free**2 + mean_s * self.square / free**3 - (mean_s / free) ** 2


def _waits_its_turn(k: int, rates: Sequence[float], services: Sequence[Law], rho: float) -> Queue:
    higher, upto, lower = (
        _Classes(rates[:k], services[:k]),
        _Classes(rates[: k + 1], services[: k + 1]),
        _Classes(rates[k + 1 :], services[k + 1 :]),
    )
    rate, service = rates[k], services[k]
    free, (work, work2) = 1 - upto.load, upto.work()
    rest, rest2 = lower.square / (2 * free), lower.cube / (3 * free)  # of a lower class's service under way
    mean_s, variance_s2 = higher.stretch(work + rest, work2 + 2 * work * rest + rest2)

    def lst(s: Complexes) -> Complexes:
        w = higher.stretched(s)
        return np.asarray(((1 - rho) * w + lower.jumps(w)) / (s - rate * (1 - service.lst(w))))

    def sojourn(t: Floats) -> Floats:  # P(T > t) jumps where the service does, weighted by P(no wait): that part is taken apart
        smooth = invert(lambda s: (1 - lst(s) * service.lst(s) - (1 - rho) * (1 - service.lst(s))) / s, _positive(t, service.mean_s))
        return (1 - rho) * service.survival(t) + np.where(t > 0, smooth, rho)

    wait = _with_atom(Transform(lst, mean_s=mean_s, variance_s2=variance_s2), rho)
    total = Formula(sojourn, mean_s=mean_s + service.mean_s, variance_s2=variance_s2 + service.variance_s2)
    return Queue(utilisation=rho, p_wait=rho, wait=wait, sojourn=total, throughput_per_s=rate)


def _interrupts(k: int, rates: Sequence[float], services: Sequence[Law], rho: float) -> Queue:
    higher, upto = _Classes(rates[:k], services[:k]), _Classes(rates[: k + 1], services[: k + 1])
    service, free, (work, work2) = services[k], 1 - upto.load, upto.work()
    square = service.variance_s2 + service.mean_s**2
    mean_s, variance_s2 = higher.stretch(work + service.mean_s, work2 + 2 * work * service.mean_s + square)
    _, before_s2 = higher.stretch(work, work2)
    pauses_s2 = service.variance_s2 * (higher.load / (1 - higher.load)) ** 2 + service.mean_s * higher.square / (1 - higher.load) ** 3
    p_none = free * float(service.lst(np.array([higher.rate], dtype=np.complex128)).real[0])

    def wait_lst(s: Complexes) -> Complexes:
        w = higher.stretched(s)
        return np.asarray(free * w / (w - upto.jumps(w)) * service.lst(w - s))

    def rest(s: Complexes) -> Complexes:
        w = higher.stretched(s)
        T, u = free * w / (w - upto.jumps(w)) * service.lst(w), s + higher.rate
        return np.asarray((1 - T) / s - free * (1 - service.lst(u)) / u)

    def sojourn(t: Floats) -> Floats:  # its jumps are those of the service, found idle and left alone until then
        smooth = invert(rest, _positive(t, service.mean_s))
        return free * np.exp(-higher.rate * t) * service.survival(t) + np.where(t > 0, smooth, upto.load)

    wait = _with_atom(Transform(wait_lst, mean_s=mean_s - service.mean_s, variance_s2=before_s2 + pauses_s2), 1 - p_none)
    total = Formula(sojourn, mean_s=mean_s, variance_s2=variance_s2)
    return Queue(utilisation=rho, p_wait=1 - p_none, wait=wait, sojourn=total, throughput_per_s=rates[k])


def _with_atom(time: Transform, p_over_0: float) -> Time:
    """Return the time with P(T > 0) as known, not as inverted."""
    return Formula(lambda t: np.where(t > 0, time.survival(t), p_over_0), mean_s=time.mean_s, variance_s2=time.variance_s2)


def _positive(t: Floats, scale_s: float) -> Floats:
    return np.where(t > 0, t, scale_s)


def _above(rates_per_s: Sequence[float]) -> list[float]:
    """Return for each class the rate of all classes above it."""
    return [math.fsum(rates_per_s[:k]) for k in range(len(rates_per_s))]


def _check(rates_per_s: Sequence[float], service_s: float, servers: int) -> tuple[float, float]:
    """Return mu and the offered load."""
    _check_rates(rates_per_s)
    if not (service_s > 0 and math.isfinite(service_s)):
        raise BadInput(f"a service time of {service_s} s is not positive and finite")
    if servers < 1:
        raise BadInput(f"{servers} servers: at least one is needed")
    offered = math.fsum(rates_per_s) * service_s
    if offered >= servers:
        raise Overload(offered / servers, servers, enough=math.floor(offered) + 1)
    return 1 / service_s, offered


def _check_mg1(rates_per_s: Sequence[float], services: Sequence[Law]) -> float:
    """Return the load."""
    _check_rates(rates_per_s)
    if len(rates_per_s) != len(services):
        raise BadInput(f"{len(rates_per_s)} arrival rates but {len(services)} service laws: one of each per class")
    rho = math.fsum(r * s.mean_s for r, s in zip(rates_per_s, services, strict=True))
    if rho >= 1:
        raise Overload(rho, 1, enough=math.floor(rho) + 1)
    return rho


def _check_rates(rates_per_s: Sequence[float]) -> None:
    if not rates_per_s or not all(rate > 0 and math.isfinite(rate) for rate in rates_per_s):
        raise BadInput(f"arrival rates {list(rates_per_s)}: one positive, finite number per class is needed")
