"""The closed-loop table (NVIDIA AIConfigurator's collection): a fixed number of users, each sending as soon as it is answered.

What the columns mean:

- `ttft_ms` and `tpot_ms` are means: 21 of the DeepSeek rows equal the mean TTFT and TPOT of a row of the InferenceX table, none equals
  medians.  `concurrency` is that of the whole system.
- Rows with lengths out of (1024 | 8192) x (1024 | 8192) come from InferenceX, whose client draws lengths evenly between 0.8 and 1.0 of
  the nominal ones and sends 10 requests per user, all users at once: see `inferencex`.  The others have fixed lengths.
- An empty precision is the checkpoint's own: 16 bit of Qwen3-32B, for 25 ms per token at TP 1 on an H100 is 64 GB.
- Parallelism: see `layouts`.
- Speculative decoding is not marked, but occurs: repeats of one DeepSeek key differ by a factor of up to 2 in TPOT, and the fast ones
  are rows that InferenceX marks `mtp`.  Nothing in the inputs tells them; they are predicted as plain decoding.
- The same run stands in several rows: for R1 and for V3, and under two spellings of its layout.  Rows with equal lengths, concurrency,
  TTFT and TPOT are one measurement: they share a group.  A group is otherwise one sweep over concurrency.
- 5 rows have no concurrency: they are a found optimum, not a run at a known load, and cannot be predicted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mlsys_bench import models
from mlsys_bench.predict.experiment import Experiment
from mlsys_bench.predict.tables import layouts, recipes
from mlsys_bench.predict.tables.inferencex import REQUESTS_PER_USER, drawn
from mlsys_bench.predict.tables.rows import Cells, Column, Format, Row, device_id, engine_id, figures_of, model_id, precision_id
from mlsys_bench.types import Lengths

_RESULTS = {"ttft_ms": Column("ttft_mean_s"), "tpot_ms": Column("tpot_mean_s")}
_NOMINAL = (1024.0, 8192.0)


def read(cells: Cells, source: str) -> Row:
    """Return a row of closed_loop_measured.csv."""
    measured = cells.measured(_RESULTS)
    model = model_id(cells.get("model"))
    prompt, output = cells.positive("isl"), cells.positive("osl")
    by_inferencex = prompt in _NOMINAL and output in _NOMINAL
    concurrency = cells.whole("concurrency")
    experiment = Experiment(
        key=f"{source}:{cells.line}",
        group="",
        model=model,
        device=device_id(cells.get("system")),
        engine=engine_id(cells.get("backend"), "vllm"),
        engine_version=cells.get("backend_version"),
        precision=precision_id(cells.get("precision"), cells.get("model")),
        pp=cells.whole("pp", 1),
        prompt_tokens=drawn(prompt) if by_inferencex else Lengths(mean=prompt),
        output_tokens=drawn(output) if by_inferencex else Lengths(mean=output),
        concurrency=concurrency,
        requests=REQUESTS_PER_USER * concurrency if by_inferencex else None,
        measured=figures_of(measured, _RESULTS),
    )
    experiment, notes = _spread(experiment, cells)
    said: tuple[str, ...] = ()
    if by_inferencex:
        experiment, said = recipes.started(experiment, int(prompt), int(output))
    experiment = dataclasses.replace(experiment, group=_sweep(experiment, prompt, output))
    return Row(line=cells.line, cells=dict(cells.text), parts=((experiment, 1.0),), measured=measured, notes=(*notes, *said))


def _spread(experiment: Experiment, cells: Cells) -> tuple[Experiment, tuple[str, ...]]:
    """Return the experiment with its parallelism, and what had to be assumed."""
    tp, moe_tp, ep = cells.whole("tp", 1), cells.whole("moe_tp_size", 1), cells.whole("moe_ep_size", 1)
    given = cells.number("attention_dp_size")
    attention_dp = int(given) if given else None
    if not models.find(experiment.model).experts:
        return dataclasses.replace(experiment, **dataclasses.asdict(layouts.dense(tp, attention_dp or 1))), ()
    if layouts.is_disaggregated_total(tp, moe_tp):
        split = layouts.assumed_split(tp, experiment.concurrency or 1)
        return layouts.split(experiment, split), (layouts.SPLIT_ASSUMED.format(gpus=tp, split=split),)
    return dataclasses.replace(experiment, **dataclasses.asdict(layouts.experts(tp, attention_dp, moe_tp, ep))), ()


def _sweep(e: Experiment, prompt: float, output: float) -> str:
    spread = f"tp{e.tp} dp{e.attention_dp} {e.moe_tp}x{e.ep}" + (f" {e.prefill_gpus}+{e.decode_gpus}" if e.disaggregated else "")
    return f"closed {e.model} {e.device} {e.engine} {e.engine_version} {e.precision} {spread} {prompt:g}/{output:g}"


def joined(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with one group for all sweeps that share a measurement."""
    first: dict[tuple[object, ...], str] = {}
    parent: dict[str, str] = {row.group: row.group for row in rows}

    def root(group: str) -> str:
        while parent[group] != group:
            group = parent[group]
        return group

    for row in rows:
        if not row.parts or not row.measured:
            continue
        e = row.parts[0][0]
        same = (e.prompt_tokens, e.output_tokens, e.concurrency, *sorted(row.measured.items()))
        parent[root(row.group)] = root(first.setdefault(same, row.group))
    return [_regrouped(row, root(row.group)) for row in rows]


def _regrouped(row: Row, group: str) -> Row:
    parts = tuple((dataclasses.replace(experiment, group=group), share) for experiment, share in row.parts)
    return dataclasses.replace(row, parts=parts)


FORMAT = Format(
    name="closed loop", tells=("isl", "osl", "moe_ep_size", "concurrency", "backend"), results=_RESULTS, read=read, device="system"
)
