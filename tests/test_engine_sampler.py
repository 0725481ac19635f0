"""Greedy, temperature, nucleus: what is drawn, how often, and from which random numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mlsys_bench.engine.sampler import Choice, choice, sample
from mlsys_bench.errors import BadInput

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -4.0])
DRAWS = 4000


def drawn(logits: torch.Tensor, *, temperature: float, top_p: float = 1.0, draws: int = DRAWS) -> torch.Tensor:
    """Return how often each token came: `draws` requests with seeds of their own, in one batch."""
    choices = [choice(temperature=temperature, top_p=top_p, seed=seed) for seed in range(draws)]
    return torch.bincount(torch.tensor(sample(logits.repeat(draws, 1), choices)), minlength=len(logits))


def greedy() -> Choice:
    return choice(temperature=0.0, top_p=1.0, seed=0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(temperature: float) -> None:
    """Chi-square against softmax(logits / temperature): a wrong temperature fails by hundreds, a right one in 1 of 1000 seeds."""
    expected = (LOGITS.double() / temperature).softmax(0) * DRAWS
    counts = drawn(LOGITS, temperature=temperature).double()
    enough = expected >= 5
    seen, want = counts[enough], expected[enough]
    want = want * seen.sum() / want.sum()
    assert stats.chisquare(seen.numpy(), want.numpy()).pvalue > 1e-3


def test_the_same_tokens_fail_the_test_for_another_temperature() -> None:
    """The check above can tell: counts of temperature 1 do not pass for 1.2."""
    wrong = (LOGITS.double() / 1.2).softmax(0) * DRAWS
    assert stats.chisquare(drawn(LOGITS, temperature=1.0).double().numpy(), wrong.numpy()).pvalue < 1e-6


def test_the_nucleus_is_renormalised() -> None:
    """The softmax is .54 .20 .12 ...: top_p 0.7 keeps two tokens, in the ratio e : 1."""
    p = LOGITS.double().softmax(0)
    assert p[0] < 0.7 < p[0] + p[1]
    counts = drawn(LOGITS, temperature=1.0, top_p=0.7)
    assert int(counts[2:].sum()) == 0
    assert stats.binomtest(int(counts[0]), DRAWS, float(p[0] / (p[0] + p[1]))).pvalue > 1e-3


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12), st.floats(1e-3, 1.0), st.floats(0.1, 3.0), st.integers(0, 2**31))
def test_nothing_outside_the_nucleus_is_picked(logits: list[float], top_p: float, temperature: float, seed: int) -> None:
    """The nucleus: a token is in it when the likelier ones together do not reach top_p."""
    row = torch.tensor(logits)
    token = sample(row[None], [choice(temperature=temperature, top_p=top_p, seed=seed)])[0]
    p = (row.double() / temperature).softmax(0)
    assert float(p[p > p[token]].sum()) < top_p + 1e-9


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=20, unique=True))
def test_greedy_takes_the_largest(logits: list[int]) -> None:
    assert sample(torch.tensor([logits]).float(), [greedy()]) == [logits.index(max(logits))]


def test_a_tiny_temperature_is_greedy() -> None:
    assert drawn(LOGITS, temperature=1e-3, draws=200).tolist() == [200, 0, 0, 0, 0, 0]


def test_what_is_impossible_is_never_drawn() -> None:
    logits = LOGITS.clone()
    logits[0] = logits[3] = -torch.inf
    counts = drawn(logits, temperature=2.0)
    assert counts[0] == counts[3] == 0


def test_a_request_draws_the_same_alone_and_in_company() -> None:
    """One draw per token from its own generator, so neighbours and their order do not matter."""
    rows = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))

    def stream(company: int) -> list[int]:
        mine, others = choice(temperature=1.0, top_p=0.95, seed=7), [choice(temperature=0.8, top_p=0.9, seed=i) for i in range(company)]
        return [sample(torch.cat([rows[:company], row[None]]), [*others, mine])[-1] for row in rows]

    alone = stream(0)
    assert len(set(alone)) > 1
    assert stream(1) == stream(4) == alone


def test_greedy_neighbours_are_not_disturbed() -> None:
    rows = LOGITS.repeat(3, 1)
    assert sample(rows, [greedy(), choice(temperature=5.0, top_p=1.0, seed=1), greedy()])[::2] == [0, 0]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong))):
        choice(**{"temperature": 1.0, "top_p": 1.0, "seed": 0, **wrong})  # type: ignore[arg-type]
