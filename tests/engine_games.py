"""Random schedules for an engine, and what every request in them must get: the answer it gets alone, in an engine without any features."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mlsys_bench import batching, models
from mlsys_bench.batching import Limits
from mlsys_bench.engine import Engine, default_limits
from mlsys_bench.engine.sampler import GREEDY, Sampling, sampling
from mlsys_bench.engine.speculate import DraftModel, NGram
from mlsys_bench.engine.tokenizer import EOS
from mlsys_bench.models import Architecture

TINY = models.counted(
    dataclasses.replace(models.find("nano"), id="tiny", layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=48, max_context=128)
)
TINIER = models.counted(dataclasses.replace(TINY, id="tinier", layers=1, heads=2, kv_heads=1, hidden=16, ffn=32))
MOST_PROMPT, MOST_OUTPUT = 40, 28

# what an engine is made with, by name; each is on top of random batches, chunks, blocks and preemption by recompute
FEATURES: dict[str, dict[str, Any]] = {
    "batched": {},
    "prefix": {"prefix_cache": True},
    "swap": {"preempt": "swap"},
    "ngram": {"speculative": NGram(drafts=3, shortest=1)},
    "draft": {"speculative": DraftModel(shape=TINIER, drafts=3)},
    "all": {"prefix_cache": True, "preempt": "swap", "speculative": DraftModel(shape=TINIER, drafts=2)},
    "all by ngram": {"prefix_cache": True, "preempt": "swap", "speculative": NGram(drafts=4, shortest=1)},
}


class Ask(NamedTuple):
    """A request."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = GREEDY
    ignore_eos: bool = True


class Answer(NamedTuple):
    """What came of it."""

    tokens: list[int]
    reason: str  # empty where it was cancelled


class Played(NamedTuple):
    """A schedule that was run: what was asked, by its place in the pool, and what came; and how often what happened."""

    answers: list[tuple[int, Answer]]
    did: dict[str, int]


def prompts(rng: np.random.Generator, count: int) -> list[tuple[int, ...]]:
    """Return prompts that begin alike, and such that repeat themselves."""
    stems = [rng.integers(97, 123, 32).tolist() for _ in range(3)]
    found = []
    for _ in range(count):
        stem = stems[rng.integers(3)][: rng.integers(0, 33)]
        own = rng.integers(97, 123, rng.integers(1, 9)).tolist() * int(rng.integers(1, 3))
        found.append(tuple([*stem, *own][:MOST_PROMPT]))
    return found


