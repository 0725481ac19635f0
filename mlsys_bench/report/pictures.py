"""Which pictures a set of records allows, and what stands under each."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mlsys_bench.checked import Check, Demo, Verification
from mlsys_bench.fleets import FleetPlan
from mlsys_bench.histories import History
from mlsys_bench.loadlimits import LoadMax, LoadSweep
from mlsys_bench.loadtests import LoadTests
from mlsys_bench.productions import Production
from mlsys_bench.record import Envelope, Record
from mlsys_bench.report import drawing, productions, stacks
from mlsys_bench.report.parts import scalar
from mlsys_bench.stage_fleets import NO_END_S
from mlsys_bench.stages import StageGraph
from mlsys_bench.types import Bench, LatencyProfile, LoadTest, Plan, Requests
from mlsys_bench.verdicts import GateCalibration, GateRun, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COST = "Cost of the chosen design and of its alternatives; hatched ones do not hold the limits."
BUCKETS = "Production's percentiles lie between edges of its histogram's buckets: the whiskers."
POOL = "GPUs in use, by scenario and hour; the frame is the pool, and a red bar on top says that an hour is short of GPUs."
FRONTIER = "Fleets of which none is both cheaper and faster than another; each keeps all limits. The plan is blue."
CHANGES = "What each change saves or costs; pale bars end within the plan's own 90 % interval."
SERVER = "What the server said of itself, second by second, on the clock of the load test."
COURSE = "Requests, those in flight, latencies by when they were due, and the client's own lateness; shaded parts are in no figure."
LADDER = "Latency by percentile, as far as the sample goes; bars are 90 % intervals, grey is what the server alone took."
GAPS = "How the gaps between tokens are spread."
RUNS = "Each dot is a run; the line is the mean of runs, the bar its 90 % interval."
MISSING = "Pictures need matplotlib: python -m pip install 'mlsys-bench[plot]'"


class Picture(NamedTuple):
    """One picture inside the page: the image as a data URI, what it shows in words, and the section it belongs to."""

    kind: str
    uri: str
    caption: str


def graphs(items: Sequence[tuple[str, Envelope, Record]]) -> tuple[Picture, ...]:
    """Return a drawing of every stage graph, and of the pool of every fleet; they need no matplotlib."""
    found = [record for _, _, record in items if isinstance(record, StageGraph)]
    pools = [Picture("fleet-plan", stacks.uri(record), POOL) for _, _, record in items if isinstance(record, FleetPlan)]
    drawn = [Picture("stages", drawing.uri(record), f"The stages of {record.name} and the ways between them.") for record in found]
    return (*pools, *drawn)


def draw(items: Sequence[tuple[str, Envelope, Record]]) -> tuple[Picture, ...] | None:
    """Return every picture the records allow, or None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from mlsys_bench.report import figures

    made = (*_every(tuple(record for _, _, record in items)), *_benches(items))
    return tuple(Picture(kind, figures.uri(figure), caption) for kind, caption, figure in made if figure is not None)


def _every(records: Sequence[Record]) -> Iterator[tuple[str, str, Figure | None]]:
    from mlsys_bench.report import figures, load_pictures

    checked = next((r for r in records if isinstance(r, Demo | Verification)), None)
    plans = _once(r.plan if isinstance(r, Demo) else r for r in records if isinstance(r, Demo | Plan))
    plan = plans[0] if plans else None
    if checked is not None:
        where = "measured through HTTP with the load generator" + (f"; predicted: {plan.profile.provenance}" if plan else "")
        kind = "demo" if isinstance(checked, Demo) else "verify"
        yield kind, _errors(checked.checks), figures.prediction(checked.checks, where)
    for seen in (r for r in records if isinstance(r, Production) and r.remade):
        judged = tuple(c for c in productions.deciding(seen) if c.measured_low is not None or c.measured is not None)
        yield "production", f"{_errors(judged)} {BUCKETS}", figures.prediction(judged, f"production: {seen.engine}, {seen.source}")
    for each in plans:
        priced = f"{each.model}, {scalar(each.workload.rate_per_s)} requests/s, {each.slo}; {each.provenance}"
        yield "plan", COST, figures.alternatives(each, priced)
        yield "plan", FRONTIER, figures.frontier(each, priced)
        yield "sensitivity", CHANGES, figures.tornado(each, priced)
    for repeated in (r for r in records if isinstance(r, LoadTests)):
        yield "loadtests", RUNS, load_pictures.runs(repeated, f"measured; {len(repeated.runs)} runs of {repeated.runs[0].target}")
    for run in (r for r in records if isinstance(r, LoadTest)):
        yield from _loadtest(run)
    for run in (r for r in records if isinstance(r, LoadTest) and r.server):
        yield "loadtest", SERVER, _server(run)
    for found in (r for r in records if isinstance(r, LoadSweep | LoadMax)):
        yield _limits(found)
    for past in (r for r in records if isinstance(r, History)):
        yield _trends(past)
    for gate in (r for r in records if isinstance(r, GateRun | GateCalibration | Verdict)):
        yield from _gate(gate)
    yield from _fits(records, plan)
    for requests in (r for r in records if isinstance(r, Requests)):
        yield from _runs(requests, plan if checked is not None else None)


