"""Recorded sessions of launches, several programs side by side, as lines without a header.

    session, disturbed, arm, round, position, samples separated by blanks

A sample is a time in microseconds, or wall_us:cpu_us:involuntary_switches.  In each session every arm is one launch; the arms A, A2, A3 are
the same program.  Other arms are held against A of their session only: two others may share an address layout, and are no independent pair.
The order of the lines says nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlsys_bench import record
from mlsys_bench.errors import BadInput
from mlsys_bench.types import Launch, Measurement, Round

BASELINE = "A"
_SAME = re.compile(r"A\d+")
FEWEST = 3  # sessions from which anything can be drawn
NAME = "time"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One program beside the baseline: both as measurements whose launches are sessions, paired by session."""

    name: str
    sessions: tuple[str, ...]
    base: Measurement
    cand: Measurement

    @property
    def is_same(self) -> bool:
        """Say whether it is the baseline's own program."""
        return _SAME.fullmatch(self.name) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sessions:
    """A file of recorded sessions."""

    source: str
    lines: int
    sessions: tuple[str, ...]
    disturbed: tuple[str, ...]  # the sessions that a neighbour disturbed
    arms: tuple[Arm, ...]
    left_out: tuple[str, ...] = ()  # arms that stand beside the baseline in too few sessions


def read(path: Path) -> Sessions:
    """Return what a file holds.  Raises BadInput naming file, line and what is wrong with it."""
    found: dict[str, dict[str, dict[int, Round]]] = {}
    disturbed: dict[str, bool] = {}
    lines = [(number, fields) for number, fields in record.csv_lines(path) if fields]
    for number, fields in lines:
        where = f"{path}: line {number}"
        session, flag, arm, turn, samples = _fields(fields, where)
        if disturbed.setdefault(session, flag) != flag:
            raise BadInput(f"{where}: session {session} is disturbed here and was not before, or the other way round")
        rounds = found.setdefault(session, {}).setdefault(arm, {})
        if turn in rounds:
            raise BadInput(f"{where}: round {turn} of arm {arm} in session {session} comes twice")
        rounds[turn] = samples
    _check_alike(found, path)
    found = {session: found[session] for session in sorted(found, key=_place)}
    arms = tuple(_arms(found, path))
    known = {BASELINE, *(arm.name for arm in arms)}
    return Sessions(
        source=str(path), lines=len(lines), sessions=tuple(found), disturbed=tuple(s for s in found if disturbed[s]), arms=arms,
        left_out=tuple(sorted({name for each in found.values() for name in each} - known, key=_order)),
    )  # fmt: skip


def _place(session: str) -> tuple[bool, int, str]:
    """Return what sessions are sorted by: numbers first, as numbers."""
    number = session.isascii() and session.isdigit()
    return not number, int(session) if number else 0, session


def _fields(fields: Sequence[str], where: str) -> tuple[str, bool, str, int, Round]:
    if len(fields) != 6:
        raise BadInput(f"{where}: has {len(fields)} fields; needed are session, disturbed, arm, round, position, samples")
    session, flag, arm, turn, position, samples = (field.strip() for field in fields)
    if flag not in ("0", "1"):
        raise BadInput(f"{where}: disturbed is {flag!r}; needed is 0 or 1")
    for name, value in (("session", session), ("arm", arm)):
        if not value:
            raise BadInput(f"{where}: {name} is empty")
    for name, value in (("round", turn), ("position", position)):
        if not (value.isascii() and value.isdigit()):
            raise BadInput(f"{where}: {name} is {value!r}; needed is a whole number")
    return session, flag == "1", arm, int(turn), _round(samples, where)


def _round(text: str, where: str) -> Round:
    rows = [_sample(token, where) for token in text.split()]
    if not rows:
        raise BadInput(f"{where}: has no samples")
    if len({len(row) for row in rows}) > 1:
        raise BadInput(f"{where}: mixes samples of one number and of wall:cpu:switches")
    walls = tuple(1e-6 * row[0] for row in rows)
    if len(rows[0]) == 1:
        return Round(values=walls)
    return Round(values=walls, cpu_s=tuple(1e-6 * row[1] for row in rows), involuntary=tuple(int(row[2]) for row in rows))


def _sample(token: str, where: str) -> tuple[float, ...]:
    parts = token.split(":")
    try:
        numbers = tuple(float(part) for part in parts)
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)) or numbers[0] <= 0 or min(numbers) < 0:
        raise BadInput(f"{where}: sample {token!r} is neither a time in microseconds above zero nor wall:cpu:switches")
    return numbers


def _check_alike(found: dict[str, dict[str, dict[int, Round]]], path: Path) -> None:
    """Refuse a file whose samples know CPU time in some lines only: its metrics would be those of some sessions only."""
    kinds = {r.cpu_s is None for arms in found.values() for rounds in arms.values() for r in rounds.values()}
    if len(kinds) > 1:
        raise BadInput(f"{path}: some lines have samples of one number, others wall:cpu:switches; give each kind a file of its own")


def _arms(found: dict[str, dict[str, dict[int, Round]]], path: Path) -> Iterator[Arm]:
    """Yield each arm with the baseline of the sessions that hold both, those of the same program first; none that stands in too few."""
    names = sorted({arm for arms in found.values() for arm in arms} - {BASELINE}, key=_order)
    beside = {name: [s for s, arms in found.items() if BASELINE in arms and name in arms] for name in names}
    most = max(names, key=lambda name: len(beside[name]), default=None)
    if most is not None and len(beside[most]) < FEWEST:
        raise BadInput(f"{path}: arm {most} stands beside {BASELINE} in {len(beside[most])} sessions; at least {FEWEST} are needed")
    for name, both in beside.items():
        if len(both) < FEWEST:
            continue
        base, cand = (_measurement([found[s][arm] for s in both]) for arm in (BASELINE, name))
        yield Arm(name=name, sessions=tuple(both), base=base, cand=cand)
    if not names:
        raise BadInput(f"{path}: holds no arm beside {BASELINE!r}, so there is nothing to decide")


def _order(name: str) -> tuple[str, int]:
    digits = re.sub(r"\D", "", name)
    return re.sub(r"\d", "", name), int(digits or 0)


def _measurement(launches: Sequence[dict[int, Round]]) -> Measurement:
    ran = tuple(
        Launch(started_s=0.0, rounds=tuple(rounds[n] for n in sorted(rounds)), pair=pair) for pair, rounds in enumerate(launches, start=1)
    )
    return Measurement(name=NAME, unit="s", better="lower", parameters={}, launches=ran)
