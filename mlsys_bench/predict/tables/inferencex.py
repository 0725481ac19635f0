"""The InferenceX table (SemiAnalysis, formerly InferenceMAX): DeepSeek-R1 on nine kinds of GPU, closed loop.

What the columns mean:

- The client (benchmark_serving.py of that suite, as its README starts it) draws lengths with `--random-range-ratio 0.8`: evenly between
  0.8 and 1.0 of `isl` and `osl`; ignores end-of-text; sends `10 * conc` requests with at most `conc` open, the first `conc` at once.  A
  mean TTFT therefore holds the burst of the start, one request in ten; the median is nearly the steady state.  Throughputs confirm the
  lengths: with 0.9 of the nominal ones, concurrency over latency gives the throughput of the row within 2 to 4 %.
- `tput_per_gpu` counts prompt and output tokens over all GPUs; `output_tput_per_gpu` divides by the decode GPUs and
  `input_tput_per_gpu` by the prefill GPUs of a disaggregated system.
- Not disaggregated: the GPUs are `decode_tp`, see `layouts`; `decode_dpa` is data-parallel attention over all of them.
- Disaggregated: `n_prefill_gpu` and `n_decode_gpu` are GPUs, by throughput; a worker has n / workers of them.  TP 1 and EP 1 on a worker of
  several GPUs is wide expert parallelism (attention DP and EP over the whole worker), TP 1 with a larger EP data-parallel attention.
- 3 rows on GB200 are marked disaggregated and give no workers: their split is assumed, and said so.
- `mean_itl_ms` is per chunk of the stream: with speculation a chunk holds several tokens, in some disaggregated runs hundreds.  It is
  left out.
- `framework`: trt and dynamo-trt run TensorRT-LLM; sglang, dynamo-sglang and mori-sglang run SGLang; atom is AMD's own.
- A configuration is measured on many dates, some results stand there twice: all of one configuration and length is one group.
- Most rows name no image.  They take the version of the nearest run, of at most 30 days before or after, of that GPU and engine that does:
  engines get faster by up to half in a few months, and of a result that stands there twice only one names its image.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from collections.abc import Sequence

from mlsys_bench.predict.experiment import Experiment
from mlsys_bench.predict.tables import layouts, recipes
from mlsys_bench.predict.tables.rows import Cells, Column, Figure, Format, Row, device_id, engine_id, figures_of, model_id, precision_id
from mlsys_bench.types import Lengths

REQUESTS_PER_USER = 10
IN_USE_DAYS = 30  # around a run that names its version
IN_USE = "no version given: that of the nearest run of the same GPU and engine within 30 days"
LEAST_SHARE = 0.8  # of the nominal length
_RESULTS = {
    f"{stat}_{metric}_ms": Column(f"{figure}_{short}_s")
    for metric, figure in (("ttft", "ttft"), ("tpot", "tpot"), ("e2el", "e2e"))
    for stat, short in (("mean", "mean"), ("median", "p50"), ("p99", "p99"))
} | {
    "tput_per_gpu": Column("tokens_per_gpu_s", 1.0),
    "output_tput_per_gpu": Column("output_tokens_per_gpu_s", 1.0),
    "input_tput_per_gpu": Column("input_tokens_per_gpu_s", 1.0),
}
_CONFIGURATION = (
    "gpu", "framework", "precision", "spec", "prefill_tp", "prefill_ep", "decode_tp", "decode_ep", "decode_dpa", "prefill_workers",
    "decode_workers", "n_prefill_gpu", "n_decode_gpu", "isl", "osl",
)  # fmt: skip


def drawn(nominal_tokens: float) -> Lengths:
    """Return the lengths that the client of InferenceX draws: evenly between 0.8 and 1.0 of the nominal one."""
    mean = nominal_tokens * (1 + LEAST_SHARE) / 2
    sd = nominal_tokens * (1 - LEAST_SHARE) / 12**0.5
    return Lengths(dist="uniform", mean=mean, cv=sd / mean, max=int(nominal_tokens))


def read(cells: Cells, source: str) -> Row:
    """Return a row of inferencex_measured.csv."""
    measured = cells.measured(_RESULTS)
    concurrency = cells.whole("conc")
    experiment = Experiment(
        key=f"{source}:{cells.line}",
        group="",
        model=model_id(cells.get("model")),
        device=device_id(cells.get("gpu")),
        engine=engine_id(cells.get("framework")),
        engine_version=_version(cells.get("image")),
        precision=precision_id(cells.get("precision"), cells.get("model")),
        prompt_tokens=drawn(cells.positive("isl")),
        output_tokens=drawn(cells.positive("osl")),
        concurrency=concurrency,
        requests=REQUESTS_PER_USER * concurrency,
        speculative=None if cells.get("spec") in ("", "none") else cells.get("spec"),
        measured=figures_of(measured, _RESULTS),
    )
    experiment, notes = _spread(experiment, cells)
    experiment, said = recipes.started(experiment, cells.whole("isl"), cells.whole("osl"))
    group = " ".join(["inferencex", *(cells.get(column) for column in _CONFIGURATION)])
    parts = ((dataclasses.replace(experiment, group=group), 1.0),)
    return Row(line=cells.line, cells=dict(cells.text), parts=parts, measured=measured, notes=(*notes, *said))


def _spread(experiment: Experiment, cells: Cells) -> tuple[Experiment, tuple[str, ...]]:
    tp, ep, dpa = cells.whole("decode_tp", 1), cells.whole("decode_ep", 1), cells.flag("decode_dpa")
    if not cells.flag("disagg"):
        return dataclasses.replace(experiment, **dataclasses.asdict(layouts.of_gpus(tp, ep=ep, data_parallel=dpa))), ()
    if not cells.number("decode_workers"):
        split = layouts.assumed_split(cells.whole("n_decode_gpu"), experiment.concurrency or 1)
        return layouts.split(experiment, split), (layouts.SPLIT_ASSUMED.format(gpus=cells.get("n_decode_gpu"), split=split),)
    workers, gpus = cells.whole("decode_workers"), cells.whole("n_decode_gpu")
    prefill_workers, prefill_gpus = cells.whole("prefill_workers", 1), cells.whole("n_prefill_gpu")
    worker = gpus // workers
    split = layouts.Split(
        worker=layouts.of_gpus(worker, ep=worker if tp == ep == 1 else ep, data_parallel=dpa or (tp == 1 and worker > 1)),
        replicas=workers,
        prefill_gpus=prefill_gpus,
        decode_gpus=gpus,
        prefill_tp=prefill_gpus // prefill_workers,
        prefill_ep=cells.whole("prefill_ep", 1),
    )
    return layouts.split(experiment, split), ()


def _version(image: str) -> str:
    """Return the version in a container image's tag: '0.5.12' of 'lmsysorg/sglang:v0.5.12-cu130', empty where there is none."""
    found = re.search(r"\d+\.\d+\.\d+[\w.]*", image.rpartition(":")[2])
    return found[0] if found else ""


