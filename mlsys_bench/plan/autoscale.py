"""Replicas hour by hour: a schedule, and a rule that follows the load, with replica-hours and violation minutes beside a static peak.

    lead        how long ago the load was when a replica answers it: one look of the rule and the cold start
    threshold   what one replica should carry, as a share of what it can within the limits.  While the load grows by
                g = rate(t + lead) / rate(t) the replicas of today serve it, so the share is at most 1 / g at the steepest hour, and
                1 / 1.1 of that, because the rule acts 10 % beyond its target (the tolerance of the Kubernetes HorizontalPodAutoscaler)
    cascade     a slow start must not be answered by more starts: replicas that are starting count as there.  Then the rule never asks
                for more than ceil(load / target); what remains is the backlog of a start, which the load in flight counts and a rate
                does not.  Where the growth within a lead leaves no backlog, there is no cascade

The rule is played as it runs in a cluster: a look every interval, starting replicas counted, down only to the most wanted within the delay.
Between looks the requests in flight are those of M_t/M/inf, exact while nobody queues: each is gone with probability 1 - exp(-dt / stay),
and a Poisson number has come; but no more leave than a Poisson number at the rate of the capacity.  Several runs at once, each a day.
Violation: fewer ready than `fewest(rate)` at that time, or a backlog from before that has not drained.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlsys_bench import stats, units
from mlsys_bench.errors import BadInput
from mlsys_bench.plan.cold_start import ColdStart
from mlsys_bench.plan.course import Course
from mlsys_bench.queueing.diurnal import Steps, mt_m_c
from mlsys_bench.simulate.conditions import TOLERANCE, Autoscaling, Metric
from mlsys_bench.surroundings import Autoscaled, Hour, Rule, Use

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Fewest = Callable[[float], int]

HOUR_S = 3600.0
INTERVAL_S = 15.0  # the Kubernetes HorizontalPodAutoscaler looks every 15 s
DOWN_DELAY_S = 300.0  # and scales down to the most it wanted within 5 minutes
RUNS = 8
_LOWER = 0.9  # each try of a threshold that did not do
_TRIES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """One replica: the rate it carries within the limits, the rate at which it saturates, the mean time of a request in it."""

    most_per_s: float
    capacity_per_s: float
    stay_s: float

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if not (0 < self.most_per_s <= self.capacity_per_s and self.stay_s > 0):
            raise BadInput(f"a replica carries {self.most_per_s:g}/s of {self.capacity_per_s:g}/s, each for {self.stay_s:g} s: it cannot")

    def load(self, metric: str) -> float:
        """Return what one replica carries at most within the limits, in the units of a metric."""
        return self.most_per_s if metric == "rate" else self.most_per_s * self.stay_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A rule played over the last period: one row per look, one column per run."""

    interval_s: float
    ready: Ints
    starting: Ints
    backlog: Floats

    @property
    def replica_s(self) -> Floats:
        """Replica-seconds of each run, starts included."""
        return np.asarray((self.ready + self.starting).sum(axis=0) * self.interval_s)


