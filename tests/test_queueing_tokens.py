"""The simulator of token generation: the truth table, requests worked by hand, steps taken singly, and replications that stop in time."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.jit import HAVE_NUMBA
from mlsys_bench.queueing.des.events import simulator
from mlsys_bench.queueing.des.streams import arrival_times
from mlsys_bench.queueing.des.tokens import lengths, saturated
from mlsys_bench.queueing.des.tokens import simulate as tokens
from mlsys_bench.queueing.des.tokens_replicate import replicate_tokens, saturation
from mlsys_bench.queueing.laws import Deterministic, Exponential, Law, Lognormal, parse_law
from mlsys_bench.queueing.station import Tokens
from mlsys_bench.queueing.times import Floats
from tests import truth_table

# ---------------------------------------------------------------- the truth table


def published_tokens(parameters: str) -> Tokens:
    p = dict(part.split("=", 1) for part in parameters.split(";"))

    def law(text: str) -> tuple[Law, tuple[int, int]]:
        found = re.fullmatch(r"([^,]+),mean (\d+)(?:,rounded,clipped to (\d+)\.\.(\d+))?", text)
        assert found
        return parse_law(found[1], float(found[2])), (int(found[3] or 1), int(found[4] or 10**9))

    (prompt, prompt_range), (output, output_range) = law(p["prompt"]), law(p["output"])
    return Tokens(
        arrivals=Exponential(1 / float(p["lambda"])),
        prompt_tokens=prompt,
        output_tokens=output,
        prompt_range=prompt_range,
        output_range=output_range,
        fixed_s=float(p["a0"]),
        per_sequence_s=float(p["b0"]),
        per_kv_token_s=float(p["k0"]),
        per_prompt_token_s=float(p["pf"]),
        max_batch=int(p["max_batch"]),
        kv_tokens=float(p["kv_tokens"]),
    )


def test_tokens_reproduce_the_truth_table() -> None:
    """Within max(2 %, 1.5 precisions) and 1.5 times their own 95 % interval; the row whose load exceeds its KV pool is refused."""
    checked, wrong = 0, []
    for parameters, rows in truth_table.by_parameters("LLM").items():
        system = published_tokens(parameters)
        if rows[0][0] == "stable":
            with pytest.raises(Overload, match="1\\.7"):
                saturation(system)
            checked += 1
            continue
        found = replicate_tokens(system, half_width=0.25 if HAVE_NUMBA else 2.0, budget_s=300.0, seed=1)
        for quantity, value, precision in rows:
            checked += 1
            if quantity == "time_avg_batch":
                got, (low, high) = found.mean_batch, found.mean_batch_interval
            else:
                name, stat = quantity.split("_")
                law = {"ttft": found.ttft, "e2e": found.e2e, "itl": found.itl}[name]
                assert law is not None
                got = law.mean_s if stat == "mean" else law.quantile_s(int(stat[1:]) / 100)
                low, high = law.mean_interval_s() if stat == "mean" else law.interval_s(int(stat[1:]) / 100)
            if abs(got - value) > max(0.02 * value, 1.5 * precision) + 1.5 * (high - low) / 2:
                wrong.append((parameters[:40], quantity, value, got, high - low))
    assert checked == 48
    assert wrong == []


SMALL = (
    "max_batch=8;kv_tokens=3000;a0=8;b0=0.25;k0=0.001;pf=0.02;lambda=0.004;"
    "prompt=logn:1,mean 300,rounded,clipped to 1..1200;output=logn:1,mean 60,rounded,clipped to 1..500"
)


# ---------------------------------------------------------------- by hand


def one_at_a_time() -> Tokens:
    """Return a prompt of 2 and an output of 3 tokens each second: steps of 0.1 + 0.02 + 0.1, 0.1 + 0.03 and 0.1 + 0.04 s."""
    return Tokens(
        arrivals=Deterministic(1.0),
        prompt_tokens=Deterministic(2.0),
        output_tokens=Deterministic(3.0),
        prompt_range=(1, 9),
        output_range=(1, 9),
        fixed_s=0.1,
        per_sequence_s=0.0,
        per_kv_token_s=0.01,
        per_prompt_token_s=0.05,
        max_batch=8,
        kv_tokens=9,
    )


def test_a_lone_request_is_prefilled_in_its_first_step_and_decoded_in_the_rest() -> None:
    visits = tokens(one_at_a_time(), np.random.default_rng(0), 1, 200, 100)
    assert visits.wait_s[0] == pytest.approx(np.zeros(200), abs=1e-9)
    assert visits.ttft_s[0] == pytest.approx(np.full(200, 0.22))
    assert visits.sojourn_s[0] == pytest.approx(np.full(200, 0.49))
    assert visits.tpot_s[0] == pytest.approx(np.full(200, 0.135))
    assert (visits.itl_mean_s[0], visits.batch[0]) == pytest.approx((0.135, 0.49))
    assert visits.itl_counts[0].sum() == 2 * 100


def test_a_pool_for_one_request_serves_one_at_a_time() -> None:
    """Two of five tokens each do not fit nine: the second waits however many slots are free."""
    assert saturated(one_at_a_time(), np.random.default_rng(0), 1, 1000)[0] == pytest.approx(1 / 0.49)
    with pytest.raises(BadInput, match="never fits"):
        tokens(dataclasses.replace(one_at_a_time(), kv_tokens=4), np.random.default_rng(0), 1, 10)


# ---------------------------------------------------------------- against a naive simulator


def stepwise(system: Tokens, rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
    """Return TTFT and E2E by taking every step singly."""
    first, second, _ = rng.spawn(3)
    count = n + n // 20 + 200 + 2 * system.max_batch
    arrive = arrival_times(system.arrivals, first, 1, count)[0]
    prompt, output = (
        lengths(law, one, (1, count), clip)[0]
        for law, one, clip in zip(
            (system.prompt_tokens, system.output_tokens), second.spawn(2), (system.prompt_range, system.output_range), strict=True
        )
    )
    ttft, e2e, t, at = np.zeros(count), np.zeros(count), 0.0, 0
    made = dict[int, int]()  # tokens so far of those running
    while (e2e[:n] == 0).any():
        if not made:
            t = max(t, arrive[at])
        new = []
        while at < count and arrive[at] <= t and len(made) < system.max_batch:
            if sum(prompt[i] + output[i] for i in [*made, at]) > system.kv_tokens:
                break
            made[at] = 0
            new.append(at)
            at += 1
        kv = sum(prompt[i] + made[i] for i in made)
        t += system.fixed_s + system.per_sequence_s * len(made) + system.per_kv_token_s * kv + system.per_prompt_token_s * sum(prompt[new])
        for i in new:
            ttft[i] = t - arrive[i]
        for i in list(made):
            made[i] += 1
            if made[i] == output[i]:
                e2e[i] = t - arrive[i]
                del made[i]
    return ttft[:n], e2e[:n]


@pytest.mark.parametrize(("kv_tokens", "per_kv"), [(1e9, 0.0), (3000.0, 2e-3)])
def test_steps_taken_in_one_go_are_the_steps_taken_singly(kv_tokens: float, per_kv: float) -> None:
    system = dataclasses.replace(
        published_tokens(SMALL),
        arrivals=Exponential(400.0),
        output_tokens=Lognormal(1.5, 30.0),
        max_batch=6,
        kv_tokens=kv_tokens,
        per_kv_token_s=per_kv,
    )
    visits = tokens(system, np.random.default_rng(3), 1, 800)
    ttft, e2e = stepwise(system, np.random.default_rng(3), 800)
    assert visits.ttft_s[0] == pytest.approx(ttft, rel=1e-7)
    assert visits.sojourn_s[0] == pytest.approx(e2e, rel=1e-7)


# ---------------------------------------------------------------- replications


def test_replications_stop_at_the_asked_width_and_say_how_wide_they_are() -> None:
    system = dataclasses.replace(published_tokens(SMALL), arrivals=Exponential(2000.0))
    found = replicate_tokens(system, half_width=0.1, budget_s=20.0)
    assert found.reached
    assert found.half_width <= 0.1
    low, high = found.ttft.interval_s(0.95)
    assert low < found.ttft.quantile_s(0.95) < high
    assert found.ttft.p_over(found.ttft.quantile_s(0.95)) == pytest.approx(0.05, abs=1e-3)
    assert found.itl is not None
    assert found.itl.quantile_s(0.5) >= system.fixed_s + system.per_sequence_s
    assert found.tpot is not None
    assert found.tpot.mean_s == pytest.approx(found.itl.mean_s, rel=0.05)


def test_more_requests_than_a_replica_ends_are_refused_with_the_number_that_would_do() -> None:
    system = dataclasses.replace(one_at_a_time(), arrivals=Exponential(0.2))
    with pytest.raises(Overload) as refused:
        replicate_tokens(system)
    assert refused.value.utilisation == pytest.approx(5 * 0.49, rel=1e-3)
    assert refused.value.enough == 3


# ---------------------------------------------------------------- what cannot be simulated


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_batch": 0}, "at least one slot"),
        ({"fixed_s": 0.0}, "takes no time"),
        ({"per_kv_token_s": -1.0}, "negative"),
        ({"output_range": (0, 4)}, "at 1 token"),
    ],
)
def test_systems_that_cannot_run_are_refused_in_words(changes: dict[str, float], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        simulator(dataclasses.replace(one_at_a_time(), **changes))(np.random.default_rng(0), 1, 10)  # type: ignore[arg-type]
