"""Waiting: workers, shards, percentiles, batches that wait to fill."""

from __future__ import annotations

from mlsys_bench import queueing
from mlsys_bench.claims import Claim
from mlsys_bench.queueing import Batches, ForkJoin, Law, Station, parse_law
from mlsys_bench.types import Provenance

SERVICE_S = 0.1
FORMULA = 0.03  # relative error that is good enough here: the same answer on every machine, whatever its speed
LENGTHS = (("constant", "det"), ("uniform", "unif"), ("exponential", "exp"), ("lognormal, cv 2", "logn:4"))


def _ten_workers() -> Claim:
    """Find the rate that ten workers carry under a limit; 10/s is what one does when it is never idle."""
    one, pooled = (highest_rate(servers, 0.5) for servers in (1, 10))
    tight = highest_rate(10, 0.35)
    return Claim(
        key="10-workers-100-qps",
        topic="queueing",
        claim="One worker does 10 QPS, so ten do 100",
        quoted="100/s",
        recomputed=f"{pooled:.0f}/s with one queue, {10 * one:.0f}/s with ten, for a p95 of 500 ms; {tight:.0f}/s for 350 ms",
        value=pooled,
        unit="1/s",
        low=10 * one,
        high=pooled,
        verdict="wrong",
        because="100/s is saturation: the queue never ends; what ten carry depends on the limit and on who shares a queue",
        formula="M/M/c, 100 ms of work: the highest rate whose p95 of wait + service keeps the limit",
        provenance=Provenance.ASSUMED,
    )


def _eighty_percent() -> Claim:
    """Compare the wait before one server and before sixteen at 80 % of capacity."""
    one, many = (_mmc(0.8 * servers / SERVICE_S, servers).wait_s / SERVICE_S for servers in (1, 16))
    return Claim(
        key="80-percent",
        topic="queueing",
        claim="80 % utilisation is a safe target",
        quoted="80 %",
        recomputed=f"mean wait {one:.1f}x the work with one server, {many:.2f}x with sixteen",
        value=one,
        unit="x",
        low=many,
        high=one,
        verdict="holds only if",
        because="many servers share one queue: the wait at a given load falls with their number",
        formula="M/M/c: Erlang C / (c (1 - load))",
        provenance=Provenance.ASSUMED,
    )


def _shards() -> Claim:
    """Wait for the slowest of 20 shards."""
    single, needed95, needed99 = 0.5 ** (1 / 20), 0.95 ** (1 / 20), 0.99 ** (1 / 20)
    system = ForkJoin(arrivals=parse_law("exp", 0.2), service=parse_law("exp", SERVICE_S), branches=20)
    together = queueing.solve(system, tolerance=FORMULA)
    alone_s = _mmc(5.0, 1).sojourn.quantile_s(0.95)
    low, worse, high = (
        s / alone_s for s in (together.interval_s(0.95)[0], together.queue.sojourn.quantile_s(0.95), together.interval_s(0.95)[1])
    )
    return Claim(
        key="20-shards",
        topic="queueing",
        claim="20 shards with a p95 of 100 ms answer with a p95 of 100 ms",
        quoted="1x",
        recomputed=f"{worse:.2f}x ({low:.2f} to {high:.2f}) at half load; the median is a shard's p{100 * single:.1f}",
        value=worse,
        unit="x",
        low=low,
        high=high,
        verdict="wrong",
        because=f"the slowest of 20 decides: a p95 takes each shard's p{100 * needed95:.2f}, a p99 its p{100 * needed99:.2f}",
        formula="P(all <= t) = F(t)^20; fork-join of 20 M/M/1 queues at half load",
        provenance=Provenance.ASSUMED,
    )


def _added_percentiles() -> Claim:
    """Add three equal exponential stages: their sum is an Erlang law."""
    each, whole = parse_law("exp", SERVICE_S).quantile_s(0.95), parse_law("erl:3", 3 * SERVICE_S).quantile_s(0.95)
    return Claim(
        key="p95s-add",
        topic="queueing",
        claim="Three stages with a p95 of 300 ms each have a p95 of 900 ms together",
        quoted=f"{3000 * each:.0f} ms",
        recomputed=f"{1000 * whole:.0f} ms",
        value=1000 * whole,
        unit="ms",
        low=1000 * whole,
        high=3000 * each,
        verdict="wrong",
        because="means add, percentiles do not: a request that is slow everywhere is rare, unless the same thing slows all stages",
        formula="p95 of Erlang(3) against 3 x p95 of an exponential law",
        provenance=Provenance.ASSUMED,
    )


