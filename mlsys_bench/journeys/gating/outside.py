"""`gate run` on what is no benchmark of ours: commands and servers, from options as typed to a contest."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlsys_bench import errors, slo, units
from mlsys_bench.errors import BadInput
from mlsys_bench.gate import budgets, readers, sequence
from mlsys_bench.gate.judge import judge
from mlsys_bench.journeys import load as loading
from mlsys_bench.journeys.gating import commands, subjects, urls
from mlsys_bench.journeys.gating import run as runs
from mlsys_bench.journeys.gating.pairs import Contest, Look
from mlsys_bench.journeys.gating.view import View
from mlsys_bench.loadtest import auth
from mlsys_bench.loadtest.caller import shown
from mlsys_bench.verdicts import GateRun, Policy, Subject

COMMAND_BUDGET_S = 600.0
FIRST_LOOK, *_, LAST_LOOK = sequence.LOOKS  # pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Typed:
    """The options that say what is measured, as typed."""

    base: str | None = None  # a ref, a wheel or a URL
    cand: str | None = None
    bench: str | None = None  # of refs with a bench worker
    worker: str | None = None
    # commands
    command: str | None = None  # run in both refs
    base_command: str | None = None
    cand_command: str | None = None
    read: str | None = None
    run_timeout: str = "10min"
    warm_runs: int = 1
    instructions: bool = True
    # servers
    base_serve: str | None = None
    cand_serve: str | None = None
    base_restart: str | None = None
    cand_restart: str | None = None
    alternate: bool = False
    idle: str = "stop"
    ready: str = "5min"
    qps: float | None = None
    users: int | None = None
    duration_each: str = "3s"
    turns: int = 5
    slo: str | None = None
    arrivals: str | None = None
    prompt_tokens: str | None = None
    output_tokens: str | None = None
    model: str | None = None
    endpoint: str = "auto"
    header: list[str] | None = None
    api_key_env: str | None = None
    seed: int = 0

    @property
    def commands(self) -> bool:
        """Say whether commands are to be measured."""
        return any((self.command, self.base_command, self.cand_command))

    @property
    def serves(self) -> bool:
        """Say whether commands that serve are to be measured."""
        return any((self.base_serve, self.cand_serve))

    @property
    def servers(self) -> bool:
        """Say whether servers are to be measured."""
        return self.serves or any(is_url(side) for side in (self.base, self.cand))


def typed(options: Mapping[str, Any]) -> Typed:
    """Return what concerns us of the options of a command, by name."""
    return Typed(**{f.name: options[f.name] for f in dataclasses.fields(Typed) if f.name in options})


def is_url(text: str | None) -> bool:
    """Say whether a side is a URL: refs and wheels have no ://."""
    return text is not None and "://" in text


def is_asked(typed: Typed) -> bool:
    """Say whether this is for us.  Raises BadInput where options do not go together."""
    if not typed.commands and not typed.servers:
        _none_of(typed, _OF_COMMANDS, "a --command, or --base-command and --cand-command")
        _none_of(typed, _OF_SERVERS, "servers: two URLs, or --base-serve and --cand-serve")
        return False
    _none_of(typed, {"bench": None, "worker": None}, "refs that have a bench worker")
    if typed.commands and typed.servers:
        raise BadInput("either commands or servers: one gate measures one kind")
    if typed.commands:
        _none_of(typed, _OF_SERVERS, "servers: two URLs, or --base-serve and --cand-serve")
    else:
        _none_of(typed, _OF_COMMANDS, "a --command, or --base-command and --cand-command")
    return True


def run(typed: Typed, asked: runs.Asked, look: Look = judge) -> GateRun:
    """Measure both sides in pairs of launches until it is decided, and return the record.  Raises BadInput."""
    _check_limits(typed, asked.policy)
    typed = dataclasses.replace(typed, slo=_promises(asked.policy))
    began_s = time.monotonic()
    with View(asked.quiet) as view, opened(typed, view.note) as contest:
        assert contest.base is not None
        assert contest.cand is not None
        timed = dataclasses.replace(asked, budget_s=budget_s(typed, asked.budget_s))
        return runs.measured([contest], contest.base.subject, contest.cand.subject, asked=timed, view=view, began_s=began_s, look=look)


