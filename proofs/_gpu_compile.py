"""Every kernel of the GPU engine, compiled for a GPU that need not be there, from the very arguments it is launched with.

Triton's own compiler and ptxas make the machine code of sm_90 on any machine; what comes out says whether registers spilled, how wide the
loads of weights are, and which tensor-core instructions are in use.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
    torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")
CAPABILITY = 90  # of an H100 and H200
OF_INTEREST = ("LDG", "LDGSTS", "HMMA", "HGMMA", "QGMMA", "LDL", "STL", "LDSM", "STS", "BAR", "FFMA", "LOP3", "I2F")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What a kernel became."""

    name: str
    settings: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: dict[str, int]
    widest_load_bits: int

    def __str__(self) -> str:
        counts = " ".join(f"{name} {n}" for name, n in self.instructions.items())
        return (
            f"{self.name:14} {self.settings:70} {self.registers:3} registers, {self.spilled_bytes} bytes spilled, "
            f"{self.shared_bytes / 1024:.0f} KiB shared, loads to {self.widest_load_bits} bit; {counts}"
        )


class Recorder:
    """Stands for a kernel: a launch compiles it instead, once for each kind of arguments."""

    def __init__(self, kernel: Any, found: dict[str, Compiled]) -> None:
        """Keep the kernel, and where to put what is found."""
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *places: Any, **named: Any) -> None:
        """Compile for these arguments as Triton's launcher would specialise them."""
        given = {**dict(zip(self.kernel.arg_names, places, strict=False)), **named}
        options = {name: given.pop(name) for name in OPTIONS if name in given}
        fixed = {p.name for p in self.kernel.params if p.is_constexpr}
        constants = {name: v for name, v in given.items() if name in fixed or v is None or v is True or v is False or _is_one(v)}
        signature = {name: "constexpr" if name in constants else _type(given[name]) for name in self.kernel.arg_names}
        key = f"{self.kernel.fn.__name__} {signature} {constants} {options}"
        if key not in self.found:
            attributes = {
                (i,): [["tt.divisibility", 16]]
                for i, name in enumerate(self.kernel.arg_names)
                if name not in constants
                and (isinstance(given[name], torch.Tensor) or (isinstance(given[name], int) and given[name] % 16 == 0))
            }
            self.found[key] = compiled(self.kernel, signature, constants, attributes, options)
            print(self.found[key], flush=True)


def compiled(kernel: Any, signature: dict[str, str], constants: dict[str, Any], attributes: Any, options: dict[str, int]) -> Compiled:
    """Compile and read the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([binaries / "cuobjdump", what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("--dump-resource-usage", "--dump-sass")
        )
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P[0-9T]+ )?([A-Z0-9_.]+)", code, re.MULTILINE))
    families = Counter[str]()
    for opcode, n in opcodes.items():
        families[opcode.split(".")[0]] += n
    loads = [opcode for opcode in opcodes if opcode.startswith(("LDG", "LDGSTS"))]
    widest = max((next((int(part) for part in load.split(".") if part in ("64", "128", "256")), 32) for load in loads), default=0)
    shown = {name: v for name, v in constants.items() if v is not None and name.isupper()}
    return Compiled(
        name=kernel.fn.__name__, settings=" ".join(f"{k}={v}" for k, v in {**shown, **options}.items()),
        registers=_number(r"REG:(\d+)", usage), spilled_bytes=families["LDL"] and _number(r"STACK:(\d+)", usage),
        shared_bytes=made.metadata.shared, widest_load_bits=widest,
        instructions={name: families[name] for name in OF_INTEREST if families[name]},
    )  # fmt: skip


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


def _number(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0


def all_kernels() -> list[Compiled]:
    """Compile every kernel in the tiles that an 8 B model's steps use.  Only kinds of arguments matter, so the matrices here are small."""
    from mlsys_bench.engine import formats
    from mlsys_bench.engine.gpu import kernels_attention, kernels_linear, kernels_small, linears, small, ways

    found: dict[str, Compiled] = {}
    for module in (kernels_linear, kernels_small, kernels_attention):
        for name in TOP_LEVEL:
            if hasattr(module, name):
                setattr(module, name, Recorder(getattr(module, name), found))
    small.runs_triton = lambda x: True
    cpu, k = torch.device("cpu"), 256
    for precision in ("bf16", "int8", "int4g64", "fp8"):
        kept = formats.quantise(torch.randn(256, k), precision)
        make = linears.Words if isinstance(kept, formats.Rows8 | formats.Groups4) else linears.Rows
        held = make(kept, cpu, torch.bfloat16)  # type: ignore[arg-type]
        few = ways.FEW[held.form]
        for rows in (1, few, 16, 64):
            _uses(held, rows, ways.default(held.form, rows, 28672, 4096), linears.Norm(eps=1e-5))
        if isinstance(held, linears.Words):
            held.widened(torch.bfloat16)
    _attention(torch.bfloat16)
    _attention(torch.int8)
    _attention(torch.float8_e4m3fn)
    small.swiglu(torch.zeros(16, 512, dtype=torch.bfloat16), torch.bfloat16)
    _choice()
    return list(found.values())


TOP_LEVEL = (
    "gemv_words", "gemv_rows", "gemm_words", "gemm_rows", "widen_words", "embed", "rms_norm", "swiglu", "rope_write", "best_of_part",
    "best_of_row", "paged_decode", "paged_prefill",
)  # fmt: skip


def _uses(held: Any, rows: int, way: Any, norm: Any) -> None:
    """Launch what a layer does with a matrix: q, k, v after a norm; SwiGLU; onto the residual stream."""
    x = torch.zeros(rows, 256)
    held.run(x, norm=norm, dtype=torch.bfloat16, way=way)
    held.run(x, norm=norm, gated=True, dtype=torch.bfloat16, way=way)
    held.run(x.bfloat16(), onto=torch.zeros(rows, 256), way=dataclasses.replace(way, splits=4) if way.kind == "gemm" else way)


def _attention(kind: torch.dtype) -> None:
    from mlsys_bench import models
    from mlsys_bench.engine.gpu import attention
    from mlsys_bench.engine.gpu.kv import GpuKV

    cpu, a = torch.device("cpu"), attention.Heads(heads=32, kv_heads=8, head_dim=128, norm_eps=1e-5)
    cache = GpuKV(dataclasses.replace(models.find("llama-3-8b"), layers=1), blocks=2, block_tokens=16, dtype=kind, device=cpu)
    qkv, out, ints = torch.zeros(16, a.width).bfloat16(), torch.zeros(16, 4096).bfloat16(), torch.zeros(16, dtype=torch.int32)
    table = torch.zeros(16, 512, dtype=torch.int32)
    attention.rope_write(a, qkv, torch.zeros(8, 64), torch.zeros(8, 64), ints, ints, cache, 0)
    for splits in (1, 4):
        attention.decode(a, qkv, table, ints, cache, 0, out, splits=splits)
    attention.prefill(a, qkv, table, torch.zeros(16, 4, dtype=torch.int32), cache, 0, out)


def _choice() -> None:
    from mlsys_bench.engine.gpu import small

    ints = torch.zeros(16, dtype=torch.int32)
    small.choose(torch.zeros(16, 128256), torch.zeros(16), ints.long(), ints, ints, allowed=torch.ones(128256, dtype=torch.uint8))
    small.embed(ints, ints, ints, torch.zeros(16, 4096).bfloat16())
