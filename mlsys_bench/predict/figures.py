"""TTFT and time per token of many experiments at once, as a function of the coefficients: what learning evaluates thousands of times.

Closed loops add up the steps of their `mix`.  Open loops are solved as a mean field: N = rate x E2E requests are in the system (Little), a
share f = rate x ITL of the steps holds a prefill, ITL = (1 - f) decode + f mixed step, and a first token waits for `wait_steps` steps, its
own, and `first_s`.  Whoever decodes is there itself: with N others if arrivals are Poisson (PASTA), as one of max(N, 1) if regular.
Disaggregated systems decode without prefill, and prefill in a pool of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsys_bench import hardware, latency, models
from mlsys_bench.latency import coefficients as names
from mlsys_bench.latency import physics
from mlsys_bench.models import sampling
from mlsys_bench.predict import mix
from mlsys_bench.predict.experiment import Experiment
from mlsys_bench.types import Lengths

Array = npt.NDArray[np.float64]
STEP_TOKENS = 8192  # budget of a step where nothing is said: the default of vLLM on large GPUs and of SGLang
DRAFTS = (2, 1)  # tokens proposed beside the one that is sure, where nobody says: more help small batches, fewer large ones
MOST_DRAFTS = 3  # those that the coefficient `draft_tokens` is of
_UNTOLD = -1
_NEWTON = 8
RESERVING = ("trtllm",)  # engines that admit a request only when memory for its whole answer is free (GUARANTEED_NO_EVICT)
_ROUNDS = 24  # of the mean field
_TINY = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """Experiments as arrays: constants of their layouts by name [n], the steps of closed loops [m, 5] with weights, and loads."""

    experiments: tuple[Experiment, ...]
    constants: dict[str, Array]
    owner: npt.NDArray[np.int64]  # [m] experiment of each kind of step
    features: Array  # [m, 5]
    first: Array  # [m]
    later: Array  # [m] of requests once the loop runs evenly
    further: Array  # [m]
    is_open: npt.NDArray[np.bool_]
    is_regular: npt.NDArray[np.bool_]  # arrivals at equal distances
    rate_per_s: Array
    prompt: Array
    output: Array
    repeats_prompts: Array  # 1 where prefix caching finds most of a prompt
    drafts: Array  # tokens proposed beside the one that is sure: 0 without speculation, below 0 where nobody says how many
    disaggregated: Array
    pool: dict[str, Array]  # constants of one prefill worker of a disaggregated system, by name [n]; elsewhere those of the replica
    prefill_workers: Array
    held_steps: Array
    clients: Array  # of the whole system
    replicas: Array

    def __len__(self) -> int:
        return len(self.experiments)


def design(experiments: Sequence[Experiment]) -> Design:
    """Return the arrays of experiments.  Raises UnknownName for a model or device nobody knows, BadInput for one that cannot compute so."""
    rows = [constants(e) for e in experiments]
    pools = [_pool(e) if e.disaggregated else k for e, k in zip(experiments, rows, strict=True)]
    found = [_mix(e) for e in experiments]
    has = [(i, m) for i, m in enumerate(found) if m is not None]
    stacked = {name: np.array([k[name] for k in rows]) for name in (rows[0] if rows else {})}
    return Design(
        experiments=tuple(experiments),
        constants=stacked,
        owner=np.concatenate([np.full(len(m.first), i) for i, m in has]) if has else np.zeros(0, dtype=np.int64),
        features=np.concatenate([m.features for _, m in has]) if has else np.zeros((0, 5)),
        first=np.concatenate([m.first for _, m in has]) if has else np.zeros(0),
        later=np.concatenate([m.later for _, m in has]) if has else np.zeros(0),
        further=np.concatenate([m.further for _, m in has]) if has else np.zeros(0),
        is_open=np.array([e.concurrency is None for e in experiments], dtype=bool),
        is_regular=np.array([e.arrivals == "constant" for e in experiments], dtype=bool),
        rate_per_s=np.array([(e.rate_per_s or 0.0) / e.replicas for e in experiments]),
        prompt=np.array([e.prompt_tokens.mean for e in experiments]),
        output=np.array([max(e.output_tokens.mean, 2.0) for e in experiments]),
        repeats_prompts=np.array([float(e.sessions > 0) for e in experiments]),
        drafts=np.array([0 if e.speculative is None else e.draft_tokens or _UNTOLD for e in experiments], dtype=float),
        disaggregated=np.array([float(e.disaggregated) for e in experiments]),
        pool={name: np.array([k[name] for k in pools]) for name in stacked},
        prefill_workers=np.array([max(e.prefill_gpus // max(e.prefill_tp, 1), 1) for e in experiments], dtype=float),
        held_steps=np.array([float(e.held_steps) for e in experiments]),
        clients=np.array([float(e.concurrency or 0) for e in experiments]),
        replicas=np.array([float(e.replicas) for e in experiments]),
    )


def constants(e: Experiment) -> dict[str, float]:
    """Return the constants of an experiment's layout, as profiles hold them."""
    arch, device = models.find(e.model), hardware.find(e.device)
    precision = precision_of(e)
    sorts = bool(sampling.truncates(arch.id)) and not e.greedy
    return physics.layout_constants(
        arch, device, precision=precision, sorts_vocabulary=sorts, tp=e.tp, pp=e.pp, ep=e.ep, moe_tp=e.moe_tp, attention_dp=e.attention_dp,
        engine=e.engine,
    )  # fmt: skip


