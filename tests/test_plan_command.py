"""Engine command lines: of a plan, parsed back, from manifests, and the difference of two in words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import workload
from mlsys_bench.errors import BadInput, UnknownName
from mlsys_bench.plan import command, manifests
from mlsys_bench.plan.command import Deployment, difference, notes, of_plan, parse, warnings
from mlsys_bench.plan.flags import ENGINES, FLAGS
from tests import sample_records


def of(engine: Any = "vllm", **item: Any) -> Deployment:
    plan = sample_records.plan()
    return of_plan(dataclasses.replace(plan, fleet=(dataclasses.replace(plan.fleet[0], **item),), max_step_tokens=2048), engine)


# ---------------------------------------------------------------- of a plan


def test_the_command_of_a_plan_by_hand() -> None:
    assert command.command(of(tp=4)) == (
        "vllm serve meta-llama/Meta-Llama-3-8B --tensor-parallel-size 4 --dtype bfloat16 --max-num-seqs 256 "
        "--max-num-batched-tokens 2048 --gpu-memory-utilization 0.9"
    )
    assert command.command(of("sglang", tp=4, precision="fp8")) == (
        "python3 -m sglang.launch_server --model-path meta-llama/Meta-Llama-3-8B --tp-size 4 --quantization fp8 "
        "--max-running-requests 256 --chunked-prefill-size 2048 --mem-fraction-static 0.88"
    )
    assert command.command(of("trtllm", tp=4)) == (
        "trtllm-serve meta-llama/Meta-Llama-3-8B --tp_size 4 --max_batch_size 256 --max_num_tokens 2048 "
        "--kv_cache_free_gpu_memory_fraction 0.9"
    )


def test_experts_and_data_parallel_attention_are_said_in_each_engines_way() -> None:
    """Eight devices: vLLM takes one rank each and says that experts are spread, SGLang counts all devices as tp."""
    vllm = command.arguments(of(attention_dp=8, ep=8))
    assert vllm[vllm.index("--data-parallel-size") + 1] == "8"
    assert vllm[vllm.index("--tensor-parallel-size") + 1] == "1"
    assert "--enable-expert-parallel" in vllm
    sglang = command.arguments(of("sglang", attention_dp=8, ep=8))
    assert [sglang[sglang.index(flag) + 1] for flag in ("--tp-size", "--dp-size", "--ep-size")] == ["8", "8", "8"]
    assert "--enable-dp-attention" in sglang
    assert of(attention_dp=8, ep=8).devices == of("sglang", attention_dp=8, ep=8).devices == 8


def test_engines_that_count_by_rank_get_the_sequences_and_the_context_of_a_rank() -> None:
    """`--max-num-seqs` of vLLM applies per DP rank: 256 on each of 8 would be 2,048 at once; SGLang divides its own."""
    plan = dataclasses.replace(sample_records.plan(), kv_tokens_per_replica=40_000, max_batch=250)
    ranks = dataclasses.replace(plan, fleet=(dataclasses.replace(plan.fleet[0], attention_dp=8, ep=8),))
    assert [of_plan(ranks, engine).max_seqs for engine in ENGINES] == [32, 250, 32]
    assert {of_plan(ranks, engine).max_context for engine in ENGINES} == {5000}
    assert (of_plan(plan).max_seqs, of_plan(plan).max_context) == (250, None)


def test_fp8_is_made_of_a_checkpoint_in_16_bit_only() -> None:
    """Engines such as vLLM end at once where `--quantization` contradicts the checkpoint; TensorRT-LLM takes them as they are."""
    plan = sample_records.plan()

    def told(model: str, precision: str, engine: Any = "vllm") -> tuple[str | None, list[str]]:
        made = dataclasses.replace(plan, model=model, fleet=(dataclasses.replace(plan.fleet[0], precision=precision),))
        deployment = of_plan(made, engine)
        return deployment.quantization, [note for note in notes(made, deployment) if "name a checkpoint" in note]

    assert told("llama-3-8b", "fp8") == ("fp8", [])
    assert told("deepseek-v3", "fp8") == (None, [])
    assert told("gpt-oss-120b", "fp8") == (None, []), "its experts stay as published"
    assert told("llama-3-8b", "fp16") == (None, [])
    for model, precision, engine in (("kimi-k2.5", "fp8", "vllm"), ("deepseek-v3", "bf16", "sglang"), ("llama-3-8b", "fp8", "trtllm")):
        quantization, (note,) = told(model, precision, engine)
        assert quantization is None
        assert note.endswith(f": name a checkpoint of it in {precision}")


def test_weights_that_become_fp8_must_fit_before() -> None:
    """Qwen3 32B takes 33 GB in fp8, and 65 GB while one L40S of 48 loads it."""
    plan = dataclasses.replace(sample_records.plan(), model="qwen3-32b", devices_per_replica=1)

    def told(gpu: str, precision: str) -> list[str]:
        made = dataclasses.replace(plan, fleet=(dataclasses.replace(plan.fleet[0], gpu=gpu, precision=precision),))
        return list(notes(made, of_plan(made)))

    (note,) = told("L40S", "fp8")
    assert note == (
        "Qwen/Qwen3-32B is loaded in 16 bit before its weights are made fp8, and 1 x 48 GB do not hold it: name a checkpoint of it in fp8"
    )
    assert told("H100-SXM", "fp8") == told("L40S", "bf16") == told("unheard-of", "fp8") == []


def test_a_name_that_stands_for_several_models_is_told() -> None:
    """A plan of DeepSeek-R1 is one of DeepSeek-V3's shape, and names it: nobody should serve the other unawares."""
    plan = dataclasses.replace(sample_records.plan(), model="deepseek-v3")
    made = dataclasses.replace(plan, fleet=(dataclasses.replace(plan.fleet[0], precision="fp8"),))
    (note,) = notes(made, of_plan(made))
    assert note.startswith("deepseek-ai/DeepSeek-V3 stands for models of its shape, such as deepseek-ai/DeepSeek-R1, ")


