"""`mlsys simulate`, from options as typed to what a person reads: in this process; `tests/e2e` runs the command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mlsys_bench import batching, models, record
from mlsys_bench.errors import BadInput, MlsysError
from mlsys_bench.journeys import around, settings, simulation
from mlsys_bench.journeys.simulation import Asked
from mlsys_bench.report import content
from mlsys_bench.report.parts import Section
from mlsys_bench.types import LoadTest, Requests

DESIGN: dict[str, Any] = {"model": "llama-3.1-8b", "gpu": "h100", "prompt_tokens": "200", "output_tokens": "20", "slo": "ttft_p50<1s"}


def simulated(**options: Any) -> LoadTest:
    return simulation.simulate(Asked(**(DESIGN | {"requests": 60} | options)))


def facts(result: LoadTest) -> dict[str, str]:
    (section,) = content.describe(result)
    assert isinstance(section, Section)
    return {fact.label: f"{fact.text} {fact.detail}" for fact in section.facts}


def test_a_fleet_is_told_beside_its_latencies() -> None:
    result = simulated(qps=20.0, replicas=2, routing="least_loaded")
    assert result.fleet is not None
    assert (result.requests, result.ok, result.fleet.replicas) == (54, 54, 2)
    said = facts(result)
    assert said["Fleet"].startswith("2 replicas")
    assert "Events" not in said
    assert "least_loaded" in result.target


def test_users_of_a_closed_loop_are_as_many_as_asked() -> None:
    result = simulated(users=4, think="100ms")
    assert (result.arrivals, result.offered_rate_per_s) == ("closed loop, 4 users", None)
    mean_s = result.e2e_s.mean
    assert mean_s is not None
    assert result.request_rate_per_s * (mean_s + 0.1) == pytest.approx(4, rel=0.3)


def test_a_trace_is_replayed_at_its_own_rate_or_at_another(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrived_at,prompt_tokens,output_tokens\n" + "".join(f"{i / 10},100,5\n" for i in range(80)))
    design = DESIGN | {"prompt_tokens": None, "output_tokens": None}
    own = simulation.simulate(Asked(**design, trace=trace))
    assert own.offered_rate_per_s == pytest.approx(10, rel=0.05)
    assert simulation.simulate(Asked(**design, trace=trace, qps=40.0)).offered_rate_per_s == pytest.approx(40, rel=0.05)
    assert simulation.simulate(Asked(**design, trace=trace, duration="2s")).requests == 18
    with pytest.raises(BadInput, match="--trace brings its own traffic"):
        simulation.simulate(Asked(**DESIGN, trace=trace))


def test_what_a_trace_lacks_is_told(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"{i // 8},100,5\n" for i in range(80)]
    trace.write_text("arrived_at,prompt_tokens,output_tokens\n" + "".join(rows) + "10,0,0\n")
    told = simulation.simulate(Asked(**DESIGN | {"prompt_tokens": None, "output_tokens": None}, trace=trace)).validity.reasons
    assert any("1 request without prompt or output tokens" in reason for reason in told)
    assert any("stand on a grid of about 1 s" in reason for reason in told)


def test_everything_around_the_replicas_can_be_asked_for() -> None:
    result = simulated(
        qps=30.0, replicas=2, autoscale="in_flight=1,max=4,cold-start=0.2s,every=0.2s,down-delay=1s", failures="at=500ms:0,repair=300ms",
        timeout="2s", retries="3,first=100ms,budget=50%", requests=90,
    )  # fmt: skip
    assert result.fleet is not None
    assert result.fleet.failures == 1
    assert result.fleet.launched >= 1
    said = facts(result)
    assert "replica failure" in said["Events"]
    (section,) = content.describe(result)
    assert "Over time" in [table.title for table in section.tables]


def test_prefill_and_decode_can_be_taken_apart() -> None:
    together, apart = simulated(qps=5.0), simulated(qps=5.0, disaggregate="prefill=2,link=1GB/s,latency=10ms")
    assert "2 prefilling" in apart.target
    assert together.ttft_s.p50 is not None
    assert apart.ttft_s.p50 is not None
    assert apart.ttft_s.p50 > together.ttft_s.p50 + 0.010 + 200 * 131072 / 1e9 - 0.005


def test_replicas_batch_by_the_rules_asked_for() -> None:
    """Slower for the first token when batches are gathered, fewer steps when drafts are right."""
    plain = simulated(qps=40.0)
    gathered, eager = simulated(qps=40.0, batching="dynamic,wait=300ms"), simulated(qps=40.0, batching="prefill-first")
    assert plain.ttft_s.mean is not None
    assert plain.tpot_s.mean is not None
    assert gathered.ttft_s.mean is not None
    assert gathered.ttft_s.mean > plain.ttft_s.mean + 0.1
    assert eager.ttft_s.mean is not None
    guessed = simulated(qps=40.0, speculate="3,acceptance=80%")
    assert guessed.tpot_s.mean is not None
    assert guessed.tpot_s.mean < 0.7 * plain.tpot_s.mean


def test_an_engine_brings_its_limits_and_rules() -> None:
    """TensorRT-LLM reserves the longest answer, so it never preempts; the others are known by their step budgets."""
    asked = Asked(**DESIGN, qps=1.0, engine="trtllm")
    candidate = simulation.design(asked)
    assert (candidate.limits.max_seqs, candidate.limits.block_tokens) == (2048, 32)
    assert around.policy(asked, candidate).reserve == 1.0
    assert simulation.design(dataclasses.replace(asked, engine="vllm", max_batch=5)).limits.max_seqs == 5
    result = simulated(qps=5.0, engine="sglang")
    assert result.ok == 54
    assert "defaults of sglang" in result.validity.reasons[1]


def test_rules_of_a_replica_are_those_of_its_engine() -> None:
    """128 kB of cache per token of Llama 3.1 8B: a block of 16 is 2.1 MB, 84 µs over 25 GB/s."""
    asked = Asked(**DESIGN, qps=1.0, kv_offload="64GB,link=25GB/s", preemption="swap,link=25GB/s", batching="static")
    candidate = simulation.design(asked)
    rules = around.policy(asked, candidate)
    assert (rules.swap, rules.prefix_cache, rules.gather, rules.gather_s) == (1, 1, 1, 60.0)
    assert around.policy(Asked(**DESIGN, prefix_cache=False), candidate).prefix_cache == 0
    assert rules.move_s == pytest.approx(131072 * 16 / 25e9)
    assert rules.host_blocks == int(64e9 / (131072 * 16))
    assert around.policy(Asked(**DESIGN), candidate) == batching.Policy()


@pytest.mark.parametrize(("model", "gpu", "tp", "prompt"), [("gemma-3-27b", "H200", 1, 8192), ("deepseek-v3.2", "B200", 8, 8192)])
def test_the_cache_that_moves_is_all_that_a_prompt_leaves(model: str, gpu: str, tp: int, prompt: int) -> None:
    """Five of six layers of Gemma 3 keep a window of 1,024; the latent cache that an indexer picks from is kept whole."""
    asked = Asked(
        model=model,
        gpu=gpu,
        tp=tp,
        precision="fp8",
        qps=1.0,
        prompt_tokens=str(prompt),
        output_tokens="100",
        disaggregate="prefill=1,link=50GB/s",
    )
    moved = around.conditions(asked, simulation.design(asked), prompt).disaggregation
    assert moved is not None
    arch = models.find(model)
    shards = min(tp, arch.kv_heads) if not arch.kv_lora_rank else 1
    assert moved.kv_bytes_per_token * prompt == pytest.approx(models.kv_bytes(arch, "fp8", prompt) / shards, rel=0.02)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kv_offload": "64GB,link=25GB/s", "prefix_cache": False}, "there is no prefix cache"),
        ({"kv_offload": "64GB,link=50GB/s", "preemption": "swap,link=25GB/s"}, "swaps over another link"),
        ({"preemption": "recompute,link=25GB/s"}, "moves over no link"),
    ],
)
def test_rules_that_would_have_no_effect_or_two_are_refused(options: dict[str, Any], why: str) -> None:
    asked = Asked(**DESIGN, qps=1.0, **options)
    with pytest.raises(BadInput, match=why):
        around.policy(asked, simulation.design(asked))


def test_requests_that_fail_make_a_run_degraded_and_break_its_limits() -> None:
    """A queue that grows without end, and clients who wait 2 s: only those are left who did not wait, and their latencies say nothing."""
    result = simulated(qps=600.0, requests=4000, max_batch=8, timeout="2s", slo="e2e_p95<3s")
    assert result.ok < result.requests / 2
    assert (result.validity.verdict, result.slo_met) == ("degraded", {"e2e_p95": False})
    assert any("of the requests failed" in reason and "timeout" in reason for reason in result.validity.reasons)


def test_several_runs_are_pooled_and_the_same_seed_tells_the_same() -> None:
    result = simulated(qps=20.0, runs=3)
    assert result.fleet is not None
    assert (result.requests, result.fleet.runs) == (162, 3)
    assert simulated(qps=20.0, runs=3) == result
    assert simulated(qps=20.0, runs=3, seed=1) != result


def test_the_runs_done_before_a_ctrl_c_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two of three are pooled, say so, and are two of those that would have been."""
    run = simulation._run

    def interrupted(given: Any, seed: int) -> Any:
        seeds.append(seed)
        if len(seeds) > 2:
            raise KeyboardInterrupt
        return run(given, seed)

    seeds: list[int] = []
    monkeypatch.setattr(simulation, "_run", interrupted)
    asked = Asked(**DESIGN, qps=20.0, requests=60, runs=3, out=tmp_path / "run.json")
    result = simulation.simulate(asked)
    assert result.fleet is not None
    assert (result.requests, result.fleet.runs) == (108, 2)
    assert (result.validity.verdict, result.validity.reasons[0]) == ("degraded", "stopped by hand after 2 of 3 runs")
    assert record.read(tmp_path / "run.json", LoadTest) == result
    assert simulation.exit_status(asked, result) == 130
    seeds[:] = [0, 0]
    with pytest.raises(KeyboardInterrupt):  # before any is done there is nothing to keep
        simulation.simulate(asked)


