"""A fleet simulated step by step at its traffic: the judge of the analytic answer.

A law of arrivals is simulated on a sample of the fleet: one replica where requests are routed at random, `SAMPLE` of them otherwise (with
more replicas a router that looks at load does no worse), at their share of the traffic.  A trace is played whole, on the whole fleet, and
where it comes near a limit with more than one luck of the router.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mlsys_bench import jit, latency, units, workload
from mlsys_bench.errors import BadInput
from mlsys_bench.plan.evened import evened
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.sizing import Design, resized
from mlsys_bench.plan.trial import BATCHES, Trial, joined, of_tracks
from mlsys_bench.pricing import Shelf
from mlsys_bench.simulate import core
from mlsys_bench.types import SLO, Workload
from mlsys_bench.workload import Schedule

REQUESTS = 300  # counted per batch, as far as the steps go
MAX_STEPS = 10_000  # in all, about: a step costs some 50 µs of CPU
SAMPLE = 4
_LEAST_REQUESTS = 40
_TRIALS = 7  # replica counts tried for one candidate
_TRIALS_OF_A_TRACE = 12
_GROWN = 2.0  # times the wait of the first batch
_HALVINGS = 4  # of a trace's headroom
_REPLICAS_A_REQUEST = 4  # at most: routed at random, some get two and others none
_BEFORE, _AFTER = 1.5, 1.0  # mean stays in the system that are simulated before and after those counted

CLOSE = 0.3  # of the logarithm of value / limit: nearer to a limit, a short run decides nothing
MOST_FOR_TENANTS = 4
BUSY = 0.85  # of capacity: from there on a queue that grows within the run is one that may never end
CROWDED = 2  # times as long is every run of a replica whose memory is full: crowds are rare, and last
MOST_DRAWN = 2_000_000  # requests of a fleet, from which those of a sample are taken
LONGER = 6  # times as long is the run that then decides
LUCKS = 3  # of the router, that must all keep the limits under a trace
DRAWING = ("random", "power_of_two")  # routers whose choice is drawn
SURER = 24  # times as long is the run whose figures a plan shows, where simulation is compiled; no run is longer for its effort
SUREST = 96  # or so many, where that leaves the replicas unknown, and if it answers no more than
_SURELY_TOKENS = 2e7  # so many tokens: some five seconds in all, and a gigabyte
Play = Callable[[Design, int], Trial]  # a fleet, and how many times as long as usual


def confirm(design: Design, request: Request, effort: int = 1, known: Mapping[int, Trial] | None = None) -> tuple[Design, Trial] | None:
    """Return the design with the fewest replicas that keep all limits in simulation, and that simulation; None where none does.

    `effort`: how many times as long as usual every run is.  `known`: runs of such length, by replicas.  Raises BadInput for a trace too
    short for its rate to keep a fleet busy.
    """
    if request.trace is None:
        efforts = (effort,) if effort >= LONGER else (effort, LONGER)
        return fewest(design, request.slo, request.shelf, lambda d, e: trial(request, d, e), _TRIALS, efforts, known)
    trace = request.trace
    if design.replicas > _REPLICAS_A_REQUEST * len(trace):
        lasts = units.show_s(len(trace) / workload.rate_per_s(trace))
        raise BadInput(
            f"the trace has {len(trace):,} requests in {lasts}, at a rate that would keep {design.replicas:,} replicas busy: it is over "
            "before most of them see one; play it slower (--speed), or plan for the rate alone (--qps, without --trace)"
        )
    return fewest(design, request.slo, request.shelf, lambda d, _: replays(d, trace, request), _TRIALS_OF_A_TRACE, (1,))


def surest() -> int:
    """Return how many times as long as usual the run is whose figures are shown: in plain Python 24 times would take half a minute."""
    return SURER if jit.HAVE_NUMBA else LONGER


def can_be_surer(design: Design, found: Trial) -> bool:
    """Say whether a fleet played for `SURER` times as long as usual can be played for `SUREST` times."""
    tokens = len(found.all.ttft_s) * design.replica.demand.mean_output * SUREST / SURER
    return jit.HAVE_NUMBA and found.effort == SURER and tokens <= _SURELY_TOKENS


def once(design: Design, request: Request) -> Trial:
    """Return a simulation of a design with the replicas it has, whatever limits that keeps, as long as those that are shown."""
    if request.trace is None:
        return trial(request, design, surest())
    return replays(design, request.trace, request)


def fewest(
    design: Design,
    limits: SLO,
    shelf: Shelf,
    play: Play,
    trials: int,
    efforts: Sequence[int] = (1, LONGER),
    known: Mapping[int, Trial] | None = None,
) -> tuple[Design, Trial] | None:
    """Return the design with the fewest replicas that keep all limits when played, and what was played; None where none is found.

    Starts from the analytic answer.  Goes down while the headroom lasts, or up, with doubling steps, and then halves the bracket.  A fleet
    is played with the next of the `efforts` as long as it is close to a limit.
    """
    tried = dict(known or {})

    def meets(replicas: int) -> bool:
        fleet = resized(design, replicas, shelf)
        if replicas not in tried:
            for effort in efforts:
                tried[replicas] = play(fleet, effort)
                if abs(math.log(max(worst(tried[replicas], limits), 1e-9))) >= CLOSE and not unstable(fleet, tried[replicas]):
                    break
        return keeps(fleet, tried[replicas], limits)

    low, high = _bracket(design, meets, trials)
    if high is None:
        return None
    while high - low > 1 and len(tried) < trials:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return resized(design, high, shelf), tried[high]


def _bracket(design: Design, meets: Callable[[int], bool], trials: int) -> tuple[int, int | None]:
    """Return a number of replicas that misses a limit, or the headroom, and a larger one that keeps all; None where none is found."""
    start, step = design.replicas, max(1, design.replicas // 16)
    if meets(start):
        high = start
        while high > design.fewest:
            lower = max(design.fewest, high - step)
            if not meets(lower):
                return lower, high
            high, step = lower, 2 * step
        return high - 1, high
    low = start
    for _ in range(trials - 2):
        if meets(low + step):
            return low, low + step
        low, step = low + step, 2 * step
    return low, None


def keeps(design: Design, found: Trial, limits: SLO) -> bool:
    """Say whether a fleet keeps all limits in its simulation, and would for longer."""
    return not unstable(design, found) and worst(found, limits) < 1


def unstable(design: Design, found: Trial) -> bool:
    """Say whether a busy fleet's queue grew in its simulation."""
    return design.replica.utilisation(design.each_per_s) > BUSY and growing(found)


