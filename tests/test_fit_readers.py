"""Results of other tools, in the schema each writes, with numbers made up here; and what is read from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlsys_bench import hardware, record, summary
from mlsys_bench.errors import BadInput
from mlsys_bench.predict import mix, readers
from mlsys_bench.predict.readers import Design, Reading
from mlsys_bench.predict.readers import aiperf as aiperf_reader
from mlsys_bench.types import Lengths, RequestRecord, Requests, Validity

H100 = Design(device="H100", precision="fp8", tp=2)
LLAMA = Design(model="llama-3-8b", device="H100")


def read(folder: Path, document: Any, design: Design = H100, name: str = "result.json") -> tuple[Reading, ...]:
    path = folder / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return readers.read([path], design)


# ---------------------------------------------------------------- vllm bench serve


def vllm(**changed: Any) -> dict[str, Any]:
    """One `vllm bench serve --save-result` file: 100 requests of 500 in, 101 out, 10 a second."""
    return {
        "date": "20260101-000000", "endpoint_type": "openai", "backend": "vllm", "label": None, "model_id": "meta-llama/Meta-Llama-3-8B",
        "tokenizer_id": "meta-llama/Meta-Llama-3-8B", "num_prompts": 100, "request_rate": 10.0, "burstiness": 1.0, "max_concurrency": None,
        "duration": 11.1, "completed": 100, "failed": 0, "total_input_tokens": 50_000, "total_output_tokens": 10_100,
        "request_throughput": 9.0, "output_throughput": 909.0, "total_token_throughput": 5405.0,
        "mean_ttft_ms": 50.0, "median_ttft_ms": 45.0, "std_ttft_ms": 10.0, "p99_ttft_ms": 90.0,
        "mean_tpot_ms": 10.0, "median_tpot_ms": 9.5, "std_tpot_ms": 1.0, "p99_tpot_ms": 14.0,
        "mean_itl_ms": 10.0, "median_itl_ms": 9.4, "std_itl_ms": 2.0, "p99_itl_ms": 30.0,
    } | changed  # fmt: skip


def test_a_vllm_result_is_read(tmp_path: Path) -> None:
    (reading,) = read(tmp_path, vllm())
    e = reading.experiment
    assert (reading.tool, reading.requests, reading.failed, reading.notes) == ("vllm bench serve", 100, 0, ())
    assert (e.model, e.device, e.engine, e.precision, e.tp) == ("llama-3-8b", "H100-SXM", "vllm", "fp8", 2)
    assert (e.rate_per_s, e.concurrency, e.arrivals) == (10.0, None, "poisson")
    assert (e.prompt_tokens.mean, e.output_tokens.mean) == (500, 101)
    assert e.measured["ttft_mean_s"] == pytest.approx(0.050)
    assert e.measured["tpot_p50_s"] == pytest.approx(0.0095)
    assert e.measured["itl_p99_s"] == pytest.approx(0.030)


def test_a_vllm_result_with_details_is_read_request_by_request(tmp_path: Path) -> None:
    """Two requests: 10 in, 3 out after 0.1 s then 2 x 0.02 s; 30 in, 2 out after 0.3 s then 0.04 s; a third failed."""
    details = {
        "input_lens": [10, 30, 20], "output_lens": [3, 2, 0], "ttfts": [0.1, 0.3, 0.0], "itls": [[0.02, 0.02], [0.04], []],
        "errors": ["", "", "refused"], "generated_texts": ["a", "b", ""], "completed": 200, "failed": 1,
    }  # fmt: skip
    (reading,) = read(tmp_path, vllm(**details))
    measured = reading.experiment.measured
    assert measured["ttft_mean_s"] == pytest.approx(0.2)
    assert measured["tpot_mean_s"] == pytest.approx(0.03)
    assert measured["e2e_mean_s"] == pytest.approx((0.14 + 0.34) / 2)
    assert "itl_p99_s" not in measured  # three gaps have no 99th percentile
    assert reading.experiment.prompt_tokens.mean == 20
    assert reading.experiment.prompt_tokens.cv == pytest.approx(0.5)


def test_a_closed_loop_of_vllm_has_a_concurrency_and_no_rate(tmp_path: Path) -> None:
    (reading,) = read(tmp_path, vllm(request_rate="inf", max_concurrency=8))
    assert (reading.experiment.rate_per_s, reading.experiment.concurrency) == (None, 8)


def test_a_rate_above_what_the_cap_lets_through_is_a_closed_loop(tmp_path: Path) -> None:
    """9 requests a second, each 0.05 + 100 x 0.01 s long: 9.5 in flight on average; with a cap of 10 that cap is the load."""
    (reading,) = read(tmp_path, vllm(max_concurrency=10))
    assert (reading.experiment.rate_per_s, reading.experiment.concurrency) == (None, 10)
    assert "cap" in reading.notes[0]


@pytest.mark.parametrize("rate", ["inf", float("inf")])
@pytest.mark.parametrize("cap", [None, 500])
def test_requests_sent_all_at_once_are_a_closed_loop_of_as_many_users(tmp_path: Path, rate: object, cap: int | None) -> None:
    """Without a rate vLLM sends all 100 at once, which a cap above 100 does not change: 100 users, each asking once."""
    (reading,) = read(tmp_path, vllm(request_rate=rate, max_concurrency=cap))
    e = reading.experiment
    assert (e.rate_per_s, e.concurrency, e.requests) == (None, 100, 100)
    assert e.measured["ttft_mean_s"] == pytest.approx(0.050)


def test_a_lone_wave_is_a_ramp_of_first_tokens() -> None:
    """Ten prompts of a whole step each, all there at once: they wait for 1, 2, … 10 steps, 5.5 on average."""
    found = mix.closed(10, Lengths(mean=1000), Lengths(mean=50), max_step_tokens=1000, seats=10, prefill_first=True, requests=10)
    assert found.first.sum() == pytest.approx(5.5)


def test_what_the_file_says_of_drafted_tokens_is_kept(tmp_path: Path) -> None:
    """The fields of vLLM are there only where it speculates; sglang's `accept_length` is null or 1 where it does not."""
    said = [
        ({}, None), ({"spec_decode_acceptance_length": 2.5}, "drafts"), ({"accept_length": 3.1}, "drafts"),
        ({"accept_length": None}, None), ({"accept_length": 1.0}, None),
    ]  # fmt: skip
    for fields, expected in said:
        (reading,) = read(tmp_path, vllm(**fields))
        assert reading.experiment.speculative == expected


