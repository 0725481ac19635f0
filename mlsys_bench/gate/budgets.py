"""Absolute limits of a gate: `ttft_p95<500ms`, `engine.step_p95<5ms`, `goodput>99%`, `memory.peak<2GB`, `loss_mean<2.1`.

A quantile keeps its limit when few enough samples lie beyond it.  Samples of one round and of one launch resemble each other, so their
number is divided by the design effect: how much more the share beyond the limit varies from round to round (or launch to launch) than
independent samples would.  Six launches know that effect badly, so their bounds are widened as Student's are against the normal ones.
Where no quantile is named, the one number of each launch is held against the limit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlsys_bench import units
from mlsys_bench.errors import BadInput, UnitError
from mlsys_bench.gate.sequence import LOOKS, Evidence, Floats
from mlsys_bench.types import Launch

_BUDGET = re.compile(
    r"^\s*(?P<metric>[A-Za-z][\w.:/-]*?)(?:_(?P<stat>p\d{1,2}(?:\.\d+)?|mean))?\s*(?P<sign>[<>])=?\s*(?P<limit>[^\s<>=].*?)\s*$"
)
_EXAMPLE = "write it like engine.step_p95<5ms, goodput>99% or memory.peak<2GB"
_READERS: tuple[tuple[Collection[str], Callable[[str, str], float], str], ...] = (
    (units.SECONDS, units.seconds, "s"),
    (units.BYTES, units.size_bytes, "bytes"),
    (units.RATES, units.per_s, "/s"),
    (("%",), units.fraction, "share"),
)
_DIMENSIONS: dict[str, Callable[[str], bool]] = {
    "s": lambda unit: unit == "s",
    "bytes": lambda unit: unit in ("bytes", "B"),
    "share": lambda unit: unit == "share",
    "usd": lambda unit: "usd" in unit or "$" in unit,
    "/s": lambda unit: unit.endswith("/s"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """One limit.  `quantile` is None for the mean, or where the one number of a launch is meant."""

    metric: str
    stat: str | None
    sign: Literal["<", ">"]
    limit: float
    dimension: str  # of the limit: 's', 'bytes', '/s', 'share', 'usd', or '' for a plain number
    text: str  # of the limit, as typed

    @property
    def name(self) -> str:
        """Return what it goes by in a verdict: 'ttft_p95'."""
        return self.metric if self.stat is None else f"{self.metric}_{self.stat}"

    @property
    def quantile(self) -> float | None:
        """Return 0.95 for p95."""
        return float(self.stat[1:]) / 100 if self.stat is not None and self.stat.startswith("p") else None


def parse(text: str) -> Budget:
    """Return the limit that a person wrote.  Raises BadInput, UnitError."""
    found = _BUDGET.match(text)
    if found is None:
        raise BadInput(f"budget {text!r} is not NAME<LIMIT or NAME>LIMIT; {_EXAMPLE}")
    limit, dimension = _quantity(found["limit"], text)
    if not limit > 0:
        raise BadInput(f"budget {text!r}: a limit must be above zero")
    sign: Literal["<", ">"] = "<" if found["sign"] == "<" else ">"
    budget = Budget(metric=found["metric"], stat=found["stat"], sign=sign, limit=limit, dimension=dimension, text=found["limit"])
    if budget.quantile is not None and not 0 < budget.quantile < 1:
        raise BadInput(f"budget {text!r}: {budget.stat} is no quantile between p0 and p100")
    if dimension == "share" and limit >= 1:
        raise BadInput(f"budget {text!r}: a share is below 100 %, and no sample can prove that none is bad; give less, e.g. 99%")
    return budget


def check(text: str) -> str:
    """Return a limit as it is printed.  Raises BadInput, UnitError."""
    budget = parse(text)
    return f"{budget.name}{budget.sign}{budget.text}"


def _quantity(text: str, budget: str) -> tuple[float, str]:
    """Return a limit in SI units, and what it measures."""
    found = re.fullmatch(r"\$?([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(.*)", text)
    where = f"budget {budget!r}"
    if found is None:
        raise BadInput(f"{where}: {text!r} is no limit; {_EXAMPLE}")
    unit = found[2]
    if text.startswith("$"):
        return (units.usd_per_h(text, where) if unit else float(found[1])), "usd"
    for known, read, dimension in _READERS:
        if unit in known:
            return read(text, where), dimension
    if unit:
        raise BadInput(f"{where}: nobody knows the unit {unit!r}; {_EXAMPLE}")
    return float(found[1]), ""


def fits(budget: Budget, unit: str) -> None:
    """Raise UnitError where the limit does not measure what the metric is in."""
    wanted = next((d for d, known in _DIMENSIONS.items() if known(unit)), "")
    if budget.dimension != wanted:
        given = f"is in {budget.dimension!r}" if budget.dimension else "has no unit"
        raise UnitError(f"budget {budget.name}{budget.sign}{budget.text} {given}; {budget.metric} is in {unit!r}; {_EXAMPLE}")


# ---------------------------------------------------------------- shares beyond a limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How many samples lie beyond a limit, as so many independent ones would say it, and the share that is allowed."""

    beyond: float  # of the samples
    samples: int
    effective: float
    allowed: float
    groups: int = 1  # launches, or blocks of fewer of them, by which the design effect is known; 1: it is not

    def counting(self, level: float) -> float:
        """Return how many independent samples bounds of this level may count on.

        The design effect comes from few groups, so the effective number is taken times (t[n - 1] / t[groups - 1])^2.
        Source: Korn and Graubard (1998), Survey Methodology 24.
        """
        from scipy.special import stdtrit

        if self.groups < 2:
            return self.effective
        known, few = (float(stdtrit(df, 1 - level)) for df in (max(self.samples, self.groups) - 1, self.groups - 1))
        return self.effective * (known / few) ** 2

    def bounds(self, level: float) -> tuple[float, float]:
        """Return the one-sided bounds of the share.  Source: Clopper and Pearson (1934), Biometrika 26, by the beta law."""
        from scipy.special import betaincinv

        n = self.counting(level)
        k = self.beyond * n
        low = float(betaincinv(k, n - k + 1, level)) if k > 0 else 0.0
        high = float(betaincinv(k + 1, n - k, 1 - level)) if k < n else 1.0
        return low, high

    def evidence(self, level: float) -> Evidence:
        """Return it as the sequential test takes it: logarithms of share over allowed share, + is worse."""
        from scipy.special import betainc

        low, high = self.bounds(level)
        n = self.counting(level)
        k = self.beyond * n
        worse = float(betainc(k, n - k + 1, self.allowed)) if k > 0 else 1.0  # P(at least so many | as many as allowed)
        figures = (*(_log(share / self.allowed) for share in (self.beyond, low, high)), worse, 1.0)
        return Evidence(*(np.array(figure) for figure in figures))


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def share(budget: Budget, launches: Sequence[Launch]) -> Share:
    """Return how many samples of these launches lie beyond the limit."""
    beyond = [[_beyond(budget, np.asarray(r.values)) for r in launch.rounds if r.values] for launch in launches]
    rounds = [r for launch in beyond for r in launch]
    whole = [np.concatenate(launch) for launch in beyond if launch]
    samples = sum(map(len, rounds))
    effect = max(1.0, design_effect(rounds), design_effect(whole))
    return Share(
        beyond=sum(int(r.sum()) for r in rounds) / samples, samples=samples, effective=samples / effect, allowed=allowed(budget),
        groups=len(whole) if len(whole) >= LOOKS[0] else len(rounds),
    )  # fmt: skip


