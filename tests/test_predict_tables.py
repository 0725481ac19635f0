"""Tables of measured serving runs read as experiments: what each column means, and what is said of rows that cannot be understood."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench.errors import BadInput
from mlsys_bench.predict import figures, tables
from mlsys_bench.predict.experiment import Experiment, Prediction
from mlsys_bench.predict.tables import blis, closed_loop, inferencex, layouts, mlperf, recipes
from mlsys_bench.predict.tables.mixture import mixed
from mlsys_bench.types import Provenance

DATA = Path(__file__).parents[2] / "shared" / "data" / "llm"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the measured tables are not beside this checkout")

BLIS = (
    "set,experiment,stage,model,gpu,tp,dp,precision,engine,max_num_batched_tokens,max_num_seqs,gpu_mem_util,workload,system_prompt_len,"
    "question_len,output_len,arrivals,multi_turn_shared_prefix,rate_rps,e2e_mean_ms,ttft_mean_ms\n"
)
BLIS_ROW = (
    "s,6-codegen,{stage},meta-llama/Llama-2-70b-hf,H100,4,1,FP16,vllm-0.15.1,2048,128,0.9,codegen,100,466,247,constant,11x4,{rate},{e2e},"
    "50\n"
)
CLOSED = (
    "model,system,backend,backend_version,precision,mode,isl,osl,tp,pp,attention_dp_size,moe_tp_size,moe_ep_size,concurrency,"
    "ttft_ms,tpot_ms\n"
)
INFERENCEX = (
    "gpu,framework,model,precision,spec,disagg,prefill_tp,prefill_ep,prefill_workers,decode_tp,decode_ep,decode_dpa,decode_workers,"
    "n_prefill_gpu,n_decode_gpu,isl,osl,conc,image,median_ttft_ms,median_tpot_ms\n"
)
MLPERF = "division,submitter,system,accelerator,acc_per_node,nodes,framework,model,scenario,samples_per_s,target_qps\n"


def table(tmp_path: Path, text: str) -> tables.Table:
    path = tmp_path / "table.csv"
    path.write_text(text)
    return tables.read(path)


def one(tmp_path: Path, text: str) -> Experiment:
    ((experiment, share),) = table(tmp_path, text).rows[0].parts
    assert share == 1.0
    return experiment


# ---------------------------------------------------------------- the file


def test_the_kind_of_a_table_is_told_by_its_header_without_any_result(tmp_path: Path) -> None:
    found = table(tmp_path, CLOSED.replace(",ttft_ms,tpot_ms", "") + "Qwen/Qwen3-32B,h100_sxm,vllm,0.12,,agg,1024,128,2,1,,1,1,8\n")
    assert found.format is closed_loop.FORMAT
    assert found.rows[0].measured == {}
    assert tables.calibration(found) == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        (CLOSED, "no rows"),
        ("a,b\n1,2\n", "line 1: these columns are of no table known here"),
        (CLOSED.replace("mode", "isl") + "x\n", "line 1: column 'isl' stands there twice"),
        (CLOSED.replace("mode", "provenance") + "x\n", "line 1: column provenance would be overwritten"),
        (CLOSED + "Qwen/Qwen3-32B,h100_sxm,vllm\n", "line 2: has 3 fields where the header has 16"),
        (CLOSED + "Qwen/Qwen3-32B,h100_sxm,vllm,,,agg,many,128,2,1,,1,1,8,,\n", "line 2, column isl: 'many' is no finite number"),
        (CLOSED + "Qwen/Qwen3-32B,h100_sxm,vllm,,,agg,1024,128,2.5,1,,1,1,8,,\n", "line 2, column tp: '2.5' is no whole number"),
        (CLOSED + "Qwen/Qwen3-32B,h100_sxm,vllm,,,agg,1024,128,2,1,,1,1,8,inf,\n", "line 2, column ttft_ms: 'inf'"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused_by_line_and_column(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(BadInput) as caught:
        table(tmp_path, text)
    assert says in str(caught.value)
    assert "table.csv: " in str(caught.value)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("Qwen/Qwen9-32B,h100_sxm,vllm,,,agg,1024,128,2,1,,1,1,8,,", "unknown model 'Qwen/Qwen9-32B'; did you mean"),
        ("Qwen/Qwen3-32B,h900_sxm,vllm,,,agg,1024,128,2,1,,1,1,8,,", "unknown GPU or CPU 'h900_sxm'; did you mean"),
        ("Qwen/Qwen3-32B,h100_sxm,vllm,,,agg,1024,128,2,1,,1,1,,,", "concurrency is empty"),
        ("deepseek-ai/DeepSeek-R1,b200_sxm,sglang,,fp8,agg,1024,128,3,1,1,1,8,8,,", "do not fit attention over 3"),
        ("Qwen/Qwen3-32B,h100_sxm,ollama,,,agg,1024,128,2,1,,1,1,8,,", "unknown engine 'ollama'"),
        ("Qwen/Qwen3-32B,h100_sxm,vllm,,auto,agg,1024,128,2,1,,1,1,8,,", "precision 'auto' is whatever the checkpoint holds; name"),
        ("Qwen/Qwen3-32B,h100_sxm,vllm,,gptq,agg,1024,128,2,1,,1,1,8,,", "precision 'gptq' does not say of how many bits; name"),
        ("Qwen/Qwen3-32B,8xH100,vllm,,,agg,1024,128,2,1,,1,1,8,,", "8xH100 are 8 GPUs, and the parallelism of the row takes 2"),
        ("Qwen/Qwen3-32B,h100_sxm,vllm,,,agg,1024,128,2,1,,1,1,nan,,", "concurrency is nan; it must be above 0"),
        ('Qwen/Qwen3-32B,h100_sxm,vllm,,,agg,"1,02",128,2,1,,1,1,8,,', "isl is '1,02'; write it with a decimal point and without commas"),
        ('Qwen/Qwen3-32B,h100_sxm,vllm,,,agg,1024,128,2,1,,1,1,8,"1,024",', "ttft_ms is '1,024'; write it with a decimal point"),
    ],
)
def test_a_row_that_cannot_be_understood_is_listed_with_its_reason_and_costs_no_other_row(tmp_path: Path, row: str, says: str) -> None:
    good = "Qwen/Qwen3-32B,h100_sxm,vllm,0.12,,agg,1024,128,2,1,,1,1,8,154,18\n"
    found = table(tmp_path, CLOSED + row + "\n" + good)
    assert says in (found.rows[0].problem or "")
    assert [len(r.parts) for r in found.rows] == [0, 1]
    assert tables.predicted(found, found.rows[0], {}) == {}


@pytest.mark.parametrize("nothing", ["N/A", "nan", "NaN", "-", "", "null"])
def test_a_result_that_says_there_is_none_is_an_empty_cell(tmp_path: Path, nothing: str) -> None:
    (row,) = table(tmp_path, CLOSED + f"Qwen/Qwen3-32B,h100_sxm,vllm,0.12,,agg,1024,128,2,1,{nothing},1,1,8,{nothing},18\n").rows
    assert row.measured == {"tpot_ms": 18}


def test_thousands_of_a_count_may_be_apart(tmp_path: Path) -> None:
    e = one(tmp_path, CLOSED + 'Qwen/Qwen3-32B,h100_sxm,vllm,0.12,,agg,"1,024,000",128,2,1,,1,1,"1,000",154,18\n')
    assert (e.prompt_tokens.mean, e.concurrency) == (1_024_000, 1000)


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [
        ("SGLang", "sglang"), ("sgl", "sglang"), ("mori-sglang", "sglang"), ("vLLM 0.17", "vllm"), ("vllm-0.15.1", "vllm"), ("", "vllm"),
        *((name, "trtllm") for name in ("TRTLLM", "TensorRT-LLM", "tensorrt_llm 1.0.0rc3", "trt", "TRT-LLM", "Dynamo-TRT")),
    ],
)  # fmt: skip
def test_an_engine_is_known_by_its_usual_spellings(tmp_path: Path, spelled: str, meant: str) -> None:
    assert one(tmp_path, CLOSED + f"Qwen/Qwen3-32B,h100_sxm,{spelled},0.12,,agg,1024,128,2,1,,1,1,8,154,18\n").engine == meant
    if spelled:
        run = f"b200,{spelled},dsr1,fp8,none,False,8,8,0,8,8,False,0,8,8,1024,1024,16,,100,10\n"
        assert one(tmp_path, INFERENCEX + run).engine == meant


def test_a_stage_of_blis_names_its_engine_and_version(tmp_path: Path) -> None:
    e = one(tmp_path, BLIS + BLIS_ROW.format(stage=0, rate=5, e2e=4000).replace("vllm-0.15.1", "TensorRT-LLM-1.0.0rc3"))
    assert (e.engine, e.engine_version) == ("trtllm", "1.0.0rc3")


SPELLED = (
    "bfloat16 bf16", "float16 fp16", "half fp16", "NVFP4 fp4", "mxfp4 fp4", "w4a16 int4", "awq int4", "FP8_E4M3 fp8", "fp8_block fp8",
    "int8_wo int8", "w4a8 w4a8",
)  # fmt: skip
CHECKPOINTS = {"Qwen/Qwen3-32B": "bf16", "Qwen/Qwen3-32B-FP8": "fp8", "deepseek-ai/DeepSeek-R1": "fp8", "openai/gpt-oss-120b": "fp4"}


@pytest.mark.parametrize(("model", "spelled", "meant"), [
    *(("Qwen/Qwen3-32B", *pair.split()) for pair in SPELLED), *((model, "", meant) for model, meant in CHECKPOINTS.items()),
])  # fmt: skip
def test_a_precision_is_known_as_spelled_and_none_is_the_checkpoints(tmp_path: Path, model: str, spelled: str, meant: str) -> None:
    assert one(tmp_path, CLOSED + f"{model},b200_sxm,vllm,0.12,{spelled},agg,1024,128,8,1,1,8,1,8,154,18\n").precision == meant


@pytest.mark.parametrize(("spelled", "meant"), [
    ("HGX B200", "B200-SXM"), ("AMD Instinct MI300X VF", "MI300X"), ("AMD_Instinct_MI300X_OAM", "MI300X"), ("2xH100", "H100-SXM"),
    ("H100 x 2", "H100-SXM"), ("H100x2", "H100-SXM"), ("MI300Xx2", "MI300X"), ("RTX 4090", "RTX-4090"),
])  # fmt: skip
def test_a_device_is_known_on_its_board_and_by_the_dozen(tmp_path: Path, spelled: str, meant: str) -> None:
    assert one(tmp_path, CLOSED + f"Qwen/Qwen3-8B,{spelled},vllm,0.12,,agg,1024,128,2,1,,1,1,8,154,18\n").device == meant


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ("0.154,0.018", "line 3: tpot_mean is 18.0 µs, and H100-SXM takes 9.55 ms at least to read the weights of qwen3-32b in bf16"),
        ("1e12,18", "line 3: ttft_mean is 277,778 h, and no run was that slow"),
    ],
)
def test_what_no_such_system_can_have_shown_is_not_learned_from(tmp_path: Path, times: str, says: str) -> None:
    """Seconds in columns of milliseconds: 64 GB without the embedding over two GPUs of 3.35 TB/s are 9.55 ms a token."""
    row = "Qwen/Qwen3-32B,h100_sxm,vllm,0.12,,agg,1024,128,2,1,,1,1,8,{}\n"
    found = table(tmp_path, CLOSED + row.format("154,18") + row.format(times))
    with pytest.raises(BadInput, match=says):
        tables.calibration(found)


# ---------------------------------------------------------------- open loop in stages


def test_a_stage_is_one_experiment_in_si_units(tmp_path: Path) -> None:
    e = one(tmp_path, BLIS + BLIS_ROW.format(stage=0, rate=5, e2e=4000))
    assert (e.model, e.device, e.tp, e.precision) == ("llama-2-70b", "H100-SXM", 4, "fp16")
    assert (e.prompt_tokens.mean, e.shared_prefix_tokens, e.output_tokens.mean, e.sessions) == (566, 100, 247, 44)
    assert (e.rate_per_s, e.arrivals, e.max_seqs, e.max_step_tokens) == (5, "constant", 128, 2048)
    assert e.measured == {"e2e_mean_s": 4.0, "ttft_mean_s": 0.05}


def test_a_summary_is_both_stages_weighted_by_their_rates(tmp_path: Path) -> None:
    found = table(tmp_path, BLIS + BLIS_ROW.format(stage="summary", rate="5+10", e2e=4500))
    parts = found.rows[0].parts
    assert [(e.rate_per_s, share) for e, share in parts] == [(5, pytest.approx(1 / 3)), (10, pytest.approx(2 / 3))]
    assert tables.calibration(found) == ()  # a mixture is no run at one rate


def test_a_row_over_two_stages_is_predicted_as_their_mixture(tmp_path: Path) -> None:
    found = table(tmp_path, BLIS + BLIS_ROW.format(stage="summary", rate="5+10", e2e=4500))
    points = {f"table:2@{rate}": {"e2e_mean_s": (s, s / 2, s * 2)} for rate, s in (("5", 3.0), ("10", 6.0))}
    predictions = {key: Prediction(key=key, figures=figures, provenance=Provenance.ROOFLINE) for key, figures in points.items()}
    said = tables.predicted(found, found.rows[0], predictions)
    assert said == {"e2e_mean_ms": (pytest.approx(5000), pytest.approx(2500), pytest.approx(10000))}


def test_weights_that_do_not_fit_their_gpus_are_not_predicted(tmp_path: Path) -> None:
    """70 billion parameters of 16 bit on one H100: its degree of parallelism is missing."""
    lines = [BLIS_ROW.format(stage=0, rate=6, e2e=4000).replace("H100,4,1", f"H100,{tp},1") for tp in (4, 2, 1, 0)]
    found = table(tmp_path, BLIS + "".join(lines))
    assert [len(row.parts) for row in found.rows] == [1, 1, 0, 0]
    assert found.rows[2].problem == found.rows[3].problem
    assert (found.rows[2].problem or "").startswith("138 GB of weights do not fit 1 x H100-SXM of 80.0 GB")


def test_what_is_measured_twice_is_learned_from_once(tmp_path: Path) -> None:
    """An experiment of one stage stands in the table twice, as its stage and as its summary."""
    rows = BLIS_ROW.format(stage=0, rate=6, e2e=4000) + BLIS_ROW.format(stage="summary", rate=6, e2e=4000)
    found = table(tmp_path, BLIS + rows)
    assert [e.key for e in tables.calibration(found)] == ["table:2"]


def test_an_overload_says_only_how_much_the_server_does(tmp_path: Path) -> None:
    head = "experiment,stage,model,gpu,tp,engine,max_num_batched_tokens,max_num_seqs,arrivals,requested_rate,n_ok,n_fail,e2e_mean_ms,"
    head += "tpot_implied_ms,prompt_len_mean,output_len_mean,requests_per_sec\n"
    row = "x-reasoning,stage_0,meta-llama/Llama-2-7b-hf,H100,1,vllm-0.15.1,2048,128,constant,4,732,{fail},160063,36.9,1082,1100,0.488\n"
    assert one(tmp_path, head + row.format(fail=4068)).measured == {"max_rate_per_s": 0.488}
    calm = one(tmp_path, head + row.format(fail=0))
    assert calm.measured == {"e2e_mean_s": pytest.approx(160.063), "tpot_mean_s": pytest.approx(0.0369)}
    assert (calm.prompt_tokens.mean, calm.output_tokens.mean) == (1082, 1100)  # as they came out


# ---------------------------------------------------------------- mixtures


@given(value=st.floats(0.01, 100), share=st.floats(0.01, 0.99), p90=st.floats(1, 3), p99=st.floats(1, 3))
def test_a_mixture_of_equal_stages_is_either_stage(value: float, share: float, p90: float, p99: float) -> None:
    stage = {
        "e2e_mean_s": (value, value, value),
        "e2e_p90_s": (value * p90, value * p90, value * p90),
        "e2e_p99_s": (value * p90 * p99, value * p90 * p99, value * p90 * p99),
    }
    found = mixed([(stage, share), (stage, 1 - share)])
    assert {name: figure[0] for name, figure in found.items()} == pytest.approx({name: figure[0] for name, figure in stage.items()})


def test_a_stage_whose_percentiles_are_alike_has_nobody_below_them() -> None:
    """Half of the requests take 1 s and half 2 s, whatever percentile one asks of either: nine tenths stay below 2 s and not below 1."""
    stages = [{f"e2e_{stat}_s": (x, 0.9 * x, 1.1 * x) for stat in ("mean", "p50", "p90", "p99")} for x in (1.0, 2.0)]
    found = mixed([(stages[0], 0.3), (stages[1], 0.7)])["e2e_p90_s"]
    assert found == pytest.approx((2.0, 1.8, 2.2), rel=1e-6)


def test_percentiles_of_a_mixture_by_hand() -> None:
    """Exponential laws of mean 1 and 10 in equal shares: the 90th percentile solves exp(-x) + exp(-x / 10) = 0.2."""

    def law(mean: float) -> dict[str, tuple[float, float, float]]:
        known = {"ttft_p50_s": np.log(2), "ttft_p90_s": np.log(10), "ttft_p99_s": np.log(100)}
        return {name: (mean * q, mean * q, mean * q) for name, q in known.items()}

    found = mixed([(law(1.0), 0.5), (law(10.0), 0.5)])["ttft_p90_s"][0]
    assert np.exp(-found) + np.exp(-found / 10) == pytest.approx(0.2, rel=1e-6)


@given(a=st.floats(0.1, 10), b=st.floats(0.1, 10), share=st.floats(0.05, 0.95))
def test_a_mixture_lies_between_its_stages(a: float, b: float, share: float) -> None:
    stages = [({"ttft_mean_s": (v, v, v), "ttft_p99_s": (3 * v, 3 * v, 3 * v)}, s) for v, s in ((a, share), (b, 1 - share))]
    for name, (value, _, _) in mixed(stages).items():
        ends = sorted(figures[name][0] for figures, _ in stages)
        assert ends[0] * (1 - 1e-9) <= value <= ends[1] * (1 + 1e-9)


# ---------------------------------------------------------------- parallelism


@pytest.mark.parametrize(
    ("tp", "attention_dp", "moe_tp", "ep", "gpus", "spread"),
    [
        (8, 1, 8, 1, 8, (8, 1, 8, 1)),
        (8, 1, 1, 8, 8, (8, 1, 1, 8)),
        (64, 1, 8, 8, 8, (8, 1, 1, 8)),  # the product of TP and EP, not GPUs
        (16, 1, 4, 4, 4, (4, 1, 1, 4)),
        (4, 1, 2, 2, 2, (2, 1, 1, 2)),
        (1, 64, 8, 8, 8, (1, 8, 1, 8)),
        (1, 4, 1, 4, 4, (1, 4, 1, 4)),
        (4, 4, 1, 16, 4, (1, 4, 1, 4)),  # vLLM with data-parallel attention
        (1, None, 2, 1, 2, (1, 2, 2, 1)),  # what makes both products equal
        (2, None, 4, 1, 4, (2, 2, 4, 1)),
        (1, 1, 1, 1, 1, (1, 1, 1, 1)),
    ],
)
def test_products_in_the_parallelism_columns_are_undone(
    tp: int, attention_dp: int | None, moe_tp: int, ep: int, gpus: int, spread: tuple[int, int, int, int]
) -> None:
    found = layouts.experts(tp, attention_dp, moe_tp, ep)
    assert (found.tp, found.attention_dp, found.moe_tp, found.ep) == spread
    assert found.tp * found.attention_dp == found.moe_tp * found.ep == gpus


@given(gpus=st.sampled_from([20, 28, 36, 40, 52, 72]), concurrency=st.integers(1, 5000))
def test_an_assumed_split_uses_every_gpu(gpus: int, concurrency: int) -> None:
    assert layouts.is_disaggregated_total(gpus, gpus)
    split = layouts.assumed_split(gpus, concurrency)
    worker = split.worker.tp * split.worker.attention_dp
    assert split.prefill_gpus + split.decode_gpus == gpus
    assert split.replicas * worker == split.decode_gpus
    assert split.prefill_gpus >= layouts.PREFILL


def test_a_disaggregated_system_counted_as_one_is_divided_and_says_so(tmp_path: Path) -> None:
    found = table(tmp_path, CLOSED + "deepseek-ai/DeepSeek-R1,gb200,trtllm,,fp4,agg,1024,1024,36,1,1,36,1,1075,1823,17.9\n")
    ((e, _),) = found.rows[0].parts
    assert (e.disaggregated, e.prefill_gpus, e.decode_gpus, e.gpus) == (True, 4, 32, 36)
    assert "assumed" in found.rows[0].notes[0]


def test_a_dense_model_has_no_experts_to_spread(tmp_path: Path) -> None:
    e = one(tmp_path, CLOSED + "meta-llama/Llama-3.1-70B,h200_sxm,vllm,0.1,fp8,agg,1024,1024,4,1,1,4,1,16,90,9\n")
    assert (e.tp, e.moe_tp, e.ep, e.gpus) == (4, 1, 1, 4)


# ---------------------------------------------------------------- closed loop


def test_lengths_are_drawn_where_the_client_drew_them(tmp_path: Path) -> None:
    """Evenly between 0.8 and 1.0 of the nominal length: mean 0.9, and the spread of 100,000 draws."""
    e = one(tmp_path, CLOSED + "meta-llama/Llama-3.1-70B,h200_sxm,vllm,0.1,fp8,agg,8192,1024,4,1,1,4,1,16,90,9\n")
    draws = np.random.default_rng(1).uniform(0.8 * 8192, 8192, 100_000)
    assert e.prompt_tokens.mean == pytest.approx(draws.mean(), rel=4 * 0.065 / 100_000**0.5)
    assert e.prompt_tokens.cv == pytest.approx(draws.std() / draws.mean(), rel=0.01)
    assert e.requests == 160
    fixed = one(tmp_path, CLOSED + "Qwen/Qwen3-32B,h100_sxm,vllm,0.12,,agg,1024,128,2,1,,1,1,8,154,18\n")
    assert (fixed.prompt_tokens.mean, fixed.prompt_tokens.cv, fixed.requests, fixed.precision) == (1024, 0, None, "bf16")


def test_one_measurement_in_two_rows_is_one_group(tmp_path: Path) -> None:
    """R1 and V3 are one architecture, and the same run is listed for both; another run at the same load is not the same measurement."""
    row = "{model},b200_sxm,sglang,{version},fp4,agg,1024,8192,4,1,1,4,1,{users},{ttft},10.01\n"
    text = CLOSED + row.format(model="deepseek-ai/DeepSeek-R1", version="0.5", users=4, ttft=609.7)
    text += row.format(model="deepseek-ai/DeepSeek-V3", version="0.6", users=4, ttft=609.7)
    text += row.format(model="deepseek-ai/DeepSeek-V3", version="0.6", users=8, ttft=700)
    text += row.format(model="deepseek-ai/DeepSeek-V3", version="0.7", users=8, ttft=650)
    groups = [r.group for r in table(tmp_path, text).rows]
    assert groups[0] == groups[1] == groups[2] != groups[3]


# ---------------------------------------------------------------- InferenceX


def test_a_system_in_one_place_has_as_many_gpus_as_its_tensor_parallelism(tmp_path: Path) -> None:
    row = "b200,trt,dsr1,fp8,{spec},False,8,8,0,8,8,{dpa},0,64,64,1024,1024,16,nvcr.io/x/release:1.1.0rc2.post2,100,10\n"
    plain = one(tmp_path, INFERENCEX + row.format(spec="none", dpa="False"))
    assert (plain.gpus, plain.tp, plain.attention_dp, plain.ep, plain.speculative) == (8, 8, 1, 8, None)
    assert (plain.engine, plain.engine_version) == ("trtllm", "1.1.0rc2.post2")
    assert plain.measured == {"ttft_p50_s": 0.1, "tpot_p50_s": 0.01}
    parallel = one(tmp_path, INFERENCEX + row.format(spec="mtp", dpa="True"))
    assert (parallel.gpus, parallel.tp, parallel.attention_dp, parallel.speculative) == (8, 1, 8, "mtp")


RUN_R1 = "{gpu},{engine},dsr1,{precision},{spec},False,{tp},1,0,{tp},1,{dpa},0,8,8,{prompt},1024,{users},,100,10\n"


@pytest.mark.parametrize(
    ("run", "started"),
    [
        (("b200", "sglang", "fp8", "none", 4, False, 8192, 32), (0.95, 8192, 30, 0)),
        (("b200", "sglang", "fp8", "mtp", 8, False, 8192, 8), (0.82, 16384, 10, 2)),
        (("b300", "sglang", "fp4", "none", 8, False, 1024, 16), (0.85, 16384, 30, 0)),
        (("h200", "sglang", "fp8", "mtp", 8, False, 1024, 64), (0.82, 32768, 0, 2)),
        (("mi325x", "sglang", "fp8", "none", 8, False, 8192, 64), (0.80, 131072, 4, 0)),
        (("mi355x", "sglang", "fp8", "mtp", 8, False, 8192, 64), (0.80, 196608, 8, 3)),
        (("mi355x", "sglang", "fp4", "none", 8, False, 8192, 64), (0.80, 32768, 4, 0)),
        (("b200", "trt", "fp8", "none", 8, False, 8192, 64), (0.80, 8320, 0, 0)),
        (("b200", "trt", "fp4", "mtp", 4, True, 1024, 256), (0.80, 1216, 60, 1)),
        (("h200", "trt", "fp8", "mtp", 8, False, 1024, 32), (0.75, 1216, 0, 3)),
        (("mi355x", "atom", "fp4", "mtp", 8, False, 1024, 32), (0.9, None, 0, 1)),
    ],
)
def test_servers_of_inferencex_were_started_by_its_recipes(
    tmp_path: Path, run: tuple[object, ...], started: tuple[float, int | None, int, int]
) -> None:
    """Share of memory, tokens a step, steps between two looks, tokens proposed: as its scripts compute them."""
    names = ("gpu", "engine", "precision", "spec", "tp", "dpa", "prompt", "users")
    e = one(tmp_path, INFERENCEX + RUN_R1.format(**dict(zip(names, run, strict=True))))
    assert (e.memory_share, e.max_step_tokens, e.held_steps, e.draft_tokens) == started


@pytest.mark.parametrize(
    ("framework", "gpu", "precision", "pools", "attention", "lengths", "users", "proposed"),
    [
        ("dynamo-trt", "gb200", "fp8", (1, 8, 2, 16), True, (1024, 8192), 2152, 1),
        ("dynamo-trt", "gb200", "fp8", (5, 8, 1, 16), True, (8192, 1024), 666, 3),
        ("dynamo-trt", "gb300", "fp4", (1, 2, 4, 8), True, (1024, 8192), 16384, 1),
        ("dynamo-trt", "b200", "fp4", (1, 4, 2, 8), True, (1024, 1024), 1214, 2),
        ("dynamo-trt", "b200", "fp8", (4, 8, 1, 8), True, (8192, 1024), 1088, 2),
        ("dynamo-trt", "h200", "fp8", (2, 8, 1, 8), True, (8192, 1024), 128, 2),
        ("dynamo-sglang", "h200", "fp8", (1, 8, 9, 8), False, (1024, 1024), 16, 2),
        ("dynamo-sglang", "b200", "fp8", (1, 8, 2, 8), True, (1024, 1024), 1024, 1),
        ("dynamo-sglang", "b200", "fp8", (2, 8, 1, 8), True, (8192, 1024), 512, 2),
        ("mori-sglang", "mi355x", "fp4", (1, 8, 2, 8), False, (8192, 1024), 32, 2),
    ],
)
def test_decode_workers_of_their_own_propose_what_the_recipe_of_their_size_says(
    tmp_path: Path, framework: str, gpu: str, precision: str, pools: tuple[int, int, int, int], attention: bool,
    lengths: tuple[int, int], users: int, proposed: int,
) -> None:  # fmt: skip
    """TensorRT-LLM's recipes are named by their size and end with `mtp` and the tokens proposed; SGLang's set `speculative-num-steps`."""
    workers, tp, decoders, decode_tp = pools
    row = f"{gpu},{framework},dsr1,{precision},mtp,True,{tp},1,{workers},{decode_tp},{decode_tp},{attention},{decoders},"
    row += f"{workers * tp},{decoders * decode_tp},{lengths[0]},{lengths[1]},{users},,100,10\n"
    assert one(tmp_path, INFERENCEX + row).draft_tokens == proposed


def test_what_a_recipe_said_is_noted_with_the_row(tmp_path: Path) -> None:
    run = RUN_R1.format(gpu="b200", engine="sglang", precision="fp8", spec="none", tp=8, dpa=False, prompt=8192, users=32)
    (row,) = table(tmp_path, INFERENCEX + run).rows
    assert recipes.SAID in row.notes
    (other,) = table(tmp_path, CLOSED + "Qwen/Qwen3-32B,h100_sxm,vllm,0.12.0,,agg,1024,1024,2,1,1,2,1,4,100,10\n").rows
    assert recipes.SAID not in other.notes


def test_four_gpus_hold_the_requests_that_were_measured_on_them(tmp_path: Path) -> None:
    """671 GB on four of 192: with 0.9 of the memory 4 requests of 8,192 tokens fit, and 32 were served without a queue."""
    e = one(
        tmp_path,
        INFERENCEX + RUN_R1.format(gpu="b200", engine="sglang", precision="fp8", spec="none", tp=4, dpa=False, prompt=8192, users=32),
    )
    assert figures.seats_of(e) >= 32 > figures.seats_of(replace(e, memory_share=0.9))


def test_a_disaggregated_system_has_the_workers_it_lists(tmp_path: Path) -> None:
    row = "gb200,dynamo-sglang,dsr1,fp4,none,True,{ptp},{pep},10,{tp},{ep},True,{workers},40,32,8192,1024,2150,,1,1\n"
    wide = one(tmp_path, INFERENCEX + row.format(ptp=1, pep=1, tp=1, ep=1, workers=1))
    assert (wide.gpus, wide.replicas, wide.attention_dp, wide.ep) == (72, 1, 32, 32)
    four = one(tmp_path, INFERENCEX + row.format(ptp=4, pep=4, tp=8, ep=8, workers=4))
    assert (four.replicas, four.attention_dp, four.ep, four.prefill_tp, four.prefill_ep) == (4, 8, 8, 4, 4)


DATED = INFERENCEX.replace("image,", "date,image,")
RUN = "mi300x,{engine},dsr1,fp8,none,False,8,1,0,8,1,False,0,8,8,1024,1024,{users},{date},{image},100,10\n"


def dated(engine: str, date: str, image: str = "", users: int = 4) -> str:
    return RUN.format(engine=engine, date=date, image=image, users=users)


def test_a_run_that_names_no_version_takes_the_one_in_use(tmp_path: Path) -> None:
    """The nearest run of the same GPU and engine says it, within 30 days; SGLang became a fifth faster between two of these dates."""
    text = (
        DATED + dated("sglang", "2026-02-27", "lmsysorg/sglang:v0.5.9-rocm700") + dated("sglang", "2026-05-18", "lmsysorg/sglang:v0.5.12")
    )
    asked = (
        ("sglang", "2026-02-27", "0.5.9"), ("sglang", "2026-01-28", "0.5.9"), ("sglang", "2026-01-27", ""),
        ("sglang", "2026-04-19", "0.5.12"), ("atom", "2026-02-27", ""), ("sglang", "", ""), ("sglang", "yesterday", ""),
    )  # fmt: skip
    found = table(tmp_path, text + "".join(dated(engine, date, users=8) for engine, date, _ in asked))
    assert [row.parts[0][0].engine_version for row in found.rows] == ["0.5.9", "0.5.12", *(version for *_, version in asked)]
    assert [inferencex.IN_USE in row.notes for row in found.rows] == [False, False, *(version != "" for *_, version in asked)]


def test_what_is_learned_from_says_which_version_is_asked_about(tmp_path: Path) -> None:
    asked, known = tmp_path / "asked.csv", tmp_path / "known.csv"
    asked.write_text(DATED + dated("sglang", "2026-03-01"))
    known.write_text(DATED + dated("sglang", "2026-02-27", "lmsysorg/sglang:v0.5.9-rocm700"))
    assert [e.engine_version for t in tables.read_all([asked, known]) for e in tables.experiments(t)] == ["0.5.9", "0.5.9"]
    assert tables.experiments(tables.read(asked))[0].engine_version == ""


def test_throughput_follows_from_latency_in_a_closed_loop() -> None:
    """Little's law by hand: 20 users, 2 s each, 10 answers per second of 900 tokens over 8 GPUs."""
    lengths = inferencex.drawn(1000)
    e = Experiment(key="k", group="g", model="m", device="d", prompt_tokens=lengths, output_tokens=lengths, concurrency=20, tp=8)
    found = inferencex.derive(e, {"e2e_mean_s": (2.0, 1.0, 4.0)})
    assert found["output_tokens_per_gpu_s"] == pytest.approx((1125, 562.5, 2250))
    assert found["tokens_per_gpu_s"] == pytest.approx((2250, 1125, 4500))


