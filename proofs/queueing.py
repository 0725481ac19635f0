"""The queueing core against its bars: the truth table, the time of a formula, of a confirmed answer, of sizing, and of simulation.

Times are wall clock, median of several runs after one that imports and compiles; linear algebra has one thread.  A child process that
cannot see numba times what a machine without it has.
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import _lattice
import _one_thread  # noqa: F401  before numpy: what a planner's search has

from mlsys_bench.types import Scalar

TRUTH = Path(__file__).resolve().parents[2] / "shared" / "data" / "queueing" / "truth.csv"
WITHOUT = "--without-numba"
RUNS = 7


class Figures:
    """Prints figures beside their bars and counts the misses."""

    def __init__(self) -> None:
        self.missed = 0

    def at_most(self, what: str, value: float, bar: float | None, unit: str = "s") -> None:
        """Print a figure that must not exceed its bar."""
        self._print(what, value, bar, unit, "<=", bar is None or value <= bar)

    def at_least(self, what: str, value: float, bar: float | None, unit: str) -> None:
        """Print a figure that must reach its bar."""
        self._print(what, value, bar, unit, ">=", bar is None or value >= bar)

    def _print(self, what: str, value: float, bar: float | None, unit: str, sign: str, kept: bool) -> None:
        self.missed += not kept
        verdict = "(no bar)" if bar is None else f"{sign} {bar:g} {unit}  {'ok' if kept else 'MISSED'}"
        print(f"{value:10.4g} {unit:12} {verdict:26} {what}", flush=True)


def main() -> int:
    """Print each figure beside its bar; return 1 when one is missed."""
    if WITHOUT in sys.argv:
        sys.modules["numba"] = None  # type: ignore[assignment]  # as if it were not installed
        print(json.dumps(simulation_figures(budget_s=12.0)))
        return 0
    figures = Figures()
    errors(figures)
    formulas(figures)
    sizing(figures)
    simulation(figures)
    others(figures)
    return 1 if figures.missed else 0


def heading(text: str) -> None:
    """Print a heading."""
    print(f"\n{text}", flush=True)


def median_s(work: Callable[[], object], runs: int = RUNS) -> float:
    """Return the median time of a piece of work, after one run that imports and compiles."""
    work()
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


# ---------------------------------------------------------------- errors


def errors(figures: Figures) -> None:
    """Back-test the truth table: every quantity of every model."""
    heading("errors against the truth table")
    if not TRUTH.exists():
        print("the truth table is not beside this checkout: its errors are not measured")
        return
    from mlsys_bench.journeys import backtest

    start = time.perf_counter()
    result = backtest.queueing(TRUTH, out=None, tolerance="1%", budget="10s", seed=0)
    refuted = Counter(row["model"] for row in result.predictions if is_refuted(row))
    for score in result.by_model:
        worst = f"worst {score.worst_error:.2g}" if score.worst_error is not None else "no answer"
        bars = f"{score.bars[0]:g}" if score.bars[0] == score.bars[1] else f"{score.bars[0]:g}..{score.bars[1]:g}"
        aside = f" ({refuted[score.model]} refuted above)" if refuted[score.model] else ""
        what = f"{score.model}: rows outside their bar, of {score.rows}{aside}; {worst} relative, bar {bars}"
        figures.at_most(what, score.rows - score.within - refuted[score.model], 0, "rows")
    for miss in (s for s in result.scores if s.within < s.rows):
        print(f"{'':12}missed: {miss.model} {miss.quantity}, {miss.rows - miss.within} of {miss.rows}, worst at {miss.worst_parameters}")
    figures.at_most(f"all {result.rows:,} rows", time.perf_counter() - start, None)


def is_refuted(row: Mapping[str, Scalar]) -> bool:
    """Say whether we miss a row whose value cannot be right, by bounds that use nothing of ours, while we lie within them; print them."""
    from mlsys_bench.journeys.truth import scores

    if row["model"] != "M/G/1" or not str(row["quantity"]).startswith("sojourn_p") or not row["predicted"]:
        return False
    asked = dict(part.split("=", 1) for part in str(row["parameters"]).split(";"))
    service = _lattice.SERVICES.get(asked.get("service", ""))
    if service is None:
        return False
    value, ours, precision = (float(row[name] or 0.0) for name in ("value", "predicted", "precision_abs"))
    if (scores.compare({k: str(v) for k, v in row.items()}, value, precision, ours).of_bar or 0.0) <= 1:
        return False
    mean_s, p = float(asked["mean_service"]), int(str(row["quantity"]).removeprefix("sojourn_p")) / 100
    low, high = (mean_s * end for end in _lattice.sojourn_bounds(service, float(asked["rho"]), p, ours / mean_s))
    shown = low <= ours <= high and not low <= value <= high
    print(f"{'':12}{row['model']} {row['parameters']} {row['quantity']}: {value:.6f} in the table ({row['source']}), {ours:.6f} by us;")
    print(f"{'':12}by waits on a lattice, rounded down and up (_lattice.py), between {low:.6f} and {high:.6f}", end=": ")
    print("the table's value is refuted, and not counted against us" if shown else "this does not refute the table")
    return shown


# ---------------------------------------------------------------- formulas


def formulas(figures: Figures) -> None:
    """Time one station and one percentile, from nothing to the number, for two fleets."""
    from mlsys_bench import queueing as q
    from mlsys_bench.queueing import laws

    heading("one station, one percentile, by formula")

    def station(servers: int, arrivals: str, service: str) -> q.Station:
        return q.Station(arrivals=q.parse_law(arrivals, 1 / (0.9 * servers)), service=q.parse_law(service, 1.0), servers=servers)

    cases = [("exp", law) for law in ("exp", "det", "h2:4", "erl:2", "logn:0.25", "logn:1", "logn:4", "gamma:10", "mix:0.9:1:10")]
    cases += [("gamma:4", "exp"), ("gamma:4", "logn:4"), ("gamma:0.25", "logn:1")]
    for servers, bar_s in ((100, 0.05), (200, 0.2)):
        for arrivals, service in cases:
            asked = station(servers, arrivals, service)
            taken = median_s(lambda asked=asked: q.solve(asked, tolerance=math.inf).queue.wait_quantile_s(0.99))
            figures.at_most(f"p99 wait, arrivals {arrivals}, service {service}, {servers} servers at 90 %", taken, bar_s)
    bursts = q.Bursts(rates_per_s=(60.0, 140.0), switches_per_s=((0.0, 0.05), (0.1, 0.0)))
    asked = q.Station(arrivals=bursts, service=laws.Exponential(1.0), servers=100)
    figures.at_most("p99 wait, bursts in two phases, 100 servers", median_s(lambda: q.solve(asked).queue.wait_quantile_s(0.99)), 0.05)


def sizing(figures: Figures) -> None:
    """Time a pipeline and the search for the fewest servers."""
    from mlsys_bench import queueing as q
    from mlsys_bench.queueing import laws

    heading("a pipeline, and the fewest servers")
    for law in ("exp", "logn:1.5", "gamma:0.25"):
        means_s = (0.004, 0.02, 0.03, 0.25, 0.01)
        stages = tuple(q.Stage(service=q.parse_law(law, m), servers=math.ceil(100 * m / 0.85)) for m in means_s)
        line = q.tandem(laws.Exponential(0.01), stages)
        taken = median_s(lambda line=line: q.solve(line, tolerance=math.inf).queue.sojourn_quantile_s(0.99), runs=3)
        figures.at_most(f"p99 of five stages by formula, service {law}", taken, 1.0)
    for law in ("exp", "logn:4", "gamma:0.25"):
        station = q.Station(arrivals=laws.Exponential(1 / 1000), service=q.parse_law(law, 1.0))
        target = q.Target(station=station, limit_s=0.25, p=0.99, of="wait")
        found = q.servers_for(target)
        taken = median_s(lambda target=target: q.servers_for(target), runs=3)
        figures.at_most(f"fewest servers for 1,000 erlangs of {law}, p99 wait under a quarter: {found.servers}", taken, 1.0)


# ---------------------------------------------------------------- simulation


def simulation(figures: Figures) -> None:
    """Time confirmed answers and the rate of the simulator, with numba here and without it in a child."""
    heading("confirmed by simulation, and G/G/8 requests per second on one core (compile time apart)")
    bars = {"with numba": (2.0, 5e6), "without": (15.0, 0.7e6)}
    child = [sys.executable, __file__, WITHOUT]
    said = {"without": json.loads(subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True).stdout)}
    if importlib.util.find_spec("numba") is None:
        print("numba is not installed (pip install 'mlsys-bench[fast]'): the figures with it are not measured")
    else:
        said = {"with numba": simulation_figures(budget_s=1.8), **said}
    for name, measured in said.items():
        for what, taken in measured["confirmed_s"].items():
            figures.at_most(f"{name}: {what}", taken, bars[name][0])
        for what, rate in measured["rate_per_s"].items():
            figures.at_least(f"{name}: {what}", rate, bars[name][1], "requests/s")


def simulation_figures(budget_s: float) -> dict[str, dict[str, float]]:
    """Return the seconds of confirmed answers and the requests per second of the simulator."""
    import numpy as np

    from mlsys_bench import queueing as q
    from mlsys_bench.queueing.des import recursion

    confirmed, rates = {}, {}
    for servers, arrivals, service in ((4, "exp", "logn:4"), (16, "gamma:4", "logn:4"), (16, "exp", "mix:0.9:1:10")):
        asked = q.Station(arrivals=q.parse_law(arrivals, 1 / (0.9 * servers)), service=q.parse_law(service, 1.0), servers=servers)
        q.solve(asked, tolerance=0.0, budget_s=0.1)  # compiles
        start = time.perf_counter()
        answer = q.solve(asked, tolerance=0.0, budget_s=budget_s)
        reached = f"p99 wait {answer.queue.wait_quantile_s(0.99):.3g}, percentiles within {100 * answer.expected_error:.1f} %"
        what = f"{arrivals}/{service}/{servers} at 90 % confirmed, {reached}"
        confirmed[what] = time.perf_counter() - start
    for arrivals, service in (("exp", "exp"), ("gamma:4", "logn:4")):
        asked = q.Station(arrivals=q.parse_law(arrivals, 1 / 7.2), service=q.parse_law(service, 1.0), servers=8)
        simulate = recursion.simulator(asked)
        taken = median_s(lambda simulate=simulate: simulate(np.random.default_rng(1), 16, 100_000), runs=3)
        rates[f"{arrivals}/{service}/8 at 90 %"] = 16 * 100_000 / taken
    return {"confirmed_s": confirmed, "rate_per_s": rates}


def others(figures: Figures) -> None:
    """Run ciw and simpy on M/M/8 at 90 %, where they are installed: no bar, for comparison."""
    heading("others on M/M/8 at 90 %, one core")
    for name, run in (("ciw", with_ciw), ("simpy", with_simpy)):
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: not measured")
            continue
        n = 40_000
        start = time.perf_counter()
        run(n)
        figures.at_least(name, n / (time.perf_counter() - start), None, "requests/s")


def with_ciw(n: int) -> None:
    """Simulate n customers of M/M/8 with ciw."""
    import ciw

    network = ciw.create_network(
        arrival_distributions=[ciw.dists.Exponential(7.2)], service_distributions=[ciw.dists.Exponential(1.0)], number_of_servers=[8]
    )
    ciw.seed(1)
    ciw.Simulation(network).simulate_until_max_customers(n)


def with_simpy(n: int) -> None:
    """Simulate n customers of M/M/8 with simpy."""
    import random

    import simpy

    draw = random.Random(1)
    world = simpy.Environment()
    servers = simpy.Resource(world, capacity=8)

    def customer():  # type: ignore[no-untyped-def]
        with servers.request() as turn:
            yield turn
            yield world.timeout(draw.expovariate(1.0))

    def source():  # type: ignore[no-untyped-def]
        for _ in range(n):
            yield world.timeout(draw.expovariate(7.2))
            world.process(customer())

    world.process(source())
    world.run()


if __name__ == "__main__":
    sys.exit(main())
