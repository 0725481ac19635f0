"""What a candidate could do at best, from a few readings of its clock: the order in which a search looks at hundreds of them.

A full replica admits a = slots / stay requests a step, stay = output - 1 + chunks of the prompt: each step then carries on average
a (output - 1) decodes and a prompts.  Where the time of a step is convex in what it carries, the time of that average step is no longer
than the mean time (Jensen), and a / time is a bound on capacity.  The weights of experts that are hit are concave: least are read where
prompts come all together, in as few full steps as can be.  The smaller of the two counts, with some slack for what is between; a test holds
the bound against the full model.

Nobody waits less than alone on a replica: `alone` gives those latencies, and a limit they miss is missed by any fleet.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlsys_bench import latency
from mlsys_bench.batching import Limits
from mlsys_bench.plan.analytic import memory_slots
from mlsys_bench.plan.demand import Demand
from mlsys_bench.plan.latencies import Floats, Latencies
from mlsys_bench.types import LatencyProfile

SLACK = 1.12
_SAMPLES = 256  # requests whose latencies alone are worked out


class Clocks:
    """The clocks of several candidates side by side: hundreds are read in little more time than one."""

    def __init__(self, profiles: Sequence[LatencyProfile]) -> None:
        self.table = latency.tables(profiles)  # one candidate in each column
        self.overheads = [latency.overhead(p) for p in profiles]

    def most_per_s(self, limits: Sequence[Limits], demand: Demand) -> Floats:
        """Return rates that single replicas cannot exceed, whatever their latencies.  The demand fits all limits."""
        prompt, more = demand.prompt, demand.mean_output - 1
        slots = np.array([max(1, min(each.max_seqs, memory_slots(each, demand))) for each in limits])
        budgets, of = np.unique([float(each.max_step_tokens) for each in limits], return_inverse=True)
        chunks = np.array([float(np.ceil(prompt / budget).mean()) for budget in budgets])
        budget = budgets[of]
        admitted = np.minimum(slots / (more + chunks[of]), budget / (demand.mean_prompt + more))
        decodes = admitted * more
        context, tokens, pairs = demand.held_tokens[0], admitted * demand.mean_prompt, admitted * float((prompt**2).mean()) / 2
        none, full = 0 * tokens, tokens / budget  # share of the steps, were prompts to come in full steps only
        mean_s, without_s, with_s = latency.many(
            self.table[:, None],
            (
                np.stack([decodes, decodes, decodes]),
                np.stack([decodes, decodes, decodes]) * context,
                np.stack([tokens, none, budget]),
                np.stack([pairs, none, pairs / full]),
                decodes + np.stack([admitted, none, admitted / full]),
            ),
        )
        return np.asarray(SLACK * admitted / np.minimum(mean_s, (1 - full) * without_s + full * with_s))

    def alone(self, limits: Sequence[Limits], demand: Demand) -> list[Latencies]:
        """Return what requests see that have a replica to themselves."""
        prompt, output = demand.prompt[:_SAMPLES], demand.output[:_SAMPLES]
        table, budget = self.table[:, :, None], np.array([[float(each.max_step_tokens)] for each in limits])
        token_s = latency.many(table, _of_one(prompt + output / 2))
        ttft = np.array([over.seconds(prompt) for over in self.overheads])
        past = np.zeros_like(budget)
        while (past < prompt.max()).any():
            chunk = np.clip(prompt - past, 0.0, budget)
            last = (chunk > 0) & (past + chunk >= prompt)
            step_s = latency.many(table, (0 * chunk, 0 * chunk, chunk, chunk * (past + chunk / 2), last))
            ttft, past = ttft + np.where(chunk > 0, step_s, 0.0), past + budget
        several = output > 1
        e2e, tpot = ttft + np.where(several, (output - 1) * token_s, 0.0), np.where(several, token_s, np.nan)
        whose = None if demand.tenant is None else demand.tenant[:_SAMPLES]
        theirs = None if whose is None else whose[several]
        weights = output[several] - 1
        return [
            Latencies(
                ttft_s=first,
                tpot_s=each,
                e2e_s=all_of_it,
                itl_s=token[several],
                itl_weights=weights,
                tenant=whose,
                tenants=demand.tenants,
                itl_tenant=theirs,
            )
            for first, each, all_of_it, token in zip(ttft, tpot, e2e, token_s, strict=True)
        ]


def most_per_s(profile: LatencyProfile, limits: Limits, demand: Demand) -> float:
    """Return a rate that one replica cannot exceed, whatever its latencies.  The demand fits the limits."""
    return float(Clocks([profile]).most_per_s([limits], demand)[0])


def alone(profile: LatencyProfile, limits: Limits, demand: Demand) -> Latencies:
    """Return what requests see that have a replica to themselves."""
    return Clocks([profile]).alone([limits], demand)[0]


def _of_one(context_tokens: Floats) -> tuple[Floats, ...]:
    """Return the features of steps in which one sequence decodes."""
    one = np.ones_like(context_tokens)
    return one, context_tokens, 0 * one, 0 * one, one
