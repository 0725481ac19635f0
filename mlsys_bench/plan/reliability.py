"""What fails, how often and for how long: GPUs, processes, zones, spot capacity; every figure with its source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mlsys_bench import units
from mlsys_bench.errors import BadInput
from mlsys_bench.plan.cold_start import ColdStart
from mlsys_bench.plan.given import Given, assumed
from mlsys_bench.types import Provenance

HOUR_S, DAY_S = 3600.0, 86400.0
GUESS = 3.0  # nobody publishes some figures: the 90 % interval of a guess is taken as a third to three times it


def guessed(value: float, source: str) -> Given:
    """Return a figure nobody publishes, with the interval of a guess."""
    return assumed(value, f"{source}; taken as a third to three times that", value / GUESS, value * GUESS)


def moved(given: Given, end: str, more_is_better: bool) -> Given:
    """Return a figure at the end of its interval where fleets fail more ('low') or less ('high'), as it is where it has none."""
    value = given.low if (end == "low") == more_is_better else given.high
    return given if value is None else replace(given, value=value)


_LLAMA_3 = (
    "419 unexpected interruptions of 16,384 H100 in 54 days, software and network among them: Llama 3 training, "
    "as reported by datacenterdynamics.com, read 2026-11-21"
)
GPU_MTBF = assumed(16_384 * 54 * DAY_S / 419, _LLAMA_3, 16_384 * 54 * DAY_S / 454.6, 16_384 * 54 * DAY_S / 386.0)
PROCESS_MTBF = guessed(30 * DAY_S, "a default: an engine crashes or is restarted once a month; nobody publishes it")
DETECTION = assumed(60.0, "a default: liveness probes that fail for a minute")
ZONE_MTBF = guessed(730 * DAY_S, "a default: a zone is away once in two years; providers do not publish it")
ZONE_MTTR = guessed(4 * HOUR_S, "a default: four hours; providers do not publish it")
SPOT_LIFE = guessed(6 * HOUR_S, "a default: a spot pool is reclaimed every six hours")
SPOT_REFILL = guessed(0.5 * HOUR_S, "a default: half an hour until other capacity is found and started")
SPOT_NOTICE = assumed(0.0, "a default: no notice is relied on")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reliability:
    """How often a replica is lost and for how long.  All in seconds: `repair` of hardware, `restart` of the process on a well node."""

    gpu_mtbf: Given = GPU_MTBF
    process_mtbf: Given = PROCESS_MTBF
    repair: Given
    restart: Given

    def mtbf_s(self, gpus: int) -> float:
        """Return the mean time between failures of a replica on so many GPUs: rates add."""
        return 1 / (gpus / self.gpu_mtbf.value + 1 / self.process_mtbf.value)

    def repair_s(self, gpus: int) -> float:
        """Return the mean time a failure takes a replica away, hardware and process in their proportions."""
        hardware, process = gpus / self.gpu_mtbf.value, 1 / self.process_mtbf.value
        return (hardware * self.repair.value + process * self.restart.value) / (hardware + process)

    def at(self, end: str) -> Reliability:
        """Return it with every figure at one end of its interval."""
        return Reliability(
            gpu_mtbf=moved(self.gpu_mtbf, end, True), process_mtbf=moved(self.process_mtbf, end, True),
            repair=moved(self.repair, end, False), restart=moved(self.restart, end, False),
        )  # fmt: skip

    @property
    def provenance(self) -> Provenance:
        """The weakest of the figures."""
        return Provenance.weakest(*(given.provenance for _, given in self.figures()))

    def figures(self) -> Iterator[tuple[str, Given]]:
        """Yield each figure with its name."""
        yield from (("MTBF of a GPU", self.gpu_mtbf), ("MTBF of an engine process", self.process_mtbf))
        yield from (("repair", self.repair), ("restart", self.restart))


def replaced(cold: ColdStart, detection: Given = DETECTION) -> Reliability:
    """Return the reliability where a failed node is replaced by a new one, as in a cloud: detection, then a cold start."""
    source = f"detection {units.show_s(detection.value)} and a cold start"
    provenance = Provenance.weakest(detection.provenance, cold.provenance)
    return Reliability(
        repair=_away(detection.value + cold.total_s, provenance, source),
        restart=_away(detection.value + cold.restart_s, provenance, f"{source} without node and image"),
    )


def _away(value: float, provenance: Provenance, source: str) -> Given:
    if provenance is Provenance.ASSUMED:
        return guessed(value, source)
    return Given(value=value, provenance=provenance, source=source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Zones:
    """Where replicas stand: `count` zones that fail as a whole.  `survive`: without any one of them the rest holds the limits at peak."""

    count: int = 1
    survive: bool = False
    mtbf: Given = ZONE_MTBF
    mttr: Given = ZONE_MTTR

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.count < 1:
            raise BadInput(f"{self.count} zones: at least one is needed")
        if self.survive and self.count < 2:
            raise BadInput("surviving the loss of one zone takes at least two; give more zones")

    def at(self, end: str) -> Zones:
        """Return them with both figures at one end of their intervals."""
        return replace(self, mtbf=moved(self.mtbf, end, True), mttr=moved(self.mttr, end, False))

    @property
    def up(self) -> float:
        """The share of time that a zone is there."""
        return self.mtbf.value / (self.mtbf.value + self.mttr.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """Replicas that may be reclaimed, all of one pool (zone and type) together, and are replaced `refill` later.

    A pool lives `life` on average, and `notice` before its end the search for another begins.  They never carry the floor: `floor` of the
    peak is held by others when every spot replica is gone; None where the cheapest way to keep an availability is looked for.
    """

    floor: float | None = None
    life: Given = SPOT_LIFE
    refill: Given = SPOT_REFILL
    notice: Given = SPOT_NOTICE

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if not self.life.value > 0:
            raise BadInput("spot pools that live no time at all serve nobody; give how long they last, e.g. life=6h")
        if self.floor is not None and not 0 < self.floor <= 1:
            raise BadInput(f"a spot floor of {self.floor:g}: the share of peak traffic held without spot lies above 0 and at most at 1")

    def at(self, end: str) -> Spot:
        """Return it with both figures at one end of their intervals."""
        return replace(self, life=moved(self.life, end, True), refill=moved(self.refill, end, False))

    @property
    def up(self) -> float:
        """The share of time that a pool is there."""
        return self.life.value / (self.life.value + self.away_s)

    @property
    def away_s(self) -> float:
        """How long a pool is away: what of the refill the notice does not cover."""
        return max(self.refill.value - self.notice.value, 0.0)
