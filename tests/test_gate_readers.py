"""Results of other benchmark tools as the gate reads them.

The files in golden/gate_inputs were written by the tools themselves (pytest-benchmark 5.3.1, pyperf 2.10.0, hyperfine 1.15.0, Google
Benchmark 1.9.5); names of machines and CPUs in them are made up.
"""

from __future__ import annotations

import gzip
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import record
from mlsys_bench.errors import BadInput, MeasurementFailed, RecordError, UnknownName
from mlsys_bench.gate import readers
from mlsys_bench.journeys import foreign
from mlsys_bench.journeys.compare import again, compare
from mlsys_bench.types import Bench, Machine, Measurement
from mlsys_bench.verdicts import Finding, Verdict

INPUTS = Path(__file__).parent / "golden" / "gate_inputs"


def raw(name: str) -> Any:
    return json.loads((INPUTS / name).read_text())


def by_name(bench: Bench) -> dict[str, Measurement]:
    return {m.name: m for m in bench.measurements if not m.parameters.get("counter")}


def values(m: Measurement) -> list[list[float]]:
    """Return the samples of each launch."""
    return [[v for r in launch.rounds for v in r.values] for launch in m.launches]


def written(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


# ---------------------------------------------------------------- what a launch is, tool by tool


def test_pytest_benchmark_measures_in_one_process_so_a_file_is_one_launch() -> None:
    document = raw("pytest_benchmark_base.json")
    found = by_name(readers.read(INPUTS / "pytest_benchmark_base.json"))
    assert set(found) == {"test_speed.py::test_sum[100]", "test_speed.py::test_sum[1000]", "test_speed.py::test_sort"}
    for test in document["benchmarks"]:
        m = found[test["fullname"]]
        assert values(m) == [test["stats"]["data"]]
        assert statistics.mean(values(m)[0]) == pytest.approx(test["stats"]["mean"]), "seconds a call, as the tool's own mean"
        assert (m.unit, m.better) == ("s", "lower")


def test_pytest_benchmark_says_what_machine_it_was() -> None:
    hard = readers.load(INPUTS / "pytest_benchmark_base.json").machine.hard
    assert hard["cpu_name"] == "Example CPU @ 2.50GHz"
    assert (hard["python"], hard["architecture"], hard["cpus"], hard["cpu_family"]) == ("3.11", "x86_64", 2, "6")


def test_pytest_benchmark_without_its_data_says_how_to_keep_them(tmp_path: Path) -> None:
    document = raw("pytest_benchmark_base.json")
    for test in document["benchmarks"]:
        del test["stats"]["data"]
    found = readers.load(written(tmp_path / "r.json", document))
    assert all(m.skipped and not m.launches for m in found.bench.measurements)
    assert "--benchmark-save-data" in found.notes[0]


def test_every_process_of_pyperf_is_a_launch() -> None:
    document = raw("pyperf_base.json")
    (m,) = readers.read(INPUTS / "pyperf_base.json").measurements
    runs = document["benchmarks"][0]["runs"]
    assert m.name == "sort_500"
    assert values(m) == [run["values"] for run in runs]
    assert len(m.launches) == 7
    assert m.launches[1].started_s == pytest.approx(2.0), "by the dates in the file"


def test_warm_ups_and_calibrations_of_pyperf_are_no_samples(tmp_path: Path) -> None:
    document = raw("pyperf_base.json")
    document["benchmarks"][0]["runs"].insert(0, {"metadata": {"calibrate_loops": 200}, "warmups": [[1, 9.9], [2, 9.9]]})
    (m,) = readers.read(written(tmp_path / "r.json", document)).measurements
    assert len(m.launches) == 7
    assert max(max(launch) for launch in values(m)) < 1


@pytest.mark.parametrize(("unit", "ours"), [("second", "s"), ("byte", "bytes"), ("integer", "count")])
def test_pyperf_also_measures_memory(tmp_path: Path, unit: str, ours: str) -> None:
    runs = [{"values": [1000.0, 1200.0]}]
    document = {
        "version": "1.0",
        "benchmarks": [{"metadata": {"name": "a", "unit": unit}, "runs": runs}, {"metadata": {"name": "b"}, "runs": runs}],
    }
    found = readers.load(written(tmp_path / "r.json", document))
    assert [m.unit for m in found.bench.measurements] == [ours, "s"]
    assert found.notes == ("measured in one process, a single launch; pyperf's --processes makes more: a, b",)


def test_every_run_of_hyperfine_is_a_launch() -> None:
    document = raw("hyperfine_base.json")
    found = by_name(readers.read(INPUTS / "hyperfine_base.json"))
    count = document["results"][0]
    assert values(found["count"]) == [[time] for time in count["times"]]
    assert len(found["count"].launches) == 8
    starts = [launch.started_s for launch in found["count"].launches]
    assert starts == pytest.approx([math.fsum(count["times"][:i]) for i in range(8)]), "one after the other"


def hyperfine(**changed: Any) -> dict[str, Any]:
    """Return an export of one command that ran three times."""
    times = [0.5, 0.6, 0.7]
    result = {"command": "./a", "mean": 0.6, "stddev": 0.1, "median": 0.6, "user": 0.3, "system": 0.1, "min": 0.5, "max": 0.7}
    return {"results": [result | {"times": times, "exit_codes": [0, 0, 0]} | changed]}


def test_a_command_that_always_fails_is_only_compared_with_its_like(tmp_path: Path) -> None:
    """What crashes at once is fast: that must never be an improvement."""
    fast = written(tmp_path / "crashes.json", hyperfine(times=[0.01] * 3, exit_codes=[1, 1, 1]))
    slow = written(tmp_path / "works.json", hyperfine())
    (m,) = readers.read(fast).measurements
    assert m.parameters == {"exit_status": 1}
    assert "failed every time" in readers.load(fast).notes[0]
    assert {f.verdict for f in compare(slow, fast, "5%").findings} <= {"not_comparable", "inconclusive"}
    assert compare(fast, fast, "5%").findings[0].ratio == pytest.approx(1.0)


@pytest.mark.parametrize(("codes", "why"), [([0, 1, 0], "2 x exit status 0, 1 x exit status 1"), ([0, None, 0], "1 x killed by a signal")])
def test_a_command_that_fails_now_and_then_was_not_measured(tmp_path: Path, codes: list[int | None], why: str) -> None:
    (m,) = readers.read(written(tmp_path / "r.json", hyperfine(exit_codes=codes))).measurements
    assert m.launches == ()
    assert why in str(m.skipped)


def test_newer_hyperfines_say_how_much_memory_each_run_took(tmp_path: Path) -> None:
    peak = [10_000_000, 10_100_000, 10_050_000]
    found = readers.read(written(tmp_path / "r.json", hyperfine(memory_usage_byte=peak, parameters={"threads": "4"}))).measurements
    assert [(m.name, m.unit, m.parameters) for m in found] == [
        ("./a", "s", {"threads": "4"}), ("./a peak memory", "bytes", {"threads": "4"}),
    ]  # fmt: skip
    assert values(found[1]) == [[float(b)] for b in peak]


def test_repetitions_of_google_benchmark_are_samples_of_one_launch_with_their_cpu_time() -> None:
    document = raw("google_benchmark_base.json")
    entries = [e for e in document["benchmarks"] if e["name"] == "sum_range/1000" and e["run_type"] == "iteration"]
    m = by_name(readers.read(INPUTS / "google_benchmark_base.json"))["sum_range/1000"]
    assert len(entries) == 3
    assert values(m) == [pytest.approx([e["real_time"] * 1e-9 for e in entries])]
    assert m.launches[0].rounds[0].cpu_s == pytest.approx([e["cpu_time"] * 1e-9 for e in entries])


def test_aggregates_of_google_benchmark_are_left_out_and_failures_are_skipped() -> None:
    found = readers.read(INPUTS / "google_benchmark_base.json").measurements
    assert {m.name for m in found} == {"sum_range/1000", "sum_range/4000", "broken"}
    assert next(m for m in found if m.name == "broken").skipped == "no such device"


def test_rates_of_google_benchmark_are_better_higher_and_counters_of_unknown_direction_are_named() -> None:
    found = readers.load(INPUTS / "google_benchmark_base.json")
    rates = {m.parameters["counter"]: (m.unit, m.better) for m in found.bench.measurements if "counter" in m.parameters}
    assert rates == {"bytes_per_second": ("bytes/s", "higher"), "items_per_second": ("items/s", "higher")}
    assert found.notes == ("counters left out, as the file does not say whether more of them is better: depth",)


@pytest.mark.parametrize(("unit", "scale"), [("ns", 1e-9), ("us", 1e-6), ("ms", 1e-3), ("s", 1.0)])
def test_google_benchmark_has_a_unit_for_each_benchmark(tmp_path: Path, unit: str, scale: float) -> None:
    document = raw("google_benchmark_base.json")
    document["benchmarks"] = [document["benchmarks"][0] | {"real_time": 2.0, "cpu_time": 1.0, "time_unit": unit}]
    m = readers.read(written(tmp_path / "r.json", document)).measurements[0]
    assert values(m) == [[pytest.approx(2.0 * scale)]]


def test_google_benchmarks_of_aggregates_alone_say_what_to_leave_out(tmp_path: Path) -> None:
    document = raw("google_benchmark_base.json")
    document["benchmarks"] = [e for e in document["benchmarks"] if e["run_type"] == "aggregate"]
    with pytest.raises(MeasurementFailed, match="leave out --benchmark_\\*aggregates_only"):
        readers.read(written(tmp_path / "r.json", document))


def test_counted_memory_that_is_the_same_in_every_repetition_is_a_counter(tmp_path: Path) -> None:
    document = raw("google_benchmark_base.json")
    first = [e | {"allocs_per_iter": 3.0, "max_bytes_used": 64 + i} for i, e in enumerate(document["benchmarks"][:3])]
    document["benchmarks"] = first
    found = {m.parameters.get("counter"): m for m in readers.read(written(tmp_path / "r.json", document)).measurements}
    assert found["allocs_per_iter"].deterministic
    assert not found["max_bytes_used"].deterministic
    assert found["allocs_per_iter"].better == "lower"


# ---------------------------------------------------------------- asv, by its source (asv/results.py, file format 2)


def asv(**changed: Any) -> dict[str, Any]:
    """Return a result of two benchmarks, one of them with a parameter, and one that only counts."""
    rows = {
        "suite.Keys.time_sort": [[0.002, 0.02], [["10", "100"]], "v", 0, 1.0, None, None, None, None, None, None, [[0.002, 0.0021], None]],
        "suite.peakmem_load": [[5_000_000], [], "v"],
        "suite.time_broken": [[None], [], "v"],
        "suite.track_hits": [[42], [], "v"],
    }  # fmt: skip
    columns = [
        "result", "params", "version", "started_at", "duration", "stats_ci_99_a", "stats_ci_99_b", "stats_q_25", "stats_q_75",
        "stats_number", "stats_repeat", "samples", "profile",
    ]  # fmt: skip
    machine = {"machine": "host-1", "cpu": "Example CPU", "num_cpu": "8", "arch": "x86_64", "os": "Linux 6.1", "ram": "16"}
    return {
        "commit_hash": "0" * 40, "env_name": "virtualenv-py3.11", "date": 0, "params": machine, "python": "3.11", "requirements": {},
        "env_vars": {}, "result_columns": columns, "results": rows, "durations": {}, "version": 2,
    } | changed  # fmt: skip


def test_asv_names_each_parameter_keeps_samples_and_leaves_out_what_has_no_direction(tmp_path: Path) -> None:
    found = readers.load(written(tmp_path / "r.json", asv()))
    told = [(m.name, m.unit, m.parameters, values(m), m.skipped) for m in found.bench.measurements]
    assert told == [
        ("suite.Keys.time_sort", "s", {"param1": "10"}, [[0.002, 0.0021]], None),
        ("suite.Keys.time_sort", "s", {"param1": "100"}, [[0.02]], None),
        ("suite.peakmem_load", "bytes", {}, [[5_000_000.0]], None),
        ("suite.time_broken", "s", {}, [], "it failed"),
    ]
    assert found.notes == ("left out, as the file does not say whether more of them is better: suite.track_hits",)
    assert found.machine.hard["cpu_name"] == "Example CPU"


# ---------------------------------------------------------------- nvbench, by its own reader (python/scripts/nvbench_compare.py)


def nvbench(tag: str = "nv/json/bin:nv/cold/sample_times") -> dict[str, Any]:
    """Return a result of one kernel at two sizes."""

    def state(size: int, samples: int) -> dict[str, Any]:
        file = {"tag": tag, "data": [
            {"name": "filename", "type": "string", "value": f"r.json-bin/{samples}.bin"},
            {"name": "size", "type": "int64", "value": str(samples)},
        ]}  # fmt: skip
        mean = {"tag": "nv/cold/time/gpu/mean", "data": [{"name": "value", "type": "float64", "value": "1.5e-05"}]}
        axes = [{"name": "Elements", "type": "int64", "value": str(size)}]
        return {"name": f"Device=0 Elements={size}", "device": 0, "axis_values": axes, "summaries": [mean, file], "is_skipped": False}

    devices = [{"id": 0, "name": "NVIDIA H100 80GB HBM3", "ecc_state": True}]
    skipped = {"device": 0, "axis_values": [], "summaries": [], "is_skipped": True, "skip_reason": "too large"}
    return {"devices": devices, "benchmarks": [{"name": "copy", "axes": [], "states": [state(256, 3), state(512, 4), skipped]}]}


def test_nvbench_samples_lie_in_files_beside_it_and_one_process_measures(tmp_path: Path) -> None:
    (tmp_path / "r.json-bin").mkdir()
    np.array([1e-5, 2e-5, 4e-5], dtype="<f4").tofile(tmp_path / "r.json-bin" / "3.bin")
    found = readers.load(written(tmp_path / "r.json", nvbench()))
    small, large, skipped = found.bench.measurements
    assert values(small) == [pytest.approx([1e-5, 2e-5, 4e-5])]
    assert small.parameters == {"Elements": "256"}
    assert values(large) == [[1.5e-5]], "its file is gone: the mean is what is left"
    assert skipped.skipped == "too large"
    assert found.machine.hard["gpu"] == "NVIDIA H100 80GB HBM3"
    assert found.notes == ("only a mean is in the file; --jsonbin keeps the samples: copy",)


def test_nvbench_samples_that_were_cut_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json-bin").mkdir()
    np.array([1e-5], dtype="<f4").tofile(tmp_path / "r.json-bin" / "3.bin")
    with pytest.raises(BadInput, match="holds 1 samples where 3 are announced"):
        readers.load(written(tmp_path / "r.json", nvbench()))


# ---------------------------------------------------------------- telling formats apart, folders, and what cannot be read


@pytest.mark.parametrize("tool", ["pytest-benchmark", "pyperf", "hyperfine", "google-benchmark"])
def test_a_file_is_known_by_what_is_in_it_and_can_be_named(tool: str) -> None:
    path = INPUTS / f"{tool.replace('-', '_')}_base.json"
    assert readers.load(path).tool == tool
    assert readers.read(path) == readers.read(path, tool)


def test_another_format_than_the_named_one_is_refused_with_how_to_make_it() -> None:
    with pytest.raises(BadInput, match=r"is not what pyperf writes but hyperfine; write one with pyperf … -o FILE"):
        readers.read(INPUTS / "hyperfine_base.json", "pyperf")


def test_a_format_nobody_knows_has_a_nearest_neighbour() -> None:
    with pytest.raises(UnknownName, match="did you mean hyperfine"):
        readers.read(INPUTS / "hyperfine_base.json", "hyperfin")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "is not JSON, or was cut off"),
        ("[1, 2]", "is no result of a tool known here; known: pytest-benchmark, google-benchmark, pyperf, hyperfine, asv, nvbench"),
        ('{"results": {}}', "is no result of a tool known here"),
    ],
)
def test_what_is_no_result_names_all_that_is_read(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        readers.read(path)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("pytest_benchmark", lambda d: d["benchmarks"][0].pop("stats")),
        ("pytest_benchmark", lambda d: d["benchmarks"][0]["stats"]["data"].__setitem__(0, float("nan"))),
        ("pyperf", lambda d: d["benchmarks"][0]["runs"][0].__setitem__("values", ["1"])),
        ("pyperf", lambda d: d["metadata"].__setitem__("unit", "parsec")),
        ("hyperfine", lambda d: d["results"][0]["times"].__setitem__(0, None)),
        ("google_benchmark", lambda d: d["benchmarks"][0].__setitem__("time_unit", "fortnight")),
        ("google_benchmark", lambda d: d["benchmarks"][0].pop("cpu_time")),
    ],
)
def test_a_file_that_was_edited_is_refused_by_name(tmp_path: Path, name: str, spoil: Callable[[Any], Any]) -> None:
    document = raw(f"{name}_base.json")
    spoil(document)
    with pytest.raises(BadInput, match=r"looks like .* but cannot be read"):
        readers.read(written(tmp_path / "r.json", document))


