"""The page of claims, as `mlsys claims` recomputes them."""

from __future__ import annotations

from mlsys_bench.claims import Claim, Claims
from mlsys_bench.report.claims import TITLES

HEAD = """\
# Numbers people quote

`mlsys claims` recomputes what is said in talks, interviews and design documents with the functions that plans are made with: model shapes,
queueing theory, rooflines, dated prices. A claim *holds*, is *wrong*, or holds *only if* something is added that people leave out.
`mlsys claims KEY …` shows some of them, `--json` the record with value, range, formula and provenance of each.

This page is made by `MLSYS_UPDATE_GOLDEN=1 python -m pytest tests/test_claims.py`; a test compares it with what is recomputed.
"""
TAIL = """\
## What is not here

Claims that only a measurement can settle stay out until the stages behind them are measured: recall of HNSW and product quantization at a
given setting, a raw sum of cosine and BM25 against a normalised one, false hits of a semantic cache, the quality lost to INT8 and INT4.
"""


def page(record: Claims) -> str:
    """Return the page in Markdown."""
    parts = [HEAD]
    for topic, title in TITLES.items():
        rows = [_row(claim) for claim in record.claims if claim.topic == topic]
        parts.append(f"## {title}\n\n| what people say | recomputed | verdict | formula |\n|---|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join([*parts, TAIL])


def _row(claim: Claim) -> str:
    verdict = f"**{claim.verdict}** {claim.because}" if claim.verdict == "holds only if" else f"**{claim.verdict}**: {claim.because}"
    return f"| {claim.claim} (`{claim.key}`) | {claim.recomputed} | {verdict} | {claim.formula} *[{claim.provenance}]* |"
