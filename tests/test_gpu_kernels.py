"""Every GPU kernel against float64, over ragged shapes and poisoned outputs: on a CUDA device, or by Triton's interpreter on the CPU.

    TRITON_INTERPRET=1 python -m pytest tests/test_gpu_kernels.py

The interpreter multiplies bf16 wrongly, so there 16-bit activations are fp16; on a device they are bf16.  Tolerances are relative errors in
the Frobenius norm: a sum in fp32 of exact products is off by a few 2^-24, rounding factors to 11 or 8 bits by 2^-12 or 2^-9 each.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mlsys_bench import models
from mlsys_bench.batching import Limits
from mlsys_bench.engine import Engine, formats, quant, spec, weights
from mlsys_bench.engine.flight import Picks, greedy
from mlsys_bench.engine.gpu import attention, linears, small, tri
from mlsys_bench.engine.gpu.attention import Heads
from mlsys_bench.engine.gpu.kernels_small import gumbel
from mlsys_bench.engine.gpu.kv import GpuKV
from mlsys_bench.engine.gpu.linears import Norm, Rows, Words
from mlsys_bench.engine.gpu.model import GpuModel, nobody
from mlsys_bench.engine.gpu.tri import tl
from mlsys_bench.engine.gpu.ways import Way
from mlsys_bench.engine.kv import KVCache
from mlsys_bench.engine.model import Model
from mlsys_bench.engine.runner import Int32, Step
from mlsys_bench.engine.sampling import GREEDY, sampling

HAS_CUDA = torch.cuda.is_available()
pytestmark = [
    pytest.mark.skipif(
        not tri.IS_INSTALLED or not (HAS_CUDA or tri.is_interpreted()),
        reason="needs Triton and a CUDA device, or TRITON_INTERPRET=1 (with numpy below 2.4 for Triton 3.6)",
    ),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # in Triton's interpreter
]
DEVICE = torch.device("cuda:0" if HAS_CUDA else "cpu")
SHORT = torch.bfloat16 if HAS_CUDA else torch.float16
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel leaves unwritten is NaN."""
    plain = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        made = plain(*size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() and made.element_size() > 1 else made

    monkeypatch.setattr(torch, "empty", empty)
    linears._SPACE.clear()


def error(got: Tensor, want: Tensor) -> float:
    """Return |got - want| / |want|; NaN where anything was left out."""
    return float((got.double() - want).norm() / want.norm())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(seed: int, *size: int) -> Tensor:
    return torch.randn(size, generator=seeded(seed)).to(DEVICE)


# ---------------------------------------------------------------- matrices

WAYS = {
    "one row": (1, Way("gemv", bm=1, bn=8, bk=64)),
    "a few, one row of W each": (3, Way("gemv", bm=4, bn=2, bk=128)),
    "tensor cores, K split": (5, Way("gemm", bm=16, bn=32, bk=32, splits=3)),
    "tensor cores": (17, Way("gemm", bm=32, bn=32, bk=32)),
    "many": (33, Way("wide")),
}


def packed(precision: str, n: int, k: int, seed: int = 0) -> tuple[linears.Triton, Tensor]:
    """Return a matrix and what it stands for in float64."""
    weight = drawn(seed, n, k) / k**0.5
    if precision == "short":
        kept: formats.Logical = formats.Dense(weight=weight.to(SHORT))
    elif precision == "int4 with zeros":
        kept = formats.groups4(weight, 32)
        kept = dataclasses.replace(kept, zero=torch.randint(0, 16, kept.scale.shape, generator=seeded(1), dtype=torch.uint8).to(DEVICE))
    else:
        kept = formats.quantise(weight, precision)
    dtype = torch.float32 if precision == "fp32" else SHORT
    held = Words(kept, DEVICE, dtype) if isinstance(kept, formats.Rows8 | formats.Groups4) else Rows(kept, DEVICE, dtype)
    return held, kept.dequantise().double()


PRECISIONS = ["fp32", "short", "fp8", "int8", "int4g32", "int4g128", "int4 with zeros"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", WAYS)
def test_a_product_with_its_norm_bias_gate_and_residual(precision: str, name: str) -> None:
    (rows, way), n, k = WAYS[name], 36, 200
    if precision == "fp32" and way.kind == "gemm":
        pytest.skip("fp32 never goes through tensor cores: they would round it")
    held, w = packed(precision, n, k)
    if name == "many" and precision == "fp8" and HAS_CUDA:
        pytest.skip("fp8 times fp8 rounds activations to 4 bits: measured beside its speed, not here")
    x, gain, bias, seen = drawn(1, rows, k), drawn(2, k).abs(), drawn(3, n), drawn(4, rows, n)
    normed = x.double() / (x.double().square().sum(1, keepdim=True) + k * 1e-5).sqrt() * gain
    want = normed @ w.T + bias
    loose = TOLERANCE[held.dtype if way.kind != "gemv" else torch.float32]
    norm = Norm(eps=1e-5, gain=gain)
    assert error(held.run(x, norm=norm, bias=bias, dtype=torch.float32, way=way), want) < loose
    gate, up = want.chunk(2, dim=1)
    gated = held.run(x, norm=norm, bias=bias, gated=True, dtype=torch.float32, way=way)
    assert error(gated, functional.silu(gate) * up) < 3 * loose
    short = x.to(held.dtype)
    want = seen.double() + short.double() @ w.T
    assert error(held.run(short, onto=seen, way=way), want) < loose
    assert int(linears.workspace(DEVICE, 0, 0)[1].abs().sum()) == 0, "counters are 0 again"


@pytest.mark.parametrize("precision", ["int8", "int4g64", "int4 with zeros"])
@pytest.mark.parametrize(("n", "k"), [(1, 32), (17, 66), (40, 160)])
def test_widened_words_are_the_weights(precision: str, n: int, k: int) -> None:
    held, w = packed(precision, n, k)
    assert isinstance(held, Words)
    assert error(held.widened(torch.float32), w) < 1e-6


def test_a_matrix_finds_its_own_way_for_any_number_of_rows() -> None:
    held, w = packed("int8", 64, 96)
    for rows in (1, 2, 3, 4, 5, 64, 65):
        x = drawn(rows, rows, 96).to(SHORT)
        assert error(held(x), x.double() @ w.T) < 2 * TOLERANCE[SHORT], rows


# ---------------------------------------------------------------- small kernels


@pytest.mark.parametrize(("rows", "hidden"), [(1, 16), (5, 100)])
def test_norm_adds_first_and_picks_rows(rows: int, hidden: int) -> None:
    x, delta, gain = drawn(0, rows, hidden), drawn(1, rows, hidden), drawn(2, hidden)
    total = x.double() + delta.double()
    want = total / (total.square().sum(1, keepdim=True) + hidden * 1e-6).sqrt() * gain
    assert error(small.rms_norm(x, 1e-6, gain, torch.float32, delta=delta), want) < 1e-6
    assert error(x, total) < 1e-6, "the residual stream has the sum"
    pick = torch.tensor([rows - 1, 0], dtype=torch.int32, device=DEVICE)
    assert error(small.rms_norm(x, 1e-6, gain, torch.float32, pick=pick), want[pick.long()]) < 1e-6


def test_swiglu_and_embedding_with_feedback() -> None:
    gate_up = drawn(0, 3, 2 * 70)
    gate, up = gate_up.double().chunk(2, dim=1)
    assert error(small.swiglu(gate_up, torch.float32), functional.silu(gate) * up) < 1e-6
    table, ints = drawn(1, 9, 40).to(SHORT), functools.partial(torch.tensor, dtype=torch.int32, device=DEVICE)
    x = small.embed(ints([3, 0, 8]), ints([-1, 1, -1]), ints([5, 7]), table)
    assert torch.equal(x, table[[3, 7, 8]].float())


HEADS = {
    "grouped": Heads(heads=6, kv_heads=2, head_dim=24, norm_eps=1e-5),
    "one of each": Heads(heads=1, kv_heads=1, head_dim=16, norm_eps=1e-5),
    "many for one": Heads(heads=20, kv_heads=1, head_dim=32, norm_eps=1e-5),
}
KINDS = [torch.float32, SHORT, torch.int8, torch.float8_e4m3fn]
ROUNDING = {torch.float32: 1e-6, SHORT: 2 * TOLERANCE[SHORT], torch.int8: 8e-3}  # of a vector, once kept
ROUNDING[torch.float8_e4m3fn] = 2.0**-4 if HAS_CUDA else 2.0**-3  # three bits of mantissa; the interpreter cuts off instead of rounding


def cache_of(a: Heads, kind: torch.dtype, *, layers: int = 1, blocks: int = 12, block_tokens: int = 4) -> GpuKV:
    shape = dataclasses.replace(models.find("nano"), layers=layers, heads=a.heads, kv_heads=a.kv_heads, head_dim=a.head_dim)
    return GpuKV(shape, blocks=blocks, block_tokens=block_tokens, dtype=kind, device=DEVICE)


def tables(a: Heads, positions: int) -> tuple[Tensor, Tensor]:
    from mlsys_bench.engine.rope import Rope

    cos, sin = Rope(dim=a.head_dim).tables(positions)
    return torch.from_numpy(cos).to(DEVICE), torch.from_numpy(sin).to(DEVICE)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads [T, heads, D] in float64.  cos, sin: [T, D / 2]."""
    low, high = x.double().chunk(2, dim=2)
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat([low * c - high * s, high * c + low * s], dim=2)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_norms", [False, True])
def test_rope_turns_queries_and_writes_keys_and_values(name: str, kind: torch.dtype, has_norms: bool) -> None:
    a, dtype = HEADS[name], torch.float32
    cache, (cos, sin) = cache_of(a, kind), tables(a, 30)
    qkv = drawn(0, 3, a.width).to(dtype)
    before = qkv.clone().view(3, -1, a.head_dim)
    positions, slots = (torch.tensor(v, dtype=torch.int32, device=DEVICE) for v in ([0, 7, 29], [5, -1, 46]))
    gains = (drawn(1, a.head_dim), drawn(2, a.head_dim)) if has_norms else None
    held = cache.raw.clone()
    attention.rope_write(a, qkv, cos, sin, positions, slots, cache, 0, gains)
    q, k, v = before.double().split([a.heads, a.kv_heads, a.kv_heads], dim=1)
    if gains:
        q, k = (x / (x.square().sum(2, keepdim=True) + a.head_dim * 1e-5).sqrt() * g for x, g in zip((q, k), gains, strict=True))
    at = positions.long()
    q, k = (turned(x, cos[at], sin[at]) for x in (q, k))
    assert error(qkv[:, : a.heads * a.head_dim].reshape(3, a.heads, -1), q) < 1e-6
    for token, slot in ((0, 5), (2, 46)):
        key, value = cache.token(0, slot)
        assert error(key, k[token]) < ROUNDING[kind]
        assert error(value, v[token]) < ROUNDING[kind]
    held[0, [1, 11]] = cache.raw[0, [1, 11]]
    assert torch.equal(held, cache.raw), "other blocks are as they were"


def context(a: Heads, kind: torch.dtype, lengths: list[int]) -> tuple[GpuKV, Tensor, list[tuple[Tensor, Tensor]]]:
    """Return a cache that holds sequences of these lengths in shuffled blocks, its table, and keys and values [n, kv_heads, D] as kept."""
    need = [-(-n // 4) for n in lengths]
    cache = cache_of(a, kind, blocks=sum(need) + 1)
    values = drawn(7, *cache.data.shape)
    cache.data.copy_((values * 40).clamp(-127, 127).round() if kind == torch.int8 else values)
    if cache.scale is not None:
        cache.scale.copy_(drawn(8, *cache.scale.shape).abs() / (40 if kind == torch.int8 else 1))
    blocks = (1 + torch.randperm(sum(need), generator=seeded(5))).tolist()
    table = torch.zeros(len(lengths), max([*need, 1]), dtype=torch.int32)
    held = []
    for s, n in enumerate(lengths):
        mine = [blocks.pop() for _ in range(need[s])]
        table[s, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        kept = [cache.token(0, mine[i // 4] * 4 + i % 4) for i in range(n)]
        held.append((torch.stack([k for k, _ in kept]), torch.stack([v for _, v in kept])) if n else (torch.empty(0), torch.empty(0)))
    return cache, table.to(DEVICE), held


def attended(a: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v in float64.  q: [heads, D]; k, v: [n, kv_heads, D]."""
    per = a.heads // a.kv_heads
    k, v = (x.double().repeat_interleave(per, dim=1) for x in (k, v))
    p = (torch.einsum("hd,nhd->hn", q.double(), k) / a.head_dim**0.5).softmax(dim=1)
    return torch.einsum("hn,nhd->hd", p, v)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [0, 70])
def test_decode_attention_over_paged_keys(name: str, kind: torch.dtype, splits: int, window: int) -> None:
    """Lengths of nobody, of one token, just at a tile's edge, and over several tiles."""
    a, lengths = HEADS[name], [1, 0, 64, 135]
    dtype = SHORT if kind == SHORT else torch.float32
    cache, table, held = context(a, kind, lengths)
    qkv = drawn(0, 4, a.width).to(dtype)
    out = torch.empty(4, a.heads * a.head_dim, dtype=dtype, device=DEVICE)
    attention.decode(a, qkv, table, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), cache, 0, out, splits=splits, window=window)
    assert not out[1].any(), "no sequence, no result"
    for s in (0, 2, 3):
        k, v = (x[-window:] for x in held[s])
        want = attended(a, qkv[s, : a.heads * a.head_dim].view(a.heads, -1), k, v)
        assert error(out[s].view(a.heads, -1), want) < 2 * TOLERANCE[dtype]
    assert int(linears.workspace(DEVICE, 0, 0)[1].abs().sum()) == 0


