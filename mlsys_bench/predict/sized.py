"""How many replicas a prediction would rent, beside how many the measurement shows to be needed.

A measured run says: a replica under this load has these latencies.  So with one of them as the limit, this load is the most that a replica
carries, and a traffic of `FLEET` times it needs `FLEET` replicas.  A planner asks the prediction: the highest load at which the same
latency is foreseen within the limit, and rents traffic / that many.  Runs without a load (MLPerf) give the highest rate themselves.

    questions()  for each run, the same design at loads from a quarter to four times its own: what has to be predicted
    answers()    from predictions of these: rate of one system and replicas, with 90 % intervals; open ends stand at a factor of four

In a closed loop the load is users and what a fleet serves is their requests per second, users / latency (Little's law).  Between loads
latencies go on straight lines of logarithms.  Where latency hardly depends on load, a small error of it is a large one of replicas: a
limit so close to an idle system's latency asks for what nobody can foresee, and `steepness` tells such questions apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mlsys_bench.predict.experiment import Experiment, Prediction
from mlsys_bench.predict.saturation import asks_for_rate
from mlsys_bench.predict.score import Judged

Array = npt.NDArray[np.float64]
FLEET = 10  # replicas that the measurement shows to be needed
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the load, that are predicted
LIMITS = {"e2e": ("e2e",), "tpot": ("tpot", "itl"), "ttft": ("ttft",)}  # what may be limited, and the figures it is called by
RATE = "own limits"  # of a run whose highest rate is asked for
STATS = ("mean", "p50")
ENOUGH = 1.0 + 1e-9
STEEP = (  # by how much latency grows with a tenth more load: slopes of logarithms up to 0.05, 0.2, above
    (0.05, "under 0.5 %"),
    (0.2, "0.5 to 2 %"),
    (math.inf, "over 2 %"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One limit of one run: the rate that one system is foreseen to carry within it, and the replicas that follows for.

    `rate_per_s` and `replicas` are (point, low, high); `measured_per_s` is the rate that it carried, None where nothing was measured.
    """

    limit: str
    limit_s: float | None
    rate_per_s: tuple[float, float, float]
    measured_per_s: float | None
    steepness: str | None = None

    @property
    def replicas(self) -> tuple[float, float, float] | None:
        """Replicas for `FLEET` times the rate that was measured, not rounded."""
        if self.measured_per_s is None:
            return None
        point, low, high = (FLEET * self.measured_per_s / rate for rate in self.rate_per_s)
        return point, high, low

    @property
    def rented(self) -> tuple[int, int] | None:
        """Return whole replicas: as planned, and at the upper end of the interval."""
        return None if self.replicas is None else (math.ceil(self.replicas[0] / ENOUGH), math.ceil(self.replicas[2] / ENOUGH))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """How well fleets were sized.  Shares of rows; `kept`: rented at least what is needed, so the limit holds as measured.

    `safe` is the same for a fleet of the interval's upper end, `safe_size` how many times the replicas needed that is, in the median.
    """

    rows: int
    within: int  # one replica, which is 10 % of `FLEET`
    kept: int
    safe: int
    size: float  # rented over needed, median
    safe_size: float


def questions(e: Experiment) -> Iterator[Experiment]:
    """Yield a run at its loads, without what was measured; only itself where it has none."""
    if asks_for_rate(e):
        yield replace(e, measured={})
        return
    for factor in FACTORS:
        yield at(e, factor)


def at(e: Experiment, factor: float) -> Experiment:
    """Return a run at so many times its load."""
    rate = None if e.rate_per_s is None else e.rate_per_s * factor
    users = None if e.concurrency is None else max(1, round(e.concurrency * factor))
    sent = None if e.requests is None else max(1, round(e.requests * factor))
    return replace(e, key=f"{e.key}*{factor:g}", rate_per_s=rate, concurrency=users, requests=sent, measured={})


def answers(e: Experiment, predictions: Mapping[str, Prediction]) -> Iterator[Answer]:
    """Yield the answer for each limit that the run's results give; of a run without a load its highest rate, measured or not."""
    if asks_for_rate(e):
        found = predictions.get(e.key)
        if found is not None and "max_rate_per_s" in found.figures:
            yield Answer(
                limit=RATE, limit_s=None, rate_per_s=found.figures["max_rate_per_s"], measured_per_s=e.measured.get("max_rate_per_s")
            )
        return
    curve = [(load(at(e, factor)), predictions.get(f"{e.key}*{factor:g}")) for factor in FACTORS]
    known = {users: found for users, found in curve if found is not None}
    measured = with_e2e(e)
    for limit, names in LIMITS.items():
        figure = next((f"{name}_{stat}_s" for stat in STATS for name in names if f"{name}_{stat}_s" in measured), None)
        if figure is not None and known and all(figure in found.figures for found in known.values()):
            yield _answer(e, limit, figure, measured, known)


