"""What the machine does while a launch measures: a thread of the parent that looks twice a second, and the verdict *contended*.

watch = Telemeter(); watch.start()      when the child starts
watch.stop(cores)                       when it has ended: the record, what disturbed it in words, and what this machine does not tell

`Disturbances` is the child's own look, before and after every visit: preempted, stolen from, throttled.
"""

from __future__ import annotations

import os
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from mlsys_bench import units
from mlsys_bench.hardware import proc
from mlsys_bench.hardware.devices import FORCED_THROTTLES, MissedError, Nvml, Rapl
from mlsys_bench.types import Telemetry

EVERY_S = 0.5
CPUFREQ = Path("/sys/devices/system/cpu")
FEW_CPUS = 16  # /proc/cpuinfo asks every CPU for its clock: not on large machines
# The limits of `gate run`'s contention (journeys/gating/conditions.py) and why they lie there: 1 % stolen makes a time 1 % longer; a
# neighbour that uses 5 % of the machine costs 1 % and more.  On the measuring cores alone the same 5 %: what others run there, we wait for.
STEAL, OTHER = 0.01, 0.05
FORCED_PER_S = 50.0
SOMEBODY = "somebody else was on a measuring core's other hyperthread"
LEAST_S = 0.5  # of watching, below which nothing is said: 50 ticks of a CPU

Cores = tuple[int, ...]
Look = dict[str, float]


class Times(NamedTuple):
    """CPU time since boot in clock ticks: of the whole machine, and of some cores."""

    machine: proc.Times
    cores: dict[int, proc.Times]


