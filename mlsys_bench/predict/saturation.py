"""The highest rate that a design keeps within its limits, by simulation: what MLPerf's Server and Offline scenarios ask.

    saturation()        that rate for a profile: Poisson arrivals at ever closer rates; without limits, everything at once
    max_rate_per_s()    the same with its 90 % interval
    learn(), predict()  what measured rates say of others, by engine, device, model and layout; predictions

One replica is simulated, which gets every n-th request of n replicas in turn; all levels share lengths and arrivals, only the rate differs.
As the rules of MLPerf ask, a run lasts 600 s or more.  A mean field of the steps gives the rate to begin with and how much the rate
depends on each coefficient: with n requests in a replica, a step decodes n tokens and, in balance, prefills n x prompt / output tokens.

Whoever submits a highest rate tunes for it: TensorRT-LLM then reserves no room for answers to come and preempts where that goes wrong
(`max_util`, the default of NVIDIA's harness for MLPerf 4.1).

With beams, b sequences of a request decode beside each other and share its prompt.  They are simulated as one sequence in units of b
tokens, with all work per token b times as long: a prompt of P tokens is then P / b units, and memory comes to P + b x answer.  Each beam
reads the prompt for itself, all but the first from the L2 cache at `CACHED` times the memory's rate: reads come to max(1, b / CACHED) P.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from mlsys_bench import batching, hardware, latency, models, workload
from mlsys_bench.batching import presets
from mlsys_bench.errors import unknown
from mlsys_bench.latency import step
from mlsys_bench.predict.experiment import Experiment, Prediction
from mlsys_bench.simulate import core
from mlsys_bench.types import LatencyProfile, Lengths, Provenance

Array = npt.NDArray[np.float64]
Profiles = Callable[[Experiment], LatencyProfile]
SLOTS = {"trtllm": 2048, "sglang": 2048}  # of a replica where nothing is said, by default of the engine
FEWER_SLOTS = 256  # of others: of vLLM before its version 1
STEP_TOKENS = 8192
RUN_S = 600.0
LEAST_REQUESTS, MOST_REQUESTS = 3000, 24_000
BEGINNING = 10  # one request of so many is the run's beginning, which is left out
HALVINGS, BISECTIONS = 8, 6  # to a rate that is kept; then to 1 %
ABOVE = 1.25  # times the rate of the mean field: mostly more than can be kept
SETTLES = 1.05  # times the throughput: at more the queue never settles, however late a loose limit shows it in a run that ends
CACHED = 2.0  # times the rate of memory, at which beams find a shared prompt in L2 (assumed): Hopper has 9.7 TB/s there beside 3.35 to 4.8
TURNS = 8  # replicas that take turns; more would hardly make arrivals more even
Z90, Z99 = 1.645, 2.326
UNKNOWN_SD = 0.3  # of log(rate) beside the coefficients: how a submission was tuned, its power limit, lengths nobody published; assumed
FIGURE_SD = {"ttft": 0.5, "tpot": 0.3, "e2e": 0.35}  # of log(time) at the highest rate; about what MLPerf 4.1 showed
SHARES = np.array(
    (0.15, 0.15, 0.15, 0.15, 0.2, 0.1)
)  # of the variance of log(measured / predicted rate), by `_groups`; the rest is a row's
FAR = 3.0  # sd from the middle beyond which a measured rate counts as so far only
LIMITS = tuple(f"{name}_{stat}_s" for name in FIGURE_SD for stat in ("mean", "p50", "p99"))  # that a rate can be asked under
PER_UNIT = (
    "flops_per_token", "attention_flops_per_token", "expert_flops_per_token", "head_flops", "activation_bytes_per_token",
    "link_s_per_token", "kv_bytes_per_token", "window_kv_bytes_per_token", "state_bytes", "decode_flops_per_pair",
)  # fmt: skip
PER_PAIR_OF_UNITS = ("attention_flops_per_pair", "window_flops_per_pair")


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturation:
    """The highest rate of the whole system, and the figures at it; without limits the rate alone."""

    rate_per_s: float
    figures: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What measured rates say: by row its groups and log(measured / predicted rate) in standard deviations."""

    keys: tuple[tuple[Hashable, ...], ...] = ()
    away: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Replica:
    """One replica and what it is asked, in units of `beams` tokens; equal for equal questions."""

    table: tuple[float, ...]
    profile: LatencyProfile = field(compare=False)
    limits: batching.Limits
    policy: batching.Policy
    prompt: Lengths
    output: Lengths
    beams: int
    turns: int
    slo: tuple[tuple[str, float], ...]


