"""Any record -> sections: the one place that knows which words belong to which kind."""

from __future__ import annotations

from typing import assert_never

from mlsys_bench.backtests import Backtest
from mlsys_bench.billing import Costs
from mlsys_bench.claims import Claims
from mlsys_bench.record import Record
from mlsys_bench.report import backtests, benches, claims, costs, lookups, plans, runs, stage_graphs, surroundings, traffic
from mlsys_bench.report.parts import Section
from mlsys_bench.stages import StageGraph
from mlsys_bench.types import (
    Bench,
    Catalog,
    Demo,
    Doctor,
    LatencyProfile,
    LoadTest,
    Plan,
    Requests,
    Scenario,
    Verdict,
    Verification,
    Workload,
)


def describe(record: Record, extra: object = None) -> tuple[Section, ...]:
    """Return the sections of a record, the answer first.  `extra` goes beside it: a bench's ready-made rows."""
    match record:
        case Plan():
            return (stage_graphs.plan(record) if record.stages else plans.plan(record), *surroundings.sections(record))
        case LoadTest():
            return (runs.loadtest(record),)
        case Bench():
            return (benches.bench(record, extra if isinstance(extra, tuple | list) else None),)
        case LatencyProfile():
            return (plans.profile(record, extra if isinstance(extra, tuple) else ()),)
        case Demo():
            return runs.demo(record)
        case Verification():
            return runs.verification(record)
        case Verdict():
            return (benches.verdict(record),)
        case Workload():
            return (traffic.section(record),)
        case Requests():
            return (runs.requests(record),)
        case Scenario():
            return (lookups.scenario(record),)
        case StageGraph():
            return (stage_graphs.graph(record),)
        case Doctor():
            return (lookups.doctor(record),)
        case Catalog():
            return (lookups.catalog(record),)
        case Backtest():
            return (backtests.backtest(record),)
        case Claims():
            return (claims.claims(record),)
        case Costs():
            return (costs.costs(record),)
        case _:
            assert_never(record)
