"""gate run: from two sides as typed to a record that holds all that decided."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path

from mlsys_bench import gate, hardware, record, units
from mlsys_bench.errors import INTERRUPTED, BadInput, MeasurementFailed, unknown
from mlsys_bench.gate import policy as rules
from mlsys_bench.gate.judge import judge
from mlsys_bench.journeys.gating import benchmarks, conditions, interrupts, subjects
from mlsys_bench.journeys.gating.pairs import SIDES, Contest, Look, Race, started
from mlsys_bench.journeys.gating.source import Source
from mlsys_bench.journeys.gating.view import View
from mlsys_bench.journeys.gating.worker import NoWorkerError, WorkerSource
from mlsys_bench.verdicts import GateRun, Policy, Subject, Verdict

BUDGET_S = 90.0  # for each benchmark, where nothing is said


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked of any gate, whatever its two sides are."""

    policy: Policy = dataclasses.field(default_factory=Policy)
    budget_s: float | None = None  # None: BUDGET_S for each contest
    seed: int = 0
    out: Path | None = None
    quiet: bool = False


def budget(text: str | None) -> float | None:
    """Return a budget as typed, in seconds.  Raises BadInput."""
    if text is None:
        return None
    seconds = units.seconds(text, "--budget")
    if not (math.isfinite(seconds) and seconds > 0):
        raise BadInput(f"--budget {text}: a time above zero is needed, e.g. 90s")
    return seconds


def refs(
    base: str | None, cand: str | None, *, bench: str | None = None, worker: str | None = None, asked: Asked, look: Look = judge
) -> GateRun:
    """Measure two git refs, working trees or wheels by their bench workers, in pairs of launches, until it is decided."""
    if not base or not cand:
        raise BadInput("say what to compare: --base REF --cand REF, where a REF is a git ref, '.' for the working tree, or a wheel")
    names = _names(bench, worker)
    _check_out(asked)
    began_s = time.monotonic()
    with View(asked.quiet) as view, interrupts.terminable(), subjects.opened(base, cand, view.note) as sides:
        if worker is None:
            for side in sides:
                side.check_ours()
        made = [Contest(base=sides[0].source(name, worker), cand=sides[1].source(name, worker)) for name in names]
        contests = _rehearsed(made, view)
        began_s += sum(side.environment.made_s for side in sides)
        return measured(contests, *(side.subject for side in sides), asked=asked, view=view, began_s=began_s, look=look)


def measured(
    contests: Sequence[Contest], base: Subject, cand: Subject, *, asked: Asked, view: View | None = None, began_s: float | None = None,
    look: Look = judge,
) -> GateRun:  # fmt: skip
    """Run the loop over contests and return its record, written where asked.

    A Ctrl-C gives what whole pairs there are, as does a side that dies, whose error then goes on.  Without a whole pair there is nothing.
    """
    _check_out(asked)
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(View(asked.quiet)) if view is None else view
        stack.enter_context(interrupts.terminable())
        budget_s = asked.budget_s or BUDGET_S * len(contests)
        race = Race(contests, policy=asked.policy, budget_s=budget_s, seed=asked.seed, began_s=began_s, show=shown.show, look=look)
        try:
            race.run()
        except KeyboardInterrupt:
            if not race.pairs:
                raise
        except MeasurementFailed:
            if race.pairs:
                _write(_record(race, contests, base, cand, asked), asked)
            raise
        found = _record(race, contests, base, cand, asked)
        _write(found, asked)
        _check_both_measured(found)
        return found


def exit_status(found: GateRun) -> int:
    """Return what the command ends with: that of the verdict, a shell's status of SIGINT when stopped by hand."""
    return INTERRUPTED if found.ended == "interrupted" else gate.exit_status(found.verdict)


