"""`mlsys fit` as a journey: which kind of file becomes which kind of profile, and the rows shown beside it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsys_bench import hardware, latency, models, record, summary
from mlsys_bench.errors import BadInput, RecordError
from mlsys_bench.journeys import fitting
from mlsys_bench.predict import beside
from mlsys_bench.predict.readers import Design
from mlsys_bench.report import content
from mlsys_bench.types import Bench, Launch, Measurement, Provenance, RequestRecord, Requests, Round, Scalar, Validity

H100 = Design(model="llama-3-8b", device="H100")


def users_test(folder: Path, users: int, service_s: float, target: str = "http://x (embedder)") -> Path:
    """Write a load test of so many users whose every answer takes that long, and the requests beside it."""
    rng = np.random.default_rng(users)
    rows = tuple(
        RequestRecord(index=i, scheduled_s=float(i), sent_s=float(i), token_s=(i + taken,), tokens_per_event=(1,), done_s=i + taken,
                      prompt_tokens=8, output_tokens=1)
        for i, taken in enumerate((service_s * rng.gamma(100, 0.01, 80)).tolist())
    )  # fmt: skip
    path = folder / f"users{users}.json"
    test = summary.summarise(
        rows, source="loadtest", target=target, arrivals=f"closed loop, {users} users", offered_rate_per_s=None, slo=None,
        validity=Validity(verdict="valid"), window=None, requests_file=f"users{users}.parquet",
    )  # fmt: skip
    record.write(path.with_suffix(".parquet"), Requests(t0_unix_s=0.0, requests=rows), hardware.machine())
    return record.write(path, test, hardware.machine())


def vllm(rate: float) -> dict[str, Any]:
    """Return a `vllm bench serve` result with numbers made up here."""
    return {
        "model_id": "meta-llama/Meta-Llama-3-8B", "backend": "vllm", "num_prompts": 100, "request_rate": rate, "burstiness": 1.0,
        "max_concurrency": None, "duration": 100 / rate + 1, "completed": 100, "failed": 0, "total_input_tokens": 50_000,
        "total_output_tokens": 10_100, "mean_ttft_ms": 40.0, "median_ttft_ms": 38.0, "mean_tpot_ms": 9.0 + rate / 10, "median_tpot_ms": 9.0,
    }  # fmt: skip


def stage_bench(folder: Path) -> Path:
    def cell(batch: int) -> Measurement:
        parameters: dict[str, Scalar] = {"stage": "ranking", "batch": batch}
        values = tuple((2e-3 + 1e-4 * batch) * (1 + 0.01 * k) for k in (-1, 0, 1))
        launch = Launch(started_s=0.0, rounds=(Round(values=values),))
        return Measurement(name="ranking.score", unit="s", better="lower", parameters=parameters, launches=(launch,))

    return record.write(folder / "stage.json", Bench(measurements=tuple(cell(n) for n in (1, 8, 64))), hardware.machine())


def test_results_of_another_tool_become_a_step_profile(tmp_path: Path) -> None:
    """With the shipped coefficients as prior; each figure stands beside what the profile says of it, and the fit draws nearer to it."""
    path = tmp_path / "vllm.json"
    path.write_text("\n".join(json.dumps(vllm(rate)) for rate in (2.0, 8.0)))
    found = fitting.fit([path], Design(device="H100"))
    layout = found.profile.layout
    assert (layout.model, layout.device, layout.precision, layout.tp) == ("llama-3-8b", "H100-SXM", "bf16", 1)
    assert found.profile.provenance is Provenance.CALIBRATED
    assert "learned from 2 load levels" in (found.profile.note or "")
    tpot = [c for c in found.checks if c.key.endswith("tpot_mean_s")]
    assert [c.measured for c in tpot] == pytest.approx([0.0092, 0.0098])
    assert all(c.error_percent is not None and abs(c.error_percent) < 15 for c in tpot)
    latency.check(found.profile)


def test_a_model_that_is_published_in_fewer_bits_was_served_so_where_nobody_says_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "vllm.json"
    path.write_text(json.dumps(vllm(2.0) | {"model_id": "openai/gpt-oss-20b"}))
    told = [fitting.fit([path], Design(device="H100", precision=p)).profile.layout.precision for p in (None, "bf16")]
    assert told == ["fp4", "bf16"]


def test_measurements_near_one_load_are_said_to_leave_others_open(tmp_path: Path) -> None:
    notes = []
    for rates in ((2.0,), (2.0, 3.0), (2.0, 8.0)):
        path = tmp_path / "vllm.json"
        path.write_text("\n".join(json.dumps(vllm(rate)) for rate in rates))
        notes.append("all near one load" in (fitting.fit([path], Design(device="H100")).profile.note or ""))
    assert notes == [True, True, False]


def test_times_beyond_what_such_hardware_takes_are_questioned(tmp_path: Path) -> None:
    path = tmp_path / "vllm.json"
    path.write_text(json.dumps(vllm(2.0) | {"mean_tpot_ms": 9200.0, "median_tpot_ms": 9200.0, "mean_ttft_ms": 40_000.0}))
    assert "times off what other engines take" in (fitting.fit([path], Design(device="H100")).profile.note or "")


def test_requests_sent_all_at_once_are_no_open_loop_at_rate_zero(tmp_path: Path) -> None:
    """100 at once at 30 ms a token, with a cap of as many or without one: one profile, not that of a lone request of 30 ms a token."""
    found = []
    for cap in (None, 100):
        path = tmp_path / f"cap{cap}.json"
        at_once = {"request_rate": "inf", "max_concurrency": cap, "duration": 6.0, "mean_ttft_ms": 2000.0, "mean_tpot_ms": 30.0}
        path.write_text(json.dumps(vllm(1.0) | at_once))
        found.append(fitting.fit([path], Design(device="H100")).profile)
    assert found[0].coefficients == pytest.approx(found[1].coefficients)
    assert latency.step_s(found[0], (1, 500, 0, 0, 1)) < 0.020


def test_load_tests_of_rising_users_become_a_slowdown(tmp_path: Path) -> None:
    paths = [users_test(tmp_path, users, 0.02 * max(1.0, users / 4)) for users in (1, 2, 4, 8, 16)]
    profile = fitting.fit(paths, stage="embedder").profile
    assert (profile.form, profile.stage) == ("service", "embedder")
    assert list(profile.valid["concurrency"]) == [1, 16]
    assert latency.service.service_s(profile, concurrency=12) == pytest.approx(0.06, rel=0.1)


def test_load_tests_of_two_addresses_are_told_in_the_note(tmp_path: Path) -> None:
    """A server that moved may be one endpoint; two endpoints made one profile that said nothing of it."""
    moved = [users_test(tmp_path, users, 0.01 * users, f"http://{host} (embedder)") for users, host in ((1, "x"), (2, "y"), (4, "y"))]
    note = fitting.fit(moved, stage="embedder").profile.note or ""
    assert note.startswith("load tests of 2 addresses (http://x (embedder), http://y (embedder)) were taken for one endpoint; ")


def test_a_bench_of_a_stage_becomes_a_batch_curve(tmp_path: Path) -> None:
    profile = fitting.fit([stage_bench(tmp_path)]).profile
    assert latency.service.service_s(profile, batch=32) == pytest.approx(2e-3 + 32e-4, rel=0.02)


def test_the_rows_behind_a_profile_are_part_of_its_report(tmp_path: Path) -> None:
    path = tmp_path / "vllm.json"
    path.write_text(json.dumps(vllm(4.0)))
    found = fitting.fit([path], Design(device="H100"))
    (section,) = content.describe(found.profile, found.checks)
    table = next(t for t in section.tables if t.title == "Measured beside predicted")
    assert len(table.rows) == len(found.checks) > 0
    assert all("4/s" in row[0].text for row in table.rows)


def test_a_step_is_named_by_what_it_does() -> None:
    checks = beside.steps(
        dataclasses.replace(PROFILE, residual_log_sd=0.1),
        [latency.Residual(features=(4, 800, 128, 128 * 64, 5), measured_s=0.010, predicted_s=0.011)],
    )
    assert checks[0].key == "decode 4 x 200 + prefill 128_s"
    assert checks[0].error_percent == pytest.approx(10)
    assert checks[0].inside is True


PROFILE = latency.roofline(models.find("llama-3-8b"), hardware.find("H100"), precision="bf16")


@pytest.mark.parametrize(
    ("files", "design", "message"),
    [
        ([], None, "name bench files"),
        (["users1.json", "users1.json"], None, "named twice"),
        (["users1.json", "stage.json"], None, "bench records beside results"),
        (["two.json"], H100, "2 layouts"),
        (["text.json"], H100, r"text.json: looks like vllm.*mean_tpot_ms is .*fast.*, no number"),
        (["seconds.json"], H100, r"tpot_mean is 9.20 µs, and H100-SXM takes 4.48 ms at least to read the weights .* are --gpu, --model"),
        (["drafts.json"], H100, "was measured with speculative decoding, which a step profile cannot hold; measure without it"),
        (["failed.json"], H100, "no load level with usable latencies.*50 % of its requests failed"),
        (["nowhere.json"], None, "No such file"),
        (["users1.parquet"], None, "name its record, the .json beside it"),
    ],
)
def test_what_cannot_be_fitted_says_why(tmp_path: Path, files: list[str], design: Design | None, message: str) -> None:
    users_test(tmp_path, 1, 0.02)
    stage_bench(tmp_path)
    (tmp_path / "two.json").write_text("\n".join(json.dumps(vllm(2.0) | {"model_id": name}) for name in ("llama-3-8b", "llama-3-70b")))
    (tmp_path / "failed.json").write_text(json.dumps(vllm(2.0) | {"completed": 50, "failed": 50}))
    (tmp_path / "drafts.json").write_text(json.dumps(vllm(2.0) | {"spec_decode_acceptance_length": 2.5}))
    (tmp_path / "text.json").write_text(json.dumps(vllm(2.0) | {"mean_tpot_ms": "fast"}))
    times = {name: value / 1000 for name, value in vllm(2.0).items() if name.endswith("_ms")}
    (tmp_path / "seconds.json").write_text(json.dumps(vllm(2.0) | times))
    asked = dataclasses.replace(design, model=None) if design else None
    with pytest.raises(BadInput, match=message):
        fitting.fit([tmp_path / name for name in files], asked)


def test_a_record_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    path = record.write(tmp_path / "profile.json", PROFILE, hardware.machine())
    with pytest.raises(RecordError, match="'profile' record"):
        fitting.fit([path])
