"""The demo holds: its plan's p50 and p95 within 15 % of the load test and inside their intervals, the loop within 6 minutes.

`nox -s bench -- demo` on a machine that does nothing else: an engine on two cores is as fast as the rest of the machine lets it be.
`python proofs/demo.py FOLDER` judges what `mlsys demo --out FOLDER` left there.

To tell where an error comes from, the load test's own steps stand beside the profile, by what they computed, and each error in its parts
(`journeys.causes`): a large part of steps is a machine that was another than at calibration, or the form of the profile; for what is
left over, look at the simulator, HTTP or the client.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mlsys_bench import latency, record
from mlsys_bench.checked import Causes, Demo
from mlsys_bench.journeys import demo, served
from mlsys_bench.types import LatencyProfile, Requests

KEYS = tuple(f"{metric}_{stat}_s" for metric in ("ttft", "tpot", "e2e") for stat in ("p50", "p95"))
ERROR_PERCENT = 15.0
RESIDUAL_PERCENT = 5.0
UTILISATION = 0.6
MINUTES = 6.0
QUIET_PERCENT = 3.0  # of its steps' time that others may have the engine's core before a figure says more of them than of the demo
GROUPS = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 12), (13, 16), (17, 64), (65, 128), (129, 256))  # tokens of a step
FEWEST = 5  # steps of a group


def main(arguments: Sequence[str]) -> int:
    """Run the demo once, or take what one left; print every figure beside its bar and where errors come from; return 1 on a miss."""
    if arguments:
        return judged(Path(arguments[0]), None)
    with tempfile.TemporaryDirectory() as folder:
        start_s = time.monotonic()
        subprocess.run([sys.executable, "-m", "mlsys_cli", "demo", "--out", folder], check=True, stdout=subprocess.DEVNULL)
        return judged(Path(folder), (time.monotonic() - start_s) / 60)


def judged(folder: Path, took_min: float | None) -> int:
    """Print a demo's figures beside their bars, and then what they are made of."""
    result = record.read(folder / "demo.json", Demo)
    profile = record.read(folder / "profile.json", LatencyProfile)
    errors = result.prediction_error_percent
    missed = sum([
        *(_line(f"{key} error", f"{value:+.1f} %", ERROR_PERCENT if key in KEYS else None, abs(value)) for key, value in errors.items()),
        *(key not in errors for key in KEYS),
        *(_holds(f"{c.key} inside its interval", c.inside is True) for c in result.checks if c.key in KEYS),
        _line("residual of the profile", f"{100 * profile.residual_log_sd:.1f} %", RESIDUAL_PERCENT, 100 * profile.residual_log_sd),
        _line("utilisation", f"{result.plan.utilisation:.2f}", UTILISATION, result.plan.utilisation),
        took_min is not None and _line("whole demo", f"{took_min:.2f} min", MINUTES, took_min),
        _holds(f"load test {result.measured.validity.verdict}", result.measured.validity.verdict == "valid"),
    ])  # fmt: skip
    print("; ".join(result.measured.validity.reasons) or f"{result.measured.ok} answers; missed: {missed}")
    explain(folder, profile, result.causes)
    return 1 if missed else 0


def _line(what: str, said: str, bar: float | None, value: float) -> bool:
    """Print a figure beside its bar; return whether it misses it."""
    kept = bar is None or value <= bar
    print(f"{what:34}{said:>12}  {'no bar' if bar is None else f'{bar:g}':>8}  {'' if bar is None else 'ok' if kept else 'MISSED'}")
    return not kept


def _holds(what: str, kept: bool) -> bool:
    print(f"{what:56}  {'ok' if kept else 'MISSED'}")
    return not kept


# ---------------------------------------------------------------- where an error comes from


def explain(folder: Path, profile: LatencyProfile, why: Causes | None) -> None:
    """Print the load test's own steps beside the profile, what HTTP added, and the parts of each error."""
    requests, log = record.read(folder / "requests.parquet", Requests), folder / demo.STEPS
    seen = served.logged(log, [requests], 0.0)
    waited = 100 * served.waited(profile, seen)
    print(f"profile: {profile.note}")
    print(", ".join(f"{name} {value:.3g}" for name, value in zip(profile.terms, profile.coefficients, strict=True)))
    quiet = "" if waited < QUIET_PERCENT else "  THE MACHINE WAS NOT QUIET: errors below what that explains say nothing of the demo"
    print(f"others had the engine's core for {waited:.1f} % of the load test's steps' time{quiet}")
    print("profile against these steps, by tokens (steps): " + ", ".join(_by_tokens(profile, seen)))
    for name, constant in (("request", "request_overhead_s"), ("token", "token_overhead_s")):
        print(f"HTTP added to a {name}: {1e3 * getattr(seen, f'{name}_s'):.2f} ms, profile {1e3 * profile.constants[constant]:.2f} ms")
    for each in why.figures if why else ():
        parts = f"arrivals {each.arrivals_percent:+.1f}, steps {each.steps_percent:+.1f}, all else {each.rest_percent:+.1f} %"
        print(f"{each.key}: {each.error_percent:+.1f} % = {parts}")


def _by_tokens(profile: LatencyProfile, seen: served.Window) -> Iterator[str]:
    """Yield the error of the profile for steps of so many tokens: against all their time, and against their own where others had some."""
    told_s, tokens = np.asarray(latency.step_s(profile, list(seen.features.T))), seen.features[:, 0] + seen.features[:, 2]
    for low, high in GROUPS:
        rows = (tokens >= low) & (tokens <= high)
        if rows.sum() >= FEWEST:
            whole, own = (100 * (told_s[rows].sum() / taken_s[rows].sum() - 1) for taken_s in (seen.period_s, seen.own_s))
            yield f"{low} to {high} {whole:+.1f} %, own {own:+.1f} % ({rows.sum()})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