def cpu_times(root: Path) -> Times | None:
    """Return what /proc/stat says, None where there is none."""
    try:
        lines = (root / "stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = {line.split()[0]: _processes(line) for line in lines if line.startswith("cpu")}
    machine = found.pop("cpu", None)
    return None if machine is None else Times(machine, {int(name[3:]): times for name, times in found.items() if times is not None})


def _processes(line: str) -> proc.Times | None:
    """Return a line's times, those of interrupts as idle: no process ran, and the kernel does not charge them to one."""
    times = proc.times_of(line)
    return None if times is None else times._replace(idle=times.idle + sum(map(int, line.split()[6:8])))


# ---------------------------------------------------------------- in the child, around each visit


class Core(NamedTuple):
    """How crowded the measuring cores are, and the clock of the slowest (`alone.core`), None where nobody can tell."""

    crowding: float
    clock_hz: float | None


class Disturbance(NamedTuple):
    """A visit: how often we were forced off a CPU, whether all of it was slowed, how crowded cores were, and their clock after it."""

    involuntary: int
    slowed: bool
    crowding: float | None = None
    clock_hz: float | None = None


class Before(NamedTuple):
    """Counters at the start of a visit."""

    involuntary: int
    stolen: int
    core: Core | None = None


class Watch(Protocol):
    """What looks around a visit."""

    def look(self) -> Before:
        """Return the counters now."""

    def since(self, before: Before) -> Disturbance:
        """Return what happened since."""


class Disturbances:
    """Reads the process's involuntary switches, the cores' stolen ticks, how crowded and fast they are, and whether a card is throttled.

    Some 60 us.  `core` looks at the measuring cores; of the clock what it is after a visit counts: before, it is that of the visit before.
    """

    def __init__(self, cores: Cores, *, cuda: bool = False, root: Path = proc.PROC, core: Callable[[], Core] | None = None) -> None:
        self._root, self._cores, self._core = root, cores, core
        self._cards = Nvml() if cuda else None

    def look(self) -> Before:
        """Return the counters now."""
        core = self._core() if self._core is not None else None
        return Before(resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw, self._stolen(), core)

    def since(self, before: Before) -> Disturbance:
        """Return what happened since."""
        now = self.look()
        slowed = now.stolen > before.stolen or self._throttled()
        crowding = max((look.core.crowding for look in (before, now) if look.core is not None), default=None)
        return Disturbance(now.involuntary - before.involuntary, slowed, crowding, now.core and now.core.clock_hz)

    def _stolen(self) -> int:
        times = cpu_times(self._root)
        if times is None:
            return 0
        return sum(times.cores[core].steal for core in self._cores if core in times.cores) if self._cores else times.machine.steal

    def _throttled(self) -> bool:
        if self._cards is None:
            return False
        try:
            return self._cards.throttled()
        except MissedError:
            self._cards = None
            return False


# ---------------------------------------------------------------- in the parent, all the time


class Seen(NamedTuple):
    """What a launch's telemetry came to."""

    telemetry: Telemetry
    contended: tuple[str, ...]
    unread: tuple[str, ...]


class Telemeter:
    """Looks at this machine in a thread until `stop`."""

    def __init__(self, root: Path = proc.PROC, cpufreq: Path = CPUFREQ, cards: Nvml | None = None, energy: Rapl | None = None) -> None:
        self._root, self._cpufreq = root, cpufreq
        self._cards, self._energy = cards or Nvml(), energy or Rapl()
        self._missing: dict[str, str] = {}
        self._at_s: list[float] = []
        self._looks: list[Look] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="telemetry")

    def start(self) -> None:
        """Begin to look."""
        self._began_s, self._before = time.monotonic(), cpu_times(self._root)
        self._ours_before_s = proc.ours_s()
        self._last = self._before
        self._look()
        self._thread.start()

    def stop(self, cores: Cores, involuntary: int | None = None) -> Seen:
        """Look a last time; return what was seen, judged for the cores that measured (none: the whole machine).

        `involuntary` is how often the child was forced off its CPU, as it said at its end.
        """
        self._over.set()
        self._thread.join()
        self._look()
        self._cards.release()
        wall_s = time.monotonic() - self._began_s
        totals = {name: value for name, value in self._totals(cores, wall_s) if value is not None}
        totals |= {} if involuntary is None else {"involuntary": float(involuntary)}
        names = dict.fromkeys(name for look in self._looks for name in look)
        series = {name: tuple(look.get(name) for look in self._looks) for name in names if not name.endswith("_j")}
        telemetry = Telemetry(at_s=tuple(self._at_s), series=series, totals=totals)
        return Seen(telemetry, tuple(contended(totals, wall_s)), tuple(self._unread()))

    def _watch(self) -> None:
        while not self._over.wait(EVERY_S):
            self._look()

    def _look(self) -> None:
        self._at_s.append(round(time.monotonic() - self._began_s, 3))
        self._looks.append({**self._cpu(), **self._gpu(), **self._joules()})

    def _cpu(self) -> Look:
        now, last = cpu_times(self._root), self._last
        self._last = now
        clock = clock_hz(self._root, self._cpufreq)
        found = {} if clock is None else {"cpu_clock_hz": clock}
        try:
            found["load_1min"] = os.getloadavg()[0]
        except OSError:
            self._missing["load"] = "the load of this machine: the system does not tell it"
        if now is None or last is None:
            return found
        shares = proc.shares(last.machine, now.machine, 0.0)
        return found | {name: v for name, v in (("steal_share", shares.steal), ("busy_share", shares.other)) if v is not None}

    def _gpu(self) -> Look:
        if "gpu" in self._missing:
            return {}
        try:
            return summed(self._cards.look(EVERY_S))
        except MissedError as error:
            self._missing["gpu"] = f"GPU clocks, power, temperature and throttling: {error}"
            return {}

    def _joules(self) -> Look:
        if "energy" in self._missing:
            return {}
        try:
            return {"cpu_energy_j": sum(self._energy.look(EVERY_S).values())}
        except MissedError as error:
            self._missing["energy"] = f"energy of the CPU: {error}"
            return {}

    def _totals(self, cores: Cores, wall_s: float) -> Iterator[tuple[str, float | None]]:
        after = cpu_times(self._root)
        ours_s = max(0.0, proc.ours_s() - self._ours_before_s)
        yield "wall_s", wall_s
        yield "cpu_s", ours_s
        whole = proc.shares(self._before and self._before.machine, after and after.machine, ours_s * proc.ticks_per_s())
        yield "other_cpu_share", whole.other
        steal, busy = _of_cores(self._before, after, cores)
        yield "steal_share", whole.steal if steal is None else steal
        if busy is not None:  # what ran on the measuring cores beyond all that we ran anywhere: at least so much was others'
            yield "other_on_cores_share", max(0.0, busy - ours_s / (wall_s * len(cores)))
        for name in ("energy_j", "cpu_energy_j"):
            known = [look[name] for look in self._looks if name in look]
            yield name, known[-1] - known[0] if len(known) > 1 else None
        if any("throttle_mask" in look for look in self._looks):
            yield "throttled_s", EVERY_S * sum(bool(int(look.get("throttle_mask", 0)) & FORCED_THROTTLES) for look in self._looks)

    def _unread(self) -> Iterator[str]:
        if self._before is None:
            yield "stolen CPU time and other processes' use: /proc/stat cannot be read, so nobody says whether others disturbed this run"
        if all("cpu_clock_hz" not in look for look in self._looks):
            yield "the CPU's clock: neither cpufreq nor /proc/cpuinfo tells it"
        yield from self._missing.values()


