"""What could serve the traffic: device x precision x parallelism, as far as weights and cache fit its memory; and other engine settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlsys_bench import hardware, latency, models, pricing
from mlsys_bench.batching import Limits
from mlsys_bench.errors import BadInput, MlsysError, NotComparable, UnknownName
from mlsys_bench.plan.request import BATCHES, MAX_BATCH, MAX_STEP_TOKENS, PRECISIONS, STEP_TOKENS, Request
from mlsys_bench.pricing import Shelf
from mlsys_bench.types import Alternative, LatencyProfile, Layout

TP = (1, 2, 4, 8)
PP = (2, 4)  # nodes in a row, where one node does not hold the model
MEMORY_SHARE = 0.90  # of a device's memory that the engine may take; vLLM's default
BLOCK_TOKENS = 16
UNBOUNDED_CONTEXT = 131_072  # where the catalogue names no longest context


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One replica of one kind: its clock, and what it can hold.  `device` is None for a measured device of no catalogue."""

    gpu: str
    precision: str
    tp: int
    profile: LatencyProfile
    limits: Limits
    device: hardware.Device | None
    memory: str  # how the KV pool came about, for people

    @property
    def kv_tokens(self) -> int:
        """Tokens the KV pool holds."""
        return self.limits.blocks * self.limits.block_tokens

    @property
    def rank_tokens(self) -> int:
        """Tokens that one sequence may hold of it: ranks of data-parallel attention have a pool each."""
        return self.kv_tokens // self.layout.attention_dp

    @property
    def layout(self) -> Layout:
        """The layout of its profile."""
        return self.profile.layout

    @property
    def devices(self) -> int:
        """Devices of one replica."""
        return devices_of(self.layout)

    @property
    def weights_bytes(self) -> float:
        """Bytes of weights of one replica, from what its profile reads; 0 where it does not say."""
        return weights_bytes(self.profile, self.devices)

    @property
    def name(self) -> str:
        """Such as 'H100-SXM bf16 tp 2'."""
        return f"{self.gpu} {self.precision}{spread_of(self.layout)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """A candidate that cannot hold the model, and why."""

    gpu: str
    layout: Layout
    why_not: str

    @property
    def name(self) -> str:
        """Such as 'L4 bf16 tp 2'."""
        return f"{self.gpu} {self.layout.precision}{spread_of(self.layout)}"

    def alternative(self) -> Alternative:
        """Return it as the plan lists it."""
        at = self.layout
        return Alternative(
            gpu=self.gpu, precision=at.precision, tp=at.tp, pp=at.pp, ep=at.ep, attention_dp=at.attention_dp,
            replicas=None, usd_per_hour=None, predicted={}, why_not=self.why_not,
        )  # fmt: skip


def devices_of(layout: Layout) -> int:
    """Return the devices of one replica of a layout."""
    return max(layout.tp * layout.attention_dp, layout.ep) * layout.pp


def weights_bytes(profile: LatencyProfile, devices: int) -> float:
    """Return the bytes of weights that so many devices of a replica hold, from what its profile reads; an embedding table is not read.

    A profile's bytes are of one device over all stages of a pipeline.
    """
    held = sum(profile.constants.get(f"{part}_bytes", 0.0) for part in ("dense", "attention", "head", "expert"))
    return held * devices / profile.layout.pp


def spread_of(layout: Layout) -> str:
    """Return how a replica is spread over devices, such as ' tp 2 pp 2', or nothing for one device."""
    degrees = (("tp", layout.tp), ("pp", layout.pp), ("dp", layout.attention_dp), ("ep", layout.ep))
    return "".join(f" {name} {n}" for name, n in degrees if n > 1)


def every(request: Request) -> tuple[tuple[Candidate, ...], tuple[Misfit, ...]]:
    """Return what fits and what does not.  Raises NotComparable for a profile whose layout is not among the candidates."""
    arch = models.find(request.model)
    own = [_own_profile(profile, arch) for profile in request.profiles]
    built = [_build(request, arch, clock) for clock in _clocks(arch, list(_layouts(request, arch, own)), own)]
    for profile in own:
        if not any(c.profile is profile for c in built if isinstance(c, Candidate)):
            _refuse_unused(profile, [c for c in built if isinstance(c, Misfit)], request)
    return tuple(c for c in built if isinstance(c, Candidate)), tuple(c for c in built if isinstance(c, Misfit))


def _own_profile(profile: LatencyProfile, arch: models.Architecture) -> LatencyProfile:
    if _same_model(profile.layout.model, arch):
        return profile
    raise NotComparable(f"the latency profile is of {profile.layout.model}, the plan of {arch.id}; fit a profile of {arch.id}")


def _same_model(name: str, arch: models.Architecture) -> bool:
    try:
        return name == arch.id or models.find(name).id == arch.id
    except BadInput:  # a name nobody knows, or a config that is not here any more
        return False


def _refuse_unused(profile: LatencyProfile, misfits: list[Misfit], request: Request) -> None:
    """Raise when a measured profile belongs to none of the devices and precisions that were asked for."""
    layout = profile.layout
    gpu = device_id(layout.device)
    if any(m.gpu == gpu and _alike(m.layout, layout) for m in misfits):
        return
    asked = ", ".join(request.gpus) or "what the profiles name"
    raise NotComparable(
        f"the latency profile is of {layout.precision} on {layout.device}, tp {layout.tp}; the plan asks for {asked} "
        f"in {', '.join(request.precisions or usual(models.find(request.model)))}: leave --gpu out, or fit a profile of that layout"
    )


def device_id(name: str) -> str:
    """Return the catalogue id of a device, or the name as it is where no catalogue knows it."""
    device = _known(name)
    return name if device is None else device.id


def _known(name: str) -> hardware.Device | None:
    try:
        return hardware.find(name)
    except UnknownName:
        return None


def usual(arch: models.Architecture) -> tuple[str, ...]:
    """Return the precisions that are tried where none is named: the checkpoint's own where it is quantized, else `PRECISIONS`."""
    return (arch.native_precision,) if arch.native_precision in models.QUANTIZED else PRECISIONS


