"""The server: what it says over HTTP is what the engine computed, and nothing stays behind."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from mlsys_bench import models, serve
from mlsys_bench.engine.sampling import Logprobs, Sampling
from mlsys_bench.errors import BadInput, MeasurementFailed, UnknownName
from mlsys_bench.serve import options as serve_options
from mlsys_bench.serve import server as http_process
from mlsys_bench.serve import wire
from mlsys_bench.serve.metrics import Metrics
from mlsys_bench.serve.options import Options
from mlsys_bench.types import Layout

MODEL = "nano"
OPTIONS = Options(port=0, max_batch=4, seed=3)
PATIENCE_S = 30.0


# ---------------------------------------------------------------- the pipe

MESSAGES: list[wire.Command | wire.Event] = [
    wire.Add(1, (65, 66), 5, Sampling(seed=-3, stop=("a",), logit_bias=((3, 1.5),)), True, -7),
    wire.Embed(3, ((65, 66), (67,))),
    wire.Embedded(3, b"\x00\x01"),
    wire.Cancel(1),
    wire.Stop(),
    wire.Ready("cpu", 7),
    wire.Failed("no"),
    wire.Refused(2, "too long"),
    wire.Stepped(None, ((1, 65),), ((1, "length"),), 0, 5, 1, 0),
    wire.Stepped(0.5, ((1, 65), (2, 66)), (), 0, 5, 2, 0, (Logprobs(-0.5, ((65, -0.5), (9, -2.0))), None)),
]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_frames_survive_any_cut(cuts: list[int]) -> None:
    data = b"".join(wire.frame(m) for m in MESSAGES)
    frames, got, at, i = wire.Frames(), [], 0, 0
    while at < len(data):
        got += list(frames.feed(data[at : at + cuts[i % len(cuts)]]))
        at, i = at + cuts[i % len(cuts)], i + 1
    both = msgspec.msgpack.Decoder(wire.Command | wire.Event)
    assert [both.decode(body) for body in got] == MESSAGES


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (Options(model="llama-3-8b"), BadInput, "no weights"),
        (Options(model="nanno"), UnknownName, "nano"),
        (Options(precision="int3"), UnknownName, "int8"),
        (Options(max_batch=0), BadInput, "max-batch 0"),
        (Options(kv_tokens=8), BadInput, "kv-tokens 8"),
        (Options(max_context=4096), BadInput, "max-context 4096"),
        (Options(port=70000), BadInput, "70000"),
        (Options(queue_limit=-1), BadInput, "queue-limit"),
    ],
)
def test_options_that_cannot_work_say_so(options: Options, error: type[BadInput], words: str) -> None:
    with pytest.raises(error, match=words):
        serve_options.check(options)


@pytest.mark.parametrize(
    ("text", "words"), [('{"prot": 1}', "did you mean port"), ('{"port": "x"}', "port"), ("{", "truncated"), ("[]", "object")]
)
def test_options_as_json_are_checked(text: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        http_process.options_from(text)


def test_engine_and_http_never_share_a_core_unless_there_is_only_one() -> None:
    place = serve_options.placement(Options())
    assert place.threads == 1
    assert place.engine_cores is not None
    assert place.http_cores is None or not set(place.http_cores) & set(place.engine_cores)
    free = serve_options.placement(Options(engine_cores=(), http_cores=()))
    assert (free.engine_cores, free.http_cores) == (None, None)


def test_retry_after_is_the_queue_over_the_rate_of_completions() -> None:
    metrics = Metrics()
    assert metrics.retry_after_s(9) == 1  # nothing is known yet
    for done_s in (10.0, 12.0, 14.0, 16.0):
        metrics.on_end("ok", arrived_s=9.0, token_s=[[9.5, done_s]], prompt_tokens=3)
    assert metrics.retry_after_s(9, now_s=18.0) == 18  # 4 in 8 s: 9 waiting take 18 s
    assert metrics.retry_after_s(1000, now_s=18.0) == 60


# ---------------------------------------------------------------- a live server


@pytest.fixture(scope="module")
def server() -> Iterator[serve.ServerProcess]:
    with serve.start(OPTIONS) as process:
        yield process


@pytest.fixture
def client(server: serve.ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def get(url: str) -> tuple[int, bytes]:
    """Return status and body, of errors too."""
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def post(url: str, body: dict[str, Any]) -> http.client.HTTPConnection:
    """Send a request and do not wait for its answer."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE_S)
    body = {"model": MODEL, "prompt": "hi", **body}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def counters(url: str) -> dict[str, float]:
    """Return every sample of /metrics by name and labels."""
    families = text_string_to_metric_families(get(f"{url}/metrics")[1].decode())
    return {",".join((s.name, *s.labels.values())): s.value for family in families for s in family.samples}


