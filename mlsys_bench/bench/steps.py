"""Time steps of the built-in engine through its real `Engine.step()`, with the features the engine itself reports.

    decode   fill the batch with prompts around one context, then time steps at the largest batch, cancel some, time again, down to one
    prefill  one prompt of `chunk` tokens, alone; or behind a first chunk of `max_step_tokens` already cached
    mixed    a running batch, and one prompt more per timed step

A batch holds uneven contexts (`uneven`), as served ones do: attention pads to the longest, so even ones would flatter the engine.
Features move by one token per step and sequence; a sample's features are the mean over the steps timed together.

What is cached before a timed step is not computed: the scheduler seats sequences as ever while a model that computes nothing stands in,
and all blocks hold copies of one that the real model wrote.  Reading them takes as long whatever they hold, and the budget goes to steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mlsys_bench import models
from mlsys_bench.batching import Limits, StepFeatures
from mlsys_bench.bench.harness import Sampled, Samples, Spec, Task, warm_up
from mlsys_bench.bench.options import Options, Suite
from mlsys_bench.bench.stand_ins import absent, logits_of
from mlsys_bench.engine import Engine, StepReport, schemes
from mlsys_bench.errors import MeasurementFailed
from mlsys_bench.models import Architecture
from mlsys_bench.types import Scalar, Work


class Bench:
    """One engine under measurement."""

    def __init__(self, engine: Engine, parameters: dict[str, Scalar], suite: Suite, *, one_thread: bool, seed: int) -> None:
        """Hold the engine and what is common to all of its cells."""
        self.engine, self.parameters, self.suite, self.one_thread, self.seed = engine, parameters, suite, one_thread, seed
        self.rng = np.random.default_rng(seed)
        self.decode_s = self.prefill_s_per_token = 0.0  # from the warm-up, to tell costs
        self.token_bytes = engine.kv_bytes / (engine.limits.blocks * engine.limits.block_tokens)

    def add(self, tokens: int, output: int) -> int:
        """Queue a prompt of random bytes."""
        prompt = self.rng.integers(0, min(256, self.engine.shape.vocab), tokens).tolist()
        return self.engine.add(prompt, max_tokens=output, ignore_eos=True)

    def fill(self, batch: int, context: int) -> list[int]:
        """Start a batch of uneven prompts around a context, and step until all of it decodes."""
        ids = [self.add(tokens, self.engine.limits.max_context - tokens) for tokens in uneven(context, batch)]
        while self.engine.step().features.decode_seqs < batch:
            if not self.engine.busy:
                raise MeasurementFailed(f"engine.step: {batch} sequences of {context} tokens ended before all of them decoded")
        return ids

    def lay(self, lengths: Sequence[int]) -> list[int]:
        """Start sequences that have such contexts already."""
        with absent(self.engine):
            ids = [self.add(tokens, self.engine.limits.max_context - tokens) for tokens in lengths]
            while self.engine.step().features.decode_seqs < len(ids):
                if not self.engine.busy:
                    raise MeasurementFailed(f"engine.step: {len(ids)} sequences ended before all of them decoded")
        return ids

    def drop(self, ids: Sequence[int]) -> None:
        """Cancel sequences."""
        for i in ids:
            self.engine.cancel(i)

    def spec(self, features: Sequence[float]) -> Spec:
        """Return the cell of these features."""
        return Spec(
            name="engine.step", unit="s", better="lower",
            parameters=self.parameters | {n: round(float(v), 3) for n, v in zip(StepFeatures._fields, features, strict=True)},
            work=self.work(*map(float, features)),
        )  # fmt: skip

    def work(self, decode_seqs: float, decode_kv_tokens: float, prefill_tokens: float, prefill_pairs: float, sampled: float) -> Work:
        """Return what a step of these features must read and compute: weights and cached tokens, products and attention."""
        a, tokens = self.engine.shape, decode_seqs + prefill_tokens
        products = tokens * models.linear_flops_per_token(a) + sampled * models.head_flops(a)
        attention = (decode_kv_tokens + prefill_pairs) * models.attention_flops_per_pair(a)
        return Work(bytes=self._weights_read(tokens) + decode_kv_tokens * self.token_bytes, flops=products + attention)

    def _weights_read(self, tokens: float) -> float:
        """Return the bytes of weights that so many tokens read: no embedding table, and of experts those they are sent to."""
        a, table = self.engine.shape, self.engine._model.weights.embedding
        held = self.engine.weight_bytes - (0 if a.tied_embeddings else table.numel() * table.element_size())
        if not a.experts:
            return held
        hit, every = (models.step_weight_bytes(a, self.engine.precision, n) for n in (tokens, math.inf))
        return held * hit / every

    def timed(self, count: int, before: Callable[[], object] = lambda: None) -> Sampled:
        """Time so many steps and return them as one cell.  Each is checked: no preemption, and a token for each that samples."""
        samples, seen = Samples(self.one_thread), []

        def step() -> None:
            seen.append(self.engine.step())

        for _ in range(count):
            before()
            samples.take(step)
        for report in seen:
            _sane(report)
        return self.spec(np.mean([report.features for report in seen], axis=0)), samples.round()


def tasks(bench: Bench) -> list[Task]:
    """Return every cell that fits the engine's limits, one task per context, chunk or mixture."""
    return [*_decodes(bench), *_prefills(bench), *_mixtures(bench)]


