"""The choice of tokens: what is drawn, how often, from which random numbers, and how likely the model found it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from mlsys_bench.engine.sampler import GREEDY, Sampling, distribution, draw, sample, sampling, uniforms
from mlsys_bench.engine.sampling import PENALTIES
from mlsys_bench.errors import BadInput

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -4.0])
DRAWS = 20_000


class Row(NamedTuple):
    """A request: `given` of its tokens are the prompt."""

    sampling: Sampling = GREEDY
    seed: int = 0
    tokens: Sequence[int] = ()
    given: int = 0


def drawn(logits: torch.Tensor, how: Sampling, draws: int = DRAWS, **row: Any) -> torch.Tensor:
    """Return how often each token came: `draws` requests with seeds of their own, in one batch."""
    rows = [Row(how, seed, **row) for seed in range(draws)]
    return torch.bincount(torch.tensor(sample(logits.repeat(draws, 1), rows).tokens), minlength=len(logits))


def by_hand(logits: Sequence[float], how: Sampling, answer: Sequence[int] = (), prompt: Sequence[int] = ()) -> list[float]:
    """Return the probabilities one after the other, in plain Python: bias, penalties, temperature, min-p, top-k, top-p."""
    x = [v + dict(how.logit_bias).get(i, 0.0) for i, v in enumerate(logits)]
    for i in {*answer, *prompt}:
        x[i] = x[i] / how.repetition_penalty if x[i] > 0 else x[i] * how.repetition_penalty
    x = [v - list(answer).count(i) * how.frequency_penalty - (i in answer) * how.presence_penalty for i, v in enumerate(x)]
    p = [math.exp((v - max(x)) / how.temperature) for v in x]
    p = [v if v >= how.min_p * max(p) else 0.0 for v in p]
    if how.top_k:
        p = [v if v >= sorted(p)[-how.top_k :][0] else 0.0 for v in p]
    if how.top_p < 1.0:
        p = [v if sum(o for o in p if o > v) < how.top_p * sum(p) else 0.0 for v in p]
    return [v / sum(p) for v in p]


# ---------------------------------------------------------------- how often

HOWS = {
    "temperature 0.5": sampling(temperature=0.5),
    "temperature 1": sampling(temperature=1.0),
    "temperature 2": sampling(temperature=2.0),
    "top-p": sampling(temperature=1.0, top_p=0.7),
    "top-k": sampling(temperature=1.0, top_k=3),
    "min-p": sampling(temperature=1.0, min_p=0.15),
    "all filters": sampling(temperature=1.5, top_k=5, top_p=0.9, min_p=0.05),
    "repetition": sampling(temperature=1.0, repetition_penalty=1.5),
    "presence and frequency": sampling(temperature=1.0, presence_penalty=0.3, frequency_penalty=0.4),
    "bias": sampling(temperature=1.0, logit_bias={5: 4.0, 0: -100.0}),
}


@pytest.mark.parametrize("name", HOWS)
def test_tokens_come_as_often_as_they_should(name: str) -> None:
    """Chi-square of 20,000 draws against probabilities computed by hand: one in a thousand fails by chance, and the seeds are fixed."""
    tokens = (1, 1, 4, 0, 1)
    expected = torch.tensor(by_hand(LOGITS.tolist(), HOWS[name], answer=tokens[2:], prompt=tokens[:2])) * DRAWS
    counts = drawn(LOGITS, HOWS[name], tokens=tokens, given=2)
    assert int(counts[expected == 0].sum()) == 0, "what is filtered out never comes"
    enough = expected >= 5
    assert int(enough.sum()) > 1
    seen, want = counts[enough].double(), expected[enough].double()
    assert stats.chisquare(seen.numpy(), (want * seen.sum() / want.sum()).numpy()).pvalue > 1e-3


def test_the_same_tokens_fail_the_test_for_another_temperature() -> None:
    """The check above can tell: counts of temperature 1 do not pass for 1.1."""
    wrong = (LOGITS.double() / 1.1).softmax(0) * DRAWS
    assert stats.chisquare(drawn(LOGITS, HOWS["temperature 1"]).double().numpy(), wrong.numpy()).pvalue < 1e-6


logits_of = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12)
hows = st.builds(
    sampling,
    temperature=st.floats(0.1, 3.0),
    top_p=st.floats(1e-3, 1.0),
    top_k=st.integers(0, 15),
    min_p=st.floats(0.0, 1.0),
    repetition_penalty=st.floats(0.5, 2.0),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
)


@settings(max_examples=80)
@given(st.data(), st.lists(st.tuples(logits_of, hows), min_size=1, max_size=3))
def test_the_distribution_is_what_plain_python_says(data: st.DataObject, asked: list[tuple[list[float], Sampling]]) -> None:
    """Any mixture of settings in one batch, row by row; cases where rounding decides what is kept are passed over."""
    batch = torch.full((len(asked), 12), -1e9)
    rows, wants = [], []
    for i, (logits, how) in enumerate(asked):
        batch[i, : len(logits)] = torch.tensor(logits)
        tokens = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=6))
        rows.append(Row(how, i, tokens, data.draw(st.integers(0, len(tokens)))))
        answer, prompt = tokens[rows[-1].given :], tokens[: rows[-1].given]
        open_p = sorted(by_hand(logits, dataclasses.replace(how, top_p=1.0, top_k=0, min_p=0.0), answer, prompt))
        assume(all(b - a > 1e-4 * b for a, b in itertools.pairwise(open_p)))
        looser = dataclasses.replace(how, top_p=min(how.top_p * 1.0001, 1.0), min_p=how.min_p * 0.9999)
        stricter = dataclasses.replace(how, top_p=how.top_p * 0.9999, min_p=min(how.min_p * 1.0001, 1.0))
        wants.append(by_hand(logits, how, answer, prompt))
        assume(all(by_hand(logits, near, answer, prompt).count(0.0) == wants[-1].count(0.0) for near in (looser, stricter)))
    p = distribution(batch, rows)
    for got, want in zip(p, wants, strict=True):
        assert got.tolist() == pytest.approx(want + [0.0] * (12 - len(want)), abs=1e-5)


coldest_and_oddest = st.builds(
    sampling,
    temperature=st.sampled_from([0.0, 1e-300, 1e-5, 2.0]),
    top_p=st.sampled_from([1e-300, 0.5, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 2**62]),
    min_p=st.sampled_from([0.0, 1e-300, 1.0]),
    repetition_penalty=st.sampled_from([PENALTIES[0], 1.0, PENALTIES[1]]),
    presence_penalty=st.sampled_from([-2.0, 0.0, 2.0]),
    logit_bias=st.dictionaries(st.integers(0, 4999), st.sampled_from([-100.0, 100.0]), max_size=2),
    logprobs=st.sampled_from([None, 3]),
)


@given(st.lists(coldest_and_oddest, min_size=1, max_size=3), st.sampled_from([5, 300, 5000]), st.integers(0, 2**31))
def test_whatever_may_be_asked_a_token_is_chosen_that_can_be(hows: list[Sampling], vocab: int, seed: int) -> None:
    """A setting that leaves no probabilities would end the engine, and with it everybody's answers."""
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(0, 30, (len(hows), vocab)).astype(np.float32))
    logits[:, random.integers(0, vocab, 2)] = -math.inf
    rows = [Row(how, seed, random.integers(0, vocab, 20).tolist(), 10) for how in hows]
    tokens = sample(logits, rows).tokens
    assert all(logits[i, token] > -math.inf for i, token in enumerate(tokens))
    assert distribution(logits, rows).sum(dim=1).tolist() == pytest.approx([1.0] * len(hows))


