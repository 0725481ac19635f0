"""Learn the shipped coefficients from the measured tables beside this checkout, and say how well they predict what they have not seen.

    python proofs/learn.py [--write]

For open and closed loops apart: the scales of `predict.field` by maximum marginal likelihood, the coefficients of all by least squares,
then leave-one-model-out and leave-one-GPU-out errors, from the assumed coefficients with those scales.  `--write` replaces
`mlsys_bench/data/coefficients.json`.  No coefficient is chosen by hand.

Scales of closed loops are learned from all times per token of the first table; those of TTFT stay as assumed, for the time of both
together grows eightfold.  The search begins at what is assumed, so that the script finds the same again.  Noise is what repeats of a run
differ by: rows that others contradict count less, and with those put aside likelihood would find less of it each time.
"""

from __future__ import annotations

import datetime
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import _one_thread  # noqa: F401
import numpy as np
import numpy.typing as npt

from mlsys_bench.latency import coefficients as names
from mlsys_bench.predict import Experiment, field, learning, ratios, tables

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "llm"
TARGET = ROOT / "mlsys_bench" / "data" / "coefficients.json"
TABLES = {
    names.OPEN: ("blis_measured.csv", "blis_training_raw_inference_perf.csv"),
    names.CLOSED: ("closed_loop_measured.csv", "inferencex_measured.csv"),
}


MAD = 0.6745  # median of |z| of a normal law


def main() -> int:
    """Learn, print scores, and write when asked to."""
    if not DATA.exists():
        print(f"{DATA} is not beside this checkout: nothing to learn from")
        return 0
    loads = {load: learned(load, rows(files)) for load, files in TABLES.items()}
    if "--write" in sys.argv:
        stored = {"learned": datetime.date.today().isoformat(), "by": "proofs/learn.py", "loads": loads}
        TARGET.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        print(f"written: {TARGET.name}")
    return 0


def rows(files: Sequence[str]) -> list[Experiment]:
    """Return the measured rows of some tables that have latencies."""
    found = [e for name in files for e in tables.calibration(tables.read(DATA / name))]
    return [e for e in found if any(name in e.measured for name in ratios.FURTHER)]


def learned(load: str, found: list[Experiment]) -> dict[str, object]:
    """Return coefficients, scales and scores of one kind of load, printing them."""
    started = time.perf_counter()
    shown = found if load == names.OPEN else rows(TABLES[load][:1])
    noise = {} if load == names.OPEN else {"noise tpot": repeated(shown)}
    scales = learning.scaled(shown, names.ASSUMED_LOG, field.SCALES | noise)
    print(f"{load}: scales from {len(shown)} rows, {time.perf_counter() - started:.0f} s", flush=True)
    mean = learning.fitted(found, names.ASSUMED_LOG)
    coefficients = dict(zip(names.NAMES, np.exp(mean).tolist(), strict=True))
    for name, value in coefficients.items():
        print(f"  {name:16} assumed {names.LEARNED[name][0]:10.3g}   learned {value:10.3g}")
    scores = left_out(found, scales)
    for name, value in scores.items():
        print(f"  {name:40} {100 * value:6.1f} %", flush=True)
    print(f"  {time.perf_counter() - started:.0f} s")
    return {
        "rows": len(found),
        "coefficients": {n: float(f"{v:.4g}") for n, v in coefficients.items()},
        "scales": {n: float(f"{v:.4g}") for n, v in scales.items()},
        "scores": {n: round(v, 4) for n, v in scores.items()},
    }


def repeated(shown: Sequence[Experiment]) -> float:
    """Return the sd by which times per token differ where the same question was measured again, by the median: some repeats are none."""
    same: dict[str, list[float]] = {}
    for e in shown:
        same.setdefault(str(tables.question(e)), []).append(
            math.log(next(e.measured[name] for name in ratios.FURTHER if name in e.measured))
        )
    away = [abs(v - np.mean(found)) * (len(found) / (len(found) - 1)) ** 0.5 for found in same.values() if len(found) > 1 for v in found]
    return float(np.median(away)) / MAD


def left_out(found: list[Experiment], scales: dict[str, float]) -> dict[str, float]:
    """Return errors of rows whose model, or GPU, was left out: exact for the linearised field, of which they are a block."""
    part = learning.learn_part(found, names.ASSUMED_LOG, scales)
    points = part.given.points
    scores = {}
    for what in ("model", "device"):
        error, sd = field.left_out(part.given, points.groups[what][points.row])
        for kind, figure in enumerate(("time per token", "TTFT")):
            size = np.abs(np.expm1(-error[points.kind == kind]))
            scores[f"leave one {what} out, {figure}, mean"] = float(size.mean())
            scores[f"leave one {what} out, {figure}, median"] = float(np.median(size))
            scores[f"leave one {what} out, {figure}, coverage"] = covered(error[points.kind == kind], sd[points.kind == kind])
    return scores


def covered(error: npt.NDArray[np.float64], sd: npt.NDArray[np.float64]) -> float:
    """Return the share of errors inside their 90 % interval."""
    return float(np.mean(np.abs(error) < 1.645 * sd))


if __name__ == "__main__":
    sys.exit(main())
