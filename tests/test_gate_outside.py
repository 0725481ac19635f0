"""The gate on what is no benchmark of ours: what a command used, what a server's users saw."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import shlex
import signal
import stat
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import loadtest, slo, summary
from mlsys_bench.errors import BadInput, MeasurementFailed, UnknownName
from mlsys_bench.hardware import proc
from mlsys_bench.journeys.gating import commands, outside, perf, running, servers, urls
from mlsys_bench.journeys.gating import run as runs
from mlsys_bench.types import LatencySummary, LoadTest, RequestRecord, Validity
from mlsys_bench.verdicts import Policy, Subject

# ---------------------------------------------------------------- words of a command


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_what_a_shell_would_hand_on_is_what_is_run(words: list[str]) -> None:
    words = ["program", *words]
    assert running.words(shlex.join(words)) == words


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("a | b", "sh -c 'a | b'"), ("a && b", "needs a shell"), ("a > out", "needs a shell"), ("a; b", "needs a shell"),
        ("N=1 a", "write env N=1 a"), ("", "is empty"), ("a 'b", "no closing quotation"),
    ],
)  # fmt: skip
def test_what_only_a_shell_understands_is_refused(text: str, cure: str) -> None:
    with pytest.raises(BadInput, match="--base-command") as error:
        running.words(text, "--base-command")
    assert cure in str(error.value)


# ---------------------------------------------------------------- one run


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", textwrap.dedent(code)]


def ran(command: list[str], timeout_s: float = 30.0) -> running.Ran:
    return running.run(command, folder=Path(), environment=os.environ, timeout_s=timeout_s)


BURN = "import time\nwhile time.process_time() < 0.1: pass\n"


def test_cpu_time_counts_what_was_waited_for() -> None:
    """A process that uses 0.1 s and waits for another that does: 0.2 s; what both took beside is their own start."""
    alone = ran(python(BURN))
    both = ran(python(f"import os, sys\nos.spawnv(os.P_WAIT, sys.executable, ['python', '-I', '-S', '-c', {BURN!r}])\n{BURN}"))
    assert 0.1 <= alone.cpu_s < both.cpu_s
    assert both.cpu_s >= 0.2
    assert alone.status == both.status == 0


def test_peak_memory_is_the_commands_own_and_not_that_of_who_started_it() -> None:
    """This process has 100 MB more than the child: started by it, the child would not seem smaller."""
    held = bytearray(100_000_000)
    small, large = ran(python("pass")), ran(python("held = bytearray(60_000_000)"))
    assert len(held) == 100_000_000
    assert large.peak_bytes is not None
    assert 60_000_000 <= large.peak_bytes < 100_000_000
    assert (small.peak_bytes or 0) <= large.peak_bytes - 50_000_000


def test_a_command_smaller_than_the_stopwatch_has_no_peak() -> None:
    assert ran(["true"]).peak_bytes is None


def test_how_a_command_ended_is_told_with_its_last_words() -> None:
    failed = ran(python("import sys\nprint('this', file=sys.stderr)\nprint('that', file=sys.stderr)\nsys.exit(3)"))
    assert (failed.status, failed.last_words) == (3, "that")
    assert ran(python("print('only here')\nraise SystemExit(1)")).last_words == "only here"
    assert ran(["sh", "-c", "kill -9 $$"]).status == -9


def ended(pid: int) -> bool:
    """Wait until a process that is no child of ours has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(handle, "rb") as file:
        return bool(select.select([file], [], [], 30.0)[0])


def test_what_outlives_a_command_is_ended_and_told() -> None:
    found = ran(["sh", "-c", "sleep 60 & echo $!"])
    assert found.left_behind
    assert ended(int(found.last_words))
    assert not ran(["true"]).left_behind


def test_what_a_command_is_there_to_start_stays() -> None:
    found = running.run(["sh", "-c", "sleep 60 & echo $!"], folder=Path(), environment=os.environ, timeout_s=30.0, sweeps=False)
    assert found.left_behind
    os.kill(int(found.last_words), signal.SIGKILL)  # it is there, and ours


