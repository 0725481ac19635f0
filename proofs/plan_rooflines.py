"""Plans of hardware nobody measured beside measured rows: do 90 % intervals hold TTFT, ITL and E2E, and do plans say what `predict` says?

Each row of `blis_measured.csv` is planned as a fleet of one, with the profile of hardware nobody measured, and predicted.  Prefix
caching is taken out alike: a prompt is the share that it leaves to compute, as learned; the rest is read by every decode step, as a state
of its sequence, and passes the tokenizer.  Coefficients of all were learned from these very rows, among others: that models left out are
predicted as well is what `predict` proves.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import _one_thread  # noqa: F401
import numpy as np

from mlsys_bench import plan, predict, slo, stats
from mlsys_bench.latency import coefficients
from mlsys_bench.predict import Experiment, tables
from mlsys_bench.types import LatencyProfile, Lengths, Workload

ROWS = Path(__file__).resolve().parents[2] / "shared" / "data" / "llm" / "blis_measured.csv"
METRICS = ("ttft", "itl", "e2e")
ANY = slo.parse(",".join(f"{metric}_mean<1000s" for metric in METRICS))  # what is asked for is the mean
ALIKE = 0.03  # median difference of plan and prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """A mean measured, planned (with its interval), by the plan's theory, and predicted."""

    measured_s: float
    planned_s: float
    low_s: float
    high_s: float
    theory_s: float
    predicted_s: float

    @property
    def inside(self) -> bool:
        """Whether the plan's interval holds what was measured."""
        return self.low_s <= self.measured_s <= self.high_s


def main() -> int:
    """Print each row and, by metric, how many lie inside; return how many bars are missed."""
    if not ROWS.exists():
        print(f"{ROWS.name} is not beside this checkout: plans of rooflines are not held against measurements")
        return 0
    nothing, found = predict.learn([]), []
    for e in _questions():
        found.append(compared(e, nothing))
        parts = (f"{m} {1e3 * b.measured_s:9.1f} {'in ' if b.inside else 'OUT'} {_said(b)}" for m, b in found[-1].items())
        print(f"{e.model[:16]:17}{e.device[:9]:10}tp {e.tp} {e.rate_per_s:4g}/s  {'   '.join(parts)}", flush=True)
    return _summary(found)


def _said(b: Beside) -> str:
    return f"{1e3 * b.low_s:.5g}–{1e3 * b.high_s:.5g}, plan {1e3 * b.planned_s:.5g} predict {1e3 * b.predicted_s:.5g}"


def _questions() -> Iterator[Experiment]:
    """Yield the rows with results of their own, each question once."""
    asked = set()
    for e in tables.calibration(tables.read(ROWS)):
        question = str(replace(e, key="", group="", measured={}, cold_start=False))
        if question not in asked and all(f"{metric}_mean_s" in e.measured for metric in METRICS):
            asked.add(question)
            yield e


def compared(e: Experiment, nothing: predict.Knowledge) -> dict[str, Beside]:
    """Return the means of a row beside those of its plan and its prediction."""
    (predicted,) = predict.predict([e], nothing)
    profile, computed = uncached(e, predict.profile(e, nothing))
    assert e.rate_per_s is not None
    traffic = Workload(
        rate_per_s=e.rate_per_s, arrivals=e.arrivals, prompt_tokens=Lengths(mean=computed), output_tokens=e.output_tokens
    )  # fmt: skip
    made = plan.plan(
        plan.Request(
            model=e.model, workload=traffic, slo=ANY, profiles=(profile,), max_batch=e.max_seqs, max_step_tokens=e.max_step_tokens,
            headroom=0.0,
        )
    )  # fmt: skip
    assert made.replicas == 1, f"{e.key}: one server carried this load, the plan wants {made.replicas}"
    return {
        metric: Beside(
            measured_s=e.measured[key], planned_s=made.predicted[key], low_s=made.intervals[key][0], high_s=made.intervals[key][1],
            theory_s=made.analytic[key], predicted_s=predicted.figures[key][0],
        )
        for metric in METRICS
        for key in [f"{metric}_mean_s"]
    }  # fmt: skip


def uncached(e: Experiment, profile: LatencyProfile) -> tuple[LatencyProfile, int]:
    """Return the profile of a server that finds most of each prompt in its cache, and how many tokens that leaves to compute."""
    share = coefficients.stored()["open"]["coefficients"]["uncached"] if e.sessions else 1.0
    computed = max(1, round(share * e.prompt_tokens.mean))
    past, k = e.prompt_tokens.mean - computed, dict(profile.constants)
    window = min(past, k.get("window_tokens", 0.0))
    k["state_bytes"] = k.get("state_bytes", 0.0) + past * k["kv_bytes_per_token"] + window * k.get("window_kv_bytes_per_token", 0.0)
    k["request_overhead_s"] += past * k["prompt_token_s"]
    return replace(profile, constants=k), computed


def _summary(found: Sequence[dict[str, Beside]]) -> int:
    missed = 0
    print(
        f"\n{'mean of':10}{'inside':>12}{'Wilson 90 %':>18}{'error':>9}{'plan beside predict: median':>30}{'most':>8}{'theory: median':>17}"
    )
    for metric in METRICS:
        rows = [row[metric] for row in found]
        inside = sum(b.inside for b in rows)
        low, high = stats.wilson(inside, len(rows), level=0.9) or (0.0, 1.0)
        error = float(np.mean([abs(b.planned_s / b.measured_s - 1) for b in rows]))
        planned, theory = (
            np.abs([math.log(getattr(b, name) / b.predicted_s) for b in rows]) for name in ("planned_s", "theory_s")
        )  # fmt: skip
        kept = high >= 0.9 and float(np.median(planned)) <= ALIKE and float(np.median(theory)) <= ALIKE
        missed += not kept
        print(
            f"{metric:10}{inside:6} of {len(rows)}{low:12.1%}–{high:.1%}{error:9.1%}{np.median(planned):30.1%}{np.max(planned):8.1%}"
            f"{np.median(theory):17.1%}  {'ok' if kept else 'MISSED'}"
        )
    return missed


if __name__ == "__main__":
    sys.exit(main())
