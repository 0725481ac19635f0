"""Blocks that are shared, moved to the host and back, or given up as a step failed: answers stay what they are, and nothing is lost."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlsys_bench import batching
from mlsys_bench.batching import Limits
from mlsys_bench.engine import Engine, default_limits
from mlsys_bench.engine.prefix import Hashes
from mlsys_bench.engine.sampler import sampling
from mlsys_bench.engine.speculate import TextDrafter
from mlsys_bench.errors import UnknownName
from tests.engine_games import FEATURES, TINY, Answer, Ask

ROOMY = default_limits(TINY, max_batch=8, max_context=128)
CRAMPED = Limits(max_seqs=4, max_step_tokens=64, block_tokens=4, blocks=20, max_context=80)
EXACT: dict[str, Any] = {"threads": 1, "deterministic": True}


def serve(engine: Engine, asks: list[Ask]) -> list[Answer]:
    """Return what each gets when all come at once; a step that fails is tried again."""
    ids = [engine.add(a.prompt, max_tokens=a.max_tokens, sampling=a.sampling, ignore_eos=a.ignore_eos) for a in asks]
    got = {i: Answer([], "") for i in ids}
    while engine.busy:
        try:
            report = engine.step()
        except Broken:
            assert engine.running == 0
            assert engine.free_blocks == engine.limits.blocks
            batching.check(engine._state, engine.limits)
            continue
        for request, token in report.tokens:
            got.setdefault(request, Answer([], "")).tokens.append(token)
        for request, reason in report.finished:
            got[request] = got[request]._replace(reason=reason)
    return list(got.values())


def open_files() -> int:
    """Return how many files this process has open, 0 where the system does not say."""
    held = Path("/proc/self/fd")
    return len(list(held.iterdir())) if held.exists() else 0


# ---------------------------------------------------------------- prefix cache


def test_a_hash_stands_for_all_tokens_up_to_its_end_and_for_the_model() -> None:
    text = list(range(12))
    whole = Hashes("a model", 4).more(text)
    assert len(set(whole)) == 3
    grown = Hashes("a model", 4)
    assert [h for end in (3, 4, 9, 12) for h in grown.more(text[:end])] == whole
    assert Hashes("a model", 4).more([*text[:8], 99, 9, 10, 11])[:2] == whole[:2]
    others = [Hashes("another model", 4).more(text), Hashes("a model", 4).more([99, *text[1:]]), Hashes("a model", 4).more(text[4:])]
    assert not {h for other in others for h in other} & set(whole)
    assert all(0 <= h < 2**64 for h in whole)


def test_shared_beginnings_are_computed_once() -> None:
    """Five prompts of a common 32 tokens: only the first computes them, and the counters of vLLM's names say so."""
    rng = np.random.default_rng(0)
    stem = rng.integers(0, 256, 32).tolist()
    asks = [Ask((*stem, *rng.integers(0, 256, 5 + i).tolist()), 4) for i in range(5)]
    plain, shared = (Engine(TINY, limits=ROOMY, prefix_cache=on, **EXACT) for on in (False, True))
    assert serve(plain, asks) == serve(shared, asks)
    assert (plain.prefix_queries, plain.prefix_hits) == (0, 0)
    assert (shared.prefix_queries, shared.prefix_hits) == (sum(len(a.prompt) for a in asks), 4 * 32)
    assert shared.free_blocks == ROOMY.blocks


def test_the_next_turn_of_a_conversation_finds_prompt_and_answer() -> None:
    engine = Engine(TINY, limits=ROOMY, prefix_cache=True, **EXACT)
    first = Ask(tuple(range(40)), 25)
    answer = serve(engine, [first])[0]
    following = Ask((*first.prompt, *answer.tokens, 1, 2, 3), 10)
    assert serve(engine, [following]) == serve(Engine(TINY, limits=ROOMY, **EXACT), [following])
    assert engine.prefix_hits == 64  # of 65 tokens before the new ones, the full blocks


def test_other_weights_share_nothing() -> None:
    one, other = (Engine(TINY, limits=ROOMY, prefix_cache=True, seed=seed, **EXACT) for seed in range(2))
    assert one._world != other._world


# ---------------------------------------------------------------- swapping


def crowd() -> list[Ask]:
    rng = np.random.default_rng(1)
    return [Ask(tuple(rng.integers(0, 256, 12).tolist()), 30) for _ in range(6)]


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
def test_a_swapped_cache_comes_back_as_it_was(kv: str) -> None:
    """Nothing is computed twice: the prompts' tokens are all that is ever prefilled, and answers are those without pressure."""
    plain = serve(Engine(TINY, limits=ROOMY, kv=kv, **EXACT), crowd())
    engine = Engine(TINY, limits=CRAMPED, kv=kv, preempt="swap", host_blocks=1000, **EXACT)
    reports = []
    step = engine.step
    engine.step = lambda: reports.append(step()) or reports[-1]  # type: ignore[method-assign, func-returns-value]
    assert serve(engine, crowd()) == plain
    assert sum(r.swapped for r in reports) == sum(len(r.preempted) for r in reports) > 3
    assert sum(r.features.prefill_tokens for r in reports) == sum(len(a.prompt) for a in crowd())
    assert engine._host.free == 1000


