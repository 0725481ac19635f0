"""Intervals of a plan for a trace: its busiest stretch replayed with drawn profiles, for theory knows no more of a trace than its mean.

What is asked is how these very requests would fare, so their number is not chance; what the router's luck changes is, and the profile.
A replay costs as many steps as the stretch has, so there are few and the stretch is cut: `TOKENS` of answers around the busiest minute.
Figures of the whole trace move as they do within the stretch; the tail of a trace is in its busiest stretch.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from mlsys_bench import workload
from mlsys_bench.plan import confirm, draws, intervals
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.plan.evened import work_s
from mlsys_bench.plan.intervals import Interval, Spread
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.sizing import MOST, Design
from mlsys_bench.plan.trial import Trial
from mlsys_bench.types import LatencyProfile
from mlsys_bench.workload import Schedule

SHARES = (0.05, 0.275, 0.5, 0.725, 0.95)  # the fastest and the slowest replayed are the ends
TOKENS = 100_000  # of answers in the stretch that is replayed, about a fifth of a second in plain Python
_TRIES = 4  # fleets tried for the fastest and the slowest engine
_Z = 1.645


def of(design: Design, trial: Trial, request: Request) -> Spread:
    """Return the intervals of a fleet that serves a trace."""
    assert request.trace is not None
    profile = design.candidate.profile
    found = draws.of(profile, intervals.usual_step(design.replica), intervals.bare_step(design), SHARES, request.seed)
    stretch = busiest(request.trace, design.replica)
    usual, again = (_played(design, profile, stretch, request, request.seed + luck) for luck in (0, 1))
    drawn = [_played(design, p, stretch, request, request.seed) for p in found.profiles]
    made: dict[str, Interval] = {}
    predicted = trial.keys(request.slo)
    for key, value in predicted.items():
        seen = [usual.get(key, 0.0), again.get(key, 0.0), *(d.get(key, 0.0) for d in drawn)]
        if value <= 0 or min(seen) <= 0:
            made[key] = (value, value)
            continue
        logs = np.log(np.array(seen) / seen[0])
        luck = _Z * math.hypot(float(logs[1]) / math.sqrt(2), intervals.outside_sd(key, design, predicted))
        made[key] = intervals.around(value, math.log(value), luck, found.band(logs[2:].tolist()))
        if key.endswith("goodput"):
            made[key] = made[key][0], min(made[key][1], 1.0)
    capacities = [Replica(p, design.replica.limits, design.replica.demand, samples=1).capacity_per_s for p in found.profiles]
    busy = [design.each_per_s / capacity for capacity in capacities]
    low, high = np.exp(found.band(np.log(busy).tolist()))
    central = design.replica.utilisation(design.each_per_s)
    made["utilisation"] = (min(float(low), central), max(float(high), central))
    made["replicas"] = _replicas(design, request, found, stretch)
    made |= intervals.costs(design, made["replicas"], request.shelf)
    return Spread(intervals=made, overloaded=sum(share > MOST for share in busy), infeasible=0, draws=len(SHARES))


def busiest(trace: Schedule, replica: Replica) -> Schedule:
    """Return neighbouring requests with `TOKENS` tokens of answers between them, those that bring most work a second."""
    tokens = np.concatenate([[0], np.cumsum(trace.output_tokens)])
    if tokens[-1] <= TOKENS:
        return trace
    ends = np.searchsorted(tokens, tokens[:-1] + TOKENS)
    starts = np.flatnonzero(ends < len(trace))
    brought = np.concatenate([[0.0], np.cumsum(work_s(replica, trace.prompt_tokens, trace.output_tokens))])
    seconds = np.maximum(trace.scheduled_s[ends[starts]] - trace.scheduled_s[starts], 1e-6)
    first = int(starts[np.argmax((brought[ends[starts]] - brought[starts]) / seconds)])
    return workload.take(trace, np.arange(first, int(ends[first])))


def _with(design: Design, profile: LatencyProfile) -> Design:
    return dataclasses.replace(design, candidate=dataclasses.replace(design.candidate, profile=profile))


def _played(design: Design, profile: LatencyProfile, stretch: Schedule, request: Request, seed: int) -> dict[str, float]:
    return confirm.replay(_with(design, profile), stretch, request.routing, seed).keys(request.slo)


def _replicas(design: Design, request: Request, found: draws.Draws, stretch: Schedule) -> Interval:
    """Return the replicas that the fastest and the slowest engine need, as many times more or fewer as in the busiest stretch."""
    planned = design.replicas
    usual = _needed(design, request, stretch, planned)
    ends = []
    for profile, slowness in ((found.profiles[i], found.slowness[i]) for i in (0, -1)):
        guess = max(1, round(usual * math.exp(slowness)))
        ends.append(planned * _needed(_with(design, profile), request, stretch, guess) / usual)
    return min(max(1.0, float(math.floor(ends[0]))), float(planned)), max(float(math.ceil(ends[1] - 1e-9)), float(planned))


def _needed(design: Design, request: Request, stretch: Schedule, guess: int) -> int:
    """Return the fewest replicas that keep all limits within the stretch, as far as a few tries from a guess find them."""

    def keeps(replicas: int) -> bool:
        fleet = dataclasses.replace(design, replicas=replicas)
        return confirm.worst(confirm.replay(fleet, stretch, request.routing, request.seed), request.slo) < 1

    step = max(1, guess // 16)
    if not keeps(guess):
        return next((n for n in range(guess + step, guess + _TRIES * step, step) if keeps(n)), guess + _TRIES * step)
    missed = next((n for n in range(guess - step, max(guess - _TRIES * step, 0), -step) if not keeps(n)), max(guess - _TRIES * step, 0))
    return missed + step
