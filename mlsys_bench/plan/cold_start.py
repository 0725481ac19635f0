"""How long a new replica takes until it serves: a node, its image, the weights, graphs, a warm-up; each measured or assumed with source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mlsys_bench import units
from mlsys_bench.errors import BadInput
from mlsys_bench.plan.given import Given, assumed
from mlsys_bench.types import Provenance

IMAGE_BYTES = 10e9  # of an engine with CUDA and PyTorch: 10 to 20 GB, dev.to/manikandan_t_6d72e32ac4e8, read 2026-11-21
PULL_BYTES_PER_S = 100e6  # the same image in 60 to 180 s: paperscode.org/articles/cut-kubernetes-cold-start-times, read 2026-11-21
LOAD_BYTES_PER_S = 0.8e9  # 140 GB of a 70B model in up to 3 min, as above; a local NVMe disk is several times as fast

NODE = assumed(
    150.0, "a cloud VM 60 to 120 s and its GPU driver 20 to 40 s: systemoverflow.com on cold starts, read 2026-11-21", 80.0, 160.0
)
GRAPHS = assumed(60.0, "torch.compile 39 s (route179.dev, 2026-06-30) and capture of CUDA graphs, about as long as half of it")
WARM_UP = assumed(10.0, "a default: profiling and first requests; measure yours")


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """The parts of a start, in seconds, one after another."""

    node: Given = field(default=NODE)
    image: Given
    weights: Given
    graphs: Given = field(default=GRAPHS)
    warm_up: Given = field(default=WARM_UP)

    @property
    def total_s(self) -> float:
        """From the decision to launch until a request can be taken, on a node that is not there yet."""
        return sum(part.value for _, part in self.parts())

    @property
    def restart_s(self) -> float:
        """The same for a process that starts again on its node, where the image is."""
        return self.weights.value + self.graphs.value + self.warm_up.value

    @property
    def provenance(self) -> Provenance:
        """The weakest of the parts."""
        return Provenance.weakest(*(part.provenance for _, part in self.parts()))

    def parts(self) -> Iterator[tuple[str, Given]]:
        """Yield each part with its name."""
        yield from (("node", self.node), ("image pull", self.image), ("weights", self.weights))
        yield from (("graph capture", self.graphs), ("warm-up", self.warm_up))

    def in_words(self) -> str:
        """Return such as '6.3 min: node 2.5 min (assumed), …'."""
        listed = ", ".join(f"{name} {units.show_s(part.value)} ({part.provenance})" for name, part in self.parts())
        return f"{units.show_s(self.total_s)}: {listed}"


VM = assumed(90.0, "a cloud VM 60 to 120 s: systemoverflow.com on cold starts, read 2026-11-21", 60.0, 120.0)
SERVICE_IMAGE_BYTES = 1e9  # a default: an image of Python and its libraries without CUDA


def of_service(memory_bytes: float = 0.0) -> ColdStart:
    """Return the cold start of a replica without a GPU that reads so many bytes of data before it serves."""
    pull, load = units.show_bytes(PULL_BYTES_PER_S), units.show_bytes(LOAD_BYTES_PER_S)
    return ColdStart(
        node=VM,
        image=assumed(SERVICE_IMAGE_BYTES / PULL_BYTES_PER_S, f"an image of {units.show_bytes(SERVICE_IMAGE_BYTES)} at {pull}/s"),
        weights=assumed(memory_bytes / LOAD_BYTES_PER_S, f"{units.show_bytes(memory_bytes)} of data at {load}/s"),
        graphs=assumed(0.0, "none: no GPU"),
    )


def of(
    weights_bytes: float, *, node: Given = NODE, pull_bytes_per_s: float = PULL_BYTES_PER_S, load_bytes_per_s: float = LOAD_BYTES_PER_S
) -> ColdStart:
    """Return the cold start of a replica whose weights are so large, all rates assumed unless given."""
    if not (weights_bytes >= 0 and pull_bytes_per_s > 0 and load_bytes_per_s > 0):
        raise BadInput(f"a cold start of {weights_bytes:g} bytes at {load_bytes_per_s:g} and {pull_bytes_per_s:g} bytes/s cannot be")
    pull, load = units.show_bytes(pull_bytes_per_s), units.show_bytes(load_bytes_per_s)
    return ColdStart(
        node=node,
        image=assumed(IMAGE_BYTES / pull_bytes_per_s, f"an image of {units.show_bytes(IMAGE_BYTES)} at {pull}/s"),
        weights=assumed(weights_bytes / load_bytes_per_s, f"{units.show_bytes(weights_bytes)} at {load}/s"),
    )
