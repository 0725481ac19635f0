"""What a simulation knows beyond what users saw: how the fleet was used, tenants, and what happened over time."""

from __future__ import annotations

from mlsys_bench.report.parts import NONE, Cell, Column, Fact, Table, digits, percent, time, time_cell
from mlsys_bench.types import FleetUse, LatencySummary, LoadTest
from mlsys_bench.units import count

ROWS = 12  # of the table over time


def facts(use: FleetUse) -> tuple[Fact, ...]:
    """Return the fleet in a few lines; what did not happen is not mentioned."""
    found = [
        Fact(
            "Fleet",
            _size(use),
            f"{_paid(use.replica_s)}, computing {percent(100 * use.utilisation)} of them",
            "simulated",
        ),
        Fact(
            "Load of one",
            f"{digits(use.batch_mean)} sequences in a step, {digits(use.waiting_mean)} waiting",
            f"on average; at most {use.waiting_peak:,} waiting",
            "simulated",
        ),
        Fact("KV memory", f"{percent(100 * use.kv_mean)} used", f"at most {percent(100 * use.kv_peak)}", "simulated"),
    ]
    if use.prefix_hit_share is not None:
        found.append(Fact("Prefix cache", f"{percent(100 * use.prefix_hit_share)} of prompt tokens found", "", "simulated"))
    happened = _happened(use)
    if happened:
        found.append(Fact("Events", ", ".join(happened), "in all runs" if use.runs > 1 else "", "simulated"))
    return tuple(found)


def _paid(replica_s: float) -> str:
    """Return replica-hours, or seconds where it is few."""
    return f"{digits(replica_s / 3600)} replica-hours" if replica_s >= 3600 else f"{digits(replica_s)} replica-seconds"


def _size(use: FleetUse) -> str:
    size = count(use.replicas, "replica")
    return size if use.most_replicas <= use.replicas else f"{size} at the start, {use.most_replicas} at most"


def _happened(use: FleetUse) -> list[str]:
    counts = (
        (use.preemptions, "preemption"), (use.retries, "retried attempt"), (use.failures, "replica failure"),
        (use.launched, "replica launched"), (use.released, "replica released"),
    )  # fmt: skip
    return [f"{n:,} {what if n == 1 else _many(what)}" for n, what in counts if n]


def _many(what: str) -> str:
    first, _, rest = what.partition(" ")
    return f"{first}s {rest}" if rest in ("launched", "released") else f"{what}s"


def tables(record: LoadTest) -> tuple[Table, ...]:
    """Return tenants side by side, and the fleet over time where its size changed."""
    found = [_tenants(record)] if record.tenants else []
    if record.fleet and len(set(record.fleet.series.get("replicas", ()))) > 1:
        found.append(over_time(record.fleet))
    return tuple(found)


def _tenants(record: LoadTest) -> Table:
    rows = tuple(
        (
            Cell(t.name, "strong"),
            Cell(f"{t.ok:,} of {t.requests:,}"),
            Cell(NONE if t.goodput_ratio is None else percent(100 * t.goodput_ratio)),
            *(_stat(s, p) for s, p in ((t.ttft_s, "p50"), (t.ttft_s, "p95"), (t.tpot_s, "p95"), (t.e2e_s, "p95"))),
        )
        for t in record.tenants
    )
    titles = ("answered", "within limits", "TTFT p50", "TTFT p95", "TPOT p95", "E2E p95")
    columns = (Column("tenant"), *(Column(title, right=True) for title in titles))
    return Table(title="Tenants", columns=columns, rows=rows, note="below each figure its 90 % interval")


def _stat(summary: LatencySummary, stat: str) -> Cell:
    value = getattr(summary, stat)
    return Cell("too few", "muted") if value is None else time_cell(value, summary.intervals.get(stat))


def over_time(use: FleetUse) -> Table:
    """Return the fleet at a dozen moments of the first run."""
    n = len(use.series["replicas"])
    moments = sorted({round((i + 1) * n / ROWS) - 1 for i in range(ROWS)})
    rows = tuple(
        (
            Cell(time((i + 1) * use.series_step_s)),
            Cell(f"{use.series['replicas'][i]:.0f}"),
            Cell(f"{use.series['running'][i]:,.0f}"),
            Cell(f"{use.series['waiting'][i]:,.0f}"),
            Cell(percent(100 * use.series["kv"][i])),
        )
        for i in moments
    )
    columns = (Column("at", right=True), *(Column(title, right=True) for title in ("replicas ready", "running", "waiting", "KV used")))
    return Table(title="Over time", columns=columns, rows=rows, note="of the first run" if use.runs > 1 else "")
