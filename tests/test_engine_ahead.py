"""With the next step launched before the last one's tokens are read, every request gets what it gets alone, one step after the other."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from mlsys_bench import batching
from mlsys_bench.engine import Engine
from mlsys_bench.engine.flight import is_simple
from mlsys_bench.engine.requests import StepReport
from mlsys_bench.engine.sampler import GREEDY, sampling
from mlsys_bench.engine.tokenizer import ByteTokenizer
from tests import engine_games as games
from tests.launched_model import Handle, Launched


class Abrupt(ByteTokenizer):
    """A tokenizer in which every twelfth byte ends an answer, so that ends come in the middle."""

    ends = frozenset(range(0, 256, 12))


@functools.cache
def pool() -> games.Pool:
    """Return requests of every kind, with what an engine gives that computes nothing else and launches nothing."""
    made = games.Pool("fp32", asks=0, tokenizer=Abrupt())
    alone = Engine(made.shape, limits=games.limits(np.random.default_rng(0))._replace(blocks=128), **made.options)
    rng = np.random.default_rng(4)
    hows = (GREEDY, sampling(temperature=0.9, seed=7), sampling(temperature=2.0, seed=2**64 - 3), sampling(stop=("a", "Q")))
    odd = (sampling(logprobs=1), sampling(temperature=1.0, top_p=0.9, seed=1), sampling(repetition_penalty=1.2))
    for i, prompt in enumerate(games.prompts(rng, 48)):
        how = odd[i % 3] if i % 8 == 0 else hows[i % 4]
        ask = games.Ask(prompt, int(rng.integers(1, games.MOST_OUTPUT + 1)), how, ignore_eos=bool(i % 3))
        made.asks.append(ask)
        made.answers.append(games.run_alone(alone, ask))
    return made


def played(feature: str, seeds: range, pool: games.Pool, **engine: Any) -> Counter[str]:
    """Play schedules and return how often what happened; `wrong` counts requests that got something else than alone."""
    did: Counter[str] = Counter()
    for seed in seeds:
        models: list[Launched] = []

        def prepare(made: Engine, seed: int = seed, models: list[Launched] = models) -> None:
            models.append(Launched(made, np.random.default_rng(seed)))
            made._ahead = engine.get("ahead", True)

        play = games.play(seed, pool, feature, prepare=prepare)
        did.update(play.did)
        did.update(wrong=games.wrong(play, pool), launched=models[0].launched, overlapping=models[0].overlapping)
    return did


@pytest.mark.parametrize("feature", ["batched", "prefix", "swap"])
def test_answers_are_those_of_steps_one_by_one(feature: str) -> None:
    """Chunks, preemption by both ways, shared prefixes, cancels, ends in the middle, and now and then a request only the host can serve."""
    did = played(feature, range(25), pool())
    assert did["wrong"] == 0
    assert did["overlapping"] > did["steps"] / 5
    assert min(did["preempted"], did["chunks"], did["mixed"], did["cancelled"]) > 5


def test_without_requests_for_the_host_nearly_every_step_is_launched_ahead() -> None:
    simple = games.Pool("fp32", asks=0, tokenizer=Abrupt())
    kept = [(ask, answer) for ask, answer in zip(pool().asks, pool().answers, strict=True) if is_simple(ask.sampling)]
    simple.asks, simple.answers = [ask for ask, _ in kept], [answer for _, answer in kept]
    did = played("prefix", range(12), simple)
    assert did["wrong"] == 0
    assert did["overlapping"] > 0.9 * (did["launched"] - 12)
    waits = played("prefix", range(4), simple, ahead=False)
    assert (waits["wrong"], waits["overlapping"]) == (0, 0)


def engine_of(**options: Any) -> tuple[Engine, Launched]:
    made = Engine(games.TINY, limits=games.limits(np.random.default_rng(1))._replace(max_seqs=4, max_step_tokens=64), ahead=True, **options)
    return made, Launched(made, np.random.default_rng(0))


def test_an_end_is_found_one_step_late_and_its_surplus_token_is_nobodys() -> None:
    prompt = pool().asks[1].prompt
    plain = Engine(games.TINY, limits=games.default_limits(games.TINY, max_batch=1, max_context=128))
    want = games.run_alone(plain, games.Ask(prompt, 20)).tokens
    at = next(i for i, token in enumerate(want) if i >= 3 and token not in want[:i])

    class Ending(ByteTokenizer):
        ends = frozenset({want[at]})

    engine, model = engine_of(tokenizer=Ending())
    request = engine.add(prompt, max_tokens=20)
    reports = []
    while engine.busy:
        reports.append(engine.step())
    assert [t for r in reports for t in r.tokens] == [(request, t) for t in want[: at + 1]]
    assert reports[-1].finished == ((request, "stop"),)
    assert model.launched == at + 2, "one more than it has tokens"
    assert engine.free_blocks == engine.limits.blocks
    batching.check(engine._state, engine.limits)
    again = engine.add(prompt, max_tokens=at)
    first = engine.step()
    assert first.tokens == ((again, want[0]),), "the step for nobody is not reported"


def test_the_last_token_by_length_gives_its_seat_to_the_next_request_at_once() -> None:
    """Two requests and one seat: the second one's prompt is computed in the step after the first one's last."""
    engine, model = engine_of()
    engine.limits = engine.limits._replace(max_seqs=1)
    ids = [engine.add((65, 66, 67), max_tokens=3, ignore_eos=True) for _ in range(2)]
    got = []
    while engine.busy:
        got.append(engine.step().tokens[0][0])
    assert got == [ids[0]] * 3 + [ids[1]] * 3
    assert (model.launched, model.overlapping) == (6, 5)


class Failing:
    """The model, but now and then a launch of it raises, or the reading of its tokens."""

    def __init__(self, model: Launched, rng: np.random.Generator, when: str) -> None:
        self.model, self.rng, self.when, self.failed = model, rng, when, 0
        self.backend, self.weights, self.forward, self.choose = model.backend, model.weights, model.forward, model.choose

    def may_fail(self, now: str) -> None:
        """Raise now and then, where that is when it may."""
        if now == self.when and self.rng.random() < 0.15:
            self.failed += 1
            raise ArithmeticError

    def launch(self, *work: Any) -> Unsure:
        """Launch, or raise."""
        self.may_fail("launch")
        return Unsure(self, self.model.launch(*work))


@dataclass
class Unsure:
    """A handle whose tokens cannot always be read."""

    model: Failing
    handle: Handle

    def tokens(self) -> list[int]:
        """Read, or raise."""
        self.model.may_fail("tokens")
        return self.handle.tokens()


def stubborn(step: Callable[[], StepReport]) -> StepReport:
    """Try a step until it succeeds."""
    while True:
        try:
            return step()
        except ArithmeticError:
            continue


@pytest.mark.parametrize("when", ["launch", "tokens"])
def test_a_step_that_fails_is_tried_again_with_nothing_lost(when: str) -> None:
    """A launch fails: tokens of the step before are read first, then all is computed anew.  Reading fails: it is read again."""
    models: list[Failing] = []

    def prepare(engine: Engine) -> None:
        rng = np.random.default_rng(len(models))
        models.append(Failing(Launched(engine, rng), rng, when))
        engine._ahead, engine._model = True, models[-1]
        engine.step = functools.partial(stubborn, engine.step)  # type: ignore[method-assign]

    assert sum(games.wrong(games.play(seed, pool(), "prefix", prepare=prepare), pool()) for seed in range(6)) == 0
    assert all(model.failed for model in models)


def test_tokens_under_way_come_even_where_no_further_step_can_be_launched() -> None:
    engine, model = engine_of()
    request = engine.add((65, 66), max_tokens=6, ignore_eos=True)
    launch, got = model.launch, [token for _ in range(2) for token in engine.step().tokens]

    def broken(*work: Any) -> Handle:
        raise ArithmeticError

    model.launch = broken  # type: ignore[method-assign]
    with pytest.raises(ArithmeticError):
        engine.step()
    got += engine.step().tokens
    with pytest.raises(ArithmeticError):
        engine.step()
    assert len(got) == 3, "the step that was under way has told its token"
    model.launch = launch  # type: ignore[method-assign]
    while engine.busy:
        got += engine.step().tokens
    want = games.run_alone(engine_of()[0], games.Ask((65, 66), 6)).tokens
    assert got == [(request, token) for token in want]


def test_a_request_may_take_the_row_of_one_whose_last_token_is_still_under_way() -> None:
    engine, model = engine_of()
    failing = engine._model = Failing(model, np.random.default_rng(0), "tokens")
    engine.add((65, 66), max_tokens=2, ignore_eos=True)
    stubborn(engine.step)
    failing.rng = np.random.default_rng(next(s for s in range(100) if np.random.default_rng(s).random() < 0.15))
    with pytest.raises(ArithmeticError):
        engine.step()
    failing.when = "never"
    later = engine.add((70, 71), max_tokens=2, ignore_eos=True)
    tokens = [token for _ in range(3) for token in engine.step().tokens]
    assert [i for i, _ in tokens] == [0, later, later]
    assert not engine.busy
    assert engine.free_blocks == engine.limits.blocks
