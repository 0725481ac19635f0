"""What GPUs and CPUs can do, by catalogue, and what this machine is."""

from __future__ import annotations

from mlsys_bench.hardware.catalogue import Device, aliases, compute_flops_per_s, every, find, supports
from mlsys_bench.hardware.probe import cpu_layout, cpu_quota, machine, nvml_gpus

__all__ = ["Device", "aliases", "compute_flops_per_s", "cpu_layout", "cpu_quota", "every", "find", "machine", "nvml_gpus", "supports"]
