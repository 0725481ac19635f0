"""The door: what becomes of an error that nobody foresaw."""

from __future__ import annotations

import sys

import pytest

from mlsys_cli import main


def test_a_bug_is_not_an_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An uncaught exception ends with 70 and its traceback: status 1 would tell CI that a plan is infeasible."""

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("mlsys_bench.journeys.doctor.examine", broken)
    monkeypatch.setattr(sys, "argv", ["mlsys", "doctor"])
    with pytest.raises(SystemExit) as end:
        main.run()
    assert end.value.code == main.BUG
    assert "ZeroDivisionError: planted" in capsys.readouterr().err
