"""What every law can say of itself."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mlsys_bench.errors import BadInput
from mlsys_bench.queueing.times import Time, check_share

if TYPE_CHECKING:
    from mlsys_bench.queueing.laws.phases import PhaseType

Floats = npt.NDArray[np.float64]
Complexes = npt.NDArray[np.complex128]
Shape = int | tuple[int, ...]


class Law(Time):
    """A law of a positive time: immutable, equal to another of the same kind and parameters."""

    third: float  # E[X^3] / mean^3
    atoms: tuple[tuple[float, float], ...] = ()  # (time, probability) where all the mass sits on a few points

    def __init__(self, *key: object, mean_s: float, variance_s2: float, third: float) -> None:
        if not (mean_s > 0 and math.isfinite(mean_s)):
            raise BadInput(f"a {type(self).__name__} law needs a positive, finite mean, not {mean_s}")
        self.__dict__.update(_key=(type(self).__name__, *key), mean_s=mean_s, variance_s2=variance_s2, third=third)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a law never changes: {name} cannot be set")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Law) and self.__dict__["_key"] == other.__dict__["_key"]

    def __hash__(self) -> int:
        return hash(self.__dict__["_key"])

    def __repr__(self) -> str:
        return f"<{self}, mean {self.mean_s:.6g} s>"

    @abstractmethod
    def quantiles(self, u: Floats) -> Floats:
        """Return the u-quantiles of an array of probabilities (the inverse of P(X <= t))."""

    @abstractmethod
    def lst(self, s: Complexes) -> Complexes:
        """Return E[e^{-sX}] for an array of complex s, Re(s) >= 0."""

    @abstractmethod
    def stop_loss_s(self, t_s: Floats) -> Floats:
        """Return E[(X - t)+] for an array of t >= 0; over the mean it is P(excess life > t)."""

    @abstractmethod
    def sample(self, rng: np.random.Generator, size: Shape) -> Floats:
        """Return independent draws."""

    @abstractmethod
    def scaled(self, mean_s: float) -> Law:
        """Return the same shape with another mean."""

    def phases(self) -> PhaseType | None:
        """Return the exact phase-type form, None where there is none."""
        return None

    def quantile_s(self, p: float) -> float:
        """Return the p-quantile."""
        return float(self.quantiles(np.array([check_share(p)], dtype=np.float64))[0])


def check_scv(kind: str, scv: float, *, above: float, included: bool = False) -> None:
    """Raise BadInput unless this kind of law can have this SCV."""
    if not (scv > above or (included and scv == above)) or not math.isfinite(scv):
        limit = f"of at least {above:g}" if included else f"above {above:g}"
        raise BadInput(f"a {kind} law needs an SCV {limit}, not {scv}; a time that never varies is `det`")


def short(x: float) -> str:
    """Return a number with no more digits than it needs."""
    return f"{x:.12g}"
