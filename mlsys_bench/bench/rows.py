"""A bench record as rows for a reader: median, interval, and the share of what this machine can do at best."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from mlsys_bench import models, stats
from mlsys_bench.bench.options import BENCHMARKS
from mlsys_bench.bench.quality import known
from mlsys_bench.errors import UnknownName
from mlsys_bench.latency import FEATURES, physics
from mlsys_bench.types import Bench, Measurement, Scalar

_LAYOUT = ("device", "threads", "pinned_cores", "max_batch", "max_step_tokens", "block_tokens", "kv_tokens", "max_context")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One benchmark.  `bytes_per_s` and `flops_per_s` are what it achieved; `share` is of the measured ceiling that `bound` names."""

    name: str
    what: str
    unit: str
    median: float | None
    interval: tuple[float, float] | None  # 90 %, of the median, within these launches
    samples: int
    launches: int
    bytes_per_s: float | None = None
    flops_per_s: float | None = None
    bound: Literal["memory", "compute"] | None = None
    share: float | None = None
    skipped: str | None = None
    costs: str = ""  # what the precision of an engine step costs in loss, where this machine knows


def table(bench: Bench) -> tuple[Row, ...]:
    """Return one row per measurement, engine steps from small to large."""
    read, product = (_ceiling(bench, name) for name in ("memory.read", "gemm"))
    losses = known()
    rows = ((m, _row(m, read, product)) for m in sorted(bench.measurements, key=_order))
    return tuple(dataclasses.replace(row, costs=_costs(m, losses)) for m, row in rows)


def _costs(m: Measurement, losses: dict[str, float]) -> str:
    precision = str(m.parameters.get("precision"))
    above = losses.get(models.ENGINE_ALIASES.get(precision, precision))
    if m.name != "engine.step" or above is None or precision == "fp32":
        return ""
    return f"{above:+.4f} bit/byte on the byte model"


def _row(m: Measurement, read: float | None, product: float | None) -> Row:
    values = [v for launch in m.launches for r in launch.rounds for v in r.values]
    median = stats.quantile(values, 0.5) if values else None
    row = Row(
        name=m.name, what=_what(m), unit=m.unit, median=median,
        interval=stats.quantile_interval(values, 0.5) if values else None,
        samples=len(values), launches=len(m.launches), skipped=m.skipped,
    )  # fmt: skip
    return row if median is None else _achieved(row, m, median, read, product)


def _achieved(row: Row, m: Measurement, median: float, read: float | None, product: float | None) -> Row:
    """Return the row with its rates, and the share of the ceiling it is nearer to."""
    if m.unit == "B/s":
        moved, computed = median, None
    elif m.name == "linear":
        moved, computed = median * models.bytes_per_param(str(m.parameters["precision"])) / (2 * float(m.parameters["m"] or 1)), median
    elif m.unit == "FLOP/s":
        moved, computed = None, median
    elif m.name == "engine.step":
        moved, computed = _work_per_s(m, median)
    else:
        return row
    shares: list[tuple[float, Literal["memory", "compute"]]] = []
    if moved is not None and read:
        shares.append((moved / read, "memory"))
    if computed is not None and product:
        shares.append((computed / product, "compute"))
    share, bound = max(shares, default=(None, None))
    return dataclasses.replace(row, bytes_per_s=moved, flops_per_s=computed, share=share, bound=bound)


def _work_per_s(m: Measurement, median_s: float) -> tuple[float | None, float | None]:
    """Return bytes and FLOPs per second of a step: weights and KV cache read, products and attention computed."""
    p = m.parameters
    try:
        k = physics.constants_of(models.find(str(p["model"])), str(p["precision"]))
    except UnknownName:
        return None, None
    d, kv, prefill, pairs, sampled = (float(p[name] or 0) for name in FEATURES)
    tokens = d + prefill
    missed = (1 - k["experts_per_token"] / k["experts"]) ** tokens if k["experts"] else 0.0
    moved = k["dense_bytes"] + k["expert_bytes"] * (1 - missed) + kv * k["kv_bytes_per_token"]
    products = tokens * (k["flops_per_token"] + k["expert_flops_per_token"]) + sampled * k["head_flops"]
    computed = products + (kv + pairs) * k["attention_flops_per_pair"]
    return moved / median_s, computed / median_s


def _ceiling(bench: Bench, name: str) -> float | None:
    """Return the largest median of a benchmark."""
    values = [[v for launch in m.launches for r in launch.rounds for v in r.values] for m in bench.measurements if m.name == name]
    return max((float(np.median(v)) for v in values if v), default=None)


def _what(m: Measurement) -> str:
    p = m.parameters
    if m.name != "engine.step":
        return ", ".join(f"{k} {_show(v)}" for k, v in p.items() if k not in _LAYOUT and v is not None)
    d, kv, prefill, pairs, _ = (float(p.get(name) or 0) for name in FEATURES)
    parts = [f"decode {d:.0f} x {kv / d:.0f}"] if d else []
    if prefill:
        parts.append(f"prefill {prefill:.0f} after {max(0.0, pairs / prefill - prefill / 2):.0f}")
    return f"{p.get('model')} {p.get('precision')}: {' + '.join(parts)}"


def _show(value: Scalar) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _order(m: Measurement) -> tuple[int, str, list[float]]:
    names = [name for name, _ in BENCHMARKS]
    place = names.index(m.name) if m.name in names else len(names)
    kind = " ".join(str(m.parameters.get(name)) for name in ("model", "precision", "layer"))
    sizes = (m.parameters.get(name) for name in ("m", "prefill_tokens", "prefill_pairs", "decode_seqs", "decode_kv_tokens"))
    return place, kind, [float(size) for size in sizes if isinstance(size, int | float)]
