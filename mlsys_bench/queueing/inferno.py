"""The means of an LLM server as the project llm-inferno computes them, for comparison with its published example."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlsys_bench.queueing.chain import Batching
from mlsys_bench.queueing.times import Floats

MARGIN = 0.001  # the highest rate it allows is this share below saturation


@dataclass(frozen=True, slots=True, kw_only=True)
class Inferno:
    """Mean latencies of requests of equal mean size on one replica."""

    sojourn_s: float
    wait_s: float
    mean_in_service: float
    ttft_s: float
    itl_s: float
    most_per_s: float  # highest arrival rate


def inferno(
    rate_per_s: float,
    *,
    max_batch: int,
    max_queue: int,
    input_tokens: float,
    output_tokens: float,
    alpha_s: float,
    beta_s: float,
    gamma_s: float,
) -> Inferno:
    """Return llm-inferno's means of a replica that batches: a `Batching` chain with r(n) = n / (prefill(n) + output decode(n)).

    A step with n requests takes it(n) = alpha + n (beta (in + out) / (out + 1) + gamma (in + out / 2)), prefill(n) = it(n) +
    (beta + gamma) in, decode(n) = it(n) + beta + gamma (in + out / 2).  TTFT and ITL are read at the mean batch: decode = (mean service
    - prefill) / out, TTFT = wait + prefill + decode.  An approximation; only the chain's own means are exact.
    Source: llm-inferno, queue-analysis, pkg/analyzer/queueanalyzer.go and README.md (/solve), https://github.com/llm-inferno/queue-analysis.
    Checked against its published example (the LLM-BD inferno README rows of truth.csv): worst relative error 4e-6 over 6 rows, of
    numbers computed in single precision.
    """
    in_, out = input_tokens, output_tokens
    slope_s = beta_s * (in_ + out) / (out + 1) + gamma_s * (in_ + out / 2)

    def prefill_s(n: Floats | float) -> Floats | float:
        return 0.0 if in_ == 0 else alpha_s + n * slope_s + (beta_s + gamma_s) * in_

    n = np.arange(1.0, max_batch + 1)
    decode_s = alpha_s + n * slope_s + beta_s + gamma_s * (in_ + out / 2)
    rates = n / (prefill_s(n) + out * decode_s)
    chain = Batching(rate_per_s, rates, capacity=max_batch + max_queue)
    in_service_s = chain.mean_batch / chain.throughput_per_s
    first_s = float(prefill_s(chain.mean_batch))
    itl_s = (in_service_s - first_s) / out
    return Inferno(
        sojourn_s=chain.sojourn_s,
        wait_s=chain.wait_s,
        mean_in_service=chain.mean_batch,
        ttft_s=chain.wait_s + first_s + itl_s,
        itl_s=itl_s,
        most_per_s=float(rates[-1]) * (1 - MARGIN),
    )
