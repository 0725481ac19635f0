"""Options of `gate run` for commands and servers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Command = Annotated[str | None, typer.Option(help="Run this in both refs: one run is one launch.  No shell: sh -c '…' for one.")]
BaseCommand = Annotated[str | None, typer.Option(help="Command of the baseline, in place of a ref.")]
CandCommand = Annotated[str | None, typer.Option(help="Command of the candidate.")]
Read = Annotated[
    str | None,
    typer.Option(help="Format of the file that the command writes to {out}: auto, pytest-benchmark, pyperf, hyperfine, …"),
]
RunTimeout = Annotated[str, typer.Option(help="Longest that one run of a command may take.")]
WarmRuns = Annotated[
    int, typer.Option(help="Untimed runs of a command before its first, or turns of load of a server before those of a launch.", min=0)
]
Instructions = Annotated[bool, typer.Option("--instructions/--no-instructions", help="Count instructions where perf may: four more runs.")]
BaseServe = Annotated[str | None, typer.Option(help="Command that serves the baseline on {port}, started afresh for each launch.")]
CandServe = Annotated[str | None, typer.Option(help="Command that serves the candidate.")]
BaseRestart = Annotated[str | None, typer.Option(help="Command that starts what is behind the baseline's URL afresh, and ends.")]
CandRestart = Annotated[str | None, typer.Option(help="The same of the candidate.")]
Alternate = Annotated[bool, typer.Option("--alternate", help="Never both servers at once, as where they cannot share a GPU.")]
Idle = Annotated[str, typer.Option(help="stop or run: what a server does while the other is under load.")]
Ready = Annotated[str, typer.Option(help="Longest wait for a server to be ready.")]
Users = Annotated[int | None, typer.Option(help="Closed loop: users who wait for each answer.", min=1)]
DurationEach = Annotated[str, typer.Option(help="How long one turn of load lasts.")]
Turns = Annotated[int, typer.Option(help="Turns of load of a launch.", min=1)]
ServedModel = Annotated[str | None, typer.Option("--model", help="Model to ask for; the first of /v1/models when left out.")]
Header = Annotated[list[str] | None, typer.Option(help="'Name: value' of every request (repeatable); never stored.")]
ApiKeyEnv = Annotated[str | None, typer.Option(help="Variable that holds the API key.")]
Endpoint = Annotated[str, typer.Option(help="auto, or a kind of API as `mlsys loadtest` knows them.")]

# ---------------------------------------------------------------- what may fail

Worker = Annotated[
    str | None,
    typer.Option(help="The project's own bench worker, run in each side's folder, the benchmark's name behind.", metavar="COMMAND"),
]
PolicyFile = Annotated[Path | None, typer.Option("--policy", help="A YAML file whose `gate:` section says what may fail.", dir_okay=False)]
Tolerance = Annotated[str | None, typer.Option(help="How much worse is still accepted.  [default: 5%]")]
Metric = Annotated[
    list[str] | None,
    typer.Option(help="A metric's own tolerance, NAME=3%, or NAME=report: it never fails the build; NAME may end in *.  Repeatable."),
]
Tails = Annotated[str | None, typer.Option(help="Whether a p99 may fail the build: report or fail.  [default: report]")]
CounterTolerance = Annotated[str | None, typer.Option(help="How much more a counter may count.  [default: 1%]")]
Calibration = Annotated[
    Path | None,
    typer.Option(help="What `mlsys gate calibrate -o` wrote here: a tolerance this runner cannot decide is refused.", dir_okay=False),
]
