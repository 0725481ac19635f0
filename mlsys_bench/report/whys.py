"""What errors of a prediction are made of, in words: this run's arrivals, its steps' own time, the rest."""

from __future__ import annotations

from mlsys_bench.checked import Causes
from mlsys_bench.report import latencies
from mlsys_bench.report.parts import Cell, Column, Table, percent

SHARED = 0.05  # by so much more must decodes have slowed than prompts before memory is named
KINDS = {"decode": "decodes, which mostly read memory,", "prompt": "steps with a prompt, which mostly compute,"}


def table(record: Causes | None) -> tuple[Table, ...]:
    """Return each figure's error in its parts, no table where steps could not be seen."""
    if record is None or not record.figures:
        return ()
    rows = tuple(
        (
            Cell(latencies.name(each.key), "strong"),
            *(Cell(percent(part, signed=True)) for part in (each.error_percent, each.arrivals_percent, each.steps_percent)),
            Cell(percent(each.rest_percent, signed=True), "strong"),
        )
        for each in record.figures
    )
    columns = ("figure", "error", "these arrivals", "slower or faster steps", "all else")
    return (
        Table(
            title="Where the errors come from",
            columns=tuple(Column(name, right=i > 0) for i, name in enumerate(columns)),
            rows=rows,
            note="the same requests simulated with the profile, and with the load test's own steps; all else is simulator, HTTP and client",
        ),
    )


def most(record: Causes | None) -> str:
    """Return in a sentence how far off simulator, HTTP and client are at most."""
    if record is None or not record.figures:
        return ""
    worst = max(record.figures, key=lambda each: abs(each.rest_percent))
    return f" Simulator, HTTP and client account for {percent(abs(worst.rest_percent))} at most ({latencies.name(worst.key)})."


def machine(record: Causes | None) -> tuple[str, ...]:
    """Return in words how much longer the steps took than the profile says, and which of them."""
    if record is None:
        return ()
    told = [f"{KINDS[kind]} {_longer(share)}" for kind, share in record.steps_longer.items() if kind in KINDS]
    said = f"the load test's own steps took {_longer(record.steps_longer['all'])} than the profile says of them"
    return (f"{said}: {', '.join(told)}" if told else said, *_memory(record))


def _longer(share: float) -> str:
    return f"{percent(100 * abs(share))} {'longer' if share >= 0 else 'less'}"


def _memory(record: Causes) -> tuple[str, ...]:
    """Name memory where what reads it has slowed and what computes has not."""
    more = record.steps_longer.get("decode", 0.0) - record.steps_longer.get("prompt", 0.0)
    if "prompt" not in record.steps_longer or more < SHARED:
        return ()
    return ("memory was slower than when it was calibrated, computing was not: on a shared host others read memory too",)
