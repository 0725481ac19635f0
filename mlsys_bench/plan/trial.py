"""What users saw in a simulation, by batches of neighbouring requests: their spread is the simulation's uncertainty (batch means)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mlsys_bench import latency, slo
from mlsys_bench.plan.latencies import Floats, Latencies
from mlsys_bench.simulate.core import Tracks
from mlsys_bench.types import SLO
from mlsys_bench.workload import Schedule

BATCHES = 4
STUDENT = {4: 2.3533634, 8: 1.8945786, 12: 1.7958848, 16: 1.7530504}  # its 95 % point, by batches; scipy would cost 0.3 s to import
_PARTS, _PART = 4, 1000  # most parts of a batch, and requests of each: ten are beyond their p99
ANSWERED = 200  # the fate of a request in `Tracks`


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One number of replicas, simulated; latencies and rates by batch.

    `preempted` is the share of requests that lost their cache, `effort` how many times as long as usual the run was.  Of several `runs` the
    batches follow one another, as many of each.
    """

    batches: tuple[Latencies, ...]
    tokens_per_s: tuple[float, ...]  # of one replica
    requests_per_s: tuple[float, ...]
    preempted: float
    effort: int = 1
    runs: int = 1

    def apart(self) -> list[Trial]:
        """Return the runs by themselves."""
        if self.runs == 1:
            return [self]
        each = len(self.batches) // self.runs
        cuts = [slice(at, at + each) for at in range(0, len(self.batches), each)]
        return [
            replace(self, batches=self.batches[c], tokens_per_s=self.tokens_per_s[c], requests_per_s=self.requests_per_s[c], runs=1)
            for c in cuts
        ]

    @property
    def all(self) -> Latencies:
        """All batches as one sample."""
        return Latencies(
            ttft_s=np.concatenate([r.ttft_s for r in self.batches]),
            tpot_s=np.concatenate([r.tpot_s for r in self.batches]),
            e2e_s=np.concatenate([r.e2e_s for r in self.batches]),
            itl_s=np.concatenate([r.itl_s for r in self.batches]),
            tenant=_concatenated([r.tenant for r in self.batches]),
            tenants=self.batches[0].tenants,
            itl_tenant=_concatenated([r.itl_tenant for r in self.batches]),
        )

    def keys(self, limits: SLO) -> dict[str, float]:
        """Return the latencies of all batches together, and the rates."""
        rates = {"throughput_tokens_per_s": self.tokens_per_s, "request_rate_per_s": self.requests_per_s}
        return self.all.keys(limits) | {key: float(np.mean(values)) for key, values in rates.items()}

    def spread(self, limits: SLO) -> dict[str, float]:
        """Return half the 90 % interval of each key, relative to its value: Student's, over the batches.

        Long batches are cut in parts, for sixteen know their spread better than four.  Batches of few requests have few in the tail, and
        agree on it for want of them: see `_tail`.
        """
        each, whole = [part.keys(limits) for batch in self.batches for part in _parts(batch)], self.all
        values = {key: [found[key] for found in each] for key in each[0] if all(key in found for found in each)}
        values |= {"throughput_tokens_per_s": list(self.tokens_per_s), "request_rate_per_s": list(self.requests_per_s)}
        return {key: max(relative_half_width(samples), _tail(whole, key)) for key, samples in values.items()}


def joined(runs: Sequence[Trial]) -> Trial:
    """Return runs of the same fleet, as many batches in each, as one."""
    return Trial(
        batches=tuple(batch for run in runs for batch in run.batches),
        tokens_per_s=tuple(rate for run in runs for rate in run.tokens_per_s),
        requests_per_s=tuple(rate for run in runs for rate in run.requests_per_s),
        preempted=float(np.mean([run.preempted for run in runs])),
        effort=runs[0].effort,
        runs=len(runs),
    )