def allowed(budget: Budget) -> float:
    """Return the share of samples that may lie beyond the limit."""
    if budget.quantile is None:
        return budget.limit if budget.sign == "<" else 1 - budget.limit  # of zeros and ones
    return 1 - budget.quantile if budget.sign == "<" else budget.quantile


def _beyond(budget: Budget, values: Floats) -> Floats:
    if budget.quantile is None:
        return values if budget.sign == "<" else 1 - values
    return np.asarray(values >= budget.limit if budget.sign == "<" else values <= budget.limit, dtype=float)


def design_effect(groups: Sequence[Floats]) -> float:
    """Return the variance of the overall share, from groups that are independent, over that of so many independent samples.

    The ratio estimator of a cluster sample: Var = C / (C - 1) * sum((k_c - p n_c)^2) / N^2.
    Source: Cochran (1977), Sampling Techniques, ch. 9A.
    """
    sizes, hits = np.array([len(g) for g in groups], dtype=float), np.array([float(g.sum()) for g in groups])
    p, c, n = hits.sum() / sizes.sum(), len(groups), sizes.sum()
    if c < 2 or not 0 < p < 1:
        return 1.0
    return float(c / (c - 1) * ((hits - p * sizes) ** 2).sum() / n**2 / (p * (1 - p) / n))
