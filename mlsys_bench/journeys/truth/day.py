"""Models whose load changes with time: a wave that repeats itself, and a step that finds its new replicas still cold."""

from __future__ import annotations

from mlsys_bench.errors import BadInput
from mlsys_bench.journeys.truth.known import Known, Number
from mlsys_bench.journeys.truth.parameters import Parameters
from mlsys_bench.queueing.answer import EXACT, Effort
from mlsys_bench.queueing.diurnal import Moment, Sinusoid, cold_start, mt_g_inf, mt_m_c

WAVE = ("lambda(t)", "lb*(1+beta*sin(2 pi t/T))")
METHOD = "Mt/M/ct"


def _wave(p: Parameters) -> tuple[Sinusoid, float]:
    """Return the wave and the time of the day at which the row looks: a share `phase` of the period."""
    p.spells_out(*WAVE)
    swing = p.number("beta", zero=True)
    if swing > 1:
        raise BadInput(f"parameter beta={swing:g} makes the arrival rate negative: it must be at most 1")
    wave = Sinusoid(mean_per_s=p.number("lb"), swing=swing, period_s=p.number("T"))
    return wave, p.number("phase", zero=True) * wave.period_s


def waves(model: str, p: Parameters, effort: Effort) -> Known:
    """Return Mt/M/c in the regime that repeats itself, at one phase of the period."""
    wave, time_s = _wave(p)
    servers, service_s = p.whole("c"), p.number("mean_service", 1.0)
    p.all_read()
    (moment,) = mt_m_c(wave, service_s, servers, [time_s], period_s=wave.period_s)
    return _at(moment, "Kolmogorov's equations, the regime that repeats itself")


def unlimited(model: str, p: Parameters, effort: Effort) -> Known:
    """Return Mt/G/inf, where nobody waits."""
    wave, time_s = _wave(p)
    service = p.law("service", p.number("mean_service", 1.0), "exp")
    p.all_read()
    mean = float(mt_g_inf(wave, service, [time_s])[0])
    numbers = {"mean_in_system": Number(mean), "stable": Number(1.0)}
    return Known(laws={}, numbers=numbers, method="Mt/G/inf", why="the load if nobody ever waited", expected_error=EXACT)


def cold(model: str, p: Parameters, effort: Effort) -> Known:
    """Return a step in load at time 0 whose new replicas serve from time `cold` on, at time t."""
    p.spells_out("step at t", "0")
    p.spells_out("replicas c1->c2 at t", "cold")
    p.spells_out("start stationary at lambda1", "")
    (moment,) = cold_start(
        before_per_s=p.number("lambda1"),
        after_per_s=p.number("lambda2"),
        service_s=p.number("mean_service", 1.0),
        servers=p.whole("c1"),
        servers_after=p.whole("c2"),
        cold_s=p.number("cold", zero=True),
        times_s=[p.number("t", zero=True)],
    )
    p.all_read()
    return _at(moment, "Kolmogorov's equations from the old load's steady state")


def _at(moment: Moment, why: str) -> Known:
    numbers = {"p_delay": Number(moment.p_delay), "mean_in_system": Number(moment.mean_requests), "stable": Number(1.0)}
    laws = {"virtual_wait": moment.virtual_wait}
    return Known(laws=laws, numbers=numbers, method=METHOD, why=why, expected_error=EXACT)