def warm(bench: Bench) -> None:
    """Step until times settle, and note what a decode step and a prefilled token cost."""
    refuse_nan(bench)
    copy_block(bench)
    limits = bench.engine.limits
    batch, chunk = min(4, limits.max_seqs), min(64, limits.max_step_tokens, limits.max_context // 2)

    def prefill() -> None:
        bench.add(chunk, 1)
        bench.engine.step()

    bench.prefill_s_per_token = warm_up(prefill, block=3) / chunk
    ids = bench.fill(batch, min(32, limits.max_context // 2))
    bench.decode_s = warm_up(bench.engine.step, block=min(5, limits.max_context // 12))
    bench.drop(ids)


def copy_block(bench: Bench) -> None:
    """Fill every block of the pool with what the model wrote to one: real keys and values, and memory that has been touched."""
    engine = bench.engine
    ids = bench.fill(1, min(engine.limits.block_tokens, engine.limits.max_context // 2))
    raw, block = engine._cache.raw, int(engine._state.block_table[engine._by_id[ids[0]].row, 0])
    raw.copy_(raw[:, block : block + 1].clone().expand_as(raw))
    bench.drop(ids)


def refuse_nan(bench: Bench) -> None:
    """Raise MeasurementFailed when a prefill or a decode step gives logits that are not numbers: its time would mean nothing."""
    with logits_of(bench.engine) as logits:
        ids = bench.fill(1, min(32, bench.engine.limits.max_context // 2))
    bench.drop(ids)
    what = "no" if not any(map(len, logits)) else "NaN" if any(bool(each.isnan().any()) for each in logits) else None
    if what is not None:
        raise MeasurementFailed(f"engine.step: {bench.parameters['precision']} gives {what} logits on this machine")


def engine_of(a: Architecture, options: Options, precision: str, device: str) -> Engine:
    """Return the engine as `serve` would run it with these limits."""
    limits = Limits(
        max_seqs=options.max_batch,
        max_step_tokens=options.max_step_tokens,
        block_tokens=options.block_tokens,
        blocks=math.ceil(options.pool_tokens / options.block_tokens),
        max_context=min(options.max_context, a.max_context or options.max_context),
    )
    return Engine(
        a, precision=precision, device=device, limits=limits, seed=options.seed, threads=options.threads,
        checkpoint=schemes.checkpoint_of(options.model), backend=options.backend, kv=options.kv, deterministic=options.deterministic,
    )  # fmt: skip


# ---------------------------------------------------------------- the cells


def _decodes(bench: Bench) -> Iterator[Task]:
    limits, count = bench.engine.limits, bench.suite.decode_steps
    batches = sizes(limits.max_seqs)
    extra = len(batches) * (count + 1) + limits.max_seqs + 2  # tokens the first sequence has grown by at the end
    for context in bench.suite.contexts:
        if not _fits(limits, context, limits.max_seqs, extra):
            continue
        nominal = tuple(bench.spec((b, sum(uneven(context, b)), 0, 0, b)) for b in batches)
        cost_s = len(batches) * (count + 1) * 1.5 * bench.decode_s
        yield Task(specs=nominal, visit=_decode(bench, context, batches, count), cost_s=cost_s)


def _decode(bench: Bench, context: int, batches: Sequence[int], count: int) -> Callable[[], list[Sampled]]:
    def visit() -> list[Sampled]:
        ids = bench.lay(uneven(context, batches[0]))
        found = []
        for batch in batches:
            bench.drop(ids[batch:])
            ids = ids[:batch]
            bench.engine.step()  # the first step after a change is not like the others
            found.append(bench.timed(count))
        bench.drop(ids)
        return found

    return visit


def _prefills(bench: Bench) -> Iterator[Task]:
    limits, count = bench.engine.limits, bench.suite.prefill_steps
    for chunk in bench.suite.chunks:
        for past in (0, limits.max_step_tokens):
            if chunk > limits.max_step_tokens or past + chunk + 1 > limits.max_context or _blocks(limits, past + chunk + 1) > limits.blocks:
                continue
            nominal = bench.spec((0, 0, chunk, chunk * (past + chunk / 2), 1))
            cost_s = (count + 1) * chunk * bench.prefill_s_per_token
            yield Task(specs=(nominal,), visit=_prefill(bench, chunk, past, count), cost_s=cost_s)


def _prefill(bench: Bench, chunk: int, past: int, count: int) -> Callable[[], list[Sampled]]:
    def before() -> None:
        bench.add(past + chunk, 1)
        if past:
            with absent(bench.engine):
                bench.engine.step()

    def visit() -> list[Sampled]:
        before()
        bench.engine.step()
        return [bench.timed(count, before)]

    return visit


def _mixtures(bench: Bench) -> Iterator[Task]:
    limits, count = bench.engine.limits, bench.suite.prefill_steps
    for batch, context, chunk in ((limits.max_seqs // 2, 256, 128), (limits.max_seqs - 1, 128, 32)):
        extra = count + limits.max_seqs + 4
        if batch < 1 or chunk + batch > limits.max_step_tokens or not _fits(limits, context, batch, extra, beside=chunk + 1):
            continue
        nominal = bench.spec((batch, sum(uneven(context, batch)), chunk, chunk * chunk / 2, batch + 1))
        cost_s = count * chunk * bench.prefill_s_per_token + (count + 1) * bench.decode_s
        yield Task(specs=(nominal,), visit=_mixture(bench, batch, context, chunk, count), cost_s=cost_s)


def _mixture(bench: Bench, batch: int, context: int, chunk: int, count: int) -> Callable[[], list[Sampled]]:
    def visit() -> list[Sampled]:
        ids = bench.lay(uneven(context, batch))
        bench.engine.step()
        found = [bench.timed(count, lambda: bench.add(chunk, 1))]
        bench.drop(ids)
        return found

    return visit


def uneven(context: int, batch: int) -> list[int]:
    """Return prompt lengths between half and one and a half times a context, evenly spread in every first part of the list.

    The offsets are van der Corput's sequence in base 2: 0, 1/2, 1/4, 3/4, 1/8 …
    """
    offsets = [sum((i >> bit & 1) / 2 ** (bit + 1) for bit in range(i.bit_length())) for i in range(batch)]
    return [max(1, round(context * (0.5 + (offset + 0.5) % 1))) for offset in offsets]


def _fits(limits: Limits, context: int, batch: int, extra: int, beside: int = 0) -> bool:
    """Say whether a batch around a context can grow by `extra` tokens each, beside another prompt."""
    return fits(limits, [tokens + extra for tokens in uneven(context, batch)], beside)


def fits(limits: Limits, lengths: Sequence[int], beside: int = 0) -> bool:
    """Say whether sequences can grow to such lengths, beside another prompt."""
    blocks = sum(_blocks(limits, tokens) for tokens in lengths) + _blocks(limits, beside)
    return max(lengths) <= limits.max_context and blocks <= limits.blocks


def sizes(largest: int) -> list[int]:
    """Return largest, 3/4, 1/2, 3/8 … 1: close enough to find the size from which on kernels change, 40 % from 3 to 4 in MKL."""
    halves = [largest >> i for i in range(largest.bit_length())]
    return sorted({size for half in halves for size in (half, 3 * half // 4) if size}, reverse=True)


def _blocks(limits: Limits, tokens: int) -> int:
    return math.ceil(tokens / limits.block_tokens)


def _sane(report: StepReport) -> None:
    """Raise MeasurementFailed when a timed step did other work than its cell says."""
    if len(report.preempted):
        raise MeasurementFailed("engine.step: a timed step preempted a sequence; give the benchmark more kv_tokens")
    if len(report.tokens) != report.features.sampled_tokens:
        raise MeasurementFailed(f"engine.step: {report.features.sampled_tokens} tokens were due and {len(report.tokens)} came")