@pytest.mark.parametrize("name", ["grouped", "one of each"])
@pytest.mark.parametrize("kind", [SHORT, torch.int8])
@pytest.mark.parametrize("window", [0, 9])
def test_chunks_of_prompts_see_their_past_and_themselves(name: str, kind: torch.dtype, window: int) -> None:
    a, past, tokens = HEADS[name], [0, 61, 3], [66, 5, 1]
    dtype = SHORT if kind == SHORT else torch.float32
    cache, table, held = context(a, kind, [p + n for p, n in zip(past, tokens, strict=True)])
    first = np.cumsum([0, *tokens]).astype(np.int32)
    positions = np.concatenate([np.arange(p, p + n) for p, n in zip(past, tokens, strict=True)]).astype(np.int32)
    qkv = drawn(0, len(positions), a.width).to(dtype)
    out = torch.empty(len(positions), a.heads * a.head_dim, dtype=dtype, device=DEVICE)
    tiles = torch.from_numpy(attention.tiles_of(first, positions)).to(DEVICE)
    attention.prefill(a, qkv, table, tiles, cache, 0, out, window=window)
    want = []
    for t, position in enumerate(positions.tolist()):
        s = int(np.searchsorted(first, t, side="right")) - 1
        low = max(0, position + 1 - window) if window else 0
        k, v = (x[low : position + 1] for x in held[s])
        want.append(attended(a, qkv[t, : a.heads * a.head_dim].view(a.heads, -1), k, v).flatten())
    assert error(out, torch.stack(want)) < 2 * TOLERANCE[dtype]