def precision_of(e: Experiment) -> str:
    """Return the precision of the weights, '' meaning 16 bit."""
    return {"": "bf16", "fp16": "bf16"}.get(e.precision.lower(), e.precision.lower())


def figures(d: Design, x: Array) -> tuple[Array, Array]:
    """Return log(seconds per further token) and log(TTFT) of each experiment, for log-coefficients `x`: [p], or [n, p] by experiment."""
    c = {name: np.exp(x[..., i]) for i, name in enumerate(names.NAMES)}
    t = latency.entries(names.floored(names.terms(c, d.constants), latency.MULTIPLIERS), d.constants)
    t = [np.broadcast_to(np.asarray(entry, dtype=float), (len(d),)) for entry in t]
    tpot, ttft = _closed(d, c, t)
    if d.is_open.any():
        open_tpot, open_ttft = _open(d, c, t)
        tpot, ttft = np.where(d.is_open, open_tpot, tpot), np.where(d.is_open, open_ttft, ttft)
    return np.log(np.maximum(tpot, _TINY)), np.log(np.maximum(ttft, _TINY))


def settled(experiments: Sequence[Experiment]) -> Array:
    """Return log(TTFT of a request that comes once the loop runs evenly, over the mean of all): where a median lies.

    A benchmark of a closed loop begins with all its clients at once, and the mean holds what they wait for each other's prompts.
    By the assumed coefficients: the ratio hardly depends on them.
    """
    if not experiments:
        return np.zeros(0)
    d = design(experiments)
    usual, later = (figures(one, names.ASSUMED_LOG)[1] for one in (d, dataclasses.replace(d, first=d.later)))
    return later - usual


def slopes(d: Design, x: Array, step: float = 1e-4) -> tuple[Array, Array]:
    """Return the derivatives [n, p] of both figures by the log-coefficients, by finite differences."""
    tpot, ttft = figures(d, x)
    by: list[tuple[Array, Array]] = []
    for i in range(len(names.NAMES)):
        moved = np.array(x, dtype=float)
        moved[..., i] += step
        a, b = figures(d, moved)
        by.append(((a - tpot) / step, (b - ttft) / step))
    return np.array([a for a, _ in by]).T, np.array([b for _, b in by]).T


def _closed(d: Design, c: dict[str, Any], t: Sequence[Array]) -> tuple[Array, Array]:
    if not len(d.owner):
        nothing = np.ones(len(d))
        return nothing, nothing
    step_s = latency.many([entry[d.owner] for entry in t], d.features.T)
    tpot, first_s = (np.bincount(d.owner, step_s * weight, len(d)).astype(float) for weight in (d.further, d.first))
    tokens: Any = 1.0
    if d.drafts.any():
        tpot, first_s, tokens = _speculated(d, c, t, tpot, first_s)
    outside_s = c["first_s"] + c["client_s"] + c["prompt_token_s"] * d.prompt
    ttft = first_s + (c["wait_steps"] + d.held_steps / 2) * tpot * tokens + outside_s
    return _apart(d, c, t, tpot, ttft, outside_s) if (d.disaggregated > 0).any() else (tpot, ttft)


