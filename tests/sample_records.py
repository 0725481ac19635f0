"""Records of every kind with realistic numbers, for tests of what people read."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mlsys_bench import slo
from mlsys_bench.backtests import Backtest, Score
from mlsys_bench.checked import Cause, Causes, Check, Demo, Verification
from mlsys_bench.loadtests import LoadTests
from mlsys_bench.looked_up import Ability, Catalog, Doctor
from mlsys_bench.record import Envelope, Record, kind_of
from mlsys_bench.stages import Assumed, Cache, Cost, Resources, Roofline, Service, Stage, StageGraph
from mlsys_bench.summary import repeated
from mlsys_bench.types import (
    Alternative,
    Bench,
    FleetItem,
    LatencyProfile,
    LatencySummary,
    Launch,
    Layout,
    Lengths,
    LoadTest,
    Machine,
    Measurement,
    Offer,
    Plan,
    Provenance,
    RequestRecord,
    Requests,
    Round,
    Scalar,
    Scenario,
    Validity,
    Workload,
)
from mlsys_bench.verdicts import Finding, Verdict
from tests.sample_bills import claims, costs
from tests.sample_calibrations import calibration
from tests.sample_fleets import fleet, fleet_plan
from tests.sample_gates import calibration as gate_calibration
from tests.sample_gates import run as gate_run
from tests.sample_histories import past
from tests.sample_limits import loadmax, sweep
from tests.sample_productions import production


def machine() -> Machine:
    return Machine(
        hard={"cpu_model": "AMD EPYC 7B13", "cores": 2, "torch": "2.13.0+cpu", "threads": 1, "gpu_name": None},
        soft={"kernel": "6.1.0", "governor": None, "load": 0.31},
    )


def head(record: Record) -> Envelope:
    return Envelope(
        schema="mlsys/1",
        kind=kind_of(record),
        created="2026-01-15T10:00:00+00:00",
        machine=machine(),
        inputs={"bench.json": "sha256:" + "0f" * 32},
    )


def roofline_profile() -> LatencyProfile:
    """llama-3-8b in bf16 on one H100, nobody measured it."""
    return LatencyProfile(
        form="step",
        layout=Layout(model="llama-3-8b", precision="bf16", device="h100-sxm"),
        stage=None,
        terms=("step_s", "sequence_s", "weights", "linear", "kv", "attention"),
        coefficients=(1.5e-3, 2e-6, 1.25, 1.43, 1.4, 2.0),
        covariance=tuple(tuple(0.01 if i == j else 0.0 for j in range(6)) for i in range(6)),
        constants={
            "dense_bytes": 15.0e9,
            "expert_bytes": 0.0,
            "experts": 0.0,
            "experts_per_token": 0.0,
            "bandwidth_bytes_per_s": 3.35e12,
            "peak_flops_per_s": 989e12,
            "flops_per_token": 1.395e10,
            "head_flops": 1.05e9,
            "attention_flops_per_pair": 524288.0,
            "kv_bytes_per_token": 131072.0,
        },
        residual_log_sd=0.15,
        valid={"decode_seqs": (0.0, 256.0), "decode_kv_tokens": (0.0, 400_000.0)},
        provenance=Provenance.ROOFLINE,
        note="nobody measured this device with this model",
    )


def cpu_profile() -> LatencyProfile:
    """Return what was fitted to the nano shape in fp32 on one core."""
    base = roofline_profile()
    return dataclasses.replace(
        base,
        layout=Layout(model="nano", precision="fp32", device="cpu", threads=1, pinned_cores=(0,)),
        coefficients=(4.1e-4, 3.5e-5, 1.31, 1.22, 2.6, 3.1),
        covariance=tuple(tuple(4e-4 if i == j else 0.0 for j in range(6)) for i in range(6)),
        constants={
            "dense_bytes": 6.1e7,
            "expert_bytes": 0.0,
            "experts": 0.0,
            "experts_per_token": 0.0,
            "bandwidth_bytes_per_s": 1.4e10,
            "peak_flops_per_s": 9.0e10,
            "flops_per_token": 3.0e7,
            "head_flops": 2.4e5,
            "attention_flops_per_pair": 12288.0,
            "kv_bytes_per_token": 12288.0,
        },
        residual_log_sd=0.048,
        valid={"decode_seqs": (0.0, 16.0), "decode_kv_tokens": (0.0, 16_384.0), "prefill_tokens": (0.0, 512.0)},
        provenance=Provenance.CALIBRATED,
        note=None,
    )


def traffic(rate_per_s: float = 200.0) -> Workload:
    return Workload(
        rate_per_s=rate_per_s,
        arrivals="poisson",
        prompt_tokens=Lengths(dist="lognormal", mean=512.0, cv=1.0, max=4096),
        output_tokens=Lengths(dist="lognormal", mean=256.0, cv=0.5, max=1024),
    )


PREDICTED = {
    "ttft_p50_s": 0.0421, "ttft_p95_s": 0.231, "ttft_p99_s": 0.412,
    "tpot_p50_s": 0.0184, "tpot_p95_s": 0.0263, "tpot_p99_s": 0.0312,
    "e2e_p50_s": 4.62, "e2e_p95_s": 11.4, "e2e_p99_s": 17.9,
}  # fmt: skip


def plan(**changes: Any) -> Plan:
    """200 requests/s of llama-3-8b on H100s."""
    offer = Offer(
        provider="aws",
        instance="p5.48xlarge",
        device="h100-sxm",
        devices=8,
        region="us-east-1",
        term="on-demand",
        usd_per_h=55.04,
        source="https://aws.amazon.com/ec2/pricing/on-demand/",
        date="2025-11-20",
        provenance=Provenance.ASSUMED,
    )
    made = Plan(
        model="llama-3-8b",
        workload=traffic(),
        slo="ttft_p95<500ms,tpot_p99<50ms",
        fleet=(
            FleetItem(
                stage="generate",
                gpu="h100-sxm",
                precision="bf16",
                tp=1,
                pp=1,
                replicas=8,
                instances=1,
                instance="p5.48xlarge",
                usd_per_hour=55.04,
            ),
        ),
        replicas=8,
        gpus=8,
        gpu="h100-sxm",
        devices_per_replica=1,
        usd_per_hour=55.04,
        usd_per_month=40179.2,
        usd_per_million_tokens=0.2986,
        utilisation=0.713,
        binding_constraint="ttft_p95 < 500 ms (queueing for prefill)",
        headroom=0.21,
        provenance=Provenance.ROOFLINE,
        predicted=PREDICTED,
        intervals={k: (0.78 * v, 1.31 * v) for k, v in PREDICTED.items()}
        | {
            "usd_per_hour": (55.04, 110.08),
            "usd_per_million_tokens": (0.2986, 0.597),
            "replicas": (7.0, 10.0),
            "utilisation": (0.61, 0.84),
        },
        analytic={k: 0.93 * v for k, v in PREDICTED.items()},
        alternatives=(
            Alternative(
                gpu="l4", precision="int8", tp=1, replicas=96, usd_per_hour=77.28, predicted={"ttft_p95_s": 0.44}, why_not="40 % dearer"
            ),
            Alternative(
                gpu="h100-sxm",
                precision="fp8",
                tp=2,
                replicas=4,
                usd_per_hour=55.04,
                predicted={"ttft_p95_s": 0.19},
                why_not="same cost, fewer replicas to lose",
            ),
            Alternative(
                gpu="l4",
                precision="bf16",
                tp=1,
                replicas=None,
                usd_per_hour=None,
                predicted={},
                why_not="infeasible: tpot_p99 is 81.0 ms at batch 1, limit 50 ms",
            ),
        ),
        profile=roofline_profile(),
        capacity_per_replica_per_s=35.1,
        max_batch=256,
        kv_tokens_per_replica=431_000,
        assumptions=("75 % of peak bandwidth and 70 % of peak FLOP/s are reached", "requests go to replicas at random"),
        prices=(offer,),
        notes=("the simulation ran 20,000 requests",),
    )
    return dataclasses.replace(made, **changes)


def summary(p50: float, spread: float = 1.9, count: int = 1200) -> LatencySummary:
    p90, p95, p99 = p50 * spread, p50 * spread * 1.2, p50 * spread * 1.6
    values = {"mean": 1.1 * p50, "p50": p50, "p90": p90, "p95": p95}
    return LatencySummary(
        count=count,
        **values,
        p99=None if count < 300 else p99,
        too_few=("p99",) if count < 300 else (),
        intervals={k: (0.96 * v, 1.05 * v) for k, v in values.items()} | ({} if count < 300 else {"p99": (0.9 * p99, 1.2 * p99)}),
    )


def loadtest(**changes: Any) -> LoadTest:
    made = LoadTest(
        source="loadtest",
        target="http://127.0.0.1:8000",
        arrivals="poisson",
        offered_rate_per_s=4.0,
        requests=240,
        ok=236,
        errors={"timeout": 3, "rejected": 1},
        duration_s=60.0,
        request_rate_per_s=3.93,
        output_tokens_per_s=188.4,
        goodput_per_s=3.71,
        goodput_ratio=0.943,
        goodput_interval=(0.914, 0.963),
        slo="ttft_p95<200ms,tpot_p99<30ms,goodput>90%",
        slo_met={"ttft_p95": True, "tpot_p99": None, "goodput": True},
        lateness_s=summary(0.0004, count=240),
        ttft_s=summary(0.0351, count=236),
        tpot_s=summary(0.0061, 1.3, count=236),
        itl_s=summary(0.0055, count=11_000),
        e2e_s=summary(0.342, count=236),
        validity=Validity(verdict="degraded", reasons=("the client sent 1.2 % of requests more than 5 ms late",)),
        requests_file="requests.parquet",
        formulas={"ttft_s": "first token - scheduled send", "goodput": "requests within all limits / requests in the window"},
    )
    return dataclasses.replace(made, **changes)


def loadtests() -> LoadTests:
    """Return three runs of one load test."""
    return repeated([loadtest(ttft_s=summary(p50, count=236)) for p50 in (0.0351, 0.0362, 0.0347)], range(3))


def checks() -> tuple[Check, ...]:
    predicted = {
        "ttft_p50_s": 0.0331,
        "ttft_p95_s": 0.0722,
        "tpot_p50_s": 0.0058,
        "tpot_p95_s": 0.0079,
        "e2e_p50_s": 0.318,
        "e2e_p95_s": 0.655,
    }
    measured = {
        "ttft_p50_s": 0.0351,
        "ttft_p95_s": 0.0911,
        "tpot_p50_s": 0.0061,
        "tpot_p95_s": 0.0081,
        "e2e_p50_s": 0.342,
        "e2e_p95_s": None,
    }
    made = []
    for key, value in predicted.items():
        seen = measured[key]
        low, high = 0.85 * value, 1.2 * value
        made.append(
            Check(
                key=key,
                predicted=value,
                low=low,
                high=high,
                measured=seen,
                measured_low=seen and 0.95 * seen,
                measured_high=seen and 1.06 * seen,
                error_percent=seen and 100 * (value / seen - 1),
                inside=None if seen is None else low <= seen <= high,
            )
        )
    made.append(
        Check(
            key="output_tokens_per_s",
            predicted=192.0,
            low=180.0,
            high=205.0,
            measured=188.4,
            measured_low=None,
            measured_high=None,
            error_percent=1.9,
            inside=True,
        )
    )
    return tuple(made)


def cpu_plan() -> Plan:
    fleet = FleetItem(
        stage="generate", gpu="cpu", precision="fp32", tp=1, pp=1, replicas=6, instances=3, instance="c7i.xlarge", usd_per_hour=0.54
    )
    predicted = {c.key: c.predicted for c in checks() if c.key.endswith(("p50_s", "p95_s"))}
    return plan(
        model="nano",
        workload=traffic(20.0),
        slo="ttft_p95<200ms",
        fleet=(fleet,),
        replicas=6,
        gpus=6,
        gpu="cpu",
        usd_per_hour=0.54,
        usd_per_month=394.2,
        usd_per_million_tokens=0.156,
        predicted=predicted,
        intervals={k: (0.85 * v, 1.2 * v) for k, v in predicted.items()},
        analytic={k: 1.04 * v for k, v in predicted.items()},
        alternatives=(),
        profile=cpu_profile(),
        capacity_per_replica_per_s=4.6,
        max_batch=16,
        kv_tokens_per_replica=16_384,
        provenance=Provenance.CALIBRATED,
        binding_constraint="ttft_p95 < 200 ms",
        prices=(),
    )


def causes() -> Causes:
    parts = {c.key: c.error_percent for c in checks() if c.error_percent is not None and c.key.startswith(("ttft", "tpot", "e2e"))}
    return Causes(
        steps_longer={"all": 0.034, "decode": 0.081, "prompt": 0.012},
        others_share=0.021,
        figures=tuple(
            Cause(key=key, error_percent=error, arrivals_percent=0.25 * error, steps_percent=0.5 * error, rest_percent=0.25 * error)
            for key, error in parts.items()
        ),
    )


def demo() -> Demo:
    return Demo(
        plan=cpu_plan(),
        measured=loadtest(),
        checks=checks(),
        prediction_error_percent={c.key: c.error_percent for c in checks() if c.error_percent is not None},
        files={"plan": "demo/plan.json", "requests": "demo/requests.parquet", "report": "demo/report.html"},
        took_s={"bench": 61.2, "fit": 0.4, "plan": 2.1, "serve": 4.4, "loadtest": 75.0, "total": 143.1},
        causes=causes(),
    )


def verification() -> Verification:
    return Verification(
        plan_file="plan.json",
        target="http://127.0.0.1:8000",
        rate_per_s=4.0,
        checks=checks(),
        holds=False,
        measured=loadtest(),
        notes=("one replica",),
        causes=causes(),
    )


def bench(samples: int = 24, seed: int = 3) -> Bench:
    """Engine steps of the nano shape on a CPU that scatters by 5 %, a memory stream, and what no CPU has."""
    from mlsys_bench import latency

    rng = np.random.default_rng(seed)
    profile = cpu_profile()
    cells = [(d, d * c, 0.0, 0.0, d) for d in (1, 2, 4, 8, 16) for c in (64, 256, 1024)] + [
        (0, 0, p, p * p / 2, 1) for p in (16, 64, 128, 256, 512)
    ]
    made = []
    for cell in cells:
        mean_s = latency.step_s(profile, [float(v) for v in cell]) * rng.lognormal(0.0, 0.048)
        values = tuple(float(v) for v in mean_s * (1 + rng.exponential(0.02, samples)))
        where = {"model": "nano", "precision": "fp32", "device": "cpu", "threads": 1, "pinned_cores": "0"}
        made.append(measurement("engine.step", values, parameters=where | dict(zip(latency.FEATURES, map(float, cell), strict=True))))
    stream = tuple(float(v) for v in 1.4e10 * (1 - rng.exponential(0.01, samples)))
    made.append(dataclasses.replace(measurement("memory.read", stream), unit="B/s", better="higher", parameters={"threads": 1}))
    made.append(dataclasses.replace(measurement("gemm.fp8", ()), launches=(), skipped="this CPU has no fp8 units"))
    return Bench(measurements=tuple(made))


def measurement(name: str, values: tuple[float, ...], parameters: dict[str, Any] | None = None) -> Measurement:
    return Measurement(
        name=name, unit="s", better="lower", parameters=parameters or {}, launches=(Launch(started_s=0.0, rounds=(Round(values=values),)),)
    )


def requests(n: int = 240, seed: int = 5) -> Requests:
    """Four requests a second for a minute, three of them timing out, the first six seconds for warm-up."""
    rng = np.random.default_rng(seed)
    at = np.cumsum(rng.exponential(0.25, n))
    made = []
    for i, t in enumerate(map(float, at)):
        tokens = int(rng.integers(10, 90))
        first = t + float(rng.lognormal(np.log(0.035), 0.45))
        times = tuple(float(x) for x in first + np.arange(tokens) * 0.0061)
        failed = i in (50, 120, 121)
        made.append(
            RequestRecord(
                index=i,
                scheduled_s=t,
                sent_s=t + 0.0004,
                token_s=() if failed else times,
                tokens_per_event=() if failed else (1,) * tokens,
                done_s=t + 2.0 if failed else times[-1],
                prompt_tokens=128,
                output_tokens=None if failed else tokens,
                token_source="usage",
                outcome="timeout" if failed else "ok",
                in_window=t >= 6.0,
            )
        )
    return Requests(t0_unix_s=1.7e9, requests=tuple(made))


def verdict() -> Verdict:
    def finding(name: str, word: Any, ratio: float | None, reason: str) -> Finding:
        ends = None if ratio is None else (ratio - 0.02, ratio + 0.02)
        candidate = None if ratio is None else 0.0021 * ratio
        return Finding(
            name=name,
            parameters={"decode_seqs": 8},
            unit="s",
            better="lower",
            baseline=0.0021,
            candidate=candidate,
            ratio=ratio,
            interval=ends,
            verdict=word,
            reason=reason,
        )

    return Verdict(
        verdict="suspect",
        tolerance=0.05,
        reasons=("1 suspect, 1 inconclusive",),
        findings=(
            finding("engine.step", "suspect", 1.21, "single launch: needs at least 6 launch pairs"),
            finding("engine.prefill", "inconclusive", 0.99, "single launch"),
            finding("gemm", "inconclusive", None, "gone: not in the candidate"),
        ),
    )


def scenario() -> Scenario:
    return Scenario(
        name="llm-chat",
        description="A chat assistant on an 8B model.",
        model="llama-3-8b",
        precision=("bf16", "fp8"),
        gpus=("h100-sxm", "l4"),
        workload=traffic(20.0),
        slo=slo.parse("ttft_p95<500ms,goodput>99%"),
        max_batch=64,
        headroom=0.2,
        source="Assumed: people who read along.",
    )


def stages() -> StageGraph:
    """Return a cache before a model, and a stage that nobody waits for."""
    assumed = Service(assumed=Assumed(dist="gamma", mean_s=0.002, cv=0.5, source="assumed: a look-up"))
    model = Service(roofline=Roofline(model="llama-3-8b", precision=("bf16",), max_batch=64, source="from the roofline"))
    on = Resources(vcpu=1.0)
    return StageGraph(
        name="cached-chat",
        description="A cache before a chat model.",
        source="Assumed: a small system.",
        workload=traffic(20.0),
        slo=slo.parse("ttft_p95<500ms,goodput>99%"),
        headroom=0.2,
        entry="cache",
        stages=(
            Stage(name="cache", service=assumed, cache=Cache(hit=0.3, on_miss="chat", source="assumed: a third"), resources=on),
            Stage(name="chat", service=model, next="log", resources=Resources(gpu=("L4",))),
            Stage(name="log", service=assumed, is_async=True, resources=on),
        ),
        cost=Cost(usd_per_vcpu_h=0.025, source="assumed: a cloud"),
    )


def doctor() -> Doctor:
    return Doctor(
        abilities=(
            Ability(name="engine", works=True, detail="torch 2.13.0+cpu, 2 cores"),
            Ability(name="GPU", works=False, detail="no NVIDIA driver was found", cure="install one, or measure on the CPU"),
        )
    )


def catalog() -> Catalog:
    row: dict[str, Scalar] = {"id": "h100-sxm", "memory_bytes": 8e10, "verified": True, "cheapest": None}
    wide: dict[str, Scalar] = {f"column_{i}": "something long" for i in range(8)}
    return Catalog(catalog="gpus", rows=(row | wide | {"source": "a datasheet " * 20, "date": "2025-11-20"},))


def backtest() -> Backtest:
    """Return what a table of four rows gave: one miss, one overload, one without a value."""

    def score(quantity: str | None, rows: int, worst: float | None) -> Score:
        return Score(
            model="M/G/c",
            quantity=quantity,
            rows=rows,
            answered=rows - (worst is None),
            within=0 if worst is None else rows - 1,
            median_error=None if worst is None else 3e-10,
            worst_error=worst,
            worst_of_bar=None if worst is None else worst / 0.02,
            bars=(0.02, 0.05),
            worst_parameters="c=16;rho=0.9;mean_service=1;arrival=exp;service=logn:4",
        )

    row: dict[str, Scalar] = {"model": "M/G/c", "parameters": "c=16;rho=0.9", "quantity": "wait_p99", "value": "4.2"}
    return Backtest(
        table="queueing",
        source="truth.csv",
        rows=4,
        answered=3,
        by_model=(score(None, 3, 0.034),),
        scores=(score("wait_p99", 2, 0.034), score("wait_mean", 1, None)),
        methods={"M/G/c": 2, "simulation": 1},
        unanswered={"overload: utilisation is 1.10 with 4 server(s): the queue never settles at or above 1.00; 5 would do": 1},
        predictions=(row | {"predicted": 4.3, "expected_error": 0.01, "method": "M/G/c: a phase-type fit"},),
    )


def every_record() -> dict[str, Record]:
    records: tuple[Record, ...] = (
        plan(),
        loadtest(),
        demo(),
        verification(),
        bench(),
        cpu_profile(),
        requests(),
        verdict(),
        traffic(),
        scenario(),
        stages(),
        doctor(),
        catalog(),
        backtest(),
        claims(),
        costs(),
        calibration(),
        loadtests(),
        sweep(),
        loadmax(),
        production(),
        fleet(),
        fleet_plan(),
        gate_run(),
        gate_calibration(),
        past(),
    )
    return {kind_of(r): r for r in records}


def items(*records: Record) -> list[tuple[str, Envelope, Record]]:
    return [(f"{kind_of(r)}.json", head(r), r) for r in records]
