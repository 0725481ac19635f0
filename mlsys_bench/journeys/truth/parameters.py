"""The parameters of a row, `c=4;rho=0.9;service=logn:4`, as numbers and laws: each is read once, and none may be left over."""

from __future__ import annotations

import math
import re

from mlsys_bench.errors import BadInput, did_you_mean
from mlsys_bench.queueing.laws import Law, parse_law

LENGTHS = re.compile(r"(?P<law>[^,]+),\s*mean (?P<mean>[^,]+)(?:,\s*rounded)?(?:,\s*clipped to (?P<low>\d+)\.\.(?P<high>\d+))?")
LONGEST = 10**9  # tokens, where lengths are not clipped
UNBOUNDED = ("inf", "infinity", "none")


class Parameters:
    """Parameters by name.  `all_read` raises for one that no model asked for: to drop it would be to answer another question."""

    def __init__(self, text: str) -> None:
        self._given: dict[str, str] = {}
        for part in filter(None, map(str.strip, text.split(";"))):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name in self._given:
                raise BadInput(f"parameter {name} is given twice")
            self._given[name] = value
        self._unread = set(self._given)
        self._known: set[str] = set()

    def has(self, name: str) -> bool:
        """Return whether a parameter is given."""
        self._known.add(name)
        return name in self._given

    def text(self, name: str, default: str | None = None) -> str:
        """Return a parameter as it stands."""
        self._known.add(name)
        self._unread.discard(name)
        value = self._given.get(name, default)
        if value is None:
            raise BadInput(f"parameter {name} is missing")
        return value

    def number(self, name: str, default: float | None = None, *, zero: bool = False) -> float:
        """Return a finite number above 0, or also 0 where `zero` allows it."""
        value = as_number(self.text(name, None if default is None else repr(default)), name)
        if value < 0 or (value == 0 and not zero):
            raise BadInput(f"parameter {name}={value:g} must {'not be negative' if zero else 'be above 0'}")
        return value

    def whole(self, name: str, default: int | None = None) -> int:
        """Return a whole number from 1 up."""
        value = self.number(name, default)
        if value != int(value):
            raise BadInput(f"parameter {name}={value:g} must be a whole number")
        return int(value)

    def whole_or_none(self, name: str) -> int | None:
        """Return a whole number from 1 up, None for `inf`."""
        return None if self.text(name).lower() in UNBOUNDED else self.whole(name)

    def law(self, name: str, mean_s: float, default: str | None = None) -> Law:
        """Return a law in the table's notation with this mean (a bounded Pareto law keeps its own)."""
        try:
            return parse_law(self.text(name, default), mean_s)
        except BadInput as error:
            raise BadInput(f"parameter {name}: {error}") from error

    def lengths(self, name: str) -> tuple[Law, tuple[int, int]]:
        """Return token lengths, `logn:1,mean 300,rounded,clipped to 1..4096`, as their law and the range they are clipped to."""
        found = LENGTHS.fullmatch(self.text(name))
        if found is None:
            raise BadInput(f"parameter {name}={self.text(name)!r} is not of the form LAW,mean M,rounded,clipped to LOW..HIGH")
        return parse_law(found["law"], as_number(found["mean"], name)), (int(found["low"] or 1), int(found["high"] or LONGEST))

    def spells_out(self, name: str, model: str) -> None:
        """Check that a parameter which writes the model down, if it is there, writes the one computed here."""
        if self.has(name) and "".join(self.text(name).split()) != "".join(model.split()):
            raise BadInput(f"{name}={self._given[name]} is another model; the one known here has {name}={model}")

    def follows(self, name: str, value: float) -> None:
        """Check a parameter that the others determine, if it is there."""
        if self.has(name) and not math.isclose(as_number(self.text(name), name), value, rel_tol=1e-3):
            raise BadInput(f"parameter {name}={self._given[name]} contradicts the others, which make it {value:g}")

    def all_read(self) -> None:
        """Raise BadInput for a parameter that nobody has read."""
        for name in sorted(self._unread):
            raise BadInput(f"unknown parameter {name!r}{did_you_mean(name, self._known)}")


def as_number(text: str, name: str) -> float:
    """Return a finite number; raise BadInput naming the parameter otherwise."""
    try:
        value = float(text)
    except ValueError:
        raise BadInput(f"parameter {name}={text!r} is no number") from None
    if not math.isfinite(value):
        raise BadInput(f"parameter {name}={text!r} is not finite")
    return value
