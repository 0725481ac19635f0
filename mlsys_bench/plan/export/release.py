"""What the manifests of a plan have in common: its name, its deployment, how long a replica starts, spare replicas, an autoscaling rule."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mlsys_bench import hardware, slo, units
from mlsys_bench.errors import BadInput, UnknownName
from mlsys_bench.plan import cold_start, command
from mlsys_bench.plan.around import offer_of, weights_bytes
from mlsys_bench.plan.command import Deployment
from mlsys_bench.plan.flags import PORTS, Engine
from mlsys_bench.surroundings import Autoscaled, Secured
from mlsys_bench.types import SLO, Offer, Plan

PROMETHEUS = "http://prometheus-operated.monitoring.svc:9090"
NODE_DEVICES = 8  # of a node where no offer says otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A plan about to be deployed."""

    plan: Plan
    deployment: Deployment
    name: str  # of every object, RFC 1123
    start_s: float  # how long a replica starts
    secured: Secured | None = None
    scaled: Autoscaled | None = None
    prometheus: str = PROMETHEUS
    namespace: str | None = None

    @property
    def replicas(self) -> int:
        """Replicas of the plan, those to spare included."""
        return self.secured.replicas if self.secured else self.plan.replicas

    @property
    def needed(self) -> int:
        """Replicas that hold the limits at peak."""
        return self.secured.needed if self.secured else self.plan.replicas

    @property
    def limits(self) -> SLO:
        """The promises of the plan to all; engines count nothing by tenant."""
        return slo.of_all(slo.parse(self.plan.slo))

    @property
    def offer(self) -> Offer | None:
        """What its first kind of replicas is rented as."""
        return offer_of(self.plan)

    @property
    def port(self) -> int:
        """Where a replica listens."""
        return self.deployment.port or PORTS[self.deployment.engine]

    @property
    def gpu_resource(self) -> str:
        """What Kubernetes calls the GPU."""
        return "amd.com/gpu" if self._vendor == "AMD" else "nvidia.com/gpu"

    @property
    def _vendor(self) -> str:
        try:
            return hardware.find(self.plan.fleet[0].gpu).vendor
        except UnknownName:
            return "NVIDIA"

    @property
    def labels(self) -> dict[str, str]:
        """Labels that select its pods."""
        return {"app.kubernetes.io/name": self.name}

    def metadata(self, suffix: str = "") -> dict[str, object]:
        """Return an object's metadata."""
        place = {"namespace": self.namespace} if self.namespace else {}
        managed = {"app.kubernetes.io/managed-by": "mlsys"}
        return {"name": f"{self.name}{suffix}", **place, "labels": {**self.labels, **managed}}

    def heading(self) -> Iterator[str]:
        """Yield the lines that say what the manifest rests on."""
        plan, item = self.plan, self.plan.fleet[0]
        yield f"mlsys plan: {self.replicas} x {plan.model} {item.precision} on {item.gpu}, {plan.workload.rate_per_s:g}/s within {plan.slo}"
        yield f"provenance of the figures: {plan.provenance}; a replica is expected to start in {units.show_s(self.start_s)}"
        if self.secured and self.scaled:
            yield f"an availability counts against the peak all day, so {self.replicas} replicas stay; without one they follow the load"
        yield from command.notes(plan, self.deployment)


def release(
    plan: Plan,
    engine: Engine = "vllm",
    *,
    deployment: Deployment | None = None,
    start_s: float | None = None,
    secured: Secured | None = None,
    scaled: Autoscaled | None = None,
    name: str | None = None,
    namespace: str | None = None,
    prometheus: str = PROMETHEUS,
) -> Release:
    """Return a plan ready for export.  Raises BadInput for a fleet of no replica, or a name Kubernetes refuses.

    Without `deployment` it is the plan's own with this engine; without `start_s` a cold start of its weights, all assumed.
    """
    if not plan.fleet or plan.replicas < 1:
        raise BadInput("the plan has no replicas to export")
    if plan.tenancy is not None and not plan.tenancy.is_shared:
        raise BadInput("the plan has several fleets, each for tenants of its own; plan and export each as a scenario of its own")
    if plan.apart is not None:
        raise BadInput("the plan has a pool for prefill and one for decode: `pools` releases each, --export k8s writes both")
    own = deployment or command.of_plan(plan, engine)
    return Release(
        plan=plan,
        deployment=_listening(own),
        name=checked_name(name or plan.model),
        start_s=start_s if start_s is not None else cold_start.of(weights_bytes(plan)).total_s,
        secured=secured,
        scaled=scaled,
        prometheus=prometheus,
        namespace=namespace,
    )


def pools(plan: Plan, engine: Engine = "vllm") -> tuple[Release, ...]:
    """Return either pool of a plan that prefills and decodes apart, ready for export."""
    from mlsys_bench.plan.disaggregated import deployed

    both = zip(deployed.halves(plan), deployed.deployments(plan, engine), strict=True)
    return tuple(release(half, engine, deployment=own, name=f"{plan.model}-{half.fleet[0].stage}") for half, own in both)


def checked_name(text: str) -> str:
    """Return a name as RFC 1123 wants it: lower case, digits and dashes, at most 52 characters so that suffixes fit."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:52].strip("-")
    if not name:
        raise BadInput(f"{text!r} leaves nothing of a name; give one of letters and digits")
    return name


def one_node(of: Release) -> None:
    """Raise BadInput where a replica needs more devices than a node has: a pod cannot reach across nodes."""
    devices, node = of.plan.devices_per_replica, of.offer.devices if of.offer else NODE_DEVICES
    if devices > max(node, 1):
        raise BadInput(
            f"a replica of {devices} devices spans nodes of {node}, which a Deployment cannot; take another plan or a LeaderWorkerSet"
        )


def startup_failures(of: Release, period_s: int = 10) -> int:
    """Return how often a startup probe may fail: twice the expected start."""
    return max(3, math.ceil(2 * of.start_s / period_s))


def _listening(deployment: Deployment) -> Deployment:
    """Return the deployment with what a pod needs: all interfaces, and metrics where they are off by default."""
    other = {"--host": "0.0.0.0", **deployment.other}  # noqa: S104  inside a pod
    if deployment.engine == "sglang":
        other["--enable-metrics"] = True
    return replace(deployment, other=other, port=deployment.port or PORTS[deployment.engine])
