"""Everything that can go wrong on purpose.

MlsysError                  what, where, what now: one line a tired person can act on
├── BadInput                exit 2   a file, an option or a value that cannot be used
│   ├── UnitError           a quantity without a unit, or with the wrong one
│   ├── RecordError         a file that is no record of ours, or of another schema version
│   ├── ScenarioError       a scenario that does not hold together
│   ├── UnknownName         a model, GPU or scenario nobody knows
│   └── NotBuilt            a command whose room is not built yet
├── Infeasible              exit 1   no design meets the limits; says which limit and by how much
├── Overload                exit 1   offered load at or above capacity: there is no steady state
├── NotComparable           exit 4   two results that must not be set side by side
└── MeasurementFailed       exit 5   nothing was measured, or what was measured is broken
    └── NothingYet          stopped by hand before anything was answered
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

INTERRUPTED = 130  # the exit status of what Ctrl-C ended, as a shell gives it


class MlsysError(Exception):
    """Base of all; `exit_status` is what the command line ends with."""

    exit_status = 2


class BadInput(MlsysError):
    """Something a person gave cannot be used."""


class UnitError(BadInput):
    """A quantity without a unit, or with the wrong one."""


class RecordError(BadInput):
    """A file that is no record of ours, is truncated, or has another schema version."""


class ScenarioError(BadInput):
    """A scenario that does not hold together."""


class UnknownName(BadInput):
    """A name that is in no catalogue.  Build it with `unknown`."""


class NotBuilt(BadInput):
    """A command that CONTRACT promises and that is not built yet."""


class Infeasible(MlsysError):
    """No design meets the limits."""

    exit_status = 1


class Overload(MlsysError):
    """Offered load at or above capacity.  `utilisation` is their ratio, `enough` the servers that would do, when known."""

    exit_status = 1

    def __init__(self, utilisation: float, servers: int, enough: int | None = None) -> None:
        """Keep the figures beside the sentence."""
        self.utilisation, self.servers, self.enough = utilisation, servers, enough
        cure = f"; {enough} would do" if enough is not None else ""
        super().__init__(f"utilisation is {utilisation:.2f} with {servers} server(s): the queue never settles at or above 1.00{cure}")

    def __reduce__(self) -> tuple[type[Overload], tuple[float, int, int | None]]:
        """Keep the figures on the way between processes, too."""
        return Overload, (self.utilisation, self.servers, self.enough)


class NotComparable(MlsysError):
    """Two results that must not be set side by side."""

    exit_status = 4


class MeasurementFailed(MlsysError):
    """Nothing was measured, or what was measured is broken."""

    exit_status = 5


class NothingYet(MeasurementFailed):
    """Stopped by hand before anything was answered."""


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> UnknownName:
    """Return the error for a name in no catalogue, naming its nearest neighbours."""
    return UnknownName(f"{where}: " * bool(where) + f"unknown {kind} {name!r}{did_you_mean(name, known)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return '; did you mean …?', or the list of what is known when nothing is near."""
    names = sorted(set(known))
    by_folded = {known_name.casefold(): known_name for known_name in names}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(by_folded[found] for found in near)}?"
    return f"; known: {', '.join(names[:12])}{', …' if len(names) > 12 else ''}"
