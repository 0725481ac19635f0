"""Steps like others."""

from __future__ import annotations

from mlsys_bench.engine.runner import Ints, Step

PARTS = ("tokens", "positions", "slots", "sequence_of", "first", "block_table", "sampled")


def changed(step: Step, **parts: Ints) -> Step:
    """Return a step with other parts."""
    return Step.of(**{name: parts.get(name, getattr(step, name)) for name in PARTS})
