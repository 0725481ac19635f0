"""plan: from options as typed to a record."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlsys_bench import hardware, latency, models, record, slo, units, workload
from mlsys_bench import plan as planner
from mlsys_bench.errors import BadInput
from mlsys_bench.fleets import Fleet, FleetPlan
from mlsys_bench.journeys import surroundings
from mlsys_bench.plan import confirm, costs, course, tenants, trial
from mlsys_bench.pricing import Market
from mlsys_bench.types import SLO, Bench, LatencyProfile, Plan, Scenario, Workload

if TYPE_CHECKING:
    from mlsys_bench.plan.fleets import FleetRequest
    from mlsys_bench.plan.graph import GraphRequest

DEFAULT_PROMPT = "lognormal:512:1:8192"
DEFAULT_OUTPUT = "lognormal:128:1:1024"
DEFAULT_SLO = "ttft_p95<500ms,tpot_p95<50ms"


def stored(file: Path) -> Plan:
    """Return the plan of a record.  Raises BadInput, naming the file, where its figures cannot be."""
    plan = record.read(file, Plan)
    try:
        return costs.check(plan)
    except BadInput as error:
        raise BadInput(f"{file}: {error}; make the plan again") from error


def profiles(files: Sequence[Path]) -> tuple[LatencyProfile, ...]:
    """Return the profiles of `--from` files: profiles as they are, bench files fitted.  Raises BadInput for a layout bound twice."""
    found = [_profile(path) for path in files]
    for i, profile in enumerate(found):
        if profile.layout in [other.layout for other in found[:i]]:
            raise BadInput(f"--from {files[i]}: its layout is bound twice; give one profile per layout")
    return tuple(found)


def _profile(path: Path) -> LatencyProfile:
    path = measured_file(path)  # STAGE=FILE: a scenario of one stage has one name for it, and any will do
    stored, value = record.load(path)
    if isinstance(value, LatencyProfile):
        return value
    if isinstance(value, Bench):
        return latency.fit(value)
    raise BadInput(f"--from {path}: holds a {stored.kind!r} record; a profile or a bench file is needed")


def measured_file(given: Path) -> Path:
    """Return the file of `--from FILE` or `--from STAGE=FILE`."""
    return Path(str(given).partition("=")[2]) if "=" in str(given) and not given.exists() else given


def ask(
    *,
    scenario: str | None,
    qps: float | None,
    measured: Sequence[Path],
    model: str | None,
    gpu: str | None,
    precision: str | None,
    slo: str | None,
    arrivals: str | None,
    prompt_tokens: str | None,
    output_tokens: str | None,
    max_batch: int | None,
    headroom: str | None,
    term: str,
    seed: int,
    trace: Path | None = None,
    speed: float = 1.0,
    routing: str = "random",
    prices: Path | None = None,
    availability: str | None = None,
    zones: int | None = None,
    survive: bool = False,
    autoscale: bool = False,
    growth: str | None = None,
    mixed: bool = False,
    disaggregate: str = "never",
    spot: str | None = None,
) -> planner.Request:
    """Return what a plan is asked for: the scenario's values, overridden by measured ones and by flags, completed by defaults."""
    base = _scenario(scenario)
    _check_trace(trace, arrivals, prompt_tokens, output_tokens)
    seen, files = traffic_files(measured, trace)
    replayed = replays(trace, seen, qps, speed)
    own = profiles(files)
    which = _model(model, base, own)
    asked = traffic(seen or (base.workload if base else None), qps, arrivals, prompt_tokens, output_tokens, speed)
    named = [tenant.name for tenant in asked.tenants] if replayed is None or replayed.tenant is None else replayed.tenants
    return planner.Request(
        model=which,
        workload=asked,
        slo=surroundings.promised(_limits(slo, base, named), availability),
        limits_assumed=not slo and base is None,
        gpus=_names(gpu, "--gpu") or _gpus(base, own),
        precisions=_names(precision, "--precision") or _precisions(base, own),
        profiles=own,
        max_batch=max_batch or (base.max_batch if base else None),
        headroom=units.fraction(headroom, "--headroom") if headroom else _headroom(base, replayed),
        term=term,
        seed=seed,
        routing=routing,
        trace=replayed,
        market=None if prices is None else market(prices),
        mixed=mixed,
        **surroundings.pools_apart(disaggregate),
        **surroundings.asked(zones, survive, autoscale, growth, spot),
    )


def market(prices: Path) -> Market:
    """Return the prices of a contract."""
    from mlsys_bench.pricing import contract

    return contract.read(prices, lambda name: hardware.find(name).id, datetime.date.today().isoformat())


