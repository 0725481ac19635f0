"""What the errors of a prediction are made of, when the server logged its own steps: arrivals, steps, the rest.

A prediction is of hours of traffic on the machine that was calibrated; a load test is one draw of arrivals on the machine of another
minute.  So the same requests are simulated twice: with the profile of the prediction, and with steps as long as the server's own were.

    prediction - simulation of these arrivals          what this run's arrivals and lengths did
    that simulation - the one with the own steps       what changed in the machine since it was calibrated, or the profile has wrong
    the latter - measurement                           simulator, HTTP and client

For the second, the k-th simulated step of a kind (decodes alone; with prompt tokens) takes as many times what the profile says of it as the
k-th logged one of that kind took: with the same arrivals and lengths, the two are of about the same moment.  It looks back at the very run
that it explains, and predicts nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsys_bench import latency, stats, summary
from mlsys_bench.batching import Limits, StepFeatures
from mlsys_bench.checked import Cause, Causes, Check
from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.journeys import served
from mlsys_bench.types import LatencyProfile, RequestRecord, Requests

METRICS = {"ttft": summary.ttft_s, "tpot": summary.tpot_s, "e2e": summary.e2e_s}
FEWEST = 10  # steps of each kind, below which nothing is said
KINDS = ("decode", "prompt")

Ratios = dict[str, npt.NDArray[np.float64]]


def of(checks: Sequence[Check], profile: LatencyProfile, health: Mapping[str, Any], log: Path, requests: Requests) -> Causes | None:
    """Return what the errors of a load test's latencies are made of; None where too few steps were logged to tell.

    `health`: what the server says of itself.  `log`: its steps.  `requests`: the whole load test.
    """
    try:
        seen = served.of_run(log, requests)
    except (BadInput, MeasurementFailed):
        return None
    took, told = seen.period_s, np.asarray(latency.step_s(profile, list(seen.features.T)))
    rows = dict(zip(KINDS, (seen.features[:, 2] == 0, seen.features[:, 2] > 0), strict=True))
    if min(some.sum() for some in rows.values()) < FEWEST:
        return None
    limits = Limits(**health["limits"])
    own = _clock(profile, {kind: took[some] / told[some] for kind, some in rows.items()})
    again, as_they_were = (_latencies(served.replayed(requests, profile, limits, clock)) for clock in (None, own))
    longer = {kind: float(took[some].sum() / told[some].sum() - 1) for kind, some in {"all": took > 0, **rows}.items()}
    return Causes(steps_longer=longer, figures=tuple(_causes(checks, again, as_they_were)))


def _clock(profile: LatencyProfile, ratios: Ratios) -> Callable[[StepFeatures], float]:
    """Return a clock by which every step takes so many times what the profile says, kind by kind in their order."""
    tell = latency.clock(profile)
    following = {kind: itertools.cycle(each.tolist()) for kind, each in ratios.items()}
    return lambda step: tell(step) * next(following["prompt" if step.prefill_tokens else "decode"])


def _latencies(records: Sequence[RequestRecord]) -> dict[str, list[float]]:
    """Return the latencies of the requests that count, metric by metric."""
    counted = [r for r in records if r.in_window and r.outcome == "ok"]
    return {name: [v for r in counted if (v := metric(r)) is not None] for name, metric in METRICS.items()}


def _causes(checks: Sequence[Check], again: Mapping[str, list[float]], as_they_were: Mapping[str, list[float]]) -> Iterator[Cause]:
    for check in checks:
        metric, _, stat = check.key.removesuffix("_s").partition("_p")
        if not check.measured or check.error_percent is None or not again.get(metric):
            continue
        simulated, own = (stats.quantile(found[metric], float(stat) / 100) for found in (again, as_they_were))
        yield Cause(
            key=check.key,
            error_percent=check.error_percent,
            arrivals_percent=100 * (check.predicted - simulated) / check.measured,
            steps_percent=100 * (simulated - own) / check.measured,
            rest_percent=100 * (own - check.measured) / check.measured,
        )
