"""Speculation: guess a few tokens, verify them all in one step, and keep those that are right.

    NGram, DraftModel    how to guess: what followed the last few tokens earlier in the text; or what a smaller model says
    verify               which guesses stand, and the token after them

What comes out is distributed as if every token had been drawn by itself.  A guess that was not drawn at random (from the text, or the
likeliest one of a model) is checked against the token that is drawn anyway: the same random number, so the same answer, token for token.
One drawn from a distribution q stands with probability min(1, p / q), and else a token is drawn from what p has more than q, (p - q)+ /
sum (p - q)+: Leviathan, Kalman and Matias (2023), "Fast inference from transformers via speculative decoding", algorithm 1; Chen et al.
(2023), "Accelerating large language model decoding with speculative sampling", algorithm 2.  One guess then stands with probability
sum min(p, q).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mlsys_bench import models
from mlsys_bench.batching import StepPlan
from mlsys_bench.engine import runner
from mlsys_bench.engine.kv import Blocks
from mlsys_bench.engine.runner import Ints, Step
from mlsys_bench.engine.sampler import Row, Sampling, distribution, draw, sample, uniforms
from mlsys_bench.errors import BadInput
from mlsys_bench.models import Architecture

ACCEPT, RESIDUAL, DRAFT = 1, 2, 3  # streams of random numbers; 0 is that of tokens that nobody guessed
MOST_DRAFTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class NGram:
    """Guess what followed the last `longest` tokens when they last stood in the text; or fewer of them, down to `shortest`."""

    drafts: int = 4
    longest: int = 4
    shortest: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftModel:
    """Guess with a smaller model over the same tokens: random weights by seed, or those of a Llama state dict."""

    shape: Architecture
    drafts: int = 4
    precision: str | None = None  # that of the large one
    seed: int = 0
    state_dict: Mapping[str, Tensor] | None = None
    checkpoint: Path | None = None


Speculation = NGram | DraftModel


def speculation(text: str) -> Speculation:
    """Return how `ngram`, `ngram:6` or `nano:3` guesses: by the text itself or by the model of that name, so many tokens."""
    name, _, count = text.partition(":")
    if count and not count.isdecimal():
        raise BadInput(f"speculate {text!r}: {count!r} is no number of tokens; try {name}:4")
    drafts = int(count or 4)
    if name == "ngram":
        return check(NGram(drafts=drafts))
    return check(DraftModel(shape=models.find(name), drafts=drafts, checkpoint=models.folder(name)))


def check(how: Speculation) -> Speculation:
    """Return it.  Raises BadInput for settings that cannot be."""
    if not 1 <= how.drafts <= MOST_DRAFTS:
        raise BadInput(f"speculate {how.drafts} tokens: give 1 to {MOST_DRAFTS}")
    if isinstance(how, NGram) and not 1 <= how.shortest <= how.longest:
        raise BadInput(f"n-grams of {how.shortest} to {how.longest} tokens: give 1 or more, the shortest first")
    return how


class Drafts(NamedTuple):
    """Guesses for one row."""

    tokens: list[int]
    q: Tensor | None  # [tokens, vocab] what each was drawn from; None where nothing was drawn at random


class Known(Protocol):
    """A request, its tokens a list: as `Row`, and known by its row."""

    row: int
    tokens: list[int]
    given: int
    sampling: Sampling
    seed: int


@dataclass(frozen=True, slots=True)
class Place:
    """A request as if it had its guesses, up to one, already: whose token is chosen there."""

    known: Known
    ahead: Sequence[int]

    @property
    def sampling(self) -> Sampling:
        """How."""
        return self.known.sampling

    @property
    def seed(self) -> int:
        """Of its random numbers."""
        return self.known.seed

    @property
    def tokens(self) -> Sequence[int]:
        """Given, generated and guessed so far."""
        return [*self.known.tokens, *self.ahead]

    @property
    def given(self) -> int:
        """How many of these are the prompt."""
        return self.known.given


def places(known: Known, drafts: Sequence[int]) -> list[Row]:
    """Return where a row's tokens are chosen: after what is known, and after each guess."""
    return [Place(known, drafts[:i]) for i in range(len(drafts) + 1)]


# ---------------------------------------------------------------- verifying


