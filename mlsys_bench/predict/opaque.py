"""An endpoint nobody can look into: from how its latency rises with the rate, the service time, its spread, and how many it serves at once.

Waiting is not service.  The endpoint is taken to be c servers behind one queue, first come first served: a sojourn is wait + service, and
`queueing.mgc.gigc` gives its law for a mean service time m, its SCV v, and c.  Figures of every load level (mean, median and p90 of
the sojourn) are compared on the log scale, weighed by what their run lets them scatter; v and m are fitted for each c, and how the misfit
grows away from the best of them is the profile likelihood that intervals come from.  A curve without a bend cannot say c: it is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mlsys_bench import stats
from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.latency import service
from mlsys_bench.queueing.laws import Deterministic, Erlang, Exponential, Gamma, Law, Lognormal, balanced, marie
from mlsys_bench.queueing.mgc import gigc
from mlsys_bench.queueing.mmc import erlang_c
from mlsys_bench.types import LatencyProfile, Layout, LoadTest, Provenance, RequestRecord

FIGURES = ("mean", "p50", "p90")  # that are fitted: one run hardly ever sees the excursions that its p99 should be made of
_TRIED = (*range(1, 33), 36, 40, 48, 56, 64, 80, 96, 128, 160, 200)  # servers
_FINALISTS = 3  # of them, by a formula; these are fitted by the exact law
_BATCHES = 25  # of mixed requests: how far their figures scatter says how far those of the whole are off
LEAST_REQUESTS = 10 * _BATCHES  # of a level
_FORM_SD = 0.02  # of log(figure): what c equal servers miss of a real endpoint even without noise
_COMMON_SD = (0.01, 0.06)  # of log m and log v: what is missed at all levels alike; without it 36 known curves were covered 64 times in 100
_SHRUNK = 0.8  # share of the correlations between figures that is believed: so few batches overstate what their differences say
_DROP = 2.706  # of twice the log-likelihood: 90 % interval of one number
_BEND = 9.2  # of the same, by which waiting must explain the curve better than none: 1 in 100 by chance, two numbers
_SCV_RANGE = (0.0025, 25.0)  # of v; below, a service is as good as constant
_SCV_LOG_SD = 3.0  # of what is known of v before anything is measured
_NUDGE = 0.01  # of log m, for slopes
_SEEN_SCV = 0.03  # from a service as good as constant, so far up for a slope
_FAR = 0.3  # on the log scale: the slope has changed
_GAIN = 0.05  # of chi-square: less is not worth a step
_STEPS = 12
_ROUGH_SCVS = (0.01, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0)
_FULL = 0.985  # utilisation from which on a level is called overloaded
_MANY = 24  # servers from which on the grid is coarser: each of its points then takes tenths of seconds
_LOADS = (0.01, 0.1, 0.22, 0.36, 0.5, 0.62, 0.72, 0.8, 0.86, 0.91, 0.95, 0.975, 0.985)
_SCVS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.6, 2.5, 4.0, 7.0, 12.0, 25.0)
_HEAVY_SCVS = (0.3, 0.7, 1.5, 3.0, 6.0, 12.0)
_TAIL_MATTERS = 0.3  # v below which a lognormal law is as good as a gamma law
Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One load level: its rate and, by name, the figures of the sojourn.

    `covariance` is that of their logarithms as if requests were independent; `_weighed` adds what the queue's memory does.
    """

    rate_per_s: float
    arrivals: str
    figures: dict[str, float]
    covariance: tuple[tuple[float, ...], ...]
    requests: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What so many servers make of the curve.  `by_logs`: covariance of log m and log v; `misfit`: chi-square over its scale."""

    servers: int
    mean_s: float
    scv: float
    lognormal: bool
    misfit: float
    by_logs: tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """An endpoint as its latency curve shows it: the best fit, every other that the curve allows, and 90 % intervals."""

    best: Fit
    allowed: tuple[Fit, ...]
    intervals: dict[str, tuple[float, float]]  # service_s, scv, servers
    rates_per_s: tuple[float, float]
    arrivals: str
    residual_log_sd: float


# ---------------------------------------------------------------- the curve


def level(rate_per_s: float, sojourn_s: Sequence[float], arrivals: str = "poisson") -> Level:
    """Return a load level from the sojourns of its requests, in the order they came, and the rate at which they really came."""
    values = np.asarray(sojourn_s, dtype=np.float64)
    if len(values) < LEAST_REQUESTS:
        raise BadInput(f"a load level of {rate_per_s:g}/s has {len(values)} requests; at least {LEAST_REQUESTS} are needed, run it longer")
    mixed = np.random.default_rng(0).permutation(values)
    batches = np.array([[v for _, v in _figures(part, FIGURES)] for part in np.array_split(mixed, _BATCHES)])
    covariance = np.cov(np.log(batches).T) / _BATCHES
    return Level(
        rate_per_s=rate_per_s,
        arrivals=arrivals,
        figures=dict(_figures(values, FIGURES)),
        covariance=tuple(tuple(row) for row in covariance.tolist()),
        requests=len(values),
    )


def level_of(test: LoadTest, requests: Sequence[RequestRecord]) -> Level:
    """Return the load level of an open-loop load test.  Raises BadInput for one that cannot be used."""
    if test.offered_rate_per_s is None:
        raise BadInput(f"{test.target}: a closed loop of users has no rate; give load tests with --qps")
    if test.requests and test.ok < 0.99 * test.requests:
        raise BadInput(f"{test.target}: {test.requests - test.ok} of {test.requests} requests failed at {test.offered_rate_per_s:g}/s")
    ok = sorted((r for r in requests if r.in_window and r.outcome == "ok" and r.done_s is not None), key=lambda r: r.scheduled_s)
    span_s = ok[-1].scheduled_s - ok[0].scheduled_s if len(ok) > 1 else 0.0
    rate = (len(ok) - 1) / span_s if span_s > 0 else test.offered_rate_per_s  # near saturation 1 % of rate is 10 % of wait
    return level(rate, [(r.done_s or 0.0) - r.scheduled_s for r in ok], test.arrivals)


def _figures(values: Array, names: Sequence[str]) -> list[tuple[str, float]]:
    ordered = stats.quantiles(values, [float(n[1:]) / 100 for n in names[1:]])
    return list(zip(names, [float(values.mean()), *ordered], strict=True))


# ---------------------------------------------------------------- the fit


def fit(levels: Sequence[Level]) -> Endpoint:
    """Return the endpoint behind a latency curve.  Raises BadInput for fewer than three rates, or a curve without a bend."""
    levels = sorted(levels, key=lambda at: at.rate_per_s)
    if len({at.rate_per_s for at in levels}) < 3:
        raise BadInput(f"{len(levels)} load level(s): three rates are needed at least, from idle to where latency has clearly risen")
    _demand_bend(levels)
    rough = sorted((_rough(levels, c) for c in _TRIED), key=lambda start: start.misfit)
    levels = _weighed(levels, rough[0])
    starts = [start for start in rough[:_FINALISTS] if math.isfinite(start.misfit)]
    fits = [_polish(levels, start) for start in starts]
    best = min(fits, key=lambda f: f.misfit)
    heavy = _polish(levels, dataclasses.replace(best, lognormal=True)) if best.scv > _TAIL_MATTERS else best
    if heavy.misfit < best.misfit:
        fits, best = [heavy], heavy
    fits += _neighbours(levels, fits, best)
    best = min(fits, key=lambda f: f.misfit)
    scale = max(1.0, best.misfit / max(_count(levels) - 3, 1))
    scaled = [dataclasses.replace(f, misfit=f.misfit / scale, by_logs=_times(f.by_logs, scale)) for f in fits]
    least = best.misfit / scale
    allowed = tuple(f for f in sorted(scaled, key=lambda f: f.misfit) if f.misfit <= least + _DROP)
    return Endpoint(
        best=allowed[0],
        allowed=allowed,
        intervals=_intervals(allowed),
        rates_per_s=(levels[0].rate_per_s, levels[-1].rate_per_s),
        arrivals=levels[0].arrivals,
        residual_log_sd=_residual(levels, allowed[0]),
    )


def predict(
    endpoint: Endpoint, rate_per_s: float, figures: Sequence[str] = (*FIGURES, "p95", "p99")
) -> dict[str, tuple[float, float, float]]:
    """Return figures of the sojourn at a rate, each with its 90 % interval: over every fit the curve allows.

    Raises Overload where not even the best of them can keep up.
    """
    least = endpoint.best.misfit
    middle = _exact(endpoint.best, rate_per_s, endpoint.arrivals, figures)
    if middle is None:
        best = endpoint.best
        raise Overload(rate_per_s * best.mean_s / best.servers, best.servers, enough=math.floor(rate_per_s * best.mean_s) + 1)
    low, high = middle.copy(), middle.copy()
    for f in endpoint.allowed:
        at = _exact(f, rate_per_s, endpoint.arrivals, figures)
        slope = None if at is None else _slope(f, at, lambda near: _exact(near, rate_per_s, endpoint.arrivals, figures))
        if at is None or slope is None:
            high[:] = np.inf  # a fit the curve allows says that the queue never settles
            continue
        spread = np.sqrt(max(_DROP - (f.misfit - least), 0.0) * np.einsum("ij,jk,ik->i", slope, np.asarray(f.by_logs), slope))
        spread = np.hypot(spread, math.sqrt(_DROP) * _FORM_SD)
        low, high = np.minimum(low, at - spread), np.maximum(high, at + spread)
    rows = zip(figures, np.exp(middle), np.exp(low), np.exp(high), strict=True)
    return {name: (float(m), float(lo), float(hi)) for name, m, lo, hi in rows}


def profile(endpoint: Endpoint, *, stage: str, device: str = "unknown") -> LatencyProfile:
    """Return the endpoint as a service profile: `service_s`, `scv` and `servers`, with the covariance over every allowed fit."""
    weights = np.exp([-(f.misfit - endpoint.best.misfit) / 2 for f in endpoint.allowed])
    weights /= weights.sum()
    logs = np.log([[f.mean_s, f.scv, f.servers] for f in endpoint.allowed])
    centre = np.log([endpoint.best.mean_s, endpoint.best.scv, endpoint.best.servers])
    covariance = np.einsum("f,fi,fj->ij", weights, logs - centre, logs - centre)
    covariance[:2, :2] += np.einsum("f,fij->ij", weights, [np.asarray(f.by_logs) for f in endpoint.allowed])
    said = "; ".join(f"{name} {_show(name, low)} to {_show(name, high)}" for name, (low, high) in endpoint.intervals.items())
    return service.check(
        LatencyProfile(
            form="service",
            layout=Layout(model=stage, precision="-", device=device),
            stage=stage,
            terms=("service_s", "scv", "servers"),
            coefficients=(endpoint.best.mean_s, endpoint.best.scv, float(endpoint.best.servers)),
            covariance=tuple(tuple(row) for row in covariance.tolist()),
            constants={"lognormal": float(endpoint.best.lognormal)},
            residual_log_sd=endpoint.residual_log_sd,
            valid={"rate_per_s": endpoint.rates_per_s},
            provenance=Provenance.CALIBRATED,
            note=f"from the latency curve of an endpoint, waiting taken off; 90 % intervals: {said}",
        )
    )


def _show(name: str, value: float) -> str:
    return f"{1e3 * value:.3g} ms" if name == "service_s" else f"{value:.3g}"


# ---------------------------------------------------------------- the model


def _law(mean_s: float, scv: float, lognormal: bool) -> Law:
    """Return a law of service with these moments: few phases where that is possible, since they are fast."""
    if scv < 2 * _SCV_RANGE[0]:
        return Deterministic(mean_s)
    if lognormal:
        return Lognormal(scv, mean_s)
    if scv < 0.5:
        return Gamma(scv, mean_s)
    return balanced(scv, mean_s) if scv >= 1 else marie(scv, mean_s)


def _gaps(arrivals: str, rate_per_s: float) -> Law:
    if arrivals == "constant":
        return Deterministic(1 / rate_per_s)
    if arrivals.startswith("gamma:"):
        return Gamma(float(arrivals.removeprefix("gamma:")) ** 2, 1 / rate_per_s)
    if arrivals != "poisson":
        raise BadInput(f"arrivals are {arrivals!r}; the curve of an endpoint needs poisson, constant or gamma:CV arrivals")
    return Exponential(1 / rate_per_s)


def _exact(f: Fit, rate_per_s: float, arrivals: str, names: Sequence[str]) -> Array | None:
    """Return log of the sojourn's figures, None where the servers cannot keep up."""
    if rate_per_s * f.mean_s >= _FULL * f.servers:
        return None
    unit = _law(1.0, f.scv, f.lognormal)  # in units of the mean service time, as gigc likes it
    return _unit_figures(_gaps(arrivals, rate_per_s * f.mean_s), unit, f.servers, names) + math.log(f.mean_s)


