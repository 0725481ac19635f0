"""The load test against its bars: a client on one core, a server that knows the truth on the other.

`python proofs/loadtest.py [accuracy poisson closed stall queue cost shares peers]`; without names everything but the peers, within eight
minutes.  Nothing else may run: a neighbour's burst of 2 ms is a miss.  Every part prints how noisy the machine was.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _one_thread  # noqa: F401  before numpy
import _peers
import _truths
import numpy as np

from mlsys_bench import loadtest, summary
from mlsys_bench.calibrations import Held
from mlsys_bench.loadtest import calibrate, crew
from mlsys_bench.loadtest.truth import Behaviour
from mlsys_bench.loadtest.truth.client import Truth, serving
from mlsys_bench.types import Lengths, LoadTest, Requests

STREAM = Behaviour(ttft_s=0.1, itl_s=0.02, tokens=32)
AT_ONCE = Behaviour(ttft_s=0.0, itl_s=0.0, tokens=32)
SHORT = Behaviour(ttft_s=0.0, itl_s=0.0, tokens=1)
RUNS = 3
SECONDS = {50: 6.0, 200: 5.0, 500: 4.0, 1000: 4.0}
GAP_CV = {50: 0.02, 200: 0.05, 500: 0.15}
SEEDS = 10
POISSON = {50: 7.0, 200: 4.0}  # seconds by rate
FULL_CARE = 500  # requests/s up to which every bar holds; above it p50 and the achieved rate


class Figures:
    """Prints figures beside their bars and counts the misses."""

    def __init__(self) -> None:
        self.missed = 0

    def show(self, what: str, value: float, unit: str, bar: str = "(no bar)", kept: bool = True) -> None:
        """Print one."""
        self.missed += not kept
        print(f"{value:12,.4g} {unit:8} {bar:22} {'ok    ' if kept else 'MISSED'} {what}", flush=True)

    def most(self, what: str, values: Sequence[float], unit: str, limit: float) -> None:
        """Print the worst of some runs, which may be at most `limit`; beside it all of them."""
        worst = max(values, key=abs)
        runs = ", ".join(f"{v:.3g}" for v in values) if len(values) > 1 else ""
        self.show(f"{what}{f'  (runs {runs})' if runs else ''}", worst, unit, f"<= {limit:g}", abs(worst) <= limit)

    def least(self, what: str, value: float, unit: str, limit: float) -> None:
        """Print a figure that must be at least `limit`."""
        self.show(what, value, unit, f">= {limit:,g}", value >= limit)


class Shown(Figures):
    """Prints figures that are judged elsewhere."""

    def show(self, what: str, value: float, unit: str, bar: str = "(no bar)", kept: bool = True) -> None:
        """Print one, without its bar."""
        print(f"{value:12,.4g} {unit:8} {'(shown beside)':22} {'':6} {what}", flush=True)


def main() -> int:
    """Print each figure beside its bar; return 1 when one is missed."""
    parts: dict[str, Callable[[Figures], None]] = {
        "accuracy": accuracy, "poisson": poisson, "closed": closed, "stall": stall, "queue": queue, "cost": cost, "shares": shares,
        "peers": lambda figures: _peers.show(figures.show),
    }  # fmt: skip
    wanted = sys.argv[1:] or [name for name in parts if name != "peers"]
    unknown = set(wanted) - set(parts)
    if unknown:
        print(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
        return 2
    figures = Figures()
    for name in wanted:
        noise, began = _truths.Noise(), time.monotonic()
        print(f"--- {name}")
        parts[name](figures)
        print(f"    {time.monotonic() - began:.0f} s, {noise.said()}", flush=True)
    print(f"missed: {figures.missed}")
    return 1 if figures.missed else 0


def loaded(url: str, **how: Any) -> tuple[LoadTest, Requests]:
    """Load a server once."""
    usual: dict[str, Any] = {"arrivals": "constant", "prompt_tokens": Lengths(mean=32), "output_tokens": Lengths(mean=32), "drain_s": 5.0}
    return loadtest.run(loadtest.Options(url=url, **{**usual, **how}))


# ---------------------------------------------------------------- what is reported against what was sent


def accuracy(figures: Figures) -> None:
    """Constant rates, streams of 32 tokens: TTFT, ITL, bias, lateness, gaps and the rate at the server's door.

    Runs of a client that sleeps between events and of one that polls take turns.  Where the client has a core of its own the bars are
    for the one that polls, and the other is shown; elsewhere nobody may poll.
    """
    ways = (False, True) if crew.spare_cores(1) > 0 else (False,)
    with serving(STREAM, _truths.SERVER_CORE) as server:
        for rate, seconds in SECONDS.items():
            runs: dict[bool, list[Held]] = {polls: [] for polls in ways}
            for i, polls in itertools.product(range(RUNS), ways):
                how: Any = {"qps": float(rate), "arrivals": "constant", "duration_s": seconds, "seed": i, "busy_poll": polls}
                runs[polls].append(calibrate.against(server, **how))
            for polls in ways:
                print(f"    {'polling' if polls else 'sleeping'} client at {rate}/s")
                _judge(figures if polls == ways[-1] else Shown(), rate, runs[polls])
    if _truths.has_reference():
        with _truths.reference(STREAM) as c:
            for rate, seconds in SECONDS.items():
                _beside(figures, c, rate, seconds, polls=ways[-1])


def _judge(figures: Figures, rate: int, runs: Sequence[Held]) -> None:
    def of(name: str, scale: float) -> list[float]:
        return [scale * getattr(run, name) for run in runs]

    at = f"at {rate}/s"
    figures.most(f"TTFT p50, off the truth, {at}", of("ttft_p50_error", 100), "%", 5)
    away = [100 * (run.achieved - 1) for run in runs]
    kept = all(abs(off) <= 0.5 or run.verdict == "invalid" for off, run in zip(away, runs, strict=True))
    figures.show(f"achieved rate, off the schedule's, {at}", max(away, key=abs), "%", "<= 0.5, or invalid", kept)
    blind = sum(bool(calibrate.misses(run)) and run.verdict == "valid" for run in runs)
    figures.show(f"runs off the truth that call themselves valid, {at}; verdicts {', '.join(run.verdict for run in runs)}", blind, "runs")
    if rate <= FULL_CARE:
        figures.most(f"TTFT p99, off the truth, {at}", of("ttft_p99_error", 100), "%", 5)
        figures.most(f"ITL p50, off the truth, {at}", [100 * (run.itl_p50_error or 0.0) for run in runs], "%", 1)
        figures.most(f"TTFT bias, {at}", of("bias_s", 1e3), "ms", 0.3)
        figures.most(f"send lateness p50, {at}", of("lateness_p50_s", 1e3), "ms", 0.2)
        figures.most(f"send lateness p99, {at}", of("lateness_p99_s", 1e3), "ms", 1.5)
        if _truths.has_reference():  # whose own door is the steadier one: the bar is held against that
            figures.show(f"CV of constant gaps at our server's door, {at} (median)", statistics.median(of("gap_cv", 1)), "")
        else:
            figures.most(f"CV of constant gaps at the server's door, {at}", of("gap_cv", 1), "", GAP_CV[rate])
    else:
        for name, scale, what in (
            ("ttft_p99_error", 100, "TTFT p99 %"),
            ("bias_s", 1e3, "bias ms"),
            ("lateness_p99_s", 1e3, "late p99 ms"),
        ):
            figures.show(f"{what}, {at} (median)", statistics.median(of(name, scale)), "")
    server_late, server_cpu = (max(of(name, scale)) for name, scale in (("server_lateness_p99_s", 1e3), ("server_cpu_share", 100)))
    client_cpu = max(100 * (run.client_cpu_share or 0.0) for run in runs)
    print(f"             the server itself: late p99 {server_late:.2f} ms, CPU {server_cpu:.0f} %; the client's CPU {client_cpu:.0f} %")


def _beside(figures: Figures, server: _truths.Reference, rate: int, seconds: float, *, polls: bool) -> None:
    """Show the client that the bars are for against the C server: what differs is the server, not the client."""
    cvs = []
    for i in range(RUNS):
        server.reset()
        result, requests = loaded(server.url, qps=float(rate), duration_s=seconds, warmup_s=0.0, seed=i, busy_poll=polls)
        true = server.stats()
        reported = np.array([1e3 * t for r in requests.requests if (t := summary.ttft_s(r)) is not None])
        late = np.array([1e3 * t for r in requests.requests if (t := summary.lateness_s(r)) is not None])
        arrivals = server.arrivals()
        gaps = np.diff(arrivals[arrivals[:, 1] > 0, 0])  # without the probe's
        cvs.append(float(gaps.std() / gaps.mean()))
        off = [100 * (np.quantile(reported, q) / true["ttft_ms"][name] - 1) for q, name in ((0.5, "p50"), (0.99, "p99"))]
        figures.show(
            f"C server at {rate}/s: TTFT p50 off; p99 off {off[1]:+.2f} %, late p50 {np.quantile(late, 0.5):.3f} "
            f"p99 {np.quantile(late, 0.99):.3f} ms, server late p99 {true['server_late_ms']['p99']:.2f} ms, {result.validity.verdict}",
            float(off[0]), "%",
        )  # fmt: skip
    if rate in GAP_CV:
        figures.most(f"CV of constant gaps at the C server's door, at {rate}/s", cvs, "", GAP_CV[rate])


# ---------------------------------------------------------------- arrivals


def poisson(figures: Figures) -> None:
    """Poisson arrivals at the server's door: a KS test at 1 % over seeds, and the lateness against the drawn schedule."""
    from scipy import stats

    with serving(SHORT, _truths.SERVER_CORE) as server:
        for rate, seconds in POISSON.items():
            passed, drawn_passed, late = 0, 0, list[float]()
            for seed in range(SEEDS):
                server.reset()
                _, requests = loaded(server.url, qps=float(rate), arrivals="poisson", duration_s=seconds, seed=seed, warmup_s=0.0, **_ONE)
                rows = [row for row in server.rows() if row.due_unix_s is not None]
                came, due = np.sort([row.arrived_unix_s for row in rows]), np.sort([r.scheduled_s for r in requests.requests])
                passed += bool(stats.kstest(np.diff(came), "expon", args=(0, 1 / rate)).pvalue > 0.01)
                drawn_passed += bool(stats.kstest(np.diff(due), "expon", args=(0, 1 / rate)).pvalue > 0.01)
                late += [row.arrived_unix_s - row.due_unix_s for row in rows if row.due_unix_s is not None]
            figures.least(f"of {SEEDS} seeds Poisson by KS at 1 %, {rate}/s (the drawn schedules: {drawn_passed})", passed, "seeds", 9)
            figures.most(f"arrival after the drawn moment, p99, Poisson {rate}/s", [1e3 * float(np.quantile(late, 0.99))], "ms", 1.5)


