"""Ceilings of a device, measured in the same record or printed on its data sheet, and what binds a piece of work below them.

A call that moves b bytes and computes f FLOPs takes at least max(b / bandwidth, f / peak): the roofline of Williams, Waterman and Patterson
(CACM 52(4), 2009).  The larger of the two names the roof, its share of the time taken says how near the work came to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from mlsys_bench import hardware, samples, stats
from mlsys_bench.errors import UnknownName
from mlsys_bench.types import Bench, Machine, Measurement

Roof = Literal["memory", "compute"]
Bound = Literal["memory", "compute", "latency", "cache"]
NEITHER = 0.5  # below it most of the time goes to something that neither roof knows: waiting, launching, synchronising
FROM_CACHE = 1.1  # above it the bytes cannot have come from memory; two medians of one launch differ by less
READS = ("memory.read", "memory.triad", "memory.copy")  # the first that was measured is the bandwidth
_AS = {  # number formats a GPU may compute in, best first; weight-only formats are widened
    "fp32": ("tf32", "fp32"), "bf16": ("bf16",), "fp16": ("fp16", "bf16"), "fp8": ("fp8", "bf16"), "w8a8": ("int8", "bf16"),
    "w4a8": ("int8", "bf16"), "int8": ("bf16", "fp16"), "int4": ("bf16", "fp16"),
}  # fmt: skip
_WIDTH = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofs:
    """Bytes per second that memory gives, and FLOP/s by the number format of the product."""

    bytes_per_s: float | None = None
    flops_per_s: dict[str, float] = field(default_factory=dict)
    is_cpu: bool = True

    def peak(self, precision: str) -> float | None:
        """Return the compute ceiling of weights kept in a precision, None where nothing says it.

        A GPU has units for a format or widens it.  A CPU's kernel takes whichever format is fastest and no narrower than the weights, so
        there the best of those counts: bf16 weights may be widened to fp32, int8 and int4 ones may meet activations made integers.
        """
        if self.is_cpu:
            least = _WIDTH.get(precision, 1)
            return max((rate for form, rate in self.flops_per_s.items() if _WIDTH.get(form, 1) >= least), default=None)
        return next((self.flops_per_s[form] for form in _AS.get(_family(precision), (precision,)) if form in self.flops_per_s), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How near a piece of work came to the nearer roof, as a share, and what binds it."""

    roof: Roof
    share: float
    bound: Bound


def measured(bench: Bench, device: str) -> Roofs:
    """Return the ceilings of a device as this record measured them."""
    here = [m for m in bench.measurements if str(m.parameters.get("device", device)) == device]
    reads = next((best for name in READS if (best := _best(m for m in here if m.name == name)) is not None), None)
    formats = dict.fromkeys(str(m.parameters.get("precision", "fp32")) for m in here if m.name == "gemm")
    peaks = {form: _best(m for m in here if m.name == "gemm" and str(m.parameters.get("precision", "fp32")) == form) for form in formats}
    return Roofs(bytes_per_s=reads, flops_per_s={form: rate for form, rate in peaks.items() if rate}, is_cpu=device == "cpu")


def datasheet(device: str, machine: Machine | None = None) -> Roofs | None:
    """Return what the catalogue has of a device; of 'cpu' what it has of the machine's processor.  None where it knows neither.

    The catalogue's own 'cpu' is no data sheet: it is what one machine of this project measured.
    """
    name = device if device != "cpu" else machine.hard.get("cpu_name") if machine is not None else None
    try:
        found = hardware.find(str(name or ""))
    except UnknownName:
        return None
    return Roofs(bytes_per_s=found.bandwidth_bytes_per_s, flops_per_s=dict(found.flops_per_s), is_cpu=found.kind == "cpu")


def standing(roofs: Roofs, precision: str, bytes_per_s: float | None, flops_per_s: float | None) -> Standing | None:
    """Return how work that achieved these rates stands below the roofs, None where neither roof says anything of it."""
    shares: list[tuple[float, Roof]] = []
    peak = roofs.peak(precision)
    if bytes_per_s and roofs.bytes_per_s:
        shares.append((bytes_per_s / roofs.bytes_per_s, "memory"))
    if flops_per_s and peak:
        shares.append((flops_per_s / peak, "compute"))
    if not shares:
        return None
    share, roof = max(shares)
    bound: Bound = "latency" if share < NEITHER else "cache" if roof == "memory" and share > FROM_CACHE else roof
    return Standing(roof=roof, share=share, bound=bound)


def share_of(roofs: Roofs | None, roof: Roof, precision: str, bytes_per_s: float | None, flops_per_s: float | None) -> float | None:
    """Return the share of one roof that was achieved."""
    if roofs is None:
        return None
    had, ceiling = (bytes_per_s, roofs.bytes_per_s) if roof == "memory" else (flops_per_s, roofs.peak(precision))
    return had / ceiling if had and ceiling else None


def _family(precision: str) -> str:
    return precision.partition("g")[0]


def _best(measurements: Iterable[Measurement]) -> float | None:
    """Return the largest median of some measurements."""
    return max((middle for m in measurements if (middle := _median(m)) is not None), default=None)


def _median(m: Measurement) -> float | None:
    values = samples.kept(m)
    return stats.quantile(values, 0.5) if len(values) else None
