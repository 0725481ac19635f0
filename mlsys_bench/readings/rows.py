"""A bench record as rows: each measurement's median with an interval, what it achieved, how near it came to which ceiling, what binds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

from mlsys_bench import models, samples, stats, units
from mlsys_bench.errors import UnknownName
from mlsys_bench.latency import FEATURES, physics
from mlsys_bench.readings import roofs as ceilings
from mlsys_bench.readings.catalogue import Group, group_of, place_of
from mlsys_bench.readings.roofs import Bound, Roof, Roofs
from mlsys_bench.types import Bench, Machine, Measurement, Scalar, Telemetry, Work

_LAYOUT = (
    "device", "threads", "pinned_cores", "companion", "max_batch", "max_step_tokens", "block_tokens", "kv_tokens", "max_context", "backend",
    "kv",
)  # fmt: skip
STEPS = ("engine.step", "engine.part")  # their parameters are the features of a step
_BOUND = ("memory.read", "memory.copy", "memory.triad", "gemm", "engine.step")  # beside the operators: what the two roofs are about


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One benchmark.  `share` is of the measured ceiling that `roof` names, `of_sheet` of the data sheet's, `bound` is what binds."""

    name: str
    group: Group
    what: str
    unit: str
    better: Literal["lower", "higher"]
    parameters: dict[str, Scalar]
    median: float | None
    interval: tuple[float, float] | None  # of the median at samples.LEVEL, within these launches
    samples: int  # those that count
    launches: int
    flagged: int = 0  # taken while something disturbed them, left out of the median
    clock_hz: float | None = None  # at which the samples that count were taken; None where it is not known, or where all count
    other_clocks: int = 0  # samples taken at another clock, left out of the median
    seconds: float | None = None  # of one call
    bytes_per_s: float | None = None
    flops_per_s: float | None = None
    tokens_per_s: float | None = None
    roof: Roof | None = None
    bound: Bound | None = None
    share: float | None = None
    of_sheet: float | None = None
    error: float | None = None
    tolerance: float | None = None
    ended: Literal["settled", "budget", "drifting"] | None = None
    skipped: str | None = None
    joules_per_token: float | None = None
    costs: str = ""  # what the precision of an engine step costs in loss, where this machine knows

    @property
    def half_width(self) -> float | None:
        """The larger half of the interval as a share of the median."""
        if self.interval is None or not self.median:
            return None
        return max(self.interval[1] - self.median, self.median - self.interval[0]) / abs(self.median)

    @property
    def intensity(self) -> float | None:
        """FLOPs per byte: where it stands below the roofline."""
        return self.flops_per_s / self.bytes_per_s if self.flops_per_s and self.bytes_per_s else None

    @property
    def tokens_per_s_per_w(self) -> float | None:
        """Tokens per second and watt: the other way round of joules per token."""
        return 1 / self.joules_per_token if self.joules_per_token else None


def table(bench: Bench, machine: Machine | None = None, losses: Mapping[str, float] | None = None) -> tuple[Row, ...]:
    """Return one row per measurement, in the catalogue's order and from small to large.

    `machine` is the record's, for the data sheet of its processor; `losses` what precisions cost, as `bench quality` found on this machine.
    """
    watts = power_w(bench.telemetry)
    own = functools.cache(lambda device: ceilings.measured(bench, device))
    sheet = functools.cache(lambda device: ceilings.datasheet(device, machine))
    found = []
    for m in sorted(bench.measurements, key=_order):
        device = str(m.parameters.get("device", "cpu"))
        row = _placed(_row(m), own(device), sheet(device))
        found.append(dataclasses.replace(row, costs=_costs(m, losses or {}), joules_per_token=_joules(row, watts)))
    return tuple(found)


def power_w(telemetry: tuple[Telemetry, ...]) -> float | None:
    """Return the median power that was read while launches measured, None where the machine does not tell it."""
    read = [p for t in telemetry for p in t.series.get("power_w", ()) if p]
    return stats.quantile(read, 0.5) if read else None


# ---------------------------------------------------------------- one row


def _row(m: Measurement) -> Row:
    values = samples.kept(m)
    median = stats.quantile(values, 0.5) if len(values) else None
    clock_hz = samples.usual_clock([launch.rounds for launch in m.launches])
    row = Row(
        name=m.name, group=group_of(m.name), what=what(m), unit=m.unit, better=m.better, parameters=m.parameters, median=median,
        interval=samples.interval(m), samples=len(values), launches=len(m.launches), flagged=samples.flagged(m),
        clock_hz=clock_hz, other_clocks=samples.at_other_clocks(m), error=m.error, tolerance=m.tolerance, ended=m.ended, skipped=m.skipped,
    )  # fmt: skip
    return row if median is None else _achieved(row, m, median)


def _achieved(row: Row, m: Measurement, median: float) -> Row:
    """Return the row with the time of a call and the rates that follow from its work."""
    work = m.work or (_step_work(m.parameters) if m.name == "engine.step" else None)
    moved, computed = (work.bytes or None, work.flops or None) if work else (None, None)
    seconds = _seconds(m.unit, median, moved, computed)
    rates: dict[str, float | None] = {"seconds": seconds}
    rates["bytes_per_s"] = median if m.unit == "B/s" else moved / seconds if moved and seconds else None
    rates["flops_per_s"] = median if m.unit == "FLOP/s" else computed / seconds if computed and seconds else None
    rates["tokens_per_s"] = median if m.unit.startswith("token") else _tokens(m) / seconds if seconds and _tokens(m) else None
    return dataclasses.replace(row, **rates)  # type: ignore[arg-type]