def test_a_host_without_room_makes_it_compute_again() -> None:
    plain = serve(Engine(TINY, limits=ROOMY, **EXACT), crowd())
    for host_blocks in (0, 8):
        engine = Engine(TINY, limits=CRAMPED, preempt="swap", host_blocks=host_blocks, **EXACT)
        assert serve(engine, crowd()) == plain
        assert engine._host.free == host_blocks


def test_one_that_is_cancelled_while_swapped_leaves_nothing_on_the_host() -> None:
    engine = Engine(TINY, limits=CRAMPED, preempt="swap", **EXACT)
    for ask in crowd():
        engine.add(ask.prompt, max_tokens=ask.max_tokens, ignore_eos=True)
    swapped: tuple[int, ...] = ()
    while not swapped:
        swapped = engine.step().preempted
    assert engine._host.free < engine._host.blocks
    for request in swapped:
        engine.cancel(request)
    assert engine._host.free == engine._host.blocks


def test_another_way_to_preempt_is_refused() -> None:
    with pytest.raises(UnknownName, match="way to preempt"):
        Engine(TINY, limits=ROOMY, preempt="swop")  # type: ignore[arg-type]


# ---------------------------------------------------------------- steps that fail


class Broken(Exception):
    """What a model raises here."""


class Breaking:
    """A model that fails one time in four, after it has written some of its K and V, or rubbish."""

    def __init__(self, model: Any, rng: np.random.Generator) -> None:
        self._model, self._rng, self.failed = model, rng, 0

    def forward(self, step: Any, cache: Any) -> torch.Tensor:
        """Fail or compute."""
        if self._rng.random() < 0.25:
            self.failed += 1
            if self._rng.random() < 0.5:
                self._model.forward(step, cache)
            else:
                cache.raw.index_fill_(1, torch.from_numpy(np.unique(step.slots // cache.block_tokens)).long(), 63)
            raise Broken
        return self._model.forward(step, cache)  # type: ignore[no-any-return]


@pytest.mark.parametrize("feature", FEATURES)
def test_a_step_that_fails_can_be_tried_again(feature: str) -> None:
    """No request is half-updated: each gets, in the end, exactly what it gets without failures, sampled ones included."""
    warm = sampling(temperature=0.8, seed=3) if feature not in ("draft", "all") else sampling()
    asks = [*crowd(), Ask((5, 6, 5, 6, 5, 6), 25, warm)]
    plain = serve(Engine(TINY, limits=ROOMY, **EXACT), asks)
    engine = Engine(TINY, limits=CRAMPED, **FEATURES[feature], **EXACT)
    engine._model = breaking = Breaking(engine._model, np.random.default_rng(2))  # type: ignore[assignment]
    assert serve(engine, asks) == plain
    assert breaking.failed > 5
    assert engine.free_blocks == CRAMPED.blocks
    assert engine._host.free == engine._host.blocks


# ---------------------------------------------------------------- static batches


def test_nobody_joins_a_static_batch_that_has_begun() -> None:
    engine = Engine(TINY, limits=ROOMY._replace(max_seqs=2), static_batches=True, **EXACT)
    ids = [engine.add((1, 2, 3), max_tokens=n, ignore_eos=True) for n in (2, 6, 3, 3)]
    got: list[set[int]] = []
    while engine.busy:
        got.append({request for request, _ in engine.step().tokens})
    first, second = set(ids[:2]), set(ids[2:])
    assert got == [first, first, *[{ids[1]}] * 4, second, second, second]


# ---------------------------------------------------------------- leaks


def test_thousands_of_requests_leave_nothing_behind() -> None:
    """Prefix hits, preemptions, swaps, guesses, cancels and failing steps: afterwards every table is as empty as before."""
    rng = np.random.default_rng(4)
    engine = Engine(TINY, limits=CRAMPED, **FEATURES["all by ngram"], **EXACT)
    model, stem = engine._model, rng.integers(0, 256, 20).tolist()
    assert isinstance(engine._drafter, TextDrafter)
    files, sizes = open_files(), []
    for _ in range(6):
        engine._model = Breaking(model, rng) if rng.random() < 0.5 else model  # type: ignore[assignment]
        for _ in range(60):
            request = engine.add([*stem[: rng.integers(1, 20)], *rng.integers(0, 256, 4).tolist()], max_tokens=int(rng.integers(1, 9)))
            if rng.random() < 0.2:
                engine.cancel(request)
            if rng.random() < 0.3:
                serve(engine, [])
        serve(engine, [])
        assert (engine.free_blocks, engine._host.free) == (CRAMPED.blocks, engine._host.blocks)
        tables: tuple[Sized, ...] = (engine._by_id, engine._by_row, engine._tokens, engine._drafter._lookups)
        assert [len(table) for table in tables] == [0, 0, 0, 0]
        sizes.append((engine._state.arrays.prefixes.shape, engine._state.arrays.rows.shape, len(engine._state.numbers)))
    assert max(shape[0][1] for shape in sizes) <= 512, "numbers of some 2,000 blocks are not used again"
    assert len({shape[1] for shape in sizes}) == 1
    assert open_files() == files
