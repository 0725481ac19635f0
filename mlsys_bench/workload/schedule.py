"""Requests to come, as arrays: when each is due, how long it is, what it shares, whose it is; and how to cut and stretch them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsys_bench import units
from mlsys_bench.errors import BadInput

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Requests to come: when each is due, and how many tokens go in and come out; every array has one row per request.

    What a request shares: the blocks of `prefix_block_tokens` tokens of its prompt, of which the last may be part-filled, have the hashes
    `prefix_hashes[prefix_offsets[r]:prefix_offsets[r + 1]]`; a hash covers its block and all before it, so equal hashes mean equal
    beginnings.  Whose it is: `tenants[tenant[r]]`; who has a lower `rank` goes first.  Without one it is first come, first served.
    Sessions: a row with `turn` > 0 follows the row of the same `session` and the turn before, which stands above it.  Where `gap_s` is
    given such a row is sent `gap_s` after that answer is complete and its `scheduled_s` is nan; where it is None all times are kept.
    """

    scheduled_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    prefix_offsets: Ints | None = None
    prefix_hashes: Ints | None = None
    prefix_block_tokens: int = 0
    tenant: Labels | None = None
    tenants: tuple[str, ...] = ()
    rank: Labels | None = None
    session: Labels | None = None
    turn: Labels | None = None
    gap_s: Floats | None = None
    notes: tuple[str, ...] = ()  # of the file it was read from: what was left out of it, what its times do not say

    def __len__(self) -> int:
        """How many requests there are."""
        return len(self.scheduled_s)


_PER_REQUEST = ("scheduled_s", "prompt_tokens", "output_tokens", "tenant", "rank", "session", "turn", "gap_s")


def take(plan: Schedule, rows: npt.ArrayLike) -> Schedule:
    """Return these rows, in this order: indices or a mask."""
    chosen = np.asarray(rows)
    chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)
    columns: dict[str, Any] = {name: None if (column := getattr(plan, name)) is None else column[chosen] for name in _PER_REQUEST}
    offsets, hashes = _take_ragged(plan, chosen)
    return dataclasses.replace(plan, **columns, prefix_offsets=offsets, prefix_hashes=hashes)


def sliced(plan: Schedule, start_s: float, end_s: float = math.inf) -> Schedule:
    """Return the requests due in [start, end), with time counted from `start_s`; turns that wait for an answer stay with their session."""
    due = starts_s(plan)
    inside = take(plan, (due >= start_s) & (due < end_s))
    if plan.gap_s is None and inside.turn is not None:  # a cut through a session: what is left of it begins anew
        inside = dataclasses.replace(inside, turn=_renumbered(inside))
    return dataclasses.replace(inside, scheduled_s=inside.scheduled_s - start_s)


def sped_up(plan: Schedule, factor: float) -> Schedule:
    """Return the same requests arriving `factor` times as fast.  The gaps inside sessions stay: people do not think faster."""
    if not (math.isfinite(factor) and factor > 0):
        raise BadInput(f"a speed-up of {factor:g}: it must be above zero, e.g. 2 for twice the rate")
    return dataclasses.replace(plan, scheduled_s=plan.scheduled_s / factor)


def rate_per_s(plan: Schedule) -> float:
    """Return requests per second between the first arrival and the last: n - 1 gaps, or for sessions all their requests over that time."""
    due = starts_s(plan)
    duration_s = float(due.max() - due.min()) if len(due) else 0.0
    if duration_s <= 0:
        raise BadInput(f"{len(due)} request(s) that arrive at one time have no rate; traffic must last")
    return (len(due) - 1) / duration_s


def scaled_to_rate(plan: Schedule, wanted_per_s: float) -> Schedule:
    """Return the same requests at another mean rate: time is stretched, so that bursts keep their share of the traffic."""
    if not (math.isfinite(wanted_per_s) and wanted_per_s > 0):
        raise BadInput(f"a rate of {wanted_per_s:g}/s: it must be above zero")
    return sped_up(plan, wanted_per_s / rate_per_s(plan))


def spread(plan: Schedule, grid_s: float, seed: int = 0) -> Schedule:
    """Return the requests with each time moved on by a random part of a grid step: times recorded on a grid arrive together else."""
    times_s = plan.scheduled_s + np.random.default_rng(seed).uniform(0.0, grid_s, len(plan))
    moved = dataclasses.replace(plan, scheduled_s=times_s)
    return take(moved, np.argsort(starts_s(moved), kind="stable"))


def merged(plans: Mapping[str, Schedule]) -> Schedule:
    """Return the traffic of several tenants together, in order of arrival; sessions and prefixes of different tenants stay apart."""
    parts = list(plans.values())
    sizes = {p.prefix_block_tokens for p in parts if p.prefix_hashes is not None}
    if not parts or len(sizes) > 1:
        raise BadInput(f"tenants to merge must share one prefix block size, not {sorted(sizes)}" if parts else "no tenants to merge")
    lengths = [len(p) for p in parts]
    joined: dict[str, Any] = {name: np.concatenate([getattr(p, name) for p in parts]) for name in _PER_REQUEST[:3]}
    together = Schedule(
        **joined | _merged_prefixes(parts, sizes) | _merged_sessions(parts),
        tenant=np.repeat(np.arange(len(parts), dtype=np.int32), lengths),
        tenants=tuple(plans),
    )
    return take(together, np.argsort(starts_s(together), kind="stable"))


