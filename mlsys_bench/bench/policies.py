"""What batching is worth: the same requests served by the real engine in static, dynamic and continuous batches, in tokens a second.

    static      a batch is filled, and computed until its longest answer has ended, the ended ones along with it: a batch is one tensor
    dynamic     a batch is whoever waits when the one before has ended; who has ended leaves it, but nobody joins
    continuous  who waits joins at the next step

All requests wait from the start, so that batches are full and what differs is the policy.  Prompts and answers have exponential lengths,
the quantiles of the law in a seeded order: the same in every launch, without luck in their mean.  Only tokens that were asked for count.
Where the machine counts energy, joules a token stand beside (`engine.energy`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mlsys_bench.bench.energy import Joules
from mlsys_bench.bench.harness import Sampled, Samples, Spec, Task
from mlsys_bench.errors import MeasurementFailed
from mlsys_bench.types import Round, Scalar

if TYPE_CHECKING:
    from mlsys_bench.bench.steps import Bench
    from mlsys_bench.engine import Engine

POLICIES = ("static", "dynamic", "continuous")
MEAN_TOKENS = 16  # of a prompt, and of an answer


class Request(NamedTuple):
    """A prompt and how many tokens are wanted after it."""

    prompt: tuple[int, ...]
    output: int


def requests(count: int, *, vocab: int, longest: int, seed: int, mean: float = MEAN_TOKENS) -> list[Request]:
    """Return requests of exponential lengths around a mean, prompt and answer together at most `longest`."""
    rng = np.random.default_rng(seed)
    prompts, outputs = (rng.permutation(_exponential(mean, count)).tolist() for _ in range(2))
    prompts = [min(tokens, longest // 2) for tokens in prompts]
    return [
        Request(tuple(rng.integers(0, min(256, vocab), prompt).tolist()), min(output, longest - prompt))
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def _exponential(mean: float, count: int) -> list[int]:
    return [max(1, round(float(x))) for x in -mean * np.log1p(-(np.arange(count) + 0.5) / count)]


def groups(policy: str, asked: Sequence[Request], seats: int) -> Iterator[list[Request]]:
    """Yield what is queued together: nothing more is until all of it has ended."""
    if policy == "continuous":
        yield list(asked)
        return
    for at in range(0, len(asked), seats):
        batch = list(asked[at : at + seats])
        most = max(r.output for r in batch)
        yield [r._replace(output=most) for r in batch] if policy == "static" else batch


def steps_of(policy: str, asked: Sequence[Request], seats: int) -> int:
    """Return how many decode steps a policy takes; of continuous batches at most so many (Graham's bound: the longest may begin last)."""
    outputs = [r.output for r in asked]
    if policy == "continuous":
        return -(-sum(outputs) // seats) + max(outputs)
    return sum(max(r.output for r in queued) for queued in groups(policy, asked, seats))


def serve(engine: Engine, policy: str, asked: Sequence[Request]) -> int:
    """Answer all requests; return how many tokens the engine gave, those nobody asked for among them."""
    given = 0
    for queued in groups(policy, asked, engine.limits.max_seqs):
        for request in queued:
            engine.add(request.prompt, max_tokens=request.output, ignore_eos=True)
        while engine.busy:
            report = engine.step()
            given += len(report.tokens)
            if report.preempted:
                raise MeasurementFailed("engine.policy: a step preempted a sequence; give the benchmark more kv_tokens")
    return given


def tasks(bench: Bench, count: int, joules: Joules | None = None) -> list[Task]:
    """Return a task per policy, over so many requests; none where the KV pool cannot hold a full batch of them."""
    engine = bench.engine
    limits = engine.limits
    longest = min(limits.max_context, limits.blocks // limits.max_seqs * limits.block_tokens)
    if count < 1 or longest < 2:
        return []
    asked = requests(count, vocab=engine.shape.vocab, longest=longest, seed=bench.seed, mean=bench.suite.policy_tokens)
    return [_task(bench, policy, asked, joules) for policy in POLICIES]


def _task(bench: Bench, policy: str, asked: Sequence[Request], joules: Joules | None) -> Task:
    engine, wanted = bench.engine, sum(r.output for r in asked)
    parameters = bench.parameters | {"policy": policy, "requests": len(asked), "prompt_tokens": sum(len(r.prompt) for r in asked)}
    specs = _specs(parameters | {"output_tokens": wanted}, has_energy=joules is not None)

    due = sum(r.output for queued in groups(policy, asked, engine.limits.max_seqs) for r in queued)

    def visit() -> list[Sampled]:
        samples, given = Samples(bench.one_thread), list[int]()
        before_j = joules() if joules else 0.0
        samples.take(lambda: given.append(serve(engine, policy, asked)))
        energy = [Round(values=((joules() - before_j) / wanted,))] if joules else []
        if given != [due]:
            raise MeasurementFailed(f"engine.policy: {policy} batches gave {given} tokens and {due} were due")
        return list(zip(specs, [samples.round(lambda seconds: wanted / seconds), *energy], strict=True))

    prompts = sum(len(r.prompt) for r in asked)
    cost_s = prompts * bench.prefill_s_per_token + 1.3 * steps_of(policy, asked, engine.limits.max_seqs) * bench.decode_s
    return Task(specs=specs, visit=visit, cost_s=cost_s)


def _specs(parameters: dict[str, Scalar], *, has_energy: bool) -> tuple[Spec, ...]:
    rate = Spec(name="engine.policy", unit="token/s", better="higher", parameters=parameters)
    energy = Spec(name="engine.energy", unit="J/token", better="lower", parameters=parameters)
    return (rate, energy) if has_energy else (rate,)
