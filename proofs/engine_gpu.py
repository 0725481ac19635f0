"""The engine on one GPU, measured: kernels against float64 and against the memory, whole models in four precisions.

    nox -s bench -- engine_gpu                     all parts, the most telling first
    python proofs/engine_gpu.py --parts decode     one of them; each writes a record of its own, so that it can be taken up again
    python proofs/engine_gpu.py --parts compile    without a GPU too: every kernel as machine code of sm_90

Parts: limits, tests, shapes, decode, attention, small, engine, matrices, compile.  A kernel that fails costs its own figures and no more;
failures are printed and counted.  Shares are of the copy bandwidth and the bf16 product that part `limits` measures first, in the same
process.  `gpu_evidence.py` runs them all.
Without a CUDA device it says so and proves nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _gpu_ledger import Ledger, guarded, timed
from torch.nn import functional

from mlsys_bench import hardware, models
from mlsys_bench.engine import formats, spec, weights
from mlsys_bench.types import Machine

ROOT = Path(__file__).resolve().parents[1]
BARS = {"bf16": 0.80, "int8": 0.75, "int4g64": 0.65}  # of copy bandwidth, 8 B shape, batch 1
SMALL_BAR = 0.65  # 1 B, bf16, batch 1
ATTENTION_BAR = 0.80  # 32 sequences of 8,192 tokens
PRECISIONS = ("bf16", "int8", "int4g64", "fp8")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PROMPT = 256  # tokens in the cache when a decode is timed
STEPS = 24  # per sample
SAMPLES = 5
PARTS = ("limits", "tests", "shapes", "decode", "attention", "small", "engine", "matrices", "compile")


def main() -> int:
    """Run the parts; return how many figures missed their bar and how many things failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which, in this order: " + ", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "evidence", help="folder of the records")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    asked = parser.parse_args()
    parts, precisions = asked.parts.split(","), tuple(asked.precisions.split(","))
    unknown = [name for name in parts if name not in PARTS]
    if unknown:
        raise SystemExit(f"part {unknown[0]!r}: there are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        return without_a_gpu("compile" in parts and asked.parts != ",".join(PARTS))
    asked.out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(asked.out, fingerprint(), time.time())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {version('triton')}", flush=True)
    for part in ("limits", *(p for p in parts if p != "limits")):
        run(part, ledger, precisions)
    print(f"{ledger.misses} figures missed their bar, {ledger.failures} things failed; {time.time() - ledger.began_s:.0f} s")
    return ledger.misses + ledger.failures


def without_a_gpu(compiles: bool) -> int:
    """Say that nothing is measured; compile the kernels where that was asked for and Triton is installed."""
    print("no CUDA device on this machine: nothing is measured, and nothing is proven")
    if compiles and importlib.util.find_spec("triton"):
        return compile_all()
    if compiles:
        print("Triton is not installed either: no kernel is compiled")
    return 0


def compile_all() -> int:
    """Compile every kernel for sm_90 and return how many spill registers or read weights by less than 128 bits."""
    import _gpu_compile

    made = _gpu_compile.all_kernels()
    spilling = [c for c in made if c.spilled_bytes]
    narrow = [c for c in made if c.name.startswith(("gemv", "gemm", "paged")) and c.widest_load_bits < 128]
    print(f"{len(made)} kernels compile for sm_90; {len(spilling)} spill registers, {len(narrow)} read by less than 128 bit (bars 0 and 0)")
    return len(spilling) + len(narrow)


def fingerprint() -> Machine:
    """Return this machine's, with what else decides a GPU's figures."""
    machine = hardware.machine()
    soft = {**machine.soft, "cuda": torch.version.cuda, "triton": version("triton"), "multiprocessors": _device().multi_processor_count}
    return dataclasses.replace(machine, soft=soft)


def version(name: str) -> str | None:
    """Return the version of an installed package."""
    return __import__(name).__version__ if importlib.util.find_spec(name) else None


def _device() -> Any:
    return torch.cuda.get_device_properties(0)


def run(part: str, ledger: Ledger, precisions: tuple[str, ...]) -> None:
    """Run one part; what it raises is a failure of its own."""
    began = time.time()
    print(f"\n== {part}", flush=True)
    try:
        if part == "limits":
            limits(ledger)
        elif part == "tests":
            tests(ledger)
        elif part == "shapes":
            shapes(ledger, precisions)
        elif part == "decode":
            for precision in precisions:
                guarded(ledger, f"8 B in {precision}", lambda p=precision: whole(ledger, "llama-3-8b", p, BATCHES, BARS.get(p)))
                ledger.write(f"decode-{precision}")
        elif part == "attention":
            attention(ledger)
        elif part == "small":
            guarded(ledger, "1 B", lambda: whole(ledger, "llama-3.2-1b", "bf16", (1, 8), SMALL_BAR))
        elif part == "engine":
            engine(ledger)
        elif part == "matrices":
            matrices(ledger, precisions)
        else:
            ledger.misses += compile_all()
    except Exception:
        ledger.failed(part)
    ledger.write(part)
    print(f"== {part} took {time.time() - began:.0f} s", flush=True)


# ---------------------------------------------------------------- limits and correctness


def limits(ledger: Ledger) -> None:
    """Measure what the memory copies and what bf16 and fp8 products reach, on random numbers."""
    elements = 2**30
    source, target = (
        torch.empty(elements, dtype=torch.bfloat16, device="cuda").normal_(),
        torch.empty(elements, dtype=torch.bfloat16, device="cuda"),
    )
    copy_s = ledger.add("copy", timed(lambda i: target.copy_(source), calls=3), "s", bytes=4 * elements)
    ledger.copy_bytes_per_s = 4 * elements / copy_s
    size = 8192
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    product_s = ledger.add("gemm", timed(lambda i: a @ b, calls=5), "s", flops=2 * size**3, precision="bf16")
    ledger.product_flops_per_s = 2 * size**3 / product_s
    print(f"copy {ledger.copy_bytes_per_s / 1e12:.2f} TB/s, bf16 product {ledger.product_flops_per_s / 1e12:.0f} TFLOP/s", flush=True)
    one = torch.ones(size, 1, device="cuda")
    guarded(ledger, "fp8 product", lambda: _fp8(ledger, a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), one))


