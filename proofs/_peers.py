"""Other load generators against the same server: plain Locust FastHttpUser here, guidellm and aiperf in environments of their own.

MLSYS_PEERS names a folder with environments that are there already (MLSYS_PEERS/guidellm, MLSYS_PEERS/aiperf).
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol

import _truths
import numpy as np

from mlsys_bench.loadtest import calibrate
from mlsys_bench.loadtest.truth import Behaviour
from mlsys_bench.loadtest.truth.client import Truth, serving

RATES = (50, 200, 500)
SECONDS = 8
INSTALL_S = 600
RUN_S = 150
TORCH = os.environ.get("MLSYS_TORCH", "torch==2.13.0")
Show = Callable[..., None]

WHOLE = """
import json
from locust import FastHttpUser, constant, task
BODY = json.dumps({"model": "truth", "prompt": "a " * 64, "max_tokens": 32, "stream": False})
class Asks(FastHttpUser):
    wait_time = constant(0)
    @task
    def ask(self):
        self.client.post("/v1/completions", data=BODY, headers={"Content-Type": "application/json"})
"""

STREAMS = """
import json, os, time
from locust import FastHttpUser, constant_throughput, events, task
BODY = json.dumps({"model": "truth", "prompt": "a " * 64, "max_tokens": 32, "stream": True})
SEEN = []
class Asks(FastHttpUser):
    wait_time = constant_throughput(1)
    @task
    def ask(self):
        began = time.perf_counter()
        how = {"headers": {"Content-Type": "application/json"}, "stream": True, "catch_response": True}
        with self.client.post("/v1/completions", data=BODY, **how) as r:
            first = None
            while line := r._response.readline(b"\\n"):
                if line.startswith(b"data: {") and first is None:
                    first = time.perf_counter()
            r.success()
        SEEN.append((time.time(), first - began))
@events.quitting.add_listener
def keep(environment, **_):
    json.dump(SEEN, open(os.environ["SEEN"], "w"))
"""


BYTES = """
import sys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "[EOS]"]
made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[EOS]").save_pretrained(sys.argv[1])
"""


class Asked(Protocol):
    """A truth server of either kind."""

    url: str

    def stats(self) -> dict[str, Any]: ...
    def reset(self) -> None: ...


def fast_http_user(server: Asked, users: int, seconds: float = 3.0) -> float:
    """Return whole answers per second of plain FastHttpUser in a closed loop, as the server counts them."""
    with tempfile.TemporaryDirectory() as folder, _locust(folder, WHOLE, server.url, users, {}) as process:
        _until(lambda: _requests(server) > 20 * users, process)
        time.sleep(0.5)
        server.reset()
        time.sleep(seconds)
        did = server.stats()
    return float(did.get("arrivals_per_s") or did.get("arrival_rate") or 0.0)


def show(show: Show) -> None:
    """Print what every peer that can be had reports beside the truth."""
    for rate in RATES:
        _ours(show, rate)
    for name, tool in (("locust FastHttpUser", _Fast), ("guidellm", _Guidellm), ("aiperf", _Aiperf)):
        with tempfile.TemporaryDirectory(prefix="mlsys-peer-") as folder:
            try:
                peer = tool(Path(folder))
            except _SkippedError as why:
                print(f"    {name}: skipped: {why}")
                continue
            for rate in RATES:
                _one(show, name, peer, rate)


def _ours(show: Show, rate: int) -> None:
    with serving(Behaviour(ttft_s=0.1, itl_s=0.02, tokens=32), _truths.SERVER_CORE) as server:
        run = calibrate.against(server, qps=float(rate), arrivals="constant", duration_s=float(SECONDS))
    off = f"p99 off {100 * run.ttft_p99_error:+.1f} %, {rate * run.achieved:.1f}/s arrived, gap CV {run.gap_cv:.2f}"
    show(f"mlsys loadtest at {rate}/s: TTFT p50 off the truth; {off}", 100 * run.ttft_p50_error, "%")


def _one(show: Show, name: str, peer: Any, rate: int) -> None:
    with serving(Behaviour(ttft_s=0.1, itl_s=0.02, tokens=32), _truths.SERVER_CORE) as server:
        try:
            p50, p99 = peer.ttft_ms(server, rate)
        except (_SkippedError, subprocess.SubprocessError, OSError, ValueError, KeyError, IndexError) as why:
            print(f"    {name} at {rate}/s: no figure: {str(why)[:160]}")
            return
        true = server.stats()
    off = [100 * (told / true["ttft_ms"][key] - 1) for told, key in ((p50, "p50"), (p99, "p99"))]
    came = true["arrivals_per_s"] or 0.0
    show(
        f"{name} at {rate}/s: TTFT p50 off the truth; p99 off {off[1]:+.1f} %, {came:.1f}/s arrived, gap CV {true['gap_cv']:.2f}",
        off[0],
        "%",
    )


class _SkippedError(Exception):
    """A peer that cannot be had or did not answer."""


class _Fast:
    """Locust users of one request a second each, timing the first event themselves: Locust does not."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def ttft_ms(self, server: Truth, rate: int) -> tuple[float, float]:
        seen = self._folder / "seen.json"
        with _locust(str(self._folder), STREAMS, server.url, rate, {"SEEN": str(seen)}) as process:
            _until(lambda: _requests(server) > rate, process)
            server.reset()
            time.sleep(SECONDS)
            process.terminate()
            process.wait(timeout=RUN_S)
        times = 1e3 * np.array([first for at, first in json.loads(seen.read_text())])
        return float(np.quantile(times, 0.5)), float(np.quantile(times, 0.99))


