"""Sequences of a step attend in groups of about equal length: what is computed does not change, and little is computed for nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import models
from mlsys_bench.batching import StepPlan
from mlsys_bench.engine import groups, runner, spec, weights
from mlsys_bench.engine.kv import KVCache
from mlsys_bench.engine.model import Model

CPU = torch.device("cpu")
KEYS = st.lists(st.integers(1, 2000), min_size=1, max_size=40).map(sorted)


def padded(keys: list[int], ends: list[int]) -> int:
    """Return the keys that are read: each group is as long as its longest."""
    starts = [0, *ends[:-1]]
    return sum((end - start) * keys[end - 1] for start, end in zip(starts, ends, strict=True))


@given(KEYS, st.floats(0, 5000))
def test_groups_are_worth_what_they_cost(keys: list[int], worth: float) -> None:
    ends = groups.group_ends(np.array(keys), worth)
    assert ends == sorted(set(ends))
    assert ends[-1] == len(keys)
    assert padded(keys, ends) + worth * (len(ends) - 1) <= len(keys) * keys[-1]


@given(KEYS)
def test_groups_that_cost_nothing_leave_no_padding(keys: list[int]) -> None:
    assert padded(keys, groups.group_ends(np.array(keys), 0)) == sum(keys)


def test_one_long_context_among_short_ones_stands_alone() -> None:
    assert groups.group_ends(np.array([64] * 15 + [768]), 128) == [15, 16]
    assert groups.group_ends(np.array([100, 104, 108, 112]), 128) == [4]


@pytest.mark.parametrize("chunk", [0, 5])
def test_grouped_sequences_get_the_logits_that_they_get_together(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Seven sequences in no order of length, alone or beside a chunk of another's prompt; in one group, in some, and each in its own."""
    a = models.find("nano")
    model = Model(
        spec.plain(a), weights.random(spec.plain(a), precision="fp32", device=CPU, seed=1), precision="fp32", max_context=512, device=CPU
    )
    lengths = [40, 3, 300, 41, 3, 150, 17]
    rows = len(lengths) + 1
    table = np.random.default_rng(2).permutation(rows * 32).reshape(rows, 32)
    known = {row: np.random.default_rng(row).integers(0, 256, 400).tolist() for row in range(rows)}
    work = [(row, n - 1, 1) for row, n in enumerate(lengths)] + ([(rows - 1, 6, chunk)] if chunk else [])

    def logits(group_bytes: int) -> torch.Tensor:
        monkeypatch.setattr(groups, "_GROUP_BYTES", {"cpu": group_bytes})
        cache = KVCache(a, blocks=rows * 32, block_tokens=16, dtype=torch.float32, device=CPU)
        cache.data.normal_(generator=torch.Generator().manual_seed(3))
        row, start, tokens = np.array(work).T
        plan = runner.order_of(StepPlan(row, start, tokens, np.ones(len(work), dtype=bool), np.zeros(0, dtype=np.int64)))
        step = runner.step_input(plan, known, table, cache)
        numbers.append(len(groups.grouped(step, cache).singles))
        return model.forward(step, cache)[np.argsort(plan.rows)]

    numbers: list[int] = []
    together, some, apart = (logits(size) for size in (2**30, 64 * 1024, 0))
    assert numbers == [1, 4, 6]
    assert torch.allclose(some, together, atol=1e-4)
    assert torch.allclose(apart, together, atol=1e-4)
    assert together.std() > 0.1, "logits of one size would agree whatever was computed"