def test_a_command_that_takes_too_long_is_ended() -> None:
    started: list[int] = []
    with pytest.raises(TimeoutError, match=r"longer than 0\.05 s"):
        running.run(["sleep", "60"], folder=Path(), environment=os.environ, timeout_s=0.05, on_start=started.append)
    assert not proc.below(started, proc.processes())


def test_a_program_that_is_not_there_is_bad_input() -> None:
    with pytest.raises(BadInput, match="'no-such-program' cannot be run"):
        ran(["no-such-program"])


# ---------------------------------------------------------------- a command as a side


def asked(*command: str, **changes: Any) -> commands.Asked:
    text = shlex.join(command)
    made = commands.Asked(text=text, subject=Subject(kind="command", label=text), warmups=0, counters=False)
    return dataclasses.replace(made, **changes)


def taken(base: commands.Asked, cand: commands.Asked) -> list[list[tuple[str, tuple[float, ...]]]]:
    """Return what the first launch of each side gives, by name."""
    sources = commands.sources(base, cand)
    found = []
    for source in sources:
        launched = source.launch(1)
        launched.hello()
        found.append([(metric.name, round_.values) for metric, round_ in launched.turn(1)])
        launched.close()
        assert launched.pids == ()
    return found


def test_one_run_is_one_launch_with_time_and_memory() -> None:
    quick = asked(*python("x = bytearray(30_000_000)"))
    source, _ = commands.sources(quick, quick)
    assert (source.turns, source.together) == (1, False)
    (wall, one), (peak, _) = source.launch(1).turn(1)
    assert (wall.name, wall.unit, peak.name, peak.unit) == ("command.wall", "s", "command.peak_memory", "bytes")
    assert len(one.values) == len(one.cpu_s or ()) == len(one.involuntary or ()) == 1
    assert (one.cpu_s or (0,))[0] > 0


def test_untimed_runs_come_first_and_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    sides = [asked("sh", "-c", f"echo {name} >> {log}", warmups=2) for name in ("base", "cand")]
    assert len(taken(sides[0], sides[1])) == 2
    assert log.read_text().split() == ["base", "base", "cand", "cand", "base", "cand"]


def test_a_failing_command_is_no_measurement() -> None:
    source, _ = commands.sources(asked("sh", "-c", "echo no such device >&2; exit 7"), asked("true"))
    with pytest.raises(MeasurementFailed, match="the baseline ended with status 7: no such device"):
        source.launch(1).turn(1)
    _, slow = commands.sources(asked("true"), asked("sleep", "60", timeout_s=0.05))
    with pytest.raises(MeasurementFailed, match="the candidate ran for more than 50"):
        slow.launch(1).turn(1)


PYPERF = """
import json, sys
runs = [{"metadata": {}, "values": [0.5, 0.25]}, {"metadata": {}, "values": [0.75]}]
found = {"version": "1.0", "metadata": {"name": "decode", "unit": "second"}, "benchmarks": [{"runs": runs}]}
open(sys.argv[1], "w").write(json.dumps(found))
"""


def test_what_a_tool_wrote_is_read_and_its_processes_are_rounds_of_one_launch() -> None:
    writes = asked(*python(PYPERF), commands.OUT, read="auto")
    base, _ = taken(writes, writes)
    names = [name for name, _ in base]
    assert "command.wall" not in names
    assert [values for name, values in base if name == "decode"] == [(0.5, 0.25), (0.75,)]


def test_a_file_that_is_not_written_or_holds_nothing_is_told() -> None:
    source, _ = commands.sources(asked("true", commands.OUT), asked("true"))
    with pytest.raises(MeasurementFailed, match=r"wrote nothing to \{out\}"):
        source.launch(1).turn(1)
    with pytest.raises(BadInput, match=r"put \{out\} in"):
        commands.sources(asked("true", read="pyperf"), asked("true"))


