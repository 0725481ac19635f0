"""Records of all workers -> what users saw, and whether to believe it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlsys_bench import summary, units
from mlsys_bench.errors import MeasurementFailed, NothingYet
from mlsys_bench.loadtest import Options, crew, job, mlperf, own, shards, target, trust, validity
from mlsys_bench.loadtest import asked as askings
from mlsys_bench.loadtest.caller import shown
from mlsys_bench.loadtest.crew import Report
from mlsys_bench.senders import Sender
from mlsys_bench.timelines import Series, Steadiness, Timeline
from mlsys_bench.types import STOPPED, LoadTest, RequestRecord, Requests

if TYPE_CHECKING:
    from mlsys_bench.workload import Schedule

_CLOCK_ERROR_S = 0.001  # from here on the workers' common start is worth a word


def checked(reports: Sequence[Report], where: object) -> None:
    """Raise MeasurementFailed when no worker came to its end, or when one's records are not what it sent and what Locust counted."""
    if all(report.done is None for report in reports):
        rows = sum(len(report.records) for report in reports)
        many = "" if len(reports) == 1 else f"s (all {len(reports)})"
        raise MeasurementFailed(f"the load worker{many} died {reports[0].last_words}; {rows} requests are kept in {where}")
    for report in reports:
        done, records = report.done, report.records
        if done is not None and not _agrees(done, records):
            raise MeasurementFailed(
                f"the load worker {_name(report, reports)}sent {done.sent} requests, Locust counted {done.locust_requests}, "
                f"{len(records)} were written down; it ended {report.last_words}; {len(records)} requests are kept in {where}"
            )


def _agrees(done: job.Done, records: Sequence[RequestRecord]) -> bool:
    """Say whether the records, what the worker sent and what Locust counted are the same requests."""
    failed = sum(r.outcome != "ok" for r in records)
    return done.sent <= len(records) == done.locust_requests and failed == done.locust_failures


def _name(report: Report, reports: Sequence[Report]) -> str:
    return f"{report.share} on {report.host} " if len(reports) > 1 else ""


def result(
    options: Options,
    plan: Schedule,
    found: target.Target,
    work: job.Job,
    reports: Sequence[Report],
    requests: Requests,
    *,
    offered_per_s: float | None,
    known: trust.Trust | None = None,
    steadiness: Steadiness | None = None,
) -> LoadTest:
    """Return what the users of one run saw.  Raises MeasurementFailed where none was answered."""
    stopped_s = _stopped_s(reports)
    end_s = _end_s(work, stopped_s)
    if options.offline is not None:  # the window of a run that sends all at once ends with the last answer
        end_s = max((r.done_s for r in requests.requests if r.done_s is not None), default=end_s)
    _check_answers(options, requests, stopped_s, work.warmup_s)
    asked = own.asked(options, requests.requests) if options.locustfile else found.as_sent(askings.asked(options, plan, requests.requests))
    flaws = []
    if stopped_s is not None:
        flaws.append(f"{STOPPED} after {stopped_s:.1f} of {work.duration_s:.1f} s; requests in flight then are left out")
    unfinished = sum(r.outcome == "unfinished" for r in requests.requests)
    if unfinished:
        flaws.append(f"{unfinished} answers did not come within {options.drain_s:g} s after the last send: the server is behind")
    run = summary.columns.of(requests.requests)
    found_so = summary.summarise(
        run,
        source="loadtest",
        target=f"{shown(options.url)} ({found.label})",
        arrivals=_arrivals(options),
        offered_rate_per_s=offered_per_s,
        slo=options.slo,
        validity=validity.judge(
            run,
            cpu_share=max(report.done.cpu_share for report in reports if report.done is not None),
            asked_prompt_tokens=askings.comparable_prompt_tokens(asked),
            asked_output_tokens=asked.output_tokens or 0.0,
            steadiness=steadiness,
            open_loop=offered_per_s is not None,
            all_at_once=options.offline is not None,
            may_poll=not options.busy_poll and options.hosts is None and crew.spare_cores(len(reports)) > 0,
            loops=[done_so for report in reports if (done_so := report.done) is not None],
            breaks=_losses(reports, requests.requests, work, end_s),
            flaws=flaws,
            notes=(
                *found.notes,
                *_clocks(reports),
                *trust.notes_on(
                    known,
                    requests.requests,
                    offered_per_s=offered_per_s,
                    window_s=end_s - work.warmup_s,
                    processes=len(reports),
                ),
            ),
        ),
        window=(work.warmup_s, end_s),
        requests_file=str(options.requests_file) if options.requests_file else None,
        steadiness=steadiness,
    )
    return dataclasses.replace(
        found_so,
        timeline=_with_cpu(found_so.timeline, reports),
        senders=tuple(_sender(report) for report in reports),
        asked=asked,
        tenants=found_so.tenants or askings.tenants(requests.requests, options.slo),
        scenario=None
        if options.preset is None
        else mlperf.judge(options.preset, requests.requests, offered_per_s=offered_per_s, slo=options.slo, lasted_s=end_s - work.warmup_s),
    )


