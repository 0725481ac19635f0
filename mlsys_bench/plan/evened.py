"""Requests of a short run made as usual as those of a long one: what is chance in a short run would be taken for the plan's figures.

Some thousand requests are by chance a few percent heavier or lighter than their law, and near saturation a few percent of load are tens
of percent of the wait.  So the lengths keep their order but take the values of an even sample of their law, and the clock is stretched
until the requests bring the very load they are planned at.  What happens within the run stays as random as it was.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from mlsys_bench import latency
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.workload import Schedule

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def evened(schedule: Schedule, replica: Replica, rate_per_s: float) -> Schedule:
    """Return the requests with even lengths, at the load that this rate brings to so many replicas."""
    level = schedule
    if schedule.tenant is None and schedule.prefix_offsets is None:
        prompt, output = replica.demand.prompt, replica.demand.output
        level = dataclasses.replace(
            schedule, prompt_tokens=_levelled(schedule.prompt_tokens, prompt), output_tokens=_levelled(schedule.output_tokens, output)
        )
    brought = float(work_s(replica, level.prompt_tokens, level.output_tokens).sum())
    nominal = rate_per_s * float(work_s(replica, replica.demand.prompt, replica.demand.output).mean())
    last_s = float(level.scheduled_s[-1])
    return dataclasses.replace(level, scheduled_s=level.scheduled_s * (brought / nominal / last_s)) if last_s > 0 else level


def _levelled(drawn: npt.NDArray[np.integer], law: Floats) -> Ints:
    """Return as many values of a law, evenly spread over it, in the order of those drawn."""
    rank = np.argsort(np.argsort(drawn, kind="stable"), kind="stable")
    even = np.interp((rank + 0.5) / len(drawn), (np.arange(len(law)) + 0.5) / len(law), np.sort(law))
    return np.maximum(np.rint(even), 1).astype(np.int64)


def work_s(replica: Replica, prompt: npt.ArrayLike, output: npt.ArrayLike) -> Floats:
    """Return the time that requests take of a full replica: their share of its steps, their cache, their prefill."""
    p, gaps = np.asarray(prompt, dtype=np.float64), np.asarray(output, dtype=np.float64) - 1
    seats, cached, mean = float(replica.slots), replica.slots * replica.context_tokens, replica.demand.mean_prompt
    bare_s, usual_s = (latency.step_s(replica.profile, (seats, kv, 0.0, 0.0, seats)) for kv in (0.0, cached))
    beside_s = latency.step_s(replica.profile, (seats, cached, mean, mean**2 / 2, seats + 1)) - usual_s
    return np.asarray(gaps * bare_s / seats + (usual_s - bare_s) / cached * gaps * (p + gaps / 2) + beside_s / mean * p)