def autoscaled(
    course: Course,
    serving: Serving,
    fewest: Fewest,
    cold: ColdStart,
    *,
    metric: Metric = "in_flight",
    least: int = 1,
    most: int | None = None,
    spare: int = 0,
    interval_s: float = INTERVAL_S,
    down_delay_s: float = DOWN_DELAY_S,
    allowed_min: float = 0.0,
    runs: int = RUNS,
    seed: int = 0,
) -> Autoscaled:
    """Return replicas hour by hour, and the highest threshold of a rule that violates the limits no longer than `allowed_min` a period.

    `fewest(rate)` says how many replicas hold the limits at a rate, `spare` more are kept for failures: at any time by the schedule, at the
    peak by the rule, whose target is that much lower.  `least` stay in any case, `most` bounds the rule (by default a fifth above the
    peak's).  Where no threshold does, the lowest tried is returned with a note: follow the schedule.
    """
    if metric not in ("in_flight", "rate"):
        raise BadInput(f"autoscaling by {metric!r}: plans are made for in_flight and rate; the others are for `mlsys simulate`")
    lead_s, peak = interval_s + cold.total_s, fewest(course.peak_per_s)
    growth, whole = steepest(course, lead_s), max(peak + spare, least)
    jump = from_nothing(course, lead_s)
    rule = Autoscaling(
        metric=metric, target=serving.load(metric) / growth / (1 + TOLERANCE) * peak / (peak + spare), least=max(1, least),
        most=max(most or math.ceil(1.2 * whole) + 1, least), interval_s=interval_s, cold_start_s=cold.total_s, down_delay_s=down_delay_s,
    )  # fmt: skip
    for _ in range(_TRIES):
        played = play(course, serving, rule, runs=runs, seed=seed)
        followed = _followed(course, fewest, played)
        if followed.violation_min <= allowed_min or (jump > 0 and fewest(jump) > rule.least):  # no threshold sees what is not there yet
            break
        rule = dataclasses.replace(rule, target=rule.target * _LOWER)
    hours = _hours(course, fewest, played, rule.least, spare)
    static = _static(course, whole)
    return Autoscaled(
        rule=Rule(**dataclasses.asdict(rule)),
        threshold=rule.target / serving.load(metric),
        lead_s=lead_s,
        growth=growth,
        from_nothing_per_s=jump,
        hours=hours,
        uses=(static, _scheduled(hours, course, cold.total_s), followed),
        cascades=bool((played.ready + played.starting).max() > max(math.ceil(1.1 * _asked(course, serving, rule)), whole)),
        provenance=cold.provenance,
        notes=tuple(_notes(static, followed, allowed_min, (growth, jump), lead_s, cold)),
    )


def steepest(course: Course, lead_s: float) -> float:
    """Return the largest growth of the rate within one lead, at least 1; where the rate is 0 before, it is left out: `from_nothing`."""
    return max([after / before for before, after in _within(course, lead_s) if before > 0], default=1.0)


def from_nothing(course: Course, lead_s: float) -> float:
    """Return the highest rate within one lead of a time without any, 0 where there is always some."""
    return max([after for before, after in _within(course, lead_s) if before == 0], default=0.0)


def _within(course: Course, lead_s: float) -> list[tuple[float, float]]:
    """Return each rate of a course with the highest within one lead of it."""
    n, ahead = len(course.rates_per_s), max(1, math.ceil(lead_s / course.step_s - 1e-9))
    return [(course.rates_per_s[k], max(course.rates_per_s[(k + j) % n] for j in range(ahead + 1))) for k in range(n)]


def too_brief(course: Course, start_s: float) -> str | None:
    """Return why no fleet follows a course over which a replica hardly comes and goes, None where one may."""
    if course.period_s >= 2 * (start_s + DOWN_DELAY_S):
        return None
    lasts, start, stays = (units.show_s(time_s) for time_s in (course.period_s, start_s, DOWN_DELAY_S))
    return (
        f"autoscaling: the course of the traffic lasts {lasts}, a replica starts in {start} and stays {stays} longer than it is needed: "
        "none follows, and the fleet for the peak stands all the time"
    )


def play(course: Course, serving: Serving, rule: Autoscaling, *, runs: int = RUNS, seed: int = 0) -> Played:
    """Return the rule's replicas over one period of the course, in independent runs, begun as much before as the rule looks back."""
    rng, dt = np.random.default_rng(seed), rule.interval_s
    looks, lead = max(1, round(course.period_s / dt)), math.ceil(rule.cold_start_s / dt - 1e-9)
    before = 2 * math.ceil((rule.cold_start_s + rule.down_delay_s + 5 * serving.stay_s) / dt)
    rate = np.array([course.at((k + 0.5) * dt) for k in range(looks)])
    fleet = _Fleet(rule, runs, lead, rate[-before % looks] * (1.0 if rule.metric == "rate" else serving.stay_s))
    n = np.full(runs, round(rate[-before % looks] * serving.stay_s), dtype=np.int64)
    backlog, gone = np.zeros(runs), 1 - math.exp(-dt / serving.stay_s)
    out = Played(interval_s=dt, ready=_room(looks, runs), starting=_room(looks, runs), backlog=np.zeros((looks, runs)))
    for k in range(-before, looks):
        arrived = rng.poisson(rate[k % looks] * dt, runs)
        capacity = fleet.ready * serving.capacity_per_s
        # who comes within the step is still there at its end with probability gone / (dt / stay); no more leave than capacity allows
        here = n - rng.binomial(n, gone) + rng.binomial(arrived, gone * serving.stay_s / dt)
        n = np.maximum(here, n + arrived - rng.poisson(capacity * dt))
        backlog = np.maximum(0.0, backlog + (rate[k % looks] - capacity) * dt)
        fleet.look(n if rule.metric == "in_flight" else arrived / dt)
        if k >= 0:
            out.ready[k], out.starting[k], out.backlog[k] = fleet.ready, fleet.starting, backlog
    return out


