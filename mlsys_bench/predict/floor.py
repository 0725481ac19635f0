"""What no run of a layout can have measured, and no prediction may say: a token faster than its weights are read, a wait of days."""

from __future__ import annotations

from mlsys_bench import models, units
from mlsys_bench.latency import step
from mlsys_bench.predict.experiment import Experiment
from mlsys_bench.predict.figures import MOST_DRAFTS, constants

LONGEST_S = 86_400.0  # of a first token, a further one or an answer: more is a slip of the unit
FURTHER = ("tpot_mean_s", "itl_mean_s", "tpot_p50_s", "itl_p50_s")  # names of the time per further token, in order of preference
_TIMES = ("ttft", "tpot", "itl", "e2e")
_ROUNDED = 0.9  # of the floor: bandwidths of datasheets are rounded


def least_s(e: Experiment) -> float:
    """Return the least seconds per further token: the weights one sequence needs, read at full bandwidth, and every draft accepted."""
    k = constants(e)
    read_s = step.weights_s(k, 1.0) + (k.get("attention_bytes", 0.0) + k.get("head_bytes", 0.0)) / k["bandwidth_bytes_per_s"]
    drafts = 0 if e.speculative is None else e.draft_tokens or MOST_DRAFTS
    return float(read_s) / (1 + drafts)


def problem(e: Experiment) -> str | None:
    """Return which of its figures no such system can have shown, and why; None where all may be."""
    for name, took_s in e.measured.items():
        if name.startswith(_TIMES) and took_s > LONGEST_S:
            return f"{name.removesuffix('_s')} is {units.show_s(took_s)}, and no run was that slow"
    told = {name: e.measured[name] for name in FURTHER if e.measured.get(name)}
    least = least_s(e) if told else 0.0
    for name, took_s in told.items():
        if took_s < _ROUNDED * least:
            reads = f"to read the weights of {models.find(e.model).id} in {e.precision}"
            return f"{name.removesuffix('_s')} is {units.show_s(took_s)}, and {e.device} takes {units.show_s(least)} at least {reads}"
    return None
