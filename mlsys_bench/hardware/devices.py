"""The devices of this machine while they work: NVIDIA GPUs through NVML, CPU packages through Linux's powercap (RAPL)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Key = tuple[str, str]  # a name and its labels as they are spelled
POWERCAP = Path("/sys/class/powercap")
DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # one is there where NVIDIA's driver is; nvidia-ml-py alone takes 60 ms to import
# NVML's bits (nvml.h, nvmlClocksThrottleReason…), which DCGM passes on; idle, set clocks and sync boost are no throttling
THROTTLES = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
FORCED_THROTTLES = 0x8 | 0x20 | 0x40 | 0x80  # heat or the power supply, not the program's own appetite


class MissedError(Exception):
    """A look that brought nothing, and why."""


class _Device:
    """What answers at once: closing it keeps the next look from beginning."""

    bytes = 0
    is_closed = False

    def close(self) -> None:
        """Look no more, also from another thread."""
        self.is_closed = True

    def _check(self) -> None:
        if self.is_closed:
            raise MissedError("the run is over")


class Nvml(_Device):
    """GPUs through NVML (nvidia-ml-py).  What a card does not tell is left out."""

    where = "NVML of this machine"

    def __init__(self, drivers: Sequence[Path] = DRIVERS) -> None:
        self._drivers = drivers
        self._nvml: Any = None
        self._cards: list[tuple[str, Any]] = []

    def look(self, timeout_s: float) -> dict[Key, float]:
        """Return what every card says.  Raises MissedError where there is none."""
        del timeout_s  # a driver answers or the machine hangs
        self._check()
        if self._nvml is None:
            self._begin()
        found = {}
        for label, card in self._cards:
            for name, ask in _questions(self._nvml, card).items():
                try:
                    found[f"nvml_{name}", label] = float(ask())
                except self._nvml.NVMLError:
                    continue  # this card, or this driver, does not tell
        if not found:
            raise MissedError("the cards tell nothing")
        return found

    def throttled(self) -> bool:
        """Say whether heat or the power supply slows a card right now; one question each, where `look` asks eight."""
        if self._nvml is None:
            self._begin()
        return any(self._mask(card) & FORCED_THROTTLES for _, card in self._cards)

    def _mask(self, card: Any) -> int:
        try:
            return int(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(card))
        except self._nvml.NVMLError:
            return 0  # this card, or this driver, does not tell

    def release(self) -> None:
        """Let the driver go."""
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml, self._cards = None, []

    def _begin(self) -> None:
        if not any(driver.exists() for driver in self._drivers):
            raise MissedError("there is no NVIDIA driver")
        try:
            import pynvml
        except ImportError:
            raise MissedError("nvidia-ml-py is not installed (pip install 'mlsys-bench[engine]')") from None
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise MissedError(str(error)) from None
        self._nvml = pynvml
        try:
            cards = [(i, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError as error:
            raise MissedError(str(error)) from None
        self._cards = [(f'gpu="{i}"', card) for i, card in cards]
        if not self._cards:
            raise MissedError("the driver lists no GPU")


def _questions(nvml: Any, card: Any) -> dict[str, Callable[[], float]]:
    """Return what is asked of a card, in SI units (NVML's own: mW, mJ, MHz, %)."""
    return {
        "power": lambda: nvml.nvmlDeviceGetPowerUsage(card) / 1e3,
        "energy": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1e3,
        "utilisation": lambda: nvml.nvmlDeviceGetUtilizationRates(card).gpu / 100,
        "sm_clock": lambda: nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM) * 1e6,
        "memory_clock": lambda: nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_MEM) * 1e6,
        "memory": lambda: nvml.nvmlDeviceGetMemoryInfo(card).used,
        "temperature": lambda: nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU),
        "throttle": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(card),
    }


class Rapl(_Device):
    """CPU packages and their memory through powercap.  The counters wrap at `max_energy_range_uj`, which is undone here.

    A domain `intel-rapl:0` is a package (AMD's too), `intel-rapl:0:N` a part of it; only `dram` lies outside the package's own figure.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self._root, self.where = root, f"RAPL of this machine ({root})"
        self._domains: list[tuple[str, Path, float]] = []
        self._last: dict[str, float] = {}
        self._turns: dict[str, float] = {}

    def look(self, timeout_s: float) -> dict[Key, float]:
        """Return joules by domain.  Raises MissedError where none can be read."""
        del timeout_s  # the kernel answers at once
        self._check()
        if not self._domains:
            self._domains = self._find()
        try:
            return {("rapl_energy", f'device="{name}"'): self._joules(name, file, most) for name, file, most in self._domains}
        except OSError as error:
            raise MissedError(f"{self._root}: energy_uj cannot be read: {error.strerror}") from None

    def release(self) -> None:
        """Forget the domains."""
        self._domains = []

    def _joules(self, name: str, file: Path, most: float) -> float:
        now = float(file.read_text())
        if now < self._last.get(name, 0.0):
            self._turns[name] = self._turns.get(name, 0.0) + most
        self._last[name] = now
        return (now + self._turns.get(name, 0.0)) * 1e-6

    def _find(self) -> list[tuple[str, Path, float]]:
        if not self._root.is_dir():
            raise MissedError(f"{self._root} is not there")
        found = []
        for folder in sorted(self._root.glob("intel-rapl:*")):
            try:
                name, most = (folder / "name").read_text().strip(), float((folder / "max_energy_range_uj").read_text())
            except (OSError, ValueError):
                continue  # a domain that tells nothing of itself
            parent = folder.name.split(":")[1]
            if name.startswith("package"):
                found.append((name, folder / "energy_uj", most))
            elif name == "dram":
                found.append((f"dram-{parent}", folder / "energy_uj", most))
        if not found:
            raise MissedError(f"{self._root} lists no CPU package")
        return found
