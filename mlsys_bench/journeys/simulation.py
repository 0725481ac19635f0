"""simulate: from options as typed to what users of one design would see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlsys_bench import hardware, record, units, workers, workload
from mlsys_bench import plan as planner
from mlsys_bench.errors import INTERRUPTED, BadInput
from mlsys_bench.journeys import around, planning
from mlsys_bench.journeys.progress import Line
from mlsys_bench.types import STOPPED, LoadTest, Requests
from mlsys_bench.units import count

if TYPE_CHECKING:
    from mlsys_bench.simulate import Simulation
    from mlsys_bench.workload import Schedule

DURATION = "300s"
ROUNDS = 20  # requests of each user of a closed loop, unless --requests says otherwise
LEAST = 500  # of all users


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The options of `mlsys simulate`, as typed."""

    scenario: str | None = None
    qps: float | None = None
    arrivals: str | None = None
    prompt_tokens: str | None = None
    output_tokens: str | None = None
    trace: Path | None = None
    users: int | None = None
    think: str | None = None
    duration: str | None = None
    requests: int | None = None
    runs: int = 1
    seed: int = 0
    measured: Sequence[Path] = ()
    model: str | None = None
    gpu: str | None = None
    precision: str | None = None
    tp: int | None = None
    max_batch: int | None = None
    slo: str | None = None
    replicas: int = 1
    routing: str = "random"
    queue_limit: int | None = None
    timeout: str | None = None
    retries: str | None = None
    failures: str | None = None
    autoscale: str | None = None
    disaggregate: str | None = None
    engine: str | None = None
    batching: str | None = None
    preemption: str | None = None
    prefix_cache: bool = True
    kv_offload: str | None = None
    speculate: str | None = None
    warmup: str | None = None
    cluster: str | None = None
    out: Path | None = None


def simulate(asked: Asked) -> LoadTest:
    """Return what users of one design would see; write the summary and the requests when asked."""
    from mlsys_bench.simulate import outcome

    requests_file = record.requests_beside(asked.out)
    request, candidate = _request(asked), design(asked)
    replayed = _schedule(asked, request, asked.seed) if asked.trace is not None else None  # workers elsewhere have no such file
    runs, stopped = _runs(asked, request, candidate, replayed)
    result = outcome.loadtest(
        runs,
        target=_target(asked, candidate),
        arrivals=_arrivals(asked, request),
        offered_rate_per_s=None if asked.users else _rate_per_s(asked, request, runs[0]),
        slo=request.slo,
        reasons=(*_reasons(asked, candidate), *(replayed.notes if replayed is not None else ())),
        stopped=stopped,
        requests_file=requests_file.name if requests_file else None,
    )
    if asked.out:
        machine, beside = hardware.machine(), [requests_file] if requests_file else []
        for path in beside:
            record.write(path, Requests(t0_unix_s=0.0, requests=runs[0].requests), machine)
        record.write(asked.out, result, machine, beside)
    return result


def exit_status(asked: Asked, result: LoadTest) -> int:
    """Return 1 when a limit that was given is missed, 3 when one cannot be decided, else 0: limits assumed by default promise nothing.

    Runs that a person ended before all were done, and that would have been 0 or 3, are 130.
    """
    given = asked.slo is not None or asked.scenario is not None
    verdicts = set(result.slo_met.values()) if given else set()
    if False in verdicts:
        return 1
    if result.validity.is_stopped:
        return INTERRUPTED
    return 3 if None in verdicts else 0


def _reasons(asked: Asked, candidate: planner.Candidate) -> tuple[str, ...]:
    """Return what the result rests on."""
    engine = around.engine_name(asked, candidate)
    rules = f"limits and rules are the defaults of {engine}" if engine else f"limits: {candidate.memory}"
    return (f"a simulation; the clock is a {candidate.profile.provenance.value} profile", rules)


# ---------------------------------------------------------------- the design


