"""Tables of latencies: predictions beside limits, percentiles of a run, predictions beside measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlsys_bench import slo as limits
from mlsys_bench.checked import Check
from mlsys_bench.report.parts import NONE, Cell, Column, Interval, Table, digits, mark, percent, span, time, time_cell
from mlsys_bench.types import LatencySummary, Limit, LoadTest, Plan

METRICS = ("ttft", "tpot", "itl", "e2e")
STATS = ("mean", "p50", "p90", "p95", "p99")


def promised(text: str | None) -> tuple[Limit, ...]:
    """Return the limits of a record's SLO line, none when it has none."""
    return limits.parse(text) if text else ()


def value_of(limit: Limit, figures: Mapping[str, float]) -> float | None:
    """Return what was predicted for a limit: 'ttft_p95_s', or a share such as 'goodput'."""
    key = limits.key(limit)
    return figures.get(f"{key}_s", figures.get(key))


def predicted(plan: Plan) -> Table:
    """Return TTFT, TPOT and E2E by percentile with their intervals and the limits beside them: three rows for a manager."""
    promises = promised(plan.slo)
    present = [m for m in METRICS if any(f"{m}_{s}_s" in plan.predicted for s in STATS)]
    shown = [s for s in STATS if any(f"{m}_{s}_s" in plan.predicted for m in present)]
    rows = tuple(
        (Cell(m.upper(), "strong"), *(_predicted_cell(plan, f"{m}_{s}_s") for s in shown), _limit_cell(plan, promises, m)) for m in present
    )
    columns = (Column("predicted"), *(Column(s, right=True, wide=s in ("mean", "p90")) for s in shown), Column("limit"))
    return Table(title="", columns=columns, rows=rows, note="below each figure its 90 % interval")


def _predicted_cell(plan: Plan, key: str) -> Cell:
    return time_cell(plan.predicted.get(key), plan.intervals.get(key))


def _limit_cell(plan: Plan, promises: Sequence[Limit], metric: str) -> Cell:
    own = [p for p in promises if p.metric == metric and p.tenant is None]
    if not own:
        return Cell("by tenant" if any(p.metric == metric for p in promises) else "none", "muted")
    kept = [value is not None and limits.meets(p, value) for p in own for value in [value_of(p, plan.predicted)]]
    texts = [f"{p.stat} < {limits.show_limit(p).partition('<')[2]} {mark(ok).text}" for p, ok in zip(own, kept, strict=True)]
    return Cell(texts[0], "good" if all(kept) else "bad", ", ".join(texts[1:]))


def two_ways(plan: Plan) -> Table | None:
    """Return the simulation beside queueing theory, or None where theory was not asked."""
    keys = [k for k in plan.predicted if k in plan.analytic and k.partition("_")[0] in METRICS and k.endswith("_s")]
    rows = tuple(
        (
            Cell(name(key)),
            time_cell(plan.predicted[key]),
            Cell(time(plan.analytic[key], plan.predicted[key])),
            Cell(percent(100 * (plan.analytic[key] / plan.predicted[key] - 1), signed=True) if plan.predicted[key] else NONE),
        )
        for key in keys
    )
    columns = (Column("latency"), Column("simulation", right=True), Column("queueing theory", right=True), Column("difference", right=True))
    return Table(title="Two ways to the same figure", columns=columns, rows=rows, detail=True) if rows else None


def percentiles(run: LoadTest) -> Table:
    """Return every latency of a run by percentile, with intervals, or 'too few' where the sample is too small."""
    summaries = [
        (m.upper(), summary) for m, summary in (("ttft", run.ttft_s), ("tpot", run.tpot_s), ("itl", run.itl_s), ("e2e", run.e2e_s))
    ]
    served = (("service TTFT", run.service_ttft_s), ("service E2E", run.service_s))
    beside = (("chunk gap", run.chunk_gap_s), *served, ("sent late", run.lateness_s))
    summaries += [(name, summary) for name, summary in beside if summary is not None and summary != run.itl_s]
    shown = (*STATS, "p999") if any(s.p999 is not None for _, s in summaries) else STATS
    rows = tuple((Cell(name, "strong"), _number(s), *(_stat_cell(s, stat) for stat in shown)) for name, s in summaries)
    columns = (
        Column("latency" if run.source == "loadtest" else run.source),
        Column("n", right=True, wide=True),
        *(Column("p99.9" if s == "p999" else s, right=True, wide=s in ("mean", "p90")) for s in shown),
    )
    bare = any(getattr(s, stat) is not None and stat not in s.intervals for _, s in summaries for stat in shown if stat != "p50")
    none = "; without one: the requests are worth too few independent ones" * (bare and run.source == "loadtest")
    service = "; service counts from the real send, all else from the schedule" * bool(run.service_s)
    note = f"below each figure its 90 % interval{none}{service}"
    return Table(title="", columns=columns, rows=rows, note=note)


def _number(summary: LatencySummary) -> Cell:
    """Return how many samples there are, and how many independent ones they are worth where that is clearly fewer."""
    worth = summary.effective_count
    return Cell(f"{summary.count:,}", "", f"worth {worth:,.0f}" if worth is not None and worth < 0.8 * summary.count else "")


