"""The microbenchmark suite against its bars: `nox -s bench -- microbench`, or `python proofs/microbench.py --parts coverage,overhead`.

coverage   the interval of the median, stop rule on: 1,000 synthetic cases of each shape, early steps too; drifting cases are refused
ceilings   memory and products as the suite measures them, beside programs that share no line with it
operators  operators alone beside decode steps and the engine's own clock: three models, three batches
overhead   what the harness adds to a sample of an empty call, and spends between two
quick      `mlsys bench gpu --suite quick` of small-160m, start included
budget     `--budget` against what the run takes
launches   each row's median of five launches beside that of five more, on a quiet machine (12 to 40 minutes)
contended  the verdict under planted load, and on a quiet machine
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable

PARTS: dict[str, str] = {  # part -> module beside this one with `PART() -> bool`
    "coverage": "_microbench_harness",
    "ceilings": "_microbench_machine",
    "operators": "_microbench_operators",
    "overhead": "_microbench_harness",
    "quick": "_microbench_harness",
    "budget": "_microbench_harness",
    "launches": "_microbench_harness",
    "contended": "_microbench_harness",
}


def main() -> int:
    """Run the parts and return how many missed their bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    names = [name for name in parser.parse_args().parts.split(",") if name]
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"unknown part(s) {', '.join(unknown)}; there are {', '.join(PARTS)}")
    missed = [name for name in names if not _part(name)()]
    sys.stdout.write(f"\n{'missed: ' + ', '.join(missed) if missed else 'every figure reaches its bar'}\n")
    return 1 if missed else 0


def _part(name: str) -> Callable[[], bool]:
    sys.stdout.write(f"\n== {name}\n")
    sys.stdout.flush()
    part: Callable[[], bool] = getattr(importlib.import_module(PARTS[name]), name)
    return part


if __name__ == "__main__":
    sys.exit(main())
