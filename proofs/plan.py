"""The planner against brute force: replicas, the smallest fleet of a trace, and how long a plan takes.

Brute force tries replica counts one after another in long simulations of its own: stations by Kiefer and Wolfowitz's recursion on services
and gaps drawn here, engines token by token.  Arguments choose parts: `stations`, `engines`, `trace`, `speed`, `disaggregated`,
`intervals`, `roofline`; none is all.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import _one_thread  # noqa: F401
import numpy as np
import plan_intervals
import plan_rooflines
from scipy import stats

from mlsys_bench import hardware, latency, plan, queueing, slo, workload
from mlsys_bench.plan import candidates, confirm, search, sizing
from mlsys_bench.plan.demand import of as demand_of
from mlsys_bench.plan.disaggregated.pairs import Pair
from mlsys_bench.plan.trial import of_tracks
from mlsys_bench.queueing import laws
from mlsys_bench.queueing.des import recursion
from mlsys_bench.queueing.des.streams import arrival_times
from mlsys_bench.simulate import core
from mlsys_bench.types import Workload
from mlsys_bench.workload import Schedule

TRACE = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces" / "azure_llm_2023_conv.csv"
ANALYTIC_S, CONFIRMED_S = 1.0, 10.0
CUSTOMERS = 400_000  # of each run of a simulated station
LEAST_RUNS, RUNS = 8, 32  # of a station; the nearer a quantile is to its limit, the more
REQUESTS = 30_000  # of each run of a simulated engine
LEAST_RUNS_OF_ENGINES, RUNS_OF_ENGINES = 2, 8
LUCKS = 8  # of the router: a fleet keeps a trace's limits if it does with all of them
WARM = 0.1  # of either, before any is counted
SEED = 20_261_121


@dataclass(slots=True)
class Sheet:
    """Prints figures beside their bars and counts the misses."""

    cases: int = 0
    missed: int = 0

    def counts(self, what: str, planned: int, least: int, most: int, note: str = "") -> None:
        """Print replicas planned beside those brute force needs, of which its runs may not tell neighbours apart: within 1, or 1 %."""
        self.cases += 1
        kept = least - max(1.0, 0.01 * least) <= planned <= most + max(1.0, 0.01 * most)
        self.missed += not kept
        brute = f"{least:,}" if least == most else f"{least:,}-{most:,}"
        print(f"{what:84}{planned:6,}{brute:>9}  {'ok' if kept else 'MISSED':7}{note}", flush=True)

    def holds(self, what: str, said: str, kept: bool) -> None:
        """Print a statement that must hold."""
        self.missed += not kept
        print(f"{what:84}{said:>14}  {'ok' if kept else 'MISSED'}", flush=True)


def main() -> int:
    """Print each figure beside its bar; return 1 when one is missed."""
    sheet, parts = Sheet(), {"stations": stations, "engines": engines, "trace": trace, "speed": speed, "disaggregated": disaggregated}
    parts |= {"intervals": intervals, "roofline": roofline}
    for name, part in parts.items():
        if not sys.argv[1:] or name in sys.argv[1:]:
            started = time.perf_counter()
            part(sheet)
            print(f"{'':84}{time.perf_counter() - started:11.0f} s\n")
    print(f"{sheet.cases} cases against brute force; {sheet.missed} missed")
    return 1 if sheet.missed else 0


def intervals(sheet: Sheet) -> None:
    """Hold the 90 % intervals of plans against worlds whose truth is known."""
    sheet.missed += plan_intervals.main()


def roofline(sheet: Sheet) -> None:
    """Hold the intervals of plans whose hardware nobody measured against measured rows."""
    sheet.missed += plan_rooflines.main()


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
    seen = Customers(arrivals, service, limit_s, 1 - p)
    brute = _least(lambda c: seen.longer(c)[0] <= 1 - p, sized.servers, math.floor(offered) + 1)
    said = f"{what}, service SCV {scv:g}, {offered:.3g} erlangs, p{100 * p:g} of the wait under {limit_s:.3g} services"
    (share, give), fewer = seen.longer(brute), f"one fewer {seen.longer(brute - 1)[0]:.2%}" if brute - 1 > offered else "the fewest"
    sheet.counts(said, sized.servers, brute, brute, f"  {share:.2%} ± {give:.2%} wait longer, {fewer}")


class Customers:
    """The same customers for every number of servers, in several runs: one run of 450 servers lasts 900 services, and is luck."""

    def __init__(self, arrivals: laws.Law | queueing.Bursts, service: laws.Law, limit_s: float, wanted: float) -> None:
        self.arrivals, self.service, self.limit_s, self.wanted = arrivals, service, limit_s, wanted
        self.drawn: list[tuple[np.ndarray, np.ndarray]] = []  # times of arrival and of service, run by run
        self.found: dict[int, tuple[float, float]] = {}

    def longer(self, servers: int) -> tuple[float, float]:
        """Return the share of customers that wait longer, and half of its 95 % interval; runs are added until that is clear."""
        if servers not in self.found:
            shares: list[float] = []
            mean = give = math.nan
            while len(shares) < LEAST_RUNS or (len(shares) < RUNS and abs(mean - self.wanted) < give):
                shares.append(self._share(servers, len(shares)))
                if len(shares) > 1:
                    mean, give = float(np.mean(shares)), float(stats.t.ppf(0.975, len(shares) - 1) * stats.sem(shares))
            self.found[servers] = mean, give
        return self.found[servers]

    def _share(self, servers: int, run: int) -> float:
        if run == len(self.drawn):
            streams = np.random.default_rng(SEED + run).spawn(2)
            self.drawn.append((arrival_times(self.arrivals, streams[0], 1, CUSTOMERS), self.service.sample(streams[1], (1, CUSTOMERS))))
        return float((recursion.waits(*self.drawn[run], servers)[0, int(WARM * CUSTOMERS) :] > self.limit_s).mean())


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
        brute = functools.cache(functools.partial(_judged, case.request, found))
        may, must = (_least(lambda n, brute=brute, say=say: brute(n) in say, made.replicas, least) for say in (("?", "keeps"), ("keeps",)))
        low, high = made.intervals["replicas"]
        sheet.counts(f"{case.name}", made.replicas, may, must, f"  90 %: {low:g}–{high:g}, {made.utilisation:.0%} busy, {took_s:.1f} s")


def _judged(request: plan.Request, candidate: plan.Candidate, replicas: int) -> str:
    """Say whether a fleet 'keeps' or 'misses' the limits, by the mean of value / limit over long runs; '?' where all do not tell."""
    worst: list[float] = []
    mean = give = math.inf
    while len(worst) < LEAST_RUNS_OF_ENGINES or (len(worst) < RUNS_OF_ENGINES and abs(mean - 1) < give):
        worst.append(_worst(request, candidate, replicas, SEED + len(worst)))
        if len(worst) > 1:
            mean, give = float(np.mean(worst)), float(stats.t.ppf(0.975, len(worst) - 1) * stats.sem(worst))
    return "?" if abs(mean - 1) < give else "keeps" if mean < 1 else "misses"


def _worst(request: plan.Request, candidate: plan.Candidate, replicas: int, seed: int) -> float:
    """Return the largest value / limit of one long simulation: of the whole fleet, or of a part where it is large."""
    part = min(replicas, 8)
    whole = workload.schedule(request.workload, n=int(REQUESTS * replicas / part), seed=seed)
    mine = np.flatnonzero(np.random.default_rng(seed).random(len(whole)) * replicas < part)
    schedule = workload.take(whole, mine)
    tracks = core.play(
        schedule, candidate.limits, profile=candidate.profile, replicas=part, routing=request.routing, seed=seed, keep_tokens=True
    )
    outside = latency.overhead(candidate.profile)
    seen = of_tracks(tracks, schedule, [(int(WARM * len(schedule)), int(0.97 * len(schedule)))], part, outside)
    return max(excess for excess, _ in seen.all.excesses(request.slo))


# ---------------------------------------------------------------- a trace


def trace(sheet: Sheet) -> None:
    """Find the smallest fleet for Azure's conversations at ten times their speed; one replica fewer must fail with some luck."""
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
        found = [_replayed(asked, chosen, replicas, luck) for luck in range(LUCKS)]
        ends = {name: [one[name] for one in found] for name in found[0]}
        said = ", ".join(f"{name} {min(seen):.2f} to {max(seen):.2f} of its limit" for name, seen in ends.items())
        keep = sum(max(one.values()) < 1 for one in found)
        sheet.holds(f"{replicas} replicas: {said}", f"{keep} of {LUCKS} keep", (keep == LUCKS) is kept)


