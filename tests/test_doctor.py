"""What `mlsys doctor` says of a machine: which of the microbenchmarks' readings there are, and why others are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlsys_bench import hardware
from mlsys_bench.bench import telemetry
from mlsys_bench.hardware.devices import Nvml, Rapl
from mlsys_bench.journeys import doctor
from mlsys_bench.journeys.gating import perf


def test_one_line_says_what_the_microbenchmarks_reach_and_which_suite_to_begin_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "Rapl", lambda: Rapl(root=tmp_path / "none"))
    monkeypatch.setattr(doctor, "Nvml", lambda: Nvml(drivers=(tmp_path / "none",)))
    monkeypatch.setattr(telemetry, "cpu_times", lambda root: None)
    monkeypatch.setattr(perf, "missing", lambda: None)
    found = doctor._bench()
    here, lacking = found.detail.split("; not here ")
    assert here.startswith("memory, products, operators, engine steps")
    assert "perf" in here
    assert "GPU (NVML): there is no NVIDIA driver" in lacking
    assert "energy (RAPL): " in lacking
    assert "stolen time: /proc/stat cannot be read" in lacking
    assert found.works
    assert "--suite quick" in (found.cure or "")
    assert "\n" not in found.detail


def test_one_core_has_no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cpu_layout", lambda: 1)
    assert "links between processes (gloo): there is one core" in doctor._bench().detail
