"""Lengths and rates as a person writes them: parsed, checked and printed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from mlsys_bench import units
from mlsys_bench.errors import BadInput
from mlsys_bench.types import Lengths, LengthsPart, Workload
from mlsys_bench.workload.arrivals import parse_arrivals

MAX_CV = 100.0
MAX_TOKENS = 1_000_000_000
_DISTS: dict[str, Literal["lognormal", "uniform", "normal"]] = {"lognormal": "lognormal", "uniform": "uniform", "normal": "normal"}


def parse_lengths(text: str | float) -> Lengths:
    """Return the law of '128', 'lognormal:MEAN:CV[:MAX]', 'normal:…', 'uniform:…' or 'mix:SHARE@LAW,…'.  Raises BadInput."""
    where = f"lengths {text!r}"
    kind, _, rest = str(text).strip().lower().partition(":")
    return _mixture(rest, where) if kind == "mix" else _law(str(text), where)


def _law(text: str, where: str) -> Lengths:
    form = "128, lognormal:MEAN:CV[:MAX], normal:…, uniform:… or mix:70%@512,30%@lognormal:4000:1, e.g. lognormal:256:1.0:2048"
    kind, *numbers = text.strip().lower().split(":")
    if kind not in _DISTS:
        return checked_lengths(Lengths(mean=_positive(kind, where, form) if not numbers else _refuse(where, form)), where)
    if not 2 <= len(numbers) <= 3:
        raise BadInput(f"{where}: write {form}")
    mean, cv, *rest = (_positive(n, where, form) for n in numbers)
    return checked_lengths(Lengths(dist=_DISTS[kind], mean=mean, cv=cv, max=int(rest[0]) if rest else None), where)


def _mixture(text: str, where: str) -> Lengths:
    """Return the law of '70%@512,30%@lognormal:4000:1', the shares adding up to 100 %."""
    parts = []
    for part in text.split(","):
        share, at, law = part.partition("@")
        if not at:
            raise BadInput(f"{where}: {part!r} is no part of a mixture; write mix:SHARE@LENGTHS,…, e.g. mix:70%@512,30%@lognormal:4000:1")
        parts.append((units.fraction(share, where), _law(law, where)))
    total = sum(share for share, _ in parts)
    if not all(share > 0 for share, _ in parts) or abs(total - 1) > 1e-6:
        raise BadInput(f"{where}: the shares add up to {100 * total:.6g} %; each is above zero and together they are 100 %")
    return mixture([(share / total, law) for share, law in parts])


def mixture(parts: Sequence[tuple[float, Lengths]]) -> Lengths:
    """Return the law that takes each part with the probability of its share; shares add up to 1.

    E[X] = sum s m,  E[X^2] = sum s m^2 (1 + cv^2), of the laws as they are written, before rounding and cutting.
    """
    mean = sum(share * law.mean for share, law in parts)
    square = sum(share * law.mean**2 * (1 + law.cv**2) for share, law in parts)
    ordered = sorted(parts, key=lambda part: part[1].mean)  # so that a high score is a long request
    cv = math.sqrt(max(square / mean**2 - 1, 0.0))
    return Lengths(dist="mixture", mean=mean, cv=cv, parts=tuple(_part(share, law) for share, law in ordered))


def parts_of(lengths: Lengths) -> list[tuple[float, Lengths]]:
    """Return the shares and laws of a mixture."""
    return [(part.share, Lengths(dist=part.dist, mean=part.mean, cv=part.cv, max=part.max)) for part in lengths.parts]


def _part(share: float, law: Lengths) -> LengthsPart:
    assert law.dist != "mixture"
    return LengthsPart(share=share, dist=law.dist, mean=law.mean, cv=law.cv, max=law.max)


def show_lengths(lengths: Lengths) -> str:
    """Print lengths so that `parse_lengths` reads them back."""
    if lengths.dist == "mixture":
        return "mix:" + ",".join(f"{100 * share:.12g}%@{show_lengths(law)}" for share, law in parts_of(lengths))
    if lengths.dist == "constant":
        return f"{lengths.mean:.12g}"
    cap = "" if lengths.max is None else f":{lengths.max}"
    return f"{lengths.dist}:{lengths.mean:.12g}:{lengths.cv:.12g}{cap}"


def checked_lengths(lengths: Lengths, where: str = "lengths") -> Lengths:
    """Return the lengths, or raise BadInput where no request could have them."""
    if not 1 <= lengths.mean <= MAX_TOKENS:  # NaN fails every comparison
        raise BadInput(f"{where}: a mean of {lengths.mean:g} tokens; it must lie between 1 and {MAX_TOKENS:,}")
    if not 0 <= lengths.cv <= MAX_CV:
        raise BadInput(f"{where}: a coefficient of variation of {lengths.cv:g}; it must lie between 0 and {MAX_CV:g}")
    if lengths.dist == "uniform" and lengths.cv > 1 / math.sqrt(3):
        raise BadInput(f"{where}: a uniform law reaches a coefficient of variation of 0.577 at most, not {lengths.cv:g}")
    if lengths.max is not None and not 1 <= lengths.max <= MAX_TOKENS:
        raise BadInput(f"{where}: a maximum of {lengths.max} tokens; it must lie between 1 and {MAX_TOKENS:,}")
    if lengths.max is not None and lengths.max < lengths.mean:
        raise BadInput(f"{where}: a maximum of {lengths.max} tokens below the mean of {lengths.mean:g}: write a smaller mean")
    return lengths


def checked_rate(rate_per_s: float, where: str = "--qps") -> float:
    """Return the rate, or raise BadInput unless it is above zero and finite."""
    if not (math.isfinite(rate_per_s) and rate_per_s > 0):
        raise BadInput(f"{where} {rate_per_s:g}: a rate must be above zero, e.g. {'--qps 20' if where == '--qps' else '20/s'}")
    return rate_per_s


def synthetic(
    rate_per_s: float, *, arrivals: str = "poisson", prompt: str | float, output: str | float, source: str | None = None
) -> Workload:
    """Return an assumed workload from its parts as a person writes them: 20, 'gamma:1.5', 'lognormal:900:1.2:8192', '128'."""
    parse_arrivals(arrivals)
    return Workload(
        rate_per_s=checked_rate(rate_per_s),
        arrivals=arrivals,
        prompt_tokens=parse_lengths(prompt),
        output_tokens=parse_lengths(output),
        source=source,
    )


def lognormal(lengths: Lengths) -> tuple[float, float]:
    """Return mu and sigma of the lognormal law with this mean and coefficient of variation."""
    variance = math.log1p(lengths.cv**2)
    return math.log(lengths.mean) - variance / 2, math.sqrt(variance)


def uniform(lengths: Lengths) -> tuple[float, float]:
    """Return the ends of the uniform law with this mean and coefficient of variation."""
    half = math.sqrt(3) * lengths.cv * lengths.mean
    return lengths.mean - half, lengths.mean + half


def cap(lengths: Lengths) -> float:
    """Return the most tokens a request may have, infinity where nothing limits them."""
    return math.inf if lengths.max is None else float(lengths.max)


def _positive(text: str, where: str, form: str) -> float:
    try:
        value = units.plain(text)
    except ValueError:
        raise BadInput(f"{where}: write {form}") from None
    if not (math.isfinite(value) and value > 0):
        raise BadInput(f"{where}: {text} must be above zero; write {form}")
    return value


def _refuse(where: str, form: str) -> float:
    raise BadInput(f"{where}: write {form}")
