"""doctor: what this machine is, and what can be measured on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping

from mlsys_bench import __version__, hardware, units
from mlsys_bench.bench import telemetry
from mlsys_bench.engine import choices
from mlsys_bench.engine.native import build, library
from mlsys_bench.hardware import proc
from mlsys_bench.hardware.devices import MissedError, Nvml, Rapl
from mlsys_bench.journeys.gating import perf
from mlsys_bench.looked_up import Ability, Doctor
from mlsys_bench.types import Scalar

EXTRAS = (
    ("engine", "torch", "run the built-in engine: bench, serve, demo"),
    ("serve", "starlette", "serve it over HTTP"),
    ("load", "locust", "load-test servers"),
    ("plot", "matplotlib", "draw the pictures of HTML reports"),
    ("fast", "numba", "simulate faster (later)"),
)


def examine() -> Doctor:
    """Return what works here and what would make the rest work."""
    machine = hardware.machine()
    abilities = (
        _processor(machine.hard),
        _memory(machine.hard),
        _layout(),
        _gpus(),
        *map(_extra, EXTRAS),
        _kernels(),
        _products(),
        _bench(),
    )
    return Doctor(abilities=(Ability(name="mlsys", works=True, detail=f"version {__version__}"), *abilities))


def _processor(hard: Mapping[str, Scalar]) -> Ability:
    name, flags = hard["cpu_name"] or hard["architecture"], hard["isa"] or "no vector extensions known"
    return Ability(name="processor", works=True, detail=f"{name}; {flags}")


def _memory(hard: Mapping[str, Scalar]) -> Ability:
    size = hard["memory_gb_class"]
    return Ability(name="memory", works=True, detail=f"of the {size} GiB class" if size else "size not readable")


def _layout() -> Ability:
    cores = hardware.cpu_layout()
    if cores >= 2:
        detail = f"{cores} cores: the engine takes one, server and client another, so they do not disturb each other"
        return Ability(name="load tests here", works=True, detail=detail)
    return Ability(
        name="load tests here",
        works=False,
        detail="one core: engine and client would share it, and the figures would be of both",
        cure="run `mlsys loadtest` from another machine",
    )


def _gpus() -> Ability:
    found = hardware.nvml_gpus()
    if isinstance(found, str):
        return Ability(name="GPU", works=False, detail=found, cure="measurements fall back to the CPU and say so; planning needs no GPU")
    listed = ", ".join(f"{g.get('name')} ({units.show_bytes(float(str(g.get('memory_bytes') or 0)))})" for g in found)
    return Ability(name="GPU", works=True, detail=listed)


def _extra(extra: tuple[str, str, str]) -> Ability:
    name, module, purpose = extra
    if importlib.util.find_spec(module) is None:
        return Ability(name=f"extra {name}", works=False, detail=f"needed to {purpose}", cure=f"pip install 'mlsys-bench[{name}]'")
    return Ability(name=f"extra {name}", works=True, detail=f"{module} {importlib.metadata.version(module)}: can {purpose}")


def _kernels() -> Ability:
    """Say whether the engine's C kernels are there, compiled now where they were not yet."""
    if library.load() is None:
        first = "" if build.find_compiler() else "install gcc or clang; "
        return Ability(name="C kernels", works=False, detail=library.why_not(), cure=f"{first}until then the engine computes with torch")
    return Ability(name="C kernels", works=True, detail=f"{library.level()} by {library.why_not()}")


def _products() -> Ability:
    """Say who multiplies matrices of which format, measured now where nobody has yet."""
    name = "matrix products"
    if importlib.util.find_spec("torch") is None:
        return Ability(name=name, works=False, detail="the engine computes with torch", cure="pip install 'mlsys-bench[engine]'")
    from mlsys_bench.engine import linear

    found = linear.timings()
    rows = ", ".join(map(str, choices.ROWS))
    detail = f"the faster of C and torch here, at {rows} rows: {choices.told(found)}" if found else "torch's own: there are no C kernels"
    return Ability(name=name, works=True, detail=detail)


def _bench() -> Ability:
    """Say in one line what `mlsys bench gpu` can measure here and what not, and with which suite to begin."""
    name = "microbenchmarks"
    if importlib.util.find_spec("torch") is None:
        return Ability(name=name, works=False, detail="operators are torch's or the engine's", cure="pip install 'mlsys-bench[engine]'")
    from mlsys_bench.bench import collectives

    why = {
        "GPU (NVML)": _untold(Nvml()),
        "energy (RAPL)": _untold(Rapl()),
        "links between processes (gloo)": collectives.lonely(hardware.cpu_layout(), "cpu"),
        "stolen time": None if telemetry.cpu_times(proc.PROC) else "/proc/stat cannot be read",
        "instructions, for the gate (perf)": perf.missing(),
    }
    here = ["memory", "products", "operators", "engine steps", *(what for what, missing in why.items() if missing is None)]
    lacking = [f"{what}: {missing}" for what, missing in why.items() if missing is not None]
    return Ability(
        name=name, works=True, detail="; ".join([", ".join(here), *(["not here " + " · ".join(lacking)] if lacking else [])]),
        cure="start with `mlsys bench gpu --suite quick`, a minute; `--suite full` takes ten and covers every shape",
    )  # fmt: skip


def _untold(device: Nvml | Rapl) -> str | None:
    """Return why a device tells nothing, None where it does."""
    try:
        device.look(1.0)
    except MissedError as missed:
        return str(missed)
    device.release()
    return None