def _replayed(asked: plan.Request, chosen: plan.Candidate, replicas: int, luck: int) -> dict[str, float]:
    """Return each limit's value over it in a replay with the public simulator."""
    from mlsys_bench import simulate, summary

    assert asked.trace is not None
    run = simulate.run(asked.trace, chosen.profile, chosen.limits, replicas=replicas, routing=asked.routing, seed=luck)
    ok = [r for r in run.requests if r.outcome == "ok"]
    ways = {"ttft": summary.ttft_s, "tpot": summary.tpot_s}
    seen = {name: [t for r in ok if (t := way(r)) is not None] for name, way in ways.items()}
    return {slo.key(x): float(np.quantile(seen[x.metric], float(x.stat[1:]) / 100)) / x.limit for x in asked.slo}


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


# ---------------------------------------------------------------- prefill and decode apart

PAIRED = 12_000  # requests of each simulated pair of pools


def pairs_of_pools() -> Iterator[Case]:
    """Yield traffic for two pools: limits on either, on both, bursts, routers that look at load, pools of different layouts."""
    long = workload.synthetic(20, prompt="lognormal:3000:0.6:7000", output="lognormal:100:0.7:500")
    base = plan.Request(
        model="llama-3-8b", workload=long, slo=slo.parse("ttft_p95<1s"), gpus=("h100-sxm",), precisions=("bf16",), headroom=0.05,
        disaggregate="only",
    )  # fmt: skip
    for rate, limits in ((20.0, "ttft_p95<1s,itl_p99<12ms"), (60.0, "ttft_p99<1s,tpot_p95<10ms"), (60.0, "ttft_p95<2s,e2e_p95<2.5s")):
        yield Case(name=f"{rate:g}/s, {limits}", request=replace(base, slo=slo.parse(limits), workload=replace(long, rate_per_s=rate)))
    bursts = replace(base, slo=slo.parse("ttft_p95<1.5s,itl_p99<14ms"), workload=replace(long, rate_per_s=40.0, arrivals="gamma:2"))
    yield Case(name="40/s, gamma:2, ttft_p95<1.5s,itl_p99<14ms", request=bursts)
    routed = replace(base, slo=slo.parse("ttft_p99<1s,itl_p99<12ms"), workload=replace(long, rate_per_s=60.0))
    for routing in ("round_robin", "least_loaded"):
        yield Case(name=f"60/s, {routing}, ttft_p99<1s,itl_p99<12ms", request=replace(routed, routing=routing))
    large = replace(base, model="llama-3-70b", precisions=("fp8",), slo=slo.parse("ttft_p95<3s,itl_p99<25ms"))
    yield Case(name="llama-3-70b fp8, 10/s, ttft_p95<3s,itl_p99<25ms", request=replace(large, workload=replace(long, rate_per_s=10.0)))


