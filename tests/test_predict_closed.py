"""Closed loops: tiles of experts, ranks of data-parallel attention, a prefill pool, drafts and reserved memory; by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from mlsys_bench import hardware, latency, models
from mlsys_bench.latency import coefficients, kernel
from mlsys_bench.latency.physics import layout_constants
from mlsys_bench.predict import Experiment, field, learning
from mlsys_bench.predict.figures import _tokens as tokens_of
from mlsys_bench.predict.figures import design, figures, seats_of, slopes
from mlsys_bench.types import Lengths

EXPERTS, CHOSEN, TILE = 128, 8, 64.0


def expert_rows(tokens: float) -> float:
    """Return the rows that experts compute in a step, in units of tokens, read off a table with nothing but experts' FLOPs."""
    table = [0.0] * kernel.SIZE
    table[kernel.EXPERT_READ], table[kernel.EXPERT_FLOPS] = 1e-12, 1.0
    table[kernel.MISSED], table[kernel.TILE] = 1 - CHOSEN / EXPERTS, TILE
    return kernel.seconds(table, tokens, 0.0, 0.0, 0.0, 0.0)


def asked(**changed: Any) -> Experiment:
    return dataclasses.replace(
        Experiment(
            key="a", group="a", model="deepseek-r1", device="B200", engine="sglang", precision="fp8", tp=8, moe_tp=8, concurrency=64,
            prompt_tokens=Lengths(mean=8192), output_tokens=Lengths(mean=1024),
        ),
        **changed,
    )  # fmt: skip


def test_one_token_fills_a_tile_of_each_expert_it_chose() -> None:
    assert expert_rows(1) == pytest.approx(TILE, abs=1.0)


def test_a_large_batch_wastes_half_a_tile_of_each_expert() -> None:
    assert expert_rows(8192) == pytest.approx(8192 + TILE / 2 * EXPERTS / CHOSEN, rel=0.01)


@pytest.mark.parametrize("tokens", [0.0, 1.0, 7.0, 64.0, 4096.0])
def test_the_two_forms_of_a_step_agree_on_tiles(tokens: float) -> None:
    table = [0.0] * kernel.SIZE
    table[kernel.EXPERT_READ], table[kernel.EXPERT_FLOPS], table[kernel.NORM] = 1e-3, 1e-6, 4.0
    table[kernel.MISSED], table[kernel.TILE] = 1 - CHOSEN / EXPERTS, TILE
    features = (tokens, 0.0, 0.0, 0.0, tokens)
    assert latency.many(table, features) == pytest.approx(kernel.seconds(table, *features), rel=1e-12)


def test_each_rank_of_attention_schedules_its_own_sequences() -> None:
    c = dict(zip(coefficients.NAMES, np.exp(coefficients.ASSUMED_LOG).tolist(), strict=True))
    shape, device = models.find("deepseek-r1"), hardware.find("B200")
    one = coefficients.terms(c, layout_constants(shape, device, precision="fp8", tp=8, ep=8))
    ranks = coefficients.terms(c, layout_constants(shape, device, precision="fp8", attention_dp=8, ep=8))
    assert ranks["sequence_s"] == pytest.approx(one["sequence_s"] / 8)


def test_fewer_drafts_give_fewer_tokens_of_the_same_chance() -> None:
    most = 1 + 0.5 + 0.25 + 0.125
    assert tokens_of(most, 1) == pytest.approx(1.5, rel=1e-6)
    assert tokens_of(most, 3) == pytest.approx(most, rel=1e-6)


def test_an_engine_that_reserves_the_whole_answer_seats_fewer() -> None:
    long = Lengths(mean=8192)
    vllm, trtllm = (
        seats_of(asked(engine=engine, output_tokens=long, model="llama-3.1-70b", tp=2, moe_tp=1)) for engine in ("sglang", "trtllm")
    )
    assert trtllm < vllm


def test_a_prefill_pool_is_never_faster_than_its_capacity_and_keeps_waiting_requests_out_of_the_batch() -> None:
    """Twice the clients of a pool that is the bottleneck: the same throughput, so the same batch; the others wait."""
    split = {"disaggregated": True, "prefill_gpus": 8, "decode_gpus": 8, "prefill_tp": 8}
    few, many = asked(concurrency=512, **split), asked(concurrency=1024, **split)
    d = design([few, many])
    tpot, ttft = (np.exp(v) for v in figures(d, coefficients.ASSUMED_LOG))
    per_s = np.array([512, 1024]) / (ttft + 1023 * tpot)
    assert per_s[1] == pytest.approx(per_s[0], rel=0.05)
    assert tpot[1] == pytest.approx(tpot[0], rel=0.1)
    assert ttft[1] > 2 * ttft[0]


def test_an_interval_of_a_wait_that_may_or_may_not_come_holds_what_it_says() -> None:
    """From far below a pool's capacity to far above: of 1,000 systems drawn from what is known, slopes' intervals hold too few."""
    split = {"disaggregated": True, "prefill_gpus": 8, "decode_gpus": 8, "prefill_tp": 8}
    rows = [asked(concurrency=n, **split) for n in (1, 32, 64, 1024)]
    part = learning.learn(()).parts[coefficients.CLOSED]
    groups, places, d = field.codes(rows, {}), field.place(rows), design(rows)
    nobody = field.Points(
        row=np.zeros(0, dtype=np.int64), kind=np.zeros(0, dtype=np.int64), slope=np.zeros((0, 0)),
        groups={name: codes[:1] for name, codes in groups.items()}, place=places[:1],
    )  # fmt: skip
    known = field.spread(part.given, nobody)
    slope = slopes(d, np.tile(part.mean, (len(rows), 1)))[1]
    straight = np.sqrt(np.einsum("ij,jk,ik->i", slope, known, slope))
    systems = np.random.default_rng(9).multivariate_normal(part.mean, known, 1000)
    off = np.abs([figures(d, x)[1] - figures(d, part.mean)[1] for x in systems])
    bent = learning._bent(rows, part, slope, straight, groups, places)
    assert ((off <= field.Z90 * straight).mean(axis=0) < 0.8).all()
    held = (off <= field.Z90 * bent).mean(axis=0)
    assert (np.abs(held - 0.9) < 0.06).all()  # 256 draws know a 0.9 quantile to +- 0.02 (sd), 1,000 systems a share to 0.01


def test_where_a_wait_is_known_its_interval_stays_as_narrow() -> None:
    rows = [asked(concurrency=64, disaggregated=True, prefill_gpus=8, decode_gpus=8, prefill_tp=8)]
    part = learning.learn(()).parts[coefficients.CLOSED]
    slope = slopes(design(rows), part.mean[None])[1]
    claimed = np.array([0.02])
    assert learning._bent(rows, part, slope, claimed, field.codes(rows, {}), field.place(rows)) == pytest.approx(claimed, rel=0.25)


def test_devices_of_two_boards_wait_for_the_network() -> None:
    shape, device = models.find("deepseek-r1"), hardware.find("H100")
    near, far = (latency.shares(shape, device, precision="fp8", tp=tp) for tp in (8, 16))
    assert near["rounds"] == pytest.approx(2 * shape.layers * math.log2(8))
    assert far["rounds"] == pytest.approx(2 * shape.layers * (math.log2(8) + 7))
    assert far["link_s_per_token"] > near["link_s_per_token"]
