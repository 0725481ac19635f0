"""What a decision by prediction costs: the configuration chosen for an SLO by prediction, beside the truly cheapest.

Configurations are measured runs that differ in GPU, engine, parallelism or concurrency and serve the same model with the same lengths;
repeats of a run are one configuration, of their geometric mean.  One costs GPUs x price over its throughput: dollars per million output
tokens at its concurrency.  For an SLO (TTFT and TPOT below a limit each):

- the best is the truly cheapest of those that truly meet it;
- the choice is the one of lowest *expected* cost.  Figures are drawn from their predicted intervals, those of one layout partly together
  (`TOGETHER`).  In a draw in which the option meets the SLO it costs its price.  Where not, that is a *miss*: a load test before the
  rollout shows it, and replicas are added, so that each serves fewer: what the cheapest option of the same layout costs that meets the
  SLO, or, where none does, the best choice of another layout; and `MISS` of that for the detour.  Without intervals that is the cheapest
  predicted to meet the SLO.  Where no draw meets it, the choice is what is predicted to miss it by least;
- what is paid is the cost of the choice if it truly meets the SLO, after a miss that of the cheapest run of the same layout that truly
  does.  A layout without such a run is given up, and the choice is made again among the others.  The regret is what is paid over the
  cost of the best, less 1.  Misses are counted beside it, for they cost more than money.

SLOs are drawn, not chosen: each limit log-uniformly between low and high quantiles of what was measured in the group.  An SLO that no
configuration truly meets asks nothing and is drawn again; one that all meet is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mlsys_bench import stats

Array = npt.NDArray[np.float64]

QUANTILES = (0.1, 0.9)
SLOS = 200  # per group
TRIES = 10  # draws per SLO before a group is given up
DRAWS = 100  # of the figures of all options, from their predicted intervals
_ROUNDS = 3  # of what a layout costs that may have to be given up for another, which may have to be given up
TOGETHER = 0.8  # of the variance of an option's errors, what all options of its layout have in common (assumed)
MISS = 0.2  # of the cost, what a choice that misses the SLO is charged when choosing: a load test more, and a second rollout (assumed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One configuration: what it costs per hour and gives, in truth and by prediction.  Throughput is output tokens per second."""

    group: str  # model and lengths: options of one group are alternatives
    layout: str  # GPU, engine, precision and parallelism
    usd_per_h: float
    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    predicted_ttft_s: float
    predicted_tpot_s: float
    predicted_tokens_per_s: float
    users: int = 0  # with layout and group: what is chosen; 0 where each option is one of its own
    ttft_sd: float = 0.0  # of the logarithm, by prediction
    tpot_sd: float = 0.0
    first_share: float = 0.5  # of a request's predicted time, that until its first token

    @property
    def cost(self) -> float:
        """Dollars per million output tokens, truly."""
        return self.usd_per_h / self.tokens_per_s / 3600 * 1e6

    @property
    def predicted_cost(self) -> float:
        """Dollars per million output tokens, by prediction."""
        return self.usd_per_h / self.predicted_tokens_per_s / 3600 * 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One SLO decided: the regret as a share of the best cost, and how many choices missed the SLO before one met it."""

    group: str
    ttft_limit_s: float
    tpot_limit_s: float
    regret: float
    misses: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """Decisions over many SLOs, each group with equal weight: every group is asked equally often."""

    groups: int
    options: int
    decisions: int
    median: float
    p90: float
    mean: float
    median_interval: tuple[float, float] | None  # 90 %, bootstrap over groups
    p90_interval: tuple[float, float] | None
    missed: float  # share of decisions whose first choice misses the SLO


@dataclass(frozen=True, slots=True, kw_only=True)
class Possible:
    """What may turn out of the options of a group: draws of their figures, by draw and option, and the layout of each as a number."""

    ttft_s: Array
    tpot_s: Array
    cost: Array
    layout: npt.NDArray[np.int64]


def possible(options: Sequence[Option], seed: int = 0) -> Possible:
    """Return draws from the predicted distributions: log-normal, TTFT and time per token apart, one layout's errors partly in common."""
    names = {name: i for i, name in enumerate(dict.fromkeys(o.layout for o in options))}
    layout = np.array([names[o.layout] for o in options], dtype=np.int64)
    rng, draws = np.random.default_rng(seed), DRAWS if any(o.ttft_sd or o.tpot_sd for o in options) else 1

    def factor(sd: Sequence[float]) -> Array:
        common, own = rng.standard_normal((draws, len(names)))[:, layout], rng.standard_normal((draws, len(options)))
        return np.asarray(np.exp((math.sqrt(TOGETHER) * common + math.sqrt(1 - TOGETHER) * own) * np.array(sd)))

    first, further = factor([o.ttft_sd for o in options]), factor([o.tpot_sd for o in options])
    share = np.array([o.first_share for o in options])
    return Possible(
        ttft_s=first * [o.predicted_ttft_s for o in options],
        tpot_s=further * [o.predicted_tpot_s for o in options],
        cost=(share * first + (1 - share) * further) * [o.predicted_cost for o in options],
        layout=layout,
    )


def decide(options: Sequence[Option], ttft_limit_s: float, tpot_limit_s: float, drawn: Possible | None = None) -> Decision | None:
    """Return the decision for one SLO; None when no option truly meets it.  `drawn` is what `possible` gives, where it is at hand."""
    good = [o.ttft_s <= ttft_limit_s and o.tpot_s <= tpot_limit_s for o in options]
    if not any(good):
        return None
    drawn = drawn or possible(options)
    meets = (drawn.ttft_s <= ttft_limit_s) & (drawn.tpot_s <= tpot_limit_s)
    best = min(o.cost for o, is_good in zip(options, good, strict=True) if is_good)
    left, misses = np.ones(len(options), dtype=bool), 0
    while True:
        choice = _choice(options, drawn, meets, left, (ttft_limit_s, tpot_limit_s))
        paid = [options[choice].cost] if good[choice] else []
        misses += not good[choice]
        paid = paid or [o.cost for o, is_good in zip(options, good, strict=True) if is_good and o.layout == options[choice].layout]
        if paid:
            break
        left &= drawn.layout != drawn.layout[choice]
    return Decision(
        group=options[0].group, ttft_limit_s=ttft_limit_s, tpot_limit_s=tpot_limit_s, regret=min(paid) / best - 1, misses=misses
    )


