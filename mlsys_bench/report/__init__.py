"""Any record -> what a person reads: a terminal, one self-contained HTML file, Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlsys_bench.record import Envelope, Record

    Item = tuple[str, Envelope, Record]


def write_html(path: Path, items: Sequence[Item]) -> Path:
    """Write one HTML file with everything in it, and return its path.  `items` are file name, envelope and record."""
    from mlsys_bench.report.html import render

    return _write(path, render(items))


def write_markdown(path: Path, items: Sequence[Item]) -> Path:
    """Write the same in Markdown, short, for a pull request or a wiki, and return its path."""
    from mlsys_bench.report.markdown import render

    return _write(path, render(items))


def write_png(path: Path, items: Sequence[Item]) -> Path:
    """Write the first load test, its repeats, gate or bench as one picture for a slide.  Raises BadInput where there is none."""
    from mlsys_bench.errors import BadInput
    from mlsys_bench.loadtests import LoadTests
    from mlsys_bench.types import Bench, LoadTest
    from mlsys_bench.verdicts import GateCalibration, GateRun, Verdict

    drawn = LoadTest | LoadTests | GateRun | GateCalibration | Verdict | Bench
    head, found = next(((head, record) for _, head, record in items if isinstance(record, drawn)), (None, None))
    if found is None:
        raise BadInput(f"{path}: a picture is drawn of a load test, a gate or benchmarks; none of the files holds any")
    check_pictures(path)
    if isinstance(found, Bench):
        from mlsys_bench.report import bench_pictures

        return bench_pictures.write_png(path, found, head.machine if head else None)
    if isinstance(found, LoadTest | LoadTests):
        from mlsys_bench.report import load_pictures

        return load_pictures.write_png(path, found)
    from mlsys_bench.report import gate_slides

    return gate_slides.write_png(path, found)


def check_pictures(path: Path) -> None:
    """Raise BadInput where no picture can be drawn."""
    import importlib.util

    from mlsys_bench.errors import BadInput

    if importlib.util.find_spec("matplotlib") is None:
        raise BadInput(f"{path}: pictures need matplotlib: python -m pip install 'mlsys-bench[plot]'")


def write_csv(path: Path, items: Sequence[Item]) -> Path:
    """Write the first file of requests or benchmarks as CSV, one row each, and return its path.  Raises BadInput where there is none."""
    from mlsys_bench.errors import BadInput
    from mlsys_bench.types import Bench, Requests

    found = next(((head, record) for _, head, record in items if isinstance(record, Requests | Bench)), None)
    if found is None:
        raise BadInput(f"{path}: a table is made of requests (.parquet) or of benchmarks; none of the files holds any")
    head, record = found
    if isinstance(record, Bench):
        from mlsys_bench import readings

        return readings.write_csv(path, readings.table(record, head.machine))
    from mlsys_bench.report.rows import write_csv as write

    return write(path, record)


def _write(path: Path, text: str) -> Path:
    from mlsys_bench.errors import BadInput

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def load(paths: Sequence[Path]) -> list[Item]:
    """Return the records of some files, named as their files are."""
    from mlsys_bench import record

    return [(path.name, *record.load(path)) for path in paths]


def print_all(items: Sequence[Item]) -> None:
    """Print records on the terminal, one after the other."""
    from mlsys_bench.report import content, terminal

    for _, head, record in items:
        terminal.show(record, extra=content.beside(head, record))
