"""Devices: found by every name that drivers and people use, in SI units; the machine: readable without rights, never raising."""

from __future__ import annotations

import builtins
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import hardware, record
from mlsys_bench.errors import BadInput, UnknownName
from mlsys_bench.hardware import probe
from mlsys_bench.types import Lengths, Workload

LENGTHS = Lengths(mean=128)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("H100", "H100-SXM"),
        ("h100_sxm", "H100-SXM"),
        ("h100-sxm", "H100-SXM"),
        ("H100 SXM5", "H100-SXM"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("A100", "A100-80GB-SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB-SXM"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB-SXM"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("L4", "L4"),
        ("NVIDIA L4", "L4"),
        ("l40s", "L40S"),
        ("NVIDIA H200", "H200-SXM"),
        ("B200", "B200-SXM"),
        ("RTX 4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-32GB", "V100-32GB-SXM2"),
        ("v100", "V100-16GB-SXM2"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Instinct MI300X-NPS1-SPX-192GB-750W", "MI300X"),
        ("mi355x", "MI355X"),
        ("b300_sxm", "B300-SXM"),
        ("gb300", "GB300-per-GPU"),
        ("NVIDIA H100-NVL-94GB", "H100-NVL"),
        ("NVIDIA H100-PCIe-80GB", "H100-PCIe"),
        ("NVIDIA H200-SXM-141GB-CTS", "H200-SXM"),
        ("NVIDIA GH200 Grace Hopper Superchip 144GB", "GH200-144GB"),
        ("cpu", "cpu-2core"),
        ("CPU-2core", "cpu-2core"),
    ],
)
def test_a_device_is_found_by_any_of_its_names(name: str, device: str) -> None:
    assert hardware.find(name).id == device


def test_no_name_means_two_devices() -> None:
    for device in hardware.every():
        for name in hardware.aliases(device):
            assert hardware.find(name) == device, name


@given(st.sampled_from(hardware.every()), st.data())
def test_case_and_separators_do_not_matter(device: hardware.Device, data: st.DataObject) -> None:
    spelled = "".join(
        data.draw(st.sampled_from([c.lower(), c.upper()])) if c != "-" else data.draw(st.sampled_from("-_ ")) for c in device.id
    )
    assert hardware.find(spelled) == device


@pytest.mark.parametrize("name", ["", "h101", "nvidia", "gtx 9999"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(UnknownName, match="unknown GPU or CPU"):
        hardware.find(name)


def test_the_catalogue_is_in_si_units() -> None:
    """H100 SXM by its data sheet: 80 GB, 3.35 TB/s, 989 TFLOP/s dense bf16, 1,979 in fp8, NVLink 900 GB/s both ways, 700 W."""
    h100 = hardware.find("h100")
    assert (h100.memory_bytes, h100.bandwidth_bytes_per_s, h100.tdp_w) == (80e9, 3350e9, 700)
    assert h100.flops_per_s == {"fp32": 67e12, "fp16": 989e12, "bf16": 989e12, "fp8": 1979e12, "int8": 1979e12}
    assert h100.interconnect_bytes_per_s == 450e9
    assert hardware.find("l4").interconnect_bytes_per_s == 0


def test_memory_is_what_the_driver_reports_where_somebody_read_it() -> None:
    """81,559 MiB on an H100 and 46,068 on an L40S: the data sheet's 80 and 48 GB are neither decimal nor what is there."""
    assert hardware.find("h100").driver_bytes == 81_559 * 2**20
    assert hardware.find("l40s").driver_bytes == 46_068 * 2**20
    assert all(0.9 * d.memory_bytes <= d.driver_bytes <= 1.08 * d.memory_bytes for d in hardware.every())
    assert hardware.find("jetson agx orin").driver_bytes == 64e9


def test_links_join_a_board_or_a_rack() -> None:
    assert {name: hardware.find(name).link_devices for name in ("h100", "gb200", "a40", "l40s")} == {
        "h100": 8,
        "gb200": 72,
        "a40": 2,
        "l40s": 1,
    }
    assert all((d.link_devices > 1) <= (d.interconnect_bytes_per_s > 0) for d in hardware.every())


def test_the_cpu_row_is_what_was_measured() -> None:
    cpu = hardware.find("cpu")
    assert (cpu.kind, cpu.memory_bytes, cpu.tdp_w) == ("cpu", 8e9, None)
    assert cpu.bandwidth_bytes_per_s == pytest.approx(32.1e9)
    assert cpu.flops_per_s == pytest.approx({"fp32": 337e9, "bf16": 2167e9, "int8": 4450e9})


def test_rows_nobody_checked_say_so() -> None:
    doubtful = {d.id for d in hardware.every() if not d.verified}
    of_old = {"A10G", "RTX-A6000", "RTX-4090", "GH200-96GB", "cpu-2core"}
    assert doubtful == of_old | {"H100-NVL", "GH200-144GB", "Jetson-AGX-Orin-64GB"}
    assert all(d.source and d.date for d in hardware.every())


def test_old_cards_have_no_bf16() -> None:
    for name in ("T4", "V100"):
        device = hardware.find(name)
        assert not hardware.supports(device, "bf16")
        assert hardware.supports(device, "fp16")
        with pytest.raises(BadInput, match=r"does not compute in bf16; it has fp32, fp16"):
            hardware.compute_flops_per_s(device, "bf16")


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("h100", "int4", 989),
        ("h100", "int8", 989),
        ("h100", "int4g64", 989),
        ("h100", "w8a8", 1979),
        ("h100", "w4a8", 1979),
        ("h100", "fp8", 1979),
        ("h100", "fp32", 67),
        ("h100", "fp4", 989),
        ("b200", "fp4", 9000),
        ("a100", "fp8", 312),
        ("t4", "int8", 65),
        ("cpu", "int8", 2.167),
        ("cpu", "fp32", 0.337),
    ],
)
def test_weights_are_computed_with_at_the_rate_of_their_format(name: str, precision: str, tera: float) -> None:
    """Weight-only int8 and int4 are widened to 16 bit; fp8 without fp8 cores as well.  With int8 activations products are int8."""
    assert hardware.compute_flops_per_s(hardware.find(name), precision) == pytest.approx(tera * 1e12)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(BadInput, match="unknown precision 'bf61'; did you mean bf16"):
        hardware.supports(hardware.find("l4"), "bf61")


# ---------------------------------------------------------------- this machine


def test_the_machine_can_stand_in_a_record() -> None:
    machine = hardware.machine()
    assert set(machine.hard).isdisjoint(machine.soft)
    text = record.dumps(Workload(rate_per_s=1.0, arrivals="poisson", prompt_tokens=LENGTHS, output_tokens=LENGTHS), machine)
    assert record.loads(text, "here")[0].machine == machine


def test_hard_fields_are_the_same_when_asked_again() -> None:
    assert hardware.machine().hard == hardware.machine().hard


def test_nothing_that_changes_between_boots_or_names_the_machine_is_hard() -> None:
    import socket

    said = hardware.machine()
    assert not {"mhz", "bogomips", "hostname", "uptime"} & {key.lower() for key in (*said.hard, *said.soft)}
    assert socket.gethostname() not in map(str, (*said.hard.values(), *said.soft.values()))


def test_a_machine_that_shows_nothing_has_none_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(self: Path, *_: Any, **__: Any) -> str:
        raise PermissionError(13, "no", str(self))

    monkeypatch.setattr(Path, "read_text", unreadable)
    said = hardware.machine()
    for key in ("cpu_vendor", "cpu_model", "cpu_stepping", "isa", "isa_digest", "cpu_quota", "memory_gb_class"):
        assert said.hard[key] is None, key
    assert said.soft["steal_ticks"] is None
    assert said.hard["cores"] == hardware.cpu_layout() >= 1


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"/sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"/sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"/sys/fs/cgroup/cpu.max": ""}, None),
        ({}, None),
    ],
)
def test_a_cgroup_quota_is_read_in_cores(monkeypatch: pytest.MonkeyPatch, files: dict[str, str], quota: float | None) -> None:
    monkeypatch.setattr(probe, "_read", files.get)
    assert hardware.machine().hard["cpu_quota"] == quota


