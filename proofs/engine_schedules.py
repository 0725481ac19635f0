"""Everything between requests and the model: the same tokens under any schedule, no more waiting than needed, and nothing lost.

    tokens     random schedules of every feature in fp32, bf16 and int8, in deterministic mode: each answer is the one a request gets alone
    flips      the same in fast mode, on the trained byte model: equal up to the first token whose lead is within rounding
    accepted   guesses that stand, against sum min(p, q), and what a draft model and the text itself give on the byte model
    batching   continuous against static batches of eight: tokens a second at constant and at exponential lengths, run in turns
    leaks      thousands of random requests, with cancels, preemptions, failing steps; then a server whose clients hang up

Options choose: --parts tokens,leaks --schedules 1000 --precisions fp32,bf16 --features draft --model small-160m --processes 2.
"""

from __future__ import annotations

import argparse
import gc
import http.client
import importlib.util
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import _one_thread  # noqa: F401
import numpy as np
from scipy import stats

from mlsys_bench import models
from mlsys_bench.engine import Engine, default_limits
from mlsys_bench.engine.sampler import sampling
from mlsys_bench.engine.speculate import DraftModel, NGram

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = ("fp32", "bf16", "int8")
# The lead in logits below which another order of sums may choose another token.  fp32: 1e-3, a hundred times what sums of 512 products of
# size 1 differ by.  With activations in bf16 each of some 24 roundings of 2^-9 moves logits of size 16 by 0.03, together by 0.15; three
# times that.
LEADS = {"fp32": 1e-3, "bf16": 0.5, "int8": 0.5}
SEATS = 8


