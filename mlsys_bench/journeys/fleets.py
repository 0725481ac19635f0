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
from mlsys_bench.plan import Request
from mlsys_bench.plan.fleets import Entry, FleetRequest
from mlsys_bench.stages import StageGraph

if TYPE_CHECKING:
    from mlsys_bench.plan.graph import GraphRequest

_TAKEN = ("scenario", "term", "seed", "prices", "measured")
_SAYS_NOTHING: tuple[object, ...] = (None, False, "", (), [], 1.0, "random", "never", "auto")  # what options are that nobody gave


def asked(found: Fleet, options: Mapping[str, Any]) -> FleetRequest:
    """Return what a fleet file asks for.  Raises BadInput for options that belong to one of its scenarios."""
    for option, value in options.items():
        if option not in _TAKEN and value not in _SAYS_NOTHING:
            name = option.replace("_", "-")
            raise BadInput(
                f"--{name}: {found.name} is a fleet of several scenarios; say it in {options['scenario']}, at the one that is meant"
            )
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
    kept = tuple(limit for limit in request.slo if limit.tenant is not None) if want.slo else request.slo
    own = planning.profiles(list(options.get("measured") or ()))
    mine = tuple(profile for profile in own if profile.layout.model == request.model)
    return dataclasses.replace(request, slo=(*want.slo, *kept), profiles=mine)


def _staged(want: Want, options: Mapping[str, Any]) -> GraphRequest:
    """Return what is asked for of a stage graph."""
    from mlsys_bench.journeys import graph_plans

    given = {"scenario": want.scenario, "qps": want.rate_per_s, "arrivals": want.arrivals, "slo": slo.show(want.slo) or None}
    found = graph_plans.asked({**given, "term": options["term"], "seed": options["seed"], "prices": options.get("prices")})
    assert found is not None
    return found
