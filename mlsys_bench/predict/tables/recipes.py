"""What the servers of InferenceX were started with: limits that its table leaves out, from the recipes that suite publishes.

For DeepSeek-R1 where prefill and decode share their GPUs:

| engine | on | share of memory | tokens a step | looks | proposed |
|---|---|---|---|---|---|
| SGLang | B200 and B300, fp8, 4 GPUs | 0.95 | 8,192 | 10 or 30 | - |
| | B200 and B300, fp8 | 0.82 | 32,768 (MTP: 16,384) | 10 or 30 | 2 |
| | B200 and B300, fp4 | 0.85 | 16,384 | 10 or 30 | 2 |
| | H200 | 0.82 | 32,768 | 1 | 2 |
| | MI300X, MI325X | 0.80 | 131,072 | 4 | 3 |
| | MI355X | 0.80 | 196,608 (fp4, 8,192 / 1,024, over 32 users: 32,768) | 4 (fp8, MTP: 8) | 3 |
| TensorRT-LLM | B200; H200 | 0.80; 0.75 of the rest | 8,192, or all users, a prompt and 64 | 1 | 3 |
| | with attention DP | the same | the same | 60 | 1 |
| ATOM | MI355X | - | - | 1 | 1 |

and Qwen3.5 in SGLang on B200 and B300: 0.82, 32,768, 10 or 30; MiniMax-M2.5 in fp8 there: 0.95.

- looks: steps between two looks at new requests.  SGLang's `scheduler-recv-interval` is 10, from 16 users on 30; its
  `num-continuous-decode-steps` is 4 on AMD; TensorRT-LLM waits up to 60 steps until every rank of data-parallel attention has a prompt.
- proposed: tokens of MTP beside the one that is sure.
- MI325X with MTP in fp8 looks every 8 steps and proposes 3 tokens as MI355X does: its own recipe was not found.
- Their limits of requests at once (32 to 512) bind in no plain run, and the closed-loop table does not say which of its runs speculate.
- Recipes change with time: ATOM's in fp8 propose 3 tokens since; most of them keep what is here.
- Disaggregated systems have a recipe for each size, of which only the tokens proposed are taken.  TensorRT-LLM's: `_FEWER` where that is
  not 3.  SGLang's on NVIDIA 2 (on B200 in fp8 two decode workers with data-parallel attention 1), on MI355X 2, with such attention 1.

Read in SemiAnalysisAI/InferenceX: `benchmarks/dsr1_*.sh` @1fc5d73c and @111f0312, `benchmarks/single_node/dsr1_*.sh` @285b6628 and
@34bc7c40, `qwen3.5_fp8_b200.sh` @01fa35cf, `minimaxm2.5_fp8_b200.sh` @07e171a3, `benchmarks/single_node/fixed_seq_len/dsr1_*.sh` @8eec0d4e
and @f89cdfe2, `.github/configs/nvidia-master.yaml` @0004cf5f (a recipe's name ends with the tokens proposed) and `amd-master.yaml`
@008b53a8; SGLang's in ishandhanani/srt-slurm `recipes/b200-fp4/*k1k-mtp.yaml` and `b200-fp8/*k1k-mtp.yaml` @893b9b9a, qiching/srt-slurm
`recipes/b200-fp*/*/mtp/*.yaml` @5063eb43, xutizhou/srt-slurm `recipes/h200/*/*-mtp.yaml` and `h100/*/mtp/*.yaml` @9c36c454 and @2e72befe.
"""

from __future__ import annotations

import dataclasses
import math

from mlsys_bench.predict.experiment import Experiment

SAID = "memory, tokens a step, looks at new requests and tokens proposed: as InferenceX's published recipe sets them"
R1 = "deepseek-v3"  # the same design
BLACKWELL = ("B200-SXM", "B300-SXM")
_GRAIN = 64  # TensorRT-LLM's recipes round tokens of a step up to it
_PROPOSED = {"atom": 1}
_FEWER = {  # GPU, precision, tokens of prompt and answer -> users: tokens proposed by TensorRT-LLM's decode workers, where not 3
    ("B200-SXM", "fp4", 1024, 1024): {1214: 2, 4968: 1, 10860: 1},
    ("B200-SXM", "fp4", 8192, 1024): {1096: 1, 1691: 1},
    ("B200-SXM", "fp8", 1024, 1024): {1600: 2},
    ("B200-SXM", "fp8", 8192, 1024): {1088: 2},
    ("B300-SXM", "fp4", 1024, 1024): {2342: 1, 8609: 1, 12926: 1},
    ("B300-SXM", "fp4", 8192, 1024): {1197: 1, 2198: 1},
    ("B300-SXM", "fp8", 1024, 1024): {720: 2, 2560: 1, 3072: 1, 11264: 1},
    ("B300-SXM", "fp8", 8192, 1024): {512: 2},
    ("GB200-per-GPU", "fp4", 1024, 1024): {2253: 1, 4301: 1, 16130: 1},
    ("GB200-per-GPU", "fp4", 1024, 8192): {6144: 1, 8192: 1},
    ("GB200-per-GPU", "fp4", 8192, 1024): {1229: 1, 4301: 1},
    ("GB200-per-GPU", "fp8", 1024, 1024): {1229: 1, 2151: 1, 4301: 1},
    ("GB200-per-GPU", "fp8", 1024, 8192): {2152: 1, 8192: 1},
    ("GB300-per-GPU", "fp4", 1024, 1024): {2253: 1, 3226: 1},
    ("GB300-per-GPU", "fp4", 1024, 8192): {8192: 1, 16384: 1},
    ("GB300-per-GPU", "fp4", 8192, 1024): {2253: 1},
    ("GB300-per-GPU", "fp8", 1024, 1024): {2253: 1, 8192: 1},
    ("GB300-per-GPU", "fp8", 1024, 8192): {2048: 1, 8192: 1},
    ("GB300-per-GPU", "fp8", 8192, 1024): {1229: 1},
    ("H100-SXM", "fp8", 1024, 1024): {615: 2, 1229: 1},
    ("H200-SXM", "fp8", 8192, 1024): {16: 2, 64: 2, 128: 2, 256: 2, 512: 1},
}