class _Fleet:
    """Fleets under one rule, one per run: replicas that are ready and that start, and what was wanted lately."""

    def __init__(self, rule: Autoscaling, runs: int, lead: int, load: float) -> None:
        self.rule, self.looks = rule, 0
        self.ready = desired(rule, np.full(runs, load), np.zeros(runs, dtype=np.int64))
        self.starting = np.zeros(runs, dtype=np.int64)
        self._due = np.zeros((lead + 1, runs), dtype=np.int64)  # by look, modulo its length
        self._wanted = np.tile(self.ready, (math.floor(rule.down_delay_s / rule.interval_s + 1e-9) + 1, 1))

    def look(self, load: Floats | Ints) -> None:
        """Take in those that are ready now, then launch or release by this load."""
        row = self._due[self.looks % len(self._due)]
        self.ready, self.starting = self.ready + row, self.starting - row
        row[:] = 0
        there = self.ready + self.starting
        wanted = desired(self.rule, load, there)
        self._wanted[self.looks % len(self._wanted)] = wanted
        self._release(np.maximum(there - self._wanted.max(axis=0), 0))
        launched = np.maximum(wanted - there, 0)
        self._due[(self.looks - 1) % len(self._due)] += launched  # comes round again after `lead` looks
        self.starting = self.starting + launched
        self.looks += 1

    def _release(self, surplus: Ints) -> None:
        """Let replicas go: those that start, the last first, then those that serve."""
        for back in range(len(self._due) if surplus.any() and self.starting.any() else 0):
            row = self._due[(self.looks - 2 - back) % len(self._due)]
            let = np.minimum(row, surplus)
            row -= let
            surplus, self.starting = surplus - let, self.starting - let
        self.ready = self.ready - surplus


def desired(rule: Autoscaling, load: Floats | Ints, there: Ints) -> Ints:
    """Return `rule.desired` of many fleets at once."""
    fair = load / rule.target
    near = (there > 0) & (np.abs(fair - there) <= TOLERANCE * there)
    wanted = np.where(near, there, np.ceil(fair - 1e-9))
    return np.asarray(np.minimum(np.maximum(wanted, rule.least), rule.most), dtype=np.int64)


def queue_violations_min(
    course: Course, servers: Sequence[int], service_s: float, *, limit_s: float, p: float = 0.95, points: int = 4
) -> float:
    """Return the minutes of a period in which the p-quantile of the wait exceeds a limit, one number of servers per step of the course.

    M_t/M/c_t in its periodic regime (`queueing.mt_m_c`), read at `points` times a step: exact for Poisson arrivals and exponential service.
    """
    if len(servers) != len(course.rates_per_s):
        raise BadInput(f"{len(servers)} numbers of servers for {len(course.rates_per_s)} steps of the course")
    at_s = tuple(course.step_s * k for k in range(1, len(servers)))
    times = [(k + 0.5) * course.step_s / points for k in range(points * len(servers))]
    moments = mt_m_c(
        Steps(values=course.rates_per_s, at_s=at_s), service_s, Steps(values=tuple(servers), at_s=at_s), times, period_s=course.period_s
    )
    return sum(m.virtual_wait.p_over(limit_s) > 1 - p for m in moments) * course.step_s / points / 60


# ---------------------------------------------------------------- parts


def _room(looks: int, runs: int) -> Ints:
    return np.zeros((looks, runs), dtype=np.int64)


def _needs(course: Course, fewest: Fewest) -> list[int]:
    known = {rate: fewest(rate) if rate > 0 else 0 for rate in set(course.rates_per_s)}
    return [known[rate] for rate in course.rates_per_s]


