"""A bench record as the suite gives it: every group of benchmarks, one drifting, some flagged, a step with its operators."""

from __future__ import annotations

import numpy as np

from mlsys_bench import models
from mlsys_bench.latency import FEATURES
from mlsys_bench.types import Bench, Launch, Measurement, Round, Scalar, Telemetry, Work

MODEL, READ, FP32, INT8 = "small-160m", 24e9, 0.11e12, 0.42e12
LAYOUT: dict[str, Scalar] = {"device": "cpu", "threads": 1, "pinned_cores": "0"}
SAMPLES = 8


def record(*, contended: tuple[str, ...] = (), watts: float | None = None, seed: int = 0) -> Bench:
    """Return it.  Operators take what the nearer roof says at 80 %, or a floor of 3 µs."""
    rng = np.random.default_rng(seed)
    found = [*_machine(rng), *_operators(rng), *_steps(rng), _skipped()]
    telemetry = () if watts is None else (Telemetry(at_s=(0.0, 1.0), series={"power_w": (watts, watts)}, totals={"energy_j": watts}),)
    return Bench(
        measurements=tuple(found), contended=contended, telemetry=telemetry, unread=("energy: no RAPL here, /sys/class/powercap is empty",)
    )


def measured(
    name: str, median: float, unit: str = "s", work: Work | None = None, rng: np.random.Generator | None = None, **parameters: Scalar
) -> Measurement:
    """Return a measurement whose samples lie closely around a median, one of them flagged and far off."""
    scatter = (rng or np.random.default_rng(1)).normal(0, 0.002, (4, SAMPLES))
    rounds = tuple(Round(values=tuple(float(v) for v in median * (1 + row))) for row in scatter)
    spoilt = Round(values=(2 * median, median), flagged=(True, False))
    return Measurement(
        name=name, unit=unit, better="lower" if unit == "s" else "higher", parameters=LAYOUT | parameters, work=work, ended="settled",
        launches=(Launch(started_s=0.0, rounds=(*rounds, spoilt)),),
    )  # fmt: skip


def _machine(rng: np.random.Generator) -> list[Measurement]:
    size = 2**28
    return [
        measured("memory.read", READ, "B/s", Work(bytes=size), rng, bytes=size),
        measured("memory.copy", 0.8 * READ, "B/s", Work(bytes=2 * size), rng, bytes=size),
        measured("memory.triad", 0.85 * READ, "B/s", Work(bytes=3 * size), rng, bytes=size),
        measured("gemm", FP32, "FLOP/s", Work(flops=2 * 1024**3, bytes=12 * 1024**2), rng, precision="fp32", n=1024),
        measured("gemm", INT8, "FLOP/s", Work(flops=2 * 1024**3, bytes=6 * 1024**2), rng, precision="int8", n=1024),
        measured("pool.handoff", 3.1e-6, "s", None, rng),
    ]


def _operators(rng: np.random.Generator) -> list[Measurement]:
    a = models.find(MODEL)
    shapes = {
        "qkv": ((a.heads + 2 * a.kv_heads) * a.head_dim, a.hidden), "out": (a.hidden, a.heads * a.head_dim),
        "gate_up": (2 * a.ffn, a.hidden), "down": (a.hidden, a.ffn), "head": (a.vocab, a.hidden),
    }  # fmt: skip
    common: dict[str, Scalar] = {"model": a.id, "precision": "int8"}
    found = []
    for layer, (n, k) in shapes.items():
        for m in (1, 16, 512):
            work = Work(bytes=n * k + 4 * m * (n + k), flops=2.0 * m * n * k)
            made = _operator("op.linear", work, rng, **common, layer=layer, m=m, n=n, k=k)
            found.append(_with(made, error=0.004, tolerance=0.02))
    for context in (512, 4096):
        work = Work(bytes=2.0 * context * a.kv_heads * a.head_dim * 4, flops=4.0 * context * a.heads * a.head_dim)
        found.append(_operator("op.attention.decode", work, rng, **common, context_tokens=context, batch=1))
    between = Work(bytes=12.0 * a.hidden, flops=6.0 * a.hidden)
    found += [_operator(name, between, rng, **common, m=1) for name in ("op.norm", "op.rope_append", "op.swiglu")]
    found.append(_operator("op.sample", Work(bytes=4.0 * a.vocab), rng, **common, policy="argmax", m=1))
    return found


def _operator(name: str, work: Work, rng: np.random.Generator, **parameters: Scalar) -> Measurement:
    seconds = max(3e-6, work.bytes / (0.8 * READ), work.flops / (0.8 * INT8))
    return measured(name, seconds, "s", work, rng, **parameters)


def _steps(rng: np.random.Generator) -> list[Measurement]:
    a = models.find(MODEL)
    weights = float(models.step_weight_bytes(a, "int8", 1))
    launch_s = 2e-4
    cells = [(d, d * c, 0.0, 0.0, d) for d in (1, 8) for c in (512,)] + [(0, 0, p, p * p / 2, 1) for p in (64, 256)]
    found = []
    for cell in cells:
        seconds = launch_s + 1.25 * max((weights + cell[1] * 2e4) / READ, 2 * models.linear_params(a) * (cell[0] + cell[2]) / INT8)
        features = dict(zip(FEATURES, map(float, cell), strict=True))
        found.append(measured("engine.step", seconds, "s", None, rng, model=a.id, precision="int8", max_batch=8, **features))
    return [*found[:-1], _with(found[-1], ended="budget")]


def _skipped() -> Measurement:
    return Measurement(
        name="device.launch", unit="s", better="lower", parameters={}, launches=(), skipped="no GPU: a kernel is called, not launched"
    )


def _with(m: Measurement, **changes: object) -> Measurement:
    import dataclasses

    return dataclasses.replace(m, **changes)  # type: ignore[arg-type]
