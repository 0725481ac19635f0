"""The engine against llama.cpp, interleaved, and against its own bars, on this machine.  `nox -s bench -- engine`.

    python proofs/engine.py [PART ...] [--rounds 3] [--threads 2]

| part       | what is held                                                                                              |
|------------|-----------------------------------------------------------------------------------------------------------|
| `int8`     | decode at batch 1 to 32 and a prompt of 512 in one chunk, beside llama.cpp's Q8_0                          |
| `int4`     | the same beside Q4_0 (its head is Q6_K)                                                                    |
| `bf16`     | the same beside BF16                                                                                      |
| `fallback` | int8 without a compiler (MLSYS_NATIVE=0)                                                                  |
| `rest`     | what of a step is not linears                                                                             |
| `loss`     | what each precision costs on the byte model that `mlsys_bench.engine.quality` trains                       |
| `memory`   | how much memory loading a checkpoint takes beside what the model keeps                                    |
| `overhead` | what HTTP and the scheduler add to a step of eight streams, through a real `mlsys serve`                   |

The model has TinyLlama's shape and random weights.  Each engine stays alive in a process of its own and works only when asked, in turns:
peer, ours, peer, ours; figures are medians of the rounds.  llama.cpp multiplies with activations that it quantises to 8 bit, and so do
`w8a8` and `w4a8g32`, which are judged; `int8` and `int4g32` keep activations as they are and stand beside.  Per cent are of what this
machine reads with as many threads, measured in the same rounds.  Beside each figure stands whether others used the machine meanwhile.
The peer needs an environment of its own, named by MLSYS_LLAMA_PYTHON (see `_llamacpp.py`); without one there are no ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import _bandwidth
import _engine
import _llamacpp

from mlsys_bench import loadtest, serve
from mlsys_bench.journeys.gating import conditions
from mlsys_bench.types import Lengths
from mlsys_bench.verdicts import Conditions

STEPS = 24
REST_BAR_S = 1e-3
MEMORY_BAR = 1.15
SERVED = (("tinyllama-1.1b", 0.05), ("small-160m", None))  # shapes, and the share of a step that HTTP and scheduler may cost
LOSS_BARS = {  # bit per byte above fp32, by precision and quantizer
    ("int8", "rtn"): 0.001, ("w8a8", "rtn"): None, ("int4g32", "rtn"): 0.01, ("int4g32", "search"): None, ("int4g32", "gptq"): 0.01,
    ("w4a8g32", "gptq"): None, ("bf16", "rtn"): None,
}  # fmt: skip
USERS, PROMPT, OUTPUT, SECONDS = 8, 32, 64, 12
WINDOWS = 512  # of held-out text


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What is measured of ours beside one model of the peer's.  The first precision is judged."""

    peer: str
    precisions: tuple[str, ...]
    asks: tuple[tuple[str, float | None], ...]  # and how many times the peer's rate ours must be
    env: tuple[tuple[str, str], ...] = ()


def decodes(*bars: float | None) -> tuple[tuple[str, float | None], ...]:
    """Return the questions for batches of 1, 4, 8, 16 and 32."""
    return tuple((f"decode {batch} {STEPS}", bar) for batch, bar in zip((1, 4, 8, 16, 32), bars, strict=True))


PARTS = {
    "int8": Part(peer="Q8_0", precisions=("w8a8", "int8"), asks=(*decodes(1.08, 1.3, 1.5, 1.5, 1.8), ("prefill 512", 4.0))),
    "int4": Part(peer="Q4_0", precisions=("w4a8g32", "int4g32"), asks=(*decodes(1.07, None, None, None, None), ("prefill 512", None))),
    "bf16": Part(peer="BF16", precisions=("bf16",), asks=(*decodes(1.2, None, None, None, None), ("prefill 512", 6.0))),
    "fallback": Part(peer="Q8_0", precisions=("w8a8", "int8"), asks=((f"decode 1 {STEPS}", 0.75),), env=(("MLSYS_NATIVE", "0"),)),
}


