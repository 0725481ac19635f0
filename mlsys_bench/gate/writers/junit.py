"""JUnit XML, one test case per metric, in the dialect of Jenkins' xunit plugin (junit-10.xsd), which GitLab and the others read too.

A regression is a `failure`, what could not be compared an `error`, what could not be decided `skipped`: it neither passed nor failed.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from mlsys_bench.gate.writers import parts
from mlsys_bench.gate.writers.parts import Outcome, Record
from mlsys_bench.verdicts import Finding, GateRun, Verdict

CLASS = "mlsys.gate"
_ELEMENTS: dict[Outcome, str] = {
    "regression": "failure", "not_comparable": "error", "suspect": "skipped", "inconclusive": "skipped", "reported": "skipped",
}  # fmt: skip
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # the Char production of XML 1.0


def junit(record: Record, name: str = "mlsys gate") -> str:
    """Return the verdict as JUnit XML."""
    verdict = parts.verdict_of(record)
    suite = ElementTree.Element("testsuite", {"name": _clean(name)})
    _properties(suite, record)
    findings = parts.ordered(verdict.findings)
    for finding, label in zip(findings, parts.labels(findings), strict=True):
        told = parts.figures(finding) if finding.ratio is not None else finding.reason
        _case(suite, label, _outcome(finding), told or parts.sentence(finding), parts.sentence(finding))
    if not _is_told(suite, verdict):
        said = "; ".join((*verdict.reasons, *verdict.fingerprint_differences)) or parts.headline(verdict)
        _case(suite, "verdict", "skipped" if verdict.verdict == "improved" else verdict.verdict, parts.headline(verdict), said)
    return _document(suite, f"{record.wall_s:.3f}" if isinstance(record, GateRun) else None)


def junit_failure(message: str, name: str = "mlsys gate") -> str:
    """Return JUnit XML of a gate that measured nothing: one test case, an error."""
    suite = ElementTree.Element("testsuite", {"name": _clean(name)})
    case = ElementTree.SubElement(suite, "testcase", {"classname": CLASS, "name": "measurement"})
    ElementTree.SubElement(case, "error", {"type": "failed", "message": _clean(message)}).text = _clean(message)
    return _document(suite, None)


def _outcome(finding: Finding) -> str:
    return "new" if parts.is_new(finding) else parts.outcome(finding)


def _case(suite: ElementTree.Element, label: str, outcome: str, message: str, text: str) -> None:
    case = ElementTree.SubElement(suite, "testcase", {"classname": CLASS, "name": _clean(label)})
    element = "skipped" if outcome == "new" else _ELEMENTS.get(outcome)  # type: ignore[call-overload]
    if element is None:
        ElementTree.SubElement(case, "system-out").text = _clean(text)
    else:
        ElementTree.SubElement(case, element, {"type": outcome, "message": _clean(message)}).text = _clean(text)


def _is_told(suite: ElementTree.Element, verdict: Verdict) -> bool:
    """Say whether the test cases tell the verdict: a reader of them alone must not see a pass where there is none."""
    wanted = _ELEMENTS.get(verdict.verdict)
    return any(case.tag == "testcase" and (wanted is None or case.find(wanted) is not None) for case in suite)


def _properties(suite: ElementTree.Element, record: Record) -> None:
    verdict = parts.verdict_of(record)
    told = {"verdict": verdict.verdict, "tolerance": f"{verdict.tolerance:g}", "reasons": "; ".join(verdict.reasons)}
    if isinstance(record, GateRun):
        told |= {"baseline": parts.subject(record.base), "candidate": parts.subject(record.cand), "ended": record.ended}
        told |= {"contention": "; ".join((record.contention.verdict, *record.contention.reasons))}
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in told.items():
        ElementTree.SubElement(properties, "property", {"name": name, "value": _clean(value)})


def _document(suite: ElementTree.Element, time: str | None) -> str:
    counts = {"tests": len(suite.findall("testcase")), "failures": len(suite.findall("testcase/failure"))}
    counts["errors"] = len(suite.findall("testcase/error"))
    told = {key: str(n) for key, n in counts.items()} | ({"time": time} if time is not None else {})
    for key, text in (told | {"skipped": str(len(suite.findall("testcase/skipped")))}).items():
        suite.set(key, text)
    root = ElementTree.Element("testsuites", {"name": suite.get("name", ""), **told})
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _clean(text: str) -> str:
    """Return text with what no XML may hold made visible."""
    return _NOT_XML.sub("\ufffd", text)