def _with_cpu(course: Timeline | None, reports: Sequence[Report]) -> Timeline | None:
    """Return a timeline with the CPU of each worker beside it."""
    if course is None:
        return None
    extra = [
        Series(
            name=f"CPU of worker {report.share}",
            unit="share of a core",
            values=summary.resampled([at - 0.5 for at, _ in report.cpu], [share for _, share in report.cpu], course),
        )
        for report in reports
        if report.cpu
    ]
    return dataclasses.replace(course, extra=(*course.extra, *extra))


def sent_until_s(work: job.Job, reports: Sequence[Report]) -> float:
    """Return when sending ended: as planned, or when a person stopped it."""
    return _end_s(work, _stopped_s(reports))


def _end_s(work: job.Job, stopped_s: float | None) -> float:
    return work.duration_s if stopped_s is None else min(work.duration_s, stopped_s)


def _arrivals(options: Options) -> str:
    """Print how requests arrived."""
    if options.users is not None:
        together = f", {options.at_once} requests at once each" if options.at_once > 1 else ""
        return f"closed loop, {options.users} user{'s' * (options.users > 1)}{together}"
    return "trace" if options.trace is not None else "all at once" if options.offline is not None else options.arrivals


def _sender(report: Report) -> Sender:
    """Return what one process did."""
    late_s = [late for r in report.records if r.in_window and (late := summary.lateness_s(r)) is not None]
    done, clock = report.done, report.clock
    return Sender(
        share=report.share,
        host=report.host,
        core=report.core,
        sent=done.sent if done else sum(r.sent_s is not None for r in report.records),
        cpu_share=done.cpu_share if done else None,
        lateness_p99_s=float(np.quantile(late_s, 0.99)) if late_s else None,
        polled_share=done.polled_share if done else None,
        ended=f"died {report.last_words}" if done is None else "stopped" if done.stopped else "done",
        clock_offset_s=clock.wall_offset_s if clock else None,
        clock_error_s=clock.error_s if clock else None,
        clock_drift_s=clock.drift_s if clock else None,
    )


def _stopped_s(reports: Sequence[Report]) -> float | None:
    """Return when a person ended the run, or None.  A worker that ended alone ended nothing: what it owed is missing."""
    done = [report.done for report in reports if report.done is not None]
    return min(each.ran_s for each in done) if done and all(each.stopped for each in done) else None


def _losses(reports: Sequence[Report], records: Sequence[RequestRecord], work: job.Job, end_s: float) -> list[str]:
    """Say which workers died, and how much of the schedule nobody sent: the rate was not what was asked."""
    of = f"of {len(reports)}"
    dead = [f"worker {r.share} {of} on {r.host} died {r.last_words}" for r in reports if r.done is None]
    if _stopped_s(reports) is None:
        ended = [(r, r.done) for r in reports if r.done is not None and r.done.stopped]
        dead += [f"worker {r.share} {of} on {r.host} was stopped after {done.ran_s:.1f} s" for r, done in ended]
    else:  # nobody owes what was due in the moment of the stop
        end_s = min(end_s, *(max((r.scheduled_s for r in report.records), default=0.0) for report in reports if report.done is not None))
    lost = shards.missing(records, work.scheduled_s, end_s) if work.users is None else 0
    if lost:
        due = int((np.asarray(work.scheduled_s) < end_s).sum())
        dead.append(f"{lost} of {due} scheduled requests are missing: latencies are of a lower rate than was asked")
    return dead


def _clocks(reports: Sequence[Report]) -> list[str]:
    """Say when the workers' common instant is known only roughly."""
    worst = max((abs(r.clock.error_s) + abs(r.clock.drift_s) for r in reports if r.clock is not None), default=0.0)
    if worst <= _CLOCK_ERROR_S:
        return []
    return [f"the workers' clocks are known to {units.show_s(worst)}: their stamps may be shifted against each other by as much"]


def _check_answers(options: Options, requests: Requests, stopped_s: float | None, warmup_s: float) -> None:
    inside: Sequence[RequestRecord] = [r for r in requests.requests if r.in_window]
    where = f"; every request is in {options.requests_file}" if options.requests_file else ""
    if stopped_s is not None and not inside:
        raise NothingYet(f"stopped after {stopped_s:.1f} s: nothing was answered yet past the warm-up of {warmup_s:.1f} s{where}")
    if not inside and requests.requests:
        due = f"all of {len(requests.requests)} requests were due in the warm-up of {units.show_s(warmup_s)}, which is left out"
        raise MeasurementFailed(f"{shown(options.url)}: {due}: give a longer --duration or a shorter --warmup{where}")
    if not any(r.outcome == "ok" for r in inside):
        kinds = Counter(f"{r.outcome}{f' (HTTP {r.http_status})' if r.http_status else ''}" for r in inside)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        raise MeasurementFailed(f"{shown(options.url)}: none of {len(inside)} requests was answered: {listed or 'none was sent'}{where}")