def _games() -> Any:
    """Return the games of the tests: a checkout has them beside the proofs."""
    spec = importlib.util.spec_from_file_location("engine_games", ROOT / "tests" / "engine_games.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["engine_games"] = module
    spec.loader.exec_module(module)
    return module


games = _games()
games.FEATURES["all on two threads"] = {**games.FEATURES["all by ngram"], "threads": 2}  # against answers of one thread


class Figures:
    """Prints figures beside their bars and counts the misses."""

    def __init__(self) -> None:
        self.missed = 0

    def show(self, what: str, value: float, unit: str, bar: str = "(no bar)", kept: bool = True) -> None:
        """Print one."""
        self.missed += not kept
        print(f"{value:14,.5g} {unit:12} {bar:18} {'ok    ' if kept else 'MISSED'} {what}", flush=True)


def main() -> int:
    """Print each figure beside its bar; return 1 when one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--features", default=",".join(games.FEATURES))
    parser.add_argument("--model", default="nano", help="of the part batching")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args()
    figures = Figures()
    for part in chosen.parts.split(","):
        print(f"\n{part}: {str(PARTS[part].__doc__).splitlines()[0]}", flush=True)
        PARTS[part](figures, chosen)
    return int(figures.missed > 0)


# ---------------------------------------------------------------- tokens


class Work(NamedTuple):
    """Some schedules of one feature in one precision."""

    precision: str
    feature: str
    seeds: range


def tokens(figures: Figures, chosen: argparse.Namespace) -> None:
    """Answers under random schedules in deterministic mode, against what each request gets alone."""
    with ProcessPoolExecutor(chosen.processes, mp_context=get_context("spawn")) as pool:
        for precision in chosen.precisions.split(","):
            for feature in chosen.features.split(","):
                size = -(-chosen.schedules // (4 * chosen.processes))
                works = [Work(precision, feature, range(at, min(at + size, chosen.schedules))) for at in range(0, chosen.schedules, size)]
                begun_s, played, wrong, did = time.perf_counter(), 0, 0, Counter[str]()
                for more, others, what in pool.map(_play, works):
                    played, wrong = played + more, wrong + others
                    did.update(what)
                happened = ", ".join(f"{did[name]:,} {name}" for name in did if did[name] and name != "steps")
                spent = f"{did['steps']:,} steps in {time.perf_counter() - begun_s:.0f} s"
                figures.show(f"{precision} {feature}: of {played:,} answers; {happened}; {spent}", wrong, "differ", "0", wrong == 0)


def _play(work: Work) -> tuple[int, int, dict[str, int]]:
    """Run schedules; return how many answers there were, how many others than alone, and how often what happened."""
    pool, did, played, wrong = games.pool(work.precision), Counter[str](), 0, 0
    for seed in work.seeds:
        game = games.play(seed, pool, work.feature)
        did.update(game.did)
        played += len(game.answers)
        wrong += games.wrong(game, pool)
    return played, wrong, dict(did)


# ---------------------------------------------------------------- fast mode


def _byte_model() -> Any:
    """Return the trained byte model, None where nobody has trained it yet."""
    from mlsys_bench.engine import train
    from mlsys_bench.engine.corpus import corpus

    text = corpus()
    if not train.cached(train.Recipe(), train.byte_shape(), text).exists():
        print("    skipped: the byte model is not trained yet on this machine (`mlsys_bench.engine.train.byte_model()`, some 5 minutes)")
        return None
    return train.byte_model()


def flips(figures: Figures, chosen: argparse.Namespace) -> None:
    """Fast mode on the trained byte model: equal up to the first token whose lead is within rounding."""
    model = _byte_model()
    if model is None:
        return
    for backend in ("torch", "auto"):
        for precision in chosen.precisions.split(","):
            pool = _fast_pool(model, precision, backend)
            answers = flipped = early = 0
            for feature in chosen.features.split(","):
                for seed in range(max(chosen.schedules // 100, 1)):
                    for which, (got, _) in games.play(seed, pool, feature).answers:
                        at = _first_difference(got, pool.answers[which].tokens)
                        close = _first_close(pool.leads[which], LEADS[precision])
                        answers, flipped = answers + 1, flipped + (at is not None)
                        early += at is not None and at < close
            figures.show(f"{backend} {precision}: of {answers:,} answers, others than alone", flipped, "flips")
            figures.show(f"{backend} {precision}: of these before a lead below {LEADS[precision]:g}", early, "differ", "0", early == 0)


def _fast_pool(model: Any, precision: str, backend: str) -> Any:
    """Return requests in the language the model knows, with their answers alone and by how much each token leads."""
    pool = games.Pool(precision, asks=0, shape=model.shape, state_dict=model.tensors, deterministic=False, backend=backend)
    rng, text = np.random.default_rng(3), model.corpus.held_out
    pool.leads = []
    alone = Engine(model.shape, limits=default_limits(model.shape, max_batch=1, max_context=128), **pool.options)
    stems = [int(at) for at in rng.integers(0, len(text) - 100, 8)]
    for _ in range(40):
        at = stems[rng.integers(8)]
        ask = games.Ask(tuple(text[at : at + int(rng.integers(4, 40))]), int(rng.integers(4, 28)), sampling(logprobs=2))
        answer, leads = _with_leads(alone, ask)
        pool.asks.append(ask._replace(sampling=games.GREEDY))
        pool.answers.append(answer)
        pool.leads.append(leads)
    return pool


def _with_leads(engine: Engine, ask: Any) -> tuple[Any, list[float]]:
    """Return an answer and by how much each of its tokens leads the second best."""
    engine.add(ask.prompt, max_tokens=ask.max_tokens, sampling=ask.sampling, ignore_eos=True)
    got: list[int] = []
    leads: list[float] = []
    while engine.busy:
        report = engine.step()
        got += [token for _, token in report.tokens]
        leads += [log.top[0][1] - log.top[1][1] for log in report.logprobs if log is not None]
    return games.Answer(got, "length"), leads


def _first_difference(got: list[int], want: list[int]) -> int | None:
    return next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)


def _first_close(leads: list[float], enough: float) -> int:
    return next((i for i, lead in enumerate(leads) if lead < enough), len(leads))


# ---------------------------------------------------------------- guesses


def accepted(figures: Figures, _: argparse.Namespace) -> None:
    """Guesses that stand: as many as theory says of two random chains; and how many on the byte model."""
    import torch

    from mlsys_bench.engine import speculate
    from mlsys_bench.engine.sampler import draw, uniforms

    class Known(NamedTuple):
        row: int
        tokens: list[int]
        given: int
        sampling: Any
        seed: int

    rng, plays = np.random.default_rng(0), 40_000
    p, q = (torch.from_numpy(rng.dirichlet(np.ones(8), 1)).float() for _ in range(2))
    rows: list[Any] = [Known(0, [1], 1, sampling(temperature=1.0), seed) for seed in range(plays)]
    guesses = draw(q.repeat(plays, 1), uniforms([speculate.Place(row, ()) for row in rows], speculate.DRAFT))
    got = speculate.verify(p.log().repeat(2 * plays, 1), rows, [speculate.Drafts([g], q) for g in guesses])
    share, expected = float(np.mean([len(t) == 2 for t in got])), float(torch.minimum(p, q).sum())
    bar = 4 * (expected * (1 - expected) / plays) ** 0.5
    what = f"of {plays:,} guesses stand; sum min(p, q) is {expected:.4f}"
    figures.show(what, share, "share", f"+- {bar:.4f}", abs(share - expected) < bar)
    first = np.bincount([t[0] for t in got], minlength=8)
    chance = stats.chisquare(first, plays * p[0].double().numpy() / float(p.sum(dtype=torch.float64))).pvalue
    figures.show("chi-square of their first tokens against p", chance, "p-value", "> 1e-4", bool(chance > 1e-4))
    model = _byte_model()
    if model is None:
        return
    text, rng = model.corpus.held_out, np.random.default_rng(5)
    asks = [tuple(text[at : at + 100]) for at in rng.integers(0, len(text) - 100, 16).tolist()]
    small = DraftModel(shape=model.shape, state_dict=model.tensors, precision="int4g32", drafts=4)
    for name, how in (("n-grams of the text", NGram(drafts=4)), ("the model in int4g32", small)):
        for warmth in (0.0, 0.8):
            limits = default_limits(model.shape, max_batch=8, max_context=256)
            engine = Engine(model.shape, precision="fp32", limits=limits, state_dict=model.tensors, speculative=how)
            for seed, ask in enumerate(asks):
                engine.add(ask, max_tokens=100, sampling=sampling(temperature=warmth, seed=seed), ignore_eos=True)
            reports = []
            while engine.busy:
                reports.append(engine.step())
            drafted, right = sum(r.drafted for r in reports), sum(r.accepted for r in reports)
            figures.show(f"of {drafted:,} guesses by {name} stand, temperature {warmth:g}", right / max(drafted, 1), "share")


# ---------------------------------------------------------------- batching


def batching(figures: Figures, chosen: argparse.Namespace) -> None:
    """Continuous against static batches of eight, in turns: how many times as many tokens a second.

    In a static batch nobody joins, and whoever has ended is computed on until the longest has: so it is where a batch is one tensor.  The
    figures without a bar are for one whose ended sequences leave, so that its last steps are shorter.
    """
    shape, mean, requests = models.find(chosen.model), 32, 256
    even = -mean * np.log1p(-(np.arange(requests) + 0.5) / requests)  # as an exponential law has it, without luck in the mean
    limits = default_limits(shape, max_batch=SEATS, max_context=min(shape.max_context or 512, 512))
    continuous, static = (
        Engine(shape, precision="int8", threads=1, limits=limits, static_batches=is_static) for is_static in (False, True)
    )
    for engine in (continuous, static):
        _served_s(engine, [2] * SEATS)
    for name, law, low, high in (
        ("constant", np.full(requests, mean), 0.95, 1.1),
        ("exponential", np.maximum(np.round(even), 1), 2.2, 3.2),
    ):
        times: list[tuple[float, float, float]] = []
        for order in range(3):
            lengths = np.random.default_rng(order).permutation(law.astype(int))
            padded = lengths.reshape(-1, SEATS).max(axis=1).repeat(SEATS)
            times.append((_served_s(continuous, lengths), _served_s(static, padded), _served_s(static, lengths)))
        for what, side, bar in (("", 1, f"{low:g} .. {high:g}"), (", ended ones leaving", 2, "(no bar)")):
            ratios = [t[side] / t[0] for t in times]
            rates = " and ".join(f"{law.sum() / statistics.median(t[i] for t in times):.0f}" for i in (0, side))
            spread = f"{rates} tokens/s; {min(ratios):.2f} .. {max(ratios):.2f}"
            about = f"{chosen.model} int8, {name} lengths of mean {law.mean():.0f}{what}: {spread}"
            ratio = statistics.median(ratios)
            figures.show(about, ratio, "times", bar, side == 2 or low <= ratio <= high)


def _served_s(engine: Engine, lengths: Iterable[int]) -> float:
    """Answer requests of eight tokens that all wait already; return the CPU time of the one thread: other processes do not count."""
    for i, length in enumerate(lengths):
        engine.add([65 + i % 26] * 8, max_tokens=int(length), ignore_eos=True)
    begun_s = time.process_time()
    while engine.busy:
        engine.step()
    return time.process_time() - begun_s


# ---------------------------------------------------------------- leaks


MOST_GROWTH_BYTES = 4 << 20  # of a process after it has warmed up: what the allocator keeps more or less of


def leaks(figures: Figures, chosen: argparse.Namespace) -> None:
    """Serve a day of random requests in minutes: blocks, memory and files afterwards."""
    requests = 20 * chosen.schedules
    for feature in ("batched", "all", "all by ngram"):
        _leaks_of_engine(figures, feature, requests)
    _leaks_of_server(figures, max(requests // 20, 100))


def _leaks_of_engine(figures: Figures, feature: str, requests: int) -> None:
    rng = np.random.default_rng(9)
    limits = games.limits(rng)._replace(max_seqs=8, max_step_tokens=32)
    engine = Engine(games.TINY, limits=limits, **games.FEATURES[feature])
    prompts, model, failed, steps = games.prompts(rng, 500), engine._model, 0, 0
    held: list[int] = []
    files = _open_files(os.getpid())

    class Failing:
        """The model, but it raises."""

        def forward(self, *_: Any) -> Any:
            raise ArithmeticError

    for i in range(requests):
        request = engine.add(prompts[rng.integers(500)], max_tokens=int(rng.integers(1, games.MOST_OUTPUT)), sampling=_any_sampling(rng))
        if rng.random() < 0.1:
            engine.cancel(request)
        while engine.waiting > 4 or (rng.random() < 0.3 and engine.busy):
            if rng.random() < 0.002:
                engine._model = Failing()  # type: ignore[assignment]
            try:
                engine.step()
            except ArithmeticError:
                failed += 1
            engine._model, steps = model, steps + 1
        if i % (requests // 20) == 0:
            gc.collect()
            held.append(_resident_bytes(os.getpid()))
    while engine.busy:
        engine.step()
    lost = engine.limits.blocks - engine.free_blocks + engine._host.blocks - engine._host.free
    about = f"{feature}: {requests:,} requests, {steps:,} steps, {engine._state.preemptions:,} preemptions, {failed} failed steps"
    figures.show(f"{about}: blocks not given back", lost, "blocks", "0", lost == 0)
    opened = _open_files(os.getpid()) - files
    figures.show(f"{feature}: files still open", opened, "files", "0", opened == 0)
    growth = _growth_bytes(held)
    figures.show(f"{feature}: memory, last quarter against second", growth / 1e6, "MB", "< 4.2", growth < MOST_GROWTH_BYTES)


def _any_sampling(rng: np.random.Generator) -> Any:
    kind = rng.integers(4)
    if kind == 0:
        return sampling(temperature=1.0, top_p=0.9, logprobs=2)
    return sampling(stop=("ab", "zz")) if kind == 1 else games.GREEDY


def _growth_bytes(held: list[int]) -> float:
    """Return how much more memory was held in the last quarter than in the second: the first warms up."""
    quarter = len(held) // 4
    return statistics.median(held[-quarter:]) - statistics.median(held[quarter : 2 * quarter])


def _leaks_of_server(figures: Figures, requests: int) -> None:
    """Stream from a real server, and hang up in the middle of most answers."""
    from mlsys_bench import serve

    options = serve.Options(
        model="nano", port=0, max_batch=4, max_context=256, kv_tokens=768, prefix_cache=True, preempt="swap", speculate="ngram:3"
    )
    rng, held, stem = np.random.default_rng(2), [], "a" * 60
    with serve.start(options) as server:
        processes = [server.process.pid, *_children(server.process.pid)]
        for i in range(requests):
            body = {"prompt": stem[: rng.integers(1, 60)] + "b" * int(rng.integers(1, 30)), "max_tokens": int(rng.integers(1, 120))}
            _hang_up(server.url, body, after=int(rng.integers(0, 40)))
            if i == requests // 10:
                files = sum(map(_open_files, processes))
            if i % (requests // 20) == 0:
                held.append(sum(map(_resident_bytes, processes)))
        deadline_s = time.monotonic() + 60
        while server.health()["free_blocks"] < 768 // options.block_tokens and time.monotonic() < deadline_s:
            time.sleep(0.05)
        lost = 768 // options.block_tokens - server.health()["free_blocks"]
        opened = sum(map(_open_files, processes)) - files
    figures.show(f"server: {requests:,} clients, most of which hang up: blocks not given back", lost, "blocks", "0", lost == 0)
    figures.show("server: files open at the end more than after a tenth", opened, "files", "<= 2", opened <= 2)
    growth = _growth_bytes(held)
    figures.show("server: memory of its processes, last quarter against second", growth / 1e6, "MB", "< 4.2", growth < MOST_GROWTH_BYTES)


def _hang_up(url: str, body: dict[str, object], after: int) -> None:
    """Ask for a stream and close the connection after so many lines of it."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        text = json.dumps({"model": "nano", "stream": True, **body})
        connection.request("POST", "/v1/completions", text, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        for _ in range(after):
            if not answer.readline():
                break
    finally:
        connection.close()


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield int(child)
            yield from _children(int(child))


def _open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


PARTS: dict[str, Callable[[Figures, argparse.Namespace], None]] = {
    "tokens": tokens, "flips": flips, "accepted": accepted, "batching": batching, "leaks": leaks,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
