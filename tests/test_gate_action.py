"""action.yml: that GitHub will take it, that nothing a stranger types is run, and what its steps do, in bash."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parent.parent
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS: dict[str, dict[str, Any]] = {step.get("name", step.get("uses")): step for step in ACTION["runs"]["steps"]}
MLSYS = str(Path(sysconfig.get_path("scripts")) / "mlsys")
WORKFLOW: dict[Any, Any] = yaml.safe_load((ROOT / ".github/workflows/gate.yml").read_text(encoding="utf-8"))

TEXT = {"type": "string", "minLength": 1}
STEP = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "name": TEXT, "id": {"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_-]*$"}, "if": TEXT, "shell": {"const": "bash"}, "run": TEXT,
        "uses": {"type": "string", "pattern": "^[^@]+@v[0-9]+$"}, "env": {"type": "object", "additionalProperties": {"type": "string"}},
        "with": {"type": "object", "additionalProperties": {"type": "string"}}, "working-directory": TEXT,
    },
    "oneOf": [{"required": ["run", "shell"]}, {"required": ["uses"]}],
}  # fmt: skip
SCHEMA = {  # what GitHub's metadata syntax says of composite actions
    "type": "object",
    "required": ["name", "description", "runs"],
    "additionalProperties": False,
    "properties": {
        "name": TEXT,
        "description": {**TEXT, "maxLength": 124},
        "branding": {"type": "object"},
        "inputs": {
            "type": "object",
            "propertyNames": {"pattern": "^[a-zA-Z_][a-zA-Z0-9_-]*$"},
            "additionalProperties": {
                "type": "object",
                "required": ["description", "default"],
                "additionalProperties": False,
                "properties": {"description": TEXT, "default": {"type": "string"}, "required": {"type": "boolean"}},
            },
        },
        "outputs": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["description", "value"],
                "properties": {"description": TEXT, "value": {"type": "string", "pattern": r"^\$\{\{ steps\..* \}\}$"}},
            },
        },
        "runs": {
            "type": "object",
            "required": ["using", "steps"],
            "properties": {"using": {"const": "composite"}, "steps": {"type": "array", "items": STEP}},
        },
    },
}


def test_the_action_is_what_github_takes() -> None:
    assert list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(ACTION)) == []


def test_every_script_stops_at_its_first_error_and_holds_nothing_that_others_typed() -> None:
    scripts = [step["run"] for step in STEPS.values() if "run" in step]
    assert len(scripts) == 5
    for script in scripts:
        assert script.startswith("set -euo pipefail\n")
        assert "${{" not in script, "text of a pull request would be run as a script; hand it over in env"


def test_every_input_is_used_and_every_used_one_is_declared() -> None:
    used = set(re.findall(r"inputs\.([a-z-]+)", json.dumps(ACTION["runs"])))
    assert used == set(ACTION["inputs"])


def test_every_output_is_written_by_its_step() -> None:
    for output in ACTION["outputs"].values():
        step, name = re.findall(r"steps\.(\w+)\.outputs\.(\w+)", output["value"])[0]
        script = next(s["run"] for s in STEPS.values() if s.get("id") == step)
        assert f"{name}=%s" in script


# ---------------------------------------------------------------- the steps, run


def run(name: str, folder: Path, env: dict[str, str], programs: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the script of one step as the runner does, with these programs found first."""
    bin_dir = folder / "bin"
    bin_dir.mkdir(exist_ok=True)
    for program, script in (programs or {}).items():
        (bin_dir / program).write_text(f"#!/bin/bash\n{script}\n")
        (bin_dir / program).chmod(0o755)
    (folder / "output").touch()
    told = dict.fromkeys(STEPS[name].get("env", {}), "") | env
    surroundings = {"PATH": f"{bin_dir}:{os.environ['PATH']}", "HOME": str(folder), "RUNNER_TEMP": str(folder)}
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", STEPS[name]["run"]],
        cwd=folder / "checkout" if (folder / "checkout").exists() else folder,
        env={**surroundings, "GITHUB_OUTPUT": str(folder / "output"), **told},
        capture_output=True,
        text=True,
    )


