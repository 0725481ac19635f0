"""The chain behind dynamic batching: how many wait when a batch starts.

Notation: a batch of b takes tau_b times the noise; B = the most a batch holds; G >= 1 = requests waiting when a batch starts.
After a full batch that left some behind the next starts at once, with G - B + (arrivals meanwhile).  After any other batch the
next starts when the oldest has waited max_wait, or B wait, and not before the server is free.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from mlsys_bench.queueing.laws import Law
from mlsys_bench.queueing.times import Complexes, Floats


def waiting_at_starts(rate: float, taus: Floats, noise: Law | None, max_wait_s: float, *, limited: bool) -> tuple[Floats, float]:
    """Return P(G = 1), P(G = 2), … and the probability that a batch ends with nobody waiting.

    Not `limited`: B is a size that batches without a limit all but never reach, and what is above it is put on it.

    Up to B the chain is solved as it is, seen only while G <= B.  Above, G is a walk with steps A - B, A the arrivals during a full
    batch; it comes down by ladder steps, 1 … B high with probabilities d, from B + j to land on B … 1.  Nothing is cut but tails
    below 1e-15.
    """
    B = len(taus)
    arrivals = _arrivals(rate * taus, noise, limited=limited)
    if not limited:
        law = _stationary(_gathered(rate, taus, arrivals[:, : B + 1], max_wait_s))
        return np.asarray(law), float(law @ arrivals[:, 0])
    down, climb = _factors(rate, taus, noise)
    above = arrivals[:, B + 1 :]  # row b - 1: P(B + j arrivals during a batch of b), j = 1 …
    law = _stationary(_gathered(rate, taus, arrivals, max_wait_s) + (above @ _landing(down, above.shape[1]))[:, ::-1])
    whole = np.concatenate([law, _visits(law @ above, down, climb)])
    return whole / whole.sum(), float(law @ arrivals[:, 0]) / float(whole.sum())


def poisson(n: npt.NDArray[np.int64], means: Floats) -> Floats:
    """Return P(n) of Poisson laws; a mean of 0 puts all on 0."""
    from scipy.special import gammaln, xlogy

    return np.asarray(np.exp(xlogy(n, means) - means - gammaln(n + 1.0)))


def poisson_table(means: Floats, count: int) -> Floats:
    """Return P(0), …, P(count - 1) of Poisson laws, one row per mean; by running products, five times as fast as exponentials."""
    if means.size == 0 or float(means.max()) > 600:  # where e^mean is near the largest number
        return poisson(np.arange(count), means[:, None])
    ratios: Floats = np.exp(-means)[:, None] * np.ones(count)
    ratios[:, 1:] = means[:, None] / np.arange(1, count)
    return np.asarray(np.cumprod(ratios, axis=1), dtype=np.float64)


def convolve(a: Floats, b: Floats) -> Floats:
    """Return the convolution along the last axis, by Fourier transform."""
    n = a.shape[-1] + b.shape[-1] - 1
    size = 1 << (n - 1).bit_length()
    return np.asarray(np.fft.irfft(np.fft.rfft(a, size) * np.fft.rfft(b, size), size)[..., :n])


def _arrivals(means: Floats, noise: Law | None, *, limited: bool) -> Floats:
    """Return P(n arrivals) for Poisson numbers with these means times the noise: [len(means), enough n to hold all but 1e-15]."""
    B, top = len(means), float(means[-1])
    if noise is None:
        return poisson_table(means, max(B, int(top + 12 * math.sqrt(top))) + 60)
    size = 1 << min(math.ceil(math.log2(4 * B + (30 * (top + 1) * max(1.0, noise.scv) if limited else 0))), 14)
    z = np.exp(-2j * np.pi * np.arange(size // 2 + 1) / size)
    transforms = noise.lst((means[:, None] * (1 - z)).ravel()).reshape(B, -1)
    return np.asarray(np.maximum(np.fft.irfft(transforms, size, axis=1), 0.0))


def _gathered(rate: float, taus: Floats, arrivals: Floats, max_wait_s: float) -> Floats:
    """Return P(the next batch starts with g, from one of b that left nobody): [B, B], g = 1 … B.

    Let s = max(tau_b - max_wait, 0).  With an arrival before s the next batch starts when the server is free, with all who came
    by then.  Otherwise, below B, it starts max_wait after the first arrival, with 1 + Poisson(rate max_wait); B takes the rest.
    """
    B = len(taus)
    n = np.arange(1, B)
    inside = np.zeros((B, B))
    if max_wait_s == 0:
        inside[:, : B - 1] = arrivals[:, 1:B]
        inside[:, 0] += arrivals[:, 0]
    else:
        held = np.minimum(taus, max_wait_s)
        late = np.exp(-rate * (taus - held))[:, None]
        inside[:, : B - 1] = arrivals[:, 1:B] + late * (poisson(n - 1, np.array(rate * max_wait_s)) - poisson(n, rate * held[:, None]))
    inside[:, B - 1] = 0.0
    inside[:, B - 1] = np.maximum(1 - inside.sum(axis=1) - arrivals[:, B + 1 :].sum(axis=1), 0.0)
    return inside


def _factors(rate: float, taus: Floats, noise: Law | None) -> tuple[Floats, Floats]:
    """Return the descending ladder law d [B] and the expected visits to heights 0, 1, … of the walk between ladder epochs.

    1 - phi(z), phi the transform of a step A - B, is D(1/z) V(z) with D = 1 - sum d_k z^-k; logarithms split into negative and
    other powers.  The root at z = 1 belongs to D and is taken out first.
    """
    B, top = len(taus), rate * float(taus[-1])
    spread = top + (noise.variance_s2 * top**2 if noise is not None else 0.0)
    decay = min(2 * (B - top) / spread, 1.0)  # of the walk's highest point, nearly
    size = 1 << min(math.ceil(math.log2(64 * math.sqrt(B) + 8 * B + 256 + 80 / decay)), 20)
    theta = 2 * np.pi * (np.arange(size) + 0.5) / size  # half a step off the root
    ahead, back = np.expm1(1j * theta), np.expm1(-1j * theta)
    turn = 1j * B * theta
    steps = -np.expm1(top * ahead - turn) if noise is None else 1 - _mirrored(noise.lst(-top * ahead[: size // 2])) * np.exp(-turn)
    rest = steps / -back
    logs = np.log(np.abs(rest)) + 1j * np.unwrap(np.angle(rest))
    coefficients = (np.fft.fft(logs) * np.exp(-1j * np.pi * np.arange(size) / size) / size).real
    series = _exponential(-coefficients[: -B - 1 : -1])  # half a step round the circle turns the sign of the wrapped ones
    down = np.maximum(series[:-1] - series[1:], 0.0)  # D = (1 - w) times the series
    rises = np.zeros(2 * size)
    rises[: size // 2] = -coefficients[: size // 2]
    climb = np.fft.irfft(np.exp(np.fft.rfft(rises)), 2 * size)[: size // 2]
    return down, np.maximum(climb, 0.0)


def _mirrored(half: Complexes) -> Complexes:
    """Return values on the whole circle from those on its upper half."""
    return np.concatenate([half, half[::-1].conj()])


def _exponential(logs: Floats) -> Floats:
    """Return the coefficients 0 … n of exp(sum_k logs[k - 1] w^k)."""
    n = len(logs)
    weighted = (np.arange(1, n + 1) * logs)[::-1]
    series = np.zeros(n + 1)
    series[0] = 1.0
    for m in range(1, n + 1):
        series[m] = float(weighted[n - m :] @ series[:m]) / m
    return series


def _landing(down: Floats, heights: int) -> Floats:
    """Return P(land i below B) for a walk that starts 1 … `heights` above B: [heights, B], i = 0 … B - 1."""
    B = len(down)
    table = np.zeros((heights + B, B))  # B rows of landing places first, then the heights
    table[:B] = np.eye(B)[::-1]
    backwards = down[::-1]
    for j in range(heights):
        table[B + j] = backwards @ table[j : B + j]
    return table[B:]


def _stationary(P: Floats) -> Floats:
    """Return the law that P keeps."""
    n = len(P)
    balance = (P / P.sum(axis=1, keepdims=True)).T - np.eye(n)
    balance[0] = 1.0
    return np.asarray(np.maximum(np.linalg.solve(balance, np.eye(n)[0]), 0.0))


def _visits(entered: Floats, down: Floats, climb: Floats) -> Floats:
    """Return the expected visits to B + 1, B + 2, … of walks that start there as `entered` says and end at B or below."""
    heights = len(entered)
    renewals = np.zeros(heights)  # P(a ladder point k below the start)
    renewals[0] = 1.0
    for k in range(1, heights):
        reach = min(k, len(down))
        renewals[k] = float(down[:reach] @ renewals[k - reach : k][::-1])
    peaks = np.maximum(convolve(entered, renewals[::-1])[heights - 1 :], 0.0)
    visits = np.maximum(convolve(peaks, climb), 0.0)
    felt = np.flatnonzero(visits > 1e-15)
    return np.asarray(visits[: felt[-1] + 1]) if len(felt) else np.zeros(1)
