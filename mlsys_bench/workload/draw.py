"""Draw traffic from its laws, seeded (PCG64): arrivals, prompts and outputs have streams of their own."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlsys_bench.errors import BadInput
from mlsys_bench.types import Lengths, Tenant, Workload
from mlsys_bench.workload.arrivals import ArrivalLaw, level_steps, parse_arrivals
from mlsys_bench.workload.laws import cap, checked_rate, lognormal, parts_of, uniform
from mlsys_bench.workload.schedule import Floats, Ints, Labels, Schedule, nominal_s
from mlsys_bench.workload.tenants import ranks

Seed = int | np.random.SeedSequence

MAX_REQUESTS = 50_000_000  # of one schedule: beyond it the arrays alone take gigabytes
_MAX_DOUBLINGS = 40


def arrival_times(rate_per_s: float, arrivals: str, *, n: int | None = None, duration_s: float | None = None, seed: Seed = 0) -> Floats:
    """Return when requests are due, in seconds from the start: so many, or all before `duration_s`.

    A constant law starts at 0; the others with a gap.  One seed gives one process, however much of it is asked for.
    """
    checked_rate(rate_per_s)
    law = parse_arrivals(arrivals)
    if (n is None) == (duration_s is None):
        raise BadInput("arrivals need either a number of requests or a duration")
    if n is not None:
        if not 0 <= n <= MAX_REQUESTS:
            raise BadInput(f"{n:,} requests: between 0 and {MAX_REQUESTS:,} are possible")
        return _times(rate_per_s, law, n, seed)
    assert duration_s is not None
    if not (math.isfinite(duration_s) and duration_s > 0) or rate_per_s * duration_s > MAX_REQUESTS / 2:
        raise BadInput(
            f"a duration of {duration_s:g} s at {rate_per_s:g}/s: it must be above zero and below {MAX_REQUESTS // 2:,} requests"
        )
    return _times_within(rate_per_s, law, duration_s, seed)


def draw_lengths(lengths: Lengths, n: int, rng: np.random.Generator) -> Ints:
    """Return n token counts: drawn from the law, rounded, and cut to [1, max]."""
    if lengths.dist == "uniform" and lengths.cv > 0:
        low, high = uniform(lengths)
        return _whole(lengths, rng.uniform(low, high, n))
    return _by_scores(lengths, np.zeros(n) if lengths.dist in ("constant", "uniform") else rng.standard_normal(n))


def schedule(workload: Workload, *, n: int | None = None, duration_s: float | None = None, seed: int = 0) -> Schedule:
    """Return the requests of a workload: so many, or all before `duration_s`."""
    arrivals, prompts, outputs, whose = np.random.SeedSequence(seed).spawn(4)
    times = arrival_times(workload.rate_per_s, workload.arrivals, n=n, duration_s=duration_s, seed=arrivals)
    if workload.tenants:
        return _of_tenants(workload, times, prompts, outputs, np.random.default_rng(whose))
    prompt, output = _lengths(workload, len(times), np.random.default_rng(prompts), np.random.default_rng(outputs))
    return Schedule(scheduled_s=times, prompt_tokens=prompt, output_tokens=output)


def _of_tenants(
    workload: Workload, times: Floats, prompts: np.random.SeedSequence, outputs: np.random.SeedSequence, whose: np.random.Generator
) -> Schedule:
    """Return the requests at these times, each one tenant's with the probability of its share and the lengths of that tenant."""
    tenants = workload.tenants
    label = np.searchsorted(np.cumsum([t.share for t in tenants])[:-1], whose.random(len(times)), side="right").astype(np.int32)
    prompt, output = np.empty(len(times), dtype=np.int64), np.empty(len(times), dtype=np.int64)
    for i, (tenant, one, other) in enumerate(zip(tenants, prompts.spawn(len(tenants)), outputs.spawn(len(tenants)), strict=True)):
        own = replace(workload, prompt_tokens=tenant.prompt_tokens, output_tokens=tenant.output_tokens)
        rows = np.flatnonzero(label == i)
        prompt[rows], output[rows] = _lengths(own, len(rows), np.random.default_rng(one), np.random.default_rng(other))
    return _labelled(Schedule(scheduled_s=times, prompt_tokens=prompt, output_tokens=output), tenants, label)


def _labelled(plan: Schedule, tenants: tuple[Tenant, ...], label: Labels) -> Schedule:
    """Return the requests as those of their tenants, ranked where these have priorities."""
    order = ranks(tenants)
    rank = None if order is None else np.array(order, dtype=np.int32)[label]
    return replace(plan, tenant=label, tenants=tuple(tenant.name for tenant in tenants), rank=rank)