# ---------------------------------------------------------------- MLPerf


def test_a_server_row_asks_for_the_highest_rate_within_its_limits(tmp_path: Path) -> None:
    row = 'closed,X,8xH100,NVIDIA H100-SXM-80GB,8,2,"TensorRT 10.2.0, CUDA 12.4",llama2-70b-99,{scenario},70,76\n'
    server = one(tmp_path, MLPERF + row.format(scenario="Server"))
    assert server.slo == (("ttft_p99_s", 2.0), ("tpot_p99_s", 0.2))
    assert (server.tp, server.replicas, server.gpus, server.precision, server.max_seqs) == (2, 8, 16, "fp8", 1024)
    assert server.output_tokens.mean == pytest.approx(294.45)
    assert (server.rate_per_s, server.concurrency) == (None, None)  # the target rate is a result, not an input
    assert one(tmp_path, MLPERF + row.format(scenario="Offline")).slo == ()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('closed,X,s,N/A,0,1,PyTorch,gptj-99,Server,1,1', "no accelerator"),
        ('closed,X,s,NVIDIA H100-SXM-80GB,8,1,TensorRT 10,gptj-99,SingleStream,1,1', "has no rate"),
        ('open,X,s,NVIDIA GeForce RTX 4090,2,1,vLLM 0.5.2,llama2-70b-99,Server,1,1', "does not fit 2 x RTX-4090"),
    ],
)  # fmt: skip
def test_a_submission_that_says_too_little_is_listed(tmp_path: Path, row: str, says: str) -> None:
    assert says in (table(tmp_path, MLPERF + row + "\n").rows[0].problem or "")