def _request(asked: Asked) -> planner.Request:
    """Return the design and the limits asked for.  A trace or a closed loop brings traffic of its own."""
    _check_traffic(asked)
    own = asked.trace is not None or asked.users is not None
    return planning.ask(
        scenario=asked.scenario, qps=1.0 if own and asked.qps is None else asked.qps, measured=asked.measured, model=asked.model,
        gpu=asked.gpu, precision=asked.precision, slo=asked.slo, arrivals=asked.arrivals, prompt_tokens=asked.prompt_tokens,
        output_tokens=asked.output_tokens, max_batch=asked.max_batch, headroom=None, term="on-demand", seed=asked.seed,
    )  # fmt: skip


def _check_traffic(asked: Asked) -> None:
    """Raise BadInput for options that say two things about the traffic."""
    laws = {"--arrivals": asked.arrivals, "--prompt-tokens": asked.prompt_tokens, "--output-tokens": asked.output_tokens}
    if asked.trace is not None:
        also = [name for name, value in {"--users": asked.users, **laws}.items() if value]
        if also:
            raise BadInput(f"--trace brings its own traffic; {' and '.join(also)} would change it: leave one of them out")
    if asked.users is not None and (asked.qps is not None or asked.arrivals or asked.duration):
        raise BadInput("--users is a closed loop: --qps, --arrivals and --duration belong to an open one; --requests says how long it runs")
    if asked.think is not None and asked.users is None:
        raise BadInput("--think is the pause of users in a closed loop; give --users too")
    if asked.users is not None and (asked.queue_limit is not None or asked.warmup):
        raise BadInput(
            "--queue-limit and --warmup belong to an open loop; users in a closed loop wait, and their first and last rounds are left out"
        )
    if asked.requests is not None and asked.duration is not None:
        raise BadInput("--requests and --duration both say how long a run is; give one")
    drawn = asked.failures or (asked.routing in ("random", "power_of_two") and asked.replicas > 1)
    if asked.runs < 1 or (asked.trace is not None and asked.runs > 1 and not drawn):
        raise BadInput("--runs: every run of a trace is the same on such a fleet; give 1")


def design(asked: Asked) -> planner.Candidate:
    """Return the one replica that is asked for."""
    request = _request(asked)
    return around.as_engine(asked, request, _one_design(request, asked.tp))


def _one_design(request: planner.Request, tp: int | None) -> planner.Candidate:
    """Return the design to simulate: the narrowest that fits of the one GPU and precision asked for."""
    fitting, misfits = planner.every_candidate(planner.check(request))
    split = [c for c in fitting if c.layout.ep == 1] or list(fitting)  # how replicas are made unless somebody asks for more
    if not request.precisions and not request.profiles:
        split = [c for c in split if c.precision == split[0].precision]  # the usual one, where none is asked for
    of_width = [c for c in split if tp in (None, c.tp)]
    kinds = sorted({(c.gpu, c.precision) for c in of_width})
    if fitting and not of_width:
        raise BadInput(f"--tp {tp} does not fit; {', '.join(sorted({str(c.tp) for c in split}, key=int))} would")
    if not fitting:
        raise BadInput(f"nothing to simulate: {misfits[0].why_not}" if misfits else "nothing to simulate: name a --gpu")
    if len(kinds) > 1:
        raise BadInput(f"simulate takes one design; choose one of {', '.join(f'--gpu {g} --precision {p}' for g, p in kinds[:4])} …")
    return min(of_width, key=lambda c: c.devices)


def _target(asked: Asked, candidate: planner.Candidate) -> str:
    """Return the design in words."""
    apart = f" decoding + {around.prefill_replicas(asked.disaggregate)} prefilling" if asked.disaggregate else ""
    return f"{asked.replicas} x {candidate.name}{apart}, {asked.routing} routing"


# ---------------------------------------------------------------- the traffic