def _choice(
    options: Sequence[Option], drawn: Possible, meets: npt.NDArray[np.bool_], left: npt.NDArray[np.bool_], limits: tuple[float, float]
) -> int:
    """Return the option of lowest expected cost among those left; where none may meet the limits, what misses them by least."""
    among = np.flatnonzero(left)
    if not meets[:, among].any():
        return int(min(among.tolist(), key=lambda i: _order(options[i], *limits)))
    return int(among[np.argmin(_expected(drawn.cost[:, among], meets[:, among], drawn.layout[among]))])


def _expected(cost: Array, meets: npt.NDArray[np.bool_], layout: npt.NDArray[np.int64]) -> Array:
    """Return the expected cost of choosing each option first: its own, or what a miss comes to."""
    held = np.where(meets, cost, np.inf)
    names, place = np.unique(layout, return_inverse=True)
    cheapest = np.stack([held[:, layout == name].min(axis=1) for name in names], axis=1)
    never = np.isinf(cheapest)
    instead = np.full(len(names), float(np.median(cost, axis=0).max()))  # what choosing again among the other layouts comes to, at most
    for _ in range(_ROUNDS):
        first = np.where(never, (1 + MISS) * instead, cheapest).mean(axis=0)
        instead = np.array([min([*first[:i], *first[i + 1 :]], default=first[i]) for i in range(len(names))])
    after_miss = (1 + MISS) * np.where(never, instead, cheapest)
    return np.asarray(np.where(meets, cost, after_miss[:, place]).mean(axis=0))


def _order(o: Option, ttft_limit_s: float, tpot_limit_s: float) -> tuple[float, float]:
    """Return how far an option is predicted to miss the limits, and its cost."""
    excess = max(o.predicted_ttft_s / ttft_limit_s, o.predicted_tpot_s / tpot_limit_s, 1.0)
    return excess, o.predicted_cost


def configurations(options: Iterable[Option]) -> list[Option]:
    """Return the options with repeats of one run joined: their geometric mean, for nobody can choose between repeats."""
    runs: dict[tuple[object, ...], list[Option]] = {}
    for i, o in enumerate(options):
        runs.setdefault((o.group, o.layout, o.users or -i), []).append(o)
    return [_joined(same) for same in runs.values()]


def _joined(same: Sequence[Option]) -> Option:
    def centre(values: Iterable[float]) -> float:
        return math.exp(sum(map(math.log, values)) / len(same))

    return replace(
        same[0],
        ttft_s=centre(o.ttft_s for o in same),
        tpot_s=centre(o.tpot_s for o in same),
        tokens_per_s=centre(o.tokens_per_s for o in same),
        predicted_ttft_s=centre(o.predicted_ttft_s for o in same),
        predicted_tpot_s=centre(o.predicted_tpot_s for o in same),
        predicted_tokens_per_s=centre(o.predicted_tokens_per_s for o in same),
    )


def decisions(options: Iterable[Option], *, slos: int = SLOS, seed: int = 0) -> list[Decision]:
    """Return the decisions for SLOs drawn in every group that has at least two options."""
    groups: dict[str, list[Option]] = {}
    for option in configurations(options):
        groups.setdefault(option.group, []).append(option)
    rng = np.random.default_rng(seed)
    return [d for name in sorted(groups) if len(groups[name]) > 1 for d in _drawn(groups[name], slos, rng)]


def _drawn(options: Sequence[Option], slos: int, rng: np.random.Generator) -> list[Decision]:
    ends = [
        [math.log(q) for q in stats.quantiles(values, QUANTILES)] for values in ([o.ttft_s for o in options], [o.tpot_s for o in options])
    ]
    found: list[Decision] = []
    drawn = possible(options)
    for _ in range(slos * TRIES):
        ttft_s, tpot_s = (math.exp(rng.uniform(low, high)) for low, high in ends)
        decision = decide(options, ttft_s, tpot_s, drawn)
        if decision is not None:
            found.append(decision)
        if len(found) == slos:
            break
    return found


def summary(made: Sequence[Decision], options: int, *, seed: int = 0, resamples: int = 500) -> Regret:
    """Return the regret of at least one decision."""
    by_group: dict[str, list[float]] = {}
    for decision in made:
        by_group.setdefault(decision.group, []).append(decision.regret)
    groups = [np.array(values) for values in by_group.values()]
    everything = np.concatenate(groups)
    rng = np.random.default_rng(seed)
    drawn = [np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))]) for _ in range(resamples)]

    def around(p: float) -> tuple[float, float] | None:
        if len(groups) < 2:
            return None
        low, high = stats.quantiles([stats.quantile(sample, p) for sample in drawn], ((1 - stats.LEVEL) / 2, (1 + stats.LEVEL) / 2))
        return low, high

    return Regret(
        groups=len(groups),
        options=options,
        decisions=len(made),
        median=stats.quantile(everything, 0.5),
        p90=stats.quantile(everything, 0.9),
        mean=float(everything.mean()),
        median_interval=around(0.5),
        p90_interval=around(0.9),
        missed=sum(decision.misses > 0 for decision in made) / len(made),
    )
