"""Queueing theory for serving systems: exact where exactness is possible, with its expected error where not.

`solve(system)` chooses the method and says which, why, and how far off it may be; `servers_for(target)` finds the fewest servers.
`station` holds what can be asked about, `laws` the laws of times.  Each model is a function of its own in a module of its name that
returns a `Queue`; docs/queueing.md says which model fits which system.
"""

from mlsys_bench.queueing.answer import Answer
from mlsys_bench.queueing.chain import Batching
from mlsys_bench.queueing.laws import Law, parse_law
from mlsys_bench.queueing.mmc import erlang_b, erlang_c
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.sizing import Sized, Target, servers_for
from mlsys_bench.queueing.solve import solve
from mlsys_bench.queueing.station import (
    Balanced,
    Batches,
    Bursts,
    ForkJoin,
    Network,
    Priorities,
    Slots,
    Stage,
    Station,
    System,
    Tokens,
    tandem,
)
from mlsys_bench.queueing.times import Time

__all__ = [
    "Answer",
    "Balanced",
    "Batches",
    "Batching",
    "Bursts",
    "ForkJoin",
    "Law",
    "Network",
    "Priorities",
    "Queue",
    "Sized",
    "Slots",
    "Stage",
    "Station",
    "System",
    "Target",
    "Time",
    "Tokens",
    "erlang_b",
    "erlang_c",
    "parse_law",
    "servers_for",
    "solve",
    "tandem",
]
