"""Choose tokens from logits, all rows of a step at once, each as its request wants it and by its own random numbers.

    sample(logits, rows)          a token per row, with log-probabilities where they are wanted
    distribution(logits, rows)    the probabilities that `sample` draws from: what speculation must preserve
    draw(weights, uniform)        tokens of given probabilities
    uniforms(rows, stream)        the random numbers of these tokens, which depend on seed and place in the answer only

Every filter is a threshold on the logits, and tokens at it are kept, as vLLM and Hugging Face keep them: so what is kept depends neither
on the order of equal logits nor on other rows.  In numpy, whose small operations take a fifth of the time of torch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsys_bench.engine.sampling import GREEDY, SEEDS, Logprobs, Sampling, sampling

__all__ = ["GREEDY", "Logprobs", "Row", "Sampled", "Sampling", "distribution", "draw", "logprobs", "sample", "sampling", "uniforms"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_SHORTLISTS = (256, 4096)  # of the likeliest tokens, where those that filters keep are looked for before a whole vocabulary is sorted
_COLDEST = 1e-30  # so that a tiny temperature makes -inf of what is less likely, and no 0 / 0 of the likeliest


class Row(Protocol):
    """A request whose next token is to be chosen."""

    @property
    def sampling(self) -> Sampling:
        """How."""

    @property
    def seed(self) -> int:
        """Of its random numbers, 0 to 2^64 - 1."""

    @property
    def tokens(self) -> Sequence[int]:
        """Given and generated so far."""

    @property
    def given(self) -> int:
        """How many of these are the prompt."""


class Sampled(NamedTuple):
    """What was chosen for each row."""

    tokens: list[int]
    logprobs: tuple[Logprobs | None, ...]  # empty where no row wants any


def sample(logits: Tensor, rows: Sequence[Row]) -> Sampled:
    """Return a token per row.  logits: [S, vocab], fp32.  Where all rows want the likeliest, that is one argmax."""
    others = [i for i, row in enumerate(rows) if not row.sampling.is_plain]
    if not others:
        return Sampled(_likeliest(logits), ())
    x = _array(logits)
    chosen = x.argmax(axis=-1)
    chosen[others] = _choose(_changed(_of(x, others), [rows[i] for i in others]), [rows[i] for i in others])
    tokens: list[int] = chosen.tolist()
    return Sampled(tokens, logprobs(logits, rows, tokens))


def distribution(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Return the probabilities that each row's token is drawn with: [S, vocab] fp32, all on one token where the likeliest is wanted."""
    return torch.from_numpy(_distribution(_changed(_array(logits), rows), [row.sampling for row in rows])).to(logits.device)


def draw(weights: Tensor, uniform: Doubles) -> list[int]:
    """Return a token per row of weights [S, vocab], by inverting their distribution function at `uniform` [S], each 0 to 1."""
    tokens: list[int] = _draw(_array(weights), uniform).tolist()
    return tokens


def logprobs(logits: Tensor, rows: Sequence[Row], tokens: Sequence[int]) -> tuple[Logprobs | None, ...]:
    """Return those of the tokens chosen for each row; none at all where no row wants any."""
    wanted = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    if not wanted:
        return ()
    x = _of(_array(logits), wanted)
    top = x.max(axis=-1, keepdims=True)
    whole = top + np.log(_total(x, top, 1.0))  # logsumexp
    best, ids = _largest(x, min(max(rows[i].sampling.logprobs or 0 for i in wanted), x.shape[1]))
    best = best - whole
    found: list[Logprobs | None] = [None] * len(rows)
    for k, i in enumerate(wanted):
        many = rows[i].sampling.logprobs
        likely = tuple(zip(ids[k, :many].tolist(), best[k, :many].tolist(), strict=True))
        found[i] = Logprobs(float(x[k, tokens[i]] - whole[k, 0]), likely)
    return tuple(found)