def test_a_copy_that_is_quantized_changes_no_weights() -> None:
    assert parse("vllm serve RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8").precision == "fp8"
    assert parse("vllm serve Qwen/Qwen2.5-7B-Instruct-AWQ").precision == "int4"
    assert parse("vllm serve Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8 -q gptq_marlin").precision == "int8"
    assert parse("vllm serve RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic -q compressed-tensors").precision == "fp8"
    assert parse("vllm serve nvidia/DeepSeek-R1-NVFP4 -q modelopt_fp4").precision == "fp4"
    assert parse("vllm serve mine -q modelopt_fp4").precision == "fp4"


def test_the_context_is_cut_to_what_the_cache_holds() -> None:
    """No engine starts with a context that its cache cannot hold."""
    assert of().max_context is None
    assert of_plan(dataclasses.replace(sample_records.plan(), kv_tokens_per_replica=4096)).max_context == 4096


def test_what_a_command_cannot_say_is_noted() -> None:
    plan = sample_records.plan()
    int4 = dataclasses.replace(plan, fleet=(dataclasses.replace(plan.fleet[0], precision="int4"),))
    assert any("checkpoint" in note for note in notes(int4, of_plan(int4)))
    assert any("activations come on top" in note for note in notes(plan, of_plan(plan, "sglang")))
    assert list(notes(plan, of_plan(plan))) == []
    with pytest.raises(UnknownName, match="vllm"):
        of_plan(plan, "vlm")  # type: ignore[arg-type]


# ---------------------------------------------------------------- of a command line


@pytest.mark.parametrize("engine", ENGINES)
def test_a_command_is_parsed_back_as_it_was(engine: Any) -> None:
    made = dataclasses.replace(of(engine, tp=2), replicas=None, gpus=None, gpu=None, image=None)
    assert parse(command.command(made)) == made


@settings(max_examples=40)
@given(st.sampled_from(ENGINES), st.integers(1, 16), st.integers(1, 4096), st.integers(1, 10**6), st.floats(0.1, 0.99), st.booleans())
def test_any_settings_survive_a_round_trip(engine: Any, tp: int, seqs: int, tokens: int, share: float, cached: bool) -> None:
    made = Deployment(
        engine=engine, model="a/b c", tp=tp, max_seqs=seqs, max_step_tokens=tokens, memory_share=round(share, 4),
        prefix_cache=cached if engine == "vllm" else None if cached or engine == "trtllm" else False,
    )  # fmt: skip
    assert parse(command.command(made)) == made


