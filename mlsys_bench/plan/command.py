"""Engine command lines: the exact one of a plan, what one that runs today says, and the difference of two in words.

vLLM reads `_` in a flag as `-`, and counts such as 32k; so does this.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from mlsys_bench import hardware, models, workload
from mlsys_bench.batching import presets
from mlsys_bench.errors import BadInput, UnknownName, did_you_mean, unknown
from mlsys_bench.plan.flags import ENGINES, FLAGS, IMAGES, MODEL_FLAGS, PRESETS, STARTS, Engine, Flag
from mlsys_bench.types import Plan, Scalar


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """How an engine is started.  None: not said, so the engine's default.  `unknown` are flags nobody here knows, as typed."""

    engine: Engine
    model: str
    tp: int | None = None
    pp: int | None = None
    dp: int | None = None  # copies of the attention weights, each with requests of its own
    ep: int | None = None  # devices that experts are shared out over; vLLM only says whether
    quantization: str | None = None
    dtype: str | None = None
    kv_dtype: str | None = None
    max_seqs: int | None = None
    max_step_tokens: int | None = None
    max_context: int | None = None
    memory_share: float | None = None
    block_tokens: int | None = None
    scheduling: str | None = None  # fcfs or priority
    prefix_cache: bool | None = None
    chunked: bool | None = None
    port: int | None = None
    replicas: int | None = None
    gpus: int | None = None  # of one replica, as a manifest says
    gpu: str | None = None
    image: str | None = None
    other: dict[str, Scalar] = dataclasses.field(default_factory=dict)  # known flags that change no plan
    unknown: tuple[str, ...] = ()

    @property
    def devices(self) -> int:
        """Devices of one replica."""
        if self.engine == "vllm":
            return (self.tp or 1) * (self.pp or 1) * (self.dp or 1)
        return (self.tp or 1) * (self.pp or 1)

    @property
    def precision(self) -> str:
        """Precision of the weights: of the quantization, the dtype, or as the model is published."""
        method = (self.quantization or "").lower()
        if not method and self.dtype in _DTYPES:
            return _DTYPES[self.dtype]
        try:
            own = models.find(self.model).native_precision
        except UnknownName:
            own = "bf16"
        if method.startswith(_AS_STORED) and own in models.QUANTIZED:
            return own
        return _PRECISIONS.get(method, method) or own