def _unit_figures(gaps: Law, service_law: Law, servers: int, names: Sequence[str]) -> Array:
    queue, _, _ = gigc(gaps, service_law, servers)
    return np.log([queue.sojourn_s if name == "mean" else queue.sojourn.quantile_s(float(name[1:]) / 100) for name in names])


@functools.lru_cache(maxsize=64)
def _surface(servers: int, lognormal: bool, arrivals: str) -> Callable[[float, float], Array]:
    """Return log figures in service times as a function of utilisation and SCV: the exact law on a grid, splines between.

    A fit asks a hundred times; the exact law takes milliseconds to tenths of seconds.  Splines over -log(1 - rho) and log(1 + v), where
    waits are smooth, are within 1.1 % of it (tests).
    """
    from scipy.interpolate import RectBivariateSpline

    loads = _LOADS if servers <= _MANY else _LOADS[::2]
    scvs = _HEAVY_SCVS if lognormal else _SCVS if servers <= _MANY else _SCVS[::2]
    grid = np.array([
        [_unit_figures(_gaps(arrivals, rho * servers), _node(v, lognormal), servers, FIGURES) for v in scvs] for rho in loads
    ])  # fmt: skip
    x, y = -np.log1p(-np.array(loads)), np.log1p(scvs)
    splines = [RectBivariateSpline(x, y, grid[:, :, k], kx=min(3, len(x) - 1), ky=min(3, len(y) - 1)) for k in range(len(FIGURES))]
    low, high = scvs[0], scvs[-1]

    def at(rho: float, scv: float) -> Array:
        v = math.log1p(min(max(scv, low), high))
        return np.array([float(spline.ev(np.array(-math.log1p(-max(rho, loads[0]))), np.array(v))) for spline in splines])

    return at