# ---------------------------------------------------------------- counters


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("# started on Sat\n\n1234567,,instructions:u,1000000,100.00,,\n", 1234567),
        ("700,,cpu_core/instructions/u,10,100.00,,\n<not counted>,,cpu_atom/instructions/u,0,100.00,,\n", 700),
        ("700,,cpu_core/instructions/u,10,100.00,,\n300,,cpu_atom/instructions/u,10,100.00,,\n", 1000),
        ("<not supported>,,instructions:u,0,100.00,,\n", None),
        ("700,,instructions:u,10,63.20,,\n", None),  # it shared the counter, and extrapolated
        ("", None),
    ],
)
def test_what_perf_wrote_is_read(text: str, count: int | None) -> None:
    assert perf.read(text) == count


@pytest.fixture
def counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a `perf` on the path that counts the letters of a command, and those of a file more on each run."""
    more = tmp_path / "more"
    script = f"""\
        #!/bin/sh
        out=$6; shift 7
        extra=$(cat {more} 2>/dev/null | wc -c)
        echo "$(( 1000000 + extra )),,instructions:u,10,100.00,," > $out
        echo x >> {more}
        exec "$@"
        """
    program = tmp_path / "bin" / "perf"
    program.parent.mkdir()
    program.write_text(textwrap.dedent(script))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    perf.missing.cache_clear()
    return more


def test_instructions_are_counted_once_as_a_counter(counter: Path) -> None:
    assert perf.missing() is None
    source, _ = commands.sources(asked("true", counters=True), asked("true", counters=True))
    first, second = source.launch(1), source.launch(2)
    first.hello()
    found = {metric.name: (metric.deterministic, round_.values) for metric, round_ in first.turn(1)}
    assert found["command.instructions"] == (True, (1000002.0,))  # perf was tried once before
    assert "command.instructions" not in {metric.name for metric, _ in second.turn(1)}
    assert counter.read_text() == "x\n" * 5
    assert source.remarks() == ()
    perf.missing.cache_clear()


@pytest.mark.parametrize(
    ("base", "cand", "why"),
    [
        ([1000, 1001], [1000, 1000], None),
        ([100, 100], [1000, 1003], "instructions are not gated: two runs of the candidate differ by 0.3 %"),
        ([100, None], [100, 100], "instructions are not counted: perf saw only a part of a run of the baseline"),
    ],
)
def test_what_differs_from_run_to_run_is_no_counter(base: list[int | None], cand: list[int | None], why: str | None) -> None:
    assert commands._uncounted({"base": base, "cand": cand}) == why


def test_where_perf_cannot_count_it_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = Path("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    perf.missing.cache_clear()
    base, cand = commands.sources(asked(str(true), counters=True), asked(str(true), counters=True))
    for source in (base, cand):
        source.launch(1).hello()
    assert base.remarks() == cand.remarks() == ("instructions are not counted: perf is not installed (Debian: linux-perf)",)
    perf.missing.cache_clear()


# ---------------------------------------------------------------- servers

NOBODY = LatencySummary(count=0, mean=None, p50=None, p90=None, p95=None, p99=None, intervals={})


def result(validity: Validity | None = None, **changes: Any) -> LoadTest:
    made = LoadTest(
        source="loadtest", target="http://127.0.0.1:1 (m)", arrivals="poisson", offered_rate_per_s=1.0, requests=3, ok=2, errors={},
        duration_s=3.0, request_rate_per_s=2.5, output_tokens_per_s=7.5, goodput_per_s=None, goodput_ratio=None, goodput_interval=None,
        slo=None, slo_met={}, lateness_s=None, ttft_s=NOBODY, tpot_s=NOBODY, itl_s=NOBODY, e2e_s=NOBODY,
        validity=validity or Validity(verdict="valid"),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def requests() -> summary.Columns:
    """Return four requests: one of the warm-up, a quick and a slow one, one that failed."""
    common: dict[str, Any] = {"tokens_per_event": (1, 1, 1), "output_tokens": 3}
    return summary.columns.of(
        [
            RequestRecord(index=0, scheduled_s=0.0, sent_s=0.0, token_s=(5.0, 6.0, 7.0), in_window=False, **common),
            RequestRecord(index=1, scheduled_s=1.0, sent_s=1.0, token_s=(1.1, 1.2, 1.4), **common),
            RequestRecord(index=2, scheduled_s=2.0, sent_s=2.0, token_s=(2.5, 2.6, 2.7), **common),
            RequestRecord(index=3, scheduled_s=3.0, sent_s=3.0, outcome="timeout"),
        ]
    )


def options(**changes: Any) -> loadtest.Options:
    asked_: dict[str, Any] = {"url": "", "qps": 1.0}
    return loadtest.Options(**asked_ | changes)


def by_name(found: list[Any]) -> dict[str, Any]:
    return {metric.name: pytest.approx(list(round_.values)) for metric, round_ in found}


def test_a_turn_of_load_is_one_round_of_each_figure() -> None:
    """By hand: TTFT 0.1 and 0.5 s, TPOT (0.3 / 2, 0.2 / 2), the gaps, E2E 0.4 and 0.7 s; two of three answered, one of three in time."""
    found = urls.sampled(requests(), result(), options(slo=slo.parse("ttft_p95<300ms")))
    assert by_name(found) == {
        "ttft": [0.1, 0.5], "tpot": [0.15, 0.1], "itl": [0.1, 0.2, 0.1, 0.1], "e2e": [0.4, 0.7],
        "availability": [1, 1, 0], "goodput": [1, 0, 0],
    }  # fmt: skip
    assert {metric.better for metric, _ in found[-2:]} == {"higher"}


def test_a_closed_loop_is_also_about_its_rate() -> None:
    found = by_name(urls.sampled(requests(), result(), options(qps=None, users=2)))
    assert (found["requests"], found["output_tokens"]) == ([2.5], [7.5])
    assert "goodput" not in found


def test_tokens_of_one_piece_still_have_a_ratio_and_no_request_is_set_aside() -> None:
    kept = urls._round(urls._known(np.array([0.0, 0.5, np.nan])))
    assert kept.values == (1e-6, 0.5)
    assert kept.involuntary == (0, 0)


def test_many_gaps_are_thinned_evenly() -> None:
    values = np.arange(10_001.0)
    kept = urls._thinned(values)
    assert len(kept) <= urls.MOST_GAPS
    assert set(np.diff(kept)) == {6.0}
    assert list(urls._thinned(values[:7])) == list(values[:7])


def server(**changes: Any) -> urls.Server:
    load = urls.Load(options=options())
    side = urls.Asked(subject=Subject(kind="url", label="u"), url="http://127.0.0.1:1", **changes)
    return urls.sources(side, side, load)[0]


def test_live_servers_are_one_launch_and_say_so() -> None:
    live, again = server(), server(restart="true")
    assert (live.most_pairs, again.most_pairs) == (1, None)
    assert "one launch each" in live.remarks()[0]
    assert again.remarks() == ()


def test_a_turn_that_cannot_be_believed_is_a_failed_launch_and_a_doubtful_one_is_told() -> None:
    side = server(restart="true")
    launched = side.launch(1)
    broken = Validity(verdict="invalid", reasons=("the busiest load worker used 97 % of a core",))
    with pytest.raises(MeasurementFailed, match="the load test is invalid: the busiest"):
        launched._judge(result(broken, requests=100, ok=95))
    launched._judge(result(broken, requests=100, ok=60))  # requests failed: that is what the server is judged by
    launched._judge(result(Validity(verdict="degraded", reasons=("late",)), requests=100, ok=100))
    launched._judge(result())
    assert side.remarks() == ("2 of 3 turns of the baseline were degraded: the busiest load worker used 97 % of a core",)


def test_a_turn_that_a_busy_moment_of_the_client_spoils_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two spoilt turns and a good one: the good one counts, the others are told; three spoilt ones fail the launch."""
    broken = Validity(
        verdict="invalid", reasons=("the client sent at 97.03% of the rate that was asked: lower the rate, or use more --processes",)
    )
    spoilt = result(broken, requests=100, ok=100)
    answers = [spoilt, spoilt, result(), spoilt, spoilt, spoilt]
    side = server(restart="true")
    launched = side.launch(1)
    monkeypatch.setattr(launched, "_sent", lambda _: (answers.pop(0), None))
    assert launched._load(1)[0].validity.verdict == "valid"
    assert side.remarks() == ("2 turns of the baseline were sent again, because the client could not be believed",)
    with pytest.raises(
        MeasurementFailed, match=r"97\.03% of the rate that was asked; lower the rate, or give the client a core of its own"
    ):
        launched._load(2)


