"""What a server said of itself during a load test, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlsys_bench.report.parts import NONE, Cell, Column, Fact, Table, digits, percent, time
from mlsys_bench.serversides import Energy, ServerSeries, ServerSide, ServerSource

_UNITS = {"per_s": "/s", "tokens_per_s": " tokens/s", "requests": "", "w": " W", "celsius": " °C"}


def facts(side: ServerSide) -> tuple[Fact, ...]:
    """Return the server's load, its latencies beside the client's, and energy, each in a line."""
    return (*_load(side), *_two_sides(side), *(_energy(one) for one in side.energy))


def tables(side: ServerSide) -> tuple[Table, ...]:
    """Return every quantity with its mean and its most in the window."""
    rows = tuple((Cell(_name(s)), _cell(s, s.mean), _cell(s, s.most)) for s in side.series if s.mean is not None or s.most is not None)
    columns = (Column("the server's own figures"), Column("mean", right=True), Column("most", right=True))
    note = f"in the window; most is of a step of {time(side.step_s)}; times are means over requests"
    return (Table(title="", columns=columns, rows=rows, note=note, detail=True),) if rows else ()


def notes(side: ServerSide) -> tuple[str, ...]:
    """Return where it was looked, what that cost, and what was not to be had."""
    return (*map(_source, side.sources), *side.notes)


def shown(unit: str, value: float | None) -> str:
    """Print a value in the unit of its series."""
    if value is None:
        return NONE
    if unit == "s":
        return time(value)
    if unit == "share":
        return percent(100 * value)
    if unit in ("hz", "bytes"):
        return f"{value / 1e6:,.0f} MHz" if unit == "hz" else f"{value / 2**30:,.1f} GiB"
    return f"{digits(value)}{_UNITS.get(unit, '')}"


def named(side: ServerSide, name: str) -> ServerSeries | None:
    """Return the series of a name."""
    return next((s for s in side.series if s.name == name), None)


def _load(side: ServerSide) -> Iterator[Fact]:
    parts = [f"{shown(s.unit, s.mean)} {name}" for name in ("running", "waiting") if (s := named(side, name)) and s.mean is not None]
    kv, hits = named(side, "kv_cache"), named(side, "prefix_hits")
    parts += [f"KV cache {shown('share', kv.mean)} full"] if kv and kv.mean is not None else []
    parts += [f"prefix hits {shown('share', hits.mean)}"] if hits and hits.mean is not None else []
    waiting = named(side, "waiting")
    most = f"means; at most {digits(waiting.most)} waiting" if waiting and waiting.most is not None else "means of the window"
    if parts:
        yield Fact("Server", ", ".join(parts), most, "measured")
    elif side.sources:
        yield Fact("Server", "tells nothing of itself", "; ".join(_skipped(side.sources[:1])))


def _two_sides(side: ServerSide) -> Iterator[Fact]:
    for one in side.two_sides:
        here, there = time(one.client_s), time(one.server_s, one.client_s)
        between = f"{time(one.between_s)} between: network, proxies and client" if one.between_s > 0 else ""
        yield Fact(f"{one.metric.upper()} there, here", f"{there} by the server, {here} from the send", between, "measured")


def _energy(one: Energy) -> Fact:
    parts = [
        f"{digits(value)} {unit}"
        for value, unit in (
            (one.joules_per_output_token, "J per output token"),
            (one.joules_per_request, "J per request"),
            (one.output_tokens_per_s_per_w, "tokens/s per W"),
        )
        if value is not None
    ]
    where = f"{', '.join(one.devices)}: {digits(one.mean_w)} W over {time(one.duration_s)} by {one.source}"
    return Fact("Energy", ", ".join(parts) or f"{digits(one.joules)} J", where, "measured")


def _name(s: ServerSeries) -> str:
    name = s.name.upper() if s.name in ("ttft", "tpot", "itl", "e2e") else s.name.replace("_", " ").replace("kv ", "KV ")
    return f"{s.device}, {name}" if s.device else name


def _cell(s: ServerSeries, value: float | None) -> Cell:
    return Cell(shown(s.unit, value), "" if value is not None else "muted")


def _source(one: ServerSource) -> str:
    if one.skipped:
        return f"{one.where}: {one.skipped}"
    failed = f", {one.failed} failed" if one.failed else ""
    cost = f"an answer took {time(one.answer_s)}, at most {time(one.longest_s)}; {percent(100 * one.cpu_share)} of a core here"
    return f"{one.kind} at {one.where}: {one.looks:,} looks, one every {time(one.interval_s)}{failed}; {cost}"


def _skipped(sources: Sequence[ServerSource]) -> Iterator[str]:
    yield from (_source(one) for one in sources if one.skipped)
