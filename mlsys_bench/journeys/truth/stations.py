"""Models named in Kendall's notation, A/S/c[/K][+P][-PS]: one queue before equal servers."""

from __future__ import annotations

import re

from mlsys_bench.errors import BadInput
from mlsys_bench.journeys.truth.known import Known, Number, numbers_of, solved
from mlsys_bench.journeys.truth.parameters import Parameters
from mlsys_bench.queueing.answer import EXACT, Effort, poisson_rate
from mlsys_bench.queueing.laws import Deterministic, Exponential, Law
from mlsys_bench.queueing.patience import erlang_a, fixed_patience, impatient
from mlsys_bench.queueing.station import Bursts, Station

KENDALL = re.compile(
    r"(?P<arrival>M|D|GI?|MMPP)/(?P<service>M|D|G|PH)/(?P<servers>c|\d+)(?:/(?P<room>K|c|\d+))?(?:\+(?P<patience>[MDG]))?(?P<sharing>-PS)?"
)
MEANING = {"M": "exp", "D": "det"}


def station(model: str, p: Parameters, effort: Effort) -> Known:
    """Return a station solved.  `c`, one of `rho`, `a`, `lambda`, and the laws that the name leaves open are its parameters."""
    name = KENDALL.fullmatch(model)
    assert name is not None, model
    servers = _count(p, "c", name["servers"])
    mean_s = p.number("mean_service", 1.0)
    service = _law(p, "service", name["service"], mean_s)
    asked = Station(
        arrivals=_arrivals(p, name["arrival"], service, servers),
        service=service,
        servers=servers,
        capacity=servers if name["room"] == "c" else _count(p, "K", name["room"]) if name["room"] else None,
        patience=_patience(p, name["patience"]) if name["patience"] else None,
        sharing=bool(name["sharing"]),
    )
    p.all_read()
    return solved(asked, effort) if asked.patience is None else _impatient(asked, asked.patience, effort)


def _count(p: Parameters, parameter: str, written: str) -> int:
    """Return a number of servers or places: that of the name, or the parameter where the name has a letter."""
    if not written.isdecimal():
        return p.whole(parameter)
    p.follows(parameter, int(written))
    return int(written)


def _law(p: Parameters, parameter: str, letter: str, mean_s: float) -> Law:
    law = p.law(parameter, mean_s, MEANING.get(letter))
    wanted = {"M": Exponential, "D": Deterministic}.get(letter)
    if wanted is not None and not isinstance(law, wanted):
        raise BadInput(f"parameter {parameter}={law} contradicts the {letter} of the model's name")
    return law


def _arrivals(p: Parameters, letter: str, service: Law, servers: int) -> Law | Bursts:
    if letter == "MMPP":
        bursts = _bursts(p)
        p.follows("rho", bursts.rate_per_s * service.mean_s / servers)
        return bursts
    gap_s = 1 / rate_per_s(p, service.mean_s, servers)
    return _law(p, "arrival", letter, gap_s).scaled(gap_s)  # a bounded Pareto law has a mean of its own until then


def rate_per_s(p: Parameters, service_s: float, servers: int) -> float:
    """Return the arrival rate from the one of utilisation `rho`, offered load `a` and rate `lambda` that is given."""
    given = [name for name in ("rho", "a", "lambda") if p.has(name)]
    if not given:
        raise BadInput("the load is missing: one of rho, a and lambda")
    scale = {"rho": servers / service_s, "a": 1 / service_s, "lambda": 1.0}
    rate = p.number(given[0]) * scale[given[0]]
    for other in given[1:]:
        p.follows(other, rate / scale[other])
    return rate


def _bursts(p: Parameters) -> Bursts:
    phases = 0
    while p.has(f"l{phases}"):
        phases += 1
    if phases < 2:
        raise BadInput("parameters l0, l1 … are the arrival rates of the phases: at least two are needed")
    return Bursts(
        rates_per_s=tuple(p.number(f"l{i}", zero=True) for i in range(phases)),
        switches_per_s=tuple(tuple(0.0 if i == j else p.number(f"q{i}{j}", 0.0, zero=True) for j in range(phases)) for i in range(phases)),
    )


def _patience(p: Parameters, letter: str) -> Law:
    """Return how long customers wait: mean `patience`, or rate `theta`; +G has its law in `patience_law`."""
    mean_s = 1 / p.number("theta") if p.has("theta") else p.number("patience")
    return p.law("patience_law", mean_s) if letter == "G" else {"M": Exponential, "D": Deterministic}[letter](mean_s)


def _impatient(asked: Station, patience: Law, effort: Effort) -> Known:
    """Return a station whose customers give up: beside the wait of those served, what was offered to all, and what all waited."""
    rate = poisson_rate(asked.arrivals)
    if rate is None or not isinstance(asked.service, Exponential) or asked.capacity is not None or asked.sharing:
        return solved(asked, effort)
    match patience:
        case Exponential():
            found, law = erlang_a(rate, asked.service.mean_s, asked.servers, patience.mean_s), "exponential patience: Erlang A"
        case Deterministic():
            found, law = fixed_patience(rate, asked.service.mean_s, asked.servers, patience.mean_s), "one timeout for all"
        case _:
            found, law = impatient(rate, asked.service.mean_s, asked.servers, patience), f"patience with law {patience}"
    return Known(
        laws={
            "wait": found.queue.wait,
            "sojourn": found.queue.sojourn,
            "wait_served": found.queue.wait,
            "sojourn_served": found.queue.sojourn,
            "offered_wait": found.offered_wait,
            "wait_all": found.wait_all,
        },
        numbers={"wait_mean_all": Number(found.wait_all.mean_s), **numbers_of(found.queue)},
        method="M/M/c+G",
        why=f"{law}; an integral over the offered wait",
        expected_error=EXACT,
    )
