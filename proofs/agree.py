"""Theory, simulator and real engine agree.  `nox -s bench -- agree`; `python proofs/agree.py theory` or `engine` runs one part.

Part 1, theory against simulation, one replica, a grid of profiles, lengths, slots and loads: TTFT p99 and ITL (mean and percentiles) within
10 %, or inside the simulation's 99 % interval.  Where something else than slots binds there is no bar: such designs are simulated, by rule.

Part 2, simulator against `mlsys serve` on this machine (CPU, one thread on core 0, HTTP and client on core 1): p50 and p95 of TTFT, TPOT
and E2E within 10 % at 0.3 and 0.6 of the simulated saturation rate; at 0.85 p50 within 10 %, p95 within 10 % or inside the simulator's 90 %
band over 20 draws of the profile's uncertainty.  The simulator replays the very arrivals and lengths.  Each level is loaded in two slices,
all in turns with calibrations (one user, a flood, a ramp; in between short ramps: none of the levels).  The profile is fitted to all
calibrations, and for each slice as fast as those before and after it were, so that drift of the machine cancels.  Wants a quiet machine:
other work on these two cores shows as drift between calibrations, which is printed.

To tell where an error comes from, each level's own steps are set beside the profile, by batch, and a profile fitted to them is replayed as
well ("own steps": where that agrees and the judged one does not, the calibration misses; where neither does, simulator, HTTP or client).
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mlsys_bench import bench, hardware, jit, latency, loadtest, models, serve, stats, summary, workload
from mlsys_bench.batching import Limits
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys import served
from mlsys_bench.plan import agreement, sizing
from mlsys_bench.types import Bench, LatencyProfile, RequestRecord, Requests, Workload

WITHIN = 0.10
BARRED = ("ttft_p99", "itl_mean", "itl_p50", "itl_p95", "itl_p99")
LOADS = {0.5: 24_000, 0.7: 48_000, 0.85: 128_000, 0.95: 240_000}  # of capacity: requests simulated
SLOW = 0.1  # of them where nothing is compiled
LEVELS = ((0.3, 35.0), (0.6, 35.0), (0.85, 35.0))  # of saturation, seconds of load of a slice
SLICES, WARMUP_S = 2, 5.0  # of each level, and of each slice
GROUPS = (0, 1, 2, 3, 4, 6, 8, 9)  # batch sizes told apart when steps are set beside the profile
FEWEST = 5  # steps of a kind
STRICT = 0.7  # above it, p95 may instead lie in the band
DRAWS = 20
DEMO = workload.synthetic(1.0, prompt="lognormal:96:0.6:384", output="lognormal:40:0.6:160")
METRICS: dict[str, Callable[[RequestRecord], float | None]] = {"ttft": summary.ttft_s, "tpot": summary.tpot_s, "e2e": summary.e2e_s}


def main(parts: Sequence[str]) -> int:
    """Run the parts asked for, print every figure beside its bar, return 1 when one is missed."""
    missed = 0
    if not parts or "theory" in parts:
        missed += theory()
    if not parts or "engine" in parts:
        missed += engine()
    print(f"{missed} figure(s) missed their bar" if missed else "every figure kept its bar")
    return 1 if missed else 0


# ---------------------------------------------------------------- theory against simulation


def cases() -> Iterator[tuple[str, LatencyProfile, Limits, Workload]]:
    """Yield replicas to try: 8B on one H100, 70B on four, the built-in shape on a CPU; KV memory is ample, so that slots bind."""
    eight, seventy = (
        latency.roofline(models.find(name), hardware.find("h100-sxm"), precision="bf16", tp=tp)
        for name, tp in (("llama-3-8b", 1), ("llama-3-70b", 4))
    )
    nano = latency.roofline(models.find("nano"), hardware.find("cpu-2core"), precision="fp32")
    chat = workload.synthetic(1.0, prompt="lognormal:512:1.0:4096", output="lognormal:128:1.0:1024")
    write = workload.synthetic(1.0, prompt="lognormal:200:1.0:2000", output="lognormal:600:0.7:3000")
    fixed = workload.synthetic(1.0, prompt="256", output="64")
    for (device, profile), (lengths, traffic), seats in itertools.product(
        {"8B H100": eight, "70B 4xH100": seventy}.items(), {"chat": chat, "write": write, "fixed": fixed}.items(), (16, 64, 256)
    ):
        yield f"{device}, {lengths}, {seats} slots", profile, Limits(seats, 2048, 16, 500_000, 8192), traffic
    for seats in (8, 16, 64):
        yield f"nano CPU, demo, {seats} slots", nano, Limits(seats, 256, 16, 50_000, 1024), DEMO


def theory() -> int:
    """Print the grid; return how many figures miss their bar."""
    began_s, missed, cells = time.monotonic(), 0, 0
    worst = dict.fromkeys(BARRED, 0.0)
    print(f"theory against simulation: error of theory, % (bar ±{100 * WITHIN:.0f} %, or inside the simulated 99 % interval; * misses)")
    print(f"{'replica':32}{'load':>5} " + "".join(f"{key:>10}" for key in agreement.KEYS))
    for name, profile, limits, traffic in cases():
        replica = agreement.of(profile, limits, traffic)
        if replica.binds != "slots":
            print(f"{name:32}      {replica.binds} binds, not slots: simulated, by rule")
            continue
        for load, requests in LOADS.items():
            found = agreement.compare(replica, traffic, load, requests=requests if jit.HAVE_NUMBA else int(SLOW * requests))
            bad = [a for a in found if a.key in BARRED and not a.agrees(WITHIN)]
            missed, cells = missed + len(bad), cells + sum(a.key in BARRED for a in found)
            for a in found:
                if a.key in BARRED and a.high_s - a.low_s < 2 * WITHIN * a.simulated_s:
                    worst[a.key] = max(worst[a.key], abs(a.error))
            marks = "".join(f"{100 * a.error:+9.1f}{'*' if a in bad else ' '}" for a in found)
            print(f"{name:32}{load:5.2f} {marks}", flush=True)
    print("worst where the interval is below 10 %: " + ", ".join(f"{key} {100 * value:.1f} %" for key, value in worst.items()))
    print(f"{cells - missed} of {cells} figures agree; {time.monotonic() - began_s:.0f} s\n")
    return missed


# ---------------------------------------------------------------- simulator against the engine


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A load level as measured for a while.  `share`: of the saturation rate simulated before it."""

    share: float
    requests: Requests
    verdict: str
    own: served.Window  # its own steps, and what HTTP added


