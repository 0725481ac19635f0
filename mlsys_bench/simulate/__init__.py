"""Token-level simulation of a fleet: the scheduler the engine runs, with a latency profile as its clock.

`run` plays one schedule of requests on N replicas; `run_many` plays independent ones; `percentiles` says what they agree on.
"""

from __future__ import annotations

from mlsys_bench.simulate.fleet import ROUTINGS, Simulation, run
from mlsys_bench.simulate.replica import Timeline
from mlsys_bench.simulate.study import percentiles, run_many

__all__ = ["ROUTINGS", "Simulation", "Timeline", "percentiles", "run", "run_many"]
