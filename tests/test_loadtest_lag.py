"""How late the load worker's hub is, as it says of itself, on a clock that the test turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mlsys_bench.loadtest import alarm
from tests.hub import Hub


class Turns:
    """An alarm, a hub and a clock: what is due goes first, then answers are stamped for `answers_s`, then the turn is over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self._due: list[tuple[float, Callable[[], None]]] = []
        self._hub = Hub()
        monkeypatch.setattr(alarm, "clock", lambda: self.now)
        self.pulse = alarm.Pulse(self, self._hub)  # type: ignore[arg-type]
        self.pulse.start()

    def at(self, moment: float, callback: Callable[[], None]) -> None:
        """Take a callback, as an alarm does."""
        self._due.append((moment, callback))

    def turn(self, answers_s: float = 0.0, stands_s: float = 0.0) -> None:
        """Wait for what is due, stand still, beat, stamp answers, end the turn."""
        moment, callback = self._due.pop()
        self.now = max(self.now, moment) + stands_s
        callback()
        self.now += answers_s
        watchers: Any = [w for w in self._hub.watchers if w.fd == -3]
        for watcher in watchers:
            watcher.call()


def test_answers_stamped_after_the_beat_count_as_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alarms go before answers: a beat that is punctual says nothing of answers that are stamped 4 ms later."""
    turns = Turns(monkeypatch)
    for _ in range(200):
        turns.turn(answers_s=0.004)
    assert turns.pulse.lag_p99_s() == pytest.approx(0.004, abs=1e-6)


def test_a_hub_that_stands_still_is_late_for_each_beat_it_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Still for 0.2 s of 10 s: 2 % of the answers are late, evenly between 0 and 0.2 s, so the p99 of the lag is 0.1 s."""
    turns = Turns(monkeypatch)
    turns.turn(stands_s=0.2)
    while turns.now < 10.0:
        turns.turn()
    assert turns.pulse.lag_p99_s() == pytest.approx(0.1, abs=0.011)


def test_beats_keep_to_their_grid_and_none_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(monkeypatch)
    for _ in range(50):
        turns.turn(answers_s=0.025)
    assert len(turns.pulse._late) == int(turns.now / 0.01 + 1e-6)
    turns.pulse.close()
    assert not turns._hub.watchers