def test_metadata_names_the_system_and_options_win_over_it(tmp_path: Path) -> None:
    """`vllm bench serve --metadata tensor_parallel_size=4 gpu=H200` writes texts."""
    said = vllm(tensor_parallel_size="4", pp="2", gpu="H200")
    (reading,) = read(tmp_path, said, Design())
    assert (reading.experiment.tp, reading.experiment.pp, reading.experiment.device) == (4, 2, "H200-SXM")
    (reading,) = read(tmp_path, said)
    assert (reading.experiment.tp, reading.experiment.device) == (2, "H100-SXM")


def test_gaps_between_chunks_are_no_token_gaps(tmp_path: Path) -> None:
    """With two tokens a chunk the tool's inter-token latency is twice the time per token."""
    (reading,) = read(tmp_path, vllm(mean_itl_ms=20.0))
    assert not any(name.startswith("itl") for name in reading.experiment.measured)
    assert "2.00 of the time per token" in reading.notes[0]


def test_burstiness_is_the_shape_of_gamma_gaps(tmp_path: Path) -> None:
    (reading,) = read(tmp_path, vllm(burstiness=0.25))
    assert reading.experiment.arrivals == "gamma:2"


def test_a_burstiness_without_end_is_a_metronome(tmp_path: Path) -> None:
    """It is written as Infinity, which JSON does not know and Python reads."""
    (reading,) = read(tmp_path, vllm(burstiness=float("inf")))
    assert reading.experiment.arrivals == "constant"


@pytest.mark.parametrize(
    ("load", "told"),
    [
        ({"ramp_up_strategy": "linear", "ramp_up_start_rps": 1, "ramp_up_end_rps": 20}, "its rate rose from 1 to 20/s"),
        ({"max_concurrent_requests": 12}, "at most 12 of 100 requests were in flight"),
        ({"request_rate": "trace"}, "followed the times of a trace"),
    ],
)
def test_a_rate_of_inf_is_no_closed_loop_where_requests_had_times_of_their_own(tmp_path: Path, load: dict[str, Any], told: str) -> None:
    """A ramp, a timed trace: read as 100 users at once, answers in 1 s would be those of a hundredfold load."""
    (reading,) = read(tmp_path, vllm(request_rate="inf") | load)
    e = reading.experiment
    assert (e.rate_per_s, e.concurrency, e.measured) == (None, None, {})
    (note,) = reading.notes
    assert told in note
    assert note.endswith("no one load stands for it; its latencies are left out")