def test_aliases_underscores_and_human_numbers_are_read() -> None:
    found = parse(
        "CUDA_VISIBLE_DEVICES=0,1 exec vllm serve m -tp 2 --max_num_seqs=64 --max-model-len 32k --max-num-batched-tokens 8K -q awq"
    )
    assert (found.tp, found.max_seqs, found.max_context, found.max_step_tokens) == (2, 64, 32_000, 8192)
    assert (found.precision, found.unknown) == ("int4", ())
    assert parse("python -m vllm.entrypoints.openai.api_server --model m").model == "m"
    assert parse("sglang serve --model-path m --tp 4").tp == 4
    assert parse("vllm serve m \\\n --tensor-parallel-size 2").tp == 2
    assert parse("vllm serve meta-llama/Meta-Llama-3-8B").precision == "bf16"
    assert parse("vllm serve m --dtype half").precision == "fp16"
    assert parse("vllm serve m -tp 2 -dp 4 --enable-expert-parallel").ep == 8


def test_a_decimal_count_is_exact() -> None:
    """32.3k is 32,300; in binary floating point it falls below."""
    assert parse("vllm serve m --max-model-len 32.3k").max_context == 32_300


def test_what_is_left_to_the_engine_is_no_size() -> None:
    """-1 is SGLang's way not to cut prompts up, and vLLM's to take the longest context that fits; it stays on the command line."""
    found = parse("sglang serve --model-path m --chunked-prefill-size -1")
    assert found.max_step_tokens is None
    assert "--chunked-prefill-size -1" in command.command(found)
    assert parse("vllm serve m --max-model-len 4096 --max-model-len -1").max_context is None
    assert difference(found, parse("sglang serve --model-path m")) == []


def test_unknown_flags_are_kept_and_told_with_their_nearest() -> None:
    found = parse("vllm serve m --tensor-paralel-size 4 --speculative-config '{}'")
    assert found.unknown == ("--tensor-paralel-size", "4", "--speculative-config", "{}")
    told = list(warnings(found))
    assert "did you mean --tensor-parallel-size" in told[0]
    assert len(told) == 2
    assert command.arguments(found)[-4:] == list(found.unknown)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("ollama serve", "starts no engine"),
        ("vllm serve --port 80", "names no model"),
        ("vllm serve m --max-num-seqs many", "takes a number"),
        ("vllm serve m -tp -3", "-tp -3: it takes a whole number from 1 up"),
        ("vllm serve m --max-num-seqs 0", "--max-num-seqs 0: it takes a whole number from 1 up"),
        ("vllm serve m --tensor-parallel-size=1.5", "from 1 up"),
        ("vllm serve m --max-model-len -2", "from 1 up"),
        ("vllm serve m --gpu-memory-utilization 7", "a share of the memory, above 0 up to 1"),
        ("sglang serve --model-path m --mem-fraction-static 0", "a share of the memory, above 0 up to 1"),
        ("vllm serve m --port", "without its value"),
        ("vllm serve 'm", "close its quotes"),
    ],
)
def test_what_cannot_be_read_is_told(text: str, what: str) -> None:
    with pytest.raises(BadInput, match=what):
        parse(text)


def test_no_flag_of_an_engine_has_two_meanings() -> None:
    for engine in ENGINES:
        names = [name for flag in FLAGS[engine] for name in flag.names]
        assert len(names) == len(set(names))


# ---------------------------------------------------------------- the difference


def test_a_default_made_explicit_is_no_difference() -> None:
    """On an H100 of 80 GB vLLM takes 1,024 sequences and 8,192 tokens a step unless told."""
    plain = dataclasses.replace(parse("vllm serve meta-llama/Meta-Llama-3-8B"), gpu="H100")
    said = parse(
        "vllm serve llama-3-8b --max-num-seqs 1024 --max-num-batched-tokens 8192 --gpu-memory-utilization 0.9 -tp 1 --kv-cache-dtype auto"
    )
    assert difference(plain, dataclasses.replace(said, gpu="H100-SXM")) == []
    small = dataclasses.replace(plain, gpu="L4")
    assert "sequences at once: 1,024 -> 256 (--max-num-seqs)" in difference(plain, small)


def test_the_difference_in_words() -> None:
    today = dataclasses.replace(
        parse("vllm serve meta-llama/Meta-Llama-3-8B -tp 2 --max-num-seqs 128 --no-enable-prefix-caching"), replicas=4
    )
    assert difference(today, dataclasses.replace(of(), gpu=None)) == [
        "replicas: 4 -> 8",
        "tensor parallel: 2 -> 1 (--tensor-parallel-size)",
        "sequences at once: 128 -> 256 (--max-num-seqs)",
        "tokens a step: 8,192 -> 2,048 (--max-num-batched-tokens)",
        "prefix cache: off -> on (--enable-prefix-caching)",
    ]