@given(logits_of, st.floats(1e-3, 1.0), st.floats(0.1, 3.0), st.integers(0, 2**31))
def test_nothing_outside_the_nucleus_is_picked(logits: list[float], top_p: float, temperature: float, seed: int) -> None:
    """The nucleus: a token is in it when the likelier ones together do not reach top_p."""
    row = torch.tensor(logits)
    token = sample(row[None], [Row(sampling(temperature=temperature, top_p=top_p), seed)]).tokens[0]
    p = (row.double() / temperature).softmax(0)
    assert float(p[p > p[token] * (1 + 1e-6)].sum()) < top_p + 1e-6


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.integers(1, 25), st.integers(0, 100))
def test_top_k_keeps_k_tokens_and_those_equal_to_the_last(logits: list[int], k: int, seed: int) -> None:
    token = sample(torch.tensor([logits]).float(), [Row(sampling(temperature=2.0, top_k=k), seed)]).tokens[0]
    assert logits[token] >= sorted(logits, reverse=True)[: min(k, len(logits))][-1]


def test_a_large_vocabulary_is_drawn_from_as_its_distribution_says() -> None:
    """Two thousand tokens, more than the shortlist; filters keep few, many, or all.  Chi-square over the first 30 and bins of 10."""
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(5)) * 1.5
    for how in (
        sampling(temperature=1.0),
        sampling(temperature=0.5, top_p=0.5),  # some 60 tokens
        sampling(temperature=1.0, top_p=0.95),  # some 1,000
        sampling(temperature=1.0, top_k=100),
        sampling(temperature=2.0, top_k=1500, top_p=0.99),
        sampling(temperature=1.0, min_p=0.1),
        sampling(temperature=3.0, min_p=0.05, top_p=0.9),
    ):
        p = distribution(logits[None], [Row(how)])[0].double()
        tokens = [sample(logits.repeat(500, 1), [Row(how, seed) for seed in range(at, at + 500)]).tokens for at in range(0, 2500, 500)]
        counts = torch.bincount(torch.tensor(tokens).flatten(), minlength=2000).double()
        assert float(counts[p == 0].sum()) == 0
        order = p.argsort(descending=True)
        seen, want = (torch.stack([part.sum() for part in torch.split(v[order], [1] * 30 + [10] * 197)]) for v in (counts, p * 2500))
        enough = want >= 5
        assert stats.chisquare(seen[enough].numpy(), (want[enough] * seen[enough].sum() / want[enough].sum()).numpy()).pvalue > 1e-3


