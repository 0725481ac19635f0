"""What a plan is asked for, checked before anything is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlsys_bench import latency, models, slo, workload
from mlsys_bench.errors import BadInput, did_you_mean, unknown
from mlsys_bench.plan import course
from mlsys_bench.pricing import TERMS, Market, Shelf, published
from mlsys_bench.types import SLO, LatencyProfile, Workload
from mlsys_bench.workload import Schedule

if TYPE_CHECKING:
    from mlsys_bench.plan.growth import Growth
    from mlsys_bench.plan.reliability import Spot
    from mlsys_bench.plan.spare import Spares
    from mlsys_bench.plan.spot import Rent

MAX_BATCH = 256  # sequences at once, as engines set it by default: the first that is tried
MAX_STEP_TOKENS = 2048  # tokens a step, likewise
LEAST_PER_S, MOST_PER_S = 1e-9, 1e12  # one request in thirty years, and more than a hundred a second for everybody
DISAGGREGATE = ("auto", "never", "only")
ROUTINGS = ("random", "round_robin", "least_loaded", "power_of_two")
BATCHES = (16, 32, 64, 128, 256, 512)  # that are tried where none is given
PRECISIONS = ("bf16", "fp8")  # that are tried where none is named, of models in 16 bit: answers hardly differ between them
STEP_TOKENS = (512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Traffic, promises, and what may be rented.

    `gpus` may be empty: then the layouts of `profiles`, or every priced GPU of the catalogue, are considered.  `precisions` empty means
    those of the profiles, the checkpoint's own where it is quantized, or `PRECISIONS`.  `max_batch` and `max_step_tokens` None: the
    engine's setting is searched for.  A profile is used for the layout it was measured in, the roofline for all others; limits of its
    engine (`max_batch`, `kv_tokens` … among its constants) win over the ones here.  `headroom` is the share of a replica's capacity that
    stays free.  With a `trace` the fleet is the smallest that serves those very requests; `workload` then says of them what theory needs.
    An availability among the limits adds replicas to spare, spread over `zones`; with `survive_zone` any one of them may go.  `day` is the
    traffic whose busiest time `workload` is, None where it is the same all day; `around` asks for autoscaling and limits that protect the
    fleet, `growth` for the month in which it is full, `mixed` for a fleet of several kinds beside the plan.
    """

    model: str
    workload: Workload
    slo: SLO
    gpus: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    profiles: tuple[LatencyProfile, ...] = ()
    max_batch: int | None = None
    max_step_tokens: int | None = None
    headroom: float = 0.2
    term: str = "on-demand"
    market: Market | None = None  # None: published prices
    seed: int = 0
    routing: str = "random"
    trace: Schedule | None = None
    zones: int = 1
    survive_zone: bool = False
    spot: Spot | None = None  # how spot goes and comes, where the term is spot and an availability is asked for; None: as assumed
    day: Workload | None = None
    around: bool = False
    growth: Growth | None = None
    mixed: bool = False
    disaggregate: str = "never"  # prefill and decode on pools of their own: where that is cheaper, never, or nothing else
    link_bytes_per_s: float | None = None  # of a device, between these pools; None: the catalogue's, or assumed
    limits_assumed: bool = False  # nobody gave any

    @property
    def shelf(self) -> Shelf:
        """Where the plan buys, on which term, and what is rented to spare."""
        spares = self.spares
        rented = spares.rented if spares else None
        return Shelf(market=self.market or published(), term=self.term, rented=rented, zones=self.zones, mix=self.rent)

    @property
    def day_mean_per_s(self) -> float | None:
        """Requests per second on average over the course whose busiest time is planned for; None where they are the same all day."""
        return None if self.day is None else course.of(self.day).mean_per_s

    @property
    def usual_share(self) -> float:
        """That mean as a share of the rate planned for; 1 where it is the same all day."""
        mean_per_s = self.day_mean_per_s
        return 1.0 if mean_per_s is None else mean_per_s / self.workload.rate_per_s

    @property
    def rent(self) -> Rent | None:
        """How spot keeps a part of the availability; None where it is not asked to."""
        spares = self.spares
        if spares is None or self.term != "spot":
            return None
        from mlsys_bench.plan.reliability import Spot
        from mlsys_bench.plan.spot import Rent

        return Rent(objective=spares.objective, zones=spares.zones, spot=self.spot or Spot(), market=self.market or published())

    @property
    def spares(self) -> Spares | None:
        """What an availability among the limits asks for; None where there is none."""
        objective = next((limit.limit for limit in self.slo if limit.metric == "availability"), None)
        if objective is None:
            return None
        from mlsys_bench.plan.reliability import Zones
        from mlsys_bench.plan.spare import Spares

        return Spares(objective=objective, zones=Zones(count=self.zones, survive=self.survive_zone))


