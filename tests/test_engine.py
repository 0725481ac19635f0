"""The engine as its users see it: requests in, tokens out, whatever else goes on."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from mlsys_bench import batching, models
from mlsys_bench.batching import Limits, StepPlan
from mlsys_bench.engine import Engine, StepReport, default_limits, memory, runner
from mlsys_bench.engine.engine import only_text
from mlsys_bench.engine.sampler import sampling
from mlsys_bench.engine.tokenizer import BOS, EOS, ByteTokenizer
from mlsys_bench.errors import BadInput, MlsysError, UnknownName

SHAPE = models.counted(
    dataclasses.replace(models.find("nano"), id="tiny", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, max_context=128)
)
ROOMY = default_limits(SHAPE, max_batch=16)


class Request(NamedTuple):
    """A prompt and how it is to be answered."""

    prompt: list[int]
    options: dict[str, Any]


def run(engine: Engine, requests: list[Request], arrive_at: list[int] | None = None) -> tuple[list[list[int]], list[str], list[StepReport]]:
    """Serve all, request i joining before step arrive_at[i]; return tokens and reason of each, and every step's report."""
    arrive_at = arrive_at or [0] * len(requests)
    order: dict[int, int] = {}
    tokens: list[list[int]] = [[] for _ in requests]
    reasons = [""] * len(requests)
    reports: list[StepReport] = []
    while len(order) < len(requests) or engine.busy:
        for i in (i for i, at in enumerate(arrive_at) if at == len(reports)):
            order[engine.add(requests[i].prompt, **requests[i].options)] = i
        reports.append(engine.step())
        for request, token in reports[-1].tokens:
            assert not reasons[order[request]], "a token after the end"
            tokens[order[request]].append(token)
        for request, reason in reports[-1].finished:
            reasons[order[request]] = reason
    return tokens, reasons, reports


def alone(request: Request) -> tuple[list[int], str]:
    """Return what one request gets that has the engine for itself, its prompt computed in one piece."""
    tokens, reasons, _ = run(Engine(SHAPE, limits=ROOMY), [request])
    return tokens[0], reasons[0]


def text(rng: np.random.Generator, tokens: int) -> list[int]:
    return [int(t) for t in rng.integers(0, 256, tokens)]


def test_who_has_priority_is_seated_first_and_all_get_what_they_get_alone() -> None:
    """One seat: the request that has it keeps it, then come those of priority -1, 2 (in order of arrival) and 5."""
    rng = np.random.default_rng(8)
    requests = [Request(text(rng, 20), {"max_tokens": 6, "ignore_eos": True, "priority": p}) for p in (5, 5, 2, -1, 2)]
    engine = Engine(SHAPE, limits=default_limits(SHAPE, max_batch=1))
    tokens, _, reports = run(engine, requests, [0, 1, 1, 2, 2])
    assert [request for report in reports for request, _ in report.finished] == [0, 3, 2, 4, 1]
    assert tokens == [alone(request)[0] for request in requests]


# ---------------------------------------------------------------- the same tokens under any schedule


def margins(prompt: list[int], output: list[int]) -> np.ndarray:
    """How far the chosen token leads the best other one at each position, from ONE forward over the whole text."""
    engine = Engine(SHAPE, limits=ROOMY)
    tokens = prompt + output[:-1]
    none, zero = np.array([], dtype=np.int32), np.zeros(1, dtype=np.int32)
    plan = StepPlan(zero, zero, np.array([len(tokens)], dtype=np.int32), np.array([True]), none)
    blocks = np.arange(engine.limits.blocks, dtype=np.int32)[None]
    step = runner.step_input(plan, {0: tokens}, blocks, engine._cache, plan.tokens)
    logits = only_text(engine._model.forward(step, engine._cache).clone(), ByteTokenizer())[len(prompt) - 1 :]
    chosen = torch.tensor(output)[:, None]
    others = logits.scatter(1, chosen, -torch.inf).amax(dim=1)
    return (logits.gather(1, chosen)[:, 0] - others).numpy()


