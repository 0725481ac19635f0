"""llama.cpp as the peer of `proofs/engine.py`: random GGUF models of TinyLlama's shape, and a process that measures one of them.

The process runs in an environment of its own that has `llama-cpp-python` and `gguf`, named by MLSYS_LLAMA_PYTHON (a virtual environment
will do; pip compiles llama.cpp for this machine).  It says hello with what it loaded, then answers each line of standard input:

    decode BATCH STEPS     one token for each of so many sequences, so often: tokens a second
    prefill TOKENS         one prompt in one chunk: tokens a second

and leaves the processor alone in between.  Nothing is sampled and no text is made: what is timed is `llama_decode` and no more.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEEDED = "import gguf, llama_cpp; llama_cpp.llama_init_from_model; print(llama_cpp.__version__)"
FORMATS = {"BF16": None, "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}
LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, VOCAB, CONTEXT = 22, 2048, 5632, 32, 4, 32000, 2048  # tinyllama-1.1b
PROMPT, ROOM = 16, 128  # tokens before the first step, and places of a sequence
LONGEST = 512


# ---------------------------------------------------------------- in our own process


def python() -> str | None:
    """Return the interpreter that was named, None where none was."""
    return os.environ.get("MLSYS_LLAMA_PYTHON")


def version(interpreter: str) -> str:
    """Return the version of llama-cpp-python that an interpreter has.  Raises SystemExit with its last word where it has none."""
    told = subprocess.run([interpreter, "-c", NEEDED], capture_output=True, text=True, check=False)
    if told.returncode:
        last = (told.stderr.strip().splitlines() or ["no word"])[-1]
        raise SystemExit(
            f"{interpreter} cannot run llama.cpp ({last}): pip install llama-cpp-python gguf there, or unset MLSYS_LLAMA_PYTHON"
        )
    return told.stdout.strip()


def model(interpreter: str, name: str) -> Path:
    """Return a GGUF model of a format, written once and kept in the folder for temporary files (BF16 2.2 GB, Q8_0 1.2, Q4_0 0.6)."""
    folder = Path(tempfile.gettempdir()) / f"mlsys-proof-llama-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    path = folder / f"tinyllama-random-{name}.gguf"
    if not path.exists():
        source = [] if FORMATS[name] is None else [str(model(interpreter, "BF16"))]
        print(f"writing {path}, once", flush=True)
        partial = path.with_suffix(".partial")
        subprocess.run([interpreter, __file__, "write", name, str(partial), *source], check=True, stderr=subprocess.DEVNULL)
        partial.rename(path)
    return path


def command(interpreter: str, name: str, threads: int) -> list[str]:
    """Return the command of a process that measures a model of this format."""
    return [interpreter, __file__, "measure", str(model(interpreter, name)), str(threads)]


# ---------------------------------------------------------------- in the peer's


def write(name: str, path: str, source: str | None) -> None:
    """Write a model: random in bf16, or another one quantised as llama.cpp does it by itself (of Q4_0 the head is Q6_K)."""
    if source is None:
        _write_random(path)
    else:
        _quantise(source, path, FORMATS[name] or "")


def _write_random(path: str) -> None:
    import gguf
    import numpy as np

    rng, bf16 = np.random.default_rng(1), gguf.GGMLQuantizationType.BF16
    out = gguf.GGUFWriter(path, "llama")
    out.add_name("random")
    out.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    out.add_tokenizer_model("no_vocab")
    for key, value in (
        ("vocab_size", VOCAB), ("context_length", CONTEXT), ("embedding_length", HIDDEN), ("block_count", LAYERS),
        ("feed_forward_length", FFN), ("head_count", HEADS), ("head_count_kv", KV_HEADS), ("rope_dimension_count", HIDDEN // HEADS),
        ("layer_norm_rms_eps", 1e-5),
    ):  # fmt: skip
        getattr(out, f"add_{key}")(value)

    def put(tensor: str, rows: int, columns: int) -> None:
        drawn = rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5)
        out.add_tensor(tensor, gguf.quants.quantize(drawn, bf16), raw_dtype=bf16)

    put("token_embd.weight", VOCAB, HIDDEN)
    out.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    put("output.weight", VOCAB, HIDDEN)
    for i in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"blk.{i}.{norm}.weight", np.ones(HIDDEN, np.float32))
        narrow = HIDDEN * KV_HEADS // HEADS
        for part, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN), ("attn_k", narrow, HIDDEN), ("attn_v", narrow, HIDDEN), ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", FFN, HIDDEN), ("ffn_up", FFN, HIDDEN), ("ffn_down", HIDDEN, FFN),
        ):  # fmt: skip
            put(f"blk.{i}.{part}.weight", rows, columns)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _quantise(source: str, path: str, kind: str) -> None:
    import llama_cpp

    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype = getattr(llama_cpp, kind)
    if llama_cpp.llama_model_quantize(source.encode(), path.encode(), ctypes.byref(how)):
        raise SystemExit(f"{source} could not be quantised to {kind}")


class Peer:
    """A loaded model, and the context of what was measured last."""

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp

        self.api, self.threads = llama_cpp, threads
        llama_cpp.llama_backend_init()
        how = llama_cpp.llama_model_default_params()
        how.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), how)
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp does not load it")
        self.context: Any = None
        self.made_for: tuple[int, int] | None = None
        self.batch = llama_cpp.llama_batch_init(LONGEST, 0, 1)

    def hello(self, path: str) -> dict[str, object]:
        """Return what was loaded: bytes that a decode step reads, bits per weight of the whole file and of the head."""
        import gguf

        tensors = gguf.GGUFReader(path).tensors
        elements, held = sum(int(t.n_elements) for t in tensors), sum(int(t.n_bytes) for t in tensors)
        head = next(t for t in tensors if t.name == "output.weight")
        return {
            "step_bytes": sum(int(t.n_bytes) for t in tensors if t.name != "token_embd.weight"),
            "bits": 8 * held / elements,
            "head": f"{head.tensor_type.name}, {8 * int(head.n_bytes) / int(head.n_elements):.1f} bit",
            "what": self.api.llama_print_system_info().decode(),
        }

    def decode(self, batch: int, steps: int) -> dict[str, object]:
        """Return the rate of so many steps of a batch whose sequences have had a prompt and two steps before."""
        self._need(batch, ROOM)
        for sequence in range(batch):
            self._run([(7 + i, i, sequence, False) for i in range(PROMPT)])

        def step(at: int) -> None:
            self._run([(11 + sequence, PROMPT + at, sequence, True) for sequence in range(batch)])

        step(0)
        step(1)
        began = time.perf_counter()
        for at in range(2, 2 + steps):
            step(at)
        took_s = time.perf_counter() - began
        return {"rate": batch * steps / took_s, "step_s": took_s / steps}

    def prefill(self, tokens: int) -> dict[str, object]:
        """Return the rate of a prompt in one chunk, after a short one."""
        self._need(1, LONGEST + PROMPT)
        self._run([(7, i, 0, False) for i in range(PROMPT)])
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        began = time.perf_counter()
        self._run([(7 + i % 64, i, 0, i + 1 == tokens) for i in range(tokens)])
        took_s = time.perf_counter() - began
        return {"rate": tokens / took_s, "step_s": took_s}

    def _need(self, sequences: int, room: int) -> None:
        """Make an empty context for so many sequences of so many tokens, unless there is one that can be emptied."""
        if self.made_for == (sequences, room):
            self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
            return
        if self.context:
            self.api.llama_free(self.context)
        how = self.api.llama_context_default_params()
        how.n_ctx, how.n_batch, how.n_ubatch, how.n_seq_max = sequences * room, LONGEST, LONGEST, sequences
        how.n_threads = how.n_threads_batch = self.threads
        how.no_perf = True
        self.context, self.made_for = self.api.llama_init_from_model(self.model, how), (sequences, room)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context for {sequences} sequences of {room} tokens")

    def _run(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Decode (token, position, sequence, whether its logits are wanted), all in one batch."""
        self.batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, wanted
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
        if self.api.llama_decode(self.context, self.batch):
            raise SystemExit("llama.cpp does not decode this batch")
        self.api.llama_synchronize(self.context)


def measure(path: str, threads: int) -> None:
    """Load, say hello, answer lines."""
    peer = Peer(path, threads)
    answer(peer.hello(path))
    for line in sys.stdin:
        kind, *numbers = line.split()
        ways: dict[str, Callable[..., dict[str, object]]] = {"decode": peer.decode, "prefill": peer.prefill}
        answer(ways[kind](*map(int, numbers)))


def answer(said: dict[str, object]) -> None:
    """Print a line of JSON."""
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    asked, *rest = sys.argv[1:]
    if asked == "write":
        write(rest[0], rest[1], rest[2] if len(rest) > 2 else None)
    else:
        measure(rest[0], int(rest[1]))