# ---------------------------------------------------------------- random numbers

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(rows: Sequence[Row], stream: int = 0) -> Doubles:
    """Return a number from [0, 1) per row: of its seed, the place of the token in the answer, and the `stream` (one use of such numbers).

    SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") of a mixed seed, at a counter: nothing to
    keep, so a request that is computed again draws the same, and neighbours do not matter.
    """
    seeds = np.array([row.seed % SEEDS for row in rows], dtype=np.uint64)
    places = np.array([len(row.tokens) - row.given for row in rows], dtype=np.uint64)
    start = _mix(_mix(seeds) + np.uint64(stream))
    return (_mix(start + (places + np.uint64(1)) * _GOLDEN) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ---------------------------------------------------------------- bias and penalties


def _changed(x: Floats, rows: Sequence[Row]) -> Floats:
    """Return logits [S, vocab] with bias and penalties; the same array where nobody wants any.

    Repetition: CTRL (Keskar et al. 2019, section 4.1) as Hugging Face's RepetitionPenaltyLogitsProcessor has it.  Frequency and presence:
    `mu[j] - c[j] frequency - (c[j] > 0) presence` with c the counts in the answer (OpenAI's API reference).
    """
    if not any(row.sampling.changes_logits for row in rows):
        return x
    x = x.copy()
    for own, row in zip(x, rows, strict=True):
        how = row.sampling
        for token, value in how.logit_bias:
            if token < len(own):
                own[token] += value
        if how.repetition_penalty != 1.0:
            ids, _ = _counted(row.tokens, len(own))
            factor = np.float32(how.repetition_penalty)
            own[ids] = np.where(own[ids] > 0, own[ids] / factor, own[ids] * factor)
        if how.frequency_penalty or how.presence_penalty:
            ids, counts = _counted(row.tokens[row.given :], len(own))
            own[ids] -= (counts * how.frequency_penalty + how.presence_penalty).astype(np.float32)
    return x


def _counted(tokens: Sequence[int], vocab: int) -> tuple[Ints, Ints]:
    """Return the different tokens that have logits, and how often each is there."""
    counts = np.bincount(np.array(tokens, dtype=np.int64), minlength=vocab)[:vocab]
    ids = np.flatnonzero(counts)
    return ids, counts[ids]


# ---------------------------------------------------------------- the choice


def _likeliest(logits: Tensor) -> list[int]:
    """Return the largest of each row, the first of equals.  On a CPU numpy's argmax, which takes a tenth of the time of torch's."""
    found: list[int] = (logits.argmax(dim=-1) if logits.is_cuda else _view(logits).argmax(axis=-1)).tolist()
    return found


def _choose(x: Floats, rows: Sequence[Row]) -> Ints:
    """Return a token per row of logits with bias and penalties.  A row's way depends on nothing but the row."""
    tokens, u = np.asarray(x.argmax(axis=-1)), uniforms(rows)
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature]
    whole = [i for i in drawn if not rows[i].sampling.has_filter]
    left = [i for i in drawn if rows[i].sampling.has_filter]
    for size in _SHORTLISTS:
        if left and size < x.shape[-1]:
            tokens[left], is_within = _from_shortlist(_of(x, left), [rows[i].sampling for i in left], u[left], size)
            left = [i for i, within in zip(left, is_within, strict=True) if not within]
    if whole or left:
        at = sorted([*whole, *left])
        tokens[at] = _draw(_distribution(_of(x, at), [rows[i].sampling for i in at]), u[at])
    return tokens


def _distribution(x: Floats, hows: Sequence[Sampling]) -> Floats:
    """Return the probabilities of logits with bias and penalties, [S, vocab]."""
    p: Floats = x - x.max(axis=-1, keepdims=True)
    p /= _temperature(hows)
    if any(how.has_filter for how in hows):
        p[p < _least(p, hows)] = -np.inf
    np.exp(p, out=p)
    p /= p.sum(axis=-1, keepdims=True)
    greedy = [i for i, how in enumerate(hows) if not how.temperature]
    if greedy:
        p[greedy] = 0.0
        p[greedy, x[greedy].argmax(axis=-1)] = 1.0
    return p


def _draw(weights: Floats, uniform: Doubles) -> Ints:
    """Return a token per row, see `draw`.

    First the block is found, then the place in it: a running sum over a whole vocabulary takes as long as everything else together.
    """
    vocab = weights.shape[-1]
    size = math.isqrt(vocab)
    starts = np.arange(0, vocab, size)
    sums = np.add.reduceat(weights, starts, axis=-1)
    tokens = np.empty(len(weights), dtype=np.int64)
    for i, (own, blocks) in enumerate(zip(weights, sums, strict=True)):
        running = blocks.cumsum(dtype=np.float64)
        at = uniform[i] * running[-1]
        block = min(int(running.searchsorted(at, side="right")), int(blocks.nonzero()[0][-1]))  # rounding must not lead beyond the last
        inside = own[starts[block] : starts[block] + size]
        before = running[block - 1] if block else 0.0
        place = inside.cumsum(dtype=np.float64).searchsorted(at - before, side="right")
        tokens[i] = starts[block] + min(int(place), int(inside.nonzero()[0][-1]))
    return tokens


# ---------------------------------------------------------------- filters


def _from_shortlist(x: Floats, hows: Sequence[Sampling], uniform: Doubles, size: int) -> tuple[Ints, list[bool]]:
    """Return tokens of what the filters keep, looked for among so many of the likeliest; and whether they keep no more than those."""
    ids = np.argpartition(x, x.shape[-1] - size, axis=-1)[:, x.shape[-1] - size :]
    ids.sort(axis=-1)
    best = np.take_along_axis(x, ids, axis=-1)
    top, temperature = best.max(axis=-1, keepdims=True), _temperature(hows)
    total = _total(x, top, temperature) if any(how.is_nucleus for how in hows) else None
    scaled = (best - top) / temperature
    keep = scaled >= _kept(_descending(scaled), hows, total, x.shape[-1])
    places = _draw(np.where(keep, np.exp(scaled), np.float32(0.0)), uniform)
    return ids[np.arange(len(ids)), places], (~keep).any(axis=-1).tolist()