def _parts(batch: Latencies) -> list[Latencies]:
    """Return a batch cut in neighbouring parts, as many as leave each enough requests."""
    n = max(1, min(_PARTS, len(batch.ttft_s) // _PART))
    if n == 1:
        return [batch]
    cut = [np.array_split(values, n) for values in (batch.ttft_s, batch.tpot_s, batch.e2e_s, batch.itl_s)]
    whose = [[None] * n if values is None else np.array_split(values, n) for values in (batch.tenant, batch.itl_tenant)]
    return [
        Latencies(ttft_s=ttft, tpot_s=tpot, e2e_s=e2e, itl_s=itl, tenant=tenant, tenants=batch.tenants, itl_tenant=of_gaps)
        for ttft, tpot, e2e, itl, tenant, of_gaps in zip(*cut, *whose, strict=True)
    ]


def _tail(seen: Latencies, key: str) -> float:
    """Return half the 90 % interval of a percentile from p90 on, relative to it, were requests independent: by ranks; else 0."""
    metric, _, rest = key.partition("_")
    stat = rest.removesuffix("_s")
    if metric not in ("ttft", "tpot", "e2e") or not stat.startswith("p") or float(stat[1:]) < 90:
        return 0.0
    p = float(stat[1:]) / 100
    samples: Floats = getattr(seen, f"{metric}_s")
    samples = samples[~np.isnan(samples)]
    if not len(samples):
        return 0.0
    reach = 1.645 * math.sqrt(p * (1 - p) / len(samples))
    low, value, high = np.quantile(samples, [p - reach, p, min(p + reach, 1.0)])
    return float(high - low) / 2 / float(value) if value > 0 else 0.0


def of_tracks(tracks: Tracks, schedule: Schedule, batches: Sequence[tuple[int, int]], replicas: int, overhead: latency.Overhead) -> Trial:
    """Return what the requests of each batch saw, rows [first, end) of the schedule, the time outside the engine included."""
    back_s = after_s(tracks, schedule, overhead)
    served = tracks.fate == ANSWERED
    borders_s = [float(schedule.scheduled_s[first]) for first, _ in batches] + [float(schedule.scheduled_s[batches[-1][1] - 1])]
    seconds = np.maximum(np.diff(borders_s), 1e-9) * replicas
    done_s = np.sort(tracks.last_s[served] + back_s[served])
    assert tracks.token_s is not None
    token_s = np.sort(tracks.token_s[_valid(tracks)]) + float(back_s[served].mean() if served.any() else 0.0)
    tokens, requests = (np.diff(np.searchsorted(times, borders_s)) / seconds for times in (token_s, done_s))
    return Trial(
        batches=tuple(_latencies(tracks, schedule, first, end, back_s) for first, end in batches),
        tokens_per_s=tuple(tokens.tolist()),
        requests_per_s=tuple(requests.tolist()),
        preempted=tracks.preemptions / max(int(served.sum()), 1),
    )


def _valid(tracks: Tracks) -> npt.NDArray[np.bool_]:
    """Return which entries of `token_s` are tokens that came."""
    assert tracks.token_s is not None
    assert tracks.token_at is not None
    change = np.zeros(len(tracks.token_s) + 1, dtype=np.int64)
    np.add.at(change, tracks.token_at, 1)
    np.add.at(change, tracks.token_at + tracks.tokens, -1)
    return np.cumsum(change[:-1]) > 0


def after_s(tracks: Tracks, schedule: Schedule, overhead: latency.Overhead) -> Floats:
    """Return by request what passes beside its steps: outside the engine, and until a first step that was not planned before it came."""
    return overhead.there_s + overhead.back_s + tracks.late_s(schedule.prompt_tokens, overhead)


def _latencies(tracks: Tracks, schedule: Schedule, first: int, end: int, back_s: Floats) -> Latencies:
    rows = np.arange(first, end)[tracks.fate[first:end] == ANSWERED]
    due_s, tokens = schedule.scheduled_s[rows], tracks.tokens[rows]
    first_s, last_s = tracks.first_s[rows] + back_s[rows], tracks.last_s[rows] + back_s[rows]
    tpot: Floats = np.where(tokens > 1, (last_s - first_s) / np.maximum(tokens - 1, 1), np.nan)
    found = Latencies(ttft_s=first_s - due_s, tpot_s=tpot, e2e_s=last_s - due_s, itl_s=_gaps(tracks, rows))
    if schedule.tenant is None:
        return found
    whose = schedule.tenant[rows].astype(np.int64)
    return replace(found, tenant=whose, tenants=schedule.tenants, itl_tenant=np.repeat(whose, np.maximum(tokens - 1, 0)))


def _concatenated(parts: Sequence[npt.NDArray[np.int64] | None]) -> npt.NDArray[np.int64] | None:
    """Return the parts as one, None where there are none."""
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if known else None


def _gaps(tracks: Tracks, rows: npt.NDArray[np.int64]) -> Floats:
    """Return the times between the tokens of these requests."""
    assert tracks.token_s is not None
    assert tracks.token_at is not None
    if not len(rows):
        return np.zeros(0)
    several = np.repeat(tracks.token_at[rows] + 1, tracks.tokens[rows] - 1)
    within = np.arange(len(several)) - np.repeat(np.cumsum(tracks.tokens[rows] - 1) - (tracks.tokens[rows] - 1), tracks.tokens[rows] - 1)
    at = several + within
    return np.asarray(tracks.token_s[at] - tracks.token_s[at - 1])


def relative_half_width(samples: list[float]) -> float:
    """Return half the 90 % interval of the mean over the batches, as a share of it."""
    mean = float(np.mean(samples))
    return STUDENT[len(samples)] * float(np.std(samples, ddof=1)) / math.sqrt(len(samples)) / mean if mean > 0 else 0.0


def corrections(simulated: dict[str, float], analytic: dict[str, float], limits: SLO) -> dict[str, float]:
    """Return, by limit, simulated over analytic value."""
    return {
        slo.key(limit): simulated[f"{slo.key(limit)}_s"] / analytic[f"{slo.key(limit)}_s"]
        for limit in slo.latencies(limits)
        if analytic.get(f"{slo.key(limit)}_s", 0.0) > 0 and f"{slo.key(limit)}_s" in simulated
    }
