"""Absolute limits on load tests: `ttft_p95<500ms`, `goodput>99%` held against the candidate's runs.

Where the files of requests are at hand a quantile keeps its limit when few enough requests lie beyond it, as in `gate.budgets`: blocks of
neighbouring requests, and runs, say how many independent ones they are worth.  Else the summaries' own intervals are used.  A request that
failed lies beyond every limit of a quantile, as in the verdict of a load test; one that was given up on purpose is none.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from mlsys_bench import errors, stats, summary
from mlsys_bench import slo as promised
from mlsys_bench.gate import budgets
from mlsys_bench.gate import policy as rules
from mlsys_bench.gate.budgets import Budget
from mlsys_bench.gate.sequence import Floats
from mlsys_bench.summary import promises
from mlsys_bench.types import SLO, Launch, LoadTest, Round
from mlsys_bench.verdicts import Finding, Policy, Word

_BLOCKS = 20  # of neighbouring requests, of a run
_LEVEL = 0.005  # chance that a bound is wrong, each


def findings(
    base: Sequence[LoadTest], cand: Sequence[LoadTest], requests: Sequence[summary.Columns], policy: Policy, *, enough: bool, slack: float
) -> Iterator[Finding]:
    """Yield each limit of the policy, held against the candidate's runs and their requests, where those are at hand.

    With `enough` runs they decide; fewer are at most suspect, unless they are beyond the limit by a factor of exp(slack) as well.
    """
    for text in policy.budgets:
        budget = budgets.parse(text)
        _check(budget, text)
        samples = _samples(budget, cand, requests, policy)
        verdict, reason = _of_requests(budget, samples, enough, slack) if samples else _of_summaries(budget, cand, enough, slack)
        figures = [_figure(budget, runs) for runs in (base, cand)]
        yield Finding(
            name=budget.name, parameters={}, unit=budget.dimension, better="lower" if budget.sign == "<" else "higher", kind="budget",
            baseline=figures[0], candidate=figures[1], ratio=None, interval=None, verdict=verdict, reason=reason, limit=budget.limit,
            may_fail=rules.may_fail(policy, budget.name), pairs=min(len(base), len(cand)),
        )  # fmt: skip


def _check(budget: Budget, text: str) -> None:
    known = (*promised.LATENCIES, *promised.SHARES)
    if budget.metric not in known:
        raise errors.unknown("metric of a load test", budget.metric, known, f"budget {text!r}")
    budgets.fits(budget, "share" if budget.metric in promised.SHARES else "s")
    if budget.metric in promised.LATENCIES and budget.stat is None:
        raise errors.BadInput(f"budget {text!r}: {budget.metric} needs a statistic, e.g. {budget.metric}_p95")


def _word(low: float, high: float, allowed: float, enough: bool, clear: bool) -> Word:
    """Return what bounds of a figure that must stay below a limit say."""
    if high <= allowed:
        return "pass"
    if low <= allowed:
        return "inconclusive"
    return "regression" if enough or clear else "suspect"


# ---------------------------------------------------------------- with the requests


def _samples(budget: Budget, runs: Sequence[LoadTest], requests: Sequence[summary.Columns], policy: Policy) -> list[Launch]:
    """Return the figures of every request, run by run in blocks; nothing where they are not at hand or a mean is asked for."""
    if budget.stat == "mean":
        return []
    values = [_values(budget, rows.where(rows.in_window), _limits(run, policy)) for run, rows in zip(runs, requests, strict=False)]
    if not values or any(each is None or not len(each) for each in values):
        return []
    return [
        Launch(started_s=float(i), rounds=tuple(Round(values=tuple(block)) for block in np.array_split(each, _BLOCKS) if len(block)))
        for i, each in enumerate(values)
        if each is not None
    ]


def _values(budget: Budget, inside: summary.Columns, limits: SLO) -> Floats | None:
    """Return one value a request, or a gap; None where nobody said which limits goodput is about."""
    asked = inside.where(inside.outcome != summary.columns.OUTCOMES.index("cancelled"))
    if budget.metric in promised.LATENCIES:
        return _latencies(budget.metric, asked)
    good = asked.ok.astype(float)
    if budget.metric == "goodput":
        if not limits:
            return None
        good[asked.ok] = promises.keeps_all(asked.where(asked.ok), limits)
    return good


def _latencies(metric: str, asked: summary.Columns) -> Floats:
    """Return a latency of each request, or its gaps, in the order of the schedule; of those that failed as many infinite ones as usual."""
    good = asked.told if metric in ("ttft", "e2e") else asked.ok  # of what is under way it is known how long it has waited
    rows = asked.where(good)
    values = rows.gaps_s[0] if metric == "itl" else {"ttft": rows.ttft_s, "tpot": rows.tpot_s, "e2e": rows.e2e_s}[metric]
    sizes = rows.gaps_s[1] if metric == "itl" else (~np.isnan(values)).astype(np.int64)
    values = values[~np.isnan(values)]
    if good.all() or not len(values):
        return values
    before = np.concatenate([[0], np.cumsum(sizes)])[np.cumsum(good)[~good]]
    return np.insert(values, np.repeat(before, round(len(values) / len(rows))), np.inf)


def _limits(run: LoadTest, policy: Policy) -> SLO:
    """Return the limits that a good request keeps: those the run was asked for, else those of the policy."""
    if run.slo is not None:
        return promised.latencies(promised.parse(run.slo))
    named = [text for text in policy.budgets if budgets.parse(text).metric in promised.LATENCIES]
    return promised.parse(",".join(named)) if named else ()


def _of_requests(budget: Budget, samples: Sequence[Launch], enough: bool, slack: float) -> tuple[Word, str]:
    share = budgets.share(budget, samples)
    low, high = share.bounds(_LEVEL)
    clear = budget.quantile is not None and budgets.share(_further(budget, slack), samples).bounds(_LEVEL)[0] > share.allowed
    failed = ", failed ones among them" * any(math.inf in r.values for launch in samples for r in launch.rounds)
    counted = f"{share.beyond:.2%} of {share.samples:,} beyond the limit{failed}, worth {share.effective:,.0f} independent ones"
    return _word(low, high, share.allowed, enough, clear), f"{counted}; {share.allowed:.2%} may be"


def _further(budget: Budget, slack: float) -> Budget:
    """Return a limit that is further away."""
    return dataclasses.replace(budget, limit=budget.limit * math.exp(slack if budget.sign == "<" else -slack))


# ---------------------------------------------------------------- without


def _of_summaries(budget: Budget, runs: Sequence[LoadTest], enough: bool, slack: float) -> tuple[Word, str]:
    intervals = [_interval(budget, run) for run in runs]
    known = [interval for interval in intervals if interval is not None]
    if len(known) < len(runs):
        return "inconclusive", "the runs have no interval of it, and their files of requests are not at hand"
    sign = 1 if budget.sign == "<" else -1
    ends = [sorted(sign * end for end in interval) for interval in known]
    low, high = (statistics.median(end[i] for end in ends) for i in (0, 1))
    bound = sign * budget.limit
    clear = low > bound * math.exp(sign * slack)
    return _word(low, high, bound, enough, clear), "by the 90 % intervals of the runs; with the files of their requests more can be said"


def missed(text: str, run: LoadTest) -> bool:
    """Say whether a run missed a limit such as 'ttft_p95<500ms' for sure: by the 90 % interval of the figure of all its requests."""
    budget = budgets.parse(text)
    word, _ = _of_summaries(budget, [run], enough=True, slack=0.0)
    return word == "regression"


def _interval(budget: Budget, run: LoadTest) -> tuple[float, float] | None:
    if budget.metric == "goodput":
        return run.goodput_interval
    if budget.metric == "availability":
        return stats.wilson(run.ok, promises.asked(run), level=0.9)
    return _of_all(budget, run, getattr(run, f"{budget.metric}_s").intervals)


def _of_all(budget: Budget, run: LoadTest, answered: Mapping[str, tuple[float, float]]) -> tuple[float, float] | None:
    """Return the interval of a quantile of all requests, those that failed last, from intervals of quantiles of the answered.

    With a share f failed it is their quantile p / (1 - f): at least as long as at p, and no longer than at the next one that is known.
    """
    own, asked = answered.get(_stat(budget)), promises.asked(run)
    share = stats.wilson(asked - run.ok - run.errors.get("unfinished", 0), asked, level=0.9)
    if budget.quantile is None or share is None or not share[0]:
        return own
    low, high = (budget.quantile / (1 - f) if f < 1 else math.inf for f in share)
    if low >= 1:
        return math.inf, math.inf
    above = [answered[name][1] for name, p in {**summary.QUANTILES, "p999": 0.999}.items() if p >= high and name in answered]
    return own and (own[0], above[0] if above else math.inf)


def _stat(budget: Budget) -> str:
    return (budget.stat or "").replace(".", "")


def _figure(budget: Budget, runs: Sequence[LoadTest]) -> float | None:
    """Return the mean figure of the runs."""
    of: Callable[[LoadTest], float | None] = {
        "goodput": lambda run: run.goodput_ratio,
        "availability": lambda run: run.ok / run.requests if run.requests else None,
    }.get(budget.metric, lambda run: getattr(getattr(run, f"{budget.metric}_s"), _stat(budget), None))
    values = [value for run in runs if (value := of(run)) is not None]
    return float(np.mean(values)) if values else None