def resampled(plan: Schedule, workload: Workload, *, n: int | None = None, duration_s: float | None = None, seed: int = 0) -> Schedule:
    """Return new arrivals of the workload, each with the lengths of a request of `plan` chosen at random: their joint law is kept.

    Prefixes and sessions are not: a prefix drawn twice would be a hit that never was.
    """
    arrivals, choice, _ = np.random.SeedSequence(seed).spawn(3)
    times = arrival_times(workload.rate_per_s, workload.arrivals, n=n, duration_s=duration_s, seed=arrivals)
    rows = np.random.default_rng(choice).integers(0, len(plan), len(times))
    return Schedule(scheduled_s=times, prompt_tokens=plan.prompt_tokens[rows], output_tokens=plan.output_tokens[rows])


def typical(workload: Workload, n: int, seed: int = 0) -> Schedule:
    """Return n > 0 requests that are true to their law: in exactly n / rate seconds, with lengths from equal shares of their law.

    A test of n requests then has the load that was asked for.  n requests drawn freely have it give or take 1 / sqrt(n), to which the
    latencies of a busy server are several times as sensitive.  Arrivals are those of the law on the condition that n fall into the
    time (for Poisson: n uniform points); a length is drawn in each of n strata of equal probability, in random order.
    Source: Cochran (1977), Sampling Techniques, ch. 5; Law (2015), Simulation Modeling and Analysis, ch. 11.
    """
    arrivals, scores, order = np.random.SeedSequence(seed).spawn(3)
    times = arrival_times(workload.rate_per_s, workload.arrivals, n=n + 1, seed=arrivals)
    rng, shuffle = np.random.default_rng(scores), np.random.default_rng(order)
    times_s = times[:n] * (n / workload.rate_per_s / times[n])
    if workload.tenants:
        return _typical_of_tenants(workload, times_s, rng, shuffle)
    prompt, output = _by_normals(workload, shuffle.permutation(_strata(n, rng)), shuffle.permutation(_strata(n, rng)))
    return Schedule(scheduled_s=times_s, prompt_tokens=prompt, output_tokens=output)


def _typical_of_tenants(workload: Workload, times_s: Floats, rng: np.random.Generator, shuffle: np.random.Generator) -> Schedule:
    """Return requests at these times of which each tenant has its share, to the nearest whole one, with lengths from strata of its law."""
    tenants, n = workload.tenants, len(times_s)
    counts = np.diff(np.rint(np.cumsum([0.0, *(tenant.share for tenant in tenants)]) * n)).astype(int)
    label = shuffle.permutation(np.repeat(np.arange(len(tenants), dtype=np.int32), counts))
    prompt, output = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    for i, (tenant, m) in enumerate(zip(tenants, counts.tolist(), strict=True)):
        own = replace(workload, prompt_tokens=tenant.prompt_tokens, output_tokens=tenant.output_tokens)
        scores = (shuffle.permutation(_strata(m, rng)) for _ in range(2))
        prompt[label == i], output[label == i] = _by_normals(own, *scores)
    return _labelled(Schedule(scheduled_s=times_s, prompt_tokens=prompt, output_tokens=output), tenants, label)


def _strata(n: int, rng: np.random.Generator) -> Floats:
    """Return one normal score from each of n strata of equal probability, in order."""
    from scipy.special import ndtri

    return np.asarray(ndtri((np.arange(n) + rng.random(n)) / n))


def _lengths(workload: Workload, n: int, prompts: np.random.Generator, outputs: np.random.Generator) -> tuple[Ints, Ints]:
    """Return both lengths of n requests: apart, or through normal scores of the correlation that gives the ranks theirs.

    Pearson's r of normal scores for Spearman's rho of ranks is 2 sin(pi rho / 6).  Source: Kruskal (1958), JASA 53.
    """
    if not workload.length_correlation:
        return draw_lengths(workload.prompt_tokens, n, prompts), draw_lengths(workload.output_tokens, n, outputs)
    return _by_normals(workload, prompts.standard_normal(n), outputs.standard_normal(n))


def _by_normals(workload: Workload, x: Floats, y: Floats) -> tuple[Ints, Ints]:
    """Return both lengths at independent normal scores x and y, the second first given its correlation."""
    rho = workload.length_correlation
    if not -1 <= rho <= 1:
        raise BadInput(f"a correlation of lengths of {rho:g}: it lies between -1 and 1")
    r = 2 * math.sin(math.pi * rho / 6)
    return _by_scores(workload.prompt_tokens, x), _by_scores(workload.output_tokens, r * x + math.sqrt(1 - r**2) * y)


def _by_scores(lengths: Lengths, scores: Floats) -> Ints:
    """Return the lengths at these normal scores of their law."""
    if lengths.dist == "mixture":
        return _of_parts(lengths, scores)
    if lengths.dist == "constant" or lengths.cv == 0:
        return _whole(lengths, np.full(len(scores), lengths.mean))
    if lengths.dist == "normal":
        return _whole(lengths, lengths.mean * (1 + lengths.cv * scores))
    if lengths.dist == "lognormal":
        mu, sigma = lognormal(lengths)
        return _whole(lengths, np.exp(mu + sigma * scores))
    from scipy.special import ndtr

    low, high = uniform(lengths)
    return _whole(lengths, low + (high - low) * ndtr(scores))


