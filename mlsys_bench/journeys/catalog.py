"""catalog gpus | models | prices | apis: the catalogues as rows, every one with source and date, what a narrow page must show first."""

from __future__ import annotations

import enum

from mlsys_bench import hardware, models, pricing
from mlsys_bench.looked_up import Catalog
from mlsys_bench.types import Scalar


def gpus() -> Catalog:
    """Return every device with what bounds it and its cheapest hour."""
    return Catalog(catalog="gpus", rows=tuple(_device(d) for d in hardware.every()))


def _device(device: hardware.Device) -> dict[str, Scalar]:
    cheapest = pricing.cheapest(device.id, 1)
    each = None if cheapest is None else cheapest[0].usd_per_h / cheapest[0].devices
    rates: dict[str, Scalar] = {f"{name}_flops_per_s": value for name, value in device.flops_per_s.items() if name not in ("bf16", "fp8")}
    return {
        "id": device.id,
        "memory_bytes": device.memory_bytes,
        "bandwidth_bytes_per_s": device.bandwidth_bytes_per_s,
        "usd_per_device_h": each,
        "bf16_flops_per_s": device.flops_per_s.get("bf16"),
        "fp8_flops_per_s": device.flops_per_s.get("fp8"),
        "offer": None if cheapest is None else f"{cheapest[0].provider} {cheapest[0].instance}",
        **rates,
        "kind": device.kind,
        "arch": device.arch,
        "verified": device.verified,
        "source": device.source,
        "date": device.date,
    }


def models_(model: str | None = None) -> Catalog:
    """Return every model, or the one that is named, with its parameters and the bytes that size a fleet."""
    shapes = models.every() if model is None else (models.find(model),)
    return Catalog(catalog="models", rows=tuple(_model(a) for a in shapes))


def _model(a: models.Architecture) -> dict[str, Scalar]:
    return {
        "id": a.id,
        "params": a.params,
        "active_params": a.active_params,
        "weight_bytes_bf16": models.weight_bytes(a, "bf16"),
        "kv_bytes_per_token_bf16": models.kv_bytes_per_token(a, "bf16"),
        "max_context": a.max_context,
        "layers": a.layers,
        "hidden": a.hidden,
        "heads": a.heads,
        "kv_heads": a.kv_heads,
        "attention": a.attention,
        "source": a.source,
        "date": a.date,
    }


def prices() -> Catalog:
    """Return every offer, dated and sourced."""
    return Catalog(
        catalog="prices",
        rows=tuple(
            _named(o, "provider", "instance", "device", "devices", "term", "usd_per_h", "region", "provenance", "source", "date")
            for o in pricing.offers()
        ),
    )


def apis() -> Catalog:
    """Return what every hosted model asks per million tokens, dated and sourced; None where it sells no such thing."""
    return Catalog(
        catalog="apis",
        rows=tuple(
            _named(
                price, "model", "mode", "input_usd_per_million", "output_usd_per_million", "withdrawn", "cached_input_usd_per_million",
                "batch_input_usd_per_million", "batch_output_usd_per_million", "provider", "source", "date",
            )
            for price in pricing.api_prices()
        ),
    )  # fmt: skip


def _named(entry: object, *names: str) -> dict[str, Scalar]:
    """Return some fields of a catalogue's entry as a row."""
    values = ((name, getattr(entry, name)) for name in names)
    return {name: value.value if isinstance(value, enum.Enum) else value for name, value in values}
