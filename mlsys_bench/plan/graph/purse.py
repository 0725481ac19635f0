"""What the replicas of all stages cost together: instances shared by stages on the same device, machines shared by those on vCPUs.

A vCPU costs what the contract says, else what the scenario says, else whole machines of the catalogue are bought and filled by vCPUs and
memory.  Storage and traffic that leaves are priced by a contract; without a price they are left out of the sum, by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mlsys_bench import pricing, units
from mlsys_bench.errors import Infeasible
from mlsys_bench.pricing import Market, machines, published, spread, together
from mlsys_bench.pricing.catalogue import CpuOffer
from mlsys_bench.pricing.machines import Machines, Pods
from mlsys_bench.pricing.packing import Fleet
from mlsys_bench.stage_fleets import Beside, Rented, StageBill
from mlsys_bench.stages import Cost
from mlsys_bench.types import Offer, Provenance

VCPU = "vCPU"
SHELF_OF_CPUS = "vcpu"  # the device that a vCPU offer names in a plan's list of prices
_NO_QUOTA = 1e9  # dollars an hour of what a quota forbids, so that a search goes elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What one replica of a stage stands on: `nodes` times so many devices that must lie within one instance, or vCPUs and memory."""

    stage: str
    device: str | None = None
    devices: int = 1
    nodes: int = 1
    vcpus: float = 0.0
    memory_bytes: float = 0.0
    shards: int = 1
    storage_bytes: float = 0.0
    egress_bytes_per_s: float = 0.0  # of the whole stage

    def pods(self, replicas: int) -> Pods:
        """Return its replicas as they fill machines."""
        return Pods(count=replicas * self.shards, vcpus=self.vcpus, memory_bytes=self.memory_bytes)

    def used(self, replicas: int) -> float:
        """Return the devices, or vCPUs, that so many replicas take."""
        each = self.vcpus if self.device is None else self.devices * self.nodes
        return each * replicas * self.shards


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePrice:
    """A stage's part of the bill: by devices where several share instances, which then are counted with the first of them."""

    usd_per_h: float | None
    instances: int
    instance: str | None = None
    devices: int | None = None  # rented, idle ones included