def test_a_context_that_is_not_said_is_the_models() -> None:
    """Llama 3 8B takes 8,192 tokens."""
    today = parse("vllm serve meta-llama/Meta-Llama-3-8B --max-model-len 100")
    assert "longest context: 100 -> 8,192 (--max-model-len)" in difference(today, of())
    assert not any("context" in line for line in difference(parse("vllm serve llama-3-8b --max-model-len 8192"), of()))
    plan = sample_records.plan()
    tokens = sum(workload.mean_tokens(lengths) for lengths in (plan.workload.prompt_tokens, plan.workload.output_tokens))
    assert list(command.refused(plan, today)) == [
        f"today's longest context of 100 tokens refuses the average request of this traffic, of {tokens:,.0f} tokens"
    ]
    assert list(command.refused(plan, parse("vllm serve llama-3-8b"))) == []
    assert list(command.refused(plan, parse("vllm serve a-model-nobody-knows"))) == []


# ---------------------------------------------------------------- manifests


def manifest(tmp_path: Path, text: str) -> str:
    path = tmp_path / "today.yaml"
    path.write_text(text)
    return str(path)


SHELL = """
apiVersion: v1
kind: ConfigMap
metadata: {name: other}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: mistral}
spec:
  replicas: 3
  template:
    spec:
      nodeSelector: {nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3}
      containers:
      - name: sidecar
        image: envoy:1
      - name: vllm
        image: vllm/vllm-openai:latest
        command: [/bin/sh, -c]
        args: ["pip install vllm-extras && exec vllm serve mistralai/Mistral-7B-v0.3 --max-num-seqs 64 --trust-remote-code"]
        resources: {limits: {nvidia.com/gpu: 2}}
"""


def test_a_manifest_with_a_shell_is_read(tmp_path: Path) -> None:
    (found,) = manifests.read(manifest(tmp_path, SHELL))
    assert (found.engine, found.model, found.max_seqs) == ("vllm", "mistralai/Mistral-7B-v0.3", 64)
    assert (found.replicas, found.gpus, found.gpu, found.image) == (3, 2, "NVIDIA-H100-80GB-HBM3", "vllm/vllm-openai:latest")
    assert command.effective(found)["gpu"] == "H100-SXM"
    assert found.other == {"--trust-remote-code": True}


def test_arguments_alone_are_those_of_the_images_own_engine(tmp_path: Path) -> None:
    text = """
apiVersion: v1
kind: List
items:
- kind: StatefulSet
  spec: {replicas: 2, template: {spec: {containers: [{image: "vllm/vllm-openai:v0.15.0", args: [--model, m, -tp, "4"]}]}}}
- kind: Pod
  spec: {containers: [{image: "lmsysorg/sglang:latest", args: [--model-path, n]}]}
- kind: InferenceService
  spec: {predictor: {minReplicas: 5, model: {modelFormat: {name: huggingface}, storageUri: "hf://org/big", args: [--max-num-seqs=9]}}}
"""
    first, second, third = manifests.read(manifest(tmp_path, text))
    assert (first.engine, first.model, first.tp, first.replicas) == ("vllm", "m", 4, 2)
    assert (second.engine, second.model, second.replicas) == ("sglang", "n", 1)
    assert (third.engine, third.model, third.max_seqs, third.replicas) == ("vllm", "org/big", 9, 5)


@pytest.mark.parametrize(
    ("text", "what"),
    [("kind: Service", "starts no engine known here .found Service"), ("a: [", "is no YAML"), ("", "found nothing")],
)
def test_manifests_without_an_engine_are_told(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(BadInput, match=what):
        manifests.read(manifest(tmp_path, text))
    with pytest.raises(BadInput, match="cannot be read"):
        manifests.read(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    "spec", ["5", "{replicas: many}", "{replicas: -2, template: {spec: {containers: [{command: [vllm, serve, m]}]}}}",
             "{template: {spec: 7}}", "{template: {spec: {containers: [word]}}}",
             "{template: {spec: {containers: [{command: [vllm, serve, m], resources: {limits: {nvidia.com/gpu: x}}}]}}}"],
)  # fmt: skip
def test_a_manifest_of_odd_shape_names_its_file(tmp_path: Path, spec: str) -> None:
    with pytest.raises(BadInput, match="is no manifest that Kubernetes would take"):
        manifests.read(manifest(tmp_path, f"kind: Deployment\nspec: {spec}\n"))


def test_a_command_line_is_no_file() -> None:
    assert manifests.read("vllm serve models/config.json")[0].model == "models/config.json"
