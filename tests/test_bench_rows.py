"""The reading of a bench record: rates, ceilings, what binds, files, the gate and the fit without flagged samples."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import gate, hardware, readings, record, samples
from mlsys_bench.errors import RecordError
from mlsys_bench.readings import Roofs, Row, roofs
from mlsys_bench.record import Envelope
from mlsys_bench.types import Bench, Launch, Machine, Measurement, Round, Scalar, Telemetry, Work
from tests import sample_benches as sample

EPYC = Machine(hard={"cpu_name": "AMD EPYC 9R14"}, soft={})


def one(name: str, value: float, unit: str = "s", work: Work | None = None, **parameters: Scalar) -> Measurement:
    return Measurement(
        name=name, unit=unit, better="lower" if unit == "s" else "higher", parameters={"device": "cpu", **parameters}, work=work,
        launches=(Launch(started_s=0.0, rounds=(Round(values=(value,) * 9),)),),
    )  # fmt: skip


def features(batch: float, kv_tokens: float) -> dict[str, Scalar]:
    return {"decode_seqs": batch, "decode_kv_tokens": kv_tokens, "prefill_tokens": 0.0, "prefill_pairs": 0.0, "sampled_tokens": batch}


CEILINGS = (
    one("memory.read", 20e9, "B/s"), one("gemm", 100e9, "FLOP/s", precision="fp32"), one("gemm", 400e9, "FLOP/s", precision="int8"),
)  # fmt: skip


def row_of(m: Measurement, *more: Measurement) -> Row:
    return next(row for row in readings.table(Bench(measurements=(*CEILINGS, *more, m))) if row.name == m.name)


# ---------------------------------------------------------------- one row


def test_a_rate_is_work_over_time_and_its_share_that_of_the_nearer_roof() -> None:
    """16 MB in 1 ms are 16 GB/s of 20; 8 MFLOP in it are 8 GFLOP/s of 100: memory binds, at 80 %."""
    row = row_of(one("op.linear", 1e-3, "s", Work(bytes=16e6, flops=8e6), precision="fp32", layer="qkv", m=1))
    assert (row.bytes_per_s, row.flops_per_s) == (pytest.approx(16e9), pytest.approx(8e9))
    assert (row.bound, row.roof, row.share) == ("memory", "memory", pytest.approx(0.8))
    assert row.intensity == pytest.approx(0.5)


@pytest.mark.parametrize(("unit", "value"), [("s", 1e-3), ("B/s", 16e9), ("FLOP/s", 8e9)])
def test_the_unit_it_was_measured_in_does_not_matter(unit: str, value: float) -> None:
    row = row_of(one("op.linear", value, unit, Work(bytes=16e6, flops=8e6), precision="fp32"))
    assert (row.seconds, row.bytes_per_s, row.flops_per_s) == (pytest.approx(1e-3), pytest.approx(16e9), pytest.approx(8e9))


@pytest.mark.parametrize(
    ("seconds", "flops", "bound"),
    [(1e-3, 90e6, "compute"), (3e-3, 90e6, "latency"), (0.5e-3, 0.0, "cache")],
    ids=["90 GFLOP/s of 100", "30 GFLOP/s and 5 GB/s", "32 GB/s where memory gives 20"],
)
def test_what_binds_is_the_nearer_roof_or_neither_or_a_cache(seconds: float, flops: float, bound: str) -> None:
    assert row_of(one("op.linear", seconds, "s", Work(bytes=16e6, flops=flops), precision="fp32")).bound == bound


def test_a_cpu_may_compute_quantized_weights_in_any_format_and_fp32_only_in_fp32() -> None:
    own = readings.measured(Bench(measurements=CEILINGS), "cpu")
    assert {p: own.peak(p) for p in ("fp32", "bf16", "int8", "int4g32", "w8a8")} == {
        "fp32": 100e9, "bf16": 100e9, "int8": 400e9, "int4g32": 400e9, "w8a8": 400e9,
    }  # fmt: skip


def test_a_gpu_computes_in_the_formats_it_has_units_for() -> None:
    """Weight-only formats are widened to 16 bit, w8a8 multiplies integers: as the catalogue has it."""
    sheet = readings.datasheet("H200")
    assert sheet is not None
    for precision in ("fp32", "bf16", "int8", "int4g128", "w8a8", "w4a8g32", "fp8"):
        assert sheet.peak(precision) == hardware.compute_flops_per_s(hardware.find("H200"), precision), precision


def test_an_unknown_processor_has_no_data_sheet() -> None:
    assert readings.datasheet("cpu", EPYC) is None
    assert readings.datasheet("cpu") is None
    assert all(row.of_sheet is None for row in readings.table(sample.record(), EPYC))


def test_a_gpu_stands_beside_its_data_sheet() -> None:
    read = dataclasses.replace(one("memory.read", 4.32e12, "B/s"), parameters={"device": "H200"})
    (row,) = readings.table(Bench(measurements=(read,)))
    assert row.of_sheet == pytest.approx(4.32e12 / hardware.find("H200").bandwidth_bytes_per_s)


@given(st.floats(1e-6, 1.0), st.floats(1.0, 1e9), st.floats(1.0, 1e12))
def test_nothing_is_nearer_to_a_roof_than_the_roofline_allows(seconds: float, moved: float, flops: float) -> None:
    """Two ways: the share by rates is the least time physics allows over the time taken."""
    own = Roofs(bytes_per_s=20e9, flops_per_s={"fp32": 100e9})
    found = roofs.standing(own, "fp32", moved / seconds, flops / seconds)
    assert found is not None
    assert found.share == pytest.approx(max(moved / 20e9, flops / 100e9) / seconds)


def test_copies_launches_and_collectives_are_not_held_against_memory() -> None:
    for name in ("copy.h2d", "collective.all_reduce", "engine.load", "pool.handoff"):
        assert row_of(one(name, 5e9, "B/s", Work(bytes=1e6))).bound is None


def test_flagged_samples_are_counted_and_left_out_of_the_median() -> None:
    rounds = (Round(values=(1.0, 1.0, 9.0), flagged=(False, False, True)), Round(values=(1.0, 9.0, 9.0), flagged=(False, True, True)))
    m = dataclasses.replace(one("op.norm", 1.0), launches=(Launch(started_s=0.0, rounds=rounds),))
    row = row_of(m)
    assert (row.median, row.samples, row.flagged) == (1.0, 3, 3)


def test_energy_is_said_per_token_where_power_was_read() -> None:
    """50 W for 10 ms on a step of 4 sequences: 0.125 J a token, 8 tokens a joule."""
    m = one("engine.step", 0.01, model="nano", precision="fp32", **features(4, 40))
    told = Telemetry(at_s=(0.0, 1.0, 2.0), series={"power_w": (50.0, None, 50.0)})
    (row,) = readings.table(Bench(measurements=(m,), telemetry=(told,)))
    assert (row.tokens_per_s, row.joules_per_token, row.tokens_per_s_per_w) == (
        pytest.approx(400.0), pytest.approx(0.125), pytest.approx(8.0),
    )  # fmt: skip
    assert readings.table(Bench(measurements=(m,)))[0].joules_per_token is None


def test_rows_come_in_the_order_of_the_list_and_from_small_to_large() -> None:
    rows = readings.table(dataclasses.replace(sample.record(), measurements=sample.record().measurements[::-1]))
    names = [entry.name for entry in readings.CATALOGUE]
    assert [names.index(row.name) for row in rows] == sorted(names.index(row.name) for row in rows)
    linears = [row.what for row in rows if row.name == "op.linear"]
    assert linears[:4] == ["qkv, int8, m 1", "qkv, int8, m 16", "qkv, int8, m 512", "out, int8, m 1"]


# ---------------------------------------------------------------- files


def test_parquet_keeps_every_sample_and_all_that_stands_beside_them(tmp_path: Path) -> None:
    bench = dataclasses.replace(sample.record(contended=("a neighbour",), watts=40.0))
    path = record.write(tmp_path / "bench.parquet", bench, EPYC)
    head, back = record.load(path)
    assert back == bench
    assert (head.kind, head.machine) == ("bench", EPYC)


def test_parquet_is_a_row_a_sample_with_name_and_parameters(tmp_path: Path) -> None:
    """So that a data frame needs no join."""
    import pyarrow.parquet as pq

    bench = sample.record()
    rows = pq.read_table(record.write(tmp_path / "bench.parquet", bench, EPYC)).to_pylist()
    assert len(rows) == sum(map(samples.count, bench.measurements))
    assert sum(row["flagged"] is True for row in rows) == sum(map(samples.flagged, bench.measurements))
    assert json.loads(rows[0]["parameters"]) == bench.measurements[0].parameters


def test_parquet_without_its_samples_is_refused(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = record.write(tmp_path / "bench.parquet", sample.record(), EPYC)
    pq.write_table(pq.read_table(path).drop_columns(["value"]), path)
    with pytest.raises(RecordError, match="do not fit"):
        record.load(path)


def test_csv_has_a_row_a_measurement_with_parameters_as_columns(tmp_path: Path) -> None:
    rows = readings.table(sample.record())
    with readings.write_csv(tmp_path / "bench.csv", rows).open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    linear = next(line for line in read if line["name"] == "op.linear")
    assert (linear["layer"], linear["m"], linear["flagged"], linear["bound"]) == ("qkv", "1", "1", "memory")
    assert float(linear["low"]) <= float(linear["median"]) <= float(linear["high"])
    assert float(linear["share_of_ceiling"]) == pytest.approx(0.8, abs=0.01)
    assert next(line for line in read if line["name"] == "device.launch")["skipped"].startswith("no GPU")


# ---------------------------------------------------------------- the gate and the fit


def head() -> Envelope:
    return record.envelope(sample.record(), EPYC)


def with_flagged(value: float, spoilt: float) -> Bench:
    """Eight launches of samples around a value, and in each as many flagged ones far off."""
    rounds = [Round(values=(value * (1 + i / 1e4), spoilt) * 12, flagged=(False, True) * 12) for i in range(8)]
    launches = tuple(Launch(started_s=float(i), rounds=(r,)) for i, r in enumerate(rounds))
    return Bench(measurements=(dataclasses.replace(one("op.norm", 1.0), launches=launches),))


def test_the_gate_does_not_see_flagged_samples() -> None:
    """Both sides are alike where they were left alone; what disturbed one of them is no regression."""
    verdict = gate.compare((head(), with_flagged(1e-3, 1e-3)), (head(), with_flagged(1e-3, 9e-3)))
    assert verdict.verdict == "pass"
    assert verdict.findings[0].ratio == pytest.approx(1.0)
    slower = gate.compare((head(), with_flagged(1e-3, 1e-3)), (head(), with_flagged(1.2e-3, 1e-3)))
    assert slower.verdict == "regression"


def test_work_error_and_end_do_not_make_another_metric_of_it() -> None:
    base = with_flagged(1e-3, 1e-3)
    cand = Bench(
        measurements=tuple(dataclasses.replace(m, work=Work(bytes=1.0), error=0.1, ended="settled") for m in base.measurements),
        contended=("a neighbour",),
    )
    assert gate.compare((head(), base), (head(), cand)).verdict == "pass"


def test_unflagged_keeps_the_samples_that_count() -> None:
    bench = sample.record()
    left = samples.unflagged(bench)
    for before, after in zip(bench.measurements, left.measurements, strict=True):
        assert samples.count(after) == len(samples.kept(before))
        assert samples.kept(after).tolist() == samples.kept(before).tolist()
    all_flagged = Round(values=(1.0, 2.0), flagged=(True, True))
    spoilt = dataclasses.replace(one("x", 1.0), launches=(Launch(started_s=0.0, rounds=(all_flagged,)),))
    assert samples.unflagged(Bench(measurements=(spoilt,))).measurements == (spoilt,)


def test_a_fit_leaves_flagged_steps_out() -> None:
    from mlsys_bench.latency import calibrate

    rounds = (Round(values=(1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0), flagged=(False,) * 3 + (True,) * 4),)
    step = dataclasses.replace(one("engine.step", 1.0, **features(1, 9)), launches=(Launch(started_s=0.0, rounds=rounds),))
    (cell,) = calibrate.cells([step])
    assert cell.median_s == 1.0
