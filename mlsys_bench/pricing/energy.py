"""What a fleet draws: watts from data sheet and use, kilowatt-hours with the building's share, CO2 by the intensity of a named grid.

    P(u) = P_idle + (P_full - P_idle) u                 per device; Fan, Weber and Barroso, ISCA 2007, measured it linear for servers
    W = PUE (devices P(u) + hosts P_host)               PUE: what the building draws over what machines draw

P_full is the TDP of the catalogue, which no device exceeds for long, so W is an upper figure where work is bound by memory.  Clouds
charge no energy apart: dollars are for machines of one's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlsys_bench.billing import Energy
from mlsys_bench.errors import BadInput
from mlsys_bench.types import Provenance
from mlsys_bench.units import HOURS_PER_MONTH, HOURS_PER_YEAR

IDLE_SHARE = 0.17  # of TDP, assumed: a CUDA context alone adds 26 to 66 W to a bare card at rest (arXiv:2605.23918)
SURVEY_PUE = 1.58  # mean of the industry, Uptime Institute survey 2023; large new sites stay below 1.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where machines stand.  What nobody gave is None and counts for nothing, which the answer says."""

    pue: float = SURVEY_PUE
    host_w: float | None = None  # of a host without its devices
    usd_per_kwh: float | None = None  # where the machines are one's own
    co2_g_per_kwh: float | None = None  # of the grid
    source: str = ""


def device_w(tdp_w: float, utilisation: float, idle_w: float | None = None) -> float:
    """Return the watts of a device that works this share of the time; idle, a sixth of its TDP where nobody measured."""
    if not (0 <= utilisation <= 1 and tdp_w > 0):
        raise BadInput(f"a device of {tdp_w:g} W used to {utilisation:g}: a share from 0 to 1 of something above zero is needed")
    idle = IDLE_SHARE * tdp_w if idle_w is None else idle_w
    return idle + (tdp_w - idle) * utilisation


def draw(
    tdp_w: float | None,
    devices: int,
    utilisation: float,
    *,
    site: Site | None = None,
    hosts: int = 0,
    stranded: int = 0,
    idle_w: float | None = None,
    requests_per_s: float | None = None,
) -> Energy | None:
    """Return the energy of a fleet: `devices` in use, `stranded` ones idle; None for a device without a published TDP."""
    if tdp_w is None:
        return None
    site = site or Site()
    machines_w = devices * device_w(tdp_w, utilisation, idle_w) + stranded * device_w(tdp_w, 0.0, idle_w) + hosts * (site.host_w or 0.0)
    watts = machines_w * site.pue
    month, year = watts * HOURS_PER_MONTH / 1000, watts * HOURS_PER_YEAR / 1000
    return Energy(
        watts=watts,
        kwh_per_month=month,
        kwh_per_year=year,
        wh_per_request=watts / 3600 / requests_per_s if requests_per_s else None,
        usd_per_month=None if site.usd_per_kwh is None else month * site.usd_per_kwh,
        co2_kg_per_month=None if site.co2_g_per_kwh is None else month * site.co2_g_per_kwh / 1000,
        provenance=Provenance.ASSUMED,
        assumed=_assumed(site, idle_w, hosts),
    )


def together(parts: Sequence[Energy]) -> Energy | None:
    """Return what parts of a fleet draw together; None for no part."""
    if not parts:
        return None
    said = tuple(dict.fromkeys(line for part in parts for line in part.assumed))
    return Energy(
        watts=sum(part.watts for part in parts),
        kwh_per_month=sum(part.kwh_per_month for part in parts),
        kwh_per_year=sum(part.kwh_per_year for part in parts),
        wh_per_request=_sum([part.wh_per_request for part in parts]),
        usd_per_month=_sum([part.usd_per_month for part in parts]),
        co2_kg_per_month=_sum([part.co2_kg_per_month for part in parts]),
        provenance=Provenance.weakest(*(part.provenance for part in parts)),
        assumed=said,
    )


def check_site(site: Site) -> Site:
    """Return a site that can be, or raise BadInput."""
    if not 1 <= site.pue < math.inf:
        raise BadInput(f"a PUE of {site.pue:g}: a building draws at least what its machines draw, 1.0 or more")
    for name in ("host_w", "usd_per_kwh", "co2_g_per_kwh"):
        value = getattr(site, name)
        if value is not None and not 0 <= value < math.inf:
            raise BadInput(f"{name} of {value:g}: a number from 0 up is needed")
    return site


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _assumed(site: Site, idle_w: float | None, hosts: int) -> tuple[str, ...]:
    said = ["a busy device draws its TDP"]
    if idle_w is None:
        said.append(f"an idle one {IDLE_SHARE:.0%} of it")
    said.append(f"PUE {site.pue:g} ({'Uptime Institute survey 2023' if site.pue == SURVEY_PUE else site.source or 'given'})")
    if hosts and site.host_w is None:
        said.append("hosts count for nothing, for want of their watts")
    return tuple(said)
