"""Mean and variance of the lengths that are really drawn: after rounding and cutting."""

from __future__ import annotations

import functools
import math

import numpy as np

from mlsys_bench.types import Lengths
from mlsys_bench.workload.laws import cap, lognormal, parts_of, uniform
from mlsys_bench.workload.schedule import Floats


def mean_tokens(lengths: Lengths) -> float:
    """Return the mean of what `draw_lengths` draws, after rounding and cutting."""
    return _moments(lengths)[0]


def scv(lengths: Lengths) -> float:
    """Return variance / mean**2 of what `draw_lengths` draws, after rounding and cutting."""
    mean, second = _moments(lengths)
    return max(0.0, second / mean**2 - 1)


@functools.lru_cache(maxsize=256)
def _moments(lengths: Lengths) -> tuple[float, float]:
    """Return E[N] and E[N**2] exactly: E[N] = 1 + sum P(N > k), E[N**2] = 1 + sum (2k+1) P(N > k), over k >= 1.

    Beyond 65,536 tokens rounding no longer matters and the sum becomes the integral of a lognormal tail, which has a closed form.
    """
    if lengths.dist == "mixture":
        of_parts = [(share, _moments(law)) for share, law in parts_of(lengths)]
        return sum(share * mean for share, (mean, _) in of_parts), sum(share * second for share, (_, second) in of_parts)
    if lengths.dist == "constant" or lengths.cv == 0:
        value = min(max(float(np.rint(lengths.mean)), 1.0), cap(lengths))
        return value, value**2
    last = min(cap(lengths), 2.0**16 if lengths.dist == "lognormal" else math.ceil(_highest(lengths)) + 1)
    k = np.arange(1, int(last), dtype=np.float64)
    above = _survival(lengths, k + 0.5)
    first, second = 1 + float(above.sum()), 1 + float(((2 * k + 1) * above).sum())
    if lengths.dist == "lognormal" and cap(lengths) > last:
        more_first, more_second = _lognormal_tail(lengths, last)
        return first + more_first, second + more_second
    return first, second


def _highest(lengths: Lengths) -> float:
    """Return what a uniform law stays below, and a normal one but for 1e-15 of its draws."""
    return uniform(lengths)[1] if lengths.dist == "uniform" else lengths.mean * (1 + 8 * lengths.cv)


def _survival(lengths: Lengths, x: Floats) -> Floats:
    if lengths.dist == "uniform":
        low, high = uniform(lengths)
        return np.clip((high - x) / (high - low), 0, 1)
    from scipy.special import ndtr

    if lengths.dist == "normal":
        return np.asarray(ndtr((lengths.mean - x) / (lengths.cv * lengths.mean)), dtype=float)
    mu, sigma = lognormal(lengths)
    return np.asarray(ndtr((mu - np.log(x)) / sigma), dtype=float)


def _lognormal_tail(lengths: Lengths, start: float) -> tuple[float, float]:
    """Return the integrals of P(X > x) and 2x P(X > x) from `start` to the cap: differences of E[min(X, x)**p] in x."""
    end = cap(lengths)
    return tuple(_capped_moment(lengths, p, end) - _capped_moment(lengths, p, start) for p in (1, 2))  # type: ignore[return-value]


def _capped_moment(lengths: Lengths, power: int, limit: float) -> float:
    """Return E[min(X, limit)**power] of the lognormal law."""
    mu, sigma = lognormal(lengths)
    whole = math.exp(power * mu + (power * sigma) ** 2 / 2)
    if math.isinf(limit):
        return whole
    z = (math.log(limit) - mu) / sigma
    return whole * _phi(z - power * sigma) + limit**power * _phi(-z)


def _phi(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))