_PRECISIONS = {
    "awq": "int4", "awq_marlin": "int4", "gptq": "int4", "gptq_marlin": "int4", "marlin": "int4", "bitsandbytes": "int4",
    "w8a8_int8": "int8", "experts_int8": "int8", "w8a8_fp8": "fp8", "fbgemm_fp8": "fp8", "ptpc_fp8": "fp8", "modelopt": "fp8",
    "modelopt_fp4": "fp4", "mxfp4": "fp4",
}  # fmt: skip
_AS_STORED = ("compressed-tensors", "awq", "gptq", "quark", "auto-round", "modelopt")  # methods that leave the format to the checkpoint
_DTYPES = {"bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}
_LEFT_OPEN = ("max_step_tokens", "max_context")
OPEN = -1  # which leaves those to the engine, and is kept among `other`
_FLOATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


# ---------------------------------------------------------------- of a plan


def of_plan(plan: Plan, engine: Engine = "vllm", *, kv_dtype: str | None = None, memory_share: float | None = None) -> Deployment:
    """Return how one replica of a plan is started with an engine.

    The context is cut to what the KV cache of a replica holds where that is less than the model's: no engine starts otherwise.  Ranks of
    data-parallel attention have a cache each, and all engines but SGLang count their sequences by rank (vLLM's Data Parallel Deployment:
    `--max-num-seqs` applies per DP rank; SGLang divides `--max-running-requests`).
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    item, arch = plan.fleet[0], models.find(plan.model)
    dp, ep = item.attention_dp, item.ep
    most = plan.kv_tokens_per_replica // dp
    return Deployment(
        engine=engine,
        model=arch.hf_id or arch.id,
        tp=item.tp * (1 if engine == "vllm" else dp),
        pp=item.pp if item.pp > 1 else None,
        dp=dp if dp > 1 else None,
        ep=ep if ep > 1 else None,
        quantization="fp8" if _is_made_fp8(item.precision, engine, arch) else None,
        dtype=_FLOATS.get(item.precision) if engine != "trtllm" else None,
        kv_dtype=kv_dtype if engine != "trtllm" else None,
        max_seqs=plan.max_batch if engine == "sglang" else math.ceil(plan.max_batch / dp),
        max_step_tokens=plan.max_step_tokens,
        max_context=most if arch.max_context is None or most < arch.max_context else None,
        scheduling="priority" if engine == "vllm" and _order(plan) else None,
        memory_share=memory_share or presets.preset(PRESETS[engine], device=item.gpu).memory_share,
        replicas=plan.replicas,
        gpus=plan.devices_per_replica,
        gpu=item.gpu,
        image=IMAGES[engine],
    )


def _is_made_fp8(precision: str, engine: Engine, arch: models.Architecture) -> bool:
    """Say whether an engine makes the plan's fp8 weights of a checkpoint in 16 bit: of one in another format vLLM and SGLang refuse to."""
    return precision == "fp8" and engine != "trtllm" and arch.native_precision not in models.QUANTIZED


def _is_kept(precision: str, arch: models.Architecture) -> bool:
    """Say whether the published checkpoint has the plan's weights: in the same formats, or 16 bit for 16 bit."""
    own, quantized = arch.native_precision, {*models.QUANTIZED, "nvfp4", "mxfp4"}
    return precision == own or not {precision, own} & quantized or models.formats(arch, precision) == models.formats(arch, own)


def _overfull(plan: Plan, arch: models.Architecture) -> str:
    """Return the devices of a replica where weights as published do not fit them, nothing where they do or nobody knows.

    vLLM, docs/features/quantization/fp8.md: "we load the model at original precision before quantizing".
    """
    try:
        device = hardware.find(plan.fleet[0].gpu)
    except UnknownName:
        return ""
    is_full = models.weight_bytes(arch, arch.native_precision) > device.driver_bytes * plan.devices_per_replica
    return f"{plan.devices_per_replica} x {device.memory_bytes / 1e9:.0f} GB" if is_full else ""


def _order(plan: Plan) -> tuple[tuple[str, ...], ...]:
    """Return the tenants by priority, nothing where all are served as they come."""
    return plan.tenancy.precedence.classes if plan.tenancy and plan.tenancy.precedence else ()


def notes(plan: Plan, deployment: Deployment) -> Iterator[str]:
    """Yield what a command line cannot say, or what its reader must do first."""
    precision, arch = plan.fleet[0].precision, models.find(plan.model)
    if not (_is_kept(precision, arch) or _is_made_fp8(precision, deployment.engine, arch)):
        kept = f"{deployment.model} is kept in {arch.native_precision}"
        yield f"the plan is for {precision} weights, {kept}: name a checkpoint of it in {precision}"
    elif deployment.quantization and (devices := _overfull(plan, arch)):
        before = f"{deployment.model} is loaded in 16 bit before its weights are made fp8"
        yield f"{before}, and {devices} do not hold it: name a checkpoint of it in fp8"
    if alike := [name for name in models.aliases(arch) if "/" in name and name != arch.hf_id]:
        yield f"{arch.hf_id} stands for models of its shape, such as {', '.join(alike[:3])}: name the one you serve"
    if deployment.engine == "trtllm" and (plan.fleet[0].attention_dp > 1 or precision == "fp8"):
        yield "TensorRT-LLM takes attention data parallelism and the cache's precision from a file: see --extra_llm_api_options"
    if deployment.engine == "sglang" and deployment.memory_share is not None:
        yield "SGLang's share of memory holds weights and cache, activations come on top: the KV cache may differ from the plan's"
    if "--kv-transfer-config" in deployment.other or "--disaggregation-mode" in deployment.other:
        yield f"{plan.fleet[0].stage} only: a router in front sends each prompt to a prefill replica first, and then to one that decodes"
    if order := _order(plan):
        sent = ", ".join(f"priority {i} of {' and '.join(names)}" for i, names in enumerate(order))
        asks = "" if deployment.engine == "vllm" else f"; {deployment.engine} schedules by priority in a way of its own, if at all"
        yield f"each request says how urgent it is, a lower number goes first: {sent}{asks}"
    if len(plan.fleet) > 1:
        yield f"the plan has {len(plan.fleet)} kinds of replicas; this is the first"


def arguments(deployment: Deployment) -> list[str]:
    """Return the words of the command line, flags in the order of the table; what is not said is left out."""
    words = [*STARTS[deployment.engine]]
    words += ["--model-path", deployment.model] if deployment.engine == "sglang" else [deployment.model]
    for flag in FLAGS[deployment.engine]:
        set_ = getattr(deployment, flag.field) if flag.field else None
        value = deployment.other.get(flag.names[0]) if set_ is None else set_
        words += _words(flag, value)
    if deployment.engine == "sglang" and (deployment.dp or 1) > 1 and "--enable-dp-attention" not in words:
        words.append("--enable-dp-attention")
    return [*words, *deployment.unknown]


def command(deployment: Deployment) -> str:
    """Return the command line, quoted for a shell."""
    return shlex.join(arguments(deployment))


def _words(flag: Flag, value: Scalar) -> list[str]:
    if value is None:
        return []
    if flag.kind in ("on", "off"):
        said = value is False if flag.kind == "off" else value > 1 if flag.field == "ep" else bool(value)  # type: ignore[operator]
        return [flag.names[0]] if said else []
    return [flag.names[0], f"{value:g}" if isinstance(value, float) else str(value)]


# ---------------------------------------------------------------- of a command line


def parse(text: str) -> Deployment:
    """Return what a command line says.  Raises BadInput for one of no known engine; flags nobody knows are kept in `unknown`."""
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise BadInput(f"the command line {text[:60]!r} cannot be read: {error}; close its quotes") from None
    engine, rest = start_of(words)
    if engine is None:
        raise BadInput(f"{text[:60]!r} starts no engine known here: write 'vllm serve MODEL …', 'sglang serve …' or 'trtllm-serve MODEL …'")
    return from_words(engine, rest)


def start_of(words: Sequence[str]) -> tuple[Engine | None, list[str]]:
    """Return which engine a command line starts, and the words after its start; variables set before it are passed over."""
    rest = list(words)
    while rest and re.fullmatch(r"[A-Za-z_]\w*=.*", rest[0]):
        rest = rest[1:]
    rest = rest[1:] if rest and rest[0] == "exec" else rest
    text = " ".join(rest[:3])
    for engine, form in (
        ("vllm", r"(\S*/)?vllm serve"),
        ("vllm", r"(\S*/)?python3? -m vllm\.entrypoints\.openai\.api_server"),
        ("sglang", r"(\S*/)?python3? -m sglang\.launch_server"),
        ("sglang", r"(\S*/)?sglang serve"),
        ("trtllm", r"(\S*/)?trtllm-serve( serve)?"),
    ):
        if found := re.match(form + r"(?= |$)", text):
            return engine, rest[len(found[0].split()) :]  # type: ignore[return-value]
    return None, rest


def from_words(engine: Engine, words: Sequence[str]) -> Deployment:
    """Return what the words after an engine's start say."""
    rest, fields, other, left = list(words), dict[str, object](), dict[str, Scalar](), list[str]()
    model = ""
    while rest:
        word = rest.pop(0)
        name, equals, given = word.partition("=")
        name = name.replace("_", "-") if engine == "vllm" and name.startswith("--") else name
        if not word.startswith("-"):
            model, left = (model or word), left if not model else [*left, word]
        elif name in MODEL_FLAGS[engine]:
            model = given if equals else _value(rest, word)
        elif flag := next((f for f in FLAGS[engine] if name in f.names), None):
            value = _read(flag, given if equals else _value(rest, word) if flag.kind not in ("on", "off") else None, word)
            if flag.field:
                fields[flag.field] = None if value == OPEN else value
            if not flag.field or value == OPEN:
                other[flag.names[0]] = value
        else:
            left += [word, *_values(rest)]
    if not model:
        raise BadInput(f"the command line of {engine} names no model")
    if engine == "vllm" and fields.get("ep"):
        fields["ep"] = int(fields.get("tp") or 1) * int(fields.get("dp") or 1)  # type: ignore[call-overload]
    return Deployment(engine=engine, model=model, other=other, unknown=tuple(left), **fields)  # type: ignore[arg-type]


def _value(rest: list[str], word: str) -> str:
    if not rest:
        raise BadInput(f"{word} stands at the end of the command line without its value")
    return rest.pop(0)


def _values(rest: list[str]) -> list[str]:
    """Take the words up to the next flag: what an unknown flag may have been given."""
    taken = []
    while rest and not rest[0].startswith("-"):
        taken.append(rest.pop(0))
    return taken


def _read(flag: Flag, text: str | None, word: str) -> Scalar:
    if flag.kind in ("on", "off") or text is None:
        return flag.kind == "on"
    if flag.kind == "text":
        return text
    scales = {"": 1, "k": 10**3, "m": 10**6, "K": 1 << 10, "M": 1 << 20}
    found = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmKM]?)", text)
    if found is None:
        raise BadInput(f"{word} {text}: it takes a number")
    number = Fraction(found[1]) * scales[found[2]]
    if flag.field in _LEFT_OPEN and number == OPEN:
        return OPEN
    if flag.field == "memory_share" and not 0 < number <= 1:
        raise BadInput(f"{word} {text}: it takes a share of the memory, above 0 up to 1")
    if flag.kind == "number":
        return float(number)
    if number.denominator != 1 or (flag.field and number < 1):
        raise BadInput(f"{word} {text}: it takes a whole number{' from 1 up' if flag.field else ''}")
    return int(number)


