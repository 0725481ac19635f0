"""Options and output for CI systems, shared by `gate run` and `gate compare`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlsys_bench.errors import MlsysError

if TYPE_CHECKING:
    from mlsys_bench.journeys.gating.outputs import Outputs
    from mlsys_bench.verdicts import GateRun, Verdict

Junit = Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML, a test case per metric.", dir_okay=False)]
Comment = Annotated[Path | None, typer.Option("--comment", help="Write Markdown for a pull request's comment.", dir_okay=False)]
Bmf = Annotated[Path | None, typer.Option("--bmf", help="Write Bencher Metric Format JSON.", dir_okay=False)]
Smaller = Annotated[Path | None, typer.Option("--smaller-is-better", help="Write customSmallerIsBetter JSON.", dir_okay=False)]
Bigger = Annotated[Path | None, typer.Option("--bigger-is-better", help="Write customBiggerIsBetter JSON.", dir_okay=False)]
Annotations = Annotated[bool, typer.Option("--annotations", help="Print GitHub annotations, to stderr.")]
Label = Annotated[str, typer.Option("--label", help="Name of this gate in titles and in the comment's marker.")]
LABEL = "mlsys gate"


def outputs(
    junit: Path | None, comment: Path | None, bmf: Path | None, smaller: Path | None, bigger: Path | None, annotations: bool, label: str
) -> Outputs:
    """Return what to write once there is a verdict.  Raises for a file that cannot be written."""
    from mlsys_bench.journeys.gating import outputs as writing

    asked = writing.Outputs(
        junit=junit, comment=comment, bmf=bmf, smaller=smaller, bigger=bigger, annotations=annotations, label=label
    )  # fmt: skip
    writing.check(asked)
    return asked


@contextlib.contextmanager
def failing(asked: Outputs) -> Iterator[None]:
    """Write the files of a gate that ends without a verdict, too."""
    from mlsys_bench.journeys.gating import outputs as writing

    try:
        yield
    except MlsysError as error:
        for line in writing.write_failure(error, asked):
            print(line, file=sys.stderr)
        raise


def write(record: Verdict | GateRun, asked: Outputs) -> None:
    """Write the files, and print what goes with them to stderr: GitHub reads annotations there too, and --json stays JSON."""
    from mlsys_bench.journeys.gating import outputs as writing

    for line in writing.write(record, asked):
        print(line, file=sys.stderr)
