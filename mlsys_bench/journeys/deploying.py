"""A plan on its way to production: written as manifests, set beside what runs today, and two plans set side by side."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from mlsys_bench import plan as planner
from mlsys_bench import record, slo
from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.plan import command, difference, manifests
from mlsys_bench.plan.difference import Difference, Figures, Inputs
from mlsys_bench.types import Plan


def told(plan: object, asked: str | None, today: str | None) -> str:
    """Return what follows a plan: today's deployment beside it, and where the manifest was written."""
    return "\n".join([*(beside(plan, today) if today else ()), *([exported(plan, asked)] if asked else ())])


def exported(plan: object, asked: str, engine: str = "vllm") -> str:
    """Write what `--export KIND[:DIR]` asks for and return where it is.  Raises BadInput for a plan of several stages."""
    from mlsys_bench.plan import export

    if not isinstance(plan, Plan):
        raise BadInput(f"--export {asked}: manifests are of plans of one model; export its LLM stage on its own")
    return f"wrote {export.write(asked, export.release(plan, engine, secured=plan.secured, scaled=plan.scaled))}"  # type: ignore[arg-type]


def beside(plan: object, text: str) -> list[str]:
    """Return the plan's own command line, what of today's was not understood, and the difference of the two, a line each."""
    if not isinstance(plan, Plan):
        raise BadInput("--from-deployment: one engine is compared with the plan of one model")
    lines = []
    for today in manifests.read(text):
        planned = command.of_plan(plan, today.engine)
        lines += [f"planned: {command.command(planned)}", f"today:   {command.command(today)}"]
        lines += [f"  {change}" for change in command.difference(today, planned)] or ["  no difference"]
        lines += [f"  note: {note}" for note in (*command.notes(plan, planned), *command.warnings(today))]
    return lines


def explained(files: Sequence[Path], as_json: bool = False) -> str:
    """Return what `--diff OLD NEW` prints: why the plans differ, each cause planned anew where that can be done."""
    found = compared(*(record.read(path, Plan) for path in files))
    return json.dumps(dataclasses.asdict(found), indent=1) if as_json else "\n".join(difference.in_words(found))


def compared(old: Plan, new: Plan) -> Difference:
    """Return the difference of two plans; from the records alone, and why, where a step between the two has no plan."""
    try:
        return difference.by_replanning(old, new, replanned)
    except (Infeasible, BadInput) as error:  # such as the new limits on the old GPU: only the two ends are known then
        ends = difference.by_record(old, new)
        return dataclasses.replace(ends, method=f"{ends.method}, because a step between them has no plan: {error}")


def replanned(inputs: Inputs) -> Figures:
    """Return the figures of a plan made anew from the inputs of a record, on its GPU, at the record's price of a device."""
    made = planner.plan(
        planner.Request(
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