Way = Callable[[int], LatencyProfile]  # the profile to use for a slice, by its number


def engine(levels: Sequence[tuple[float, float]] = LEVELS) -> int:
    """Serve, calibrate and load in turns; print measured beside simulated; return how many figures miss their bar."""
    began_s = time.monotonic()
    alone = bench.run(bench.Options(device="cpu", only=("memory.read", "gemm", "engine.step"), launches=2, budget_s=80.0))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "steps.csv"
        with serve.start(serve.Options(port=0, device="cpu", queue_limit=1000, step_log=str(log))) as server:
            health = server.health()
            limits = Limits(**health["limits"])
            first = served.calibrate(server.url, log, DEMO, users=limits.max_seqs, seed=1)
            rate_per_s = served.saturation_per_s(DEMO, served.fit(health, [first], alone), limits)
            windows, slices = [first], []
            for i, (share, seconds) in enumerate(SLICES * tuple(levels)):
                slices.append(measure(server.url, log, share, rate_per_s, seconds, seed=100 + i))
                windows.append(served.recalibrate(server.url, log, DEMO, flood_per_s=first.flood_per_s, seed=10 * (i + 2)))
            windows.append(served.calibrate(server.url, log, DEMO, users=limits.max_seqs, seed=5))
    profile = served.fit(health, windows, alone)
    fixed = {**by_bench(alone), "first calibration": served.fit(health, windows[:1], alone), "all calibrations": profile}
    describe(fixed, windows, limits, rate_per_s)
    judged = [served.around(profile, beside) for beside in itertools.pairwise(windows)]
    missed = 0
    for share, _ in levels:
        chosen = {i: s for i, s in enumerate(slices) if s.share == share}
        own = served.fit(health, [s.own for s in chosen.values()], alone)
        ways: dict[str, Way] = {name: always(p) for name, p in fixed.items()}
        ways["own steps"] = lambda i, own=own: served.around(own, [slices[i].own])
        missed += judge(chosen, ways, judged, limits)
        explain(chosen, judged)
    print(f"{time.monotonic() - began_s:.0f} s\n")
    return missed


