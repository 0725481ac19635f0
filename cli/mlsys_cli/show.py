"""Show a record: to a person, as JSON, and as files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlsys_bench.errors import BadInput, NotBuilt

if TYPE_CHECKING:
    import typer

    from mlsys_bench.record import Record


def show(
    value: Record,
    as_json: bool = False,
    out: Path | None = None,
    html: Path | None = None,
    md: Path | None = None,
    inputs: Sequence[Path] = (),
    extra: object = None,
) -> None:
    """Print the record as text or, with --json, as JSON alone, and write the files asked for: what a full disk refuses was told."""
    if not as_json:
        from mlsys_bench.report import terminal

        terminal.show(value, extra=extra)
    if as_json or out or html or md:
        _write(value, as_json, out, html, md, inputs)


def _write(value: Record, as_json: bool, out: Path | None, html: Path | None, md: Path | None, inputs: Sequence[Path]) -> None:
    """Write what says which machine it comes from."""
    from mlsys_bench import hardware, record, report

    machine = hardware.machine()
    if as_json:
        print(record.dumps(value, machine, inputs))
    if out is not None:
        record.write(out, value, machine, inputs)
    if html is not None or md is not None:
        items = [(out.name if out else record.kind_of(value), record.envelope(value, machine, inputs), value)]
        report.write_html(html, items) if html else None
        report.write_markdown(md, items) if md else None


def writable(*paths: Path | None) -> None:
    """Raise for a file that cannot be written: before minutes of measuring, not after them."""
    for path in filter(None, paths):
        from mlsys_bench import record

        record.check_writable(path)


def refuse(given: dict[str, object]) -> None:
    """Raise for an option that CONTRACT promises and that is not built yet: silently dropping it would plan something else."""
    for option, value in given.items():
        if value:
            raise NotBuilt(f"{option} is not built yet; docs/roadmap.md says when")


def together(needed: str, given: Mapping[str, object]) -> None:
    """Raise for an option that means nothing without another one."""
    for option, value in given.items():
        if value:
            raise BadInput(f"{option} belongs to {needed}; give both")


def leave_out(other: str, given: Mapping[str, object]) -> None:
    """Raise for an option that does nothing beside another one."""
    for option, value in given.items():
        if value:
            raise BadInput(f"{option} does nothing beside {other}; leave it out")


def alone(option: str, ctx: typer.Context, beside: Collection[str]) -> None:
    """Raise for whatever else was given beside an option that needs none of it."""
    for param in ctx.command.params:
        if param.name not in beside and ctx.params.get(param.name or "") not in (param.default, None, ()):
            raise BadInput(f"{param.opts[0]} does nothing beside {option}; leave it out")