def test_what_was_not_submitted_is_divided_by_memory_and_marked_assumed() -> None:
    found = mlperf.divided("llama-2-70b", "L40S", "tensorrt", 8)
    assert (found.tp, found.precision, found.assumed) == (2, "fp8", True)  # 69 GB in fp8 on cards of 48 GB


def test_every_data_set_names_its_source_and_every_limit_can_be_read() -> None:
    for model in ("llama-2-70b", "mixtral-8x7b", "gpt-j-6b"):
        data = mlperf.dataset(model)
        assert data.limits
        assert data.assumed.startswith("assumed") == (model == "gpt-j-6b")  # whose prompts' mean length nobody published, and that is said


# ---------------------------------------------------------------- against the tables themselves


@needs_data
@pytest.mark.parametrize(
    ("name", "rows", "problems"),
    [
        ("blis_measured", 57, 0), ("inputs_without_results_blis", 83, 0), ("blis_training_raw_inference_perf", 19, 8),
        ("closed_loop_measured", 1733, 5), ("inferencex_measured", 876, 0), ("mlperf_inference_v41_llm", 188, 11),
        ("inputs_without_results_mlperf", 144, 9),
    ],
)  # fmt: skip
def test_every_row_is_understood_or_says_why_not(name: str, rows: int, problems: int) -> None:
    found = tables.read(DATA / f"{name}.csv")
    assert len(found.rows) == rows
    assert sum(row.problem is not None for row in found.rows) == problems
    assert all(row.parts or row.problem for row in found.rows)
    keys = [e.key for e in tables.experiments(found)]
    assert len(keys) == len(set(keys))


