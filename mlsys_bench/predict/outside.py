"""A step profile from outside: what the tokens of a few probing requests say of a server's engine.

Decode: while c requests that were sent together all decode, tokens come one step apart, so the time over many tokens divided by their
number is the step's time at batch c, whatever the way to the client adds.  Prefill: the first token of a lone request comes after

    TTFT(p) = request_overhead_s + sum of the steps its p tokens are cut into + token_overhead_s,

so with the step budget B known, TTFT(p) - TTFT(p - B) of two prompts is one step of B tokens with p - B before it, free of overheads;
prompts within one step hold them, and their sum is the number that makes prefill and decode steps agree best on one profile (least
misfit; its interval by how fast the misfit grows).  The streams of one step reach the client one after another: that spacing is what the
way back of a token costs, `token_overhead_s`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mlsys_bench import hardware, latency
from mlsys_bench.errors import BadInput, UnknownName
from mlsys_bench.latency import solve
from mlsys_bench.latency.calibrate import cells
from mlsys_bench.types import Bench, LatencyProfile, Launch, Layout, Measurement, Provenance, RequestRecord, Round, Scalar

BLOCK_TOKENS = 8  # tokens that one sample of a decode step is the mean of: the jitter of the two ends is shared by so many
_EDGE_TOKENS = 2  # of the time when all decode: the step that brought the last one in may still be mixed
_OVERHEADS = 25  # tried between nothing and the shortest TTFT
_FINER = 5  # steps on either side of the best of them
_SHARE = 0.98  # of the shortest TTFT: the most the overhead may take
_DROP = 2.71 / 2  # of the log-likelihood: the 90 % interval of one number
_GROUP = 4  # samples that make a round
_NOISE = 0.03  # of log(time): what so short a formula misses even without noise
Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """Steps in which `batch` requests, each with about `context_tokens` tokens, made one token each."""

    batch: int
    context_tokens: float
    step_s: tuple[float, ...]
    spacing_s: float | None  # between two streams of one step; None for a single one


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prefilling:
    """First tokens of lone requests of one length."""

    prompt_tokens: int
    ttft_s: tuple[float, ...]


def decoding(records: Sequence[RequestRecord]) -> Decoding | None:
    """Return the steps of a wave while all of its requests decoded, or None where they never all did for long enough."""
    if not records or any(r.outcome != "ok" or len(r.token_s) < 2 or not r.prompt_tokens for r in records):
        return None
    start_s = max(r.token_s[0] for r in records)
    end_s = min(r.token_s[-1] for r in records)
    streams = [_between(r, start_s, end_s) for r in records]
    tokens = min(len(times) for times, _, _ in streams) - 1
    blocks = tokens // BLOCK_TOKENS
    if blocks < 1:
        return None
    at = np.arange(blocks + 1) * BLOCK_TOKENS
    per_token = np.array([np.diff(times[at]) / (BLOCK_TOKENS * rate) for times, rate, _ in streams])
    context = sum(float(r.prompt_tokens or 0) + done + rate * tokens / 2 for r, (_, rate, done) in zip(records, streams, strict=True))
    return Decoding(
        batch=len(records),
        context_tokens=context / len(records),
        step_s=tuple(per_token.mean(axis=0).tolist()),
        spacing_s=_spacing([times for times, _, _ in streams]),
    )


def _between(record: RequestRecord, start_s: float, end_s: float) -> tuple[Array, float, float]:
    """Return when a request's events came within a time, the tokens of each, and the tokens it had before."""
    times = np.asarray(record.token_s)
    inside = np.flatnonzero((times >= start_s) & (times <= end_s))[_EDGE_TOKENS:]
    rate = max((record.output_tokens or len(times)) - 1, 1) / max(len(times) - 1, 1)
    return times[inside], rate, rate * float(inside[0]) if len(inside) else 0.0


def _spacing(streams: Sequence[Array]) -> float | None:
    """Return the median time between the tokens of two streams of one step."""
    if len(streams) < 2:
        return None
    count = min(len(times) for times in streams)
    step_s = float(np.median(np.diff(streams[0])))
    spread = np.array([_spread(streams, i, step_s) for i in range(count)])
    return float(np.median(spread)) / (len(streams) - 1)


def _spread(streams: Sequence[Array], i: int, step_s: float) -> float:
    """Return how long the tokens nearest to the first stream's i-th take to come, wrapped to one step."""
    at = streams[0][i]
    nearest = np.array([times[np.argmin(np.abs(times - at))] for times in streams])
    return float(min(nearest.max() - nearest.min(), step_s))


