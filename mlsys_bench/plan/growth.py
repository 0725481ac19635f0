"""Growth: the month in which a fleet is full, and replicas and cost month by month."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mlsys_bench.errors import BadInput
from mlsys_bench.surroundings import Month, Outlook

Fewest = Callable[[float], int]
Price = Callable[[int], float | None]

MONTHS = 24
FARTHEST_TIMES = 1000.0  # today's traffic: beyond it no month is told, nor priced
FARTHEST_MONTHS = 1200  # a fleet that is not full by then is full never
_HALVINGS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """Growth of traffic per month, 0.1 for 10 %.  `low` and `high` are its interval, None where it has none."""

    per_month: float
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        ends = (self.per_month if self.low is None else self.low, self.per_month, self.per_month if self.high is None else self.high)
        if not all(math.isfinite(g) and g > -1 for g in ends) or list(ends) != sorted(ends):
            raise BadInput(
                f"growth of {self.per_month:g} a month between {ends[0]:g} and {ends[2]:g}: above -100 %, the interval around it"
            )

    @property
    def ends(self) -> tuple[float, float] | None:
        """Slowest and fastest growth, None without an interval."""
        if self.low is None and self.high is None:
            return None
        return (self.per_month if self.low is None else self.low, self.per_month if self.high is None else self.high)


def outlook(
    rate_per_s: float,
    growth: Growth,
    fewest: Fewest,
    *,
    fleet: int,
    usd_per_h: Price = lambda replicas: None,
    months: int = MONTHS,
    holds_per_s: float | None = None,
) -> Outlook:
    """Return when a fleet of so many replicas is full, and what each month takes.

    `fewest(rate)` says how many hold the limits, `usd_per_h(n)` what they cost.

    Traffic of month m is rate x (1 + growth)^m; the months told end before it is `FARTHEST_TIMES` today's.  Full: beyond `holds_per_s`,
    else beyond the highest rate that `fewest` serves.
    """
    if not (rate_per_s > 0 and fleet >= 1 and months >= 0):
        raise BadInput(f"an outlook of {months} months for {rate_per_s:g}/s on {fleet} replicas: all must be above zero")
    most_per_s = highest_rate(rate_per_s, fewest, fleet) if holds_per_s is None else holds_per_s
    ends = growth.ends
    return Outlook(
        per_month=growth.per_month,
        fleet=fleet,
        full_at_per_s=most_per_s,
        full_month=full_month(rate_per_s, growth.per_month, most_per_s),
        full_interval=(full_month(rate_per_s, ends[1], most_per_s), full_month(rate_per_s, ends[0], most_per_s)) if ends else None,
        months=tuple(_month(m, rate_per_s, growth, fewest, usd_per_h) for m in told(growth, months)),
    )


def full_month(rate_per_s: float, growth: float, most_per_s: float) -> float | None:
    """Return after how many months traffic exceeds a rate: ln(most / rate) / ln(1 + growth), 0 when it does today, None for never."""
    if rate_per_s > most_per_s:
        return 0.0
    if growth <= 0:
        return None
    months = math.log(most_per_s / rate_per_s) / math.log1p(growth)
    return months if months <= FARTHEST_MONTHS else None


def highest_rate(rate_per_s: float, fewest: Fewest, fleet: int) -> float:
    """Return the highest rate that so many replicas hold; 0 when they hold none."""
    low, high = 0.0, rate_per_s
    while fewest(high) <= fleet and high < 1e12:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fewest(middle) <= fleet else (low, middle)
    return low


def told(growth: Growth, months: int = MONTHS) -> range:
    """Return the months to tell: those of a traffic that somebody may plan for."""
    fastest = max(growth.ends or (growth.per_month,))
    return range(1 + (months if fastest <= 0 else min(months, math.floor(math.log(FARTHEST_TIMES) / math.log1p(fastest)))))


def _month(m: int, rate_per_s: float, growth: Growth, fewest: Fewest, usd_per_h: Price) -> Month:
    def replicas(per_month: float) -> int:
        return fewest(rate_per_s * (1 + per_month) ** m)

    needed, ends = replicas(growth.per_month), growth.ends
    return Month(
        month=m,
        rate_per_s=rate_per_s * (1 + growth.per_month) ** m,
        replicas=needed,
        replicas_interval=(replicas(ends[0]), replicas(ends[1])) if ends else None,
        usd_per_h=usd_per_h(needed),
    )