def test_a_result_without_a_benchmark_is_a_failed_measurement(tmp_path: Path) -> None:
    with pytest.raises(MeasurementFailed, match="holds no benchmark of hyperfine"):
        readers.read(written(tmp_path / "r.json", {"results": []}))


def test_a_packed_pyperf_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "r.json.gz").write_bytes(gzip.compress((INPUTS / "pyperf_base.json").read_bytes()))
    assert readers.read(tmp_path / "r.json.gz") == readers.read(INPUTS / "pyperf_base.json")


def folder(path: Path, name: str, n: int, factor: float = 1.0) -> Path:
    """Return a folder of so many results of this tool, each a little slower than the one before, all by a factor."""
    path.mkdir()
    for i in range(n):
        document = raw(f"{name}_base.json")
        for test in document["benchmarks"]:
            test["stats"]["data"] = [v * factor * (1 + 0.002 * (i % 3) + 1e-6 * i) for v in test["stats"]["data"]]
        written(path / f"{i}.json", document)
    return path


def test_a_folder_of_files_is_a_launch_a_file(tmp_path: Path) -> None:
    found = readers.read(folder(tmp_path / "a", "pytest_benchmark", 6))
    assert [len(m.launches) for m in found.measurements] == [6, 6, 6]


def test_a_copy_of_a_launch_is_no_second_one(tmp_path: Path) -> None:
    place = folder(tmp_path / "a", "pytest_benchmark", 2)
    (place / "2.json").write_text((place / "0.json").read_text())
    with pytest.raises(BadInput, match=r"2\.json: is a copy of 0\.json"):
        readers.read(place)


