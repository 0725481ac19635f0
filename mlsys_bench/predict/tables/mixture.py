"""The latency of all requests, where each stage of a run has its own: means are weighted, percentiles are those of the mixture."""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Sequence

from mlsys_bench.predict.tables.rows import Figure

_HALVINGS = 60
_RISE = 1e-9  # least share by which a percentile is above a lower one, so that each value has one share of requests below it
Law = tuple[list[float], list[float]]  # -ln(1 - p), rising, and the values there


def mixed(stages: Sequence[tuple[dict[str, Figure], float]]) -> dict[str, Figure]:
    """Return the figures of a run out of those of its stages, each with its share of the requests.

    A stage's law is drawn through what is known of it (its percentiles; its mean as the median where that is not known), linear in
    -ln(1 - p): exponential between and beyond the points.  Ends of intervals are mixed like points: the stages err together.
    """
    common = set.intersection(*(set(figures) for figures, _ in stages))
    return {name: _mixed(name, stages) for name in sorted(common)}


def _mixed(name: str, stages: Sequence[tuple[dict[str, Figure], float]]) -> Figure:
    found = re.fullmatch(r"(\w+)_p(\d+)_s", name)
    if found is None:
        sums = [sum(share * figures[name][end] for figures, share in stages) for end in range(3)]
    else:
        laws = [[(_law(figures, found[1], end), share) for figures, share in stages] for end in range(3)]
        sums = [_quantile(law, float(found[2]) / 100) for law in laws]
    return sums[0], sums[1], sums[2]


def _law(figures: dict[str, Figure], metric: str, end: int) -> Law:
    """Return the points (-ln(1 - p), value) known of a latency, in order; a percentile that is not above a lower one is raised above it."""
    points = {0.5: figures[f"{metric}_mean_s"][end]} if f"{metric}_mean_s" in figures else {}
    for name, figure in figures.items():
        known = re.fullmatch(rf"{metric}_p(\d+)_s", name)
        if known:
            points[float(known[1]) / 100] = figure[end]
    xs = [-math.log1p(-p) for p in sorted(points)]
    return xs, list(itertools.accumulate((points[p] for p in sorted(points)), lambda lower, value: max(value, lower * (1 + _RISE))))


def _between(ask: float, known: Sequence[float], told: Sequence[float]) -> float:
    """Return what goes with a value, on the line through the two known points next to it; beyond them the line goes on."""
    if len(known) == 1:
        return told[0]
    i = max(1, min(len(known) - 1, bisect.bisect_left(known, ask)))
    return told[i - 1] + (told[i] - told[i - 1]) * (ask - known[i - 1]) / (known[i] - known[i - 1])


def _below(law: Law, value: float) -> float:
    """Return the share of requests below a value."""
    xs, values = law
    if len(values) == 1:  # no spread is known: all at one value
        return float(value >= values[0])
    return -math.expm1(-max(_between(value, values, xs), 0.0))


def _quantile(laws: Sequence[tuple[Law, float]], p: float) -> float:
    """Return the value that a share p of all requests stays below, by halving.  It lies between those of the stages."""
    own = [_between(-math.log1p(-p), xs, values) for (xs, values), _ in laws]
    low, high = min(own), max(own)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = sum(share * _below(law, middle) for law, share in laws)
        low, high = (middle, high) if below < p else (low, middle)
    return (low + high) / 2