def _of_parts(lengths: Lengths, scores: Floats) -> Ints:
    """Return lengths of a mixture: the shares cut (0, 1) into pieces, and where in its piece a score falls is a score of that part."""
    from scipy.special import ndtr, ndtri

    at = ndtr(scores)
    parts = parts_of(lengths)
    edges = np.cumsum([0.0, *(share for share, _ in parts)])
    whose = np.clip(np.searchsorted(edges, at, side="right") - 1, 0, len(parts) - 1)
    drawn = np.empty(len(scores), dtype=np.int64)
    for i, (share, law) in enumerate(parts):
        rows = whose == i
        drawn[rows] = _by_scores(law, ndtri(np.clip((at[rows] - edges[i]) / share, 1e-12, 1 - 1e-12)))
    return drawn


def _whole(lengths: Lengths, drawn: Floats) -> Ints:
    return np.clip(np.rint(drawn), 1, cap(lengths)).astype(np.int64)


def _steady(law: ArrivalLaw, n: int, seed: Seed) -> Floats:
    """Return n points of the law of gaps at a rate of one per second."""
    if law.kind == "constant":
        return np.arange(n, dtype=float)
    rng, shape = np.random.default_rng(seed), 1 / law.cv**2
    gaps = rng.standard_exponential(n) if law.kind == "poisson" else rng.standard_gamma(shape, n) / shape
    return np.cumsum(gaps)


def _times(rate_per_s: float, law: ArrivalLaw, n: int, seed: Seed) -> Floats:
    if law.file is not None:
        return _replayed(rate_per_s, law.file, n)
    points = _steady(law, n, seed)
    if not law.modulations or not n:
        return points / rate_per_s
    until_s = 1.25 * n / rate_per_s
    for _ in range(_MAX_DOUBLINGS):
        edges, elapsed, levels = _clock(rate_per_s, law, until_s, seed)
        if elapsed[-1] >= points[-1]:
            return _on_clock(points, edges, elapsed, levels)
        until_s *= 2
    raise BadInput(f"arrivals bring {elapsed[-1]:,.0f} requests and no more, not {n:,}: the last stage has no traffic")


def _times_within(rate_per_s: float, law: ArrivalLaw, duration_s: float, seed: Seed) -> Floats:
    """Draw ever longer beginnings of the same process until one reaches past the end."""
    n = max(16, int(rate_per_s * duration_s * 1.1))
    if law.modulations and law.file is None:
        edges, elapsed, levels = _clock(rate_per_s, law, duration_s, seed)
        if elapsed[-1] > MAX_REQUESTS / 2:
            raise BadInput(f"{elapsed[-1]:,.0f} requests in {duration_s:g} s: at most {MAX_REQUESTS // 2:,} are possible")
        n = max(16, int(elapsed[-1] * 1.1))
        while (points := _steady(law, n, seed))[-1] < elapsed[-1]:
            n *= 2
        times = _on_clock(points[points <= elapsed[-1]], edges, elapsed, levels)
        return times[times < duration_s]
    while True:
        times = _times(rate_per_s, law, n, seed)
        if times[-1] >= duration_s:
            return times[times < duration_s]
        n *= 2


def _clock(rate_per_s: float, law: ArrivalLaw, until_s: float, seed: Seed) -> tuple[Floats, Floats, Floats]:
    """Return edges, the requests expected by each, and the rate after each but the last."""
    root = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
    edges, levels = level_steps(law.modulations, until_s, root)
    rates = rate_per_s * levels
    return edges, np.concatenate([[0.0], np.cumsum(rates * np.diff(edges))]), rates


def _on_clock(points: Floats, edges: Floats, elapsed: Floats, rates: Floats) -> Floats:
    """Return when so many requests were expected: the inverse of the integrated rate, which never lands where the rate is zero."""
    at = np.maximum(np.searchsorted(elapsed, points, side="left") - 1, 0)
    at += np.argmax(rates > 0) * (points <= 0)  # a metronome's first point, where the first stage is silent
    slope = np.where(rates[at] > 0, rates[at], 1.0)
    return np.asarray(edges[at] + (points - elapsed[at]) / slope)


def _replayed(rate_per_s: float, path: Path, n: int) -> Floats:
    """Return a trace's arrival times at this rate; after the last of them it begins again, one mean gap later."""
    from mlsys_bench.workload.trace import from_trace

    times_s = np.sort(nominal_s(from_trace(path)))
    lasted_s = float(times_s[-1] - times_s[0])
    if not lasted_s > 0:
        raise BadInput(f"{path}: all requests arrive at the same time; a rate needs a trace that lasts")
    times_s = (times_s - times_s[0]) * ((len(times_s) - 1) / lasted_s / rate_per_s)
    rounds = np.arange(-(-n // len(times_s)) if n else 0)
    again_s = rounds * (times_s[-1] + 1 / rate_per_s)
    return np.asarray((again_s[:, None] + times_s[None, :]).ravel()[:n])
