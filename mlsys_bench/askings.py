"""What the requests of a load test asked, and the figure of one of MLPerf's scenarios where the run was one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioResult:
    """What a scenario's rules call its result.  `value` is None where too few queries were answered."""

    scenario: str
    metric: str
    unit: str
    value: float | None
    plain_value: float | None  # the percentile of these very queries, without the allowance for their number
    queries: int
    samples_per_query: int
    least_queries: int | None  # with which the rules' statistics can say anything
    lasted_s: float
    least_s: float
    shortfalls: tuple[str, ...]  # in what the run is less than the rules ask for
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What requests asked beside what the server counted, over the window."""

    what: str  # made-up words, or whose prompts
    prompt_tokens: float | None
    prompt_tokens_counted: float | None
    output_tokens: float | None
    output_tokens_counted: float | None
    shared_prefix: float | None = None  # share of the prompt tokens that a cache that forgets nothing would have
    sessions: int | None = None
    images: int = 0  # of each request
    notes: tuple[str, ...] = ()
