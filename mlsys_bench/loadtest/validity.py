"""Whether a load test may be believed: did the client keep its own schedule, had it CPU to spare, did the server answer and settle.

| figure                                          | degraded above | invalid above | why there                                          |
|-------------------------------------------------|----------------|---------------|----------------------------------------------------|
| own lateness, p99                               | 5 ms           | 50 ms         | 5 % and half of a TTFT of 100 ms, which it is in   |
| share of sends late by more than 1 ms           | 5 %            | 50 %          | beyond p95 and the median, a figure holds lateness |
| lag of a worker's loop, p99                     | 5 ms           | 50 ms         | each stamp of an answer may be late by as much,    |
|                                                 |                |               | though every send be punctual (see `alarm.Pulse`)  |
| longest pause of the garbage collector          | 20 ms          | 200 ms        | one pause shifts the stamps of all open streams    |
| CPU of the busiest worker (one core = 100 %)    | 70 %           | 90 %          | a queue at its own core: M/D/1 waits 1.2 and 4.5   |
|                                                 |                |               | times the work of a request                        |
| achieved rate off the schedule's, open loop     | 0.2 %          | 0.5 %         | latencies are of the rate that was really sent     |
| arrivals that nobody sent (see `breaks`)        | -              | none allowed  | likewise                                           |
| requests that waited for a connection           | 1 %            | -             | p99 then holds the handshakes                      |
| share of requests that failed                   | 1 %            | 10 %          | latencies are of the others, likely the luckier    |
| prompt or answer length off what was asked      | 10 %           | -             | latencies are of other requests than asked for     |
| steadiness (`summary.steady`)                   | not steady     | -             | figures depend on how long the run lasted          |

Lateness is part of every latency (it counts from the schedule), so it only ever makes the server look worse.
Sends go before answers, so a client near its limit is punctual and reads late; its loop's lag is therefore taken after the answers of a
turn (1.5 to 2.5 times what it is before them).  12 runs of 200 to 1,200/s on a core that was shared, against the truth server: TTFT p99 was
3 to 4 % off where that lag was below 5 ms (once 6 %, and sent late as well), 5 and 6 % at 7 ms, 60 to 180 % above 50 ms.  CPU tells less
where neighbours take part of the core: 36 to 57 % in the runs that were off by more than 5 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mlsys_bench import summary, units
from mlsys_bench.summary import columns, promises
from mlsys_bench.summary.intervals import LEAST_IN_SERIES, effective
from mlsys_bench.timelines import Steadiness
from mlsys_bench.types import RequestRecord, Validity

if TYPE_CHECKING:
    from mlsys_bench.loadtest.job import Done

LATENESS_P99_S = (0.005, 0.05)
LATE_S = 0.001
LATE_SHARE = (0.05, 0.5)
LAG_P99_S = (0.005, 0.05)
PAUSE_S = (0.02, 0.2)
CPU_SHARE = (0.7, 0.9)
RATE_OFF = (0.002, 0.005)
WAITED_SHARE = 0.01  # of requests, for a connection
FAILED_SHARE = (0.01, 0.1)
LENGTH_OFF = 0.1
LITTLE_WORTH = 30  # independent requests; fewer and the intervals themselves are rough
MOVING = ("not_steady", "over_saturated")
_LEAST_SENDS = 20  # to tell a rate from

Floats = npt.NDArray[np.float64]
Finding = tuple[int, str]  # 0 good to know, 1 degraded, 2 invalid


def judge(
    records: Sequence[RequestRecord] | summary.Columns,
    *,
    cpu_share: float,
    asked_prompt_tokens: float,
    asked_output_tokens: float,
    steadiness: Steadiness | None = None,
    open_loop: bool = False,
    all_at_once: bool = False,
    may_poll: bool = False,
    loops: Sequence[Done] = (),
    breaks: Iterable[str] = (),
    flaws: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> Validity:
    """Return the verdict on the requests of the window, with what to change.

    `may_poll` says that cores are left over and the client slept between events.
    `loops` is what each worker process said at its end.  `breaks` spoil a run as they stand, `flaws` degrade it, `notes` do neither.
    """
    run = records if isinstance(records, summary.Columns) else columns.of(records)
    inside = run.where(run.in_window)
    ok = inside.where(inside.ok)
    found = [
        *(() if all_at_once else _steadiness(steadiness)),
        *(() if all_at_once else _lateness(_known(inside.lateness_s), may_poll)),
        *(_rate(inside) if open_loop else ()),
        *_over(
            cpu_share, CPU_SHARE,
            f"the busiest load worker used {units.show_share(cpu_share)} of a core: lower the rate, or use more --processes",
        ),
        *_loops(loops, len(run)),
        *_failures(inside),
        *_lengths("prompts", inside.prompt_tokens, asked_prompt_tokens, "the server counts text otherwise"),
        *_lengths("answers", ok.output_tokens, asked_output_tokens, "the server ends them itself"),
        *(() if steadiness is not None and steadiness.verdict in MOVING else _worth(_known(ok.e2e_s))),
        *((2, each) for each in breaks),
        *((1, flaw) for flaw in flaws),
        *((0, note) for note in notes),
    ]  # fmt: skip
    worst = max((level for level, _ in found), default=0)
    reasons = (text for _, text in sorted(found, key=lambda finding: -finding[0]))
    return Validity(verdict=("valid", "degraded", "invalid")[worst], reasons=tuple(reasons))


def _over(value: float, limits: tuple[float, float], text: str) -> list[Finding]:
    level = sum(value > limit for limit in limits)
    return [(level, text)] if level else []


def _lateness(late_s: Floats, may_poll: bool) -> list[Finding]:
    if not len(late_s):
        return []
    p99_s, share = float(np.quantile(late_s, 0.99)), float(np.mean(late_s > LATE_S))
    cure = "lower the rate, use more --processes, or give the client a core of its own"
    cure += ", where --busy-poll keeps it awake" * may_poll
    return [
        *_over(p99_s, LATENESS_P99_S, f"the client itself sent late: p99 {units.show_s(p99_s)} after schedule; {cure}"),
        *_over(share, LATE_SHARE, f"{units.show_share(share)} of the requests were sent more than 1 ms late by the client; {cure}"),
    ]


def _rate(inside: summary.Columns) -> list[Finding]:
    """Hold the rate of the sends against that of the schedule: the slope of one over the other, which a few late ones do not move."""
    sent = ~np.isnan(inside.sent_s)
    due_s, out_s = inside.scheduled_s[sent], inside.sent_s[sent] - inside.connect_s[sent]
    spread = float(np.var(due_s)) if len(due_s) >= _LEAST_SENDS else 0.0
    if spread == 0:
        return []
    slope = float(np.mean((due_s - due_s.mean()) * (out_s - out_s.mean()))) / spread
    said = f"the client sent at {1 / slope:.2%} of the rate that was asked: lower the rate, or use more --processes"
    return _over(abs(slope - 1), RATE_OFF, said)


def _loops(loops: Sequence[Done], requests: int) -> list[Finding]:
    """Judge the workers by what they saw of themselves."""
    if not loops:
        return []
    lag_s, pause_s = max(each.lag_p99_s for each in loops), max(each.gc_pause_max_s for each in loops)
    waited, retries = sum(each.late_connections for each in loops), sum(each.retries for each in loops)
    share = waited / requests if requests else 0.0
    found = [
        *_over(lag_s, LAG_P99_S, f"a worker's loop lagged: p99 {units.show_s(lag_s)}, in which stamps share; {_SPREAD}"),
        *_over(pause_s, PAUSE_S, f"the garbage collector held a worker for {units.show_s(pause_s)}; {_SPREAD}"),
    ]
    if share > WAITED_SHARE:
        said = (
            f"{units.show_share(share)} of the requests waited for a connection of their own, which is in their latency: the server closes"
        )
        found.append((1, f"{said} them, or more were needed than were opened before the start"))
    if retries:
        found.append((0, f"{retries:,} attempts were retries; latencies count from the first"))
    return found


_SPREAD = "lower the rate, or use more --processes"


_NO_FAILURES = ("ok", "cancelled")  # inside the window only those are cancelled that --cancel drew


def _failures(inside: summary.Columns) -> list[Finding]:
    counts = dict(zip(columns.OUTCOMES, np.bincount(inside.outcome, minlength=len(columns.OUTCOMES)).tolist(), strict=True))
    share, said = promises.failures({name: n for name, n in counts.items() if n and name not in _NO_FAILURES}, len(inside))
    return _over(share, FAILED_SHARE, said)


def _lengths(what: str, counts: Floats, asked: float, why: str) -> list[Finding]:
    known = _known(counts)
    if not len(known) or asked <= 0 or abs(known.mean() / asked - 1) <= LENGTH_OFF:
        return []
    return [(1, f"{what} had {known.mean():.4g} tokens on average, {asked:.4g} were asked: {why}")]


def _steadiness(found: Steadiness | None) -> list[Finding]:
    if found is None:
        return []
    level = 1 if found.verdict in MOVING else 0
    return [(level, reason) for reason in found.reasons]


def _worth(e2e_s: Floats) -> list[Finding]:
    """Say when requests resemble their neighbours so much that even the intervals are rough."""
    if len(e2e_s) < 2 * LEAST_IN_SERIES:
        return []
    worth, _ = effective(e2e_s)
    if worth >= LITTLE_WORTH:
        return []
    said = f"neighbouring requests are so alike that {len(e2e_s):,} say as much as {worth:.0f} independent ones: intervals are rough"
    return [(0, f"{said}, a run {LITTLE_WORTH / max(worth, 1):.0f} times as long would settle them")]


def _known(values: Floats) -> Floats:
    known: Floats = values[~np.isnan(values)]
    return known