def test_a_server_without_a_port_a_lone_restart_and_an_empty_turn_are_refused() -> None:
    url = urls.Asked(subject=Subject(kind="url", label="u"), url="http://127.0.0.1:1")
    serve = urls.Asked(subject=Subject(kind="command", label="s"), serve="serve --port {port}")
    again = urls.Asked(subject=Subject(kind="url", label="u"), url="http://127.0.0.1:1", restart="true")
    load = urls.Load(options=options())
    no_port = urls.Asked(subject=Subject(kind="command", label="s"), serve="serve")
    with pytest.raises(BadInput, match=r"put \{port\} where the port belongs"):
        urls.sources(serve, no_port, load)
    with pytest.raises(BadInput, match="both sides a restart command or none"):
        urls.sources(again, url, load)
    with pytest.raises(BadInput, match="--alternate starts and ends servers itself"):
        urls.sources(url, url, load, alternate=True)
    assert not urls.sources(serve, serve, load, alternate=True)[0].together
    assert urls.sources(serve, url, load)[0].together


def test_a_server_that_ends_or_never_answers_is_told_with_its_last_words() -> None:
    def started(*words: str) -> contextlib.closing[servers.Server]:
        return contextlib.closing(servers.Server(words, folder=Path(), environment=os.environ, name="candidate"))

    ends = pytest.raises(MeasurementFailed, match="the server of the candidate ended with status 9: address taken")
    with started("sh", "-c", "echo address taken; exit 9") as ended, ends:
        ended.wait_until(lambda: None, 30.0)
    with started("sleep", "60") as mute:
        mute.pause()
        with pytest.raises(MeasurementFailed, match=rf"not ready within 50\.0 ms: nothing listens on port {mute.port}"):
            mute.wait_until(lambda: None, 0.05)
    assert not proc.below([mute.process.pid], proc.processes())
    with pytest.raises(BadInput, match="'no-such-program' cannot be run"):
        started("no-such-program")


