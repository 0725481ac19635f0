"""Whether a plan's 90 % intervals hold the truth in 90 % of worlds, and whether a smaller fleet that would do is inside them.

In each world an engine is made up: the roofline's coefficients, drawn from how they differ between engines.  It is measured as by
`mlsys bench`, with noise of the cell and of the launch; `latency.fit` sees these cells only, and its form has fewer terms than the engine.
A plan is made with the fitted profile, and held against the engine itself, in long simulations: what its users see at the rate planned,
and how few replicas it needs.  Arguments: how many worlds, and the first of them.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import _one_thread  # noqa: F401
import numpy as np

from mlsys_bench import latency, plan, slo, stats, workload
from mlsys_bench.batching import Limits
from mlsys_bench.plan import again, candidates, demand, sizing
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.simulate import core
from mlsys_bench.types import Bench, LatencyProfile, Launch, Measurement, Plan, Round, Scalar

WORLDS, PROCESSES = 192, 2
REQUESTS = 120_000  # of each long simulation: of 30,000 a p99 differs by 3 to 5 % from run to run, and the replicas needed with it
SATURATING = 12_000  # of those that find how much an engine can do
LAUNCHES, ROUNDS, SAMPLES = 3, 2, 12
CELL, LAUNCH, SAMPLE = 0.02, 0.01, 0.02  # sd of the log: of a cell in one launch, of a launch, of a sample
ENGINES = (
    ("llama-3-8b", "H100-SXM", "bf16", 1, 64), ("llama-3-8b", "L40S", "bf16", 1, 128), ("llama-3-70b", "H100-SXM", "fp8", 4, 128),
    ("qwen2.5-72b", "H200-SXM", "fp8", 2, 128), ("qwen2.5-14b", "A100-80GB-SXM", "bf16", 1, 64), ("llama-3-8b", "L4", "fp8", 1, 32),
    ("qwen2.5-32b", "H100-SXM", "bf16", 2, 256), ("mistral-nemo-12b", "H200-SXM", "bf16", 1, 256),
)  # fmt: skip
TRAFFIC = (
    ("lognormal:512:1.0:4096", "lognormal:128:1.0:1024"), ("lognormal:1155:0.96:8192", "lognormal:211:0.77:1024"),
    ("lognormal:2500:0.7:8000", "lognormal:350:0.8:1500"), ("lognormal:300:0.6:2000", "lognormal:500:0.7:2000"),
)  # fmt: skip
FLEETS, HEADROOMS = (1.5, 4.0, 12.0, 40.0, 150.0), (0.2, 0.1, 0.05, 0.2)  # replicas, about
ABOVE_IDLE = 1.5  # of the value without traffic: a limit is at least so much, as people set them
ARRIVALS = ("poisson", "poisson", "gamma:2")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What is asked, with a fitted profile; and the engine that it was fitted to."""

    name: str
    request: plan.Request
    limits: Limits
    engine: LatencyProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A plan beside the truth."""

    name: str
    planned: int
    needed: int
    replicas: tuple[float, float]
    inside: dict[str, bool]  # by key
    off: dict[str, float]  # log of predicted over true
    half: dict[str, float]  # half the log of the interval's ends
    fewer: str  # what is said of one replica fewer: "inside", "misses" or "CLAIMED"
    seconds: float  # of the plan


def main(arguments: Sequence[str] = ()) -> int:
    """Print coverage by figure beside 90 %; return how many bars are missed."""
    count, first = (int(a) for a in [*arguments, *(str(WORLDS), "0")[len(arguments) :]])
    with concurrent.futures.ProcessPoolExecutor(PROCESSES) as pool:
        found = []
        for one in pool.map(judged, range(first, first + count)):
            found.append(one)
            wrong = [key for key, inside in one.inside.items() if not inside]
            said = f"{one.planned:5,}{one.needed:6,}  {one.replicas[0]:g}–{one.replicas[1]:g}"
            print(f"{one.name:76}{said:24}{one.fewer:8} {one.seconds:4.1f} s  {' '.join(wrong)}", flush=True)
    return _summary(found)


def _summary(found: Sequence[Found]) -> int:
    missed = 0
    rows = {key: [f.inside[key] for f in found if key in f.inside] for key in found[0].inside}
    print(f"\n{'figure':24}{'inside':>8}{'of':>6}{'Wilson 90 %':>18}{'half width':>12}{'sd of error':>12}{'bias':>8}")
    for key, inside in rows.items():
        low, high = stats.wilson(sum(inside), len(inside), level=0.9) or (0.0, 1.0)
        verdict = "MISSED" if high < 0.9 else "ok" if low <= 0.9 else "ok, too wide"
        missed += high < 0.9
        half, off = ([getattr(f, name)[key] for f in found if key in getattr(f, name)] for name in ("half", "off"))
        more = f"{np.median(half):12.3f}{np.std(off):12.3f}{np.mean(off):8.3f}" if off else f"{'':32}"
        print(f"{key:24}{np.mean(inside):8.1%}{len(inside):6}{low:12.1%}–{high:.1%}{more}  {verdict}")
    missed += _together(found)
    held = [f.replicas[0] <= f.needed <= f.replicas[1] for f in found]
    widths = [(f.replicas[1] - f.replicas[0]) / max(1.0, 0.1 * f.planned) for f in found]
    fewer = Counter(f.fewer for f in found)
    for what, value, bar, kept in (
        ("replicas inside", f"{np.mean(held):.1%}", ">= 90 %", np.mean(held) >= 0.9),
        ("their mean width, of max(1, 10 %)", f"{np.mean(widths):.2f}", "<= 1", np.mean(widths) <= 1),
        ("one fewer: claimed too few without ground", f"{fewer['CLAIMED']}", "0", not fewer["CLAIMED"]),
    ):
        missed += not kept
        print(f"{what:50}{value:>10}  {bar:8} {'ok' if kept else 'MISSED'}")
    print(f"one fewer: {dict(fewer)}; a plan took {np.median([f.seconds for f in found]):.2f} s of CPU (median)")
    return missed


def _together(found: Sequence[Found]) -> bool:
    """Print the share of all latencies inside, and whether it misses 90 % on either side.

    The figures of one world are inside or outside together, so worlds are what is counted: Wilson's interval of as many independent figures
    as their shares differ like (effective sample size, Kish 1965).
    """
    shares = np.array([np.mean(list(f.inside.values())) for f in found])
    mean, variance = float(shares.mean()), float(shares.var(ddof=1)) if len(found) > 1 else 0.0
    figures = sum(len(f.inside) for f in found)
    worth = min(figures, round(len(found) * mean * (1 - mean) / variance)) if variance > 0 else figures
    low, high = stats.wilson(round(mean * worth), worth, level=0.9) or (0.0, 1.0)
    kept = low <= 0.9 <= high
    print(f"{'all latencies':24}{mean:8.1%}{figures:6}{low:12.1%}–{high:.1%}, worth {worth} independent ones  {'ok' if kept else 'MISSED'}")
    return not kept


def judged(i: int) -> Found:
    """Return the plan of one world beside its truth."""
    world = made_up(i)
    started = time.process_time()
    made = plan.plan(world.request)
    seconds = time.process_time() - started
    seen, gaps = played(world, made.replicas, 11 + i)
    true = {k: v for k, v in seen.keys(world.request.slo).items() if not k.startswith("itl")} | gaps
    ends = {k: made.intervals[k] for k in true}
    return Found(
        name=world.name, planned=made.replicas, needed=needed(world, made.replicas, 5 + i), replicas=made.intervals["replicas"],
        inside={k: ends[k][0] <= true[k] <= ends[k][1] for k in true},
        off={k: math.log(made.predicted[k] / true[k]) for k in true},
        half={k: math.log(ends[k][1] / ends[k][0]) / 2 for k in true},
        fewer=_of_one_fewer(world, made), seconds=seconds,
    )  # fmt: skip


def _of_one_fewer(world: World, made: Plan) -> str:
    """Return whether one replica fewer is inside the interval, or its upper end misses a limit or the headroom, as it must."""
    if made.replicas == 1 or made.intervals["replicas"][0] < made.replicas:
        return "inside"
    seen = again.foresee(made, world.request.workload, made.replicas - 1)
    over = [seen.intervals.get(f"{slo.key(x)}_s", (0.0, math.inf))[1] >= x.limit for x in world.request.slo]
    busy = seen.rate_per_s / seen.capacity_interval[0] > sizing.usable(world.request.headroom)
    return "misses" if busy or any(over) else "CLAIMED"


# ---------------------------------------------------------------- worlds


def made_up(i: int) -> World:
    """Return a world: engine, traffic, limits and fleet differ from one to the next."""
    rng = np.random.default_rng([7, i])
    model, gpu, precision, tp, slots = ENGINES[i % len(ENGINES)]
    prompt, output = TRAFFIC[(i // len(ENGINES) + i) % len(TRAFFIC)]
    traffic = workload.synthetic(10.0, prompt=prompt, output=output)
    asked = plan.Request(
        model=model, workload=traffic, slo=slo.parse("ttft_p95<100s"), gpus=(gpu,), precisions=(precision,), max_batch=slots,
        max_step_tokens=2048,
    )  # fmt: skip
    usual = next(c for c in candidates.every(asked)[0] if (c.tp, c.layout.pp, c.layout.ep) == (tp, 1, 1))
    drawn = latency.draw(usual.profile, rng)
    engine = latency.engine_only(drawn)
    fitted = latency.fit(measured(engine, usual.limits, rng))
    rough = Replica(fitted, usual.limits, demand.of(traffic).fitting(usual.limits))
    load = rng.uniform(0.45, 0.85)
    limits = _limits(i % 4, rough.predict(load * rough.capacity_per_s), rough.predict(sizing.IDLE * rough.capacity_per_s))
    rate = FLEETS[i % 5] * rng.uniform(0.8, 1.2) * load * rough.capacity_per_s
    arrivals, headroom = ARRIVALS[i % 3], HEADROOMS[(i // 3) % 4]
    return World(
        name=f"{model} {gpu}, {arrivals}, {limits}, headroom {headroom:.0%}",
        request=replace(
            asked, workload=replace(traffic, rate_per_s=rate, arrivals=arrivals), slo=slo.parse(limits), headroom=headroom,
            profiles=(fitted,), gpus=(), precisions=(), max_batch=None, max_step_tokens=None, seed=i,
        ),
        limits=usual.limits,
        engine=slowed(engine, math.exp(LAUNCH * rng.standard_normal())),
    )  # fmt: skip


def _limits(kind: int, at: Latencies, idle: Latencies) -> str:
    """Return limits that bind at this load, by kind; the last leaves the capacity to bind.

    None is less than `ABOVE_IDLE` of what an idle replica does: so close to it fleets of half and of double the size look alike.
    """

    def ms(metric: str, stat: str, times: float = 1.0) -> str:
        least = ABOVE_IDLE * (idle.value(metric, stat) or 0.0)
        return f"{metric}_{stat}<{1e3 * max(times * (at.value(metric, stat) or 0.0), least):.4g}ms"

    if kind == 0:
        return ms("ttft", "p95")
    if kind == 1:
        return f"{ms('ttft', 'p99')},{ms('tpot', 'p99', 1.6)}"
    return ms("tpot", "p95") if kind == 2 else ms("e2e", "p95", 4.0)


def slowed(engine: LatencyProfile, factor: float) -> LatencyProfile:
    """Return an engine whose every step takes so many times as long: another launch of the same program."""
    terms = zip(engine.terms, engine.coefficients, strict=True)
    return replace(engine, coefficients=tuple(c if name == "expert_tile" else c * factor for name, c in terms))


def measured(engine: LatencyProfile, limits: Limits, rng: np.random.Generator) -> Bench:
    """Return the bench file that an engine gives."""
    at, k = engine.layout, engine.constants
    common: dict[str, Scalar] = {
        "model": at.model, "precision": at.precision, "device": at.device, "tp": at.tp, "threads": None, "max_batch": limits.max_seqs,
        "max_step_tokens": limits.max_step_tokens, "block_tokens": limits.block_tokens,
        "kv_tokens": limits.blocks * limits.block_tokens, "max_context": limits.max_context,
    }  # fmt: skip
    launches = np.exp(LAUNCH * rng.standard_normal(LAUNCHES)).tolist()
    steps = [
        Measurement(
            name="engine.step", unit="s", better="lower", parameters={**common, **dict(zip(latency.FEATURES, features, strict=True))},
            launches=tuple(_launch(latency.step_s(engine, features) * launch, rng) for launch in launches),
        )
        for features in cells(limits)
    ]  # fmt: skip
    ceilings = [
        Measurement(
            name=name, unit=unit, better="higher", parameters={"device": at.device, "threads": None, "precision": at.precision},
            launches=(Launch(started_s=0.0, rounds=(Round(values=(k[ceiling],)),)),),
        )
        for name, unit, ceiling in (("memory.read", "B/s", "bandwidth_bytes_per_s"), ("gemm", "FLOP/s", "peak_flops_per_s"))
    ]  # fmt: skip
    return Bench(measurements=(*steps, *ceilings))


def _launch(time_s: float, rng: np.random.Generator) -> Launch:
    centre = time_s * math.exp(CELL * rng.standard_normal())
    rounds = (Round(values=tuple((centre * np.exp(SAMPLE * rng.standard_normal(SAMPLES))).tolist())) for _ in range(ROUNDS))
    return Launch(started_s=0.0, rounds=tuple(rounds))


def cells(limits: Limits) -> Iterator[tuple[float, ...]]:
    """Yield the steps that are measured: decodes by batch and context, prompts by length and place, and some of both."""
    pool, most = limits.blocks * limits.block_tokens, limits.max_seqs
    halves = [most >> i for i in range(most.bit_length())]
    for context, batch in itertools.product((128, 512, 2048), sorted({n for h in halves for n in (h, 3 * h // 4) if n})):
        if 1.2 * batch * context <= pool:
            yield float(batch), float(batch * context), 0.0, 0.0, float(batch)
    for chunk, past in itertools.product((64, 256, 512, 1024, 2048), (0, 2048)):
        yield 0.0, 0.0, float(chunk), chunk * (past + chunk / 2), 1.0
    for batch, context, chunk in ((most // 2, 512, 256), (most - 1, 256, 64), (most // 2, 512, 1024)):
        yield float(batch), float(batch * context), float(chunk), chunk * chunk / 2, batch + 1.0


# ---------------------------------------------------------------- truth


def played(world: World, replicas: int, seed: int) -> tuple[Latencies, dict[str, float]]:
    """Return what users of one replica of the true engine see, beside the percentiles of the gaps."""
    traffic = world.request.workload
    each = replace(traffic, rate_per_s=traffic.rate_per_s / replicas, arrivals="poisson")
    schedule = workload.schedule(each, n=REQUESTS, seed=seed)
    if traffic.arrivals != "poisson":
        schedule = replace(schedule, scheduled_s=_thinned(float(traffic.arrivals.removeprefix("gamma:")), each.rate_per_s, replicas, seed))
    first, end = int(0.1 * len(schedule)), int(0.97 * len(schedule))
    from_s = float(schedule.scheduled_s[first])
    tracks = core.play(schedule, world.limits, profile=world.engine, routing="random", seed=seed, compiled=True, gaps_from_s=from_s)
    rows = np.arange(first, end)[tracks.fate[first:end] == 200]
    due_s, tokens = schedule.scheduled_s[rows], schedule.output_tokens[rows]
    ttft_s, e2e_s = tracks.first_s[rows] - due_s, tracks.last_s[rows] - due_s
    tpot_s = np.where(tokens > 1, (e2e_s - ttft_s) / np.maximum(tokens - 1, 1), np.nan)
    seen = Latencies(ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=e2e_s, itl_s=np.zeros(0))
    return seen, {f"itl_p{p}_s": tracks.gap_quantile_s(p / 100) for p in (50, 95, 99)}


def _thinned(cv: float, rate_per_s: float, replicas: int, seed: int) -> np.ndarray:
    """Return when requests come to one of so many replicas, those of the fleet having gamma gaps: as many gaps as chance passes it over."""
    rng = np.random.default_rng(seed)
    gaps = rng.geometric(1 / replicas, REQUESTS)
    return np.asarray(np.cumsum(rng.gamma(gaps / cv**2)) * cv**2 / (rate_per_s * replicas))


def needed(world: World, near: int, seed: int) -> int:
    """Return the fewest replicas of the true engine that keep headroom and limits, looked for about a guess."""
    usable = sizing.usable(world.request.headroom) * capacity_per_s(world)
    least = max(1, math.ceil(world.request.workload.rate_per_s / usable - 1e-9))

    def keeps(n: int) -> bool:
        return all(excess < 1 for excess, _ in played(world, n, seed)[0].excesses(world.request.slo))

    low, high = least - 1, max(near, least)
    step = max(1, high // 30)
    while not keeps(high):
        low, high, step = high, high + step, 2 * step
    step = max(1, high // 30)
    while high - step > low and keeps(high - step):
        high, step = high - step, 2 * step
    low = max(low, high - step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


def capacity_per_s(world: World) -> float:
    """Return the rate at which the true engine answers while requests wait."""
    flood = workload.schedule(replace(world.request.workload, rate_per_s=1e4, arrivals="poisson"), n=SATURATING, seed=3)
    tracks = core.play(flood, world.limits, profile=world.engine, seed=3, compiled=True)
    start_s, end_s = np.nanquantile(tracks.last_s, [0.2, 0.8])
    return float(0.6 * np.count_nonzero(tracks.fate == 200) / (end_s - start_s))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
