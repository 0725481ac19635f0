"""`mlsys bench quality`: what is measured, what is kept, and what a person reads."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from mlsys_bench import hardware, readings, record
from mlsys_bench.bench import quality
from mlsys_bench.bench.quality import Options
from mlsys_bench.engine import train
from mlsys_bench.errors import BadInput, MeasurementFailed, UnknownName
from mlsys_bench.report import qualities
from mlsys_bench.types import Bench, Launch, Measurement, Round
from mlsys_cli import main


def loss(precision: str, values: tuple[float, ...], *, quantizer: str = "rtn", kv: str = "auto", steps: int = 1) -> Measurement:
    return Measurement(
        name="quality.loss", unit="bit/byte", better="lower", launches=(Launch(started_s=0.0, rounds=(Round(values=values),)),),
        parameters={"model": "byte-llama", "precision": precision, "quantizer": quantizer, "kv": kv, "steps": steps, "corpus": "c"},
    )  # fmt: skip


train_once = train.Recipe(steps=1, batch=1)


def told(what: str) -> object:
    return lambda done, of: None


def test_every_4_bit_precision_is_measured_with_every_quantizer_and_fp32_first() -> None:
    found = quality.ways_of(Options(precisions=("int8", "int4", "fp32", "w4a8g32"), quantizers=("rtn", "gptq"), kvs=("int8", "auto")))
    assert [(w.precision, w.quantizer, w.kv) for w in found] == [
        ("fp32", "rtn", "auto"), ("int8", "rtn", "auto"), ("int4g128", "rtn", "auto"), ("int4g128", "gptq", "auto"),
        ("w4a8g32", "rtn", "auto"), ("w4a8g32", "gptq", "auto"), ("fp32", "rtn", "int8"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error"),
    [(Options(precisions=("int5",)), UnknownName), (Options(quantizers=("awq",)), UnknownName), (Options(windows=1), BadInput),
     (Options(steps=0), BadInput)],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_training(
    options: Options, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "trained", lambda steps, told: pytest.fail("trained first"))
    with pytest.raises(error):
        quality.run(options, told)  # type: ignore[arg-type]


def test_stopped_while_training_nothing_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(steps: int | None, told: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quality, "trained", interrupt)
    with pytest.raises(MeasurementFailed, match="nothing was kept"):
        quality.run(Options(), told)  # type: ignore[arg-type]


def test_stopped_while_measuring_what_there_is_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path))
    done = [Launch(started_s=0.0, rounds=(Round(values=(1.0, 2.0)),))]

    def launch(*_: object) -> Launch:
        if not done:
            raise KeyboardInterrupt
        return done.pop()

    small = dataclasses.replace(train.byte_shape(), layers=1, hidden=64, heads=2, kv_heads=1, ffn=128)
    monkeypatch.setattr(train, "byte_shape", lambda: small)
    monkeypatch.setattr(train, "Recipe", lambda: train_once)
    monkeypatch.setattr(quality, "_launch", launch)
    found = quality.run(Options(precisions=("int8", "w8a8"), kvs=()), told)  # type: ignore[arg-type]
    assert [(m.skipped, len(m.launches)) for m in found.measurements] == [(None, 1), ("interrupted", 0), ("interrupted", 0)]
    assert quality.known() == {}, "half a comparison is not shown beside speeds"


def test_the_difference_is_taken_window_by_window() -> None:
    """Windows differ by whole bits, the precisions by 0.01 in each: the interval is that of the differences, +0.0100 with none."""
    table = qualities.table([loss("fp32", (1.0, 2.0, 6.0)), loss("int4g32", (1.01, 2.01, 6.01))])
    assert table.rows[0][5].text == "—"
    assert (table.rows[1][4].text, table.rows[1][5].text, table.rows[1][5].sub) == ("3.0100", "+0.0100", "+0.0100 .. +0.0100")
    assert table.rows[1][3].text == "0.56"


def test_losses_of_other_windows_or_another_model_are_not_compared() -> None:
    table = qualities.table([loss("fp32", (1.0, 2.0)), loss("int8", (1.0, 2.0, 3.0)), loss("int8", (1.0, 2.0), steps=2)])
    assert [row[5].text for row in table.rows] == ["—", "—", "—"]


def test_speeds_stand_beside_what_their_precision_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path))
    assert quality.known() == {}
    kept = Bench(measurements=(loss("fp32", (1.0, 2.0)), loss("int4g128", (1.02, 2.04)), loss("int4g128", (9.0, 9.0), quantizer="gptq")))
    record.write(tmp_path / "byte-llama-losses.json", kept, hardware.machine())
    assert quality.known() == {"fp32": 0.0, "int4g128": pytest.approx(0.03)}
    step = Measurement(
        name="engine.step", unit="s", better="lower", launches=(Launch(started_s=0.0, rounds=(Round(values=(0.1, 0.1)),)),),
        parameters={"model": "none", "precision": "int4", "decode_seqs": 1, "decode_kv_tokens": 9, "prefill_tokens": 0, "prefill_pairs": 0},
    )  # fmt: skip
    rows = readings.table(Bench(measurements=(step,)), losses=quality.known())
    assert [row.costs for row in rows] == ["+0.0300 bit/byte on the byte model"]


def test_a_broken_file_of_costs_is_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read when benchmarks have run for minutes, whose result must not be lost by it."""
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path))
    for text in ("{", "[]", '{"kind": "plan"}'):
        (tmp_path / "byte-llama-losses.json").write_text(text)
        assert quality.known() == {}
    record.write(tmp_path / "byte-llama-losses.json", Bench(measurements=(loss("int8", (1.0, 2.0)),)), hardware.machine())
    assert quality.known() == {}, "without fp32 there is nothing to compare with"