@dataclass(frozen=True, slots=True, kw_only=True)
class Paid:
    """The bill of all stages, each stage's part of it, the offers behind it, and what a reader must know."""

    bill: StageBill
    stages: dict[str, StagePrice]
    offers: tuple[Offer, ...]
    notes: tuple[str, ...]

    @property
    def usd_per_h(self) -> float | None:
        """Dollars an hour of everything; None where some machine has no price."""
        if any(price.usd_per_h is None for price in self.stages.values()):
            return None
        rented, beside = (line.usd_per_hour for line in self.bill.rented), (line.usd_per_hour for line in self.bill.beside)
        return round(math.fsum((*rented, *beside)), 6)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The part of a bill that is for stages on one kind of device, or on vCPUs."""

    stages: dict[str, StagePrice]
    rented: tuple[Rented, ...] = ()
    offers: tuple[Offer, ...] = ()
    stranded: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Purse:
    """Where a graph buys: a market, a term, the scenario's own price of a vCPU, and zones that replicas are spread over."""

    market: Market = field(default_factory=published)
    term: str = "on-demand"
    cost: Cost | None = None
    zones: int = 1

    # ------------------------------------------------------------ one stage alone: what a search goes by

    def alone(self, unit: Unit, replicas: int) -> float | None:
        """Return what replicas of one stage cost by themselves: instances of their own, or their share of machines.  Committed is free."""
        if unit.device is None:
            each = self._vcpu_usd_per_h(unit)
            return None if each is None else each * replicas * unit.shards
        key = (unit.device, unit.devices, replicas * unit.nodes * unit.shards)
        if key not in self._known:
            self._known[key] = self._instances(*key)
        return self._known[key]

    def _instances(self, device: str, devices: int, replicas: int) -> float | None:
        try:
            fleet = pricing.pack(device, devices, replicas, self.term, self.market)
        except Infeasible:
            return _NO_QUOTA * replicas
        return None if fleet is None else fleet.new_usd_per_h

    @cached_property
    def _known(self) -> dict[tuple[str, int, int], float | None]:
        return {}

    def _vcpu_usd_per_h(self, unit: Unit) -> float | None:
        if (rate := self._rate()) is not None:
            return rate.usd_per_vcpu_h * unit.vcpus
        return machines.share_usd_per_h(unit.pods(1), self._cpu_offers()[0])

    # ------------------------------------------------------------ all stages together

    def pay(self, wanted: Mapping[Unit, int]) -> Paid:
        """Return the bill for so many replicas of each.  Raises Infeasible, naming the quota, where too few may be rented."""
        devices = dict.fromkeys(unit.device for unit in wanted)
        parts = [self._part(device, {unit: n for unit, n in wanted.items() if unit.device == device}) for device in devices]
        stages = {name: price for part in parts for name, price in part.stages.items()}
        beside, unpriced = self._beside(wanted)
        rented = tuple(line for part in parts for line in part.rented)
        return Paid(
            bill=StageBill(
                rented=rented,
                beside=tuple(beside),
                stranded={device: n for part in parts for device, n in part.stranded.items() if n > 0},
                unpriced=(*(f"replicas of {name}" for name, price in stages.items() if price.usd_per_h is None), *unpriced),
            ),
            stages={unit.stage: stages[unit.stage] for unit in wanted},
            offers=tuple(dict.fromkeys(offer for part in parts for offer in part.offers)),
            notes=(*(note for part in parts for note in part.notes), *_apart(rented), *self.market.notes),
        )

    def _part(self, device: str | None, wanted: Mapping[Unit, int]) -> _Part:
        return self._vcpus(wanted) if device is None else self._devices(device, wanted)

    def _devices(self, device: str, wanted: Mapping[Unit, int]) -> _Part:
        zones = [self._sizes(wanted, zone) for zone in range(self.zones)]
        fleet = together.pack_together(device, zones, self.term, self.market)
        names = tuple(unit.stage for unit in wanted)
        if fleet is None:
            prices = {unit.stage: StagePrice(usd_per_h=None, instances=n * unit.nodes * unit.shards) for unit, n in wanted.items()}
            return _Part(stages=prices, notes=(f"no {self.term} price is known for {device}: {', '.join(names)} stand unpriced",))
        usd = _split(fleet.usd_per_h, [unit.used(n) for unit, n in wanted.items()])
        prices = {}
        for k, ((unit, n), each) in enumerate(zip(wanted.items(), usd, strict=True)):
            own = int(unit.used(n))
            prices[unit.stage] = StagePrice(
                usd_per_h=each, instances=0 if k else fleet.instances, instance=fleet.instance, devices=own if k else own + fleet.stranded
            )
        return _Part(
            stages=prices,
            rented=tuple(_rented(names, x.offer, x.instances, x.committed, device, x.devices, x.usd_per_h) for x in fleet.lots),
            offers=tuple(lot.offer for lot in fleet.lots),
            stranded={device: float(fleet.stranded)},
            notes=tuple(_of_fleet(fleet, device, names)),
        )

    def _sizes(self, wanted: Mapping[Unit, int], zone: int) -> dict[int, int]:
        """Return the replicas that stand in one zone, by their number of devices."""
        sizes: dict[int, int] = {}
        for unit, n in wanted.items():
            here = spread(n, self.zones)[zone] * unit.nodes * unit.shards
            sizes[unit.devices] = sizes.get(unit.devices, 0) + here
        return sizes

    def _vcpus(self, wanted: Mapping[Unit, int]) -> _Part:
        rate = self._rate()
        if rate is not None:
            return self._by_the_vcpu(rate, wanted)
        offers, told = self._cpu_offers()
        chosen = self._machines(wanted, offers)
        if chosen is None:
            prices = {unit.stage: StagePrice(usd_per_h=None, instances=n * unit.shards) for unit, n in wanted.items()}
            return _Part(stages=prices, notes=("no machine of the catalogue has the vCPUs and memory that some stage asks for: unpriced",))
        names, sold = tuple(unit.stage for unit in wanted), [(_as_offer(offer), count) for offer, count in chosen.items()]
        rented = tuple(_rented(names, offer, n, 0, VCPU, offer.devices * n, round(offer.usd_per_h * n, 6)) for offer, n in sold)
        shares = [(self._vcpu_usd_per_h(unit) or 0.0) * n * unit.shards for unit, n in wanted.items()]
        usd = _split(round(math.fsum(line.usd_per_hour for line in rented), 6), shares)
        prices = {
            unit.stage: StagePrice(usd_per_h=each, instances=n * unit.shards) for (unit, n), each in zip(wanted.items(), usd, strict=True)
        }
        return _Part(stages=prices, rented=rented, offers=tuple(offer for offer, _ in sold), notes=tuple(told))

    def _machines(self, wanted: Mapping[Unit, int], offers: Sequence[CpuOffer]) -> dict[CpuOffer, int] | None:
        """Return machines by kind, those of each zone filled apart."""
        total: dict[CpuOffer, int] = {}
        for zone in range(self.zones):
            pods = [unit.pods(spread(n, self.zones)[zone]) for unit, n in wanted.items()]
            found: tuple[Machines, ...] | None = machines.house(pods, offers)
            if found is None:
                return None
            for each in found:
                total[each.offer] = total.get(each.offer, 0) + each.count
        return total

    def _by_the_vcpu(self, rate: Cost, wanted: Mapping[Unit, int]) -> _Part:
        date, kind = (self.market.rates.date, Provenance.MEASURED) if self._is_contract else ("", Provenance.ASSUMED)
        offer = Offer(
            provider="any", instance="1 vCPU", device=SHELF_OF_CPUS, devices=1, region="any", term="on-demand",
            usd_per_h=rate.usd_per_vcpu_h, source=rate.source, date=date, provenance=kind,
        )  # fmt: skip
        names, used = tuple(unit.stage for unit in wanted), [unit.used(n) for unit, n in wanted.items()]
        usd = [round(rate.usd_per_vcpu_h * n, 6) for n in used]
        line = _rented(names, offer, math.fsum(used), 0, VCPU, math.fsum(used), round(math.fsum(usd), 6))
        prices = {
            unit.stage: StagePrice(usd_per_h=each, instances=n * unit.shards) for (unit, n), each in zip(wanted.items(), usd, strict=True)
        }
        hungry = [unit.stage for unit in wanted if unit.memory_bytes]
        told = (f"memory of {', '.join(hungry)}: taken to come with the vCPUs at that price",) if hungry else ()
        return _Part(stages=prices, rented=(line,), offers=(offer,), notes=told)

    @property
    def _is_contract(self) -> bool:
        return self.market.rates.vcpu_usd_per_h is not None

    def _rate(self) -> Cost | None:
        """Return what a vCPU costs where somebody says so; None: machines of the catalogue are bought."""
        rates = self.market.rates
        if rates.vcpu_usd_per_h is not None:
            return Cost(usd_per_vcpu_h=rates.vcpu_usd_per_h, source=rates.source)
        return self.cost

    def _cpu_offers(self) -> tuple[tuple[CpuOffer, ...], list[str]]:
        """Return machines on the term, else on demand with a note."""
        found = pricing.cpu_offers(self.term) if self.term in pricing.TERMS else ()
        if found:
            return found, []
        return pricing.cpu_offers(), [f"the catalogue lists no machine without a GPU as {self.term}: those are rented on demand"]

    def _beside(self, wanted: Mapping[Unit, int]) -> tuple[list[Beside], list[str]]:
        """Return lines for storage and traffic that leaves, and what has no price."""
        rates, lines, unpriced = self.market.rates, [], []
        for unit, n in wanted.items():
            if unit.storage_bytes:
                copies = n * unit.shards
                what = f"{units.show_bytes(unit.storage_bytes)} x {copies}"
                line = pricing.storage(rates, unit.storage_bytes, copies, unit.stage)
                lines += [] if line is None else [_beside(unit.stage, f"storage, {what}", line.usd_per_h, rates)]
                unpriced += [f"storage of {unit.stage}, {what}"] if line is None else []
            if unit.egress_bytes_per_s:
                line = pricing.network(rates, 1.0, unit.egress_bytes_per_s)
                what = f"traffic that leaves, {units.show_bytes(unit.egress_bytes_per_s)}/s"
                lines += [] if line is None else [_beside(unit.stage, what, line.usd_per_h, rates)]
                unpriced += [f"{what}, of {unit.stage}"] if line is None else []
        return lines, unpriced