@needs_data
def test_a_measured_summary_is_the_weighted_mean_of_its_measured_stages() -> None:
    """Equal durations: the weights are the rates.  Held against every two-stage experiment."""
    found = tables.read(DATA / "blis_measured.csv")
    by_stage = {(r.cells["experiment"], r.cells["stage"]): r.measured["e2e_mean_ms"] for r in found.rows}
    checked = 0
    for row in found.rows:
        if len(row.parts) == 2:
            stages = [by_stage[row.cells["experiment"], stage] for stage in ("0", "1")]
            expected = sum(share * value for (_, share), value in zip(row.parts, stages, strict=True))
            assert row.measured["e2e_mean_ms"] == pytest.approx(expected, rel=2e-3)
            checked += 1
    assert checked == 13


@needs_data
def test_raw_stages_are_in_the_group_of_the_experiment_they_are() -> None:
    """Where both files hold one run (equal E2E), it is one group, so that neither teaches the other."""
    measured = {e.measured["e2e_mean_s"]: e.group for e in tables.calibration(tables.read(DATA / "blis_measured.csv"))}
    raw = tables.calibration(tables.read(DATA / "blis_training_raw_inference_perf.csv"))
    same = [(e.group, measured[e.measured["e2e_mean_s"]]) for e in raw if e.measured.get("e2e_mean_s") in measured]
    assert len(same) >= 3
    assert all(mine == other for mine, other in same)


