"""What the requests of a run asked, beside what the server counted; and what the users of each tenant saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlsys_bench import slo as limits
from mlsys_bench import summary
from mlsys_bench.askings import Asked
from mlsys_bench.types import SLO, RequestRecord, TenantUse
from mlsys_bench.workload import prefix

if TYPE_CHECKING:
    from mlsys_bench.loadtest import Options
    from mlsys_bench.workload import Schedule


def asked(options: Options, plan: Schedule, records: Sequence[RequestRecord]) -> Asked:
    """Return what the requests of the window asked, and what came of it."""
    inside = [r for r in records if r.in_window]
    rows = np.array([r.index for r in inside], dtype=np.int64) % len(plan)
    answered = [r for r in inside if r.outcome == "ok"]
    content, data = options.content, options.content.dataset
    begins = ~np.isnan(plan.scheduled_s)  # later turns of a session hold answers, as long as they came
    first = [r for r in answered if begins[r.index % len(plan)]]
    words = "made-up words" if begins.all() else "made-up words; prompt tokens are those of first turns"
    return Asked(
        what=f"the prompts of {data.name}" if data else words,
        prompt_tokens=None if data else _mean(plan.prompt_tokens[rows[begins[rows]]]),
        prompt_tokens_counted=_mean([r.prompt_tokens for r in first if r.prompt_tokens is not None]),
        output_tokens=_mean(plan.output_tokens[rows]),
        output_tokens_counted=_mean([r.output_tokens for r in answered if r.output_tokens is not None]),
        shared_prefix=prefix.hit_share(plan) if plan.prefix_hashes is not None else None,
        sessions=len({r.session for r in inside}) if plan.session is not None else None,
        images=content.images.each if content.images else 0,
        notes=(*_reused(options, inside), *_never_sent(plan, records)),
    )


def comparable_prompt_tokens(found: Asked) -> float:
    """Return the mean that the prompts of all requests must have, 0 where nobody knows it: images and real answers count as they will."""
    return 0.0 if found.images or found.sessions is not None else found.prompt_tokens or 0.0


def tenants(records: Sequence[RequestRecord], slo: SLO | None) -> tuple[TenantUse, ...]:
    """Return what the users of each tenant saw, where requests have one."""
    names = sorted({r.tenant for r in records if r.tenant is not None})
    return tuple(_tenant(name, [r for r in records if r.tenant == name and r.in_window], slo) for name in names)


def _tenant(name: str, records: Sequence[RequestRecord], slo: SLO | None) -> TenantUse:
    ok = [r for r in records if r.outcome == "ok"]
    promised = slo if slo and limits.latencies(slo) else None
    return TenantUse(
        name=name,
        requests=len(records),
        ok=len(ok),
        goodput_ratio=sum(summary.meets_all(r, promised) for r in ok) / len(records) if promised and records else None,
        ttft_s=summary.summary(_present([summary.ttft_s(r) for r in ok])),
        tpot_s=summary.summary(_present([summary.tpot_s(r) for r in ok])),
        e2e_s=summary.summary(_present([summary.e2e_s(r) for r in ok])),
    )


def _reused(options: Options, records: Sequence[RequestRecord]) -> tuple[str, ...]:
    """Say how often the rows of a data set were used."""
    data = options.content.dataset
    if data is None:
        return ()
    times = (max((r.index for r in records), default=-1) + 1) / len(data.rows)
    again = f"its {len(data.rows):,} rows were used {times:.2g} times: a server's cache has seen them" if times > 1 else ""
    return (*data.notes, *([again] if again else []))


def _never_sent(plan: Schedule, records: Sequence[RequestRecord]) -> tuple[str, ...]:
    """Say how many turns of sessions that began were not sent: the run ended before their time, or the answer before them failed."""
    if plan.gap_s is None or plan.session is None:
        return ()
    begun = {r.session for r in records}
    size = np.bincount(plan.session)
    due = sum(int(size[int(name.partition(".")[0])]) for name in begun if name is not None)
    missing = due - len(records)
    why = "their time came after the end, or after a failure"
    return (f"{missing:,} of {due:,} turns of the sessions that began were not sent: {why}",) * (missing > 0)


def _mean(values: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _present(values: Sequence[float | None]) -> summary.Floats:
    return np.array([v for v in values if v is not None], dtype=np.float64)
