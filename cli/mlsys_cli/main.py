"""`mlsys`: parse, call one function, show.  Every command is one of the files beside this one."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import traceback
from typing import Annotated

import typer

from mlsys_bench import __version__
from mlsys_bench.errors import INTERRUPTED, MlsysError
from mlsys_cli import backtest, claims, cost, gate, loadtest, look, measure, model, traffic
from mlsys_cli.lean import Door, Group

BUG = 70  # sysexits.h: an internal software error

# typer carries a click of its own, older ones use click itself: this is the base of all usage errors in both
USAGE_ERROR: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = Door(
    name="mlsys",
    cls=Group,
    help="How many replicas of what, on which GPUs, at what cost, will serve this traffic within these limits?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def version(value: bool) -> None:
    """Print the version and stop."""
    if value:
        print(f"mlsys {__version__}")
        raise typer.Exit


@app.callback()
def door(_: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False) -> None:
    """Measure, model, plan, verify and guard ML serving systems."""


for room in (look, measure, loadtest, traffic, model, gate, backtest, claims, cost):
    room.register(app)


def run() -> None:
    """Run the command line and end with its exit status (docs/commands.md lists them)."""
    atexit.register(gc.freeze)  # what is left at the end need not be searched for cycles: a tenth of a short command's processor time
    gc.set_threshold(50_000)  # modules and records stay: looking through them every 700 objects costs 3 % of a plan
    try:
        status = app(prog_name="mlsys", standalone_mode=False)
        if status == INTERRUPTED:
            complain("interrupted", INTERRUPTED)
        sys.stdout.flush()  # here, where a reader who left or a full disk can still be told
    except MlsysError as error:
        status = complain(str(error), error.exit_status)
    except USAGE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a bare `mlsys` asks what there is
            print(error.format_message())  # type: ignore[attr-defined]
            sys.exit(2)
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context is not None else ""
        status = complain(f"{error.format_message()}{hint}", 2)  # type: ignore[attr-defined]
    except (typer.Abort, KeyboardInterrupt):
        status = complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        status = forget_output(0)  # the reader of our pipe left; that is its right
    except OSError as error:
        status = forget_output(complain(f"{error.filename or 'standard output'}: {error.strerror or error}", 2))
    except Exception:
        traceback.print_exc()  # a bug of ours: Python's own status 1 would read as "the answer is no"
        status = complain("this is a bug in mlsys; please report it with the lines above", BUG)
    sys.exit(status if isinstance(status, int) else 0)


def complain(message: str, status: int) -> int:
    """Print one line to stderr and give the status back."""
    print(f"mlsys: {' '.join(message.split())}", file=sys.stderr)
    return status


def forget_output(status: int) -> int:
    """Drop what is still to be printed, so that the interpreter does not stumble over it at its end, and give the status back."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status
