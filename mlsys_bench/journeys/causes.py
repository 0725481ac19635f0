"""What the errors of a prediction are made of, when the server logged its own steps: arrivals, steps, the rest.

A prediction is of hours of traffic on the machine that was calibrated; a load test is one draw of arrivals on the machine of another
minute.  So the same requests are simulated twice: with the profile of the prediction, and with steps as long as the server's own were.

    prediction - simulation of these arrivals          what this run's arrivals and lengths did
    that simulation - the one with the own steps       what changed in the machine since it was calibrated, what the profile has wrong, and
                                                       how single steps scatter, which a profile does not say
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
ALIKE, FEW = 0.05, 3  # by which share, or number, simulated and logged steps may differ
KINDS = ("decode", "prompt")

Ratios = dict[str, npt.NDArray[np.float64]]


def of(checks: Sequence[Check], profile: LatencyProfile, health: Mapping[str, Any], log: Path, requests: Requests) -> Causes | None:
    """Return what the errors of a load test's latencies are made of; None where the log cannot tell.

    That is of too few steps, and of requests that were never answered: their steps are in the log, and no simulation knows their lengths.
    `health`: what the server said of itself.  `log`: its steps.  `requests`: the whole load test.
    """
    try:
        seen = served.of_run(log, requests)
    except (BadInput, MeasurementFailed, OSError):
        return None
    told = np.asarray(latency.step_s(profile, list(seen.features.T)))
    sound = (seen.period_s > 0) & (told > 0)
    prompt = seen.features[:, 2] > 0
    rows = {"all": sound, "decode": sound & ~prompt, "prompt": sound & prompt}
    ratios = {kind: seen.period_s[rows[kind]] / told[rows[kind]] for kind in KINDS}
    if min(map(len, ratios.values())) < FEWEST:
        return None
    limits, own = Limits(**health["limits"]), _Clock(latency.clock(profile), ratios)
    again, as_they_were = (_latencies(served.replayed(requests, profile, limits, clock)) for clock in (None, own))
    if not own.is_alike():
        return None
    return Causes(
        steps_longer={kind: float(seen.period_s[some].sum() / told[some].sum() - 1) for kind, some in rows.items()},
        others_share=served.waited(profile, seen),
        figures=tuple(_causes(checks, again, as_they_were)),
    )


class _Clock:
    """By which every step takes so many times what the profile says, kind by kind in their order; from the beginning again at the end."""

    def __init__(self, tell: Callable[[StepFeatures], float], ratios: Ratios) -> None:
        self._tell = tell
        self._logged = {kind: len(each) for kind, each in ratios.items()}
        self._taken = dict.fromkeys(ratios, 0)
        self._following = {kind: itertools.cycle(each.tolist()) for kind, each in ratios.items()}

    def __call__(self, step: StepFeatures) -> float:
        """Return the seconds of the next step."""
        kind = KINDS[step.prefill_tokens > 0]
        self._taken[kind] += 1
        return float(self._tell(step) * next(self._following[kind]))

    def is_alike(self) -> bool:
        """Say whether about as many steps of each kind were asked for as were logged: then the k-th of both are of one moment."""
        return all(abs(self._taken[kind] - logged) <= max(ALIKE * logged, FEW) for kind, logged in self._logged.items())


def _latencies(records: Sequence[RequestRecord]) -> dict[str, list[float]]:
    """Return the latencies of the requests that count, metric by metric."""
    counted = [r for r in records if r.in_window and r.outcome == "ok"]
    return {name: [v for r in counted if (v := metric(r)) is not None] for name, metric in METRICS.items()}


def _causes(checks: Sequence[Check], again: Mapping[str, list[float]], as_they_were: Mapping[str, list[float]]) -> Iterator[Cause]:
    for check in checks:
        metric, _, stat = check.key.removesuffix("_s").partition("_p")
        if not check.measured or check.error_percent is None or not again.get(metric) or not as_they_were[metric]:
            continue
        simulated, own = (stats.quantile(found[metric], float(stat) / 100) for found in (again, as_they_were))
        yield Cause(
            key=check.key,
            error_percent=check.error_percent,
            arrivals_percent=100 * (check.predicted - simulated) / check.measured,
            steps_percent=100 * (simulated - own) / check.measured,
            rest_percent=100 * (own - check.measured) / check.measured,
        )
