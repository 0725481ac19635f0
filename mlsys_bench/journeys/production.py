"""verify --prometheus: a plan's predictions held against production's own metrics, and its traffic against production's."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlsys_bench import latency, record, slo, units, workload
from mlsys_bench.checked import Check
from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.journeys import planning, traffic
from mlsys_bench.journeys.verify import check_testable, rate_per_replica
from mlsys_bench.plan import again, demand
from mlsys_bench.plan.again import Foreseen
from mlsys_bench.productions import Kept, Production, Seen
from mlsys_bench.types import Limit, Plan, Workload
from mlsys_bench.workload import metrics, prometheus, served
from mlsys_bench.workload.metrics import Metrics
from mlsys_bench.workload.served import Estimate, Histogram

RANGE = "1h"
ALIKE = 0.05  # of a mean: closer than this, production's traffic is the plan's
ALIKE_CV = 0.15
COARSE = 3.0  # high over low of what was measured: an interval wider than that, and than the prediction's, decides nothing
LEAST_REQUESTS = 100  # fewer decide nothing
COURSE = 1.5  # the busiest step over the mean: beyond it one rate does not stand for the range
UNEVEN = 1.25  # likewise the busiest replica
Z90 = 1.645
STATUS = {"holds": 0, "does not hold": 1, "undecided": 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Which metrics to read: an address or an exported file, and what of it."""

    where: str
    range_: str | None = None
    until: str | None = None
    engine: str | None = None
    model: str | None = None
    selector: str | None = None
    auth_file: Path | None = None


def check(source: Source, url: str | None, duration: str | None) -> None:
    """Raise BadInput for options that belong to the other way of verifying."""
    if duration is not None:
        raise BadInput(f"--duration {duration}: is how long a load test lasts; --prometheus reads what was, as far back as --range")
    if url is not None:
        raise BadInput(f"mlsys verify: {url} is load-tested and --prometheus is read; name one of them")
    if Path(source.where).is_file() and (source.range_ or source.until or source.selector or source.auth_file):
        raise BadInput(f"{source.where}: is a file and read whole; --range, --until, --selector and --auth-file belong to a server")


def production(
    plan_file: Path, source: Source, url: str | None = None, *, duration: str | None = None, seed: int, out: Path | None
) -> Production:
    """Hold every prediction of a plan against what its fleet did in production."""
    check(source, url, duration)
    plan = check_testable(planning.stored(plan_file))
    if out is not None:
        record.check_writable(out)
    where, seen = _metrics(source)
    try:
        observed = metrics.workload(seen, where)
    except MeasurementFailed as error:
        return _nothing(plan_file, plan, where, seen, str(error))
    return judge(plan_file.name, plan, seen, observed, where, seed=seed)


def files(source: Source) -> list[Path]:
    """Return the files that metrics are read from."""
    return [Path(source.where)] if Path(source.where).is_file() else []


def exit_status(result: Production) -> int:
    """Return 0 when the plan holds, 1 when a figure lies outside its interval or a limit is missed, 3 when too little is known."""
    return STATUS[result.verdict]


def _metrics(source: Source) -> tuple[str, Metrics]:
    """Return where the metrics are from and what they are.  Raises BadInput where there are none of a known engine."""
    path = Path(source.where)
    try:
        if path.is_file():
            return path.name, prometheus.exported(path, engine=source.engine, model=source.model, wanted=served.latency_names)
        server = prometheus.server(source.where, traffic.authorization(source.auth_file))
        return server.shown, prometheus.fetched(
            server,
            end_s=time.time() if source.until is None else traffic.unix_s(source.until),
            range_s=units.seconds(source.range_ or RANGE, "--range"),
            step_s=None,
            engine=source.engine,
            model=source.model,
            selector=source.selector,
            wanted=served.latency_names,
        )
    except MeasurementFailed as error:
        raise BadInput(f"nothing to verify against: {error}") from None


def _nothing(plan_file: Path, plan: Plan, where: str, seen: Metrics, why: str) -> Production:
    """Return that there was no traffic to judge by."""
    return Production(
        plan_file=plan_file.name, source=where, engine=seen.engine.name, start_unix_s=seen.start_s, duration_s=seen.end_s - seen.start_s,
        requests=0, replicas=0.0, replicas_planned=plan.replicas, replicas_counted=False, rate_per_s=0.0, busiest_share=None, traffic=(),
        as_planned=False, utilisation=plan.utilisation, utilisation_seen=None, kv_share=None, checks=(), remade=(), limits=(),
        verdict="undecided", notes=(why,),
    )  # fmt: skip