def test_results_of_two_tools_or_machines_do_not_belong_in_one_folder(tmp_path: Path) -> None:
    place = folder(tmp_path / "a", "pytest_benchmark", 1)
    written(place / "z.json", raw("hyperfine_base.json"))
    with pytest.raises(BadInput, match="launches of one side come from one tool"):
        readers.read(place)
    other = raw("pytest_benchmark_base.json")
    other["machine_info"]["cpu"]["brand_raw"] = "Another CPU"
    written(place / "z.json", other)
    with pytest.raises(BadInput, match=r"was measured elsewhere than .* \(cpu_name: Example CPU @ 2.50GHz -> Another CPU\)"):
        readers.read(place)


def test_an_empty_folder_says_what_it_wants(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="give it one result of each launch"):
        readers.read(tmp_path)


TIMES = st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=5)


@given(st.lists(TIMES, min_size=1, max_size=6))
def test_whatever_was_measured_comes_back_launch_by_launch(launches: list[list[float]]) -> None:
    runs = [{"values": launch, "warmups": [[1, 1.0]]} for launch in launches]
    text = json.dumps({"version": "1.0", "metadata": {"name": "x"}, "benchmarks": [{"runs": runs}]})
    (m,) = readers.parse(text, "r.json").bench.measurements
    assert values(m) == launches


