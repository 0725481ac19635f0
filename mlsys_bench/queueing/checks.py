"""What a system must be before it is solved: whole counts, laws where laws belong, tables that fit, rates that are numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from mlsys_bench.errors import BadInput
from mlsys_bench.queueing.laws import Law
from mlsys_bench.queueing.station import Balanced, Batches, Bursts, ForkJoin, Network, Priorities, Station, System, Tokens


def check(system: System) -> None:
    """Raise BadInput for a system with a part that cannot be; what only one model knows, that model checks."""
    match system:
        case Station():
            _streams([system.arrivals], bursts=True)
            _laws("service", [system.service])
            _laws("patience", [] if system.patience is None else [system.patience])
            _counts(servers=system.servers, capacity=system.capacity)
        case Priorities():
            _streams(system.arrivals)
            _laws("services", system.services)
            _counts(servers=system.servers)
        case Balanced():
            _streams([system.arrivals])
            _laws("service", [system.service])
            _counts(queues=system.queues, choices=system.choices)
        case Batches():
            _streams([system.arrivals])
            _counts(servers=system.servers, max_batch=system.max_batch)
            if system.noise is not None and not (isinstance(system.noise, Law) and abs(system.noise.mean_s - 1) < 1e-9):
                raise BadInput(f"noise multiplies a batch's time: it has to be a law with mean 1, not {system.noise!r}")
        case ForkJoin():
            _streams([system.arrivals])
            _laws("service", [system.service])
            _counts(branches=system.branches)
        case Network():
            _streams([system.arrivals])
            _laws("a stage's service", [stage.service for stage in system.stages])
            for stage in system.stages:
                _counts(servers=stage.servers)
            if not all(math.isfinite(x) for x in (*system.entry, *(x for row in system.routing for x in row))):
                raise BadInput("entry shares and the routing table must be numbers from 0 to 1")
        case Tokens():
            _tokens(system)


def check_bursts(bursts: Bursts) -> None:
    """Raise BadInput unless rates are numbers from 0 up and the switches a table between as many phases, with one steady state."""
    n, rates = len(bursts.rates_per_s), bursts.rates_per_s
    if n == 0 or len(bursts.switches_per_s) != n or any(len(row) != n for row in bursts.switches_per_s):
        raise BadInput(f"bursts of {n} phases need a {n} x {n} table of switches, and at least one phase")
    Q = np.array(bursts.switches_per_s, dtype=np.float64)
    np.fill_diagonal(Q, 0.0)
    if not (all(rate >= 0 and math.isfinite(rate) for rate in rates) and np.isfinite(Q).all() and (Q >= 0).all()):
        raise BadInput("bursts: rates of arrivals and of switches must be finite, from 0 up")
    reach = np.linalg.matrix_power((Q > 0) | np.eye(n, dtype=bool), n)
    if not reach.all(axis=0).any():
        raise BadInput("bursts: some phases are never left for others, so the share of time in each depends on the start")
    if bursts.rate_per_s <= 0:
        raise BadInput("bursts without arrivals: a phase that is visited again and again needs a positive rate")


def _streams(arrivals: Iterable[object], *, bursts: bool = False) -> None:
    for stream in arrivals:
        if bursts and isinstance(stream, Bursts):
            check_bursts(stream)
        elif not isinstance(stream, Law):
            also = " or Bursts" if bursts else ""
            raise BadInput(f"arrivals must be a law of the time between them{also}, such as Exponential(1 / rate), not {stream!r}")


def _laws(what: str, laws: Iterable[object]) -> None:
    for law in laws:
        if not isinstance(law, Law):
            raise BadInput(f"{what} must be a law, such as Exponential(mean_s), not {law!r}")


def _counts(**counts: object) -> None:
    """Raise BadInput unless each count there is, is a whole number; None stands for no limit."""
    for name, count in counts.items():
        unlimited = count is None and name in ("capacity", "max_batch")
        if not unlimited and not isinstance(count, int | np.integer):
            raise BadInput(f"{name} must be a whole number, not {count!r}")
        if name == "servers" and isinstance(count, int | np.integer) and count < 1:
            raise BadInput(f"{count} servers: at least one is needed")


def _tokens(system: Tokens) -> None:
    _streams([system.arrivals])
    _laws("tokens", [system.prompt_tokens, system.output_tokens])
    _counts(max_batch=system.max_batch)
    for name in ("prompt_range", "output_range"):
        ends = getattr(system, name)
        if len(ends) != 2 or not 1 <= ends[0] <= ends[1]:
            raise BadInput(f"{name} is a least and a most number of tokens, from 1 up, not {ends}")
    times_s = (system.fixed_s, system.per_sequence_s, system.per_kv_token_s, system.per_prompt_token_s)
    if not all(time_s >= 0 and math.isfinite(time_s) for time_s in times_s):
        raise BadInput(f"the parts of a step's time must be finite, from 0 up, not {times_s}")
    if not system.kv_tokens > 0:
        raise BadInput(f"room for {system.kv_tokens} KV tokens: some is needed")