@settings(max_examples=20)
@given(st.lists(st.integers(0, 3), min_size=260, max_size=300), st.integers(1, 300), st.floats(0.01, 1.0), st.integers(0, 50))
def test_ties_and_filters_beyond_the_shortlist_keep_what_they_should(logits: list[int], k: int, top_p: float, seed: int) -> None:
    """Few different logits among many tokens: what is drawn is in the distribution, whose support is thresholds'."""
    x = torch.tensor([logits]).float()
    how = sampling(temperature=1.0, top_k=k, top_p=top_p)
    p = distribution(x, [Row(how)])[0]
    assert p.tolist() == pytest.approx(by_hand(logits, how), abs=1e-5)
    assert p[sample(x, [Row(how, seed)]).tokens[0]] > 0


def test_a_nucleus_beyond_the_shortlist_is_found_all_the_same() -> None:
    """Ten thousand tokens about equally likely: the nucleus of 0.9 is some nine thousand of them, beside a row whose nucleus is three."""
    flat = torch.randn(10_000, generator=torch.Generator().manual_seed(1)) * 0.01
    peaked = torch.full((10_000,), -50.0)
    peaked[:3] = torch.tensor([3.0, 2.5, 2.0])
    rows = [Row(sampling(temperature=1.0, top_p=0.9), i) for i in range(2)]
    p = distribution(torch.stack([flat, peaked]), rows).double()
    kept = flat.double().softmax(0)[p[0] > 0]
    assert 0.9 <= float(kept.sum()) < 0.9 + 2e-4
    assert float(kept.sum() - kept.min()) < 0.9
    assert int((p[1] > 0).sum()) == 3


# ---------------------------------------------------------------- the likeliest


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=20, unique=True))
def test_greedy_takes_the_largest(logits: list[int]) -> None:
    assert sample(torch.tensor([logits]).float(), [Row()]).tokens == [logits.index(max(logits))]


def test_a_tiny_temperature_is_greedy() -> None:
    for temperature in (1e-3, 1e-30, 5e-324):
        assert drawn(LOGITS, sampling(temperature=temperature), draws=200).tolist() == [200, 0, 0, 0, 0, 0]


