"""Records, numbers and answers that do not hold together: each was taken, or ended in a traceback, and is refused in one line now."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from mlsys_bench import hardware, latency, loadtest, record, report, units
from mlsys_bench.errors import BadInput, RecordError
from mlsys_bench.gate import words
from mlsys_bench.journeys import costing, planning, simulation, traffic
from mlsys_bench.loadtest.endpoints import reading
from mlsys_bench.loadtest.wire import WireError
from mlsys_bench.report import parts, runs
from mlsys_bench.report import traffic as traffic_in_words
from mlsys_bench.serve import app, openai_api, server
from mlsys_bench.serve.openai_api import ApiError
from mlsys_bench.types import Bench, LatencyProfile, Launch, Lengths, Measurement, Plan, Round, TrafficSummary, Workload
from mlsys_bench.workload import prometheus
from mlsys_cli import main
from tests import sample_records

DEEP = "[" * 100_000  # deeper than any reader follows


def stored(folder: Path, value: record.Record, **changes: Any) -> Path:
    """Write a record with some of its keys replaced."""
    path = folder / "record.json"
    path.write_text(json.dumps(json.loads(record.dumps(value, hardware.machine())) | changes))
    return path


# ---------------------------------------------------------------- profiles


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"coefficients": [1.0]}, "1 beside 6 terms; each term has one"),
        ({"covariance": [[0.01]]}, "it is 6 x 6: fit the profile again"),
        ({"covariance": []}, "it is 6 x 6: fit the profile again"),
        ({"terms": ["kv"] * 6}, "names one twice"),
    ],
)
def test_a_profile_whose_parts_do_not_fit_is_refused_by_whoever_reads_it(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    alone = stored(tmp_path, sample_records.roofline_profile(), **changes)
    for read in (lambda: record.read(alone, LatencyProfile), lambda: planning.profiles([alone]), lambda: report.load([alone])):
        with pytest.raises(RecordError, match=f"record.json: .*{why}"):
            read()
    inside = json.loads(record.dumps(sample_records.plan(), hardware.machine()))["profile"] | changes
    with pytest.raises(RecordError, match=rf"{why}.* - at `\$\.profile`"):
        record.read(stored(tmp_path, sample_records.plan(), profile=inside), Plan)


@pytest.mark.parametrize(
    ("constants", "why"),
    [
        ({"head_flops": -1.0}, "constant head_flops is -1; it must be from 0 up"),
        ({"peak_flops_per_s": 0.0}, "constant peak_flops_per_s is 0; it must be above zero"),
        ({"dense_bytes": None}, "has no dense_bytes; no step can be timed"),
    ],
)
def test_a_constant_that_cannot_be_is_named(constants: dict[str, float | None], why: str) -> None:
    profile = sample_records.roofline_profile()
    changed = {name: value for name, value in (profile.constants | constants).items() if value is not None}
    with pytest.raises(BadInput, match=why):
        latency.check(dataclasses.replace(profile, constants=changed))


def test_a_coefficient_or_a_share_of_a_device_that_cannot_be_is_named() -> None:
    profile = sample_records.roofline_profile()
    with pytest.raises(BadInput, match=r"layout\.tp is 0"):
        latency.check(dataclasses.replace(profile, layout=dataclasses.replace(profile.layout, tp=0)))
    first = dataclasses.replace(profile, terms=("step_s",), coefficients=(1.0,), covariance=((0.0,),))
    with pytest.raises(BadInput, match="has no sequence_s and no weights"):
        latency.check(first)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"replicas": 0}, "replicas is 0"),
        ({"max_batch": -1}, "max_batch is -1"),
        ({"workload": {"rate_per_s": -3.0}}, "workload.rate_per_s -3"),
        ({"workload": {"prompt_tokens": {"mean": 0}}}, "prompt_tokens: a mean of 0 tokens"),
        ({"profile": {"constants": {"bandwidth_bytes_per_s": 0}}}, "bandwidth_bytes_per_s is 0"),
    ],
)
def test_a_plan_that_cannot_be_is_not_priced(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    plan = sample_records.plan()
    whole = json.loads(record.dumps(plan, hardware.machine()))
    with pytest.raises(BadInput, match=rf"record\.json: .*{why}.*; make the plan again"):
        costing.cost(stored(tmp_path, plan, **_within(whole, changes)))


def _within(whole: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a document with some keys replaced, however deep."""
    return whole | {key: _within(whole[key], new) if isinstance(new, dict) else new for key, new in changes.items()}