def warnings(deployment: Deployment) -> Iterator[str]:
    """Yield what was not understood: each unknown flag, with the nearest known one."""
    known = [name for flag in FLAGS[deployment.engine] for name in flag.names]
    for word in deployment.unknown:
        if word.startswith("-"):
            yield f"{word} is not known here and left out of the comparison{did_you_mean(word.partition('=')[0], known)}"


# ---------------------------------------------------------------- the difference of two

_TOLD = {
    "engine": "engine", "model": "model", "replicas": "replicas", "gpu": "GPU", "tp": "tensor parallel", "pp": "pipeline parallel",
    "dp": "data parallel", "ep": "experts over devices", "precision": "weights", "kv_dtype": "KV cache", "max_seqs": "sequences at once",
    "max_step_tokens": "tokens a step", "max_context": "longest context", "memory_share": "share of memory", "block_tokens": "KV block",
    "scheduling": "who goes first",
    "prefix_cache": "prefix cache", "chunked": "chunked prefill",
}  # fmt: skip


def difference(old: Deployment, new: Deployment) -> list[str]:
    """Return what changes from one deployment to another, a line each: 'sequences at once: 256 -> 128 (--max-num-seqs)'.

    What is not said counts as the engine's default on that device, so that a default made explicit is no change.
    """
    before, after = effective(old), effective(new)
    return [
        f"{told}: {_show(before[field])} -> {_show(after[field])}{_by(new.engine, field)}"
        for field, told in _TOLD.items()
        if before[field] != after[field] and None not in (before[field], after[field])
    ]


