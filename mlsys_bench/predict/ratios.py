"""Other figures from the two that physics gives: E2E from TTFT and time per token, percentiles from their centre.

log(figure / base) is a constant of all, plus deviations shared by client and engine, by model, by layout, and of the row: a random-effects
model whose variances are fixed shares of the whole (`_SHARES`), so that little data moves it little.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlsys_bench.predict import figures, floor
from mlsys_bench.predict.experiment import Experiment, Prediction
from mlsys_bench.types import Provenance

Array = npt.NDArray[np.float64]
FURTHER = floor.FURTHER
FIRST = ("ttft_mean_s", "ttft_p50_s")
Z90 = 1.645
_SHARES = (0.25, 0.2, 0.3)  # of the variance: client and engine, model, layout; the rest is the row's own
_ENDS = (0.1, 0.7, 0.1)  # the same for E2E: it differs from TTFT and tokens where answers end early, which is a habit of the model
_MOST_STARTED = 0.5  # of a time per token: what a start is taken to have added at most
_ALIKE = 3  # rows of the same client, engine and start from which on they say more than the defaults
_ANY_START = ("e2e_mean_s", "e2e_p50_s", "e2e_p90_s")  # a server just started delays fewer requests than these figures feel
_TAIL = {"e2e_p95_s": 1.645 / 1.2816, "e2e_p99_s": 2.3263 / 1.2816}  # of a normal law: the log-ratio over that of the 90th percentile
_DEFAULTS = {  # of log(figure / base) where nothing was measured: centre and sd
    "ttft_p50_s": (-0.05, 0.15), "ttft_mean_s": (0.0, 0.1), "ttft_p90_s": (0.25, 0.3), "ttft_p95_s": (0.35, 0.4), "ttft_p99_s": (0.7, 0.6),
    "tpot_p50_s": (0.0, 0.03), "tpot_mean_s": (0.0, 0.03), "itl_mean_s": (0.0, 0.03), "itl_p50_s": (-0.05, 0.1), "tpot_p99_s": (0.1, 0.15),
    "tpot_p90_s": (0.06, 0.1), "itl_p90_s": (0.1, 0.2), "itl_p99_s": (0.5, 0.5),
    "e2e_mean_s": (0.0, 0.03), "e2e_p50_s": (0.0, 0.03), "e2e_p90_s": (0.04, 0.05), "e2e_p95_s": (0.06, 0.06), "e2e_p99_s": (0.12, 0.12),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """Of each figure: groups and log-ratios of the rows that have it."""

    keys: dict[str, tuple[tuple[Hashable, ...], ...]]
    values: dict[str, Array]


def learn(rows: Sequence[Experiment]) -> Ratios:
    """Return what rows say of the relation of their figures."""
    keys: dict[str, list[tuple[Hashable, ...]]] = {}
    values: dict[str, list[float]] = {}
    for e, warm, median in zip(rows, without_start(rows), _medians(rows), strict=True):
        tpot, ttft = _first(warm, *FURTHER), _mean_ttft(warm, median)
        for name, value in (e.measured | {name: warm[name] for name in _ANY_START if name in warm}).items():
            base = _base(name, e, tpot, ttft, median)
            if name in _DEFAULTS and base and value > 0:
                keys.setdefault(name, []).append(_groups(e, name))
                values.setdefault(name, []).append(math.log(value / base))
    return Ratios(keys={n: tuple(k) for n, k in keys.items()}, values={n: np.array(v) for n, v in values.items()})


def warm_times(rows: Sequence[Experiment]) -> list[tuple[float | None, float | None]]:
    """Return the time per further token and the mean TTFT of each row, of a server just started without its slow first requests."""
    return [(_first(warm, *FURTHER), _mean_ttft(warm, median)) for warm, median in zip(without_start(rows), _medians(rows), strict=True)]


def without_start(rows: Sequence[Experiment]) -> list[dict[str, float]]:
    """Return what was measured of each row, the means of a server just started without its slow first requests.

    Those are in a mean and not in the 90th percentile, and warm runs of evenly spaced, equal requests have the two at one ratio: a wait of
    up to a step is uniform, and answers take all but the same time.  Where it is less than the median over the rows of its client, the
    mean is taken to be too high by that much.  What E2E is too high by beyond TTFT was waited for between tokens.
    """
    usual: dict[Hashable, list[float]] = {}
    for e in rows:
        for what in ("ttft", "e2e"):
            mean, p90 = e.measured.get(f"{what}_mean_s"), e.measured.get(f"{what}_p90_s")
            if mean and p90:
                usual.setdefault((what, *_client(e)), []).append(p90 / mean)
    return [_without_start(e, usual) if e.cold_start else dict(e.measured) for e in rows]


def _without_start(e: Experiment, usual: dict[Hashable, list[float]]) -> dict[str, float]:
    """Return what was measured of a row whose server was just started, given p90 over mean of all rows by figure and client."""
    found = dict(e.measured)
    slow: dict[str, float] = {}
    for what in ("ttft", "e2e"):
        mean, p90 = e.measured.get(f"{what}_mean_s"), e.measured.get(f"{what}_p90_s")
        alike = usual.get((what, *_client(e)), [])
        if mean and p90 and len(alike) >= _ALIKE:
            slow[what] = max(0.0, mean - p90 / float(np.median(alike)))
            found[f"{what}_mean_s"] = mean - slow[what]
    further = e.output_tokens.mean - 1
    if len(slow) == 2 and further >= 1:
        between = max(0.0, slow["e2e"] - slow["ttft"]) / further
        for name in ("itl_mean_s", "tpot_mean_s"):
            if name in found:
                found[name] -= min(between, _MOST_STARTED * found[name])
    return found


def _client(e: Experiment) -> tuple[Hashable, ...]:
    """Return what rows have to share for their percentiles to lie alike: engine, kind of load, arrivals."""
    return e.engine, e.concurrency is None, e.rate_per_s is None, e.arrivals


def _mean_ttft(measured: dict[str, float], median: float) -> float | None:
    """Return the mean TTFT, from the median where that alone was measured, which lies e^median off."""
    ttft = _first(measured, *FIRST)
    return ttft if ttft is None or "ttft_mean_s" in measured else ttft / math.exp(median)


def _medians(rows: Sequence[Experiment]) -> list[float]:
    """Return how far the median TTFT lies off the mean by physics, as a logarithm, of the rows whose median was measured; 0 of others."""
    asked = [i for i, e in enumerate(rows) if "ttft_p50_s" in e.measured]
    found = [0.0] * len(rows)
    for i, median in zip(asked, figures.settled([rows[i] for i in asked]), strict=True):
        found[i] = float(median)
    return found


def complete(
    e: Experiment, known: Ratios, further: tuple[float, float], first: tuple[float, float], provenance: Provenance, median: float = 0.0
) -> Prediction:
    """Return all figures of an experiment: from the log and its sd of the time per token and of TTFT, whose median lies e^median off.

    No time per token, nor the low end of its interval, is below `floor`, whatever was learned.
    """
    least = floor.least_s(e)
    tpot, ttft = max(math.exp(further[0]), least), math.exp(first[0])
    all_figures: dict[str, tuple[float, float, float]] = {}
    for name in _DEFAULTS:
        base = _base(name, e, tpot, ttft, median)
        if not base or (e.output_tokens.mean <= 1 and name.startswith(("tpot", "itl"))):
            continue
        centre, spread = ratio(e, name, known)
        by_first = ttft / base if name.startswith("e2e") else 1.0 if name.startswith("ttft") else 0.0
        own = math.hypot(by_first * first[1], (1 - by_first) * further[1], spread)
        bound = least if name.startswith(("tpot", "itl")) else 0.0
        middle = max(base * math.exp(centre), bound)
        all_figures[name] = (middle, max(middle * math.exp(-Z90 * own), bound), middle * math.exp(Z90 * own))
    for name in all_figures:
        if name.startswith("e2e") and (first_token := all_figures.get(f"ttft{name[3:]}")):
            all_figures[name] = tuple(map(max, all_figures[name], first_token))  # type: ignore[assignment]  # three of each
    return Prediction(key=e.key, figures=all_figures, provenance=provenance)


def ratio(e: Experiment, name: str, known: Ratios) -> tuple[float, float]:
    """Return the expected log-ratio of a figure to its base, and its sd."""
    centre, sd = _expected(e, name, known)
    if name not in known.values:
        return centre, sd
    mine = _groups(e, name)
    alike = [i for i, other in enumerate(known.keys[name]) if other[0] == mine[0]]
    if len(alike) < _ALIKE:
        return centre, sd
    values, keys = known.values[name][alike], [known.keys[name][i] for i in alike]
    middle = float(np.median(values))
    spread = max(1.4826 * float(np.median(np.abs(values - middle))), 0.3 * float(np.std(values)), 0.003)
    weight = len(values) / (len(values) + 4.0)
    centre, variance = weight * middle + (1 - weight) * centre, weight * spread**2 + (1 - weight) * sd**2
    same = np.array([[a == b for a, b in zip(mine, other, strict=True)] for other in keys], dtype=float)
    near = np.arange(len(keys))[-400:]
    shares = np.array(_ENDS if name in _ANY_START else _SHARES)
    codes = [[hash(keys[i][g]) for i in near] for g in range(3)]
    covariance = sum(s * np.equal.outer(c, c) for s, c in zip(shares, codes, strict=True)) + (1 - shares.sum()) * np.eye(len(near))
    across = same[near] @ shares
    weights = np.linalg.solve(covariance, across)
    off = np.clip(values[near] - centre, -4 * spread, 4 * spread)
    return centre + float(weights @ off), math.sqrt(variance * max(1 - float(weights @ across), 0.05))


def _expected(e: Experiment, name: str, known: Ratios) -> tuple[float, float]:
    """Return what is expected of a log-ratio and its sd before rows of this very figure.

    A median E2E has the mean's habits.  The tail of a warm server follows from its p90; of one just started, p95 lies between p90 and p99.
    """
    if name == "e2e_p50_s":
        return ratio(e, "e2e_mean_s", known)
    if name not in _TAIL or (e.cold_start and name == "e2e_p99_s"):
        return _DEFAULTS[name]
    (mean, _), (p90, sd) = ratio(e, "e2e_mean_s", known), ratio(e, "e2e_p90_s", known)
    if not e.cold_start:
        return mean + _TAIL[name] * max(p90 - mean, 0.0), _TAIL[name] * sd
    p99, sd99 = ratio(e, "e2e_p99_s", known)
    share = (_TAIL[name] - 1) / (_TAIL["e2e_p99_s"] - 1)
    return p90 + share * max(p99 - p90, 0.0), (1 - share) * sd + share * sd99


def _groups(e: Experiment, name: str) -> tuple[Hashable, ...]:
    client = (e.engine, e.concurrency is None, e.cold_start and name not in _ANY_START)
    return client, (*client, e.model), (*client, *e.layout, round(e.output_tokens.mean))


def _first(measured: dict[str, float], *wanted: str) -> float | None:
    return next((measured[name] for name in wanted if measured.get(name)), None)


def _base(name: str, e: Experiment, tpot: float | None, ttft: float | None, median: float) -> float | None:
    """Return what a figure is related to."""
    if name == "ttft_p50_s":
        return None if ttft is None else ttft * math.exp(median)
    if name.startswith("e2e"):
        return None if tpot is None or ttft is None else ttft + (max(e.output_tokens.mean, 1.0) - 1) * tpot
    return ttft if name.startswith("ttft") else tpot