def asks_for_rate(e: Experiment) -> bool:
    """Say whether an experiment has no load of its own: its highest rate is asked for."""
    return e.rate_per_s is None and e.concurrency is None


def learn(rows: Sequence[Experiment], profiles: Profiles) -> Rates:
    """Return what the measured rates of experiments without a load say of others."""
    keys, away = [], []
    for e in rows:
        measured = e.measured.get("max_rate_per_s")
        found = saturation(e, profiles(e)) if measured and asks_for_rate(e) else None
        if measured and found:
            keys.append(_groups(e))
            away.append(math.log(measured / found.rate_per_s) / _sd(e, profiles(e)))
    return Rates(keys=tuple(keys), away=tuple(away))


def predict(experiments: Sequence[Experiment], profiles: Profiles, known: Rates) -> tuple[Prediction, ...]:
    """Return of each experiment the highest rate with its 90 % interval, and the times at it."""
    return tuple(_predict(e, profiles(e), known) for e in experiments)


def max_rate_per_s(e: Experiment, profile: LatencyProfile, known: Rates | None = None) -> tuple[float, float, float] | None:
    """Return the highest rate within the limits `e.slo` and its 90 % interval; None where no rate keeps them."""
    found = saturation(e, profile)
    if found is None:
        return None
    centre, sd = _deviation(e, _sd(e, profile), known or Rates())
    return _around(found.rate_per_s * math.exp(centre), sd)


def saturation(e: Experiment, profile: LatencyProfile) -> Saturation | None:
    """Return the highest rate within the limits `e.slo`, None where no rate keeps them; without limits the throughput.

    Neither speculation nor a pool of its own for prompts is simulated.  Raises UnknownName for a limit on another figure.
    """
    for name, _ in e.slo:
        if name not in LIMITS:
            raise unknown("limit", name, LIMITS)
    replica = _replica(e, profile)
    found = _saturation(replica) if replica.limits.blocks else None
    return Saturation(rate_per_s=e.replicas * found.rate_per_s, figures=found.figures) if found else None


def in_units(profile: LatencyProfile, beams: int, prompt_share: float = 0.0) -> LatencyProfile:
    """Return the profile of steps that are counted in units of so many tokens, decoded by as many beams.

    `prompt_share`: of the units in the cache, those of prompts, which each beam reads.
    """
    if beams == 1:
        return profile
    k, c = profile.constants, step.coefficients(profile)
    missed = (1 - k["experts_per_token"] / k["experts"]) ** beams if k["experts"] else 0.0
    more = {name: k[name] * beams for name in PER_UNIT if name in k} | {name: k[name] * beams**2 for name in PER_PAIR_OF_UNITS if name in k}
    c["sequence_s"] *= beams
    c["kv"] *= 1 + prompt_share * (max(beams / CACHED, 1.0) - 1)
    if missed and "expert_tile" in c:  # as many tiles for each expert that is hit
        c["expert_tile"] *= (1 - missed) * k["experts"] / (k["experts_per_token"] * beams)
    return replace(profile, coefficients=tuple(c.values()), constants=k | more | {"experts_per_token": k["experts"] * (1 - missed)})


# ---------------------------------------------------------------- simulation


