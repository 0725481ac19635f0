"""Markdown for a pull request: a comment that is found again by its hidden marker, and the summary of a step.

Worst first; what does not fit is counted, never dropped in silence.  Names are code, with everything that Markdown, HTML or GitHub
(mentions, issue numbers) would act on written as character references.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence

from mlsys_bench.gate.writers import parts
from mlsys_bench.gate.writers.parts import Outcome, Record
from mlsys_bench.verdicts import Finding, GateRun, Word

COMMENT_CHARACTERS = 64_000  # GitHub refuses bodies of more than 65,536
SUMMARY_BYTES = 1_000_000  # GitHub drops a step's summary of more than 1 MiB
_OPEN: tuple[Outcome, ...] = ("regression", "not_comparable", "suspect", "inconclusive", "reported")  # shown at once; others folded
_MARKS: dict[Outcome, str] = {
    "regression": "❌", "not_comparable": "🚫", "suspect": "⚠️", "inconclusive": "❔", "reported": "⚠️", "improved": "🚀", "pass": "✅",
}  # fmt: skip
_TITLES: dict[Word, str] = {
    "regression": "regression", "not_comparable": "not comparable", "suspect": "suspect", "inconclusive": "inconclusive",
    "improved": "improved", "pass": "passed",
}  # fmt: skip
_LONGEST_NAME, _LONGEST_LINE, _MOST_LINES, _MOST_NAMES = 160, 300, 20, 8
_HEAD = "| verdict | metric | baseline | candidate | change | bounds of the change |\n|---|---|--:|--:|--:|--:|\n"
# a `_` inside a word is none to Markdown, a `:` only matters in :names: of emoji
_SPECIAL = re.compile(r"[\\`*\[\]#|~$@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=[\w+-]+:)")


def comment(record: Record, name: str = "mlsys gate") -> str:
    """Return the comment on a pull request, its marker first."""
    return f"{marker(name)}\n" + _fitting(record, name, COMMENT_CHARACTERS - len(marker(name)) - 1, len)


def step_summary(record: Record, name: str = "mlsys gate") -> str:
    """Return the summary of a step."""
    return _fitting(record, name, SUMMARY_BYTES, lambda text: len(text.encode()))


def failure(message: str, name: str = "mlsys gate") -> str:
    """Return the summary of a gate that measured nothing, and why."""
    return f"### ❌ {_prose(name)}: failed\n\nNothing was decided, as nothing could be measured:\n\n{_list([_prose(message)])}\n"


def comment_failure(message: str, name: str = "mlsys gate") -> str:
    """Return the comment that replaces that of an earlier run: what passed then says nothing of now."""
    return f"{marker(name)}\n{failure(message, name)}"


def marker(name: str) -> str:
    """Return the hidden line that a comment is found by: its own for each name, so that two gates have two comments."""
    return f"<!-- mlsys-gate: {re.sub(r'[^A-Za-z0-9 ._/-]|--', '.', name)} -->"


def _fitting(record: Record, name: str, limit: int, size: Callable[[str], int]) -> str:
    """Return the text with as many rows as fit, found by halving."""
    findings = parts.ordered(parts.verdict_of(record).findings)
    rows = [(finding, _row(finding, label)) for finding, label in zip(findings, parts.labels(findings), strict=True)]
    top, why = _top(record, name), _why(record, findings)
    low, high = 0, len(rows)
    whole = _text(top, rows, high, why)
    if size(whole) <= limit:
        return whole
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(_text(top, rows, middle, why)) <= limit else (low, middle)
    return _text(top, rows, low, why)


def _text(top: Sequence[str], rows: Sequence[tuple[Finding, str]], fitting: int, why: str) -> str:
    shown = rows[:fitting]
    folded = [(f, row) for f, row in shown if _is_folded(f)]
    blocks = [
        *top,
        _table([row for f, row in shown if not _is_folded(f)]),
        _details(_counted([f for f, _ in folded]), _table([row for _, row in folded])) if folded else "",
        _left_out([f for f, _ in rows[fitting:]]),
        why,
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _top(record: Record, name: str) -> list[str]:
    verdict = parts.verdict_of(record)
    title = f"### {_MARKS[verdict.verdict]} {_prose(name)}: {_TITLES[verdict.verdict]}"
    return [title, parts.headline(verdict), _sides(record)]


def _is_folded(finding: Finding) -> bool:
    return parts.is_new(finding) or parts.outcome(finding) not in _OPEN


def _sides(record: Record) -> str:
    if not isinstance(record, GateRun):
        return ""
    sides = f"{_code(parts.subject(record.base))} → {_code(parts.subject(record.cand))}"
    return " · ".join((sides, *map(_prose, parts.circumstances(record))))


def _table(rows: Sequence[str]) -> str:
    return _HEAD + "\n".join(rows) if rows else ""


def _row(finding: Finding, label: str) -> str:
    word = "🆕 new" if parts.is_new(finding) else f"{_MARKS[parts.outcome(finding)]} {parts.WORDS[parts.outcome(finding)]}"
    word += ", reported only" * (not finding.may_fail and finding.verdict in ("inconclusive", "suspect"))
    more = " (more is better)" if finding.better == "higher" else ""
    sides = (parts.value(finding.baseline, finding.unit), parts.value(finding.candidate, finding.unit))
    figures = (_prose(text).replace(" ", "\u00a0") for text in (*sides, parts.change(finding.ratio), parts.bounds(finding)))
    return f"| {' | '.join((word, _code(label) + more, *figures))} |"


def _counted(findings: Sequence[Finding]) -> str:
    words = ["new" if parts.is_new(f) else parts.WORDS[parts.outcome(f)] for f in findings]
    return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))


def _left_out(missing: Sequence[Finding]) -> str:
    """Return how many metrics are not in the table, and what they are: none is worse than what is."""
    if not missing:
        return ""
    words = [parts.outcome(f) for f in missing]
    counts = ", ".join(f"{words.count(word)} {parts.WORDS[word]}" for word in parts.WORST_FIRST if word in words)
    return f"**{len(missing)} more metrics are not shown for want of room ({counts}); the record holds them all.**"


def _why(record: Record, findings: Sequence[Finding]) -> str:
    """Return the reasons of the verdict, what was remarked on the run, then the reason of each metric that is open, each once."""
    verdict, remarks = parts.verdict_of(record), record.remarks if isinstance(record, GateRun) else ()
    named: dict[str, list[str]] = {}
    for finding in findings:
        if not _is_folded(finding) and finding.reason:
            named.setdefault(finding.reason, []).append(_code(finding.name))
    said = map(_prose, dict.fromkeys((*verdict.reasons, *verdict.fingerprint_differences, *remarks)))
    lines = [*said, *(f"{_named(list(dict.fromkeys(names)))}: {_prose(reason)}" for reason, names in named.items())]
    more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return _details("Why", _list(lines[:_MOST_LINES] + more)) if lines else ""


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMES]) + (f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else "")


def _list(lines: Sequence[str]) -> str:
    """Return a list of these lines; one that begins with '- ' or '1. ' would be a list of its own, so such a character is a reference."""
    return "\n".join(f"- {line if line[0].isalpha() or line[0] in '<&' else f'&#{ord(line[0])};{line[1:]}'}" for line in lines if line)


def _details(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _code(text: str) -> str:
    """Return text as code that shows what it is, in a table too: a code span of Markdown would need a `|` escaped and no backquote."""
    return f"<code>{_references(text, _LONGEST_NAME)}</code>"


def _prose(text: str) -> str:
    """Return text that shows as it is, and mentions nobody."""
    return _references(text, _LONGEST_LINE).replace("&#64;", "&#64;&#8203;").replace("&#35;", "&#35;&#8203;")


def _references(text: str, longest: int) -> str:
    line = " ".join(text.split())
    short = line if len(line) <= longest else f"{line[: longest - 1]}…"
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", html.escape(short, quote=True).replace("&#x27;", "'"))
