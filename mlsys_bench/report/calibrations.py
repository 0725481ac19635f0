"""A calibration of the load client in words: how fast it may go and be believed, and who was the narrow point."""

from __future__ import annotations

from mlsys_bench import units
from mlsys_bench.calibrations import Calibration, Client, Held, Step
from mlsys_bench.loadtests import Spread
from mlsys_bench.report.parts import Cell, Column, Fact, Section, Table, digits, percent, time, time_span

COLUMNS = (
    Column("offered", right=True),
    Column("runs", right=True),
    Column("p50 off", right=True),
    Column("p99 off", right=True),
    Column("late p50", right=True, wide=True),
    Column("late p99", right=True),
    Column("achieved", right=True, wide=True),
    Column("CPU client / server", right=True, wide=True),
    Column("verdict", flexible=True),
)
_LIMITED = {
    "client": "the client was the limit",
    "server": "the truth server was the limit: the client may be good for more",
    "budget": "a longer --budget may find more",
}


def calibration(record: Calibration) -> Section:
    """Return what the client can be trusted at, every rate that was tried, and how to read it."""
    return Section(
        kind="calibration",
        title="Calibration of the load client",
        lead=_lead(record),
        tag="measured",
        tone="good" if all(c.trusted_rate_per_s is not None for c in record.clients) else "bad",
        facts=tuple(fact for client in record.clients for fact in _facts(client, record)),
        tables=tuple(_steps(client) for client in record.clients),
        notes=(
            (
                "How to read it",
                (
                    f"streams of {record.tokens} tokens, the first after {time(record.ttft_s)}, the others every {time(record.itl_s)}, "
                    f"{record.arrivals} arrivals; longer or faster answers load the client more",
                    "trusted: in every run TTFT p50 and p99 within 5 % of what the server really sent, own lateness p99 within 1.5 ms, the "
                    "rate at the server's door within 0.5 % of the schedule's",
                    "bias: median over requests of TTFT as reported (from the schedule) minus TTFT as sent",
                    f"intervals: 90 %, Student's, over {record.repeats} runs or more; it took {time(record.took_s)}",
                ),
            ),
            *((("Notes", record.notes),) if record.notes else ()),
        ),
    )


def _processes(client: Client) -> str:
    return f"{client.processes} process{'es' * (client.processes > 1)}"


def _lead(record: Calibration) -> str:
    best = record.clients[-1]
    if best.trusted_rate_per_s is None:
        why = "; ".join(next((step.missed for step in best.steps if step.missed), ("nothing was tried",)))
        return f"This machine's client cannot be trusted at any rate that was tried, down to {_lowest(best)}: {why}."
    return (
        f"This machine's load client can be trusted up to {units.show_rate(best.trusted_rate_per_s)} "
        f"({_processes(best)}{_few(best, record.repeats)}); {_LIMITED[best.limited_by]}."
    )


def _few(client: Client, wanted: int) -> str:
    """Say that the rate was held fewer times than it should have been."""
    runs = next((len(step.runs) for step in client.steps if step.rate_per_s == client.trusted_rate_per_s), wanted)
    return f", in {runs} of the {wanted} runs it takes: give it a longer --budget" if runs < wanted else ""


def _lowest(client: Client) -> str:
    return units.show_rate(min((s.rate_per_s for s in client.steps), default=0.0))


def _facts(client: Client, record: Calibration) -> list[Fact]:
    who = _processes(client)
    at = units.show_rate(client.trusted_rate_per_s) if client.trusted_rate_per_s is not None else "no rate"
    facts = [Fact(f"Trusted, {who}", at, _LIMITED[client.limited_by], "measured", "good" if client.trusted_rate_per_s else "bad")]
    for label, figure in (("TTFT bias", client.ttft_bias_s), ("Late p50", client.lateness_p50_s), ("Late p99", client.lateness_p99_s)):
        if figure is not None and figure.mean is not None:
            facts.append(Fact(label, time(figure.mean), time_span(figure.interval, figure.mean), "measured"))
    limit = "; limited by the server" if client.ceiling_limited_by == "server" else ""
    for label, figure, what in (
        ("Closed loop", client.requests_per_s, "whole answers"),
        ("Zero delay", client.streams_per_s, f"streams of {record.tokens}"),
    ):
        if figure is not None and figure.mean is not None:
            facts.append(Fact(label, f"{digits(figure.mean)} {what}/s", f"{_rates(figure)}{limit}", "measured"))
    return facts


def _rates(figure: Spread) -> str:
    return "" if figure.interval is None else "–".join(digits(max(end, 0.0)) for end in figure.interval)


def _steps(client: Client) -> Table:
    who = _processes(client)
    return Table(
        title=f"Rates tried, {who}: TTFT off the truth, own lateness; the worst of the runs",
        columns=COLUMNS,
        rows=tuple(map(_row, client.steps)),
    )


def _row(step: Step) -> tuple[Cell, ...]:
    def worst(values: list[float]) -> float:
        return max(values, key=abs)

    def shares(name: str) -> str:
        return percent(100 * worst([getattr(run, name) for run in step.runs]), signed=True)

    away = worst([run.achieved - 1 for run in step.runs])
    return (
        Cell(units.show_rate(step.rate_per_s), "strong"),
        Cell(str(len(step.runs))),
        Cell(shares("ttft_p50_error")),
        Cell(shares("ttft_p99_error")),
        Cell(time(max(run.lateness_p50_s for run in step.runs))),
        Cell(time(max(run.lateness_p99_s for run in step.runs))),
        Cell(f"{100 * (1 + away):.1f} %"),
        Cell(_cpu(step.runs)),
        Cell(f"{'; '.join(step.missed)} ({step.limit})", "bad") if step.missed else Cell("held", "good"),
    )


def _cpu(runs: tuple[Held, ...]) -> str:
    client = max((run.client_cpu_share for run in runs if run.client_cpu_share is not None), default=None)
    server = max(run.server_cpu_share for run in runs)
    return f"{'—' if client is None else f'{100 * client:.0f}'} / {100 * server:.0f} %"
