"""What a gate leaves for the CI system that runs it: files that were asked for, and GitHub's summary of the step."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlsys_bench import record as records
from mlsys_bench.errors import MlsysError, RecordError
from mlsys_bench.gate import writers
from mlsys_bench.verdicts import GateRun, Verdict

SUMMARY = "GITHUB_STEP_SUMMARY"  # GitHub's file for the summary of a step, appended to


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What to write, None for nothing.  `label` names this gate among several, in titles and in the comment's marker."""

    junit: Path | None = None
    comment: Path | None = None
    bmf: Path | None = None
    smaller: Path | None = None
    bigger: Path | None = None
    annotations: bool = False
    label: str = "mlsys gate"

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the files that will be written."""
        return tuple(path for path in (self.junit, self.comment, self.bmf, self.smaller, self.bigger) if path is not None)


def check(outputs: Outputs) -> None:
    """Raise RecordError for a file that cannot be written: before minutes of measuring, not after them."""
    for path in outputs.files:
        records.check_writable(path)


def write(found: Verdict | GateRun, outputs: Outputs, environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Write what was asked for, and return the lines to print: annotations, and what a person must know of the files."""
    name = outputs.label
    texts: tuple[tuple[Path | None, Callable[[], str]], ...] = (
        (outputs.junit, lambda: writers.junit(found, name)),
        (outputs.comment, lambda: writers.comment(found, name)),
        (outputs.bmf, lambda: writers.bmf(found)),
        (outputs.smaller, lambda: writers.smaller_is_better(found)),
        (outputs.bigger, lambda: writers.bigger_is_better(found)),
    )
    for path, text in texts:
        if path is not None:
            records.write_text(path, text())
    annotated = writers.annotated(found, name) if outputs.annotations else ()
    return (*annotated, *_kept_apart(found, outputs), *_summarise(writers.step_summary(found, name), environ))


def write_failure(error: MlsysError, outputs: Outputs, environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Write of a gate that ended without a verdict what CI systems show, and return the lines to print.

    Else the comment of an earlier run would stand, and say passed.
    """
    message, name = str(error), outputs.label
    if outputs.junit is not None:
        records.write_text(outputs.junit, writers.junit_failure(message, name))
    if outputs.comment is not None:
        records.write_text(outputs.comment, writers.comment_failure(message, name))
    annotated = (writers.command("error", f"{name}: failed", message),) if outputs.annotations else ()
    return (*annotated, *_summarise(writers.failure(message, name), environ))


def _summarise(text: str, environ: Mapping[str, str] | None) -> tuple[str, ...]:
    """Append to the summary of the step where GitHub has one, and say so."""
    path = (os.environ if environ is None else environ).get(SUMMARY)
    if not path:
        return ()
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write("\n" + text)  # after an empty line a heading is one, whatever stands before it
    except OSError as error:
        raise RecordError(f"{path}: the summary of the step cannot be written: {error.strerror or error}") from error
    return (f"wrote the summary of this step ({SUMMARY} is set)",)


def _kept_apart(found: Verdict | GateRun, outputs: Outputs) -> tuple[str, ...]:
    """Say which metrics a tracker's file leaves out because their better end is the other one."""
    verdict = found.verdict if isinstance(found, GateRun) else found
    better = [finding.better for finding in verdict.findings if finding.candidate is not None]
    lines = []
    for file, other, option, word in (
        (outputs.smaller, outputs.bigger, "--bigger-is-better", "higher"),
        (outputs.bigger, outputs.smaller, "--smaller-is-better", "lower"),
    ):
        if file is not None and other is None and word in better:
            lines.append(f"{file.name} leaves out {better.count(word)} metric(s) of which {word} is better; {option} FILE writes them")
    return tuple(lines)