def effective(deployment: Deployment) -> dict[str, Scalar]:
    """Return the settings in force, those of the engine's preset where nothing is said; None where nobody knows."""
    preset = _preset(deployment)
    model = _known(deployment.model)
    return {
        **{field: getattr(deployment, field) for field in _TOLD},
        "model": model,
        "gpu": _known_gpu(deployment.gpu),
        "tp": deployment.tp or 1,
        "pp": deployment.pp or 1,
        "dp": deployment.dp or 1,
        "ep": deployment.ep or 1,
        "kv_dtype": deployment.kv_dtype or "auto",
        "max_context": deployment.max_context or _context(model),
        "max_seqs": deployment.max_seqs or preset.max_seqs,
        "max_step_tokens": deployment.max_step_tokens or preset.max_step_tokens,
        "memory_share": deployment.memory_share or preset.memory_share,
        "block_tokens": deployment.block_tokens or preset.block_tokens,
        "scheduling": deployment.scheduling or "fcfs",
        "prefix_cache": bool(preset.policy.prefix_cache) if deployment.prefix_cache is None else deployment.prefix_cache,
        "chunked": bool(preset.policy.chunked) if deployment.chunked is None else deployment.chunked,
    }


def refused(plan: Plan, deployment: Deployment) -> Iterator[str]:
    """Yield that a deployment refuses the average request of a plan, where its longest context is shorter."""
    longest = effective(deployment)["max_context"]
    tokens = sum(workload.mean_tokens(lengths) for lengths in (plan.workload.prompt_tokens, plan.workload.output_tokens))
    if isinstance(longest, int) and tokens > longest:
        yield f"today's longest context of {longest:,} tokens refuses the average request of this traffic, of {tokens:,.0f} tokens"


def _context(model: str) -> int | None:
    """Return the longest context of a model, which engines take unless told; None where it is not known."""
    try:
        return models.find(model).max_context
    except BadInput:
        return None


def _preset(deployment: Deployment) -> presets.Preset:
    gpu = _known_gpu(deployment.gpu)
    memory_bytes = hardware.find(gpu).memory_bytes if gpu and gpu in [d.id for d in hardware.every()] else 80e9
    return presets.preset(PRESETS[deployment.engine], device=gpu or "H100", memory_bytes=memory_bytes)


def _known(model: str) -> str:
    try:
        return models.find(model).id
    except BadInput:
        return model


def _known_gpu(gpu: str | None) -> str | None:
    try:
        return None if gpu is None else hardware.find(gpu).id
    except UnknownName:
        return gpu


def _show(value: Scalar) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _by(engine: Engine, field: str) -> str:
    names = [flag.names[0] for flag in FLAGS[engine] if flag.field == field]
    return f" ({names[0]})" if names else ""
