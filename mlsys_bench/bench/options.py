"""What to measure: options, checked before any process starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mlsys_bench import models
from mlsys_bench.engine import schemes, spec
from mlsys_bench.errors import BadInput, did_you_mean, unknown
from mlsys_bench.readings.catalogue import CATALOGUE

BENCHMARKS = tuple((entry.name, entry.line) for entry in CATALOGUE if entry.group not in ("quality", "gate"))
GATED = tuple((entry.name, entry.line) for entry in CATALOGUE if entry.group == "gate")  # of `gate run`: `mlsys bench --worker NAME`
PRECISIONS = (*models.ENGINE_PRECISIONS, *models.ENGINE_ALIASES)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """How much of each benchmark to take."""

    rounds: int
    decode_steps: int  # timed per batch size and visit
    prefill_steps: int  # timed per visit
    contexts: tuple[int, ...]
    chunks: tuple[int, ...]
    gemm: int
    budget_s: float
    anatomy: tuple[tuple[int, int], ...] = ()  # (batch, context) of the decode steps that are taken apart
    policy_requests: int = 0  # served in each way of batching,
    policy_tokens: float = 16  # each with a prompt and an answer of so many on average


SUITES = {
    "quick": Suite(
        rounds=1000, decode_steps=6, prefill_steps=2, contexts=(64, 256, 640), chunks=(16, 64, 128, 256), gemm=1024, budget_s=55.0,
        anatomy=((1, 512), (8, 512)), policy_requests=16, policy_tokens=8,
    ),
    "full": Suite(
        rounds=1000, decode_steps=20, prefill_steps=6, contexts=(32, 64, 128, 256, 512, 768, 1536, 3072, 6144),
        chunks=(8, 16, 32, 64, 128, 256, 512, 1024, 2048), gemm=2048, budget_s=600.0,
        anatomy=((1, 512), (4, 512), (8, 512)), policy_requests=64,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One `mlsys bench` run.  `only` takes names or their beginnings; empty means all."""

    device: str = "auto"  # auto | cpu | cuda:0
    suite: str = "quick"
    only: tuple[str, ...] = ()
    model: str = "nano"
    precisions: tuple[str, ...] = ("fp32",)
    launches: int = 1
    budget_s: float | None = None  # of the whole run; None is the suite's own, per launch
    rounds: int | None = None  # None: the suite's own
    threads: int = 1
    pin: bool = True  # each thread to a core of its own, the first ones; CPU only
    companion: bool = True  # steps are timed with a neighbour on the next core that works as HTTP and a client do; pinned CPU only
    max_batch: int = 8
    max_step_tokens: int = 256
    block_tokens: int = 16
    max_context: int = 1024
    kv_tokens: int | None = None  # None: max_batch sequences of max_context
    backend: str = "auto"  # who computes, what the KV cache is kept in, and whether batches may change bits: see `Engine`
    kv: str = "auto"
    deterministic: bool = False
    seed: int = 0

    @property
    def launch_budget_s(self) -> float:
        """Return the time one launch has, start-up included."""
        return SUITES[self.suite].budget_s if self.budget_s is None else self.budget_s / self.launches

    @property
    def rounds_each(self) -> int:
        """Return how often every task is visited in a launch, if the budget lasts."""
        return SUITES[self.suite].rounds if self.rounds is None else self.rounds

    @property
    def pool_tokens(self) -> int:
        """Return the KV pool in tokens."""
        return self.kv_tokens if self.kv_tokens is not None else self.max_batch * self.max_context


def wants(only: Sequence[str], name: str) -> bool:
    """Say whether a benchmark is asked for."""
    return not only or any(name == o or name.startswith(o) for o in only)


def checked(options: Options) -> Options:
    """Return the options with the catalogue's name of the model, or raise BadInput for what cannot be measured."""
    if options.suite not in SUITES:
        raise BadInput(f"unknown suite {options.suite!r}{did_you_mean(options.suite, SUITES)}")
    for name in options.only:
        if not any(wants((name,), known) for known, _ in BENCHMARKS):
            raise unknown("benchmark", name, [known for known, _ in BENCHMARKS])
    folder = schemes.checkpoint_of(options.model)
    if folder is not None:
        spec.of_config(folder)  # what is not computed says so
    own = "fp32" if folder is None else schemes.own_precision(folder)
    options = dataclasses.replace(options, precisions=tuple(own if name == "auto" else name for name in options.precisions))
    for precision in options.precisions:
        if precision not in PRECISIONS:
            raise BadInput(f"the built-in engine does not run in {precision!r}{did_you_mean(precision, PRECISIONS)}")
    if options.device not in ("auto", "cpu") and not options.device.removeprefix("cuda:").isdecimal():
        raise BadInput(f"unknown device {options.device!r}; use auto, cpu or cuda:0")
    for field in (
        "launches",
        "threads",
        "max_batch",
        "max_step_tokens",
        "block_tokens",
        "max_context",
        "pool_tokens",
        "launch_budget_s",
        "rounds_each",
    ):
        if not getattr(options, field) > 0:
            raise BadInput(f"{field.removeprefix('launch_')} is {getattr(options, field)}; it must be above 0")
    if not options.precisions:
        raise BadInput("no precision to measure; name at least one of " + ", ".join(PRECISIONS))
    return dataclasses.replace(options, model=models.find(options.model).id)