def _of_cores(before: Times | None, after: Times | None, cores: Cores) -> tuple[float | None, float | None]:
    """Return the stolen and the busy share of some cores' time, None where nothing tells."""
    if before is None or after is None or not cores or any(core not in after.cores or core not in before.cores for core in cores):
        return None, None
    shares = [proc.shares(before.cores[core], after.cores[core], 0.0) for core in cores]
    steal, busy = [s.steal for s in shares if s.steal is not None], [s.other for s in shares if s.other is not None]
    return (statistics.fmean(steal), statistics.fmean(busy)) if steal and busy else (None, None)


def contended(totals: dict[str, float], wall_s: float) -> Iterator[str]:
    """Say in words what else used this machine, beyond what costs a measurement 1 %.  Nothing below half a second of watching."""
    if wall_s < LEAST_S:
        return
    if (steal := totals.get("steal_share", 0.0)) > STEAL:
        yield f"the hypervisor took {units.show_share(steal)} of the measuring cores' time: the host is shared"
    if (other := totals.get("other_on_cores_share", 0.0)) > OTHER:
        yield f"other processes used {units.show_share(other)} of the measuring cores' time: end them, or measure on other cores"
    elif (other := totals.get("other_cpu_share", 0.0)) > OTHER:
        yield f"other processes used {units.show_share(other)} of this machine's CPU time: end them, caches and memory are shared"
    forced_per_s = totals.get("involuntary", 0.0) / wall_s
    if forced_per_s > FORCED_PER_S and totals.get("other_cpu_share", 1.0) > OTHER / 5:
        yield f"others forced it off its CPU {forced_per_s:,.0f} times a second"
    if totals.get("throttled_s", 0.0) > 0:
        yield f"a GPU was slowed by heat or its power supply for {totals['throttled_s']:.1f} s"


def shared(shares: Sequence[float]) -> Iterator[str]:
    """Say in words that a neighbour shared the measuring cores, in such shares of the visits of the launches, beyond what costs 1 %."""
    if (share := max(shares, default=0.0)) > OTHER:
        yield f"{SOMEBODY} in {units.show_share(share)} of the samples (on a shared host another tenant); these are left out of medians"


def summed(look: dict[tuple[str, str], float]) -> Look:
    """Return one state of all cards: the slowest clocks, all power, energy and memory, the hottest, every throttle."""
    by_name: dict[str, list[float]] = {}
    for (name, _), value in look.items():
        by_name.setdefault(name.removeprefix("nvml_"), []).append(value)
    shown: dict[str, tuple[str, Callable[[list[float]], float]]] = {
        "sm_clock_hz": ("sm_clock", min), "memory_clock_hz": ("memory_clock", min), "power_w": ("power", sum), "energy_j": ("energy", sum),
        "temperature_c": ("temperature", max), "utilisation": ("utilisation", max), "memory_bytes": ("memory", sum),
        "throttle_mask": ("throttle", max),
    }  # fmt: skip
    return {shown_as: together(by_name[name]) for shown_as, (name, together) in shown.items() if name in by_name}


def clock_hz(root: Path, cpufreq: Path) -> float | None:
    """Return the clock of the first CPU as cpufreq has it, or as /proc/cpuinfo does on small machines."""
    try:
        return float((cpufreq / "cpu0/cpufreq/scaling_cur_freq").read_text(encoding="utf-8")) * 1e3
    except (OSError, ValueError):
        pass
    try:
        text = (root / "cpuinfo").read_text(encoding="utf-8", errors="replace") if (os.cpu_count() or 1) <= FEW_CPUS else ""
    except OSError:
        return None
    found = [line.partition(":")[2] for line in text.splitlines() if line.startswith("cpu MHz")]
    return float(found[0]) * 1e6 if found else None
