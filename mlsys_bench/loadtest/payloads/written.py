"""A schedule as what its requests carry: tokens become characters, what prompts share becomes blocks of text, turns follow turns."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest.content import Images
from mlsys_bench.loadtest.payloads import Spec
from mlsys_bench.loadtest.payloads.dataset import DataSet
from mlsys_bench.workload import Schedule, take
from mlsys_bench.workload.schedule import Ints


def spec(
    plan: Schedule,
    *,
    chars: Callable[[int], int],
    chars_per_token: float,
    seed: int,
    data: DataSet | None = None,
    images: Images | None = None,
) -> Spec:
    """Return what the requests of a schedule carry.  `chars` says how long the text of a prompt of so many tokens is.

    The schedule must have its waiting turns last, as `waiting_last` puts them.
    """
    after = _after(plan)
    waits = np.zeros(len(plan), dtype=bool)
    waits[after[after >= 0]] = True
    offsets, blocks = _shared_blocks(plan, waits)
    return Spec(
        prompt_chars=_chars(plan, after, chars, chars_per_token),
        output_tokens=plan.output_tokens.tolist(),
        seed=seed,
        block_chars=plan.prefix_block_tokens * chars_per_token,
        block_offsets=offsets.tolist() if len(blocks) else [],
        blocks=blocks.tolist(),
        tenants=list(plan.tenants) if plan.tenant is not None else [],
        tenant=plan.tenant.tolist() if plan.tenant is not None else [],
        rank=plan.rank.tolist() if plan.rank is not None else [],
        session=plan.session.tolist() if plan.session is not None else [],
        arrivals=int((~waits).sum()),
        after=after.tolist() if waits.any() else [],
        gap_s=plan.gap_s.tolist() if plan.gap_s is not None and waits.any() else [],
        records=[msgspec.Raw(msgspec.json.encode(row)) for row in data.rows] if data else [],
        images=list(images.urls) if images else [],
        image_pixels=images.pixels if images else None,
        images_each=images.each if images else 0,
    )


def waiting_last(plan: Schedule) -> Schedule:
    """Return the schedule with those that arrive by themselves first, in order of time, and the turns that wait for answers after them."""
    if plan.gap_s is None:
        return plan
    waits = np.isnan(plan.scheduled_s)
    return take(plan, np.concatenate([np.flatnonzero(~waits), np.flatnonzero(waits)]))


def _after(plan: Schedule) -> Ints:
    """Return for each row the row that waits for its answer, or -1."""
    after = np.full(len(plan), -1, dtype=np.int64)
    if plan.gap_s is None or plan.session is None or plan.turn is None:
        return after
    order = np.lexsort((plan.turn, plan.session))
    same = plan.session[order][1:] == plan.session[order][:-1]
    waits = np.isnan(plan.scheduled_s[order][1:])
    if (waits & ~same).any() or np.isnan(plan.scheduled_s[order[0]]):
        raise BadInput("a turn that waits for an answer follows no request of its session; was the trace cut through a session?")
    after[order[:-1][same & waits]] = order[1:][same & waits]
    return after


def _chars(plan: Schedule, after: Ints, chars: Callable[[int], int], chars_per_token: float) -> list[int]:
    """Return characters by row: of a whole prompt, or of what a turn adds to what was asked and answered before it."""
    found = [chars(tokens) for tokens in plan.prompt_tokens.tolist()]
    before = np.flatnonzero(after >= 0)
    new = plan.prompt_tokens[after[before]] - plan.prompt_tokens[before] - plan.output_tokens[before]
    for row, tokens in zip(after[before].tolist(), new.tolist(), strict=True):
        found[row] = max(1, round(max(1, tokens) * chars_per_token))
    return found


def _shared_blocks(plan: Schedule, waits: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> tuple[Ints, Ints]:
    """Return offsets and hashes of the blocks that a prompt has in common with another; what it has alone is text of its own.

    A hash covers all that comes before its block, so those in common stand first.  A later turn of a session shares by its conversation.
    """
    if plan.prefix_offsets is None or plan.prefix_hashes is None:
        return np.zeros(len(plan) + 1, dtype=np.int64), np.zeros(0, dtype=np.int64)
    row = np.repeat(np.arange(len(plan)), np.diff(plan.prefix_offsets))
    mine = ~waits[row]
    row, hashes = row[mine], plan.prefix_hashes[mine]
    _, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    shared = counts[which] > 1
    kept = np.bincount(row[shared], minlength=len(plan))
    return np.concatenate([[0], np.cumsum(kept)]).astype(np.int64), hashes[shared]
