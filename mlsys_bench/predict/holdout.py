"""Which measurements to learn from and which to predict, so that nothing predicted was learned from.

A group is never on both sides, but where a part of a sweep is left out on purpose (`interior`, `first_points`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from mlsys_bench.predict.experiment import Experiment

Fold = tuple[tuple[Experiment, ...], tuple[Experiment, ...]]  # to learn from, to predict


def leave_one_out(experiments: Sequence[Experiment], key: Callable[[Experiment], Hashable]) -> dict[Hashable, Fold]:
    """Return for each value of a key what is learned without it and what is then predicted."""
    found: dict[Hashable, Fold] = {}
    for value in dict.fromkeys(key(e) for e in experiments):
        test = tuple(e for e in experiments if key(e) == value)
        gone = {e.group for e in test}
        found[value] = (tuple(e for e in experiments if key(e) != value and e.group not in gone), test)
    return found


def interior(experiments: Sequence[Experiment], count: int | None = None) -> list[Fold]:
    """Return folds that each leave at most one interior concurrency out of a sweep; over all folds each is left out once.

    A sweep is a group.  Repeats at one concurrency leave together; the least and the greatest always stay: nothing is extrapolated.
    What leaves is dealt to the folds in turn, so that of other sweeps most stays.  By default there are as many folds as the longest
    sweep has interior concurrencies; more leave fewer out at once, and take longer to learn.
    """
    sweeps: dict[str, set[int]] = {}
    for e in experiments:
        if e.concurrency is not None:
            sweeps.setdefault(e.group, set()).add(e.concurrency)
    inner = {group: sorted(levels)[1:-1] for group, levels in sweeps.items()}
    count = max(count or 0, *map(len, inner.values()), 0)
    dealt = {place: i % count for i, place in enumerate((group, level) for group, levels in inner.items() for level in levels)}
    folds = []
    for fold in range(count):
        leaves = [dealt.get((e.group, e.concurrency or 0)) == fold for e in experiments]
        train, test = (tuple(e for e, gone in zip(experiments, leaves, strict=True) if gone == side) for side in (False, True))
        folds.append((train, test))
    return [fold for fold in folds if fold[1]]


def first_points(experiments: Sequence[Experiment], key: Callable[[Experiment], Hashable]) -> Fold:
    """Return the first measured experiment of each value of a key, and all others of values that have more than one."""
    points: dict[Hashable, Experiment] = {}
    for e in experiments:
        points.setdefault(key(e), e)
    taken = {e.key for e in points.values()}
    rest = tuple(e for e in experiments if e.key not in taken)
    return tuple(points.values()), rest