def test_only_flags_that_kernels_dispatch_on_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = (
        "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu MHz\t: 2500\nflags\t: fpu amx_tile avx2 avx512_bf16 rdtscp fma\n\nprocessor\t: 1\n"
    )
    monkeypatch.setattr(probe, "_read", {"/proc/cpuinfo": cpuinfo, "/proc/meminfo": "MemTotal:       16303036 kB\n"}.get)
    said = hardware.machine().hard
    assert said["isa"] == "amx_tile avx2 avx512_bf16 fma"
    assert said["memory_gb_class"] == 16


def test_without_nvml_there_is_one_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pynvml":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    assert hardware.nvml_gpus() == "no NVIDIA GPU: nvidia-ml-py is not installed"
    assert hardware.machine().hard["gpu_count"] == 0


class NVML(types.ModuleType):
    """A driver with one H100 that knows no ECC and no MIG."""

    class NVMLError(Exception):
        """What the real module raises."""

    def __init__(self, starts: bool = True) -> None:
        super().__init__("pynvml")
        self.starts, self.stopped = starts, False

    def nvmlInit(self) -> None:  # noqa: N802
        """Start, or say why not."""
        if not self.starts:
            raise self.NVMLError("NVML Shared Library Not Found")

    def nvmlShutdown(self) -> None:  # noqa: N802
        """Remember that it was called."""
        self.stopped = True

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlDeviceGetCount": lambda: 1,
            "nvmlSystemGetDriverVersion": lambda: b"570.1",
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda _: "NVIDIA H100 80GB HBM3",
            "nvmlDeviceGetMemoryInfo": lambda _: types.SimpleNamespace(total=85899345920),
            "nvmlDeviceGetPowerManagementLimit": lambda _: 700_000,
        }
        return answers.get(name, self._refuse)

    def _refuse(self, *_: Any) -> Any:
        raise self.NVMLError("Not Supported")


def test_a_gpu_is_described_as_far_as_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = NVML()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert hardware.nvml_gpus() == (
        {
            "index": 0,
            "name": "NVIDIA H100 80GB HBM3",
            "driver": "570.1",
            "memory_bytes": 85899345920,
            "power_limit_w": 700.0,
            "ecc": None,
            "mig": None,
        },
    )
    assert nvml.stopped
    said = hardware.machine().hard
    assert (said["gpu"], said["gpu_count"], said["gpu_driver"]) == ("NVIDIA H100 80GB HBM3", 1, "570.1")
    assert hardware.find(str(said["gpu"])).id == "H100-SXM"


def test_a_driver_that_does_not_start_is_one_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", NVML(starts=False))
    assert hardware.nvml_gpus() == "no NVIDIA GPU: NVML Shared Library Not Found"
