"""What a calibration of this machine says about a run: whether it went faster than its client was found trustworthy at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlsys_bench import units
from mlsys_bench.calibrations import Calibration, Client
from mlsys_bench.errors import BadInput, RecordError
from mlsys_bench.types import Machine, RequestRecord

# of the fingerprint: what a load client is made of; a GPU or a torch beside it changes nothing
_COUNTS = ("architecture", "os", "cpu_vendor", "cpu_family", "cpu_model", "cpu_name", "cores", "cpu_quota", "python")
_NEAR = 0.8  # of a closed loop's ceiling: from here on the client may be what is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """A calibration of this very machine."""

    calibration: Calibration
    where: str  # file and date


def cached(*, busy_poll: bool = False) -> Path:
    """Return where `mlsys loadtest --calibrate` keeps its result for later runs; clients that poll have a place of their own."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "mlsys" / f"calibration{'-polling' * busy_poll}.json"


def load(given: Path | None, *, busy_poll: bool = False) -> Trust | None:
    """Return the calibration a run is held against: the one given, else the cached one where it is of this machine, else None.

    Raises BadInput for a file that was given and is of another machine or of a client that polled where this one sleeps, or is none.
    """
    if given is None:
        return _from_cache(cached(busy_poll=busy_poll))
    from mlsys_bench import record  # here and below: most runs have no calibration and need not wait for this

    envelope, calibration = record.load(given)
    if not isinstance(calibration, Calibration):
        raise BadInput(f"--calibration {given}: holds a {envelope.kind!r} record; make one with mlsys loadtest --calibrate -o {given}")
    differs = _differences(envelope.machine)
    if differs:
        raise BadInput(
            f"--calibration {given}: is of another machine ({', '.join(differs)}); make one here with mlsys loadtest --calibrate"
        )
    if calibration.busy_poll and not busy_poll:
        raise BadInput(f"--calibration {given}: is of a client that polled, this one sleeps between events; add --busy-poll")
    return Trust(calibration=calibration, where=f"{given}, {envelope.created[:10]}")


def notes_on(
    trust: Trust | None, records: Sequence[RequestRecord], *, offered_per_s: float | None, window_s: float, processes: int
) -> tuple[str, ...]:
    """Return what to know of a run with these records.  `offered_per_s` is None in a closed loop."""
    ok = [r for r in records if r.in_window and r.outcome == "ok"]
    if trust is None or not ok or window_s <= 0:
        return ()
    rate_per_s = len(ok) / window_s if offered_per_s is None else offered_per_s
    tokens_per_s = rate_per_s * sum(r.output_tokens or 0 for r in ok) / len(ok)
    return notes(trust, open_loop=offered_per_s is not None, rate_per_s=rate_per_s, tokens_per_s=tokens_per_s, processes=processes)


def notes(trust: Trust | None, *, open_loop: bool, rate_per_s: float, tokens_per_s: float, processes: int) -> tuple[str, ...]:
    """Return what to know of a run at this rate: nothing where it stayed below what was found trustworthy."""
    clients = [c for c in trust.calibration.clients if c.processes <= processes] if trust else []
    if trust is None or not clients:
        return ()
    client = max(clients, key=lambda c: c.processes)
    return _open(trust, client, rate_per_s, tokens_per_s) if open_loop else _closed(trust, client, rate_per_s, tokens_per_s)


def _open(trust: Trust, client: Client, rate_per_s: float, tokens_per_s: float) -> tuple[str, ...]:
    if client.trusted_rate_per_s is None:
        return (f"this machine's load client was not found trustworthy at any rate ({trust.where})",)
    tokens_bound = client.trusted_rate_per_s * trust.calibration.tokens
    bound = f"up to {units.show_rate(client.trusted_rate_per_s)} of {trust.calibration.tokens} tokens ({trust.where})"
    if rate_per_s > client.trusted_rate_per_s:
        return (f"{units.show_rate(rate_per_s)} is more than this machine's client was found trustworthy at: {bound}",)
    if tokens_per_s > tokens_bound:
        return (f"{tokens_per_s:,.0f} tokens/s are more than this machine's client was found trustworthy at: {bound}",)
    return ()


def _closed(trust: Trust, client: Client, rate_per_s: float, tokens_per_s: float) -> tuple[str, ...]:
    streams, whole = (figure.mean if figure else None for figure in (client.streams_per_s, client.requests_per_s))
    used = max(rate_per_s / whole if whole else 0.0, tokens_per_s / (streams * trust.calibration.tokens) if streams else 0.0)
    if used <= _NEAR:
        return ()
    return (f"the client itself may be the limit: {units.show_share(used)} of what it can do in a closed loop ({trust.where})",)


def _from_cache(path: Path) -> Trust | None:
    if not path.is_file():
        return None
    from mlsys_bench import record

    try:
        envelope, calibration = record.load(path)
    except RecordError:  # of an older version, or half a file: as good as none, and the next --calibrate writes it anew
        return None
    if not isinstance(calibration, Calibration) or _differences(envelope.machine):
        return None
    return Trust(calibration=calibration, where=f"{path}, {envelope.created[:10]}")


def _differences(machine: Machine) -> list[str]:
    from mlsys_bench import hardware

    here = hardware.machine().hard
    return [f"{name} {machine.hard.get(name)}, here {here.get(name)}" for name in _COUNTS if machine.hard.get(name) != here.get(name)]