def _continuous_batching() -> Claim:
    """Compare the longest answer, which a static batch waits for, with the average one, after which a place is given away."""
    gains = {name: mean_of_max(parse_law(law), 8) for name, law in LENGTHS}
    text = ", ".join(f"{name} {gain:.1f}x" for name, gain in gains.items())
    wide = mean_of_max(parse_law("exp"), 64)
    return Claim(
        key="continuous-batching",
        topic="queueing",
        claim="Continuous batching gives 2 to 5 times the throughput of static batching",
        quoted="2-5x",
        recomputed=f"batch of 8: {text}; batch of 64, exponential {wide:.1f}x",
        value=gains["exponential"],
        unit="x",
        low=gains["constant"],
        high=max(wide, *gains.values()),
        verdict="holds only if",
        because="answers differ in length; answers all alike gain nothing",
        formula="E[longest of B] / E[length]",
        provenance=Provenance.ASSUMED,
    )


def _wait_to_batch() -> Claim:
    """Let a server that takes up to 16 at once, in 5 ms and 0.5 ms each, wait up to 20 ms for company, or not at all."""
    added = {rate: _batched(rate, 0.02) - _batched(rate, 0.0) for rate in (5.0, 1000.0)}
    return Claim(
        key="wait-10-20ms",
        topic="queueing",
        claim="Waiting 10 to 20 ms to fill a batch is a good trade",
        quoted="<20 ms",
        recomputed=f"waiting 20 ms makes the mean {1000 * added[5.0]:+.1f} ms at 5/s, {1000 * added[1000.0]:+.1f} ms at 1,000/s",
        value=1000 * added[1000.0],
        unit="ms",
        low=1000 * min(added.values()),
        high=1000 * max(added.values()),
        verdict="wrong",
        because="a busy server finds its next batch waiting without that; the wait spares machine time, and costs latency at every load",
        formula="batch queue, 5 ms + 0.5 ms a request, at most 16: mean with the wait less mean without",
        provenance=Provenance.ASSUMED,
    )


def _rate_limit() -> Claim:
    """Empty a bucket that holds a minute's worth at once, and take what drips in until the minute ends."""
    capacity, per_minute = 60, 60
    most = capacity + per_minute
    return Claim(
        key="60-per-minute",
        topic="queueing",
        claim="A limit of 60 requests a minute lets at most 60 through in a minute",
        quoted="60",
        recomputed=f"up to {most} with a bucket of {capacity}, {1 + per_minute} with a bucket of 1",
        value=float(most),
        unit="requests",
        low=float(1 + per_minute),
        high=float(most),
        verdict="wrong",
        because="a token bucket starts full: the burst it allows comes on top of the rate",
        formula="capacity + rate x time",
        provenance=Provenance.ASSUMED,
    )


# ---------------------------------------------------------------- arithmetic


def highest_rate(servers: int, limit_s: float, p: float = 0.95) -> float:
    """Return the highest rate per second at which the p-quantile of wait + service keeps a limit: M/M/c with 100 ms of work."""
    low, high = 0.0, servers / SERVICE_S
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _mmc(middle, servers).sojourn.quantile_s(p) <= limit_s else (low, middle)
    return low


def mean_of_max(law: Law, n: int) -> float:
    """Return E[max of n] / E[X] of a law: the integral of its quantile against n u^(n - 1) du.

    With u = 1 - e^-y the integrand is smooth up to the tail, and the midpoint rule does.
    """
    import numpy as np

    width = 36.0 / 40_000
    y = (np.arange(40_000) + 0.5) * width
    u = -np.expm1(-y)
    return float((law.quantiles(u) * n * u ** (n - 1) * np.exp(-y)).sum() * width) / law.mean_s


def _mmc(rate_per_s: float, servers: int) -> queueing.Queue:
    station = Station(arrivals=parse_law("exp", 1 / rate_per_s), service=parse_law("exp", SERVICE_S), servers=servers)
    return queueing.solve(station).queue


def _batched(rate_per_s: float, max_wait_s: float) -> float:
    system = Batches(arrivals=parse_law("exp", 1 / rate_per_s), fixed_s=0.005, per_request_s=0.0005, max_batch=16, max_wait_s=max_wait_s)
    return queueing.solve(system, tolerance=FORMULA, budget_s=60.0).queue.sojourn_s


CLAIMS = {
    "10-workers-100-qps": _ten_workers,
    "80-percent": _eighty_percent,
    "20-shards": _shards,
    "p95s-add": _added_percentiles,
    "continuous-batching": _continuous_batching,
    "wait-10-20ms": _wait_to_batch,
    "60-per-minute": _rate_limit,
}