# ---------------------------------------------------------------- gate compare on such files


def findings(verdict: Verdict) -> dict[str, Finding]:
    return {f.name: f for f in verdict.findings}


@pytest.mark.parametrize("tool", ["pytest_benchmark", "google_benchmark"])
def test_a_single_process_is_never_more_than_suspect_however_slow_it_is(tmp_path: Path, tool: str) -> None:
    document = raw(f"{tool}_base.json")
    for test in document["benchmarks"]:
        if "stats" in test:
            test["stats"]["data"] = [10 * v for v in test["stats"]["data"]]
        elif "real_time" in test:
            test |= {"real_time": 10 * test["real_time"], "cpu_time": 10 * test["cpu_time"]}
    verdict = compare(INPUTS / f"{tool}_base.json", written(tmp_path / "slow.json", document), "5%")
    assert verdict.verdict == "suspect"
    assert "regression" not in {f.verdict for f in verdict.findings}


def test_six_files_a_side_are_six_launches_and_can_prove_a_regression(tmp_path: Path) -> None:
    base, slow = folder(tmp_path / "base", "pytest_benchmark", 6), folder(tmp_path / "slow", "pytest_benchmark", 6, factor=1.2)
    assert compare(base, slow, "5%").verdict == "regression"
    assert compare(base, base, "5%").verdict == "pass"
    assert compare(slow, base, "5%").verdict == "improved"