def verify(logits: Tensor, rows: Sequence[Known], drafts: Sequence[Drafts]) -> list[list[int]]:
    """Return what each row gets: its guesses up to the first that does not stand, and one token more.

    logits: [sum of (drafts + 1), vocab], row by row, each after what is known and after each of its guesses.
    """
    ends = np.cumsum([len(d.tokens) + 1 for d in drafts]).tolist()
    at = [places(row, d.tokens) for row, d in zip(rows, drafts, strict=True)]
    got: list[list[int]] = [[] for _ in rows]
    for is_drawn, decide in ((False, _agreed), (True, _accepted)):
        some = [i for i, d in enumerate(drafts) if (d.q is not None) is is_drawn]
        if some:
            index = [place for i in some for place in range(ends[i] - len(at[i]), ends[i])]
            here = logits if len(some) == len(rows) else logits[index]
            for i, tokens in zip(some, decide(here, [at[i] for i in some], [drafts[i] for i in some]), strict=True):
                got[i] = tokens
    return got


def _agreed(logits: Tensor, at: list[list[Row]], drafts: list[Drafts]) -> Iterator[list[int]]:
    """Yield what is drawn anyway, up to where a guess was another: what is drawn after that belongs to another text."""
    drawn = sample(logits, [place for mine in at for place in mine]).tokens
    begin = 0
    for guessed, _ in drafts:
        here = drawn[begin : begin + len(guessed) + 1]
        right = next((i for i, (guess, token) in enumerate(zip(guessed, here, strict=False)) if guess != token), len(guessed))
        yield here[: right + 1]
        begin += len(here)


def _accepted(logits: Tensor, at: list[list[Row]], drafts: list[Drafts]) -> Iterator[list[int]]:
    """Yield the guesses that stand by the rule of Leviathan et al. and Chen et al., and one token more."""
    p = distribution(logits, [place for mine in at for place in mine])
    q = torch.cat([d.q for d in drafts if d.q is not None])
    counts = np.array([len(d.tokens) for d in drafts])
    begins = np.cumsum(counts + 1) - counts - 1
    guessed = np.concatenate([d.tokens for d in drafts])
    in_p = np.repeat(begins, counts) + _within(counts)
    tokens, where = torch.from_numpy(guessed).to(p.device), torch.from_numpy(in_p).to(p.device)
    u = uniforms([place for mine in at for place in mine[:-1]], ACCEPT)
    stands = u * q.gather(1, tokens[:, None])[:, 0].double().cpu().numpy() < p[where, tokens].double().cpu().numpy()
    right = [int(np.argmin([*mine, False])) for mine in np.split(stands, np.cumsum(counts)[:-1])]
    last = [mine[r] for mine, r in zip(at, right, strict=True)]
    weights, falls = p[(begins + right).tolist()], np.array(right) < counts
    if falls.any():
        rest = (weights[falls] - q[(np.cumsum(counts) - counts + right)[falls].tolist()]).clamp_(min=0.0)
        weights[falls] = torch.where(rest.sum(dim=-1, keepdim=True) > 0.0, rest, weights[falls])  # equal up to rounding: either will do
    more = draw(weights, np.where(falls, uniforms(last, RESIDUAL), uniforms(last)))
    for d, r, token in zip(drafts, right, more, strict=True):
        yield [*d.tokens[:r], token]


