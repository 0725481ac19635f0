"""One clock: what a fit minimises, what a profile says, and what simulators and planners are compiled from are the same number."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import hardware, jit, latency, models
from mlsys_bench.latency import kernel, physics, solve, step
from mlsys_bench.types import Bench, LatencyProfile, Launch, Layout, Measurement, Provenance, Round, Scalar

KINDS = {"dense": "llama-2-7b", "GQA": "llama-3-8b", "MLA and experts": "deepseek-v3", "experts": "mixtral-8x7b", "windows": "gpt-oss-20b"}
TERMS = {"step_s": 2e-3, "sequence_s": 2e-5, "weights": 1.25, "linear": 1.5, "kv": 1.6, "attention": 2.5, "pack_s": 1e-4}
CEILINGS = {"bandwidth_bytes_per_s": 3.35e12, "peak_flops_per_s": 989e12, "pack_tokens": 24.0}
GRID = [
    *((b, b * c, 0, 0, b) for b in (1, 4, 16, 32, 64, 128) for c in (128, 1024, 4096)),
    *((0, 0, n, n * (past + n / 2), 1) for n in (128, 512, 2048, 8192) for past in (0, 2048)),
    (32, 32_000, 512, 512 * 256, 33),
]
HELD_OUT = [
    *((b, b * 900, 0, 0, b) for b in (2, 8, 48, 96)),
    *((0, 0, n, n * n / 2, 1) for n in (300, 1000, 4096)),
    (16, 16_000, 1024, 1024 * 512, 17),
]
STEPS = np.array([*GRID, *HELD_OUT, (1, 0, 0, 0, 0), (0, 0, 1, 0.5, 0)], dtype=float)


def known(model: str, *, norm: float | None = None, tp: int = 1) -> LatencyProfile:
    """Return a truth of the form that is fitted."""
    k = physics.constants_of(models.find(model), "bf16", tp) | CEILINGS
    return LatencyProfile(
        form="step",
        layout=Layout(model=model, precision="bf16", device="H100", tp=tp),
        stage=None,
        terms=tuple(TERMS),
        coefficients=tuple(TERMS.values()),
        covariance=tuple(map(tuple, np.diag(np.full(7, 0.01)).tolist())),
        constants=k if norm is None else k | {"roof_norm": norm},
        residual_log_sd=0.02,
        valid={},
        provenance=Provenance.CALIBRATED,
    )


def measured(truth: LatencyProfile) -> Bench:
    """Return the steps of `GRID`, and the machine's ceilings, without noise."""
    layout: dict[str, Scalar] = {"device": "H100", "model": truth.layout.model, "precision": "bf16", "tp": truth.layout.tp}

    def one(name: str, unit: str, value: float, **more: Scalar) -> Measurement:
        launch = Launch(started_s=0.0, rounds=(Round(values=(value,) * 3),))
        return Measurement(name=name, unit=unit, better="lower", parameters=layout | more, launches=(launch,))

    steps = [one("engine.step", "s", latency.step_s(truth, f), **dict(zip(latency.FEATURES, f, strict=True))) for f in GRID]
    return Bench(measurements=(*steps, one("memory.read", "B/s", 3.35e12), one("gemm", "FLOP/s", 989e12)))


@pytest.mark.parametrize(("kind", "norm"), [("dense", 2.0), ("GQA", None), ("MLA and experts", 2.0), ("experts", None), ("experts", 2.0)])
def test_a_fit_gives_a_known_profile_back_where_it_saw_it_and_where_it_did_not(kind: str, norm: float | None) -> None:
    """Noise-free steps of every kind of model: within 1 %, and the residual is what `step_s` misses of cells left out."""
    truth = known(KINDS[kind], norm=norm)
    profile = latency.fit(measured(truth))
    off = [latency.step_s(profile, f) / latency.step_s(truth, f) - 1 for f in (*GRID, *HELD_OUT)]
    assert max(map(abs, off)) < 0.01
    assert max(map(abs, off)) < 6 * profile.residual_log_sd + 1e-4
    assert profile.constants.get("roof_norm") == norm


def test_a_fit_follows_the_corner_that_operators_of_gpus_have() -> None:
    """A p-norm of 1.4, which the fit does not try, lies between two that it tries: steps are some 1 % off at most, not 2 to 4 %."""
    truth = known(KINDS["dense"], norm=1.4)
    profile = latency.fit(measured(truth))
    assert 1.2 < profile.constants["roof_norm"] < 1.6
    assert max(abs(latency.step_s(profile, f) / latency.step_s(truth, f) - 1) for f in (*GRID, *HELD_OUT)) < 0.015


def test_experts_are_read_while_they_are_multiplied() -> None:
    """Mixtral, 8,192 tokens: reading all experts takes 28 ms, multiplying two for each token 211 ms; the step takes the longer, no sum."""
    truth = dataclasses.replace(known("mixtral-8x7b"), coefficients=(1e-6, 1e-9, 1.0, 1.0, 1.0, 1.0, 1e-9))
    flops = 2 * 8192 * 32 * 2 * 3 * 4096 * 14336
    dense = 8192 * 2 * 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 4096 * 8)
    assert latency.step_s(truth, (0, 0, 8192, 0, 0)) == pytest.approx((flops + dense) / 989e12, rel=1e-3)
    assert latency.floor_s(truth, (0, 0, 8192, 0, 0)) == pytest.approx((flops + dense) / 989e12, rel=1e-3)