def test_a_peak_of_all_is_a_closed_loop_of_all(tmp_path: Path) -> None:
    (reading,) = read(tmp_path, vllm(request_rate="inf", max_concurrent_requests=100))
    assert (reading.experiment.concurrency, reading.notes) == (100, ())
    assert reading.experiment.measured


def test_a_test_that_fell_behind_keeps_no_latency(tmp_path: Path) -> None:
    """100 requests at 10/s take 10 s and one answer; 40 s mean that the queue grew to the end."""
    (reading,) = read(tmp_path, vllm(duration=40.0))
    assert reading.experiment.measured == {}
    assert "2.5/s were answered of 10/s sent" in reading.notes[0]


def test_a_test_with_failures_keeps_no_latency(tmp_path: Path) -> None:
    (reading,) = read(tmp_path, vllm(completed=80, failed=20))
    assert reading.experiment.measured == {}
    assert "20 % of its requests failed" in reading.notes[0]


def test_sglangs_server_says_its_model_and_layout_and_options_win_over_it(tmp_path: Path) -> None:
    """Without, eight GPUs were read as one."""
    info = {"model_path": "meta-llama/Meta-Llama-3-8B", "tp_size": 8, "pp_size": 1, "ep_size": 1}
    said = vllm(model_id=None, backend="sglang", server_info=info)
    (reading,) = read(tmp_path, said, Design(device="H100"))
    assert (reading.experiment.model, reading.experiment.tp) == ("llama-3-8b", 8)
    assert read(tmp_path, said)[0].experiment.tp == 2


def test_what_sglang_does_not_count_as_failed_is_counted_from_its_details(tmp_path: Path) -> None:
    """Three requests sent, two answered, and neither `failed` nor `num_prompts` in the file."""
    details = {
        "backend": "sglang", "input_lens": [10, 30, 20], "output_lens": [3, 2, 0], "ttfts": [0.1, 0.3, 0.0],
        "itls": [[0.02, 0.02], [0.04], []], "completed": 2,
    }  # fmt: skip
    (reading,) = read(tmp_path, {k: v for k, v in vllm(**details).items() if k not in ("failed", "num_prompts")})
    assert (reading.requests, reading.failed) == (2, 1)
    assert "33 % of its requests failed" in reading.notes[0]


def test_sglang_appends_a_line_per_run(tmp_path: Path) -> None:
    common = {"backend": "sglang", "mean_e2e_latency_ms": 1060.0, "median_e2e_latency_ms": 1000.0, "model_id": None}
    lines = [vllm(**common, request_rate=rate, duration=100 / rate + 1) for rate in (5.0, 10.0)]
    text = "\n".join(json.dumps(line) for line in lines)
    found = read(tmp_path, text, Design(model="llama-3-8b", device="H100"), "result.jsonl")
    assert [r.experiment.rate_per_s for r in found] == [5.0, 10.0]
    assert {r.experiment.engine for r in found} == {"sglang"}
    assert found[0].experiment.measured["e2e_mean_s"] == pytest.approx(1.06)
    assert len({r.experiment.key for r in found}) == 2


# ---------------------------------------------------------------- AIPerf and GenAI-Perf


def aiperf(**changed: Any) -> dict[str, Any]:
    def stats(avg: float, unit: str = "ms", **more: float) -> dict[str, Any]:
        return {"unit": unit, "avg": avg, "p50": avg, "p90": 1.5 * avg, "p95": 1.6 * avg, "p99": 2 * avg, "std": 0.0} | more

    return {
        "schema_version": "1.4", "aiperf_version": "0.13.0",
        "request_throughput": {"unit": "requests/sec", "avg": 4.0}, "request_count": {"unit": "requests", "avg": 400.0},
        "request_latency": stats(1000.0), "time_to_first_token": stats(80.0), "inter_token_latency": stats(9.2),
        "output_sequence_length": stats(101.0, "tokens", std=20.2, max=180), "input_sequence_length": stats(512.0, "tokens"),
        "input_config": {
            "models": {"items": [{"name": "meta-llama/Meta-Llama-3-8B"}]},
            "phases": [
                {"name": "warmup", "type": "concurrency", "concurrency": 1},
                {"name": "profiling", "type": "concurrency", "concurrency": 4},
            ],
        },
        "telemetry_data": {"endpoints": {"localhost:9401": {"gpus": {"gpu_0": {"gpu_name": "NVIDIA H100 80GB HBM3", "gpu_index": 0}}}}},
    } | changed  # fmt: skip