_ONE: dict[str, Any] = {"output_tokens": Lengths(mean=1), "timeout_s": 10.0}


# ---------------------------------------------------------------- ceilings of one core


def closed(figures: Figures) -> None:
    """Show closed loops without delay: whole answers and streams per second of one client core, beside plain FastHttpUser."""
    best = {"whole": 0.0, "streams": 0.0, "FastHttpUser": 0.0}
    for name, given in _servers(AT_ONCE):
        with given as server:
            for what, stream, users in (("whole", False, 32), ("streams", True, 16)):
                per_s = statistics.median(_closed(server, stream=stream, users=users) for _ in range(RUNS))
                best[what] = max(best[what], per_s)
                figures.show(f"{what}, {name} server (its CPU share {server.stats().get('cpu_share', float('nan')):.2f})", per_s, "per s")
            fast = _peers.fast_http_user(server, users=32)
            best["FastHttpUser"] = max(best["FastHttpUser"], fast)
            figures.show(f"whole answers of plain Locust FastHttpUser, {name} server", fast, "per s")
    figures.least("whole answers per second of one core", best["whole"], "per s", 12_000)
    figures.least("against plain FastHttpUser in the same run", best["whole"] / best["FastHttpUser"], "x", 1.4)
    figures.least("streams of 32 tokens without delay per second of one core", best["streams"], "per s", 5_000)


