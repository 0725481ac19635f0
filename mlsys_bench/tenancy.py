"""What a plan says of its tenants, as its record holds it: what each sees, who goes first, what fleets of their own would cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlsys_bench.provenance import Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantPlan:
    """What the users of one tenant will see.  Keys are those of a plan: `ttft_p95_s` …; intervals are 90 %."""

    name: str
    share: float  # of the requests
    rate_per_s: float
    slo: str
    binds: bool  # whether one of its limits keeps its fleet from being smaller
    predicted: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    analytic: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantFleet:
    """Replicas that some of the tenants share, and nobody else uses."""

    tenants: tuple[str, ...]
    gpu: str
    precision: str
    devices_per_replica: int
    replicas: int
    usd_per_hour: float | None
    max_batch: int
    utilisation: float | None  # None where it was not worked out
    binds: str
    provenance: Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """One way to give fleets to tenants: one for all, one for each, or one of them apart from the others.

    `by` says how far it was worked out: confirmed by simulation, by theory, or the least it could cost.  A division that cannot be has no
    fleets.
    """

    fleets: tuple[TenantFleet, ...]
    usd_per_hour: float | None
    by: str  # simulation, theory, least
    why: str

    @property
    def replicas(self) -> int:
        """Replicas of all its fleets."""
        return sum(fleet.replicas for fleet in self.fleets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surge:
    """More traffic than was planned for, on the planned fleet: by tenant the largest value / limit, None for a wait without end."""

    times: float  # the planned traffic
    utilisation: float
    excess: dict[str, float | None]
    fifo_excess: dict[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Precedence:
    """Tenants by priority, those that go first first, beside one fleet that serves all as they come; `fifo_…` is None where none can."""

    classes: tuple[tuple[str, ...], ...]
    replicas: int
    usd_per_hour: float | None
    fifo_replicas: int | None
    fifo_usd_per_hour: float | None
    why: str
    surges: tuple[Surge, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenancy:
    """The tenants of a plan, and the ways to divide them over fleets, the plan's own first."""

    tenants: tuple[TenantPlan, ...]
    divisions: tuple[Division, ...] = field(default=())
    precedence: Precedence | None = None  # None: first come, first served

    @property
    def is_shared(self) -> bool:
        """Whether the plan is one fleet for all."""
        return not self.divisions or len(self.divisions[0].fleets) <= 1
