"""How a checkpoint's matrices are quantised: read from `quantization_config`, with the tensors that a matrix then consists of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlsys_bench import models
from mlsys_bench.errors import BadInput
from mlsys_bench.models.precision import ENGINE_PRECISIONS

FLOATS = ("F32", "F16", "BF16")  # safetensors' names
_WORDS = ("I32",)
_WEIGHT_FILES = ("safetensors", "safetensors.index.json", "bin", "pt", "pth", "gguf")  # those that are not read say why
Part = tuple[tuple[int, ...], tuple[str, ...]]  # shape and possible types of a tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A way of quantising that the engine takes as it is."""

    method: Literal["awq", "gptq", "int4", "fp8"]  # the last two are compressed-tensors'
    group: int = 0  # inputs per scale, 0 for whole rows
    is_v2: bool = False  # GPTQ: zero points are stored as they are
    act_order: bool = False  # GPTQ: g_idx counts

    @property
    def precision(self) -> str | None:
        """The engine's precision of the same format, None where there is none: groups of another size."""
        name = "fp8" if self.method == "fp8" else f"int4g{self.group}"
        return name if name in ENGINE_PRECISIONS else None

    def layout(self, rows: int, columns: int) -> dict[str, Part]:
        """Return the tensors of a matrix [rows, columns], by the table of `packed`."""
        groups = columns // (self.group or columns)
        if self.method == "fp8":
            return {"weight": ((rows, columns), ("F8_E4M3",))}
        if self.method == "int4":
            return {"weight_packed": ((rows, -(-columns // 8)), _WORDS), "weight_scale": ((rows, groups), FLOATS)}
        words = (columns, rows // 8) if self.method == "awq" else (columns // 8, rows)
        order: dict[str, Part] = {"g_idx": ((columns,), _WORDS)} if self.act_order else {}
        return {"qweight": (words, _WORDS), "qzeros": ((groups, rows // 8), _WORDS), "scales": ((groups, rows), FLOATS), **order}


def checkpoint_of(model: str) -> Path | None:
    """Return the folder with weights that a model's name means; None where it is a shape without."""
    folder = models.folder(model)
    return folder if folder and any(any(folder.glob(f"*.{kind}")) for kind in _WEIGHT_FILES) else None


def own_precision(folder: Path) -> str:
    """Return the engine's precision that takes a checkpoint's matrices as they are; bf16 where there is none."""
    kept = models.from_config(folder).native_precision
    keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    scheme = of_config(keys, str(folder))
    return (scheme.precision if scheme else kept if kept == "fp32" else None) or "bf16"


def of_config(keys: Mapping[str, Any], where: str) -> Scheme | None:
    """Return the scheme of a config.json, None where nothing is quantised.  Raises BadInput for what the engine has no format for."""
    config = keys.get("quantization_config") or (keys.get("text_config") or {}).get("quantization_config")
    if not config:
        return None
    method = str(config.get("quant_method") or "")
    read = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}.get(method)
    found = read(config) if read else f"quant_method {method!r}"
    if isinstance(found, str):
        raise BadInput(f"{where}: quantised as {found}, which is not read; AWQ (gemm), GPTQ and compressed-tensors int4 and fp8 are")
    return found


def _awq(config: Mapping[str, Any]) -> Scheme | str:
    bits, version = config.get("bits", config.get("w_bit")), str(config.get("version") or "gemm").lower()
    if bits != 4 or version != "gemm":
        return f"AWQ in {bits} bit, version {version}"
    return Scheme(method="awq", group=_group(config.get("group_size", config.get("q_group_size"))))


def _gptq(config: Mapping[str, Any]) -> Scheme | str:
    bits, kind = config.get("bits"), str(config.get("checkpoint_format") or "gptq").lower()
    if bits != 4 or kind not in ("gptq", "gptq_v2"):
        return f"GPTQ in {bits} bit, format {kind}"
    return Scheme(method="gptq", group=_group(config.get("group_size")), is_v2=kind == "gptq_v2", act_order=bool(config.get("desc_act")))


def _compressed(config: Mapping[str, Any]) -> Scheme | str:
    given = config.get("config_groups")
    groups = [group for group in given.values() if isinstance(group, dict)] if isinstance(given, dict) else []
    kept = (groups[0].get("weights") or {}) if len(groups) == 1 else {}
    kind, bits, strategy, layout = kept.get("type"), kept.get("num_bits"), kept.get("strategy"), config.get("format")
    if kind == "float" and bits == 8 and strategy in ("channel", "tensor"):
        return Scheme(method="fp8")
    if kind == "int" and bits == 4 and strategy in ("group", "channel") and layout == "pack-quantized" and not kept.get("actorder"):
        return Scheme(method="int4", group=_group(kept.get("group_size")))
    return f"compressed-tensors {kind} {bits} bit, {strategy}, {layout}, {len(groups)} groups of layers"


def _group(size: Any) -> int:
    """Return the inputs per scale; 0 for whole rows, which files write as -1 or null.  Raises BadInput."""
    if not isinstance(size, int | None):
        raise BadInput(f"quantization_config: a group of {size!r} inputs; it must be a whole number, -1 for whole rows")
    return size if size and size > 0 else 0
