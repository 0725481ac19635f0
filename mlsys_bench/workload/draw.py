"""Draw traffic from its laws, seeded (PCG64): arrivals, prompts and outputs have streams of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlsys_bench.errors import BadInput
from mlsys_bench.types import Lengths, Workload
from mlsys_bench.workload.laws import ArrivalLaw, cap, checked_rate, lognormal, parse_arrivals, uniform

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
MAX_REQUESTS = 50_000_000  # of one schedule: beyond it the arrays alone take gigabytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Requests to come: when each is due, and how many tokens go in and come out."""

    scheduled_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints


def arrival_times(
    rate_per_s: float, arrivals: str, *, n: int | None = None, duration_s: float | None = None, seed: int | np.random.SeedSequence = 0
) -> Floats:
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
    if lengths.dist == "constant" or lengths.cv == 0:
        drawn = np.full(n, lengths.mean)
    elif lengths.dist == "lognormal":
        mu, sigma = lognormal(lengths)
        drawn = np.exp(mu + sigma * rng.standard_normal(n))
    else:
        low, high = uniform(lengths)
        drawn = rng.uniform(low, high, n)
    tokens: Ints = np.clip(np.rint(drawn), 1, cap(lengths)).astype(np.int64)
    return tokens


def schedule(workload: Workload, *, n: int | None = None, duration_s: float | None = None, seed: int = 0) -> Schedule:
    """Return the requests of a workload: so many, or all before `duration_s`."""
    arrivals, prompts, outputs = np.random.SeedSequence(seed).spawn(3)
    times = arrival_times(workload.rate_per_s, workload.arrivals, n=n, duration_s=duration_s, seed=arrivals)
    return Schedule(
        scheduled_s=times,
        prompt_tokens=draw_lengths(workload.prompt_tokens, len(times), np.random.default_rng(prompts)),
        output_tokens=draw_lengths(workload.output_tokens, len(times), np.random.default_rng(outputs)),
    )


def _times(rate_per_s: float, law: ArrivalLaw, n: int, seed: int | np.random.SeedSequence) -> Floats:
    if law.kind == "constant":
        return np.arange(n) / rate_per_s
    rng, shape = np.random.default_rng(seed), 1 / law.cv**2
    gaps = rng.standard_exponential(n) if law.kind == "poisson" else rng.standard_gamma(shape, n) / shape
    return np.cumsum(gaps) / rate_per_s


def _times_within(rate_per_s: float, law: ArrivalLaw, duration_s: float, seed: int | np.random.SeedSequence) -> Floats:
    """Draw ever longer beginnings of the same process until one reaches past the end."""
    n = max(16, int(rate_per_s * duration_s * 1.1))
    while True:
        times = _times(rate_per_s, law, n, seed)
        if times[-1] >= duration_s:
            return times[times < duration_s]
        n *= 2