def test_seven_processes_of_pyperf_prove_a_regression_and_the_verdict_says_they_were_measured_apart(tmp_path: Path) -> None:
    document = raw("pyperf_base.json")
    for run in document["benchmarks"][0]["runs"]:
        run["values"] = [1e-5, 1.01e-5, 1.02e-5]
    base = written(tmp_path / "base.json", document)
    for run in document["benchmarks"][0]["runs"]:
        run["values"] = [1.2 * v for v in run["values"]]
    verdict = compare(base, written(tmp_path / "cand.json", document), "5%")
    assert verdict.verdict == "regression"
    assert findings(verdict)["sort_500"].ratio == pytest.approx(1.2)
    assert foreign.APART in verdict.reasons


def test_another_cpu_is_not_comparable_and_an_unknown_one_is_a_remark(tmp_path: Path) -> None:
    document = raw("pyperf_base.json")
    document["metadata"]["cpu_model_name"] = "Another CPU"
    other = compare(INPUTS / "pyperf_base.json", written(tmp_path / "other.json", document), "5%")
    assert other.verdict == "not_comparable"
    assert other.fingerprint_differences == ("cpu_name: Example CPU @ 2.50GHz -> Another CPU",)
    unknown = compare(INPUTS / "hyperfine_base.json", INPUTS / "hyperfine_cand.json", "5%")
    assert any("unknown on both sides, so not checked: cpu_name, cpus" in reason for reason in unknown.reasons)


