"""The planner against brute force: replicas, the smallest fleet of a trace, and how long a plan takes.

Brute force tries replica counts one after another in long simulations of its own: stations by Kiefer and Wolfowitz's recursion on services
and gaps drawn here, engines token by token.  Arguments choose parts: `stations`, `engines`, `trace`, `speed`; none is all.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import _one_thread  # noqa: F401
import numpy as np

from mlsys_bench import hardware, plan, queueing, slo, workload
from mlsys_bench.plan import candidates, search
from mlsys_bench.plan.demand import of as demand_of
from mlsys_bench.plan.trial import of_tracks
from mlsys_bench.queueing import laws
from mlsys_bench.queueing.des import recursion
from mlsys_bench.queueing.des.streams import arrival_times
from mlsys_bench.simulate import core
from mlsys_bench.types import Limit

TRACE = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces" / "azure_llm_2023_conv.csv"
ANALYTIC_S, CONFIRMED_S = 1.0, 10.0
CUSTOMERS = 400_000  # of each simulated station
REQUESTS = 30_000  # of each simulated engine
WARM = 0.1  # of either, before any is counted
SEED = 20_261_121


@dataclass(slots=True)
class Sheet:
    """Prints figures beside their bars and counts the misses."""

    cases: int = 0
    missed: int = 0

    def counts(self, what: str, planned: int, brute: int, note: str = "") -> None:
        """Print replicas planned beside those brute force needs: within 1, or 1 %."""
        self.cases += 1
        kept = abs(planned - brute) <= max(1.0, 0.01 * brute)
        self.missed += not kept
        print(f"{what:84}{planned:6,}{brute:8,}  {'ok' if kept else 'MISSED':7}{note}", flush=True)

    def holds(self, what: str, said: str, kept: bool) -> None:
        """Print a statement that must hold."""
        self.missed += not kept
        print(f"{what:84}{said:>14}  {'ok' if kept else 'MISSED'}", flush=True)


def main() -> int:
    """Print each figure beside its bar; return 1 when one is missed."""
    sheet, parts = Sheet(), {"stations": stations, "engines": engines, "trace": trace, "speed": speed}
    for name, part in parts.items():
        if not sys.argv[1:] or name in sys.argv[1:]:
            started = time.perf_counter()
            part(sheet)
            print(f"{'':84}{time.perf_counter() - started:11.0f} s\n")
    print(f"{sheet.cases} cases against brute force; {sheet.missed} missed")
    return 1 if sheet.missed else 0


# ---------------------------------------------------------------- stations


def stations(sheet: Sheet) -> None:
    """Size stages without batching: service SCV 0 to 10, 1 to 500 servers, p95 and p99, steady and in bursts."""
    print(f"{'stations: servers for a limit on the wait':84}{'plan':>6}{'brute':>8}")
    for scv, offered, p in itertools.product((0.0, 0.5, 1.0, 4.0, 10.0), (0.6, 7.0, 55.0, 450.0), (0.95, 0.99)):
        _size(sheet, "Poisson", laws.Exponential(1 / offered), scv, p)
    for scv, offered in itertools.product((0.5, 4.0), (7.0, 55.0)):
        bursts = queueing.Bursts(rates_per_s=(0.6 * offered, 3.0 * offered), switches_per_s=((0.0, 0.01), (0.05, 0.0)))
        _size(sheet, "bursts of 5 x the calm rate", bursts, scv, 0.95)


def _size(sheet: Sheet, what: str, arrivals: laws.Law | queueing.Bursts, scv: float, p: float) -> None:
    """Size one station of services of 1 s; the limit is tighter where many servers share the queue."""
    service = laws.parse_law(f"logn:{scv:g}" if scv not in (0.0, 1.0) else "det" if scv == 0 else "exp", 1.0)
    offered = recursion.rate_per_s(queueing.Station(arrivals=arrivals, service=service))
    limit_s = 0.5 / math.sqrt(max(offered, 1.0))
    station = queueing.Station(arrivals=arrivals, service=service)
    sized = queueing.servers_for(queueing.Target(station=station, limit_s=limit_s, p=p, of="wait"), tolerance=0.02)
    brute = _least(lambda c: _wait_p(arrivals, service, c, p) <= limit_s, sized.servers, math.floor(offered) + 1)
    said = f"{what}, service SCV {scv:g}, {offered:.3g} erlangs, p{100 * p:g} of the wait under {limit_s:.3g} services"
    sheet.counts(said, sized.servers, brute)


def _wait_p(arrivals: laws.Law | queueing.Bursts, service: laws.Law, servers: int, p: float) -> float:
    """Return a quantile of the wait in one long run; every number of servers meets the same customers."""
    rng = np.random.default_rng(SEED)
    streams = rng.spawn(2)
    arrive_s = arrival_times(arrivals, streams[0], 1, CUSTOMERS)
    wait_s = recursion.waits(arrive_s, service.sample(streams[1], (1, CUSTOMERS)), servers)[0, int(WARM * CUSTOMERS) :]
    return float(np.quantile(wait_s, p))


def _least(meets: Callable[[int], bool], near: int, least: int) -> int:
    """Return the least number that meets, going down or up from a guess one by one."""
    n = max(near, least)
    if meets(n):
        while n > least and meets(n - 1):
            n -= 1
        return n
    while not meets(n):
        n += 1
    return n


# ---------------------------------------------------------------- engines


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An engine and its traffic."""

    name: str
    request: plan.Request