# ---------------------------------------------------------------- judging


def judge(plan_name: str, plan: Plan, seen: Metrics, observed: Workload, where: str, *, seed: int) -> Production:
    """Return the plan's predictions, and those made anew where the traffic is another, beside what production's metrics say."""
    summary = observed.observed
    assert summary is not None
    members, found = served.members(seen), served.histograms(seen)
    replicas = members.mean / plan.fleet[0].attention_dp if members.is_told else float(plan.replicas)
    compared = tuple(_traffic(plan, observed, replicas))
    as_planned = all(figure.alike for figure in compared) and _arrivals_alike(plan, observed)
    whole = max(1, round(replicas))
    foreseen = again.foresee(plan, _fleet(plan, observed, compared, whole / replicas), whole, seed=seed)
    figures = _measured(seen, found, replicas, plan.fleet[0].attention_dp)
    own = tuple(_checks(plan.predicted, plan.intervals, figures, plan))
    remade = tuple(_remade(foreseen, figures, plan))
    limits = tuple(_kept(limit, found) for limit in slo.latencies(slo.parse(plan.slo)))
    return Production(
        plan_file=plan_name,
        source=where,
        engine=seen.engine.name,
        start_unix_s=min(float(s.times_s[0]) for s in seen.arrived),
        duration_s=summary.duration_s,
        requests=summary.requests,
        replicas=replicas,
        replicas_planned=plan.replicas,
        replicas_counted=members.is_told,
        rate_per_s=observed.rate_per_s,
        busiest_share=members.busiest_share,
        traffic=compared,
        as_planned=as_planned,
        utilisation=plan.utilisation,
        utilisation_seen=foreseen.utilisation,
        kv_share=served.kv_share(seen),
        checks=own,
        remade=remade,
        limits=limits,
        verdict=_verdict(_deciding(own, remade) if as_planned else remade, limits, summary.requests),
        notes=tuple(_notes(plan, seen, observed, found, members, foreseen, not as_planned)),
    )


def _deciding(own: tuple[Check, ...], remade: tuple[Check, ...]) -> tuple[Check, ...]:
    """Return the plan's own predictions, and of those made anew what it does not predict: means, requests in flight."""
    keys = {c.key for c in own}
    return (*own, *(c for c in remade if c.key not in keys))


def _verdict(checks: Sequence[Check], limits: Sequence[Kept], requests: int) -> Literal["holds", "does not hold", "undecided"]:
    """Return what decides: a figure outside, a limit missed; then whether at least half of what was measured says anything."""
    if any(c.inside is False for c in checks) or any(limit.kept is False for limit in limits):
        return "does not hold"
    measured = [c for c in checks if c.measured is not None or c.measured_low is not None]
    decided = [c for c in measured if c.inside is not None]
    return "holds" if requests >= LEAST_REQUESTS and measured and 2 * len(decided) >= len(measured) else "undecided"


def _fleet(plan: Plan, observed: Workload, compared: Sequence[Seen], share: float) -> Workload:
    """Return production's traffic for a whole number of replicas, each at the rate that one saw.

    Where nothing speaks against the plan's own law of lengths or arrivals, it stays: counters and buckets know less of its shape.
    """
    other = {figure.name.partition(" ")[0] for figure in compared if not figure.alike}
    return dataclasses.replace(
        observed,
        rate_per_s=observed.rate_per_s * share,
        arrivals=plan.workload.arrivals if _arrivals_alike(plan, observed) else observed.arrivals,
        prompt_tokens=observed.prompt_tokens if "prompt" in other else plan.workload.prompt_tokens,
        output_tokens=observed.output_tokens if "output" in other else plan.workload.output_tokens,
        length_correlation=plan.workload.length_correlation,
        tenants=() if other & {"prompt", "output"} else plan.workload.tenants,
    )


# ---------------------------------------------------------------- traffic


