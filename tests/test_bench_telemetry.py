"""What a machine tells while it measures, the verdict *contended*, and machines that tell less."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlsys_bench import bench
from mlsys_bench.bench import telemetry
from mlsys_bench.hardware import proc
from mlsys_bench.hardware.devices import MissedError, Nvml, Rapl
from mlsys_bench.types import Bench

STAT = "cpu  {user} 0 0 {idle} 0 10 10 {steal} 0 0\ncpu0 {user} 0 0 {idle} 0 10 10 {steal} 0 0\ncpu1 0 0 0 900 0 0 0 0 0 0\nintr 7\n"


def stat(root: Path, *, user: int, idle: int, steal: int = 0) -> Path:
    (root / "stat").write_text(STAT.format(user=user, idle=idle, steal=steal))
    return root


class Cards(Nvml):
    """A card that answers as written here."""

    def __init__(self, *answers: dict[str, float]) -> None:
        """Keep the answers, the last for ever."""
        super().__init__()
        self._answers = list(answers)

    def look(self, timeout_s: float) -> dict[tuple[str, str], float]:
        """Return the next answer."""
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return {(f"nvml_{name}", 'gpu="0"'): value for name, value in answer.items()}


def nobody(tmp_path: Path) -> dict[str, Any]:
    """Return devices that are not there."""
    return {"cpufreq": tmp_path / "none", "cards": Nvml([tmp_path / "none"]), "energy": Rapl(tmp_path / "none")}


# ---------------------------------------------------------------- reading /proc/stat


def test_times_are_read_by_core_and_interrupts_count_as_idle(tmp_path: Path) -> None:
    """Nobody's process ran in them, and the kernel charges them to none."""
    times = telemetry.cpu_times(stat(tmp_path, user=100, idle=800, steal=5))
    assert times is not None
    assert times.machine == proc.Times(total=925, idle=820, steal=5)
    assert set(times.cores) == {0, 1}
    assert telemetry.cpu_times(tmp_path / "nowhere") is None


def test_stolen_ticks_of_the_measuring_core_disturb_a_visit(tmp_path: Path) -> None:
    watch = telemetry.Disturbances((0,), root=stat(tmp_path, user=1, idle=1, steal=5))
    before = watch.look()
    assert not watch.since(before).slowed
    stat(tmp_path, user=1, idle=1, steal=6)
    assert watch.since(before).slowed
    assert not telemetry.Disturbances((1,), root=tmp_path).since(telemetry.Before(0, 0)).slowed  # that was another core


def test_a_throttled_card_disturbs_a_visit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    watch = telemetry.Disturbances((), cuda=True, root=tmp_path)
    monkeypatch.setattr(Nvml, "throttled", lambda self: True)
    assert watch.since(watch.look()).slowed


def test_without_a_driver_or_proc_a_visit_is_taken_as_undisturbed(tmp_path: Path) -> None:
    watch = telemetry.Disturbances((0,), cuda=True, root=tmp_path / "nowhere")
    watch._cards = Nvml([tmp_path / "nowhere"])
    assert not watch.since(watch.look()).slowed


# ---------------------------------------------------------------- the thread of the parent


def test_a_launch_is_told_with_its_totals(tmp_path: Path) -> None:
    cards = Cards(
        {"sm_clock": 1.98e9, "power": 300.0, "energy": 1000.0, "utilisation": 1.0, "throttle": 0x0},
        {"sm_clock": 1.41e9, "power": 700.0, "energy": 1500.0, "utilisation": 1.0, "throttle": 0x40},
    )
    meter = telemetry.Telemeter(root=stat(tmp_path, user=100, idle=800), **(nobody(tmp_path) | {"cards": cards}))
    meter.start()
    stat(tmp_path, user=150, idle=840, steal=10)
    seen = meter.stop((0,), involuntary=3)
    assert seen.telemetry.series["sm_clock_hz"][0] == 1.98e9
    assert seen.telemetry.series["power_w"][-1] == 700.0
    assert seen.telemetry.totals["energy_j"] == 500.0
    assert seen.telemetry.totals["throttled_s"] > 0
    assert seen.telemetry.totals["steal_share"] == pytest.approx(10 / 100)
    assert seen.telemetry.totals["involuntary"] == 3.0
    assert len(seen.telemetry.at_s) == len(seen.telemetry.series["power_w"])


def test_a_machine_that_tells_nothing_says_what_and_why(tmp_path: Path) -> None:
    """No /proc/stat, no cpufreq, no driver, no powercap: the measurement goes on and each is named."""
    meter = telemetry.Telemeter(root=tmp_path / "nowhere", **nobody(tmp_path))
    meter.start()
    seen = meter.stop(())
    text = "\n".join(seen.unread)
    for what in ("/proc/stat cannot be read", "clock", "there is no NVIDIA driver", "is not there"):
        assert what in text
    assert seen.contended == ()
    assert "steal_share" not in seen.telemetry.totals