def _layouts(request: Request, arch: models.Architecture, own: list[LatencyProfile]) -> Iterator[Layout]:
    """Yield every layout to consider: those of the profiles when no GPU is named, else GPU x precision x parallelism."""
    if own and not request.gpus:
        yield from (profile.layout for profile in own if not request.precisions or profile.layout.precision in request.precisions)
        return
    gpus = list(dict.fromkeys(_named(gpu, own) for gpu in request.gpus or _priced(request.shelf)))
    precisions = request.precisions or tuple(dict.fromkeys(p.layout.precision for p in own)) or usual(arch)
    for gpu in gpus:
        for precision in precisions:
            wanted = [
                Layout(model=arch.id, precision=precision, device=gpu, tp=tp, pp=pp, ep=ep, attention_dp=ep)
                for tp, pp, ep in _spreads(gpu, arch, precision)
            ]
            wanted += [p.layout for p in own if device_id(p.layout.device) == gpu and p.layout.precision == precision]
            yield from {(at.tp, at.pp, at.ep, at.attention_dp): at for at in wanted}.values()


def _named(gpu: str, own: list[LatencyProfile]) -> str:
    """Return the id of a GPU a person named: of the catalogue, or a profile's own device."""
    return gpu if any(p.layout.device == gpu for p in own) and _known(gpu) is None else hardware.find(gpu).id


def _priced(shelf: Shelf) -> list[str]:
    """Return the GPUs that have a price: without one a plan could not rank them."""
    return [d.id for d in hardware.every() if d.kind == "gpu" and shelf.sells(d.id)]


def _degrees(gpu: str, arch: models.Architecture) -> tuple[int, ...]:
    """Return the tensor-parallel degrees: heads divide evenly, and devices are linked or sold together."""
    device = _known(gpu)
    if device is None or device.kind == "cpu":
        return (1,)
    together = max((offer.devices for offer in pricing.offers(gpu)), default=1)
    most = max(TP) if device.interconnect_bytes_per_s > 0 else together
    return tuple(tp for tp in TP if arch.heads % tp == 0 and tp <= most)


def _spreads(gpu: str, arch: models.Architecture, precision: str) -> Iterator[tuple[int, int, int]]:
    """Yield the ways to spread a replica over devices: (tp, pp, ep).

    Matrices are split (tp); experts may be shared out instead, each device then attending to requests of its own (attention dp, as large
    models of experts are served); whole nodes in a row (pp) follow for models that one node does not hold.
    """
    degrees = _degrees(gpu, arch)
    yield from ((tp, 1, 1) for tp in degrees)
    if arch.experts:
        yield from ((1, 1, n) for n in degrees if n > 1 and arch.experts % n == 0)
    device, widest = _known(gpu), max(degrees)
    if widest == max(TP) and device and models.weight_bytes(arch, precision) > MEMORY_SHARE * device.memory_bytes * widest:
        yield from ((widest, pp, 1) for pp in PP if arch.layers >= pp)


