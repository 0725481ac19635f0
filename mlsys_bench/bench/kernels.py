"""All that is measured below the engine: the machine (`machine`), the operators of a model (`operators`), its links (`collectives`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mlsys_bench import models
from mlsys_bench.bench import alone, collectives, machine, operators
from mlsys_bench.bench.harness import MEMORY_SHARE, Spec, Task, free_bytes
from mlsys_bench.bench.machine import Lacking, Offers
from mlsys_bench.bench.operators import Operators, Sizes
from mlsys_bench.bench.options import SUITES, Options, wants
from mlsys_bench.engine import kv, schemes, spec
from mlsys_bench.engine.rope import Rope
from mlsys_bench.engine.spec import Decoder
from mlsys_bench.engine.tokenizer import TokenIds, open_tokenizer
from mlsys_bench.errors import BadInput
from mlsys_bench.models import Architecture
from mlsys_bench.types import Scalar

CONTEXTS = tuple(2**i for i in range(9, 16))  # 512 to 32 k
SIZES = {
    "quick": Sizes(tokens=(1, 512), contexts=(512, 4096), batches=(1,), prefills=(512,), links=(2**20,)),
    "full": Sizes(
        tokens=(1, 4, 16, 64, 512), contexts=CONTEXTS, batches=(1, 8, 32), prefills=CONTEXTS,
        links=collectives.SIZES,
    ),
}  # fmt: skip
MOST_SAMPLED = 64  # rows whose tokens are chosen at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """What can be measured here, and what cannot and why.  `tell` gives what is to be said once all was measured."""

    tasks: tuple[Task, ...]
    lacking: tuple[Lacking, ...]
    operators: tuple[Operators, ...] = ()

    def notes(self) -> tuple[str, ...]:
        """Return what a reader must know of the figures: it is known once they were taken."""
        return tuple(dict.fromkeys(note for each in self.operators for note in each.notes))


def offered(options: Options, *, device: str, common: dict[str, Scalar], cores: Sequence[int]) -> Offered:
    """Return all that is asked for.  cores: those this process might use before it was pinned."""
    every = list(_operators(options, device, common)) if wants_any(options, operators.NAMES) else []
    offers = [offer for offer in _offers(options, every, device, common, cores) if wants(options.only, _name(offer))]
    return Offered(
        tasks=tuple(offer for offer in offers if isinstance(offer, Task)),
        lacking=tuple(offer for offer in offers if not isinstance(offer, Task)),
        operators=tuple(each for each in every if isinstance(each, Operators)),
    )


def wants_any(options: Options, names: Iterable[str]) -> bool:
    """Say whether one of these is asked for."""
    return any(wants(options.only, name) for name in names)


def _name(offer: Task | Lacking) -> str:
    return offer.specs[0].name if isinstance(offer, Task) else offer[0].name


def _offers(options: Options, every: Sequence[Operators | Lacking], device: str, common: dict[str, Scalar], cores: Sequence[int]) -> Offers:
    suite, threads = SUITES[options.suite], options.threads
    yield from machine.memory(device, common, threads)
    if wants(options.only, "gemm"):
        yield from machine.products(device, common, suite.gemm, threads)
    if device == "cpu":
        yield from machine.handoff(common, threads)
    yield from machine.paths(device, common)
    yield from _links(options, device, common, cores)
    for each in every:
        yield from _of(each, options) if isinstance(each, Operators) else (each,)
    yield _tokenize(options, common)


# ---------------------------------------------------------------- operators


def _operators(options: Options, device: str, common: dict[str, Scalar]) -> Iterator[Operators | Lacking]:
    """Yield the operators of each precision, or their names as lacking."""
    d = decoder_of(options.model)
    for precision in options.precisions:
        about = common | {"model": options.model, "precision": precision}
        if isinstance(d, str):
            yield from (
                (Spec(name=name, unit="s", better="lower", parameters=about), d) for name in operators.NAMES if name != "op.tokenize"
            )
            continue
        kind = kv.kind_of(options.kv, precision)
        who = alone.computes(
            d, precision=precision, kv=kind, device=torch.device(device), asked=options.backend, threads=options.threads,
            deterministic=options.deterministic,
        )  # fmt: skip
        yield Operators(
            d, who, precision=precision, kv=kind, common=about, device=device, threads=options.threads, block_tokens=options.block_tokens
        )


def decoder_of(model: str) -> Decoder | str:
    """Return a model as it is computed, or why its operators are not: also of shapes that the engine has no weights for."""
    folder = models.folder(model)
    try:
        return _of_shape(models.find(model)) if folder is None else spec.of_config(folder)
    except BadInput as error:
        return str(error)


def _of_shape(a: Architecture) -> Decoder | str:
    odd = {
        "latent attention": a.is_mla, "layers of linear attention": bool(a.linear_layers), "gated attention": a.gated_attention,
        "an MLP without a gate": a.mlp_matrices != 3,
    }  # fmt: skip
    what = next((what for what, has in odd.items() if has), None)
    return f"{a.id} has {what}, which the engine does not compute" if what else Decoder(shape=a, rope=Rope(dim=a.head_dim))


def _of(each: Operators, options: Options) -> Offers:
    sizes, pairs = SIZES[options.suite], SUITES[options.suite].anatomy
    tokens = tuple(sorted({*sizes.tokens, *(batch for batch, _ in pairs)}))
    yield from each.linears(tokens)
    for context, batch in sorted({*itertools.product(sizes.contexts, sizes.batches), *((context, batch) for batch, context in pairs)}):
        yield _if_it_fits(each, each.decode(context, batch), each.attention_bytes(context, batch))
    for context in sizes.prefills:
        yield _if_it_fits(each, each.prefill(context), each.attention_bytes(context, 1))
    for m in tokens:
        yield from (each.norm(m), each.rope_append(m), each.swiglu(m), each.embedding(m))
    for m in (m for m in tokens if m <= MOST_SAMPLED):
        yield from (each.sample(m, policy) for policy in operators.POLICIES)


def _if_it_fits(each: Operators, task: Task, wanted: float) -> Task | Lacking:
    spared = MEMORY_SHARE * free_bytes(each.device)
    if wanted <= spared:
        return task
    return task.specs[0], f"its keys and values take {wanted / 2**30:.1f} GiB; {spared / 2**30:.1f} GiB of memory are spared for them"


def _tokenize(options: Options, common: dict[str, Scalar]) -> Task | Lacking:
    shape = models.find(options.model)
    tokenizer = open_tokenizer(schemes.checkpoint_of(options.model), shape.vocab)
    about = common | {"model": options.model}
    if isinstance(tokenizer, TokenIds):
        return Spec(name="op.tokenize", unit="B/s", better="higher", parameters=about), "the checkpoint has no tokenizer.json"
    return operators.tokenize(tokenizer, about)


# ---------------------------------------------------------------- links


def _links(options: Options, device: str, common: dict[str, Scalar], cores: Sequence[int]) -> Offers:
    """Yield the collectives between all GPUs, or between two processes of a CPU as the small case of the same."""
    ranks = torch.cuda.device_count() if device != "cpu" else min(2, len(cores))
    why = collectives.lonely(ranks, device)
    if why is not None:
        yield from ((Spec(name=f"collective.{op}", unit="B/s", better="higher", parameters=common), why) for op in collectives.OPS)
        return
    hidden, sizes = models.find(options.model).hidden, SIZES[options.suite]
    sent = (*(4 * hidden * batch for batch in sizes.batches), *sizes.links)
    between = collectives.Ranks(ranks, "gloo" if device == "cpu" else "nccl", cores)
    yield from collectives.tasks(between, sent, {name: value for name, value in common.items() if name == "device"})
