"""How long a user of a closed loop thinks between an answer and the next request."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

from mlsys_bench import units
from mlsys_bench.errors import BadInput

_FORM = "2s, exponential:2s, lognormal:MEAN:CV or uniform:MEAN:CV, e.g. lognormal:5s:1.2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Think:
    """A law of pauses by mean and coefficient of variation."""

    dist: Literal["constant", "exponential", "lognormal", "uniform"] = "constant"
    mean_s: float = 0.0
    cv: float = 0.0

    def after(self, seed: int, index: int) -> float:
        """Return the pause after request `index`, the same in every process."""
        if self.dist == "constant" or not self.mean_s:
            return self.mean_s
        rng = random.Random(f"think {seed} {index}")
        if self.dist == "exponential":
            return rng.expovariate(1 / self.mean_s)
        if self.dist == "uniform":
            half = math.sqrt(3) * self.cv
            return self.mean_s * rng.uniform(1 - half, 1 + half)
        variance = math.log1p(self.cv**2)
        return self.mean_s * math.exp(rng.gauss(-variance / 2, math.sqrt(variance)))


def parse(text: str) -> Think:
    """Return the law of '2s', 'exponential:2s', 'lognormal:2s:1' or 'uniform:2s:0.3'.  Raises BadInput."""
    where = f"--think {text}"
    kind, *rest = text.strip().lower().split(":")
    if not rest:
        return Think(mean_s=_pause(kind, where))
    if kind == "exponential" and len(rest) == 1:
        return Think(dist="exponential", mean_s=_pause(rest[0], where), cv=1.0)
    if kind not in ("lognormal", "uniform") or len(rest) != 2:
        raise BadInput(f"{where}: write {_FORM}")
    return Think(dist="lognormal" if kind == "lognormal" else "uniform", mean_s=_pause(rest[0], where), cv=_cv(kind, rest[1], where))


def _pause(text: str, where: str) -> float:
    value = units.seconds(text, where)
    if not (math.isfinite(value) and value >= 0):
        raise BadInput(f"{where}: a pause cannot be negative; write {_FORM}")
    return value


def _cv(kind: str, text: str, where: str) -> float:
    try:
        value = units.plain(text)
    except ValueError:
        raise BadInput(f"{where}: {text!r} is no coefficient of variation; write {_FORM}") from None
    most = 1 / math.sqrt(3) if kind == "uniform" else 100.0
    if not 0 < value <= most:
        raise BadInput(f"{where}: the coefficient of variation of a {kind} law lies between 0 and {most:.3g}, not {text}")
    return value
