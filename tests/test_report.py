"""What people read: the same words on a terminal, in HTML and in Markdown."""

from __future__ import annotations

import dataclasses
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mlsys_bench import report, slo
from mlsys_bench.record import KINDS, Envelope, Record, kind_of
from mlsys_bench.report import content, parts, terminal
from mlsys_bench.types import (
    Ability,
    Alternative,
    Backtest,
    Bench,
    Catalog,
    Check,
    Demo,
    Doctor,
    Finding,
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
    Score,
    Validity,
    Verdict,
    Verification,
    Workload,
)

GOLDEN = Path(__file__).parent / "golden"

# ---------------------------------------------------------------- records with realistic numbers


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


def demo() -> Demo:
    return Demo(
        plan=cpu_plan(),
        measured=loadtest(),
        checks=checks(),
        prediction_error_percent={c.key: c.error_percent for c in checks() if c.error_percent is not None},
        files={"plan": "demo/plan.json", "requests": "demo/requests.parquet", "report": "demo/report.html"},
        took_s={"bench": 61.2, "fit": 0.4, "plan": 2.1, "serve": 4.4, "loadtest": 75.0, "total": 143.1},
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
        doctor(),
        catalog(),
        backtest(),
    )
    return {kind_of(r): r for r in records}


def items(*records: Record) -> list[tuple[str, Envelope, Record]]:
    return [(f"{kind_of(r)}.json", head(r), r) for r in records]


