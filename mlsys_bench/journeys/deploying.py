"""A plan on its way to production: written as manifests, set beside what runs today, and two plans set side by side."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

from mlsys_bench import plan as planner
from mlsys_bench import slo, workers
from mlsys_bench.errors import BadInput, Infeasible, unknown
from mlsys_bench.journeys import planning
from mlsys_bench.plan import command, difference, manifests
from mlsys_bench.plan.difference import Difference, Figures, Inputs
from mlsys_bench.types import Plan

ONE_ENGINE = "--from-deployment: one engine is compared with the plan of one model; plan that model alone"


def check(asked: object, exports: Sequence[str], today: str | None) -> None:
    """Raise, before a minute of planning, for what no plan of this request could be written as or set beside."""
    from mlsys_bench.plan.export import KINDS, files
    from mlsys_bench.plan.fleets import FleetRequest

    for export in exports:
        if (kind := export.partition(":")[0]) not in KINDS:
            raise unknown("export", kind, KINDS)
        if exports.count(export) > 1:
            raise BadInput(f"--export {export} is given {exports.count(export)} times; each file is written once")
        if isinstance(asked, FleetRequest):
            raise BadInput(f"--export {export}: manifests are of one scenario; export each scenario of the fleet by itself")
        files.writable(export, export.partition(":")[2])
    if today is not None and not isinstance(asked, planner.Request):
        raise BadInput(ONE_ENGINE)
    if today is not None:
        manifests.read(today)


def told(plan: object, exports: Sequence[str], today: str | None) -> str:
    """Return what follows a plan: today's deployment beside it, and where the manifests were written."""
    return "\n".join([*(beside(plan, today) if today else ()), *(exported(plan, asked) for asked in exports)])


def exported(plan: object, asked: str, engine: str = "vllm") -> str:
    """Write what `--export KIND[:DIR]` asks for and return where it is."""
    from mlsys_bench.plan import export

    if not isinstance(plan, Plan):
        raise BadInput(f"--export {asked}: manifests are of plans of one model, or of a scenario's stages; make one with mlsys plan")
    if plan.stages:
        from mlsys_bench.plan.export import stages

        return f"wrote {stages.write(asked, plan, engine)}"  # type: ignore[arg-type]
    if plan.apart:
        return f"wrote {export.write(asked, *export.pools(plan, engine))}"  # type: ignore[arg-type]
    return f"wrote {export.write(asked, export.release(plan, engine, secured=plan.secured, scaled=plan.scaled))}"  # type: ignore[arg-type]


def beside(plan: object, text: str) -> list[str]:
    """Return the plan's own command line, what of today's was not understood, and the difference of the two, a line each."""
    if not isinstance(plan, Plan) or plan.stages:
        raise BadInput(ONE_ENGINE)
    lines = []
    for today in manifests.read(text):
        if plan.apart:
            from mlsys_bench.plan.disaggregated import deployed

            lines += [*deployed.lines(plan, today.engine), f"today:   {command.command(today)}"]
            continue
        planned = command.of_plan(plan, today.engine)
        lines += [f"planned: {command.command(planned)}", f"today:   {command.command(today)}"]
        lines += [f"  {change}" for change in command.difference(today, planned)] or ["  no difference"]
        lines += [f"  note: {note}" for note in (*command.notes(plan, planned), *command.refused(plan, today), *command.warnings(today))]
    return lines


def explained(files: Sequence[Path], as_json: bool = False) -> str:
    """Return what `--diff OLD NEW` prints: why the plans differ, each cause planned anew where that can be done."""
    old, new = map(planning.stored, files)
    found = compared(old, new)
    return json.dumps(dataclasses.asdict(found), indent=1) if as_json else "\n".join(difference.in_words(found))


def compared(
    old: Plan, new: Plan, given: planner.Request | None = None, executor: Executor | workers.Local | None = None
) -> Difference:  # fmt: skip
    """Return the difference of two plans, with what no record holds (headroom, term, prices …) as `given` for the new one.

    From the records alone, and why, where nothing can be planned between the two.
    """
    if old.stages and new.stages:
        return difference.by_stages(old, new)
    if old.stages or new.stages:
        return dataclasses.replace(
            difference.by_record(old, new), steps=(), method="the cost alone: one of the two is of several stages, so no cause is shared"
        )
    if old.apart or new.apart:
        return dataclasses.replace(
            difference.by_record(old, new), steps=(), method="the cost alone: prefill and decode are two pools in one of them"
        )
    if given is not None and given.trace is not None:
        ends = difference.by_record(old, new)
        return dataclasses.replace(ends, method=f"{ends.method}, because the new plan is of a trace, which no record holds")
    try:
        return difference.by_replanning(old, new, functools.partial(replanned, given=given), executor)
    except (Infeasible, BadInput) as error:  # such as the new limits on the old GPU: only the two ends are known then
        ends = difference.by_record(old, new)
        return dataclasses.replace(ends, method=f"{ends.method}, because a step between them has no plan: {error}")


def replanned(inputs: Inputs, given: planner.Request | None = None) -> Figures:
    """Return the figures of a plan made anew from the inputs of a record, on its GPU, at the record's price of a device."""
    base = given or planner.Request(model=inputs.model, workload=inputs.workload, slo=())
    made = planner.plan(
        planner.Request(
            headroom=base.headroom,
            term=base.term,
            market=base.market,
            routing=base.routing,
            seed=base.seed,
            model=inputs.model,
            workload=inputs.workload,
            slo=slo.parse(inputs.slo),
            gpus=() if inputs.profile else (inputs.gpu,),
            precisions=() if inputs.profile else (inputs.precision,),
            profiles=(inputs.profile,) if inputs.profile else (),
            max_batch=inputs.max_batch,
            max_step_tokens=inputs.max_step_tokens,
            zones=inputs.zones,
            survive_zone=inputs.survive_zone,
        )
    )
    own_usd, usd = difference.inputs_of(made).usd_per_device_h, inputs.usd_per_device_h
    cost = None if own_usd is None or usd is None or made.usd_per_hour is None else made.usd_per_hour * usd / own_usd
    return Figures(replicas=made.replicas, gpus=made.gpus, usd_per_hour=cost)
