"""Statistics: how many samples a claim needs, and what an average hides."""

from __future__ import annotations

import math
from statistics import NormalDist

from mlsys_bench.claims import Claim
from mlsys_bench.types import Provenance


def _availability() -> Claim:
    """Turn a share of time into minutes."""
    month, year = 0.001 * 30 * 24 * 60, 0.001 * 365 * 24
    return Claim(
        key="three-nines",
        topic="statistics",
        claim="99.9 % uptime allows 43 minutes a month",
        quoted="43 min",
        recomputed=f"{month:.1f} min in 30 days, {year:.2f} h a year; with three such services in a row {3 * month:.0f} min",
        value=month,
        unit="min",
        low=month,
        high=3 * month,
        verdict="holds",
        because="for one service; those that all must work lose the sum",
        formula="(1 - 99.9 %) x 30 x 24 x 60",
        provenance=Provenance.ASSUMED,
    )


def _rare_errors() -> Claim:
    """Apply the rule of three: n samples without an event exclude a share above 3 / n with 95 %."""
    needed = math.ceil(math.log(0.05) / math.log(1 - 0.001))
    return Claim(
        key="errors-0.1-percent",
        topic="statistics",
        claim="Alert when more than 0.1 % of requests fail",
        quoted="0.1 %",
        recomputed=f"{needed:,} requests without a failure before 'below 0.1 %' may be said",
        value=float(needed),
        unit="requests",
        verdict="holds only if",
        because="the window holds that many: one failure in 100 requests is no 1 % error rate",
        formula="ln 0.05 / ln (1 - 0.001), with 95 %",
        provenance=Provenance.ASSUMED,
    )


def _mean_and_tail() -> Claim:
    """Find the least mean that a p95 allows: 5 % at the percentile, everything else at nothing."""
    least = 0.05 * 200
    return Claim(
        key="mean-20-p95-200",
        topic="statistics",
        claim="A mean of 20 ms and a p95 of 200 ms cannot go together",
        quoted="impossible",
        recomputed=f"any mean from {least:.0f} ms up goes with it; an exponential law of that mean has a p95 of {20 * math.log(20):.0f} ms",
        value=least,
        unit="ms",
        verdict="wrong",
        because="few slow requests hardly move a mean: that is why percentiles are promised",
        formula="mean >= (1 - 0.95) x 200 ms (Markov)",
        provenance=Provenance.ASSUMED,
    )


def _ab_test() -> Claim:
    z, p = two_proportions(500, 10_000, 560, 10_000)
    return Claim(
        key="ab-500-560",
        topic="statistics",
        claim="560 against 500 conversions of 10,000 each: B wins by 12 %",
        quoted="wins",
        recomputed=f"z = {z:.4f}, p = {p:.4f}: not at 5 %",
        value=p,
        unit="p",
        verdict="wrong",
        because="so large a difference comes by chance in 6 of 100 tests of two equal things",
        formula="z = (p_a - p_b) / sqrt(p (1 - p) (1 / n_a + 1 / n_b)), p pooled",
        provenance=Provenance.ASSUMED,
    )


def _ab_samples() -> Claim:
    even = samples_per_arm(0.05, 0.055)
    return Claim(
        key="ab-samples",
        topic="statistics",
        claim="A few thousand users show whether 5.0 % became 5.5 %",
        quoted="thousands",
        recomputed=f"{even:,} in each arm, {2 * even:,} in all; split 90 to 10, {math.ceil(2 * even / (4 * 0.9 * 0.1)):,}",
        value=float(even),
        unit="users",
        verdict="wrong",
        because="half a point is little beside the spread of a share of 5 %: that takes 31,000 in each arm (5 % error, 80 % power)",
        formula="(z_a sqrt(2 p (1 - p)) + z_b sqrt(p_1 (1 - p_1) + p_2 (1 - p_2)))^2 / (p_1 - p_2)^2",
        provenance=Provenance.ASSUMED,
    )


# ---------------------------------------------------------------- arithmetic


def two_proportions(a: int, of_a: int, b: int, of_b: int) -> tuple[float, float]:
    """Return z and the two-sided p of two shares, pooled."""
    pooled = (a + b) / (of_a + of_b)
    z = (a / of_a - b / of_b) / math.sqrt(pooled * (1 - pooled) * (1 / of_a + 1 / of_b))
    return z, 2 * NormalDist().cdf(-abs(z))


def samples_per_arm(old: float, new: float, error: float = 0.05, power: float = 0.8) -> int:
    """Return the samples in each of two equal arms that tell two shares apart, two-sided."""
    z_error, z_power = NormalDist().inv_cdf(1 - error / 2), NormalDist().inv_cdf(power)
    pooled = (old + new) / 2
    spread = z_error * math.sqrt(2 * pooled * (1 - pooled)) + z_power * math.sqrt(old * (1 - old) + new * (1 - new))
    return math.ceil(spread**2 / (old - new) ** 2)


CLAIMS = {
    "three-nines": _availability,
    "errors-0.1-percent": _rare_errors,
    "mean-20-p95-200": _mean_and_tail,
    "ab-500-560": _ab_test,
    "ab-samples": _ab_samples,
}