def test_what_is_impossible_is_never_drawn() -> None:
    logits = LOGITS.clone()
    logits[0] = logits[3] = -torch.inf
    counts = drawn(logits, sampling(temperature=2.0, top_p=0.999, min_p=1e-6, repetition_penalty=2.0), tokens=(0, 3, 4), given=1)
    assert counts[0] == counts[3] == 0
    assert counts[4] > 0


def test_greedy_neighbours_are_not_disturbed() -> None:
    rows = [Row(), Row(sampling(temperature=5.0), 1), Row()]
    assert sample(LOGITS.repeat(3, 1), rows).tokens[::2] == [0, 0]


def test_a_step_of_greedy_rows_is_one_argmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of what follows is even called."""
    for name in ("distribution", "uniforms", "_changed", "_choose"):
        monkeypatch.setattr(f"mlsys_bench.engine.sampler.{name}", None)
    assert sample(LOGITS.repeat(3, 1), [Row()] * 3) == ([0, 0, 0], ())


def test_penalties_move_the_likeliest() -> None:
    """2 - 3 x 0.4 < 1; and 2 / 2.5 < 1, where the prompt counts too."""
    often = Row(sampling(frequency_penalty=0.4), tokens=(3, 0, 0, 0), given=1)
    in_prompt = Row(sampling(presence_penalty=1.5), tokens=(0, 3), given=1)
    repeated = Row(sampling(repetition_penalty=2.5), tokens=(0, 3), given=1)
    wanted = Row(sampling(logit_bias={5: 7.0}))
    beyond = Row(sampling(logit_bias={600: 7.0}), tokens=(600,))
    assert sample(LOGITS.repeat(5, 1), [often, in_prompt, repeated, wanted, beyond]).tokens == [1, 0, 1, 5, 0]


def test_penalties_leave_the_models_logits_alone() -> None:
    logits = LOGITS.repeat(2, 1)
    sample(logits, [Row(sampling(repetition_penalty=2.5, logit_bias={1: 3.0}), tokens=(0,)), Row()])
    assert torch.equal(logits, LOGITS.repeat(2, 1))


# ---------------------------------------------------------------- random numbers


def test_a_request_draws_the_same_alone_and_in_company() -> None:
    """A number per token from seed and place, so neighbours and their order do not matter."""
    logits = torch.randn(5, 5000, generator=torch.Generator().manual_seed(0))

    def stream(company: int) -> list[int]:
        others = [Row(sampling(temperature=0.8, top_p=0.9, top_k=50 * i), seed=i) for i in range(company)]
        mine = [Row(sampling(temperature=1.0, top_p=0.95), seed=7, tokens=[0] * n) for n in range(5)]
        return [sample(torch.cat([logits[:company], row[None]]), [*others, me]).tokens[-1] for row, me in zip(logits, mine, strict=True)]

    alone = stream(0)
    assert len(set(alone)) > 1
    assert stream(1) == stream(4) == alone


def test_random_numbers_are_uniform_along_seeds_places_and_streams_and_do_not_follow_each_other() -> None:
    """Kolmogorov-Smirnov of 20,000 each way; lagged correlations within five standard errors."""
    for numbers in (
        uniforms([Row(seed=s) for s in range(DRAWS)]),
        uniforms([Row(seed=5, tokens=range(n)) for n in range(DRAWS)]),
        uniforms([Row(seed=2**64 - 1 - s, tokens=range(s % 7)) for s in range(DRAWS)], stream=2),
        np.array([uniforms([Row(seed=3)], stream=s)[0] for s in range(2000)]),
    ):
        assert stats.kstest(numbers, "uniform").pvalue > 1e-3
        for lag in (1, 2, 7):
            assert abs(np.corrcoef(numbers[lag:], numbers[:-lag])[0, 1]) < 5 / math.sqrt(len(numbers))


def test_known_random_numbers_stay_what_they_are() -> None:
    """Answers with a seed are repeatable from version to version: SplitMix64 in plain Python."""

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    for seed, place, stream in ((0, 0, 0), (1, 5, 0), (2**64 - 1, 3, 2), (-1 % 2**64, 3, 2)):
        by_hand = mix((mix(mix(seed) + stream) + (place + 1) * 0x9E3779B97F4A7C15) % 2**64)
        assert uniforms([Row(seed=seed, tokens=range(place))], stream)[0] == (by_hand >> 11) / 2**53


def test_draws_invert_the_distribution_function() -> None:
    p = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]]).repeat(5, 1)
    assert draw(p, np.array([0.0, 0.2499, 0.25, 0.7501, 1.0 - 2**-53])) == [0, 0, 2, 3, 3]
    assert draw(p[:1] * 4, np.array([0.9999])) == [3]  # weights need not add up to one


# ---------------------------------------------------------------- log-probabilities


def test_logprobs_are_of_the_models_own_distribution() -> None:
    """Whatever penalties and temperature do to the choice: the logarithms of the plain softmax, likeliest first."""
    how = sampling(temperature=0.7, logprobs=2, logit_bias={3: 50.0}, top_k=1)
    asked = [Row(), Row(how), Row(sampling(logprobs=0)), Row(sampling(logprobs=50))]
    tokens, logs = sample(LOGITS.repeat(4, 1), asked)
    want = LOGITS.double().log_softmax(0).tolist()
    none, biased, bare, every = logs
    assert tokens[1] == 3
    assert none is None
    assert biased
    assert bare
    assert every
    assert biased.chosen == pytest.approx(want[3], abs=1e-6)
    assert [t for t, _ in biased.top] == [0, 1]
    assert [v for _, v in biased.top] == pytest.approx(want[:2], abs=1e-6)
    assert bare.chosen == pytest.approx(want[0], abs=1e-6)
    assert bare.top == ()
    assert sum(math.exp(v) for _, v in every.top) == pytest.approx(1.0, abs=1e-5)


# ---------------------------------------------------------------- refusals, and peers


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -2}, {"min_p": -0.1},
        {"min_p": 1.1}, {"repetition_penalty": 0.0}, {"repetition_penalty": 1e-300},
        {"repetition_penalty": 1e300}, {"presence_penalty": float("inf")}, {"frequency_penalty": float("nan")},
        {"logprobs": -1}, {"logit_bias": {-1: 1.0}}, {"logit_bias": {1: float("nan")}}, {"stop": ("",)},
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong))):
        sampling(**wrong)


def test_all_of_the_vocabulary_is_said_with_zero_or_minus_one() -> None:
    assert sampling(top_k=-1) == sampling(top_k=0) == GREEDY


def test_filters_and_the_repetition_penalty_are_those_of_hugging_face() -> None:
    """Each alone, on random logits of a real vocabulary's size."""
    from transformers.generation import logits_process as hf

    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(3)) * 3
    prompt = torch.randint(0, 5000, (4, 40), generator=torch.Generator().manual_seed(4))
    for how, theirs in [
        (sampling(temperature=0.6), hf.TemperatureLogitsWarper(0.6)),
        (sampling(temperature=1.0, top_k=40), hf.TopKLogitsWarper(40)),
        (sampling(temperature=1.0, top_p=0.8), hf.TopPLogitsWarper(0.8)),
        (sampling(temperature=1.0, min_p=0.05), hf.MinPLogitsWarper(0.05)),
        (sampling(temperature=1.0, repetition_penalty=1.3), hf.RepetitionPenaltyLogitsProcessor(1.3)),
    ]:
        rows = [Row(how, 0, tokens.tolist(), given=30) for tokens in prompt]
        want = theirs(prompt, logits.clone()).softmax(-1)
        assert torch.allclose(distribution(logits, rows), want, atol=1e-6)


# ---------------------------------------------------------------- a tensor that is written again


def test_logits_written_into_the_same_tensor_are_read_anew() -> None:
    """The C engine gives its logits in one tensor for all steps, whose array is kept; another tensor has another array."""
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert sample(logits, [Row()]).tokens == [1]
    logits[0, 2] = 3.0
    assert sample(logits, [Row()]).tokens == [2]
    assert sample(torch.tensor([[5.0, 2.0, 1.0]]), [Row()]).tokens == [0]
