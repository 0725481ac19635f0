"""Scenarios, catalogues and this machine's abilities, in words."""

from __future__ import annotations

from mlsys_bench import slo, units
from mlsys_bench.looked_up import Catalog, Doctor
from mlsys_bench.report import tenants, traffic
from mlsys_bench.report.parts import Cell, Column, Fact, Section, Table, digits, mark, percent, scalar
from mlsys_bench.types import Scalar, Scenario
from mlsys_bench.units import count

WIDE = ("source", "date", "region", "hf_id", "aliases", "arch", "vendor", "verified", "tdp_w", "interconnect")
LONG = ("source", "instance", "model")
UNITS = {"bytes_per_s": "B/s", "flops_per_s": "FLOP/s", "bytes": "B"}  # by what a name holds; the value then says its unit


def scenario(record: Scenario) -> Section:
    """Return a system, its traffic and its promises."""
    return Section(
        kind="scenario",
        title=f"Scenario: {record.name}",
        lead=" ".join(record.description.split()),
        tag="assumed",
        facts=(
            Fact("Model", record.model, ", ".join(record.precision), "assumed"),
            Fact("Devices", ", ".join(record.gpus), f"batch of at most {record.max_batch:,}", "assumed"),
            *traffic.facts(record.workload),
            Fact(
                "Promises",
                ", ".join(map(slo.show_limit, record.slo)),
                f"{percent(100 * record.headroom)} of each replica stays free",
                "assumed",
            ),
        ),
        tables=tuple(table for table in (tenants.lengths(record.workload.tenants),) if table is not None),
        notes=(("Source", (record.source,)),),
    )


def doctor(record: Doctor) -> Section:
    """Return what this machine can do, and what would change what it cannot."""
    working = sum(ability.works for ability in record.abilities)
    rows = tuple((mark(a.works), Cell(a.name, "strong"), Cell(a.detail, "", a.cure or "")) for a in record.abilities)
    return Section(
        kind="doctor",
        title="This machine",
        lead=f"{working} of {len(record.abilities)} abilities are there.",
        tables=(Table(title="", columns=(Column(""), Column("ability"), Column("what was found", flexible=True)), rows=rows),),
    )


def catalog(record: Catalog) -> Section:
    """Return a catalogue as a table: its own columns, in its own order."""
    titles = list(dict.fromkeys(name for row in record.rows for name in row))
    columns = tuple(Column(_title(t), right=_numeric(record, t), wide=t in WIDE, flexible=t in LONG) for t in titles)
    rows = tuple(tuple(Cell(_by_unit(t, row.get(t)), "strong" if t == titles[0] else "") for t in titles) for row in record.rows)
    return Section(
        kind="catalog",
        title=f"Catalogue: {record.catalog}",
        lead=f"{count(len(rows), 'row')}, each with its source and date in --json.",
        tables=(Table(title="", columns=columns, rows=rows),),
    )


def _title(name: str) -> str:
    """Print the name of a column without the unit that its values say."""
    for part in UNITS:
        name = name.replace(f"_{part}", "")
    return name.replace("usd_per_million", "$/1M").replace("usd_per_device_h", "$/h each").replace("usd_per_h", "$/h").replace("_", " ")


def _by_unit(name: str, value: Scalar) -> str:
    """Print a value in the unit its column's name holds; units stay in the title where they cannot be told."""
    if value is None or isinstance(value, bool | str):
        return scalar(value)
    if name.endswith("params"):
        return f"{digits(float(value) / 1e9)} B"
    unit = next((unit for part, unit in UNITS.items() if part in name), None)
    if unit is not None:
        return units.show_scaled(float(value), unit) if value else scalar(None)
    return units.show_usd(float(value)) if "usd" in name else scalar(value)


def _numeric(record: Catalog, name: str) -> bool:
    values = [row.get(name) for row in record.rows if row.get(name) is not None]
    return bool(values) and all(isinstance(v, int | float) for v in values)
