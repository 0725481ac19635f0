"""The options of `mlsys simulate` that are several settings in one: what happens around the replicas, and how they batch."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from mlsys_bench import models, units
from mlsys_bench import plan as planner
from mlsys_bench.batching import Policy, presets
from mlsys_bench.errors import BadInput, unknown
from mlsys_bench.journeys import settings

if TYPE_CHECKING:
    from mlsys_bench.journeys.simulation import Asked
    from mlsys_bench.simulate import Autoscaling, Conditions, Disaggregation, Failures, Retries

_RETRIES: dict[str, settings.Parse] = {
    "times": settings.whole, "first": units.seconds, "most": units.seconds, "jitter": units.fraction, "budget": units.fraction,
}  # fmt: skip
_FAILURES: dict[str, settings.Parse] = {"mtbf": units.seconds, "repair": units.seconds, "at": lambda text, where: _moment(text, where)}
_SCALING: dict[str, settings.Parse] = {
    "in_flight": settings.number, "queue": settings.number, "kv": units.fraction, "rate": units.per_s,
    "min": settings.whole, "max": settings.whole, "cold-start": units.seconds, "every": units.seconds, "down-delay": units.seconds,
}  # fmt: skip
_APART: dict[str, settings.Parse] = {"prefill": settings.whole, "link": settings.bandwidth, "latency": units.seconds}


def conditions(asked: Asked, candidate: planner.Candidate, prompt_tokens: float = 1.0) -> Conditions:
    """Return what happens around the replicas, for prompts of so many tokens on average."""
    from mlsys_bench.simulate import Conditions

    return Conditions(
        timeout_s=units.seconds(asked.timeout, "--timeout") if asked.timeout else None,
        retries=_retries(asked.retries) if asked.retries else None,
        failures=_failures(asked.failures, asked) if asked.failures else None,
        autoscaling=_scaling(asked.autoscale, asked.replicas) if asked.autoscale else None,
        disaggregation=_apart(asked.disaggregate, candidate, prompt_tokens) if asked.disaggregate else None,
    )


def _retries(text: str) -> Retries:
    from mlsys_bench.simulate import Retries

    given = settings.parse(text, "--retries", _RETRIES, main="times")
    names = {"first": "first_s", "most": "most_s"}
    return Retries(attempts=1 + given.pop("times", 2), **{names.get(key, key): value for key, value in given.items()})


def _failures(text: str, asked: Asked) -> Failures:
    from mlsys_bench.simulate import Failures

    given = settings.parse(text, "--failures", _FAILURES, needed=("repair",))
    at = given.get("at", [])
    times = tuple(at) if isinstance(at, list) else (at,)
    if not times and "mtbf" not in given:
        raise BadInput(f"--failures {text}: say when, with mtbf=10h or at=60s:0 (the replica numbered 0 fails after a minute)")
    missing = [replica for _, replica in times if replica >= asked.replicas]
    if missing and not asked.autoscale:
        raise BadInput(f"--failures {text}: there is no replica {missing[0]}; the {asked.replicas} of --replicas are numbered from 0")
    return Failures(repair_s=given["repair"], mtbf_s=given.get("mtbf"), times=times)


def _moment(text: str, where: str) -> tuple[float, int]:
    """Return a time and a replica: '60s:0'."""
    time, _, replica = text.partition(":")
    return units.seconds(time, where), settings.whole(replica or "0", where)


def _scaling(text: str, replicas: int) -> Autoscaling:
    from mlsys_bench.simulate import METRICS, Autoscaling

    given = settings.parse(text, "--autoscale", _SCALING, needed=("max", "cold-start"))
    metrics = [name for name in METRICS if name in given]
    if len(metrics) != 1:
        raise BadInput(f"--autoscale {text}: name one of {', '.join(METRICS)} and what one replica should carry of it, e.g. in_flight=32")
    if replicas > given["max"]:
        raise BadInput(f"--autoscale {text}: the fleet begins with the {replicas} of --replicas, more than its max")
    if replicas < given.get("min", 1):
        raise BadInput(
            f"--autoscale {text}: the fleet begins with the {replicas} of --replicas, less than its min; add --replicas {given['min']}"
        )
    if metrics[0] == "kv" and given["kv"] > 1:
        raise BadInput(f"--autoscale {text}: kv is a share of the KV memory; above 100% nothing would ever be added")
    names = {"min": "least", "max": "most", "cold_start": "cold_start_s", "every": "interval_s", "down_delay": "down_delay_s"}
    return Autoscaling(
        metric=metrics[0], target=given.pop(metrics[0]), **{names[key]: value for key, value in given.items()}  # type: ignore[arg-type]
    )  # fmt: skip


def _apart(text: str, candidate: planner.Candidate, prompt_tokens: float) -> Disaggregation:
    """Return prefill and decode apart; every device sends its share of the cache over a link of its own."""
    from mlsys_bench.simulate import Disaggregation

    given = settings.parse(text, "--disaggregate", _APART, needed=("prefill", "link"))
    kv_bytes = _kv_bytes_per_token(candidate, "--disaggregate", prompt_tokens)
    return Disaggregation(
        prefill_replicas=given["prefill"], kv_bytes_per_token=kv_bytes, link_bytes_per_s=given["link"], latency_s=given.get("latency", 0.0)
    )


def prefill_replicas(text: str) -> int:
    """Return how many replicas only prefill."""
    found: int = settings.parse(text, "--disaggregate", _APART, needed=("prefill", "link"))["prefill"]
    return found


# ---------------------------------------------------------------- how a replica batches

_MEMORY_RULES = {"vllm-v1": "vllm", "sglang": "sglang", "trtllm": "trtllm"}
_KINDS = ("continuous", "prefill-first", "dynamic", "static")
_STATIC_WAIT_S = 60.0  # for a batch that does not fill
_BATCHING: dict[str, settings.Parse] = {"kind": lambda text, where: _kind(text, where), "wait": units.seconds}
_PREEMPTION: dict[str, settings.Parse] = {"kind": lambda text, where: text, "link": settings.bandwidth}
_OFFLOAD: dict[str, settings.Parse] = {"size": units.size_bytes, "link": settings.bandwidth}
_DRAFTS: dict[str, settings.Parse] = {"drafts": settings.whole, "acceptance": units.fraction}


def as_engine(asked: Asked, request: planner.Request, candidate: planner.Candidate) -> planner.Candidate:
    """Return the design with the limits that an engine has by default; as it is where none is named."""
    engine = _preset(asked, candidate)
    if engine is None:
        return candidate
    if "kv_tokens" in candidate.profile.constants or candidate.device is None:
        raise BadInput(f"--engine {asked.engine}: the profile says how its own engine was set; name an engine for a design nobody measured")
    layout, lengths = candidate.profile.layout, request.workload
    max_seqs = asked.max_batch or engine.max_seqs
    budget = models.kv_budget_tokens(
        models.find(layout.model), candidate.device, precision=layout.precision, tp=layout.tp, pp=layout.pp, max_seqs=max_seqs,
        memory_share=engine.memory_share, max_step_tokens=engine.max_step_tokens, engine=_MEMORY_RULES[engine.id],
        context_tokens=math.ceil(lengths.prompt_tokens.mean + lengths.output_tokens.mean / 2),
    )  # fmt: skip
    if budget.tokens < engine.block_tokens:
        raise BadInput(f"--engine {asked.engine}: {candidate.name} has no memory left for a KV cache; try more GPUs (--tp)")
    limits = engine.limits(budget.tokens, candidate.limits.max_context)._replace(max_seqs=max_seqs)
    return dataclasses.replace(candidate, limits=limits)


def engine_name(asked: Asked, candidate: planner.Candidate) -> str | None:
    """Return the engine whose defaults are simulated, with its version."""
    engine = _preset(asked, candidate)
    return None if engine is None else f"{engine.id} {engine.version}"


def _preset(asked: Asked, candidate: planner.Candidate) -> presets.Preset | None:
    if asked.engine is None:
        return None
    memory_bytes = candidate.device.memory_bytes if candidate.device else 80e9
    return presets.preset(asked.engine, device=candidate.gpu, memory_bytes=memory_bytes)


def policy(asked: Asked, candidate: planner.Candidate, prompt_tokens: float = 1.0) -> Policy:
    """Return the rules a replica batches by, for prompts of so many tokens on average."""
    engine = _preset(asked, candidate)
    rules = engine.policy if engine else Policy()
    rules = rules if asked.prefix_cache else rules._replace(prefix_cache=0)
    rules = _batched(rules, asked.batching) if asked.batching else rules
    rules = _preempting(rules, asked.preemption, candidate, prompt_tokens) if asked.preemption else rules
    rules = _offloading(rules, asked.kv_offload, candidate, prompt_tokens) if asked.kv_offload else rules
    if asked.speculate:
        given = settings.parse(asked.speculate, "--speculate", _DRAFTS, main="drafts", needed=("drafts", "acceptance"))
        if not given["drafts"]:
            raise BadInput(f"--speculate {asked.speculate}: 0 drafts is no speculation; leave it out, or write 3,acceptance=70%")
        rules = rules._replace(drafts=given["drafts"], acceptance=given["acceptance"])
    return rules


def _kind(text: str, where: str) -> str:
    if text not in _KINDS:
        raise unknown("kind of batching", text, _KINDS, where)
    return text


def _batched(rules: Policy, text: str) -> Policy:
    given = settings.parse(text, "--batching", _BATCHING, main="kind", needed=("kind",))
    kind, wait_s = given["kind"], given.get("wait")
    if kind in ("continuous", "prefill-first"):
        if wait_s is not None:
            raise BadInput(f"--batching {text}: only dynamic and static batches wait to fill")
        return rules._replace(prefill_first=int(kind == "prefill-first"))
    if kind == "dynamic" and wait_s is None:
        raise BadInput(f"--batching {text}: say how long a batch may wait to fill, e.g. dynamic,wait=50ms")
    return rules._replace(gather=1, gather_s=_STATIC_WAIT_S if wait_s is None else wait_s)


def _preempting(rules: Policy, text: str, candidate: planner.Candidate, prompt_tokens: float) -> Policy:
    given = settings.parse(text, "--preemption", _PREEMPTION, main="kind", needed=("kind",))
    if given["kind"] == "recompute":
        if "link" in given:
            raise BadInput(f"--preemption {text}: what is computed again moves over no link; leave it out, or say swap")
        return rules
    if given["kind"] != "swap":
        raise unknown("kind of preemption", given["kind"], ("recompute", "swap"), "--preemption")
    if "link" not in given:
        raise BadInput(f"--preemption {text}: say how fast the cache moves to the host, e.g. swap,link=25GB/s")
    return rules._replace(swap=1, move_s=_block_bytes(candidate, "--preemption", prompt_tokens) / given["link"])


def _offloading(rules: Policy, text: str, candidate: planner.Candidate, prompt_tokens: float) -> Policy:
    """Return the rules with room in host memory for cached prefixes; size and link are those of each GPU."""
    given = settings.parse(text, "--kv-offload", _OFFLOAD, main="size", needed=("size", "link"))
    if not rules.prefix_cache:
        raise BadInput(f"--kv-offload {text}: host memory keeps cached prefixes, and there is no prefix cache; leave one of the two out")
    block_bytes = _block_bytes(candidate, "--kv-offload", prompt_tokens)
    move_s = block_bytes / given["link"]
    if rules.swap and not math.isclose(move_s, rules.move_s):
        raise BadInput(f"--kv-offload {text}: --preemption swaps over another link; GPU and host are joined by one: give it one speed")
    return rules._replace(host_blocks=math.floor(given["size"] / block_bytes), move_s=move_s)


def _block_bytes(candidate: planner.Candidate, option: str, prompt_tokens: float) -> float:
    """Return the bytes of a KV block on one GPU."""
    return _kv_bytes_per_token(candidate, option, prompt_tokens) * candidate.limits.block_tokens


def _kv_bytes_per_token(candidate: planner.Candidate, option: str, prompt_tokens: float) -> float:
    """Return the KV cache of a token on one GPU, of a prompt of so many tokens.

    Layers that attend to a window keep the last tokens alone; those that attend to the best few keep all.
    """
    constants = candidate.profile.constants
    found, bound = constants.get("kv_bytes_per_token"), constants.get("window_tokens", 0.0)
    if found is None:
        raise BadInput(f"{option}: the profile does not say how many bytes the KV cache of a token takes (kv_bytes_per_token)")
    if not bound:
        return found
    kept = 1.0 if models.find(candidate.profile.layout.model).index_topk else min(bound / prompt_tokens, 1.0)
    return found + constants.get("window_kv_bytes_per_token", 0.0) * kept
