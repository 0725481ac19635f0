"""Git refs, the working tree and wheels as folders to run from.  The checkout itself is never touched, and nothing of ours is left."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mlsys_bench.errors import BadInput, NotComparable, did_you_mean
from mlsys_bench.journeys.gating import environments, interrupts, running
from mlsys_bench.journeys.gating.environments import HERE, Environment, Needs
from mlsys_bench.journeys.gating.worker import Command, WorkerSource
from mlsys_bench.verdicts import Subject

WORKTREE = (".", "WORKTREE")  # how a person names what is not committed yet
_OURS = ("-m", "mlsys_cli", "bench", "--worker")
_PYTHONS = ("python", "python3")
_PROJECTS = ("pyproject.toml", "setup.py", "setup.cfg")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side, ready to run."""

    subject: Subject
    root: Path  # where its code must come from
    environment: Environment
    paths: tuple[Path, ...]  # of its code, for PYTHONPATH

    def source(self, benchmark: str, worker: str | None = None) -> WorkerSource:
        """Return one benchmark of this side.  `worker` is the command that measures it, the name goes behind; None: this project's own."""
        words = running.words(worker, "--worker") if worker else [_PYTHONS[0], *_OURS]
        words = [self.environment.python, *words[1:]] if words[0] in _PYTHONS else words
        command = Command(
            argv=(*words, *([benchmark] if benchmark else [])), root=self.root, folder=self.root, environment=self.variables()
        )
        return WorkerSource(subject=self.subject, benchmark=benchmark or "benchmarks", command=command)

    def check_ours(self) -> None:
        """Raise NotComparable where this project has none of the benchmarks that run when neither a worker nor a command is named."""
        if not any((path / _OURS[1]).is_dir() for path in self.paths):
            raise NotComparable(
                f"{self.subject.label}: holds no {_OURS[1]}, whose benchmarks run where nothing else is asked: "
                "give --command 'python bench.py' (one run is one launch), or --worker COMMAND"
            )

    def variables(self) -> dict[str, str]:
        """Return what the worker sees: its own code first, one thread per library, bytecode kept from launch to launch."""
        before = os.environ.get("PYTHONPATH")
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONDONTWRITEBYTECODE", "PYTHONHOME")}
        return kept | {
            "PYTHONPATH": os.pathsep.join([*map(str, self.paths), *([before] if before else [])]),
            "PATH": os.pathsep.join([str(Path(self.environment.python).parent), os.environ.get("PATH", os.defpath)]),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }


@contextlib.contextmanager
def opened(base: str, cand: str, note: Callable[[str], None], folder: Path | None = None) -> Iterator[tuple[Side, Side]]:
    """Give both sides as folders with an environment each, and remove the folders afterwards.

    Raises BadInput for what is no ref of this repository, no repository, or no wheel.
    """
    stack = contextlib.ExitStack()
    try:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlsys-gate-", ignore_cleanup_errors=True))).resolve()
        laid = [_laid(text, place / name, folder or Path.cwd(), stack) for text, name in ((base, "base"), (cand, "cand"))]
        needs = [found[2] for found in laid]
        is_same = needs[0].digest() == needs[1].digest()
        sides = [_side(subject, root, HERE if is_same else environments.provide(need, note)) for subject, root, need in laid]
        yield sides[0], sides[1]
    finally:
        with interrupts.held():
            stack.close()


def _side(subject: Subject, root: Path, environment: Environment) -> Side:
    paths = tuple(path for path in (root / "cli", root / "src", root) if path.is_dir())
    return Side(subject=dataclasses.replace(subject, environment=environment.words), root=root, environment=environment, paths=paths)


