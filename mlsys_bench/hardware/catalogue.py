"""What GPUs and CPUs can do: published figures, dense rates, each row of `data/devices.csv` with source and date."""

from __future__ import annotations

import csv
import functools
import re
from dataclasses import dataclass
from typing import Literal

from mlsys_bench import resources
from mlsys_bench.errors import BadInput, did_you_mean, unknown

_RATES = {
    "fp32": "fp32_tflops", "fp16": "fp16_dense_tflops", "bf16": "bf16_dense_tflops", "fp8": "fp8_dense_tflops",
    "int8": "int8_dense_tops", "fp4": "fp4_dense_tflops",
}  # fmt: skip
_COMPUTES_AS = {
    "fp32": ("fp32",),
    "fp16": ("fp16",),
    "bf16": ("bf16",),
    "fp8": ("fp8", "bf16"),
    "int8": ("bf16", "fp16"),
    "int4": ("bf16", "fp16"),
    "fp4": ("fp4", "bf16", "fp16"),
    "nvfp4": ("fp4", "bf16", "fp16"),
    "mxfp4": ("fp4", "bf16", "fp16"),
    **dict.fromkeys(("int4g32", "int4g64", "int4g128"), ("bf16", "fp16")),
    **dict.fromkeys(("w8a8", "w4a8", "w4a8g32", "w4a8g64", "w4a8g128"), ("int8", "bf16", "fp16")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU or CPU of the catalogue.  `flops_per_s` holds dense rates by number format, only those the device has."""

    id: str
    kind: Literal["gpu", "cpu"]
    vendor: str
    arch: str
    memory_bytes: float
    bandwidth_bytes_per_s: float
    flops_per_s: dict[str, float]
    tdp_w: float | None
    interconnect_bytes_per_s: float  # one direction, 0 where there is none but PCIe
    link_devices: int  # devices that the interconnect joins at that speed: 8 on an HGX board, 72 in an NVL72 rack
    driver_bytes: float  # memory as the driver reports it, more than the data sheet's rounded figure; that figure where nobody has read it
    source: str
    date: str
    verified: bool


def find(name: str) -> Device:
    """Return the device of a name: catalogue id, alias or the driver's name for it, in any case.  Raises UnknownName.

    Short names mean the usual form: H100 and H200 the SXM module, A100 the one with 80 GB, V100 the one with 16 GB.
    """
    found = _index().get(_plain(name))
    if found is None:
        raise unknown("GPU or CPU", name, [d.id for d in every()])
    return found


def every() -> tuple[Device, ...]:
    """Return the whole catalogue."""
    return tuple(device for device, _ in _rows())


def aliases(device: Device) -> tuple[str, ...]:
    """Return the names `find` knows it by."""
    return next(names for known, names in _rows() if known.id == device.id)


def supports(device: Device, precision: str) -> bool:
    """Say whether weights of this precision can be computed with: a T4 has no bf16, the catalogue's CPU no fp16."""
    return any(form in device.flops_per_s for form in _forms(precision))


def compute_flops_per_s(device: Device, precision: str) -> float:
    """Return the rate at which weights of this precision are computed with.  Raises BadInput where the device cannot.

    int8 and int4 are weight-only: they are widened and computed at the bf16 rate (fp16 on devices without bf16).  w8a8 and w4a8 compute in
    int8, fp8 and fp4 at their own rate, where the device has one, else as weight-only.
    """
    for form in _forms(precision):
        if form in device.flops_per_s:
            return device.flops_per_s[form]
    raise BadInput(f"{device.id} does not compute in {precision}; it has {', '.join(device.flops_per_s)}")


def _forms(precision: str) -> tuple[str, ...]:
    if precision not in _COMPUTES_AS:
        raise BadInput(f"unknown precision {precision!r}{did_you_mean(precision, _COMPUTES_AS)}")
    return _COMPUTES_AS[precision]


# ---------------------------------------------------------------- catalogue


@functools.cache
def _rows() -> tuple[tuple[Device, tuple[str, ...]], ...]:
    with resources.catalogue("devices.csv").open(newline="", encoding="utf-8") as file:
        return tuple((_device(row), (row["id"], *filter(None, row["aliases"].split(";")))) for row in csv.DictReader(file))


@functools.cache
def _index() -> dict[str, Device]:
    return {_plain(name): device for device, names in _rows() for name in names}


def _plain(name: str) -> str:
    """Return a name as it is compared: letters and digits only, no maker's name, no board that holds it and no virtual function of it."""
    return re.sub(r"nvidia|geforce|tesla|amd|instinct|hgx|dgx|(?<=\dx)[ _-](oam|vf)$|[^a-z0-9]", "", name.lower())


def _device(row: dict[str, str]) -> Device:
    return Device(
        id=row["id"],
        kind="cpu" if row["kind"] == "cpu" else "gpu",
        vendor=row["vendor"],
        arch=row["arch"],
        memory_bytes=float(row["memory_gb"]) * 1e9,
        bandwidth_bytes_per_s=float(row["mem_bw_gbs"]) * 1e9,
        flops_per_s={form: float(row[column]) * 1e12 for form, column in _RATES.items() if row[column]},
        tdp_w=float(row["tdp_w"]) if row["tdp_w"] else None,
        interconnect_bytes_per_s=float(row["interconnect_gbs_bidir"]) * 1e9 / 2,
        link_devices=int(row["link_devices"]),
        driver_bytes=float(row["memory_mib"]) * 2**20 if row["memory_mib"] else float(row["memory_gb"]) * 1e9,
        source=row["source"],
        date=row["date"],
        verified=row["date"] != "unverified" and not re.search("VERIFY|assumed", row["source"]),
    )