def _scenario(name: str | None) -> Scenario | None:
    if name is None:
        return None
    from mlsys_bench import scenario

    found = scenario.load(name)
    if not isinstance(found, Scenario):
        what = "is a fleet of several scenarios" if isinstance(found, Fleet) else "has several stages"
        raise BadInput(f"{name} {what}: `mlsys plan {name}` plans them; this command runs one language model")
    return found


def _model(model: str | None, base: Scenario | None, own: Sequence[LatencyProfile]) -> str:
    if model:
        return models.find(model).id
    if base is not None:
        return base.model
    if own:
        return own[0].layout.model
    raise BadInput("no model: give --model NAME, a scenario, or --from a measured profile (`mlsys catalog models` lists names)")


def replays(trace: Path | None, seen: Workload | None, qps: float | None, speed: float) -> workload.Schedule | None:
    """Return the requests of a trace as the fleet will get them, faster by `speed` or at the rate asked for, each at a time of its own."""
    if trace is None:
        if speed != 1:
            raise BadInput("--speed plays a trace faster; give --trace FILE, or --qps for traffic of a law")
        return None
    if qps is not None and speed != 1:
        raise BadInput("--qps and --speed both say how fast the trace is played; give one")
    return workload.opened(workload.from_trace(trace, speed=speed, rate_per_s=qps))


def _headroom(base: Scenario | None, replayed: workload.Schedule | None) -> float:
    """Return the share of capacity kept free where none is asked for: none beside a trace, whose peaks are in it."""
    return 0.0 if replayed is not None else base.headroom if base else 0.2


def _names(text: str | None, option: str) -> tuple[str, ...]:
    if text is None:
        return ()
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise BadInput(f"{option} {text!r} names none; name one or more, or leave it out")
    return found


def _gpus(base: Scenario | None, own: Sequence[LatencyProfile]) -> tuple[str, ...]:
    """Leave the choice to the measured layouts when there are any: a profile is of one device."""
    return base.gpus if base and not own else ()


def _precisions(base: Scenario | None, own: Sequence[LatencyProfile]) -> tuple[str, ...]:
    return base.precision if base and not own else ()


def _limits(text: str | None, base: Scenario | None, names: Sequence[str]) -> SLO:
    if base is None:
        return slo.parse(text or DEFAULT_SLO)
    return tenants.overridden(slo.parse(text), base.slo, names) if text else base.slo


def _check_trace(trace: Path | None, arrivals: str | None, prompt_tokens: str | None, output_tokens: str | None) -> None:
    """Raise BadInput for a law of arrivals or lengths beside a trace, which is replayed as it came."""
    laws = {"--arrivals": arrivals, "--prompt-tokens": prompt_tokens, "--output-tokens": output_tokens}
    also = [name for name, value in laws.items() if value]
    if trace is not None and also:
        raise BadInput(f"--trace brings its own traffic; {' and '.join(also)} would change it: leave one of them out")


def traffic_files(measured: Sequence[Path], trace: Path | None) -> tuple[Workload | None, list[Path]]:
    """Return the traffic that a trace or a workload record among the `--from` files brings, and the files that are left."""
    found = [(path, value) for path in measured if (value := _workload(path)) is not None]
    if len(found) + (trace is not None) > 1:
        raise BadInput(
            f"the traffic is given {len(found) + (trace is not None)} times; give one --trace or one workload record with --from"
        )
    rest = [path for path in measured if path not in [named for named, _ in found]]
    if trace is not None:
        from mlsys_bench.workload import observe
        from mlsys_bench.workload.trace import read

        return observe.of_trace(read(trace), trace), rest
    return (found[0][1] if found else None), rest


def _workload(path: Path) -> Workload | None:
    if path.suffix != ".json" or not path.is_file():
        return None
    _, value = record.load(path)
    return value if isinstance(value, Workload) else None