def _clocks(arch: models.Architecture, layouts: Sequence[Layout], own: list[LatencyProfile]) -> list[LatencyProfile | Misfit]:
    """Return the profile of every layout, measured or else by physics, or why it has none."""
    found = [_measured_or_device(arch, layout, own) for layout in layouts]
    unmeasured = [(device, layout) for device, layout in zip(found, layouts, strict=True) if isinstance(device, hardware.Device)]
    physics = iter(latency.rooflines(arch, [(device, _spread(layout)) for device, layout in unmeasured]))
    return [next(physics) if isinstance(clock, hardware.Device) else clock for clock in found]


def _measured_or_device(arch: models.Architecture, layout: Layout, own: list[LatencyProfile]) -> LatencyProfile | hardware.Device | Misfit:
    """Return what was measured of a layout, or the device whose physics will do, or why it has neither: found before any is worked out."""
    gpu, device = device_id(layout.device), _known(layout.device)
    measured = next((p for p in own if device_id(p.layout.device) == gpu and _alike(p.layout, layout)), None)
    if measured is not None:
        return measured
    try:
        if device is None:
            raise UnknownName(f"no catalogue knows {layout.device}, and it was not measured")
        hardware.compute_flops_per_s(device, layout.precision)
        _check_room(arch, device, layout)
    except (_TooLittleMemoryError, MlsysError) as misfit:  # weights too large, a device that does not compute in this precision
        return Misfit(gpu=gpu, layout=layout, why_not=str(misfit))
    return device


def _spread(layout: Layout) -> latency.Spread:
    return latency.Spread(precision=layout.precision, tp=layout.tp, pp=layout.pp, ep=layout.ep, attention_dp=layout.attention_dp)


def _build(request: Request, arch: models.Architecture, clock: LatencyProfile | Misfit) -> Candidate | Misfit:
    if isinstance(clock, Misfit):
        return clock
    layout, device = clock.layout, _known(clock.layout.device)
    gpu = device_id(layout.device)
    try:
        limits, memory = _limits(request, arch, device, clock, _seqs(request), _step_tokens(request))
    except (_TooLittleMemoryError, MlsysError) as misfit:
        return Misfit(gpu=gpu, layout=layout, why_not=str(misfit))
    return Candidate(gpu=gpu, precision=layout.precision, tp=layout.tp, profile=clock, limits=limits, device=device, memory=memory)


def settings(request: Request, candidate: Candidate, batches: bool) -> Iterator[Candidate]:
    """Yield the candidate with other batches, or with steps of other sizes, as far as request and profile leave them open."""
    arch, limits = models.find(request.model), candidate.limits
    for max_seqs, max_step_tokens in _other_settings(request, candidate, batches):
        try:
            found, memory = _limits(request, arch, candidate.device, candidate.profile, max_seqs, max_step_tokens)
        except _TooLittleMemoryError:
            continue  # its activations take what the cache needs
        if found[:2] != limits[:2]:
            yield dataclasses.replace(candidate, limits=found, memory=memory)


def _other_settings(request: Request, candidate: Candidate, batches: bool) -> Iterator[tuple[int, int]]:
    max_seqs, max_step_tokens = candidate.limits[:2]
    seqs_open, tokens_open = open_settings(request, candidate.profile)
    if batches and seqs_open:
        yield from ((n, max_step_tokens) for n in BATCHES if n <= max_step_tokens)
    if not batches and tokens_open:
        yield from ((max_seqs, n) for n in STEP_TOKENS if n >= max_seqs)


def open_settings(request: Request, profile: LatencyProfile) -> tuple[bool, bool]:
    """Say whether the batch, and the tokens of a step, are left open by the request and by what was measured."""
    return (
        request.max_batch is None and "max_batch" not in profile.constants,
        request.max_step_tokens is None and "max_step_tokens" not in profile.constants,
    )


def widest(request: Request, candidate: Candidate) -> Limits:
    """Return the candidate's limits with the largest settings that are left open, the cache as it is."""
    seqs_open, tokens_open = open_settings(request, candidate.profile)
    limits = candidate.limits._replace(max_seqs=max(BATCHES)) if seqs_open else candidate.limits
    return limits._replace(max_step_tokens=max(limits.max_step_tokens, *STEP_TOKENS)) if tokens_open else limits


def _seqs(request: Request) -> int:
    return MAX_BATCH if request.max_batch is None else request.max_batch


def _step_tokens(request: Request) -> int:
    """Return the tokens of a step, where they are open not fewer than the sequences: engines refuse to start so."""
    return max(MAX_STEP_TOKENS, _seqs(request)) if request.max_step_tokens is None else request.max_step_tokens


