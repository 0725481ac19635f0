"""What surrounded the launches of a gate: the hypervisor, other processes, the GPUs; and whether that disturbed them.

watch = begin(pids)                                        when both sides are ready
end(watch, pair=1, side="base", started_s=…, wall_s=…)     for each side, before it is closed; stops looking
contention(conditions)                                     once, for the record
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mlsys_bench import units
from mlsys_bench.hardware import proc
from mlsys_bench.journeys.gating import gpus
from mlsys_bench.verdicts import Conditions, Contention

STEAL = 0.01
OTHER = 0.05
FORCED_PER_S = 50.0
CLOCK_APART = 0.01
OFTEN = 0.2  # of the launches
LEAST_S = 0.5  # of watching, below which nothing is said: 50 ticks of a CPU
_HARD_THROTTLES = ("hardware slowdown", "software thermal slowdown", "hardware thermal slowdown", "power brake")


@dataclass(slots=True, kw_only=True, eq=False)
class Watch:
    """A look at the machine that is under way."""

    pids: tuple[int, ...]
    times: proc.Times | None
    ours_s: float
    cpu_s: dict[int, float | None]
    involuntary: dict[int, int | None]
    sampler: gpus.Sampler
    shares: proc.Shares | None = None  # once it is over


def begin(pids: Sequence[int]) -> Watch:
    """Start to watch the machine around these processes and what they start."""
    return Watch(
        pids=tuple(pids),
        times=proc.times(),
        ours_s=proc.ours_s(pids),
        cpu_s={pid: proc.cpu_s([pid]) for pid in pids},
        involuntary={pid: proc.involuntary([pid]) for pid in pids},
        sampler=gpus.Sampler(),
    )


def end(watch: Watch, *, pair: int, side: Literal["base", "cand"], started_s: float, wall_s: float, pids: Sequence[int] = ()) -> Conditions:
    """Return what surrounded one launch, whose processes are `pids`.  The first call stops looking; the other side shares its window."""
    shares = stop(watch)
    own = [pid for pid in pids if pid in watch.cpu_s]
    return Conditions(
        pair=pair,
        side=side,
        started_s=started_s,
        wall_s=wall_s,
        cpu_s=_grown(own, watch.cpu_s, lambda pid: proc.cpu_s([pid])),
        involuntary=_whole(_grown(own, watch.involuntary, lambda pid: proc.involuntary([pid]))),
        steal_share=shares.steal,
        other_cpu_share=shares.other,
        load=_load(),
        gpu=watch.sampler.stop(),
    )


def stop(watch: Watch) -> proc.Shares:
    """Look a last time and end the thread that looks at GPUs.  May be called again."""
    watch.sampler.stop()
    if watch.shares is None:
        ours_s = max(0.0, proc.ours_s(watch.pids) - watch.ours_s)
        watch.shares = proc.shares(watch.times, proc.times(), ours_s * proc.ticks_per_s())
    return watch.shares


def _grown(pids: Sequence[int], before: Mapping[int, float | None], now: Callable[[int], float | None]) -> float | None:
    """Return by how much a counter of some processes grew together, None where one of them is gone or does not tell."""
    pairs = [(before[pid], now(pid)) for pid in pids]
    grown = [after - start for start, after in pairs if start is not None and after is not None]
    return sum(grown) if grown and len(grown) == len(pairs) else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


# ---------------------------------------------------------------- were they disturbed?


def contention(conditions: Sequence[Conditions]) -> Contention:
    """Say whether others disturbed a run: on the whole, or in a fifth of its launches.

    | figure                                 | from    | why there                                                                     |
    |----------------------------------------|---------|-------------------------------------------------------------------------------|
    | steal, of the machine's CPU time       | 1 %     | what is taken from a core is missing from what runs on it, so a time grows by |
    |                                        |         | as much or more: the d0 = 1 % from which a 5 % tolerance calls it slower      |
    | others' CPU time, of the machine's     | 5 %     | a neighbour with 20 % of a two-core machine costs an engine on the other core |
    |                                        |         | 4 to 10 % (`bench.companion`): 1 % and more from a quarter of that            |
    | forced off a CPU, per second and launch| 50      | two busy processes on one core forced each other off it 830 to 970 times a    |
    |                                        |         | second (measured, Linux 6.18); a twentieth of that is 2 to 5 % of the time    |
    | SM clocks of the two sides apart       | 1 %     | a kernel bound by compute takes as much longer                                |
    | a GPU slowed by heat or brake          | any     | its clock is then not that of the program                                     |

    Being forced off counts where others used more than 1 % of the CPU time: threads of one program force each other off, too.  A power cap
    is the program's own doing and is left in the record.  Less than half a second of watching in all says nothing.
    """
    told = [c for c in conditions if c.steal_share is not None or c.other_cpu_share is not None]
    watched_s = sum(c.wall_s for c in told)
    reasons = (*(_cpu_reasons(told) if watched_s >= LEAST_S else ()), *_gpu_reasons(conditions))
    if reasons:
        return Contention(verdict="contended", reasons=reasons)
    if watched_s < LEAST_S:
        why = f"only {watched_s:.2g} s were watched" if told else "this machine does not say who used its CPUs (no /proc/stat)"
        return Contention(verdict="unknown", reasons=(why,))
    return Contention(verdict="quiet")


def _cpu_reasons(told: Sequence[Conditions]) -> Iterator[str]:
    steal = _taken(told, lambda c: c.steal_share, STEAL)
    other = _taken(told, lambda c: c.other_cpu_share, OTHER)
    if steal:
        yield f"the hypervisor took {steal}: the host is shared; use a dedicated runner, or raise the tolerance"
    if other:
        yield f"other processes used {other}: end them, or give the job a machine of its own"
    forced = [c.involuntary / c.wall_s for c in told if c.involuntary is not None and c.wall_s >= LEAST_S and _had_company(c)]
    above = [rate for rate in forced if rate > FORCED_PER_S]
    if len(above) >= max(1.0, OFTEN * len(told)):
        yield f"others forced it off its CPU up to {max(above):,.0f} times a second, in {len(above)} of {len(told)} launches"


def _had_company(c: Conditions) -> bool:
    """Say whether anybody else ran at all: the threads of one program force each other off, too."""
    return c.other_cpu_share is None or c.other_cpu_share > OTHER / 5


def _taken(told: Sequence[Conditions], share_of: Callable[[Conditions], float | None], limit: float) -> str | None:
    """Return how much of the CPU time, where that is too much: over all launches together, or in a fifth of those long enough to tell."""
    known = [(share, c.wall_s) for c in told if (share := share_of(c)) is not None]
    mean = sum(share * wall_s for share, wall_s in known) / sum(wall_s for _, wall_s in known) if known else 0.0
    long = [share for share, wall_s in known if wall_s >= LEAST_S]
    above = [share for share in long if share > limit]
    if mean <= limit and len(above) < max(1.0, OFTEN * len(long)):
        return None
    worst = f", up to {units.show_share(max(above))} in {len(above)} of {len(long)} launches" if above else ""
    return f"{units.show_share(mean)} of the CPU time{worst}"


def _gpu_reasons(conditions: Sequence[Conditions]) -> Iterator[str]:
    known = [(c.side, c.gpu) for c in conditions if c.gpu]
    slowed = [[why for why in _HARD_THROTTLES if why in str(gpu.get("throttle") or "")] for _, gpu in known]
    if any(slowed):
        whys = ", ".join(dict.fromkeys(why for each in slowed for why in each))
        yield f"a GPU was slowed ({whys}) in {sum(map(bool, slowed))} of {len(known)} launches"
    clocks = [[float(mhz) for at, gpu in known if at == side and (mhz := gpu.get("sm_clock_mhz"))] for side in ("base", "cand")]
    if all(clocks):
        base, cand = map(statistics.fmean, clocks)
        if abs(cand / base - 1) > CLOCK_APART:
            yield f"the GPU ran at {base:.0f} MHz for the baseline and at {cand:.0f} MHz for the candidate: lock them (nvidia-smi -lgc)"
