"""verify: one replica at its planned load, prediction beside measurement."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from mlsys_bench import latency, loadtest, record, slo, stats, summary, units, workload
from mlsys_bench.checked import Check, Verification
from mlsys_bench.errors import BadInput
from mlsys_bench.gate import load_limits
from mlsys_bench.journeys import causes, planning
from mlsys_bench.journeys.load import progress
from mlsys_bench.journeys.progress import Line
from mlsys_bench.loadtest.validity import FAILED_SHARE
from mlsys_bench.serve import ServerProcess
from mlsys_bench.types import Layout, LoadTest, Plan, Requests

KEYS = (*(f"{metric}_{stat}_s" for metric in ("ttft", "tpot", "e2e") for stat in ("p50", "p95", "p99")), "throughput_tokens_per_s")
_LIMITS = ("max_step_tokens", "block_tokens", "kv_tokens", "max_context")  # constants of a profile
ENGINES = ("cpu", "cuda:0")  # devices the built-in engine runs on


def verify(plan_file: Path, url: str | None, *, duration: str, seed: int, out: Path | None, quiet: bool = False) -> Verification:
    """Load-test one replica of a plan, the built-in engine or a given server, and hold every prediction against it."""
    plan = check_testable(planning.stored(plan_file))
    duration_s = units.seconds(duration, "--duration")
    requests_file = record.requests_beside(out)
    told = {} if url is None else of_ours(url)
    if told:
        latency.check_layout(plan.profile, msgspec.convert(told["layout"], Layout))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        log = Path(folder) / "steps.csv"
        own = stack.enter_context(replica(plan, log)) if url is None else None
        target, health = (own.url, own.health()) if own else (str(url), {})
        measured, requests = trial(plan, target, duration_s=duration_s, seed=seed, requests_file=requests_file, quiet=quiet)
        found = checks(plan, measured)
        in_order = not plan.workload.tenants  # a replay knows no priorities
        why = causes.of(found, plan.profile, health, log, requests) if own and in_order else None
    broken = missed(plan, measured)
    return Verification(
        plan_file=plan_file.name,
        target=target,
        rate_per_s=rate_per_replica(plan),
        checks=found,
        holds=all(check.inside is not False for check in found) and not broken and measured.validity.verdict != "invalid",
        measured=measured,
        notes=(*notes(plan, measured), *settings(plan, told)),
        causes=why,
        missed=broken,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What `/health` of `mlsys serve` says, as far as it is needed here."""

    layout: Layout
    limits: dict[str, int]

    def __post_init__(self) -> None:
        """Raise ValueError where a limit is missing."""
        if not {"max_seqs", "max_step_tokens", "blocks", "block_tokens"} <= self.limits.keys():
            raise ValueError("limits of another server")


def of_ours(url: str) -> dict[str, Any]:
    """Return what `mlsys serve` says of itself at this address, nothing for any other server."""
    try:
        where = urlsplit(url if "://" in url else f"http://{url}")
        with contextlib.closing(http.client.HTTPConnection(where.hostname or "", where.port, timeout=5)) as connection:
            connection.request("GET", "/health")
            body = json.loads(connection.getresponse().read())
        msgspec.convert(body, _Told)
    except (OSError, ValueError, RecursionError, msgspec.ValidationError, http.client.HTTPException):
        return {}  # another kind of server, or none: the load test says which
    return dict(body)


def settings(plan: Plan, told: Mapping[str, Any]) -> tuple[str, ...]:
    """Return in words which settings of the server are not the plan's."""
    limits = told.get("limits")
    if limits is None:
        return ()
    given = {
        "max batch": (plan.max_batch, limits["max_seqs"]),
        "tokens a step": (plan.max_step_tokens, limits["max_step_tokens"]),
        "KV tokens": (plan.kv_tokens_per_replica, limits["blocks"] * limits["block_tokens"]),
    }
    other = [f"{name} {has:,}, planned {wanted:,}" for name, (wanted, has) in given.items() if wanted is not None and has != wanted]
    return (f"the server is not set as planned: {'; '.join(other)}",) if other else ()


def check_testable(plan: Plan) -> Plan:
    """Return a plan whose replicas are alike and each do the whole work; raise BadInput for any other: no replica sees what was planned."""
    if plan.stages:
        raise BadInput(f"the plan is of a stage graph ({', '.join(s.stage for s in plan.stages)}); verify tests one replica of one model")
    if plan.gpu is None or len(plan.fleet) != 1:
        kinds = ", ".join(f"{item.replicas} x {item.stage} on {item.gpu}" for item in plan.fleet)
        raise BadInput(f"the plan's replicas differ ({kinds}), and no one of them sees the traffic planned; verify a plan of one kind")
    return plan