def _split(total: float, shares: Sequence[float]) -> list[float]:
    """Return a total by shares, so that the parts add up to it to the last digit kept."""
    whole = math.fsum(shares)
    parts = [round(total * share / whole, 6) if whole else 0.0 for share in shares[:-1]]
    return [*parts, round(total - math.fsum(parts), 6)]


def _rented(stages: tuple[str, ...], offer: Offer, instances: float, committed: int, unit: str, holds: float, usd_per_h: float) -> Rented:
    return Rented(
        stages=stages, provider=offer.provider, instance=offer.instance, region=offer.region, term=offer.term, instances=instances,
        committed=committed, unit=unit, holds=holds, usd_per_hour=usd_per_h, source=offer.source, date=offer.date,
        provenance=offer.provenance,
    )  # fmt: skip


def _beside(stage: str, what: str, usd_per_h: float, rates: pricing.Rates) -> Beside:
    return Beside(
        stage=stage, what=what, usd_per_hour=round(usd_per_h, 6), source=rates.source, date=rates.date, provenance=Provenance.MEASURED
    )


def _as_offer(found: CpuOffer) -> Offer:
    return Offer(
        provider=found.provider, instance=found.instance, device=SHELF_OF_CPUS, devices=found.vcpus, region=found.region, term=found.term,
        usd_per_h=found.usd_per_h, source=found.source, date=found.date, provenance=Provenance.MEASURED,
    )  # fmt: skip


def _of_fleet(fleet: Fleet, device: str, stages: tuple[str, ...]) -> Iterator[str]:
    """Yield what of the bill is not plain: shared instances, idle devices, what is committed."""
    if len(stages) > 1:
        yield f"{' and '.join(stages)} share {fleet}; their cost is split by devices"
    if fleet.stranded:
        yield f"{fleet.stranded} of the {fleet.devices} {device} rented are used by no replica"
    committed = sum(lot.offer.usd_per_h * lot.committed for lot in fleet.lots)
    if committed:
        yield f"{units.show_usd(committed)}/h of {device} is committed and paid in any case; {units.show_usd(fleet.new_usd_per_h)}/h is new"
    if fleet.unused_usd_per_h:
        yield f"commitments of {units.show_usd(fleet.unused_usd_per_h)}/h on {device} stay unused and are paid as well"


def _apart(rented: Sequence[Rented]) -> Iterator[str]:
    """Yield a warning where stages are rented far from each other: each kind of machine is bought where it costs least."""
    places = dict.fromkeys(f"{line.provider} {line.region}" for line in rented if line.region != "any")
    if len(places) > 1:
        yield f"machines stand in {' and '.join(places)}: the way between them takes time and money that is not counted"
