"""Traffic in words: how much, how bursty, how long, how much of it was seen before."""

from __future__ import annotations

from mlsys_bench import units, workload
from mlsys_bench.report.parts import NONE, Cell, Column, Fact, Section, Table, digits, scalar, span
from mlsys_bench.types import Lengths, LengthSummary, TrafficSummary, Workload
from mlsys_bench.units import count

_BARS = " ▁▂▃▄▅▆▇█"
_BAR_COUNT = 48


def section(record: Workload) -> Section:
    """Return the traffic as a planner sees it and, where it was observed, what was seen."""
    seen, tag = record.observed, record.provenance.value
    return Section(
        kind="workload",
        title=f"Workload: {requests(record.rate_per_s)}",
        lead=f"{requests(record.rate_per_s)}, {workload.in_words(record.arrivals)}.",
        tag=tag,
        facts=(*facts(record), Fact("Arrivals", short(record.arrivals), "the law that stands in for them", tag), *_prefix(record, tag))
        + (_observed(seen, tag) if seen else ()),
        tables=_tables(seen) if seen else (),
        notes=(*((("Source", (record.source,)),) if record.source else ()), *((("Notes", seen.notes),) if seen and seen.notes else ())),
    )


def facts(w: Workload) -> list[Fact]:
    """Return rate, arrivals and lengths."""
    text = f"{requests(w.rate_per_s)}, {short(w.arrivals)} arrivals"
    lengths = f"{_law(w.prompt_tokens, 'tokens in')}; {_law(w.output_tokens, 'out')}" if w.prompt_tokens.mean > 0 else ""
    return [Fact("Traffic", text, lengths, w.provenance.value)]


def requests(rate_per_s: float) -> str:
    """Print a rate of requests."""
    return f"{scalar(rate_per_s)} requests/s"


def short(arrivals: str) -> str:
    """Print a law of arrivals, long lists of levels shortened."""
    return "*".join(part if len(part) < 50 else f"{part[:28]}…" for part in arrivals.split("*"))


def _law(law: Lengths, what: str) -> str:
    if law.dist == "constant" or law.cv == 0:
        return f"{scalar(law.mean)} {what}"
    if law.dist == "mixture":
        parts = " + ".join(f"{100 * one.share:.3g} % {one.dist} of {scalar(one.mean)}" for one in law.parts)
        return f"{scalar(law.mean)} {what} ({parts})"
    return f"{scalar(law.mean)} {what} ({law.dist}, cv {scalar(law.cv)}{f', at most {law.max:,}' if law.max else ''})"


def _prefix(w: Workload, tag: str) -> tuple[Fact, ...]:
    if w.prefix_hit_share is None:
        return ()
    sizes = w.observed.prefix_hits_by_cache_tokens if w.observed else {}
    smaller = "; ".join(f"{units.show_share(share)} with a cache of {tokens} tokens" for tokens, share in sizes.items())
    return (Fact("Prefixes", f"{units.show_share(w.prefix_hit_share)} of the prompt tokens were seen before", smaller, tag),)


def _observed(seen: TrafficSummary, tag: str) -> tuple[Fact, ...]:
    lasted, peak = units.show_s(seen.duration_s), units.show_rate(seen.peak_rate_per_s)
    made = [
        Fact("Seen", f"{count(seen.requests, 'request')} in {lasted}", f"{units.show_rate(seen.rate_per_s)} on average", tag),
        Fact("Busiest", f"{peak} in the busiest {units.show_s(seen.series_step_s)}", _times(seen), tag),
        Fact("Course", _sparkline(seen.series_per_s), f"{units.show_s(seen.series_step_s)} a step, from 0 to {peak}", tag),
    ]
    if seen.gap_scv is not None:
        made.append(Fact("Gaps", f"SCV {digits(seen.gap_scv)}", "1 for a Poisson process", tag))
    if seen.length_correlation is not None:
        made.append(Fact("Lengths", f"prompt and output ranks correlate by {seen.length_correlation:.2f}", "", tag))
    if seen.sessions is not None:
        each = f"{seen.requests / seen.sessions:.2f} requests each" if seen.sessions else ""
        made.append(Fact("Sessions", f"{seen.sessions:,}", each, tag))
    if seen.tenants:
        made.append(Fact("Tenants", ", ".join(f"{name} {units.show_share(share)}" for name, share in seen.tenants.items()), "", tag))
    return tuple(made)


def _times(seen: TrafficSummary) -> str:
    return f"{seen.peak_rate_per_s / seen.rate_per_s:.2f} times the mean" if seen.rate_per_s else ""


def _tables(seen: TrafficSummary) -> tuple[Table, ...]:
    return tuple(table for table in (_burstiness(seen), _lengths(seen)) if table is not None)


def _burstiness(seen: TrafficSummary) -> Table | None:
    rows = tuple(
        (Cell(f"{float(name.removesuffix('s')):,.3g} s"), Cell(digits(index)), Cell(span(seen.dispersion_intervals.get(name))))
        for name, index in seen.dispersion.items()
    )
    columns = (Column("window"), Column("variance / mean", right=True), Column("90 % interval", right=True))
    note = "Index of dispersion of the counts: 1 for a Poisson process at every window."
    return Table(title="Burstiness", columns=columns, rows=rows, note=note) if rows else None


def _lengths(seen: TrafficSummary) -> Table | None:
    rows = tuple(_row(name, s) for name, s in (("prompt", seen.prompt_tokens), ("output", seen.output_tokens)) if s is not None)
    heads = ("mean", "cv", "p50", "p90", "p99", "max")
    columns = (Column("tokens"), *(Column(head, right=True) for head in heads))
    return Table(title="Lengths", columns=columns, rows=rows) if rows else None


def _row(name: str, s: LengthSummary) -> tuple[Cell, ...]:
    most = NONE if s.max is None else f"{s.max:,}"
    return (Cell(name), Cell(digits(s.mean)), Cell(digits(s.cv), "", span(s.cv_bounds)), *(Cell(digits(p)) for p in (s.p50, s.p90, s.p99)),
            Cell(most))  # fmt: skip


def _sparkline(series: tuple[float | None, ...]) -> str:
    """Return the course of the rate as bars; a gap is a dot."""
    k = -(-len(series) // _BAR_COUNT)
    groups = [[r for r in series[i : i + k] if r is not None] for i in range(0, len(series), k)]
    means = [sum(g) / len(g) if g else None for g in groups]
    top = max((m for m in means if m is not None), default=0.0) or 1.0
    return "".join("·" if m is None else _BARS[round(m / top * (len(_BARS) - 1))] for m in means)