def test_a_result_of_another_tool_is_not_comparable_with_a_record_of_ours(tmp_path: Path) -> None:
    """What one side does not know of its machine cannot be held against the other."""
    ours = record.write(tmp_path / "ours.json", readers.read(INPUTS / "hyperfine_base.json"), Machine(hard={"cpu_name": "x"}, soft={}))
    verdict = compare(ours, INPUTS / "hyperfine_cand.json", "5%")
    assert verdict.verdict == "not_comparable"
    assert "cpu_name: x -> unknown" in verdict.fingerprint_differences


def test_one_result_alone_is_told_what_it_lacks() -> None:
    with pytest.raises(RecordError, match="needs a CAND to compare with"):
        again(INPUTS / "hyperfine_base.json")


# ---------------------------------------------------------------- load tests of other tools


def vllm(ttft_s: float = 0.05, **changed: Any) -> dict[str, Any]:
    """Return a `vllm bench serve --save-result --save-detailed` file of 60 requests."""
    n = 60
    details = {
        "input_lens": [500] * n, "output_lens": [11] * n, "ttfts": [ttft_s * (1 + 0.01 * (i % 7)) for i in range(n)],
        "itls": [[0.01] * 10 for _ in range(n)], "errors": [""] * n,
    }  # fmt: skip
    return {
        "backend": "vllm", "model_id": "m", "num_prompts": n, "request_rate": 10.0, "burstiness": 1.0, "max_concurrency": None,
        "duration": 6.0, "completed": n, "failed": 0, "total_input_tokens": 500 * n, "total_output_tokens": 11 * n,
        "request_throughput": 10.0, "mean_ttft_ms": 50.0, "mean_tpot_ms": 10.0, **details,
    } | changed  # fmt: skip