def prefilling(waves: Sequence[Sequence[RequestRecord]]) -> tuple[Prefilling, ...]:
    """Return the first tokens of lone requests by prompt length, as the server counted it."""
    found: dict[int, list[float]] = {}
    for records in waves:
        for r in records:
            if len(records) == 1 and r.outcome == "ok" and r.token_s and r.sent_s is not None and r.prompt_tokens:
                found.setdefault(r.prompt_tokens, []).append(r.token_s[0] - r.sent_s)
    return tuple(Prefilling(prompt_tokens=tokens, ttft_s=tuple(values)) for tokens, values in sorted(found.items()))


# ---------------------------------------------------------------- the profile


def fit(
    decodes: Sequence[Decoding],
    prefills: Sequence[Prefilling],
    *,
    layout: Layout,
    max_step_tokens: int | None,
    limits: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
) -> tuple[LatencyProfile, Bench]:
    """Return the profile of what was seen, and its steps as `engine.step` cells.

    `max_step_tokens` is the server's step budget, None where it is not known: prompts are then taken to be one step.
    Raises BadInput where too little was seen.
    """
    within = [p for p in prefills if max_step_tokens is None or p.prompt_tokens <= max_step_tokens]
    beyond = _later_chunks(prefills, max_step_tokens) if max_step_tokens else []
    if len(within) < 2:
        raise BadInput("the probe saw first tokens of fewer than two prompt lengths within one step; give it a larger --budget")
    decode_cells = [_decode_cell(d, layout, limits or {}) for d in _merged(decodes)]
    fixed = [*decode_cells, *(_prefill_cell(values, p, past, layout, limits or {}) for p, past, values in beyond)]

    def bench(overhead_s: float) -> Bench:
        lone = [_prefill_cell([t - overhead_s for t in p.ttft_s], p.prompt_tokens, 0, layout, limits or {}) for p in within]
        return Bench(measurements=(*fixed, *lone, *_ceilings(layout)))

    overhead_s, low_s, high_s = _overhead(bench, layout, min(min(p.ttft_s) for p in within))
    seen = bench(overhead_s)
    profile = latency.fit(seen, layout=layout)
    spacings = [d.spacing_s for d in decodes if d.spacing_s is not None]
    back_s = min(float(np.median(spacings)), overhead_s) if spacings else 0.0  # of the overhead, the part that every token pays
    constants = {"request_overhead_s": overhead_s - back_s, "token_overhead_s": back_s}
    said = f"seen from outside; a request costs {1e3 * overhead_s:.2g} ms ({1e3 * low_s:.2g} to {1e3 * high_s:.2g}) beside its steps"
    note = "; ".join([said, *notes, *([profile.note] if profile.note else [])])
    return dataclasses.replace(profile, constants=profile.constants | constants, note=note), seen


def ttft_s(profile: LatencyProfile, prompt_tokens: int, max_step_tokens: int | None = None) -> float:
    """Return the time to first token of a lone request: the overhead and every step its prompt is cut into."""
    total_s = profile.constants.get("request_overhead_s", 0.0) + profile.constants.get("token_overhead_s", 0.0)
    budget, past = max_step_tokens or prompt_tokens, 0
    while past < prompt_tokens:
        chunk = min(budget, prompt_tokens - past)
        past += chunk
        total_s += latency.step_s(profile, (0.0, 0.0, float(chunk), chunk * (past - chunk / 2), float(past == prompt_tokens)))
    return total_s


def _merged(decodes: Sequence[Decoding]) -> list[Decoding]:
    """Return the cells with the samples of all their waves together; contexts of one cell differ by a token or two."""
    found: dict[tuple[int, int], list[Decoding]] = {}
    for d in decodes:
        found.setdefault((d.batch, round(8 * math.log2(d.context_tokens))), []).append(d)
    return [
        dataclasses.replace(
            same[0], context_tokens=float(np.mean([d.context_tokens for d in same])), step_s=tuple(s for d in same for s in d.step_s)
        )
        for same in found.values()
    ]


def _later_chunks(prefills: Sequence[Prefilling], budget: int) -> list[tuple[int, int, list[float]]]:
    """Return (tokens, tokens before them, times) of the last step of each prompt of whole steps whose one-step-shorter twin was seen."""
    whole = {p.prompt_tokens: p for p in prefills if p.prompt_tokens % budget == 0}
    found = []
    for tokens, longer in whole.items():
        shorter = whole.get(tokens - budget)
        if shorter is not None:
            middle = float(np.median(shorter.ttft_s))
            values = [t - middle for t in longer.ttft_s if t > middle]
            if values:
                found.append((budget, tokens - budget, values))
    return found


