"""What Prometheus reads: metrics named after those of vLLM, with the prefix `mlsys_`, in a registry of their own."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlsys_bench.serve import wire

_STEP_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_LATENCY_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_COMPLETIONS_KEPT = 64
_RETRY_S = (1, 60)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("mlsys_requests", "Requests by what became of them", ["outcome"], registry=r)
        for outcome in ("ok", "bad_request", "rejected", "cancelled", "error"):
            self.requests.labels(outcome)  # a counter that has not counted yet reads 0
        self.received = Counter("mlsys_requests_received", "Well-formed requests that came, also those turned away", registry=r)
        self.running = Gauge("mlsys_running", "Sequences that have a seat in the batch", registry=r)
        self.waiting = Gauge("mlsys_waiting", "Requests that wait for a seat", registry=r)
        self.free_blocks = Gauge("mlsys_kv_blocks_free", "KV blocks nobody holds", registry=r)
        self.blocks = Gauge("mlsys_kv_blocks", "KV blocks in all", registry=r)
        self.prompt_tokens = Counter("mlsys_prompt_tokens", "Prompt tokens of requests taken", registry=r)
        self.generated = Counter("mlsys_generation_tokens", "Tokens generated", registry=r)
        self.prompt = Histogram("mlsys_request_prompt_tokens", "Prompt tokens of a request", buckets=_TOKENS, registry=r)
        self.output = Histogram("mlsys_request_generation_tokens", "Tokens generated for a request", buckets=_TOKENS, registry=r)
        self.preempted = Counter("mlsys_preemptions", "Sequences that lost their seat and go on later", registry=r)
        self.queries = Counter("mlsys_prefix_cache_queries", "Tokens looked for in the prefix cache", registry=r)
        self.hits = Counter("mlsys_prefix_cache_hits", "Tokens found there", registry=r)
        self.drafted = Counter("mlsys_spec_decode_num_draft_tokens", "Tokens guessed", registry=r)
        self.accepted = Counter("mlsys_spec_decode_num_accepted_tokens", "Tokens guessed that were right", registry=r)
        self.ttft = Histogram("mlsys_ttft_seconds", "From the request's arrival to its first token", buckets=_LATENCY_S, registry=r)
        self.tpot = Histogram("mlsys_tpot_seconds", "Mean time per token after the first", buckets=_STEP_S, registry=r)
        self.e2e = Histogram("mlsys_e2e_seconds", "From the request's arrival to its last token", buckets=_LATENCY_S, registry=r)
        self.step = Histogram("mlsys_step_seconds", "Engine steps", buckets=_STEP_S, registry=r)
        self._completed_s: deque[float] = deque(maxlen=_COMPLETIONS_KEPT)

    def on_step(self, event: wire.Stepped) -> None:
        """Count one engine step."""
        self.running.set(event.running)
        self.waiting.set(event.waiting)
        self.free_blocks.set(event.free_blocks)
        if event.step_s is not None:
            self.step.observe(event.step_s)
            self.generated.inc(len(event.tokens))
            self.preempted.inc(event.preempted)
            self.queries.inc(event.prefix_queries)
            self.hits.inc(event.prefix_hits)
            self.drafted.inc(event.drafted)
            self.accepted.inc(event.accepted)

    def on_end(self, outcome: str, *, arrived_s: float, token_s: Sequence[Sequence[float]], prompt_tokens: int) -> None:
        """Count one request, by when the tokens of each of its choices came.  Only one that ran to its end counts in the histograms."""
        self.requests.labels(outcome).inc()
        if outcome != "ok":
            return
        first_s, last_s = min(times[0] for times in token_s), max(times[-1] for times in token_s)
        self._completed_s.append(last_s)
        self.ttft.observe(first_s - arrived_s)
        self.e2e.observe(last_s - arrived_s)
        self.prompt.observe(prompt_tokens)
        self.output.observe(sum(len(times) for times in token_s))
        for times in token_s:
            if len(times) > 1:
                self.tpot.observe((times[-1] - times[0]) / (len(times) - 1))

    def on_embedded(self, *, arrived_s: float, prompt_tokens: int) -> None:
        """Count a request for vectors."""
        now_s = time.perf_counter()
        self.requests.labels("ok").inc()
        self._completed_s.append(now_s)
        self.e2e.observe(now_s - arrived_s)
        self.prompt.observe(prompt_tokens)

    def retry_after_s(self, waiting: int, now_s: float | None = None) -> int:
        """Return when to come back, in whole seconds: the queue's length over the rate at which requests completed lately."""
        done = self._completed_s
        low, high = _RETRY_S
        if not done:
            return low
        now = time.perf_counter() if now_s is None else now_s
        rate_per_s = len(done) / max(now - done[0], 1e-3)
        return min(max(-int(-waiting // rate_per_s), low), high)

    def text(self) -> bytes:
        """Return the page that Prometheus scrapes."""
        return generate_latest(self.registry)