def _speculated(
    d: Design, c: dict[str, Any], t: Sequence[Array], tpot: Array, first_s: Array, share: Array | None = None
) -> tuple[Array, Array, Array]:
    """Return the times, and the tokens that a step brings each sequence, where it proposes some.

    As many are proposed as is set, or where nobody says so many of `DRAFTS` as make the times shortest.  A token then takes fewer steps,
    but prompts are computed as often as before.
    """
    speculates = d.drafts != 0
    of = np.flatnonzero(speculates[d.owner])
    owner, f = d.owner[of], d.features[of].T.copy()
    if share is not None:
        f *= share[owner]
    entries = [entry[owner] for entry in t]
    decodes, prefills = f[0] > 0, f[2] > 0
    further, first = d.further[of], d.first[of]
    mixed, plain = (np.bincount(owner, further * kind, len(d)) for kind in (decodes & prefills, decodes & ~prefills))
    best, brought = np.full(len(d), np.inf), np.ones(len(d))
    for untold in DRAFTS:
        drafts = np.where(d.drafts > 0, d.drafts, untold)
        steps = 1 / _tokens(c["draft_tokens"], drafts)  # a token takes
        kept = np.minimum(1.0, steps / np.maximum(mixed, _TINY))  # of steps with prefill: beyond, one step computes prompts of several
        fewer = np.maximum(steps - mixed * kept, 0.0) / np.maximum(plain, _TINY)
        times = np.where(decodes, np.where(prefills, kept[owner], fewer[owner]), 1.0)
        more = np.where(decodes, 1 / kept[owner], 1.0)
        own = drafts[owner]
        step_s = latency.many(entries, [f[0] * (1 + own), f[1], f[2] * more, f[3] * more, f[4]])
        step_s = step_s * np.where(decodes, 1 + own / d.constants["layers"][owner], 1.0)  # the draft module is a layer of its own
        found = np.bincount(owner, step_s * further * times, len(d))
        better = speculates & (found < best)
        best, brought = np.where(better, found, best), np.where(better, 1 / steps, brought)
        first_s = np.where(better, np.bincount(owner, step_s * first * times, len(d)), first_s)
    return np.where(speculates, best, tpot), first_s, brought


def _tokens(most: Any, drafts: Array) -> Any:
    """Return the tokens of a step with so many proposed, given those with `MOST_DRAFTS`.

    Each is accepted with one chance if the last one was: 1 + p + ... + p^drafts (Leviathan et al. 2023, Fast Inference from Transformers
    via Speculative Decoding, eq. 1).
    """
    powers = range(MOST_DRAFTS + 1)
    chance = np.clip((most - 1.0) / MOST_DRAFTS, 0.05, 0.99)
    for _ in range(_NEWTON):
        rise = sum(i * chance ** (i - 1) for i in powers[1:])
        chance = np.clip(chance - (sum(chance**i for i in powers) - most) / rise, 0.01, 0.99)
    return (1 - chance ** (drafts + 1)) / (1 - chance)


