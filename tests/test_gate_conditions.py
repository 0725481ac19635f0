"""What surrounded a launch of the gate, and whether it disturbed it."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mlsys_bench.hardware import proc
from mlsys_bench.journeys.gating import conditions, gpus
from mlsys_bench.loadtest.serverside.page import MissedError
from mlsys_bench.verdicts import Conditions, Contention

STAT = "cpu  100 5 50 800 20 3 2 20 40 0\ncpu0 100 5 50 800 20 3 2 20 40 0\nintr 7\n"


# ---------------------------------------------------------------- CPU time of the machine


def test_the_machines_time_is_the_sum_of_eight_columns_and_guests_are_in_the_first(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(STAT)
    assert proc.times(tmp_path) == proc.Times(total=1000, idle=820, steal=20)


@pytest.mark.parametrize("text", ["", "cpu  1 2 3\n", "cpu  0 0 0 0 0 0 0 0 0 0\n", "nothing here\n"])
def test_a_kernel_that_does_not_tell_gives_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "stat").write_text(text)
    assert proc.times(tmp_path) is None
    assert proc.times(tmp_path / "nowhere") is None


def test_shares_by_hand() -> None:
    """Of 200 ticks 100 were idle, 4 stolen, 80 ours: 16 are others'."""
    before, after = proc.Times(1000, 820, 20), proc.Times(1200, 920, 24)
    assert proc.shares(before, after, ours_ticks=80) == proc.Shares(steal=0.02, other=0.08)
    assert proc.shares(before, after, ours_ticks=99).other == 0.0  # ticks are coarse: never below none
    assert proc.shares(before, before, ours_ticks=0) == proc.Shares(None, None)
    assert proc.shares(None, after, ours_ticks=0) == proc.Shares(None, None)


def test_processes_are_found_with_all_they_started(tmp_path: Path) -> None:
    """Names may hold spaces and brackets; 10 ticks of user, 20 of system, 3 and 4 of waited children."""
    for pid, parent in ((10, 1), (11, 10), (12, 11), (20, 1)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a) b (c) S {parent} 1 1 0 -1 0 0 0 0 0 10 20 3 4 20 0 1 0 99")
    (tmp_path / "30").mkdir()  # it has just ended
    every = proc.processes(tmp_path)
    assert every[12] == proc.Process(parent=11, ticks=37)
    assert proc.below([10], every) == {10, 11, 12}
    assert proc.below([30], every) == set()


def test_who_listens_is_known_by_port() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        assert os.getpid() not in proc.listeners(port)
        sock.listen()
        assert os.getpid() in proc.listeners(port)


def test_a_watch_tells_what_a_process_did_meanwhile() -> None:
    """Whatever the neighbours do, what this process used is no one else's."""
    watch = conditions.begin([os.getpid()])
    used_s = proc.ours_s()
    while proc.ours_s() < used_s + 0.1:
        sum(range(10_000))
    seen = conditions.end(watch, pair=3, side="cand", started_s=1.0, wall_s=0.5, pids=[os.getpid()])
    again = conditions.end(watch, pair=3, side="base", started_s=1.0, wall_s=0.5)
    assert (seen.pair, seen.side, again.side) == (3, "cand", "base")
    assert seen.cpu_s is not None
    assert seen.cpu_s >= 0.1 - 2 / proc.ticks_per_s()
    assert again.cpu_s is None  # nobody said which processes it has
    assert (seen.steal_share, seen.other_cpu_share) == (again.steal_share, again.other_cpu_share)
    assert seen.other_cpu_share is not None
    assert 0 <= seen.other_cpu_share <= 1
    assert seen.involuntary is not None
    assert seen.gpu is None or "sm_clock_mhz" in seen.gpu


# ---------------------------------------------------------------- was it disturbed?


def launch(wall_s: float = 3.0, **known: Any) -> Conditions:
    still = Conditions(pair=1, side="base", started_s=0.0, wall_s=wall_s, steal_share=0.0, other_cpu_share=0.0)
    return dataclasses.replace(still, **known)


def said(*launches: Conditions) -> Contention:
    return conditions.contention(launches)


def test_a_quiet_machine_is_quiet() -> None:
    assert said(*[launch(steal_share=0.009, other_cpu_share=0.049, involuntary=149)] * 10) == Contention(verdict="quiet")


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({"steal_share": 0.011}, "the hypervisor took"),
        ({"other_cpu_share": 0.051}, "other processes used"),
        ({"involuntary": 151, "other_cpu_share": 0.02}, "forced it off its CPU up to 50 times a second, in 10 of 10 launches"),
        ({"gpu": {"throttle": "power cap, hardware thermal slowdown"}}, "a GPU was slowed (hardware thermal slowdown) in 10 of 10"),
    ],
)
def test_each_figure_has_its_threshold(known: Mapping[str, Any], reason: str) -> None:
    found = said(*[launch(**known)] * 10)
    assert found.verdict == "contended"
    assert reason in found.reasons[0]


