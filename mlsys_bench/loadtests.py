"""The record of a load test that was repeated: every run, and how far runs lie apart."""

from __future__ import annotations

from dataclasses import dataclass

from mlsys_bench.types import LoadTest, Validity


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """One figure over the runs.  `interval` is Student's, 90 %, of the mean of runs; None below two runs that have the figure."""

    values: tuple[float | None, ...]  # one a run; None where a run's sample was too small
    mean: float | None
    sd: float | None  # between runs
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTests:
    """The same load test several times, each with a seed of its own.  `spread` goes by figure, e.g. 'ttft_p95_s'."""

    runs: tuple[LoadTest, ...]
    seeds: tuple[int, ...]
    spread: dict[str, Spread]
    validity: Validity  # of all together: that of the worst run
