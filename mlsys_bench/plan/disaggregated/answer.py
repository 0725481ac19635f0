"""A confirmed pair as a plan: two items in the fleet, figures of the whole, and what binds either pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from mlsys_bench import models, pricing, slo, units
from mlsys_bench.apart import Apart, PoolUse
from mlsys_bench.plan import sizing, words
from mlsys_bench.plan.disaggregated import confirm, spread
from mlsys_bench.plan.disaggregated.pairs import Pair, fleet, of_both, of_decode, of_prefill, station
from mlsys_bench.plan.disaggregated.stations import Decode
from mlsys_bench.plan.planner import fleet_item
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.sizing import Design
from mlsys_bench.plan.trial import Trial, corrections
from mlsys_bench.types import SLO, Alternative, Limit, Plan, Provenance

Interval = tuple[float, float]


def plan(request: Request, pair: Pair, trial: Trial, alternatives: tuple[Alternative, ...], notes: tuple[str, ...]) -> Plan:
    """Return the plan of a pair.  What a plan says once is said of the decode pool, which holds a request longest; `apart` has both."""
    decode = pair.decode.candidate
    analytic = _analytic(pair, request.slo) if request.trace is None else {}
    predicted = trial.keys(request.slo)
    found = spread.of(pair, trial, analytic, request)
    pools = tuple(_use(request, pool, name, predicted) for name, pool in (("prefill", pair.prefill), ("decode", pair.decode)))
    usd, lots = pair.usd_per_h, [lot for pool in (pair.prefill, pair.decode) if pool.price is not None for lot in pool.price.lots]
    return Plan(
        model=models.find(request.model).id,
        workload=request.workload,
        slo=slo.show(request.slo),
        fleet=(fleet_item(pair.prefill, "prefill"), fleet_item(pair.decode, "decode")),
        replicas=pair.replicas,
        gpus=pair.devices,
        gpu=decode.gpu,
        devices_per_replica=decode.devices,
        usd_per_hour=usd,
        usd_per_month=None if usd is None else pricing.usd_per_month(usd),
        usd_per_million_tokens=None if usd is None else _usd_per_million(pair, usd),
        utilisation=max(pool.utilisation for pool in pools),
        binding_constraint=f"{pools[0].binds} (prefill), {pools[1].binds} (decode)",
        headroom=_headroom(request, pair, predicted, analytic),
        provenance=Provenance.weakest(
            *(pool.provenance for pool in pools), pair.link.provenance, *(lot.offer.provenance for lot in lots)
        ),
        predicted=predicted,
        intervals=found | _per_token(pair, found),
        analytic=analytic,
        alternatives=alternatives,
        profile=decode.profile,
        capacity_per_replica_per_s=station(pair.decode).capacity_per_s,
        max_batch=decode.limits.max_seqs,
        max_step_tokens=decode.limits.max_step_tokens,
        kv_tokens_per_replica=decode.kv_tokens,
        assumptions=tuple(_assumptions(request, pair)),
        prices=tuple(dict.fromkeys(lot.offer for lot in lots)),
        notes=(*_notes(request, pair, trial), *_beyond(request, pair, found), *notes),
        apart=_apart(pair, (pools[0], pools[1])),
    )  # fmt: skip


def _analytic(pair: Pair, limits: SLO) -> dict[str, float]:
    rates = {
        "throughput_tokens_per_s": pair.decode.each_per_s * station(pair.decode).demand.mean_output,
        "request_rate_per_s": pair.decode.each_per_s,
    }
    return fleet(pair).predict(pair.rate_per_s).keys(limits) | rates


def _use(request: Request, pool: Design, stage: str, predicted: dict[str, float]) -> PoolUse:
    candidate, own = pool.candidate, station(pool)
    return PoolUse(
        stage=stage,
        replicas=pool.replicas,
        devices_per_replica=candidate.devices,
        utilisation=own.utilisation(pool.each_per_s),
        capacity_per_replica_per_s=own.capacity_per_s,
        max_batch=candidate.limits.max_seqs,
        max_step_tokens=candidate.limits.max_step_tokens,
        kv_tokens_per_replica=candidate.kv_tokens,
        binds=_binding(request, pool, predicted),
        provenance=candidate.profile.provenance,
    )


def _binding(request: Request, pool: Design, predicted: dict[str, float]) -> str:
    """Return what keeps a pool from being one replica smaller."""
    own = station(pool)
    if pool.replicas == 1:
        return "one replica at least"
    if pool.replicas > pool.fewest:
        mine = of_decode(request.slo) if isinstance(own, Decode) else of_prefill(request.slo)
        limit = pool.binds or _nearest((*mine, *of_both(request.slo)), predicted)
        if limit is not None:
            return slo.show_limit(limit)
    what = sizing.bottleneck(_inner(pool)) if isinstance(own, Decode) else "compute"
    return f"{100 * request.headroom:g} % headroom over {what}" if request.headroom > 1 - sizing.MOST else what


def _inner(pool: Design) -> Design:
    """Return the design of a decode pool with the model of its replicas that the planner knows."""
    own = station(pool)
    assert isinstance(own, Decode)
    return dataclasses.replace(pool, replica=own.inner)


def _nearest(limits: SLO, predicted: dict[str, float]) -> Limit | None:
    shares = [(predicted.get(f"{slo.key(limit)}_s", 0.0) / limit.limit, limit) for limit in slo.latencies(limits)]
    return max(shares, key=lambda s: s[0], default=(0.0, None))[1]


def _headroom(request: Request, pair: Pair, predicted: dict[str, float], analytic: dict[str, float]) -> float:
    """Return the extra traffic, as a share, until a limit breaks or a pool saturates: theory, scaled to agree with simulation today."""
    if request.trace is not None:
        return confirm.headroom(pair, request, request.trace)
    scaled, limits = corrections(predicted, analytic, request.slo), slo.latencies(request.slo)
    most_per_s, _ = sizing.highest_rate(fleet(pair), limits, sizing.MOST, scaled)  # type: ignore[arg-type]
    return max(0.0, most_per_s / pair.rate_per_s - 1)


def _usd_per_million(pair: Pair, usd: float) -> float:
    return pricing.usd_per_million_tokens(usd, pair.rate_per_s * station(pair.decode).demand.mean_output)


def _per_token(pair: Pair, found: dict[str, Interval]) -> dict[str, Interval]:
    if "usd_per_hour" not in found:
        return {}
    low, high = found["usd_per_hour"]
    return {
        "usd_per_month": (pricing.usd_per_month(low), pricing.usd_per_month(high)),
        "usd_per_million_tokens": (_usd_per_million(pair, low), _usd_per_million(pair, high)),
    }


def _apart(pair: Pair, pools: tuple[PoolUse, PoolUse]) -> Apart:
    prompts = station(pair.prefill).demand.prompt
    return Apart(
        pools=pools,
        kv_bytes_per_prompt=float(pair.link.bytes_of(prompts).mean()),
        transfer_s=float(pair.link.seconds(prompts).mean()),
        link_bytes_per_s=pair.link.bytes_per_s,
        link_latency_s=pair.link.latency_s,
        link_source=pair.link.source,
        link_provenance=pair.link.provenance,
    )


def _assumptions(request: Request, pair: Pair) -> Iterator[str]:
    for stage, pool in (("prefill", pair.prefill), ("decode", pair.decode)):
        candidate = pool.candidate
        if candidate.profile.note and stage == "decode":
            yield candidate.profile.note
        yield f"{stage} memory: {candidate.memory}"
        yield f"{stage} engine: at most {candidate.limits.max_seqs} sequences and {candidate.limits.max_step_tokens} tokens a step"
    yield f"{pair.link}; those leaving one replica follow each other"
    yield f"each replica has its own queue, both pools routed {request.routing}; the first token reaches the client with the cache"
    yield from words.lucks(request)
    yield (
        "each pool is rented on its own, both in one region; cost per million tokens: output tokens at the average load, "
        "idle time and idle devices paid for"
    )
    if request.workload.source is None and request.workload.provenance is Provenance.ASSUMED:
        yield "the traffic is assumed: rate, arrivals and lengths as given"


def _notes(request: Request, pair: Pair, trial: Trial) -> Iterator[str]:
    for stage, price in (("prefill", pair.prefill.price), ("decode", pair.decode.price)):
        if price is None:
            yield f"no {request.term} price is known for the {stage} pool: designs are ranked by devices"
        elif price.stranded:
            yield f"{price.stranded} of the {price.devices} devices rented for {stage} are used by no replica"
    if request.term == "spot":
        yield words.RECLAIMED
    yield from request.shelf.market.notes
    share = station(pair.decode).demand.share
    if share < 1:
        most = pair.decode.candidate.limits.max_context
        yield f"{100 * (1 - share):.2g} % of the requests exceed the {most:,} tokens that both pools hold: refused, not planned for"
    if trial.preempted > 0.01:
        yield f"{100 * trial.preempted:.0f} % of simulated requests lost their cache to others: the decode pool's memory is tight"


def _beyond(request: Request, pair: Pair, found: dict[str, Interval]) -> Iterator[str]:
    """Yield that the upper ends of the pools are more than may be rented in one place."""
    if pair.usd_per_h is None:
        return
    pools = [found["prefill_replicas"], found["decode_replicas"]]
    most = spread.rentable(pair, pools, request.shelf)
    if most != tuple(int(high) for _, high in pools):
        needed = f"up to {pools[0][1]:g} + {pools[1][1]:g} replicas may be needed"
        yield f"{needed}, more than may be rented in one region: the upper end of the cost is that of {most[0]} + {most[1]}"


def alternative(pair: Pair, trial: Trial | None, request: Request, why_not: str) -> Alternative:
    """Return a pair as a plan lists what it is not."""
    at, seen = pair.decode.candidate, trial.keys(request.slo) if trial else fleet(pair).predict(pair.rate_per_s).keys(request.slo)
    return Alternative(
        gpu=at.gpu, precision=at.precision, tp=at.tp, pp=at.layout.pp, ep=at.layout.ep, attention_dp=at.layout.attention_dp,
        max_batch=at.limits.max_seqs, max_step_tokens=pair.prefill.candidate.limits.max_step_tokens, replicas=pair.replicas,
        usd_per_hour=pair.usd_per_h, predicted=seen, why_not=f"{in_words(pair)}: {why_not}",
    )  # fmt: skip


def in_words(pair: Pair) -> str:
    """Return such as '2 prefilling + 4 decoding apart'."""
    first, second = pair.prefill.candidate.tp, pair.decode.candidate.tp
    tp = f" (tp {first} + {second})" if first != second else ""
    return f"{pair.prefill.replicas} prefilling + {pair.decode.replicas} decoding apart{tp}"


def dearer(usd: float | None, than: float | None) -> str:
    """Return by how much something costs more, or that it does not."""
    if usd is None or than is None:
        return "not cheaper"
    return f"{units.show_usd(usd - than)}/h more" if usd - than > 0.005 else "as dear, and more to run"