class _Installed:
    """A peer with an environment of its own: it pulls in what this project does without."""

    package = ""
    settings: ClassVar[dict[str, str]] = {}

    def __init__(self, folder: Path) -> None:
        ready = Path(os.environ.get("MLSYS_PEERS", "")) / self.package / "bin"
        self.folder, self.bin = folder, ready if (ready / self.package).exists() else folder / "venv" / "bin"
        if self.bin != ready:
            self._install()
        self._tokenizer()

    def _install(self) -> None:
        install = [str(self.bin / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        for command in (
            [sys.executable, "-m", "venv", str(self.bin.parent)],
            [*install, *TORCH.split()],  # first and alone: a looser request can pull gigabytes of CUDA
            [*install, self.package, "tokenizers", "transformers"],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
            except subprocess.TimeoutExpired:
                raise _SkippedError(f"{self.package} was not installed within {INSTALL_S} s") from None
            if done.returncode:
                raise _SkippedError(f"{self.package} cannot be installed: {(done.stderr.strip().splitlines() or ['no word'])[-1][:160]}")

    def _tokenizer(self) -> None:
        """Make a tokenizer of bytes: the usual ones would have to be fetched."""
        self.call([str(self.bin / "python"), "-c", BYTES, str(self.folder / "tokenizer")])

    def call(self, command: list[str]) -> None:
        home = {"HOME": str(self.folder), "PATH": f"{self.bin}:{os.environ['PATH']}", **self.settings}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=RUN_S, check=False, cwd=self.folder, env={**os.environ, **home},
            preexec_fn=_truths.pin_to_client_cores,
        )  # fmt: skip
        if done.returncode:
            words = (done.stderr or done.stdout).strip().splitlines() or ["no word"]
            raise _SkippedError(f"{Path(command[0]).name} ended with {done.returncode}: {words[-1][:200]}")


class _Guidellm(_Installed):
    package = "guidellm"
    settings: ClassVar[dict[str, str]] = {"HF_HUB_OFFLINE": "1"}  # aiperf takes a tokenizer's folder only without it

    def ttft_ms(self, server: Truth, rate: int) -> tuple[float, float]:
        out = self.folder / f"{rate}.json"
        server.reset()
        self.call([
            str(self.bin / "guidellm"), "run", "--disable-console",
            "--backend", f"kind=openai_http,target={server.url},model=truth,request_format=/v1/completions",
            "--profile", f"kind=constant,rate={rate}", "--constraint", f"kind=max_duration,seconds={SECONDS}",
            "--tokenizer", f"kind=hf_auto,model={self.folder / 'tokenizer'}",
            "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=32", "--output", f"kind=json,path={out}",
        ])  # fmt: skip
        found = json.loads(out.read_text())["benchmarks"][0]["metrics"]["time_to_first_token_ms"]["successful"]
        return float(found["percentiles"]["p50"]), float(found["percentiles"]["p99"])


class _Aiperf(_Installed):
    package = "aiperf"

    def ttft_ms(self, server: Truth, rate: int) -> tuple[float, float]:
        out = self.folder / f"aiperf-{rate}"
        server.reset()
        self.call([
            str(self.bin / "aiperf"), "profile", "--model", "truth", "--url", server.url, "--endpoint-type", "completions", "--streaming",
            "--tokenizer", str(self.folder / "tokenizer"), "--request-rate", str(rate), "--arrival-pattern", "constant",
            "--request-count", str(rate * SECONDS), "--isl", "32", "--osl", "32",
            "--artifact-dir", str(out), "--ui", "none",
        ])  # fmt: skip
        file = next(out.rglob("*.csv"), None)
        if file is None:
            raise _SkippedError("it wrote no table")
        rows = [row for row in csv.reader(file.open()) if row]
        head = next(row for row in rows if "p50" in row)
        values = next(row for row in rows if row[0].lower().startswith("time to first token"))
        return float(values[head.index("p50")]), float(values[head.index("p99")])


@contextmanager
def _locust(folder: str, text: str, url: str, users: int, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    file = Path(folder) / "locustfile.py"
    file.write_text(text)
    command = [sys.executable, "-W", "ignore", "-m", "locust", "-f", str(file), "--headless", "-u", str(users), "-r", str(users), "-H", url]
    with subprocess.Popen(
        [*command, "--stop-timeout", "3"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **env},
        preexec_fn=_truths.pin_to_client_cores,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()


def _requests(server: Asked) -> int:
    did = server.stats()
    return int(did.get("requests", did.get("n", 0)))


def _until(done: Callable[[], bool], process: subprocess.Popen[bytes], patience_s: float = 30.0) -> None:
    began = time.monotonic()
    while not done():
        if process.poll() is not None or time.monotonic() - began > patience_s:
            raise _SkippedError("Locust did not begin")
        time.sleep(0.2)
