"""The options of `mlsys plan` that ask for what surrounds a plan: spare replicas, autoscaling, growth."""

from __future__ import annotations

from typing import Any

from mlsys_bench import units
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys import settings
from mlsys_bench.types import SLO, Limit

OPTIONS = ("availability", "zones", "survive", "spot", "autoscale", "growth", "mixed")


def promised(limits: SLO, availability: str | None) -> SLO:
    """Return the limits with the availability of `--availability` among them, in place of the scenario's own."""
    if not availability:
        return limits
    share = units.fraction(availability, "--availability")
    if not 0 < share < 1:
        raise BadInput(f"--availability {availability}: it lies between 0% and 100%, e.g. 99.9%")
    return (*(limit for limit in limits if limit.metric != "availability"), Limit(metric="availability", stat="ratio", limit=share))


def pools_apart(text: str) -> dict[str, Any]:
    """Return the fields of a request that `--disaggregate auto|never|only[,link=50GB/s]` fills."""
    known: dict[str, settings.Parse] = {"way": lambda way, _: way, "link": settings.bandwidth}
    found = settings.parse(text, "--disaggregate", known, main="way")
    if found.get("way") == "never" and "link" in found:
        raise BadInput(f"--disaggregate {text}: no link is crossed where pools are never weighed; leave one of them out")
    return {"disaggregate": found.get("way", "auto"), "link_bytes_per_s": found.get("link")}


def asked(zones: int | None, survive: bool, autoscale: bool, growth: str | None, spot: str | None = None) -> dict[str, Any]:
    """Return the fields of a request that these options fill."""
    found: dict[str, Any] = {"zones": zones or 1, "survive_zone": survive, "around": autoscale}
    if growth:
        from mlsys_bench.plan.growth import Growth

        found["growth"] = Growth(per_month=units.fraction(growth, "--growth"))
    if spot:
        from mlsys_bench.plan.spot import parse

        found["spot"] = parse(spot)
    return found
