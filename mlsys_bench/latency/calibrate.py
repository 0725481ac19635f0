"""Fit a step profile to the `engine.step` cells of a bench file.

Least squares on log(time), robust, one median per cell and launch.  Multipliers are bounded below by 1, the physics floor; that is
sound because the ceilings they multiply are the best this machine showed in the same file: `memory.read`, `gemm`, and the steps
themselves (a step that moved B bytes in t seconds proves a bandwidth of B / t).  What the cells leave open is held by a weak prior,
and the note says which coefficient that is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from mlsys_bench import models
from mlsys_bench.errors import BadInput
from mlsys_bench.latency import physics, step
from mlsys_bench.latency.solve import FITTED, Cell, best_shape, names, residual_sd, solve
from mlsys_bench.types import Bench, LatencyProfile, Launch, Layout, Measurement, Provenance

_LIMITS = ("max_batch", "max_step_tokens", "block_tokens", "kv_tokens", "max_context")
_ENOUGH = 8  # undisturbed samples, if they are not half of all
_OWNED = 0.95  # share of its wall time that an undisturbed step computes
Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """One cell beside what a profile says of it."""

    features: tuple[float, ...]
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Return predicted / measured - 1."""
        return self.predicted_s / self.measured_s - 1


def fit(bench: Bench, *, layout: Layout | None = None) -> LatencyProfile:
    """Return the step profile of the one layout a bench file holds, or of the one that is asked for.

    Raises BadInput when there are no `engine.step` cells, too few kinds of them, or several layouts and none is chosen.
    """
    layout = _one_layout(bench, layout)
    steps = [m for m in _steps(bench) if _layout(m) == layout]
    rows = cells(steps)
    _demand_coverage(rows, layout)
    constants, note = _ceilings(bench, layout, rows)
    shape = best_shape(rows, constants)
    logs, covariance, vague = solve(rows, shape)
    held_out = np.abs(np.expm1(shape.held_out_logs))
    notes = [
        f"fitted to {len({r.key for r in rows})} cells of {max(len(m.launches or m.drifted) for m in steps)} launch(es)",
        f"held-out cells are off by {100 * np.median(held_out):.1f} % (median), {100 * held_out.max():.1f} % (worst)",
        *note,
        *_busy(steps),
        *_drifting(steps),
        *([f"held by a weak prior, the cells do not say: {', '.join(vague)}"] if vague else []),
    ]
    return step.check(
        LatencyProfile(
            form="step",
            layout=layout,
            stage=None,
            terms=names(shape.constants),
            coefficients=tuple(np.exp(logs).tolist()),
            covariance=tuple(tuple(row) for row in covariance.tolist()),
            constants=shape.constants | _limits(steps[0]),
            residual_log_sd=residual_sd(rows, shape),
            valid=_valid(rows),
            provenance=Provenance.CALIBRATED,
            note="; ".join(notes),
        )
    )


def layouts(bench: Bench) -> tuple[Layout, ...]:
    """Return the layouts whose engine steps a bench file holds, in order of appearance."""
    return tuple(dict.fromkeys(_layout(m) for m in _steps(bench)))


def cells(measurements: Iterable[Measurement]) -> list[Cell]:
    """Return one row per measured cell and launch; where all launches of a cell drifted, these, as unsure as they drifted."""
    return [_cell(m, launch) for m in measurements for launch in m.launches or m.drifted if any(r.values for r in launch.rounds)]


def residuals(profile: LatencyProfile, bench: Bench) -> tuple[Residual, ...]:
    """Return every cell of the profile's layout beside its prediction."""
    rows = cells([m for m in _steps(bench) if _layout(m) == profile.layout])
    return tuple(Residual(features=r.features, measured_s=r.median_s, predicted_s=step.step_s(profile, r.features)) for r in rows)


# ---------------------------------------------------------------- reading the file


def _steps(bench: Bench) -> list[Measurement]:
    return [m for m in bench.measurements if m.name == "engine.step" and (m.drifted or (m.skipped is None and m.launches))]


def _one_layout(bench: Bench, wanted: Layout | None) -> Layout:
    found = layouts(bench)
    if not found:
        skipped = next((f": {m.skipped}" for m in bench.measurements if m.name == "engine.step" and m.skipped), "")
        raise BadInput(f"the bench file has no engine.step measurement to fit{skipped}; run mlsys bench gpu")
    if wanted is not None and wanted not in found:
        raise BadInput(f"the bench file has no engine.step of {_show(wanted)}; it has {'; '.join(map(_show, found))}")
    if wanted is None and len(found) > 1:
        raise BadInput(
            f"the bench file holds {len(found)} layouts ({'; '.join(map(_show, found))}); choose one, a profile belongs to one layout"
        )
    return wanted or found[0]


