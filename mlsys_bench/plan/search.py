"""What a search over candidates found: the common ground of the planner and of its words."""

from __future__ import annotations

from dataclasses import dataclass

from mlsys_bench.plan.analytic import Replica
from mlsys_bench.plan.candidates import Candidate, Misfit
from mlsys_bench.plan.sizing import Design
from mlsys_bench.types import Limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A candidate and the least it can cost: the replicas that its capacity and the headroom ask for, latencies aside."""

    candidate: Candidate
    replica: Replica
    replicas: int
    usd_per_h: float | None

    def sort_key(self) -> tuple[bool, float, int]:
        """Cheapest first, the unpriced last and by devices."""
        return (self.usd_per_h is None, self.usd_per_h or 0.0, self.replicas * self.candidate.tp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Everything that was looked at: designs that keep the limits, candidates that miss one, are passed over, or are too small."""

    designs: tuple[Design, ...]
    missed: tuple[tuple[Bound, float, Limit], ...]  # with value / limit of an idle replica
    passed_over: tuple[Bound, ...]
    misfits: tuple[Misfit, ...]
    unconfirmed: tuple[Design, ...] = ()  # kept by theory, missed by simulation at every number of replicas tried
