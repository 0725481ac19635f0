"""Options -> every request of a run: when it is due, how long it is, what it shares with others and whom it waits for."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from mlsys_bench import workload
from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest.content import SharedPrefix
from mlsys_bench.types import Workload
from mlsys_bench.workload.schedule import nominal_s

if TYPE_CHECKING:
    from mlsys_bench.loadtest import Options
    from mlsys_bench.workload import Schedule

CLOSED_LOOP_LENGTHS = 4096  # drawn once; users walk through them again and again
_OWN_FILES = 64  # that a process has open beside its connections
_GROUP = 1 << 40  # between the block names of one group of sessions and the next


def schedule(options: Options) -> Schedule:
    """Return every request the run will send; those that wait for an answer come last and have no time."""
    from mlsys_bench.loadtest.payloads import written

    plan = options.trace if options.trace is not None else _drawn(options)
    if options.content.shared_prefix is not None and options.content.sessions is None:
        plan = with_shared_prefix(plan, options.content.shared_prefix, options.seed)
    if options.content.dataset is not None:
        plan = _as_long_as_the_rows(options, plan)
    return written.waiting_last(plan)


def with_shared_prefix(plan: Schedule, shared: SharedPrefix, seed: int) -> Schedule:
    """Return the requests with a prefix put before the prompts of a share of them, each of one of the groups."""
    if plan.prefix_hashes is not None:
        raise BadInput("--shared-prefix: this traffic says itself what its prompts share; leave it out")
    rng = np.random.default_rng([seed, 7])
    chosen = rng.random(len(plan)) < shared.share
    return dataclasses.replace(
        plan,
        prompt_tokens=plan.prompt_tokens + shared.tokens * chosen,
        prefix_offsets=np.concatenate([[0], np.cumsum(chosen)]).astype(np.int64),
        prefix_hashes=rng.integers(0, shared.groups, int(chosen.sum())),
        prefix_block_tokens=shared.tokens,
    )


def duration_s(options: Options) -> float:
    """Return the seconds of sending; a trace lasts until one mean gap after its last arrival.

    A trace of sessions lasts until its last turn would come if answers took no time, and no less than asked: real ones take longer.
    """
    if options.offline is not None:
        return 1e-3
    if options.trace is None:
        return options.duration_s
    times = nominal_s(options.trace)
    last_s = float(times.max()) * (1 + 1 / len(times)) + 1e-3 if len(times) else options.duration_s
    return last_s if options.trace.gap_s is None else max(last_s, options.duration_s)


def check_sockets(options: Options) -> None:
    """Raise BadInput when a run that sends all at once needs more connections than a process may have."""
    most = _most_files() - _OWN_FILES
    if options.offline is not None and options.offline > most:
        raise BadInput(f"{options.offline:,} requests at once need as many connections; a process here may have {most:,}: fewer --requests")


def _most_files() -> int:
    try:
        import resource
    except ImportError:  # no such limit
        return 1 << 30
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 1 << 30 if hard == resource.RLIM_INFINITY else hard


def _drawn(options: Options) -> Schedule:
    if options.content.sessions is not None:
        return _sessions(options, options.content.sessions)
    traffic = _traffic(options)
    if options.offline is not None:
        return _all_at_once(workload.schedule(traffic, n=options.offline, seed=options.seed))
    if options.users is not None:
        return _all_at_once(_requests(options, traffic, n=CLOSED_LOOP_LENGTHS))
    return _requests(options, traffic, seconds=options.duration_s)


def _requests(options: Options, traffic: Workload, *, n: int | None = None, seconds: float | None = None) -> Schedule:
    """Return requests of the laws, or with pairs of lengths of a trace."""
    if options.content.pairs is not None:
        return workload.resampled(options.content.pairs, traffic, n=n, duration_s=seconds, seed=options.seed)
    return workload.schedule(traffic, n=n, duration_s=seconds, seed=options.seed)


def _traffic(options: Options) -> Workload:
    traffic = Workload(
        rate_per_s=options.qps or 1.0,
        arrivals=options.arrivals,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
    )
    return workload.with_tenants(traffic, options.content.tenants) if options.content.tenants else traffic


def _all_at_once(plan: Schedule) -> Schedule:
    return dataclasses.replace(plan, scheduled_s=np.zeros(len(plan)))


def _sessions(options: Options, law: workload.Sessions) -> Schedule:
    """Return sessions that start within the run; in a closed loop those that users walk through."""
    shared = options.content.shared_prefix
    if shared is not None:
        if shared.share < 1:
            raise BadInput("--shared-prefix: every session begins with it or none does; leave the share out")
        law = dataclasses.replace(law, shared_tokens=shared.tokens)
    rate = options.qps or 1.0
    turns = workload.mean_tokens(law.turns)
    wanted = CLOSED_LOOP_LENGTHS / turns if options.users is not None else rate / turns * options.duration_s
    n = math.ceil(wanted + 4 * math.sqrt(wanted) + 8)
    while True:
        plan = workload.sessions(law, rate_per_s=rate, arrivals=options.arrivals, n=n, seed=options.seed)
        starts = plan.scheduled_s[~np.isnan(plan.scheduled_s)]
        if options.users is not None or starts.max() >= options.duration_s:
            break
        n *= 2
    if options.users is not None:
        plan = dataclasses.replace(plan, scheduled_s=np.where(np.isnan(plan.scheduled_s), np.nan, 0.0))
    else:
        plan = workload.sliced(plan, 0.0, options.duration_s)
    return plan if shared is None or shared.groups == 1 else _in_groups(plan, shared, law, options.seed)


def _in_groups(plan: Schedule, shared: SharedPrefix, law: workload.Sessions, seed: int) -> Schedule:
    """Return the sessions with a shared beginning for each group instead of one for all."""
    assert plan.session is not None
    assert plan.prefix_offsets is not None
    assert plan.prefix_hashes is not None
    group = np.random.default_rng([seed, 8]).integers(0, shared.groups, int(plan.session.max(initial=0)) + 1)
    counts = np.diff(plan.prefix_offsets)
    within = np.arange(len(plan.prefix_hashes)) - np.repeat(plan.prefix_offsets[:-1], counts)
    own = np.repeat(group[plan.session], counts) * _GROUP * (within < law.shared_tokens // law.block_tokens)
    return dataclasses.replace(plan, prefix_hashes=plan.prefix_hashes + own)


def _as_long_as_the_rows(options: Options, plan: Schedule) -> Schedule:
    """Return the schedule with the lengths of a data set's rows, one after another, over again when they are used up."""
    from mlsys_bench.loadtest.payloads import dataset

    assert options.content.dataset is not None
    if plan.gap_s is not None or options.content.pairs is not None or options.content.shared_prefix is not None:
        raise BadInput("--dataset brings its own prompts: leave --turns, --shared-prefix, --lengths-from and sessions that wait out")
    rows = options.content.dataset.rows
    at = np.arange(len(plan)) % len(rows)
    asked = np.array([dataset.prompt_tokens(row) for row in rows], dtype=np.int64)
    answers = np.array([row.output_tokens or 0 for row in rows], dtype=np.int64)[at]
    outputs = np.where(answers > 0, answers, plan.output_tokens) if options.content.dataset_lengths else plan.output_tokens
    return dataclasses.replace(plan, prompt_tokens=asked[at], output_tokens=outputs, prefix_offsets=None, prefix_hashes=None)