@functools.lru_cache(maxsize=1024)
def _saturation(replica: _Replica) -> Saturation | None:
    """Return the same for one replica."""
    throughput_per_s = _throughput_per_s(replica)
    if not replica.slo:
        return Saturation(rate_per_s=throughput_per_s, figures={})
    most = SETTLES * throughput_per_s
    n = int(min(max(RUN_S * most, LEAST_REQUESTS), MOST_REQUESTS))
    low, found = _lowered(replica, n, min(ABOVE * _mean_field_per_s(replica, replica.profile), most))
    if found is None:
        return None
    high = min(2 * low, most)
    while high < most and (better := _kept(replica, n, high)):
        low, high, found = high, min(2 * high, most), better
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high)
        better = _kept(replica, n, middle)
        low, high, found = (middle, high, better) if better else (low, middle, found)
    return Saturation(rate_per_s=low, figures=found)


def _lowered(replica: _Replica, n: int, rate_per_s: float) -> tuple[float, dict[str, float] | None]:
    """Return the first of ever lower rates that is kept, with its figures; None where even the lowest is not."""
    for _ in range(HALVINGS):
        rate_per_s /= 2
        found = _kept(replica, n, rate_per_s)
        if found:
            return rate_per_s, found
    return rate_per_s, None


def _kept(replica: _Replica, n: int, rate_per_s: float) -> dict[str, float] | None:
    """Return the figures of n requests at a rate, None where they break a limit.

    A replica that gets every k-th request of a Poisson process sees gaps of a gamma law of shape k.
    """
    gaps_s = np.random.default_rng(1).gamma(replica.turns, 1 / (replica.turns * rate_per_s), n)
    tracks = _played(replica, np.cumsum(gaps_s))
    if np.any(tracks.fate != 200):
        return None
    found = _figures(tracks, replica.profile.constants.get("request_overhead_s", 0.0))
    return found if all(found[name] <= limit for name, limit in replica.slo) else None