def _least(scaled: Floats, hows: Sequence[Sampling]) -> Floats:
    """Return the least logit that is kept, [S, 1].  scaled: [S, vocab], divided by temperature, the likeliest 0."""
    vocab, total = scaled.shape[-1], _total(scaled, 0.0, 1.0)
    for size in (size for size in _SHORTLISTS if size < vocab):
        best = _descending(np.partition(scaled, vocab - size, axis=-1)[:, vocab - size :])
        least = _kept(best, hows, total, vocab)
        if (best[:, -1:] < least).all():
            return least
    return _kept(_descending(scaled), hows, None, vocab)


def _descending(x: Floats) -> Floats:
    """Return each row's values, largest first."""
    return np.asarray(np.sort(x, axis=-1)[:, ::-1])


def _total(x: Floats, top: Floats | float, temperature: Floats | float) -> Doubles:
    """Return the sum of exp((x - top) / temperature) of each row, [S, 1]."""
    e = x - top
    e /= temperature
    np.exp(e, out=e)
    return np.asarray(e.sum(axis=-1, keepdims=True), dtype=np.float64)


def _kept(best: Floats, hows: Sequence[Sampling], total: Doubles | None, vocab: int) -> Floats:
    """Return the least logit that is kept, [S, 1], by the n largest ones: best [S, n], largest first, divided by temperature, the first 0.

    Where more than those n are kept, it is one that keeps all n.  Top-p is the nucleus of Holtzman et al. 2020, "The curious case of
    neural text degeneration": the fewest of the likeliest tokens that reach a share of the probability, here of what min-p and top-k keep.
    total [S, 1]: the sum of exp over the vocabulary, for rows without those two; None where no row is like that, or n is all there is.
    """
    n, each = best.shape[-1], np.arange(len(best))[:, None]
    least = _column([math.log(how.min_p) if how.min_p else -math.inf for how in hows])
    if any(how.top_k for how in hows):
        kth = best[each, [[min(how.top_k or n, n) - 1] for how in hows]]
        least = np.where(_column([how.top_k for how in hows]) > 0, np.maximum(least, kth), least)
    if all(how.top_p >= 1.0 for how in hows):
        return least
    top_p = np.array([[how.top_p] for how in hows])
    weights = np.where(best < least, 0.0, np.exp(best.astype(np.float64)))
    mass = weights.sum(axis=-1, keepdims=True)
    if total is not None:
        mass = np.where(least == -np.inf, total, mass)
    inside = (weights.cumsum(axis=-1) - weights < mass * top_p).sum(axis=-1, keepdims=True)
    last = np.maximum(least, best[each, np.maximum(inside - 1, 0)])
    is_cut = (least > -np.inf) & (best[:, -1:] >= least)  # there may be more of these: what they weigh is not known, nor their nucleus
    return np.where((top_p >= 1.0) | (is_cut & (n < vocab)), least, last)


def _largest(x: Floats, n: int) -> tuple[Floats, Ints]:
    """Return the n largest of each row and where they are, [S, n]: largest first, of equal ones the first first."""
    vocab = x.shape[-1]
    ids = np.argpartition(x, vocab - n, axis=-1)[:, vocab - n :] if 0 < n < vocab else np.tile(np.arange(n), (len(x), 1))
    ids.sort(axis=-1)
    order = np.argsort(-np.take_along_axis(x, ids, axis=-1), axis=-1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=-1)
    return np.take_along_axis(x, ids, axis=-1), ids


def _temperature(hows: Sequence[Sampling]) -> Floats:
    """Return what logits are divided by, [S, 1]: 1 where the likeliest is wanted."""
    return _column([max(how.temperature, _COLDEST) if how.temperature else 1.0 for how in hows])


def _column(values: Sequence[float]) -> Floats:
    """Return numbers as [S, 1]."""
    return np.array(values, dtype=np.float32)[:, None]


def _of(x: Floats, rows: Sequence[int]) -> Floats:
    """Return some rows; where they are all of them, not copied: fresh memory costs as much as what is computed in it."""
    return x if len(rows) == len(x) else x[rows]


def _array(x: Tensor) -> Floats:
    """Return a tensor as an array of this process's memory."""
    return _view(x.cpu() if x.is_cuda else x)


class _View:
    """The array of a tensor on the CPU, kept for the one that was asked for last.

    A model that gives its logits in the same tensor every time is asked once: to make an array takes 75 µs where the weights of a step
    have just gone through the caches.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, Floats] | None = None

    def __call__(self, x: Tensor) -> Floats:
        last = self._last
        if last is None or last[0] is not x:
            self._last = last = x, x.numpy()
        return last[1]


_view = _View()