def started(e: Experiment, prompt: int, output: int) -> tuple[Experiment, tuple[str, ...]]:
    """Return the experiment with what its server was started with, and a note where that was said; lengths are the nominal ones."""
    found = _started(e, prompt, output)
    return found, () if found == e else (SAID,)


def _started(e: Experiment, prompt: int, output: int) -> Experiment:
    if e.model != R1:
        return _other(e)
    drafts = _drafts(e) if e.speculative else 0
    if e.disaggregated:
        return dataclasses.replace(e, draft_tokens=_apart(e, prompt, output) if e.speculative else 0)
    if e.engine == "sglang":
        return dataclasses.replace(_sglang(e, prompt, output), draft_tokens=drafts)
    if e.engine == "trtllm":
        return dataclasses.replace(_trtllm(e, prompt, drafts), draft_tokens=drafts)
    return dataclasses.replace(e, draft_tokens=drafts)


def _other(e: Experiment) -> Experiment:
    if e.model == "qwen3.5-397b-a17b" and e.engine == "sglang" and e.device in BLACKWELL:
        return dataclasses.replace(e, memory_share=0.82, max_step_tokens=32768, held_steps=_looks(e))
    if e.model == "minimax-m2.5" and e.precision == "fp8" and e.device in BLACKWELL:
        return dataclasses.replace(e, memory_share=0.95)
    return e


def _looks(e: Experiment) -> int:
    """Return SGLang's interval between looks at new requests, which these recipes set on Blackwell."""
    return 30 if (e.concurrency or 1) >= 16 else 10


def _drafts(e: Experiment) -> int:
    if e.engine == "trtllm":
        return 1 if e.attention_dp > 1 else 3
    return _PROPOSED.get(e.engine, 3 if e.device.startswith("MI") else 2)


def _apart(e: Experiment, prompt: int, output: int) -> int:
    """Return the tokens proposed by decode workers of their own."""
    if e.engine == "trtllm":
        return _FEWER.get((e.device, e.precision, prompt, output), {}).get(e.concurrency or 1, 3)
    if e.device.startswith("MI"):
        return 1 if e.attention_dp > 1 else 2
    return 1 if (e.device, e.precision, prompt) == ("B200-SXM", "fp8", 1024) and e.attention_dp > 1 and e.replicas == 2 else 2


def _sglang(e: Experiment, prompt: int, output: int) -> Experiment:
    users = e.concurrency or 1
    if e.device.startswith("MI"):
        e = dataclasses.replace(e, held_steps=8 if e.speculative and e.precision == "fp8" else 4)
        fewer = e.precision == "fp4" and (prompt, output) == (8192, 1024) and users > 32
        tokens = 131072 if e.device in ("MI300X", "MI325X") else 32768 if fewer else 196608
        return dataclasses.replace(e, memory_share=0.80, max_step_tokens=tokens)
    if e.device.startswith("H"):
        return dataclasses.replace(e, memory_share=0.82, max_step_tokens=32768)
    e = dataclasses.replace(e, held_steps=0 if e.attention_dp > 1 else _looks(e))
    if e.precision == "fp4":
        return dataclasses.replace(e, memory_share=0.85, max_step_tokens=16384)
    if e.gpus == 4:
        return dataclasses.replace(e, memory_share=0.95, max_step_tokens=8192)
    if e.speculative:
        return dataclasses.replace(e, memory_share=0.82, max_step_tokens=16384)
    return dataclasses.replace(e, memory_share=0.82, max_step_tokens=32768)


def _trtllm(e: Experiment, prompt: int, drafts: int) -> Experiment:
    users = e.concurrency or 1
    batch = max(users // e.attention_dp, 1) if drafts else users
    tokens = math.ceil(((drafts + 1) * batch + prompt + 64) / _GRAIN) * _GRAIN
    return dataclasses.replace(
        e, memory_share=0.75 if e.device.startswith("H") else 0.80, max_step_tokens=tokens if drafts else max(tokens, 8192),
        held_steps=60 if e.attention_dp > 1 else 0,
    )  # fmt: skip