def always(profile: LatencyProfile) -> Way:
    """Return the way that uses one profile for every slice."""
    return lambda _: profile


def by_bench(alone: Bench) -> dict[str, LatencyProfile]:
    """Return the profile of steps timed in a process of their own, by its name, where the machine left time for enough of them."""
    try:
        return {"bench": latency.fit(alone)}
    except BadInput as error:
        print(f"no profile from the benchmark alone: {error}")
        return {}


def measure(url: str, log: Path, share: float, saturation_per_s: float, seconds: float, seed: int) -> Slice:
    """Load the server at a share of saturation for a while."""
    options = loadtest.Options(
        url=url,
        qps=share * saturation_per_s,
        prompt_tokens=DEMO.prompt_tokens,
        output_tokens=DEMO.output_tokens,
        duration_s=seconds,
        warmup_s=min(WARMUP_S, seconds / 4),
        seed=seed,
    )
    seen, requests = loadtest.run(options)
    verdict = f"{seen.validity.verdict} {'; '.join(seen.validity.reasons)}".strip()
    return Slice(share=share, requests=requests, verdict=verdict, own=served.logged(log, [requests], seen.request_rate_per_s))


def describe(ways: dict[str, LatencyProfile], windows: Sequence[served.Window], limits: Limits, rate_per_s: float) -> None:
    """Print what the profiles rest on, and what each says of saturation beside what the floods measured."""
    last = ways["all calibrations"]
    ratios = [served.stretch(last, w) for w in windows]
    print("simulator against the served engine: error of the simulator, %")
    print(f"profile: {last.note}")
    print("steps of each calibration against the profile of all: " + ", ".join(f"{100 * (r - 1):+.1f} %" for r in ratios))
    there_s, back_s = (last.constants[name] for name in ("request_overhead_s", "token_overhead_s"))
    print(f"HTTP adds {1e3 * there_s:.2f} ms to a request and {1e3 * back_s:.2f} ms to a token")
    floods = ", ".join(f"{w.flood_per_s:.2f}" for w in (windows[0], windows[-1]))
    simulated = ", ".join(f"{name} {served.saturation_per_s(DEMO, p, limits):.2f}/s" for name, p in ways.items())
    print(f"saturation: floods measured {floods}/s; simulated: {simulated}; levels are shares of {rate_per_s:.2f}/s")


