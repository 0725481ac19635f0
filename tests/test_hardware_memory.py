"""What this process may take of the machine's memory, and the caches before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlsys_bench.hardware import memory


def test_a_container_s_limit_counts(tmp_path: Path) -> None:
    """Of nested groups the one that leaves least, file pages that can be dropped not counted as used."""
    inner = tmp_path / "fs/pod/box"
    inner.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/pod/box\n")
    for group, limit, used, cached in ((inner, "8000", 5000, 1000), (inner.parent, "9000", 8000, 500), (tmp_path / "fs", "max", 1, 0)):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
    assert sorted(memory.group_limits(tmp_path / "cgroup", tmp_path / "fs")) == [(8000, 5000, 1000), (9000, 8000, 500)]


def test_an_older_system_s_limit_counts(tmp_path: Path) -> None:
    """Version 1 has a tree per controller, and a container often sees its own group as the root of it."""
    (tmp_path / "fs/memory").mkdir(parents=True)
    (tmp_path / "cgroup").write_text("5:cpu,cpuacct:/box\n4:memory:/box\n0::/\n")
    (tmp_path / "fs/memory/memory.limit_in_bytes").write_text("8000\n")
    (tmp_path / "fs/memory/memory.usage_in_bytes").write_text("3000\n")
    (tmp_path / "fs/memory/memory.stat").write_text("total_inactive_file 700\n")
    assert list(memory.group_limits(tmp_path / "cgroup", tmp_path / "fs")) == [(8000, 3000, 700)]
    assert list(memory.group_limits(tmp_path / "nothing", tmp_path / "fs")) == []


def test_of_the_machine_and_the_containers_around_the_least_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = tmp_path / "fs/box"
    box.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/box\n")
    (box / "memory.max").write_text("8192000\n")
    (box / "memory.current").write_text("3000000\n")
    (tmp_path / "meminfo").write_text("MemTotal:       24000 kB\nMemFree: 1 kB\nMemAvailable:   6000 kB\n")
    for name, path in (("_MEMINFO", "meminfo"), ("_OWN", "cgroup"), ("_CGROUPS", "fs")):
        monkeypatch.setattr(memory, name, tmp_path / path)
    assert (memory.total_bytes(), memory.available_bytes()) == (8_192_000, 5_192_000)
    (box / "memory.max").write_text("max\n")
    assert (memory.total_bytes(), memory.available_bytes()) == (24_576_000, 6_144_000)
    (tmp_path / "meminfo").unlink()
    assert (memory.total_bytes(), memory.available_bytes()) == (None, None)


def cache(cpu: Path, level: int, size: str, shared: str) -> None:
    """Describe a cache as Linux does."""
    index = cpu / "cache" / f"index{level}"
    index.mkdir(parents=True)
    for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
        (index / name).write_text(f"{text}\n")


def test_the_last_level_caches_of_the_cores_in_use_add_up(tmp_path: Path) -> None:
    """Of an EPYC's chiplets each has a cache of its own: threads on two of them have twice the room."""
    for cpu in range(6):
        cache(tmp_path / f"cpu{cpu}", 1, "32K", str(cpu))
        cache(tmp_path / f"cpu{cpu}", 2, "1M", str(cpu))
        cache(tmp_path / f"cpu{cpu}", 3, "32768K", "0-2" if cpu < 3 else "3-5")
    mib = 2**20
    assert memory.cache_bytes(frozenset({0}), tmp_path) == memory.cache_bytes(frozenset({0, 1, 2}), tmp_path) == 32 * mib
    assert memory.cache_bytes(frozenset({2, 3}), tmp_path) == memory.cache_bytes(frozenset(range(6)), tmp_path) == 64 * mib
    assert memory.cache_bytes(root=tmp_path / "nowhere") == memory.UNKNOWN_CACHE_BYTES


def test_inner_caches_alone_are_not_the_last(tmp_path: Path) -> None:
    """Some virtual machines tell of no other."""
    for cpu in range(100):
        cache(tmp_path / f"cpu{cpu}", 2, "1M", str(cpu))
    assert memory.cache_bytes(frozenset({0, 1}), tmp_path) == memory.UNKNOWN_CACHE_BYTES
    assert memory.cache_bytes(frozenset(range(100)), tmp_path) == 100 * 2**20