@pytest.mark.parametrize("model", KINDS.values(), ids=KINDS.keys())
@settings(max_examples=10, deadline=None)
@given(
    logs=st.lists(st.floats(-1.0, 3.0), min_size=8, max_size=8), norm=st.sampled_from([0.0, 1.0, 1.4, 4.0]), tp=st.sampled_from([1, 8]),
    stairs=st.sampled_from([{}, {"pass_tokens": 40.0}]),
)  # fmt: skip
def test_what_a_fit_minimises_is_what_the_profile_says(
    model: str, logs: list[float], norm: float, tp: int, stairs: dict[str, float]
) -> None:
    """Any coefficients, over models and layouts; constants of `roofline` too, which hold more classes than those of a fit."""
    x = (np.array(logs) - np.array([6, 10, 0, 0, 0, 0, 9, 9]))[: 7 + len(stairs)]
    bare = known(model, tp=tp)
    device = hardware.find("H100")
    for constants in (bare.constants, physics.layout_constants(models.find(model), device, precision="bf16", tp=tp)):
        k = constants | {"roof_norm": norm} | stairs
        exact = ((0.0,) * len(x),) * len(x)
        profile = dataclasses.replace(bare, terms=solve.names(k), coefficients=tuple(np.exp(x).tolist()), covariance=exact, constants=k)
        assert profile.terms[:7] == solve.FITTED == bare.terms
        assert np.exp(solve.predicted(x, STEPS.T, k)) == pytest.approx(latency.step_s(profile, list(STEPS.T)), rel=1e-12)


LAYOUTS = [
    pytest.param(model, {"tp": tp, "ep": ep, "attention_dp": dp}, id=f"{model}-tp{tp}-ep{ep}-dp{dp}")
    for model in (*KINDS.values(), "qwen3-next-80b-a3b", "deepseek-v3.2", "gemma-3-4b")
    for tp, ep, dp in ((1, 1, 1), (2, 1, 1), (8, 8, 1), (1, 8, 8))
    if (ep == 1 or models.find(model).experts)
]


@pytest.mark.parametrize(("model", "spread"), LAYOUTS)
def test_every_way_to_read_a_profile_shows_the_same_clock(model: str, spread: dict[str, int]) -> None:
    """`step_s` of one and of many, the simulator's plain and compiled clocks, and tables of several layouts at once."""
    arch, h100 = models.find(model), hardware.find("H100")
    roofline = latency.roofline(arch, h100, precision="bf16", **spread)  # type: ignore[arg-type]
    fitted = known(model)
    padded = dataclasses.replace(fitted, constants=fitted.constants | {"graph_stride": 8.0, "graph_end": 64.0})
    names, values = (*fitted.terms, "pass_s"), (*fitted.coefficients, 3e-4)
    exact, more = ((0.0,) * len(names),) * len(names), {"pass_tokens": 40.0}
    stairs = dataclasses.replace(fitted, terms=names, coefficients=values, covariance=exact, constants=fitted.constants | more)
    beside = latency.tables([roofline, fitted, padded, stairs])
    for i, profile in enumerate((roofline, fitted, padded, stairs)):
        alone = [latency.step_s(profile, tuple(s)) for s in STEPS.tolist()]
        clock, plain = latency.clock(profile), latency.table(profile).tolist()
        terms = step.coefficients(profile)
        assert [clock(s) for s in STEPS.tolist()] == alone
        assert [kernel.seconds(plain, *s) for s in STEPS.tolist()] == alone
        assert latency.step_s(profile, list(STEPS.T)) == pytest.approx(alone, rel=1e-9)
        assert latency.many(latency.entries(terms, profile.constants), STEPS.T) == pytest.approx(alone, rel=1e-9)
        assert latency.many(beside[:, i : i + 1], STEPS.T) == pytest.approx(alone, rel=1e-9)
        assert latency.many(beside[:, :, None], STEPS.T)[i] == pytest.approx(alone, rel=1e-9)
        assert (np.array(alone) >= np.asarray(latency.floor_s(profile, list(STEPS.T))) * (1 - 1e-12)).all()


def test_the_compiled_clock_is_the_plain_one() -> None:
    """Of each kind of model, with numba where it is installed."""
    pytest.importorskip("numba")
    fast = jit.fast(kernel.seconds)
    for model in KINDS.values():
        table = latency.table(latency.roofline(models.find(model), hardware.find("H100"), precision="bf16", tp=2))
        plain = table.tolist()
        assert [fast(table, *s) for s in STEPS.tolist()] == pytest.approx([kernel.seconds(plain, *s) for s in STEPS.tolist()], rel=1e-12)
