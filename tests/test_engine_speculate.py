"""Speculation: what comes out is distributed as without, and as much of it is right as theory says."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mlsys_bench.engine import Engine, default_limits, speculate
from mlsys_bench.engine.sampler import Sampling, distribution, draw, sampling, uniforms
from mlsys_bench.engine.speculate import DRAFT, DraftModel, Drafts, Lookup, NGram, Place
from mlsys_bench.errors import BadInput, UnknownName
from tests.engine_games import TINIER, TINY, Ask, run_alone

ROOMY = default_limits(TINY, max_batch=64, max_context=128)
WARM = sampling(temperature=1.0)
SIGMAS = 4.5  # one test in 150,000 fails by chance


@dataclass
class Known:
    """A request with a seed."""

    seed: int
    row: int = 0
    tokens: list[int] = field(default_factory=lambda: [1])
    given: int = 1
    sampling: Sampling = WARM


def tables(seed: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two Markov chains [vocab, vocab], some of whose steps are impossible."""
    rng = np.random.default_rng(seed)
    chains = rng.dirichlet(np.full(vocab, 0.7), (2, vocab)) * (rng.random((2, vocab, vocab)) < 0.8) + 1e-6 * np.eye(vocab)
    p, q = torch.from_numpy(chains / chains.sum(axis=2, keepdims=True))
    return p, q