def _throughput_per_s(replica: _Replica) -> float:
    """Return the answers per second where all requests wait from the beginning: those of the middle half."""
    n = min(max(6 * replica.limits.max_seqs, LEAST_REQUESTS), MOST_REQUESTS)
    ends_s = np.sort(_played(replica, np.zeros(n)).last_s)
    return float((n // 2) / (ends_s[n // 4 + n // 2] - ends_s[n // 4]))


def _played(replica: _Replica, at_s: Array) -> core.Tracks:
    """Return what becomes of requests that are due at these times."""
    prompt, output = _lengths(replica.prompt, len(at_s), 2), _lengths(replica.output, len(at_s), 3)
    asked = workload.Schedule(scheduled_s=at_s, prompt_tokens=-(-prompt // replica.beams), output_tokens=output)
    return core.play(asked, replica.limits, profile=replica.profile, policy=replica.policy)


def _lengths(lengths: Lengths, n: int, seed: int) -> npt.NDArray[np.int64]:
    """Return n token counts whose mean is the one given: a law that is cut at its maximum falls short of it."""
    drawn = workload.draw_lengths(lengths, n, np.random.default_rng(seed))
    scaled = np.rint(drawn * (lengths.mean / drawn.mean()))
    cut: npt.NDArray[np.int64] = np.clip(scaled, 1, lengths.max or math.inf).astype(np.int64)
    return cut


def _figures(tracks: core.Tracks, outside_s: float) -> dict[str, float]:
    """Return mean, median and p99 of the times of requests, their beginning left out."""
    taken = slice(len(tracks.first_s) // BEGINNING, None)
    first_s, last_s, tokens = tracks.first_s[taken], tracks.last_s[taken], tracks.tokens[taken]
    ttft_s = first_s - tracks.arrived_s[taken] + outside_s
    several = tokens > 1
    times = {
        "ttft": ttft_s,
        "tpot": (last_s - first_s)[several] / (tokens[several] - 1) if np.any(several) else np.zeros(1),
        "e2e": last_s - tracks.arrived_s[taken] + outside_s,
    }
    stats: dict[str, Callable[[Array], float]] = {"mean": np.mean, "p50": np.median, "p99": lambda s: np.quantile(s, 0.99)}
    return {f"{name}_{stat}_s": float(of(sample)) for name, sample in times.items() for stat, of in stats.items()}


# ---------------------------------------------------------------- one replica


def _replica(e: Experiment, profile: LatencyProfile) -> _Replica:
    counted = in_units(profile, e.beams, e.prompt_tokens.mean / e.beams / _context_units(e))
    return _Replica(
        table=tuple(latency.table(counted).tolist()), profile=counted, limits=_limits(e), policy=_policy(e.engine), prompt=e.prompt_tokens,
        output=e.output_tokens, beams=e.beams, turns=min(e.replicas, TURNS), slo=e.slo,
    )  # fmt: skip


def _limits(e: Experiment) -> batching.Limits:
    """Return what a replica holds, by slots and KV memory, in units of `e.beams` tokens."""
    slots, step_tokens = e.max_seqs or SLOTS.get(e.engine, FEWER_SLOTS), e.max_step_tokens or STEP_TOKENS
    held = models.kv_budget_tokens(
        models.find(e.model), hardware.find(e.device), precision=e.precision, kv_precision=latency.kv_format(e.engine, e.precision),
        tp=e.tp, pp=e.pp, experts_over=e.stage_gpus, memory_share=e.memory_share, max_seqs=slots,
        max_step_tokens=step_tokens, engine=e.engine if e.engine in models.ENGINES else "sglang", engine_version=e.engine_version,
        context_tokens=math.ceil(_most(e.prompt_tokens) + _most(e.output_tokens)),
    ).tokens * e.attention_dp // e.beams  # fmt: skip
    block_tokens = 16
    most = -(-_most(e.prompt_tokens) // e.beams) + _most(e.output_tokens)
    blocks = held // block_tokens if held >= most else 0
    seats = min(slots, max(int(held / _context_units(e)), 1) * 2)  # arrays are as long as this
    return batching.Limits(
        max_seqs=seats, max_step_tokens=max(step_tokens // e.beams, 1), block_tokens=block_tokens, blocks=blocks, max_context=most
    )  # fmt: skip


def _policy(engine: str) -> batching.Policy:
    """Return the rules of an engine, tuned for throughput."""
    usual = presets.preset(engine).policy if engine in presets.engines() else batching.Policy()
    return usual._replace(reserve=0.0 if engine == "trtllm" else usual.reserve, prefix_cache=0)


def _most(lengths: Lengths) -> int:
    return lengths.max or math.ceil(lengths.mean * (1 + 4 * lengths.cv))


def _context_units(e: Experiment | _Replica) -> float:
    """Return the mean that a running request holds, in units: long answers are met more often, by their length."""
    prompt, output = (e.prompt_tokens, e.output_tokens) if isinstance(e, Experiment) else (e.prompt, e.output)
    return prompt.mean / e.beams + output.mean * (1 + output.cv**2) / 2


# ---------------------------------------------------------------- mean field


def _mean_field_per_s(replica: _Replica, profile: LatencyProfile) -> float:
    """Return about the highest rate: at the most requests whose 99th percentile has a slot, room, and a time per token within its limit."""
    limits = dict(replica.slo)
    most = min(float(replica.limits.max_seqs), replica.limits.blocks * replica.limits.block_tokens / _context_units(replica))
    longest = _most(replica.output)

    def keeps(n: float) -> bool:
        """Say so of a mean number that fluctuates like that of a Poisson process."""
        high = n + Z99 * math.sqrt(n)
        step_s = _step_s(replica, profile, high)
        late = step_s > limits.get("tpot_p99_s", math.inf) or step_s * longest > limits.get("e2e_p99_s", math.inf)
        return high <= most and not late

    low, high = (0.0, most) if replica.slo else (most, most)
    for _ in range(30 if replica.slo else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    n = low or most
    return n / (replica.output.mean * _step_s(replica, profile, n))


def _step_s(replica: _Replica, profile: LatencyProfile, n: float) -> float:
    """Return the time of a step with n requests decoding and their share of prompts."""
    begun, prompt = n / replica.output.mean, replica.prompt.mean / replica.beams
    pairs = prompt**2 * (1 + replica.prompt.cv**2) / 2
    return latency.step_s(profile, (n, n * _context_units(replica), begun * prompt, begun * pairs, n + begun))


# ---------------------------------------------------------------- what other rates say


def _predict(e: Experiment, profile: LatencyProfile, known: Rates) -> Prediction:
    found = saturation(e, profile)
    if found is None:
        return Prediction(key=e.key, figures={}, provenance=profile.provenance, notes=("no rate keeps the limits",))
    centre, sd = _deviation(e, _sd(e, profile), known)
    rate = _around(found.rate_per_s * math.exp(centre), sd)
    tokens = e.output_tokens.mean
    figures = {"max_rate_per_s": rate, "output_tokens_per_s": (rate[0] * tokens, rate[1] * tokens, rate[2] * tokens)}
    figures |= {name: _around(value, FIGURE_SD[name.split("_")[0]]) for name, value in found.figures.items()}
    seen = any(_groups(e)[4] == key[4] for key in known.keys)
    return Prediction(key=e.key, figures=figures, provenance=Provenance.CALIBRATED if seen else profile.provenance)


def _around(value: float, sd: float) -> tuple[float, float, float]:
    return value, value * math.exp(-Z90 * sd), value * math.exp(Z90 * sd)


def _sd(e: Experiment, profile: LatencyProfile) -> float:
    """Return the sd of log(rate) while no rate is known: of the coefficients, by slopes of the mean field, and of what is unknown."""
    replica = _replica(e, profile)
    if not replica.limits.blocks:
        return UNKNOWN_SD
    here, moves = math.log(_mean_field_per_s(replica, replica.profile)), 0.02
    slopes = []
    for i, value in enumerate(replica.profile.coefficients):
        moved = list(replica.profile.coefficients)
        moved[i] = value * math.exp(moves)
        slopes.append((math.log(_mean_field_per_s(replica, replace(replica.profile, coefficients=tuple(moved)))) - here) / moves)
    variance = float(np.array(slopes) @ np.asarray(profile.covariance) @ np.array(slopes))
    return math.sqrt(max(variance, 0.0) + UNKNOWN_SD**2 + profile.residual_log_sd**2)


def _deviation(e: Experiment, sd: float, known: Rates) -> tuple[float, float]:
    """Return the expected log(measured / predicted rate) and its sd: the normal law with variances shared as `SHARES`, given known rows."""
    if not known.away:
        return 0.0, sd
    away = np.array(known.away)
    middle = float(np.median(away))
    away = np.clip(away, middle - FAR, middle + FAR)
    rows = [np.array([hash(key[g]) for key in known.keys]) for g in range(len(SHARES))]
    covariance = (1 - SHARES.sum()) * np.eye(len(away))
    covariance += sum(share * np.equal.outer(own, own) for share, own in zip(SHARES, rows, strict=True))
    mine = [hash(group) for group in _groups(e)]
    across = sum(share * (own == here) for share, own, here in zip(SHARES, rows, mine, strict=True))
    weights = np.linalg.solve(covariance, across)
    return sd * float(weights @ away), sd * math.sqrt(max(1 - float(weights @ across), 1 - float(SHARES.sum())))


def _groups(e: Experiment) -> tuple[Hashable, ...]:
    """Return what a rate has in common with others: all, engine and kind of load, device, model, layout, system."""
    kind = bool(e.slo)
    return "all", (e.engine, kind), e.device, e.model, (*e.layout, e.engine), e.group
