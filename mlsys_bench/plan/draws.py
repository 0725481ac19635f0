"""Profiles drawn from a profile's own uncertainty, few enough to work out each, and what they say of a figure.

Of a large pool the time of one usual step is worked out, which costs next to nothing.  From the pool, put in order by that time, those at
given shares are taken: most of what a figure does follows from how slow the engine is, so the ends of a figure are found by profiles near
the ends of that.  Draws at random would have to be many: the 5 % point of a dozen lies too far inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlsys_bench import latency
from mlsys_bench.types import LatencyProfile

Floats = npt.NDArray[np.float64]
TAILS = (0.05, 0.95)
POOL = 1024
COMMON = 0.55  # of the residual's variance: what is left of it in a mean of many kinds of steps (ADR 0039)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Profiles from fast to slow, each where a share of the pool has a faster usual step; and what the usual step of each takes, as log
    of its ratio to that of the profile they were drawn from.
    """

    profiles: tuple[LatencyProfile, ...]
    shares: tuple[float, ...]
    slowness: Floats
    bare: tuple[float, float]  # 5 % and 95 % points of the log of a step that only decodes, over that of the profile they were drawn from

    def band(self, values: Sequence[float]) -> tuple[float, float]:
        """Return the 5 % and 95 % points of a figure that has these values with the profiles drawn."""
        low, high = np.interp(TAILS, self.shares, np.sort(np.asarray(values, dtype=np.float64)))
        return float(low), float(high)


def of(profile: LatencyProfile, usual: latency.Features, bare: latency.Features, shares: Sequence[float], seed: int) -> Draws:
    """Return draws of a profile whose usual step has these features, and those that only decode the others, at shares of the pool."""
    rng = np.random.default_rng(seed)
    logs = rng.multivariate_normal(np.log(profile.coefficients), np.asarray(profile.covariance), POOL, method="eigh")
    misfit = profile.residual_log_sd * rng.standard_normal(POOL)
    one_kind, terms = (
        {name: _term(name, np.exp(logs[:, i]), np.exp(share**0.5 * misfit)) for i, name in enumerate(profile.terms)}
        for share in (1.0, COMMON)
    )
    pool, decode = _logs(profile, terms, usual), _logs(profile, one_kind, bare)
    low, high = np.quantile(decode, TAILS)
    chosen = np.argsort(pool, kind="stable")[[int(share * POOL) for share in shares]]
    profiles = (tuple(float(terms[name][i]) for name in profile.terms) for i in chosen)
    return Draws(
        profiles=tuple(dataclasses.replace(profile, coefficients=coefficients) for coefficients in profiles),
        shares=tuple(shares),
        slowness=pool[chosen],
        bare=(float(low), float(high)),
    )


def _logs(profile: LatencyProfile, terms: dict[str, Floats], features: latency.Features) -> Floats:
    """Return the log of the time of one step with each profile of the pool, over that of the profile they were drawn from."""
    times_s = latency.many(latency.entries(terms, profile.constants), np.asarray(features, dtype=np.float64))
    return np.asarray(np.log(np.broadcast_to(times_s, POOL) / latency.step_s(profile, features)))


def _term(name: str, values: Floats, factor: Floats) -> Floats:
    """Return a term's values, times stretched by a factor, none below the physics floor."""
    if name == "expert_tile":  # rows, not a time
        return values
    return np.maximum(values * factor, 1.0) if name in latency.MULTIPLIERS else values * factor