# ---------------------------------------------------------------- traffic


def seen(**changes: Any) -> TrafficSummary:
    return TrafficSummary(**{
        "requests": 10, "duration_s": 5.0, "rate_per_s": 2.0, "peak_rate_per_s": 3.0, "series_step_s": 1.0, "series_per_s": (1.0, 3.0),
        "gap_scv": 1.0, "dispersion": {"1s": 1.5}, "dispersion_intervals": {"1s": (1.0, 2.0)}, "prompt_tokens": None,
        "output_tokens": None, "length_correlation": None, "prefix_hit_share": None,
    } | changes)  # fmt: skip


@pytest.mark.parametrize(
    ("dispersion", "intervals", "why"),
    [
        ({"soon": 1.0}, {}, "'soon' is no window in seconds; write it like 60s"),
        ({"nans": 1.0}, {}, "'nans' is no window"),
        ({"1s": 1.0}, {"2s": [1.0, 2.0]}, "2s is in no window of dispersion"),
        ({"1s": "much"}, {}, "Expected `float`, got `str`"),
    ],
)
def test_a_dispersion_of_no_window_is_refused(tmp_path: Path, dispersion: Any, intervals: Any, why: str) -> None:
    whole = Workload(rate_per_s=2.0, arrivals="poisson", prompt_tokens=Lengths(mean=5), output_tokens=Lengths(mean=5), observed=seen())
    document = json.loads(record.dumps(whole, hardware.machine()))
    observed = document["observed"] | {"dispersion": dispersion, "dispersion_intervals": intervals}
    with pytest.raises(RecordError, match=why):
        record.read(stored(tmp_path, whole, observed=observed), Workload)


def test_traffic_of_no_request_is_shown_without_ratios() -> None:
    whole = Workload(
        rate_per_s=2.0, arrivals="poisson", prompt_tokens=Lengths(mean=5), output_tokens=Lengths(mean=5),
        observed=seen(rate_per_s=0.0, requests=0, sessions=0),
    )  # fmt: skip
    facts = {fact.label: fact for fact in traffic_in_words.section(whole).facts}
    assert (facts["Busiest"].detail, facts["Sessions"].detail) == ("", "")


def test_what_is_beyond_any_number_is_printed_as_none() -> None:
    assert parts.digits(float("inf")) == parts.digits(float("nan")) == parts.NONE


# ---------------------------------------------------------------- simulate, load tests


def test_one_request_has_latencies_and_no_rates() -> None:
    design: dict[str, Any] = {"model": "llama-3.1-8b", "gpu": "h100", "prompt_tokens": "200", "output_tokens": "20", "qps": 2.0}
    one = simulation.simulate(simulation.Asked(**design, requests=1))
    assert (one.duration_s, one.goodput_per_s, one.validity.verdict) == (0.0, None, "degraded")
    assert "due at one moment: no rate can be told" in one.validity.reasons[0]
    section = runs.loadtest(one)
    facts = {fact.label: fact.text for fact in section.facts}
    assert section.lead == "1 of 1 request answered, 100.0 % within all limits."
    assert (facts["Rate"], facts["Goodput"], "Tokens" in facts) == ("2.00/s asked, — completed", "100.0 %", False)


def test_a_schedule_without_requests_is_refused_dry_or_not() -> None:
    options = loadtest.Options(url="http://127.0.0.1:1", qps=0.001, duration_s=1.0)
    for asked in (loadtest.dry_run, loadtest.run):
        with pytest.raises(BadInput, match=r"no request falls into 1\.00 s"):
            asked(options)
    with pytest.raises(BadInput, match="is no URL: Invalid IPv6 URL"):
        loadtest.dry_run(dataclasses.replace(options, url="http://[::1"))


# ---------------------------------------------------------------- numbers as typed