# ---------------------------------------------------------------- processes that are asked


class Child:
    """A process that says hello in a line of JSON, and answers each line with another."""

    def __init__(self, command: Sequence[str], env: Sequence[tuple[str, str]] = ()) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed in `end`
        around = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, env=around | dict(env)
        )
        self.pid = self._process.pid
        self.hello = self._read()

    def ask(self, line: str) -> dict[str, Any]:
        """Return the answer to a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            raise SystemExit(f"a child ended with {self._process.returncode}: {self._said.read().decode(errors='replace').strip()[-800:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._said.close()


@contextmanager
def child(command: Sequence[str], env: Sequence[tuple[str, str]] = ()) -> Iterator[Child]:
    """Give a process that can be asked, and end it."""
    started = Child(command, env)
    try:
        yield started
    finally:
        started.end()


@contextmanager
def watched(children: Sequence[Child], seen: list[Conditions]) -> Iterator[None]:
    """Note what surrounded the work of these processes meanwhile."""
    pids = [each.pid for each in children]
    watch, began_s = conditions.begin(pids), time.perf_counter()
    yield
    wall_s = time.perf_counter() - began_s
    seen.append(conditions.end(watch, pair=len(seen), side="cand", started_s=0.0, wall_s=wall_s, pids=pids))


def around(seen: Sequence[Conditions]) -> str:
    """Return in a word whether the machine was quiet, and if not, who used it."""
    found = conditions.contention(seen)
    others = [c.other_cpu_share for c in seen if c.other_cpu_share is not None]
    steal = [c.steal_share for c in seen if c.steal_share is not None]
    if found.verdict != "contended" or not others:
        return found.verdict
    return f"contended (others {statistics.fmean(others):.0%}, steal {statistics.fmean(steal):.0%})"


def verdict(value: float, bar: float | None, *, least: bool) -> tuple[str, int]:
    """Return how a figure stands beside its bar, and 1 where it misses it."""
    if bar is None:
        return "", 0
    missed = value < bar if least else value > bar
    return "MISSED" if missed else "ok", int(missed)


# ---------------------------------------------------------------- beside the peer


def peered(name: str, peer_python: str | None, rounds: int, threads: int) -> int:
    """Print every figure of a part beside the peer's; return how many bars are missed."""
    part = PARTS[name]
    with ExitStack() as stack:
        ours = [
            stack.enter_context(child(_engine.command(precision=p, threads=threads, **backend(part)), part.env)) for p in part.precisions
        ]
        peer = stack.enter_context(child(_llamacpp.command(peer_python, part.peer, threads))) if peer_python else None
        reads = stack.enter_context(child(_bandwidth.command(threads)))
        print(f"\n{name}: " + "; ".join(f"{p} {o.hello['bits']:.2f} bit a weight" for p, o in zip(part.precisions, ours, strict=True)))
        if peer:
            print(f"  beside llama.cpp {part.peer}: {peer.hello['bits']:.2f} bit a weight, head {peer.hello['head']}")
        return sum(compared(line, bar, part, peer, ours, reads, rounds) for line, bar in part.asks)


def backend(part: Part) -> dict[str, str]:
    """Return the backend to ask for: the best there is where there may be no compiler."""
    return {"backend": "auto" if part.env else "native"}