def disaggregated(sheet: Sheet) -> None:
    """Size pairs of pools and hold them against every pair near them, whole pools simulated for long; one must win, one must lose."""
    from mlsys_bench.plan import disaggregated as apart
    from mlsys_bench.plan.disaggregated import pairs

    print(f"{'prefill and decode apart: replicas of either pool':84}{'plan':>6}{'brute':>8}")
    for case in pairs_of_pools():
        started = time.process_time()
        request = case.request
        traffic = demand_of(request.workload)
        bounds, _small = search.bounds(request, candidates.every(request)[0], traffic)
        found = apart.look(request, bounds, traffic, None).confirmed
        assert found is not None
        took_s, pair = time.process_time() - started, found[0]
        prefill, decode = _cheapest_pair(request, pair)
        usd = pair.resized(prefill, decode, request.shelf).usd_per_h
        said = f"  {pairs.station(pair.prefill).utilisation(pair.prefill.each_per_s):.0%} and "
        said += f"{pairs.station(pair.decode).utilisation(pair.decode.each_per_s):.0%} busy, ${pair.usd_per_h} for ${usd}/h, {took_s:.1f} s"
        sheet.counts(f"{case.name}: prefill{spread_of(pair.prefill)}", pair.prefill.replicas, prefill, prefill)
        sheet.counts(f"{case.name}: decode{spread_of(pair.decode)}", pair.decode.replicas, decode, decode, said)
    _won_and_lost(sheet)


