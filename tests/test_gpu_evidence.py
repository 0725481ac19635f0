"""The command that collects a GPU's evidence: parts once each, as far as time goes, and what came of them kept."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FILE = Path(__file__).resolve().parents[1] / "proofs" / "gpu_evidence.py"


@pytest.fixture(scope="module")
def evidence() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_evidence", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["gpu_evidence"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.e2e
def test_parts_are_done_once_and_a_late_one_is_ended(evidence: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One holds, one does not, one is too long to be started; the second time only that one is left, and ended at its limit."""
    count = "print('counted'); print('x', end='', file=open(r'{out}/count', 'a'))"
    good = evidence.Part("good", "", (["-c", count],), 1)
    bad = evidence.Part("bad", "", (["-c", "raise SystemExit(3)"],), 1)
    long = evidence.Part("long", "", (["-c", "import time; print('began', flush=True); time.sleep(60)"],), 100)
    assert evidence.run_all((good, bad, long), tmp_path, 50.0, again=False) == 1
    monkeypatch.setattr(evidence, "LIMIT_S", 2.0)
    assert evidence.run_all((good, bad, long), tmp_path, 500.0, again=False) == 2
    kept = json.loads((tmp_path / "parts.json").read_text())
    assert {name: what["status"] for name, what in kept.items()} == {"good": 0, "bad": 3, "long": 124}
    assert (tmp_path / "count").read_text() == "x"
    assert (tmp_path / "good.log").read_text() == "counted\n"
    assert (tmp_path / "long.log").read_text() == "began\n"


def test_all_of_it_fits_a_lease_of_half_an_hour_in_commands_of_ten_minutes(evidence: ModuleType) -> None:
    assert sum(part.expected_s for part in evidence.chosen(None)) <= 30 * 60
    assert max(part.expected_s for part in evidence.PARTS) < evidence.LIMIT_S < 600


def test_an_unknown_part_is_named(evidence: ModuleType) -> None:
    with pytest.raises(SystemExit, match="'speed': there are machine, right"):
        evidence.chosen("speed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so(evidence: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_evidence.py"])
    assert evidence.main() == 0
    assert "no CUDA device" in capsys.readouterr().out
