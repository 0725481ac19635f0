"""The Open Inference Protocol (KServe v2, Triton, MLServer, OpenVINO): tensors over HTTP; and Triton's generate extension.

Sources: Triton's docs/protocol: the KServe community standard "required API", extension_binary_data.md, extension_generate.md.
"""

from __future__ import annotations

import math
import random
import struct
import zlib
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec

from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest import answers, tokens
from mlsys_bench.loadtest.answers import Answer, Emitted, Usage
from mlsys_bench.loadtest.endpoints import Ask, Spec, texts
from mlsys_bench.loadtest.endpoints.reading import decoded, refuse_errors
from mlsys_bench.loadtest.wire import Response, WireError

_encode = msgspec.json.Encoder().encode
_POOL_BYTES = 8 * 2**20  # of made-up tensors, written once before the start
_POOL = 64  # different ones at most, so that a cache of answers has something to miss
_INTEGERS = {"INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q"}
_FLOATS = {"FP16": "e", "FP32": "f", "FP64": "d"}
_CODES = {**_INTEGERS, **_FLOATS, "BOOL": "?"}  # of the module struct
DATATYPES = ("BOOL", *_INTEGERS, *_FLOATS, "BYTES")
_INTEGER_LIMIT = 100  # small enough for any vocabulary and for 8 bits


class Tensor(msgspec.Struct, frozen=True):
    """One input, with every dimension known."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers or texts it holds."""
        return math.prod(self.shape)


def parse_tensor(text: str, batch: int) -> Tensor:
    """Return NAME:DATATYPE:SHAPE, e.g. image:FP32:-1x3x224x224; the first -1 is the batch.  Raises BadInput."""
    name, _, rest = text.partition(":")
    datatype, _, shape = rest.partition(":")
    try:
        dimensions = [int(n) for n in shape.split("x")] if shape else [-1]
    except ValueError:
        raise BadInput(f"--input {text}: the shape is written like 1x3x224x224") from None
    if not name or datatype.upper() not in DATATYPES:
        raise BadInput(f"--input {text}: is written NAME:DATATYPE:SHAPE, with a datatype of {', '.join(DATATYPES)}")
    return sized(name, datatype.upper(), dimensions, batch)


def sized(name: str, datatype: str, dimensions: Sequence[int], batch: int) -> Tensor:
    """Return a tensor whose first dimension, if open, is the batch.  Raises BadInput for another open one: nobody can guess it."""
    shape = [batch if n == -1 and i == 0 else n for i, n in enumerate(dimensions)]
    if any(n < 1 for n in shape):
        listed = "x".join(map(str, dimensions))
        raise BadInput(f"input {name} ({datatype}, {listed}) has an open dimension: say how large with --input {name}:{datatype}:{listed}")
    return Tensor(name, datatype, tuple(shape))


def tensors(spec: Spec) -> list[Tensor]:
    """Return the inputs of a request: as a person wrote them, else as the server describes its model."""
    if spec.form.inputs:
        return [parse_tensor(text, spec.form.batch) for text in spec.form.inputs]
    found = msgspec.convert(spec.settings.get("inputs", []), list[Tensor])
    if not found:
        raise BadInput("what tensors the model takes is not known: say so with --input NAME:DATATYPE:SHAPE")
    return found


class Infer:
    """POST /v2/models/NAME/infer with typed tensors, as JSON or after a JSON head as binary data."""

    def __init__(self, spec: Spec) -> None:
        self._inputs = tensors(spec)
        self._binary = spec.form.binary
        self._has_texts = any(tensor.datatype == "BYTES" for tensor in self._inputs)
        self._pool = [] if self._has_texts else self._made(spec)

    def body(self, ask: Ask) -> bytes:
        """Return the body of a request: made-up numbers, or the words that were asked where an input takes text."""
        if self._pool:
            return self._pool[zlib.crc32(ask.text.encode()) % len(self._pool)]
        return self._written(random.Random(zlib.crc32(ask.text.encode())), ask)

    def read(self, response: Response) -> Answer:
        """Return the moment of the tensors.  Their numbers are not parsed."""
        body = response.body()
        head = response.headers.get("inference-header-content-length", "")
        said = decoded(body[: int(head)] if head.isdecimal() else body, _Inferred, "inference")
        if said.outputs is None:
            raise WireError(f"an answer without outputs is no inference: {body[:60]!r}")
        return answers.whole(response.pieces, usage=Usage())

    def _made(self, spec: Spec) -> list[bytes]:
        rng = random.Random(zlib.crc32(spec.model.encode()))
        nothing = Ask(text="", output_tokens=0)
        made = [self._written(rng, nothing)]
        room = _POOL_BYTES // len(made[0])
        return made + [self._written(rng, nothing) for _ in range(min(_POOL, room) - 1)]

    def _written(self, rng: random.Random, ask: Ask) -> bytes:
        return (_as_binary if self._binary else _as_json)(self._inputs, rng, ask)


