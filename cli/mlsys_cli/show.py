"""Show a record: to a person, as JSON, and as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlsys_bench import hardware, record
from mlsys_bench.errors import NotBuilt


def show(
    value: record.Record,
    as_json: bool = False,
    out: Path | None = None,
    html: Path | None = None,
    md: Path | None = None,
    inputs: Sequence[Path] = (),
    extra: object = None,
) -> None:
    """Write the files asked for, then print the record as text or, with --json, as JSON alone."""
    machine = hardware.machine()
    if out is not None:
        record.write(out, value, machine, inputs)
    if html is not None or md is not None:
        from mlsys_bench import report

        items = [(out.name if out else record.kind_of(value), record.envelope(value, machine, inputs), value)]
        report.write_html(html, items) if html else None
        report.write_markdown(md, items) if md else None
    if as_json:
        print(record.dumps(value, machine, inputs))
        return
    from mlsys_bench.report import terminal

    terminal.show(value, extra=extra)


def refuse(given: dict[str, object]) -> None:
    """Raise for an option that CONTRACT promises and that is not built yet: silently dropping it would plan something else."""
    for option, value in given.items():
        if value:
            raise NotBuilt(f"{option} is not built yet; docs/roadmap.md says when")
