"""What this machine is, from /proc and NVML.  Nothing here imports torch, and nothing raises for what cannot be read."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlsys_bench.types import Machine, Scalar


def machine() -> Machine:
    """Return the fingerprint of this machine.  What cannot be read is None; nothing is raised.

    Hard fields must agree before two results are compared; soft ones only explain.  Clock rates are in neither: they change
    from boot to boot.
    """
    gpus = nvml_gpus()
    cpu = _cpu_fields()
    flags = _isa_flags(cpu.get("flags", ""))
    hard: dict[str, Scalar] = {
        "architecture": platform.machine() or None,
        "os": platform.system() or None,
        "libc": _libc(),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "cpu_vendor": cpu.get("vendor_id"),
        "cpu_family": cpu.get("cpu family"),
        "cpu_model": cpu.get("model"),
        "cpu_name": cpu.get("model name"),
        "cpu_stepping": cpu.get("stepping"),
        "isa": " ".join(flags) or None,
        "isa_digest": hashlib.sha256(" ".join(flags).encode()).hexdigest()[:12] if flags else None,
        "cores": cpu_layout(),
        "cpu_quota": cpu_quota(),
        "memory_gb_class": _memory_class_gb(),
        "torch": _version("torch"),
        "gpu": ", ".join(sorted({str(gpu["name"]) for gpu in gpus})) or None if isinstance(gpus, tuple) else None,
        "gpu_count": len(gpus) if isinstance(gpus, tuple) else 0,
        "gpu_driver": str(gpus[0]["driver"]) if isinstance(gpus, tuple) and gpus else None,
    }
    soft: dict[str, Scalar] = {
        "kernel": platform.release() or None,
        "governor": _first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load_1min": _load(),
        "steal_ticks": _steal_ticks(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "numpy": _version("numpy"),
    }
    return Machine(hard=hard, soft=soft)


def cpu_layout() -> int:
    """Return the cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def nvml_gpus() -> tuple[dict[str, Scalar], ...] | str:
    """Return the NVIDIA GPUs as NVML sees them, or one plain line why there are none."""
    try:
        import pynvml
    except ImportError:
        return "no NVIDIA GPU: nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"no NVIDIA GPU: {error}"
    try:
        gpus = tuple(_nvml_gpu(pynvml, i) for i in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError as error:
        return f"no usable NVIDIA GPU: {error}"
    finally:
        pynvml.nvmlShutdown()
    return gpus or "no NVIDIA GPU: the driver lists none"


def _nvml_gpu(nvml: Any, index: int) -> dict[str, Scalar]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def ask(question: Callable[[Any], Any]) -> Any:
        """Return the answer, or None where the card has none (no ECC, no MIG)."""
        try:
            return question(handle)
        except nvml.NVMLError:
            return None

    memory = ask(nvml.nvmlDeviceGetMemoryInfo)
    limit_mw = ask(nvml.nvmlDeviceGetPowerManagementLimit)
    ecc, mig = ask(nvml.nvmlDeviceGetEccMode), ask(nvml.nvmlDeviceGetMigMode)
    return {
        "index": index,
        "name": _text(ask(nvml.nvmlDeviceGetName)),
        "driver": _text(nvml.nvmlSystemGetDriverVersion()),
        "memory_bytes": None if memory is None else int(memory.total),
        "power_limit_w": None if limit_mw is None else limit_mw / 1000,
        "ecc": None if ecc is None else bool(ecc[0]),
        "mig": None if mig is None else bool(mig[0]),
    }


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _first_line(path: str) -> str | None:
    text = _read(path)
    return text.splitlines()[0].strip() or None if text and text.splitlines() else None


def _cpu_fields() -> dict[str, str]:
    """Return the first processor's fields of /proc/cpuinfo, without those that change between boots."""
    block = (_read("/proc/cpuinfo") or "").split("\n\n")[0]
    pairs = (line.partition(":") for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _isa_flags(flags: str) -> list[str]:
    """Return the instruction sets that numeric kernels dispatch on."""
    return sorted(f for f in flags.split() if re.match(r"avx|amx|fma|f16c|bf16|asimd|sve", f))


def _libc() -> str | None:
    name, version = platform.libc_ver()
    return f"{name} {version.split('.')[0]}" if name else None


def cpu_quota() -> float | None:
    """Return the CPUs that cgroup v2 or v1 allows, None where there is no limit."""
    quota, _, period = (_first_line("/sys/fs/cgroup/cpu.max") or "").partition(" ")
    if not quota:
        quota = _first_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") or ""
        period = _first_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us") or ""
    try:
        return int(quota) / int(period) if int(quota) > 0 else None
    except ValueError:
        return None


def _memory_class_gb() -> int | None:
    """Return the memory rounded to a power of two GiB: sizes of one class differ by what firmware and kernel keep."""
    found = re.search(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo") or "")
    return 2 ** round(math.log2(max(int(found[1]) * 1024 / 2**30, 1))) if found else None


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def _steal_ticks() -> int | None:
    """Return the clock ticks that the hypervisor has taken since boot."""
    fields = (_first_line("/proc/stat") or "").split()
    return int(fields[8]) if len(fields) > 8 and fields[8].isdigit() else None


def _version(distribution: str) -> str | None:
    import importlib.metadata  # 50 ms that reading the catalogue need not pay

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
