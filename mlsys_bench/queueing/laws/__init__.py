"""Laws of a service time or of the time between arrivals, each with moments, tail, quantiles, transform, draws and a short name.

Names are those of the truth table: `exp`, `det`, `erl:k`, `gamma:v`, `logn:v`, `h2:v` (balanced means), `cox2:v` (Marie) with SCV v,
`unif` (0 to twice the mean), `mix:p:a:b` (two points), `bp:alpha:low:high` (bounded Pareto).
"""

from mlsys_bench.queueing.laws.base import Law
from mlsys_bench.queueing.laws.curves import BoundedPareto, Erlang, Gamma, Lognormal, Uniform
from mlsys_bench.queueing.laws.notation import parse_law
from mlsys_bench.queueing.laws.phases import Exponential, Hyperexponential, PhaseType, balanced, marie
from mlsys_bench.queueing.laws.points import Deterministic, Empirical, TwoPoint

__all__ = [
    "BoundedPareto",
    "Deterministic",
    "Empirical",
    "Erlang",
    "Exponential",
    "Gamma",
    "Hyperexponential",
    "Law",
    "Lognormal",
    "PhaseType",
    "TwoPoint",
    "Uniform",
    "balanced",
    "marie",
    "parse_law",
]
