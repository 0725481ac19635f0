"""What a client may do to others: nothing.  A request that goes wrong costs no seat, and a long one stops no stream."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from mlsys_bench import serve
from mlsys_bench.engine.sampling import Sampling
from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.serve import app
from mlsys_bench.serve.link import Link
from tests import sample_checkpoints as samples

PATIENCE_S = 30.0


def test_a_request_that_no_frame_holds_takes_no_seat() -> None:
    """Seats that nobody gives back would fill up, until every request is told to come again later."""
    link = Link(lambda event: None)
    with pytest.raises(OverflowError):
        link.submit((65,), max_tokens=1, choices=[Sampling(), Sampling(top_k=2**64)], ignore_eos=False)
    with pytest.raises(OverflowError):
        link.embed(((2**64,),))
    assert link.in_flight == 0


def test_a_long_body_is_read_while_everybody_else_is_served() -> None:
    others = threading.Event()

    def parse(data: bytes) -> bool:
        return others.wait(PATIENCE_S)

    async def both() -> bool:
        reading = asyncio.create_task(app._parsed(parse, b" " * (1 << 20)))
        await asyncio.sleep(0)  # it has begun
        others.set()
        return await reading

    assert asyncio.run(both())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = samples.write(tmp_path_factory.mktemp("hostile") / "llama", samples.LLAMA, samples.llama_tensors(samples.LLAMA))
    samples.tokenizer(folder)
    return folder


@pytest.mark.e2e
def test_one_client_s_odd_requests_leave_the_server_as_it_was(llama: Path) -> None:
    """One that no frame holds, one that leaves no probabilities, and a model whose name is a path."""
    odd: list[dict[str, Any]] = [{"top_k": 2**64}, {"repetition_penalty": 1e-300, "top_k": 5}, {"repetition_penalty": 1e300, "top_k": 5}]
    with serve.start(serve.Options(model=str(llama), port=0, max_batch=1, queue_limit=1, max_context=128)) as server:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=PATIENCE_S)
        for fields in odd * 3:
            body = {"model": str(llama), "prompt": "how many replicas", "max_tokens": 8, **fields}
            connection.request("POST", "/v1/completions", json.dumps(body))
            response = connection.getresponse()
            assert (response.status, b"invalid_value" in response.read()) == (400, True)
        connection.close()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            assert client.completions.create(model=str(llama), prompt="how", max_tokens=2).choices[0].finish_reason == "length"
            assert client.models.retrieve(str(llama)).id == str(llama)
        assert server.health()["in_flight"] == 0


@pytest.mark.e2e
def test_who_asks_twice_to_end_it_sees_no_traceback() -> None:
    """The first Ctrl-C lets answers end, the second cuts them off."""
    command = [sys.executable, "-m", "mlsys_bench.serve", '{"model": "nano", "port": 0}']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        at = urlsplit(process.stdout.readline().rpartition(" at ")[2].strip())
        connection = http.client.HTTPConnection(at.netloc, timeout=PATIENCE_S)
        body = {"model": "nano", "prompt": "a", "max_tokens": 1000, "n": 8, "ignore_eos": True, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body))
        response = connection.getresponse()
        response.read(1)
        process.send_signal(signal.SIGINT)
        while True:  # until nobody is let in any more
            try:
                socket.create_connection((at.hostname or "", at.port or 0), PATIENCE_S).close()
            except OSError:
                break
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_S)
        response.close()
        connection.close()
    assert (process.returncode, said) == (0, "")


def test_a_tokenizer_that_cannot_write_is_refused_before_anything_is_served(llama: Path, tmp_path: Path) -> None:
    folder = samples.write(tmp_path / "llama", samples.LLAMA, samples.llama_tensors(samples.LLAMA))
    fields = json.loads((llama / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(fields | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}))
    with pytest.raises((BadInput, MeasurementFailed), match="decoder WordPiece is not known"):
        serve.start(serve.Options(model=str(folder), port=0, max_context=128))