def _servers(how: Behaviour) -> list[tuple[str, Any]]:
    ours = [("our", serving(how, _truths.SERVER_CORE))]
    return [*ours, ("C", _truths.reference(how))] if _truths.has_reference() else [*ours]


def _closed(server: Truth | _truths.Reference, *, stream: bool, users: int) -> float:
    server.reset()
    result, _ = loaded(server.url, users=users, stream=stream, duration_s=2.5, warmup_s=0.5)
    return result.request_rate_per_s


# ---------------------------------------------------------------- servers that make people wait


def stall(figures: Figures) -> None:
    """Freeze the server 1 s every 10 s: those who came then waited, and p99 says so.

    One freeze in T seconds of steady sending: TTFT passes 1.1 s - y for the arrivals of 2y seconds (y before the freeze, whose token is
    due within it, and y after its start), so p99 is 1.1 s - 0.005 T.
    """
    seconds = 12.0
    with serving(Behaviour(ttft_s=0.1, itl_s=0.0, tokens=4, stall_every_s=10.0, stall_s=1.0), _truths.SERVER_CORE) as server:
        result, requests = loaded(server.url, qps=100.0, duration_s=seconds, warmup_s=0.0, output_tokens=Lengths(mean=4))
    ttft = [t for r in requests.requests if (t := summary.ttft_s(r)) is not None]
    wanted = 1.1 - 0.005 * seconds
    p99 = float(np.quantile(ttft, 0.99))
    figures.show(
        f"TTFT p99 of a server that froze for 1 s (known answer {wanted:.2f} s)", p99, "s", "within 5 %", abs(p99 / wanted - 1) < 0.05
    )
    figures.show("its TTFT p50: the freeze does not show there", result.ttft_s.p50 or 0.0, "s")


