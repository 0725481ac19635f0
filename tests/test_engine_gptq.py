"""Rounding for the outputs: against round-to-nearest, and against what can be worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench.engine import formats, gptq, spec, train
from mlsys_bench.engine.formats import Groups4
from mlsys_bench.engine.weights import Weights

GROUP = 32


def gaussian(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def correlated(seed: int, rows: int, inputs: int) -> torch.Tensor:
    """Return inputs of which a few directions carry most, as activations do."""
    return gaussian(seed, rows, inputs // 4) @ gaussian(seed + 1, inputs // 4, inputs) + 0.3 * gaussian(seed + 2, rows, inputs)


def error(kept: Groups4, weight: torch.Tensor, x: torch.Tensor) -> float:
    """Return how far outputs are off, as a share of their size."""
    exact = x @ weight.T
    return float((x @ kept.dequantise().T - exact).norm() / exact.norm())


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 60), st.sampled_from([32, 64]))
def test_without_correlation_it_is_round_to_nearest_bit_for_bit(seed: int, outputs: int, pairs: int, group: int) -> None:
    """Whatever the sizes of the inputs, and so the order of the columns, and with a short last group."""
    weight, sizes = gaussian(seed, outputs, 2 * pairs), gaussian(seed + 1, 2 * pairs).square()
    kept, nearest = gptq.quantise(weight, torch.diag(sizes), group, search=False), formats.groups4(weight, group)
    assert torch.equal(kept.weight, nearest.weight)
    assert torch.equal(kept.scale, nearest.scale)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("search", [False, True])
def test_outputs_of_correlated_inputs_are_closer_than_with_round_to_nearest(seed: int, search: bool) -> None:
    """On inputs that it has not seen, too: it learns their correlation, not the sample."""
    weight, x = gaussian(seed + 10, 48, 150), correlated(seed, 1000, 150)
    seen, unseen = x[:600], x[600:]
    kept, nearest = gptq.quantise(weight, seen.T @ seen, GROUP, search=search), formats.groups4(weight, GROUP)
    assert error(kept, weight, seen) < 0.8 * error(nearest, weight, seen)
    assert error(kept, weight, unseen) < 0.9 * error(nearest, weight, unseen)


def test_the_error_of_a_column_is_made_good_by_the_next_as_least_squares_says() -> None:
    """Two inputs that are nearly one: the first is taken up by 0.4 steps, so the second goes down by 0.4 H12 / (H22 + damping)."""
    weight = torch.tensor([[2.6, 1.3, 8.0]])  # 8.0 sets the scale to -1; steps are -2.6, -1.3
    moments = torch.tensor([[2.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 3.0]])
    step, factor = torch.full((1, 3), 1.0), gptq._factor(moments.clone())
    damped = moments + gptq.DAMPING * 2.0 * torch.eye(3)
    assert float(-factor[0, 1]) == pytest.approx(float(damped[0, 1] / damped[1, 1]), rel=1e-5)
    assert gptq._rounded(weight, step, factor).tolist() == [[3, 1, 7]], "1.3 - 0.4 * 0.88 = 0.95 goes to 1"
    assert gptq._rounded(torch.tensor([[2.6, 1.7, 8.0]]), step, factor).tolist() == [[3, 1, 7]], "to the nearest it would be 2"


def test_the_order_of_columns_is_by_the_size_of_their_inputs() -> None:
    """Input 1 is large: its weight is rounded first and exactly as it is; input 0 makes good for it."""
    weight, x = torch.tensor([[0.30, 0.26, -0.8, 0.0]]), gaussian(1, 400, 4) * torch.tensor([1.0, 9.0, 1.0, 1.0])
    x[:, 0] += x[:, 1] / 9
    kept = gptq.quantise(weight, x.T @ x, 4, search=False)
    assert kept.integers()[0, 1] == formats.groups4(weight, 4).integers()[0, 1]
    assert error(kept, weight, x) <= error(formats.groups4(weight, 4), weight, x)


def test_inputs_that_never_vary_do_no_harm() -> None:
    weight, x = gaussian(2, 8, 64), correlated(3, 200, 64)
    x[:, 5:9] = 0.0
    kept = gptq.quantise(weight, x.T @ x, GROUP)
    assert bool(torch.isfinite(kept.dequantise()).all())
    assert torch.equal(gptq.quantise(weight, torch.zeros(64, 64), GROUP, search=False).weight, formats.groups4(weight, GROUP).weight), (
        "nothing known: to the nearest"
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 80))
def test_a_searched_scale_is_never_worse_than_the_plain_one(seed: int, outputs: int, pairs: int) -> None:
    weight, importance = gaussian(seed, outputs, 2 * pairs), gaussian(seed + 1, 2 * pairs).square()
    found = formats.with_scales(weight, formats.searched_scales4(weight, GROUP, importance), GROUP)
    lost = [((kept.dequantise() - weight).square() * importance).sum() for kept in (found, formats.groups4(weight, GROUP))]
    assert float(lost[0]) <= float(lost[1]) * (1 + 1e-5)


def test_layers_come_one_after_the_other_and_the_head_last() -> None:
    names = ["lm_head", *(f"model.layers.{i}.{part}" for i in range(11) for part in ("self_attn.qkv", "mlp.down_proj"))]
    stages = gptq._stages(names)
    assert stages[10] == ["model.layers.10.self_attn.qkv", "model.layers.10.mlp.down_proj"]
    assert stages[-1] == ["lm_head"]
    assert len(stages) == 12


def test_every_matrix_of_a_decoder_is_rounded_with_what_it_is_given() -> None:
    """The calibration is run once a layer and once for the head; each run sees the layers before it rounded already."""
    shape = dataclasses.replace(train.byte_shape(), layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, ffn=64, vocab=40)
    tensors, seen = {k: t.detach() for k, t in train.fresh(shape, 0).items()}, []

    def run(held: Weights) -> None:
        x = correlated(7, 40, shape.hidden)
        for layer in held.layers:
            assert layer.gate_up is not None
            assert layer.down is not None
            layer.qkv(x)
            layer.o(x)
            layer.gate_up(x)
            layer.down(correlated(8, 40, shape.ffn))
        held.head(x)
        seen.append(held.layers[0].qkv.tensors()[0].clone())

    found = gptq.decoder(spec.plain(shape), tensors, run, group=64)
    assert len(found) == 4 * shape.layers + 1
    assert len(seen) == shape.layers + 1
    first = found["model.layers.0.self_attn.qkv"]
    assert not torch.equal(seen[0], first.dequantise())
    assert all(torch.equal(later, first.dequantise()) for later in seen[1:])
