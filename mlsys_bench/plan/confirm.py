"""One replica simulated step by step at its share of the traffic: the judge of the analytic answer."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from mlsys_bench import simulate, slo, workload
from mlsys_bench.plan.latencies import Floats, Latencies
from mlsys_bench.plan.sizing import Design, resized
from mlsys_bench.simulate import Simulation
from mlsys_bench.types import SLO, RequestRecord, Workload

BATCHES = 4  # of neighbouring requests: their spread is the simulation's uncertainty (method of batch means)
STUDENT = 2.3533634  # its 95 % point at BATCHES - 1 degrees of freedom; `stats.mean_interval` would cost 0.3 s to import scipy
REQUESTS = 300  # counted per batch, as far as the steps go
MAX_STEPS = 10_000  # in all, about: a step costs some 80 µs of CPU
_LEAST_REQUESTS = 40
_TRIALS = 7  # replica counts tried for one candidate
_BEFORE, _AFTER = 1.5, 1.0  # mean stays in the system that are simulated before and after those counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One number of replicas, simulated; latencies and rates by batch.  `preempted` is the share of requests that lost their cache."""

    batches: tuple[Latencies, ...]
    tokens_per_s: tuple[float, ...]  # of one replica
    requests_per_s: tuple[float, ...]
    preempted: float

    @property
    def all(self) -> Latencies:
        """All batches as one sample."""
        return Latencies(
            ttft_s=np.concatenate([r.ttft_s for r in self.batches]),
            tpot_s=np.concatenate([r.tpot_s for r in self.batches]),
            e2e_s=np.concatenate([r.e2e_s for r in self.batches]),
            itl_s=np.concatenate([r.itl_s for r in self.batches]),
        )

    def keys(self, limits: SLO) -> dict[str, float]:
        """Return the latencies of all batches together, and the rates."""
        rates = {"throughput_tokens_per_s": self.tokens_per_s, "request_rate_per_s": self.requests_per_s}
        return self.all.keys(limits) | {key: float(np.mean(values)) for key, values in rates.items()}

    def spread(self, limits: SLO) -> dict[str, float]:
        """Return half the 90 % interval of each key, relative to its value: Student's, over the batches."""
        each = [batch.keys(limits) for batch in self.batches]
        values = {key: [found[key] for found in each] for key in each[0] if all(key in found for found in each)}
        values |= {"throughput_tokens_per_s": list(self.tokens_per_s), "request_rate_per_s": list(self.requests_per_s)}
        return {key: relative_half_width(samples) for key, samples in values.items()}


def confirm(design: Design, traffic: Workload, limits: SLO, term: str, seed: int) -> tuple[Design, Trial] | None:
    """Return the design with the fewest replicas that keep all limits in simulation, and that simulation; None where none does.

    Starts from the analytic answer.  Goes down while the headroom lasts, or up, with doubling steps, and then halves the bracket.
    """
    tried: dict[int, Trial] = {}

    def meets(replicas: int) -> bool:
        if replicas not in tried:
            tried[replicas] = trial(resized(design, replicas, term), traffic, seed)
        return all(excess < 1 for excess, _ in tried[replicas].all.excesses(limits))

    low, high = _bracket(design, meets)
    if high is None:
        return None
    while high - low > 1 and len(tried) < _TRIALS:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return resized(design, high, term), tried[high]


def _bracket(design: Design, meets: object) -> tuple[int, int | None]:
    """Return a number of replicas that misses a limit, or the headroom, and a larger one that keeps all; None where none is found."""
    assert callable(meets)
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
    for _ in range(_TRIALS - 2):
        if meets(low + step):
            return low, low + step
        low, step = low + step, 2 * step
    return low, None


def trial(design: Design, traffic: Workload, seed: int) -> Trial:
    """Simulate one replica of the design at its share of the traffic.  The same seed and share give the same result.

    One long run rather than several: the empty start and the last long answers cost as many steps as 300 requests.
    """
    before, counted, after = _requests(design)
    schedule = _one_replica(design, traffic, before + BATCHES * counted + after, seed)
    simulation = simulate.run(schedule, design.candidate.profile, design.candidate.limits, seed=seed)
    served = [r for r in simulation.requests if r.outcome == "ok"]
    batches = [served[start : start + counted] for start in range(before, before + BATCHES * counted, counted)]
    rates = _rates(simulation, [batch[0].scheduled_s for batch in batches] + [batches[-1][-1].scheduled_s])
    return Trial(
        batches=tuple(_latencies(batch) for batch in batches),
        tokens_per_s=tuple(tokens for tokens, _ in rates),
        requests_per_s=tuple(requests for _, requests in rates),
        preempted=simulation.preemptions / max(len(served), 1),
    )