def _decode_cell(d: Decoding, layout: Layout, limits: Mapping[str, float]) -> Measurement:
    features = (float(d.batch), d.batch * d.context_tokens, 0.0, 0.0, float(d.batch))
    return _cell(features, d.step_s, layout, limits)


def _prefill_cell(values: Sequence[float], tokens: int, past: int, layout: Layout, limits: Mapping[str, float]) -> Measurement:
    return _cell((0.0, 0.0, float(tokens), tokens * (past + tokens / 2), 1.0), values, layout, limits)


def _cell(features: Sequence[float], values: Sequence[float], layout: Layout, limits: Mapping[str, float]) -> Measurement:
    parameters: dict[str, Scalar] = {
        "model": layout.model,
        "precision": layout.precision,
        "device": layout.device,
        "threads": layout.threads,
        "pinned_cores": None if layout.pinned_cores is None else ",".join(map(str, layout.pinned_cores)),
        "tp": layout.tp,
        **dict(zip(latency.FEATURES, features, strict=True)),
        **limits,
    }
    groups = [tuple(values[i : i + _GROUP]) for i in range(0, len(values), _GROUP)]
    launch = Launch(started_s=0.0, rounds=tuple(Round(values=group) for group in groups))
    return Measurement(name="engine.step", unit="s", better="lower", parameters=parameters, launches=(launch,))


def _ceilings(layout: Layout) -> tuple[Measurement, ...]:
    """Return what the catalogue says the device can do at most; nothing for a device it does not know."""
    try:
        device = hardware.find(layout.device)
        peak = hardware.compute_flops_per_s(device, layout.precision)
    except (UnknownName, BadInput):
        return ()
    found = (("memory.read", "B/s", device.bandwidth_bytes_per_s), ("gemm", "FLOP/s", peak))
    same: dict[str, Scalar] = {"device": layout.device, "threads": layout.threads, "precision": layout.precision}
    return tuple(
        Measurement(
            name=name,
            unit=unit,
            better="higher",
            parameters=same,
            launches=(Launch(started_s=0.0, rounds=(Round(values=(value,)),)),),
        )
        for name, unit, value in found
    )


def _overhead(bench: Callable[[float], Bench], layout: Layout, shortest_s: float) -> tuple[float, float, float]:
    """Return the overhead of a request that fits prefill and decode to one profile best, and its 90 % interval.

    The form's shape constants are those of a fit at half the shortest TTFT; each overhead is then judged by the misfit of all cells.
    """
    constants = latency.fit(bench(shortest_s / 2), layout=layout).constants
    coarse = np.linspace(0.0, _SHARE * shortest_s, _OVERHEADS)
    score = {float(o): _misfit(bench(float(o)), constants) for o in coarse}
    near = min(score, key=lambda o: score[o])
    fine = np.linspace(max(near - coarse[1], 0.0), min(near + coarse[1], coarse[-1]), 2 * _FINER + 1)
    score |= {float(o): _misfit(bench(float(o)), constants) for o in fine}
    best = min(score, key=lambda o: score[o])
    inside = [o for o, value in score.items() if value <= score[best] + _DROP]
    return best, min(inside), max(inside)


def _misfit(bench: Bench, constants: dict[str, float]) -> float:
    """Return the negative log-likelihood of the cells under their best coefficients, heavy tails allowed."""
    rows = cells([m for m in bench.measurements if m.name == "engine.step"])
    logs = solve.least(rows, constants)
    terms = dict(zip(solve.names(constants), np.exp(logs).tolist(), strict=True))
    profile = _bare(terms, constants)
    off = np.array([(math.log(r.median_s) - math.log(latency.step_s(profile, r.features))) / math.hypot(r.log_se, _NOISE) for r in rows])
    return float(np.log1p(off**2 / 3).sum() * 2)  # Student, three degrees of freedom


def _bare(terms: Mapping[str, float], constants: dict[str, float]) -> LatencyProfile:
    n = len(terms)
    return LatencyProfile(
        form="step",
        layout=Layout(model="", precision="", device=""),
        stage=None,
        terms=tuple(terms),
        coefficients=tuple(terms.values()),
        covariance=tuple((0.0,) * n for _ in range(n)),
        constants=constants,
        residual_log_sd=0.0,
        valid={},
        provenance=Provenance.CALIBRATED,
    )