def compared(line: str, bar: float | None, part: Part, peer: Child | None, ours: Sequence[Child], reads: Child, rounds: int) -> int:
    """Ask the same of all, in turns; print a row; return 1 where the bar is missed."""
    everyone = [*([peer] if peer else []), *ours]
    seen, answers, read = list[Conditions](), {each.pid: list[dict[str, Any]]() for each in everyone}, list[float]()
    for number in range(rounds):
        with watched([*everyone, reads], seen):
            read.append(reads.ask("read")["rate"])
            for each in everyone if number % 2 == 0 else everyone[::-1]:
                answers[each.pid].append(each.ask(line))
    rates = {pid: statistics.median(a["rate"] for a in given) for pid, given in answers.items()}
    is_decode = line.startswith("decode")
    what = f"decode at batch {line.split()[1]}" if is_decode else f"prefill of {line.split()[1]}"

    def shown(each: Child) -> str:
        took_s = statistics.median(a["step_s"] for a in answers[each.pid])
        share = f" ({each.hello['step_bytes'] / took_s / statistics.median(read):.0%} of read)" if is_decode else ""
        return f"{rates[each.pid]:.1f} tok/s{share}"

    ratios = [rates[each.pid] / rates[peer.pid] if peer else None for each in ours]
    word, missed = verdict(ratios[0], bar, least=True) if ratios[0] is not None else ("no peer", 0)
    cells = [
        f"{precision} {shown(each)}" + (f" = {ratio:.2f}x" if ratio is not None else "")
        for precision, each, ratio in zip(part.precisions, ours, ratios, strict=True)
    ]
    theirs = [f"peer {shown(peer)}"] if peer else []
    held = [f"bar {bar:.2f}x {word}"] if bar is not None else []
    print(f"  {what:18}", "; ".join([*theirs, *cells, *held, f"reads {statistics.median(read) / 1e9:.1f} GB/s", around(seen)]), flush=True)
    return missed


# ---------------------------------------------------------------- alone


def rest(rounds: int, threads: int) -> int:
    """Print what a step of one sequence takes beside its linears."""
    missed = 0
    for precision, bar in (("w8a8", REST_BAR_S), ("w4a8g32", REST_BAR_S), ("bf16", REST_BAR_S)):
        with child(_engine.command(precision=precision, threads=threads, backend="native", max_batch=1)) as ours:
            seen = list[Conditions]()
            answers = []
            for _ in range(rounds):
                with watched([ours], seen):
                    answers.append(ours.ask("rest 48"))
        if answers[0]["rest_s"] is None:
            print(f"  rest, {precision}: this backend does not time its linears")
            missed += 1
            continue
        rest_s = statistics.median(a["rest_s"] for a in answers)
        step_s = statistics.median(a["step_s"] for a in answers)
        word, is_missed = verdict(rest_s, bar, least=False)
        print(
            f"  rest, {precision}: {1e3 * rest_s:.2f} of {1e3 * step_s:.2f} ms; bar {1e3 * bar:.0f} ms {word}; {around(seen)}", flush=True
        )
        missed += is_missed
    return missed


def loss(threads: int) -> int:
    """Print what each way of keeping the byte model costs, window by window beside fp32; train it where that has not been done."""
    from mlsys_bench.engine import quality, train

    print("  loss: the byte model is loaded, or trained in about five minutes", flush=True)
    judge = quality.Quality(train.byte_model(), count=WINDOWS, threads=threads)
    base, missed = judge.losses(quality.way("fp32")), 0
    print(f"  loss, fp32: {base.mean():.4f} bit per byte of text it has not seen")
    for (precision, quantizer), bar in LOSS_BARS.items():
        above = judge.losses(quality.way(precision, quantizer)) - base
        half = 1.96 * above.std(ddof=1) / len(above) ** 0.5
        word, is_missed = verdict(float(above.mean()), bar, least=False)
        held = f"; bar {bar:+.3f} {word}" if bar is not None else ""
        print(f"  loss, {precision} {quantizer}: {above.mean():+.4f} ± {half:.4f}{held}", flush=True)
        missed += is_missed
    return missed