def _show(layout: Layout) -> str:
    threads = "" if layout.threads is None else f", {layout.threads} thread(s)"
    return f"{layout.model} {layout.precision} on {layout.device}{threads}"


def _layout(m: Measurement) -> Layout:
    p = m.parameters
    missing = [name for name in ("model", "precision", "device", *step.FEATURES) if p.get(name) is None]
    if missing:
        raise BadInput(f"an engine.step measurement lacks the parameter(s) {', '.join(missing)}; was this file made by mlsys bench?")
    cores, threads = p.get("pinned_cores"), p.get("threads")
    return Layout(
        model=str(p["model"]),
        precision=str(p["precision"]),
        device=str(p["device"]),
        threads=None if threads is None else int(threads),
        pinned_cores=None if cores is None else tuple(int(c) for c in str(cores).split(",")),
        tp=int(p.get("tp") or 1),
    )


def _cell(m: Measurement, launch: Launch) -> Cell:
    features = tuple(float(m.parameters[name] or 0) for name in step.FEATURES)
    values_s, turn = _undisturbed(m, launch)
    logs = np.log(values_s)
    by_round = np.array([np.median(logs[turn == t]) for t in np.unique(turn)])
    return Cell(
        key=repr(features),
        features=features,
        median_s=float(np.exp(np.median(logs))),
        log_se=max(_median_se(logs), _median_se(by_round), _drift(by_round) if launch in m.drifted else 0.0),  # a round's samples are alike
    )


def _median_se(logs: Array) -> float:
    """Return the standard error of a median: as for a normal sample, or by the ranks around it where that is more.

    A handful of samples in two heaps has its median in one of them, and its median deviation there; the ranks see the other heap.
    """
    normal = 1.2533 * 1.4826 * np.median(np.abs(logs - np.median(logs))) / np.sqrt(len(logs))
    aside = 0.5 / np.sqrt(len(logs))  # one standard error, as a share of the sample
    low, high = np.quantile(logs, [0.5 - aside, 0.5 + aside])
    return float(max(normal, (high - low) / 2))


def _undisturbed(m: Measurement, launch: Launch) -> tuple[Array, npt.NDArray[np.int64]]:
    """Return the samples that had their core to themselves, if enough did to speak for the cell, and the round of each.

    Else, for an engine of one thread on a CPU, the CPU time of all: what the step takes once the others have left.
    """
    wall_s = np.array([v for r in launch.rounds for v in r.values])
    turn = np.repeat(np.arange(len(launch.rounds), dtype=np.int64), [len(r.values) for r in launch.rounds])
    if not (wall_s > 0).all():
        raise BadInput("engine.step holds a time that is not above 0 s; the file is broken, measure again")
    flagged = np.array([bad for r in launch.rounds for bad in r.flagged or (False,) * len(r.values)])
    if not _owns_its_core(m) or any(r.cpu_s is None for r in launch.rounds):
        count = ~flagged if not flagged.all() else np.ones_like(flagged)
        return wall_s[count], turn[count]
    cpu_s = np.array([v for r in launch.rounds for v in r.cpu_s or ()])
    clean = (cpu_s >= _OWNED * wall_s) & ~flagged
    if clean.sum() >= min(_ENOUGH, len(wall_s) / 2):
        return wall_s[clean], turn[clean]
    return (cpu_s, turn) if (cpu_s > 0).all() else (wall_s, turn)


def _owns_its_core(m: Measurement) -> bool:
    """Say whether CPU time and wall time should agree: one thread that computes all the time."""
    return m.parameters.get("device") == "cpu" and m.parameters.get("threads") == 1


def _busy(steps: list[Measurement]) -> list[str]:
    """Return a warning when most samples had to share their core: a plan made of them holds for a quieter machine."""
    rounds = [r for m in steps if _owns_its_core(m) for launch in m.launches for r in launch.rounds if r.cpu_s]
    owned = [cpu_s >= _OWNED * wall_s for r in rounds for wall_s, cpu_s in zip(r.values, r.cpu_s or (), strict=True)]
    if not owned or 2 * sum(owned) >= len(owned):
        return []
    shared = 100 * (1 - sum(owned) / len(owned))
    return [f"{shared:.0f} % of the samples shared their core with other processes; they count by CPU time, as on a quiet machine"]


