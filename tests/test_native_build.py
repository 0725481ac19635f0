"""Compiling the kernels: once, by whoever comes first, and never a reason to fail."""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlsys_bench.engine.native import build, library
from mlsys_bench.errors import BadInput

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a library of one function in place of the kernels, with a cache of its own."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "answer.c").write_text("int answer(void) { return 42; }\n")
    monkeypatch.setattr(build, "SOURCE", folder)
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLSYS_NATIVE", raising=False)
    return folder


@needs_compiler
def test_whoever_comes_at_the_same_time_gets_the_same_whole_library(source: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = {future.result().path for future in [pool.submit(build.built) for _ in range(8)]}
    (path,) = found
    assert path is not None
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing half-made is left"


@needs_compiler
def test_it_is_compiled_once_and_again_when_the_source_changes(source: Path) -> None:
    first = build.built().path
    assert first is not None
    stamp = first.stat().st_mtime_ns
    assert build.built().path == first
    assert first.stat().st_mtime_ns == stamp
    (source / "answer.h").write_text("/* more */\n")
    assert build.built().path != first


@needs_compiler
def test_source_that_does_not_compile_is_told_in_one_line(source: Path) -> None:
    (source / "answer.c").write_text("int answer(void) { return nothing; }\n")
    found = build.built()
    assert found.path is None
    assert "error" in found.detail
    assert "\n" not in found.detail


@needs_compiler
def test_a_toolchain_older_than_amx_does_without_tiles(source: Path) -> None:
    (source / "answer.c").write_text("#ifndef MLSYS_OLD_ASSEMBLER\n#error unknown instruction\n#endif\n")
    assert build.built().path is not None


@needs_compiler
def test_a_cache_that_cannot_be_written_names_the_way_out(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLSYS_CACHE", str(source / "answer.c" / "cache"))
    found = build.built()
    assert found.path is None
    assert "MLSYS_CACHE" in found.detail


def test_without_a_compiler_there_is_a_reason_and_no_kernels(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(source))
    monkeypatch.delenv("CC", raising=False)
    assert build.built() == build.Built(path=None, detail="no C compiler (cc, gcc or clang) on PATH")
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    assert library.load() is None
    with pytest.raises(BadInput, match=r"no C compiler.*--backend torch"):
        library.need()


def test_the_kernels_can_be_turned_off(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLSYS_NATIVE", "0")
    assert build.built() == build.Built(path=None, detail="turned off by MLSYS_NATIVE=0")


@needs_compiler
@pytest.mark.parametrize("kept", [0, 60, 500, -1])
def test_a_library_that_was_cut_off_is_compiled_again(source: Path, kept: int) -> None:
    """By a crash or a full disk: to read it would end the process, or leave it without kernels for good."""
    path = build.built().path
    assert path is not None
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    assert build.built().path == path
    assert path.read_bytes() == whole


@needs_compiler
def test_a_library_that_the_system_does_not_load_is_done_without(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a volume that may not hold programs; here it is one of another processor."""
    path = build.built().path
    assert path is not None
    if path.read_bytes()[:4] != b"\x7fELF":
        pytest.skip("libraries here have another form")
    path.write_bytes(path.read_bytes()[:18] + b"\xff" + path.read_bytes()[19:])
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    assert library.load() is None
    assert "MLSYS_CACHE" in library.why_not()


@pytest.mark.parametrize("content", ["no program\n", "#!/where/there/is/nothing\n"])
def test_a_compiler_that_cannot_be_run_is_told_in_one_line(source: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    compiler = source / "compiler"
    compiler.write_text(content)
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    found = build.built()
    assert found.path is None
    assert found.detail.startswith(f"{compiler} cannot be run: ")


def test_a_user_without_a_home_is_told_where_kernels_may_go(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLSYS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # whom no system knows
    with pytest.raises(BadInput, match="set MLSYS_CACHE"):
        build.cache_folder()
    if build.find_compiler() is not None:
        assert "MLSYS_CACHE" in build.built().detail


@needs_compiler
def test_an_unknown_processor_falls_back_to_the_compiler_s_own_choice(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert "-march=native" not in build.flags()
    assert build.built().path is not None