def exit_status(result: Verification) -> int:
    """Return 0 when every prediction holds, 1 when one does not or a limit is missed, 3 when the measurement decides nothing."""
    if result.missed:
        return 1
    if result.measured.validity.verdict == "invalid" or all(check.inside is None for check in result.checks):
        return 3
    return 0 if result.holds else 1


def rate_per_replica(plan: Plan) -> float:
    """Return the load the plan gives each replica."""
    return plan.workload.rate_per_s / plan.replicas


@contextlib.contextmanager
def replica(plan: Plan, log: Path) -> Iterator[ServerProcess]:
    """Run one replica of the plan as a server, in the layout its profile was measured in.  `log`: where it writes its steps."""
    from mlsys_bench import serve

    layout, constants = plan.profile.layout, plan.profile.constants
    if layout.device not in ENGINES:
        raise BadInput(f"the plan is for {layout.device}, which is not in this machine; give the URL of a replica: mlsys verify PLAN URL")
    missing = [name for name in _LIMITS if name not in constants]
    if missing:
        raise BadInput(
            f"the plan's profile does not say which {' and '.join(missing)} it was measured with, so no replica can be started like it; "
            "start one by hand and give its URL: mlsys verify PLAN URL"
        )
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
        step_log=str(log),
    )
    with serve.start(options) as server:
        latency.check_layout(plan.profile, msgspec.convert(server.health()["layout"], Layout))
        yield server


def trial(
    plan: Plan, url: str, *, duration_s: float, seed: int, requests_file: Path | None, quiet: bool = False
) -> tuple[LoadTest, Requests]:
    """Load one replica at its planned rate with the plan's own traffic, open loop, true to its rate and lengths."""
    traffic = dataclasses.replace(plan.workload, rate_per_s=rate_per_replica(plan))
    options = loadtest.Options(
        url=url,
        trace=workload.typical(traffic, max(1, round(traffic.rate_per_s * duration_s)), seed),
        duration_s=duration_s,
        slo=slo.of_all(slo.parse(plan.slo)),
        seed=seed,
        requests_file=requests_file,
    )
    line = Line(quiet)
    try:
        measured, requests = loadtest.run(options, lambda p: line.show(progress(p)))
        return dataclasses.replace(measured, arrivals=f"exact-rate {traffic.arrivals}"), requests
    finally:
        line.clear()


def missed(plan: Plan, measured: LoadTest) -> tuple[str, ...]:
    """Return the plan's limits that were missed for sure; none where the client is not believed for another reason than failures.

    Predictions are of requests that are answered: a replica that turns the rest away would do what was predicted.
    """
    failed = 1 - measured.ok / measured.requests if measured.requests else 0.0
    if measured.validity.verdict == "invalid" and failed <= FAILED_SHARE[1]:
        return ()
    promised = slo.of_all(slo.parse(plan.slo))
    decided = (limit for limit in promised if limit.metric != "availability")  # that of the fleet, spare replicas and all
    return tuple(slo.show_limit(limit) for limit in decided if load_limits.missed(slo.show_limit(limit), measured))


def checks(plan: Plan, measured: LoadTest) -> tuple[Check, ...]:
    """Return every prediction beside its measurement.

    A prediction holds when its 90 % interval and that of the measurement overlap: both are uncertain, and one run of one replica
    is a sample.
    """
    seen = summary.predicted_keys(measured)
    if measured.e2e_s.p50 is None:  # a rate of so few answers is that of its first and last one
        seen = {key: value for key, value in seen.items() if key != "throughput_tokens_per_s"}
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
    said = [f"one replica at {rate}, {measured.ok:,} answers; the load test was {measured.validity.verdict}"]
    few = {
        name
        for name in ("ttft_s", "tpot_s", "e2e_s")
        for stat in getattr(measured, name).too_few
        if f"{name[:-2]}_{stat}_s" in plan.predicted
    }
    if few:
        needed = stats.enough_for_quantile(0.99)
        duration = units.show_s(math.ceil(1.1 * needed / rate_per_replica(plan) / 10) * 10)
        said.append(f"a p99 needs {needed} answers: those of --duration {duration} or so would do")
    said.append("a prediction holds when its 90 % interval and the measurement's overlap; error is (predicted - measured) / measured")
    return tuple(said)