NO_NUMBERS = ("0x24", "1_000", " 24 ", "infinity", "nan", "1e999", "٣", "", "+", "1.2.3")


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_only_python_takes_for_a_number_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="no plain number"):
        units.plain(text)
    for command in (["plan", "--qps"], ["simulate", "--replicas"], ["cost", "plan.json", "--vcpus"]):
        monkeypatch.setattr("sys.argv", ["mlsys", *command[:-1], f"{command[-1]}={text}"])
        with pytest.raises(SystemExit) as ended:
            main.run()
        assert ended.value.code == 2
        assert f"Invalid value for '{command[-1]}'" in capsys.readouterr().err


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_python_writes_is_read_back(value: float) -> None:
    assert units.plain(repr(value)) == value


@pytest.mark.parametrize(
    ("hours", "why"),
    [
        ("0x24", "no replica runs in any hour"),
        ("2x0", "no replica"),
        ("1_000", "hour by hour"),
        ("٣", "hour by hour"),
        ("2x9999", "a year"),
    ],
)
def test_hours_that_nobody_can_mean_are_refused(tmp_path: Path, hours: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        costing.replicas_by_hour(hours)


# ---------------------------------------------------------------- JSON and exports from elsewhere


def test_json_nested_without_end_is_no_record_dataset_or_answer(tmp_path: Path) -> None:
    file = tmp_path / "deep.json"
    file.write_text(DEEP)
    with pytest.raises(RecordError, match="is not JSON"):
        record.load(file)
    with pytest.raises(BadInput):
        prometheus.exported(file, engine=None, model=None)
    with pytest.raises(WireError):
        reading.decoded(DEEP.encode(), dict[str, Any], "answer")


def test_a_body_nested_without_end_and_one_cut_off_are_the_clients_mistakes() -> None:
    with pytest.raises(ApiError, match="nested deeper") as deep:
        openai_api.decode(DEEP.encode(), openai_api.CompletionBody, "nano")

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    with pytest.raises(ApiError, match="closed before the whole body came") as cut:
        asyncio.run(app._body(Request({"type": "http", "method": "POST"}, gone)))
    assert deep.value.status == cut.value.status == 400


def test_an_address_of_another_machine_is_no_port_in_use() -> None:
    with pytest.raises(BadInput, match="an address of this machine as --host"):
        server.bind("192.0.2.1", 0)  # TEST-NET-1, which no machine has


def test_a_measurement_without_launches_is_compared_with_nothing() -> None:
    launch = Launch(started_s=0.0, rounds=(Round(values=(1.0, 1.1)),))
    one = Measurement(name="x", unit="s", better="lower", parameters={}, launches=(launch,))
    none = dataclasses.replace(one, launches=())
    for base, cand, verdict, why in (
        (one, none, "inconclusive", "the candidate holds no"),
        (none, one, "not_comparable", "the baseline holds no"),
    ):
        found = words.unmatched(base, cand)
        assert found is not None
        assert (found.verdict, why in (found.reason or "")) == (verdict, True)
    assert words.matched(Bench(measurements=(none,)), Bench(measurements=(none,))) == []


def exported(folder: Path, rows: Any) -> Path:
    path = folder / "export.json"
    path.write_text(json.dumps({"status": "success", "data": {"resultType": "matrix", "result": rows}}))
    return path


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([5], "is not the answer of query_range"),
        ([{"metric": None, "values": [[1, "2"]]}], "is not the answer of query_range"),
        ([{"metric": {"__name__": "mlsys_x"}, "values": [[1, "+Inf"]]}], "mlsys_x: has a sample that is no finite number"),
        ([{"metric": {"__name__": "mlsys_x"}, "values": [[5, "1"], [1.7e9, "2"]]}], "more than two years apart"),
    ],
)
def test_an_export_that_is_none_is_named(tmp_path: Path, rows: Any, why: str) -> None:
    with pytest.raises(BadInput, match=rf"export\.json: .*{why}"):
        prometheus.exported(exported(tmp_path, rows), engine=None, model=None)


def test_an_address_of_prometheus_is_checked(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="write an address like"):
        prometheus.server("http://[::1")
    file = exported(tmp_path, [])
    with pytest.raises(BadInput, match="is a file, and read whole; give it as the argument"):
        traffic.from_prometheus(str(file), range_="1h", step="auto", until=None, engine=None, model=None, selector=None, auth_file=None)