def _within(counts: Ints) -> Ints:
    """Return 0, 1, .. for each count, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


# ---------------------------------------------------------------- guessing


class Drafter(Protocol):
    """A way to guess."""

    caches: tuple[Blocks, ...]  # what it keeps, in the blocks of the engine

    def guess(self, plan: StepPlan, room: Ints, rows: Mapping[int, Known], block_table: Ints) -> list[Drafts]:
        """Return guesses for each row of a plan, at most `room` of them.  What the plan computes is, for a model, computed here too."""

    def forget(self, row: int) -> None:
        """Take note that a row has gone, or begins anew."""


NOTHING = Drafts([], None)


class Lookup:
    """Where the ends of one text stood in it before.  Costs a few dictionary entries a token, however long the text is."""

    __slots__ = ("_known", "_seen", "_sizes")

    def __init__(self, how: NGram) -> None:
        """Begin with nothing read."""
        self._sizes, self._known = range(how.longest, how.shortest - 1, -1), 1
        self._seen: dict[tuple[int, ...], int] = {}

    def after(self, tokens: list[int], most: int) -> list[int]:
        """Return what followed, the last time; a text that repeats itself goes on doing so."""
        for end in range(self._known, len(tokens)):  # what ends here is followed by tokens[end]
            for size in self._sizes:
                if size <= end:
                    self._seen[tuple(tokens[end - size : end])] = end
        self._known = max(len(tokens), 1)
        for size in self._sizes:
            at = self._seen.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if at is not None:
                period = len(tokens) - at
                return [tokens[at + i % period] for i in range(most)]
        return []


class TextDrafter:
    """Guesses from the texts themselves."""

    caches: tuple[Blocks, ...] = ()

    def __init__(self, how: NGram) -> None:
        """Begin without any text."""
        self._how, self._lookups = how, dict[int, Lookup]()

    def guess(self, plan: StepPlan, room: Ints, rows: Mapping[int, Known], block_table: Ints) -> list[Drafts]:
        """Return what followed earlier in each text."""
        return [
            Drafts(self._lookup(row).after(rows[row].tokens, most), None) if most else NOTHING
            for row, most in zip(plan.rows.tolist(), room.tolist(), strict=True)
        ]

    def _lookup(self, row: int) -> Lookup:
        if row not in self._lookups:
            self._lookups[row] = Lookup(self._how)
        return self._lookups[row]

    def forget(self, row: int) -> None:
        """Forget its text."""
        self._lookups.pop(row, None)


class ModelDrafter:
    """Guesses of a smaller model, whose cache lies in the same blocks.

    It computes what the plan computes, so whatever of the large model's cache is filled, shared or swapped is so in its own; only the last
    guess of a row whose guesses all stood is still to come, and comes with the next step.  Were it wrong there, answers would not change:
    they are right for any guesses.
    """

    def __init__(self, forward: Callable[[Step], Tensor], cache: Blocks) -> None:
        """Take a model: the logits of a step, only of what may be generated, after its K and V are in the cache."""
        self._forward, self._cache = forward, cache
        self.caches: tuple[Blocks, ...] = (cache,)
        self._computed: dict[int, int] = {}  # by row, the tokens in the cache

    def guess(self, plan: StepPlan, room: Ints, rows: Mapping[int, Known], block_table: Ints) -> list[Drafts]:
        """Compute the plan, then go on a token at a time; the rows that want another one together."""
        numbers = plan.rows.tolist()
        guesses: dict[int, tuple[list[int], list[Tensor]]] = {row: ([], []) for row in numbers}
        given = (plan.start + plan.tokens - room).astype(np.int32)  # what is known, as far as the plan goes
        done = [min(at, self._computed.get(row, at)) for row, at in zip(numbers, plan.start.tolist(), strict=True)]
        start = np.array(done, dtype=np.int32)
        self._turn(StepPlan(plan.rows, start, given - start, room > 0, plan.preempted), rows, block_table, guesses)
        for turn in range(1, int(room.max(initial=0))):
            more = plan.rows[room > turn]
            ends = given[room > turn] + turn
            self._turn(StepPlan(more, ends - 1, np.ones_like(ends), np.ones(len(ends), np.bool_), more[:0]), rows, block_table, guesses)
        for row, known in zip(numbers, given.tolist(), strict=True):
            self._computed[row] = known + max(len(guesses[row][0]) - 1, 0)
        return [
            Drafts(tokens, torch.stack(q) if tokens and rows[row].sampling.temperature > 0.0 else None)
            for row, (tokens, q) in guesses.items()
        ]

    def _turn(
        self, plan: StepPlan, rows: Mapping[int, Known], block_table: Ints, guesses: dict[int, tuple[list[int], list[Tensor]]]
    ) -> None:
        """Compute a plan, and add a guess to each of its rows that wants one."""
        plan = runner.order_of(plan)
        known = {row: [*rows[row].tokens, *guesses[row][0]] for row in plan.rows.tolist()}
        logits = self._forward(runner.step_input(plan, known, block_table, self._cache))
        wanting = plan.rows[plan.samples].tolist()
        if wanting:
            at: list[Row] = [Place(rows[row], guesses[row][0].copy()) for row in wanting]
            q = distribution(logits, at)
            for i, (row, token) in enumerate(zip(wanting, draw(q, uniforms(at, DRAFT)), strict=True)):
                guesses[row][0].append(token)
                guesses[row][1].append(q[i])

    def forget(self, row: int) -> None:
        """Forget that: its cache is another one now."""
        self._computed.pop(row, None)