def _node(scv: float, lognormal: bool) -> Law:
    """Return the law at a node of the grid: few phases, which are exact and fast."""
    if lognormal:
        return Lognormal(scv, 1.0)
    if scv == 0:
        return Deterministic(1.0)
    return Erlang(round(1 / scv), 1.0) if scv <= 0.5 else _law(1.0, scv, False)


def _log_figures(f: Fit, rate_per_s: float, arrivals: str) -> Array | None:
    """Return log of the fitted figures by the surface, None where the servers cannot keep up."""
    rho = rate_per_s * f.mean_s / f.servers
    return None if rho >= _FULL else _surface(f.servers, f.lognormal, arrivals)(rho, f.scv) + math.log(f.mean_s)


def _slope(f: Fit, at: Array, figures: Callable[[Fit], Array | None]) -> Array | None:
    """Return the derivatives of log figures, which are `at`, by log m and log v: towards less load and towards the middle of v's range."""
    faster = figures(dataclasses.replace(f, mean_s=f.mean_s * math.exp(-_NUDGE)))
    nudge = -4 * _NUDGE if f.scv >= 1 else max(4 * _NUDGE, math.log(_SEEN_SCV / f.scv))
    other = figures(dataclasses.replace(f, scv=f.scv * math.exp(nudge)))
    if faster is None or other is None:
        return None
    return np.column_stack([(at - faster) / _NUDGE, (other - at) / nudge])


