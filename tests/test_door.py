"""The door: what becomes of an error that nobody foresaw."""

from __future__ import annotations

import subprocess
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


def test_options_that_are_plain_or_left_out_cost_no_validator() -> None:
    """Pydantic takes 0.15 s of CPU: half of what --help may take.  Numbers with bounds still meet it."""
    code = (
        "import sys; from mlsys_cli import main\n"
        "sys.argv = ['mlsys', 'plan', '--qps', '2.5', '--model', 'no-such-model', '--slo', 'ttft_p95<1s', *sys.argv[1:]]\n"
        "try:\n    main.run()\nfinally:\n    print('pydantic' in sys.modules, file=sys.stderr)"
    )
    for more, is_loaded in (([], False), (["--max-batch", "8"], True)):
        done = subprocess.run([sys.executable, "-c", code, *more], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "no-such-model" in done.stderr
        assert done.stderr.split()[-1] == str(is_loaded)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--qps", "many"], "Invalid value for '--qps'"),
        (["--max-batch", "0"], "Invalid value for '--max-batch'"),
        (["--speed", "-1"], "Invalid value for '--speed'"),
        (["--nonsense"], "No such option"),
    ],
)
def test_what_is_wrong_with_an_option_is_said(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mlsys", "plan", "--model", "llama-3-8b", *words])
    with pytest.raises(SystemExit) as end:
        main.run()
    assert end.value.code == 2
    assert said in capsys.readouterr().err