def growing(found: Trial) -> bool:
    """Say whether first tokens come later from batch to batch, at the end twice as late as at first: a queue without end looks so."""
    return any(_grows([float(np.median(batch.ttft_s)) for batch in run.batches if len(batch.ttft_s)]) for run in found.apart())


def _grows(usual: Sequence[float]) -> bool:
    return len(usual) == BATCHES and sorted(set(usual)) == usual and usual[-1] > _GROWN * usual[0]


def worst(found: Trial, limits: SLO) -> float:
    """Return the largest value / limit of a simulation, of several that of the worst: below 1 all limits are kept."""
    return max((excess for run in found.apart() for excess, _ in run.all.excesses(limits)), default=0.0)


# ---------------------------------------------------------------- what is played


def trial(request: Request, design: Design, effort: int = 1) -> Trial:
    """Simulate a sample of the fleet at its share of the traffic.  The same seed and share give the same result.

    One long run rather than several: the empty start and the last long answers cost as many steps as 300 requests.
    """
    sample = 1 if request.routing == "random" else min(design.replicas, SAMPLE)
    asked = times(request.workload) * (CROWDED if design.replica.binds == "memory" else 1)
    longer = min(effort * asked, max(SURER, effort, asked))
    before, counted, after = (sample * n for n in lengths(design, sample, longer))
    drawn = of_sample(design, request.workload, sample, before + BATCHES * counted + after, request.seed)
    schedule = evened(drawn, design.replica, sample * design.each_per_s)
    batches = [(first, first + counted) for first in range(before, before + BATCHES * counted, counted)]
    return dataclasses.replace(_played(design, schedule, batches, sample, request.routing, request.seed), effort=effort)


def times(traffic: Workload) -> int:
    """Return how many times as long a run is for tenants: so that the smallest has, within reason, as many requests as one of many has."""
    if not traffic.tenants:
        return 1
    return min(MOST_FOR_TENANTS, math.ceil(1 / (len(traffic.tenants) * min(tenant.share for tenant in traffic.tenants)) - 1e-9))


def replay(design: Design, trace: Schedule, routing: str, seed: int) -> Trial:
    """Simulate the whole fleet under every request of a trace, those left out that it can never hold; all are counted."""
    kept = workload.take(trace, holdable(design, trace))
    borders = np.linspace(0, len(kept), BATCHES + 1).astype(int).tolist()
    return _played(design, kept, list(itertools.pairwise(borders)), design.replicas, routing, seed)