def _followed(course: Course, fewest: Fewest, played: Played) -> Use:
    needs = _needs(course, fewest)
    looks = len(played.ready)
    need = np.array([needs[int(k * played.interval_s / course.step_s) % len(needs)] for k in range(looks)])
    broken = ((played.ready < need[:, None]) | (played.backlog > 0)).sum(axis=0) * played.interval_s / 60
    hours = played.replica_s / HOUR_S
    return Use(
        way="followed",
        replica_h=float(hours.mean()),
        replica_h_interval=_interval(hours),
        violation_min=float(broken.mean()),
        violation_min_interval=_interval(broken),
        most_replicas=int((played.ready + played.starting).max()),
    )


def _interval(values: Floats) -> tuple[float, float]:
    """Return the 90 % interval of a mean over runs; from one run, that run."""
    found = stats.mean_interval(values) if len(values) > 1 else None
    return found or (float(values.min()), float(values.max()))


def _static(course: Course, replicas: int) -> Use:
    hours = replicas * course.period_s / HOUR_S
    return _certain("static", hours, replicas)


def _scheduled(hours: Sequence[Hour], course: Course, lead_s: float) -> Use:
    """Return the schedule's use: each launch is paid from one cold start before its hour."""
    length_s = course.period_s / len(hours)
    launched = sum(max(0, hour.scheduled - before.scheduled) for before, hour in zip((hours[-1], *hours[:-1]), hours, strict=True))
    paid = (sum(hour.scheduled for hour in hours) * length_s + launched * lead_s) / HOUR_S
    return _certain("scheduled", paid, max(hour.scheduled for hour in hours))


def _certain(way: str, replica_h: float, most: int) -> Use:
    return Use(
        way=way, replica_h=replica_h, replica_h_interval=(replica_h, replica_h), violation_min=0.0, violation_min_interval=(0.0, 0.0),
        most_replicas=most,
    )  # fmt: skip


def _hours(course: Course, fewest: Fewest, played: Played, least: int, spare: int) -> tuple[Hour, ...]:
    """Return hours of the period, or its steps where they are longer or the period is no whole number of hours."""
    n = round(course.period_s / HOUR_S)
    n = n if 1 < n <= len(course.rates_per_s) and abs(n * HOUR_S - course.period_s) < 1e-6 else len(course.rates_per_s)
    length_s, mean = course.period_s / n, played.ready.mean(axis=1)
    highest = [course.highest(k * length_s, (k + 1) * length_s) for k in range(n)]
    parts = np.array_split(mean, n)
    return tuple(
        Hour(
            start_s=k * length_s,
            rate_per_s=rate,
            scheduled=max(least, (fewest(rate) if rate > 0 else 0) + spare),
            followed=float(parts[k].mean() if len(parts[k]) else mean[-1]),  # more steps than looks: the last one holds on
        )
        for k, rate in enumerate(highest)
    )


def _asked(course: Course, serving: Serving, rule: Autoscaling) -> float:
    """Return the replicas the rule asks for at the peak without a backlog, three standard deviations of the noise in flight included."""
    in_flight = course.peak_per_s * serving.stay_s
    if rule.metric == "in_flight":
        return (in_flight + 3 * math.sqrt(in_flight)) / rule.target
    seen = course.peak_per_s * rule.interval_s
    return (seen + 3 * math.sqrt(seen)) / rule.interval_s / rule.target


def _notes(
    static: Use, followed: Use, allowed_min: float, grows: tuple[float, float], lead_s: float, cold: ColdStart
) -> Iterator[str]:  # fmt: skip
    growth, jump = grows
    yield f"cold start {cold.in_words()}"
    if jump > 0:
        yield f"the rate goes from nothing to {units.show_rate(jump)} within the lead of {units.show_s(lead_s)}"
    else:
        yield f"the rate grows by {100 * (growth - 1):.0f} % at most within the lead of {units.show_s(lead_s)}"
    broken = f"{followed.violation_min:.1f} min a period are broken"
    if followed.violation_min > allowed_min and jump > 0:
        yield f"no rule sees traffic that is not there yet: {broken}; follow the schedule, which starts replicas ahead of it"
    elif followed.violation_min > allowed_min:
        yield f"no threshold tried keeps the limits: {broken}; follow the schedule, or shorten the cold start"
    elif followed.replica_h >= static.replica_h:
        yield "to keep the limits the rule must run no fewer replicas than the static peak: follow the schedule, or shorten the cold start"
