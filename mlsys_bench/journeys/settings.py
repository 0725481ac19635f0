"""Settings written in one option: `KEY=VALUE,KEY=VALUE`, the first value without its key where there is a main one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlsys_bench import units
from mlsys_bench.errors import BadInput, did_you_mean

Parse = Callable[[str, str], Any]


def parse(
    text: str,
    option: str,
    known: Mapping[str, Parse],
    *,
    main: str | None = None,
    needed: Sequence[str] = (),
    often: Sequence[str] = ("at",),
) -> dict[str, Any]:
    """Return the settings of an option by name, dashes as underscores; those that may be named `often` become lists.  Raises BadInput."""
    found: dict[str, list[Any]] = {}
    for i, part in enumerate(text.split(",")):
        key, equals, value = (side.strip() for side in part.partition("="))
        if not equals and i == 0 and main is not None:
            key, value = main, key
        if key not in known:
            raise BadInput(f"{option} {text}: unknown setting {key!r}{did_you_mean(key, known)}")
        if not value:
            raise BadInput(f"{option} {text}: {key} needs a value, e.g. {key}=…")
        if key in found and key not in often:
            raise BadInput(f"{option} {text}: {key} is given twice; which of them holds?")
        found.setdefault(key, []).append(known[key](value, f"{option}: {key}"))
    missing = [key for key in needed if key not in found]
    if missing:
        raise BadInput(f"{option} {text}: {' and '.join(missing)} must be given too")
    return {key.replace("-", "_"): values[0] if len(values) == 1 else values for key, values in found.items()}


def whole(text: str, where: str) -> int:
    """Return a count."""
    if not text.isdecimal():
        raise BadInput(f"{where}: {text!r} is no whole number")
    return int(text)


def number(text: str, where: str) -> float:
    """Return a number without a unit."""
    try:
        return units.plain(text)
    except ValueError as error:
        raise BadInput(f"{where}: {text!r} is no number") from error


def bandwidth(text: str, where: str) -> float:
    """Return bytes per second: '50GB/s'."""
    if not text.endswith("/s"):
        raise BadInput(f"{where}: {text!r} is no bandwidth; write it like 50GB/s")
    found = units.size_bytes(text.removesuffix("/s"), where)
    if found <= 0:
        raise BadInput(f"{where}: {text!r}: nothing moves over such a link; it must be above zero, e.g. 50GB/s")
    return found
