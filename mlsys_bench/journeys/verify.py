"""verify: one replica at its planned load, prediction beside measurement."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import msgspec

from mlsys_bench import latency, loadtest, record, slo, summary, units, workload
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys.load import progress
from mlsys_bench.journeys.progress import Line
from mlsys_bench.types import Check, Layout, LoadTest, Plan, Requests, Verification

KEYS = (*(f"{metric}_{stat}_s" for metric in ("ttft", "tpot", "e2e") for stat in ("p50", "p95", "p99")), "throughput_tokens_per_s")
ENGINES = ("cpu", "cuda:0")  # devices the built-in engine runs on


def verify(plan_file: Path, url: str | None, *, duration: str, seed: int, out: Path | None, quiet: bool = False) -> Verification:
    """Load-test one replica of a plan, the built-in engine or a given server, and hold every prediction against it."""
    plan = record.read(plan_file, Plan)
    duration_s = units.seconds(duration, "--duration")
    if out is not None:
        record.check_writable(out)
    requests_file = out.with_suffix(".parquet") if out else None
    with contextlib.nullcontext(url) if url else replica(plan) as target:
        measured, _ = trial(plan, target, duration_s=duration_s, seed=seed, requests_file=requests_file, quiet=quiet)
    found = checks(plan, measured)
    return Verification(
        plan_file=plan_file.name,
        target=target,
        rate_per_s=rate_per_replica(plan),
        checks=found,
        holds=all(check.inside is not False for check in found) and measured.validity.verdict != "invalid",
        measured=measured,
        notes=notes(plan, measured),
    )


def exit_status(result: Verification) -> int:
    """Return 0 when every prediction holds, 1 when one does not, 3 when the measurement itself cannot be believed."""
    if result.measured.validity.verdict == "invalid":
        return 3
    return 0 if result.holds else 1


def rate_per_replica(plan: Plan) -> float:
    """Return the load the plan gives each replica."""
    return plan.workload.rate_per_s / plan.replicas


@contextlib.contextmanager
def replica(plan: Plan) -> Iterator[str]:
    """Run one replica of the plan as a server, in the layout its profile was measured in, and give its URL."""
    from mlsys_bench import serve

    layout, constants = plan.profile.layout, plan.profile.constants
    if layout.device not in ENGINES:
        raise BadInput(f"the plan is for {layout.device}, which is not in this machine; give the URL of a replica: mlsys verify PLAN URL")
    options = serve.Options(
        model=layout.model,
        precision=layout.precision,
        device=layout.device,
        max_batch=plan.max_batch,
        max_step_tokens=int(constants["max_step_tokens"]),
        block_tokens=int(constants["block_tokens"]),
        kv_tokens=int(constants["kv_tokens"]),
        max_context=int(constants["max_context"]),
        threads=layout.threads,
        engine_cores=layout.pinned_cores,
        port=0,
        queue_limit=1000,  # an open loop must see the queue, not its limit
    )
    with serve.start(options) as server:
        latency.check_layout(plan.profile, msgspec.convert(server.health()["layout"], Layout))
        yield server.url


def trial(
    plan: Plan, url: str, *, duration_s: float, seed: int, requests_file: Path | None, quiet: bool = False
) -> tuple[LoadTest, Requests]:
    """Load one replica at its planned rate with the plan's own traffic, open loop, true to its rate and lengths."""
    traffic = dataclasses.replace(plan.workload, rate_per_s=rate_per_replica(plan))
    options = loadtest.Options(
        url=url,
        trace=workload.typical(traffic, max(1, round(traffic.rate_per_s * duration_s)), seed),
        duration_s=duration_s,
        slo=slo.parse(plan.slo),
        seed=seed,
        requests_file=requests_file,
    )
    line = Line(quiet)
    try:
        measured, requests = loadtest.run(options, lambda p: line.show(progress(p)))
        return dataclasses.replace(measured, arrivals=f"{traffic.arrivals}, true to rate and lengths"), requests
    finally:
        line.clear()


def checks(plan: Plan, measured: LoadTest) -> tuple[Check, ...]:
    """Return every prediction beside its measurement.

    A prediction holds when its 90 % interval and that of the measurement overlap: both are uncertain, and one run of one replica
    is a sample.
    """
    seen = summary.predicted_keys(measured)
    return tuple(_check(key, plan, seen.get(key), measured) for key in KEYS if key in plan.predicted)


def _check(key: str, plan: Plan, seen: float | None, measured: LoadTest) -> Check:
    predicted = plan.predicted[key]
    low, high = plan.intervals.get(key, (None, None))
    seen_low, seen_high = _interval(key, measured)
    inside = None
    if seen is not None and low is not None and high is not None:
        inside = (seen_low if seen_low is not None else seen) <= high and (seen_high if seen_high is not None else seen) >= low
    return Check(
        key=key,
        predicted=predicted,
        low=low,
        high=high,
        measured=seen,
        measured_low=seen_low,
        measured_high=seen_high,
        error_percent=None if not seen else 100 * (predicted - seen) / seen,
        inside=inside,
    )


def _interval(key: str, measured: LoadTest) -> tuple[float | None, float | None]:
    if key == "throughput_tokens_per_s":
        return measured.output_tokens_interval or (None, None)
    metric, _, rest = key.partition("_")
    found = getattr(measured, f"{metric}_s", None)
    if found is None:
        return None, None
    low_high: tuple[float | None, float | None] = found.intervals.get(rest.removesuffix("_s"), (None, None))
    return low_high


def notes(plan: Plan, measured: LoadTest) -> tuple[str, ...]:
    """Return what a reader must know beside the figures."""
    rate = units.show_rate(rate_per_replica(plan))
    said = [f"one replica at {rate}, {measured.ok} answers; the load test was {measured.validity.verdict}"]
    if measured.validity.reasons:
        said.append("; ".join(measured.validity.reasons))
    said.append("a prediction holds when its 90 % interval and the measurement's overlap; error is (predicted - measured) / measured")
    return tuple(said)
