"""Everything a person or CI runs here.  `python -m pip install nox && nox -s demo`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests"]

# Installed first and alone: any looser request, made beside other packages, can pull gigabytes of CUDA.
TORCH = os.environ.get("MLSYS_TORCH", "torch==2.13.0")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # of those that share the cores
KEEPING = {"PYTHONDONTWRITEBYTECODE": ""}  # where nothing compiled is kept, every worker compiles every test anew, for 15 s
FAILED = Path(".pytest_cache/v/cache/lastfailed")  # where pytest notes what failed
FEW = 10  # more failures than these no busy machine explains
HONESTY = Path("../shared/tools/honesty.py")


def install(session: nox.Session, extras: str) -> None:
    """Install torch, then this checkout with its extras, everything else pinned."""
    session.install(*TORCH.split())
    session.install("-c", "constraints.txt", "-e", f".[{extras}]")


@nox.session
def demo(session: nox.Session) -> None:
    """Run the whole loop on this machine: measure, fit, plan, serve, load-test, compare, report."""
    install(session, "engine,serve,load,plot")
    session.run("mlsys", "demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Check style, types, floors and behaviour; then that the wheel works alone."""
    install(session, "engine,serve,load,plot,fast,cluster,test")
    with warming(session):
        check_style(session)
    check_behaviour(session)
    if HONESTY.exists():
        session.run("python", str(HONESTY), ".")
    session.notify("wheel")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types only."""
    install(session, "engine,serve,load,plot,fast,cluster,test")
    check_style(session)


def check_style(session: nox.Session) -> None:
    """Run ruff and mypy over everything."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    untyped = ("--disable-error-code", "misc", "--disable-error-code", "no-untyped-call")  # lambdas with defaults; simpy's processes
    session.run("mypy", *untyped, "proofs", env={"MYPYPATH": "proofs"})


@contextmanager
def warming(session: nox.Session) -> Iterator[None]:
    """Beside checks that use one core have compiled, once, what each worker of pytest would compile for itself: tests and kernels.

    Tests are compiled, and the engine's kernels, when tests are collected; the simulator's by the one test that is run.  What fails here is
    told by the tests.
    """
    if session.posargs:
        yield
        return
    command = [str(Path(session.bin) / "python"), "-m", "pytest", "-k", "compiled_and_plain_runs"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **KEEPING}) as compiling:
        try:
            yield
        except BaseException:
            compiling.terminate()
            raise


def check_behaviour(session: nox.Session) -> None:
    """Run the tests: on all cores those that hold on a busy machine, then alone those that measure; or what posargs ask for."""
    if session.posargs:
        session.run("python", "-m", "pytest", *session.posargs)
        return
    workers = str(min(8, (os.cpu_count() or 1) + 1))  # one more than cores: some of the tests wait for processes
    spread = ("-n", workers, "--dist", "loadfile", "--no-loadscope-reorder")
    run_tests(session, "-m", "not measures", *spread, "--durations=30", env={**ONE_THREAD, **KEEPING})
    measuring = [str(path) for path in sorted(Path("tests").rglob("test_*.py")) if "mark.measures" in path.read_text(encoding="utf-8")]
    run_tests(session, "-m", "measures", "--durations=20", *measuring, env=KEEPING)


def run_tests(session: nox.Session, *arguments: str, env: dict[str, str]) -> None:
    """Run tests; the few that fail are run once more, alone and by name: a busy machine is told from a defect, and both are shown."""
    FAILED.unlink(missing_ok=True)
    try:
        session.run("python", "-m", "pytest", *arguments, env=env)
    except CommandFailed as ended:
        failed = list(json.loads(FAILED.read_text(encoding="utf-8"))) if FAILED.exists() else []
        if not 0 < len(failed) <= FEW or not str(ended.reason).endswith(" code 1"):  # 1: all tests ran and some failed
            raise
        session.warn(f"{len(failed)} failed among others and must now pass alone: {', '.join(failed)}")
        session.run("python", "-m", "pytest", *failed, env=env)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it alone, without torch, and plan with it from outside the checkout."""
    session.install("build", "-c", "constraints.txt")
    dist = Path(session.create_tmp()).resolve()
    for old in dist.glob("*.whl"):
        old.unlink()
    session.run("python", "-m", "build", "--wheel", "--outdir", str(dist), ".")
    built = next(dist.glob("*.whl"))
    session.install("--force-reinstall", "--no-deps", str(built))
    session.install("-c", "constraints.txt", str(built))
    slo = "ttft_p95<500ms,tpot_p99<50ms"
    with session.chdir(dist):
        session.run("python", "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)")
        session.run("mlsys", "scenario", "show", "llm-chat")
        session.run("mlsys", "plan", "--qps", "200", "--model", "llama-3-8b", "--gpu", "h100-sxm,l4", "--slo", slo)


@nox.session
def bench(session: nox.Session) -> None:
    """Run proofs/NAME.py: every figure beside its bar, non-zero on a miss.  `nox -s bench -- NAME`."""
    names = session.posargs or sorted(p.stem for p in Path("proofs").glob("[a-z]*.py"))
    install(session, "engine,serve,load,plot,fast,cluster,test")
    for name in names:
        session.run("python", f"proofs/{name}.py")


@nox.session
def gate(session: nox.Session) -> None:
    """Gate the working tree against the commit before it, or MLSYS_GATE_BASE: only a proven regression fails."""
    install(session, "engine,serve,load,fast")
    base = os.environ.get("MLSYS_GATE_BASE", "HEAD~1")
    names = "engine.decode,planner.plan,loadtest.sender"
    # 3: this machine could not tell today; 4: the commit before has no bench worker, or another torch.  Neither is a regression
    session.run("mlsys", "gate", "run", "--base", base, "--cand", ".", "--bench", names, *session.posargs, success_codes=[0, 3, 4])
