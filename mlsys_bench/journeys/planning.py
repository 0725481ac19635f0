"""fit, plan, simulate: from options as typed to a record."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mlsys_bench import hardware, latency, models, record, slo, units, workload
from mlsys_bench import plan as planner
from mlsys_bench.errors import BadInput
from mlsys_bench.types import SLO, Bench, LatencyProfile, LoadTest, Plan, Requests, Scenario, Validity, Workload

DEFAULT_PROMPT = "lognormal:512:1:8192"
DEFAULT_OUTPUT = "lognormal:128:1:1024"
DEFAULT_SLO = "ttft_p95<500ms,tpot_p95<50ms"


def fit(files: Sequence[Path]) -> LatencyProfile:
    """Return the profile of the engine steps in these bench files."""
    if not files:
        raise BadInput("mlsys fit: name at least one bench file; `mlsys bench gpu -o bench.json` makes one")
    twice = [str(path) for i, path in enumerate(files) if path in files[:i]]
    if twice:
        raise BadInput(f"mlsys fit: {twice[0]} is named twice; its samples would count double")
    measurements = [m for path in files for m in record.read(path, Bench).measurements]
    return latency.fit(Bench(measurements=tuple(measurements)))


def profiles(files: Sequence[Path]) -> tuple[LatencyProfile, ...]:
    """Return the profiles of `--from` files: profiles as they are, bench files fitted.  Raises BadInput for a layout bound twice."""
    found = [_profile(path) for path in files]
    for i, profile in enumerate(found):
        if profile.layout in [other.layout for other in found[:i]]:
            raise BadInput(f"--from {files[i]}: its layout is bound twice; give one profile per layout")
    return tuple(found)


def _profile(path: Path) -> LatencyProfile:
    if not path.exists() and "=" in str(path):
        path = Path(str(path).partition("=")[2])  # STAGE=FILE: today's scenarios have one stage
    stored, value = record.load(path)
    if isinstance(value, LatencyProfile):
        return value
    if isinstance(value, Bench):
        return latency.fit(value)
    raise BadInput(f"--from {path}: holds a {stored.kind!r} record; a profile or a bench file is needed")


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
) -> planner.Request:
    """Return what a plan is asked for: the scenario's values, overridden by flags, completed by defaults."""
    base = _scenario(scenario)
    own = profiles(measured)
    return planner.Request(
        model=_model(model, base, own),
        workload=traffic(base, qps, arrivals, prompt_tokens, output_tokens),
        slo=_limits(slo, base),
        gpus=_names(gpu) or _gpus(base, own),
        precisions=_names(precision) or _precisions(base, own),
        profiles=own,
        max_batch=max_batch or (base.max_batch if base else planner.MAX_BATCH),
        headroom=units.fraction(headroom, "--headroom") if headroom else (base.headroom if base else 0.2),
        term=term,
        seed=seed,
    )


def _scenario(name: str | None) -> Scenario | None:
    if name is None:
        return None
    from mlsys_bench import scenario

    return scenario.load(name)


def _model(model: str | None, base: Scenario | None, own: Sequence[LatencyProfile]) -> str:
    if model:
        return models.find(model).id
    if base is not None:
        return base.model
    if own:
        return own[0].layout.model
    raise BadInput("no model: give --model NAME, a scenario, or --from a measured profile (`mlsys catalog models` lists names)")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


def _gpus(base: Scenario | None, own: Sequence[LatencyProfile]) -> tuple[str, ...]:
    """Leave the choice to the measured layouts when there are any: a profile is of one device."""
    return base.gpus if base and not own else ()


def _precisions(base: Scenario | None, own: Sequence[LatencyProfile]) -> tuple[str, ...]:
    return base.precision if base and not own else ()


def _limits(text: str | None, base: Scenario | None) -> SLO:
    if text:
        return slo.parse(text)
    return base.slo if base else slo.parse(DEFAULT_SLO)


def traffic(
    base: Scenario | None, qps: float | None, arrivals: str | None, prompt_tokens: str | None, output_tokens: str | None
) -> Workload:
    """Return the traffic: the scenario's, overridden by flags, or assumed defaults that say so."""
    if base is None and qps is None:
        raise BadInput("no traffic: give --qps R, or a scenario")
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
    changed = dataclasses.replace(
        base.workload,
        rate_per_s=base.workload.rate_per_s if qps is None else workload.checked_rate(qps),
        arrivals=arrivals or base.workload.arrivals,
        prompt_tokens=workload.parse_lengths(prompt_tokens) if prompt_tokens else base.workload.prompt_tokens,
        output_tokens=workload.parse_lengths(output_tokens) if output_tokens else base.workload.output_tokens,
    )
    workload.parse_arrivals(changed.arrivals)
    return changed


def plan(request: planner.Request) -> Plan:
    """Return the plan."""
    return planner.plan(request)


def simulate(request: planner.Request, *, replicas: int, routing: str, duration: str, out: Path | None) -> LoadTest:
    """Return what users of one design would see; write the summary and the requests when asked."""
    from mlsys_bench import simulate as simulator
    from mlsys_bench import summary

    candidate = _one_design(request)
    duration_s = units.seconds(duration, "--duration")
    schedule = workload.schedule(request.workload, duration_s=duration_s, seed=request.seed)
    if not len(schedule.scheduled_s):
        raise BadInput(f"--duration {duration}: no request arrives in that time at {request.workload.rate_per_s:g}/s")
    run = simulator.run(schedule, candidate.profile, candidate.limits, replicas=replicas, routing=routing, seed=request.seed)
    requests_file = out.with_suffix(".parquet") if out else None
    result = summary.summarise(
        run.requests,
        source="simulation",
        target=f"{replicas} x {candidate.name}, {routing} routing",
        arrivals=request.workload.arrivals,
        offered_rate_per_s=request.workload.rate_per_s,
        slo=request.slo,
        validity=Validity(verdict="valid", reasons=(f"a simulation; the clock is a {candidate.profile.provenance.value} profile",)),
        window=run.window,
        requests_file=requests_file.name if requests_file else None,
    )
    if out and requests_file:
        machine = hardware.machine()
        record.write(requests_file, Requests(t0_unix_s=0.0, requests=run.requests), machine)
        record.write(out, result, machine, [requests_file])
    return result


def _one_design(request: planner.Request) -> planner.Candidate:
    """Return the design to simulate: the narrowest that fits of the one GPU and precision asked for."""
    fitting, misfits = planner.every_candidate(planner.check(request))
    kinds = sorted({(c.gpu, c.precision) for c in fitting})
    if not fitting:
        raise BadInput(f"nothing to simulate: {misfits[0].why_not}" if misfits else "nothing to simulate: name a --gpu")
    if len(kinds) > 1:
        raise BadInput(f"simulate takes one design; choose one of {', '.join(f'--gpu {g} --precision {p}' for g, p in kinds[:4])} …")
    return min(fitting, key=lambda c: c.tp)
