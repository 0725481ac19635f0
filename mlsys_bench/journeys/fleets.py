"""plan of a fleet file: from options as typed to a record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlsys_bench import scenario, slo
from mlsys_bench.errors import BadInput
from mlsys_bench.fleets import Fleet, Want
from mlsys_bench.journeys import planning
from mlsys_bench.plan import Request, tenants
from mlsys_bench.plan.fleets import Entry, FleetRequest
from mlsys_bench.stages import StageGraph
from mlsys_bench.types import SLO

if TYPE_CHECKING:
    from mlsys_bench.plan.graph import GraphRequest

_TAKEN = ("scenario", "term", "seed", "prices", "measured")
_LEFT_OUT = {"speed": (1.0,), "routing": ("random",), "disaggregate": ("auto", "never")}  # said where nobody gave the option
_OF_ONE = ("trace", "speed", "routing", "zones", "survive", "spot", "autoscale", "growth", "disaggregate", "mixed")  # no file says these


def asked(found: Fleet, options: Mapping[str, Any]) -> FleetRequest:
    """Return what a fleet file asks for.  Raises BadInput for options that belong to one of its scenarios."""
    for option, value in options.items():
        if option not in _TAKEN and value not in (None, False, "", (), [], *_LEFT_OUT.get(option, ())):
            name = option.replace("_", "-")
            cure = "plan the one that is meant alone" if option in _OF_ONE else f"say it in {options['scenario']}, at the one that is meant"
            raise BadInput(f"--{name}: {found.name} is a fleet of several scenarios; {cure}")
    return FleetRequest(name=found.name, pool=found.pool, entries=tuple(_entry(found, want, options) for want in found.wants))


def _entry(fleet: Fleet, want: Want, options: Mapping[str, Any]) -> Entry:
    """Return one scenario with what the fleet changes of it, on the GPUs of the pool that it names."""
    found = scenario.load(want.scenario)
    request: Request | GraphRequest
    if isinstance(found, StageGraph):
        request, gpus = _staged(want, options), found.engines[0].resources.gpu if found.engines[0].resources else ()
    else:
        request = _of_model(want, options)
        gpus = request.gpus
    return Entry(
        name=want.name,
        scenario=want.scenario if not Path(want.scenario).suffix else Path(want.scenario).name,
        priority=want.priority,
        request=request,
        gpus=tuple(gpu for gpu in fleet.pool if gpu in gpus),
    )


def _of_model(want: Want, options: Mapping[str, Any]) -> Request:
    """Return what is asked for of a scenario of one model; profiles are those of its model."""
    request = planning.ask(
        scenario=want.scenario, qps=want.rate_per_s, measured=(), model=None, gpu=None, precision=None, slo=None, arrivals=want.arrivals,
        prompt_tokens=None, output_tokens=None, max_batch=None, headroom=None, term=options["term"], seed=options["seed"],
        prices=options.get("prices"),
    )  # fmt: skip
    own = planning.profiles(list(options.get("measured") or ()))
    mine = tuple(profile for profile in own if profile.layout.model == request.model)
    return dataclasses.replace(request, slo=_limits(want, request), profiles=mine)


def _limits(want: Want, request: Request) -> SLO:
    """Return the limits of a scenario with those of the fleet file in place of them."""
    if not want.slo:
        return request.slo
    names = [tenant.name for tenant in request.workload.tenants]
    try:
        return tenants.overridden(want.slo, request.slo, names)
    except BadInput as error:
        told = f"every tenant of {want.scenario} has limits of its own ({', '.join(names)})"
        raise BadInput(f"{want.name}: slo {slo.show(want.slo)} would bind nobody, {told}; change those, and leave it out") from error


def _staged(want: Want, options: Mapping[str, Any]) -> GraphRequest:
    """Return what is asked for of a stage graph."""
    from mlsys_bench.journeys import graph_plans

    given = {"scenario": want.scenario, "qps": want.rate_per_s, "arrivals": want.arrivals, "slo": slo.show(want.slo) or None}
    found = graph_plans.asked({**given, "term": options["term"], "seed": options["seed"], "prices": options.get("prices")})
    assert found is not None
    return found