def _apart(d: Design, c: dict[str, Any], t: Sequence[Array], tpot: Array, ttft: Array, outside_s: Any) -> tuple[Array, Array]:
    """Return the times of disaggregated systems: who waits for the prefill pool is not in the decode batch.

    A pool of s seconds a prompt and N clients that come back Z seconds after their prompt is done: R = s (1 + N R / (R + Z)).
    """
    pool = latency.entries(names.floored(names.terms(c, d.pool), latency.MULTIPLIERS), d.pool)
    zero, pairs = np.zeros(len(d)), d.prompt / 2
    alone_s = latency.many(pool, (zero, zero, d.prompt, d.prompt * pairs, zero + 1))
    full = np.maximum(d.prompt, STEP_TOKENS * d.pool["attention_dp"])
    each_s = latency.many(pool, (zero, zero, full, full * pairs, full / d.prompt)) * d.prompt / full / d.prefill_workers
    here, of = d.disaggregated > 0, np.flatnonzero(d.disaggregated[d.owner] > 0)
    owner, f = d.owner[of], d.features[of].T
    entries = [entry[owner] for entry in t]
    seated = d.replicas * np.maximum(
        np.bincount(owner, f[0] * d.further[of], len(d)), _TINY
    )  # that decode at once, where nobody waits elsewhere
    apart, found, share = ttft, tpot, np.ones(len(d))
    for _ in range(_ROUNDS // 3):
        decode_s = (d.output - 1) * found
        away = each_s * d.clients - decode_s
        waited_s = (away + np.sqrt(away**2 + 4 * each_s * decode_s)) / 2
        unseated_s = decode_s * (d.clients / seated - 1)
        apart = np.where(here, np.maximum(alone_s - each_s + waited_s + outside_s + c["transfer_s"], unseated_s), ttft)
        decoding = d.clients * decode_s / (decode_s + apart)
        share = np.where(here, 0.5 * share + 0.5 * np.minimum(decoding / seated, 1.0), 1.0)
        steps_s = latency.many(entries, f * share[owner])
        found = np.where(here, np.bincount(owner, steps_s * d.further[of], len(d)), tpot)
        if d.drafts.any():
            found = np.where(here, _speculated(d, c, t, found, apart, share)[0], found)
    return found, apart


def _open(d: Design, c: dict[str, Any], t: Sequence[Array]) -> tuple[Array, Array]:
    computed = d.prompt * np.where(d.repeats_prompts > 0, np.minimum(c["uncached"], 1.0), 1.0)
    past, zero = d.prompt - computed, np.zeros(len(d))
    itl, ttft = np.full(len(d), 0.02), np.full(len(d), 0.1)
    for _ in range(_ROUNDS):
        n = np.minimum(d.rate_per_s * (ttft + (d.output - 1) * itl), 1e4)
        with_it = np.where(d.is_regular, np.maximum(n, 1.0), n + 1.0)  # in a step that brings a given request a token
        reads = with_it * (d.prompt + d.output / 2)
        decode_s = latency.many(t, (with_it, reads, zero, zero, with_it))
        mixed_s = latency.many(t, (with_it, reads, computed, computed * (past + computed / 2), with_it + 1))
        share = np.minimum(d.rate_per_s * itl, 1.0)
        itl = 0.5 * itl + 0.5 * ((1 - share) * decode_s + share * mixed_s)
        busy = np.minimum(n, 1.0)  # with fewer than one request at a time an arrival mostly finds the engine idle
        ttft = c["wait_steps"] * itl * busy + mixed_s + c["first_s"] + c["prompt_token_s"] * d.prompt
    return itl, ttft


def _mix(e: Experiment) -> mix.Mix | None:
    if e.concurrency is None:
        return None
    clients = max(1, round(e.concurrency / e.replicas))
    seats = min(seats_of(e), e.max_seqs or 10**9, clients)
    return _steps(
        clients,
        e.prompt_tokens,
        e.output_tokens,
        e.max_step_tokens or STEP_TOKENS,
        seats,
        e.engine == "sglang",
        e.disaggregated,
        e.requests,
    )


@functools.lru_cache(maxsize=4096)
def _steps(
    clients: int, prompt: Lengths, output: Lengths, budget: int, seats: int, prefill_first: bool, disaggregated: bool, requests: int | None
) -> mix.Mix:
    found = mix.closed(clients, prompt, output, max_step_tokens=budget, seats=seats, prefill_first=prefill_first, requests=requests)
    return mix.decode_only(found) if disaggregated else found


def seats_of(e: Experiment) -> int:
    """Return the requests that KV memory holds at once, by the mean context: prompt and half of the output, or all that may come."""
    arch, device = models.find(e.model), hardware.find(e.device)
    precision = precision_of(e)
    held = 1.0 if e.engine in RESERVING else 0.6
    context = e.prompt_tokens.mean + held * e.output_tokens.mean
    budget = models.kv_budget_tokens(
        arch, device, precision=precision, kv_precision=latency.kv_format(e.engine, precision), tp=e.tp, pp=e.pp,
        experts_over=e.stage_gpus, memory_share=e.memory_share,
        max_step_tokens=e.max_step_tokens or STEP_TOKENS, max_seqs=e.max_seqs or 256,
        engine=e.engine if e.engine in models.ENGINES else "sglang", engine_version=e.engine_version, context_tokens=math.ceil(context),
    )  # fmt: skip
    return max(1, math.floor(budget.tokens * e.attention_dp / context))


def _pool(e: Experiment) -> dict[str, float]:
    """Return the constants of one prefill worker, spread as the decode workers are: tensor parallel, or data-parallel attention."""
    gpus = max(e.prefill_tp, 1)
    ep = gpus if e.attention_dp > 1 else min(e.prefill_ep, gpus)
    ranks = gpus if e.attention_dp > 1 else 1
    return constants(dataclasses.replace(e, tp=gpus // ranks, attention_dp=ranks, ep=ep, moe_tp=gpus // ep))
