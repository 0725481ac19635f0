"""A counter of the energy that a device takes: NVML's of a GPU, RAPL's of a CPU's packages and memory."""

from __future__ import annotations

import os
from collections.abc import Callable

from mlsys_bench.hardware.devices import Key, MissedError, Nvml, Rapl

Joules = Callable[[], float]  # so far, from some beginning


def counter(device: str, nvml: Nvml | None = None, rapl: Rapl | None = None) -> Joules | None:
    """Return the counter of a device, 'cpu' or 'cuda:0'; None where the machine keeps or shows none."""
    source, name = (rapl or Rapl(), "rapl_energy") if device == "cpu" else (nvml or Nvml(), "nvml_energy")
    label = "" if device == "cpu" else f'gpu="{_nvml_index(device)}"'

    def told() -> dict[Key, float]:
        return {key: value for key, value in source.look(1.0).items() if key[0] == name and label in key[1]}

    try:
        return (lambda: sum(told().values())) if told() else None
    except MissedError:
        return None


def _nvml_index(device: str) -> str:
    """Return the driver's number of what torch calls cuda:N, which CUDA_VISIBLE_DEVICES may count otherwise."""
    index = device.partition(":")[2] or "0"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    chosen = visible[int(index)] if len(visible) > int(index) else ""
    return chosen if chosen.isdigit() else index
