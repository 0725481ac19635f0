"""Models that are more than one queue: balancing, batches, priorities, networks, tokens, traffic that changes over the day."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from mlsys_bench.errors import BadInput, unknown
from mlsys_bench.journeys.truth.known import Known, Number, numbers_of, relative, solved
from mlsys_bench.journeys.truth.parameters import UNBOUNDED, Parameters
from mlsys_bench.queueing.answer import EXACT, Effort, poisson_rate
from mlsys_bench.queueing.batches import BatchQueue
from mlsys_bench.queueing.batches import batches as batch_queue
from mlsys_bench.queueing.des import events
from mlsys_bench.queueing.laws import Exponential, Law
from mlsys_bench.queueing.station import Balanced, Batches, ForkJoin, Network, Policy, Priorities, Slots, Stage, Tokens, tandem
from mlsys_bench.queueing.times import Time

POLICIES: dict[str, Policy] = {"random": "random", "round_robin": "round_robin", "jsq": "jsq", "least_work": "least_work"}
BATCH_ERROR = 0.005  # of a simulated mean batch


def poisson(rate: float) -> Law:
    """Return the time between arrivals of a Poisson stream."""
    return Exponential(1 / rate)


def priorities(model: str, p: Parameters, effort: Effort) -> Known:
    """Return classes by priority, each with its lambda1, lambda2 …; PRIO-PR interrupts."""
    servers = p.whole("c", 1)
    mean_s = p.number("mean_service", 1.0)
    rates: list[float] = []
    while p.has(f"lambda{len(rates) + 1}"):
        rates.append(p.number(f"lambda{len(rates) + 1}"))
    if len(rates) < 2:
        raise BadInput("parameters lambda1, lambda2 … are the arrival rates of the classes: at least two are needed")
    service = p.law("service", mean_s, "exp")
    system = Priorities(
        arrivals=tuple(map(poisson, rates)), services=(service,) * len(rates), servers=servers, preemptive=model.startswith("PRIO-PR")
    )
    p.all_read()
    return solved(system, effort)


def balanced(model: str, p: Parameters, effort: Effort) -> Known:
    """Return one stream dealt to N servers with a queue each; `po2` asks two of them, and N = inf is its mean field."""
    mean_s, rho, name = p.number("mean_service", 1.0), p.number("rho"), p.text("policy")
    service = p.law("service", mean_s, "exp")
    chosen = re.fullmatch(r"po(\d+)", name)
    if not chosen and name not in POLICIES:
        raise unknown("policy", name, [*POLICIES, "po2"])
    if p.text("N").lower() in UNBOUNDED:
        return _mean_field(p, service, rho / mean_s, int(chosen[1]) if chosen else 0)
    queues = p.whole("N")
    system = Balanced(
        arrivals=p.law("arrival", mean_s / (rho * queues), "exp"),
        service=service,
        queues=queues,
        policy="power_of_d" if chosen else POLICIES[name],
        choices=int(chosen[1]) if chosen else 2,
    )
    p.all_read()
    return solved(system, effort)


def _mean_field(p: Parameters, service: Law, rate_per_s: float, choices: int) -> Known:
    """Return power of d choices with infinitely many servers, each offered `rate_per_s`."""
    from mlsys_bench.queueing.balancing import power_of_d_mean_field

    if choices < 1 or not isinstance(service, Exponential) or p.text("arrival", "exp") != "exp":
        raise BadInput("N=inf is known for po2, po3 … with Poisson arrivals and exponential service only")
    p.all_read()
    queue, _ = power_of_d_mean_field(rate_per_s, service.mean_s, math.inf, choices)
    return Known(
        laws={"wait": queue.wait, "sojourn": queue.sojourn},
        numbers=numbers_of(queue),
        method="mean field",
        why="the limit of infinitely many queues",
        expected_error=EXACT,
    )


def forkjoin(model: str, p: Parameters, effort: Effort) -> Known:
    """Return jobs that send one task to each of N servers."""
    mean_s = p.number("mean_service", 1.0)
    system = ForkJoin(
        arrivals=p.law("arrival", mean_s / p.number("rho"), "exp"), service=p.law("service", mean_s, "exp"), branches=p.whole("N")
    )
    p.all_read()
    return solved(system, effort)


def in_line(model: str, p: Parameters, effort: Effort) -> Known:
    """Return stations one after another: `mu=1|2`, or `stages(mu:c)=1.0:10|2.5:5`."""
    rate = p.number("lambda")
    text = p.text("stages(mu:c)") if p.has("stages(mu:c)") else p.text("mu")
    stages = tuple(_stage(part) for part in text.split("|"))
    p.all_read()
    return solved(tandem(poisson(rate), stages), effort)


def _stage(text: str) -> Stage:
    mu, _, servers = text.partition(":")
    try:
        rate, count = float(mu), int(servers or "1")
    except ValueError:
        raise BadInput(f"stage {text!r} is not of the form MU or MU:SERVERS") from None
    if not (rate > 0 and math.isfinite(rate) and count > 0):
        raise BadInput(f"stage {text!r} needs a rate and servers above 0")
    return Stage(service=Exponential(1 / rate), servers=count)


def feedback(model: str, p: Parameters, effort: Effort) -> Known:
    """Return one server whose customers return with probability `p_feedback`."""
    again = p.number("p_feedback", zero=True)
    if again >= 1:
        raise BadInput(f"parameter p_feedback={again:g} must be below 1")
    system = Network(
        arrivals=poisson(p.number("lambda")),
        stages=(Stage(service=Exponential(1 / p.number("mu")), servers=p.whole("c", 1)),),
        entry=(1.0,),
        routing=((again,),),
    )
    p.all_read()
    return solved(system, effort)


def slots(model: str, p: Parameters, effort: Effort) -> Known:
    """Return a replica with `max_batch` slots and room for K, whose step takes alpha + beta n and whose requests want `tokens` steps."""
    p.spells_out("iter", "alpha+beta*n")
    p.spells_out("total_rate(n)", "n/(tokens*(alpha+beta*n))")
    n = np.arange(1, p.whole("max_batch") + 1)
    rates = n / (p.number("tokens") * (p.number("alpha", zero=True) + p.number("beta", zero=True) * n))
    system = Slots(rate_per_s=p.number("lambda"), completions_per_s=tuple(map(float, rates)), capacity=p.whole("K") if p.has("K") else None)
    p.all_read()
    return solved(system, effort)


def inferno(model: str, p: Parameters, effort: Effort) -> Known:
    """Return the means that llm-inferno's queue-analysis gives for a replica: times in ms, rates per second."""
    from mlsys_bench.queueing.inferno import inferno as means

    found = means(
        p.number("RPS") / 1000,
        max_batch=p.whole("maxBatch"),
        max_queue=p.whole("maxQueue"),
        input_tokens=p.number("inTok", zero=True),
        output_tokens=p.number("outTok"),
        alpha_s=p.number("alpha", zero=True),
        beta_s=p.number("beta", zero=True),
        gamma_s=p.number("gamma", zero=True),
    )
    p.all_read()
    numbers = {
        "avgRespTime_ms": found.sojourn_s,
        "avgWaitTime_ms": found.wait_s,
        "avgNumInServ": found.mean_in_service,
        "avgTTFT_ms": found.ttft_s,
        "avgITL_ms": found.itl_s,
        "maxRPS": 1000 * found.most_per_s,
        "stable": 1.0,
    }
    why = "its own formulas over a birth-death chain"
    return Known(laws={}, numbers={name: Number(x) for name, x in numbers.items()}, method="llm-inferno", why=why, expected_error=EXACT)


