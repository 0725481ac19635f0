"""The loop of the engine: schedule, guess, compute, choose, grow.

A step that raises leaves every request as it was before it, waiting in its order: of a half-computed cache nothing is believed, all of it
is given up and computed anew.  So a step may be tried again, and gives what it would have given.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Tokens
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mlsys_bench import batching
from mlsys_bench.batching import Limits, StepPlan
from mlsys_bench.engine import build, prefix, runner, speculate
from mlsys_bench.engine.build import default_limits, only_text
from mlsys_bench.engine.flight import Flight, Planned, is_simple, launches, picks
from mlsys_bench.engine.kv import name_of
from mlsys_bench.engine.requests import Reason, Sequence, StepReport
from mlsys_bench.engine.runner import Int32, Step
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
        ahead: bool = False,
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
        `ahead`: a model that launches (on a GPU) starts each step before the tokens of the one before are read.
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
            shape, precision=precision, seed=seed, state_dict=state_dict, checkpoint=checkpoint, host_blocks=host_blocks,
            tokenizer=self.tokenizer, **on,
        )  # fmt: skip
        self._has_operators = self._model.backend != "native"  # of torch: what guards them costs a native step 25 us, its caches cold
        native: Any = self._model
        native.reuses_logits = True  # each step's are read before the next; models that know nothing of it give new ones
        self._only_text = build.OnlyText(self.tokenizer)
        self._drafter = build.drafter(how, self.tokenizer, precision, shape.vocab, **on)
        caches = (self._cache, *(self._drafter.caches if self._drafter else ()))
        self._host = Host(caches, host_blocks)
        self._world = f"{shape.id} {checkpoint or seed} {precision} {kv}" if prefix_cache else None  # what K and V depend on
        self._state = batching.new_state(limits, policy=policy, shares=prefix_cache)
        self._by_id: dict[int, Sequence] = {}
        self._by_row: dict[int, Sequence] = {}
        self._tokens: dict[int, list[int]] = {}  # by row: the lists of the sequences themselves
        self._next_id = 0
        self._ahead = ahead
        self._choosy: set[int] = set()  # ids whose tokens only the host can choose
        self._flights: deque[Flight] = deque()  # the oldest first

    # ------------------------------------------------------------ requests

    def add(self, prompt: Tokens[int], *, max_tokens: int, sampling: Sampling = GREEDY, ignore_eos: bool = False, priority: int = 0) -> int:
        """Queue a request behind those of its priority, the lower first, and return its id.  Raises BadInput for one that could never run.

        It ends with reason "stop" at a token that ends answers (unless `ignore_eos`) or when one of `sampling.stop` is in its text, and
        with "length" after `max_tokens`.  The token that ended it is among its tokens.
        """
        tokens = [int(t) for t in prompt]
        wrong = next((t for t in tokens if not 0 <= t < self.shape.vocab), None)
        if wrong is not None:
            raise BadInput(f"prompt: token {wrong} is outside the vocabulary of {self.shape.vocab}")
        text = TextStream(self.tokenizer.stream(tokens), sampling.stop) if sampling.stop else None
        hashes = None if self._world is None else prefix.Hashes(self._world, self.limits.block_tokens)
        row = batching.add(self._state, self.limits, len(tokens), max_tokens, hashes.more(tokens) if hashes else (), priority)
        sequence = Sequence(
            id=self._next_id, row=row, tokens=tokens, given=len(tokens), sampling=sampling, ignore_eos=ignore_eos, hashes=hashes,
            seed=(self.seed + self._next_id if sampling.seed is None else sampling.seed) % SEEDS, text=text,
        )  # fmt: skip
        self._next_id += 1
        self._by_id[sequence.id] = self._by_row[row] = sequence
        self._tokens[row] = tokens
        if not is_simple(sampling):
            self._choosy.add(sequence.id)
        return sequence.id

    def cancel(self, request: int) -> None:
        """Forget a request and free its blocks at once.  One that has finished meanwhile is passed over."""
        sequence = self._by_id.get(request)
        if sequence is not None:
            self._remove(sequence)

    def _remove(self, sequence: Sequence) -> None:
        self._leave(sequence)
        del self._by_id[sequence.id]
        self._choosy.discard(sequence.id)

    def _leave(self, sequence: Sequence) -> None:
        """Give back a sequence's seat and blocks, unless it has; its last token may still be under way."""
        if self._by_row.get(sequence.row) is sequence:
            batching.remove(self._state, sequence.row)
            self._host.drop(sequence.row)
            self._forget_guesses(sequence.row)
            del self._by_row[sequence.row], self._tokens[sequence.row]

    # ------------------------------------------------------------ the loop

    def step(self) -> StepReport:
        """Compute one step for as many sequences as the limits allow.

        Of a model that launches, the next step is on its way before this one's tokens are read, where nothing depends on them.
        """
        began = time.perf_counter()
        if not self._has_operators:
            return self._step(began)
        with torch.inference_mode():
            return self._step(began)

    def _step(self, began: float) -> StepReport:
        if self._flights and not any(self._by_id.get(s.id) is s for s in self._flights[0].sequences):
            self._flights.popleft()  # all it computes for have ended meanwhile
        return self._fly(began) if self._flights or self._may_launch() else self._compute_now(began)

    def _compute_now(self, began: float) -> StepReport:
        """Plan a step, compute it, and read its logits."""
        try:
            planned, drafts = self._planned()
            plan = planned.plan
            sequences = [self._by_row[row] for row in plan.rows[plan.samples].tolist()]
            chosen = self._choose(self._compute(plan, drafts), sequences, drafts) if len(plan.rows) else []
        except BaseException:
            self._give_up()
            raise
        tokens, finished, logs = self._grow(plan, sequences, chosen)
        drafted, accepted = sum(len(d.tokens) for d in drafts.values()), sum(len(new) - 1 for new, _ in chosen)
        return planned.report(began, tokens, finished, logprobs=logs, drafted=drafted, accepted=accepted)

    def _planned(self) -> tuple[Planned, dict[int, Drafts]]:
        """Schedule a step, move caches as it wants them, and guess."""
        state = self._state
        asked, hit = state.asked_tokens, state.hit_tokens
        plan = batching.schedule(state, self.limits)
        preempted = tuple(self._by_row[row].id for row in plan.preempted.tolist())
        swapped = self._swap(plan)
        plan, drafts = self._guess(plan)
        found = state.asked_tokens - asked, state.hit_tokens - hit
        return Planned(plan, batching.features(state, plan), preempted, swapped, *found), drafts

    def _give_up(self) -> None:
        """Give up all caches, as a step has failed: everybody waits, in order, and is computed anew."""
        batching.restart(self._state)
        self._host.clear()
        for row in self._by_row:
            self._forget_guesses(row)

    # ------------------------------------------------------------ steps under way

    def _may_launch(self) -> bool:
        """Whether a step may start before the tokens of the one before are known: nobody's choice depends on more than the last one."""
        return bool(self._by_id) and not self._choosy and self._drafter is None and launches(self._model)

    def _fly(self, began: float) -> StepReport:
        """Launch a step if none is under way, then the one after it, and read the tokens of the first."""
        if not self._flights:
            self._launch(None)
        flight = self._flights[0]
        if self._ahead and len(self._flights) == 1 and not flight.is_last and self._may_launch():
            self._launch(flight)
        chosen = flight.handle.tokens()  # what is raised here leaves both steps under way
        self._flights.popleft()
        tokens, finished = self._land(flight, chosen)
        return flight.planned.report(began, tokens, finished)

    def _launch(self, before: Flight | None) -> None:
        """Schedule a step and start it.  before: the one under way, whose tokens it continues with."""
        assert launches(self._model), "only a model that launches gets here"
        if before is not None:
            self._settle(before)
            before.is_last = True  # until this one is under way: should it fail, tokens come first
        try:
            planned, _ = self._planned()
            if not len(planned.plan.rows):
                return
            sequences = [self._by_row[row] for row in planned.plan.rows.tolist()]
            step, feed = self._fed(planned.plan, sequences, before)
            rows = [s for s, samples in zip(sequences, planned.plan.samples.tolist(), strict=True) if samples]
            places = (self._state.known[planned.plan.rows] - self._state.prompt[planned.plan.rows])[planned.plan.samples]
            handle = self._model.launch(step, self._cache, picks(rows, places), feed)
        except BaseException:
            self._give_up()
            raise
        self._flights.append(Flight(planned=planned, sequences=sequences, handle=handle))

    def _fed(self, plan: StepPlan, sequences: list[Sequence], before: Flight | None) -> tuple[Step, Int32 | None]:
        """Return a step, and by token, which token of the step before stands there, -1 for one that is known."""
        source = {s.id: i for i, s in enumerate(before.sampled)} if before else {}
        unread = [len(s.tokens) < end for s, end in zip(sequences, (plan.start + plan.tokens).tolist(), strict=True)]
        waiting = [s for s, is_unread in zip(sequences, unread, strict=True) if is_unread]
        for s in waiting:
            s.tokens.append(0)
        step = runner.step_input(plan, self._tokens, self._state.block_table, self._cache)
        for s in waiting:
            s.tokens.pop()
        if not waiting:
            return step, None
        feed = np.full(len(step.tokens), -1, dtype=np.int32)
        feed[step.first[1:][unread] - 1] = [source[s.id] for s in waiting]
        return step, feed

    def _settle(self, flight: Flight) -> None:
        """Tell the scheduler that a step is computed; those who get their last token in it give back seat and blocks."""
        if flight.ended is None:
            full = set(batching.update(self._state, self.limits, flight.plan).tolist())
            over = [s for s in flight.sequences if s.row in full and self._by_row.get(s.row) is s]
            flight.ended = {s.id for s in over}
            for sequence in over:
                self._leave(sequence)

    def _land(self, flight: Flight, chosen: list[int]) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, Reason], ...]]:
        """Give sequences their tokens, but those that have ended since; return (id, token) and (id, reason)."""
        self._settle(flight)
        assert flight.ended is not None, "it is settled"
        tokens: list[tuple[int, int]] = []
        finished: list[tuple[int, Reason]] = []
        for sequence, token in zip(flight.sampled, chosen, strict=True):
            if self._by_id.get(sequence.id) is not sequence:
                continue
            _, stops = sequence.until_end([token], self.tokenizer.ends)
            sequence.tokens.append(token)
            tokens.append((sequence.id, token))
            if stops or sequence.id in flight.ended:
                finished.append((sequence.id, "stop" if stops else "length"))
                self._remove(sequence)
            elif sequence.hashes:
                batching.extend(self._state, sequence.row, sequence.hashes.more(sequence.tokens))
        return tuple(tokens), tuple(finished)

    # ------------------------------------------------------------ the parts of a step

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
        known: dict[int, list[int]] = self._tokens
        wanted: Int32 | None = None
        if drafts:
            known = {**known, **{row: [*known[row], *d.tokens] for row, d in drafts.items()}}
            asked = [1 + len(drafts[row].tokens) if row in drafts else 1 for row in plan.rows.tolist()]
            wanted = np.where(plan.samples, np.array(asked, dtype=np.int32), 0)
        step = runner.step_input(plan, known, self._state.block_table, self._cache, wanted)
        return self._only_text(self._model.forward(step, self._cache))

    def _choose(self, logits: torch.Tensor, sequences: list[Sequence], drafts: dict[int, Drafts]) -> Chosen:
        """Return what each sequence gets: a token, or the guesses that stand and one more."""
        if not sequences:
            if self._cache.device.type == "cuda":  # nothing is read back, and a step takes as long as it computes
                torch.cuda.synchronize(self._cache.device)
            return []
        if not drafts:
            tokens, logs = sample(logits, sequences)
            self._redraw(tokens, logits, sequences)
            return [([token], logs[i : i + 1]) for i, token in enumerate(tokens)]
        guesses = [drafts.get(s.row, speculate.NOTHING) for s in sequences]
        chosen, at = speculate.verify(logits, sequences, guesses), 0
        result: Chosen = []
        for sequence, new, guess in zip(sequences, chosen, guesses, strict=True):
            wants = sequence.sampling.logprobs is not None
            result.append((new, logprobs(logits[at : at + len(new)], speculate.places(sequence, new)[:-1], new) if wants else ()))
            at += len(guess.tokens) + 1
        return result

    def _redraw(self, tokens: list[int], logits: torch.Tensor, sequences: list[Sequence]) -> None:
        """Draw by the rule of a model that launches what it would have drawn: a request's tokens depend not on who is beside it."""
        if self._drafter is None and launches(self._model):
            drawn = [i for i, s in enumerate(sequences) if s.sampling.temperature and is_simple(s.sampling)]
            own = [sequences[i] for i in drawn]
            how = picks(own, [len(s.tokens) - s.given for s in own])
            for i, token in zip(drawn, self._model.choose(logits[drawn], how) if drawn else (), strict=True):
                tokens[i] = token

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
        new = None
        if len(tokens) > len(sequences):
            new = np.ones(len(plan.rows), dtype=np.int32)
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