def cases() -> Iterator[Case]:
    """Yield engines where slots bind and where memory binds, limits on TTFT, TPOT and E2E, steady and in bursts."""
    chat = workload.synthetic(10, prompt="lognormal:512:1.0:4096", output="lognormal:128:1.0:1024")
    long = workload.synthetic(10, prompt="lognormal:3000:0.8:12000", output="lognormal:400:0.8:2000")
    base = plan.Request(
        model="llama-3-8b", workload=chat, slo=slo.parse("ttft_p95<500ms"), gpus=("h100-sxm",), precisions=("bf16",), max_batch=64,
        max_step_tokens=2048, headroom=0.05,
    )  # fmt: skip
    for slots, rate, limits in (
        (16, 12.0, "ttft_p95<400ms"), (16, 60.0, "ttft_p99<800ms"), (32, 25.0, "tpot_p95<14ms"),
        (32, 200.0, "ttft_p95<300ms,tpot_p99<25ms"), (64, 120.0, "e2e_p95<6s"), (64, 700.0, "ttft_p99<600ms"),
        (256, 300.0, "tpot_p99<20ms"), (256, 2500.0, "ttft_p95<500ms,tpot_p99<40ms"),
    ):  # fmt: skip
        yield Case(
            name=f"{slots} slots, {rate:g}/s, {limits}",
            request=replace(base, max_batch=slots, slo=slo.parse(limits), workload=replace(chat, rate_per_s=rate)),
        )
    for rate, limits in ((6.0, "ttft_p95<2s"), (40.0, "ttft_p99<3s,tpot_p99<60ms"), (120.0, "e2e_p95<40s")):
        yield Case(
            name=f"memory binds (L40S), {rate:g}/s, {limits}",
            request=replace(base, gpus=("l40s",), max_batch=256, slo=slo.parse(limits), workload=replace(long, rate_per_s=rate)),
        )
    for arrivals, rate, limits in (("gamma:2", 60.0, "ttft_p95<500ms"), ("gamma:3", 250.0, "ttft_p95<500ms,tpot_p99<40ms")):
        yield Case(
            name=f"64 slots, {arrivals}, {rate:g}/s, {limits}",
            request=replace(base, slo=slo.parse(limits), workload=replace(chat, rate_per_s=rate, arrivals=arrivals)),
        )
    for routing, rate in (("least_loaded", 60.0), ("round_robin", 60.0), ("power_of_two", 60.0)):
        yield Case(
            name=f"64 slots, {routing}, {rate:g}/s, ttft_p99<300ms",
            request=replace(base, routing=routing, slo=slo.parse("ttft_p99<300ms"), workload=replace(chat, rate_per_s=rate)),
        )


def engines(sheet: Sheet) -> None:
    """Size fleets of engines and hold them against whole fleets simulated for long."""
    print(f"{'engines: replicas of llama-3-8b':84}{'plan':>6}{'brute':>8}")
    for case in cases():
        started = time.process_time()
        made = plan.plan(case.request)
        took_s = time.process_time() - started
        (found,) = [c for c in candidates.every(case.request)[0] if c.layout == made.profile.layout]
        least = max(1, math.ceil(case.request.workload.rate_per_s / ((1 - case.request.headroom) * made.capacity_per_replica_per_s) - 1e-9))
        brute = _least(lambda n, case=case, found=found: _keeps(case.request, found, n), made.replicas, least)  # type: ignore[misc]
        low, high = made.intervals["replicas"]
        sheet.counts(f"{case.name}", made.replicas, brute, f"  90 %: {low:g}–{high:g}, {made.utilisation:.0%} busy, {took_s:.1f} s")


