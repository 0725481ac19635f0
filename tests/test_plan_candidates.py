"""What fits: memory arithmetic by hand, tensor parallelism, and which clock a layout gets."""

from __future__ import annotations

import dataclasses

import pytest

from mlsys_bench import hardware, latency, models, slo, workload
from mlsys_bench.errors import Infeasible, NotComparable, UnknownName
from mlsys_bench.plan import Request, candidates, demand, plan, sizing
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.types import LatencyProfile, Provenance

TRAFFIC = workload.synthetic(10, prompt="512", output="128")


def request(**changes: object) -> Request:
    base = Request(model="llama-3-8b", workload=TRAFFIC, slo=slo.parse("ttft_p95<500ms"), gpus=("h100-sxm",), precisions=("bf16",))
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def measured(
    model: str = "llama-3-8b", device: str = "h100-sxm", precision: str = "bf16", tp: int = 1, **constants: float
) -> LatencyProfile:
    profile = latency.roofline(models.find(model), hardware.find(device), precision=precision, tp=tp)
    return dataclasses.replace(profile, provenance=Provenance.MEASURED, constants={**profile.constants, **constants})


def test_the_kv_pool_of_an_8b_model_on_one_l4_by_hand() -> None:
    """(23,034 MiB - 0.46 GiB unseen) x 0.9 - 16.06 GB of weights - a step's peak - 0.26 GiB of context, at 131,072 bytes a token.

    The peak is a layer's: 2048 tokens x 2 bytes x (3 x 14336 + 4.25 x 4096); the sampler's 256 x 128256 x 15.3 bytes is less.
    """
    (candidate,), misfits = candidates.every(request(gpus=("l4",)))
    assert misfits == ()
    arch = models.find("llama-3-8b")
    peak = max(2 * 2048 * (3 * 14336 + 4.25 * 4096), 256 * 128256 * 15.3)
    free = (23034 * 2**20 - 0.46 * 2**30) * 0.9 - 8.030e9 * 2 - peak - 0.26 * 2**30
    assert candidate.kv_tokens == pytest.approx(free / (2 * 32 * 8 * 128 * 2), rel=1e-3)
    assert models.weight_bytes(arch, "bf16") == pytest.approx(16.06e9, rel=1e-3)
    assert candidate.limits.blocks * candidate.limits.block_tokens == candidate.kv_tokens


def test_llama_3_70b_in_bf16_needs_two_h100_and_then_has_little_cache() -> None:
    fits, misfits = candidates.every(request(model="llama-3-70b"))
    assert [m.layout.tp for m in misfits] == [1]
    assert misfits[0].why_not == "weights 141 GB do not fit 1 x 80 GB (10% reserved)"
    by_tp = {c.tp: c.kv_tokens for c in fits}
    assert 10_000 < by_tp[2] < 30_000, "153 GB less 141 GB of weights, activations and NCCL leave some thousand tokens of 328 kB"
    assert by_tp[4] > 20 * by_tp[2] / 2


def test_a_batch_that_takes_the_memory_of_the_cache_is_told_as_the_reason() -> None:
    """A million rows of 128,256 logits at 15.3 bytes are 1,962 GB: it is not the 16 GB of weights that do not fit."""
    fits, misfits = candidates.every(request(max_batch=1_000_000))
    assert fits == ()
    assert misfits[0].why_not == (
        "16.1 GB of weights and 1,962.6 GB of working memory for steps of 1,000,000 sequences and 1,000,000 tokens "
        "leave no room for a cache on 1 x 80 GB (10% reserved)"
    )
    with pytest.raises(Infeasible, match=r"or a smaller --max-batch \(it is 256 when left out\)"):
        plan(request(max_batch=1_000_000))


def test_a_step_has_a_token_for_each_sequence() -> None:
    """Engines refuse to start with fewer."""
    fits, _ = candidates.every(request(max_batch=9000))
    assert fits[0].limits[:2] == (9000, 9000)
    assert candidates.widest(request(max_batch=9000), fits[0])[:2] == (9000, 9000)
    assert candidates.every(request(max_batch=64))[0][0].limits[:2] == (64, 2048)


def test_kv_heads_are_repeated_when_there_are_fewer_than_devices() -> None:
    """8 KV heads on 8 devices halve what each holds against tp 4; qwen2.5-7b has 4, so tp 8 would hold no more per device."""
    arch, device = models.find("qwen2.5-7b"), hardware.find("h100-sxm")
    per_token = {tp: latency.roofline(arch, device, precision="bf16", tp=tp).constants["kv_bytes_per_token"] for tp in (2, 4)}
    assert per_token[2] == 2 * per_token[4]
    tps = {c.tp for c in candidates.every(request(model="qwen2.5-7b"))[0]}
    assert tps == {1, 2, 4}, "28 heads do not divide by 8"


def test_devices_without_a_link_go_together_only_where_they_are_sold_together() -> None:
    assert {c.tp for c in candidates.every(request(gpus=("l4",)))[0]} == {1}
    assert {c.tp for c in candidates.every(request(gpus=("l40s",)))[0]} == {1, 2, 4}


def test_a_device_that_cannot_compute_in_a_precision_says_so() -> None:
    fits, misfits = candidates.every(request(gpus=("t4",)))
    assert fits == ()
    assert "T4 does not compute in bf16" in misfits[0].why_not