def check(request: Request) -> Request:
    """Return the request, or raise BadInput in one line."""
    models.find(request.model)
    _check_traffic(request.workload)
    if request.trace is not None and any(map(math.isnan, request.trace.scheduled_s)):
        raise BadInput("the trace has turns without a time, which wait for an answer; give them times with workload.opened(trace)")
    slo.check_unique(request.slo, "the SLO")
    for limit in request.slo:
        if not (math.isfinite(limit.limit) and limit.limit > 0):
            raise BadInput(f"SLO {slo.key(limit)}: a limit of {limit.limit:g} can never be met; it must be above zero")
    for precision in request.precisions:
        models.bytes_per_param(precision)
    for name, value in (("max_batch", request.max_batch), ("max_step_tokens", request.max_step_tokens)):
        if value is not None and value < 1:
            raise BadInput(f"{name} is {value}: a replica takes at least 1")
    if not 0 <= request.headroom < 1:
        raise BadInput(f"headroom is {request.headroom:g}: it is the share of capacity kept free, from 0 to below 1, e.g. 20%")
    if request.routing not in ROUTINGS:
        raise unknown("routing", request.routing, ROUTINGS)
    if request.term not in TERMS:
        raise BadInput(f"unknown term {request.term!r}{did_you_mean(request.term, TERMS)}")
    if request.mixed and request.workload.tenants:
        raise BadInput("pools by prompt length and tenants are not planned together yet; leave --mixed out")
    for profile in request.profiles:
        latency.check(profile)
    _check_spares(request)
    _check_apart(request)
    return request


def _check_apart(request: Request) -> None:
    """Raise BadInput for pools of prefill and decode together with what is planned for whole replicas only."""
    if request.disaggregate not in DISAGGREGATE:
        raise unknown("way to disaggregate", request.disaggregate, DISAGGREGATE)
    if request.link_bytes_per_s is not None and not request.link_bytes_per_s > 0:
        raise BadInput(f"a link of {request.link_bytes_per_s:g} bytes/s: it must be above zero")
    other = whole_only(request)
    if request.disaggregate == "only" and other is not None:
        raise BadInput(f"--disaggregate only and {other} are not planned together yet; leave one of them out")


def whole_only(request: Request) -> str | None:
    """Return what is asked for that is planned for whole replicas only, None where nothing is."""
    named = {
        "an availability": request.spares is not None,
        "autoscaling": request.around,
        "traffic that varies by the hour": request.day is not None,
        "growth": request.growth is not None,
        "a fleet of several kinds": request.mixed,
        "tenants": bool(request.workload.tenants) or any(limit.tenant is not None for limit in request.slo),
    }
    return next((name for name, is_asked in named.items() if is_asked), None)


def _check_spares(request: Request) -> None:
    """Raise BadInput for zones without an availability, and Infeasible for an availability that zones alone rule out."""
    rents = request.spares is not None and request.term == "spot"
    if request.spot is not None and not rents:
        raise BadInput("--spot says how spot replicas go and come; give --term spot and an --availability with it, or leave it out")
    if rents and request.survive_zone:
        raise BadInput(
            "when a zone is lost everybody wants the spot capacity of the others, so none can be counted on; leave --survive out, or plan "
            "with --term on-demand"
        )
    if rents and (request.around or request.growth is not None or request.mixed):
        raise BadInput(
            "spot and on-demand replicas together are planned for one rate and one kind: leave out --autoscale, --growth, --mixed"
        )
    if request.spares is not None:
        request.spares.rented(1, 0.0, 1)
    elif request.zones != 1 or request.survive_zone:
        raise BadInput("zones are planned for an availability; say which, e.g. --availability 99.9%")


def _check_traffic(traffic: Workload) -> None:
    workload.checked_rate(traffic.rate_per_s)
    if not LEAST_PER_S <= traffic.rate_per_s <= MOST_PER_S:
        possible = f"from {LEAST_PER_S:g} to {MOST_PER_S:g} can be planned for"
        raise BadInput(f"{traffic.rate_per_s:g} requests/s: {possible}; check --qps and --speed")
    workload.parse_arrivals(traffic.arrivals)
    workload.checked_lengths(traffic.prompt_tokens, "prompt lengths")
    workload.checked_lengths(traffic.output_tokens, "output lengths")