def _record(race: Race, contests: Sequence[Contest], base: Subject, cand: Subject, asked: Asked) -> GateRun:
    benches = [race.bench(side) for side in SIDES]
    here = hardware.machine() if len(race.machines) < len(SIDES) else None
    machines = [race.machines.get(side) or here for side in SIDES]
    assert machines[0] is not None
    assert machines[1] is not None
    verdict = gate.verdict_of(benches[0], benches[1], asked.policy, machines[0], machines[1])
    sources = [source for contest in contests for source in (contest.base, contest.cand) if source is not None]
    return GateRun(
        base=base,
        cand=cand,
        base_bench=benches[0],
        cand_bench=benches[1],
        base_machine=machines[0],
        cand_machine=machines[1],
        policy=asked.policy,
        conditions=tuple(race.conditions),
        contention=conditions.contention(race.conditions),
        ended=race.ended,
        wall_s=race.wall_s,
        verdict=verdict,
        remarks=(*dict.fromkeys(remark for source in sources for remark in _remarks(source)), *_idle(asked.policy, verdict)),
    )


def _check_both_measured(found: GateRun) -> None:
    """Raise MeasurementFailed where one side gave no sample at all: a benchmark that broke is no undecided question."""
    for side, subject, bench in (("baseline", found.base, found.base_bench), ("candidate", found.cand, found.cand_bench)):
        if not any(measurement.launches for measurement in bench.measurements):
            raise MeasurementFailed(f"the {side} measured nothing: its launches gave no sample ({subject.label})")


def _idle(policy: Policy, verdict: Verdict) -> tuple[str, ...]:
    """Say which rules are about nothing that was measured: in a file of several gates all is well, a mistyped one does nothing."""
    names = dict.fromkeys(finding.name for finding in verdict.findings)
    unused = rules.idle(policy, names)
    return (f"no metric goes by the rule of {', '.join(unused)}; measured: {', '.join(names)}",) if unused and names else ()


def _remarks(source: Source) -> tuple[str, ...]:
    """Return what a source wants said, where it has something to say."""
    remarks = getattr(source, "remarks", None)
    return tuple(remarks()) if callable(remarks) else ()


def _write(found: GateRun, asked: Asked) -> None:
    if asked.out is not None:
        record.write(asked.out, found, hardware.machine())


def _check_out(asked: Asked) -> None:
    if asked.out is not None:
        record.check_writable(asked.out)


# ---------------------------------------------------------------- before the first pair


def _names(bench: str | None, worker: str | None) -> tuple[str, ...]:
    """Return the benchmarks asked for: all of ours, or, with a worker of the project's own, its only one without a name."""
    named = tuple(dict.fromkeys(part.strip() for part in (bench or "").split(",") if part.strip()))
    if worker is not None:
        return named or ("",)
    known = benchmarks.names()
    strange = next((name for name in named if not any(k == name or k.startswith(f"{name}.") for k in known)), None)
    if strange is not None:
        raise unknown("benchmark of the gate", strange, known)
    return tuple(k for k in known if not named or any(k == name or k.startswith(f"{name}.") for name in named))


def _rehearsed(contests: Sequence[Contest], view: View) -> list[Contest]:
    """Return the contests with the sides that have no such worker left out; say what a run will cost.

    Starting every worker once also compiles its modules, which would make a first launch unlike the others.  Raises NotComparable where a
    side has no worker at all.
    """
    found, starts_s = [], []
    absent: dict[str, NoWorkerError] = {}
    for contest in contests:
        start_s = time.monotonic()
        lacking = _lacking(contest)
        starts_s.append(time.monotonic() - start_s)
        absent |= lacking
        found.append(Contest(base=None if "base" in lacking else contest.base, cand=None if "cand" in lacking else contest.cand))
    for side in SIDES:
        if side in absent and all(contest.of(side) is None for contest in found):
            raise absent[side]
    turns = sum(c.base.turns * 2 for c in contests if c.base is not None)
    view.note(
        f"{len(contests)} benchmark(s), 6 to 20 pairs of launches: to start a pair takes about {units.show_s(sum(starts_s))}, "
        f"to warm it up and take {turns} turns {units.show_s(turns * 0.04)} or more"
    )
    return found


def _lacking(contest: Contest) -> dict[str, NoWorkerError]:
    """Start both workers, hear their hello, and return the sides that have none."""
    lacking: dict[str, NoWorkerError] = {}
    with contextlib.ExitStack() as stack:
        launched = {}
        for side in SIDES:
            source = contest.of(side)
            assert isinstance(source, WorkerSource)
            try:
                launched[side] = started(source, 0, stack)
            except NoWorkerError as error:
                lacking[side] = error
        for side, launch in launched.items():
            try:
                launch.hello()
            except NoWorkerError as error:
                lacking[side] = error
    return lacking
