"""The BLIS tables: vLLM under a constant request rate, in stages; and the raw file of the load generator.

What the columns mean:

- One experiment runs one or two stages of equal length on one server; `summary` is over the requests of both, so a mean there is the
  mean of the stages weighted by their rates (5 and 10 per second weigh 1 : 2) and a percentile that of the mixture.
- `multi_turn_shared_prefix` 11x4: 11 system prompts with 4 users each; every user holds one conversation.  Arrivals are evenly spaced.
- The first stage finds a server that has just been started: its p99 is 5 to 76 % above the mean, that of later stages 2 to 20 %.
- Lengths are nominal.  Prompts came out 4.8 % longer in every experiment of the raw file, outputs 0 to 2 % shorter, for Llama-3.1-8B
  4 % and for Llama-2-7b 15 to 18 %: these models end early.  The raw file gives what came out, and that is used.
- `rate_rps` of a summary is '5+10'.  An empty `max_num_seqs` is vLLM's own default there; data/README names 128 as partly assumed.
- In the raw file `inter_token_latency` is per chunk of the stream, half the gap between tokens: `tpot_implied_ms` is read instead.
  A stage with failed requests is an overload: its latencies say how long the run was, only its throughput says something of the
  server, and it becomes the highest rate.
- Experiments of one model, GPU, TP, step budget and workload are one group, whichever file they stand in.
"""

from __future__ import annotations

import re
from dataclasses import replace

from mlsys_bench.predict.experiment import Experiment
from mlsys_bench.predict.tables.rows import (
    MOST,
    Cells,
    Column,
    Format,
    Row,
    Unclear,
    device_id,
    engine_id,
    engine_version,
    figures_of,
    model_id,
    precision_id,
)
from mlsys_bench.types import Lengths

_LATENCIES = {f"{metric}_{stat}_ms": Column(f"{metric}_{stat}_s") for metric in ("e2e", "ttft", "itl") for stat in ("mean", "p90", "p99")}
_RAW = {
    f"{metric}_{stat}_ms": Column(f"{metric}_{short}_s")
    for metric in ("e2e", "ttft")
    for stat, short in (("mean", "mean"), ("median", "p50"), ("p90", "p90"), ("p95", "p95"), ("p99", "p99"))
} | {"tpot_implied_ms": Column("tpot_mean_s"), "requests_per_sec": Column("max_rate_per_s", 1.0)}
_WORKLOADS = {  # system prompt, question, output: as the measured table gives them, for the raw file names only the workload
    "codegen": (100, 466, 247, 44), "roleplay": (150, 600, 251, 50), "general": (100, 447, 248, 45), "reasoning": (100, 934, 1448, 23),
}  # fmt: skip


def read(cells: Cells, source: str) -> Row:
    """Return a row of blis_measured.csv, or of the same table without results."""
    rates = _rates(cells.get("rate_rps"))
    measured = cells.measured(_LATENCIES)
    system, question = cells.number("system_prompt_len") or 0, cells.positive("question_len")
    stage = Experiment(
        key=f"{source}:{cells.line}",
        group="",
        model=model_id(cells.get("model")),
        device=device_id(cells.get("gpu")),
        engine=engine_id(cells.get("engine"), "vllm"),
        engine_version=engine_version(cells.get("engine")),
        precision=precision_id(cells.get("precision"), cells.get("model"), "fp16"),
        tp=cells.whole("tp", 1),
        replicas=cells.whole("dp", 1),
        max_seqs=cells.whole("max_num_seqs", 128),
        max_step_tokens=cells.whole("max_num_batched_tokens", 2048),
        memory_share=cells.number("gpu_mem_util") or 0.9,
        prompt_tokens=Lengths(mean=system + question),
        output_tokens=Lengths(mean=cells.positive("output_len")),
        shared_prefix_tokens=int(system),
        sessions=_sessions(cells.get("multi_turn_shared_prefix")),
        arrivals=cells.get("arrivals") or "constant",
        greedy=False,
        cold_start=_is_first(cells) or len(rates) > 1,
        rate_per_s=rates[0],
    )
    stage = replace(stage, group=_group(stage, cells.get("workload").removesuffix("-lite") or f"{system:g}+{question:g}"))
    if len(rates) == 1:
        stage = replace(stage, measured=figures_of(measured, _LATENCIES))
    parts = tuple(
        (replace(stage, key=f"{stage.key}@{rate:g}", rate_per_s=rate, cold_start=i == 0), rate / sum(rates)) for i, rate in enumerate(rates)
    )
    return Row(line=cells.line, cells=dict(cells.text), parts=parts if len(rates) > 1 else ((stage, 1.0),), measured=measured)


def read_raw(cells: Cells, source: str) -> Row:
    """Return a row of blis_training_raw_inference_perf.csv."""
    if cells.get("stage") == "summary":
        raise Unclear("a summary of the stages above it, without their rates: the stages are read")
    workload = cells.get("experiment").rpartition("-")[2]
    if workload not in _WORKLOADS:
        raise Unclear(f"experiment {cells.get('experiment')!r} names no workload of {', '.join(_WORKLOADS)}")
    system, question, output, sessions = _WORKLOADS[workload]
    measured = cells.measured(_RAW)
    overload = bool(cells.number("n_fail"))
    kept = {column: value for column, value in measured.items() if (column == "requests_per_sec") == overload}
    stage = Experiment(
        key=f"{source}:{cells.line}",
        group="",
        model=model_id(cells.get("model")),
        device=device_id(cells.get("gpu")),
        engine=engine_id(cells.get("engine"), "vllm"),
        engine_version=engine_version(cells.get("engine")),
        precision="fp16",
        tp=cells.whole("tp", 1),
        max_seqs=cells.whole("max_num_seqs", 128),
        max_step_tokens=cells.whole("max_num_batched_tokens", 2048),
        prompt_tokens=Lengths(mean=cells.number("prompt_len_mean") or system + question),
        output_tokens=Lengths(mean=cells.number("output_len_mean") or output),
        shared_prefix_tokens=system,
        sessions=sessions,
        arrivals=cells.get("arrivals") or "constant",
        greedy=False,
        cold_start=_is_first(cells),
        rate_per_s=cells.positive("requested_rate"),
        measured=figures_of(kept, _RAW),
    )
    stage = replace(stage, group=_group(stage, workload))
    notes = ("overload: only its throughput is read",) if overload else ()
    return Row(line=cells.line, cells=dict(cells.text), parts=((stage, 1.0),), measured=kept, notes=notes)


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split("+")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate <= MOST for rate in rates):
        raise Unclear(f"rate_rps is {text or 'empty'}; it must be a rate above 0 and at most {MOST:g}, or several with + between them")
    return rates


def _sessions(text: str) -> int:
    """Return the conversations of '11x4': 11 system prompts, 4 users each; 0 where nothing is said."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    return int(found[1]) * int(found[2]) if found else 0


def _is_first(cells: Cells) -> bool:
    """Say whether a row is of a first stage, or a summary of a single one."""
    return cells.get("stage").removeprefix("stage_") in ("0", "summary")


def _group(stage: Experiment, workload: str) -> str:
    return f"blis {stage.model} {stage.device} tp{stage.tp} {stage.precision} {stage.max_step_tokens} {workload}"


MEASURED = Format(name="blis", tells=("rate_rps", "system_prompt_len", "question_len", "output_len"), results=_LATENCIES, read=read)
RAW = Format(name="blis raw", tells=("requested_rate", "n_fail", "max_num_batched_tokens"), results=_RAW, read=read_raw)
