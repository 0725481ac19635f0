"""loadtest --calibrate: measure this machine's load client, and keep the result where later runs find it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mlsys_bench import hardware, record, units
from mlsys_bench.calibrations import Calibration
from mlsys_bench.errors import BadInput, RecordError
from mlsys_bench.journeys.progress import Line
from mlsys_bench.loadtest import calibrate, crew, trust


def run(
    *,
    budget: str,
    arrivals: str | None = None,
    processes: str = "1",
    busy_poll: bool = False,
    seed: int = 0,
    out: Path | None = None,
    quiet: bool = False,
) -> Calibration:
    """Calibrate within a budget of time; write the record to the user's cache and, when asked, to a file of its own."""
    if out is not None:
        record.check_writable(out)
    line = Line(quiet)
    try:
        found = calibrate.run(
            units.seconds(budget, "--budget"),
            arrivals=arrivals or "poisson",
            processes=_count(processes),
            busy_poll=busy_poll,
            seed=seed,
            say=line.show,
        )
    finally:
        line.clear()
    machine = hardware.machine()
    try:
        record.write(trust.cached(busy_poll=busy_poll), found, machine)
    except RecordError as error:
        found = dataclasses.replace(found, notes=(*found.notes, f"later runs will not know of it: {error}"))
    if out is not None:
        record.write(out, found, machine)
    return found


def _count(processes: str) -> int:
    """Return how many load processes: auto leaves one core to the truth server."""
    try:
        return crew.how_many("auto" if processes == "auto" else int(processes), "127.0.0.1", None)
    except ValueError:
        raise BadInput(f"--processes {processes}: give a number of worker processes, or auto for one per core") from None


def exit_status(found: Calibration) -> int:
    """Return 3 when no rate was found at which the client can be trusted, else 0."""
    return 0 if found.clients[-1].trusted_rate_per_s is not None else 3
