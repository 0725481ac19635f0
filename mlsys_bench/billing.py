"""What things cost, as a record: bills, energy, break-evens, comparisons, what a change would save.  `pricing` computes them."""

from __future__ import annotations

from dataclasses import dataclass

from mlsys_bench.provenance import Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a bill, in dollars per hour, with where its price is from."""

    what: str
    usd_per_h: float
    source: str
    date: str
    provenance: Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """What everything costs together, and what of it has no price."""

    lines: tuple[Line, ...]
    usd_per_h: float
    usd_per_month: float
    usd_per_year: float
    usd_per_request: float
    usd_per_million_tokens: float | None  # input and output together; None where there are none
    usd_per_million_input_tokens: float | None
    usd_per_million_output_tokens: float | None
    unpriced: tuple[str, ...]
    provenance: Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """What a fleet draws on average, and over a month and a year."""

    watts: float
    kwh_per_month: float
    kwh_per_year: float
    wh_per_request: float | None
    usd_per_month: float | None
    co2_kg_per_month: float | None
    provenance: Provenance
    assumed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """From where an own fleet costs no more than an API.  None: at no rate."""

    from_per_day: float | None  # the least such rate
    for_good_per_day: float | None  # from here on at every rate; between the two, each new replica makes the API cheaper for a while
    replicas: int | None  # of the fleet at `from_per_day`
    api_usd_per_request: float
    idle_usd_per_day: float  # of the least fleet
    model: str = ""  # of the API


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One figure of two plans.  `change` is the share by which the new one exceeds the old; None where one of them has no such figure."""

    what: str
    baseline: float | None
    plan: float | None
    change: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What a change makes of a plan.  None where nothing was found, and then `why_not` says why."""

    what: str
    replicas: int | None
    usd_per_hour: float | None
    change_usd_per_month: float | None  # below zero: saved
    change: float | None  # likewise, as a share of the plan's cost
    clear: bool | None  # whether the new cost lies outside the plan's own interval
    binding_constraint: str | None
    why_not: str = ""
    usd_interval: tuple[float, float] | None = None  # 90 %, of the new cost an hour
    provenance: Provenance | None = None
    method: str = ""  # how it was found, and what that leaves out


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One cause of the difference between two plans, what it changed, and its share of the difference; below zero is saved."""

    cause: str
    changes: tuple[str, ...]
    replicas: int
    usd_per_month: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """A plan beside a stated baseline.  Differences are the plan less the baseline: below zero is saved; None where one has no price."""

    baseline: str  # its fleet, in words
    file: str
    figures: tuple[Comparison, ...]
    change_usd_per_month: float | None
    change: float | None  # the same as a share of the baseline's cost
    change_interval: tuple[float, float] | None  # 90 %, of dollars a month, as if the two plans erred independently
    per_request_usd_per_month: float | None  # what the plan's traffic would cost more at the baseline's price per request
    causes: tuple[Cause, ...]
    method: str  # how the causes were found
    differences: tuple[str, ...]  # why the two are not the same promise
    provenance: Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """How many instances on which term, and what each part costs an hour on average."""

    reserved: int
    firm: int  # reserved and on demand at the busiest hour
    spot: int  # at the busiest hour, spares included
    spot_spares: int  # of those, what the loss of a pool would take
    reserved_usd_per_h: float
    on_demand_usd_per_h: float
    spot_usd_per_h: float
    all_on_demand_usd_per_h: float  # the same hours without any of this
    notes: tuple[str, ...] = ()

    @property
    def usd_per_h(self) -> float:
        """Dollars per hour, on average over the hours."""
        return self.reserved_usd_per_h + self.on_demand_usd_per_h + self.spot_usd_per_h

    @property
    def saving(self) -> float:
        """Share of the all-on-demand price that is saved."""
        return 1 - self.usd_per_h / self.all_on_demand_usd_per_h if self.all_on_demand_usd_per_h else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a plan costs, seen from every side that was asked for."""

    plan: str  # its fleet, in words
    requests_per_s: float  # of the average load that idle time is shared out over
    bill: Bill | None  # None where the fleet has no price
    energy: Energy | None  # None where a device's watts are not known
    apis: tuple[BreakEven, ...] = ()
    mix: Mix | None = None
    comparison: tuple[Comparison, ...] = ()  # with a baseline
    saving_usd_per_month: float | None = None  # against its price per request
    differences: tuple[str, ...] = ()  # why the two are not the same promise
    sensitivity: tuple[Sensitivity, ...] = ()
    notes: tuple[str, ...] = ()