def replays(design: Design, trace: Schedule, request: Request) -> Trial:
    """Replay a trace; where that keeps the limits only just, and the router draws, with other luck of the router as well: see `by_luck`."""
    return by_luck(lambda seed: replay(design, trace, request.routing, seed), request)


def by_luck(play: Callable[[int], Trial], request: Request) -> Trial:
    """Return what is played with the request's seed; joined with `LUCKS` less one more where that keeps the limits, but only just.

    The requests of a trace are given and the router's draws are not: which replica gets the long ones moves a p99 by several percent.
    """
    first = play(request.seed)
    if request.routing not in DRAWING or not 1 > worst(first, request.slo) > math.exp(-CLOSE):
        return first
    return joined([first, *(play(request.seed + luck) for luck in range(1, LUCKS))])


def headroom(design: Design, request: Request, trace: Schedule) -> float:
    """Return by how much faster the trace may be played, as a share, before a limit breaks.

    One replica fewer is as good as the share 1 / (replicas - 1) of extra traffic, and too much.
    """
    low, high = 0.0, 1 / max(design.replicas - 1, 1)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = replays(design, workload.sped_up(trace, 1 + middle), request)
        low, high = (middle, high) if worst(found, request.slo) < 1 else (low, middle)
    return low


def _played(design: Design, schedule: Schedule, batches: list[tuple[int, int]], replicas: int, routing: str, seed: int) -> Trial:
    candidate = design.candidate
    tracks = core.play(
        schedule, candidate.limits, profile=candidate.profile, replicas=replicas, routing=routing, seed=seed, keep_tokens=True
    )
    return of_tracks(tracks, schedule, batches, replicas, latency.overhead(candidate.profile))


def lengths(design: Design, sample: int, effort: int) -> tuple[int, int, int]:
    """Return how many requests of a replica to simulate before those counted, in a batch of these, and after them, within the budget."""
    rate, replica = design.each_per_s, design.replica
    prediction = replica.predict(min(rate, 0.98 * replica.capacity_per_s))
    stay_s = prediction.value("e2e", "mean") or 0.0
    batch = min(rate * stay_s, replica.slots)
    step_s = float(np.interp(batch, np.arange(1, replica.slots + 1), replica.step_s[1:]))
    affordable = MAX_STEPS * effort / sample * step_s * rate / min(1.0, max(batch, 1e-9))  # an idle replica takes no steps
    before, after = rate * stay_s * _BEFORE, rate * stay_s * _AFTER
    squeeze = min(1.0, affordable / 2 / max(before + after, 1e-9))
    before, after = before * squeeze, after * squeeze
    counted = min(REQUESTS * effort, max(_LEAST_REQUESTS, (affordable - before - after) / BATCHES))
    return int(before) + 1, int(counted), int(after) + 1


def of_sample(design: Design, traffic: Workload, sample: int, n: int, seed: int) -> Schedule:
    """Return the requests that come to a sample of the replicas, those that they can never hold left out.

    A Poisson process thinned stays Poisson; any other law is drawn for the fleet and thinned, or for as much of a large fleet as is
    reasonable: thinned a hundred times or a thousand, it is as good as Poisson between its surges.
    """
    rng = np.random.default_rng([seed, 1])
    wanted = n / design.replica.demand.share
    enough = wanted + 4 * wanted**0.5
    whole = 1.0 if workload.parse_arrivals(traffic.arrivals).kind == "poisson" else design.replicas / sample
    shares = min(whole, max(1.0, MOST_DRAWN / enough))
    each = dataclasses.replace(traffic, rate_per_s=traffic.rate_per_s * sample / design.replicas * shares)
    fleet = workload.schedule(each, n=int(shares * enough) + 10, seed=seed)
    mine = np.nonzero(rng.random(len(fleet.scheduled_s)) * shares < 1)[0]
    drawn = workload.take(fleet, mine)
    return workload.take(drawn, np.flatnonzero(holdable(design, drawn))[:n])


def holdable(design: Design, schedule: Schedule) -> np.ndarray:
    """Return which requests come to a replica and which of them it can hold."""
    limits, prompts = design.candidate.limits, schedule.prompt_tokens
    held = prompts + schedule.output_tokens <= min(limits.max_context, limits.blocks * limits.block_tokens)
    return np.asarray(held & (prompts > design.above_tokens) & (prompts <= design.most_tokens))