def _polish(levels: Sequence[Level], start: Fit) -> Fit:
    """Return the best mean and SCV for so many servers: Gauss and Newton, the slope taken anew only after a long way."""
    top_s = 0.97 * start.servers / max(at.rate_per_s for at in levels)
    now = dataclasses.replace(start, mean_s=min(start.mean_s, top_s), scv=_scv(start.scv))
    off, slopes, way = _misses(levels, now), None, math.inf
    now = dataclasses.replace(now, misfit=_chi2(levels, off))
    for _ in range(_STEPS):
        if off is None:
            break
        if slopes is None or way > _FAR:
            slopes, way = _slopes(levels, now, off), 0.0
        step = np.clip(np.linalg.solve(_information(levels, slopes), _gradient(levels, slopes, off)), -0.7, 0.7)
        ahead = dataclasses.replace(now, mean_s=now.mean_s * math.exp(step[0]), scv=_scv(now.scv * math.exp(step[1])))
        ahead_off = _misses(levels, ahead)
        ahead = dataclasses.replace(ahead, misfit=_chi2(levels, ahead_off))
        if ahead.misfit > now.misfit - _GAIN:
            if way == 0.0:
                break
            way = math.inf  # an old slope led astray
            continue
        now, off, way = ahead, ahead_off, way + float(np.abs(step).max())
    if off is None or slopes is None:
        return now
    covariance = np.linalg.inv(_information(levels, slopes)) + np.diag(np.square(_COMMON_SD))
    return dataclasses.replace(now, by_logs=tuple(tuple(row) for row in covariance.tolist()))


