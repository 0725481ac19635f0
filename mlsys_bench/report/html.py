"""One HTML file that needs nothing beside itself: styles inline, pictures as data, no script."""

from __future__ import annotations

from collections.abc import Sequence

from mlsys_bench import __version__
from mlsys_bench.record import Envelope, Record
from mlsys_bench.report import content, pictures
from mlsys_bench.report.parts import Section
from mlsys_bench.report.templates import environment

ORDER = (  # the answer first
    "demo", "verify", "production", "plan", "fleet-plan", "baseline", "sensitivity", "around", "gate", "gate-calibration", "verdict",
    "loadmax", "loadsweep", "loadtests", "loadtest", "requests", "bench", "profile", "workload",
)  # fmt: skip


def render(items: Sequence[tuple[str, Envelope, Record]]) -> str:
    """Return one self-contained page about these records; `items` are file name, envelope and record."""
    sections = ordered(items)
    drawn = pictures.draw(items)
    return environment(escape=True).get_template("report.html.j2").render(
        title=sections[0][1].title if sections else "Report",
        answer=answer(sections),
        tiled=_tiled(sections),
        sections=_numbered(sections),
        pictures=_placed((*pictures.graphs(items), *(drawn or ())), sections),
        missing=pictures.MISSING if drawn is None else "",
        machines=machines(items),
        items=items,
        version=__version__,
    )  # fmt: skip


def ordered(items: Sequence[tuple[str, Envelope, Record]]) -> list[tuple[str, Section]]:
    """Return every section with the file it is from, the answer first, one that stands in two files (a demo holds its plan) once."""
    found = [(name, section) for name, head, record in items for section in content.describe(record, content.beside(head, record))]
    once = {section: name for name, section in reversed(found)}
    kinds = {kind: i for i, kind in enumerate(ORDER)}
    return sorted(((name, section) for section, name in reversed(once.items())), key=lambda pair: kinds.get(pair[1].kind, len(ORDER)))


def answer(sections: Sequence[tuple[str, Section]]) -> Section | None:
    """Return the section whose figures go to the top of the page."""
    return next((section for _, section in sections if section.tiles), None)


def _tiled(sections: Sequence[tuple[str, Section]]) -> list[Section]:
    """Return the sections whose figures go to the top: those of a load test or a bench only where it is the answer itself."""
    first = answer(sections)
    return [section for _, section in sections if section.tiles and (section is first or section.kind not in ("loadtest", "bench"))]


def machines(items: Sequence[tuple[str, Envelope, Record]]) -> list[tuple[str, Envelope]]:
    """Return each machine once, with the files made on it."""
    files: dict[str, tuple[list[str], Envelope]] = {}
    for name, head, _ in items:
        files.setdefault(repr(head.machine), ([], head))[0].append(name)
    return [(", ".join(names), head) for names, head in files.values()]


def _numbered(sections: Sequence[tuple[str, Section]]) -> list[tuple[str, str, Section]]:
    return [(f"s{i}", name, section) for i, (name, section) in enumerate(sections, start=1)]


def _placed(drawn: Sequence[pictures.Picture], sections: Sequence[tuple[str, Section]]) -> dict[str, list[pictures.Picture]]:
    """Return the pictures by the section they stand in: the first of their kind, else the first of all."""
    anchors = {section.kind: f"s{i}" for i, (_, section) in reversed(list(enumerate(sections, start=1)))}
    placed: dict[str, list[pictures.Picture]] = {}
    for picture in drawn:
        placed.setdefault(anchors.get(picture.kind, "s1"), []).append(picture)
    return placed
