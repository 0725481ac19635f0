"""Who rents what: reserved for the base load, on demand and spot above it, and no SLO on spot.

Instances wanted in each hour of a typical day or week are D_t.  Reserved ones are paid at all hours, on-demand ones while they are used,
spot ones likewise and with the spares that survive the loss of a pool (`spot.instances_to_hold`).  With R reserved, the fleet firm
(reserved or on demand) up to B, and spot above:

    usd_h(R, B) = r R + p E[min(D, B) - min(D, R)] + s paid E[hold(max(D - B, 0) / useful)]     committed <= R <= B, floor <= B

For a given B the best R is the newsvendor's: reserve one more while r < p P(D > R), since it is used only P(D > R) of the time (Arrow,
Harris and Marschak 1951).  B is tried in full, so the answer is the least of all.  `floor` is what keeps the SLO alone: it stays firm.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlsys_bench.billing import Mix
from mlsys_bench.errors import BadInput
from mlsys_bench.pricing import spot
from mlsys_bench.pricing.spot import Reclaims


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What one instance costs an hour on each term; None where it is not sold so.  `committed` reserved ones are paid for already."""

    on_demand_usd_per_h: float
    reserved_usd_per_h: float | None = None
    spot_usd_per_h: float | None = None
    committed: int = 0
    reserved_at_most: int | None = None


def best(wanted: Sequence[int], floor: int, terms: Terms, reclaims: Reclaims | None = None) -> Mix:
    """Return the cheapest mix for the instances wanted hour by hour, of which `floor` keep the SLO and never stand on spot.

    Without `reclaims` nothing is known of spot, and none is bought.
    """
    if not wanted or min(wanted) < 0 or floor < 0:
        raise BadInput("a mix of terms needs the instances wanted hour by hour, none below zero")
    if terms.committed and terms.reserved_usd_per_h is None:
        raise BadInput(f"{terms.committed} committed instances need the price they were committed at")
    shares = {level: hours / len(wanted) for level, hours in Counter(wanted).items()}
    most = max(wanted)
    reserved = reserve(shares, most, terms)
    spot_sold = terms.spot_usd_per_h is not None and reclaims is not None
    firm = range(min(floor, most) if spot_sold else most, most + 1)
    tried = (_at(shares, max(terms.committed, min(reserved, n)), n, terms, reclaims) for n in firm)
    return min((m for m in tried if math.isfinite(m.usd_per_h)), key=lambda m: (m.usd_per_h, m.spot))


def reserve(shares: Mapping[int, float], most: int, terms: Terms) -> int:
    """Return how many to reserve: what is committed, and one more while its price is below on demand x the share of hours it is used."""
    reserved = terms.committed
    if terms.reserved_usd_per_h is None:
        return reserved
    top = most if terms.reserved_at_most is None else min(most, terms.reserved_at_most)
    while reserved < top and terms.reserved_usd_per_h < terms.on_demand_usd_per_h * _share_above(shares, reserved):
        reserved += 1
    return reserved


def _at(shares: Mapping[int, float], reserved: int, firm: int, terms: Terms, reclaims: Reclaims | None) -> Mix:
    """Return the mix with so many reserved and so many firm instances."""
    firm = max(firm, reserved)
    on_demand = math.fsum(share * max(min(level, firm) - reserved, 0) for level, share in shares.items())
    above = {level - firm: share for level, share in shares.items() if level > firm}
    held = {level: _held(level, reclaims) for level in above} if reclaims is not None else {}
    paid = reclaims.paid_share if reclaims is not None else 0.0
    peak = max(above, default=0)
    return Mix(
        reserved=reserved,
        firm=firm,
        spot=int(held[peak]) if peak and math.isfinite(held[peak]) else 0,
        spot_spares=int(held[peak]) - peak if peak and math.isfinite(held[peak]) else 0,
        reserved_usd_per_h=reserved * (terms.reserved_usd_per_h or 0.0),
        on_demand_usd_per_h=on_demand * terms.on_demand_usd_per_h,
        spot_usd_per_h=paid * (terms.spot_usd_per_h or 0.0) * sum(held[level] * share for level, share in above.items()),
        all_on_demand_usd_per_h=terms.on_demand_usd_per_h * math.fsum(level * share for level, share in shares.items()),
        notes=_notes(peak, reclaims),
    )


def _held(wanted: int, reclaims: Reclaims) -> float:
    """Return the spot instances that do the work of so many and survive the loss of a pool; infinite where none can."""
    if wanted == 0:
        return 0.0
    if reclaims.useful_share <= 0:
        return math.inf
    working = math.ceil(wanted / reclaims.useful_share - 1e-9)
    held = spot.instances_to_hold(working, reclaims.pools)
    return math.inf if held is None else held


def _share_above(shares: Mapping[int, float], level: int) -> float:
    return math.fsum(share for wanted, share in shares.items() if wanted > level)


def _notes(peak: int, reclaims: Reclaims | None) -> tuple[str, ...]:
    if not peak or reclaims is None:
        return ()
    short = spot.share_short(reclaims)
    return (
        f"spot: lives of {reclaims.mean_life_s / 3600:.3g} h over {reclaims.pools} pools ({reclaims.source}); "
        f"{1 - reclaims.useful_share:.1%} of what is paid goes to starts and lost work; two pools are gone at once {short:.2%} of the time",
    )