class Pool:
    """Requests with the answers they get alone, one after the other, in an engine that does nothing but compute."""

    def __init__(self, precision: str, *, asks: int = 40, seed: int = 0, **engine: Any) -> None:
        """Compute them.  `engine`: what all engines of this pool are made with."""
        rng = np.random.default_rng(seed)
        self.options = {"precision": precision, "threads": 1, "deterministic": True, **engine}
        self.shape: Architecture = self.options.pop("shape", TINY)
        self.asks: list[Ask] = []
        self.answers: list[Answer] = []
        alone = Engine(self.shape, limits=default_limits(self.shape, max_batch=1, max_context=128), **self.options)
        for prompt in prompts(rng, asks):
            ask = Ask(prompt, int(rng.integers(1, MOST_OUTPUT + 1)))
            kind = rng.integers(4)
            if kind == 0:
                ask = ask._replace(sampling=sampling(logit_bias={EOS: 4.0}, repetition_penalty=1.1), ignore_eos=False)
            answer = run_alone(alone, ask)
            text = alone.tokenizer.decode(answer.tokens)
            if kind == 1 and text:
                ask = ask._replace(sampling=sampling(stop=(text[len(text) // 2 :][:2],)))
                answer = run_alone(alone, ask)
            self.asks.append(ask)
            self.answers.append(answer)


def run_alone(engine: Engine, ask: Ask) -> Answer:
    """Return the answer of an engine that has nothing else to do."""
    engine.add(ask.prompt, max_tokens=ask.max_tokens, sampling=ask.sampling, ignore_eos=ask.ignore_eos)
    tokens: list[int] = []
    reason = ""
    while engine.busy:
        report = engine.step()
        tokens += [token for _, token in report.tokens]
        reason = report.finished[0][1] if report.finished else ""
    return Answer(tokens, reason)


@functools.cache
def pool(precision: str, backend: str = "auto") -> Pool:
    """Return the pool of a precision, in deterministic mode."""
    return Pool(precision, asks=40 if backend == "auto" else 12, backend=backend)


def limits(rng: np.random.Generator) -> Limits:
    """Return limits under which prompts come in chunks and sequences push each other out."""
    block_tokens = int(rng.integers(1, 9))
    return Limits(
        max_seqs=int(rng.integers(1, 9)),
        max_step_tokens=int(rng.integers(1, 48)),
        block_tokens=block_tokens,
        blocks=-(-int(rng.integers(MOST_PROMPT + MOST_OUTPUT, 112)) // block_tokens),
        max_context=128,
    )


def play(seed: int, pool: Pool, feature: str, requests: int = 6, prepare: Callable[[Engine], object] = lambda engine: None) -> Played:
    """Run one random schedule: arrivals, limits, cancels; and assert that nothing is lost.  prepare: what is done to its engine first."""
    rng = np.random.default_rng([seed, *feature.encode()])
    options = dict(FEATURES[feature])
    if options.get("preempt") == "swap":
        options["host_blocks"] = int(rng.integers(0, 200))
    guesser = options.get("speculative")
    if isinstance(guesser, DraftModel) and rng.random() < 0.7:  # right mostly; else it stays one that never is
        own = {"shape": pool.shape, "state_dict": pool.options.get("state_dict"), "precision": "int4g32"}
        options["speculative"] = dataclasses.replace(guesser, **own)
    engine = Engine(pool.shape, limits=limits(rng), **{**pool.options, **options})
    prepare(engine)
    coming = sorted(rng.integers(0, 16, requests).tolist())
    picked = rng.choice(len(pool.asks), requests).tolist()
    doomed = {i: int(rng.integers(1, 40)) for i in range(requests) if rng.random() < 0.15}  # request -> steps until it is cancelled
    ids: dict[int, int] = {}
    got: list[Answer] = [Answer([], "") for _ in range(requests)]
    did = dict.fromkeys(("steps", "mixed", "chunks", "preempted", "swapped", "hits", "drafted", "accepted", "cancelled"), 0)
    while len(ids) < requests or engine.busy:
        while len(ids) < requests and coming[len(ids)] <= did["steps"]:
            ask = pool.asks[picked[len(ids)]]
            ids[engine.add(ask.prompt, max_tokens=ask.max_tokens, sampling=ask.sampling, ignore_eos=ask.ignore_eos)] = len(ids)
        report = engine.step()
        for request, token in report.tokens:
            assert not got[ids[request]].reason, "a token after the end"
            got[ids[request]].tokens.append(token)
        for request, reason in report.finished:
            got[ids[request]] = got[ids[request]]._replace(reason=reason)
        for request, i in ids.items():
            if doomed.get(i) == did["steps"] - coming[i] and not got[i].reason:
                engine.cancel(request)
                did["cancelled"] += 1
        did["steps"] += 1
        did["mixed"] += report.features.prefill_tokens > 0 and report.features.decode_seqs > 0
        did["chunks"] += report.features.prefill_tokens > 0 and not report.tokens
        did["preempted"] += len(report.preempted)
        did["swapped"] += report.swapped
        did["drafted"] += report.drafted
        did["accepted"] += report.accepted
        if did["steps"] % 8 == 0:
            batching.check(engine._state, engine.limits)
    batching.check(engine._state, engine.limits)
    assert sum(not answer.reason for answer in got) == did["cancelled"], "a request has no end"
    assert engine.free_blocks == engine.limits.blocks, "a block is lost"
    assert engine._host.free == engine._host.blocks, "a block of the host is lost"
    did["hits"] = engine.prefix_hits
    return Played(list(zip(picked, got, strict=True)), did)


def wrong(played: Played, pool: Pool) -> int:
    """Return how many requests got something else than alone; one that was cancelled must have got the beginning of that."""
    count = 0
    for which, (tokens, reason) in played.answers:
        want = pool.answers[which]
        count += tokens != want.tokens[: len(tokens)] if not reason else (tokens, reason) != want
    return count