def _keeps(request: plan.Request, candidate: plan.Candidate, replicas: int) -> bool:
    """Say whether a fleet keeps the limits in one long simulation: of the whole, or of a part where it is large."""
    part = min(replicas, 8)
    traffic = request.workload
    whole = workload.schedule(traffic, n=int(REQUESTS * replicas / part), seed=SEED)
    mine = np.flatnonzero(np.random.default_rng(SEED).random(len(whole)) * replicas < part)
    schedule = workload.take(whole, mine)
    tracks = core.play(
        schedule, candidate.limits, profile=candidate.profile, replicas=part, routing=request.routing, seed=SEED, keep_tokens=True
    )
    back_s = candidate.profile.constants.get("request_overhead_s", 0.0) + candidate.profile.constants.get("token_overhead_s", 0.0)
    kept = of_tracks(tracks, schedule, [(int(WARM * len(schedule)), int(0.97 * len(schedule)))], part, back_s)
    return all(excess < 1 for excess, _ in kept.all.excesses(request.slo))


# ---------------------------------------------------------------- a trace


def trace(sheet: Sheet) -> None:
    """Find the smallest fleet for Azure's conversations at ten times their speed; one replica fewer must fail."""
    if not TRACE.exists():
        print(f"{TRACE.name} is not beside this checkout: nothing is measured")
        return
    from mlsys_bench.journeys import planning

    asked = planning.ask(
        scenario=None, qps=None, measured=[], model="llama-3-70b", gpu="h100-sxm", precision="bf16", slo="ttft_p99<2s,tpot_p99<80ms",
        arrivals=None, prompt_tokens=None, output_tokens=None, max_batch=None, headroom=None, term="on-demand", seed=0,
        trace=TRACE, speed=10.0,
    )  # fmt: skip
    made = planning.plan(asked)
    (layout,) = [c for c in candidates.every(asked)[0] if c.layout == made.profile.layout]
    blocks = made.kv_tokens_per_replica // layout.limits.block_tokens
    assert made.max_step_tokens is not None
    chosen = replace(layout, limits=layout.limits._replace(max_seqs=made.max_batch, max_step_tokens=made.max_step_tokens, blocks=blocks))
    print(f"Azure conversations x 10 ({asked.workload.rate_per_s:.3g}/s): {made.replicas} x {chosen.name}, ${made.usd_per_hour:,.2f}/h")
    for replicas, kept in ((made.replicas, True), (made.replicas - 1, False)):
        found = _replayed(asked, chosen, replicas)
        said = ", ".join(f"{slo.key(limit)} {excess:.2f} of its limit" for excess, limit in found)
        sheet.holds(f"{replicas} replicas: {said}", "keeps" if kept else "fails", all(excess < 1 for excess, _ in found) is kept)


def _replayed(asked: plan.Request, chosen: plan.Candidate, replicas: int) -> list[tuple[float, Limit]]:
    """Return the limits' shares in a simulation with the public simulator."""
    from mlsys_bench import simulate, summary

    assert asked.trace is not None
    run = simulate.run(asked.trace, chosen.profile, chosen.limits, replicas=replicas, routing=asked.routing, seed=asked.seed)
    ok = [r for r in run.requests if r.outcome == "ok"]
    seen = {"ttft": [summary.ttft_s(r) for r in ok], "tpot": [t for r in ok if (t := summary.tpot_s(r)) is not None]}
    return [(float(np.quantile(seen[limit.metric], float(limit.stat[1:]) / 100)) / limit.limit, limit) for limit in asked.slo]


# ---------------------------------------------------------------- speed


def speed(sheet: Sheet) -> None:
    """Time one plan over every GPU of the catalogue, each precision, parallelism and engine setting."""
    every = tuple(d.id for d in hardware.every() if d.kind == "gpu")
    for model, rate, limits in (
        ("llama-3-8b", 50.0, "ttft_p95<500ms,tpot_p99<40ms"),
        ("llama-3-70b", 20.0, "ttft_p99<2s,tpot_p99<80ms"),
        ("mixtral-8x7b", 40.0, "ttft_p95<1s,tpot_p99<50ms"),
    ):
        request = plan.Request(
            model=model, workload=workload.synthetic(rate, prompt="lognormal:1155:0.96:8192", output="lognormal:211:0.77:1024"),
            slo=slo.parse(limits), gpus=every, precisions=("bf16", "fp8", "int8", "int4"),
        )  # fmt: skip
        for _ in range(2):  # the second finds its caches warm
            started = time.process_time()
            fitting, misfits = candidates.every(request)
            bounds, _small = search.bounds(request, fitting, demand_of(request.workload))
            found = search.search(request, bounds, misfits, 3)
            analytic_s = time.process_time() - started
        started = time.process_time()
        plan.plan(request)
        confirmed_s = time.process_time() - started
        best = found.designs[0]
        what = f"{model}: {len(fitting)} candidates on {len(every)} GPUs, best {best.replicas} x {best.candidate.name}"
        sheet.holds(what + ", by theory", f"{analytic_s:.2f} s", analytic_s < ANALYTIC_S)
        sheet.holds(what + ", confirmed", f"{confirmed_s:.2f} s", confirmed_s < CONFIRMED_S)


if __name__ == "__main__":
    sys.exit(main())
