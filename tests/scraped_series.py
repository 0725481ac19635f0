"""Counters as a Prometheus would give them, for tests of what is made of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlsys_bench.workload.counters import Series

T0 = 1_700_006_400.0  # a midnight, UTC


def series(values: Any, name: str = "vllm:request_success_total", every_s: float = 15.0, start_s: float = T0, **labels: str) -> Series:
    values = np.asarray(values, dtype=float)
    return Series(name=name, labels=labels, times_s=start_s + every_s * np.arange(len(values)), values=values)