@pytest.mark.parametrize(
    ("options", "precisions", "is_kept"),
    [
        (Options(), ("fp32", "int8", "bf16"), True),
        (Options(precisions=("int8",)), ("fp32", "int8"), False),
        (Options(windows=2), ("fp32", "int8", "bf16"), False),
        (Options(backend="torch"), ("fp32", "int8", "bf16"), False),
        (Options(steps=3), ("fp32", "int8", "bf16"), False),
    ],
)
def test_only_a_whole_comparison_is_shown_beside_speeds_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Options, precisions: tuple[str, ...], is_kept: bool
) -> None:
    """Not one of two windows, which is noise, nor one that would make others' costs be forgotten."""
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path))
    before = Bench(measurements=(loss("fp32", (1.0, 2.0)), loss("bf16", (1.0, 2.0))))
    record.write(tmp_path / "byte-llama-losses.json", before, hardware.machine())
    after = tuple(loss(name, (1.0, 3.0)) for name in precisions)
    monkeypatch.setattr(quality, "trained", lambda steps, told: None)
    monkeypatch.setattr(quality, "_measured", lambda model, ways, options, told: after)
    quality.run(options, told)  # type: ignore[arg-type]
    assert ("int8" in quality.known()) is is_kept
    assert "bf16" in quality.known()


def test_it_is_in_the_list() -> None:
    assert "quality.loss" in {entry.name for entry in readings.CATALOGUE}


def test_the_command_trains_measures_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path))
    small = dataclasses.replace(train.byte_shape(), layers=1, hidden=64, heads=2, kv_heads=1, ffn=128)
    monkeypatch.setattr(train, "byte_shape", lambda: small)
    monkeypatch.setattr("mlsys_bench.engine.quality.CALIBRATION", 1)
    out = tmp_path / "quality.json"
    asked = ["bench", "quality", "--steps", "1", "--windows", "2", "--precision", "int8,int4g128", "--threads", "1", "-o", str(out)]
    monkeypatch.setattr(sys, "argv", ["mlsys", *asked])
    with pytest.raises(SystemExit) as end:
        main.run()
    assert not end.value.code
    assert "Loss of the byte model" in capsys.readouterr().out
    kept = record.read(out, Bench)
    assert [m.parameters["quantizer"] for m in kept.measurements] == ["rtn", "rtn", "rtn", "gptq", "rtn"]
    assert all(len(m.launches[0].rounds[0].values) == 2 for m in kept.measurements)
    assert json.loads(out.read_text())["kind"]
    assert quality.known() == {}, "a model of one step says nothing about speeds' cost"
