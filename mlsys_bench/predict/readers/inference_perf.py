"""inference-perf's `stage_N_lifecycle_metrics.json`: one load stage.

As in inference_perf/reportgen: `load_summary` (requested and achieved rate), `successes.latency.NAME` in seconds, `throughput`, and the
lengths: `prompt_tokens` and `output_tokens` as the server counted them (0.7), `prompt_len` and `output_len` before.  Traps:
`inter_token_latency` and, in older versions, `time_per_output_token` are per chunk of the stream and may be half the token gap, so TPOT
is taken from request latency, TTFT and output length; latency counts from the real send, so a client that fell behind its schedule hides
the queue.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlsys_bench.errors import BadInput
from mlsys_bench.predict.readers.parts import STATS, Run, at, first, lengths_from_tails, number, whole, whole_or_none

NAME = "inference-perf"
_PROMPT, _OUTPUT = ("prompt_tokens", "prompt_len"), ("output_tokens", "output_len")
_METRICS = {"time_to_first_token": "ttft", "request_latency": "e2e"}
_BEHIND = 0.05  # of the request latency: a client later than that did not send the load it was asked for
_SAME = 0.05  # a tool's own time per token this near to the implied one is per token


def knows(document: Any) -> bool:
    """Say whether this is such a stage."""
    return isinstance(at(document, "successes", "latency"), Mapping) and isinstance(at(document, "load_summary"), Mapping)


def runs(document: Mapping[str, Any], where: str) -> list[Run]:
    """Return the one run of a stage."""
    load, done = document["load_summary"], document["successes"]
    rate, concurrency = number(load.get("requested_rate")), number(load.get("concurrency"))
    if rate is None and concurrency is None:
        raise BadInput(f"{where}: a summary over several stages has no rate of its own; give the stage_N_lifecycle_metrics.json files")
    measured = _measured(done)
    rate, notes = _sent(load, rate, measured)
    return [
        Run(
            prompt_tokens=_lengths(done, _PROMPT, where),
            output_tokens=_lengths(done, _OUTPUT, where),
            rate_per_s=None if concurrency is not None else rate,
            arrivals="poisson",
            concurrency=whole_or_none(concurrency, "concurrency"),
            measured=measured,
            requests=whole(done["count"], "successes.count"),
            failed=whole(first(at(document, "failures", "count"), 0), "failures.count"),
            duration_s=_duration_s(done),
            notes=notes,
        )
    ]


def _measured(done: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric, name in _METRICS.items():
        values = at(done, "latency", metric) or {}
        figures = {"mean": values.get("mean"), **{p: values.get("median" if p == "p50" and "median" in values else p) for p in STATS}}
        found |= {f"{name}_{stat}_s": float(v) for stat, v in figures.items() if v and number(v)}
    outputs = number(at(_told(done, _OUTPUT), "mean"))
    if outputs and outputs > 1 and {"e2e_mean_s", "ttft_mean_s"} <= set(found):
        found["tpot_mean_s"] = (found["e2e_mean_s"] - found["ttft_mean_s"]) / (outputs - 1)
        said = at(done, "latency", "time_per_output_token") or {}
        if number(said.get("mean")) and abs(said["mean"] / found["tpot_mean_s"] - 1) <= _SAME and number(said.get("median")):
            found["tpot_p50_s"] = float(said["median"])
    return found


def _sent(load: Mapping[str, Any], rate: float | None, measured: Mapping[str, float]) -> tuple[float | None, tuple[str, ...]]:
    """Return the rate that was really sent, and a note where that is not the one asked for."""
    late, achieved = number(at(load, "schedule_delay", "mean")), number(load.get("achieved_rate"))
    if rate is None or late is None or achieved is None or late <= _BEHIND * measured.get("e2e_mean_s", 0.0):
        return rate, ()
    return achieved, (f"the client sent {late:.2g} s late on average: {achieved:.4g}/s went out, not {rate:g}/s",)


def _duration_s(done: Mapping[str, Any]) -> float | None:
    """Return how long the stage took, by its requests and their rate."""
    rate = number(at(done, "throughput", "requests_per_sec"))
    return int(done["count"]) / rate if rate else None


def _told(done: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """Return the first summary of lengths that says their mean."""
    return next((done[name] for name in names if number(at(done, name, "mean"))), None)


def _lengths(done: Mapping[str, Any], names: tuple[str, ...], where: str) -> Any:
    values = _told(done, names)
    if values is None and not done["count"]:
        return lengths_from_tails(1.0, None, None, None)
    if values is None:
        raise BadInput(f"{where}: successes has neither {' nor '.join(names)}: how many tokens had its requests?")
    return lengths_from_tails(float(values["mean"]), number(values.get("p10")), number(values.get("p90")), number(values.get("max")))