@needs_data
def test_the_closed_loop_table_holds_means() -> None:
    """Runs that stand in both tables, by TTFT and TPOT within 0.2 %: many by their means, none by their medians."""
    loads: dict[tuple[object, ...], list[Experiment]] = {}
    for e in tables.calibration(tables.read(DATA / "inferencex_measured.csv")):
        loads.setdefault((e.model, e.device, e.precision, e.prompt_tokens, e.output_tokens, e.concurrency), []).append(e)
    closed = tables.calibration(tables.read(DATA / "closed_loop_measured.csv"))

    def equal(e: Experiment, other: Experiment, stat: str) -> bool:
        pairs = [(e.measured[f"{m}_mean_s"], other.measured.get(f"{m}_{stat}_s", 0.0)) for m in ("ttft", "tpot")]
        return all(mine == pytest.approx(theirs, rel=2e-3) for mine, theirs in pairs)

    def same(stat: str) -> int:
        key = [(e, (e.model, e.device, e.precision, e.prompt_tokens, e.output_tokens, e.concurrency)) for e in closed]
        return sum(any(equal(e, other, stat) for other in loads.get(load, [])) for e, load in key if "tpot_mean_s" in e.measured)

    assert same("mean") > 10
    assert same("p50") == 0


@needs_data
def test_gpus_and_lengths_explain_the_throughput_that_was_measured() -> None:
    """Little's law with our GPUs and lengths against measured throughput per GPU: within 10 % for the typical row of every layout."""
    found = tables.read(DATA / "inferencex_measured.csv")
    ratios: dict[tuple[int, bool], list[float]] = {}
    for row in found.rows:
        ((e, _),) = row.parts
        latency = e.measured.get("e2e_mean_s")
        if latency is None or set(row.notes) - {recipes.SAID}:
            continue
        said = inferencex.derive(e, {"e2e_mean_s": (latency, latency, latency)})
        ratios.setdefault((e.gpus, e.disaggregated), []).append(said["tokens_per_gpu_s"][0] / e.measured["tokens_per_gpu_s"])
    assert sum(map(len, ratios.values())) > 100
    for values in ratios.values():
        assert 0.9 < statistics.median(values) < 1.15


@needs_data
def test_blis_rates_are_read_from_either_spelling() -> None:
    rates = {e.rate_per_s for e in tables.experiments(tables.read(DATA / "inputs_without_results_blis.csv"))}
    assert rates == {1, 2.5, 4, 5, 6, 8, 10, 20}
    assert blis.MEASURED.name == "blis"