def memory(threads: int) -> int:
    """Print the most memory that loading a checkpoint took, beside what the model keeps."""
    import _checkpoint

    missed = 0
    for precision in ("bf16", "w8a8", "w4a8g32"):
        with child(_engine.command(precision=precision, threads=threads, max_batch=1, checkpoint=str(_checkpoint.folder()))) as ours:
            told = ours.hello
        grew = told["peak_bytes"] - told["before_bytes"] - told["kv_bytes"]
        word, is_missed = verdict(grew / told["weight_bytes"], MEMORY_BAR, least=False)
        print(
            f"  memory, {precision}: {grew / 1e9:.2f} GB at most for {told['weight_bytes'] / 1e9:.2f} GB of weights: "
            f"{grew / told['weight_bytes']:.2f}x; bar {MEMORY_BAR:.2f}x {word}",
            flush=True,
        )
        missed += is_missed
    return missed


def overhead(rounds: int, shapes: Sequence[tuple[str, float | None]] = SERVED) -> int:
    """Print what HTTP and the scheduler add to the steps of eight streams, one thread on a core of its own as `mlsys serve` has it."""
    missed = 0
    for model, bar in shapes:
        options = serve.Options(model=model, precision="w8a8", port=0, max_batch=USERS, max_context=512)
        same = {"model": model, "precision": "w8a8", "max_batch": USERS, "max_step_tokens": options.max_step_tokens}
        with serve.start(options) as server, child(_engine.command(threads=1, cores=[first_core()], **same)) as ours:
            seen, served, alone, outside = list[Conditions](), list[float](), list[float](), list[float]()
            for _ in range(rounds):
                with watched([ours], seen):
                    answer = ours.ask(f"closed {SECONDS - 2} {USERS} {PROMPT} {OUTPUT}")
                alone.append(answer["rate"])
                outside.append(answer["outside"])
                served.append(through_http(server.url))
        http = statistics.median(alone) / statistics.median(served) - 1
        scheduler = statistics.median(outside)
        word, is_missed = verdict(http + scheduler, bar, least=False)
        rates = f"{statistics.median(served):.1f} tok/s served, {statistics.median(alone):.1f} without HTTP"
        held = f"bar {bar:.0%} {word}; {around(seen)}" if bar is not None else around(seen)
        print(
            f"  overhead, {model}, {USERS} streams: {rates}: HTTP {http:+.1%} and scheduler {scheduler:.1%} of a step; {held}", flush=True
        )
        missed += is_missed
    return missed


def first_core() -> int:
    """Return the core that `mlsys serve` takes for its engine."""
    return min(os.sched_getaffinity(0))


def through_http(url: str) -> float:
    """Return the tokens a second that eight users receive, each asking again as soon as it is answered."""
    options = loadtest.Options(
        url=url, users=USERS, duration_s=float(SECONDS), warmup_s=2.0, drain_s=60.0, metrics=("off",),
        prompt_tokens=Lengths(mean=PROMPT), output_tokens=Lengths(mean=OUTPUT),
    )  # fmt: skip
    _, requests = loadtest.run(options)
    came_s = [at for r in requests.requests for at in r.token_s if 2.0 <= at < SECONDS]
    return len(came_s) / (SECONDS - 2.0)


def main() -> int:
    """Print every figure beside its bar; return how many are missed."""
    alone: dict[str, Callable[[argparse.Namespace], int]] = {
        "rest": lambda asked: rest(asked.rounds, asked.threads),
        "loss": lambda asked: loss(asked.threads),
        "memory": lambda asked: memory(asked.threads),
        "overhead": lambda asked: overhead(asked.rounds),
    }
    names = [*PARTS, *alone]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*names, []], default=[], metavar="PART", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    peer = _llamacpp.python()
    wanted = asked.parts or names
    if any(name in PARTS for name in wanted):
        print(f"llama-cpp-python {_llamacpp.version(peer)}" if peer else "no peer: name one with MLSYS_LLAMA_PYTHON; ratios are left out")
    return sum(peered(name, peer, asked.rounds, asked.threads) if name in PARTS else alone[name](asked) for name in wanted)


if __name__ == "__main__":
    sys.exit(main())
