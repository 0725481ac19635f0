"""Whether a load test may be believed: did the client keep its own schedule, had it CPU to spare, did the server answer.

| figure                                      | degraded above | invalid above |
|---------------------------------------------|----------------|---------------|
| own lateness, p99                           | 5 ms           | 50 ms         |
| share of sends late by more than 1 ms       | 5 %            | 50 %          |
| CPU share of the worker (one core = 100 %)  | 70 %           | 90 %          |
| share of requests that failed               | 1 %            | 10 %          |
| prompt or answer length off what was asked  | 10 %           | -             |

Lateness is part of every latency (it counts from the schedule), so it only ever makes the server look worse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from mlsys_bench import summary, units
from mlsys_bench.types import RequestRecord, Validity

LATENESS_P99_S = (0.005, 0.05)
LATE_S = 0.001
LATE_SHARE = (0.05, 0.5)
CPU_SHARE = (0.7, 0.9)
FAILED_SHARE = (0.01, 0.1)
LENGTH_OFF = 0.1

Finding = tuple[int, str]  # 0 good to know, 1 degraded, 2 invalid


def judge(
    records: Sequence[RequestRecord],
    *,
    cpu_share: float,
    asked_prompt_tokens: float,
    asked_output_tokens: float,
    flaws: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> Validity:
    """Return the verdict on the requests of the window, with what to change.  `flaws` degrade as they stand, `notes` do not."""
    inside = [r for r in records if r.in_window]
    found = [
        *_lateness([late for r in inside if (late := summary.lateness_s(r)) is not None]),
        *_over(cpu_share, CPU_SHARE, f"the load worker used {units.show_share(cpu_share)} of a core: lower the rate or use a faster one"),
        *_failures(inside),
        *_lengths("prompts", [r.prompt_tokens for r in inside], asked_prompt_tokens, "the server counts text otherwise"),
        *_lengths("answers", [r.output_tokens for r in inside if r.outcome == "ok"], asked_output_tokens, "the server ends them itself"),
        *((1, flaw) for flaw in flaws),
        *((0, note) for note in notes),
    ]
    worst = max((level for level, _ in found), default=0)
    return Validity(verdict=("valid", "degraded", "invalid")[worst], reasons=tuple(text for _, text in found))


def _over(value: float, limits: tuple[float, float], text: str) -> list[Finding]:
    level = sum(value > limit for limit in limits)
    return [(level, text)] if level else []


def _lateness(late_s: Sequence[float]) -> list[Finding]:
    if not late_s:
        return []
    p99_s, share = float(np.quantile(late_s, 0.99)), float(np.mean(np.asarray(late_s) > LATE_S))
    cure = "give the client a core of its own, or lower the rate"
    return [
        *_over(p99_s, LATENESS_P99_S, f"the client itself sent late: p99 {units.show_s(p99_s)} after schedule; {cure}"),
        *_over(share, LATE_SHARE, f"{units.show_share(share)} of the requests were sent more than 1 ms late by the client; {cure}"),
    ]


def _failures(records: Sequence[RequestRecord]) -> list[Finding]:
    failed = Counter(r.outcome for r in records if r.outcome != "ok")
    share = failed.total() / len(records) if records else 0.0
    kinds = ", ".join(f"{count} {outcome}" for outcome, count in failed.most_common())
    return _over(share, FAILED_SHARE, f"{units.show_share(share)} of the requests failed ({kinds}): latencies are of the others")


def _lengths(what: str, counts: Sequence[int | None], asked: float, why: str) -> list[Finding]:
    known = [count for count in counts if count is not None]
    if not known or asked <= 0 or abs(np.mean(known) / asked - 1) <= LENGTH_OFF:
        return []
    return [(1, f"{what} had {np.mean(known):.4g} tokens on average, {asked:.4g} were asked: {why}")]
