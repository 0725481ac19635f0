"""Token for token, whatever is done with a request, its answer is the one it gets alone.  `proofs/engine_schedules.py` plays more."""

from __future__ import annotations

import functools

import pytest

from mlsys_bench.engine.native import library
from tests import engine_games as games

PLAYS = range(3)
WITHOUT_COMPILER = library.load() is None  # torch then computes token by token, which is slow: one schedule must do


@functools.cache
def tally(precision: str, feature: str, backend: str = "auto", plays: range = PLAYS) -> tuple[int, int, dict[str, int]]:
    """Return how many requests were played and how many got something else, and how often what happened."""
    pool = games.pool(precision, backend)
    played = [games.play(seed, pool, feature) for seed in plays]
    did = {name: sum(p.did[name] for p in played) for name in played[0].did}
    return sum(len(p.answers) for p in played), sum(games.wrong(p, pool) for p in played), did


@pytest.mark.skipif(WITHOUT_COMPILER, reason="no C compiler: the test below, in torch, is all")
@pytest.mark.parametrize("feature", games.FEATURES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_answers_do_not_depend_on_the_schedule(precision: str, feature: str) -> None:
    """Batched, paged, in chunks, preempted, from a prefix cache, swapped, guessed and verified, cancelled beside: in deterministic mode."""
    played, wrong, _ = tally(precision, feature)
    assert (played, wrong) == (6 * len(PLAYS), 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nor_do_they_where_torch_computes(precision: str) -> None:
    """Token by token, in deterministic mode."""
    played, wrong, _ = tally(precision, "all by ngram", "torch", range(1))
    assert (played, wrong) == (6, 0)


@pytest.mark.skipif(WITHOUT_COMPILER, reason="no C compiler")
def test_the_schedules_did_what_they_are_for() -> None:
    """Otherwise the test above would say little."""
    did = {feature: tally("fp32", feature)[2] for feature in games.FEATURES}
    assert sum(d["mixed"] for d in did.values()) > 50
    assert sum(d["chunks"] for d in did.values()) > 50
    assert sum(d["preempted"] for d in did.values()) > 20
    assert sum(d["cancelled"] for d in did.values()) > 5
    assert min(did[f]["hits"] for f in ("prefix", "all", "all by ngram")) > 20
    assert sum(did[f]["swapped"] for f in ("swap", "all", "all by ngram")) > 2
    assert min(did[f]["drafted"] for f in ("ngram", "draft", "all", "all by ngram")) > 20
    assert did["draft"]["accepted"] > 20
    assert did["draft"]["drafted"] - did["draft"]["accepted"] > 10