def wait_until(server: serve.ServerProcess, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Ask /health until it is so; each question takes a millisecond or two."""
    for _ in range(20_000):
        health = server.health()
        if is_so(health):
            return health
    raise AssertionError(f"it never came to that: {health}")


def is_idle(health: dict[str, Any]) -> bool:
    return [health[k] for k in ("free_blocks", "in_flight", "running", "waiting")] == [health["blocks"], 0, 0, 0]


def has_exited(pid: int) -> Callable[[], bool]:
    """Return a function that waits for this process, child or not, to end."""
    fd = os.pidfd_open(pid)

    def wait() -> bool:
        try:
            return bool(select.select([fd], [], [], PATIENCE_S)[0])
        finally:
            os.close(fd)

    return wait


def test_the_greedy_answer_is_the_engines_token_for_token(client: openai.OpenAI) -> None:
    from mlsys_bench.engine import Engine

    prompt = list(range(40, 100))
    engine = Engine(models.find(MODEL), precision="fp32", device="cpu", limits=serve_options.limits(OPTIONS), seed=OPTIONS.seed, threads=1)
    engine.add(prompt, max_tokens=24, ignore_eos=True)
    expected: list[int] = []
    while engine.busy:
        expected += [token for _, token in engine.step().tokens]
    extra = {"ignore_eos": True, "return_token_ids": True}
    whole = client.completions.create(model=MODEL, prompt=prompt, max_tokens=24, temperature=0, extra_body=extra).choices[0]
    stream = client.completions.create(model=MODEL, prompt=prompt, max_tokens=24, temperature=0, extra_body=extra, stream=True)
    choices = [chunk.choices[0] for chunk in stream]
    assert whole.model_extra is not None
    assert whole.model_extra["token_ids"] == expected
    assert [c.model_extra["token_ids"] for c in choices if c.model_extra] == [[t] for t in expected]
    assert "".join(c.text for c in choices) == whole.text == engine.tokenizer.decode(expected)


def test_a_completion_counts_its_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="hello", max_tokens=7, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 7, 12)
    assert answer.choices[0].finish_reason == "length"


def test_a_streamed_chat_has_one_event_per_token_and_ends_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    role, *chunks, last = list(stream)
    assert (role.choices[0].delta.role, role.choices[0].delta.content) == ("assistant", "")
    assert len(chunks) == 9
    assert all(c.choices[0].delta.role is None and isinstance(c.choices[0].delta.content, str) for c in chunks)
    assert [c.choices[0].finish_reason for c in chunks] == [None] * 8 + ["length"]
    assert all(c.usage is None for c in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 9
    assert last.usage.prompt_tokens == len("user: hello\nassistant:")


def test_a_chat_that_is_not_streamed_says_the_same_as_one_that_is(client: openai.OpenAI) -> None:
    ask: Any = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_completion_tokens": 30, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    parts = [c.choices[0].delta.content for c in client.chat.completions.create(**ask, stream=True)]
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content == "".join(p or "" for p in parts)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == len(parts) - 1  # the first names the role


def test_a_stop_string_ends_the_answer_and_is_not_shown(client: openai.OpenAI) -> None:
    ask: Any = {"model": MODEL, "prompt": "once upon", "max_tokens": 60, "temperature": 0.8, "seed": 5, "extra_body": {"ignore_eos": True}}
    text = client.completions.create(**ask).choices[0].text
    middle = len(text) // 2
    stop = text[middle : middle + 3]  # three characters: three tokens or more
    assert len(stop) == 3
    cut = text[: text.find(stop)]
    whole = client.completions.create(**ask, stop=stop)
    chunks = list(client.completions.create(**ask, stop=[stop, "never to be seen"], stream=True))
    assert whole.choices[0].text == "".join(c.choices[0].text for c in chunks) == cut
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == len(chunks) < 60


def test_an_answer_that_stops_takes_no_step_more(server: serve.ServerProcess, client: openai.OpenAI) -> None:
    """The engine itself ends it: nothing is generated that the client does not get, and its blocks are free."""
    ask: Any = {"model": MODEL, "prompt": "once upon", "max_tokens": 60, "temperature": 0.8, "seed": 5, "extra_body": {"ignore_eos": True}}
    text = client.completions.create(**ask).choices[0].text
    stop = text[20:23]
    wait_until(server, is_idle)
    before = counters(server.url)["mlsys_generation_tokens_total"]
    ask["extra_body"] = {"ignore_eos": True, "include_stop_str_in_output": True}
    answer = client.completions.create(**ask, stop=stop)
    assert answer.choices[0].text == text[: text.find(stop) + len(stop)]
    assert answer.usage is not None
    wait_until(server, is_idle)
    assert counters(server.url)["mlsys_generation_tokens_total"] - before == answer.usage.completion_tokens


def test_logprobs_are_the_engines_whole_or_streamed_in_both_apis(client: openai.OpenAI) -> None:
    """Greedy: the chosen token is the likeliest of those shown; the chat is the completion of its text."""
    text = "user: hello\nassistant:"
    extra = {"ignore_eos": True, "return_token_ids": True}
    ask: Any = {"model": MODEL, "max_tokens": 8, "temperature": 0, "extra_body": extra}
    whole = client.completions.create(**ask, prompt=text, logprobs=3).choices[0]
    parts = [c.choices[0].logprobs for c in client.completions.create(**ask, prompt=text, logprobs=3, stream=True)]
    told: Any = {"messages": [{"role": "user", "content": "hello"}], "logprobs": True, "top_logprobs": 3}
    chat = client.chat.completions.create(**ask, **told).choices[0].logprobs
    deltas = [c.choices[0].logprobs for c in client.chat.completions.create(**ask, **told, stream=True)][1:]
    assert whole.logprobs is not None
    got, tops = whole.logprobs.token_logprobs, whole.logprobs.top_logprobs
    assert got is not None
    assert tops is not None
    assert chat is not None
    assert chat.content is not None
    assert len(got) == len(tops) == len(chat.content) == 8
    assert got == [max(top.values()) for top in tops] == [p.token_logprobs[0] for p in parts if p and p.token_logprobs]
    assert [len(top) for top in tops] == [3] * 8
    assert [c.logprob for c in chat.content] == pytest.approx(got, abs=1e-6) == [d.content[0].logprob for d in deltas if d and d.content]
    assert whole.model_extra is not None
    assert [c.bytes for c in chat.content] == [[t] if t < 256 else list(b"<end>") for t in whole.model_extra["token_ids"]]
    assert [[t.logprob for t in c.top_logprobs] for c in chat.content] == [sorted(top.values(), reverse=True) for top in tops]


def test_several_choices_are_those_of_the_seeds_that_follow(client: openai.OpenAI) -> None:
    ask: Any = {"model": MODEL, "prompt": "once", "max_tokens": 12, "temperature": 0.9, "extra_body": {"ignore_eos": True}}
    alone = [client.completions.create(**ask, seed=seed).choices[0].text for seed in (7, 8, 9)]
    together = client.completions.create(**ask, seed=7, n=3, echo=True)
    streamed = ["", "", ""]
    for chunk in client.completions.create(**ask, seed=7, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert [c.text for c in together.choices] == ["once" + text for text in alone]
    assert streamed == alone
    assert together.usage is not None
    assert (together.usage.prompt_tokens, together.usage.completion_tokens) == (4, 36)


def test_settings_reach_the_sampler(client: openai.OpenAI) -> None:
    """A bias that decides, a penalty that forbids repeating, filters that leave one token: each shows in the text."""
    ask: Any = {"model": MODEL, "prompt": "once", "max_tokens": 12, "temperature": 0}
    extra: dict[str, Any] = {"ignore_eos": True}
    greedy = client.completions.create(**ask, extra_body=extra).choices[0].text
    biased = client.completions.create(**ask, extra_body=extra, logit_bias={str(ord("q")): 100}).choices[0].text
    once = client.completions.create(**ask, extra_body={**extra, "repetition_penalty": 50}, logit_bias={str(ord("q")): 60}).choices[0].text
    ask["temperature"] = 1.5
    one = client.completions.create(**ask, extra_body={**extra, "top_k": 1}).choices[0].text
    sure = client.completions.create(**ask, extra_body={**extra, "min_p": 1.0}).choices[0].text
    assert biased == "q" * 12
    assert once.find("q") == once.rfind("q") == 0, "60 / 50 is no longer the largest"
    assert greedy == one == sure


def test_a_seed_repeats_its_answer_whatever_runs_beside_it(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        return client.completions.create(model=MODEL, prompt="once", max_tokens=30, temperature=0.8, seed=seed).choices[0].text

    with ThreadPoolExecutor(4) as pool:
        first, again, other, third = pool.map(ask, [11, 11, 12, 11])
    assert first == again == third == ask(11)
    assert other != first


def test_twelve_streams_at_once_all_get_all_their_tokens(server: serve.ServerProcess, client: openai.OpenAI) -> None:
    """Three times as many as there are seats."""

    def count(tokens: int) -> tuple[int, int]:
        stream = client.completions.create(
            model=MODEL,
            prompt="x" * tokens,
            max_tokens=tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        chunks = list(stream)
        assert chunks[-1].usage is not None
        return sum(len(c.choices) for c in chunks), chunks[-1].usage.completion_tokens

    lengths = list(range(4, 40, 3))
    before = counters(server.url)["mlsys_generation_tokens_total"]
    with ThreadPoolExecutor(len(lengths)) as pool:
        counted = list(pool.map(count, lengths))
    assert counted == [(n, n) for n in lengths]
    wait_until(server, is_idle)
    assert counters(server.url)["mlsys_generation_tokens_total"] - before == sum(lengths)


def test_errors_have_the_classes_of_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-5", prompt="hi")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt="hi", temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="hi", max_tokens=10**6)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="generates text"):
        client.embeddings.create(model=MODEL, input="hi")


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_a_wrong_path_or_method_is_an_error_in_openais_shape(server: serve.ServerProcess) -> None:
    for path, status in (("/v2/completions", 404), ("/v1/completions", 405)):
        got, body = get(server.url + path)
        assert got == status
        assert path in json.loads(body)["error"]["message"]


def test_health_tells_the_layout_and_the_limits(server: serve.ServerProcess) -> None:
    health = server.health()
    place = serve_options.placement(OPTIONS)
    expected = Layout(model=MODEL, precision="fp32", device="cpu", threads=1, pinned_cores=place.engine_cores)
    assert msgspec.convert(health["layout"], Layout) == expected
    assert health["limits"] == serve_options.limits(OPTIONS)._asdict()
    assert health["status"] == "ok"
    assert server.ready_line.startswith("mlsys serve: nano fp32 on cpu (1 thread, core ")


def test_only_the_engine_process_holds_torch_and_each_stays_on_its_core(server: serve.ServerProcess) -> None:
    health = server.health()
    for pid, has_torch, cores in ((health["engine_pid"], True, health["pinned_cores"]), (server.process.pid, False, health["http_cores"])):
        assert ("libtorch" in Path(f"/proc/{pid}/maps").read_text()) == has_torch
        assert cores is None or os.sched_getaffinity(pid) == set(cores)


def test_metrics_are_read_by_the_prometheus_parser_and_add_up(server: serve.ServerProcess, client: openai.OpenAI) -> None:
    before = counters(server.url)
    client.completions.create(model=MODEL, prompt="hello", max_tokens=6, extra_body={"ignore_eos": True})
    wait_until(server, is_idle)
    after = counters(server.url)
    grown = {name: after[name] - before[name] for name in before}
    assert grown["mlsys_requests_total,ok"] == 1
    assert grown["mlsys_prompt_tokens_total"] == 5
    assert grown["mlsys_generation_tokens_total"] == 6
    assert grown["mlsys_step_seconds_count"] == 6  # the prompt's step gives the first token
    for name in ("mlsys_ttft_seconds_count", "mlsys_tpot_seconds_count", "mlsys_e2e_seconds_count"):
        assert grown[name] == 1
    assert after["mlsys_ttft_seconds_sum"] < after["mlsys_e2e_seconds_sum"]
    assert after["mlsys_kv_blocks_free"] == after["mlsys_kv_blocks"] == 4 * 1024 // 16


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_goes_away_frees_its_blocks(server: serve.ServerProcess, is_streamed: bool) -> None:
    before = counters(server.url)
    connection = post(server.url, {"max_tokens": 1000, "ignore_eos": True, "stream": is_streamed})
    if is_streamed:
        assert connection.getresponse().readline().startswith(b"data: ")
    wait_until(server, lambda h: h["running"] == 1 and h["free_blocks"] < h["blocks"])
    connection.close()
    wait_until(server, is_idle)
    after = counters(server.url)
    assert after["mlsys_requests_total,cancelled"] == before["mlsys_requests_total,cancelled"] + 1
    assert after["mlsys_generation_tokens_total"] < before["mlsys_generation_tokens_total"] + 1000


# ---------------------------------------------------------------- its life


def test_a_full_queue_answers_429_and_a_signal_ends_the_server_in_order() -> None:
    """Two seats and one place to wait.  After SIGTERM short answers are finished, a long one is cut, and nothing stays behind."""
    options = Options(port=0, max_batch=2, queue_limit=1, max_context=2048)
    with serve.start(options) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        engine_is_gone = has_exited(server.health()["engine_pid"])
        held = [post(server.url, {"max_tokens": n, "ignore_eos": True, "stream": True}) for n in (2000, 40, 5)]
        wait_until(server, lambda h: h["in_flight"] == 3)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model=MODEL, prompt="hi")
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert refused.value.code == "queue_full"
        assert counters(server.url)["mlsys_requests_total,rejected"] == 1
        server.process.send_signal(signal.SIGTERM)
        long, *short = [connection.getresponse().read() for connection in held]
        assert [a.count(b"data: {") for a in short] == [40, 5]
        assert all(a.endswith(b"data: [DONE]\n\n") for a in short)
        assert b"the server is shutting down" in long or long.count(b"data: {") == 2000  # a machine that makes 500 tokens a second
        for connection in held:
            connection.close()
        assert server.process.wait(PATIENCE_S) == 0
        assert engine_is_gone()


def test_when_the_engine_dies_everyone_is_told() -> None:
    with serve.start(Options(port=0, max_batch=1)) as server:
        streamed = post(server.url, {"max_tokens": 1000, "ignore_eos": True, "stream": True})
        response = streamed.getresponse()
        assert response.readline().startswith(b"data: ")
        waiting = post(server.url, {"max_tokens": 5})
        wait_until(server, lambda h: h["in_flight"] == 2)
        os.kill(server.health()["engine_pid"], signal.SIGKILL)
        assert b"engine process is gone (signal 9)" in response.read()
        answer = waiting.getresponse()
        assert answer.status == 503
        assert json.loads(answer.read())["error"]["type"] == "server_error"
        status, body = get(f"{server.url}/health")
        assert (status, json.loads(body)["status"]) == (503, "dead")
        streamed.close()
        waiting.close()
        assert server.process.wait(PATIENCE_S) == MeasurementFailed.exit_status
        assert server.stderr_tail().startswith("mlsys serve: the engine process is gone (signal 9)")


def test_the_engine_does_not_outlive_its_server() -> None:
    with serve.start(Options(port=0)) as server:
        engine_is_gone = has_exited(server.health()["engine_pid"])
        server.process.kill()
        assert engine_is_gone()


def test_a_port_in_use_is_one_line_and_exit_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "mlsys_bench.serve", json.dumps({"port": port})]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"mlsys serve: 127.0.0.1:{port}: cannot listen there: Address already in use")


def test_a_server_that_does_not_come_up_fails_with_its_last_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(MeasurementFailed, match="cannot listen there"):
        serve.start(Options(port=taken.getsockname()[1]))