@functools.cache
def pool() -> tuple[tuple[Request, list[int], str], ...]:
    """Greedy requests of all lengths with what they get alone.

    Only such whose every choice leads by 1e-3: sums in another order move logits by some 1e-6, which must not decide a test.
    """
    rng = np.random.default_rng(20)
    requests = [
        Request(text(rng, int(rng.integers(1, 50))), {"max_tokens": int(rng.integers(1, 40)), "ignore_eos": bool(i % 2)}) for i in range(24)
    ]
    known = [(request, *alone(request)) for request in requests]
    clear = [(r, tokens, reason) for r, tokens, reason in known if margins(r.prompt, tokens).min() > 1e-3]
    assert len(clear) >= 18, "random weights should rarely leave two tokens this close"
    return tuple(clear)


def cramped(rng: np.random.Generator) -> Limits:
    """Limits under which prompts come in chunks and sequences push each other out."""
    block_tokens = int(rng.integers(1, 9))
    return Limits(
        max_seqs=int(rng.integers(1, 8)),
        max_step_tokens=int(rng.integers(1, 40)),
        block_tokens=block_tokens,
        blocks=-(-int(rng.integers(90, 200)) // block_tokens),
        max_context=SHAPE.max_context or 128,
    )


@functools.cache
def under_pressure(seed: int) -> tuple[int, int, int]:
    """Serve ten requests under one random schedule, assert that each gets what it gets alone; return what the schedule did."""
    rng = np.random.default_rng(seed)
    picked = [pool()[i] for i in rng.choice(len(pool()), 10, replace=False)]
    engine = Engine(SHAPE, limits=cramped(rng))
    tokens, reasons, reports = run(engine, [p[0] for p in picked], rng.integers(0, 30, 10).tolist())
    assert [(t, r) for t, r in zip(tokens, reasons, strict=True)] == [(t, r) for _, t, r in picked]
    assert engine.free_blocks == engine.limits.blocks
    batched = sum(r.features.sampled_tokens > 1 for r in reports)
    mixed = sum(r.features.prefill_tokens > 0 and r.features.decode_seqs > 0 for r in reports)
    return batched, mixed, sum(len(r.preempted) for r in reports)


SCHEDULES = range(40)


@pytest.mark.parametrize("seed", SCHEDULES)
def test_greedy_output_does_not_depend_on_the_schedule(seed: int) -> None:
    """Batching, chunked prefill and preemption, at random: token for token what one request gets alone."""
    assert len(under_pressure(seed)) == 3


def test_the_schedules_did_batch_mix_and_preempt() -> None:
    """Otherwise the test above would say little."""
    batched, mixed, preempted = np.array([under_pressure(seed) for seed in SCHEDULES]).T
    assert (batched > 10).sum() > len(SCHEDULES) / 2
    assert (mixed > 5).sum() > len(SCHEDULES) / 2
    assert (preempted > 0).sum() > len(SCHEDULES) / 4


def test_greedy_output_is_the_argmax_of_one_forward_over_the_whole_text() -> None:
    """The reference above is right itself: no cache, no steps, the same tokens."""
    for request, tokens, _ in pool():
        assert margins(request.prompt, tokens).min() >= 0


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_other_precisions_serve_a_crowd(precision: str) -> None:
    """Their rounding depends on the batch, so tokens may differ; lengths, ends and blocks may not."""
    rng = np.random.default_rng(1)
    requests = [Request(text(rng, n), {"max_tokens": 20, "ignore_eos": True}) for n in (3, 30, 17, 50, 1)]
    engine = Engine(SHAPE, precision=precision, limits=Limits(max_seqs=4, max_step_tokens=24, block_tokens=4, blocks=25, max_context=128))
    tokens, reasons, reports = run(engine, requests)
    assert [len(t) for t in tokens] == [20] * 5
    assert reasons == ["length"] * 5
    assert any(r.preempted for r in reports)
    assert engine.free_blocks == 25


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_step_in_the_middle_of_a_prompt_samples_nothing(precision: str) -> None:
    engine = Engine(SHAPE, precision=precision, limits=ROOMY._replace(max_step_tokens=16))
    engine.add(list(range(40)), max_tokens=1, ignore_eos=True)
    reports = [engine.step() for _ in range(3)]
    assert [r.features.prefill_tokens for r in reports] == [16, 16, 8]
    assert [len(r.tokens) for r in reports] == [0, 0, 1]


# ---------------------------------------------------------------- sampling


def sampled(seed: int | None = None, max_tokens: int = 30, **how: Any) -> dict[str, Any]:
    """Return the options of a request that draws its tokens."""
    how = {"temperature": 0.8, "top_p": 0.9, **how}
    return {"max_tokens": max_tokens, "sampling": sampling(seed=seed, **how), "ignore_eos": True}


def test_a_seed_fixes_the_output_whoever_shares_the_batch() -> None:
    rng = np.random.default_rng(2)
    mine = Request(text(rng, 20), sampled(5))
    others = [Request(text(rng, 9 * i + 1), sampled(i)) for i in range(4)]
    want = alone(mine)[0]
    cramped_engine = Engine(SHAPE, limits=Limits(max_seqs=4, max_step_tokens=16, block_tokens=4, blocks=30, max_context=128))
    tokens, _, reports = run(cramped_engine, [*others, mine])
    assert sum(len(r.preempted) for r in reports) > 0
    assert tokens[-1] == want
    assert run(Engine(SHAPE, limits=ROOMY), [mine, *others])[0][0] == want


def test_another_seed_gives_another_output() -> None:
    prompt = text(np.random.default_rng(3), 12)
    outputs = {tuple(alone(Request(prompt, sampled(seed)))[0]) for seed in range(5)}
    assert len(outputs) == 5


def test_requests_without_a_seed_differ_from_each_other_but_not_from_run_to_run() -> None:
    request = Request(text(np.random.default_rng(4), 12), sampled())
    first, second = (run(Engine(SHAPE, limits=ROOMY), [request, request])[0] for _ in range(2))
    assert first == second
    assert first[0] != first[1]


def test_only_what_has_text_is_generated() -> None:
    """Bytes and the end; nothing above, where random weights would go one time in five."""
    requests = [Request([i], sampled(max_tokens=60, temperature=5.0, top_p=1.0)) for i in range(8)]
    tokens = {t for output in run(Engine(SHAPE, limits=ROOMY), requests)[0] for t in output}
    assert len(tokens) > 100
    assert max(tokens) <= EOS
    assert BOS not in tokens


# ---------------------------------------------------------------- ends


def ends_early() -> Request:
    """Return a request that comes to EOS by itself."""
    for seed in range(200):
        request = Request(text(np.random.default_rng(9), 10), {"max_tokens": 60, "sampling": sampling(temperature=3.0, seed=seed)})
        if alone(request)[1] == "stop":
            return request
    raise AssertionError("no seed in 200 met EOS within 60 tokens")


def test_eos_stops_unless_it_is_ignored() -> None:
    request = ends_early()
    tokens, reason = alone(request)
    assert reason == "stop"
    assert tokens[-1] == EOS
    assert EOS not in tokens[:-1]
    on, reason = alone(request._replace(options={**request.options, "ignore_eos": True}))
    assert on[: len(tokens)] == tokens
    assert (len(on), reason) == (60, "length")


def test_max_tokens_ends_with_length() -> None:
    assert alone(Request([65, 66], {"max_tokens": 1, "ignore_eos": True}))[1] == "length"


def test_all_blocks_come_back_when_a_request_is_cancelled() -> None:
    """Waiting, in prefill, decoding: at once, and the others go on undisturbed."""
    (mine, want, _), other = pool()[0], pool()[1][0]
    for steps in (0, 1, 3, 8):
        engine = Engine(SHAPE, limits=ROOMY._replace(max_step_tokens=16, max_seqs=2))
        doomed = engine.add(list(range(60)), max_tokens=20, ignore_eos=True)
        kept = engine.add(mine.prompt, **mine.options)
        late = engine.add(other.prompt, **other.options)
        got = [t for _ in range(steps) for i, t in engine.step().tokens if i == kept]
        held = engine.limits.blocks - engine.free_blocks
        before = batching.running(engine._state) + batching.waiting(engine._state)
        engine.cancel(doomed)
        engine.cancel(late)
        assert engine.running + engine.waiting == before - 2
        assert engine.limits.blocks - engine.free_blocks < held or steps == 0
        while engine.busy:
            got += [t for i, t in engine.step().tokens if i == kept]
        assert got == want
        assert engine.free_blocks == engine.limits.blocks


def test_cancelling_what_has_ended_does_nothing() -> None:
    engine = Engine(SHAPE, limits=ROOMY)
    request = engine.add([1, 2, 3], max_tokens=1)
    engine.step()
    engine.cancel(request)
    engine.cancel(12345)
    assert not engine.busy
    assert engine.free_blocks == engine.limits.blocks


def test_a_step_with_nothing_to_do_does_nothing() -> None:
    report = Engine(SHAPE, limits=ROOMY).step()
    assert (len(report.tokens), len(report.finished), len(report.preempted)) == (0, 0, 0)
    assert sum(report.features) == 0


# ---------------------------------------------------------------- what a step says of itself


def test_features_and_time_describe_the_step() -> None:
    engine = Engine(SHAPE, limits=ROOMY)
    engine.add(list(range(30)), max_tokens=5, ignore_eos=True)
    first = engine.step()
    assert first.features == (0, 0, 30, 450.0, 1)
    engine.add(list(range(10)), max_tokens=5, ignore_eos=True)
    assert engine.step().features == (1, 31, 10, 50.0, 2)
    assert engine.step().features == (2, 32 + 11, 0, 0.0, 2)
    assert first.step_s > 0


# ---------------------------------------------------------------- refusals


def test_the_engine_asks_the_machine_before_it_allocates() -> None:
    with pytest.raises(BadInput, match="does not fit"):
        Engine(SHAPE, limits=ROOMY._replace(blocks=10**10))


def test_the_system_says_how_much_memory_is_free() -> None:
    available = memory.available_bytes(torch.device("cpu"))
    assert available is None or 2**20 < available < 2**50


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_cuda_device_is_one_plain_line() -> None:
    with pytest.raises(MlsysError, match=r"cuda:0.*sees 0 CUDA devices") as raised:
        Engine(SHAPE, device="cuda:0", limits=ROOMY)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_cuda_device_serves_the_same_code(precision: str) -> None:
    rng = np.random.default_rng(1)
    requests = [Request(text(rng, n), {"max_tokens": 20, "ignore_eos": True}) for n in (3, 30, 17)]
    engine = Engine(SHAPE, precision=precision, device="cuda:0", limits=ROOMY._replace(max_step_tokens=24))
    assert [len(t) for t in run(engine, requests)[0]] == [20] * 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"device": "tpu"}, "cpu or cuda:0"),
        ({"device": "meta"}, "cpu or cuda:0"),
        ({"precision": "fp4"}, "engine precision 'fp4'"),
        ({"threads": 0}, "threads is 0"),
        ({"limits": ROOMY._replace(max_context=4096)}, "context of 4096 tokens is more than its 128"),
        ({"limits": ROOMY._replace(max_seqs=0)}, "max_seqs is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Engine(SHAPE, **{"limits": ROOMY, **changes})


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "gpt3-175b"])
def test_other_kinds_of_models_are_refused(name: str) -> None:
    a = models.find(name)
    with pytest.raises(BadInput, match="dense Llama-family"):
        Engine(a, limits=default_limits(a))