def test_an_aiperf_export_is_read_and_names_its_gpu(tmp_path: Path) -> None:
    (reading,) = read(tmp_path, aiperf(), Design())
    e = reading.experiment
    assert (reading.tool, reading.requests, e.model, e.device, e.concurrency) == ("AIPerf", 400, "llama-3-8b", "H100-SXM", 4)
    assert (e.output_tokens.dist, e.output_tokens.max) == ("lognormal", 180)
    assert e.output_tokens.cv == pytest.approx(0.2)
    assert e.prompt_tokens.dist == "constant"
    assert e.measured["tpot_mean_s"] == pytest.approx(0.0092)  # what it calls inter-token latency is one value a request
    assert e.measured["e2e_p99_s"] == pytest.approx(2.0)


@pytest.mark.parametrize(("server", "tpot_s", "told"), [(61.0, 0.0092 * 100 / 60, True), (100.0, 0.0092, False)])
def test_tokens_are_those_that_the_server_counted_not_those_of_aiperfs_tokenizer(
    tmp_path: Path, server: float, tpot_s: float, told: bool
) -> None:
    """Its tokenizer finds 101 tokens in an answer; of 61, the same 0.92 s after the first are 15.3 ms each.  A prompt has its template."""
    counted = {"usage_completion_tokens": {"unit": "tokens", "avg": server}, "usage_prompt_tokens": {"unit": "tokens", "avg": 530.0}}
    (reading,) = read(tmp_path, aiperf(**counted), Design())
    e = reading.experiment
    assert (e.output_tokens.mean, e.prompt_tokens.mean) == (server, 530.0)
    assert e.measured["tpot_mean_s"] == pytest.approx(tpot_s)
    assert e.measured["e2e_mean_s"] == pytest.approx(1.0)
    assert any("counts 101 tokens an answer, the server 61" in note for note in reading.notes) is told


@pytest.mark.parametrize(
    ("config", "rate", "arrivals", "concurrency"),
    [
        ({"phases": [{"name": "profiling", "type": "gamma", "rate": 4.0, "smoothness": 4.0}]}, 4.0, "gamma:0.5", None),
        ({"phases": [{"name": "profiling", "type": "constant", "rate": 4.0, "concurrency": 100}]}, 4.0, "constant", None),
        ({"loadgen": {"request_rate": 4.0, "request_rate_mode": "poisson"}}, 4.0, "poisson", None),
        ({"loadgen": {"concurrency": 16}}, None, "poisson", 16),
        ({"perf_analyzer": {"stimulus": {"concurrency": 2}}}, None, "poisson", 2),
    ],
)
def test_the_load_of_every_generation_of_aiperf(
    tmp_path: Path, config: dict[str, Any], rate: float | None, arrivals: str, concurrency: int | None
) -> None:
    (reading,) = read(tmp_path, aiperf(input_config=config), Design(model="llama-3-8b"))
    e = reading.experiment
    assert (e.rate_per_s, e.arrivals, e.concurrency) == (rate, arrivals, concurrency)


def test_a_rate_of_aiperf_above_what_its_cap_lets_through_is_a_closed_loop(tmp_path: Path) -> None:
    """4 requests a second of 1 s each: four in flight.  With a cap of four that is the load, not the 100/s asked for."""
    both = {"loadgen": {"concurrency": 4, "request_rate": 100.0}}
    (reading,) = read(tmp_path, aiperf(input_config=both), Design(model="llama-3-8b"))
    assert (reading.experiment.rate_per_s, reading.experiment.concurrency) == (None, 4)
    assert "the cap, not 100/s, was the load" in reading.notes[0]
    assert reading.experiment.measured["tpot_mean_s"] == pytest.approx(0.0092)


def test_a_run_of_no_known_load_keeps_no_latency(tmp_path: Path) -> None:
    """It was read as an open loop at rate 0, which is batch 1."""
    (aiperf_run,) = read(tmp_path, aiperf(input_config={}), Design(model="llama-3-8b"))
    (throughput,) = read(tmp_path, {"benchmarks": [guidellm({"type_": "throughput", "max_concurrency": None})]})
    (capped,) = read(tmp_path, {"benchmarks": [guidellm({"type_": "throughput", "max_concurrency": 64})]})
    for reading in (aiperf_run, throughput):
        assert reading.experiment.measured == {}
        assert "does not say under which load" in reading.notes[0]
    assert (capped.experiment.concurrency, capped.notes) == (64, ())
    assert capped.experiment.measured


