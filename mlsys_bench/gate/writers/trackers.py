"""What the candidate measured, for services that keep a history: Bencher, and the github-action-benchmark action.

They track values of one side, so the baseline is not in them.  Their bounds are those of the change, held against the baseline's value:
where the candidate's value lies if the baseline's is right.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any, Literal

from mlsys_bench.gate.writers import parts
from mlsys_bench.gate.writers.parts import Record
from mlsys_bench.verdicts import Finding

_LONGEST_BENCHMARK, _LONGEST_MEASURE = 1024, 64  # of names in Bencher


def bmf(record: Record) -> str:
    """Return Bencher Metric Format JSON: times as `latency` in nanoseconds, rates as `throughput`, all else under its unit's name."""
    document: dict[str, dict[str, dict[str, float]]] = {}
    for name, finding, number in _values(record):
        measure, scale = _measure(finding)
        metric = {"value": number * scale}
        interval = _interval(finding)
        if interval is not None:
            metric |= {"lower_value": interval[0] * scale, "upper_value": interval[1] * scale}
        document[_short(name, _LONGEST_BENCHMARK)] = {measure: metric}
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def smaller_is_better(record: Record) -> str:
    """Return `customSmallerIsBetter` JSON of the metrics of which less is better."""
    return _custom(record, "lower")


def bigger_is_better(record: Record) -> str:
    """Return `customBiggerIsBetter` JSON of the metrics of which more is better."""
    return _custom(record, "higher")


def _custom(record: Record, better: Literal["lower", "higher"]) -> str:
    entries = [_entry(name, finding, number) for name, finding, number in _values(record) if finding.better == better]
    return json.dumps(entries, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _entry(name: str, finding: Finding, number: float) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "unit": finding.unit, "value": number}
    interval = _interval(finding)
    if interval is not None:
        entry["range"] = f"{interval[0]:.6g} to {interval[1]:.6g}"
    return entry | {"extra": f"{parts.WORDS[parts.outcome(finding)]}: {parts.sentence(finding)}"}


def _values(record: Record) -> Iterator[tuple[str, Finding, float]]:
    findings = parts.ordered(parts.verdict_of(record).findings)
    for name, finding in zip(parts.labels(findings), findings, strict=True):
        if finding.candidate is not None and math.isfinite(finding.candidate):
            yield name, finding, finding.candidate


def _interval(finding: Finding) -> tuple[float, float] | None:
    """Return where the candidate's value lies if the baseline's is right."""
    if finding.interval is None or not finding.ratio or finding.candidate is None:
        return None
    middle = finding.candidate / finding.ratio
    return middle * finding.interval[0], middle * finding.interval[1]


def _measure(finding: Finding) -> tuple[str, float]:
    """Return Bencher's measure of a unit and how many of its units one of ours is."""
    if finding.unit == "s":
        return "latency", 1e9
    if finding.better == "higher" and finding.unit.endswith("/s"):
        return "throughput", 1.0
    slug = re.sub(r"[^a-z0-9]+", "-", finding.unit.lower()).strip("-")
    return _short(slug or "value", _LONGEST_MEASURE), 1.0


def _short(name: str, longest: int) -> str:
    """Return a name that fits, told apart from others with the same beginning."""
    if len(name) <= longest:
        return name
    return f"{name[: longest - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
