"""Refuse what does not fit before it is allocated."""

from __future__ import annotations

from pathlib import Path

import torch

from mlsys_bench import models, units
from mlsys_bench.batching import Limits
from mlsys_bench.errors import BadInput, MlsysError
from mlsys_bench.models import Architecture


def device_of(name: str) -> torch.device:
    """Return the device of a name, 'cpu' or 'cuda:0'.  Raises MlsysError where this machine has none of that kind."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"device {name!r}: the engine runs on cpu or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MlsysError(f"device {name!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here; use --device cpu")
    return device


def available_bytes(device: torch.device) -> int | None:
    """Return the memory that may still be taken, None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    line = next((line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")), None)
    return int(line.split()[1]) * 1024 if line else None


def refuse_misfit(shape: Architecture, precision: str, limits: Limits, available: int | None) -> None:
    """Raise BadInput, with the arithmetic, when weights and KV cache are more than is available."""
    weights, per_token = models.weight_bytes(shape, precision), models.kv_bytes_per_token(shape, precision)
    tokens = limits.blocks * limits.block_tokens
    if available is None or weights + tokens * per_token <= available:
        return
    raise BadInput(
        f"{shape.id} in {precision} does not fit: weights {units.show_bytes(weights)} + KV cache of {tokens} tokens x"
        f" {units.show_bytes(per_token)} = {units.show_bytes(weights + tokens * per_token)}, and {units.show_bytes(available)} are free;"
        " take fewer KV tokens, a smaller model or a lower precision"
    )