def _loadtest(run: LoadTest) -> Iterator[tuple[str, str, Figure | None]]:
    from mlsys_bench.report import load_pictures

    where = f"measured; {run.arrivals}, {run.target}"
    yield "loadtest", COURSE, load_pictures.over_time(run, where)
    yield "loadtest", LADDER, load_pictures.percentiles(run, where)
    yield "loadtest", GAPS, load_pictures.gaps(run, where)


def _limits(record: LoadSweep | LoadMax) -> tuple[str, str, Figure | None]:
    from mlsys_bench.report import loadlimit_pictures as limits

    where = f"measured; {record.target}, {record.arrivals} arrivals"
    if isinstance(record, LoadSweep):
        return "loadsweep", limits.CURVE, limits.curve(record, where)
    return "loadmax", limits.SEARCH, limits.closing_in(record, f"{record.slo}; {where}")


def _trends(record: History) -> tuple[str, str, Figure | None]:
    from mlsys_bench.report import history_pictures

    where = f"measured; {record.results} results in {record.database}"
    return "gate-history", history_pictures.TREND, history_pictures.trends(record, where)


def _gate(record: GateRun | GateCalibration | Verdict) -> Iterator[tuple[str, str, Figure | None]]:
    from mlsys_bench.report import gate_forest
    from mlsys_bench.report import gate_pictures as drawn

    match record:
        case Verdict():
            yield "verdict", gate_forest.FOREST, gate_forest.forest(record, "from recorded files")
        case GateRun():
            where = drawn.run_subtitle(record)
            yield "gate", gate_forest.FOREST, gate_forest.forest(record.verdict, where)
            yield "gate", drawn.LAUNCHES, drawn.launches(record, where)
            yield "gate", drawn.QUANTILES, drawn.quantiles(record, where)
        case GateCalibration():
            yield "gate-calibration", drawn.SAME, drawn.same(record, drawn.calibration_subtitle(record))
            yield "gate-calibration", drawn.LAUNCHES, drawn.launches(record.run, drawn.calibration_subtitle(record))


def _server(run: LoadTest) -> Figure | None:
    from mlsys_bench.report import server_pictures

    if run.server is None:
        return None
    kinds = ", ".join(f"{s.kind} at {s.where}" for s in run.server.sources if not s.skipped)
    return server_pictures.over_time(run.server, run.timeline.window_s if run.timeline else None, f"measured; {kinds}")


def _once(plans: Iterable[Plan]) -> list[Plan]:
    """Return each plan once: a demo's plan may be there as a file too."""
    found: list[Plan] = []
    for plan in plans:
        found += [plan] * (plan not in found)
    return found


def _errors(checks: Sequence[Check]) -> str:
    inside, known = sum(c.inside is True for c in checks), sum(c.inside is not None for c in checks)
    return f"{inside} of {known} measured figures lie inside the predicted 90 % interval; the error stands above each."


def _benches(items: Sequence[tuple[str, Envelope, Record]]) -> Iterator[tuple[str, str, Figure | None]]:
    from mlsys_bench import anatomy
    from mlsys_bench.report import bench_pictures as drawn

    for _, head, record in items:
        if isinstance(record, Bench):
            yield "bench", drawn.ROOFLINE, drawn.roofline(record, head.machine, drawn.subtitle(record))
            for taken in anatomy.tables(record.measurements)[:1]:
                yield "bench", drawn.STEP, drawn.step(taken, drawn.subtitle(record))


def _fits(records: Sequence[Record], plan: Plan | None) -> Iterator[tuple[str, str, Figure | None]]:
    from mlsys_bench.report import figures

    benches = [r for r in records if isinstance(r, Bench)]
    profiles = [r for r in records if isinstance(r, LatencyProfile)] or ([plan.profile] if plan else [])
    for bench in benches:
        for profile in (p for p in profiles if p.form == "step"):
            at = profile.layout
            where = f"{at.model}, {at.precision}, {at.device}{f', {at.threads} thread(s)' if at.threads else ''}; {profile.provenance}"
            yield "bench", "Every measured engine step against what the profile says of it.", figures.step_fit(bench, profile, where)


def _runs(requests: Requests, plan: Plan | None) -> Iterator[tuple[str, str, Figure | None]]:
    from mlsys_bench.report import figures

    where = "simulated" if "simulated" in {r.token_source for r in requests.requests} else "measured"
    beside = f"{where}; predicted: {plan.profile.provenance}" if plan else where
    predicted = plan.predicted if plan else {}
    intervals = {key: ends for key, ends in plan.intervals.items() if ends[1] < NO_END_S} if plan else {}
    yield "requests", "Latency of every request, counted from when it was due.", figures.timeline(requests, where)
    yield "requests", "Share of requests answered within a time.", figures.distribution(requests, predicted, intervals, beside)
    yield "requests", "Tokens per second, and requests that had been sent and not yet answered.", figures.load(requests, where)