@contextlib.contextmanager
def opened(typed: Typed, note: Callable[[str], None]) -> Iterator[Contest]:
    """Give the contest, with the folders of refs there meanwhile.  What it costs in time is said first.  Raises BadInput."""
    if typed.servers:
        yield _servers(typed, note)
    elif typed.command is not None:
        with _in_refs(typed, typed.command, note) as contest:
            yield contest
    else:
        yield _two_commands(typed)


def budget_s(typed: Typed, given_s: float | None = None) -> float:
    """Return the time a gate may take: as given, else that of the last look for servers and ten minutes for commands.

    Raises BadInput where servers would not come to their first look: no short budget applies to them.
    """
    if not typed.servers:
        return given_s or COMMAND_BUDGET_S
    first_s = pair_s(typed) * (FIRST_LOOK if typed.serves or typed.base_restart else 1)
    if given_s is not None and given_s < first_s:
        raise BadInput(
            f"--budget {units.show_s(given_s)}: these servers need {units.show_s(first_s)} at least: "
            "give them that, or shorten --duration-each or --turns"
        )
    return given_s or LAST_LOOK * pair_s(typed)


def pair_s(typed: Typed) -> float:
    """Return what a pair of launches of servers takes at least: their start is not in it."""
    load = _load(typed)
    return 2 * (load.warm_turns + load.turns) * (load.each_s + load.settle_s + urls.CLIENT_S)


# ---------------------------------------------------------------- absolute limits


def _check_limits(typed: Typed, policy: Policy) -> None:
    """Raise what would else be found after minutes of measuring: a limit on what is not measured."""
    known = _known(typed)
    for text in policy.budgets:
        metric = budgets.parse(text).metric
        if known and metric not in known:
            raise errors.unknown("metric", metric, known, f"limit {text!r}")
        if typed.servers and metric == urls.GOODPUT.name and not slo.latencies(slo.parse(_promises(policy) or "")):
            raise BadInput(f"limit {text!r}: say what a good request keeps, e.g. ttft_p95<500ms,{text}")


def _known(typed: Typed) -> tuple[str, ...]:
    """Return the names of what is measured; none where only the files that commands write can tell."""
    if typed.servers:
        rates = urls.RATES if typed.users is not None else {}
        return (*urls.LATENCIES, *rates, urls.AVAILABILITY.name, urls.GOODPUT.name)
    if any(commands.OUT in (text or "") for text in (typed.command, typed.base_command, typed.cand_command)):
        return ()
    return (commands.WALL.name, commands.PEAK.name, commands.INSTRUCTIONS.name)


def _promises(policy: Policy) -> str | None:
    """Return the limits of a policy that are about requests: what goodput counts by."""
    about = [text for text in policy.budgets if budgets.parse(text).metric in (*slo.LATENCIES, *slo.SHARES)]
    return ",".join(about) or None


# ---------------------------------------------------------------- commands

_OF_COMMANDS = {"read": None, "run_timeout": "10min", "instructions": True}
_OF_SERVERS = {
    "base_restart": None, "cand_restart": None, "alternate": False, "idle": "stop", "ready": "5min", "qps": None, "users": None,
    "duration_each": "3s", "turns": 5, "arrivals": None, "prompt_tokens": None, "output_tokens": None, "model": None, "endpoint": "auto",
    "header": None, "api_key_env": None,
}  # fmt: skip


def _none_of(typed: Typed, usual: Mapping[str, object], whose: str) -> None:
    given = next((name for name, value in usual.items() if getattr(typed, name) not in (value, ())), None)  # (): a list left out
    if given is not None:
        raise BadInput(f"--{given.replace('_', '-')} belongs to {whose}")


def _two_commands(typed: Typed) -> Contest:
    if typed.base_command is None or typed.cand_command is None:
        raise BadInput("give both --base-command and --cand-command, or one --command with --base REF and --cand REF")
    if typed.base is not None or typed.cand is not None:
        raise BadInput("--base and --cand are refs to run one --command in; --base-command and --cand-command stand alone")
    sides = ((typed.base_command, "--base-command"), (typed.cand_command, "--cand-command"))
    return _of_commands(*(_command(typed, text, Subject(kind="command", label=text), option=option) for text, option in sides))


