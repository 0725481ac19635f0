"""Parse and print quantities.  Inside the house everything is SI; milliseconds and GiB exist only in text."""

from __future__ import annotations

import math
import re

from mlsys_bench.errors import UnitError

_QUANTITY = re.compile(r"^\s*(?P<usd>\$)?\s*(?P<number>[+-]?(?:\d+(?:_\d+)*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>[A-Za-zµ%/]*)\s*$")
_PLAIN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)

SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
BYTES = {
    "B": 1.0, "KB": 1e3, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
    "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40,
}  # fmt: skip
RATES = {"/s": 1.0, "/min": 1 / 60, "/m": 1 / 60, "/h": 1 / 3600, "/d": 1 / 86400}
USD_PER_H = {"/h": 1.0, "/hour": 1.0, "/d": 1 / 24, "/month": 1 / 730}
HOURS_PER_MONTH = 730.0  # 365 days / 12, as cloud price lists count
HOURS_PER_YEAR = 12 * HOURS_PER_MONTH
MONTHS = {"month": 1.0, "months": 1.0, "y": 12.0, "year": 12.0, "years": 12.0}
USD_PER_BYTE = {f"/{size}": 1 / BYTES[size] for size in ("GB", "GiB", "TB", "TiB")}
USD_PER_BYTE_MONTH = {f"{size}/month": price for size, price in USD_PER_BYTE.items()}


def plain(text: str) -> float:
    """Return a number written in plain decimal: '24', '0.5', '1e6'.  Raises ValueError for '0x18', '1_000', ' 24 ', 'nan' and 'inf'."""
    if not _PLAIN.fullmatch(text) or not math.isfinite(float(text)):
        raise ValueError(f"{text!r} is no plain number")
    return float(text)


def seconds(text: str | float, where: str = "") -> float:
    """Return a duration in seconds: '500ms' -> 0.5."""
    return _parse(text, SECONDS, "duration", "500ms", where)


def size_bytes(text: str | float, where: str = "") -> float:
    """Return a size in bytes: '2.5GB' -> 2.5e9, '1GiB' -> 2**30."""
    return _parse(text, BYTES, "size", "2.5GB", where)


def per_s(text: str | float, where: str = "") -> float:
    """Return a rate per second: '60/min' -> 1.0."""
    return _parse(text, RATES, "rate", "200/s", where)


def usd_per_h(text: str | float, where: str = "") -> float:
    """Return a price in dollars per hour: '$3.20/h' -> 3.2."""
    return _parse(text, USD_PER_H, "price", "$3.20/h", where, dollars=True)


def usd_per_byte(text: str | float, where: str = "") -> float:
    """Return a price in dollars per byte: '$0.09/GB' -> 9e-11."""
    return _parse(text, USD_PER_BYTE, "price", "$0.09/GB", where, dollars=True)


def usd_per_byte_month(text: str | float, where: str = "") -> float:
    """Return a price in dollars per byte kept for a month: '$0.10/GB/month' -> 1e-10."""
    return _parse(text, USD_PER_BYTE_MONTH, "price", "$0.10/GB/month", where, dollars=True)


def months(text: str | float, where: str = "") -> float:
    """Return a term in months: '1y' -> 12.0."""
    return _parse(text, MONTHS, "term", "12month", where)


def fraction(text: str | float, where: str = "") -> float:
    """Return a share: '99.9%' -> 0.999."""
    return _parse(text, {"%": 0.01}, "share", "99.9%", where)


def _parse(text: str | float, units: dict[str, float], what: str, example: str, where: str, dollars: bool = False) -> float:
    prefix = f"{where}: " if where else ""
    if not isinstance(text, str):
        guess = example.lstrip("$0123456789.")
        raise UnitError(f"{prefix}{text} has no unit; a {what} needs one, did you mean {'$' * dollars}{text}{guess}?")
    found = _QUANTITY.match(text)
    if found is None or bool(found["usd"]) != dollars:
        raise UnitError(f"{prefix}{text!r} is no {what}; write it like {example}")
    if found["unit"] not in units:
        missing = "has no unit" if not found["unit"] else f"has the unit {found['unit']!r}"
        raise UnitError(f"{prefix}{text!r} {missing}; a {what} takes one of {', '.join(units)}, e.g. {example}")
    value = float(found["number"].replace("_", "")) * units[found["unit"]]
    if not math.isfinite(value):
        raise UnitError(f"{prefix}{text!r} is not a finite {what}")
    return value


# ---------------------------------------------------------------- printing


def count(n: int, noun: str) -> str:
    """Print a number of things: '1 replica', '1,200 requests'."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def show_s(value: float | None) -> str:
    """Print a duration in its natural unit, three digits: 0.0123 -> '12.3 ms'."""
    if value is None or not math.isfinite(value):
        return "—"
    magnitude = abs(value)
    if magnitude >= 7200:
        return f"{_digits(value / 3600)} h"
    if magnitude >= 120:
        return f"{_digits(value / 60)} min"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if magnitude >= scale * 0.9995:
            return f"{_digits(value / scale)} {unit}"
    return f"{_digits(value / 1e-9)} ns" if value else "0 s"


def show_bytes(value: float | None) -> str:
    """Print a size, decimal units: 2.5e9 -> '2.50 GB'."""
    return _show_scaled(value, "B")


def show_usd(value: float | None) -> str:
    """Print dollars: cents below 1,000, whole dollars above."""
    if value is None:
        return "unpriced"
    if 0 < abs(value) < 0.1:
        return f"${value:.4f}"
    return f"${value:,.2f}" if abs(value) < 1000 else f"${value:,.0f}"


def show_rate(value: float | None) -> str:
    """Print a rate per second: 12.34 -> '12.3/s'."""
    return "—" if value is None else f"{_digits(value)}/s"


def show_share(value: float | None) -> str:
    """Print a share in percent: 0.634 -> '63.4 %'."""
    return "—" if value is None else f"{100 * value:.1f} %"


def show_scaled(value: float | None, unit: str) -> str:
    """Print with a decimal prefix: (1.2e12, 'FLOP/s') -> '1.20 TFLOP/s'."""
    return _show_scaled(value, unit)


def _show_scaled(value: float | None, unit: str) -> str:
    if value is None or not math.isfinite(value):
        return "—"
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale * 0.9995:
            return f"{_digits(value / scale)} {prefix}{unit}"
    return f"{_digits(value)} {unit}"


def _digits(value: float) -> str:
    """Three significant digits, no exponent, thousands marked."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value)) + 1e-12))
    return f"{value:,.{min(decimals, 6)}f}"
