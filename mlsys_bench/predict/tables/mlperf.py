"""The MLPerf Inference table: the highest rate a whole system keeps within the p99 limits of its benchmark.

What the columns mean:

- Server: requests arrive as a Poisson process; `samples_per_s` is the highest rate at which 99 % of requests met the limits.  Offline: all
  requests at once, `samples_per_s` is the throughput, without a limit.  SingleStream: one at a time; it has no rate and is left out.
- Latencies are those at that rate; Offline they say how long the run was, and are not predicted.  To learn from there is the rate alone.
- `target_qps` is what the submitter asked for, known only to who has measured: nothing is predicted from it.
- `completed_tokens_per_s / samples_per_s` is the mean output: 294 tokens for llama2-70b, 146 for mixtral, 69.0 for gptj.
- `llama2-70b-99` and `-99.9` are accuracy targets; one run usually serves both.  Rows of one system and model are one group.
- Lengths and limits of the data sets: `data/datasets.csv`, with what is assumed.  GPT-J searches 4 beams.
- How a system was divided: `data/mlperf_layouts.csv`, from the configurations submitted.  For others: the fewest GPUs, a power of two,
  that hold the weights in 85 % of their memory; fp8 where the GPU has it, else 16 bit; both assumed.
- `nodes` are copies of `acc_per_node` GPUs.  A row without an accelerator ran on CPUs, whose kind the table does not name.
"""

from __future__ import annotations

import csv
import functools
import re
from dataclasses import dataclass

from mlsys_bench import hardware, models, resources
from mlsys_bench.predict.experiment import Experiment
from mlsys_bench.predict.tables.rows import Cells, Column, Figure, Format, Row, Unclear, device_id, figures_of, model_id
from mlsys_bench.types import Lengths

