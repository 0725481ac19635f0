"""Any record -> sections: the one place that knows which words belong to which kind."""

from __future__ import annotations

from typing import assert_never

from mlsys_bench.backtests import Backtest
from mlsys_bench.billing import Costs
from mlsys_bench.calibrations import Calibration
from mlsys_bench.checked import Demo, Verification
from mlsys_bench.claims import Claims
from mlsys_bench.fleets import Fleet, FleetPlan
from mlsys_bench.histories import History
from mlsys_bench.loadlimits import LoadMax, LoadSweep
from mlsys_bench.loadtests import LoadTests
from mlsys_bench.looked_up import Catalog, Doctor
from mlsys_bench.productions import Production
from mlsys_bench.record import Envelope, Record
from mlsys_bench.report.parts import Section
from mlsys_bench.stages import StageGraph
from mlsys_bench.types import (
    Bench,
    LatencyProfile,
    LoadTest,
    Machine,
    Plan,
    Requests,
    Scenario,
    Workload,
)
from mlsys_bench.verdicts import GateCalibration, GateRun, Verdict


def describe(record: Record, extra: object = None) -> tuple[Section, ...]:
    """Return the sections of a record, the answer first.  `extra` goes beside it: a bench's ready-made rows, or its machine.

    Each kind's words are loaded when they are wanted: all of them, with what draws graphs, would take 5 % of a plan's time.
    """
    match record:
        case Plan():
            return _plan(record)
        case LoadTest():
            from mlsys_bench.report import runs

            return (runs.loadtest(record),)
        case LoadTests():
            from mlsys_bench.report import repeats, runs

            return (repeats.repeats(record), *(runs.loadtest(run) for run in record.runs[:1]))
        case Bench():
            from mlsys_bench.report import benches

            return (benches.bench(record, extra),)
        case LatencyProfile():
            from mlsys_bench.report import plans

            return (plans.profile(record, extra if isinstance(extra, tuple) else ()),)
        case Demo():
            from mlsys_bench.report import runs

            return runs.demo(record)
        case Verification():
            from mlsys_bench.report import runs

            return runs.verification(record)
        case Verdict():
            from mlsys_bench.report import gates

            return (gates.verdict(record),)
        case GateRun():
            from mlsys_bench.report import gates

            return (gates.run(record),)
        case GateCalibration():
            from mlsys_bench.report import gate_calibrations

            return (gate_calibrations.calibration(record),)
        case History():
            from mlsys_bench.report import histories

            return (histories.history(record),)
        case Workload():
            from mlsys_bench.report import traffic

            return (traffic.section(record),)
        case Requests():
            from mlsys_bench.report import runs

            return (runs.requests(record),)
        case Scenario():
            from mlsys_bench.report import lookups

            return (lookups.scenario(record),)
        case StageGraph():
            from mlsys_bench.report import stage_graphs

            return (stage_graphs.graph(record),)
        case Doctor():
            from mlsys_bench.report import lookups

            return (lookups.doctor(record),)
        case Catalog():
            from mlsys_bench.report import lookups

            return (lookups.catalog(record),)
        case Backtest():
            from mlsys_bench.report import backtests

            return (backtests.backtest(record),)
        case LoadSweep():
            from mlsys_bench.report import loadlimits

            return (loadlimits.sweep(record),)
        case LoadMax():
            from mlsys_bench.report import loadlimits

            return (loadlimits.highest(record),)
        case Calibration():
            from mlsys_bench.report import calibrations

            return (calibrations.calibration(record),)
        case Claims():
            from mlsys_bench.report import claims

            return (claims.claims(record),)
        case Fleet():
            from mlsys_bench.report import fleets

            return (fleets.fleet(record),)
        case FleetPlan():
            from mlsys_bench.report import fleets

            return (fleets.plan(record),)
        case Production():
            from mlsys_bench.report import productions

            return (productions.production(record),)
        case Costs():
            from mlsys_bench.report import costs

            return (costs.costs(record),)
        case _:
            assert_never(record)


def beside(head: Envelope, record: Record) -> Machine | None:
    """Return what the words want beside a record read from a file: of a bench its machine, for the data sheet of its processor."""
    return head.machine if isinstance(record, Bench) else None


def _plan(record: Plan) -> tuple[Section, ...]:
    from mlsys_bench.report import comparisons, plans, stage_fleets, surroundings

    if record.stages:
        from mlsys_bench.report import stage_graphs

        answer = stage_graphs.plan(record)
    else:
        answer = plans.plan(record)
    return (answer, *surroundings.sections(record), *stage_fleets.sections(record), *comparisons.sections(record))
