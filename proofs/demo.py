"""The demo holds: prediction within 30 % of measurement at the median, and the loop within 6 minutes.  `nox -s bench -- demo`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mlsys_bench import record
from mlsys_bench.types import Demo

ERROR_PERCENT = 30.0
MINUTES = 6.0
KEYS = ("ttft_p50_s", "tpot_p50_s", "e2e_p50_s")


def main() -> int:
    """Run the demo once and print every figure beside its bar; return how many missed."""
    with tempfile.TemporaryDirectory() as folder:
        start_s = time.monotonic()
        subprocess.run([sys.executable, "-m", "mlsys_cli", "demo", "--out", folder], check=True, stdout=subprocess.DEVNULL)
        took_min = (time.monotonic() - start_s) / 60
        result = record.read(Path(folder) / "demo.json", Demo)
    missed = 0
    print(f"{'figure':26} {'measured':>10} {'bar':>10}")
    for key, value in result.prediction_error_percent.items():
        bar = ERROR_PERCENT if key in KEYS else None
        missed += bar is not None and abs(value) > bar
        print(f"{key + ' error':26} {value:+9.1f}% {f'±{bar:.0f} %' if bar else 'none':>10}")
    missed += sum(key not in result.prediction_error_percent for key in KEYS)
    missed += took_min > MINUTES
    print(f"{'whole demo':26} {took_min:6.2f} min {f'{MINUTES:g} min':>10}")
    print(f"{'load test':26} {result.measured.validity.verdict:>10} {'—':>10}  {'; '.join(result.measured.validity.reasons)}")
    return missed


if __name__ == "__main__":
    sys.exit(main())
