"""Why one plan differs from another: each cause alone, the steps add up, and the records alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from mlsys_bench.plan.difference import ORDER, Figures, Inputs, by_record, by_replanning, changes_in, in_words, inputs_of, replaced
from mlsys_bench.types import Lengths, Plan
from tests import sample_records


def carries(inputs: Inputs) -> float:
    """Return what a replica carries: a small planner whose answers can be worked out by hand."""
    slower = 2.0 if inputs.slo.startswith("ttft_p95<250ms") else 1.0
    return inputs.max_batch / 256 * 25 / slower * 512 / inputs.workload.prompt_tokens.mean


def replan(inputs: Inputs) -> Figures:
    replicas = math.ceil(inputs.workload.rate_per_s / carries(inputs))
    usd = None if inputs.usd_per_device_h is None else replicas * inputs.usd_per_device_h
    return Figures(replicas=replicas, gpus=replicas, usd_per_hour=usd)


def plan(rate: float = 200.0, prompt: float = 512, usd: float = 8.0, **changes: Any) -> Plan:
    """Return a plan as that planner makes it."""
    base = sample_records.plan()
    traffic = dataclasses.replace(base.workload, rate_per_s=rate, prompt_tokens=Lengths(dist="constant", mean=prompt))
    offer = dataclasses.replace(base.prices[0], devices=1, usd_per_h=usd)
    made = dataclasses.replace(base, workload=traffic, prices=(offer,), **changes)
    figures = replan(inputs_of(made))
    return dataclasses.replace(made, replicas=figures.replicas, gpus=figures.gpus, usd_per_hour=figures.usd_per_hour)


def test_the_same_plan_differs_in_nothing() -> None:
    found = by_replanning(plan(), plan(), replan)
    assert found.steps == ()
    assert by_record(plan(), plan()).steps == ()
    assert in_words(found)[0] == "8 replicas, 8 GPUs, $64.00/h -> 8 replicas, 8 GPUs, $64.00/h (+0 replicas, +$0.00/h)"


def test_every_cause_alone_takes_the_whole_change() -> None:
    cases = {
        "traffic": plan(rate=400.0),
        "lengths": plan(prompt=1024),
        "limits": plan(slo="ttft_p95<250ms"),
        "engine": plan(max_batch=128),
        "price": plan(usd=10.0),
    }
    for cause, new in cases.items():
        found = by_replanning(plan(), new, replan)
        assert [step.cause for step in found.steps] == [cause]
        assert found.steps[0].replicas == (0 if cause == "price" else 8)
        assert found.steps[0].usd_per_hour == pytest.approx(16 if cause == "price" else 64)


def test_causes_together_are_taken_in_the_stated_order_and_add_up() -> None:
    """200 -> 300/s is 12 replicas, then twice the prompt 24, then half the batch 48, then $8 -> $6."""
    old, new = plan(), plan(rate=300.0, prompt=1024, max_batch=128, usd=6.0)
    found = by_replanning(old, new, replan)
    assert [(s.cause, s.replicas, s.usd_per_hour) for s in found.steps] == [
        ("traffic", 4, 32.0), ("lengths", 12, 96.0), ("engine", 24, 192.0), ("price", 0, -96.0),
    ]  # fmt: skip
    assert sum(s.replicas for s in found.steps) == new.replicas - old.replicas
    assert old.usd_per_hour is not None
    assert new.usd_per_hour is not None
    assert sum(s.usd_per_hour or 0 for s in found.steps) == pytest.approx(new.usd_per_hour - old.usd_per_hour)
    words = in_words(found)
    assert "  traffic: +4 replicas, +$32.00/h" in words
    assert "    rate: 200/s -> 300/s" in words
    assert "  price: +0 replicas, -$96.00/h" in words
    assert words[-1].startswith("  (planned anew after each cause, in the order traffic, lengths")


def test_what_records_do_not_hold_is_a_line_of_its_own() -> None:
    more = dataclasses.replace(plan(), replicas=10, gpus=10, usd_per_hour=80.0)
    found = by_replanning(plan(), more, replan)
    assert [(s.cause, s.replicas) for s in found.steps] == [("remainder", 2)]
    assert "headroom" in found.steps[0].changes[0]


def test_replacing_every_cause_gives_the_new_inputs() -> None:
    old, new = inputs_of(plan()), inputs_of(plan(rate=300.0, prompt=1024, max_batch=128, usd=6.0, slo="e2e_p99<9s", model="llama-2-7b"))
    current = old
    for cause in ORDER:
        if any(changes_in(cause, current, new)):
            current = replaced(cause, current, new)
    assert current == new
    assert [cause for cause in ORDER if any(changes_in(cause, old, new))] == ["traffic", "lengths", "limits", "model", "engine", "price"]


def test_the_records_alone_tell_three_factors() -> None:
    """300/s of 200 on 8 replicas are 12 at $8; 48 are there, so 36 for what a replica carries; then the price, -$96."""
    old, new = plan(), plan(rate=300.0, prompt=1024, max_batch=128, usd=6.0)
    found = by_record(old, new)
    assert [(s.cause, s.replicas, s.usd_per_hour) for s in found.steps] == [
        ("traffic", 4, 32.0), ("what a replica carries", 36, 288.0), ("price of a replica", 0, -96.0),
    ]  # fmt: skip
    assert any("prompt tokens: 512 -> 1024" in line for line in found.steps[1].changes)
    assert found.method.startswith("from the two records")


def test_plans_without_a_price_still_compare_replicas() -> None:
    old = dataclasses.replace(plan(), usd_per_hour=None)
    found = by_record(old, dataclasses.replace(plan(rate=400.0), usd_per_hour=None))
    assert [(s.cause, s.replicas, s.usd_per_hour) for s in found.steps] == [("traffic", 8, None)]
    assert "price unknown" in in_words(found)[1]


def test_a_mixed_change_of_hardware_is_told() -> None:
    base = plan()
    moved = dataclasses.replace(base, fleet=(dataclasses.replace(base.fleet[0], gpu="A100-80GB-SXM", tp=2),))
    assert list(changes_in("hardware", inputs_of(base), inputs_of(moved))) == [
        "GPU: h100-sxm -> A100-80GB-SXM", "tp, pp, ep, dp: (1, 1, 1, 1) -> (2, 1, 1, 1)",
    ]  # fmt: skip