# ---------------------------------------------------------------- the choice of tokens


def chosen(logits: Tensor, heat: list[float], seeds: list[int], places: list[int], allowed: Tensor | None = None) -> list[int]:
    tokens = torch.full((len(logits),), -1, dtype=torch.int32, device=DEVICE)
    small.choose(
        logits, torch.tensor(heat, device=DEVICE), torch.tensor(seeds, device=DEVICE),
        torch.tensor(places, dtype=torch.int32, device=DEVICE), tokens, allowed=allowed,
    )  # fmt: skip
    return [int(t) for t in tokens.tolist()]


def test_greedy_is_the_first_of_the_largest_among_those_allowed() -> None:
    logits = drawn(0, 3, 2500)
    logits[1, [40, 2100, 7]] = 50.0
    allowed = torch.ones(2500, dtype=torch.uint8, device=DEVICE)
    assert chosen(logits, [0.0] * 3, [0] * 3, [0] * 3) == [int(logits[0].argmax()), 7, int(logits[2].argmax())]
    allowed[:100] = 0
    assert chosen(logits, [0.0] * 3, [0] * 3, [0] * 3, allowed)[1] == 2100


def test_draws_follow_the_softmax_and_depend_on_seed_and_place_alone() -> None:
    """Chi-square of 400 draws over 5 tokens stays below its 99.9 % quantile, 18.5 at 4 degrees of freedom."""
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    rows = 400 if HAS_CUDA else 100
    logits = (p.log() * 0.7).repeat(rows, 1).to(DEVICE)
    got = chosen(logits, [0.7] * rows, list(range(rows)), [3] * rows)
    counts = np.bincount(got, minlength=5)
    expected = rows * p.numpy()
    assert float(((counts - expected) ** 2 / expected).sum()) < 18.5
    assert chosen(logits[:2], [0.7] * 2, [11, 12], [3, 3]) == got[11:13]
    assert len({chosen(logits[:1], [0.7], [5], [place])[0] for place in range(12)}) > 1