def traffic(
    base: Workload | None,
    qps: float | None,
    arrivals: str | None,
    prompt_tokens: str | None,
    output_tokens: str | None,
    speed: float = 1.0,
) -> Workload:
    """Return the traffic: the scenario's or what was seen, overridden by flags, or assumed defaults that say so."""
    if base is None and qps is None:
        raise BadInput("no traffic: give --qps R, a scenario, or --from a workload record")
    if base is None:
        guessed = [name for name, given in (("prompt", prompt_tokens), ("output", output_tokens)) if not given]
        source = f"{' and '.join(guessed)} lengths are defaults; give your own" if guessed else "given on the command line"
        return workload.synthetic(
            workload.checked_rate(qps or 0.0),
            arrivals=arrivals or "poisson",
            prompt=prompt_tokens or DEFAULT_PROMPT,
            output=output_tokens or DEFAULT_OUTPUT,
            source=source,
        )
    if base.tenants and (prompt_tokens or output_tokens):
        raise BadInput(
            "--prompt-tokens and --output-tokens: the traffic has tenants with lengths of their own; change them in the scenario"
        )
    changed = dataclasses.replace(
        base,
        rate_per_s=base.rate_per_s * speed if qps is None else workload.checked_rate(qps),
        arrivals=arrivals or base.arrivals,
        prompt_tokens=workload.parse_lengths(prompt_tokens) if prompt_tokens else base.prompt_tokens,
        output_tokens=workload.parse_lengths(output_tokens) if output_tokens else base.output_tokens,
        observed=None,  # what was seen stays in its own record
    )
    workload.parse_arrivals(changed.arrivals)
    return changed


def asked(**options: Any) -> planner.Request | GraphRequest | FleetRequest:
    """Return what a plan is asked for, of one model, of a scenario of several stages, or of several scenarios on one pool."""
    for name in ("slo", "arrivals", "prompt_tokens", "output_tokens", "headroom", "availability", "growth", "spot"):
        if (value := options.get(name)) is not None and not value.strip():
            raise BadInput(f"--{name.replace('_', '-')} {value!r} says nothing; write a value, or leave the option out for the default")
    if not options.get("scenario"):
        return ask(**options)
    from mlsys_bench import scenario

    found = scenario.load(options["scenario"])
    if isinstance(found, Fleet):
        from mlsys_bench.journeys import fleets

        return fleets.asked(found, options)
    if isinstance(found, Scenario):
        return ask(**options)
    from mlsys_bench.journeys import graph_plans

    return graph_plans.asked(options) or ask(**options)


def answer(request: planner.Request | GraphRequest | FleetRequest, executor: Executor | None = None) -> Plan | FleetPlan:
    """Return the plan of whatever was asked for."""
    if isinstance(request, planner.Request):
        return plan(request, executor)
    from mlsys_bench.plan.fleets import FleetRequest, plan_fleet

    return plan_fleet(request, executor) if isinstance(request, FleetRequest) else plan(request, executor)


def exit_status(made: Plan | FleetPlan) -> int:
    """Return 1 where a pool is too small to serve every scenario of a fleet in full, or a fleet of one model misses a limit after all."""
    if isinstance(made, FleetPlan):
        return 0 if made.is_whole else 1
    from mlsys_bench.report import plans

    return 1 if not made.stages and plans.missed(made) else 0


def plan(request: planner.Request | GraphRequest, executor: Executor | None = None) -> Plan:
    """Return the plan for the busiest time of the traffic; what that leaves out of the traffic stands among the assumptions."""
    if not isinstance(request, planner.Request):
        from mlsys_bench.plan.graph import plan_graph

        return plan_graph(request, executor)
    peak = request.workload if request.trace is not None else workload.at_peak(request.workload)
    made = planner.plan(dataclasses.replace(request, workload=peak, day=None if peak is request.workload else request.workload), executor)
    more = _traffic_assumptions(request.workload, peak, request.trace is not None)
    return dataclasses.replace(made, assumptions=(*made.assumptions, *more))


def _traffic_assumptions(given: Workload, peak: Workload, replayed: bool) -> Iterator[str]:
    if peak is not given:
        mean_per_s = course.of(given).mean_per_s  # of stages written as multiples of a rate, that rate is not the mean
        yield f"sized for the busiest time of day or stage: {peak.rate_per_s:.4g}/s where the mean is {mean_per_s:.4g}/s"
    for bursts in () if replayed else workload.parse_arrivals(peak.arrivals).bursts:  # a trace is played as it came
        cycle = units.show_s(bursts.burst_s + bursts.calm_s)
        most = trial.BATCHES * confirm.REQUESTS
        yield f"bursts come every {cycle} on average, the plan simulates {most:,} requests a replica at most: `mlsys simulate` runs longer"
    if not given.prefix_hit_share:
        return
    seen = f"the {100 * given.prefix_hit_share:.0f} % seen"
    if replayed:
        yield f"what a replica still has of {seen} before in prompts is not computed again; capacity and utilisation count every token"
    else:
        yield f"every prompt token is computed: {seen} in prefix caches would need less"