def load(e: Experiment) -> float:
    """Return the load of a run: requests per second, or users."""
    return float(e.rate_per_s if e.rate_per_s is not None else e.concurrency or 1)


def with_e2e(e: Experiment) -> dict[str, float]:
    """Return what was measured, with the mean latency where TTFT and the time per token make it up."""
    found = dict(e.measured)
    for stat in STATS:
        ttft, tpot = found.get(f"ttft_{stat}_s"), found.get(f"tpot_{stat}_s")
        if ttft is not None and tpot is not None and stat == "mean":
            found.setdefault("e2e_mean_s", ttft + (e.output_tokens.mean - 1) * tpot)
    return found


def _answer(e: Experiment, limit: str, figure: str, measured: Mapping[str, float], known: Mapping[float, Prediction]) -> Answer:
    loads = np.array(list(known))
    ends = [np.maximum.accumulate([found.figures[figure][end] for found in known.values()]) for end in range(3)]
    carried = [_highest(loads, ends[end], measured[figure]) for end in (0, 2, 1)]  # the slow end of a latency is the low end of a load
    if e.rate_per_s is not None:
        rates, seen = carried, e.rate_per_s
    else:
        stat = "p50" if "_p50_" in figure else "mean"
        whole = f"e2e_{stat}_s"
        if whole not in measured or any(whole not in found.figures for found in known.values()):
            rates, seen = carried, load(e)
        else:
            slow = [[found.figures[whole][end] for found in known.values()] for end in (0, 2, 1)]
            rates = [users / _between(loads, np.array(lat), users) for users, lat in zip(carried, slow, strict=True)]
            seen = load(e) / measured[whole]
    point, low, high = rates
    return Answer(
        limit=limit,
        limit_s=measured[figure],
        rate_per_s=(point, min(low, point), max(high, point)),
        measured_per_s=seen,
        steepness=_steepness(loads, ends[0], load(e)),
    )


def _highest(loads: Array, latency_s: Array, limit_s: float) -> float:
    """Return the highest load at which a rising latency is within a limit; the ends of what is known beyond it."""
    if latency_s[0] > limit_s:
        return float(loads[0])
    if latency_s[-1] <= limit_s:
        return float(loads[-1])
    at = int(np.searchsorted(latency_s, limit_s, side="right"))
    low, high = (math.log(float(x)) for x in latency_s[at - 1 : at + 1])
    share = (math.log(limit_s) - low) / (high - low) if high > low else 0.0
    return float(loads[at - 1] * (loads[at] / loads[at - 1]) ** share)


def _between(loads: Array, values: Array, users: float) -> float:
    return math.exp(float(np.interp(math.log(users), np.log(loads), np.log(values))))


def _steepness(loads: Array, latency_s: Array, here: float) -> str:
    """Return by how much latency is foreseen to depend on load, in words: d log(latency) / d log(load) over half to twice the load."""
    low, high = (_between(loads, latency_s, here * factor) for factor in (0.5, 2.0))
    slope = math.log(high / low) / math.log(4.0)
    return next(words for most, words in STEEP if slope < most)


# ---------------------------------------------------------------- how good that is


def judged(e: Experiment, found: Sequence[Answer], tags: Mapping[str, str]) -> Iterator[tuple[Judged, Answer]]:
    """Yield each answer that can be judged: replicas, of which `FLEET` are needed."""
    for answer in found:
        if answer.replicas is not None:
            point, low, high = answer.replicas
            own = {**tags, "limit": answer.limit, **({"steepness": answer.steepness} if answer.steepness else {})}
            yield (
                Judged(figure=f"replicas by {answer.limit}", measured=FLEET, predicted=point, low=low, high=high, group=e.group, tags=own),
                answer,
            )


def summary(found: Sequence[Answer]) -> Sized:
    """Return how well at least one fleet was sized."""
    rented = [answer.rented for answer in found if answer.rented is not None]

    def share(holds: Callable[[tuple[int, int]], bool]) -> int:
        return sum(holds(fleet) for fleet in rented)

    return Sized(
        rows=len(rented),
        within=share(lambda fleet: abs(fleet[0] - FLEET) <= 1),
        kept=share(lambda fleet: fleet[0] >= FLEET),
        safe=share(lambda fleet: fleet[1] >= FLEET),
        size=float(np.median([fleet[0] for fleet in rented])) / FLEET,
        safe_size=float(np.median([fleet[1] for fleet in rented])) / FLEET,
    )
