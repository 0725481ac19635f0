"""The door: what becomes of an error that nobody foresaw."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from mlsys_bench.errors import INTERRUPTED
from mlsys_bench.types import Bench
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


@pytest.mark.parametrize(("words", "journey"), [(["bench", "gpu"], "gpu"), (["bench", "quality"], "quality")])
def test_a_bench_that_ctrl_c_ended_is_shown_and_ends_so(
    words: list[str], journey: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mlsys bench gpu -o bench.json && mlsys fit bench.json` must not go on with a part of it."""
    kept = Bench(measurements=(), stopped="stopped by hand in launch 1 of 3")
    monkeypatch.setattr(f"mlsys_bench.journeys.benchmark.{journey}", lambda **_: (kept, []) if journey == "gpu" else kept)
    assert end_of(words, monkeypatch) == INTERRUPTED
    out, err = capsys.readouterr()
    assert "stopped by hand in launch 1 of 3" in out
    assert err == "mlsys: interrupted\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--qps", "many"], "Invalid value for '--qps'"),
        (["--max-batch", "0"], "Invalid value for '--max-batch'"),
        (["--speed", "-1"], "Invalid value for '--speed'"),
        (["--nonsense"], "No such option"),
        (["--gpu", "H100", "--gpu=L4"], "--gpu is given 2 times"),
        (["-o", "a.json", "--out", "b.json"], "--out is given 2 times"),
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


def end_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, "argv", ["mlsys", *words])
    with pytest.raises(SystemExit) as end:
        main.run()
    return end.value.code


def test_ctrl_c_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def by_hand(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlsys_bench.journeys.doctor.examine", by_hand)
    assert end_of(["doctor"], monkeypatch) == INTERRUPTED
    assert capsys.readouterr().err == "mlsys: interrupted\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("plan llm-chat --diff old.json new.json", "scenario does nothing beside --diff"),
        ("plan --diff old.json new.json -o out.json", "--out does nothing beside --diff"),
        ("plan llm-chat --export k9s", "unknown export 'k9s'"),
        ("plan chat-fleet --export k8s", "export each scenario of the fleet by itself"),
        ("plan rag-support-bot --from-deployment 'vllm serve x'", "plan that model alone"),
        ("plan llm-chat --disaggregate never,link=50GB/s", "leave one of them out"),
        ("cost plan.json --cached 30%", "--cached belongs to --api"),
        ("cost plan.json --floor 2", "--floor belongs to --hours"),
        ("cost plan.json --small llama-3-8b", "--small belongs to --what-if"),
    ],
)
def test_nothing_is_planned_before_what_would_be_passed_over_is_refused(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a moment, not after a minute of planning; and never in silence."""
    monkeypatch.setattr("mlsys_bench.journeys.planning.answer", None)
    assert end_of(shlex.split(words), monkeypatch) == 2
    shown = capsys.readouterr()
    assert (shown.out, said in shown.err, shown.err.count("\n")) == ("", True, 1)
