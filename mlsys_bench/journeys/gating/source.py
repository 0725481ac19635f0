"""What one side of a gate is measured from: a git ref's worker, a command, a server.  The loop in `pairs` knows nothing else of it."""

from __future__ import annotations

from typing import Protocol

from mlsys_bench.bench import harness
from mlsys_bench.types import Machine, Round
from mlsys_bench.verdicts import Subject

Metric = harness.Spec  # the same name and parameters on both sides make a pair
Sampled = tuple[Metric, Round]


class Launched(Protocol):
    """One launch under way: the unit of evidence.  Between turns it does nothing."""

    @property
    def pids(self) -> tuple[int, ...]:
        """Return the processes that belong to it now."""

    def hello(self) -> Machine:
        """Wait until it can be measured, and return what it runs on.  Raises MeasurementFailed, NotComparable."""

    def turn(self, number: int) -> list[Sampled]:
        """Measure once, the first turn warmed up: one round of each metric.  Raises MeasurementFailed when it died, with its last words."""

    def close(self) -> None:
        """End it and all it started.  May be called at any time, and again."""


class Source(Protocol):
    """One side, or one benchmark of it: starts launches of what it stands for."""

    @property
    def subject(self) -> Subject:
        """Return what is measured, as the record names it."""

    @property
    def together(self) -> bool:
        """Say whether a launch of the other side may be open meanwhile.  If not, whole launches alternate."""

    @property
    def turns(self) -> int:
        """Return how many turns a launch has; 1 where a run cannot be cut into turns."""

    def launch(self, pair: int) -> Launched:
        """Start the launch of this pair.  Returns at once, so that both sides can start up side by side."""