def test_threads_of_one_program_that_force_each_other_off_are_its_own_doing() -> None:
    assert said(*[launch(involuntary=30_000)] * 10).verdict == "quiet"


def test_a_fifth_of_the_launches_is_enough_and_one_in_ten_is_not() -> None:
    """The mean of one launch with 8 % and nine without is 0.8 %, of two 1.6 %: both below 5 %."""
    still, loud = launch(), launch(other_cpu_share=0.08)
    assert said(*[still] * 9, loud).verdict == "quiet"
    found = said(*[still] * 8, loud, loud)
    assert found.verdict == "contended"
    assert "other processes used 1.6 % of the CPU time, up to 8.0 % in 2 of 10 launches" in found.reasons[0]


def test_short_launches_count_together() -> None:
    """A tick is a coarse measure of 50 ms; of a hundred such launches it is a good one."""
    short = launch(wall_s=0.05, other_cpu_share=0.1)
    assert said(*[short] * 5).verdict == "unknown"
    assert said(*[short] * 100).verdict == "contended"


def test_a_power_cap_is_the_programs_own_doing() -> None:
    assert said(launch(gpu={"throttle": "power cap", "sm_clock_mhz": 1500.0})).verdict == "quiet"


def test_clocks_that_differ_between_the_sides_are_told() -> None:
    base = launch(gpu={"sm_clock_mhz": 1980.0})
    assert said(base, launch(side="cand", gpu={"sm_clock_mhz": 1970.0})).verdict == "quiet"
    assert "1980 MHz for the baseline and at 1900" in said(base, launch(side="cand", gpu={"sm_clock_mhz": 1900.0})).reasons[0]


def test_where_nothing_is_told_nothing_is_claimed() -> None:
    mute = launch(steal_share=None, other_cpu_share=None)
    assert said(mute) == Contention(verdict="unknown", reasons=("this machine does not say who used its CPUs (no /proc/stat)",))
    assert said().verdict == "unknown"


# ---------------------------------------------------------------- GPUs


def look(card: str, **values: float) -> dict[tuple[str, str], float]:
    return {(f"nvml_{name}", card): value for name, value in values.items()}


def test_cards_that_worked_are_summed_by_hand() -> None:
    """Medians of the looks in which a card worked: 1.9 and 1.7 GHz, the slower counts; watts add up, the hottest counts; one slept."""
    first = look('gpu="0"', utilisation=0.9, sm_clock=1.8e9, power=600, temperature=60, throttle=0x4)
    second = look('gpu="0"', utilisation=1.0, sm_clock=2.0e9, power=620, temperature=64, throttle=0x0)
    idle = look('gpu="0"', utilisation=0.0, sm_clock=0.3e9, power=100, temperature=40, throttle=0x1)
    other = look('gpu="1"', utilisation=0.5, sm_clock=1.7e9, power=300, temperature=80, throttle=0x20)
    asleep = look('gpu="2"', utilisation=0.0, sm_clock=0.2e9, power=70, temperature=30, throttle=0x1)
    assert gpus.summed([first | other | asleep, second, idle]) == {
        "cards": 2, "sm_clock_mhz": 1700.0, "power_w": 910.0, "temperature_c": 80.0, "throttle": "power cap, software thermal slowdown",
    }  # fmt: skip


def test_no_looks_are_no_state_and_no_masks_no_reasons() -> None:
    assert gpus.summed([]) is None
    assert gpus.throttles([]) is None
    assert gpus.throttles([0x1, 0x0]) == ""


class Told:
    """Cards that answer so often, and then no more."""

    def __init__(self, answers: int) -> None:
        self.left, self.is_released = answers, False

    def look(self, timeout_s: float) -> gpus.Look:
        """Answer, or say that there is nothing."""
        del timeout_s
        self.left -= 1
        if self.left < 0:
            raise MissedError("there is no NVIDIA driver")
        return look('gpu="0"', utilisation=1.0, sm_clock=1.5e9)

    def release(self) -> None:
        """Remember it."""
        self.is_released = True


def test_a_sampler_looks_until_it_is_stopped_and_says_when_there_is_nothing() -> None:
    cards = Told(1_000_000)
    sampler = gpus.Sampler(cards)
    assert sampler.stop() == sampler.stop() == {"cards": 1, "sm_clock_mhz": 1500.0}
    assert cards.is_released
    none = gpus.Sampler(Told(0))
    assert none.stop() is None
    assert none.missing == "there is no NVIDIA driver"