def _laid(text: str, root: Path, folder: Path, stack: contextlib.ExitStack) -> tuple[Subject, Path, Needs]:
    """Return a subject with the folder that holds it and what it asks for."""
    if text.endswith(".whl"):
        needs = environments.of_wheel(Path(text))
        environments.unpack(Path(text), root)
        return Subject(kind="wheel", label=Path(text).name), root, needs
    top = Path(_git(folder, "rev-parse", "--show-toplevel"))
    commit = _copied(top, root) if text in WORKTREE else _checked_out(top, root, text, stack)
    project = root / _project(folder.resolve(), top.resolve())
    if not project.is_dir():
        raise BadInput(f"{text} has no folder {project.relative_to(root)}, where this was started; start it from the repository's top")
    return Subject(kind="ref", label=text, commit=commit), project, environments.of_folder(project)


def _checked_out(top: Path, root: Path, ref: str, stack: contextlib.ExitStack) -> str:
    """Check a ref out as a worktree, until the stack is closed, and return its commit."""
    commit = _commit(top, ref)
    stack.callback(_try_git, top, "worktree", "remove", "--force", "--force", str(root))
    _git(top, "-c", "core.hooksPath=/dev/null", "worktree", "add", "--quiet", "--detach", "--force", str(root), commit)
    return commit


def _project(folder: Path, top: Path) -> Path:
    """Return where in a repository the project of a folder lies: the nearest that describes itself, else all of it."""
    inside = (place for place in (folder, *folder.parents) if place.is_relative_to(top))
    return next((place for place in inside if any((place / name).is_file() for name in _PROJECTS)), top).relative_to(top)


def _commit(top: Path, ref: str) -> str:
    """Return the commit of a ref.  Raises BadInput saying how to get one that is not here."""
    found = _try_git(top, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    if found is not None:
        return found
    if _try_git(top, "rev-parse", "--is-shallow-repository") == "true":
        alone = "" if set("~^@:") & set(ref) else f", or `git fetch --depth 1 origin {ref}` and name FETCH_HEAD"
        raise BadInput(
            f"{ref!r} is not in this shallow clone: `git fetch --deepen 50`{alone} "
            "(in GitHub Actions: actions/checkout with fetch-depth: 0)"
        )
    names = (_try_git(top, "for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/tags", "refs/remotes") or "").split()
    raise BadInput(f"unknown git ref {ref!r}{did_you_mean(ref, names) if names else ''}; a working tree that is not committed is '.'")


def _copied(top: Path, root: Path) -> str:
    """Copy what git would keep of a working tree, as it is now, and return its commit, with '-dirty' where it is not that."""
    root.mkdir()
    listed = _git(top, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        source, target = top / name, root / name
        if source.is_file():  # a deleted one is listed too
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    return _commit(top, "HEAD") + ("-dirty" if _git(top, "status", "--porcelain") else "")


# ---------------------------------------------------------------- git


def _git(folder: Path, *arguments: str) -> str:
    """Return what git says.  Raises BadInput with its last words."""
    done = _asked(folder, arguments)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["it left no message"])[-1]
        if "not a git repository" in done.stderr:
            raise BadInput(f"{folder} is in no git repository: go to a checkout, or compare wheels (X.whl), commands or URLs")
        raise BadInput(f"git {shlex.join(arguments[:2])} failed: {words}")
    return done.stdout.strip()


def _try_git(folder: Path, *arguments: str) -> str | None:
    """Return what git says, None where it refuses."""
    done = _asked(folder, arguments)
    return done.stdout.strip() if done.returncode == 0 else None


def _asked(folder: Path, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    # a hook's variables would point git elsewhere; a session of its own keeps Ctrl-C from cutting a worktree off half way
    variables = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    try:
        return subprocess.run(
            ["git", *arguments], cwd=folder, env=variables | {"LC_ALL": "C"}, capture_output=True, text=True, check=False,
            start_new_session=sys.platform != "win32",
        )  # fmt: skip
    except FileNotFoundError as error:
        raise BadInput("git is not installed here: refs cannot be compared; compare wheels (X.whl), commands or URLs") from error
