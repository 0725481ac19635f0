"""The probe: waves of requests to a real server, and a profile recovered from what the simulator shows of a known one."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from mlsys_bench import latency, models, serve, simulate
from mlsys_bench.batching import Limits
from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.journeys import probe
from mlsys_bench.latency import physics
from mlsys_bench.loadtest import endpoints, target, waves, wire
from mlsys_bench.loadtest.form import Form
from mlsys_bench.loadtest.waves import Wave
from mlsys_bench.predict import outside
from mlsys_bench.types import Bench, LatencyProfile, Layout, Provenance, RequestRecord
from mlsys_bench.workload import Schedule

LAYOUT = Layout(model="nano", precision="fp32", device="cpu", threads=1, pinned_cores=(0,))
LIMITS = Limits(max_seqs=8, max_step_tokens=256, block_tokens=16, blocks=512, max_context=1024)
OVERHEAD_S = 1.5e-3
SPACING_S = 40e-6


def truth() -> LatencyProfile:
    """Return the truth: a small model on one slow core."""
    constants = physics.constants_of(models.find("nano"), "fp32") | {
        "bandwidth_bytes_per_s": 12e9, "peak_flops_per_s": 60e9, "pack_tokens": 3.0,
    }  # fmt: skip
    values = {"step_s": 2e-3, "sequence_s": 3e-4, "weights": 1.2, "linear": 1.5, "kv": 3.0, "attention": 4.0, "pack_s": 3e-3}
    return LatencyProfile(
        form="step",
        layout=LAYOUT,
        stage=None,
        terms=tuple(values),
        coefficients=tuple(values.values()),
        covariance=tuple(tuple(row) for row in np.diag(np.full(7, 0.01)).tolist()),
        constants=constants,
        residual_log_sd=0.02,
        valid={},
        provenance=Provenance.CALIBRATED,
    )


def seen(requests: int, prompt: int, output: int, rng: np.random.Generator, noise: float = 0.01) -> tuple[RequestRecord, ...]:
    """Return what a client sees of a wave: the simulator's times, the overhead, streams one after another, jitter of every arrival."""
    schedule = Schedule(scheduled_s=np.zeros(requests), prompt_tokens=np.full(requests, prompt), output_tokens=np.full(requests, output))
    clock = latency.clock(truth())
    run = simulate.run(schedule, truth(), LIMITS, clock=lambda f: clock(f) * float(np.exp(rng.normal(0, noise))))
    return tuple(_through_http(r, i, rng) for i, r in enumerate(run.requests))


def _through_http(record: RequestRecord, place: int, rng: np.random.Generator) -> RequestRecord:
    late = OVERHEAD_S + place * SPACING_S + rng.exponential(20e-6, len(record.token_s))
    return dataclasses.replace(record, sent_s=0.0, token_s=tuple(sorted((np.asarray(record.token_s) + late).tolist())))


