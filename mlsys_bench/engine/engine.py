"""The loop of the engine: schedule, guess, compute, choose, grow.

A step that raises leaves every request as it was before it, waiting in its order: of a half-computed cache nothing is believed, all of it
is given up and computed anew.  So a step may be tried again, and gives what it would have given.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Tokens
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mlsys_bench import batching
from mlsys_bench.batching import Limits, StepPlan
from mlsys_bench.engine import build, prefix, runner, speculate
from mlsys_bench.engine.build import default_limits, only_text
from mlsys_bench.engine.kv import name_of
from mlsys_bench.engine.requests import Reason, Sequence, StepReport
from mlsys_bench.engine.sampler import GREEDY, Logprobs, Sampling, logprobs, sample
from mlsys_bench.engine.sampling import SEEDS
from mlsys_bench.engine.speculate import Drafts, Speculation
from mlsys_bench.engine.stops import TextStream
from mlsys_bench.engine.swap import Host
from mlsys_bench.engine.tokenizer import Tokenizer, open_tokenizer
from mlsys_bench.errors import BadInput
from mlsys_bench.models import Architecture

__all__ = ["Engine", "Reason", "Sequence", "StepReport", "default_limits", "only_text"]

Chosen = list[tuple[list[int], tuple[Logprobs | None, ...]]]  # by sequence: its new tokens, and of each, where any are wanted


class Engine:
    """A model that serves many requests at once, one step at a time."""

    def __init__(
        self,
        shape: Architecture,
        *,
        precision: str = "fp32",
        device: str = "cpu",
        limits: Limits,
        seed: int = 0,
        threads: int | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        checkpoint: Path | None = None,
        tokenizer: Tokenizer | None = None,
        prefix_cache: bool = False,
        preempt: Literal["recompute", "swap"] = "recompute",
        host_blocks: int | None = None,
        speculative: Speculation | str | None = None,
        static_batches: bool = False,
        backend: str = "auto",
        kv: str = "auto",
        deterministic: bool = False,
    ) -> None:
        """Allocate everything.  Weights are random by `seed`, or those of a Llama state dict; `threads` holds for the whole process.

        `checkpoint`: a folder with config.json, *.safetensors and tokenizer.json, whose shape is `models.find(folder)`; with `precision`
        auto its matrices are taken as they are.  `tokenizer` (the checkpoint's, or bytes, unless given) says which tokens end an answer
        and which are never generated; only stop strings need its text.
        `prefix_cache`: requests that begin alike share the blocks of their beginning.  `preempt`: what becomes of the cache of one that
        must give way: it is computed again, or lies in up to `host_blocks` (as many as the device has) of host memory meanwhile.
        `speculative`: how to guess tokens that are then verified together.  `static_batches`: nobody joins a batch that has begun.
        `backend`: who computes (`auto`, `native`, `torch`, `triton`); `kv`: what the cache is kept in (`auto`, `fp32`, `bf16`, `int8`,
        `fp8`); `deterministic`: a request's tokens depend on nothing but itself, bit for bit.
        """
        self.tokenizer = open_tokenizer(checkpoint, shape.vocab) if tokenizer is None else tokenizer
        build.refuse_shape(shape, limits, self.tokenizer, has_config=checkpoint is not None)
        how = speculate.speculation(speculative) if isinstance(speculative, str) else speculative and speculate.check(speculative)
        policy = build.policy(preempt, how, static_batches=static_batches)
        build.check_threads(threads)
        precision = build.precision_of(precision, checkpoint)
        self.shape, self.precision, self.device, self.limits, self.seed = shape, precision, device, limits, seed
        host_blocks = (limits.blocks if host_blocks is None else host_blocks) if policy.swap else 0
        on: dict[str, Any] = {
            "device": device, "limits": limits, "backend": backend, "kv": kv, "deterministic": deterministic, "threads": threads,
        }  # fmt: skip
        self._model, self._cache = build.load(
            shape, precision=precision, seed=seed, state_dict=state_dict, checkpoint=checkpoint, host_blocks=host_blocks, **on
        )
        self._drafter = build.drafter(how, self.tokenizer, precision, shape.vocab, **on)
        caches = (self._cache, *(self._drafter.caches if self._drafter else ()))
        self._host = Host(caches, host_blocks)
        self._world = f"{shape.id} {checkpoint or seed} {precision} {kv}" if prefix_cache else None  # what K and V depend on
        self._state = batching.new_state(limits, policy=policy, shares=prefix_cache)
        self._by_id: dict[int, Sequence] = {}
        self._by_row: dict[int, Sequence] = {}
        self._tokens: dict[int, list[int]] = {}  # by row: the lists of the sequences themselves
        self._next_id = 0

    # ------------------------------------------------------------ requests

    def add(self, prompt: Tokens[int], *, max_tokens: int, sampling: Sampling = GREEDY, ignore_eos: bool = False) -> int:
        """Queue a request and return its id.  Raises BadInput for one that could never run.

        It ends with reason "stop" at a token that ends answers (unless `ignore_eos`) or when one of `sampling.stop` is in its text, and
        with "length" after `max_tokens`.  The token that ended it is among its tokens.
        """
        tokens = [int(t) for t in prompt]
        wrong = next((t for t in tokens if not 0 <= t < self.shape.vocab), None)
        if wrong is not None:
            raise BadInput(f"prompt: token {wrong} is outside the vocabulary of {self.shape.vocab}")
        text = TextStream(self.tokenizer.stream(tokens), sampling.stop) if sampling.stop else None
        hashes = None if self._world is None else prefix.Hashes(self._world, self.limits.block_tokens)
        row = batching.add(self._state, self.limits, len(tokens), max_tokens, hashes.more(tokens) if hashes else ())
        sequence = Sequence(
            id=self._next_id, row=row, tokens=tokens, given=len(tokens), sampling=sampling, ignore_eos=ignore_eos, hashes=hashes,
            seed=(self.seed + self._next_id if sampling.seed is None else sampling.seed) % SEEDS, text=text,
        )  # fmt: skip
        self._next_id += 1
        self._by_id[sequence.id] = self._by_row[row] = sequence
        self._tokens[row] = tokens
        return sequence.id

    def cancel(self, request: int) -> None:
        """Forget a request and free its blocks at once.  One that has finished meanwhile is passed over."""
        sequence = self._by_id.get(request)
        if sequence is not None:
            self._remove(sequence)

    def _remove(self, sequence: Sequence) -> None:
        batching.remove(self._state, sequence.row)
        self._host.drop(sequence.row)
        self._forget_guesses(sequence.row)
        del self._by_id[sequence.id], self._by_row[sequence.row], self._tokens[sequence.row]

    # ------------------------------------------------------------ the loop

    @torch.inference_mode()
    def step(self) -> StepReport:
        """Compute one step for as many sequences as the limits allow."""
        began, state = time.perf_counter(), self._state
        asked, hit = state.asked_tokens, state.hit_tokens
        plan = batching.schedule(state, self.limits)
        preempted = tuple(self._by_row[row].id for row in plan.preempted.tolist())
        try:
            swapped = self._swap(plan)
            plan, drafts = self._guess(plan)
            features = batching.features(self._state, plan)
            sequences = [self._by_row[row] for row in plan.rows[plan.samples].tolist()]
            chosen = self._choose(self._compute(plan, drafts), sequences, drafts) if len(plan.rows) else []
        except BaseException:
            self._begin_anew()
            raise
        tokens, finished, logs = self._grow(plan, sequences, chosen)
        return StepReport(
            features=features, step_s=time.perf_counter() - began, tokens=tokens, finished=finished, preempted=preempted, logprobs=logs,
            drafted=sum(len(d.tokens) for d in drafts.values()), accepted=sum(len(new) - 1 for new, _ in chosen), swapped=swapped,
            prefix_queries=state.asked_tokens - asked, prefix_hits=state.hit_tokens - hit,
        )  # fmt: skip

    def _swap(self, plan: StepPlan) -> int:
        """Move the cache of those who gave way to host memory, as long as there is room, and that of those who are back to the device."""
        kept, out = self._host.blocks > self._host.free, 0
        for row in plan.preempted.tolist():
            blocks = -(-int(self._state.computed[row]) // self.limits.block_tokens)
            if self._state.policy.swap and self._host.out(row, self._state.block_table[row, :blocks].tolist()):
                out += 1
                continue
            if self._state.policy.swap:
                batching.forget(self._state, row)
            self._forget_guesses(row)
        if kept:
            for row in (row for row in plan.rows.tolist() if row in self._host):
                self._host.back(row, self._state.block_table[row].tolist())
        return out

    def _guess(self, plan: StepPlan) -> tuple[StepPlan, dict[int, Drafts]]:
        """Return the plan as it is computed, in the order of a step, and guesses for rows that decode."""
        if self._drafter is None or not len(plan.rows):
            return runner.order_of(plan), {}
        room = np.maximum(plan.start + plan.tokens - self._state.known[plan.rows], 0)
        found = self._drafter.guess(plan, room, self._by_row, self._state.block_table)
        unused = room - np.array([len(d.tokens) for d in found], dtype=np.int32)
        drafts = {row: d for row, d in zip(plan.rows.tolist(), found, strict=True) if d.tokens}
        return runner.order_of(plan._replace(tokens=plan.tokens - unused)), drafts

    def _compute(self, plan: StepPlan, drafts: dict[int, Drafts]) -> torch.Tensor:
        """Return logits after each token to be chosen from: [sampled, vocab], row by row."""
        known = {**self._tokens, **{row: [*self._tokens[row], *d.tokens] for row, d in drafts.items()}} if drafts else self._tokens
        step = runner.step_input(plan, known, self._state.block_table, self._cache)
        if drafts:
            last = np.array([1 + len(drafts[row].tokens) if row in drafts else 1 for row in plan.rows.tolist()])[plan.samples]
            ends = step.first[1:][plan.samples]
            step = step._replace(
                sampled=np.concatenate([np.arange(end - n, end, dtype=np.int32) for end, n in zip(ends, last, strict=True)])
            )
        return only_text(self._model.forward(step, self._cache), self.tokenizer)

    def _choose(self, logits: torch.Tensor, sequences: list[Sequence], drafts: dict[int, Drafts]) -> Chosen:
        """Return what each sequence gets: a token, or the guesses that stand and one more."""
        if not sequences:
            if self._cache.device.type == "cuda":  # nothing is read back, and a step takes as long as it computes
                torch.cuda.synchronize(self._cache.device)
            return []
        if not drafts:
            tokens, logs = sample(logits, sequences)
            return [([token], logs[i : i + 1]) for i, token in enumerate(tokens)]
        guesses = [drafts.get(s.row, speculate.NOTHING) for s in sequences]
        chosen, at = speculate.verify(logits, sequences, guesses), 0
        result: Chosen = []
        for sequence, new, guess in zip(sequences, chosen, guesses, strict=True):
            wants = sequence.sampling.logprobs is not None
            result.append((new, logprobs(logits[at : at + len(new)], speculate.places(sequence, new)[:-1], new) if wants else ()))
            at += len(guess.tokens) + 1
        return result

    def _grow(
        self, plan: StepPlan, sequences: list[Sequence], chosen: Chosen
    ) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, Reason], ...], tuple[Logprobs | None, ...]]:
        """Give sequences their tokens, up to where they end; return (id, token), (id, reason) and log-probabilities."""
        tokens: list[tuple[int, int]] = []
        logs: list[Logprobs | None] = []
        stopped: set[int] = set()
        for sequence, (chosen_now, logs_now) in zip(sequences, chosen, strict=True):
            kept, stops = sequence.until_end(chosen_now, self.tokenizer.ends)
            sequence.tokens += chosen_now[:kept]
            tokens += [(sequence.id, token) for token in chosen_now[:kept]]
            logs += logs_now[:kept] or [None] * kept
            if stops:
                stopped.add(sequence.row)
        new = np.ones(len(plan.rows), dtype=np.int32)
        if len(tokens) > len(sequences):
            new[plan.samples] = [
                len(s.tokens) - known for s, known in zip(sequences, self._state.known[plan.rows[plan.samples]], strict=True)
            ]
        full = batching.update(self._state, self.limits, plan, new)
        reasons: dict[int, Reason] = {row: "stop" if row in stopped else "length" for row in {*full.tolist(), *stopped}}
        finished = tuple((s.id, reasons[s.row]) for s in sequences if s.row in reasons)
        for sequence in sequences:
            if sequence.row in reasons:
                self._remove(sequence)
            elif sequence.hashes:
                batching.extend(self._state, sequence.row, sequence.hashes.more(sequence.tokens))
        return tuple(tokens), finished, tuple(logs) if any(logs) else ()

    def _begin_anew(self) -> None:
        """Give up all caches: everybody waits, in order, and is computed anew."""
        batching.restart(self._state)
        self._host.clear()
        for row in self._by_row:
            self._forget_guesses(row)

    def _forget_guesses(self, row: int) -> None:
        if self._drafter:
            self._drafter.forget(row)

    # ------------------------------------------------------------ what it is doing

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._by_id)

    @property
    def free_blocks(self) -> int:
        """How many KV blocks nobody holds; those of cached prefixes that nobody uses are among them."""
        return batching.free_blocks(self._state)

    @property
    def running(self) -> int:
        """How many requests have a seat."""
        return batching.running(self._state)

    @property
    def waiting(self) -> int:
        """How many requests wait for a seat, preempted ones included."""
        return batching.waiting(self._state)

    @property
    def prefix_queries(self) -> int:
        """Tokens that were looked for in the prefix cache so far, by requests that got a seat."""
        return self._state.asked_tokens

    @property
    def prefix_hits(self) -> int:
        """How many of them were there."""
        return self._state.hit_tokens

    @property
    def backend(self) -> str:
        """Who computes the steps: `native`, `torch` or `triton`."""
        return self._model.backend

    @property
    def kv(self) -> str:
        """What the KV cache is kept in: `fp32`, `bf16`, `int8` or `fp8`."""
        return name_of(self._cache.dtype)

    @property
    def kv_bytes(self) -> int:
        """What the KV cache holds in memory."""
        return self._cache.allocated_bytes

    @property
    def weight_bytes(self) -> int:
        """What the weights hold in memory."""
        return sum(t.numel() * t.element_size() for t in self._model.weights.tensors())
