"""Claims in words: what is quoted, what it is, and whether it holds."""

from __future__ import annotations

from collections import Counter

from mlsys_bench.claims import Claim, Claims, Finding
from mlsys_bench.report.parts import Cell, Column, Section, Table, Tone
from mlsys_bench.units import count

TITLES = {
    "memory": "Memory: what fits where",
    "queueing": "Waiting: workers, shards, batches",
    "speed": "Speed: tokens, FLOPs, bytes",
    "money": "Money: APIs, fleets, caches, routing",
    "statistics": "Samples and averages",
}
TONES: dict[Finding, Tone] = {"holds": "good", "holds only if": "unsure", "wrong": "bad"}
COLUMNS = (
    Column("what people say", flexible=True),
    Column("quoted", wide=True),
    Column("verdict"),
    Column("recomputed, and why", flexible=True),
)


def claims(record: Claims) -> Section:
    """Return the claims by topic, and the formula behind each."""
    found = Counter(claim.verdict for claim in record.claims)
    tally = ", ".join(f"{found[verdict]} {words}" for verdict, words in _WORDS if found[verdict])
    return Section(
        kind="claims",
        title="Numbers people quote",
        lead=f"{count(len(record.claims), 'claim')} recomputed: {tally}.",
        tables=tuple(
            Table(title=title, columns=COLUMNS, rows=rows)
            for topic, title in TITLES.items()
            if (rows := tuple(_row(claim) for claim in record.claims if claim.topic == topic))
        ),
        notes=(("Formulas", tuple(f"{claim.key} [{claim.provenance}]: {claim.formula}" for claim in record.claims)),),
    )


_WORDS: tuple[tuple[Finding, str], ...] = (("holds", "hold"), ("holds only if", "hold only under a condition"), ("wrong", "wrong"))


def _row(claim: Claim) -> tuple[Cell, ...]:
    why = f"only if {claim.because}" if claim.verdict == "holds only if" else claim.because
    verdict = "only if …" if claim.verdict == "holds only if" else claim.verdict
    return (
        Cell(claim.claim, "strong", claim.key),
        Cell(claim.quoted),
        Cell(verdict, TONES[claim.verdict], claim.provenance.value),
        Cell(claim.recomputed, "", why),
    )