def binary_head_bytes(spec: Spec) -> int:
    """Return the length of the JSON head before binary tensors: Triton wants it in a header, so it must be the same in every request."""
    inputs = tensors(spec)
    if any(tensor.datatype == "BYTES" for tensor in inputs):
        raise BadInput("--binary: texts have no fixed length; leave it out for inputs of BYTES")
    return len(_encode(_binary_head(inputs)))


class _Inferred(msgspec.Struct, gc=False):
    outputs: list[msgspec.Raw] | None = None


def _as_json(inputs: Sequence[Tensor], rng: random.Random, ask: Ask) -> bytes:
    written = [{"name": t.name, "shape": t.shape, "datatype": t.datatype, "data": _values(t, rng, ask)} for t in inputs]
    return _encode({"inputs": written})


def _as_binary(inputs: Sequence[Tensor], rng: random.Random, ask: Ask) -> bytes:
    return b"".join([_encode(_binary_head(inputs)), *(_packed(tensor, rng, ask) for tensor in inputs)])


def _binary_head(inputs: Sequence[Tensor]) -> dict[str, Any]:
    sizes = [{"binary_data_size": t.size * _item_bytes(t)} for t in inputs]
    described = [{"name": t.name, "shape": t.shape, "datatype": t.datatype, "parameters": p} for t, p in zip(inputs, sizes, strict=True)]
    return {"inputs": described, "parameters": {"binary_data_output": True}}


def _item_bytes(tensor: Tensor) -> int:
    return struct.calcsize("=" + _CODES[tensor.datatype])


def _packed(tensor: Tensor, rng: random.Random, ask: Ask) -> bytes:
    return struct.pack(f"<{tensor.size}{_CODES[tensor.datatype]}", *_values(tensor, rng, ask))


def _values(tensor: Tensor, rng: random.Random, ask: Ask) -> list[Any]:
    if tensor.datatype == "BYTES":
        return texts(ask, tensor.size)
    drawn = array("H", rng.randbytes(2 * tensor.size))
    if tensor.datatype in _FLOATS:
        return [n % 1000 / 1000 for n in drawn]
    return [n % 2 == 1 for n in drawn] if tensor.datatype == "BOOL" else [n % _INTEGER_LIMIT for n in drawn]


def nested(tensor: Tensor, ask: Ask) -> Any:
    """Return made-up values in lists of lists, as JSON has them where the shape is not said beside."""
    values: list[Any] = _values(tensor, random.Random(zlib.crc32(ask.text.encode())), ask)
    for size in tensor.shape[:0:-1]:
        values = [values[i : i + size] for i in range(0, len(values), size)]
    return values


# ---------------------------------------------------------------- Triton's generate extension


class Generate:
    """POST /v2/models/NAME/generate: text in, text out, whole."""

    def __init__(self, spec: Spec) -> None:
        self._ignore_eos = spec.ignore_eos
        self._count = tokens.counter(spec.form.tokenizer) if spec.form.tokenizer else None
        self._fixed: dict[str, Any] = {"stream": spec.streams, "temperature": 0, **({"ignore_eos": True} if spec.ignore_eos else {})}

    def body(self, ask: Ask) -> bytes:
        """Return the body of a request.  `max_tokens` stands twice: TensorRT-LLM's models read it as a tensor, vLLM's as a parameter."""
        return _encode({
            "text_input": ask.text, "max_tokens": ask.output_tokens, "parameters": {**self._fixed, "max_tokens": ask.output_tokens},
        })  # fmt: skip

    def read(self, response: Response) -> Answer:
        """Return the moment of the text."""
        said = _generated(decoded(response.body(), dict, "generated text"))
        if said is None:
            raise WireError("an answer without text_output is no generated text")
        return answers.whole(response.pieces, usage=Usage(), text=said, count=self._count)


class GenerateStream(Generate):
    """POST /v2/models/NAME/generate_stream: an event for every response of the model."""

    def read(self, response: Response) -> Answer:
        """Return the tokens of a stream.  Nothing marks its end but the end of the body."""
        emitted: list[Emitted] = []
        for at, _, data in answers.sse(response.pieces):
            said = _generated(decoded(data, dict, "event of a generated text"))
            if said is not None:
                emitted.append((at, bool(said), said, None))
        return answers.assemble(emitted, usage=Usage(), is_whole=bool(emitted), count=self._count)


def _generated(document: Any) -> str | None:
    refuse_errors(document)
    said = document.get("text_output") if isinstance(document, dict) else None
    return "".join(map(str, said)) if isinstance(said, list) else None if said is None else str(said)