@tri.jit
def noise(bits: Any, y: Any, N: tl.constexpr) -> None:
    """Write y [N], the noise of bits [N]."""
    at = tl.arange(0, N)
    tl.store(y + at, gumbel(tl.load(bits + at).to(tl.uint32, bitcast=True)))


def test_noise_is_exact_where_it_decides_and_never_infinite() -> None:
    """-log(-log(1 - v)) of v = (bits + 1/2) / 2^32 in float64: large noise comes of few bits, and all ones must not win."""
    bits = np.array([0, 1, 2, 63, 10**6, 4 * 10**6, 5 * 10**6, 2**30, 2**31, 2**32 - 2**20, 2**32 - 2**10, 2**32 - 600], dtype=np.uint32)
    bits = np.concatenate([bits, [2**32 - 1] * 4]).astype(np.uint32)
    y = torch.empty(16, dtype=torch.float32, device=DEVICE)
    noise[(1,)](torch.from_numpy(bits.view(np.int32)).to(DEVICE), y, N=16)
    v = (bits.astype(np.float64) + 0.5) / 2**32
    got, want = y.cpu().double().numpy(), -np.log(-np.log1p(-v))
    assert np.abs(got[:9] - want[:9]).max() < 1e-4
    assert (got[9:] < -1).all(), "the smallest noise may be coarse, but small it is"


