"""What errors of a prediction are made of, in words: this run's arrivals, its steps' own time, the rest."""

from __future__ import annotations

from collections.abc import Iterator

from mlsys_bench.checked import Causes
from mlsys_bench.report import latencies
from mlsys_bench.report.parts import Cell, Column, Table, percent

SLOWED, NOT_SLOWED = 0.05, 0.02  # decodes by more than the one, prompts by less than the other: memory is named
NOTABLE = 0.01  # of the time in which others had the core
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
    return (f"{said}: {', '.join(told)}" if told else said, *_others(record))


def _longer(share: float) -> str:
    return f"{percent(100 * abs(share))} {'longer' if share >= 0 else 'less'}"


def _others(record: Causes) -> Iterator[str]:
    """Yield who else may have been there: on the core, and at the memory, where what reads it has slowed and what computes has not."""
    if record.others_share > NOTABLE:
        yield f"others had the engine's core for {percent(100 * record.others_share)} of its steps' time"
    if record.steps_longer.get("decode", 0.0) > SLOWED and record.steps_longer.get("prompt", SLOWED) < NOT_SLOWED:
        yield "memory was slower than when it was calibrated, computing was not: on a shared host others may read memory too"