def _misses(levels: Sequence[Level], f: Fit) -> list[Array] | None:
    """Return log(measured / predicted) of every level's figures, None where the servers cannot keep up with one."""
    found = []
    for at in levels:
        predicted = _log_figures(f, at.rate_per_s, at.arrivals)
        if predicted is None:
            return None
        found.append(np.log(list(at.figures.values())) - predicted)
    return found


def _slopes(levels: Sequence[Level], f: Fit, off: Sequence[Array]) -> list[Array]:
    found = []
    for at, miss in zip(levels, off, strict=True):
        here = np.log(list(at.figures.values())) - miss
        slope = _slope(f, here, lambda near, at=at: _log_figures(near, at.rate_per_s, at.arrivals))  # type: ignore[misc]
        found.append(np.zeros((len(here), 2)) if slope is None else slope)
    return found


def _information(levels: Sequence[Level], slopes: Sequence[Array]) -> Array:
    """Return the inverse covariance of log m and log v; a weak prior on v, of which a constant service says little."""
    return np.asarray(sum(s.T @ _weight(at) @ s for at, s in zip(levels, slopes, strict=True)) + np.diag([0.0, _SCV_LOG_SD**-2]))


def _gradient(levels: Sequence[Level], slopes: Sequence[Array], off: Sequence[Array]) -> Array:
    return np.asarray(sum(s.T @ _weight(at) @ miss for at, s, miss in zip(levels, slopes, off, strict=True)))


def _chi2(levels: Sequence[Level], off: Sequence[Array] | None) -> float:
    if off is None:
        return math.inf
    return sum(float(miss @ _weight(at) @ miss) for at, miss in zip(levels, off, strict=True))


def _weight(at: Level) -> Array:
    """Return the inverse covariance of a level's log figures; a little more on the diagonal for what the form misses."""
    covariance = _SHRUNK * np.asarray(at.covariance)
    np.fill_diagonal(covariance, np.diag(covariance) / _SHRUNK + _FORM_SD**2)
    return np.asarray(np.linalg.inv(covariance))


# ---------------------------------------------------------------- where to begin


def _demand_bend(levels: Sequence[Level]) -> None:
    """Raise BadInput where figures that do not depend on the rate explain the curve as well as a queue could."""
    names = [name for name in FIGURES if all(name in at.figures for at in levels)]
    rows = np.log([[at.figures[name] for name in names] for at in levels])
    weights = [_weight(at)[: len(names), : len(names)] for at in levels]
    flat = np.linalg.solve(np.sum(weights, axis=0), np.sum([w @ row for w, row in zip(weights, rows, strict=True)], axis=0))
    chi2 = sum(float((row - flat) @ w @ (row - flat)) for w, row in zip(weights, rows, strict=True))
    rising = rows[-1][0] > rows[0][0]
    if chi2 < _BEND + (len(levels) - 1) * len(names) or not rising:
        low, high = levels[0], levels[-1]
        raise BadInput(
            f"the latency curve has no bend: {1e3 * low.figures['mean']:.3g} ms at {low.rate_per_s:g}/s, "
            f"{1e3 * high.figures['mean']:.3g} ms at {high.rate_per_s:g}/s; load the endpoint until latency clearly rises"
        )


def _weighed(levels: Sequence[Level], rough: Fit) -> list[Level]:
    """Return the levels with the covariance their queues give them, and without the bias of a logarithm of so uncertain a mean.

    One run's waits are all too long or all too short together, by `_wait_log_sd` of them; a figure moves by its share of waiting.  That
    spread comes from the model: from the run itself, a run whose waits happen to be short would also seem the more certain.
    """
    found = []
    for at in levels:
        sd = float(_wait_log_sd(at, rough.servers, np.array(at.rate_per_s * rough.mean_s), rough.scv))
        share = np.array([max(0.0, 1 - levels[0].figures[name] / value) for name, value in at.figures.items()])
        figures = {name: value * math.exp(w * sd**2 / 2) for (name, value), w in zip(at.figures.items(), share, strict=True)}
        covariance = np.asarray(at.covariance) + sd**2 * np.outer(share, share)
        found.append(dataclasses.replace(at, figures=figures, covariance=tuple(tuple(row) for row in covariance.tolist())))
    return found