def test_an_unknown_precision_is_an_unknown_name() -> None:
    with pytest.raises(UnknownName):
        Engine(SHAPE, precision="int3", limits=ROOMY)


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ([], {"max_tokens": 1}, "at least one prompt token"),
        ([1], {"max_tokens": 0}, "one output token"),
        ([1], {"max_tokens": 128}, "context ends at 128"),
        ([320], {"max_tokens": 1}, "token 320 is outside the vocabulary of 320"),
        ([-1], {"max_tokens": 1}, "token -1"),
    ],
)
def test_a_request_that_could_never_run_is_refused_and_leaves_nothing_behind(prompt: list[int], options: dict[str, Any], says: str) -> None:
    engine = Engine(SHAPE, limits=ROOMY)
    with pytest.raises(BadInput, match=says):
        engine.add(prompt, **options)
    assert not engine.busy


def test_default_limits_hold_the_whole_batch_at_full_context() -> None:
    limits = default_limits(models.find("nano"), max_batch=5, max_context=100, block_tokens=16)
    assert limits == Limits(max_seqs=5, max_step_tokens=512, block_tokens=16, blocks=35, max_context=100)
    assert default_limits(models.find("nano"), kv_tokens=160).blocks == 10
    assert default_limits(models.find("llama-3.1-8b")).max_context == 2048


def test_the_cache_of_an_engine_takes_what_models_says() -> None:
    for precision in ("fp32", "int8"):
        engine = Engine(SHAPE, precision=precision, limits=ROOMY)
        assert engine.kv_bytes == models.kv_bytes_per_token(SHAPE, precision) * engine.limits.blocks * engine.limits.block_tokens
