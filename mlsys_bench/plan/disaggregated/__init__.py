"""Prefill and decode on pools of their own, as a design among the others: planned where it is cheaper than whole replicas, or all there is.

`weighed` asks the planner for its best fleet of whole replicas, looks at pairs of pools that could cost less (`pairs`: bounds, then
theory), lets simulation confirm them (`confirm`), and returns the cheaper plan (`answer`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlsys_bench import units
from mlsys_bench.errors import Infeasible
from mlsys_bench.plan.demand import Demand
from mlsys_bench.plan.disaggregated import answer, confirm, pairs
from mlsys_bench.plan.disaggregated.pairs import Pair
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.search import Bound
from mlsys_bench.plan.sizing import Design, Rank
from mlsys_bench.plan.trial import Trial
from mlsys_bench.types import Alternative, FleetItem, Plan

__all__ = ["Looked", "Made", "look", "weighed"]

SIZED = 3  # pairs of candidates that are worked out at most
CONFIRMED = 2  # pairs that are simulated at most
NEAR = 1.15  # times the cost of the best one so far: theory does not err by more
CHEAPER = 0.005  # dollars an hour that are worth two pools
Made = tuple[Plan, Design, Trial]


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What a look at pairs found: the confirmed one, or else the best by theory, or else only what any costs at least.

    `missed` pairs that could be cheaper keep no limit by theory, and `beyond` are more than may be rented in one place.
    """

    confirmed: tuple[Pair, Trial] | None = None
    sized: Pair | None = None
    least_usd_per_h: float | None = None  # new money: what is committed is paid in any case
    missed: int = 0
    beyond: int = 0


def weighed(request: Request, bounds: Sequence[Bound], traffic: Demand, whole: Callable[[], Made]) -> Made:
    """Return the plan of the cheaper design: whole replicas, as `whole` plans them, or two pools.

    Raises Infeasible where neither keeps the limits, or, asked for pools only, where no pair does.
    """
    if request.disaggregate == "only":
        return _only(request, look(request, bounds, traffic, None))
    try:
        made, design, trial = whole()
    except Infeasible as error:
        found = look(request, bounds, traffic, None)
        if found.confirmed is None:
            raise
        pair, seen = found.confirmed
        return answer.plan(request, pair, seen, (), (f"no fleet of whole replicas will do: {error}",)), pair.decode, seen
    found = look(request, bounds, traffic, _below(design))
    if found.confirmed is not None and found.confirmed[0].link.is_guess:
        return _offered(made, *found.confirmed, request), design, trial
    if found.confirmed is not None:
        pair, seen = found.confirmed
        others = (_of_whole(made, pair), *(_against(other, pair) for other in made.alternatives))
        return answer.plan(request, pair, seen, others, ()), pair.decode, seen
    return _beside(made, design, found, request), design, trial


def look(request: Request, bounds: Sequence[Bound], traffic: Demand, below: Rank | None) -> Looked:
    """Return the best pair that costs less than `below`, as far as one does."""
    every = pairs.promising(request, bounds, None)
    least = every[0].key[1] if every and not every[0].key[0] else None
    sized: list[Pair] = []
    missed = beyond = 0
    for promising in [x for x in every if below is None or x.key < below][:SIZED]:
        if sized and min(map(Pair.sort_key, sized)) <= promising.key:
            break
        pair = pairs.sized(request, promising, traffic)
        if pair is None:
            missed += 1
        elif not _affordable(pair, request):
            beyond += 1
        else:
            sized.append(pair)
    sized.sort(key=Pair.sort_key)
    best: tuple[Pair, Trial] | None = None
    for pair in sized[:CONFIRMED]:
        most = below if best is None else best[0].sort_key()
        if best is not None and (pair.usd_per_h or 0.0) > NEAR * (best[0].usd_per_h or 0.0):
            break
        if most is None or _least_of(pair, request).sort_key() < most:
            judged = confirm.confirmed(pair, request)
            if judged is not None and _affordable(judged[0], request) and (most is None or judged[0].sort_key() < most):
                best = judged
    return Looked(confirmed=best, sized=sized[0] if sized else None, least_usd_per_h=least, missed=missed, beyond=beyond)


def _affordable(pair: Pair, request: Request) -> bool:
    """Say whether a pair has a price, or is of a device that nobody prices: one beyond a quota is no plan."""
    return pair.usd_per_h is not None or not request.shelf.sells(pair.decode.candidate.gpu)