def _wait_log_sd(at: Level, servers: int, offered: Array, scv: Array | float) -> Array:
    """Return how far the mean wait of one run may be off, on the log scale: 2 U (2 / P(wait) - 1) / n, U = rho^2 (a + v) / (1 - rho)^2.

    The asymptotic variance of reflected Brownian motion (time unit U in requests) over its mean squared is 2; M/M/1 has it for rho -> 1.
    The factor of P(wait) is the relative variance of a wait that is zero for all others.
    """
    rho = np.minimum(offered / servers, 0.98)
    memory = rho**2 * (_gaps(at.arrivals, at.rate_per_s).scv + scv) / (1 - rho) ** 2
    p_wait = np.maximum(_p_wait(servers, rho * servers), 1e-3)
    return np.asarray(np.minimum(np.sqrt((1 + 2 * memory) * (2 / p_wait - 1) / at.requests), 1.0))


def _p_wait(servers: int, offered: Array) -> Array:
    """Return Erlang's C of every load of an array."""
    return np.array([erlang_c(servers, float(a)) for a in np.ravel(offered)]).reshape(np.shape(offered))


def _rough(levels: Sequence[Level], servers: int) -> Fit:
    """Return where to begin: the best of a grid by means alone, E[T] = m + (v + a) / 2 W(M/M/c), a the SCV of gaps (Allen and Cunneen)."""
    means = np.array([at.figures["mean"] for at in levels])
    tried_s = np.unique(np.minimum(means[0] * np.linspace(0.4, 1.05, 40), 0.97 * servers / levels[-1].rate_per_s))[:, None]  # [m, 1]
    scv = np.array(_ROUGH_SCVS)[None, :]  # [1, v]
    score = np.zeros((len(tried_s), scv.size))
    for at, mean in zip(levels, means, strict=True):
        offered = at.rate_per_s * tried_s
        wait = (scv + _gaps(at.arrivals, at.rate_per_s).scv) / 2 * tried_s * _p_wait(servers, offered) / (servers - offered)
        spread = _wait_log_sd(at, servers, offered, scv) * wait / (tried_s + wait)
        sd = np.hypot(spread, 3 * _FORM_SD)
        score += ((math.log(mean) + spread**2 / 2 - np.log(tried_s + wait)) / sd) ** 2 + 2 * np.log(sd)
    m, v = np.unravel_index(np.argmin(score), score.shape)
    return Fit(servers=servers, mean_s=float(tried_s[m, 0]), scv=float(scv[0, v]), lognormal=False, misfit=float(score[m, v]), by_logs=())


def _neighbours(levels: Sequence[Level], fits: Sequence[Fit], best: Fit) -> list[Fit]:
    """Return fits for the server counts beside the allowed ones, until the curve forbids the next."""
    scale = max(1.0, best.misfit / max(_count(levels) - 3, 1))
    known = {f.servers: f for f in fits}
    found: list[Fit] = []
    for step in (-1, 1):
        at = known[best.servers]
        while at.misfit <= best.misfit + _DROP * scale:
            place = _TRIED.index(at.servers) + step
            if not 0 <= place < len(_TRIED):
                break
            count = _TRIED[place]
            if count not in known:
                known[count] = _polish(levels, dataclasses.replace(at, servers=count))
                found.append(known[count])
            at = known[count]
    return found


def _scv(value: float) -> float:
    return min(max(value, _SCV_RANGE[0]), _SCV_RANGE[1])


def _count(levels: Sequence[Level]) -> int:
    return sum(len(at.figures) for at in levels)


def _times(matrix: Sequence[Sequence[float]], scale: float) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(v * scale for v in row) for row in matrix)


def _residual(levels: Sequence[Level], f: Fit) -> float:
    off = _misses(levels, f)
    return float(np.sqrt(np.mean(np.concatenate(off) ** 2))) if off else 0.0


def _intervals(allowed: Sequence[Fit]) -> dict[str, tuple[float, float]]:
    """Return the range of each number over every fit the curve allows, each as far as its own misfit lets it go."""
    least = allowed[0].misfit
    ends: dict[str, list[float]] = {"service_s": [], "scv": []}
    for f in allowed:
        room = math.sqrt(max(_DROP - (f.misfit - least), 0.0))
        for i, (name, value) in enumerate((("service_s", f.mean_s), ("scv", f.scv))):
            sd = math.sqrt(f.by_logs[i][i])
            ends[name] += [value * math.exp(-room * sd), value * math.exp(room * sd)]
    counts = [f.servers for f in allowed]
    found = {name: (min(values), max(values)) for name, values in ends.items()}
    if found["scv"][0] <= 4 * _SCV_RANGE[0]:  # as good as constant
        found["scv"] = (0.0, found["scv"][1])
    return found | {"servers": (float(min(counts)), float(max(counts)))}
