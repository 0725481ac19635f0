"""`fit --probe` sees the engine: its step times and first tokens, held against `mlsys serve`'s own clock.  `nox -s bench -- probe`.

The server's histogram of step times is read around waves that the probe does not send: other contexts, long answers, so that hardly a step
is anything but decode.  First tokens are those of prompt lengths it does not send.  Both are measured before the probe and after it.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import re
import statistics
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

from mlsys_bench import latency, serve
from mlsys_bench.journeys import probe
from mlsys_bench.loadtest import target, waves
from mlsys_bench.predict import outside
from mlsys_bench.types import LatencyProfile

TPOT_BAR, TTFT_BAR = 0.05, 0.10
WAVES = ((1, 40), (1, 600), (3, 100), (6, 24), (8, 48))  # requests, prompt tokens
ANSWER_TOKENS = 160
PROMPTS = (20, 110, 200, 330, 640)
REPEATS = 3  # before the probe, and after it


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the proof sees by itself: mean steps of waves by the engine's clock, and first tokens of lone prompts."""

    steps: dict[tuple[int, int], list[tuple[float, float]]]  # by requests and prompt tokens: number of steps, seconds of each
    ttft_s: dict[int, list[float]]  # by prompt tokens


def main() -> int:
    """Probe a server, measure before and after it what it does not see; print every figure beside its bar; return how many missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds for the probe")
    parser.add_argument("--model", default="nano")
    asked = parser.parse_args()
    with serve.start(serve.Options(model=asked.model, port=0)) as server:
        before = _see(server.url, seed=77)
        found = probe.probe(probe.Options(url=server.url, budget_s=asked.budget))
        print(f"probe: {found.rounds} rounds, {found.requests} requests in {found.took_s:.0f} s; {found.profile.note}\n")
        after = _see(server.url, seed=79)
    return _steps(found.profile, before, after) + _first_tokens(found.profile, before, after)


def _see(url: str, seed: int) -> Seen:
    """Send every wave and every prompt a few times."""
    found = target.probe(url, endpoint="completions", model=None, api_key=None, timeout_s=10, seed=seed)
    sender, seen = waves.Sender(found, is_chat=False, api_key=None, seed=seed + 1), Seen(steps={}, ttft_s={})
    with waves.pinned():
        for _ in range(REPEATS):
            for requests, prompt in WAVES:
                seen.steps.setdefault((requests, prompt), []).append(_wave(sender, url, requests, prompt))
            for prompt in PROMPTS:
                (record,) = sender.send(waves.Wave(requests=1, prompt_tokens=prompt, output_tokens=1), timeout_s=60)
                assert record.prompt_tokens == prompt
                seen.ttft_s.setdefault(prompt, []).append(record.token_s[0] - (record.sent_s or 0.0))
    sender.close()
    return seen


def _wave(sender: waves.Sender, url: str, requests: int, prompt: int) -> tuple[float, float]:
    """Return the number of the engine's steps in a wave, and the mean time of one."""
    before_s, before = _clock(url)
    records = sender.send(waves.Wave(requests=requests, prompt_tokens=prompt, output_tokens=ANSWER_TOKENS), timeout_s=120)
    after_s, after = _clock(url)
    assert all(r.outcome == "ok" for r in records)
    return after - before, (after_s - before_s) / (after - before)


def _steps(profile: LatencyProfile, before: Seen, after: Seen) -> int:
    """Print the mean step of each wave, measured beside predicted; return whether TPOT misses its bar."""
    errors = []
    print(f"{'mean step of a wave':28} {'engine':>10} {'predicted':>10} {'error':>8} {'bar':>6}")
    for requests, prompt in WAVES:
        sides = [seen.steps[requests, prompt] for seen in (before, after)]
        measured_s = _middle([[step_s for _, step_s in side] for side in sides])
        predicted_s = _middle([[_predicted_s(profile, requests, prompt, steps) for steps, _ in side] for side in sides])
        errors.append(predicted_s / measured_s - 1)
        cell = f"{requests} x {prompt} + {ANSWER_TOKENS} tokens"
        print(f"{cell:28} {1e3 * measured_s:7.3f} ms {1e3 * predicted_s:7.3f} ms {errors[-1]:+8.1%}")
    return _kept("TPOT against the step clock", errors, TPOT_BAR)


def _first_tokens(profile: LatencyProfile, before: Seen, after: Seen) -> int:
    """Print first tokens of lone prompts, measured beside predicted; return whether TTFT misses its bar."""
    errors = []
    print(f"{'first token of a prompt':28} {'measured':>10} {'predicted':>10} {'error':>8} {'bar':>6}")
    for prompt in before.ttft_s:
        measured_s = _middle([before.ttft_s[prompt], after.ttft_s[prompt]])
        predicted_s = outside.ttft_s(profile, prompt, 256)
        errors.append(predicted_s / measured_s - 1)
        print(f"{f'{prompt} tokens':28} {1e3 * measured_s:7.2f} ms {1e3 * predicted_s:7.2f} ms {errors[-1]:+8.1%}")
    return _kept("TTFT at idle", errors, TTFT_BAR)


def _middle(sides: Sequence[Sequence[float]]) -> float:
    """Return the geometric mean of the medians before and after the probe: a machine that drifts was in between while it was probed."""
    return statistics.geometric_mean(statistics.median(side) for side in sides)


def _kept(name: str, errors: Sequence[float], bar: float) -> int:
    middle = statistics.median(map(abs, errors))
    print(f"{name:28} {'':10} {'median':>10} {middle:8.1%} {bar:6.0%}\n")
    return int(middle > bar)


def _predicted_s(profile: LatencyProfile, requests: int, prompt: int, steps: float) -> float:
    """Return the mean step of a wave: its prompts in as few steps as they fit, the rest decodes at growing context."""
    prefill_s = outside.ttft_s(profile, requests * prompt, 256) - outside.ttft_s(profile, 0)
    decode_s = sum(latency.step_s(profile, (requests, requests * (prompt + i), 0.0, 0.0, requests)) for i in range(1, ANSWER_TOKENS))
    prefills = -(-requests * prompt // 256)
    return (prefill_s + decode_s * (steps - prefills) / (ANSWER_TOKENS - 1)) / steps


def _clock(url: str) -> tuple[float, float]:
    """Return the seconds and the number of the engine's steps so far."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()
    found = [re.search(rf"^mlsys_step_seconds_{name} (\S+)$", page, re.MULTILINE) for name in ("sum", "count")]
    total_s, steps = (float(m[1]) for m in found if m)
    return total_s, steps


if __name__ == "__main__":
    sys.exit(main())
