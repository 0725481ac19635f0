"""A gate's calibration in words: what this runner can see of two programs that are the same, and what to do when that is too little."""

from __future__ import annotations

import math

from mlsys_bench import units
from mlsys_bench.report.gates import FIRST_LOOK, LAST_LOOK, contention, launch_pairs, origin, rounded, share
from mlsys_bench.report.parts import Cell, Column, Fact, Section, Table, Tone, parameters
from mlsys_bench.units import count
from mlsys_bench.verdicts import GateCalibration, Resolution

_HOW = (
    "the same program stood on both sides: whatever differs is this machine",
    "sd of pairs: of the log ratio of two launches; below it its 90 % interval",
    "false alarms: share of gate runs on the same program that would fail the build, pairs resampled with flipped signs; 90 % interval",
    "finds: the smallest slowdown found nine times in ten within the budget; finest: the smallest tolerance that it still decides",
)


def calibration(record: GateCalibration) -> Section:
    """Return what this runner can decide: its launch sd, its false alarms, and the smallest effect it sees in the budget."""
    tolerance = record.run.policy.tolerance
    fine, known = not blind(record), bool(record.resolutions)
    tone: Tone = "good" if fine and known else "bad"
    return Section(
        kind="gate-calibration",
        title="What this runner can see",
        lead=_sight(record),
        tag="measured",
        tone=tone if known else "unsure",
        tiles=_sight_tiles(record),
        facts=(
            Fact("Same on both", record.run.base.label, origin(record.run.base)),
            Fact("Measured", f"{count(launch_pairs(record.run), 'launch pair')} in {units.show_s(record.run.wall_s)}", "", "measured"),
            Fact("Budget", units.show_s(record.budget_s), f"{count(pairs_in(record), 'launch pair')} of {units.show_s(record.pair_s)}"),
            contention(record.run),
            *((Fact("Tolerance", f"{share(tolerance)} {'can be decided' if fine else 'is too fine'}", tone=tone),) if known else ()),
        ),
        tables=(_resolutions(record),) if record.resolutions else (),
        notes=(*((("What to do", _cures(record)),) if not (fine and known) else ()), ("How to read it", _HOW)),
    )


def blind(record: GateCalibration) -> tuple[Resolution, ...]:
    """Return the metrics for which the tolerance asked for is too fine."""
    return tuple(r for r in record.resolutions if r.finest_tolerance > asked(record, r))


def pairs_in(record: GateCalibration) -> int:
    """Return how many launch pairs the budget holds."""
    return int(record.budget_s / record.pair_s) if record.pair_s > 0 else 0


def asked(record: GateCalibration, r: Resolution) -> float:
    """Return the tolerance that a metric was to be decided at."""
    held = (f.tolerance for f in record.run.verdict.findings if (f.name, f.parameters) == (r.name, r.parameters))
    return next(held, None) or record.run.policy.tolerance


def finest(r: Resolution) -> str:
    """Print the smallest tolerance that is decided; 'none' where none below all of it is."""
    return share(r.finest_tolerance) if r.finest_tolerance < 1 else "none"


def _finds(r: Resolution) -> str:
    return f"+{share(r.detectable)}" if r.detectable < 1 else "nothing"


def _sight(record: GateCalibration) -> str:
    if not record.resolutions:
        return "Nothing could be said of this runner: no metric has enough launch pairs."
    budget = units.show_s(record.budget_s)
    dull = blind(record)
    if dull:
        worst = max(dull, key=lambda r: r.finest_tolerance)
        said = f"its finest tolerance is {finest(worst)}" if worst.finest_tolerance < 1 else "no tolerance can be decided"
        return f"This runner cannot decide {share(asked(record, worst))} of {worst.name} in {budget}: {said}."
    worst = max(record.resolutions, key=lambda r: r.detectable)
    finds = f"it finds a slowdown of {share(worst.detectable)} nine times in ten"
    return f"This runner can decide a tolerance of {share(record.run.policy.tolerance)} in {budget}: {finds}."


def _sight_tiles(record: GateCalibration) -> tuple[Fact, ...]:
    if not record.resolutions:
        return ()
    noisy = max(record.resolutions, key=lambda r: r.launch_sd)
    alarms = max(record.resolutions, key=lambda r: r.false_alarms)
    dullest = max(record.resolutions, key=lambda r: r.finest_tolerance)
    slowest = max(record.resolutions, key=lambda r: r.detectable)
    return (
        Fact("Finest tolerance", finest(dullest), f"in {units.show_s(record.budget_s)}", "measured"),
        Fact("Finds nine times in ten", _finds(slowest), "the smallest slowdown", "measured"),
        Fact("Sd of a launch pair", f"{100 * noisy.launch_sd:.1f} %", _span(noisy.sd_interval), "measured"),
        Fact("False alarms", f"{100 * alarms.false_alarms:.1f} %", _span(alarms.false_alarm_interval), "measured"),
    )


def _span(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f} %"


def _resolutions(record: GateCalibration) -> Table:
    columns = (
        Column("metric", flexible=True), Column("pairs", right=True), Column("sd of pairs", right=True), Column("false alarms", right=True),
        Column("finds", right=True), Column("finest", right=True),
    )  # fmt: skip
    dull = blind(record)
    rows = tuple(_resolution(r, r in dull) for r in sorted(record.resolutions, key=lambda r: -r.finest_tolerance))
    return Table(title="", columns=columns, rows=rows, note="intervals: 90 %; finest: the smallest tolerance that is decided")


def _resolution(r: Resolution, too_fine: bool) -> tuple[Cell, ...]:
    return (
        Cell(r.name, "strong", parameters(r.parameters)),
        Cell(str(r.pairs)),
        Cell(f"{100 * r.launch_sd:.1f} %", "", _span(r.sd_interval)),
        Cell(f"{100 * r.false_alarms:.1f} %", "", _span(r.false_alarm_interval)),
        Cell(_finds(r)),
        Cell(finest(r), "bad" if too_fine else "good"),
    )


def _cures(record: GateCalibration) -> tuple[str, ...]:
    """Return what would make this runner see more, what was seen first."""
    if not record.resolutions:
        needed = units.show_s(rounded(1.2 * FIRST_LOOK * record.pair_s))
        return (f"give it a longer --budget: {FIRST_LOOK} launch pairs take {needed} or so, and 20 say three times as much",)
    dullest = max(r.finest_tolerance for r in blind(record))
    lines = [f"ask for --tolerance {math.ceil(100 * dullest)}% on this runner"] if dullest < 0.5 else []
    if record.run.contention.verdict == "contended":
        lines.append("run it where fewer neighbours are: " + record.run.contention.reasons[0])
    lines.append("pin the benchmark to cores of its own (taskset -c, or isolated cores) and set the governor to performance")
    if pairs_in(record) < LAST_LOOK:  # beyond it time buys nothing
        wanted = max(r.finest_tolerance / asked(record, r) for r in blind(record))
        longer = units.show_s(rounded(record.budget_s * wanted**2))
        lines.append(f"give it a longer --budget, {longer} or so: the interval narrows with the root of the pairs")
    lines.append("gate deterministic counters instead: bytes, allocations, kernel launches need one launch and no luck")
    return tuple(lines)