def _drift(by_round: Array) -> float:
    """Return by how much the last third of the rounds lies from the first."""
    third = max(1, len(by_round) // 3)
    return abs(float(np.median(by_round[-third:]) - np.median(by_round[:third])))


def _drifting(steps: list[Measurement]) -> list[str]:
    """Return a warning where cells changed while they were measured."""
    many = sum(not m.launches for m in steps)
    return [f"{many} of {len(steps)} cells changed while they were measured; each counts as unsure as it changed"] if many else []


def _demand_coverage(rows: list[Cell], layout: Layout) -> None:
    decode = [r.features for r in rows if r.features[0] > 0 and r.features[2] == 0]
    prefill = [r.features for r in rows if r.features[0] == 0 and r.features[2] > 0]
    missing = []
    if len({f[0] for f in decode}) < 2:
        missing.append("decode steps at two batch sizes")
    if len({round(f[1] / f[0], -1) for f in decode}) < 2:
        missing.append("decode steps at two contexts")
    if len({f[2] for f in prefill}) < 2:
        missing.append("prefill steps of two lengths")
    if missing or len({r.key for r in rows}) < len(FITTED):
        needed = " and ".join(missing) or f"{len(FITTED)} cells, there are {len({r.key for r in rows})}"
        raise BadInput(
            f"too few steps of {_show(layout)} were measured to fit a profile: it needs {needed}; a larger --budget measures more"
        )


def _limits(m: Measurement) -> dict[str, float]:
    return {name: float(value) for name in _LIMITS if isinstance(value := m.parameters.get(name), int | float)}


def _valid(rows: list[Cell]) -> dict[str, tuple[float, float]]:
    table = np.array([r.features for r in rows])
    return {name: (float(c.min()), float(c.max())) for name, c in zip(step.FEATURES, table.T, strict=True)}


def _ceilings(bench: Bench, layout: Layout, rows: list[Cell]) -> tuple[dict[str, float], list[str]]:
    """Return the constants with this machine's bandwidth and peak, and what there is to say about them."""
    constants = physics.constants_of(models.find(layout.model), layout.precision, layout.tp)
    unit = constants | {"bandwidth_bytes_per_s": 1.0, "peak_flops_per_s": 1.0}
    D, K, P, Q, S = np.array([r.features for r in rows]).T
    taken_s = np.array([r.median_s for r in rows])
    moved = float(((step.weights_s(unit, D + P) + K * constants["kv_bytes_per_token"]) / taken_s).max())
    computed = float(((step.linear_s(unit, D + P, S) + (K + Q) * constants["attention_flops_per_pair"]) / taken_s).max())
    read, product = _best(bench, layout, "memory.read"), _best(bench, layout, "gemm")
    notes = []
    if read is None or product is None:
        lacking = " and ".join(n for n, v in (("memory.read", read), ("gemm", product)) if v is None)
        notes.append(f"no {lacking} in the file: that ceiling is what the steps themselves reached")
    if (read or moved) < moved or (product or computed) < computed:
        notes.append("steps beat the ceiling measured beside them (caches, or a disturbed run); the ceiling is raised to theirs")
    ceilings = {"bandwidth_bytes_per_s": max(read or 0.0, moved), "peak_flops_per_s": max(product or 0.0, computed)}
    return constants | ceilings, notes


def _best(bench: Bench, layout: Layout, name: str) -> float | None:
    """Return the best sample of a benchmark on the layout's device and threads: a ceiling, so not the median.

    int8 and int4 weights are widened before they are multiplied, so a product in fp32 or bf16 is their ceiling; w8a8 multiplies int8.
    """
    wanted = {"device": layout.device, "threads": layout.threads}
    formats: tuple[str | None, ...] = (layout.precision, None)
    if layout.precision.startswith(("int8", "int4")):
        formats = ("fp32", "bf16")
    elif layout.precision.startswith(("w8a8", "w4a8")):
        formats = ("int8", None)
    found = [
        value
        for m in bench.measurements
        if m.name == name and all(m.parameters.get(k, v) == v for k, v in wanted.items())
        if name != "gemm" or m.parameters.get("precision") in formats
        for launch in m.launches
        for r in launch.rounds
        for value in r.values
    ]
    return max(found, default=None)
