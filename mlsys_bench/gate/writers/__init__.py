"""A verdict, or a gate's whole record -> what CI systems read: JUnit XML, Markdown, annotations, values for trackers.  Text, no files."""

from __future__ import annotations

from mlsys_bench.gate.writers.annotations import annotated, command
from mlsys_bench.gate.writers.junit import junit, junit_failure
from mlsys_bench.gate.writers.markdown import comment, comment_failure, failure, step_summary
from mlsys_bench.gate.writers.trackers import bigger_is_better, bmf, smaller_is_better

__all__ = [
    "annotated", "bigger_is_better", "bmf", "command", "comment", "comment_failure", "failure", "junit", "junit_failure",
    "smaller_is_better", "step_summary",
]  # fmt: skip
