"""How often the gate is right, on recorded sessions: pairs are drawn from the sessions, and the looks of a live gate decide.

The sessions are what is independent, so the interval of each rate is drawn over them: first sessions are drawn, then jobs from those.
It is never narrower than Wilson's of the jobs that were played: none of 4,000 is not never.
Of the same program pairs are turned round at random, so that what one session leans to does not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mlsys_bench import stats
from mlsys_bench.backtests import Deciding
from mlsys_bench.gate import rows, sequence
from mlsys_bench.gate.rows import Row
from mlsys_bench.gate.sequence import Bools, Evidence, Floats, Ints
from mlsys_bench.gate.sessions import Arm, Sessions
from mlsys_bench.verdicts import Policy

JOBS = 4000
DRAWS = 200  # of sessions
JOBS_EACH = 100  # of each draw


class Pool(NamedTuple):
    """Log ratios of an arm: [metrics, sessions] or, of several arms of the same program, [metrics, arms * sessions]."""

    arm: str
    same: bool
    sessions: int
    rows: tuple[Row, ...]
    logs: Floats


class Outcome(NamedTuple):
    """What became of jobs: one of the words each, and the pairs that it took."""

    regression: Bools
    improved: Bools
    inconclusive: Bools
    pairs: Ints


def replay(found: Sessions, policy: Policy, seed: int = 0, jobs: int = JOBS, draws: int = DRAWS) -> Iterator[Deciding]:
    """Yield the rates of each arm: of all metrics that may fail together, then of each alone.  Without draws intervals are of jobs only."""
    for pool in _pools(found, policy):
        counting = [i for i, row in enumerate(pool.rows) if row.may_fail]
        for metrics in (*([counting] if len(counting) > 1 else []), *([i] for i in range(len(pool.rows)))):
            yield _deciding(found.source, pool, metrics, policy, (seed, jobs, draws))


def ratios(found: Sessions, policy: Policy) -> Iterator[tuple[str, str, str, float]]:
    """Yield session, arm, metric and candidate over baseline, as the gate takes them from the launches."""
    for arm in found.arms:
        for row in rows.of(arm.base, arm.cand, policy):
            for session, log in zip(arm.sessions, row.logs, strict=True):
                yield session, arm.name, row.name, math.exp(float(log))


def _pools(found: Sessions, policy: Policy) -> Iterator[Pool]:
    """Yield every arm, and all of the same program together."""
    pools = [_pool(arm, policy) for arm in found.arms]
    same = [pool for pool in pools if pool.same]
    yield from pools
    alike = len({pool.logs.shape for pool in same}) == 1 and len({arm.sessions for arm in found.arms if arm.is_same}) == 1
    if len(same) > 1 and alike:  # in the same sessions: places of the pool are sessions
        together = np.concatenate([pool.logs for pool in same], axis=1)
        yield Pool(", ".join(pool.arm for pool in same), True, same[0].sessions, same[0].rows, together)


def _pool(arm: Arm, policy: Policy) -> Pool:
    found = tuple(rows.of(arm.base, arm.cand, policy))
    return Pool(arm.name, arm.is_same, len(found[0].pairs), found, np.array([row.logs for row in found]))


def _deciding(source: str, pool: Pool, metrics: Sequence[int], policy: Policy, effort: tuple[int, int, int]) -> Deciding:
    seed, jobs, draws = effort
    logs, used = pool.logs[list(metrics)], [pool.rows[i] for i in metrics]
    rng = np.random.default_rng([seed, *pool.arm.encode(), len(metrics), metrics[0]])
    said = _said(_drawn(logs, pool.same, rng.integers(0, logs.shape[1], (jobs, sequence.MOST_PAIRS)), rng), used)
    again = _said(_drawn(logs, pool.same, _by_session(pool, draws, rng), rng), used) if draws else said

    def spread(of: npt.NDArray[np.generic]) -> tuple[float, float]:
        return _interval(of.reshape(draws or 1, -1).mean(axis=1, dtype=float))

    def share(of: Bools, drawn: Bools) -> tuple[float, tuple[float, float]]:
        (low, high), played = spread(drawn), stats.wilson(int(of.sum()), len(of))
        assert played is not None
        return float(of.mean()), (min(low, played[0]), max(high, played[1]))

    pairs, span = float(said.pairs.mean()), spread(again.pairs)
    shares = [share(a, b) for a, b in zip(_words(said), _words(again), strict=True)]
    return Deciding(
        source=source, arm=pool.arm, metric=used[0].name if len(used) == 1 else None, tolerance=policy.tolerance, same=pool.same,
        sessions=pool.sessions, change=math.expm1(float(logs.mean())), sd=float(logs.std(axis=1, ddof=1).max()),
        regression=shares[0][0], regression_interval=shares[0][1], improved=shares[1][0], improved_interval=shares[1][1],
        passed=shares[2][0], passed_interval=shares[2][1], inconclusive=shares[3][0], inconclusive_interval=shares[3][1],
        pairs=pairs, pairs_interval=(min(pairs, span[0]), max(pairs, span[1])), may_fail=any(row.may_fail for row in used),
    )  # fmt: skip


def _by_session(pool: Pool, draws: int, rng: np.random.Generator) -> Ints:
    """Return places in the pool for the jobs of each draw [draws * JOBS_EACH, pairs]: sessions are drawn first, then pairs from those."""
    sessions = rng.integers(0, pool.sessions, (draws, 1, pool.sessions))
    which = rng.integers(0, pool.sessions, (draws, JOBS_EACH, sequence.MOST_PAIRS))
    places = np.take_along_axis(np.broadcast_to(sessions, (draws, JOBS_EACH, pool.sessions)), which, axis=2)
    arms = rng.integers(0, pool.logs.shape[1] // pool.sessions, places.shape)  # of the same program
    return (places + pool.sessions * arms).reshape(-1, sequence.MOST_PAIRS)


def _words(said: Outcome) -> tuple[Bools, Bools, Bools, Bools]:
    passed = ~(said.regression | said.improved | said.inconclusive)
    return said.regression, said.improved, passed, said.inconclusive


def _interval(values: Floats) -> tuple[float, float]:
    low, high = stats.quantiles(values, ((1 - stats.LEVEL) / 2, (1 + stats.LEVEL) / 2))
    return low, high


def _drawn(logs: Floats, same: bool, places: Ints, rng: np.random.Generator) -> Floats:
    """Return log ratios [jobs, metrics, pairs]; the metrics of a pair stay together, and are turned round together."""
    drawn = logs[:, places].transpose(1, 0, 2)
    return drawn * rng.choice((-1.0, 1.0), (len(places), 1, places.shape[1])) if same else drawn


def _said(d: Floats, used: Sequence[Row]) -> Outcome:
    """Return what the looks of a live gate say of these jobs."""
    d1 = np.broadcast_to([row.accepted for row in used], d.shape[:2])
    silent = np.array([not row.may_pass for row in used])

    def look(start: int, stop: int, level: float, jobs: Ints) -> Evidence:
        seen = sequence.bounds(d[jobs, :, start:stop], d1[jobs] / 5, level)
        return seen._replace(high=np.where(silent, np.inf, seen.high))

    track = sequence.follow(look, d.shape[2], d1, np.ones(d1.shape, dtype=bool))
    regression = (track.state == sequence.REGRESSION).any(axis=1)
    inconclusive = ~regression & ~np.isin(track.state, (sequence.PASS, sequence.IMPROVED)).all(axis=1)
    improved = ~regression & ~inconclusive & (track.state == sequence.IMPROVED).any(axis=1)
    return Outcome(regression, improved, inconclusive, track.pairs.max(axis=1))