def _alike(measured: Layout, wanted: Layout) -> bool:
    """Say whether two layouts of one device are the same to a planner."""
    return all(getattr(measured, name) == getattr(wanted, name) for name in ("precision", "tp", "pp", "ep", "attention_dp"))


# ---------------------------------------------------------------- memory


class _TooLittleMemoryError(Exception):
    """The sentence that says what does not fit."""


def _check_room(arch: models.Architecture, device: hardware.Device, layout: Layout) -> None:
    """Raise where the weights alone are too large: before any profile is worked out."""
    weights = models.weight_bytes(arch, layout.precision)
    if weights > MEMORY_SHARE * device.memory_bytes * devices_of(layout):
        raise _TooLittleMemoryError(_too_large(weights, device, layout))


def _too_large(weights: float, device: hardware.Device, layout: Layout) -> str:
    return (
        f"weights {weights / 1e9:.0f} GB do not fit {devices_of(layout)} x {device.memory_bytes / 1e9:.0f} GB "
        f"({1 - MEMORY_SHARE:.0%} reserved)"
    )


def _limits(
    request: Request,
    arch: models.Architecture,
    device: hardware.Device | None,
    profile: LatencyProfile,
    max_seqs: int,
    max_step_tokens: int,
) -> tuple[Limits, str]:
    """Return what a replica can hold: as its engine was measured, or by arithmetic."""
    engine = profile.constants
    max_seqs = min(max_seqs, int(engine.get("max_batch", max_seqs)))
    max_step_tokens = int(engine.get("max_step_tokens", max_step_tokens))
    block_tokens = int(engine.get("block_tokens", BLOCK_TOKENS))
    max_context = int(engine.get("max_context", arch.max_context or UNBOUNDED_CONTEXT))
    if "kv_tokens" in engine:
        kv_tokens, memory = int(engine["kv_tokens"]), f"{int(engine['kv_tokens']):,} KV tokens, as the engine was measured with"
    elif device is None:
        raise UnknownName(f"no catalogue knows {profile.layout.device}, and its profile names no kv_tokens: the KV pool is unknown")
    else:
        kv_tokens, memory = kv_pool(
            arch, device, profile, max_seqs=max_seqs, max_step_tokens=max_step_tokens, context_tokens=_typical_context(request)
        )
    if (ranks := profile.layout.attention_dp) > 1:
        max_context = min(max_context, kv_tokens // ranks)  # a sequence stays on one
    limits = Limits(max_seqs, max_step_tokens, block_tokens, kv_tokens // block_tokens, max_context)
    if limits.blocks < 1:
        raise _TooLittleMemoryError(f"no room for a KV block: {memory}")
    return limits, memory


def _typical_context(request: Request) -> int:
    """Return the tokens an average request holds half-way through its answer: what windows and states are weighed at."""
    return math.ceil(request.workload.prompt_tokens.mean + request.workload.output_tokens.mean / 2)


def kv_pool(
    arch: models.Architecture,
    device: hardware.Device,
    profile: LatencyProfile,
    *,
    max_seqs: int,
    max_step_tokens: int,
    context_tokens: int | None = None,
) -> tuple[int, str]:
    """Return the KV tokens a replica holds beside weights, activations and communication, and the sum in words: see `models.memory`."""
    layout = profile.layout
    budget = models.kv_budget_tokens(
        arch, device, precision=layout.precision, tp=layout.tp, pp=layout.pp, memory_share=MEMORY_SHARE,
        experts_over=layout.ep if layout.ep > 1 else None,
        max_seqs=math.ceil(max_seqs / layout.attention_dp), max_step_tokens=max_step_tokens, context_tokens=context_tokens,
    )  # fmt: skip
    count = devices_of(layout)
    devices = f"{count} x {device.memory_bytes / 1e9:.0f} GB"
    rest = (budget.activations_bytes + budget.communication_bytes) * count
    taken = f"{budget.weights_bytes * count / 1e9:.1f} GB of weights and {rest / 1e9:,.1f} GB of working memory"
    if not budget.fits:
        _check_room(arch, device, layout)
        steps = f"steps of {max_seqs:,} sequences and {max_step_tokens:,} tokens"
        raise _TooLittleMemoryError(f"{taken} for {steps} leave no room for a cache on {devices} ({1 - MEMORY_SHARE:.0%} reserved)")
    tokens = budget.tokens * layout.attention_dp
    return tokens, f"{tokens:,} KV tokens in {budget.pool_bytes * count / 1e9:.1f} GB beside {taken} on {devices}"