@pytest.mark.parametrize(
    ("phases", "told"),
    [
        ([{"name": "profiling", "type": "fixed_schedule", "concurrency": 64}], "followed the times of a trace"),
        ([{"name": "profiling", "type": "poisson", "rate_series": {"points": [[0, 1], [60, 9]]}, "concurrency": 64}], "changed on the way"),
        ([{"name": n, "kind": "profiling", "type": "constant", "rate": r} for n, r in (("low", 1.0), ("high", 9.0))], "2 phases"),
    ],
)
def test_a_cap_of_aiperf_is_no_load_where_a_trace_or_a_course_was(tmp_path: Path, phases: list[dict[str, Any]], told: str) -> None:
    """A trace replayed with at most 64 in flight was read as a closed loop of 64 users; of two phases one was taken for both."""
    warmup = {"name": "warmup", "type": "concurrency", "concurrency": 1}
    (reading,) = read(tmp_path, aiperf(input_config={"phases": [warmup, *phases]}), LLAMA)
    e = reading.experiment
    assert (e.rate_per_s, e.concurrency, e.measured) == (None, None, {})
    assert told in reading.notes[0]


def test_genai_perf_does_not_count_its_requests(tmp_path: Path) -> None:
    export = aiperf()
    del export["request_count"]
    (reading,) = read(tmp_path, export, Design())
    assert reading.experiment.measured["ttft_mean_s"] == pytest.approx(0.080)


def test_an_aiperf_table_is_read_like_its_json(tmp_path: Path) -> None:
    table = "\n".join(
        [
            "Metric,avg,min,max,p50,p90,p95,p99,std",
            "Time to First Token (ms),80.0,70,90,80.0,120.0,128.0,160.0,5",
            "Request Latency (ms),1000.00,900,1100,1000.0,1500.0,1600.0,2000.0,50",
            "Inter Token Latency (ms),9.2,9,10,9.2,13.8,14.72,18.4,0.1",
            "Output Sequence Length (tokens),101.0,80,180,101,150,160,180,20.2",
            "Input Sequence Length (tokens),512.0,512,512,512,512,512,512,0",
            "",
            "Metric,Value",
            "Request Throughput (requests/sec),4.0",
            "Request Count,400",
        ]
    )
    (reading,) = read(tmp_path, table, Design(model="llama-3-8b", device="H100"), "profile_export_aiperf.csv")
    (twin,) = read(tmp_path, aiperf(input_config={}), Design(model="llama-3-8b", device="H100"))
    assert reading.experiment.measured == twin.experiment.measured == {}  # a table does not say the load
    assert reading.requests == 400
    document = aiperf_reader.from_csv(table)
    assert document is not None
    (run,), (other,) = aiperf_reader.runs(document, ""), aiperf_reader.runs(aiperf(), "")
    assert run.measured == pytest.approx(other.measured)


def test_an_aiperf_run_that_broke_off_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not complete: watchdog"):
        read(tmp_path, aiperf(is_complete=False, incomplete_reason="watchdog"), Design())


# ---------------------------------------------------------------- guidellm


def guidellm(strategy: dict[str, Any], **changed: Any) -> dict[str, Any]:
    def stats(mean: float, sd: float = 0.0) -> dict[str, Any]:
        found = {"mean": mean, "median": mean, "std_dev": sd, "max": 1.5 * mean, "count": 50}
        return {
            "successful": found
            | {"percentiles": {"p50": mean, "p90": 1.1 * mean, "p95": 1.2 * mean, "p99": 1.3 * mean, "p999": 1.4 * mean}}
        }

    return {
        "type_": "generative_benchmark",
        "config": {"strategy": strategy, "backend": {"target": "http://x", "model": "meta-llama/Meta-Llama-3-8B"}},
        "duration": 30.0,
        "metrics": {
            "request_totals": {"successful": 50, "incomplete": 2, "errored": 0, "total": 52},
            "request_latency": stats(1.0), "time_to_first_token_ms": stats(100.0), "inter_token_latency_ms": stats(9.0),
            "time_per_output_token_ms": stats(9.9), "prompt_token_count": stats(256.0), "output_token_count": stats(101.0, 50.5),
        },
    } | changed  # fmt: skip


