"""What a candidate could do at best, from a few readings of its clock: the order in which a search looks at hundreds of them.

A full replica admits a = slots / stay requests a step, stay = output - 1 + chunks of the prompt: each step then carries on average
a (output - 1) decodes and a prompts.  Where the time of a step is convex in what it carries, the time of that average step is no longer
than the mean time (Jensen), and a / time is a bound on capacity.  The weights of experts that are hit are concave: least are read where
prompts come all together, in as few full steps as can be.  The smaller of the two counts, with some slack for what is between; a test holds
the bound against the full model.

Nobody waits less than alone on a replica: `alone` gives those latencies, and a limit they miss is missed by any fleet.
"""

from __future__ import annotations

import numpy as np

from mlsys_bench import latency
from mlsys_bench.batching import Limits
from mlsys_bench.plan.analytic import memory_slots
from mlsys_bench.plan.demand import Demand
from mlsys_bench.plan.latencies import Floats, Latencies
from mlsys_bench.types import LatencyProfile

SLACK = 1.12
_SAMPLES = 256  # requests whose latencies alone are worked out


def most_per_s(profile: LatencyProfile, limits: Limits, demand: Demand) -> float:
    """Return a rate that one replica cannot exceed, whatever its latencies.  The demand fits the limits."""
    prompt, output, budget = demand.prompt, demand.output, float(limits.max_step_tokens)
    slots = max(1, min(limits.max_seqs, memory_slots(limits, demand)))
    by_slots = slots / (demand.mean_output - 1 + float(np.ceil(prompt / budget).mean()))
    by_budget = budget / (float(prompt.mean()) + float(output.mean()) - 1)
    admitted = min(by_slots, by_budget)
    decodes = admitted * (demand.mean_output - 1)
    context, tokens, pairs = demand.held_tokens[0], admitted * demand.mean_prompt, admitted * float((prompt**2).mean()) / 2
    mean_s = latency.step_s(profile, (decodes, decodes * context, tokens, pairs, decodes + admitted))
    full = tokens / budget  # share of the steps, were prompts to come in full steps only
    apart_s = (1 - full) * latency.step_s(profile, (decodes, decodes * context, 0.0, 0.0, decodes))
    apart_s += full * latency.step_s(profile, (decodes, decodes * context, budget, pairs / full, decodes + admitted / full))
    return SLACK * admitted / min(mean_s, apart_s)


def alone(profile: LatencyProfile, limits: Limits, demand: Demand) -> Latencies:
    """Return what requests see that have a replica to themselves."""
    prompt, output, budget = demand.prompt[:_SAMPLES], demand.output[:_SAMPLES], float(limits.max_step_tokens)
    overhead_s = profile.constants.get("request_overhead_s", 0.0) + profile.constants.get("token_overhead_s", 0.0)
    token_s = np.asarray(latency.step_s(profile, _of_one(prompt + output / 2)))
    ttft = np.full(len(prompt), overhead_s)
    for past in np.arange(0.0, prompt.max(), budget):
        chunk = np.clip(prompt - past, 0.0, budget)
        last = (chunk > 0) & (past + chunk >= prompt)
        step_s = latency.step_s(profile, (0 * chunk, 0 * chunk, chunk, chunk * (past + chunk / 2), last.astype(float)))
        ttft += np.where(chunk > 0, step_s, 0.0)
    several = output > 1
    return Latencies(
        ttft_s=ttft,
        tpot_s=np.where(several, token_s, np.nan),
        e2e_s=ttft + np.where(several, (output - 1) * token_s, 0.0),
        itl_s=token_s[several],
        itl_weights=output[several] - 1,
    )


def _of_one(context_tokens: Floats) -> tuple[Floats, ...]:
    """Return the features of steps in which one sequence decodes."""
    one = np.ones_like(context_tokens)
    return one, context_tokens, 0 * one, 0 * one, one