def judge(slices: Mapping[int, Slice], ways: Mapping[str, Way], judged: Sequence[LatencyProfile], limits: Limits) -> int:
    """Print one level; return how many of its figures miss their bar by the judged profiles.  Other ways stand beside it."""
    found = {name: told(slices, way, limits) for name, way in ways.items()}
    predicted, band = told(slices, judged.__getitem__, limits), banded(slices, judged, limits)
    seen = figures([r for s in slices.values() for r in s.requests.requests])
    count, share = sum(r.in_window for s in slices.values() for r in s.requests.requests), next(iter(slices.values())).share
    print(f"\nat {share:.2f} of saturation, {count} requests, load test {'; '.join(dict.fromkeys(s.verdict for s in slices.values()))}")
    print(f"{'':10}{'measured':>10}{'simulated':>11}{'90 % band':>20}{'error':>8}  bar      " + "".join(f"{name:>20}" for name in ways))
    missed = 0
    for key, value in seen.items():
        simulated, (low, high) = predicted[key], band[key]
        error = simulated / value - 1
        may_lie_inside = share > STRICT and key.endswith("p95")
        kept = abs(error) <= WITHIN or (may_lie_inside and low <= value <= high)
        missed += not kept
        others = "".join(f"{100 * (figure[key] / value - 1):+19.1f}%" for figure in found.values())
        bar = f"10 %{' or band' if may_lie_inside else '':8}"
        span = f"{1e3 * low:.1f} to {1e3 * high:.1f}"
        print(f"{key:10}{1e3 * value:8.1f}ms{1e3 * simulated:9.1f}ms{span:>20}{100 * error:+7.1f}%  {bar}{'' if kept else '*':2}{others}")
    return missed


def explain(slices: Mapping[int, Slice], judged: Sequence[LatencyProfile]) -> None:
    """Print a level's own steps beside the judged profiles, by batch and by whether they read prompts, and HTTP's part."""
    told_s = np.concatenate([latency.step_s(judged[i], list(s.own.features.T)) for i, s in slices.items()])
    features, period_s = (np.concatenate([getattr(s.own, name) for s in slices.values()]) for name in ("features", "period_s"))
    batch, reads, cells = features[:, 0], features[:, 2] > 0, []
    for low, high in itertools.pairwise(GROUPS):
        for kind, rows in (("decode", ~reads), ("with prompts", reads)):
            chosen = rows & (batch >= low) & (batch < high)
            if chosen.sum() >= FEWEST:
                error = told_s[chosen].sum() / period_s[chosen].sum() - 1
                cells.append(f"{low}{f' to {high - 1}' if high - low > 1 else ''} {kind} {100 * error:+.1f} % ({chosen.sum()})")
    whole = ", ".join(f"{100 * (1 / served.stretch(judged[i], s.own) - 1):+.1f} %" for i, s in slices.items())
    print(f"profile against the level's own steps: {whole}; by batch: {', '.join(cells)}")
    for name, title in (("request", "request"), ("token", "token")):
        pairs = [(getattr(s.own, f"{name}_s"), judged[i].constants[f"{name}_overhead_s"]) for i, s in slices.items()]
        print(f"HTTP added to a {title}: " + ", ".join(f"{1e3 * seen_s:.2f} ms ({1e3 * taken_s:.2f} taken)" for seen_s, taken_s in pairs))


def told(slices: Mapping[int, Slice], way: Way, limits: Limits) -> dict[str, float]:
    """Return the figures of a level as a way of making profiles simulates them."""
    return figures([r for i, s in slices.items() for r in served.replayed(s.requests, way(i), limits)])


def figures(records: Sequence[RequestRecord]) -> dict[str, float]:
    """Return p50 and p95 of every metric over the requests that count."""
    counted = [r for r in records if r.in_window and r.outcome == "ok"]
    values = {name: [v for r in counted if (v := metric(r)) is not None] for name, metric in METRICS.items()}
    return {f"{name} p{p}": stats.quantile(v, p / 100) for name, v in values.items() for p in (50, 95)}


def banded(slices: Mapping[int, Slice], judged: Sequence[LatencyProfile], limits: Limits) -> dict[str, tuple[float, float]]:
    """Return the 5 % and 95 % points of each figure over draws of the profile's uncertainty, one draw at a time for all slices."""
    draws = {i: sizing.drawn(judged[i], DRAWS, seed=0) for i in slices}
    found = [told(slices, lambda i, k=k: draws[i][k], limits) for k in range(DRAWS)]
    return {key: (stats.quantile([f[key] for f in found], 0.05), stats.quantile([f[key] for f in found], 0.95)) for key in found[0]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