def outputs(folder: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in (folder / "output").read_text().splitlines())


GIT = ("git", "-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "init.defaultBranch=main", "-c", "protocol.file.allow=always")


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run([*GIT, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def merge(tmp_path: Path) -> dict[str, str]:
    """Return the commits of a pull request as actions/checkout leaves it: a checkout of depth 1 of the merge of `topic` into `main`."""
    origin = tmp_path / "origin"
    origin.mkdir()
    git(origin, "init", "--quiet")
    git(origin, "config", "uploadpack.allowAnySHA1InWant", "true")
    commits = {}
    for name in ("first", "main"):
        git(origin, "commit", "--quiet", "--allow-empty", "-m", name)
        commits[name] = git(origin, "rev-parse", "HEAD")
    git(origin, "checkout", "--quiet", "-b", "topic", commits["first"])
    git(origin, "commit", "--quiet", "--allow-empty", "-m", "topic")
    commits["topic"] = git(origin, "rev-parse", "HEAD")
    git(origin, "checkout", "--quiet", "-b", "merge", commits["main"])
    git(origin, "merge", "--quiet", "--no-ff", "-m", "merge", "topic")
    commits["merge"] = git(origin, "rev-parse", "HEAD")
    git(tmp_path, "clone", "--quiet", "--depth=1", "--branch=merge", f"file://{origin}", "checkout")
    return commits


@pytest.mark.parametrize(("extras", "wanted"), [("", "/action"), ("engine,load", "/action[engine,load]")])
def test_mlsys_is_installed_from_the_action_itself_with_its_pins(tmp_path: Path, extras: str, wanted: str) -> None:
    pip = tmp_path / "mlsys" / "bin" / "python"
    pip.parent.mkdir(parents=True)
    pip.write_text('#!/bin/bash\nprintf "%s\\0" "$@" > "$RUNNER_TEMP/arguments"\n')
    pip.chmod(0o755)
    done = run("Install mlsys", tmp_path, {"EXTRAS": extras, "GITHUB_ACTION_PATH": "/action"}, {"python": "exit 0"})
    assert done.returncode == 0, done.stderr
    told = (tmp_path / "arguments").read_text().split("\0")
    assert told[:3] == ["-m", "pip", "install"]
    assert told[-4:-1] == ["-c", "/action/constraints.txt", wanted]


FIND = "Find both commits"


def test_a_pull_request_is_compared_with_what_it_is_merged_into(merge: dict[str, str], tmp_path: Path) -> None:
    done = run(FIND, tmp_path, {"TARGET": merge["main"]})
    assert done.returncode == 0, done.stderr
    assert outputs(tmp_path) == {"base": merge["main"], "cand": merge["merge"]}


def test_a_push_is_compared_with_the_commit_before_though_the_checkout_is_shallow(merge: dict[str, str], tmp_path: Path) -> None:
    assert run(FIND, tmp_path, {}).returncode == 0
    assert outputs(tmp_path) == {"base": merge["main"], "cand": merge["merge"]}


def test_named_commits_and_branches_are_fetched(merge: dict[str, str], tmp_path: Path) -> None:
    assert run(FIND, tmp_path, {"BASE": "topic", "CAND": merge["first"]}).returncode == 0
    assert outputs(tmp_path) == {"base": merge["topic"], "cand": merge["first"]}


@pytest.mark.parametrize("name", ["nowhere", "--upload-pack=touch owned", "$(touch owned)", "a b; touch owned", "-h"])
def test_a_commit_nobody_knows_is_an_error_that_says_so_whatever_it_is_called(merge: dict[str, str], tmp_path: Path, name: str) -> None:
    done = run(FIND, tmp_path, {"BASE": name})
    assert done.returncode != 0
    assert f"cannot find the commit '{name}'" in done.stderr
    assert not list(tmp_path.rglob("owned"))
    assert merge["merge"]


GATE = "Measure and decide"
ENDS = """
printf '%s\\0' "$@" > "$RUNNER_TEMP/arguments"
while [ $# -gt 0 ]; do [ "$1" = -o ] && record=$2; shift; done
[ -z "$VERDICT" ] || echo "{\\"verdict\\": {\\"verdict\\": \\"$VERDICT\\"}}" > "$record"
exit "$STATUS"
"""


def gate(folder: Path, status: int, word: str, **env: str) -> list[str]:
    """Run the step on an mlsys that ends like this, and return what that was told."""
    place = folder / "mlsys" / "bin"
    place.mkdir(parents=True, exist_ok=True)
    (place / "mlsys").write_text("#!/bin/bash\n" + ENDS)
    (place / "mlsys").chmod(0o755)
    done = run(GATE, folder, {"BASE": "b" * 40, "CAND": "c" * 40, "LABEL": "mlsys gate", "STATUS": str(status), "VERDICT": word, **env})
    assert done.returncode == 0, done.stderr
    return (folder / "arguments").read_text().split("\0")[:-1]


@pytest.mark.parametrize(("status", "word"), [(0, "pass"), (1, "regression"), (3, "inconclusive"), (4, "not_comparable")])
def test_the_step_ends_well_whatever_the_verdict_and_hands_it_on(tmp_path: Path, status: int, word: str) -> None:
    gate(tmp_path, status, word)
    told = outputs(tmp_path)
    assert (told["status"], told["verdict"]) == (str(status), word)
    assert Path(told["record"]).is_file()


def test_nothing_measured_is_said_to_have_failed(tmp_path: Path) -> None:
    gate(tmp_path, 5, "")
    assert outputs(tmp_path)["verdict"] == "failed"
    assert outputs(tmp_path)["status"] == "5"


def test_inputs_arrive_as_single_arguments_and_empty_ones_not_at_all(tmp_path: Path) -> None:
    told = gate(
        tmp_path, 0, "pass", COMMAND="./bench 'a b' $(touch owned)", TOLERANCE="3%", EXTRA="--metric=loss=report\n\n--seed=7 \n", BENCH=""
    )  # fmt: skip
    assert told[:4] == ["gate", "run", "--base=" + "b" * 40, "--cand=" + "c" * 40]
    assert told[-4:] == ["--command=./bench 'a b' $(touch owned)", "--tolerance=3%", "--metric=loss=report", "--seed=7 "]
    assert not [argument for argument in told if argument.startswith(("--bench", "--budget", "--policy"))]
    assert not list(tmp_path.rglob("owned"))


def test_every_option_that_the_step_gives_is_one_of_gate_run() -> None:
    shown = subprocess.run([MLSYS, "gate", "run", "--help"], capture_output=True, text=True, check=True).stdout
    given = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*(?=[= )])", "\n".join(re.findall(r"arguments\+?=\((.*)\)", STEPS[GATE]["run"]))))
    assert {"--base", "--command", "--policy", "--junit", "-o"} <= given
    assert given <= set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", shown))


@pytest.mark.e2e
def test_the_step_gates_a_command_in_two_commits_and_leaves_record_report_and_summary(merge: dict[str, str], tmp_path: Path) -> None:
    """The command gives the same result in both, so that the verdict is known."""
    place = tmp_path / "mlsys" / "bin"
    place.mkdir(parents=True)
    (place / "mlsys").symlink_to(MLSYS)
    git(tmp_path / "checkout", "fetch", "--quiet", "--depth=1", "origin", merge["main"])
    env = {
        "BASE": merge["main"], "CAND": merge["merge"], "BUDGET": "60s", "LABEL": "same",
        "COMMAND": f"cp {ROOT}/tests/golden/gate_inputs/pytest_benchmark_base.json {{out}}",
        "EXTRA": "--no-instructions\n--read=pytest-benchmark", "GITHUB_STEP_SUMMARY": str(tmp_path / "s.md"),
    }  # fmt: skip
    done = run(GATE, tmp_path, env)
    assert done.returncode == 0, done.stderr
    told = outputs(tmp_path)
    found = json.loads(Path(told["record"]).read_text())
    assert (told["status"], told["verdict"], found["verdict"]["verdict"]) == ("0", "pass", "pass")
    assert (found["base"]["commit"], found["cand"]["commit"]) == (merge["main"], merge["merge"])
    assert {path.name for path in Path(told["folder"]).iterdir()} == {"gate.json", "gate.html", "junit.xml", "comment.md"}
    assert (tmp_path / "s.md").read_text().count("### ✅ same: passed") == 1


COMMENT = "Comment on the pull request"
GH = """
printf '%s ' "$@" >> "$HOME/calls"; echo >> "$HOME/calls"
case "$*" in *--paginate*) [ "$MARKER" = '<!-- mlsys-gate: kernels -->' ] && printf '%s' "$FOUND" ;; *) exit "${REFUSED:-0}" ;; esac
"""


def comment(folder: Path, **env: str) -> tuple[list[str], str]:
    """Run the step with a `gh` that finds these comments, and return its calls and what was printed."""
    file = folder / "comment.md"
    file.write_text("<!-- mlsys-gate: kernels -->\n### passed\n")
    told = {"COMMENTS": "repos/o/r/issues/7/comments", "ISSUES": "repos/o/r/issues/comments", "FILE": str(file), "FOUND": "", **env}
    done = run(COMMENT, folder, told, {"gh": GH})
    assert done.returncode == 0, done.stderr
    calls = folder / "calls"
    return calls.read_text().splitlines() if calls.exists() else [], done.stdout


def test_the_first_comment_is_new_and_later_ones_replace_it(tmp_path: Path) -> None:
    calls, _ = comment(tmp_path)
    assert calls[1].startswith("api --silent --method POST repos/o/r/issues/7/comments -F body=@")
    calls, _ = comment(tmp_path, FOUND="41\n42\n")
    assert calls[3].startswith("api --silent --method PATCH repos/o/r/issues/comments/41 -F body=@")


def test_a_token_that_may_not_comment_is_a_warning_and_not_a_failed_build(tmp_path: Path) -> None:
    _, printed = comment(tmp_path, REFUSED="1")
    assert printed.startswith("::warning title=mlsys gate::the comment could not be written")


def test_there_is_no_comment_when_nothing_was_measured(tmp_path: Path) -> None:
    calls, printed = comment(tmp_path, FILE=str(tmp_path / "absent.md"))
    assert calls == []
    assert "nothing was measured" in printed


@pytest.mark.parametrize(
    ("status", "inconclusive", "ends"),
    [(0, "pass", 0), (0, "fail", 0), (1, "pass", 1), (3, "pass", 0), (3, "fail", 3), (3, "Pass", 2), (4, "pass", 4), (5, "pass", 5)],
)
def test_the_job_fails_on_a_regression_and_on_what_could_not_be_measured(tmp_path: Path, status: int, inconclusive: str, ends: int) -> None:
    done = run("Pass or fail", tmp_path, {"STATUS": str(status), "VERDICT": "x", "INCONCLUSIVE": inconclusive})
    assert done.returncode == ends


# ---------------------------------------------------------------- this repository's own workflow


def test_this_repository_gates_its_pull_requests_with_read_rights_and_the_whole_history() -> None:
    on = WORKFLOW[True]  # YAML 1.1 reads `on` as a truth value
    assert set(on) == {"pull_request"}
    assert WORKFLOW["permissions"] == {"contents": "read"}
    (job,) = WORKFLOW["jobs"].values()
    checkout = next(step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@"))
    assert checkout["with"]["fetch-depth"] == 0
    scripts = "\n".join(step.get("run", "") for step in job["steps"])
    assert "nox -s gate" in scripts
    assert "${{" not in scripts