def printed(record: Record, width: int = 80, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    terminal.show(record, console, **options)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ---------------------------------------------------------------- the words


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("kind", every_record())
def test_every_record_fits_the_terminal(kind: str, width: int) -> None:
    text = printed(every_record()[kind], width)
    assert text.strip()
    assert max(len(line) for line in text.splitlines()) <= width
    assert "\x1b" not in text  # no colour where there is no terminal
    assert not re.search("[\U0001f000-\U0001ffff]", text)


def test_every_kind_of_record_has_words() -> None:
    assert set(every_record()) == set(KINDS)
    said = {section.kind for record in every_record().values() for section in content.describe(record)}
    assert said == set(every_record())


def test_the_plan_reads_as_agreed() -> None:
    """The golden text at 80 columns; MLSYS_UPDATE_GOLDEN=1 writes it anew."""
    golden = GOLDEN / "plan_80.txt"
    text = "\n".join(line.rstrip() for line in printed(plan()).splitlines()) + "\n"
    if os.environ.get("MLSYS_UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


def test_a_table_too_wide_for_the_terminal_names_what_it_leaves_out() -> None:
    text = printed(catalog())
    assert "h100-sxm" in text
    assert "80.0 GB" in text
    assert re.search(r"too wide for this terminal, see --json: column \d", text)


def test_a_machine_says_what_it_cannot_do_and_what_would_change_that() -> None:
    text = printed(doctor())
    assert "✗" in text
    assert "install one, or measure on the CPU" in text


def test_a_plan_says_fleet_cost_limit_headroom_and_where_each_comes_from() -> None:
    text = " ".join(printed(plan(), 120).split())
    for said in (
        "8 replicas",
        "$55.04/h",
        "$40,179/month",
        "$0.30 per 1M",
        "71.3 %",
        "ttft_p95 < 500 ms",
        "+21 %",
        "roofline",
        "assumed",
        "2025-11-20",
    ):
        assert said in text
    assert "231 ms" in text
    assert "180–303 ms" in text
    assert "p95 < 500ms ✓" in text


def test_a_broken_limit_is_marked() -> None:
    text = printed(plan(predicted=PREDICTED | {"ttft_p95_s": 0.7}))
    assert "p95 < 500ms ✗" in text


def test_the_next_best_is_the_cheapest_that_would_do() -> None:
    section = content.describe(plan())[0]
    assert next(f.text for f in section.facts if f.label == "Next best") == "4 x h100-sxm (fp8, tp 2) at $55.04/h"


def test_an_unpriced_plan_says_so_instead_of_a_cost() -> None:
    text = printed(plan(usd_per_hour=None, usd_per_month=None, usd_per_million_tokens=None, prices=()))
    assert "unpriced" in text
    assert "None" not in text
    assert "$0.00" not in text


def test_a_sample_that_is_too_small_says_too_few() -> None:
    text = printed(loadtest())
    assert "too few" in text
    assert "tpot_p99<30ms" in text
    assert [line.split()[-1] for line in text.splitlines() if line.strip().startswith("tpot_p99<30ms")] == ["?"]


def test_errors_and_doubts_of_a_load_test_are_not_hidden() -> None:
    text = " ".join(printed(loadtest(), 120).split())
    assert "3 timeout, 1 rejected" in text
    assert "degraded" in text
    assert "more than 5 ms late" in text


def test_checks_say_inside_outside_and_not_measured() -> None:
    table = content.describe(verification())[0].tables[0]
    by_name = {row[0].text: row for row in table.rows}
    assert by_name["TTFT p50"][-1].text == "✓"
    assert by_name["TTFT p95"][-1].text == "✗"
    assert by_name["E2E p95"][-1].text == "?"
    assert by_name["TTFT p95"][3].text == "-20.7 %"


def test_skipped_benchmarks_are_named_with_the_reason() -> None:
    assert "gemm.fp8: this CPU has no fp8 units" in printed(bench())
    twice = dataclasses.replace(bench(), measurements=(*bench().measurements, bench().measurements[-1]))
    assert "2 x gemm.fp8: this CPU has no fp8 units" in printed(twice)


def test_ready_made_bench_rows_show_the_share_of_this_machines_best() -> None:
    from mlsys_bench.bench import rows

    text = printed(bench(), 120, extra=rows.table(bench()))
    assert "of this machine's best" in text
    assert "100.0 %" in text


def test_without_details_only_the_managers_part_is_printed() -> None:
    short, full = printed(plan(), details=False), printed(plan())
    assert "What else was considered" in full
    assert "What else was considered" not in short
    assert len(short.splitlines()) <= 32  # one screen


def test_a_terminal_without_utf8_still_gets_the_words() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    terminal.show(plan(), Console(file=file, width=80, color_system=None))
    file.flush()
    assert b"p95 < 500ms y" in raw.getvalue()


def test_the_terminal_report_imports_neither_matplotlib_nor_jinja() -> None:
    import subprocess
    import sys

    code = (
        "import sys, mlsys_bench.report.terminal; print([m for m in ('matplotlib', 'jinja2', 'pandas', 'scipy.stats') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- numbers


def test_numbers_print_three_digits_in_one_unit() -> None:
    assert parts.digits(1234.5) == "1,234"
    assert parts.digits(0.012345) == "0.0123"
    assert parts.time(0.0421) == "42.1 ms"
    assert parts.time_span((0.9, 1.1), like=1.0) == "0.900–1.10 s"  # never '900 ms–1.10 s'
    assert parts.quantity(4.1e10, "B/s", (4.0e10, 4.2e10)) == ("41.0 GB/s", "40.0–42.0 GB/s")
    assert parts.quantity(0.0021, "s", None) == ("2.10 ms", "")
    assert parts.ratio(1.052) == "+5.2 %"
    assert parts.parameters({"m": 512.0, "zero": 0, "none": None, "flag": False}) == "m 512, flag no"


# ---------------------------------------------------------------- HTML


def demo_items() -> list[tuple[str, Envelope, Record]]:
    return items(demo(), requests(), bench(), cpu_profile(), plan())


@pytest.fixture(scope="module")
def page() -> str:
    from mlsys_bench.report import html

    return html.render(demo_items())


def test_the_page_holds_every_picture(page: str) -> None:
    """Prediction, cost of alternatives, fit, latency over time, distribution, throughput."""
    import base64

    uris = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)" alt="[^"]+">', page)
    images = [base64.b64decode(uri) for uri in uris]
    assert len(images) == 6
    assert all(image.startswith(b"<?xml") and b"</svg>" in image for image in images)


def test_the_page_asks_nobody_for_anything(page: str) -> None:
    assert not re.search(r"""(?:src|href|action|data|poster)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert not re.search(r"<script|<iframe|<link(?! rel=\"icon\" href=\"data:,\")|@import|url\(", page)


def test_the_page_names_machine_digests_time_and_version(page: str) -> None:
    from mlsys_bench import __version__

    for said in ("AMD EPYC 7B13", "sha256:0f0f", "2026-01-15T10:00:00", f"mlsys {__version__}", "requests.json"):
        assert said in page


def test_the_answer_stands_at_the_top(page: str) -> None:
    top = page[page.index("<header>") : page.index("</header>")]
    assert "TTFT p50 error" in top
    assert "-5.7 %" in top
    assert "per 1M output tokens" in top


def test_a_demo_and_its_plan_file_show_the_plan_once() -> None:
    from mlsys_bench.report import html

    titles = [section.title for _, section in html.ordered(items(demo(), demo().plan, demo().measured))]
    assert len(titles) == len(set(titles)) == 3


HOSTILE = '<script>alert(1)</script>" onload="x| $b$ `'


@pytest.mark.parametrize("kind", ["plan", "demo", "profile", "bench", "verdict", "loadtest"])
def test_hostile_names_stay_text(kind: str) -> None:
    from mlsys_bench.report import html

    layout = dataclasses.replace(cpu_profile().layout, model=HOSTILE)
    hostile: dict[str, Record] = {
        "plan": plan(model=HOSTILE, slo="ttft_p95<500ms"),
        "demo": dataclasses.replace(demo(), plan=plan(model=HOSTILE), files={HOSTILE: HOSTILE}),
        "profile": dataclasses.replace(cpu_profile(), layout=layout),
        "bench": Bench(measurements=(measurement(HOSTILE, (1.0, 2.0), {HOSTILE: HOSTILE}),)),
        "verdict": dataclasses.replace(verdict(), reasons=(HOSTILE,)),
        "loadtest": loadtest(target=HOSTILE),
    }
    head_, record = head(hostile[kind]), hostile[kind]
    text = html.render([(HOSTILE, head_, record)])
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert 'onload="x' not in text


def test_the_page_is_the_same_twice() -> None:
    from mlsys_bench.report import html

    assert html.render(items(plan())) == html.render(items(plan()))


def test_every_record_becomes_a_page_and_markdown() -> None:
    from mlsys_bench.report import html, markdown

    for kind, record in every_record().items():
        assert content.describe(record)[0].title.split(":")[0] in html.render(items(record)), kind
        assert content.describe(record)[0].title.split(":")[0] in markdown.render(items(record)), kind


def test_templates_compile_and_refuse_names_nobody_gave() -> None:
    import jinja2

    from mlsys_bench.report.templates import environment

    made = environment(escape=True)
    assert {"report.html.j2", "report.md.j2"} <= set(made.list_templates())
    for name in made.list_templates(extensions=["j2"]):
        with pytest.raises(jinja2.UndefinedError):
            made.get_template(name).render()


# ---------------------------------------------------------------- pictures


def drawn(record: Record) -> int:
    from mlsys_bench.report import pictures

    return len(pictures.draw(items(record)) or ())


def test_records_without_a_picture_have_none() -> None:
    assert drawn(loadtest()) == 0
    assert drawn(bench()) == 0  # a fit needs a profile beside it
    assert drawn(cpu_plan()) == 0  # no alternatives, nothing to compare
    assert drawn(Requests(t0_unix_s=0.0, requests=())) == 0


def test_a_run_in_which_nothing_was_answered_still_has_its_timeline() -> None:
    failed = tuple(dataclasses.replace(r, outcome="connect", token_s=(), tokens_per_event=(), done_s=None) for r in requests(20).requests)
    assert drawn(Requests(t0_unix_s=0.0, requests=failed)) == 1


def test_the_fit_shows_every_cell_of_its_layout_and_no_other() -> None:
    from mlsys_bench.report import figures

    other = dataclasses.replace(cpu_profile(), layout=dataclasses.replace(cpu_profile().layout, threads=2))
    assert figures.step_fit(bench(), other, "x") is None
    figure = figures.step_fit(bench(), cpu_profile(), "x")
    assert figure is not None
    points = {line.get_label(): len(line.get_xdata()) for line in figure.axes[0].get_lines()}
    assert points["decode, measured"] + points["prefill, measured"] == 20
    assert points["physics floor of that step"] == 20


def test_text_on_pictures_is_at_least_eleven_points() -> None:
    from matplotlib.text import Text

    from mlsys_bench.report import figures

    made = [
        figures.prediction(checks(), "x"), figures.alternatives(plan(), "x"), figures.timeline(requests(), "x"),
        figures.distribution(requests(), PREDICTED, {}, "x"), figures.load(requests(), "x"),
    ]  # fmt: skip
    sizes = [text.get_fontsize() for figure in made if figure for text in figure.findobj(Text) if text.get_text()]
    assert min(sizes) >= 11


def test_drawing_leaves_the_users_matplotlib_settings_alone() -> None:
    import matplotlib

    from mlsys_bench.report import figures

    before = dict(matplotlib.rcParams)
    figures.uri(figures.prediction(checks(), "x"))
    assert dict(matplotlib.rcParams) == before


# ---------------------------------------------------------------- files


def test_files_are_written_where_asked(tmp_path: Path) -> None:
    page, short = report.write_html(tmp_path / "new" / "r.html", items(plan())), report.write_markdown(tmp_path / "r.md", items(plan()))
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert "## Plan: llama-3-8b at 200/s" in short.read_text(encoding="utf-8")


def test_a_file_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    from mlsys_bench.errors import BadInput

    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        report.write_markdown(tmp_path / "file" / "r.md", items(plan()))


def test_markdown_tables_keep_their_columns() -> None:
    from mlsys_bench.report import markdown

    text = markdown.render(items(plan(model="a|b"), verdict()))
    tables = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    assert tables
    assert "a\\|b" in text
    blocks = re.split(r"\n(?=[^|])", re.sub(r"\\\|", "", text))
    for block in blocks:
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1


def test_records_load_by_file_name(tmp_path: Path) -> None:
    from mlsys_bench import record

    path = record.write(tmp_path / "plan.json", plan(), machine())
    assert [(name, kind_of(value)) for name, _, value in report.load([path])] == [("plan.json", "plan")]
