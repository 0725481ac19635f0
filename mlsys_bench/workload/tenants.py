"""Traffic of several tenants: their shares, and the lengths of all of them together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from mlsys_bench.errors import BadInput
from mlsys_bench.types import Lengths, Tenant, Workload

EXACT = 1e-6  # how far shares may add up beside 1


def with_tenants(traffic: Workload, tenants: Sequence[Tenant]) -> Workload:
    """Return the traffic with these tenants: its own lengths become those of all requests together.  Raises BadInput."""
    total = sum(tenant.share for tenant in tenants)
    if not tenants or not all(tenant.share > 0 for tenant in tenants) or abs(total - 1) > EXACT:
        raise BadInput(f"the shares of the tenants add up to {100 * total:.6g} %; each is above zero and together they are 100 %")
    shares = [tenant.share / total for tenant in tenants]
    return dataclasses.replace(
        traffic,
        prompt_tokens=together([tenant.prompt_tokens for tenant in tenants], shares),
        output_tokens=together([tenant.output_tokens for tenant in tenants], shares),
        tenants=tuple(dataclasses.replace(tenant, share=share) for tenant, share in zip(tenants, shares, strict=True)),
    )


def ranks(tenants: Sequence[Tenant]) -> tuple[int, ...] | None:
    """Return by tenant how many priorities go before its own; None where all have the same, and nobody goes first."""
    classes = sorted({tenant.priority for tenant in tenants})
    return tuple(classes.index(tenant.priority) for tenant in tenants) if len(classes) > 1 else None


def first_come(traffic: Workload) -> Workload:
    """Return the traffic without priorities: first come, first served."""
    return dataclasses.replace(traffic, tenants=tuple(dataclasses.replace(tenant, priority=1) for tenant in traffic.tenants))


def only(traffic: Workload, names: Sequence[str]) -> Workload:
    """Return the traffic of some of the tenants alone; one that is left alone is the whole traffic, and no tenant any more."""
    kept = [tenant for tenant in traffic.tenants if tenant.name in names]
    share = sum(tenant.share for tenant in kept)
    own = dataclasses.replace(traffic, rate_per_s=traffic.rate_per_s * share)
    if len(kept) == 1:
        return dataclasses.replace(own, prompt_tokens=kept[0].prompt_tokens, output_tokens=kept[0].output_tokens, tenants=())
    return with_tenants(own, [dataclasses.replace(tenant, share=tenant.share / share) for tenant in kept])


def together(lengths: Sequence[Lengths], shares: Sequence[float]) -> Lengths:
    """Return one law with the mean and coefficient of variation of a mixture, for those who read only these.

    E[X] = sum s m,  E[X^2] = sum s m^2 (1 + cv^2), of the laws as they are written, before rounding and cutting.
    """
    if all(each == lengths[0] for each in lengths):
        return lengths[0]
    mean = sum(s * each.mean for s, each in zip(shares, lengths, strict=True))
    square = sum(s * each.mean**2 * (1 + each.cv**2) for s, each in zip(shares, lengths, strict=True))
    cv = math.sqrt(max(square / mean**2 - 1, 0.0))
    most = [each.max if each.max is not None or each.cv > 0 else math.ceil(each.mean) for each in lengths]
    known = [tokens for tokens in most if tokens is not None]
    if cv == 0:
        return Lengths(mean=mean)
    return Lengths(dist="lognormal", mean=mean, cv=cv, max=max(known) if len(known) == len(most) else None)