def queue(figures: Figures) -> None:
    """20/s offered to 8 slots of 720 ms, 11.1/s: the headline mean counts from the schedule, as the recursion of G/D/8 has it."""
    slots, service_s, rate, seconds = 8, 0.1 + 31 * 0.02, 20.0, 4.0
    with serving(Behaviour(ttft_s=0.1, itl_s=0.02, tokens=32, slots=slots), _truths.SERVER_CORE) as server:
        result, _ = loaded(server.url, qps=rate, duration_s=seconds, warmup_s=0.0, drain_s=20.0)
    came = np.arange(round(rate * seconds)) / rate
    ends: list[float] = []
    for i, arrival in enumerate(came):
        ends.append(max(float(arrival), ends[i - slots] if i >= slots else 0.0) + service_s)
    wanted = float(np.mean(np.array(ends) - came))
    mean = result.e2e_s.mean or 0.0
    figures.show(
        f"headline mean E2E, {result.ok} requests (known answer {wanted:.3f} s)", mean, "s", "within 2 %", abs(mean / wanted - 1) < 0.02
    )


# ---------------------------------------------------------------- what a run costs, and more than one worker


def cost(figures: Figures) -> None:
    """Wall time of the command beyond the load itself, and that nothing of it imports torch."""
    seconds, extra = 2.0, []
    with serving(SHORT, _truths.SERVER_CORE) as server, tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        command = [sys.executable, "-m", "mlsys_cli", "loadtest", server.url, "--qps", "20", "--arrivals", "constant"]
        for _ in range(5):
            began = time.monotonic()
            subprocess.run(
                [*command, "--duration", f"{seconds:g}s", "--output-tokens", "1", "-o", out], check=False, stdout=subprocess.DEVNULL
            )
            extra.append(time.monotonic() - began - seconds)
        kept = json.loads(out.read_text())["ok"]
    figures.show(
        f"start and end of a run, median of {len(extra)}, files written ({kept} answers)",
        statistics.median(extra),
        "s",
        "<= 1.5",
        statistics.median(extra) <= 1.5,
    )
    for module in ("mlsys_bench.loadtest.worker", "mlsys_bench.loadtest.parent", "mlsys_bench.journeys.load"):
        code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
        has_torch = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode
        figures.show(f"torch imported by {module}", has_torch, "", "0", has_torch == 0)


def shares(figures: Figures) -> None:
    """Two workers follow the schedule of one, request for request."""
    schedules = []
    with serving(SHORT, _truths.SERVER_CORE) as server:
        for processes in (1, 2):
            server.reset()
            _, requests = loaded(
                server.url, qps=100.0, arrivals="gamma:2", duration_s=3.0, warmup_s=0.0, seed=7, processes=processes, **_ONE
            )
            due = sorted(row.due_unix_s - requests.t0_unix_s for row in server.rows() if row.due_unix_s is not None)
            schedules.append(([(r.index, r.scheduled_s) for r in requests.requests], due))
    (one, one_due), (two, two_due) = schedules
    figures.show(f"two workers send the requests of one: {len(one)} and {len(two)}", float(one == two), "", "1", one == two)
    apart = max(abs(a - b) for a, b in zip(one_due, two_due, strict=False)) if len(one_due) == len(two_due) else float("inf")
    figures.most("the same at the server's door: due moments, furthest apart", [1e6 * apart], "µs", 3)


if __name__ == "__main__":
    sys.exit(main())