def test_a_guidellm_sweep_gives_one_level_a_strategy(tmp_path: Path) -> None:
    strategies: list[dict[str, Any]] = [
        {"type_": "synchronous"}, {"type_": "concurrent", "streams": 8},
        {"type_": "constant", "rate": 2.0}, {"type_": "poisson", "rate": 2.0},
    ]  # fmt: skip
    found = read(tmp_path, {"metadata": {"guidellm_version": "0.5.3"}, "benchmarks": [guidellm(s) for s in strategies]})
    assert [(r.experiment.concurrency, r.experiment.rate_per_s, r.experiment.arrivals) for r in found] == [
        (1, None, "poisson"), (8, None, "poisson"), (None, 2.0, "constant"), (None, 2.0, "poisson"),
    ]  # fmt: skip
    assert {r.experiment.group for r in found} == {str(tmp_path / "result.json")}


def test_guidellms_time_per_output_token_is_not_ours(tmp_path: Path) -> None:
    """It divides the whole latency by all tokens; what it calls inter-token latency leaves the first one out."""
    (reading,) = read(tmp_path, {"benchmarks": [guidellm({"type_": "synchronous"})]})
    assert reading.experiment.measured["tpot_mean_s"] == pytest.approx(0.009)
    assert reading.experiment.output_tokens.cv == pytest.approx(0.5)


def test_tokens_that_nobody_counted_are_not_one_token(tmp_path: Path) -> None:
    """A 0 stands in guidellm's file where the server says no usage and it has no tokenizer; inference-perf could leave lengths out."""
    uncounted = guidellm({"type_": "synchronous"})
    uncounted["metrics"]["prompt_token_count"]["successful"]["mean"] = 0.0
    with pytest.raises(BadInput, match="prompt_token_count is 0 or missing: nobody counted tokens"):
        read(tmp_path, {"benchmarks": [uncounted]})
    nameless = inference_perf()
    del nameless["successes"]["prompt_len"]
    with pytest.raises(BadInput, match="neither prompt_tokens nor prompt_len"):
        read(tmp_path, nameless, LLAMA)


def test_an_older_guidellm_keeps_its_strategy_elsewhere(tmp_path: Path) -> None:
    old = guidellm({}, config={}, args={"strategy": {"type_": "concurrent", "streams": 3}}, worker={"backend_model": "llama-3-8b"})
    (reading,) = read(tmp_path, {"benchmarks": [old]})
    assert (reading.experiment.concurrency, reading.experiment.model) == (3, "llama-3-8b")


def test_an_unknown_strategy_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'trace'; known: synchronous"):
        read(tmp_path, {"benchmarks": [guidellm({"type_": "trace"})]})


# ---------------------------------------------------------------- inference-perf


def inference_perf(**load: Any) -> dict[str, Any]:
    def stats(mean: float) -> dict[str, float]:
        return {"mean": mean, "min": mean, "p10": 0.9 * mean, "median": mean, "p90": 1.1 * mean, "p99": 1.3 * mean, "max": 1.4 * mean}

    return {
        "load_summary": {
            "count": 300, "schedule_delay": stats(0.0005), "send_duration": 60.0, "requested_rate": 5.0, "achieved_rate": 5.0,
        } | load,
        "successes": {
            "count": 300,
            "latency": {
                "request_latency": stats(1.1), "time_to_first_token": stats(0.1), "time_per_output_token": stats(0.005),
                "inter_token_latency": stats(0.005), "normalized_time_per_output_token": stats(0.011),
            },
            "throughput": {"requests_per_sec": 4.9, "output_tokens_per_sec": 495.0},
            "prompt_len": stats(1000.0), "output_len": {"mean": 101.0},
        },
        "failures": {"count": 0, "request_latency": None, "prompt_len": None},
    }  # fmt: skip


def test_the_time_per_token_of_inference_perf_is_implied_not_believed(tmp_path: Path) -> None:
    """Its own figures are per chunk: 5 ms where (1.1 - 0.1) s / 100 tokens are 10 ms."""
    (reading,) = read(tmp_path, inference_perf(), Design(model="llama-3-8b", device="H100"))
    measured = reading.experiment.measured
    assert measured["tpot_mean_s"] == pytest.approx(0.010)
    assert "tpot_p50_s" not in measured
    assert "itl_mean_s" not in measured
    assert measured["ttft_p50_s"] == pytest.approx(0.1)
    assert reading.experiment.prompt_tokens.cv == pytest.approx(0.2 / 2.563, rel=1e-3)