def _requests(design: Design) -> tuple[int, int, int]:
    """Return how many requests to simulate before those counted, in a batch of these, and after them, within the budget of steps."""
    rate, replica = design.each_per_s, design.replica
    prediction = replica.predict(min(rate, 0.98 * replica.capacity_per_s))
    stay_s = prediction.value("e2e", "mean") or 0.0
    batch = min(rate * stay_s, replica.slots)
    step_s = float(np.interp(batch, np.arange(1, replica.slots + 1), replica.step_s[1:]))
    affordable = MAX_STEPS * step_s * rate / min(1.0, max(batch, 1e-9))  # an idle replica takes no steps
    before, after = rate * stay_s * _BEFORE, rate * stay_s * _AFTER
    squeeze = min(1.0, affordable / 2 / max(before + after, 1e-9))
    before, after = before * squeeze, after * squeeze
    counted = min(REQUESTS, max(_LEAST_REQUESTS, (affordable - before - after) / BATCHES))
    return int(before) + 1, int(counted), int(after) + 1


def _one_replica(design: Design, traffic: Workload, n: int, seed: int) -> workload.Schedule:
    """Return the requests that random routing sends to one replica, those that it can never hold left out.

    A Poisson process thinned stays Poisson; any other law is drawn for the fleet and thinned.
    """
    rng = np.random.default_rng([seed, 1])
    replicas = 1 if workload.parse_arrivals(traffic.arrivals).kind == "poisson" else design.replicas
    each = dataclasses.replace(traffic, rate_per_s=traffic.rate_per_s / design.replicas * replicas)
    wanted = n / design.replica.demand.share
    fleet = workload.schedule(each, n=int(replicas * (wanted + 4 * wanted**0.5)) + 10, seed=seed)
    mine = np.nonzero(rng.random(len(fleet.scheduled_s)) * replicas < 1)[0]
    limits = design.candidate.limits
    total = fleet.prompt_tokens[mine] + fleet.output_tokens[mine]
    mine = mine[total <= min(limits.max_context, limits.blocks * limits.block_tokens)][:n]
    return workload.Schedule(
        scheduled_s=fleet.scheduled_s[mine], prompt_tokens=fleet.prompt_tokens[mine], output_tokens=fleet.output_tokens[mine]
    )


def _latencies(window: list[RequestRecord]) -> Latencies:
    first, last, due = (np.array(x) for x in zip(*((r.token_s[0], r.token_s[-1], r.scheduled_s) for r in window), strict=True))
    tokens = np.array([len(r.token_s) for r in window])
    tpot: Floats = np.where(tokens > 1, (last - first) / np.maximum(tokens - 1, 1), np.nan)
    gaps = np.concatenate([np.diff(r.token_s) for r in window])
    return Latencies(ttft_s=first - due, tpot_s=tpot, e2e_s=last - due, itl_s=gaps)


def _rates(simulation: Simulation, borders_s: list[float]) -> list[tuple[float, float]]:
    """Return output tokens and requests completed per second between each two borders."""
    token_s = np.sort(np.concatenate([r.token_s for r in simulation.requests]))
    done_s = np.sort([r.token_s[-1] for r in simulation.requests if r.token_s])
    seconds = np.maximum(np.diff(borders_s), 1e-9)
    tokens, requests = (np.diff(np.searchsorted(times, borders_s)) / seconds for times in (token_s, done_s))
    return list(zip(tokens.tolist(), requests.tolist(), strict=True))


def relative_half_width(samples: list[float]) -> float:
    """Return half the 90 % interval of the mean over the batches, as a share of it."""
    mean = float(np.mean(samples))
    return STUDENT * float(np.std(samples, ddof=1)) / math.sqrt(len(samples)) / mean if mean > 0 else 0.0


def corrections(simulated: dict[str, float], analytic: dict[str, float], limits: SLO) -> dict[str, float]:
    """Return, by limit, simulated over analytic value."""
    return {
        slo.key(limit): simulated[f"{slo.key(limit)}_s"] / analytic[f"{slo.key(limit)}_s"]
        for limit in slo.latencies(limits)
        if analytic.get(f"{slo.key(limit)}_s", 0.0) > 0 and f"{slo.key(limit)}_s" in simulated
    }
