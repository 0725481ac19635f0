"""Who computes matrices: the backend asked for, or the one that was measured to be faster here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mlsys_bench.engine import backend, choices, formats, kv, linear, quant
from mlsys_bench.engine.choices import FORMATS, ROWS, Timing
from mlsys_bench.engine.native import library
from tests.decoder_reference import CPU, kinds

has_kernels = pytest.mark.skipif(library.load() is None, reason=f"no C kernels: {library.why_not()}")


def timings(native_s: float, torch_s: float, name: str = "int8") -> tuple[Timing, ...]:
    return tuple(Timing(format=name, rows=rows, native_s=native_s, torch_s=torch_s) for rows in ROWS)


def chosen(*, deterministic: bool = False) -> str:
    """Return who computes an int8 Llama if nobody says who shall."""
    return backend.choose("auto", kinds()["llama"], precision="int8", device=CPU, kv=kv.KINDS["bf16"], deterministic=deterministic)


@has_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "w8a8", "int4g64", "w4a8g128"])
@pytest.mark.parametrize("name", ["native", "torch"])
def test_every_backend_computes_the_same_product(precision: str, name: str) -> None:
    """Up to what it rounds: bf16 activations (2^-9) in some kernels, int8 ones (1 %)."""
    draw = torch.Generator().manual_seed(1)
    kept = formats.quantise(torch.randn(96, 128, generator=draw), precision)
    x = torch.randn(5, 128, generator=draw)
    want = x.double() @ kept.dequantise().double().T
    pack = linear.packer(name, precision, CPU) or (lambda logical: quant.pack(logical, precision, CPU))
    got = pack(kept)(x)
    assert got.dtype == x.dtype
    assert float((got - want).norm() / want.norm()) < (0.02 if formats.precision(precision).int8_input else 0.005)


@has_kernels
def test_torch_computes_where_its_products_are_much_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the margin that a step in C is worth beside its products; a request that no batch may change is C's in any case."""
    for torch_s, backend_chosen in ((2.0, "native"), (1.0, "native"), (1.01 / choices.MARGIN, "native"), (0.99 / choices.MARGIN, "torch")):
        monkeypatch.setattr(linear, "timings", lambda torch_s=torch_s: timings(1.0, torch_s))
        assert chosen() == backend_chosen
        assert chosen(deterministic=True) == "native"


def test_every_precision_of_a_cpu_was_measured_under_some_name() -> None:
    names = ("fp32", "bf16", "int8", "w8a8", "int4", "int4g32", "int4g64", "w4a8", "w4a8g64")
    assert {linear.format_of(formats.precision(name)) for name in names} == set(FORMATS)


def test_the_mean_is_geometric() -> None:
    """Twice as slow once and thrice as fast once is faster; what nobody measured is torch's."""
    mixed = (Timing(format="int8", rows=1, native_s=2.0, torch_s=1.0), Timing(format="int8", rows=8, native_s=1.0, torch_s=3.0))
    assert choices.best(mixed, "int8") == "native"
    assert choices.best(mixed, "bf16") == "torch"


@has_kernels
def test_a_machine_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path))
    calls: list[int] = []

    def measure() -> tuple[Timing, ...]:
        calls.append(1)
        return timings(1.0, 3.0)

    assert choices.known(measure) == choices.known(measure) == timings(1.0, 3.0)
    assert calls == [1]
    assert choices.read(choices.file()) == timings(1.0, 3.0), "the next process reads it"
    assert [p.name for p in tmp_path.iterdir()] == [choices.file().name]


def test_a_file_that_is_broken_or_of_another_make_is_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "timings.json"
    assert choices.read(path) is None
    halved = '[{"format": "int8", "rows": 1, "native_s": "fast", "torch_s": 0}]'
    for text in ("{", '[{"format": "int8"}]', "[1]", "7", "[]", halved):
        path.write_text(text)
        assert choices.read(path) is None


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    choices.write(tmp_path / "file" / "timings.json", timings(1.0, 2.0))
    assert (tmp_path / "file").read_text() == ""


def test_the_line_names_the_winner_and_by_how_much() -> None:
    line = choices.told(timings(1.0, 2.0) + timings(3.0, 1.5, "bf16"))
    assert "int8 native 2.0/2.0/2.0/2.0x" in line
    assert "bf16 torch 2.0/2.0/2.0/2.0x" in line


@has_kernels
def test_measuring_covers_every_format_and_number_of_rows() -> None:
    threads = torch.get_num_threads()
    found = linear.measure()
    assert torch.get_num_threads() == threads, "one thread measures, and no other notices"
    assert [(t.format, t.rows) for t in found] == [(name, rows) for name in FORMATS for rows in ROWS]
    assert all(0.0 < t.native_s < 60.0 and 0.0 < t.torch_s < 60.0 for t in found)