def _least_of(pair: Pair, request: Request) -> Pair:
    """Return a pair with the replicas that capacity alone asks for: theory may be too pessimistic about the rest."""
    return pair.resized(min(pair.prefill.fewest, pair.prefill.replicas), min(pair.decode.fewest, pair.decode.replicas), request.shelf)


def _below(design: Design) -> Rank:
    """Return the rank that a pair must beat: cheaper in dollars, or where nothing has a price with fewer devices."""
    unpriced, usd, devices, _ = design.sort_key()
    return (unpriced, usd - CHEAPER, 0, 0.0) if not unpriced else (True, 0.0, devices, -1e9)


def _only(request: Request, found: Looked) -> Made:
    if found.confirmed is None:
        by_theory = None if found.sized is None else found.sized.name
        why = "theory finds no pair of pools that keeps" if by_theory is None else f"{by_theory} keeps by theory, not in simulation,"
        raise Infeasible(
            f"--disaggregate only: {why} the limits; allow more time for the limit nearest to breaking, or leave --disaggregate out"
        )
    pair, seen = found.confirmed
    return answer.plan(request, pair, seen, (), ()), pair.decode, seen


def _of_whole(made: Plan, pair: Pair) -> Alternative:
    """Return the best fleet of whole replicas as the alternative to a pair."""
    item: FleetItem = made.fleet[0]
    return Alternative(
        gpu=item.gpu, precision=item.precision, tp=item.tp, pp=item.pp, ep=item.ep, attention_dp=item.attention_dp,
        max_batch=made.max_batch, max_step_tokens=made.max_step_tokens, replicas=made.replicas, usd_per_hour=made.usd_per_hour,
        predicted=made.predicted, why_not=f"prefill and decode in one: {answer.dearer(made.usd_per_hour, pair.usd_per_h)}",
    )  # fmt: skip


def _against(other: Alternative, pair: Pair) -> Alternative:
    """Return an alternative to whole replicas as one to a pair: what it costs more."""
    found = re.match(r"(at least )?(?:\$\S+/h more|as dear, (?:not better|more devices))", other.why_not)
    return other if found is None else dataclasses.replace(
        other, why_not=f"{found[1] or ''}{answer.dearer(other.usd_per_hour, pair.usd_per_h)}{other.why_not[found.end() :]}"
    )  # fmt: skip


def _offered(made: Plan, pair: Pair, seen: Trial, request: Request) -> Plan:
    """Return the plan of whole replicas with a cheaper pair beside it, which is planned only once its link is known."""
    saved = f"{answer.dearer(made.usd_per_hour, pair.usd_per_h).replace(' more', ' less')}, over a network nobody named"
    note = (
        f"prefill and decode apart, {answer.in_words(pair)}, would cost {saved}: "
        "say what it carries with --disaggregate auto,link=10GB/s, or plan it with --disaggregate only"
    )
    other = answer.alternative(pair, seen, request, saved)
    return dataclasses.replace(made, alternatives=(other, *made.alternatives), notes=(*made.notes, note))


def _beside(made: Plan, design: Design, found: Looked, request: Request) -> Plan:
    """Return the plan of whole replicas with what two pools would have been."""
    if found.sized is not None:
        other = answer.alternative(found.sized, None, request, _beaten(found.sized, design))
        return dataclasses.replace(made, alternatives=(*made.alternatives, other))
    if found.least_usd_per_h is None:
        return made
    return dataclasses.replace(made, notes=(*made.notes, _none_cheaper(found, found.least_usd_per_h, request)))


def _beaten(pair: Pair, design: Design) -> str:
    """Return why a pair that was worked out by theory is not the plan; what is committed counts for nothing."""
    (unpriced, usd, *_), (unknown, than, *_) = pair.sort_key(), design.sort_key()
    if unpriced or unknown:
        return answer.dearer(None, None)
    return "cheaper by theory, not in simulation" if usd < than - CHEAPER else answer.dearer(usd, than)


def _none_cheaper(found: Looked, least_usd_per_h: float, request: Request) -> str:
    """Return why no pair was worked out: none can be cheaper, or those that could keep no limit, or are more than may be rented."""
    new = " of new money" if any(held.committed for held in request.shelf.market.reservations.values()) else ""
    usd, pools = f"{units.show_usd(least_usd_per_h)}/h{new}", "prefill and decode on pools of their own"
    if not (found.missed or found.beyond):
        return f"{pools} cost {usd} at least: no cheaper"
    kept = ["keeps the limits by theory"] if found.missed else []
    rented = ["may be rented in one region"] if found.beyond else []
    return f"{pools} cost {usd} at least, but no pair that was looked at {' and '.join(kept + rented)}"
