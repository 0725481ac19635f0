"""The times of one request.  `columns` has the same of a million at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mlsys_bench import slo as limits
from mlsys_bench import stats
from mlsys_bench.types import SLO, RequestRecord

Floats = npt.NDArray[np.float64]


def ttft_s(record: RequestRecord) -> float | None:
    """Return the time from the scheduled send to the first token; None for an answer that has none, such as an embedding."""
    return record.token_s[0] - record.scheduled_s if record.token_s and has_tokens(record) else None


def has_tokens(record: RequestRecord) -> bool:
    """Say whether the first stamp is that of a token: one with no tokens is only the moment of the answer."""
    return not record.tokens_per_event or record.tokens_per_event[0] > 0


def e2e_s(record: RequestRecord) -> float | None:
    """Return the time from the scheduled send to the last token."""
    return record.token_s[-1] - record.scheduled_s if record.token_s else None


def service_s(record: RequestRecord) -> float | None:
    """Return the time from the real send to the last token: what the client waited for, its own lateness left out."""
    return record.token_s[-1] - record.sent_s if record.token_s and record.sent_s is not None else None


def tpot_s(record: RequestRecord) -> float | None:
    """Return the mean time per token after the first, or None for a single token, or for tokens that came all at once."""
    tokens = record.output_tokens if record.output_tokens is not None else sum(record.tokens_per_event)
    return (record.token_s[-1] - record.token_s[0]) / (tokens - 1) if len(record.token_s) > 1 and tokens > 1 else None


def itl_s(record: RequestRecord) -> Floats:
    """Return the gaps between neighbouring tokens.  An event with k tokens gives k gaps of gap / k.

    Tokens beyond the first in the first event arrived with it: when they were made cannot be known, so they give no gap.
    """
    gaps = np.diff(np.asarray(record.token_s, dtype=float))
    counts = np.asarray(record.tokens_per_event[1 : 1 + len(gaps)], dtype=int)
    return np.repeat(gaps / np.maximum(counts, 1), counts)


def lateness_s(record: RequestRecord) -> float | None:
    """Return how late the client itself was; the time to connect is the server's and the network's."""
    return None if record.sent_s is None else record.sent_s - record.scheduled_s - record.stage_s.get("connect", 0.0)


def meets_all(record: RequestRecord, slo: SLO) -> bool:
    """Say whether one answered request kept every latency limit itself.  What a request does not have cannot break a limit."""
    values = {"ttft": ttft_s(record), "tpot": tpot_s(record), "e2e": e2e_s(record)}
    for limit in limits.latencies(slo):
        if limit.tenant not in (None, record.tenant):
            continue
        value = stat_of(itl_s(record), limit.stat) if limit.metric == "itl" else values[limit.metric]
        if value is not None and not limits.meets(limit, value):
            return False
    return True


def stat_of(values: Floats, stat: str) -> float | None:
    """Return 'mean' or a percentile such as 'p99.9' of some values, None where there are none."""
    if not len(values):
        return None
    return float(values.mean()) if stat == "mean" else stats.quantile(values, share_of(stat))


def share_of(stat: str) -> float:
    """Return 0.95 for 'p95'."""
    return float(stat.removeprefix("p")) / 100