_RESULTS = {
    "completed_tokens_per_s": Column("output_tokens_per_s", 1.0),
    "samples_per_s": Column("max_rate_per_s", 1.0),
    **{f"{m}_{stat}_ms": Column(f"{m}_{stat}_s") for m in ("ttft", "tpot") for stat in ("mean", "p50", "p99")},
    "lat_mean_ms": Column("e2e_mean_s"),
    "lat_p99_ms": Column("e2e_p99_s"),
}
MEMORY_FOR_WEIGHTS = 0.85
_LIMIT = re.compile(r"(\w+)<([\d.]+)(ms|s)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """The requests of one MLPerf benchmark and the limits of its Server scenario."""

    prompt_tokens: Lengths
    output_tokens: Lengths
    requests: int
    beams: int
    limits: tuple[tuple[str, float], ...]
    assumed: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """How one replica was served."""

    tp: int
    precision: str
    max_seqs: int | None
    assumed: bool


def read(cells: Cells, source: str) -> Row:
    """Return a row of the MLPerf table."""
    scenario = cells.get("scenario").lower()
    if scenario not in ("server", "offline"):
        raise Unclear(f"scenario {cells.get('scenario')!r} has no rate; Server and Offline have")
    gpus = cells.number("acc_per_node") if cells.get("acc_per_node") not in ("", "N/A") else 0
    if not gpus:
        raise Unclear("no accelerator: the CPU is not named")
    model, device = model_id(cells.get("model")), device_id(_accelerator(cells.get("accelerator")))
    data = dataset(model)
    framework = "vllm" if "vllm" in cells.get("framework").lower() else "tensorrt"
    division = divided(model, device, framework, int(gpus))
    measured = cells.measured(_RESULTS)
    experiment = Experiment(
        key=f"{source}:{cells.line}",
        group=f"mlperf {cells.get('submitter')} {cells.get('system')} {model}",
        model=model,
        device=device,
        engine="vllm" if framework == "vllm" else "trtllm",
        engine_version=cells.get("framework"),
        precision=division.precision,
        tp=division.tp,
        replicas=max(int(gpus) * cells.whole("nodes", 1) // division.tp, 1),
        max_seqs=division.max_seqs,
        beams=data.beams,
        prompt_tokens=data.prompt_tokens,
        output_tokens=data.output_tokens,
        slo=data.limits if scenario == "server" else (),
        requests=data.requests if scenario == "offline" else None,
        measured={name: value for name, value in figures_of(measured, _RESULTS).items() if name == "max_rate_per_s"},
    )
    said = (f"prompt lengths {data.assumed}" * bool(data.assumed), f"TP {division.tp} and {division.precision} assumed" * division.assumed)
    notes = tuple(note for note in said if note)
    return Row(line=cells.line, cells=dict(cells.text), parts=((experiment, 1.0),), measured=measured, notes=notes)


def dataset(model: str) -> Dataset:
    """Return the data set a model is benchmarked with.  Raises Unclear where MLPerf has none for it."""
    found = next((row for row in _rows("datasets.csv") if row["model"] == model), None)
    if found is None:
        raise Unclear(f"no MLPerf data set is known for {model}")
    return Dataset(
        prompt_tokens=_lengths(found, "prompt"),
        output_tokens=_lengths(found, "output"),
        requests=int(found["requests"]),
        beams=int(found["beams"]),
        limits=tuple(_limit(text) for text in found["server_limits"].split()),
        assumed=found["prompt_source"] if found["prompt_source"].startswith("assumed") else "",
    )


def divided(model: str, device: str, framework: str, gpus: int) -> Division:
    """Return how a system serves a model: as submitted, or the fewest GPUs that hold it."""
    for row in _rows("mlperf_layouts.csv"):
        if (row["model"], row["device"], row["framework"]) == (model, device, framework) and int(row["tp"]) <= gpus:
            limit = int(row["max_seqs"]) if row["max_seqs"] else None
            return Division(tp=int(row["tp"]), precision=row["precision"], max_seqs=limit, assumed=False)
    found = hardware.find(device)
    precision = "fp8" if "fp8" in found.flops_per_s else "fp16"
    held = models.weight_bytes(models.find(model), precision)
    tp = 1
    while tp < gpus and held > MEMORY_FOR_WEIGHTS * tp * found.memory_bytes:
        tp *= 2
    if held > MEMORY_FOR_WEIGHTS * tp * found.memory_bytes:
        raise Unclear(f"{model} in {precision} does not fit {gpus} x {device}: another precision was served, which the table does not name")
    return Division(tp=tp, precision=precision, max_seqs=None, assumed=True)


def derive(experiment: Experiment, figures: dict[str, Figure]) -> dict[str, Figure]:
    """Return the figures with the tokens per second at the highest rate, and without the latencies of a run that is offline."""
    rate = figures.get("max_rate_per_s")
    if rate is None:
        return figures
    tokens = experiment.output_tokens.mean
    kept = figures if experiment.slo else {"max_rate_per_s": rate}
    return {"output_tokens_per_s": (rate[0] * tokens, rate[1] * tokens, rate[2] * tokens)} | kept


def _accelerator(name: str) -> str:
    """Return a device's name without what MLPerf adds: 'AMD Instinct MI300X-NPS1-SPX-192GB-750W' is an MI300X."""
    plain = re.sub(r"-NPS1.*$|-CTS$| Grace Hopper Superchip", "", name)
    return re.sub(r"GH200 (\d+)GB", r"GH200-\1GB", plain)


def _lengths(row: dict[str, str], which: str) -> Lengths:
    mean, cv, most = (float(row[f"{which}_tokens_{part}"]) for part in ("mean", "cv", "max"))
    return Lengths(dist="lognormal", mean=mean, cv=cv, max=int(most))


def _limit(text: str) -> tuple[str, float]:
    found = _LIMIT.fullmatch(text)
    if found is None:
        raise ValueError(f"datasets.csv: {text!r} is no limit")
    return f"{found[1]}_s", float(found[2]) / (1000.0 if found[3] == "ms" else 1.0)


@functools.cache
def _rows(name: str) -> tuple[dict[str, str], ...]:
    with resources.catalogue(name).open(newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


FORMAT = Format(
    name="mlperf", tells=("scenario", "accelerator", "acc_per_node", "submitter"), results=_RESULTS, read=read, derive=derive,
    device="accelerator",
)  # fmt: skip
