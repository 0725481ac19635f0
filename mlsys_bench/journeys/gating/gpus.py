"""GPU clocks, power, temperature and what slowed them, looked at while launches run: afterwards a GPU is idle and says nothing of them."""

from __future__ import annotations

import statistics
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from mlsys_bench.loadtest.serverside.devices import Nvml
from mlsys_bench.loadtest.serverside.names import THROTTLES
from mlsys_bench.loadtest.serverside.page import MissedError
from mlsys_bench.loadtest.serverside.text import Key
from mlsys_bench.types import Scalar

EVERY_S = 0.2
Look = Mapping[Key, float]


class Cards(Protocol):
    """What answers for the GPUs of this machine."""

    def look(self, timeout_s: float) -> Look:
        """Return what every card says now.  Raises MissedError where there is none."""

    def release(self) -> None:
        """Let the driver go."""


class Sampler:
    """Looks several times a second, in a thread, until `stop`; where there is no GPU it ends at the first look."""

    def __init__(self, cards: Cards | None = None) -> None:
        self._cards = cards or Nvml()
        self._looks: list[Look] = []
        self._over = threading.Event()
        self.missing: str | None = None  # why there is nothing
        self._thread: threading.Thread | None = None
        if self._look():
            self._thread = threading.Thread(target=self._watch, daemon=True, name="gpu conditions")
            self._thread.start()

    def stop(self) -> dict[str, Scalar] | None:
        """Return the state of the cards meanwhile, None where there are none.  May be called again."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._cards.release()
        return summed(self._looks)

    def _watch(self) -> None:
        while not self._over.wait(EVERY_S) and self._look():
            pass

    def _look(self) -> bool:
        try:
            self._looks.append(self._cards.look(EVERY_S))
        except MissedError as error:
            self.missing = str(error)
        return self.missing is None


def summed(looks: Iterable[Look]) -> dict[str, Scalar] | None:
    """Return one state of all cards that worked (of all, where none did): the slowest clocks, all power, the hottest, every throttle.

    A card's clocks are the medians of the looks in which it worked: an idle card rests at a low clock, which slows nobody.
    """
    by_card: dict[str, list[dict[str, float]]] = defaultdict(list)
    for look in looks:
        one: dict[str, dict[str, float]] = defaultdict(dict)
        for (name, card), value in look.items():
            one[card][name.removeprefix("nvml_")] = value
        for card, values in one.items():
            by_card[card].append(values)
    if not by_card:
        return None
    worked = {card: busy for card, seen in by_card.items() if (busy := [look for look in seen if look.get("utilisation", 0.0) > 0])}
    used = list((worked or by_card).values())
    figures: dict[str, Scalar] = {
        "cards": len(used),
        "sm_clock_mhz": _over(used, "sm_clock", 1e-6, min),
        "memory_clock_mhz": _over(used, "memory_clock", 1e-6, min),
        "power_w": _over(used, "power", 1.0, sum),
        "temperature_c": _over(used, "temperature", 1.0, max),
        "throttle": throttles(int(look["throttle"]) for seen in used for look in seen if "throttle" in look),
    }
    return {name: value for name, value in figures.items() if value is not None}


def _over(used: list[list[dict[str, float]]], name: str, scale: float, together: Callable[[list[float]], float]) -> float | None:
    medians = [statistics.median(known) for seen in used if (known := [look[name] for look in seen if name in look])]
    return round(together(medians) * scale, 3) if medians else None


def throttles(masks: Iterable[int]) -> str | None:
    """Return the reasons in NVML's bit masks as text, '' for none; None where no card tells.  Source: nvml.h, nvmlClocksEventReasons."""
    known = list(masks)
    if not known:
        return None
    return ", ".join(text for bit, text in THROTTLES.items() if any(mask & bit for mask in known))