def tokens(model: str, p: Parameters, effort: Effort) -> Known:
    """Return a replica that batches token by token, simulated: the law of TTFT, E2E and ITL, and the batch over time."""
    from mlsys_bench.queueing.des.tokens_replicate import replicate_tokens

    p.spells_out("step", "a0+b0*n+k0*kv+pf*prompt_admitted")
    (prompts, prompt_range), (outputs, output_range) = p.lengths("prompt"), p.lengths("output")
    system = Tokens(
        arrivals=p.law("arrival", 1 / p.number("lambda"), "exp"),
        prompt_tokens=prompts,
        output_tokens=outputs,
        prompt_range=prompt_range,
        output_range=output_range,
        fixed_s=p.number("a0", zero=True),
        per_sequence_s=p.number("b0", zero=True),
        per_kv_token_s=p.number("k0", 0.0, zero=True),
        per_prompt_token_s=p.number("pf", 0.0, zero=True),
        max_batch=p.whole("max_batch"),
        kv_tokens=p.number("kv_tokens"),
    )
    p.all_read()
    found = replicate_tokens(system, seed=effort.seed, half_width=min(effort.tolerance, 0.02), budget_s=effort.budget_s)
    laws: dict[str, Time] = {"ttft": found.ttft, "e2e": found.e2e}
    laws |= {name: law for name, law in (("tpot", found.tpot), ("itl", found.itl)) if law is not None}
    return Known(
        laws=laws,
        numbers={
            "stable": Number(1.0),
            "utilisation": Number(found.utilisation, found.half_width),
            "time_avg_batch": Number(found.mean_batch, relative(found.mean_batch_interval, found.mean_batch)),
        },
        method="simulation",
        why=f"step by step, {found.runs} runs of {found.requests:,} requests in {found.seconds:.1f} s",
        expected_error=found.half_width,
    )


