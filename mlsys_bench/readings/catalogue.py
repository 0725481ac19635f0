"""Every benchmark in a line, by group, with its unit and what it cannot do without: `mlsys bench list`, and the order of a reading."""

from __future__ import annotations

from typing import Literal, NamedTuple

Group = Literal["machine", "paths", "links", "operators", "engine", "serving", "quality", "gate", "other"]


class Entry(NamedTuple):
    """One benchmark.  `needs` names what a machine must have for it, nothing where every machine will do."""

    name: str
    group: Group
    unit: str
    line: str
    needs: str = ""


GROUPS: dict[Group, str] = {
    "machine": "What this machine delivers",
    "paths": "Launches, copies, hand-offs",
    "links": "Collectives",
    "operators": "Operators of the model",
    "engine": "Steps of the engine",
    "serving": "Starts, loads, batching",
    "quality": "What number formats cost",
    "gate": "Of `mlsys gate run`, each in a process of its own",
    "other": "Others",
}
CATALOGUE = (
    Entry("memory.read", "machine", "B/s", "reading a buffer much larger than the caches: the ceiling of a decode step"),
    Entry("memory.copy", "machine", "B/s", "copying it, bytes read and written"),
    Entry("memory.triad", "machine", "B/s", "a = b + s c over three such buffers, as STREAM has it"),
    Entry("gemm", "machine", "FLOP/s", "a square matrix product per precision through torch: the ceiling of prefill"),
    Entry("device.launch", "paths", "s", "handing one empty kernel to the device", "a GPU"),
    Entry("device.sync", "paths", "s", "waiting for a device that has nothing to do", "a GPU"),
    Entry("copy.h2d", "paths", "B/s", "host memory to the device, pinned and pageable", "a GPU"),
    Entry("copy.d2h", "paths", "B/s", "device memory to the host, pinned and pageable", "a GPU"),
    Entry("pool.handoff", "paths", "s", "an empty job handed to the engine's threads and back", "a CPU with C kernels"),
    Entry("collective.all_reduce", "links", "B/s", "all-reduce between devices or processes, by size", "two devices or cores"),
    Entry("collective.all_gather", "links", "B/s", "all-gather, likewise", "two devices or cores"),
    Entry("collective.send_recv", "links", "B/s", "point to point, likewise", "two devices or cores"),
    Entry("op.linear", "operators", "s", "each matrix of a layer and the head, on m tokens, through the engine's own kernels"),
    Entry("op.attention.prefill", "operators", "s", "attention of a prompt over itself"),
    Entry("op.attention.decode", "operators", "s", "attention of one token per sequence over a paged cache, context x batch"),
    Entry("op.norm", "operators", "s", "RMS norm, with the residual added as the engine does it"),
    Entry("op.rope_append", "operators", "s", "rotary embedding, and keys and values written into the cache"),
    Entry("op.swiglu", "operators", "s", "SiLU of the gate times the up projection"),
    Entry("op.embedding", "operators", "s", "rows of the embedding table, one per token"),
    Entry("op.sample", "operators", "s", "a token from the logits: argmax, and top-p over the vocabulary"),
    Entry("op.tokenize", "operators", "B/s", "text to tokens"),
    Entry("engine.step", "engine", "s", "one step of the engine: decode over batch x context, prefill over chunk x past, both mixed"),
    Entry("engine.part", "engine", "s", "a decode step by the engine's own clock: products with weights, what lies between, the host"),
    Entry("engine.host", "engine", "s", "a step whose model computes nothing: the scheduler, its arrays, the choice of tokens"),
    Entry("engine.coldstart", "serving", "s", "from the start of the process to the first token, phase by phase"),
    Entry("engine.load", "serving", "B/s", "weights brought into place"),
    Entry("engine.policy", "serving", "token/s", "static, dynamic and continuous batching of the same prompts"),
    Entry("engine.energy", "serving", "J/token", "what a token costs in each of these ways", "a counter of energy"),
    Entry("quality.loss", "quality", "bit/byte", "the trained byte model in every number format: `mlsys bench quality`"),
    Entry("engine.decode", "gate", "s", "a decode step on one thread; operators, KV blocks, bytes and the memory peak beside it"),
    Entry("engine.quality", "gate", "nats", "int8 against fp32: divergence of the next token's distribution, error of the logits"),
    Entry("planner.plan", "gate", "s", "one plan of a fixed workload, and what it costs"),
    Entry("loadtest.sender", "gate", "s", "what one request costs the load generator"),
)
_BY_NAME = {entry.name: (place, entry) for place, entry in enumerate(CATALOGUE)}


def group_of(name: str) -> Group:
    """Return the group of a benchmark, 'other' for a name nobody listed."""
    known = _BY_NAME.get(name)
    return known[1].group if known else "other"


def place_of(name: str) -> int:
    """Return where a benchmark stands in the list, the end for one nobody listed."""
    known = _BY_NAME.get(name)
    return known[0] if known else len(CATALOGUE)
