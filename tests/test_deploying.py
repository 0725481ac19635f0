"""`mlsys plan --export`, `--from-deployment` and `--diff`, as the command runs them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mlsys_bench import record
from mlsys_bench.errors import BadInput, RecordError
from mlsys_bench.journeys import deploying
from mlsys_bench.types import Plan
from mlsys_cli.main import app
from tests import sample_records

ASK = ["plan", "--qps", "20", "--model", "llama-3-8b", "--gpu", "H100", "--precision", "bf16", "--max-batch", "64"]


def test_a_plan_is_exported_compared_with_today_and_with_another(tmp_path: Path) -> None:
    """Twice the traffic is the whole difference of the two records; the manifest runs the plan's own command."""
    old, new, run = tmp_path / "old.json", tmp_path / "new.json", CliRunner()
    exports = ["--export", f"k8s:{tmp_path}", "--export", f"openslo:{tmp_path}"]
    first = run.invoke(app, [*ASK, "-o", str(old), *exports, "--from-deployment", "vllm serve llama-3-8b -tp 2 --foo"])
    assert first.exit_code == 0, first.output
    for kind in ("k8s", "openslo"):
        assert f"wrote {tmp_path / f'llama-3-8b-{kind}.yaml'}" in first.output
        assert (tmp_path / f"llama-3-8b-{kind}.yaml").is_file()
    assert "tensor parallel: 2 -> 1 (--tensor-parallel-size)" in first.output
    assert "sequences at once: 1,024 -> 64 (--max-num-seqs)" in first.output
    assert "--foo is not known here" in first.output
    deployment = next(yaml.safe_load_all((tmp_path / "llama-3-8b-k8s.yaml").read_text()))
    plan = record.read(old, Plan)
    assert deployment["spec"]["replicas"] == plan.replicas
    busier = dataclasses.replace(plan, workload=dataclasses.replace(plan.workload, rate_per_s=200.0), replicas=plan.replicas + 9)
    record.write(new, busier, sample_records.machine())
    second = run.invoke(app, ["plan", "--diff", str(old), str(new), "--json"])
    assert second.exit_code == 0, second.output
    found = json.loads(second.output)
    assert found["steps"][0]["cause"] == "traffic"
    assert found["steps"][0]["changes"] == ["rate: 20.0/s -> 200/s"]
    assert sum(step["replicas"] for step in found["steps"]) == 9


def test_a_step_without_a_plan_leaves_the_two_ends_and_says_why() -> None:
    """A limit that no replica on the old GPU keeps: the records alone are compared."""
    plan = sample_records.plan()
    found = deploying.compared(plan, dataclasses.replace(plan, slo="tpot_p99<1ms", replicas=12))
    assert found.method.startswith("from the two records")
    assert "because a step between them has no plan" in found.method
    assert [step.replicas for step in found.steps] == [4, 0]


@pytest.mark.parametrize("odd", [{"replicas": 0}, {"replicas": -3}, {"fleet": ()}, {"usd_per_hour": -5.0}])
def test_a_record_of_a_fleet_that_cannot_be_is_compared_with_nothing(tmp_path: Path, odd: dict[str, Any]) -> None:
    plan = sample_records.plan()
    for name, value in (("good.json", plan), ("odd.json", dataclasses.replace(plan, **odd))):
        record.write(tmp_path / name, value, sample_records.machine())
    with pytest.raises(BadInput, match=r"odd.json: .*; a p.*; make the plan again"):
        deploying.explained((tmp_path / "good.json", tmp_path / "odd.json"))


def test_a_manifest_asked_for_twice_is_refused_before_anything_is_planned() -> None:
    with pytest.raises(BadInput, match="--export k8s:a is given 2 times"):
        deploying.check(None, ["k8s:a", "keda:a", "k8s:a"], None)
    with pytest.raises(BadInput, match="unknown export 'k9s'"):
        deploying.check(None, ["k8s:a", "k9s"], None)


def test_a_folder_that_cannot_be_is_refused_before_anything_is_planned(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"--export k8s:.*file: .*file is no folder"):
        deploying.check(None, [f"k8s:{tmp_path}/file"], None)
    with pytest.raises(BadInput, match=r"--export k8s:.*file/below cannot be made: Not a directory; name another folder"):
        deploying.check(None, [f"k8s:{tmp_path}/file/below"], None)


@pytest.mark.parametrize("option", ["--out", "--html", "--md"])
@pytest.mark.parametrize(
    "command", [["plan", "--qps", "1", "--model", "no-such-model"], ["cost", "no-such.json"], ["verify", "no-such.json"]]
)
def test_a_file_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, command: list[str], option: str) -> None:
    """That the model or the plan is not there, too, would be said next."""
    (tmp_path / "file").write_text("")
    found = CliRunner().invoke(app, [*command, option, str(tmp_path / "file" / "below")])
    assert isinstance(found.exception, RecordError)
    assert "cannot be written" in str(found.exception)


def test_what_is_no_plan_of_one_model_is_refused() -> None:
    with pytest.raises(BadInput, match="one model"):
        deploying.told(sample_records.traffic(), ["k8s"], None)
    with pytest.raises(BadInput, match="one model"):
        deploying.told(sample_records.traffic(), [], "vllm serve m")