def batches(model: str, p: Parameters, effort: Effort) -> Known:
    """Return dynamic batching: a batch of n takes (alpha n + beta) X; the chain of batches where it is exact, else simulation."""
    p.spells_out("batch_time", "(alpha*n+beta)*X")
    noise = p.law("X", 1.0, "det")
    system = Batches(
        arrivals=p.law("arrival", 1 / p.number("lambda"), "exp"),
        fixed_s=p.number("beta", zero=True),
        per_request_s=p.number("alpha", zero=True),
        max_batch=p.whole_or_none("max_batch"),
        max_wait_s=p.number("max_wait", 0.0, zero=True),
        noise=None if noise.scv == 0 else noise,
        servers=p.whole("c", 1),
    )
    p.all_read()
    return _batches(system, effort)


def slowest(model: str, p: Parameters, effort: Effort) -> Known:
    """Return the longest of N exponential times, with no queue before them."""
    from mlsys_bench.queueing.forkjoin import max_of

    law = max_of(Exponential(p.number("mean", 1.0)), p.whole("N"))
    p.all_read()
    return Known(laws={"": law}, numbers={}, method="maximum", why="P(T > t) = 1 - (1 - P(S > t))^N", expected_error=EXACT)


def _batches(system: Batches, effort: Effort) -> Known:
    exact = _exact_batches(system)
    if exact is None or exact.queue is None:
        known = solved(system, effort)
        means = _simulated_means(system, effort.seed) if exact is None else _means(exact)
        return dataclasses.replace(known, numbers={**known.numbers, **means})
    laws: dict[str, Time] = {"wait": exact.queue.wait, "sojourn": exact.queue.sojourn}
    why = "the chain of batches, and the laws of wait and sojourn that follow from it"
    numbers = {**numbers_of(exact.queue), **_means(exact)}
    return Known(laws=laws, numbers=numbers, method="batches", why=why, expected_error=EXACT)


def _exact_batches(system: Batches) -> BatchQueue | None:
    """Return what is computed of one server with Poisson arrivals, None where it is not."""
    rate = poisson_rate(system.arrivals)
    if rate is None or system.servers > 1:
        return None
    try:
        return batch_queue(
            rate,
            fixed_s=system.fixed_s,
            per_request_s=system.per_request_s,
            max_batch=system.max_batch,
            max_wait_s=system.max_wait_s,
            noise=system.noise,
        )
    except BadInput:  # noise beside a timer, or a timer longer than a batch: simulated instead
        return None


def _means(exact: BatchQueue) -> dict[str, Number]:
    """Return what is exact even where percentiles are simulated."""
    numbers = {
        "sojourn_mean_batch": exact.mean_batch,
        "sojourn_util": exact.utilisation,
        "utilisation": exact.utilisation,
        "sojourn_mean": exact.sojourn_s,
        "wait_mean": exact.wait_s,
        "inoue_bound": exact.bound_s,
    }
    return {name: Number(value) for name, value in numbers.items() if value is not None and math.isfinite(value)}


def _simulated_means(system: Batches, seed: int) -> dict[str, Number]:
    """Return the mean batch and the share of time a server works."""

    def busy() -> float:
        return (system.fixed_s / _mean_batch(system, seed) + system.per_request_s) / system.arrivals.mean_s / system.servers

    return {
        "sojourn_mean_batch": Number(lambda: _mean_batch(system, seed), BATCH_ERROR),
        "sojourn_util": Number(busy, BATCH_ERROR),
        "utilisation": Number(busy, BATCH_ERROR),
    }


def _mean_batch(system: Batches, seed: int) -> float:
    """Return the mean over batches of their size, simulated: n requests ride in a sum of 1 / size batches."""
    visits = events.simulator(system)(np.random.default_rng(seed), 16, 100_000)
    assert visits.kind is not None
    return float(1 / np.mean(1 / visits.kind[:, 20_000:]))
