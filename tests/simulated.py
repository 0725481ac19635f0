"""What simulations are tried on: a clock that hands can follow, a profile of nothing but constants, and schedules as rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlsys_bench.batching import StepFeatures
from mlsys_bench.types import LatencyProfile, Layout, Provenance
from mlsys_bench.workload import Schedule


def linear(f: StepFeatures) -> float:
    """10 ms a step, 1 ms a prompt token, 2 ms a decode."""
    return 0.010 + 0.001 * f.prefill_tokens + 0.002 * f.decode_seqs


def profile(**constants: float) -> LatencyProfile:
    """Return a profile whose clock every caller replaces; only its constants are read."""
    return LatencyProfile(
        form="step", layout=Layout(model="nano", precision="fp32", device="cpu"), stage=None, terms=(), coefficients=(), covariance=(),
        constants=constants, residual_log_sd=0.0, valid={}, provenance=Provenance.ASSUMED,
    )  # fmt: skip


def requests(*rows: tuple[float, int, int], **more: Any) -> Schedule:
    """Return a schedule of (scheduled_s, prompt tokens, output tokens)."""
    at_s, prompts, outputs = zip(*rows, strict=True)
    return Schedule(scheduled_s=np.array(at_s, dtype=float), prompt_tokens=np.array(prompts), output_tokens=np.array(outputs), **more)