def speculated(p: torch.Tensor, q: torch.Tensor, plays: int, guesses: int) -> list[list[int]]:
    """Return what one step gives so many requests whose tokens follow chain p, guessed by chain q."""
    rows = [Known(seed) for seed in range(plays)]
    paths = [[1] for _ in rows]
    for _ in range(guesses):
        at = [Place(row, path[1:]) for row, path in zip(rows, paths, strict=True)]
        for path, token in zip(paths, draw(q[[path[-1] for path in paths]].float(), uniforms(at, DRAFT)), strict=True):
            path.append(token)
    drafts = [Drafts(path[1:], q[path[:-1]].float()) for path in paths]
    return speculate.verify(p[[token for path in paths for token in path]].log().float(), rows, drafts)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Return the p-value of counts whose means are expected; rare cells are put together."""
    rare = expected < 5
    seen, wanted = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    assert counts[expected == 0].sum() == 0, "what is impossible came"
    if len(seen) < 2:
        return 1.0
    return float(stats.chi2.sf(((seen - wanted) ** 2 / wanted).sum(), len(seen) - 1))


@pytest.mark.parametrize("seed", range(3))
def test_guessing_keeps_the_distribution_and_guesses_stand_as_often_as_theory_says(seed: int) -> None:
    """Leviathan et al., theorem 1 and corollary 3.6: tokens of p; a guess stands with probability sum min(p, q)."""
    vocab, plays = 6, 3000
    p, q = tables(seed, vocab)
    got = speculated(p, q, plays, guesses=2)
    first = np.bincount([tokens[0] for tokens in got], minlength=vocab)
    assert chi_square(first, plays * p[1].numpy()) > 1e-5
    for last in range(vocab):  # after a guess that stood, the next token is drawn as after any other
        after = np.bincount([t[1] for t in got if len(t) > 1 and t[0] == last], minlength=vocab)
        assert chi_square(after, after.sum() * p[last].numpy()) > 1e-5
    stands = float(torch.minimum(p[1], q[1]).sum())
    sd = math.sqrt(stands * (1 - stands) / plays)
    assert abs(np.mean([len(t) > 1 for t in got]) - stands) < SIGMAS * sd


def test_a_guess_that_is_the_models_own_always_stands() -> None:
    p, _ = tables(3, 6)
    assert all(len(tokens) == 4 for tokens in speculated(p, p, 200, guesses=3))


def test_a_guess_that_was_not_drawn_stands_as_often_as_it_is_drawn_anyway() -> None:
    """Probability p(guess); and what comes is, seed by seed, what comes without guessing."""
    p, _ = tables(4, 6)
    logits = p[[1, 2]].log().float()
    rows = [Known(seed) for seed in range(2000)]
    got = speculate.verify(logits.repeat(2000, 1), rows, [Drafts([2], None)] * 2000)
    plain = speculate.verify(logits[:1].repeat(2000, 1), rows, [speculate.NOTHING] * 2000)
    assert [t[0] for t in got] == [t[0] for t in plain]
    stands = float(p[1, 2])
    assert abs(np.mean([len(t) > 1 for t in got]) - stands) < SIGMAS * math.sqrt(stands * (1 - stands) / 2000)


def test_rows_with_and_without_guesses_are_verified_together() -> None:
    """Each gets what it gets alone."""
    p, q = tables(5, 6)
    drafts = [Drafts([2, 3], None), speculate.NOTHING, Drafts([4], q[1:2].float()), Drafts([0], None)]
    rows = [Known(seed) for seed in range(4)]
    paths = [[1, *d.tokens] for d in drafts]
    together = speculate.verify(torch.cat([p[path] for path in paths]).log().float(), rows, drafts)
    alone = [speculate.verify(p[path].log().float(), [row], [d])[0] for path, row, d in zip(paths, rows, drafts, strict=True)]
    assert together == alone


# ---------------------------------------------------------------- looking up


@pytest.mark.parametrize(
    ("tokens", "guess"),
    [
        ([], []),
        ([1, 2, 3], []),
        ([1, 2, 3, 4, 9, 1, 2], [3, 4, 9]),
        ([1, 2, 3, 7, 1, 2, 4, 7, 1, 2], [4, 7, 1]),  # the last time counts
        ([5, 1, 2, 6, 7, 1, 2, 8, 5, 1, 2], [6, 7, 1]),  # but a longer match before
        ([1, 1, 1], [1, 1, 1]),
        ([1, 2, 1, 2], [1, 2, 1]),  # a text that repeats itself goes on
    ],
)
def test_what_followed_the_last_tokens_is_guessed(tokens: list[int], guess: list[int]) -> None:
    how = NGram(longest=3, shortest=2)
    assert Lookup(how).after(tokens, 3) == guess


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.data())
@settings(max_examples=50, deadline=None)
def test_looking_up_as_the_text_grows_is_looking_up_in_all_of_it(tokens: list[int], data: st.DataObject) -> None:
    """And both are what a search from the end finds."""
    how, grown = NGram(longest=3, shortest=1), Lookup(NGram(longest=3, shortest=1))
    end = 0
    while end < len(tokens):
        end += data.draw(st.integers(1, 5))
        text = tokens[:end]
        assert grown.after(text, 4) == Lookup(how).after(text, 4) == _searched(text, 4)


def _searched(text: list[int], most: int) -> list[int]:
    for size in (3, 2, 1):
        for at in range(len(text) - 1, size - 1, -1):
            if text[at - size : at] == text[-size:] and size <= len(text):
                return [(text[at:] * most)[i] for i in range(most)]
    return []


# ---------------------------------------------------------------- in the engine


@functools.cache
def exact(prompt: tuple[int, ...], how: Sampling, length: int) -> dict[tuple[int, ...], float]:
    """Return the probability of every answer of so many tokens, from logits that one request after the other gives."""
    engine = Engine(TINY, limits=ROOMY, threads=1, deterministic=True)
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        grown: dict[tuple[int, ...], float] = {}
        for answer, chance in chances.items():
            seen: list[torch.Tensor] = []
            engine._choose, choose = _spy(engine._choose, seen), engine._choose  # type: ignore[method-assign]
            run_alone(engine, Ask((*prompt, *answer), 1))
            engine._choose = choose  # type: ignore[method-assign]
            p = distribution(seen[0], [Known(0, sampling=how)])[0]
            grown |= {(*answer, t): chance * float(p[t]) for t in p.nonzero()[:, 0].tolist()}
        chances = grown
    return chances


def _spy(choose: Any, seen: list[torch.Tensor]) -> Any:
    def spied(logits: torch.Tensor, *rest: Any) -> Any:
        seen.append(logits.clone())
        return choose(logits, *rest)

    return spied


@pytest.mark.parametrize("how", [DraftModel(shape=TINIER, drafts=2, seed=7), NGram(drafts=2, shortest=1), None])
def test_a_speculating_engine_draws_from_the_exact_distribution(how: DraftModel | NGram | None) -> None:
    """All answers of four tokens, their probabilities from the model itself, against 1,000 that were drawn."""
    prompt, plays, length = (97, 98, 97, 98, 97), 1000, 4
    chosen = sampling(temperature=1.5, top_k=3, logit_bias=dict.fromkeys((97, 98, 99), 20.0))  # so that texts repeat themselves
    chances = exact(prompt, chosen, length)
    assert sum(chances.values()) == pytest.approx(1.0)
    engine = Engine(TINY, limits=ROOMY, speculative=how, prefix_cache=True, threads=1, deterministic=True)
    ids = [engine.add(prompt, max_tokens=length, sampling=dataclasses.replace(chosen, seed=seed), ignore_eos=True) for seed in range(plays)]
    answers: dict[int, list[int]] = {i: [] for i in ids}
    drafted = 0
    while engine.busy:
        report = engine.step()
        drafted += report.drafted
        for request, token in report.tokens:
            answers[request].append(token)
    assert drafted > 0 or how is None
    found = dict.fromkeys(itertools.chain(chances, map(tuple, answers.values())), 0)
    for answer in answers.values():
        found[tuple(answer)] += 1
    assert chi_square(np.array(list(found.values())), plays * np.array([chances.get(a, 0.0) for a in found])) > 1e-5


def test_with_a_seed_the_text_guesses_change_nothing() -> None:
    """Token for token, with log-probabilities, penalties and stops."""
    rng = np.random.default_rng(0)
    asks = [
        Ask(
            (97, 98) * int(rng.integers(1, 6)),
            30,
            sampling(temperature=0.9, top_p=0.8, seed=i, logprobs=2, frequency_penalty=0.1 * (i % 3)),
        )
        for i in range(6)
    ]
    plain, guessing = (Engine(TINY, limits=ROOMY, speculative=how, threads=1, deterministic=True) for how in (None, "ngram:3"))
    for engine in (plain, guessing):
        for ask in asks:
            engine.add(ask.prompt, max_tokens=ask.max_tokens, sampling=ask.sampling)
    got = [_all(engine) for engine in (plain, guessing)]
    assert got[0] == got[1]


def _all(engine: Engine) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    while engine.busy:
        report = engine.step()
        for (request, token), log in zip(report.tokens, report.logprobs, strict=True):
            assert log is not None
            found.setdefault(request, []).append((token, round(log.chosen, 4), [t for t, _ in log.top]))
    return found


def test_a_model_that_guesses_for_itself_is_always_right() -> None:
    """One token with the prompt, then three guesses and one more a step."""
    engine = Engine(TINY, limits=ROOMY, speculative=DraftModel(shape=TINY, drafts=3), threads=1, deterministic=True)
    engine.add([97, 98, 99], max_tokens=14, ignore_eos=True)
    reports = []
    while engine.busy:
        reports.append(engine.step())
    assert [len(r.tokens) for r in reports] == [1, 4, 4, 4, 1]
    assert [(r.drafted, r.accepted) for r in reports] == [(0, 0), (3, 3), (3, 3), (3, 3), (0, 0)]
    assert [r.features.decode_seqs for r in reports] == [0, 4, 4, 4, 1]


@pytest.mark.parametrize(
    ("text", "how"),
    [("ngram", NGram(drafts=4)), ("ngram:6", NGram(drafts=6)), ("nano:2", "nano")],
)
def test_how_to_guess_is_a_word(text: str, how: NGram | str) -> None:
    found = speculate.speculation(text)
    assert found == how or (isinstance(found, DraftModel) and (found.shape.id, found.drafts) == ("nano", 2))


@pytest.mark.parametrize(("text", "says"), [("ngram:0", "1 to 16"), ("ngram:x", "no number"), ("ngram:99", "1 to 16")])
def test_what_cannot_be_is_refused(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Engine(TINY, limits=ROOMY, speculative=text)


def test_an_unknown_model_is_an_unknown_name() -> None:
    with pytest.raises(UnknownName):
        speculate.speculation("nanoo:3")
    with pytest.raises(BadInput, match="shortest first"):
        Engine(TINY, limits=ROOMY, speculative=NGram(longest=1, shortest=2))
    small = dataclasses.replace(TINIER, vocab=300)
    with pytest.raises(BadInput, match="vocabulary of 300 it cannot guess for a model of 320"):
        Engine(TINY, limits=ROOMY, speculative=DraftModel(shape=small))
