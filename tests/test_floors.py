"""Imports go down, never up: the *may import* column of docs/architecture.md, held against every import in the tree."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STDLIB = sys.stdlib_module_names
F0 = {
    "ahead",
    "provenance",
    "apart",
    "tenancy",
    "timelines",
    "serversides",
    "senders",
    "askings",
    "loadtests",
    "loadlimits",
    "calibrations",
    "fleets",
    "surroundings",
    "stage_fleets",
    "types",
    "verdicts",
    "histories",
    "looked_up",
    "checked",
    "stages",
    "errors",
    "units",
    "slo",
    "stats",
    "record",
    "resources",
    "jit",
    "documents",
    "longform",
    "claims",
    "billing",
    "backtests",
    "productions",
    "workers",
    "samples",
}
F1 = {"anatomy", "batching", "queueing", "latency", "readings", "workload", "pricing", "scenario", "models", "hardware", "summary"}
F2 = {"engine", "simulate"}
F3 = {"bench", "loadtest", "serve", "systems", "plan", "predict"}
F4 = {"report", "gate"}
MAY_IMPORT: dict[str, set[str]] = {
    "ahead": set(), "tenancy": {"provenance"}, "apart": {"provenance"}, "fleets": {"types"},
    "provenance": set(), "surroundings": {"provenance"}, "stage_fleets": {"provenance", "surroundings"},
    "types": {"billing", "askings", "apart", "stage_fleets", "provenance", "surroundings", "tenancy", "timelines", "serversides",
              "senders"},
    "serversides": set(), "timelines": set(), "senders": set(), "askings": set(), "loadtests": {"types"}, "loadlimits": {"types"},
    "calibrations": {"loadtests"}, "verdicts": {"types"}, "histories": {"types"}, "looked_up": {"types"}, "checked": {"types"},
    "samples": {"types"}, "claims": {"types"}, "backtests": {"types"}, "productions": {"types", "checked"}, "billing": {"provenance"},
    "stages": {"types"},
    "errors": set(), "documents": {"errors"}, "workers": {"errors"}, "resources": set(), "stats": set(), "jit": set(),
    "units": {"errors"}, "slo": {"types", "errors", "units"}, "record": F0,
    "anatomy": F0 | {"models"}, "batching": F0, "queueing": F0, "models": F0, "hardware": F0, "pricing": F0, "workload": F0, "summary": F0,
    "latency": F0 | {"models", "hardware"}, "longform": {"types"}, "readings": F0 | {"models", "hardware", "latency"},
    "scenario": F0 | {"models", "hardware", "pricing", "workload"},
    "engine": F0 | F1, "simulate": F0 | F1,
    "bench": F0 | F1 | F2, "systems": F0 | F1 | F2, "serve": F0 | F1 | F2 | {"systems"},
    "loadtest": F0 | F1, "plan": F0 | F1 | F2 | {"predict"}, "predict": F0 | F1 | F2,
    "report": F0 | F1, "gate": F0 | F1,
    "journeys": F0 | F1 | F2 | F3 | F4,
}  # fmt: skip
TORCH = {"engine", "bench"}
LOCUST = {f"mlsys_bench/loadtest/{name}.py" for name in ("worker", "locustfile", "remote", "master", "child")}


@functools.cache
def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in the file the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it in full"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "mlsys_bench" else {module}
    return found


def library_files() -> list[Path]:
    return sorted((ROOT / "mlsys_bench").rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "mlsys_bench").with_suffix("").parts
    return parts[0]


@pytest.mark.parametrize("path", library_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_what_lies_below_it(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    assert room in MAY_IMPORT, f"{room} is in no floor; add it to docs/architecture.md and here"
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top != "mlsys_cli", f"{path}: the library does not know the door"
        if top == "mlsys_bench" and rest:
            target = rest.split(".")[0]
            allowed = MAY_IMPORT[room] | {room, "__version__"}
            assert target in allowed, f"{path}: {room} may not import {target}"


@pytest.mark.parametrize("path", library_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_torch_and_locust_stay_in_their_rooms(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports(path)}
    assert "torch" not in tops or room_of(path) in TORCH, f"{path} imports torch"
    assert not tops & {"locust", "gevent", "geventhttpclient"} or str(path.relative_to(ROOT)) in LOCUST, f"{path} imports locust or gevent"


def test_types_errors_and_resources_need_only_the_standard_library() -> None:
    for room in ("types", "errors", "resources"):
        tops = {name.split(".")[0] for name in imports(ROOT / f"mlsys_bench/{room}.py")}
        assert tops <= set(STDLIB) | {"mlsys_bench"}


def test_importing_any_module_but_the_load_worker_leaves_gevent_and_locust_out() -> None:
    names = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in library_files()
        if str(p.relative_to(ROOT)) not in LOCUST and p.name != "__main__.py"
    ]
    code = (
        f"import importlib, sys\nfor n in {names!r}: importlib.import_module(n)\nprint(sorted({{'gevent', 'locust'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_planning_path_imports_nothing_heavy() -> None:
    """torch, locust, pandas, matplotlib, pyarrow, scipy.stats and the gate are imported where they are used; planning uses none of them."""
    libraries = ("torch", "locust", "pandas", "matplotlib", "pyarrow", "scipy.stats")
    heavy = (*libraries, "sqlite3", "mlsys_bench.gate", "mlsys_bench.journeys.gating")
    imported = "import sys, mlsys_cli.main, mlsys_bench.plan, mlsys_bench.scenario, mlsys_bench.report.terminal"
    code = f"{imported}\nprint(sorted(m for m in {heavy!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