def test_of_logits_that_are_no_numbers_a_token_comes_that_has_a_row_in_the_table() -> None:
    assert 0 <= chosen(torch.full((1, 70), float("nan"), device=DEVICE), [0.0], [0], [0])[0] < 70


# ---------------------------------------------------------------- the model

SHAPE = models.counted(
    dataclasses.replace(
        models.find("nano"), id="tiny", layers=1, hidden=32, heads=2, kv_heads=1, head_dim=16, ffn=48, max_context=40, vocab=64,
        tied_embeddings=False,
    )
)  # fmt: skip


def both(precision: str, kind: torch.dtype) -> tuple[Model, KVCache, GpuModel, GpuKV]:
    """Return the torch model on dequantised weights and the GPU model on the packed ones, both with fp32 activations."""
    d, exact = spec.plain(SHAPE), torch.float32
    one = weights.random(
        d, precision=precision, device=DEVICE, seed=0, pack=lambda kept: quant.pack(formats.Dense(weight=kept.dequantise()), "fp32", DEVICE)
    )
    one = dataclasses.replace(one, embedding=one.embedding.float())
    other = weights.random(d, precision=precision, device=DEVICE, seed=0, pack=linears.packer(precision, DEVICE, exact))
    other = dataclasses.replace(other, embedding=one.embedding)
    sizes = {"blocks": 20, "block_tokens": 4}
    return (
        Model(d, one, precision="fp32", max_context=40, device=DEVICE), KVCache(SHAPE, dtype=exact, device=DEVICE, **sizes),
        GpuModel(d, other, precision=precision, max_context=40, max_batch=4, device=DEVICE, dtype=exact),
        GpuKV(SHAPE, dtype=kind, device=DEVICE, **sizes),
    )  # fmt: skip


TABLE = np.random.default_rng(0).permutation(20).astype(np.int32).reshape(2, 10)