def derive(experiment: Experiment, figures: dict[str, Figure]) -> dict[str, Figure]:
    """Return the figures with throughput per GPU: concurrency over the mean latency, times tokens, over GPUs (Little's law).

    The mean latency is TTFT and a TPOT per further token where it is not predicted as such.
    """
    e2e = figures.get("e2e_mean_s") or _latency(experiment, figures)
    if e2e is None or not experiment.concurrency:
        return figures
    prompt, output = experiment.prompt_tokens.mean, experiment.output_tokens.mean
    prefill = experiment.prefill_gpus or experiment.gpus
    decode = experiment.decode_gpus or experiment.gpus
    rates = tuple(experiment.concurrency / seconds for seconds in (e2e[0], e2e[2], e2e[1]))
    added: dict[str, Figure] = {
        "tokens_per_gpu_s": _times(rates, (prompt + output) / experiment.gpus),
        "output_tokens_per_gpu_s": _times(rates, output / decode),
        "input_tokens_per_gpu_s": _times(rates, prompt / prefill),
    }
    return added | figures


def _latency(experiment: Experiment, figures: dict[str, Figure]) -> Figure | None:
    ttft, tpot = figures.get("ttft_mean_s"), figures.get("tpot_mean_s")
    if ttft is None or tpot is None:
        return None
    more = experiment.output_tokens.mean - 1
    return ttft[0] + more * tpot[0], ttft[1] + more * tpot[1], ttft[2] + more * tpot[2]


def versioned(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the version in use where they name none; as they are where no run near in time does."""
    named: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for row in rows:
        day = _day(row)
        for e, _ in row.parts:
            if e.engine_version and day is not None:
                named.setdefault((e.device, e.engine), []).append((day, e.engine_version))
    return [_in_use(row, named) for row in rows]


def _in_use(row: Row, named: dict[tuple[str, str], list[tuple[int, str]]]) -> Row:
    day = _day(row)
    if day is None or not row.parts or row.parts[0][0].engine_version:
        return row
    e, share = row.parts[0]
    days, version = min(((abs(day - other), version) for other, version in named.get((e.device, e.engine), ())), default=(math.inf, ""))
    if days > IN_USE_DAYS:
        return row
    return dataclasses.replace(row, parts=((dataclasses.replace(e, engine_version=version), share),), notes=(*row.notes, IN_USE))


def _day(row: Row) -> int | None:
    """Return the date of a run as a number of days, None where it gives none."""
    try:
        return datetime.date.fromisoformat(row.cells.get("date", "").strip()).toordinal()
    except ValueError:
        return None


def _times(values: tuple[float, ...], factor: float) -> Figure:
    return values[0] * factor, values[1] * factor, values[2] * factor


FORMAT = Format(name="inferencex", tells=("framework", "decode_dpa", "n_decode_gpu", "conc"), results=_RESULTS, read=read, derive=derive)
