"""How much CPU it takes to be told something: `mlsys --help` and a simple `mlsys plan`, as whole processes.

User and system time of the process and of its threads, median of several runs after one that fills the bytecode cache, as an installed
wheel has it.  Without a cache, as PYTHONDONTWRITEBYTECODE leaves a checkout, a plan takes some 0.15 s more.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

RUNS = 7
PLAN = "plan --qps 200 --model llama-3-8b --gpu h100-sxm,l4 --slo ttft_p95<500ms,tpot_p99<50ms"
FIGURES: tuple[tuple[str, Sequence[str], float | None], ...] = (  # what, python's arguments, bar in seconds
    ("mlsys --help", ("-m", "mlsys_cli", "--help"), 0.3),
    (f"mlsys {PLAN}", ("-m", "mlsys_cli", *PLAN.split()), 1.5),
    ("import mlsys_bench.plan", ("-c", "import mlsys_bench.plan"), None),
    ("import numpy", ("-c", "import numpy"), None),
    ("an empty python", ("-c", "pass"), None),
)


def main() -> int:
    """Print each figure beside its bar; return 1 when one is missed."""
    missed = 0
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for what, arguments, bar_s in FIGURES:
            cpu_s(arguments, environment)
            runs = [cpu_s(arguments, environment) for _ in range(RUNS)]
            median_s = statistics.median(runs)
            kept = bar_s is None or median_s <= bar_s
            missed += not kept
            verdict = "(no bar)" if bar_s is None else f"<= {bar_s:g} s  {'ok' if kept else 'MISSED'}"
            print(f"{median_s:6.3f} s CPU  {verdict:18} {min(runs):.3f} to {max(runs):.3f}  {what}")
    return 1 if missed else 0


def cpu_s(arguments: Sequence[str], environment: dict[str, str]) -> float:
    """Return user and system time of one run of this python, from start to end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())