def step_of(tokens: list[list[int]], starts: list[int], rows: list[int], *, samples: bool = True) -> Step:
    """Return the step in which sequences compute these tokens from these positions on; rows: of TABLE."""
    first = np.cumsum([0, *map(len, tokens)]).astype(np.int32)
    positions = np.concatenate([np.arange(s, s + len(t)) for s, t in zip(starts, tokens, strict=True)]).astype(np.int32)
    sequence_of = np.repeat(np.arange(len(tokens)), np.diff(first)).astype(np.int32)
    table = TABLE[rows]
    slots: Int32 = (table[sequence_of, positions // 4] * 4 + positions % 4).astype(np.int32)
    return Step.of(
        tokens=np.concatenate(tokens).astype(np.int32), positions=positions, slots=slots, sequence_of=sequence_of, first=first,
        block_table=table, sampled=first[1:] - 1 if samples else first[:0],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "kind", "most"), [("fp32", torch.float32, 1e-5), ("int8", torch.float32, 1e-5), ("int4g32", torch.int8, 0.03)]
)
def test_the_model_computes_what_torch_computes(precision: str, kind: torch.dtype, most: float) -> None:
    """A prompt beside a single token, then decode steps, and a step that is fed by the one before."""
    torch_model, torch_cache, model, cache = both(precision, kind)
    most *= 10 if HAS_CUDA else 1  # the reference is torch in fp32: on a GPU its attention adds in blocks of its own

    def hold(step: Step) -> None:
        want = torch_model.forward(step, torch_cache).double()
        assert error(model.forward(step, cache), want) < most

    hold(step_of([[9], [1, 2, 3, 4, 5]], [0, 0], [0, 1]))
    hold(step_of([[7], [6, 8]], [1, 5], [0, 1]))
    hold(step_of([[10], [11]], [2, 7], [0, 1]))
    step = step_of([[12], [13]], [3, 8], [0, 1])
    hold(step)
    handle = model.launch(step, cache)
    tokens = handle.tokens()
    assert tokens == model.graphs.logits(2).argmax(dim=1).tolist()
    fed = model.launch(step_of([[0]], [9], [1]), cache, feed=np.array([1], dtype=np.int32))
    logits = model.graphs.logits(1).clone()
    assert fed.tokens() == [int(logits.argmax())]
    want = torch_model.forward(step_of([[tokens[1]]], [9], [1]), torch_cache).double()
    assert error(logits, want) < most


def test_chunks_are_launched_fed_and_chosen_from_as_decode_steps_are() -> None:
    """A chunk beside a token that only the device knows: the logits and tokens are those of known tokens."""
    _, _, model, cache = both("fp32", torch.float32)
    token = model.launch(step_of([[9], [8]], [0, 0], [0, 1]), cache).tokens()[0]
    want = model.forward(step_of([[token], [1, 2, 3]], [1, 1], [0, 1]), cache).clone()
    again = model.launch(step_of([[9], [8]], [0, 0], [0, 1]), cache)
    fed = model.launch(step_of([[0], [1, 2, 3]], [1, 1], [0, 1]), cache, feed=np.array([0, -1, -1, -1], dtype=np.int32))
    assert again.tokens()[0] == token
    assert fed.tokens() == want.argmax(dim=1).tolist() == model.choose(want, greedy(2))
    held = cache.raw.clone()
    part = step_of([[5, 6]], [4], [1], samples=False)
    assert model.launch(part, cache).tokens() == []
    assert not torch.equal(held, cache.raw)
    held = cache.raw.clone()
    assert len(model.launch(nobody(2, 1, 10), cache).tokens()) == 1
    assert torch.equal(held, cache.raw), "warming up writes nothing"


def test_the_engine_launches_ahead_what_it_computes_step_by_step() -> None:
    """Greedy and drawn requests, one of each only the host can serve, over two seats and chunks: ahead, step by step, and all in torch."""
    shape = dataclasses.replace(SHAPE, id="byte", vocab=264)
    limits = Limits(max_seqs=2, max_step_tokens=6, block_tokens=4, blocks=9, max_context=40)
    warm = sampling(temperature=0.8, seed=3)
    asks = [([5, 6, 7, 8, 9, 10, 11], GREEDY), ([1], warm), ([2, 3], GREEDY)]
    got = []
    for options in ({"ahead": True}, {"ahead": False}, {"backend": "torch"}):
        engine = Engine(shape, device=str(DEVICE), limits=limits, **{"backend": "triton", **options})
        ids = [engine.add(prompt, max_tokens=4, sampling=how, ignore_eos=True) for prompt, how in asks]
        tokens: dict[int, list[int]] = {i: [] for i in ids}
        while engine.busy:
            for i, token in engine.step().tokens:
                tokens[i].append(token)
        assert engine.free_blocks == limits.blocks
        got.append(list(tokens.values()))
    assert got[0] == got[1]
    assert [got[2][0], got[2][2]] == [got[0][0], got[0][2]], "torch draws by another rule, and takes the same likeliest ones"


def test_a_launch_draws_as_its_picks_say() -> None:
    _, _, model, cache = both("fp32", torch.float32)
    step = step_of([[3], [4]], [0, 0], [0, 1])
    hot = Picks(np.array([0.0, 5.0], dtype=np.float32), np.array([1, 2], dtype=np.int64), np.array([0, 0], dtype=np.int32))
    plain = model.launch(step, cache, greedy(2)).tokens()
    draws = [model.launch(step, cache, hot._replace(places=np.array([i, i], dtype=np.int32))).tokens() for i in range(6)]
    assert {first for first, _ in draws} == {plain[0]}
    assert len({second for _, second in draws}) > 1