def _traffic(plan: Plan, observed: Workload, replicas: float) -> Iterator[Seen]:
    """Yield rate and lengths, planned and seen: the means with the interval of the sample, the spreads with what the buckets leave open."""
    summary = observed.observed
    assert summary is not None
    n, index = summary.requests, max([1.0, *summary.dispersion.values()])
    yield _mean("rate per replica", "/s", rate_per_replica(plan), observed.rate_per_s / replicas, Z90 * math.sqrt(index / n))
    planned = demand.of(plan.workload)
    for name, lengths, asked in (("prompt", summary.prompt_tokens, planned.prompt), ("output", summary.output_tokens, planned.output)):
        law = observed.prompt_tokens if name == "prompt" else observed.output_tokens
        value = workload.mean_tokens(law) if lengths is None else lengths.mean
        cv = law.cv if lengths is None else lengths.cv
        yield _mean(f"{name} length, mean", " tokens", float(asked.mean()), value, Z90 * cv / math.sqrt(n))
        if lengths is not None:
            low, high = lengths.cv_bounds or (lengths.cv, math.inf)
            wanted = float(asked.std() / asked.mean())
            yield Seen(
                name=f"{name} length, cv", unit="", planned=wanted, seen=lengths.cv, low=low, high=None if math.isinf(high) else high,
                alike=low - ALIKE_CV <= wanted <= high + ALIKE_CV,
            )  # fmt: skip


def _mean(name: str, unit: str, planned: float, seen: float, relative: float) -> Seen:
    low, high = seen * max(1 - relative, 0.0), seen * (1 + relative)
    alike = low <= planned <= high or abs(seen / planned - 1) <= ALIKE
    return Seen(name=name, unit=unit, planned=planned, seen=seen, low=low, high=high, alike=alike)


def _arrivals_alike(plan: Plan, observed: Workload) -> bool:
    """Say whether both arrive in bursts, or neither."""
    kinds = {workload.parse_arrivals(w.arrivals).kind in ("poisson", "constant") for w in (plan.workload, observed)}
    return len(kinds) == 1


# ---------------------------------------------------------------- figures


def _measured(seen: Metrics, found: Mapping[str, Histogram], replicas: float, ranks: int) -> dict[str, Estimate]:
    """Return what production shows, by the key of the prediction; of quantiles those that predictions name."""
    figures = {f"{metric}_mean_s": served.mean(histogram) for metric, histogram in found.items()}
    for metric, histogram in found.items():
        for stat in ("p50", "p90", "p95", "p99"):
            figures[f"{metric}_{stat}_s"] = served.quantile(histogram, float(stat[1:]) / 100)
    tokens, held = served.output_tokens_per_s(seen), served.in_flight(seen)
    if tokens is not None:
        figures["throughput_tokens_per_s"] = _scaled(tokens, 1 / replicas)
    if held is not None:
        figures["requests_in_flight"] = _scaled(held, ranks)
    return figures


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    value, low, high = (None if v is None else v * factor for v in (estimate.value, estimate.low, estimate.high))
    return Estimate(value=value, low=low, high=high)


def _remade(foreseen: Foreseen, figures: Mapping[str, Estimate], plan: Plan) -> Iterator[Check]:
    """Yield predictions made anew, and by Little's law the requests in flight; one of capacity where production carries more than it."""
    predicted, around = dict(foreseen.predicted), dict(foreseen.intervals)
    if not predicted:
        carried, (low, high) = foreseen.rate_per_s, foreseen.capacity_interval
        yield Check(
            key="capacity_per_s", predicted=foreseen.capacity_per_s, low=low, high=high, measured=carried, measured_low=carried,
            measured_high=None, error_percent=100 * (foreseen.capacity_per_s / carried - 1), inside=False if carried > high else None,
        )  # fmt: skip
        return
    if "e2e_mean_s" in predicted:
        predicted["requests_in_flight"] = foreseen.rate_per_s * predicted["e2e_mean_s"]
        low, high = around["e2e_mean_s"]
        around["requests_in_flight"] = foreseen.rate_per_s * low, foreseen.rate_per_s * high
    yield from _checks(predicted, around, figures, plan)


def _checks(
    predicted: Mapping[str, float], around: Mapping[str, tuple[float, float]], figures: Mapping[str, Estimate], plan: Plan
) -> Iterator[Check]:
    """Yield each prediction beside what production shows.  The rate is no prediction: it is the traffic."""
    outside_s = latency.overhead(plan.profile).seconds(plan.workload.prompt_tokens.mean)
    order = [key for key in predicted if key in around and key != "request_rate_per_s" and not key.startswith("goodput")]
    for key in order:
        low, high = around[key]
        if key.startswith(("ttft", "e2e")):
            low = max(low - outside_s, 0.0)  # the engine's own clock starts and stops inside the server
        yield _check(key, predicted[key], low, high, figures.get(key))


