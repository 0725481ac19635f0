"""Two pools played: prompts on the prefill replicas, their caches over the links, answers on the decode replicas.

Nothing flows back, so the pools are played one after the other with the simulator of whole runs: each prefill replica sends its caches in
order of their ends, and the decode pool gets them as they arrive.  The same happens, event by event, in `simulate.run` with
`Disaggregation`; a test holds the two against each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mlsys_bench import workload
from mlsys_bench.plan.candidates import Candidate
from mlsys_bench.plan.demand import Floats
from mlsys_bench.plan.disaggregated.link import Link
from mlsys_bench.simulate import core
from mlsys_bench.simulate.core import Tracks
from mlsys_bench.workload import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """What a prefill pool did with a schedule: when each first token was computed, and when its cache had arrived."""

    schedule: Schedule
    tracks: Tracks
    handed_s: Floats


def prefilled(candidate: Candidate, schedule: Schedule, link: Link, replicas: int, routing: str, seed: int) -> Prefilled:
    """Return what so many prefill replicas do with a schedule."""
    alone = replace(schedule, output_tokens=np.ones(len(schedule), dtype=np.int64))
    tracks = core.play(alone, candidate.limits, profile=candidate.profile, replicas=replicas, routing=routing, seed=seed)
    assert tracks.replica is not None
    several = schedule.output_tokens > 1
    transfer_s = np.where(several, link.seconds(schedule.prompt_tokens.astype(np.float64)), 0.0)
    handed_s = tracks.last_s.copy()
    order = np.lexsort((np.arange(len(handed_s)), tracks.last_s))
    for r in range(replicas):
        mine = order[(tracks.replica[order] == r) & several[order]]
        handed_s[mine] = _one_after_another(tracks.last_s[mine], transfer_s[mine])
    return Prefilled(schedule=schedule, tracks=tracks, handed_s=handed_s)


def _one_after_another(ready_s: Floats, takes_s: Floats) -> Floats:
    """Return when each is done, in order: max(ready, end of the one before) + its time."""
    sent = np.cumsum(takes_s)
    return np.asarray(sent + np.maximum.accumulate(ready_s - sent + takes_s))


def decoded(candidate: Candidate, first: Prefilled, kept: npt.NDArray[np.bool_], replicas: int, routing: str, seed: int) -> Tracks:
    """Return what becomes of the requests that are `kept` on so many decode replicas, as tracks of their rows of the schedule."""
    rows = np.flatnonzero(kept & (first.schedule.output_tokens > 1))
    order = rows[np.argsort(first.handed_s[rows], kind="stable")]
    coming = replace(workload.take(first.schedule, order), scheduled_s=first.handed_s[order])
    tracks = core.play(
        coming, candidate.limits, profile=candidate.profile, replicas=replicas, routing=routing, seed=seed, keep_tokens=True, begun=True
    )
    return _joined(first, np.flatnonzero(kept), order, tracks)


def _joined(first: Prefilled, rows: npt.NDArray[np.int64], order: npt.NDArray[np.int64], tracks: Tracks) -> Tracks:
    """Return the tracks of whole requests: the first token as it was handed over, the others as they were decoded."""
    assert tracks.token_s is not None
    assert tracks.token_at is not None
    n, place = len(rows), np.searchsorted(rows, order)
    handed_s = first.handed_s[rows]
    token_s = tracks.token_s.copy()
    token_s[tracks.token_at] = first.handed_s[order]
    single = np.setdiff1d(np.arange(n), place)
    token_at = np.empty(n, dtype=np.int64)
    token_at[place], token_at[single] = tracks.token_at, len(token_s) + np.arange(len(single))
    last_s, worst_s, tokens, fate = handed_s.copy(), np.full(n, np.nan), np.ones(n, dtype=np.int64), first.tracks.fate[rows].copy()
    for whole, part in ((last_s, tracks.last_s), (worst_s, tracks.worst_gap_s), (tokens, tracks.tokens), (fate, tracks.fate)):
        whole[place] = part
    return replace(
        tracks,
        last_s=last_s,
        worst_gap_s=worst_s,
        tokens=tokens,
        fate=fate,
        arrived_s=first.tracks.arrived_s[rows],
        started_s=first.tracks.started_s[rows],
        first_s=handed_s,
        token_s=np.concatenate([token_s, handed_s[single]]),
        token_at=token_at,
        replica=None,
    )