def _runs(
    asked: Asked, request: planner.Request, candidate: planner.Candidate, replayed: Schedule | None
) -> tuple[list[Simulation], str | None]:
    """Return independent runs, one for each seed, by whoever is hired for them; after a Ctrl-C those that are done, and words for it."""
    from mlsys_bench import simulate as simulator

    seeds = [asked.seed] if asked.runs == 1 else simulator.seeds(asked.seed, asked.runs)
    line, stopped = Line(), None
    done: dict[int, Simulation] = {}
    try:
        with workers.hired(asked.cluster) as crew:
            given = (asked, request, candidate, replayed)
            done.update(workers.as_done(_run, seeds, shared=given, executor=crew, told=line.counted("runs")))  # one by one
    except KeyboardInterrupt:
        if not done:
            raise
        stopped = f"{STOPPED} after {len(done)} of {asked.runs} runs"
    finally:
        line.clear()
    return [done[i] for i in sorted(done)], stopped


def _run(given: tuple[Asked, planner.Request, planner.Candidate, Schedule | None], seed: int) -> Simulation:
    """Return one run."""
    from mlsys_bench import simulate as simulator

    asked, request, candidate, replayed = given
    prompt_tokens = request.workload.prompt_tokens.mean
    options: dict[str, Any] = {
        "replicas": asked.replicas, "routing": asked.routing, "seed": seed, "policy": around.policy(asked, candidate, prompt_tokens),
        "conditions": around.conditions(asked, candidate, prompt_tokens),
    }  # fmt: skip
    if asked.users is not None:
        return simulator.closed(
            candidate.profile, candidate.limits, concurrency=asked.users, prompt_tokens=request.workload.prompt_tokens,
            output_tokens=request.workload.output_tokens, n=asked.requests or max(ROUNDS * asked.users, LEAST),
            think_s=units.seconds(asked.think, "--think") if asked.think else 0.0, **options,
        )  # fmt: skip
    schedule = _schedule(asked, request, seed) if replayed is None else replayed
    return simulator.run(
        schedule, candidate.profile, candidate.limits, queue_limit=asked.queue_limit, warmup_s=_warmup_s(asked, schedule), **options
    )


def _warmup_s(asked: Asked, schedule: Schedule) -> float | None:
    """Return how much of the beginning is left out.  Raises BadInput where nothing would be left to look at."""
    if asked.warmup is None:
        return None
    warmup_s, last_s = units.seconds(asked.warmup, "--warmup"), float(np.nanmax(schedule.scheduled_s))
    if not 0 <= warmup_s <= last_s:
        raise BadInput(f"--warmup {asked.warmup}: the last request is due after {last_s:.3g} s; leave out less than that, from 0s up")
    return warmup_s


def _schedule(asked: Asked, request: planner.Request, seed: int) -> Schedule:
    """Return the requests of an open loop, from a trace or from laws."""
    duration_s = units.seconds(asked.duration, "--duration") if asked.duration else None
    if duration_s is not None and duration_s <= 0:
        raise BadInput(f"--duration {asked.duration}: it must be above zero, e.g. {DURATION}")
    if asked.trace is not None:
        whole = workload.from_trace(asked.trace, rate_per_s=asked.qps)
        cut = whole if duration_s is None else workload.sliced(whole, 0.0, duration_s)
        return cut if asked.requests is None else workload.take(cut, range(min(asked.requests, len(cut))))
    if asked.requests is not None:
        return workload.schedule(request.workload, n=asked.requests, seed=seed)
    schedule = workload.schedule(request.workload, duration_s=duration_s or units.seconds(DURATION), seed=seed)
    if not len(schedule):
        raise BadInput(f"--duration {asked.duration}: no request arrives in that time at {request.workload.rate_per_s:g}/s")
    return schedule


def _arrivals(asked: Asked, request: planner.Request) -> str:
    if asked.users is not None:
        return f"closed loop, {count(asked.users, 'user')}"
    return f"trace {asked.trace.name}" if asked.trace is not None else request.workload.arrivals


def _rate_per_s(asked: Asked, request: planner.Request, run: Simulation) -> float:
    """Return the rate asked for, or the one that the trace brings."""
    if asked.trace is None:
        return request.workload.rate_per_s
    start_s, end_s = run.window
    return sum(r.in_window for r in run.requests) / (end_s - start_s) if end_s > start_s else 0.0
