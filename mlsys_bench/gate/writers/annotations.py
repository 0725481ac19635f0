"""GitHub's workflow commands: at most ten annotations a step, one for each group of findings.

Escapes as actions/toolkit's command.ts: `%`, CR and LF in messages, `:` and `,` in properties too.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlsys_bench.gate.writers import parts
from mlsys_bench.gate.writers.parts import Outcome, Record
from mlsys_bench.verdicts import Finding

MOST = 10  # of a level and step; GitHub drops the rest without a word
_SHOWN, _LONGEST = 20, 500  # lines of one annotation, and characters of each
_LEVELS: dict[Outcome, str] = {
    "regression": "error", "not_comparable": "error", "suspect": "warning", "inconclusive": "warning", "reported": "warning",
}  # fmt: skip


def annotated(record: Record, name: str = "mlsys gate") -> tuple[str, ...]:
    """Return the lines to print: one for each benchmark that got worse, one for each other trouble, worst first."""
    verdict = parts.verdict_of(record)
    groups = _groups([f for f in parts.ordered(verdict.findings) if _is_told(f)])
    lines = [_of_group(word, findings, name) for word, findings in groups[: MOST if len(groups) <= MOST else MOST - 1]]
    if len(groups) > MOST:
        lines.append(_of_rest(groups[MOST - 1 :], name))
    if not lines and verdict.verdict in _LEVELS:
        text = "\n".join((*verdict.reasons, *verdict.fingerprint_differences)) or parts.headline(verdict)
        lines.append(command(_LEVELS[verdict.verdict], f"{name}: {parts.WORDS[verdict.verdict]}", text))
    return tuple(lines)


def _is_told(finding: Finding) -> bool:
    """Say whether a finding is worth an annotation: what is only reported is so only when it got worse."""
    word = parts.outcome(finding)
    return word in _LEVELS and not parts.is_new(finding) and (finding.may_fail or word == "reported")


def command(level: str, title: str, message: str) -> str:
    """Return a workflow command with everything in it escaped."""
    data = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    named = title.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A").replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={named}::{data}"


def _groups(findings: Sequence[Finding]) -> list[tuple[Outcome, list[Finding]]]:
    """Return regressions by the name of their benchmark, everything else by its outcome, in the order given."""
    found: dict[tuple[Outcome, str], list[Finding]] = {}
    for finding in findings:
        word = parts.outcome(finding)
        found.setdefault((word, finding.name if word == "regression" else ""), []).append(finding)
    return [(word, group) for (word, _), group in found.items()]


def _of_group(word: Outcome, findings: Sequence[Finding], name: str) -> str:
    what = findings[0].name if word == "regression" else f"{len(findings)} metric{'s' * (len(findings) != 1)}"
    return command(_LEVELS[word], f"{name}: {parts.WORDS[word]} in {what}", _lines(findings))


def _of_rest(groups: Sequence[tuple[Outcome, list[Finding]]], name: str) -> str:
    findings = [f for _, group in groups for f in group]
    return command(_LEVELS[groups[0][0]], f"{name}: {len(findings)} more metrics", _lines(findings))


def _lines(findings: Sequence[Finding]) -> str:
    shown = [f"{label}: {parts.sentence(f)}"[:_LONGEST] for f, label in zip(findings, parts.labels(findings), strict=True)][:_SHOWN]
    more = [f"and {len(findings) - _SHOWN} more"] if len(findings) > _SHOWN else []
    return "\n".join((*shown, *more))