def spread_of(design: sizing.Design) -> str:
    """Return how a pool's replicas are spread over devices."""
    return candidates.spread_of(design.candidate.layout)


def _cheapest_pair(request: plan.Request, pair: Pair) -> tuple[int, int]:
    """Return the cheapest pair of all near the one planned that keeps the limits in one long simulation of both pools whole."""
    best: tuple[float, int, int] | None = None
    most = pair.decode.replicas + 3
    for prefill in range(pair.prefill.fewest, pair.prefill.replicas + 3):
        enough = [n for n in range(pair.decode.fewest, most + 1) if _pair_keeps(request, pair.resized(prefill, n, request.shelf))][:1]
        if enough:
            usd = pair.resized(prefill, enough[0], request.shelf).usd_per_h
            assert usd is not None
            best = min(best or (math.inf, 0, 0), (usd, prefill, enough[0]))
            most = enough[0] - 1  # more prefill for no fewer decode replicas is never cheaper
    assert best is not None
    return best[1], best[2]


@functools.cache
def _pair_traffic(traffic: Workload) -> Schedule:
    return workload.schedule(traffic, n=PAIRED, seed=SEED)


def _pair_keeps(request: plan.Request, pair: Pair) -> bool:
    """Say whether both pools, whole, keep the limits in one long run; decode is not played where prefill misses its own."""
    from mlsys_bench.plan.disaggregated import played

    schedule = _pair_traffic(request.workload)
    schedule = workload.take(schedule, confirm.holdable(pair.prefill, schedule))
    counted = slice(int(WARM * len(schedule)), int(0.97 * len(schedule)))
    first = played.prefilled(pair.prefill.candidate, schedule, pair.link, pair.prefill.replicas, request.routing, SEED)
    ttft_s = (first.handed_s - schedule.scheduled_s)[counted]
    own = [x for x in request.slo if x.metric == "ttft"]
    if any(np.quantile(ttft_s, float(x.stat[1:]) / 100) >= x.limit for x in own):
        return False
    everyone = np.ones(len(schedule), dtype=bool)
    tracks = played.decoded(pair.decode.candidate, first, everyone, pair.decode.replicas, request.routing, SEED + 1)
    outside = replace(latency.overhead(pair.decode.candidate.profile), planned_steps=0.0)
    kept = of_tracks(tracks, schedule, [(counted.start, counted.stop)], pair.decode.replicas, outside)
    return all(excess < 1 for excess, _ in kept.all.excesses(request.slo))


def _won_and_lost(sheet: Sheet) -> None:
    """Plan where long prompts break a tight limit on gaps, and where nothing asks for two pools."""
    base = next(iter(pairs_of_pools())).request
    for limits, wins in (("ttft_p95<2s,itl_p99<12ms", True), ("ttft_p95<2s,tpot_p95<60ms", False)):
        made = plan.plan(replace(base, slo=slo.parse(limits), disaggregate="auto", headroom=0.2))
        said = made.alternatives[0].why_not if wins else made.notes[-1]
        sheet.holds(f"20/s, {limits}: ${made.usd_per_hour}/h; {said}"[:84], "apart" if made.apart else "together", bool(made.apart) is wins)


if __name__ == "__main__":
    sys.exit(main())