def test_a_single_run_of_vllm_with_details_is_at_most_suspect(tmp_path: Path) -> None:
    base, cand = written(tmp_path / "base.json", vllm()), written(tmp_path / "cand.json", vllm(0.1))
    found = foreign.load(base)
    assert found.tool == "vllm bench serve"
    assert {m.name: len(m.launches[0].rounds[0].values) for m in found.bench.measurements if m.name in ("ttft", "itl")} == {
        "ttft": 60,
        "itl": 600,
    }
    verdict = compare(base, cand, "5%")
    assert verdict.verdict == "suspect"
    assert findings(verdict)["ttft"].ratio == pytest.approx(2.0, rel=0.05)


def test_figures_without_requests_are_single_values_that_can_be_suspect_at_most(tmp_path: Path) -> None:
    bare: Any = {"input_lens": [], "output_lens": [], "ttfts": [], "itls": []}
    base, cand = (written(tmp_path / f"{ttft}.json", vllm(**bare, mean_ttft_ms=ttft)) for ttft in (50.0, 150.0))
    verdict = compare(base, cand, "5%")
    assert verdict.verdict == "suspect"
    assert findings(verdict)["ttft_mean"].parameters == {"rate_per_s": 10.0, "arrivals": "poisson"}


def test_six_runs_of_vllm_in_one_file_are_six_launches(tmp_path: Path) -> None:
    """As --append-result writes them: one object a line."""
    for name, factor in (("base", 1.0), ("cand", 1.5)):
        (tmp_path / f"{name}.json").write_text("\n".join(json.dumps(vllm(0.05 * factor * (1 + i / 1000))) for i in range(6)))
    assert len(by_name(foreign.load(tmp_path / "base.json").bench)["ttft"].launches) == 6
    assert findings(compare(tmp_path / "base.json", tmp_path / "cand.json", "5%"))["ttft"].verdict == "regression"


def test_another_load_is_not_comparable(tmp_path: Path) -> None:
    base, longer = written(tmp_path / "a.json", vllm()), written(tmp_path / "b.json", vllm(input_lens=[600] * 60))
    other_model = written(tmp_path / "c.json", vllm(model_id="n"))
    assert compare(base, longer, "5%").fingerprint_differences == ("mean_prompt_tokens: 500 -> 600",)
    assert compare(base, other_model, "5%").fingerprint_differences == ("model: m -> n",)
    slightly = written(tmp_path / "d.json", vllm(input_lens=[510] * 60))
    assert compare(base, slightly, "5%").verdict != "not_comparable"


