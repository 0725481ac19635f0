"""`mlsys loadtest --find-max` beside the truth: a server with slots, whose highest rate queueing theory knows.  `nox -s bench -- find_max`.

The server answers `slots` requests at once, each in exactly the same time, first come first served: an M/D/c queue for Poisson arrivals,
and for constant ones its capacity itself.  Server on one core, client on the other, as the load test does by itself where there are two.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from mlsys_bench import loadtest, slo
from mlsys_bench.journeys import limits
from mlsys_bench.loadlimits import LoadMax
from mlsys_bench.loadtest.truth import Behaviour
from mlsys_bench.loadtest.truth.client import serving
from mlsys_bench.queueing.mdc import mdc

RATE_BAR, TIME_BAR_S = 0.05, 120.0
HELD_BAR = 0.9  # of the runs
TTFT_S, ITL_S, TOKENS = 0.02, 0.002, 32
LIMIT_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kind of server and traffic, with the rate that is the truth."""

    name: str
    slots: int
    arrivals: str
    truth_per_s: float


def main() -> int:
    """Search with ten seeds, print every figure beside its bar, and return how many cases missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="seeds of the first case; others take a third of them")
    asked = parser.parse_args()
    cases = _cases()
    return sum(_case(case, asked.runs if i == 0 else max(1, asked.runs // 3)) for i, case in enumerate(cases))


def service_s() -> float:
    """Return the time that a request holds a slot."""
    return TTFT_S + ITL_S * (TOKENS - 1)


def _cases() -> tuple[Case, ...]:
    capacity_8 = 8 / service_s()
    return (
        Case(name="8 slots, Poisson", slots=8, arrivals="poisson", truth_per_s=_truth(8)),
        Case(name="8 slots, constant", slots=8, arrivals="constant", truth_per_s=capacity_8),
        Case(name="16 slots, Poisson", slots=16, arrivals="poisson", truth_per_s=_truth(16)),
    )


def _truth(slots: int) -> float:
    """Return the rate at which the p99 wait of M/D/c reaches the limit, by bisection."""
    low, high = 0.1 * slots / service_s(), slots / service_s() * (1 - 1e-6)
    for _ in range(50):
        middle = (low + high) / 2
        is_kept = mdc(middle, service_s(), slots).wait.quantile_s(0.99) < LIMIT_S - TTFT_S
        low, high = (middle, high) if is_kept else (low, middle)
    return low


def _case(case: Case, runs: int) -> int:
    print(f"\n{case.name}: capacity {case.slots / service_s():.1f}/s, ttft_p99<{1e3 * LIMIT_S:g}ms holds up to {case.truth_per_s:.2f}/s")
    print(f"{'seed':>5} {'found':>9} {'90 % interval':>17} {'error':>8} {'time':>7} {'levels':>7}  ended")
    held = [_run(case, seed) for seed in range(1, runs + 1)]
    share, bar = sum(held) / runs, HELD_BAR if runs >= 10 else 2 / 3
    print(f"{sum(held)} of {runs} within {RATE_BAR:.0%} in {TIME_BAR_S:.0f} s (bar {bar:.0%}): {'kept' if share >= bar else 'MISSED'}")
    return int(share < bar)


def _run(case: Case, seed: int) -> bool:
    behaviour = Behaviour(ttft_s=TTFT_S, itl_s=ITL_S, tokens=TOKENS, slots=case.slots)
    with serving(behaviour, core=0) as server:
        options = loadtest.Options(
            url=server.url, arrivals=case.arrivals, slo=slo.parse(f"ttft_p99<{1e3 * LIMIT_S:g}ms"), seed=seed, metrics=("off",)
        )
        found = limits.find_max(options, budget=f"{TIME_BAR_S:g}s", quiet=True)
    return _print(case, seed, found)


def _print(case: Case, seed: int, found: LoadMax) -> bool:
    if found.rate_per_s is None or found.interval_per_s is None:
        print(f"{seed:5} {'nothing':>9}  ended: {found.ended}")
        return False
    error = found.rate_per_s / case.truth_per_s - 1
    low, high = found.interval_per_s
    print(
        f"{seed:5} {found.rate_per_s:7.2f}/s {low:8.2f}–{high:.2f} {error:+8.1%} {found.took_s:6.0f}s {len(found.probes):7}  {found.ended}",
        flush=True,
    )
    return abs(error) <= RATE_BAR and found.took_s <= TIME_BAR_S


if __name__ == "__main__":
    sys.exit(main())