def test_a_measured_profile_brings_its_engine_s_limits_and_needs_no_gpu_named() -> None:
    profile = measured("small-160m", "cpu", "fp32", max_batch=8, max_step_tokens=128, block_tokens=16, kv_tokens=4096, max_context=1024)
    (candidate,), _ = candidates.every(request(model="small-160m", gpus=(), precisions=(), profiles=(profile,)))
    assert tuple(candidate.limits) == (8, 128, 16, 256, 1024)
    assert candidate.profile is profile
    assert candidate.gpu == "cpu-2core"
    assert "as the engine was measured" in candidate.memory


def test_a_profile_is_used_for_its_own_layout_and_the_roofline_for_the_others() -> None:
    profile = measured(tp=2)
    fits, _ = candidates.every(request(gpus=("h100-sxm", "l4"), profiles=(profile,)))
    assert {(c.gpu, c.tp) for c in fits if c.profile.provenance is Provenance.MEASURED} == {("H100-SXM", 2)}
    assert all(c.profile.provenance is Provenance.ROOFLINE for c in fits if (c.gpu, c.tp) != ("H100-SXM", 2))


def test_a_device_of_no_catalogue_can_be_planned_from_its_profile_alone() -> None:
    profile = measured(kv_tokens=50_000)
    foreign = dataclasses.replace(profile, layout=dataclasses.replace(profile.layout, device="my-accelerator"))
    (candidate,), _ = candidates.every(request(gpus=(), profiles=(foreign,)))
    assert (candidate.gpu, candidate.device, candidate.kv_tokens) == ("my-accelerator", None, 50_000)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "llama-3-70b"}, r"the latency profile is of llama-3-8b, the plan of llama-3-70b"),
        ({"gpus": ("l4",)}, r"of bf16 on H100-SXM, tp 1; the plan asks for l4"),
        ({"precisions": ("fp8",)}, r"asks for h100-sxm in fp8"),
    ],
)
def test_a_profile_of_another_layout_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(NotComparable, match=says):
        candidates.every(request(profiles=(measured(),), **changes))


def test_an_unknown_gpu_is_named_with_its_neighbours() -> None:
    with pytest.raises(UnknownName, match="did you mean"):
        candidates.every(request(gpus=("h100-smx",)))


def test_without_gpus_every_priced_one_is_considered() -> None:
    fits, misfits = candidates.every(request(gpus=()))
    seen = {c.gpu for c in fits} | {m.gpu for m in misfits}
    assert {"H100-SXM", "L4", "A100-80GB-SXM"} <= seen
    assert "T4" not in seen, "the catalogue has no price for it"


def test_a_checkpoint_is_planned_in_its_own_format() -> None:
    """What is published in four bits was planned in bf16 and fp8: twice the weights, of a checkpoint nobody has."""
    asked = request(model="kimi-k2.5", gpus=("h200-sxm",), precisions=())
    fits, misfits = candidates.every(asked)
    assert {c.precision for c in fits} == {"int4"}
    assert {m.layout.precision for m in misfits} == {"int4"}
    assert {c.precision for c in candidates.every(request(model="gpt-oss-120b", precisions=()))[0]} == {"fp4"}
    assert {c.precision for c in candidates.every(request(precisions=()))[0]} == {"bf16", "fp8"}
    assert {c.precision for c in candidates.every(dataclasses.replace(asked, precisions=("fp4",)))[0]} == {"fp4"}


def test_a_sequence_is_held_by_one_rank() -> None:
    """MiniMax M2.5 with attention copied on 4 H100: a pool each, of which a sequence sees one."""
    fits, _ = candidates.every(request(model="minimax-m2.5", precisions=("fp8",)))
    ranks = next(c for c in fits if c.layout.attention_dp == 4)
    assert ranks.limits.max_context == ranks.rank_tokens == ranks.kv_tokens // 4
    assert ranks.limits.max_context < 196_608
    split = next(c for c in fits if c.tp == 8)
    assert split.rank_tokens == split.kv_tokens


@pytest.mark.parametrize(
    ("name", "precision", "tp", "pp"), [("llama-3-70b", "bf16", 4, 1), ("llama-3-70b", "fp8", 8, 2), ("mixtral-8x7b", "bf16", 2, 1)]
)
def test_a_replica_starts_with_all_its_weights(name: str, precision: str, tp: int, pp: int) -> None:
    """Attention and head too, not MLPs alone (113 of 139 GB), and each stage of a pipeline its own."""
    arch = models.find(name)
    profile = latency.roofline(arch, hardware.find("h100-sxm"), precision=precision, tp=tp, pp=pp)
    read = models.step_weight_bytes(arch, precision, 1e9)
    assert candidates.weights_bytes(profile, tp * pp) == pytest.approx(read, rel=0.002)  # a router is on every device


def test_experts_that_compute_are_told_as_compute() -> None:
    """Long prompts and short answers of Mixtral: its experts' rate is a constant of its own."""
    asked = request(model="mixtral-8x7b", workload=workload.synthetic(1, prompt="8000", output="2"))
    (candidate,) = (c for c in candidates.every(asked)[0] if c.name == "H100-SXM bf16 tp 2")
    replica = Replica(candidate.profile, candidate.limits, demand.of(asked.workload))
    found = sizing.size(candidate, replica, (), 1.0, 0.2, asked.shelf)
    assert found is not None
    assert sizing.bottleneck(found) == "compute"