def test_a_run_in_which_requests_failed_is_no_improvement(tmp_path: Path) -> None:
    base = written(tmp_path / "a.json", vllm())
    shed = written(tmp_path / "b.json", vllm(0.01, completed=30, failed=30))
    verdict = compare(base, shed, "5%")
    assert "improved" not in {f.verdict for f in verdict.findings}
    assert "50 % of its requests failed" in str([f.reason for f in verdict.findings])


def test_a_file_of_no_known_tool_names_all_of_them(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no record of ours .* hyperfine, .* vllm bench serve, AIPerf"):
        compare(written(tmp_path / "a.json", {"x": 1}), INPUTS / "hyperfine_base.json", "5%")


def guidellm(kind: str, ttft_ms: float = 100.0, **strategy: Any) -> dict[str, Any]:
    """Return one benchmark of a GuideLLM report."""

    def stats(mean: float) -> dict[str, Any]:
        return {"successful": {"mean": mean, "std_dev": 0.0, "max": mean, "percentiles": {"p50": mean, "p95": mean, "p99": mean}}}

    metrics = {
        "request_totals": {"successful": 50, "incomplete": 0, "errored": 0, "total": 50}, "request_latency": stats(1.0),
        "time_to_first_token_ms": stats(ttft_ms), "inter_token_latency_ms": stats(9.0), "prompt_token_count": stats(256.0),
        "output_token_count": stats(101.0),
    }  # fmt: skip
    return {"config": {"strategy": {"type_": kind, **strategy}, "backend": {"model": "m"}}, "metrics": metrics}


def test_every_level_of_a_guidellm_sweep_is_a_metric_of_its_own(tmp_path: Path) -> None:
    sweep = {"benchmarks": [guidellm("synchronous"), guidellm("constant", rate=2.0), guidellm("constant", 120.0, rate=2.0)]}
    found = foreign.load(written(tmp_path / "r.json", sweep))
    assert [m.parameters for m in found.bench.measurements if m.name == "ttft_mean"] == [
        {"concurrency": 1}, {"rate_per_s": 2.0, "arrivals": "constant"}, {"rate_per_s": 2.0, "arrivals": "constant", "run": 2},
    ]  # fmt: skip


def test_six_reports_of_guidellm_in_a_folder_are_six_launches(tmp_path: Path) -> None:
    for side, factor in (("base", 1.0), ("cand", 1.3)):
        (tmp_path / side).mkdir()
        for i in range(6):
            written(tmp_path / side / f"{i}.json", {"benchmarks": [guidellm("concurrent", 100.0 * factor + i / 10, streams=4)]})
    told = findings(compare(tmp_path / "base", tmp_path / "cand", "5%"))
    assert (told["ttft_mean"].verdict, told["tpot_mean"].verdict) == ("regression", "pass")


def test_a_table_of_aiperf_is_read_and_another_table_is_not(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(
        "Metric,avg,min,max,p99,p95,p90,p50,std\nTime To First Token (ms),80,70,90,89,88,87,80,1\n"
        "Request Latency (ms),900,800,1000,990,980,970,900,5\n"
        "Input Sequence Length (tokens),512,512,512,512,512,512,512,0\nOutput Sequence Length (tokens),100,100,100,100,100,100,100,0\n\n"
        "Metric,Value\nRequest Count,400\n"
    )
    found = foreign.load(tmp_path / "r.csv")
    assert found.tool == "AIPerf"
    assert {m.name: values(m) for m in found.bench.measurements}["ttft_p95"] == [[pytest.approx(0.088)]]
    (tmp_path / "r.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadInput, match="is no table of AIPerf"):
        foreign.load(tmp_path / "r.csv")