def _check(key: str, predicted: float, low: float, high: float, seen: Estimate | None) -> Check:
    value = None if seen is None else seen.value
    return Check(
        key=key,
        predicted=predicted,
        low=low,
        high=high,
        measured=value,
        measured_low=None if seen is None else seen.low,
        measured_high=None if seen is None else seen.high,
        error_percent=None if seen is None else _error_percent(key, predicted, seen),
        inside=None if seen is None else _inside(low, high, seen),
    )


def _error_percent(key: str, predicted: float, seen: Estimate) -> float | None:
    """Return the error: of a percentile, which lies anywhere between two edges, beyond the nearer one; 0 between them."""
    nearest = seen.value
    if key.rpartition("_p")[2].removesuffix("_s")[:1].isdigit() and seen.low is not None:
        nearest = max(seen.low, predicted if seen.high is None else min(predicted, seen.high))
    return 100 * (predicted / nearest - 1) if nearest else None


def _inside(low: float, high: float, seen: Estimate) -> bool | None:
    """Say whether both intervals meet; None where they do and production's is too wide to mean anything."""
    if seen.low is None:
        return None
    if seen.low > high or (seen.high is not None and seen.high < low):
        return False
    if seen.high is None or seen.high > max(COARSE, high / max(low, 1e-12)) * max(seen.low, 1e-12):
        return None
    return True


def _kept(limit: Limit, found: Mapping[str, Histogram]) -> Kept:
    """Return a limit beside the edges between which production's figure lies."""
    histogram = found.get(limit.metric)
    if histogram is None or limit.tenant is not None:  # counters are of all tenants together
        return Kept(limit=slo.show((limit,)), low=None, high=None, kept=None)
    seen = served.mean(histogram) if limit.stat == "mean" else served.quantile(histogram, float(limit.stat[1:]) / 100)
    kept = True if seen.high is not None and seen.high <= limit.limit else None
    if seen.low is not None and seen.low >= limit.limit:
        kept = False
    return Kept(limit=slo.show((limit,)), low=seen.low, high=seen.high, kept=kept)


# ---------------------------------------------------------------- words


def _notes(
    plan: Plan, seen: Metrics, observed: Workload, found: Mapping[str, Histogram], members: served.Members, foreseen: Foreseen, replan: bool
) -> Iterator[str]:
    """Yield what a reader must know beside the figures."""
    summary = observed.observed
    assert summary is not None
    if not foreseen.predicted:
        yield (
            f"by the plan's profile {units.show_rate(foreseen.rate_per_s)} is {units.show_share(foreseen.utilisation)} of what a replica "
            f"carries at these lengths: no queue would settle, so nothing is predicted; fit a new profile, or add replicas"
        )
    if replan:
        where = "FILE" if observed.source and not observed.source.startswith("http") else "--prometheus URL"
        yield f"to plan for this traffic: mlsys workload {where} -o traffic.json, then mlsys plan --from traffic.json"
    if not members.is_told:
        yield f"no label tells servers apart: the {plan.replicas} replicas planned are assumed"
    if members.busiest_share is not None and members.busiest_share > UNEVEN:
        yield f"the busiest replica carries {members.busiest_share:.2f} times the mean; predictions are for an even share"
    if summary.peak_rate_per_s > COURSE * summary.rate_per_s and summary.requests >= LEAST_REQUESTS:
        yield (
            f"the rate rose to {units.show_rate(summary.peak_rate_per_s)} from a mean of {units.show_rate(summary.rate_per_s)}: one rate "
            "stands for the whole range; take a shorter --range"
        )
    if not _arrivals_alike(plan, observed):
        yield f"arrivals: {plan.workload.arrivals} as planned, {observed.arrivals} as counted every scrape"
    if summary.prefix_hit_share:
        yield (
            f"{units.show_share(summary.prefix_hit_share)} of prompt tokens come from the prefix cache; predictions compute every prompt "
            "whole, so TTFT is foreseen too long"
        )
    missing = [metric for metric in ("ttft", "tpot", "itl", "e2e") if metric not in found]
    if missing:
        yield f"{seen.engine.name} shows no histogram of {', '.join(m.upper() for m in missing)}"
    yield "latencies are the servers' own, from arrival at the engine: the network and what stands before the engine are not in them"
    yield (
        "a percentile lies between two edges of the histogram's buckets, about where Prometheus puts it; a prediction holds when its 90 % "
        "interval meets that range, and its error is what it lies beyond"
    )
