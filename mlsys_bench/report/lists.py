"""Plain lists for `list` commands."""

from __future__ import annotations

from collections.abc import Iterator

from mlsys_bench.readings import CATALOGUE, GROUPS

_NAME = max(len(entry.name) for entry in CATALOGUE) + 2


def benchmarks() -> str:
    """Return every benchmark in a line, by group: its name, its unit, what it is, and what a machine must have for it."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    for at, (group, title) in enumerate(GROUPS.items()):
        mine = [entry for entry in CATALOGUE if entry.group == group]
        if mine:
            yield from ("",) * bool(at)
            yield title
        for entry in mine:
            needs = f" (needs {entry.needs})" if entry.needs else ""
            yield f"  {entry.name:{_NAME}}{entry.unit:10}{entry.line}{needs}"