def test_inference_perf_counts_tokens_under_two_names(tmp_path: Path) -> None:
    """0.7 calls them `prompt_tokens`, and gives the server's own count of the output beside its tokenizer's: prompts had one token."""
    document = inference_perf()
    done = document["successes"]
    done["prompt_tokens"] = done.pop("prompt_len") | {"total": 300_000.0, "cached": 0.0, "uncached": 300_000.0}
    done["output_tokens"] = {"total": 60_300.0, "mean": 201.0}
    (reading,) = read(tmp_path, document, LLAMA)
    e = reading.experiment
    assert (e.prompt_tokens.mean, e.output_tokens.mean) == (1000, 201)
    assert e.prompt_tokens.cv == pytest.approx(0.2 / 2.563, rel=1e-3)
    assert e.measured["tpot_mean_s"] == pytest.approx(1.0 / 200)
    assert e.measured["tpot_p50_s"] == pytest.approx(0.005)  # its own is per token, too


def test_a_client_that_was_late_sent_another_rate(tmp_path: Path) -> None:
    late = inference_perf(schedule_delay={"mean": 20.0}, achieved_rate=2.5)
    (reading,) = read(tmp_path, late, Design(model="llama-3-8b", device="H100"))
    assert reading.experiment.rate_per_s == 2.5
    assert "20 s late" in reading.notes[0]


def test_a_summary_over_stages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="stage_N_lifecycle_metrics"):
        read(tmp_path, inference_perf(requested_rate=None))


# ---------------------------------------------------------------- trtllm-bench


def trtllm(**changed: Any) -> dict[str, Any]:
    def ms(p50: float) -> dict[str, float]:
        return {
            "minimum": 0.5 * p50,
            "average": 1.1 * p50,
            "p50": p50,
            "p90": 1.2 * p50,
            "p95": 1.3 * p50,
            "p99": 1.4 * p50,
            "maximum": 2 * p50,
        }

    return {
        "engine": {"model": "meta-llama/Meta-Llama-3-8B", "model_path": "None", "version": "1.2.0", "backend": "Pytorch",
                   "dtype": "bfloat16", "kv_cache_dtype": "FP8", "quantization": "FP8"},
        "machine": {"name": "NVIDIA H100 80GB HBM3", "memory.total": 79.1, "clocks.mem": 2.6},
        "world_info": {"tp_size": 2, "pp_size": 1, "ep_size": 1, "world_size": 2, "max_batch_size": 64, "max_num_tokens": 4096,
                       "scheduling_policy": "GUARANTEED_NO_EVICT", "kv_cache_percentage": 0.9, "issue_rate": 1e6},
        "request_info": {"num_requests": 512, "avg_num_concurrent_requests": 31.8, "avg_input_length": 1024.0, "avg_output_length": 128.0},
        "performance": {"total_latency_ms": 30000.0, "request_throughput_req_s": 17.0, "request_latency_percentiles_ms": ms(1800.0)},
        "streaming_metrics": {"ttft_percentiles": ms(120.0), "tpot_percentiles": ms(13.0), "avg_tpot_ms": 14.3},
        "dataset": {"isl": {}},
    } | changed  # fmt: skip


def test_a_trtllm_report_says_everything_itself(tmp_path: Path) -> None:
    (reading,) = read(tmp_path, trtllm(), Design())
    e = reading.experiment
    assert (e.model, e.device, e.engine, e.engine_version, e.precision) == ("llama-3-8b", "H100-SXM", "trtllm", "1.2.0", "fp8")
    assert (e.tp, e.max_seqs, e.max_step_tokens, e.concurrency) == (2, 64, 4096, 32)
    assert e.measured["tpot_p50_s"] == pytest.approx(0.013)
    assert e.measured["e2e_mean_s"] == pytest.approx(1.98)


def test_a_trtllm_report_without_streaming_says_what_is_missing(tmp_path: Path) -> None:
    report = trtllm()
    del report["streaming_metrics"]
    (reading,) = read(tmp_path, report, Design())
    assert set(reading.experiment.measured) == {f"e2e_{stat}_s" for stat in ("mean", "p50", "p90", "p95", "p99")}
    assert "no TTFT" in reading.notes[0]


# ---------------------------------------------------------------- our own, and what is none