def observed(seed: int = 0) -> tuple[list[outside.Decoding], list[outside.Prefilling]]:
    rng = np.random.default_rng(seed)
    found = [outside.decoding(seen(c, p, 40 + 2 * c * p // 256 * 3, rng)) for c in (1, 2, 3, 4, 6, 8) for p in (32, 160, 768 // c + 64)]
    lone = [seen(1, p, 1, rng) for p in (8, 13, 22, 35, 58, 95, 156, 256, 512, 768) for _ in range(4)]
    assert all(found)
    return [d for d in found if d], list(outside.prefilling(lone))


@pytest.fixture(scope="module")
def fitted() -> tuple[LatencyProfile, Bench]:
    decodes, prefills = observed()
    return outside.fit(decodes, prefills, layout=LAYOUT, max_step_tokens=256)


@pytest.fixture
def profile(fitted: tuple[LatencyProfile, Bench]) -> LatencyProfile:
    return fitted[0]


def test_the_gap_between_tokens_is_the_step_while_all_decode() -> None:
    """Eight requests of 64 tokens: two mixed steps bring them in, then each step makes eight tokens at contexts from 65 on."""
    rng = np.random.default_rng(3)
    found = outside.decoding(seen(8, 64, 60, rng, noise=0.0))
    assert found is not None
    assert found.batch == 8
    features = (8.0, 8 * found.context_tokens, 0.0, 0.0, 8.0)
    assert np.median(found.step_s) == pytest.approx(latency.step_s(truth(), features), rel=0.01)
    assert found.spacing_s == pytest.approx(SPACING_S, rel=0.5)


def test_requests_that_take_turns_are_no_batch() -> None:
    """Sixteen requests for eight seats never all decode at once."""
    assert outside.decoding(seen(16, 64, 60, np.random.default_rng(0))) is None


def test_batches_lie_so_close_that_a_change_of_kernels_is_found() -> None:
    """Up to four tokens MKL reads weights as they are, from then on it copies them: a grid of 1, 2, 4, 8 cannot tell 3 from 4."""
    assert probe.batches(12) == [1, 2, 3, 4, 6, 8, 12]
    assert probe.batches(3) == [1, 2, 3]
    assert probe.batches(2) == [1, 2]


def test_a_failed_request_spoils_its_wave() -> None:
    records = seen(2, 64, 60, np.random.default_rng(0))
    assert outside.decoding((dataclasses.replace(records[0], outcome="rejected"), records[1])) is None
    assert outside.decoding(()) is None


def test_events_that_carry_several_tokens_or_none_do_not_change_the_step() -> None:
    """A server that sends two events a token, or one event for two tokens, is timed by its count of tokens."""
    (record,) = seen(1, 64, 81, np.random.default_rng(1), noise=0.0)
    plain = outside.decoding((record,))
    halves = outside.decoding((dataclasses.replace(record, token_s=record.token_s[::2]),))
    assert plain is not None
    assert halves is not None
    assert np.median(halves.step_s) == pytest.approx(np.median(plain.step_s), rel=0.01)


def test_a_known_engine_is_recovered_from_outside(profile: LatencyProfile) -> None:
    """Steps that no wave held are within 5 %, first tokens of unseen prompts within 5 %."""
    for features in ((1, 400, 0, 0, 1), (3, 900, 0, 0, 3), (6, 1200, 0, 0, 6), (8, 1500, 0, 0, 8)):
        assert latency.step_s(profile, features) == pytest.approx(latency.step_s(truth(), features), rel=0.05)
    for tokens in (16, 120, 400):
        (record,) = seen(1, tokens, 1, np.random.default_rng(tokens), noise=0.0)
        assert outside.ttft_s(profile, tokens, 256) == pytest.approx(record.token_s[0], rel=0.05)


def test_the_overhead_of_a_request_is_told_apart_from_its_steps(profile: LatencyProfile) -> None:
    k = profile.constants
    assert k["request_overhead_s"] + k["token_overhead_s"] == pytest.approx(OVERHEAD_S, abs=1e-3)
    assert "a request costs" in (profile.note or "")
    assert profile.provenance is Provenance.CALIBRATED


def test_the_steps_of_a_long_prompt_come_from_differences(fitted: tuple[LatencyProfile, Bench]) -> None:
    pairs = {m.parameters["prefill_pairs"] for m in fitted[1].measurements if m.parameters.get("prefill_tokens") == 256.0}
    assert pairs == {256 * 128.0, 256 * (256 + 128.0), 256 * (512 + 128.0)}


def test_too_few_lengths_are_refused() -> None:
    decodes, prefills = observed(2)
    with pytest.raises(BadInput, match="fewer than two prompt lengths"):
        outside.fit(decodes, prefills[:1], layout=LAYOUT, max_step_tokens=256)


# ---------------------------------------------------------------- a real server


@pytest.fixture(scope="module")
def server() -> Iterator[serve.ServerProcess]:
    with serve.start(serve.Options(model="nano", port=0, max_batch=4, queue_limit=1, max_context=256)) as running:
        yield running


@pytest.fixture
def sender(server: serve.ServerProcess) -> Iterator[waves.Sender]:
    found = target.probe(server.url, endpoint="completions", model=None, api_key=None, timeout_s=30, seed=1)
    opened = waves.Sender(found, is_chat=False, api_key=None, seed=2)
    yield opened
    opened.close()


@pytest.mark.e2e
def test_a_wave_comes_back_whole_with_the_servers_own_counts(sender: waves.Sender) -> None:
    for _ in range(2):  # over the same connections
        records = sender.send(Wave(requests=3, prompt_tokens=20, output_tokens=7), timeout_s=60)
        assert [(r.outcome, r.prompt_tokens, r.output_tokens, len(r.token_s)) for r in records] == [("ok", 20, 7, 7)] * 3
        assert all(r.sent_s is not None and r.sent_s <= r.token_s[0] <= r.token_s[-1] <= (r.done_s or 0.0) for r in records)


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["completions", "chat"])
@pytest.mark.parametrize("streams", [True, False])
def test_every_way_to_ask_our_own_server_says_the_same(server: serve.ServerProcess, kind: str, streams: bool) -> None:
    """Found by itself (completions) or by name, streamed or whole: so many prompt tokens, so many output tokens, by its own count."""
    named = "auto" if kind == "completions" else kind
    found = target.probe(server.url, endpoint=named, model=None, api_key=None, timeout_s=30, seed=1, form=Form(streams=streams))
    assert (found.endpoint.name, found.endpoint.streams, found.model) == (kind, streams, "nano")
    endpoint = endpoints.make(found.endpoint)
    text = "a" * found.chars(40)
    with contextlib.closing(http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)) as connection:
        body = endpoint.body(endpoints.Ask(text=text, output_tokens=5))
        connection.request("POST", found.path, body, {"Content-Type": "application/json"})
        response = wire.Response()
        came = connection.getresponse()
        response.status, response.headers = came.status, {k.lower(): v for k, v in came.getheaders()}
        response.pieces = [(float(i), data) for i, data in enumerate(iter(lambda: came.read1(65536), b""))]
    said = endpoint.read(response)
    assert (said.prompt_tokens, said.output_tokens, said.token_source, said.is_whole) == (40, 5, "usage", True)
    assert sum(said.tokens_per_event) == 5
    assert len(said.token_s) == (5 if streams else 1)


@pytest.mark.e2e
def test_requests_turned_away_and_refused_say_so(sender: waves.Sender) -> None:
    """Four seats and one place to wait: of twelve at once some are turned away; a prompt beyond the context is refused."""
    outcomes = {r.outcome for r in sender.send(Wave(requests=12, prompt_tokens=16, output_tokens=64), timeout_s=60)}
    assert outcomes == {"ok", "rejected"}
    (refused,) = sender.send(Wave(requests=1, prompt_tokens=250, output_tokens=64), timeout_s=60)
    assert (refused.outcome, refused.http_status) == ("bad_response", 400)


@pytest.mark.e2e
def test_a_wave_ends_in_time_and_leaves_the_sender_fit_for_the_next(sender: waves.Sender) -> None:
    (late,) = sender.send(Wave(requests=1, prompt_tokens=16, output_tokens=200), timeout_s=0.02)
    assert late.outcome == "timeout"
    (next_one,) = sender.send(Wave(requests=1, prompt_tokens=16, output_tokens=2), timeout_s=60)
    assert next_one.outcome == "ok"


@pytest.mark.measures
def test_a_probe_of_a_live_server_gives_a_profile_of_its_own_layout(server: serve.ServerProcess) -> None:
    found = probe.probe(probe.Options(url=server.url, concurrency=2, longest_tokens=64, budget_s=120.0, most_rounds=1), quiet=True)
    assert found.profile.layout == Layout(**{**server.health()["layout"], "pinned_cores": (0,)})
    assert found.profile.constants["max_batch"] == 4
    assert found.profile.constants["request_overhead_s"] >= 0
    assert found.outcomes == {"ok": found.requests}
    assert max(r.features[0] for r in found.residuals) == 2  # never more than it was allowed
    assert latency.check(found.profile) is found.profile


def test_ctrl_c_ends_the_measuring_and_says_what_is_missing(server: serve.ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in its sixth wave a probe has too little for a profile; it says so, and leaves no task behind."""
    real, calls = waves.Sender.send, []

    def interrupted(self: waves.Sender, wave: Wave, *, timeout_s: float) -> tuple[RequestRecord, ...]:
        calls.append(wave)
        if len(calls) < 6:
            return real(self, wave, timeout_s=timeout_s)
        threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
        return real(self, Wave(requests=2, prompt_tokens=8, output_tokens=240), timeout_s=timeout_s)

    monkeypatch.setattr(waves.Sender, "send", interrupted)
    with pytest.raises(MeasurementFailed, match=r"stopped by hand .* too early for a profile: .*(larger --budget|too few)"):
        probe.probe(probe.Options(url=server.url, concurrency=2, budget_s=60.0), quiet=True)
    assert len(calls) == 6


@pytest.mark.measures
@pytest.mark.parametrize(
    ("end", "says", "status"),
    [(KeyboardInterrupt(), "stopped by hand after ", 130), (MeasurementFailed("no connection"), "the server was gone after ", 3)],
)
def test_what_half_a_probe_measured_is_fitted_and_said_to_be_half(
    server: serve.ServerProcess, monkeypatch: pytest.MonkeyPatch, end: BaseException, says: str, status: int
) -> None:
    whole = probe._Run._round

    def ending(self: probe._Run) -> Iterator[Wave]:
        if self._rounds:
            raise end
        return whole(self)

    monkeypatch.setattr(probe._Run, "_round", ending)
    found = probe.probe(probe.Options(url=server.url, concurrency=2, longest_tokens=64, budget_s=120.0), quiet=True)
    assert (found.rounds, found.exit_status) == (1, status)
    assert says in found.profile.note


@pytest.mark.parametrize(
    ("changed", "message"), [({"budget_s": 601.0}, "at most 10 minutes"), ({"concurrency": 1}, "batches of at least two sizes")]
)
def test_a_probe_that_makes_no_sense_is_refused(changed: dict[str, float], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        probe.probe(dataclasses.replace(probe.Options(url="http://127.0.0.1:9"), **changed))  # type: ignore[arg-type]