# ---------------------------------------------------------------- the verdict


@pytest.mark.parametrize(
    ("totals", "said"),
    [
        ({"steal_share": 0.02}, "the hypervisor took 2"),
        ({"other_on_cores_share": 0.5, "other_cpu_share": 0.25}, "of the measuring cores' time"),
        ({"other_on_cores_share": 0.0, "other_cpu_share": 0.25}, "of this machine's CPU time"),
        ({"involuntary": 5000.0, "other_cpu_share": 0.02}, "forced it off its CPU 500 times a second"),
        ({"throttled_s": 1.5}, "slowed by heat"),
    ],
)
def test_what_disturbs_is_said_in_words(totals: dict[str, float], said: str) -> None:
    (line,) = telemetry.contended(totals, wall_s=10.0)
    assert said in line


@pytest.mark.parametrize(
    ("totals", "wall_s"),
    [
        ({}, 10.0),
        ({"steal_share": 0.005, "other_on_cores_share": 0.03, "other_cpu_share": 0.03, "involuntary": 100.0, "throttled_s": 0.0}, 10.0),
        ({"involuntary": 5000.0, "other_cpu_share": 0.0}, 10.0),  # its own threads, for nobody else was there
        ({"other_cpu_share": 1.0}, 0.1),  # too short to tell
    ],
)
def test_a_quiet_machine_is_not_called_contended(totals: dict[str, float], wall_s: float) -> None:
    assert list(telemetry.contended(totals, wall_s)) == []


# ---------------------------------------------------------------- the clock


def test_the_clock_is_that_of_cpufreq_else_of_cpuinfo(tmp_path: Path) -> None:
    (tmp_path / "cpu0" / "cpufreq").mkdir(parents=True)
    (tmp_path / "cpu0" / "cpufreq" / "scaling_cur_freq").write_text("3400000\n")
    (tmp_path / "cpuinfo").write_text("processor : 0\ncpu MHz\t\t: 2596.130\n")
    assert telemetry.clock_hz(tmp_path, tmp_path) == 3.4e9
    assert telemetry.clock_hz(tmp_path, tmp_path / "none") == pytest.approx(2.59613e9)
    assert telemetry.clock_hz(tmp_path / "none", tmp_path / "none") is None


def test_a_card_without_an_answer_is_missed(tmp_path: Path) -> None:
    with pytest.raises(MissedError, match="no NVIDIA driver"):
        Nvml([tmp_path / "none"]).throttled()


# ---------------------------------------------------------------- whole runs on lesser machines

SMALL = bench.Options(device="cpu", only=("op.norm",), rounds=1, budget_s=60.0, max_batch=2, max_context=128, kv_tokens=512)


@pytest.mark.e2e
def test_a_run_carries_telemetry_and_says_what_it_could_not_read() -> None:
    found = bench.run(SMALL)
    assert len(found.telemetry) == 1
    assert found.telemetry[0].totals["wall_s"] > 0
    assert [m.error is not None and m.error <= (m.tolerance or 0) for m in found.measurements if m.launches] != []
    assert all(m.work is not None for m in found.measurements)


@pytest.mark.e2e
def test_without_a_compiler_the_portable_kernels_are_measured_and_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = bench.run(SMALL)
    assert any("C kernels" in text for text in found.unread)
    assert all(m.launches for m in found.measurements)


ONE_CORE = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from mlsys_bench import bench, hardware, record
options = bench.Options(device="cpu", only=("op.norm",), rounds=1, budget_s=60.0, max_batch=2, max_context=128, kv_tokens=512)
sys.stdout.write(record.dumps(bench.run(options), hardware.machine()))
"""


@pytest.mark.e2e
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not keep a process to one core")
def test_on_one_core_it_works_and_says_that_steps_have_no_neighbour() -> None:
    from mlsys_bench import record

    done = subprocess.run([sys.executable, "-c", ONE_CORE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    _, found = record.loads(done.stdout, "bench.json")
    assert isinstance(found, Bench)
    assert any("neighbour" in text for text in found.unread)
    assert all(m.launches for m in found.measurements)


@pytest.mark.e2e
def test_a_neighbour_on_the_measuring_core_is_called_contention() -> None:
    """Planted by another process than the one that measures: what that starts is its own."""
    core = min(os.sched_getaffinity(0))
    busy = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    measure = (
        "import sys\nfrom mlsys_bench import bench\n"
        "found = bench.run(bench.Options(device='cpu', only=('op.norm',), rounds=1, budget_s=60.0))\n"
        "sys.stdout.write('; '.join(found.contended))"
    )
    with subprocess.Popen([sys.executable, "-c", busy, str(core)]) as planted:
        try:
            done = subprocess.run([sys.executable, "-c", measure], capture_output=True, text=True, timeout=120)
        finally:
            planted.kill()
    assert done.returncode == 0, done.stderr
    assert "other processes used" in done.stdout