def starts_s(plan: Schedule) -> Floats:
    """Return when each request, or the session it belongs to, starts."""
    if plan.gap_s is None or plan.session is None or plan.turn is None:
        return plan.scheduled_s
    first = plan.turn == 0
    by_session = np.full(int(plan.session.max(initial=-1)) + 1, np.nan)
    by_session[plan.session[first]] = plan.scheduled_s[first]
    return np.where(first, plan.scheduled_s, by_session[plan.session])


def nominal_s(plan: Schedule) -> Floats:
    """Return when each request would arrive if answers took no time: its own time, or its session's start and all gaps since."""
    if plan.gap_s is None or plan.session is None:
        return plan.scheduled_s
    by_session = np.argsort(plan.session, kind="stable")
    first = np.flatnonzero(np.diff(plan.session[by_session], prepend=-1))
    waited = np.cumsum(plan.gap_s[by_session])
    before = np.repeat(waited[first] - plan.gap_s[by_session][first], np.diff(np.append(first, len(plan))))
    times_s = np.empty(len(plan))
    times_s[by_session] = starts_s(plan)[by_session] + waited - before
    return times_s


def opened(plan: Schedule) -> Schedule:
    """Return the same requests at times of their own, in order: turns that wait for an answer come as if it took no time.

    So sessions keep their rate and their pauses, and their turns come a little earlier than they would.  A schedule without such turns
    stays as it is.
    """
    waiting = 0 if plan.gap_s is None or plan.turn is None else int(np.count_nonzero(plan.turn))
    if not waiting:
        return plan
    due_s = nominal_s(plan)
    lasts_s = float(due_s.max() - due_s.min())
    note = (
        f"{waiting:,} of {len(plan):,} requests are turns that follow an answer: they come after their pause as if it had taken no time, "
        f"{units.show_rate((len(plan) - 1) / lasts_s)} over {units.show_s(lasts_s)} in all; `mlsys simulate --trace` lets them wait"
    )
    timed = dataclasses.replace(plan, scheduled_s=due_s, gap_s=None, notes=(*plan.notes, note))
    return take(timed, np.argsort(due_s, kind="stable"))


def _take_ragged(plan: Schedule, rows: Ints) -> tuple[Ints | None, Ints | None]:
    if plan.prefix_offsets is None or plan.prefix_hashes is None:
        return None, None
    begins, counts = plan.prefix_offsets[rows], np.diff(plan.prefix_offsets)[rows]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
    return offsets, plan.prefix_hashes[np.repeat(begins, counts) + within]


def _renumbered(plan: Schedule) -> Labels:
    """Return turns counted from 0 in each session."""
    assert plan.session is not None
    assert plan.turn is not None
    least = np.full(int(plan.session.max(initial=-1)) + 1, np.iinfo(np.int32).max, dtype=np.int32)
    np.minimum.at(least, plan.session, plan.turn)
    return plan.turn - least[plan.session]


def _merged_prefixes(parts: list[Schedule], sizes: set[int]) -> dict[str, Any]:
    if not sizes:
        return {}
    counts, hashes, used = [], [], 0
    for part in parts:
        if part.prefix_offsets is None or part.prefix_hashes is None:
            counts.append(np.zeros(len(part), dtype=np.int64))
            continue
        names, renamed = np.unique(part.prefix_hashes, return_inverse=True)
        counts.append(np.diff(part.prefix_offsets))
        hashes.append(renamed.astype(np.int64) + used)
        used += len(names)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    return {"prefix_offsets": offsets, "prefix_hashes": np.concatenate(hashes), "prefix_block_tokens": sizes.pop()}


def _merged_sessions(parts: list[Schedule]) -> dict[str, Any]:
    """Return sessions of all parts under numbers of their own; a request that belonged to none is a session of one turn."""
    if all(p.session is None for p in parts):
        return {}
    sessions, turns, gaps, used = [], [], [], 0
    for part in parts:
        own = np.arange(len(part), dtype=np.int32) if part.session is None else part.session
        sessions.append(own + np.int32(used))
        turns.append(np.zeros(len(part), dtype=np.int32) if part.turn is None else part.turn)
        gaps.append(np.zeros(len(part)) if part.gap_s is None else part.gap_s)
        used += int(own.max(initial=-1)) + 1
    waits = any(p.gap_s is not None for p in parts)
    if waits and any(p.gap_s is None and p.turn is not None and p.turn.any() for p in parts):
        raise BadInput("sessions that wait for answers cannot be merged with sessions of fixed times; give both gaps, or neither")
    return {"session": np.concatenate(sessions), "turn": np.concatenate(turns), "gap_s": np.concatenate(gaps) if waits else None}