def test_the_summary_and_every_request_are_written(tmp_path: Path) -> None:
    result = simulated(qps=20.0, out=tmp_path / "run.json")
    assert record.read(tmp_path / "run.json", LoadTest) == result
    assert len(record.read(tmp_path / "run.parquet", Requests).requests) == 60


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"users": 3, "qps": 2.0}, "--users is a closed loop"),
        ({"qps": 2.0, "think": "1s"}, "give --users too"),
        ({"qps": 2.0, "duration": "1s"}, "give one"),
        ({"users": 3, "queue_limit": 1}, "--queue-limit"),
        ({"qps": 2.0, "tp": 3}, "--tp 3 does not fit; 1, 2"),
        ({"qps": 2.0, "routing": "random_robin"}, "round_robin"),
        ({"qps": 2.0, "retries": "two"}, "times: 'two' is no whole number"),
        ({"qps": 2.0, "retries": "2,frist=1s"}, "did you mean first"),
        ({"qps": 2.0, "failures": "repair=1min"}, "say when"),
        ({"qps": 2.0, "failures": "mtbf=10h"}, "repair must be given too"),
        ({"qps": 2.0, "autoscale": "max=3,cold-start=10s"}, "name one of in_flight"),
        ({"qps": 2.0, "autoscale": "in_flight=3,kv=50%,max=3,cold-start=10s"}, "name one of in_flight"),
        ({"qps": 2.0, "autoscale": "in_flight=3,max=3,cold-start=10"}, "has no unit"),
        (
            {"qps": 2.0, "autoscale": "in_flight=3,min=2,max=3,cold-start=10s"},
            "begins with the 1 of --replicas, less than its min; add --replicas 2",
        ),
        ({"qps": 2.0, "disaggregate": "prefill=1,link=50GB"}, "write it like 50GB/s"),
        ({"qps": 2.0, "disaggregate": "prefill=1,link=50GB/s", "failures": "mtbf=1h,repair=1s"}, "one at a time"),
        ({"qps": 2.0, "timeout": "0s"}, "above zero"),
        ({"qps": 2.0, "batching": "dynamic"}, "how long a batch may wait"),
        ({"qps": 2.0, "batching": "continous"}, "did you mean continuous"),
        ({"qps": 2.0, "batching": "continuous,wait=1s"}, "only dynamic and static"),
        ({"qps": 2.0, "preemption": "swap"}, "how fast the cache moves"),
        ({"qps": 2.0, "preemption": "swop,link=1GB/s"}, "did you mean swap"),
        ({"qps": 2.0, "speculate": "3"}, "acceptance must be given too"),
        ({"qps": 2.0, "kv_offload": "64GB"}, "link must be given too"),
        ({"qps": 2.0, "engine": "vlm"}, "did you mean vllm"),
        ({"users": 2, "warmup": "1s"}, "--warmup"),
        ({}, "no traffic"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(options: dict[str, Any], why: str) -> None:
    with pytest.raises(MlsysError, match=why) as refused:
        simulated(**options)
    assert "\n" not in str(refused.value)


def test_settings_of_one_option_are_named_or_come_first() -> None:
    known: dict[str, settings.Parse] = {"times": settings.whole, "cold-start": settings.number, "at": settings.number}
    assert settings.parse("3,cold-start=1.5", "--x", known, main="times") == {"times": 3, "cold_start": 1.5}
    assert settings.parse("at=1,at=2", "--x", known) == {"at": [1.0, 2.0]}
    with pytest.raises(BadInput, match="cold-start needs a value"):
        settings.parse("cold-start=", "--x", known)
    with pytest.raises(BadInput, match="is no number"):
        settings.parse("at=1.5x", "--x", known)


def test_every_option_of_the_command_reaches_the_journey() -> None:
    """A flag that the command takes and forgets would simulate something else than asked."""
    import inspect

    from mlsys_cli.simulate import GROUPS, simulate

    options = set(inspect.signature(simulate).parameters)
    assert {f.name for f in dataclasses.fields(Asked)} == options - {"html", "md", "as_json"}
    assert {name for names in GROUPS.values() for name in names} == options - {"scenario"}
