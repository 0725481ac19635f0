"""plan: the answer with what was asked for beside it: a baseline, and what changes would save or cost; by whoever is hired for it."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING

from mlsys_bench import models, pricing, workers
from mlsys_bench import plan as planner
from mlsys_bench.billing import Beside, Cause, Sensitivity
from mlsys_bench.errors import BadInput
from mlsys_bench.fleets import FleetPlan
from mlsys_bench.journeys import planning
from mlsys_bench.journeys.progress import Line
from mlsys_bench.pricing import compare
from mlsys_bench.types import Plan, Provenance
from mlsys_bench.units import count

if TYPE_CHECKING:
    from mlsys_bench.plan.fleets import FleetRequest
    from mlsys_bench.plan.graph import GraphRequest


def planned(
    asked: planner.Request | GraphRequest | FleetRequest,
    *,
    cluster: str | None = None,
    baseline: Path | None = None,
    changes: bool = False,
    small: str | None = None,
    quiet: bool = False,
) -> Plan | FleetPlan:
    """Return the plan of a request, beside the plan of another record and under changes where these are asked for."""
    _check(asked, {"--cluster": cluster, "--sensitivity": changes, "--baseline": baseline}, small)
    if cluster is None and baseline is None and not changes:
        return planning.answer(asked)
    old = None if baseline is None else planning.stored(baseline)
    line = Line(quiet)
    try:
        with workers.hired(cluster) as crew:
            made = planning.answer(asked, crew if isinstance(crew, Executor) else None)
            given = asked if isinstance(asked, planner.Request) else None
            if old is not None and baseline is not None and isinstance(made, Plan):
                line.show("planning between the baseline and the plan")
                made = dataclasses.replace(made, baseline=beside(made, old, baseline.name, given, crew))
            if given is not None and changes and isinstance(made, Plan):
                from mlsys_bench.plan import sensitivity

                first = sensitivity.smaller(made.model) if small is None else models.find(small).id
                rows = sensitivity.sensitivity(given, made, planning.plan, first, crew, line.counted("changes planned"))
                made = dataclasses.replace(made, sensitivity=rows)
            elif changes and isinstance(made, Plan):
                made = dataclasses.replace(made, sensitivity=_staged(asked, made, crew, line))
    finally:
        line.clear()
    return made


def _staged(asked: object, made: Plan, crew: Executor | workers.Local | None, line: Line) -> tuple[Sensitivity, ...]:
    """Return what changes make of the plan of a stage graph."""
    from mlsys_bench.plan import sensitivity
    from mlsys_bench.plan.graph import GraphRequest, changes

    assert isinstance(asked, GraphRequest)
    return sensitivity.rows(list(changes.variants(asked, made)), made, planning.plan, crew, line.counted("changes planned"))


def _check(asked: object, options: dict[str, object], small: str | None) -> None:
    """Raise BadInput for what would be passed over in silence."""
    given = [name for name, value in options.items() if value]
    if given and not isinstance(asked, planner.Request):
        from mlsys_bench.plan.graph import GraphRequest

        if not isinstance(asked, GraphRequest):
            what = "several scenarios on one pool are planned without it: plan one of them alone, or leave it out"
            raise BadInput(f"{given[0]} is for the plan of one scenario; {what}")
        if small is not None:
            raise BadInput(f"--small {small} is for the plan of one model; a graph says in its escalations which model answers first")
    if small is not None and not options["--sensitivity"]:
        raise BadInput(f"--small {small} answers first in a cascade of --sensitivity; give that, too")
    if small is not None and isinstance(asked, planner.Request):
        first, last = models.find(small), models.find(asked.model)
        if not first.params < last.params:
            raise BadInput(f"--small {small}: {first.id} is no smaller than {last.id}, which it answers before; name a smaller model")


def beside(
    plan: Plan, old: Plan, file: str, given: planner.Request | None = None, executor: Executor | workers.Local | None = None
) -> Beside:  # fmt: skip
    """Return a plan beside a baseline: what it saves or adds, and the share of each cause."""
    from mlsys_bench.journeys import deploying  # what it reads of command lines would cost every plan its time

    found = deploying.compared(old, plan, given, executor)
    added = _less(plan.usd_per_month, old.usd_per_month)
    saving = compare.saving_usd_per_month(old, plan)
    return Beside(
        baseline=in_words(old),
        file=file,
        figures=compare.compare(old, plan),
        change_usd_per_month=added,
        change=None if added is None or not old.usd_per_month else added / old.usd_per_month,
        change_interval=_interval(old, plan),
        per_request_usd_per_month=None if saving is None else -saving,
        causes=tuple(
            Cause(
                cause=step.cause,
                changes=step.changes,
                replicas=step.replicas,
                usd_per_month=None if step.usd_per_hour is None else pricing.usd_per_month(step.usd_per_hour),
            )
            for step in found.steps
        ),
        method=found.method,
        differences=compare.incomparable(old, plan),
        provenance=Provenance.weakest(old.provenance, plan.provenance),
    )


def in_words(plan: Plan) -> str:
    """Return the fleet of a plan in a few words."""
    if plan.stages:
        return f"{plan.scenario or plan.model}, {count(plan.replicas, 'replica')} of {count(len(plan.stages), 'stage')}"
    return (
        f"{plan.model} on {' + '.join(f'{item.replicas} x {_each(item.gpu, item.tp * item.pp)} ({item.precision})' for item in plan.fleet)}"
    )


def _each(gpu: str, devices: int) -> str:
    return gpu if devices == 1 else f"{devices} x {gpu}"


def _less(new: float | None, old: float | None) -> float | None:
    return None if new is None or old is None else new - old


def _interval(old: Plan, new: Plan) -> tuple[float, float] | None:
    """Return between what ends the change lies if each plan lies within its own interval."""
    before, after = (plan.intervals.get("usd_per_month") for plan in (old, new))
    return None if before is None or after is None else (after[0] - before[1], after[1] - before[0])
