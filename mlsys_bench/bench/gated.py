"""What the gate measures of the engine: a decode step as it is served, and how far int8 is from fp32."""

from __future__ import annotations

import math
import resource
import sys
from typing import Any

import torch

from mlsys_bench import models
from mlsys_bench.batching import Limits
from mlsys_bench.bench import steps
from mlsys_bench.bench.harness import Spec
from mlsys_bench.bench.options import SUITES, Options
from mlsys_bench.bench.stand_ins import logits_of
from mlsys_bench.bench.turns import Benchmark
from mlsys_bench.engine import Engine
from mlsys_bench.types import Scalar

MODEL, BATCH, CONTEXT, STEPS = "nano", 2, 48, 5
PROMPTS, TOKENS = 8, 96  # of the quality


def decode() -> Benchmark:
    """Return a step of a batch that decodes, on one thread.  Contexts grow from turn to turn, in every launch by the same."""
    torch.set_num_threads(1)
    options = Options(model=MODEL, max_batch=BATCH, max_context=512, device="cpu")
    engine = steps.engine_of(models.find(MODEL), options, "fp32", "cpu")
    common: dict[str, Scalar] = {
        "model": MODEL,
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
        "decode_seqs": BATCH,
        "context": CONTEXT,
    }
    bench = steps.Bench(engine, common, SUITES["quick"], one_thread=True, seed=0)
    running: list[int] = []

    def refill() -> None:
        bench.drop(running)
        running[:] = bench.fill(BATCH, CONTEXT)

    return Benchmark(
        spec=Spec(name="engine.decode", unit="s", better="lower", parameters=common),
        work=engine.step,
        iterations=STEPS,
        before=refill,
        counted=lambda: [(_counter(name, unit, common), value) for name, unit, value in _counts(engine, refill)],
        peaks=lambda: [(Spec(name="engine.decode.memory_peak", unit="B", better="lower", parameters=common), _peak_bytes())],
    )


def _counts(engine: Engine, refill: Any) -> list[tuple[str, str, float]]:
    """Return what one decode step of the batch needs, counted."""
    refill()
    with torch.autograd.profiler.profile() as profile:  # a dispatch mode would import torch._dynamo: 1 to 2 s of every launch
        report = engine.step()
    operators = [e for e in profile.function_events if e.name.startswith("aten::")]
    launched = [e for e in operators if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]  # not by another one
    return [
        ("operators", "operators", 1 + len(launched)),  # and the step itself: the C step needs none, and of nothing there is no ratio
        ("kv_blocks", "blocks", engine.limits.blocks - engine.free_blocks),
        ("kv_tokens", "tokens", report.features.decode_kv_tokens),
        ("weight_bytes", "B", engine.weight_bytes),
    ]


def _counter(name: str, unit: str, common: dict[str, Scalar]) -> Spec:
    return Spec(name=f"engine.decode.{name}", unit=unit, better="lower", parameters=common, deterministic=True)


def _peak_bytes() -> float:
    """Return the most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------- quality


def quality() -> Benchmark:
    """Return how far int8's logits are from those of fp32, the weights and prompts the same in every launch."""
    torch.set_num_threads(1)
    common: dict[str, Scalar] = {"model": MODEL, "precision": "int8", "against": "fp32", "prompts": PROMPTS, "tokens": TOKENS}
    divergence = Spec(name="engine.quality.divergence", unit="nats", better="lower", parameters=common, deterministic=True)
    error = Spec(name="engine.quality.logit_error", unit="ratio", better="lower", parameters=common, deterministic=True)
    return Benchmark(counted=lambda: list(zip((divergence, error), against("int8"), strict=True)))


def against(precision: str, prompts: int = PROMPTS) -> tuple[float, float]:
    """Return the mean Kullback-Leibler divergence of a precision's next-token distribution from fp32's, and the logits' relative error."""
    exact, coarse = _logits("fp32", prompts), _logits(precision, prompts)
    p, q = torch.log_softmax(exact, -1), torch.log_softmax(coarse, -1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    error = (coarse - exact).norm() / exact.norm()
    return float(divergence), float(error)


def _logits(precision: str, prompts: int) -> torch.Tensor:
    """Return the logits after each of the prompts, in double precision.  [prompt, vocabulary]"""
    shape = models.find(MODEL)
    blocks = math.ceil(TOKENS / 16) + 1
    limits = Limits(max_seqs=1, max_step_tokens=TOKENS, block_tokens=16, blocks=blocks, max_context=TOKENS + 1)
    engine = Engine(shape, precision=precision, limits=limits, seed=0, threads=1)
    random = torch.Generator().manual_seed(0)
    found = []
    for _ in range(prompts):
        with logits_of(engine) as seen:
            engine.add(torch.randint(0, 256, (TOKENS,), generator=random).tolist(), max_tokens=1, ignore_eos=True)
            engine.step()
        found.append(seen[-1][0, :256].double())
    return torch.stack(found)