def load_test(folder: Path, arrivals: str = "closed loop, 4 users", gap_s: float = 0.01) -> Path:
    rows = tuple(
        RequestRecord(
            index=i, scheduled_s=0.5 * i, sent_s=0.5 * i, token_s=tuple(0.5 * i + 0.1 + gap_s * k for k in range(11)),
            tokens_per_event=(1,) * 11, done_s=0.5 * i + 0.1 + 10 * gap_s, prompt_tokens=64, output_tokens=11, outcome="ok",
        )
        for i in range(60)
    )  # fmt: skip
    closed = arrivals.startswith("closed")
    found = summary.summarise(
        rows, source="loadtest", target="http://x (nano)", arrivals=arrivals, offered_rate_per_s=None if closed else 2.0, slo=None,
        validity=Validity(verdict="valid"), window=None, requests_file="load.parquet",
    )  # fmt: skip
    machine = hardware.machine()
    record.write(folder / "load.parquet", Requests(t0_unix_s=0.0, requests=rows), machine)
    return record.write(folder / "load.json", found, machine)


def test_a_load_test_of_ours_is_read_with_its_lengths(tmp_path: Path) -> None:
    (reading,) = readers.read([load_test(tmp_path)], Design(model="nano", device="cpu", precision="fp32"))
    e = reading.experiment
    assert (reading.tool, e.concurrency, e.rate_per_s, e.device) == ("mlsys loadtest", 4, None, "cpu")
    assert (e.prompt_tokens.mean, e.output_tokens.mean) == (64, 11)
    assert e.measured["tpot_mean_s"] == pytest.approx(0.01)
    assert e.measured["e2e_p50_s"] == pytest.approx(0.2)


def test_a_load_test_without_its_requests_is_refused(tmp_path: Path) -> None:
    path = load_test(tmp_path)
    (tmp_path / "load.parquet").unlink()
    with pytest.raises(BadInput, match=r"load\.parquet is not beside it"):
        readers.read([path], Design(model="nano", device="cpu"))


@pytest.mark.parametrize(
    ("document", "design", "message"),
    [
        ({"hello": 1}, H100, "no result of a tool known here .*guidellm"),
        ("neither JSON\nnor a table", H100, "no JSON, JSON lines or AIPerf table"),
        (vllm(model_id=None), H100, "which model was served; give --model"),
        (vllm(), Design(), "on which GPU; give --gpu"),
        (vllm(model_id="who/knows"), H100, "unknown model"),
        (vllm(total_input_tokens="many"), H100, "looks like vllm bench serve but cannot be read"),
        ({"benchmarks": [guidellm({"type_": "concurrent"})]}, H100, "looks like guidellm but cannot be read: KeyError"),
        (aiperf(time_to_first_token={"unit": "parsec", "avg": 1.0}), Design(), "unit 'parsec'; known: ns"),
        (vllm(completed=0, total_input_tokens=0, total_output_tokens=0), H100, "no request was answered in it"),
        (inference_perf() | {"successes": inference_perf()["successes"] | {"count": 0}}, H100, "no request was answered in it"),
        (trtllm() | {"request_info": trtllm()["request_info"] | {"num_requests": 0}}, H100, "no request was answered in it"),
        (vllm(completed=-1), H100, "-1 requests answered and 0 failed"),
        (vllm(completed="100"), H100, "completed is '100', no whole number"),
        (vllm(total_output_tokens=0), H100, ": 0 output tokens; a run has more than 0"),
        (vllm(total_input_tokens=10**15), H100, r": 1e\+13 prompt tokens; a run has .* at most 10,000,000"),
        (vllm(mean_tpot_ms=1e9), H100, "tpot_mean is 278 h; no time is below 0, and none here above a day"),
        (vllm(mean_ttft_ms=-5), H100, "ttft_mean is -5.00 ms; no time"),
        (vllm(request_rate="inf", max_concurrency=-3), H100, "the cap is -3 requests in flight"),
        (vllm(request_rate=0), H100, "the rate is 0/s"),
        (vllm(request_rate="fast"), H100, "request_rate is 'fast', no rate"),
        (vllm(tensor_parallel_size="4", tp="2"), H100, "tensor_parallel_size and tp_size and tp are 2 and 4"),
        (vllm(tp="0"), Design(device="H100"), "tp is 0; it must be a whole number of at least 1"),
        (aiperf(input_sequence_length={"unit": "tokens", "avg": -3}), Design(), ": -3 prompt tokens"),
        (aiperf(input_config={"phases": [5]}), Design(), "looks like AIPerf but cannot be read"),
        (inference_perf(requested_rate=0), H100, ": 0 requests per second"),
        (trtllm(world_info={"tp_size": "x"}), Design(), "tp is 'x'; it must be a whole number"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, document: Any, design: Design, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read(tmp_path, document, design)
