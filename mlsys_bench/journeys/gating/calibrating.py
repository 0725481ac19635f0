"""gate calibrate: the same program on both sides -> what this runner can see, and whether a gate asks for more than that."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlsys_bench import hardware, record, units
from mlsys_bench.errors import INTERRUPTED, BadInput, NotComparable, RecordError
from mlsys_bench.gate import fingerprint, resolution, sequence
from mlsys_bench.gate import policy as rules
from mlsys_bench.gate.judge import Standing, judge
from mlsys_bench.journeys.gating import outside, run
from mlsys_bench.journeys.gating.run import Asked
from mlsys_bench.types import Bench
from mlsys_bench.verdicts import GateCalibration, GateRun, Policy, Resolution

BUDGET_S = 120.0
LOOKS = (*sequence.LOOKS, 30, sequence.MOST_PAIRS)  # pairs at which the view says how it stands; more are not asked for
TOO_FINE, TOO_FEW = 1, 3  # exit statuses: the answer is no; nothing can be said


def itself(
    ref: str = ".",
    *,
    bench: str | None = None,
    worker: str | None = None,
    command: str | None = None,
    read: str | None = None,
    asked: Asked,
) -> GateCalibration:
    """Measure a git ref, the working tree or a wheel by its benchmarks, or a command, against itself.

    Raises BadInput, MeasurementFailed.
    """
    if command is None:
        if read is not None:
            raise BadInput("--read belongs to --command")
        return _kept(lambda inner: run.refs(ref, ref, bench=bench, worker=worker, asked=inner, look=_go_on), asked)
    if bench is not None or worker is not None:
        raise BadInput("either --command, or the benchmarks of --ref by --bench or --worker")
    typed = outside.Typed(base_command=command, cand_command=command, read=read)
    return _kept(lambda inner: outside.run(typed, inner, look=_go_on), asked)


def exit_status(found: GateCalibration) -> int:
    """Return 0 where this runner can decide what was asked, 1 where it cannot, 3 where there were too few launches to say."""
    if found.run.ended == "interrupted":
        return INTERRUPTED
    return TOO_FEW if not found.resolutions else TOO_FINE if any(_is_too_fine(r, found.run.policy) for r in found.resolutions) else 0


def resolved(found: GateRun, budget_s: float) -> GateCalibration:
    """Return what launches of the same program say of gate runs that may take so long; nothing where they are too few."""
    each_s = pair_s(found)
    apart = resolution.apart(found.base_bench, found.cand_bench, found.policy)
    enough = [a for a in apart if len(a.logs) >= resolution.LEAST_PAIRS]
    seen = resolution.resolve(enough, _affordable(budget_s, each_s)) if enough else ()
    return GateCalibration(run=found, budget_s=budget_s, pair_s=each_s, resolutions=seen)


def pair_s(found: GateRun) -> float:
    """Return the median time from the start of one pair to the start of the next; of a lone pair all that was spent."""
    starts = {c.pair: c.started_s for c in sorted(found.conditions, key=lambda c: -c.started_s)}
    between = np.diff([starts[pair] for pair in sorted(starts)])
    return float(np.median(between)) if len(between) else found.wall_s


def check(path: Path, policy: Policy, budget_s: float | None) -> None:
    """Raise BadInput where a calibration says that this runner cannot decide a tolerance in the budget, with the figure.

    Without a budget that of the calibration is meant.  Raises NotComparable for a calibration of another machine.
    """
    head, found = record.load(path)
    if not isinstance(found, GateCalibration):
        raise RecordError(f"{path}: holds a {head.kind!r} record; --calibration takes what `mlsys gate calibrate -o` wrote")
    different = fingerprint.differences(head.machine, hardware.machine())
    if different:
        raise NotComparable(f"{path}: was made on another machine ({different[0]}): run mlsys gate calibrate here")
    if budget_s is not None and not np.isclose(found.budget_s, budget_s, rtol=0.05):
        found = resolved(dataclasses.replace(found.run, policy=policy), budget_s)
    if not found.resolutions:
        raise BadInput(f"{path}: says nothing of this runner: too few launch pairs; calibrate it with a longer --budget")
    dull = [r for r in found.resolutions if rules.may_fail(policy, r.name) and _is_too_fine(r, policy)]
    if dull:
        raise BadInput(f"{path}: {_refusal(max(dull, key=lambda r: r.finest_tolerance), policy, found.budget_s)}")


# ---------------------------------------------------------------- one calibration


def _kept(measured: Callable[[Asked], GateRun], asked: Asked) -> GateCalibration:
    """Return what was measured with what it says, and write it where asked."""
    if asked.out is not None:
        record.check_writable(asked.out)
    budget_s = asked.budget_s or BUDGET_S
    found = resolved(measured(dataclasses.replace(asked, out=None, budget_s=budget_s)), budget_s)
    if asked.out is not None:
        record.write(asked.out, found, hardware.machine())
    return found


def _go_on(base: Bench, cand: Bench, policy: Policy) -> Standing:
    """Return where it stands, never decided: what is wanted is the noise."""
    standing = judge(base, cand, policy)
    return dataclasses.replace(standing, decided=False, next_look=next((n for n in LOOKS if n > standing.pairs), None))


def _affordable(budget_s: float, each_s: float) -> int:
    return min(sequence.MOST_PAIRS, int(budget_s / each_s) if each_s > 0 else sequence.MOST_PAIRS)


def _is_too_fine(r: Resolution, policy: Policy) -> bool:
    return r.finest_tolerance > rules.tolerance_of(policy, r.name)


def _refusal(r: Resolution, policy: Policy, budget_s: float) -> str:
    asked = f"{100 * rules.tolerance_of(policy, r.name):.2g} % of {r.name}"
    if r.finest_tolerance >= resolution.MOST:
        cure = "give it a longer --budget, or fewer neighbours"
        return f"this runner cannot decide {asked}, nor any tolerance, in {units.show_s(budget_s)}: {cure}"
    finest = math.ceil(1000 * r.finest_tolerance) / 10
    return (
        f"this runner cannot decide {asked} in {units.show_s(budget_s)}, its finest tolerance there is {finest:.1f} %: "
        f"ask for --metric {r.name}={finest:.1f}%, or give it a longer --budget, or pin it to cores of its own"
    )
