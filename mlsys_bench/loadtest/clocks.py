"""How far another host's clock lies from ours, from messages that carry four stamps each.

A message leaves us at t1 (our clock), is heard at t2 and answered at t3 (theirs), and is back at t4 (ours).  No message travels backwards
in time, so the offset theirs - ours lies between t3 - t4 and t2 - t1: every exchange bounds it, however lopsided the way is.
The middle of that is right where both ways take equally long (Mills, RFC 5905, section 8).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """The four stamps of one question and its answer."""

    sent_s: float
    heard_s: float
    answered_s: float
    back_s: float

    @property
    def offset_s(self) -> float:
        """Return theirs - ours, taking both ways as equally long."""
        return ((self.heard_s - self.sent_s) + (self.answered_s - self.back_s)) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Another clock: its monotonic one says `offset_s` more than ours; that is right to `error_s`."""

    offset_s: float
    error_s: float
    wall_offset_s: float = 0.0  # of the clocks on the wall, which nothing here depends on
    drift_s: float = 0.0  # how much the offset changed between the start and the end


def measured(exchanges: Sequence[Exchange]) -> Clock:
    """Return the offset: the median of all exchanges, held within the bounds that all of them set together.  At least one is needed."""
    low_s = max(e.answered_s - e.back_s for e in exchanges)
    high_s = min(e.heard_s - e.sent_s for e in exchanges)
    low_s, high_s = min(low_s, high_s), max(low_s, high_s)  # a clock that was moved meanwhile crosses them
    middle_s = statistics.median(e.offset_s for e in exchanges)
    offset_s = min(max(middle_s, low_s), high_s)
    return Clock(offset_s=offset_s, error_s=max(high_s - offset_s, offset_s - low_s))
