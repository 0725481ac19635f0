"""The part of a run that counts: after a warm-up that is given or found in the data, before the drain."""

from __future__ import annotations

import dataclasses

from mlsys_bench import summary, workload
from mlsys_bench.loadtest import Options, job
from mlsys_bench.timelines import Steadiness
from mlsys_bench.types import Requests


def settle(options: Options, work: job.Job, requests: Requests, end_s: float) -> tuple[job.Job, Requests, Steadiness | None]:
    """Return job and requests with the warm-up left out, and how that was found; all at once has no warm-up."""
    if options.offline is not None:
        return work, requests, None
    found = summary.settled(
        summary.columns.of(requests.requests),
        duration_s=end_s,
        warmup_s=options.warmup_s,
        stationary=is_stationary(options),
        open_loop=options.users is None,
    )
    counted = tuple(summary.windowed(requests.requests, found.warmup_s))
    return dataclasses.replace(work, warmup_s=found.warmup_s), dataclasses.replace(requests, requests=counted), found


def is_stationary(options: Options) -> bool:
    """Say whether the offered load is meant to stay the same."""
    return options.users is not None or (options.trace is None and workload.parse_arrivals(options.arrivals).is_steady)
