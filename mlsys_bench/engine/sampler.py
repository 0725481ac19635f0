"""Choose tokens from logits, all rows of a step at once, each as its request wants it and by its own random numbers.

    sample(logits, rows)          a token per row, with log-probabilities where they are wanted
    distribution(logits, rows)    the probabilities that `sample` draws from: what speculation must preserve
    draw(p, uniform)              tokens of given probabilities
    uniforms(rows, stream)        the random numbers of these tokens, which depend on seed and place in the answer only

Every filter is a threshold on the logits, and tokens at it are kept, as vLLM and Hugging Face keep them: so what is kept depends neither
on the order of equal logits nor on other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsys_bench.engine.sampling import GREEDY, SEEDS, Logprobs, Sampling, sampling

__all__ = ["GREEDY", "Logprobs", "Row", "Sampled", "Sampling", "distribution", "draw", "logprobs", "sample", "sampling", "uniforms"]

_SHORTLIST = 256  # of the likeliest tokens, in which a nucleus is looked for before the whole vocabulary is sorted


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
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    others = [i for i, row in enumerate(rows) if not row.sampling.is_plain]
    if not others:
        return Sampled(tokens, ())
    chosen = [rows[i] for i in others]
    p = distribution(logits[others], chosen)
    for i, token in zip(others, draw(p, uniforms(chosen)), strict=True):
        tokens[i] = token
    return Sampled(tokens, logprobs(logits, rows, tokens))


def distribution(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Return the probabilities that each row's token is drawn with: [S, vocab] fp32, all on one token where the likeliest is wanted."""
    changed = _changed(logits, rows)
    best = changed.argmax(dim=-1, keepdim=True)
    temperature = _column([row.sampling.temperature for row in rows], logits)
    is_greedy = temperature == 0.0
    if bool(is_greedy.all()):
        return torch.zeros_like(changed).scatter_(1, best, 1.0)
    x = changed - changed.gather(1, best)  # so that a tiny temperature overflows to -inf, never to NaN
    x = x / temperature.masked_fill(is_greedy, 1.0)
    p = x.masked_fill(x < _threshold(x, [row.sampling for row in rows]), -torch.inf).softmax(dim=-1)
    return torch.where(is_greedy, torch.zeros_like(p).scatter_(1, best, 1.0), p)


def draw(p: Tensor, uniform: npt.NDArray[np.float64]) -> list[int]:
    """Return a token per row of probabilities [S, vocab], by inverting their distribution function at `uniform` [S], each 0 to 1."""
    below = p.double().cumsum(dim=-1)
    at = torch.from_numpy(uniform).to(p.device)[:, None] * below[:, -1:]
    last = p.shape[-1] - 1 - (p > 0).flip(-1).int().argmax(dim=-1, keepdim=True)  # rounding must not lead beyond it
    tokens: list[int] = torch.searchsorted(below, at, right=True).minimum(last)[:, 0].tolist()
    return tokens


def uniforms(rows: Sequence[Row], stream: int = 0) -> npt.NDArray[np.float64]:
    """Return a number from [0, 1) per row: of its seed, the place of the token in the answer, and the `stream` (one use of such numbers).

    SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") of a mixed seed, at a counter: nothing to
    keep, so a request that is computed again draws the same, and neighbours do not matter.
    """
    seeds = np.array([row.seed % SEEDS for row in rows], dtype=np.uint64)
    places = np.array([len(row.tokens) - row.given for row in rows], dtype=np.uint64)
    start = _mix(_mix(seeds) + np.uint64(stream))
    return (_mix(start + (places + np.uint64(1)) * _GOLDEN) >> np.uint64(11)).astype(np.float64) * 2.0**-53


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def logprobs(logits: Tensor, rows: Sequence[Row], tokens: Sequence[int]) -> tuple[Logprobs | None, ...]:
    """Return those of the tokens chosen for each row; none at all where no row wants any."""
    wanted = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    if not wanted:
        return ()
    logs = logits[wanted].log_softmax(dim=-1)
    chosen = logs.gather(1, torch.tensor([[tokens[i]] for i in wanted], device=logits.device))[:, 0].tolist()
    most = min(max(rows[i].sampling.logprobs or 0 for i in wanted), logits.shape[-1])
    best, ids = logs.topk(most, dim=-1)
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), best.tolist(), strict=True)]
    found: list[Logprobs | None] = [None] * len(rows)
    for i, log, top in zip(wanted, chosen, tops, strict=True):
        found[i] = Logprobs(log, top[: rows[i].sampling.logprobs])
    return tuple(found)


# ---------------------------------------------------------------- bias and penalties


