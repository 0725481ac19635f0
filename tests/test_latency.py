"""The step profile: what it predicts by hand and by physics, and what a fit gives back."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import hardware, latency, models, record
from mlsys_bench.errors import BadInput, NotComparable, UnknownName
from mlsys_bench.latency import calibrate, coefficients, physics, solve
from mlsys_bench.types import Bench, LatencyProfile, Launch, Layout, Measurement, Provenance, Round, Scalar

BLIS = Path(__file__).parents[2] / "shared" / "data" / "llm" / "blis_measured.csv"
DECODE_ONE = (1.0, 1.0, 0.0, 0.0, 1.0)
GRID: list[tuple[float, ...]] = [
    *((b, b * c, 0, 0, b) for b in (1, 2, 4, 8) for c in (64, 256, 768)),
    *((0, 0, n, n * (past + n / 2), 1) for n in (16, 64, 128, 256) for past in (0, 256)),
    (4, 400, 128, 8192, 5),
]


def nano_on_cpu(norm: float | None = None) -> LatencyProfile:
    """Return a truth to recover: a small model on one slow core."""
    constants = physics.constants_of(models.find("nano"), "fp32") | {
        "bandwidth_bytes_per_s": 12e9, "peak_flops_per_s": 60e9, "pack_tokens": 3.0,
    }  # fmt: skip
    values = {"step_s": 2e-3, "sequence_s": 3e-4, "weights": 1.2, "linear": 1.5, "kv": 3.0, "attention": 4.0, "pack_s": 3e-3}
    return LatencyProfile(
        form="step",
        layout=Layout(model="nano", precision="fp32", device="cpu", threads=1, pinned_cores=(0,)),
        stage=None,
        terms=tuple(values),
        coefficients=tuple(values.values()),
        covariance=tuple(tuple(row) for row in np.diag(np.full(7, 0.01)).tolist()),
        constants=constants if norm is None else constants | {"roof_norm": norm},
        residual_log_sd=0.02,
        valid={},
        provenance=Provenance.CALIBRATED,
    )


def in_c(norm: float | None = 2.0) -> LatencyProfile:
    """Return a truth with two stairs, as the built-in C kernels have them: a lone row is read in place, 12 rows are one pass."""
    k = physics.constants_of(models.find("nano"), "fp32") | {"bandwidth_bytes_per_s": 23e9, "peak_flops_per_s": 120e9}
    k |= {"pack_tokens": 1.5, "pass_tokens": 12.5} | ({} if norm is None else {"roof_norm": norm})
    multipliers = {"weights": 1.05, "linear": 1.05, "kv": 3.0, "attention": 2.0}
    values = {"step_s": 2e-4, "sequence_s": 3e-5, **multipliers, "pack_s": 5e-4, "pass_s": 9e-4}
    return dataclasses.replace(
        nano_on_cpu(), terms=tuple(values), coefficients=tuple(values.values()), constants=k,
        covariance=tuple(map(tuple, np.diag(np.full(8, 0.01)).tolist())),
    )  # fmt: skip


def measured(name: str, unit: str, parameters: dict[str, Scalar], launches: list[list[float]]) -> Measurement:
    return Measurement(
        name=name,
        unit=unit,
        better="lower" if unit == "s" else "higher",
        parameters={"device": "cpu", "threads": 1, "pinned_cores": "0"} | parameters,
        launches=tuple(Launch(started_s=0.0, rounds=(Round(values=tuple(values)),)) for values in launches),
    )


def bench_of(truth: LatencyProfile, *, seed: int = 0, noise: float = 0.02, grid: list[tuple[float, ...]] = GRID) -> Bench:
    """Return a bench file as that truth would give it: every cell is off by `noise` of its own, its samples by a little more."""
    rng = np.random.default_rng(seed)
    steps = []
    for features in grid:
        centre = latency.step_s(truth, features) * math.exp(rng.normal(0, noise))
        parameters: dict[str, Scalar] = dict(zip(latency.FEATURES, features, strict=True))
        parameters |= {"model": "nano", "precision": "fp32", "max_batch": 8, "kv_tokens": 8192}
        steps.append(measured("engine.step", "s", parameters, [(centre * np.exp(rng.normal(0, 0.01, 20))).tolist()]))
    ceilings = [
        measured("memory.read", "B/s", {"bytes": 2**28}, [[11.8e9, 12e9]]),
        measured("gemm", "FLOP/s", {"precision": "fp32", "n": 1024}, [[60e9, 58e9]]),
    ]
    return Bench(measurements=(*steps, *ceilings))


def learned() -> dict[str, float]:
    """Return the shipped coefficients by name."""
    return dict(zip(coefficients.NAMES, np.exp(coefficients.learned_log()).tolist(), strict=True))


@pytest.fixture(scope="module")
def llama() -> LatencyProfile:
    return latency.roofline(models.find("llama-3-8b"), hardware.find("H100"), precision="bf16")


@pytest.fixture(scope="module")
def fitted() -> LatencyProfile:
    return latency.fit(bench_of(nano_on_cpu()))


# ---------------------------------------------------------------- by hand


def test_one_token_of_llama_8b_costs_an_h100_at_least_its_weights(llama: LatencyProfile) -> None:
    """8.03 G parameters less 0.525 G of embedding table, 2 bytes each = 15.01 GB; over 3.35 TB/s = 4.48 ms."""
    assert latency.floor_s(llama, DECODE_ONE) == pytest.approx(15.01e9 / 3.35e12, rel=2e-3)


def test_a_long_prefill_of_llama_8b_costs_an_h100_at_least_its_flops(llama: LatencyProfile) -> None:
    """8,192 tokens at 2 x 6.98 G FLOPs and 4 x 32 x 4,096 FLOPs a pair, over 989 TFLOP/s: compute, not bytes, is the floor."""
    flops = 8192 * 2 * 6.98e9 + 8192**2 / 2 * 4 * 32 * 4096 + 2 * 4096 * 128256
    assert latency.floor_s(llama, (0, 0, 8192, 8192**2 / 2, 1)) == pytest.approx(flops / 989e12, rel=2e-3)


def test_the_roofline_of_one_decode_step_is_the_sum_of_its_learned_parts(llama: LatencyProfile) -> None:
    """Matrices of a layer: (4,096 x 4,096 x 2 + 4,096 x 1,024 x 2 + 3 x 4,096 x 14,336) x 2 bytes; head 4,096 x 128,256 x 2 bytes."""
    c = learned()
    layer_bytes = 2 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    host_s = c["step_s"] + 32 * c["layer_s"] + c["sequence_s"]
    read_s = c["memory"] * (32 * layer_bytes + 2 * 4096 * 128256) / 3.35e12
    computed = c["compute16"] / 989e12 / (c["memory"] / 3.35e12)  # of reading it: two bytes and two FLOPs a parameter
    weights_s = read_s * (1 + computed**1.4) ** (1 / 1.4)
    kv_s = c["kv"] * 1000 * 131072 / 3.35e12
    activations_s = c["activation"] * 12 * 32 * 4096 * 2 / 3.35e12
    assert latency.step_s(llama, (1, 1000, 0, 0, 1)) == pytest.approx(host_s + weights_s + kv_s + activations_s, rel=1e-6)
    assert llama.provenance is Provenance.ROOFLINE
    assert llama.note == (
        f"coefficients learned on other hardware: weights at {100 / c['memory']:.0f} % of bandwidth, "
        f"{1e3 * (c['step_s'] + 32 * c['layer_s']):.1f} ms a step beside bytes and FLOPs"
    )


def test_a_mixture_reads_the_experts_that_are_hit() -> None:
    """Mixtral sends a token to 2 of 8 experts; a batch of 16 leaves (3/4)^16 = 1 % of them unread."""
    a = models.find("mixtral-8x7b")
    profile = latency.roofline(a, hardware.find("H100"), precision="bf16")
    k = profile.constants
    always = k["attention_bytes"] + k["dense_bytes"] + k["head_bytes"]
    assert always + k["expert_bytes"] / 4 == pytest.approx(models.step_weight_bytes(a, "bf16", 1))
    for n in (1, 2, 16):
        read_s = models.step_weight_bytes(a, "bf16", n) / 3.35e12
        assert latency.floor_s(profile, (n, 0, 0, 0, n)) == pytest.approx(read_s)


def test_copies_of_a_token_among_experts_are_moved_and_split_by_who_holds_what() -> None:
    """Mixtral: 32 layers, 2 copies of 4,096 values, moved 5 times, of 14,336 moved 6 times, at 2 bytes, counted twice; 12 passes."""
    a, h100 = models.find("mixtral-8x7b"), hardware.find("H100")
    passes, hidden, inner = 12 * 32 * 4096 * 2, 2 * 32 * 2 * 5 * 4096 * 2, 2 * 32 * 2 * 6 * 14336 * 2
    moved = {ep: latency.shares(a, h100, precision="fp8", tp=4, ep=ep)["activation_bytes_per_token"] for ep in (1, 4)}
    assert moved[1] == pytest.approx(passes + hidden + inner / 4)  # each device has a quarter of every expert
    assert moved[4] == pytest.approx(passes + hidden / 4 + inner / 4)  # each has a quarter of the experts
    dense = latency.shares(models.find("llama-3-8b"), h100, precision="bf16")
    assert dense["activation_bytes_per_token"] == passes  # the same shape without experts


def test_thin_slices_of_experts_multiply_slower() -> None:
    """Mixtral on 8 devices: two products sum over 4,096 values, one over 14,336, or an eighth of it in a slice."""
    a, h100, depth = models.find("mixtral-8x7b"), hardware.find("H100"), learned()["expert_depth"]
    for ep, inner in ((1, 14336 / 8), (8, 14336)):
        profile = latency.roofline(a, h100, precision="fp8", tp=8, ep=ep)
        found = dict(zip(profile.terms, profile.coefficients, strict=True))["expert_linear"]
        slower = (2 * (1 + depth / 4096) + (1 + depth / inner)) / 3
        assert found == pytest.approx(learned()["compute8"] * learned()["expert_compute"] * slower)


def test_matrix_kernels_of_ampere_read_slower() -> None:
    """1.23 of the time of the bytes on A100 and A40 (`proofs/operators.py`), 1.11 elsewhere: as assumed before rows were seen."""
    a = models.find("llama-3-8b")
    weights = {
        name: dict(zip(p.terms, p.coefficients, strict=True))["weights"]
        for name in ("A100-80GB-SXM", "A40", "H100", "L40S")
        for p in [latency.roofline(a, hardware.find(name), precision="bf16")]
    }
    assert weights["A100-80GB-SXM"] == weights["A40"] == pytest.approx(1.11 * weights["H100"])
    assert weights["L40S"] == weights["H100"]


def test_tensor_parallelism_divides_the_bytes_and_adds_all_reduces() -> None:
    """Two devices: half the bytes, two rounds a layer; each token sends 2 x 80 layers x 8,192 x 2 bytes once over 450 GB/s."""
    a, h100 = models.find("llama-3-70b"), hardware.find("H100")
    one, two = (latency.roofline(a, h100, precision="bf16", tp=tp) for tp in (1, 2))
    assert latency.floor_s(two, DECODE_ONE) == pytest.approx(latency.floor_s(one, DECODE_ONE) / 2)
    assert two.constants["link_s_per_token"] == pytest.approx(2 * 80 * 8192 * 2 / 450e9)
    assert one.constants["link_s_per_token"] == 0
    by_name = (dict(zip(p.terms, p.coefficients, strict=True)) for p in (one, two))
    host_one_s, host_two_s = (terms["step_s"] for terms in by_name)
    assert host_two_s - host_one_s == pytest.approx(2 * 80 * learned()["round_s"])
    assert (two.note or "").endswith("all-reduce over its link")
    on_l4 = latency.roofline(a, hardware.find("L4"), precision="bf16", tp=2)
    assert (on_l4.note or "").endswith("all-reduce over PCIe 4.0 x16, assumed")
    with pytest.raises(BadInput, match="tp 0"):
        latency.roofline(a, h100, precision="bf16", tp=0)


def test_a_latent_cache_is_whole_on_every_device_and_split_by_attention_ranks() -> None:
    """DeepSeek R1 keeps 512 + 64 values a token in each of 61 layers; 8 ranks of data-parallel attention hold an eighth each."""
    a, h200 = models.find("deepseek-r1"), hardware.find("H200")
    by_tp = latency.shares(a, h200, precision="fp8", tp=8, ep=8)
    by_rank = latency.shares(a, h200, precision="fp8", attention_dp=8, ep=8)
    assert by_tp["kv_bytes_per_token"] == 61 * 576 * 2
    assert by_rank["kv_bytes_per_token"] == by_tp["kv_bytes_per_token"] / 8
    assert by_rank["devices"] == by_tp["devices"] == 8
    assert by_rank["expert_bytes"] == by_tp["expert_bytes"]
    whole = latency.shares(a, h200, precision="fp8")
    assert by_rank["attention_bytes"] == whole["attention_bytes"] > by_tp["attention_bytes"]  # copied on each rank
    assert by_rank["attention_flops_per_token"] == pytest.approx(whole["attention_flops_per_token"] / 8)
    assert latency.shares(a, h200, precision="fp8", engine="sglang", tp=8)["kv_bytes_per_token"] == 61 * 576  # an fp8 cache


def test_layers_with_a_window_stop_reading_at_its_end() -> None:
    """gpt-oss: 18 of 36 layers see 128 tokens; 2 x 8 x 64 values of 2 bytes a token and layer."""
    profile = latency.roofline(models.find("gpt-oss-120b"), hardware.find("H100"), precision="bf16")
    c = dict(zip(profile.terms, profile.coefficients, strict=True))

    def longer_s(low: float, high: float) -> float:
        return latency.step_s(profile, (1, high, 0, 0, 1)) - latency.step_s(profile, (1, low, 0, 0, 1))

    full_s = c["kv"] * 18 * 2048 * 1000 / 3.35e12
    assert longer_s(1000, 2000) == pytest.approx(full_s)
    assert longer_s(0, 100) == pytest.approx(2 * full_s / 10)


def test_linear_layers_read_a_state_whatever_the_context() -> None:
    """Qwen3-Next: 36 of 48 layers keep a state that is read and written each step; the others 2 x 2 x 256 values a token."""
    a = models.find("qwen3-next-80b-a3b")
    k = latency.shares(a, hardware.find("H100"), precision="bf16")
    assert k["state_bytes"] == 2 * models.state_bytes(a) > 0
    assert k["kv_bytes_per_token"] == 12 * 1024 * 2


@pytest.mark.parametrize(
    ("device", "precision", "width"), [("H100", "int4", "16"), ("A100-80GB", "fp4", "16"), ("H100", "fp8", "8"), ("B200", "fp4", "4")]
)
def test_a_format_the_device_cannot_multiply_in_only_saves_bytes(device: str, precision: str, width: str) -> None:
    a, d = models.find("llama-3-8b"), hardware.find(device)
    k = latency.shares(a, d, precision=precision)
    assert set(latency.formats(a, d, precision).values()) == {width}
    assert k["peak_flops_per_s"] == d.flops_per_s[{"16": "bf16", "8": "fp8", "4": "fp4"}[width]]
    assert k["dense_bytes"] == pytest.approx(32 * 3 * 4096 * 14336 * models.group_bytes(a, precision)["mlp"])


def test_a_device_without_bf16_says_so() -> None:
    with pytest.raises(BadInput, match="bf16"):
        latency.roofline(models.find("nano"), hardware.find("T4"), precision="bf16")


# ---------------------------------------------------------------- properties

counts = st.integers(0, 512)
steps = st.tuples(counts, st.integers(0, 10**6), counts, st.integers(0, 10**7), counts)
PROFILES = {
    "dense": latency.roofline(models.find("llama-3-8b"), hardware.find("L4"), precision="int8"),
    "mixture, tp 4": latency.roofline(models.find("mixtral-8x7b"), hardware.find("H100"), precision="fp8", tp=4),
    "windows": latency.roofline(models.find("gpt-oss-120b"), hardware.find("B200"), precision="fp4", tp=2),
    "latent, attention ranks": latency.roofline(models.find("deepseek-r1"), hardware.find("H200"), precision="fp8", ep=8, attention_dp=8),
    "linear": latency.roofline(models.find("qwen3-next-80b-a3b"), hardware.find("H100"), precision="bf16", tp=2, pp=2),
    "measured": nano_on_cpu(norm=2.0),
    "measured, two stairs": in_c(),
}


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES.keys())
@settings(max_examples=60, deadline=None)
@given(features=steps, grown=st.integers(0, 4), by=st.integers(1, 1000))
def test_a_larger_step_never_takes_less_time(profile: LatencyProfile, features: tuple[int, ...], grown: int, by: int) -> None:
    larger = tuple(v + by * (i == grown) for i, v in enumerate(features))
    assert latency.step_s(profile, larger) >= latency.step_s(profile, features)
    assert latency.floor_s(profile, larger) >= latency.floor_s(profile, features)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES.keys())
@settings(max_examples=60, deadline=None)
@given(features=steps, seed=st.integers(0, 2**32 - 1))
def test_no_profile_nor_a_draw_of_it_is_faster_than_physics(profile: LatencyProfile, features: tuple[int, ...], seed: int) -> None:
    drawn = latency.draw(profile, np.random.default_rng(seed))
    assert latency.step_s(drawn, features) >= latency.floor_s(profile, features) * (1 - 1e-12)
    assert latency.check(drawn) is drawn


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES.keys())
@settings(max_examples=60, deadline=None)
@given(features=steps)
def test_the_clock_shows_the_same_time_as_the_formula(profile: LatencyProfile, features: tuple[int, ...]) -> None:
    alone = latency.step_s(profile, features)
    assert latency.clock(profile)(features) == pytest.approx(alone, rel=1e-12)
    many = latency.step_s(profile, [np.full(3, float(v)) for v in features])
    assert many == pytest.approx(np.full(3, alone), rel=1e-12)


def test_padded_batches_take_the_time_of_the_next_step_of_the_stair() -> None:
    """CUDA graphs are captured at batch sizes 8 apart: 17 decode as long as 24, a step with prefill is not padded."""
    plain = nano_on_cpu()
    padded = dataclasses.replace(plain, constants=plain.constants | {"graph_stride": 8.0, "graph_end": 64.0})
    for n, as_many in ((8, 8), (17, 24), (65, 65)):
        step = (n, 100, 0, 0, 0)
        assert latency.step_s(padded, step) == pytest.approx(latency.step_s(plain, (as_many, 100, 0, 0, 0)))
        assert latency.step_s(padded, [np.full(2, float(v)) for v in step]) == pytest.approx(np.full(2, latency.step_s(padded, step)))
    assert latency.step_s(padded, (17, 100, 1, 0, 0)) == latency.step_s(plain, (17, 100, 1, 0, 0))


def test_a_smooth_roof_lies_between_the_longer_time_and_the_sum() -> None:
    sharp, smooth, summed = (latency.step_s(nano_on_cpu(norm), (8, 2048, 0, 0, 8)) for norm in (None, 4.0, 1.0))
    assert sharp < smooth < summed


def test_weights_pass_again_beyond_the_rows_of_one_pass() -> None:
    """Memory alone: 1, 2 to 12 and 13 tokens take 58.9 MB / 23 GB/s · 1.05 = 2.69 ms, 0.5 ms more, and 0.9 ms more than that."""
    slow = dataclasses.replace(in_c(None), coefficients=(1e-9, 1e-9, 1.05, 1.0, 1.0, 1.0, 5e-4, 9e-4))
    read_s = 1.05 * slow.constants["dense_bytes"] / 23e9
    slow = dataclasses.replace(slow, constants=slow.constants | {"peak_flops_per_s": 1e15})
    for tokens, taken_s in ((1, read_s), (2, read_s + 5e-4), (12, read_s + 5e-4), (13, read_s + 1.4e-3), (64, read_s + 1.4e-3)):
        assert latency.step_s(slow, (tokens, 0, 0, 0, 0)) == pytest.approx(taken_s, rel=1e-3)


def test_draws_scatter_as_the_covariance_says() -> None:
    profile = dataclasses.replace(nano_on_cpu(), covariance=tuple(map(tuple, (0.02 * (np.eye(7) + 0.5)).tolist())))
    rng = np.random.default_rng(1)
    far_from_floor = dataclasses.replace(profile, coefficients=(2e-3, 1e-4, 5.0, 5.0, 5.0, 5.0, 3e-3))
    logs = np.log([latency.draw(far_from_floor, rng).coefficients for _ in range(4000)])
    error = 4 * 0.03 * math.sqrt(2 / 4000)  # four standard errors of a variance of 0.03
    assert np.cov(logs.T) == pytest.approx(np.asarray(profile.covariance), abs=error)


# ---------------------------------------------------------------- two stairs

SERVED: list[tuple[float, ...]] = [
    *((1, context, 0, 0, 1) for context in (40, 160, 240)),
    *((b, b * (60 + 40 * (b % 3)), 0, 0, b) for b in range(1, 17)),
    *((0, 0, n, n * n / 2, 1) for n in (40, 60, 90, 130, 200)),
    *((d, d * 110, n, n * n / 2, d + 1) for d in (2, 15) for n in (40, 80, 130, 220)),
]


@pytest.mark.parametrize("norm", [None, 2.0])
def test_a_fit_finds_both_stairs_of_kernels_that_have_two(norm: float | None) -> None:
    """Where they are, and every size of step within 3 %, the lone row among them."""
    truth = in_c(norm)
    profile = latency.fit(bench_of(truth, grid=SERVED, noise=0.01))
    assert (profile.constants["pack_tokens"], profile.constants["pass_tokens"]) == (1.5, 12.5)
    assert profile.terms[-1] == "pass_s"
    assert profile.residual_log_sd < 0.02
    off = [latency.step_s(profile, f) / latency.step_s(truth, f) - 1 for f in SERVED]
    assert max(map(abs, off)) < 0.03


def test_a_fit_of_kernels_with_one_stair_has_one(fitted: LatencyProfile) -> None:
    truth = dataclasses.replace(nano_on_cpu(), constants=nano_on_cpu().constants | {"pack_tokens": 3.5})
    for profile in (fitted, latency.fit(bench_of(truth, grid=SERVED, noise=0.01))):
        assert "pass_tokens" not in profile.constants
        assert len(profile.terms) == len(profile.coefficients) == 7


def test_a_second_stair_must_be_surer_than_chance() -> None:
    """50 cells whose misses fall from 4 to 3 %: 100 log(4/3) = 29; misses of a per mille are alike."""

    def shape(miss: float) -> solve.Shape:
        return solve.Shape(constants={}, held_out_logs=np.full(50, miss), form_sd=0.03)

    assert shape(0.03).surer(shape(0.04)) == pytest.approx(100 * math.log(4 / 3))
    assert shape(1e-9).surer(shape(1e-3)) == 0.0


def test_few_disturbed_samples_of_a_rare_step_are_no_misfit_of_the_form() -> None:
    """Four of seven samples twice as long: the median is theirs, its standard error reaches to the others, and the miss hardly counts."""
    parameters: dict[str, Scalar] = dict(zip(latency.FEATURES, (13, 1500, 0, 0, 13), strict=True))
    shared = measured("engine.step", "s", parameters, [[1.0, 2, 1, 2, 2, 1, 2.01]])
    (rare,) = calibrate.cells([shared])
    assert rare.median_s == pytest.approx(2.0)
    assert rare.log_se > 0.3
    rows = [rare, *(dataclasses.replace(rare, key=f"{i}", log_se=0.01) for i in range(20))]
    shape = solve.Shape(constants={}, held_out_logs=np.array([math.log(2), *[0.02, -0.02] * 10]), form_sd=0.02)
    assert solve.residual_sd(rows, shape) == pytest.approx(0.02, rel=0.2)


# ---------------------------------------------------------------- refusals


def test_a_profile_faster_than_the_hardware_is_an_error() -> None:
    fast = dataclasses.replace(nano_on_cpu(), coefficients=(2e-3, 1e-4, 0.8, 1.5, 3.0, 4.0, 3e-3))
    with pytest.raises(BadInput, match=r"weights = 0.8 is below its physics floor"):
        latency.check(fast)
    with pytest.raises(BadInput, match="sequence_s is 0"):
        latency.check(dataclasses.replace(nano_on_cpu(), coefficients=(2e-3, 0.0, 1.2, 1.5, 3.0, 4.0, 3e-3)))


def test_a_profile_of_requests_is_no_step_profile() -> None:
    with pytest.raises(BadInput, match="'service'"):
        latency.step_s(dataclasses.replace(nano_on_cpu(), form="service"), DECODE_ONE)


def test_a_profile_of_another_layout_is_refused_by_what_differs() -> None:
    profile = nano_on_cpu()
    latency.check_layout(profile, profile.layout)
    with pytest.raises(NotComparable, match="precision fp32 against int8, threads 1 against 2"):
        latency.check_layout(profile, dataclasses.replace(profile.layout, precision="int8", threads=2))


def test_a_step_beyond_the_measured_range_is_named(fitted: LatencyProfile) -> None:
    assert latency.outside(fitted, (8, 2000, 0, 0, 8)) == []
    warnings = latency.outside(fitted, (9, 2000, 0, 0, 8))
    assert warnings == ["decode_seqs = 9 is outside the measured 0 to 8: extrapolated"]


@pytest.mark.parametrize(
    ("measurements", "message"),
    [
        ((), "no engine.step"),
        (bench_of(nano_on_cpu(), grid=GRID[:12]).measurements, "prefill steps of two lengths"),
        (bench_of(nano_on_cpu(), grid=GRID[12:20]).measurements, "decode steps at two batch sizes and decode steps at two contexts"),
        ((measured("engine.step", "s", {"model": "nano", "precision": "fp32"}, [[1.0]]),), "lacks the parameter"),
    ],
)
def test_a_bench_file_that_cannot_be_fitted_says_what_it_lacks(measurements: tuple[Measurement, ...], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        latency.fit(Bench(measurements=measurements))


def test_a_file_of_two_layouts_needs_a_choice() -> None:
    file = bench_of(nano_on_cpu())
    other = tuple(dataclasses.replace(m, parameters=m.parameters | {"threads": 2}) for m in file.measurements)
    both = Bench(measurements=file.measurements + other)
    with pytest.raises(BadInput, match="2 layouts"):
        latency.fit(both)
    assert [layout.threads for layout in latency.layouts(both)] == [1, 2]
    assert latency.fit(both, layout=latency.layouts(both)[1]).layout.threads == 2


def test_a_model_nobody_knows_is_refused() -> None:
    file = bench_of(nano_on_cpu())
    with pytest.raises(UnknownName, match="nono"):
        latency.fit(
            Bench(measurements=tuple(dataclasses.replace(m, parameters=m.parameters | {"model": "nono"}) for m in file.measurements))
        )


# ---------------------------------------------------------------- the fit


UNSEEN = (
    (1, 150, 0, 0, 1), (2, 300, 0, 0, 2), (3, 900, 0, 0, 3), (5, 700, 0, 0, 5), (6, 2000, 0, 0, 6), (7, 3000, 0, 0, 7),
    (0, 0, 30, 450, 1), (0, 0, 100, 5000, 1), (0, 0, 180, 60000, 1), (0, 0, 200, 20000, 1), (3, 300, 60, 1800, 4), (6, 600, 40, 800, 7),
)  # fmt: skip


def test_steps_that_no_cell_held_lie_within_the_interval_of_a_fit() -> None:
    """Over four noisy files, about nine of ten are within 1.645 sd of draws (48 trials: 3 sd below is 37); none is off by a tenth."""
    truth, rng, inside = nano_on_cpu(), np.random.default_rng(0), 0.0
    for seed in range(4):
        profile = latency.fit(bench_of(truth, seed=seed))
        drawn = [latency.draw(profile, rng) for _ in range(60)]
        for features in UNSEEN:
            spread = np.std(np.log([latency.step_s(d, features) for d in drawn]))
            off = abs(math.log(latency.step_s(profile, features) / latency.step_s(truth, features)))
            inside += float(off <= 1.645 * spread)
            assert off < 0.1
    assert inside >= 37


def test_what_hides_behind_a_longer_time_is_not_drawn_to_many_times_the_step() -> None:
    """Where FLOPs rule every step, the cells say of the weights only that reading them takes no longer."""
    truth = dataclasses.replace(nano_on_cpu(), coefficients=(2e-3, 3e-4, 1.0, 8.0, 3.0, 4.0, 1e-5))
    truth = dataclasses.replace(truth, constants=truth.constants | {"bandwidth_bytes_per_s": 200e9})
    steps = bench_of(truth).measurements
    profile = latency.fit(Bench(measurements=(*steps, measured("memory.read", "B/s", {"bytes": 2**28}, [[200e9]]))))
    rng, usual = np.random.default_rng(1), (4, 400, 0, 0, 4)
    most_s = max(latency.step_s(latency.draw(profile, rng), usual) for _ in range(100))
    assert most_s < 1.25 * latency.step_s(profile, usual)


def test_the_size_from_which_on_kernels_change_is_found(fitted: LatencyProfile) -> None:
    """The truth takes 3 ms more from four tokens on."""
    three, four = (latency.step_s(fitted, (n, 100 * n, 0, 0, n)) for n in (3, 4))
    assert four - three > 2e-3


@pytest.mark.parametrize("norm", [None, 2.0])
def test_a_fit_predicts_steps_it_has_not_seen(norm: float | None) -> None:
    truth = nano_on_cpu(norm)
    profile = latency.fit(bench_of(truth, seed=3))
    unseen = [(3, 3 * 500, 0, 0, 3), (6, 6 * 100, 0, 0, 6), (0, 0, 200, 200 * 228, 1), (2, 600, 64, 64 * 32, 3)]
    errors = [math.log(latency.step_s(profile, f) / latency.step_s(truth, f)) for f in unseen]
    assert max(map(abs, errors)) < 3 * profile.residual_log_sd


def test_a_fit_carries_limits_range_and_what_it_is_worth(fitted: LatencyProfile) -> None:
    assert fitted.provenance is Provenance.CALIBRATED
    assert fitted.layout == Layout(model="nano", precision="fp32", device="cpu", threads=1, pinned_cores=(0,))
    assert fitted.constants["max_batch"] == 8
    assert fitted.constants["bandwidth_bytes_per_s"] == 12e9  # the best sample of memory.read, not the median
    assert fitted.valid["prefill_tokens"] == (0, 256)
    assert 0.01 < fitted.residual_log_sd < 0.06  # cells scatter by 2 %, held-out corners by more
    assert "held-out cells are off by" in (fitted.note or "")
    found = latency.residuals(fitted, bench_of(nano_on_cpu()))
    assert len(found) == len(GRID)
    assert max(abs(r.error) for r in found) < 0.1


def test_a_fitted_profile_survives_its_file(fitted: LatencyProfile) -> None:
    text = record.dumps(fitted, hardware.machine())
    assert record.loads(text, "profile.json")[1] == fitted


def test_one_wild_cell_does_not_rule_the_fit() -> None:
    file = bench_of(nano_on_cpu(), seed=5)
    wild = dataclasses.replace(file.measurements[5], launches=(Launch(started_s=0, rounds=(Round(values=(1.0,) * 9),)),))
    profile = latency.fit(Bench(measurements=(*file.measurements[:5], wild, *file.measurements[6:])))
    errors = [abs(r.error) for r in latency.residuals(profile, file)]
    assert float(np.median(errors)) < 0.06


def disturbed(file: Bench, *, share: int) -> Bench:
    """Return the file with `share` disturbed copies of each sample added: ten times the wall time, the same CPU time."""

    def slowed(m: Measurement) -> Measurement:
        values = m.launches[0].rounds[0].values
        late = tuple(10 * v for v in values) * share
        both = Round(values=(*values, *late)[-20 * share - 5 :], cpu_s=(values * (share + 1))[-20 * share - 5 :])
        return dataclasses.replace(m, launches=(Launch(started_s=0, rounds=(both,)),))

    return Bench(measurements=tuple(slowed(m) if m.name == "engine.step" else m for m in file.measurements))


def test_a_step_that_had_to_wait_for_its_core_does_not_count_as_slow() -> None:
    """Five clean samples beside twenty disturbed ones are too few: CPU time speaks for all, and the note warns."""
    file = bench_of(nano_on_cpu(), noise=0)
    clean, busy = latency.fit(file), latency.fit(disturbed(file, share=1))
    assert [r.predicted_s for r in latency.residuals(busy, file)] == pytest.approx(
        [r.predicted_s for r in latency.residuals(clean, file)], rel=0.02
    )
    assert "80 % of the samples shared their core" in (busy.note or "")
    assert "shared their core" not in (clean.note or "")


def drifting(m: Measurement) -> Measurement:
    """Return a step that took 20 % longer, and rose by 8 % while it was measured: refused as a figure, kept as what it is."""
    values = m.launches[0].rounds[0].values
    rounds = tuple(Round(values=tuple(1.2 * v * (0.96 + 0.01 * i) for v in values)) for i in range(9))
    return dataclasses.replace(
        m, launches=(), drifted=(Launch(started_s=0, rounds=rounds),), ended="drifting", skipped="drifting: it changed by +8 %"
    )


def test_cells_that_drifted_count_little_and_are_named() -> None:
    """As unsure as they changed: a fit of a machine whose clock moves is worth less, but there is one, and the steady cells rule it."""
    file = bench_of(nano_on_cpu(), noise=0)
    steady = latency.fit(file)
    moved = dataclasses.replace(file, measurements=(drifting(file.measurements[5]), *file.measurements[:5], *file.measurements[6:]))
    found = latency.fit(moved)
    assert [r.predicted_s for r in latency.residuals(found, file)] == pytest.approx(
        [r.predicted_s for r in latency.residuals(steady, file)], rel=0.03
    )
    assert f"1 of {len(GRID)} cells changed while they were measured" in (found.note or "")
    all_moved = dataclasses.replace(file, measurements=tuple(drifting(m) if m.name == "engine.step" else m for m in file.measurements))
    assert [r.predicted_s for r in latency.residuals(latency.fit(all_moved), file)] == pytest.approx(
        [1.2 * r.predicted_s for r in latency.residuals(steady, file)], rel=0.03
    )
    assert latency.layouts(all_moved) == latency.layouts(file)


def test_without_ceilings_in_the_file_the_steps_are_their_own() -> None:
    file = bench_of(nano_on_cpu())
    profile = latency.fit(Bench(measurements=tuple(m for m in file.measurements if m.name == "engine.step")))
    assert "no memory.read and gemm in the file" in (profile.note or "")
    for r in latency.residuals(profile, file):
        assert r.measured_s >= latency.floor_s(profile, r.features) * (1 - 1e-9)


# ---------------------------------------------------------------- real engines


def test_vllm_on_h100_a100_and_l40s_lies_above_the_floor_and_mostly_within_the_roofline_band() -> None:
    """Mean ITL at a constant rate; by Little's law rate x output tokens x ITL sequences decode at once, with half their output cached."""
    if not BLIS.exists():
        pytest.skip("the measurements of others are not beside this checkout")
    names = {"H100": "h100-sxm", "A100-80GB": "a100-80gb-sxm", "L40S": "l40s"}
    inside = []
    with BLIS.open() as file:
        for row in csv.DictReader(file):
            if row["stage"] == "summary" or row["precision"] != "FP16" or "codellama" in row["model"].lower() or "Nemo" in row["model"]:
                continue
            profile = latency.roofline(models.find(row["model"]), hardware.find(names[row["gpu"]]), precision="bf16", tp=int(row["tp"]))
            itl_s, out, rate_per_s = float(row["itl_mean_ms"]) / 1e3, float(row["output_len"]), float(row["rate_rps"])
            fresh = float(row["question_len"])
            context = fresh + float(row["system_prompt_len"]) + out / 2
            batch = rate_per_s * out * itl_s
            step = (batch, batch * context, rate_per_s * itl_s * fresh, rate_per_s * itl_s * fresh * context, batch)
            assert itl_s > latency.floor_s(profile, (batch, batch * context, 0, 0, batch))
            draws = [latency.draw(profile, np.random.default_rng(seed)) for seed in range(60)]
            noise = np.exp(np.random.default_rng(0).normal(0, profile.residual_log_sd, 60))
            low, high = np.quantile(np.array([latency.step_s(d, step) for d in draws]) * noise, [0.05, 0.95])
            inside.append(bool(low <= itl_s <= high))
    print(f"{sum(inside)} of {len(inside)} inside the 90 % band")  # noqa: T201
    assert len(inside) >= 20
    assert np.mean(inside) > 0.5
