"""Launch -> its one number.  The gate decides by it and the report draws it, so it stands below both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from mlsys_bench.types import Launch

ENOUGH_SAMPLES = 20  # un-preempted ones, for a median

Statistic = Literal["median", "best tenth", "share"]


def samples(launch: Launch) -> npt.NDArray[np.float64]:
    """Return every sample of a launch."""
    return np.array([v for r in launch.rounds for v in r.values], dtype=float)


def undisturbed(launch: Launch) -> npt.NDArray[np.float64] | None:
    """Return the samples without an involuntary context switch, or None where any round did not count them."""
    if any(r.involuntary is None for r in launch.rounds):
        return None
    switches = np.array([n for r in launch.rounds for n in r.involuntary or ()])
    return np.asarray(samples(launch)[switches == 0])


def statistic_for(launches: Sequence[Launch]) -> Statistic:
    """Return the one statistic that all these launches allow: two different ones must not be compared."""
    if all(_is_share(launch) for launch in launches):
        return "share"
    clean = [undisturbed(launch) for launch in launches]
    return "median" if all(c is not None and len(c) >= ENOUGH_SAMPLES for c in clean) else "best tenth"


def number(launch: Launch, statistic: Statistic, better: Literal["lower", "higher"]) -> float:
    """Return the one number of a launch: the median of undisturbed samples, the quantile a tenth from the good end, or a share of ones."""
    values = samples(launch)
    if statistic == "median":
        return float(np.median(undisturbed(launch)))  # type: ignore[arg-type]  # statistic_for has seen that it is there
    if statistic == "share":
        return share(launch, len(values))
    return float(np.quantile(values, 0.1 if better == "lower" else 0.9))


def share(launch: Launch, among: int) -> float:
    """Return the share of ones, never 0: it has a logarithm.  None counts as half a one `among` so many, alike for both sides."""
    return max(float(samples(launch).mean()), 0.5 / among)


def cpu_s(launch: Launch) -> float | None:
    """Return the median CPU time of all samples of a launch, or None where any round does not know it.

    Disturbed samples count: CPU time leaves out the waiting, and where few samples are undisturbed it is what there is.
    """
    if not launch.rounds or any(not r.cpu_s for r in launch.rounds):
        return None
    return float(np.median([c for r in launch.rounds for c in r.cpu_s or ()]))


def usable(launches: Sequence[Launch]) -> bool:
    """Say whether all launches have numbers with a logarithm that can be compared: shares of ones, or samples above zero."""
    pools = [samples(launch) for launch in launches]
    if not pools or not all(len(pool) for pool in pools):
        return False
    return all(float(pool.min()) > 0 for pool in pools) or all(_is_share(launch) for launch in launches)


def _is_share(launch: Launch) -> bool:
    """Say whether a launch holds zeros and ones, both or many: whether each request was good."""
    values = samples(launch)
    return len(values) > 1 and bool(np.isin(values, (0.0, 1.0)).all())