class _Counts(NamedTuple):
    """Different tokens of some rows, laid end to end, and how often each is there.  All [N]."""

    rows: Tensor
    tokens: Tensor
    counts: Tensor


def _changed(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Return logits [S, vocab] with bias and penalties; the same tensor where nobody wants any.

    Repetition: CTRL (Keskar et al. 2019, section 4.1) as Hugging Face's RepetitionPenaltyLogitsProcessor has it.  Frequency and presence:
    `mu[j] - c[j] frequency - (c[j] > 0) presence` with c the counts in the answer (OpenAI's API reference).
    """
    hows = [row.sampling for row in rows]
    if not any(how.changes_logits for how in hows):
        return logits
    logits = logits.clone()
    bias = [(i, token, value) for i, how in enumerate(hows) for token, value in how.logit_bias if token < logits.shape[1]]
    if bias:
        at, tokens, values = (torch.tensor(column, device=logits.device) for column in zip(*bias, strict=True))
        logits.index_put_((at, tokens), values.to(logits.dtype), accumulate=True)
    if any(how.repetition_penalty != 1.0 for how in hows):
        seen = _counted(logits, [row.tokens if row.sampling.repetition_penalty != 1.0 else () for row in rows])
        factor = _column([how.repetition_penalty for how in hows], logits)[seen.rows, 0]
        x = logits[seen.rows, seen.tokens]
        logits[seen.rows, seen.tokens] = torch.where(x > 0, x / factor, x * factor)
    if any(how.frequency_penalty or how.presence_penalty for how in hows):
        said = _counted(logits, [row.tokens[row.given :] if row.sampling.changes_logits else () for row in rows])
        each, once = (_column(c, logits)[said.rows, 0] for c in ([h.frequency_penalty for h in hows], [h.presence_penalty for h in hows]))
        logits[said.rows, said.tokens] -= said.counts * each + once
    return logits


def _counted(logits: Tensor, lists: Sequence[Sequence[int]]) -> _Counts:
    """Return the different tokens of each list that have logits [S, vocab]."""
    vocab = logits.shape[1]
    tokens = np.concatenate([np.asarray(tokens, dtype=np.int64) for tokens in lists])
    rows = np.arange(len(lists)).repeat([len(tokens) for tokens in lists])
    known = tokens < vocab
    keys, counts = np.unique(rows[known] * vocab + tokens[known], return_counts=True)
    return _Counts(*(torch.from_numpy(a).to(logits.device) for a in (keys // vocab, keys % vocab, counts)))


# ---------------------------------------------------------------- filters


def _threshold(x: Tensor, hows: Sequence[Sampling]) -> Tensor:
    """Return the least logit that is kept, [S, 1].  x: [S, vocab], divided by temperature, the likeliest 0."""
    least = _column([h.min_p for h in hows], x).log()
    if any(h.top_k for h in hows):
        least = least.maximum(_kth(x, [h.top_k for h in hows]))
    if any(h.top_p < 1.0 for h in hows):
        least = least.maximum(_nucleus(x.masked_fill(x < least, -torch.inf), _column([h.top_p for h in hows], x)))
    return least


def _kth(x: Tensor, top_k: Sequence[int]) -> Tensor:
    """Return the logit of each row's k-th likeliest token, [S, 1]; -inf where all are wanted."""
    vocab = x.shape[-1]
    best = x.topk(min(max(top_k), vocab), dim=-1).values
    places = torch.tensor([[min(k or 1, vocab) - 1] for k in top_k], device=x.device)
    return best.gather(1, places).masked_fill(_column(top_k, x) == 0, -torch.inf)


def _nucleus(x: Tensor, top_p: Tensor) -> Tensor:
    """Return the logit of the last token of each row's nucleus, [S, 1]: the smallest set of likeliest ones that reaches top_p.

    Holtzman et al. 2020, "The curious case of neural text degeneration".  Looked for among the likeliest first: sorting a whole
    vocabulary takes fifty times as long.
    """
    is_all = top_p >= 1.0
    mass = (x.double().exp().sum(dim=-1, keepdim=True) * top_p).masked_fill(is_all, 0.0)
    size = min(_SHORTLIST, x.shape[-1])
    while True:
        best = x.topk(size, dim=-1).values
        before = best.double().exp().cumsum(dim=-1) - best.double().exp()
        inside = (before < mass).sum(dim=-1, keepdim=True)
        if size == x.shape[-1] or int(inside.max()) < size:
            last = best.gather(1, (inside - 1).clamp_(min=0))
            return last.masked_fill(is_all, -torch.inf)
        size = min(16 * size, x.shape[-1])


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Return numbers as [S, 1]."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