def _stat_cell(summary: LatencySummary, stat: str) -> Cell:
    value: float | None = getattr(summary, stat)
    if value is None:
        return Cell("too few" if summary.count and (stat in summary.too_few or stat == "p999") else NONE, "muted")
    return time_cell(value, summary.intervals.get(stat))


def kept(run: LoadTest) -> Table | None:
    """Return each limit with what was seen and whether it held, or None without an SLO."""
    promises = {limits.key(p): p for p in promised(run.slo)}
    if not promises:
        return None
    verdicts = {key.partition("<")[0].partition(">")[0]: ok for key, ok in run.slo_met.items()}
    rows = tuple((Cell(limits.show_limit(p)), _seen(run, key, p, met := verdicts.get(key)), mark(met)) for key, p in promises.items())
    note = "percentiles here are of all requests, those that failed last" * any(run.slo_seen.values()) * (run.ok < run.requests)
    return Table(title="Limits", columns=(Column("limit"), Column("seen", right=True), Column("met")), rows=rows, note=note)


def _seen(run: LoadTest, key: str, limit: Limit, met: bool | None) -> Cell:
    """Return what a limit was held against, with the interval where that is of the same requests."""
    known = run.slo_seen if key in run.slo_seen else {}
    value, interval = known.get(key), _interval(run, limit)
    if limit.metric in limits.SHARES:
        ratio = _ratio(run, limit) if value is None else value
        return Cell(NONE if ratio is None else percent(100 * ratio), "", span(interval, 100, " %"))
    if known and value is None:
        return Cell("too few", "muted") if met is None else Cell("failed", "bad", _failed(run))
    if value is None:
        return _recorded(run, limit)
    if met is None and run.errors.get("unfinished"):
        return Cell(f"≥ {time(value)}", "", f"{run.errors['unfinished']:,} unfinished")
    return time_cell(value, interval if run.ok == run.requests else None)


def _failed(run: LoadTest) -> str:
    return f"{percent(100 * (1 - run.ok / run.requests))} of the requests"


def _interval(run: LoadTest, limit: Limit) -> Interval | None:
    """Return the 90 % interval of the figure that a limit is about, where the record has one."""
    if limit.metric in limits.SHARES:
        return run.goodput_interval if limit.metric == "goodput" and not limit.tenant else None
    summary, stat = _summary(run, limit), limit.stat.replace(".", "")
    return None if summary is None else summary.intervals.get(stat)


def _summary(run: LoadTest, limit: Limit) -> LatencySummary | None:
    whose = next((each for each in run.tenants if each.name == limit.tenant), None) if limit.tenant else run
    return getattr(whose, f"{limit.metric}_s", None)


def _ratio(run: LoadTest, limit: Limit) -> float | None:
    """Return the share that a record holds which does not say what its limits were held against."""
    if limit.metric == "availability":
        return run.ok / run.requests if run.requests else None
    return next((each.goodput_ratio for each in run.tenants if each.name == limit.tenant), None) if limit.tenant else run.goodput_ratio


def _recorded(run: LoadTest, limit: Limit) -> Cell:
    """Return the percentile of the answered, of a record that holds no other."""
    summary, stat = _summary(run, limit), limit.stat.replace(".", "")  # p99.9 is the field p999
    return Cell(NONE, "muted") if summary is None or not hasattr(summary, stat) else _stat_cell(summary, stat)


def checks(rows: Sequence[Check]) -> Table:
    """Return predictions beside measurements."""
    columns = (
        Column("figure"),
        Column("predicted", right=True),
        Column("measured", right=True),
        Column("error", right=True),
        Column("inside"),
    )
    return Table(title="", columns=columns, rows=tuple(map(_check, rows)), note="below each figure its 90 % interval")


def _check(c: Check) -> tuple[Cell, ...]:
    said = mark(c.inside)
    return (
        Cell(name(c.key), "strong"),
        figure(c.key, c.predicted, _pair(c.low, c.high)),
        figure(c.key, c.measured, _pair(c.measured_low, c.measured_high)),
        Cell(percent(c.error_percent, signed=True), said.tone),
        said._replace(sub="" if c.inside is not None else "too few answers" if c.measured is None else ""),
    )


def _pair(low: float | None, high: float | None) -> Interval | None:
    return None if low is None or high is None else (low, high)


def figure(key: str, value: float | None, interval: Interval | None) -> Cell:
    """Return a predicted figure in the unit its key ends in: _per_s, _s, or a share."""
    if value is None:
        return Cell(NONE, "muted")
    if key.endswith("_per_s"):
        return Cell(f"{digits(value)}/s", "", span(interval, unit="/s"))
    if key.endswith("_s"):
        return time_cell(value, interval)
    if key in ("goodput", "goodput_ratio", "utilisation"):
        return Cell(percent(100 * value), "", span(interval, 100, " %"))
    return Cell(digits(value), "", span(interval))


def name(key: str) -> str:
    """Print a key for people: ttft_p95_s -> 'TTFT p95', 'output_tokens_per_s' -> 'output tokens'."""
    metric, _, stat = key.removesuffix("_s").partition("_")
    return f"{metric.upper()} {stat}" if metric in METRICS else key.removesuffix("_per_s").removesuffix("_s").replace("_", " ")