def _seconds(unit: str, median: float, moved: float | None, computed: float | None) -> float | None:
    amount = {"s": None, "B/s": moved, "FLOP/s": computed}.get(unit)
    return median if unit == "s" else amount / median if amount and median else None


def _placed(row: Row, own: Roofs, sheet: Roofs | None) -> Row:
    """Return the row with its place below the roofs, if it is of what they are about."""
    if row.group != "operators" and row.name not in _BOUND:
        return row
    precision = str(row.parameters.get("precision", "fp32"))
    found = ceilings.standing(own, precision, row.bytes_per_s, row.flops_per_s)
    if found is None:
        return row
    bound = found.roof if found.bound == "cache" and row.group == "machine" else found.bound  # stores may pass the caches, reads do not
    of_sheet = ceilings.share_of(sheet, found.roof, precision, row.bytes_per_s, row.flops_per_s)
    return dataclasses.replace(row, roof=found.roof, share=found.share, bound=bound, of_sheet=of_sheet)


def _tokens(m: Measurement) -> float:
    """Return the tokens one engine step gives or takes in."""
    if m.name != "engine.step":
        return 0.0
    return sum(float(m.parameters.get(name) or 0) for name in ("decode_seqs", "prefill_tokens"))


def _joules(row: Row, watts: float | None) -> float | None:
    return watts / row.tokens_per_s if watts and row.tokens_per_s else None


def _step_work(p: Mapping[str, Scalar]) -> Work | None:
    """Return what physics wants of a step: weights and KV cache read, products and attention computed; None for a model nobody knows."""
    try:
        k = physics.constants_of(models.find(str(p["model"])), str(p["precision"]))
    except UnknownName:
        return None
    d, kv, prefill, pairs, sampled = (float(p.get(name) or 0) for name in FEATURES)
    tokens = d + prefill
    missed = (1 - k["experts_per_token"] / k["experts"]) ** tokens if k["experts"] else 0.0
    moved = k["dense_bytes"] + k["expert_bytes"] * (1 - missed) + kv * k["kv_bytes_per_token"]
    products = tokens * (k["flops_per_token"] + k["expert_flops_per_token"]) + sampled * k["head_flops"]
    return Work(bytes=moved, flops=products + (kv + pairs) * k["attention_flops_per_pair"])


def _costs(m: Measurement, losses: Mapping[str, float]) -> str:
    precision = str(m.parameters.get("precision"))
    above = losses.get(models.ENGINE_ALIASES.get(precision, precision))
    if m.name != "engine.step" or above is None or precision == "fp32":
        return ""
    return f"{above:+.4f} bit/byte on the byte model"


# ---------------------------------------------------------------- words and order


def what(m: Measurement) -> str:
    """Return the parameters of a measurement in words, those of the layout left out."""
    p = {name: v for name, v in m.parameters.items() if name not in _LAYOUT and v is not None}
    if m.name in STEPS:
        part = f", {p['part']}" if "part" in p else ""
        return f"{p.pop('model', '')} {p.pop('precision', '')}: {step_words(p)}{part}".strip()
    p.pop("model", None)
    bare = [str(p.pop(name)) for name in ("layer", "part", "phase", "policy", "precision") if name in p]
    if "model" in m.parameters:  # which says the shape
        p = {name: v for name, v in p.items() if name not in ("n", "k")}
    elif m.name == "gemm" and "n" in p:
        bare.append(f"{_show(p['n'])} x {_show(p.pop('n'))}")
    bare += [f"m {_show(p.pop('m'))}"] if "m" in p else []
    bare += [units.show_bytes(float(size))] if isinstance(size := p.pop("bytes", None), int | float) else []
    return ", ".join((*bare, *(f"{name.removesuffix('_tokens')} {_show(v)}" for name, v in p.items())))


def step_words(p: Mapping[str, Scalar]) -> str:
    """Return the features of a step as people say them: 'decode 4 x 512 + prefill 256', 'prefill 256 after 512'."""
    d, kv, prefill, pairs, _ = (float(p.get(name) or 0) for name in FEATURES)
    parts = [f"decode {d:.0f} x {kv / d:.0f}"] if d else []
    if prefill:
        after = round(max(0.0, pairs / prefill - prefill / 2))
        parts.append(f"prefill {prefill:.0f}" + f" after {after}" * bool(after))
    return " + ".join(parts)


def _show(value: Scalar) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


_SIZES = ("m", "context_tokens", "prefill_tokens", "prefill_pairs", "decode_seqs", "decode_kv_tokens", "batch", "bytes")
_KINDS = ("model", "precision", "layer", "part", "phase", "policy")


def _order(m: Measurement) -> tuple[int, str, tuple[str, ...], list[float]]:
    p = m.parameters
    sizes = [float(size) for name in _SIZES if isinstance(size := p.get(name), int | float)]
    return place_of(m.name), m.name, tuple(str(_RANKS.get(str(p.get(name)), p.get(name))) for name in _KINDS), sizes


_RANKS = {  # in the order they come in a model, a start, a history of ideas
    name: f"{rank:02}"
    for rank, name in enumerate(
        ("qkv", "out", "gate_up", "down", "head", "process", "import", "weights", "first_token", "steady", "total", "static", "dynamic",
         "continuous")
    )
}  # fmt: skip
