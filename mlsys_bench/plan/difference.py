"""Why one plan differs from another: its inputs replaced one cause at a time, in a stated order, the plan made anew after each.

The steps telescope: their changes add up to the whole.  A cause's share depends on the order when causes act together, so the order is
fixed and told: traffic, lengths, limits, model, engine, hardware, price.  What remains between the last step and the new plan (a headroom,
a term or a catalogue that records do not hold) is its own line.

From two records alone, without planning anew, the same in three factors: traffic at the load a replica had, what a replica carries, price.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from mlsys_bench import units, workers
from mlsys_bench.types import LatencyProfile, Plan, Provenance, StagePlan, Workload
from mlsys_bench.workload import show_lengths

ORDER = ("traffic", "lengths", "limits", "model", "engine", "hardware", "price")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a plan is made from, as far as its record tells."""

    workload: Workload
    slo: str
    model: str
    precision: str
    max_batch: int
    max_step_tokens: int | None
    profile: LatencyProfile | None  # None: the roofline
    gpu: str
    layout: tuple[int, int, int, int]  # tp, pp, ep, attention dp
    usd_per_device_h: float | None
    zones: int = 1  # that its spares are spread over
    survive_zone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What comes out."""

    replicas: int
    gpus: int
    usd_per_hour: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One cause: what it changed in words, and the figures after it."""

    cause: str
    changes: tuple[str, ...]
    after: Figures
    replicas: int  # added by it
    usd_per_hour: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two plans, and the steps from one to the other."""

    old: Figures
    new: Figures
    steps: tuple[Step, ...]
    method: str


Replan = Callable[[Inputs], Figures]


def inputs_of(plan: Plan) -> Inputs:
    """Return what a plan record tells of its inputs; of a mixed fleet those of its first kind."""
    item = plan.fleet[0]
    own = plan.profile.provenance in (Provenance.MEASURED, Provenance.CALIBRATED)
    usd = plan.usd_per_hour
    return Inputs(
        workload=plan.workload,
        slo=plan.slo,
        model=plan.model,
        precision=item.precision,
        max_batch=plan.max_batch,
        max_step_tokens=plan.max_step_tokens,
        profile=plan.profile if own else None,
        gpu=item.gpu,
        layout=(item.tp, item.pp, item.ep, item.attention_dp),
        usd_per_device_h=None if usd is None or not plan.prices else plan.prices[0].usd_per_h / plan.prices[0].devices,
        zones=len(plan.secured.zones) if plan.secured else 1,
        survive_zone=plan.secured is not None and plan.secured.survives_zone,
    )


def figures_of(plan: Plan) -> Figures:
    """Return the figures of a plan."""
    return Figures(replicas=plan.replicas, gpus=plan.gpus, usd_per_hour=plan.usd_per_hour)


def by_replanning(old: Plan, new: Plan, replan: Replan, executor: Executor | workers.Local | None = None) -> Difference:
    """Return the steps from one plan to the other, each planned anew with one more cause taken from the new one."""
    current, after = inputs_of(old), inputs_of(new)
    start, end = figures_of(old), figures_of(new)
    legs: list[tuple[str, tuple[str, ...], Inputs]] = []
    for cause in ORDER:
        changes = tuple(changes_in(cause, current, after))
        if changes:
            current = replaced(cause, current, after)
            legs.append((cause, changes, current))
    steps, figures = list[Step](), start
    found = workers.each(_replanned, [inputs for _, _, inputs in legs], shared=replan, executor=executor)
    for (cause, changes, _), reached in zip(legs, found, strict=True):
        steps.append(_step(cause, changes, figures, reached))
        figures = reached
    if not _alike(figures, end):
        told = ("what the records do not hold: headroom, term, catalogue, or the search itself",)
        steps.append(_step("remainder", told, figures, end))
    return Difference(old=start, new=end, steps=tuple(steps), method=f"planned anew after each cause, in the order {', '.join(ORDER)}")


def _replanned(replan: Replan, inputs: Inputs) -> Figures:
    return replan(inputs)


def by_stages(old: Plan, new: Plan) -> Difference:
    """Return the change of each stage of two plans of stage graphs, as their records have them; the name of the stage is the cause."""
    start, end = figures_of(old), figures_of(new)
    before, after = ({stage.stage: stage for stage in plan.stages} for plan in (old, new))
    rates = (old.workload.rate_per_s, new.workload.rate_per_s)
    steps, figures = list[Step](), start
    for name in dict.fromkeys([*before, *after]):
        then, now = before.get(name), after.get(name)
        replicas = (0 if now is None else now.replicas * now.shards) - (0 if then is None else then.replicas * then.shards)
        ends = [None if stage is None else stage.usd_per_hour for stage in (then, now)]
        usd = (
            None if any(stage is not None and stage.usd_per_hour is None for stage in (then, now)) else (ends[1] or 0.0) - (ends[0] or 0.0)
        )
        if not replicas and not usd:
            continue
        reached = Figures(
            replicas=figures.replicas + replicas,
            gpus=end.gpus,  # a stage of vCPUs has none, and no record says which stage has which
            usd_per_hour=None if usd is None or figures.usd_per_hour is None else figures.usd_per_hour + usd,
        )
        steps.append(_step(name, tuple(_stage_changes(then, now, rates)), figures, reached))
        figures = reached
    if not _alike(figures, end):
        steps.append(_step("remainder", ("what stages share: machines filled together, spares, rounding",), figures, end))
    return Difference(old=start, new=end, steps=tuple(steps), method="by stage, from the two records, nothing planned anew")


def _stage_changes(then: StagePlan | None, now: StagePlan | None, rates: tuple[float, float]) -> Iterator[str]:
    """Yield what is another at a stage: its calls, the time of each, how busy it is."""
    if then is None or now is None:
        yield "a stage that was not there" if then is None else "a stage that is gone"
        return
    told = (
        ("calls", units.show_rate(then.calls * rates[0]), units.show_rate(now.calls * rates[1])),
        ("each takes", units.show_s(then.service_s), units.show_s(now.service_s)),
        ("busy", f"{100 * then.utilisation:.0f} %", f"{100 * now.utilisation:.0f} %"),
    )
    yield from (f"{name}: {a} -> {b}" for name, a, b in told if a != b)


def by_record(old: Plan, new: Plan) -> Difference:
    """Return the change in three factors that the records alone tell: traffic, what a replica carries, price of a replica.

    Traffic: replicas in proportion, rounded up, at the old price.  Then the new number of replicas at the old price of one; then its price.
    """
    before, after = inputs_of(old), inputs_of(new)
    start, end = figures_of(old), figures_of(new)
    scaled = math.ceil(old.replicas * new.workload.rate_per_s / old.workload.rate_per_s - 1e-9)
    each_usd = None if old.usd_per_hour is None else old.usd_per_hour / old.replicas
    carried = tuple(line for cause in ORDER[1:-1] for line in changes_in(cause, before, after))
    legs = (
        ("traffic", tuple(changes_in("traffic", before, after)), scaled),
        ("what a replica carries", carried or ("the same inputs: rounding, or the search",), new.replicas),
    )
    steps, figures = list[Step](), start
    for cause, changes, replicas in legs:
        usd = None if each_usd is None else replicas * each_usd
        reached = Figures(replicas=replicas, gpus=replicas * old.devices_per_replica, usd_per_hour=usd)
        if reached.replicas != figures.replicas or (cause == "traffic" and changes):
            steps.append(_step(cause, changes, figures, reached))
            figures = reached
    if figures != end:
        price = tuple(changes_in("price", before, after)) or ("a replica costs another share of its instances",)
        steps.append(_step("price of a replica", price, figures, end))
    return Difference(old=start, new=end, steps=tuple(steps), method="from the two records, nothing planned anew")


def replaced(cause: str, current: Inputs, new: Inputs) -> Inputs:
    """Return the inputs with one cause taken from the new ones."""
    then, now = current.workload, new.workload
    lengths = {name: getattr(now, name) for name in ("prompt_tokens", "output_tokens", "length_correlation", "prefix_hit_share")}
    old_lengths = {name: getattr(then, name) for name in lengths}
    made: dict[str, Callable[[], Inputs]] = {
        "traffic": lambda: replace(current, workload=replace(now, **old_lengths)),
        "lengths": lambda: replace(current, workload=replace(then, **lengths)),
        "limits": lambda: replace(current, slo=new.slo, zones=new.zones, survive_zone=new.survive_zone),
        "model": lambda: replace(current, model=new.model, profile=new.profile, layout=new.layout),
        "engine": lambda: replace(
            current, precision=new.precision, max_batch=new.max_batch, max_step_tokens=new.max_step_tokens, profile=new.profile
        ),
        "hardware": lambda: replace(current, gpu=new.gpu, layout=new.layout, profile=new.profile),
        "price": lambda: replace(current, usd_per_device_h=new.usd_per_device_h),
    }
    return made[cause]()


def changes_in(cause: str, old: Inputs, new: Inputs) -> Iterator[str]:
    """Yield what a cause changes, a line each; nothing where it changes nothing."""
    then, now = old.workload, new.workload
    told: dict[str, list[tuple[str, object, object]]] = {
        "traffic": [("rate", units.show_rate(then.rate_per_s), units.show_rate(now.rate_per_s)), ("arrivals", then.arrivals, now.arrivals)],
        "lengths": [
            ("prompt tokens", show_lengths(then.prompt_tokens), show_lengths(now.prompt_tokens)),
            ("output tokens", show_lengths(then.output_tokens), show_lengths(now.output_tokens)),
            ("correlation of lengths", then.length_correlation, now.length_correlation),
            ("prefix hits", then.prefix_hit_share, now.prefix_hit_share),
        ],
        "limits": [
            ("limits", old.slo, new.slo),
            ("zones", old.zones, new.zones),
            ("any zone may go", old.survive_zone, new.survive_zone),
        ],
        "model": [("model", old.model, new.model)],
        "engine": [
            ("precision", old.precision, new.precision),
            ("sequences at once", old.max_batch, new.max_batch),
            ("tokens a step", old.max_step_tokens, new.max_step_tokens),
            ("step times", *_profiles(old, new)),
        ],
        "hardware": [("GPU", old.gpu, new.gpu), ("tp, pp, ep, dp", old.layout, new.layout)],
        "price": [("price of a device", _usd(old.usd_per_device_h), _usd(new.usd_per_device_h))],
    }
    yield from (f"{name}: {a} -> {b}" for name, a, b in told[cause] if a != b)


def in_words(found: Difference) -> list[str]:
    """Return the difference a line each: the whole, every cause with its share, and how it was found."""
    lines = [f"{_show(found.old)} -> {_show(found.new)} ({_delta(found.new.replicas - found.old.replicas, _less(found.new, found.old))})"]
    for step in found.steps:
        lines.append(f"  {step.cause}: {_delta(step.replicas, step.usd_per_hour)}")
        lines += [f"    {change}" for change in step.changes]
    return [*lines, f"  ({found.method})"]


# ---------------------------------------------------------------- parts


def _step(cause: str, changes: tuple[str, ...], before: Figures, after: Figures) -> Step:
    return Step(cause=cause, changes=changes, after=after, replicas=after.replicas - before.replicas, usd_per_hour=_less(after, before))


def _alike(a: Figures, b: Figures) -> bool:
    """Say whether two figures are one but for the rounding of sums."""
    if (a.replicas, a.gpus) != (b.replicas, b.gpus) or a.usd_per_hour is None or b.usd_per_hour is None:
        return a == b
    return math.isclose(a.usd_per_hour, b.usd_per_hour, rel_tol=1e-6)


def _less(after: Figures, before: Figures) -> float | None:
    return None if after.usd_per_hour is None or before.usd_per_hour is None else after.usd_per_hour - before.usd_per_hour


def _profiles(old: Inputs, new: Inputs) -> tuple[str, str]:
    """Return how step times are known; two fits of one layout that differ are two."""
    names = tuple(
        "roofline" if p is None else f"{p.provenance} in {p.layout.precision} on {p.layout.device}" for p in (old.profile, new.profile)
    )
    if names[0] == names[1] and old.profile != new.profile:
        return names[0], f"another fit, {names[1]}"
    return names[0], names[1]


def _usd(value: float | None) -> str:
    return "unpriced" if value is None else f"{units.show_usd(value)}/h"


def _show(figures: Figures) -> str:
    return f"{units.count(figures.replicas, 'replica')}, {units.count(figures.gpus, 'GPU')}, {_usd(figures.usd_per_hour)}"


def _delta(replicas: int, usd: float | None) -> str:
    money = "price unknown" if usd is None else f"{'-' if usd < 0 else '+'}{units.show_usd(abs(usd))}/h"
    return f"{replicas:+d} {'replica' if abs(replicas) == 1 else 'replicas'}, {money}"