def _fp8(ledger: Ledger, a: torch.Tensor, b: torch.Tensor, one: torch.Tensor) -> None:
    taken = timed(lambda i: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one.t(), out_dtype=torch.bfloat16), calls=5)
    print(
        f"fp8 product {2 * a.shape[0] ** 3 / ledger.add('gemm', taken, 's', flops=2 * a.shape[0] ** 3, precision='fp8') / 1e12:.0f} TFLOP/s"
    )


def tests(ledger: Ledger) -> None:
    """Run the tests of all kernels against float64 on this device."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "--import-mode=importlib", "--noconftest", "-p", "no:cacheprovider",
               "tests/test_gpu_kernels.py", "tests/test_gpu_layout.py"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    lines = done.stdout.strip().splitlines()
    for line in [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))][:40]:
        print(line)
    print(lines[-1] if lines else done.stderr.strip()[-500:])
    ledger.failures += len([line for line in lines if line.startswith(("FAILED", "ERROR"))]) or int(done.returncode != 0)


ERRORS = {"bf16": 0.01, "int8": 0.01, "int4g64": 0.01, "fp8": 0.01}  # of products with bf16 activations, relative, Frobenius norm
FP8_ERROR = 0.06  # where activations are fp8 too


def shapes(ledger: Ledger, precisions: tuple[str, ...]) -> None:
    """Hold kernels against float64 at the sizes of an 8 B model: what small tests cannot see is offsets, grids and shared memory."""
    sizes = {"o": (4096, 4096), "qkv": (6144, 4096), "down": (4096, 14336), "gate_up": (28672, 4096), "head": (128256, 4096)}
    for precision, (what, (n, k)) in itertools.product(precisions, sizes.items()):
        guarded(ledger, f"{precision} {what}", lambda p=precision, w=what, n=n, k=k: exact_matrix(ledger, p, w, n, k))
    for kind, blocks in (("bf16", 140_000), ("int8", 280_000), ("fp8", 280_000)):
        guarded(ledger, f"attention over {kind}", lambda k=kind, b=blocks: exact_attention(ledger, k, b))
    guarded(ledger, "choice of tokens", lambda: exact_choice(ledger))


def judged(ledger: Ledger, what: str, off: float, bar: float) -> None:
    """Print an error beside its bar, and count a miss; NaN is one."""
    ledger.misses += not off < bar
    print(f"  {what}: off by {off:.2e} (bar {bar:g}{'' if off < bar else ', MISSED'})", flush=True)


def exact_matrix(ledger: Ledger, precision: str, what: str, n: int, k: int) -> None:
    """Multiply by every way that rows of 1 to 100 take, and with what is fused before and after."""
    from mlsys_bench.engine.gpu import linears

    kept = formats.quantise(torch.randn(n, k, device="cuda") / k**0.5, precision)
    held, exact = linears.pack(kept, precision, torch.device("cuda:0")), kept.dequantise().double()
    worst, worst_wide = 0.0, 0.0
    for rows in (1, 2, 3, 4, 5, 8, 16, 17, 64, 100):
        x = torch.randn(rows, k, device="cuda")
        normed = x.double() / (x.double().square().sum(1, keepdim=True) + k * 1e-5).sqrt() * k**0.5
        gain = torch.full((k,), k**0.5, device="cuda")
        want = normed @ exact.T
        got = held.run(x, norm=linears.Norm(eps=1e-5, gain=gain), dtype=torch.float32).double()
        off = float((got - want).norm() / want.norm())
        onto = torch.randn(rows, n, device="cuda")
        short = x.bfloat16()
        summed = onto.double() + short.double() @ exact.T
        off = max(off, float((held.run(short, onto=onto).double() - summed).norm() / summed.norm()))
        if rows > 64:
            worst_wide = off
        else:
            worst = max(worst, off)
    judged(ledger, f"{precision} {what} {n} x {k}, 1 to 64 rows", worst, ERRORS.get(precision, 0.01))
    judged(ledger, f"{precision} {what} {n} x {k}, 100 rows", worst_wide, FP8_ERROR if precision == "fp8" else 0.01)


def exact_attention(ledger: Ledger, kind: str, blocks: int) -> None:
    """Attend over blocks whose offsets are beyond 2^31 elements: 64 sequences of up to 8,192 tokens, five of them in float64."""
    from mlsys_bench.engine.gpu import attention as kernels
    from mlsys_bench.engine.gpu.kv import GpuKV
    from mlsys_bench.engine.kv import KINDS

    a, device = dataclasses.replace(models.find("llama-3-8b"), layers=1), torch.device("cuda:0")
    heads = kernels.Heads(heads=32, kv_heads=8, head_dim=128, norm_eps=1e-5)
    cache = GpuKV(a, blocks=blocks, block_tokens=16, dtype=KINDS[kind], device=device)
    if cache.scale is None:
        cache.data.normal_()
    else:
        cache.raw.random_(0, 60)
        cache.scale.fill_(0.01 if kind == "int8" else 1.0)
    table = torch.randperm(blocks, device="cuda")[: 64 * 512].int().view(64, 512)
    lengths = torch.randint(1, 8193, (64,), dtype=torch.int32, device="cuda")
    lengths[:3] = torch.tensor([8192, 1, 0], dtype=torch.int32)
    qkv, out = torch.randn(64, heads.width, device="cuda").bfloat16(), torch.empty(64, 4096, dtype=torch.bfloat16, device="cuda")
    kernels.decode(heads, qkv, table, lengths, cache, 0, out, splits=kernels.splits_of(64, 8, 8192, device))
    split = torch.empty_like(out)
    kernels.decode(heads, qkv, table, lengths, cache, 0, split, splits=8)
    worst = 0.0
    for s in (0, 1, 20, 40, 63):
        bits = cache.data.view(torch.uint8) if cache.dtype.itemsize == 1 else cache.data  # not every torch picks from fp8 tensors
        kv = bits[0][table[s].long()].view(cache.dtype).double()
        if cache.scale is not None:
            kv *= cache.scale[0][table[s].long()].double()[..., None]
        k, v = (kv[:, :, i].transpose(0, 1).reshape(8, -1, 128)[:, : int(lengths[s])].repeat_interleave(4, dim=0) for i in (0, 1))
        score = torch.einsum("hd,hnd->hn", qkv[s, :4096].view(32, 128).double(), k) / 128**0.5
        want = torch.einsum("hn,hnd->hd", score.softmax(dim=1), v).flatten()
        worst = max(worst, *(float((got[s].double() - want).norm() / want.norm()) for got in (out, split)))
    judged(ledger, f"attention over {kind}, 64 sequences to 8,192 tokens, {blocks:,} blocks", worst, 0.02)
    judged(ledger, f"attention over {kind}, of a sequence that is none", float(out[2].abs().max()), 1e-30)


def exact_choice(ledger: Ledger) -> None:
    """Choose among 128,256 tokens: the likeliest; and of 6,400 draws as many as the softmax says, within five standard deviations."""
    from mlsys_bench.engine.gpu import small

    rows, vocabulary = 64, 128_256
    zeros, ints = torch.zeros(rows, device="cuda"), torch.zeros(rows, dtype=torch.int32, device="cuda")
    logits, tokens, seeds = torch.randn(rows, vocabulary, device="cuda"), ints.clone(), torch.arange(rows, device="cuda")
    small.choose(logits, zeros, seeds, ints, tokens)
    judged(ledger, "likeliest tokens that are others", float((tokens != logits.argmax(dim=1)).sum()), 0.5)
    logits = torch.zeros(rows, vocabulary, device="cuda")
    logits[:, 77] = 10.0
    hits = 0
    for place in range(100):
        small.choose(logits, zeros + 1.0, seeds, ints + place, tokens)
        hits += int((tokens == 77).sum())
    p, draws = float(np.exp(10) / (np.exp(10) + vocabulary - 1)), 100 * rows
    share, bar = hits / draws, 5 * (p * (1 - p) / draws) ** 0.5
    judged(ledger, f"of {draws:,} draws {share:.2%} are the token of {p:.2%}", abs(share - p), bar)


# ---------------------------------------------------------------- whole models


def built(name: str, precision: str, max_context: int, max_batch: int) -> Any:
    """Return a model of random weights, drawn on the device."""
    from mlsys_bench.engine.gpu import linears
    from mlsys_bench.engine.gpu.model import GpuModel

    d, device = spec.plain(models.find(name)), torch.device("cuda:0")
    generator = torch.Generator(device="cuda").manual_seed(0)

    def draw(what: str, *size: int) -> torch.Tensor:
        if len(size) == 1:
            return torch.ones(size, device="cuda")
        return torch.empty(size, device="cuda").normal_(0.0, weights._sd(d, what, size[1]), generator=generator)

    made = weights.build(d, weights.Tensors(draw), precision=precision, device=device, pack=linears.packer(precision, device))
    torch.cuda.empty_cache()
    return GpuModel(d, made, precision=precision, max_context=max_context, max_batch=max_batch, device=device)


def steps_of(batch: int, position: int, blocks_each: int, block_tokens: int, tokens: np.ndarray[Any, Any] | None = None) -> Any:
    """Return the decode step of sequences that all stand at one position, each in blocks of its own."""
    from mlsys_bench.engine.runner import Step

    table = np.arange(batch * blocks_each, dtype=np.int32).reshape(batch, blocks_each)
    at = np.full(batch, position, dtype=np.int32)
    rows = np.arange(batch, dtype=np.int32)
    return Step.of(
        tokens=np.full(batch, 5, dtype=np.int32) if tokens is None else tokens, positions=at,
        slots=(table[rows, at // block_tokens] * block_tokens + at % block_tokens).astype(np.int32), sequence_of=rows,
        first=np.arange(batch + 1, dtype=np.int32), block_table=table, sampled=rows,
    )  # fmt: skip


def prompt_of(tokens: int, block_tokens: int, start: int = 0) -> Any:
    """Return the step that computes a prompt of one sequence, from `start` on."""
    from mlsys_bench.engine.runner import Step

    at = np.arange(start, start + tokens, dtype=np.int32)
    return Step.of(
        tokens=(at * 7919 % 1000).astype(np.int32), positions=at, slots=at, sequence_of=np.zeros(tokens, dtype=np.int32),
        first=np.array([0, tokens], dtype=np.int32), block_table=np.arange(-(-(start + tokens) // block_tokens), dtype=np.int32)[None],
        sampled=np.array([tokens - 1], dtype=np.int32),
    )  # fmt: skip


def whole(ledger: Ledger, name: str, precision: str, batches: Sequence[int], bar: float | None) -> None:
    """Time decode steps at each batch, each fed by the one before, and prompts; the bar is that of batch 1."""
    from mlsys_bench.engine.gpu.kv import GpuKV

    began, longest, block_tokens = time.time(), 8192, 16
    a = models.find(name)
    model = built(name, precision, longest, max(batches))
    blocks_each = -(-(PROMPT + 600) // block_tokens)
    blocks = max(max(batches) * blocks_each, longest // block_tokens)
    cache = GpuKV(a, blocks=blocks, block_tokens=block_tokens, dtype=torch.bfloat16, device=torch.device("cuda:0"))
    read = sum(
        t.numel() * t.element_size() for layer in model.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down) for t in m.tensors()
    )
    read += sum(t.numel() * t.element_size() for t in model.head.tensors())
    print(f"{name} in {precision}: {read / 1e9:.2f} GB read a step, built in {time.time() - began:.0f} s", flush=True)
    guarded(ledger, f"{precision}: two ways to the same logits", lambda: two_ways(ledger, model, cache, precision))
    for batch in sorted(batches, key=lambda b: (b != 1, -b)):  # batch 1 has the bar; then from the largest, as graphs are captured
        guarded(
            ledger, f"{precision} batch {batch}", lambda b=batch: decode(ledger, model, cache, name, precision, b, blocks_each, read, bar)
        )
    for tokens in (512, 2048, 8192):
        guarded(ledger, f"{precision} prompt {tokens}", lambda n=tokens: prefill(ledger, model, cache, name, precision, n))


def two_ways(ledger: Ledger, model: Any, cache: Any, precision: str) -> None:
    """Compute tokens one by one and in one chunk: other kernels, the same logits but for rounding."""
    whole_chunk = model.forward(prompt_of(72, cache.block_tokens), cache).clone()
    model.forward(prompt_of(64, cache.block_tokens), cache)
    for position in range(64, 72):
        logits = model.forward(prompt_of(1, cache.block_tokens, position), cache)
    off = float((logits - whole_chunk).norm() / whole_chunk.norm())
    bar = 0.25 if precision == "fp8" else 0.05  # chunks of fp8 round activations to 4 bits, single tokens keep 8
    ledger.misses += not off < bar
    print(f"  one by one against one chunk: {off:.2%} apart (bar {bar:.0%}{'' if off < bar else ', MISSED'})", flush=True)


def decode(
    ledger: Ledger, model: Any, cache: Any, name: str, precision: str, batch: int, blocks_each: int, read: int, bar: float | None
) -> None:
    """Time steps as a server would see them: prepared on the host, launched before the last one's tokens are read."""
    feed = np.arange(batch, dtype=np.int32)
    position, wall, handle = PROMPT, [], None
    for sample in range(SAMPLES + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(STEPS):
            after = model.launch(steps_of(batch, position, blocks_each, cache.block_tokens), cache, feed=feed if handle else None)
            if handle:
                handle.tokens()
            handle, position = after, position + 1
        torch.cuda.synchronize()
        if sample:  # the first one compiles and captures
            wall.append((time.perf_counter() - began) / STEPS)
    bucket = model.graphs.current
    device = timed_replays(bucket.graph)
    step_s = ledger.add("decode.step", wall, "s", model=name, precision=precision, batch=batch, context=PROMPT)
    graph_s = ledger.add("decode.graph", device, "s", model=name, precision=precision, batch=batch, context=PROMPT)
    kv = batch * (PROMPT + (SAMPLES + 1) * STEPS / 2) * 2 * model.heads.kv_heads * model.heads.head_dim * 2 * len(model.layers)
    share = (read + kv) / step_s / ledger.copy_bytes_per_s
    said = ledger.hold(f"{precision} decode", share, bar if batch == 1 else None)
    print(
        f"  batch {batch:3}: {batch / step_s:8.0f} tok/s, step {1e3 * step_s:.3f} ms, graph {1e3 * graph_s:.3f} ms, "
        f"{said} of copy bandwidth",
        flush=True,
    )
    if not torch.isfinite(bucket.logits).all():
        raise ValueError("logits are not finite")


def timed_replays(graph: torch.cuda.CUDAGraph, count: int = 20) -> list[float]:
    """Return seconds of single replays, back to back."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(marks)]


def prefill(ledger: Ledger, model: Any, cache: Any, name: str, precision: str, tokens: int) -> None:
    """Time one prompt in one step."""
    step, taken = prompt_of(tokens, cache.block_tokens), []
    for sample in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.forward(step, cache)
        torch.cuda.synchronize()
        if sample:
            taken.append(time.perf_counter() - began)
    took_s = ledger.add("prefill", taken, "s", model=name, precision=precision, tokens=tokens)
    a = model.decoder.shape
    flops = 2 * tokens * sum(m.n * m.k for layer in model.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down))
    flops += 2 * tokens**2 * a.heads * a.head_dim * a.layers
    share = flops / took_s / ledger.product_flops_per_s
    print(
        f"  prompt {tokens:5}: {tokens / took_s:8.0f} tok/s, {1e3 * took_s:.1f} ms, {flops / took_s / 1e12:.0f} TFLOP/s, "
        f"{share:.1%} of the bf16 product",
        flush=True,
    )


# ---------------------------------------------------------------- kernels


def attention(ledger: Ledger) -> None:
    """Time paged decode attention on the 8 B shape."""
    cases = (
        (32, 8192, "bf16", ATTENTION_BAR),
        (1, 8192, "bf16", None),
        (8, 32768, "bf16", None),
        (64, 1024, "bf16", None),
        (32, 8192, "int8", None),
        (32, 8192, "fp8", None),
    )
    for batch, context, kind, bar in cases:
        guarded(ledger, f"attention {batch} x {context} {kind}", lambda c=(batch, context, kind, bar): one_attention(ledger, *c))


def one_attention(ledger: Ledger, batch: int, context: int, kind: str, bar: float | None) -> None:
    """Time one case, over shuffled blocks, against the bytes of its keys and values; then try other tiles and splits."""
    from mlsys_bench.engine.gpu import attention as kernels
    from mlsys_bench.engine.gpu.kv import GpuKV
    from mlsys_bench.engine.kv import KINDS

    a = dataclasses.replace(models.find("llama-3-8b"), layers=1)
    heads, device = kernels.Heads(heads=32, kv_heads=8, head_dim=128, norm_eps=1e-5), torch.device("cuda:0")
    cache = GpuKV(a, blocks=batch * context // 16, block_tokens=16, dtype=KINDS[kind], device=device)
    if cache.scale is None:
        cache.data.normal_()
    else:
        cache.raw.random_(0, 60)  # bytes that are numbers in int8 and in fp8
        cache.scale.fill_(0.01)
    table = torch.randperm(batch * context // 16, device="cuda").int().view(batch, -1)
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    qkv, out = torch.randn(batch, heads.width, device="cuda").bfloat16(), torch.empty(batch, 4096, dtype=torch.bfloat16, device="cuda")
    natural = kernels.splits_of(batch, 8, context, device)
    bytes_read = batch * context * 8 * 2 * (128 * cache.dtype.itemsize + (4 if cache.scale is not None else 0))
    for splits in sorted({natural, max(1, natural // 2), 2 * natural}, key=lambda s: (s != natural, s)):
        taken = timed(lambda i, s=splits: kernels.decode(heads, qkv, table, lengths, cache, 0, out, splits=s), calls=10)
        took_s = ledger.add("attention.decode", taken, "s", batch=batch, context=context, kv=kind, splits=splits)
        share = bytes_read / took_s / ledger.copy_bytes_per_s
        said = ledger.hold("attention", share, bar if splits == natural else None)
        print(
            f"  {batch:3} x {context:6} {kind}, {splits:2} splits: {1e6 * took_s:7.1f} us, {bytes_read / took_s / 1e12:.2f} TB/s, {said}",
            flush=True,
        )


def matrices(ledger: Ledger, precisions: tuple[str, ...]) -> None:
    """Time every matrix of the 8 B shape in every way for many numbers of rows, beside what torch brings: what `ways` should choose."""
    shapes = {"o": (4096, 4096), "qkv": (6144, 4096), "down": (4096, 14336), "gate_up": (28672, 4096)}
    for precision in precisions:
        for what, (n, k) in shapes.items():
            guarded(ledger, f"{precision} {what}", lambda p=precision, w=what, n=n, k=k: one_matrix(ledger, p, w, n, k))
        ledger.write(f"matrices-{precision}")


def one_matrix(ledger: Ledger, precision: str, what: str, n: int, k: int) -> None:
    """Time one shape in one precision, over as many copies as the L2 cache cannot hold."""
    from mlsys_bench.engine.gpu import linears

    kept = formats.quantise(torch.randn(n, k, device="cuda") / k**0.5, precision)
    copies = max(2, 2 * 10**8 // kept.nbytes)
    device = torch.device("cuda:0")
    held: list[Any] = [linears.pack(kept, precision, device) for _ in range(copies)]
    for rows in (1, 2, 4, 8, 16, 64):
        x, figures = torch.randn(rows, k, device="cuda").bfloat16(), []
        for way, work in candidates(held, kept, precision, x, rows, n, k).items():
            try:
                took_s = ledger.add(
                    "matrix", timed(work, calls=copies, samples=10), "s", precision=precision, what=what, rows=rows, way=way
                )
            except Exception:
                ledger.failed(f"{precision} {what} x {rows}: {way}")
                continue
            figures.append((kept.nbytes / took_s / ledger.copy_bytes_per_s, way))
        print(
            f"  {precision} {what} x {rows}: " + ", ".join(f"{way} {share:.0%}" for share, way in sorted(figures, reverse=True)), flush=True
        )


def candidates(
    held: list[Any], kept: Any, precision: str, x: torch.Tensor, rows: int, n: int, k: int
) -> dict[str, Callable[[int], object]]:
    """Return ways to multiply: ours in several tiles, and torch's."""
    from mlsys_bench.engine.gpu import ways

    form, count = held[0].form, len(held)
    found: dict[str, Callable[[int], object]] = {}
    own: list[tuple[str, Any]] = [("own", None)]
    if rows <= 8:
        base = ways.gemv(form, rows, n, k)
        own += [(f"gemv bn{bn}", dataclasses.replace(base, bn=bn)) for bn in {max(1, base.bn // 2), base.bn, 2 * base.bn}]
    if rows >= 4:
        base = ways.gemm(form, rows, n, k)
        own += [
            (f"gemm bn{bn} splits{s} stages{st}", dataclasses.replace(base, bn=bn, splits=s, stages=st))
            for bn, s, st in ((64, base.splits, 4), (64, 2 * base.splits, 4), (64, base.splits, 3), (128, 2 * base.splits, 3))
        ]
    for name, way in own:
        found[name] = lambda i, way=way: held[i % count].run(x, dtype=torch.bfloat16, way=way)
    if precision == "bf16":
        found["cuBLAS"] = lambda i: functional.linear(x, held[i % count].weight)
    if precision == "int4g64":
        tiny = functools.cache(lambda: tinygemm(kept))
        found["tinygemm (one copy, cached)"] = lambda i: torch.ops.aten._weight_int4pack_mm(x, tiny()[0], 64, tiny()[1])
    if precision == "fp8" and rows >= 16:
        found["_scaled_mm"] = lambda i: held[i % count].many(x)
    return found


def tinygemm(kept: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return torch's own int4 layout of a matrix: packed weights, and scales and zeros in bf16 [K / group, N, 2]."""
    swapped = (kept.weight << 4) | (kept.weight >> 4)  # it wants the even input in the high nibble
    packed = torch.ops.aten._convert_weight_to_int4pack(swapped.contiguous(), 8)
    scale = kept.scale.t().bfloat16()
    return packed, torch.stack([scale, torch.zeros_like(scale)], dim=2).contiguous()


# ---------------------------------------------------------------- the engine


def engine(ledger: Ledger) -> None:
    """Serve the same requests on GPU and CPU in fp32: the same tokens; then a small model under load."""
    from mlsys_bench.engine import Engine, default_limits

    shape = models.find("nano")
    outputs = []
    for device, backend in (("cpu", "torch"), ("cuda:0", "triton")):
        served = Engine(shape, device=device, backend=backend, limits=default_limits(shape, max_batch=8, max_context=256))
        outputs.append(answers(served, [list(range(3, 3 + n)) for n in (1, 9, 40, 120)], 40)[0])
    same = sum(a == b for a, b in zip(*outputs, strict=True))
    print(f"  {same} of {len(outputs[0])} greedy answers in fp32 are the CPU's, token for token (bar all)")
    ledger.misses += same < len(outputs[0])
    shape = models.find("tinyllama-1.1b")
    given = []
    for ahead in (False, True):
        served = Engine(shape, precision="bf16", device="cuda:0", limits=default_limits(shape, max_batch=32, max_context=1024), ahead=ahead)
        answers(served, [[1, 2, 3]] * 32, 8)
        got, took_s, tokens = answers(served, [list(range(5, 133)) for _ in range(32)], 128)
        given.append(got)
        ledger.add("engine.throughput", [tokens / took_s], "1/s", "higher", model=shape.id, precision="bf16", batch=32, ahead=ahead)
        how = "next step launched before the last tokens are read" if ahead else "one step after the other"
        print(f"  {shape.id} bf16, 32 requests of 128 + 128 tokens, {how}: {tokens / took_s:.0f} tok/s")
    same = sum(a == b for a, b in zip(*given, strict=True))
    print(f"  {same} of {len(given[0])} answers are the same both ways (bar all)")
    ledger.misses += same < len(given[0])


def answers(served: Any, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], float, int]:
    """Return every request's tokens, the seconds all took, and how many tokens there were."""
    ids = [served.add(prompt, max_tokens=tokens, ignore_eos=True) for prompt in prompts]
    got: dict[int, list[int]] = {i: [] for i in ids}
    began = time.perf_counter()
    while served.busy:
        for request, token in served.step().tokens:
            got[request].append(token)
    return [got[i] for i in ids], time.perf_counter() - began, sum(map(len, got.values()))


if __name__ == "__main__":
    sys.exit(main())
