"""The same in Markdown, short: the answer, the tables a manager reads, and where the numbers come from."""

from __future__ import annotations

from collections.abc import Sequence

from mlsys_bench import __version__
from mlsys_bench.record import Envelope, Record
from mlsys_bench.report import html
from mlsys_bench.report.templates import environment


def render(items: Sequence[tuple[str, Envelope, Record]]) -> str:
    """Return these records as Markdown for a pull request or a wiki."""
    sections = html.ordered(items)
    return environment(escape=False).get_template("report.md.j2").render(
        sections=[section for _, section in sections], machines=html.machines(items), items=items, version=__version__
    )  # fmt: skip