@contextlib.contextmanager
def _in_refs(typed: Typed, command: str, note: Callable[[str], None]) -> Iterator[Contest]:
    if typed.base_command is not None or typed.cand_command is not None:
        raise BadInput("either one --command for both refs, or --base-command and --cand-command")
    if typed.base is None or typed.cand is None:
        raise BadInput("--command is run in two refs: give --base REF and --cand REF ('.' is the working tree)")
    with subjects.opened(typed.base, typed.cand, note) as sides:
        asked = [_command(typed, command, side.subject).placed(side.root, side.variables()) for side in sides]
        yield _of_commands(*asked)


def _patience_s(text: str) -> float:
    """Return the longest that a run may take.  Raises BadInput where nothing would end within it."""
    found = units.seconds(text, "--run-timeout")
    if not found > 0:
        raise BadInput(f"--run-timeout {text}: a time above zero is needed, e.g. 10min")
    return found


def _command(typed: Typed, text: str, subject: Subject, option: str = "--command") -> commands.Asked:
    return commands.Asked(
        text=text,
        subject=subject,
        read=_format(typed.read),
        timeout_s=_patience_s(typed.run_timeout),
        warmups=typed.warm_runs,
        counters=typed.instructions,
        option=option,
    )


def _format(name: str | None) -> str | None:
    if name is not None and name != "auto" and name not in readers.KNOWN:
        raise errors.unknown("format", name, ("auto", *readers.KNOWN), "--read")
    return name


def _of_commands(base: commands.Asked, cand: commands.Asked) -> Contest:
    first, second = commands.sources(base, cand)
    return Contest(base=first, cand=second)


# ---------------------------------------------------------------- servers


def _servers(typed: Typed, note: Callable[[str], None]) -> Contest:
    load = _load(typed)
    base, cand = urls.sources(_side(typed, "base"), _side(typed, "cand"), load, alternate=typed.alternate)
    few = urls.few_for_p99(load)
    if few is not None:
        note(few)
    note(_cost(typed))
    return Contest(base=base, cand=cand, most_pairs=base.most_pairs)


def _side(typed: Typed, name: str) -> urls.Asked:
    url, serve, restart = (getattr(typed, f"{name}{what}") for what in ("", "_serve", "_restart"))
    if serve is not None and url is not None:
        raise BadInput(f"either --{name} URL or --{name}-serve CMD: a command that serves has a URL of its own")
    if serve is not None:
        return urls.Asked(subject=Subject(kind="command", label=serve), serve=serve)
    if not is_url(url):
        raise BadInput(f"the other side is a server: give --{name} a URL, e.g. http://127.0.0.1:8000, or --{name}-serve CMD")
    return urls.Asked(subject=Subject(kind="url", label=shown(url)), url=url, restart=restart)


def _load(typed: Typed) -> urls.Load:
    if typed.idle not in ("stop", "run"):
        raise BadInput(f"--idle {typed.idle}: a server that is not under load is to stop or to run")
    each_s = units.seconds(typed.duration_each, "--duration-each")
    if (typed.qps is None) == (typed.users is None) and not typed.arrivals:
        raise BadInput("say how much load the servers get: one of --qps R (requests a second) and --users N (closed loop)")
    options = loading.options(
        target="", qps=typed.qps, users=typed.users, arrivals=typed.arrivals, prompt_tokens=typed.prompt_tokens,
        output_tokens=typed.output_tokens, model=typed.model, endpoint=typed.endpoint, duration=typed.duration_each, warmup="0s",
        timeout="60s", slo=typed.slo, seed=typed.seed, metrics=("off",),
        headers=auth.headers(typed.header or (), key_variable=typed.api_key_env),
    )  # fmt: skip
    return urls.Load(
        options=options, each_s=each_s, turns=typed.turns, warm_turns=typed.warm_runs, ready_s=units.seconds(typed.ready, "--ready"),
        idle="run" if typed.idle == "run" else "stop",
    )  # fmt: skip


def _cost(typed: Typed) -> str:
    """Say what this takes before it begins."""
    one_s = pair_s(typed)
    if not (typed.serves or typed.base_restart):
        return f"{units.show_s(one_s)}: one launch of each server"
    start = "the start of a server after the other" if typed.alternate else "the start of a server"
    first, last = (units.show_s(pairs * one_s) for pairs in (FIRST_LOOK, LAST_LOOK))
    return (
        f"a pair of launches takes {units.show_s(one_s)} and {start}; {FIRST_LOOK}, the first look, {first}; {LAST_LOOK}, the last, {last}"
    )
