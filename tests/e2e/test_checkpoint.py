"""A folder with a model, from the command line to the answer; and what loading one takes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mlsys_bench import models
from mlsys_bench.batching import Limits
from mlsys_bench.engine import Engine
from mlsys_bench.engine.tokenizer import open_tokenizer
from tests import sample_checkpoints as sample
from tests.e2e.conftest import Cli

pytestmark = pytest.mark.e2e
SPREAD = 1.15  # the bar: peak memory over the size of the weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a tiny Llama with a tokenizer of its own, in bf16, in two shards."""
    tensors = sample.llama_tensors(sample.LLAMA, dtype=torch.bfloat16)
    made = sample.write(tmp_path / "model", sample.LLAMA | {"torch_dtype": "bfloat16", "eos_token_id": 1}, tensors, shards=2)
    sample.tokenizer(made)
    return made


@pytest.fixture
def address(mlsys: Cli, folder: Path) -> Iterator[str]:
    """Return where the folder is served."""
    process = mlsys.start("serve", folder, "--port", 0, "--max-context", 128, "--max-batch", 2, "--precision", "fp32", "--device", "cpu")
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        found = re.search(r" at (http://\S+)", process.stdout.readline())
        assert found is not None, process.stderr.read()
        yield found[1]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()


def ask(url: str, **body: object) -> dict[str, object]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, object] = json.load(response)
        return answer


def test_a_folder_is_served_with_its_own_tokenizer(address: str, folder: Path) -> None:
    """The text over HTTP is what the engine gives in this process for the same prompt."""
    with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as response:
        name = json.load(response)["data"][0]["id"]
    answer = ask(f"{address}/v1/completions", model=name, prompt="how many replicas", max_tokens=12, temperature=0)
    tokenizer = open_tokenizer(folder, 320)
    prompt = tokenizer.encode("how many replicas")
    assert len(prompt) < len("how many replicas"), "a trained tokenizer has words"
    assert answer["usage"]["prompt_tokens"] == len(prompt)  # type: ignore[index]
    limits = Limits(max_seqs=2, max_step_tokens=256, block_tokens=16, blocks=16, max_context=128)
    engine = Engine(models.find(str(folder)), limits=limits, checkpoint=folder)
    engine.add(prompt, max_tokens=12)
    tokens: list[int] = []
    while engine.busy:
        tokens += [token for _, token in engine.step().tokens]
    assert answer["choices"][0]["text"] == tokenizer.decode(tokens)  # type: ignore[index]


def test_a_folder_is_measured(mlsys: Cli, folder: Path) -> None:
    done = mlsys("bench", "gpu", "--model", folder, "--only", "engine.coldstart", "--device", "cpu", "--budget", "20s", "--json")
    assert done.returncode == 0, done.stderr
    phases = json.loads(done.stdout)["measurements"]
    assert {(m["parameters"]["model"], m["parameters"]["precision"]) for m in phases} == {(str(folder), "bf16")}


def test_a_broken_folder_is_one_line(mlsys: Cli, folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    done = mlsys("serve", folder, "--port", 0, "--max-context", 128)
    assert done.returncode == 2
    assert "model-00002-of-00002.safetensors: not a whole safetensors file" in done.stderr
    assert "Traceback" not in done.stderr


_LOAD = """
import re, sys
import torch
from pathlib import Path
from mlsys_bench.engine import checkpoint, formats, quant
from mlsys_bench.engine.native import library, linears

def taken(what):  # of this process alone: getrusage would count its parent's, before exec
    return 1024 * int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder, precision, backend = sys.argv[1:]
torch.set_num_threads(1)
small = torch.ones(256, 256)
pack = (lambda logical: linears.pack(logical, precision)) if backend == "native" and library.load() else None
for kept in (formats.quantise(small, precision), formats.quantise(small, "bf16")):  # what the first use of each library takes
    (pack or (lambda logical: quant.pack(logical, precision, torch.device("cpu"))))(kept)
opened = checkpoint.open_folder(folder)
planned, before = checkpoint.planned_bytes(opened, precision), taken("VmRSS")
held = checkpoint.load(opened, precision=precision, device=torch.device("cpu"), pack=pack)
print(planned, taken("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the peak of a process's memory")
@pytest.mark.parametrize(("precision", "backend"), [("bf16", "torch"), ("int8", "native")])
def test_weights_are_loaded_without_a_second_copy(tmp_path: Path, precision: str, backend: str) -> None:
    """A model of 320 MB on disk: the peak of the loading process over what it had before is its weights and a matrix or two."""
    config = sample.LLAMA | {
        "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 64, "torch_dtype": "bfloat16",
    }  # fmt: skip
    folder = sample.write(tmp_path / "large", config, sample.llama_tensors(config, dtype=torch.bfloat16, same_layers=True), shards=2)
    done = subprocess.run([sys.executable, "-c", _LOAD, str(folder), precision, backend], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    planned, peak = map(int, done.stdout.split())
    assert planned > (300e6 if precision == "bf16" else 150e6)
    assert 0.9 * planned < peak < SPREAD * planned, f"{peak / planned:.2f} times the weights"
