"""What was seen of servers and devices -> the record: series on the run's seconds, the server's latencies beside the client's, energy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from mlsys_bench import summary, units
from mlsys_bench.loadtest.serverside import lines, names
from mlsys_bench.loadtest.serverside.lines import Floats, Read
from mlsys_bench.loadtest.serverside.watch import Looks
from mlsys_bench.serversides import Energy, ServerSeries, ServerSide, ServerSource, TwoSides
from mlsys_bench.types import RequestRecord
from mlsys_bench.workload.metrics import canonical

Window = tuple[float, float]
_MOST_STEPS = 600
_COVERED = 0.8  # of the window, by the energy counter's own updates
_APART = {"ttft": (0.01, 0.25), "tpot": (0.001, 0.1)}  # seconds and share of the client's: beyond both the two sides disagree
_COUNTS_APART = 0.1
_WAYS = {"nvml": "NVML's energy counter", "dcgm": "DCGM's energy counter", "triton": "Triton's energy counter", "rapl": "RAPL"}


def read(
    looked: Sequence[Looks],
    records: Sequence[RequestRecord],
    *,
    t0_unix_s: float,
    window: Window,
    model: str | None = None,
    step_s: float | None = None,
    steps: int | None = None,
) -> ServerSide:
    """Return the server's side of a run.  `step_s` and `steps` are those of the run's timeline, where it has one."""
    end_s = max((r.done_s for r in records if r.done_s is not None), default=window[1])
    step_s = step_s or float(max(1, math.ceil(end_s / _MOST_STEPS)))
    edges_s = step_s * np.arange((steps or max(1, math.ceil(end_s / step_s))) + 1, dtype=np.float64)
    found = list(lines.found(lines.collect(looked, t0_unix_s, model)))
    used = _in_use(found, window)
    energy, whys = _energy(found, used, records, window)
    two_sides = tuple(_two_sides(found, records, window))
    return ServerSide(
        sources=tuple(_source(looks) for looks in looked),
        step_s=step_s,
        series=tuple(_series(read, edges_s, window) for read in found if read.reading.name not in (names.ENERGY, "throttle")),
        two_sides=two_sides,
        energy=energy,
        doubts=(*_disagreements(two_sides), *_throttled(found, window), *_others(found, records, window)),
        notes=(*_idle(found, used), *whys),
    )


def _series(read: Read, edges_s: Floats, window: Window) -> ServerSeries:
    values = read.on(edges_s)
    inside = values[(edges_s[:-1] < window[1]) & (edges_s[1:] > window[0])]
    known = inside[np.isfinite(inside)]
    return ServerSeries(
        name=read.reading.name,
        unit=read.reading.unit,
        device=read.device,
        values=tuple(float(f"{v:.6g}") if math.isfinite(v) else None for v in values),
        mean=read.window(window) if read.reading.kind in ("rate", "ratio") else float(known.mean()) if len(known) else None,
        most=float(known.max()) if len(known) else None,
    )


def _source(looks: Looks) -> ServerSource:
    times, took = np.array(looks.times_s), np.array(looks.took_s)
    kinds = list(dict.fromkeys(r.server for r in names.READINGS for name, _ in looks.samples if canonical(name) in r.metrics))
    nothing = None if kinds else looks.missed or "none of the names that are known here"
    return ServerSource(
        kind=", ".join(kinds) or "none",
        where=looks.where,
        looks=len(times),
        failed=looks.failed,
        interval_s=float(np.median(np.diff(times))) if len(times) > 1 else None,
        answer_s=float(took.mean()) if len(took) else None,
        longest_s=float(took.max()) if len(took) else None,
        bytes_per_look=looks.bytes / max(len(times), 1),
        cpu_share=looks.cpu_s / max(looks.lasted_s, 1e-9),
        skipped=nothing,
    )


# ---------------------------------------------------------------- the server's latencies beside the client's


def _two_sides(found: Sequence[Read], records: Sequence[RequestRecord], window: Window) -> Iterator[TwoSides]:
    """Yield means of the same requests: those whose latency the server counted in the window.  Both sides count from the send."""
    ok = [r for r in records if r.outcome == "ok" and r.token_s]
    for metric, of in (("ttft", _own_ttft_s), ("tpot", summary.tpot_s)):
        read = next((one for one in found if one.reading.name == metric), None)
        mean = read.window(window) if read else None
        if read is None or mean is None:
            continue
        counted_at = -1 if metric == "tpot" or read.reading.server in names.COUNT_AT_END else 0
        client = [value for r in ok if window[0] <= r.token_s[counted_at] <= window[1] and (value := of(r)) is not None]
        if client:
            count = read.counted(window)
            yield TwoSides(metric=metric, server_s=mean, server_count=count, client_s=float(np.mean(client)), client_count=len(client))


def _own_ttft_s(record: RequestRecord) -> float | None:
    """Return the time from the real send to the first token; an answer that came in one piece hides when that was made."""
    hidden = len(record.token_s) == 1 and sum(record.tokens_per_event) > 1
    return None if record.sent_s is None or hidden else record.token_s[0] - record.sent_s


def _disagreements(sides: Sequence[TwoSides]) -> Iterator[str]:
    for side in sides:
        least_s, share = _APART[side.metric]
        here, there = units.show_s(side.client_s), units.show_s(side.server_s)
        if abs(side.between_s) > max(least_s, share * side.client_s):
            why = "a proxy, the network or this client lies between" if side.between_s > 0 else "it counts other requests than these"
            yield f"{side.metric.upper()} is {here} here and {there} by the server's own count (means from the send): {why}"
        if abs(side.server_count - side.client_count) > max(_COUNTS_APART * side.client_count, 3):
            why = "others use it too" if side.server_count > side.client_count else "its metrics show a part of the fleet"
            counts = f"{side.server_count:,.0f} in the window, this client {side.client_count:,}"
            yield f"requests with a {side.metric.upper()}: the server counted {counts}: {why}"


def _others(found: Sequence[Read], records: Sequence[RequestRecord], window: Window) -> Iterator[str]:
    """Say when the server made more tokens than came here: energy per token is then too high."""
    read = next((one for one in found if one.reading.name == "generation_tokens" and one.reading.server != "tgi"), None)
    rate = read.window(window) if read else None
    here = _tokens(records, window)
    made = 0.0 if rate is None else rate * (window[1] - window[0])
    if here and made > (1 + _COUNTS_APART) * here:
        yield f"the server made {made:,.0f} tokens in the window, {here:,} came here: others use it, energy per token is too high"


# ---------------------------------------------------------------- devices


def _in_use(found: Sequence[Read], window: Window) -> set[str | None]:
    """Return the devices that worked in the window; all where none tells."""
    told = {one.device: one for one in found if one.reading.name == "utilisation"}
    every = {one.device for one in found if one.reading.by_device}
    grid = np.linspace(*window, 2 + int(window[1] - window[0]))
    busy = {device for device, one in told.items() if np.nanmax(np.append(one.on(grid), 0.0)) > 0}
    return (every - (set(told) - busy)) if busy else every


def _idle(found: Sequence[Read], used: set[str | None]) -> Iterator[str]:
    idle = sorted(str(d) for d in {one.device for one in found if one.reading.by_device} - used)
    if idle:
        yield f"{', '.join(idle)} did nothing in the window: their energy is left out"


def _throttled(found: Sequence[Read], window: Window) -> Iterator[str]:
    """Say which devices were slowed down, for how much of the looks, and why."""
    for one in (one for one in found if one.reading.name == "throttle"):
        samples = [v for line in one.of for t, v in zip(line.times_s, line.values, strict=True) if window[0] <= t <= window[1]]
        for bit, why in names.THROTTLES.items():
            share = sum(bool(int(v) & bit) for v in samples) / len(samples) if samples else 0.0
            if share:
                yield f"{one.device} was slowed down in {units.show_share(share)} of the looks: {why}"


def _energy(
    found: Sequence[Read], used: set[str | None], records: Sequence[RequestRecord], window: Window
) -> tuple[tuple[Energy, ...], list[str]]:
    """Return the energy of GPUs and that of CPUs, and why there is none."""
    got: list[Energy] = []
    whys: list[str] = []
    drawn = [one for one in found if one.reading.name in (names.ENERGY, names.POWER) and one.device in used]
    for kind in (("nvml", "dcgm", "triton"), ("rapl",)):  # several ways to the same GPUs: the first that works counts
        tried = [_of_devices(own, server, records, window) for server in kind if (own := [r for r in drawn if r.reading.server == server])]
        known = [one for one in tried if isinstance(one, Energy)]
        got += known[:1]
        whys += [] if known else [one for one in tried if isinstance(one, str)]
    return tuple(got), whys


def _of_devices(own: Sequence[Read], server: str, records: Sequence[RequestRecord], window: Window) -> Energy | str:
    """Return the energy of all devices over what of the window is known of all, by their counters or else by their power."""
    counters = {one.device: one for one in own if one.reading.name == names.ENERGY}
    powers = {one.device: one for one in own if one.reading.name == names.POWER}
    ways = ((_by_counter, counters, _WAYS[server]), (_by_power, powers, f"power of {server.upper()}, summed over time"))
    for curve, reads, source in ways:
        curves = [curve(one) for one in reads.values()]
        if len(curves) < len({one.device for one in own}) or any(len(times) < 2 for times, _ in curves):
            continue
        low, high = max(window[0], *(t[0] for t, _ in curves)), min(window[1], *(t[-1] for t, _ in curves))
        if high - low < _COVERED * (window[1] - window[0]):
            continue
        joules = sum(float(np.diff(np.interp([low, high], times, values))[0]) for times, values in curves)
        answered = sum(r.outcome == "ok" and low <= (r.done_s or 0.0) <= high for r in records)
        return Energy(
            devices=tuple(sorted(str(device) for device in reads)), source=source, joules=joules, duration_s=high - low,
            output_tokens=_tokens(records, (low, high)), requests=answered,
        )  # fmt: skip
    return f"energy is not known: {_WAYS[server]} was not updated often enough for a window of {units.show_s(window[1] - window[0])}"


def _by_counter(one: Read) -> tuple[Floats, Floats]:
    """Return when an energy counter changed, and to what.

    DCGM's exporter renews its figures every 30 s unless told otherwise: between two changes nothing is known but what they are.
    """
    line = one.of[0]
    joules = one.reading.scale * line.cumulative()
    changed = np.flatnonzero(np.diff(line.values)) + 1
    looks_s = line.gap_s / 5
    is_live = len(changed) > 1 and float(np.median(np.diff(line.times_s[changed]))) < 2 * looks_s
    at = np.append(0, changed) if is_live else changed  # the first value of a slow counter is older than the first look
    return line.times_s[at], joules[at]


def _by_power(one: Read) -> tuple[Floats, Floats]:
    line = one.of[0]
    watts = one.reading.scale * line.values
    steps = np.diff(line.times_s) * (watts[1:] + watts[:-1]) / 2
    return line.times_s, np.append(0.0, np.cumsum(steps))


def _tokens(records: Sequence[RequestRecord], window: Window) -> int:
    return sum(k for r in records for t, k in zip(r.token_s, r.tokens_per_event, strict=True) if window[0] <= t <= window[1])