def test_a_server_stands_still_while_it_is_not_its_turn() -> None:
    """All of its group: what it started, too."""
    with contextlib.closing(servers.Server(["sh", "-c", "sleep 60 & wait"], folder=Path(), environment=os.environ, name="x")) as idle:
        idle.pause()
        assert os.waitid(os.P_PID, idle.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_status == signal.SIGSTOP  # type: ignore[union-attr]
        idle.resume()
        assert os.waitid(os.P_PID, idle.process.pid, os.WCONTINUED | os.WEXITED | os.WNOWAIT).si_status == signal.SIGCONT  # type: ignore[union-attr]
        idle.pause()  # a stopped one is ended as well
    assert idle.process.returncode is not None


def test_a_server_that_died_before_its_turn_is_told_with_its_last_words() -> None:
    dies = urls.Asked(subject=Subject(kind="command", label="s"), serve="sh -c 'echo out of blocks {port}; exit 4'")
    launched = urls.sources(dies, dies, urls.Load(options=options()))[1].launch(1)
    os.waitid(os.P_PID, launched.pids[0], os.WEXITED | os.WNOWAIT)
    with contextlib.closing(launched), pytest.raises(MeasurementFailed, match="server of the candidate ended with status 4: out of blocks"):
        launched.turn(1)


def test_a_p99_needs_a_thousand_requests_a_launch() -> None:
    assert urls.few_for_p99(urls.Load(options=options(qps=70.0))) is None  # 70/s, five times 3 s
    said_ = urls.few_for_p99(urls.Load(options=options(qps=20.0)))
    assert said_ is not None
    assert "300 requests a launch" in said_
    assert "--duration-each 10s has them" in said_


# ---------------------------------------------------------------- options as typed


@pytest.mark.parametrize(
    ("typed", "cure"),
    [
        ({"qps": 5.0}, "--qps belongs to servers"),
        ({"read": "pyperf"}, "--read belongs to a --command"),
        ({"base": "http://a", "cand": "http://b", "read": "auto"}, "--read belongs to"),
        ({"command": "x", "alternate": True}, "--alternate belongs to servers"),
        ({"command": "x", "base_serve": "y {port}"}, "one gate measures one kind"),
    ],
)
def test_options_that_do_not_go_together_are_refused(typed: dict[str, Any], cure: str) -> None:
    with pytest.raises(BadInput, match=cure):
        outside.is_asked(outside.Typed(**typed))


@pytest.mark.parametrize(
    ("typed", "cure"),
    [
        ({"base_command": "x"}, "both --base-command and --cand-command"),
        ({"base_command": "x", "cand_command": "y", "base": "main"}, "stand alone"),
        ({"command": "x"}, "--base REF and --cand REF"),
        ({"command": "x", "base_command": "y"}, "either one --command"),
        ({"base": "http://a", "cand": "main", "qps": 1.0}, "the other side is a server"),
        ({"base": "http://a", "cand": "http://b"}, "one of --qps R .* and --users N"),
        ({"base": "http://a", "base_serve": "x {port}", "cand": "http://b", "qps": 1.0}, "either --base URL or --base-serve"),
        ({"base": "http://a", "cand": "http://b", "qps": 1.0, "idle": "sleep"}, "--idle sleep"),
    ],
)
def test_half_of_what_is_needed_is_refused(typed: dict[str, Any], cure: str) -> None:
    asked_ = outside.Typed(**typed)
    assert outside.is_asked(asked_)
    with pytest.raises(BadInput, match=cure), outside.opened(asked_, lambda _: None):
        raise AssertionError("nothing to measure")


def test_an_unknown_format_names_the_nearest() -> None:
    typed = outside.Typed(base_command="x {out}", cand_command="y {out}", read="pyprf")
    with pytest.raises(UnknownName, match="did you mean pyperf"), outside.opened(typed, lambda _: None):
        raise AssertionError("nothing to measure")


def test_refs_alone_are_for_others() -> None:
    assert not outside.is_asked(outside.Typed(base="main", cand="."))
    assert not outside.is_asked(
        outside.typed({"base": "main", "cand": ".", "header": (), "seed": 3, "out": None})
    )  # as Typer hands them over


def test_what_servers_cost_is_said_first() -> None:
    """Six turns of 3 + 0.5 + 1.5 s for each of two sides are a minute."""
    notes: list[str] = []
    typed = outside.Typed(base_serve="a {port}", cand_serve="b {port}", qps=100.0)
    with outside.opened(typed, notes.append) as contest:
        assert contest.most_pairs is None
    assert outside.pair_s(typed) == 60.0
    assert outside.budget_s(typed) == 1200.0
    assert outside.budget_s(typed, 400.0) == 400.0
    with pytest.raises(BadInput, match=r"these servers need 6\.00 min at least"):
        outside.budget_s(typed, 90.0)
    assert notes == ["a pair of launches takes 60.0 s and the start of a server; 6, the first look, 6.00 min; 20, the last, 20.0 min"]


@pytest.mark.parametrize(
    ("typed", "limit", "cure"),
    [
        ({"base": "http://a", "cand": "http://b", "qps": 1.0}, "tttf_p95<1s", "did you mean ttft"),
        ({"base": "http://a", "cand": "http://b", "qps": 1.0}, "goodput>99%", "say what a good request keeps"),
        ({"base": "http://a", "cand": "http://b", "qps": 1.0}, "requests>5/s", "unknown metric 'requests'"),
        ({"base_command": "a", "cand_command": "b"}, "ttft_p95<1s", "unknown metric 'ttft'"),
    ],
)
def test_a_limit_on_what_is_not_measured_is_refused_before_anything_is(typed: dict[str, Any], limit: str, cure: str) -> None:
    with pytest.raises(BadInput, match=cure):
        outside.run(outside.Typed(**typed), runs.Asked(policy=Policy(budgets=(limit,)), quiet=True))
