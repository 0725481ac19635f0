"""`mlsys fit --probe URL`: measure a live server from outside and fit a step profile to what was seen.

A round sends every cell of the grid once, in a new order: first tokens of lone requests over prompt lengths (`max_tokens` 1), and waves of
requests over concurrency x context.  Rounds go on until the budget is spent or a person stops them; what was measured by then is fitted.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from mlsys_bench import latency, units
from mlsys_bench.errors import INTERRUPTED, BadInput, MeasurementFailed
from mlsys_bench.journeys.progress import Line
from mlsys_bench.loadtest import target as targets
from mlsys_bench.loadtest import waves
from mlsys_bench.loadtest.target import Target
from mlsys_bench.loadtest.waves import Wave
from mlsys_bench.predict import outside
from mlsys_bench.types import LatencyProfile, Layout, RequestRecord
from mlsys_bench.units import count

MOST_BUDGET_S = 600.0
_LENGTHS = 8  # prompt lengths of lone requests
_CONTEXTS = 3
_SHORTEST = 8  # prompt tokens
_LONGEST = 4096  # of a context, unless the server takes less
_PLATEAU_TOKENS = 5 * outside.BLOCK_TOKENS  # that all requests of a wave should decode together
_PATIENCE_S = 60.0  # for one wave
_SUSPECT = 3  # the exit status of a profile of half a probe


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to probe, and how hard.  Nothing beyond `concurrency` requests is ever in flight."""

    url: str
    layout: Layout | None = None  # None: as the server itself says (`mlsys serve` does)
    served_model: str | None = None  # name to ask for; None: the first of /v1/models
    endpoint: Literal["completions", "chat"] = "completions"
    concurrency: int = 16
    longest_tokens: int | None = None
    max_step_tokens: int | None = None  # step budget of the server; None: as it says, else unknown
    budget_s: float = 300.0
    pauses_s: tuple[float, ...] = (1.0, 4.0)  # before a cell that was turned away is asked for again
    most_rounds: int = 12  # more would not narrow anything
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What a probe found: the profile, every cell beside it, and how the requests fared."""

    profile: LatencyProfile
    residuals: tuple[latency.Residual, ...]
    requests: int
    outcomes: dict[str, int]
    rounds: int
    took_s: float
    exit_status: int = 0  # INTERRUPTED where a person ended the measuring, 3 where the server was gone before its end


def probe(options: Options, *, quiet: bool = False) -> Probed:
    """Measure a server within the budget and return its profile.  Ctrl-C ends the measuring, not the fit."""
    if not 0 < options.budget_s <= MOST_BUDGET_S:
        raise BadInput(f"--budget {units.show_s(options.budget_s)}: a probe takes more than nothing and at most 10 minutes")
    if options.concurrency < 2:
        raise BadInput(f"--concurrency {options.concurrency}: batches of at least two sizes are needed; give 2 or more")
    found = targets.probe(
        options.url, endpoint=options.endpoint, model=options.served_model, api_key=_api_key(), timeout_s=30.0, seed=options.seed
    )
    said = _health(found)
    layout = options.layout or _layout(said, options.url)
    run = _Run(options, found, said)
    line = Line(quiet)
    try:
        with waves.pinned():
            run.measure(line)
    finally:
        line.clear()
    return run.fitted(layout)


class _Run:
    """One probe: the grid as it turns out to be possible, and what came of it."""

    def __init__(self, options: Options, found: Target, said: dict[str, Any]) -> None:
        limits = _limits(said)
        room = min(_context(found) or math.inf, limits.get("max_context", math.inf), 8 * _LONGEST)
        self._options, self._target, self._limits = options, found, limits
        self._budget_tokens = options.max_step_tokens or limits.get("max_step_tokens")
        self._room = int(room)
        self._longest = max(_SHORTEST, min(options.longest_tokens or _LONGEST, int(0.75 * room)))
        self._most = min(options.concurrency, limits.get("max_seqs", options.concurrency))
        self._rng = random.Random(options.seed)
        self._lone: list[tuple[RequestRecord, ...]] = []
        self._decodes: list[outside.Decoding] = []
        self._outcomes: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()  # the outcomes that are no answers, with what HTTP said
        self._notes: list[str] = []
        self._cut: str | None = None  # why it ended before its time
        self._status = 0
        self._seconds_per_prompt_token, self._step_s = 1e-4, 0.02
        self._rounds, self._pauses, self._began_s = 0, 0, time.monotonic()

    @property
    def _left_s(self) -> float:
        return self._options.budget_s - (time.monotonic() - self._began_s)

    def measure(self, line: Line) -> None:
        """Send rounds until the budget is spent, a person stops it, the server is gone, or there is enough.

        Raises MeasurementFailed where the server is gone before it answered anything.
        """
        sender = waves.Sender(self._target, is_chat=self._options.endpoint == "chat", api_key=_api_key(), seed=self._options.seed ^ 0xF17)
        try:
            for tokens in (_SHORTEST, _SHORTEST, 4 * _SHORTEST):  # warm-up, left out
                if self._left_s > 0:
                    sender.send(Wave(requests=1, prompt_tokens=tokens, output_tokens=4), timeout_s=self._patience_s)
            while self._left_s > 0 and self._rounds < self._options.most_rounds:
                for wave in self._round():
                    if self._left_s <= 0:
                        return
                    line.show(f"probe round {self._rounds + 1}, {self._left_s:.0f} s left: {wave.requests} x {wave.prompt_tokens} tokens")
                    self._one(sender, wave)
                self._rounds += 1
                if not self._outcomes["ok"]:
                    return  # nor would it answer the same once more
        except KeyboardInterrupt:
            self._cut, self._status = f"stopped by hand after {units.show_s(time.monotonic() - self._began_s)}", INTERRUPTED
        except MeasurementFailed as error:
            if not self._outcomes["ok"]:
                raise
            self._cut, self._status = f"the server was gone after {units.show_s(time.monotonic() - self._began_s)}: {error}", _SUSPECT
        finally:
            sender.close()

    @property
    def _patience_s(self) -> float:
        return max(1.0, min(_PATIENCE_S, self._left_s))

    def _round(self) -> Iterator[Wave]:
        """Yield the cells of a round; lone requests first in the first, since the size of the others follows from them."""
        lone = [Wave(requests=1, prompt_tokens=n, output_tokens=1) for n in self._lengths()]
        grid = [(c, n) for c in batches(self._most) for n in self._contexts()]
        if self._rounds == 0:
            yield from lone
            grid.sort(key=lambda cell: cell[0] * cell[1])
            yield from (wave for c, n in grid if (wave := self._wave(c, n)))
            return
        mixed: list[Wave | tuple[int, int]] = [*lone, *grid]
        self._rng.shuffle(mixed)
        for cell in mixed:
            wave = cell if isinstance(cell, Wave) else self._wave(*cell)
            if wave:
                yield wave

    def _answers(self, sender: waves.Sender, wave: Wave) -> tuple[RequestRecord, ...]:
        """Send a cell and return what came; nothing where the budget cut it short, which is no failure of the server.

        One that is turned away is sent again after a pause: a limit may be on requests a minute, not on those at a time.
        """
        for pause_s in (*self._options.pauses_s, math.inf):
            allowed_s = min(_PATIENCE_S, self._left_s)
            records = sender.send(wave, timeout_s=self._patience_s)
            if allowed_s < _PATIENCE_S and any(r.outcome == "timeout" for r in records):
                return ()
            self._outcomes.update(r.outcome for r in records)
            self._failed.update(_failure(r) for r in records if r.outcome != "ok")
            is_turned_away = any(r.outcome == "rejected" for r in records)
            if not is_turned_away or not self._outcomes["ok"] or pause_s >= self._left_s:
                break
            self._pauses += 1
            time.sleep(pause_s)
        return records

    def _one(self, sender: waves.Sender, wave: Wave) -> None:
        records = self._answers(sender, wave)
        if not records:
            return
        statuses = {r.http_status for r in records if r.outcome == "rejected"}
        if statuses and wave.requests > 1:
            self._most = min(self._most, wave.requests - 1)
            self._notes.append(f"{wave.requests} requests at a time are turned away (HTTP {statuses.pop()}): not asked again")
        if any(r.http_status == 400 for r in records) and wave.prompt_tokens > _SHORTEST:
            self._longest = max(_SHORTEST, min(self._longest, wave.prompt_tokens - 1))
            self._notes.append(f"prompts of {wave.prompt_tokens} tokens are refused (HTTP 400): not asked again")
        if any(r.outcome != "ok" for r in records):
            return
        if wave.output_tokens == 1:
            self._lone.append(records)
            self._learn_prefill(records[0])
            return
        seen = outside.decoding(records)
        if seen is not None and not min(seen.step_s) > 0:
            self._notes.append("tokens of whole blocks came at one moment, as through a proxy that gathers them: left out")
        elif seen is not None:
            self._decodes.append(seen)
            self._step_s = min(seen.step_s)
        elif wave.requests > 1 and _took_turns(records):
            self._most = min(self._most, wave.requests - 1)
            self._notes.append(f"{wave.requests} requests never decoded together: the server runs fewer at a time")

    def _learn_prefill(self, record: RequestRecord) -> None:
        if record.prompt_tokens and record.prompt_tokens >= self._longest // 2 and record.sent_s is not None:
            self._seconds_per_prompt_token = (record.token_s[0] - record.sent_s) / record.prompt_tokens

    def _wave(self, batch: int, context: int) -> Wave | None:
        """Return a wave long enough that all of it decodes together for a while, or None where the server has no room for that."""
        if batch > self._most or context > self._longest:
            return None
        stagger = batch * context * self._seconds_per_prompt_token / self._step_s if batch > 1 else 0.0
        tokens = _PLATEAU_TOKENS + math.ceil(1.2 * stagger)
        tokens = min(tokens, self._room - context)
        expected_s = tokens * self._step_s
        return Wave(requests=batch, prompt_tokens=context, output_tokens=tokens) if expected_s < min(_PATIENCE_S, self._left_s) else None

    def _contexts(self) -> list[int]:
        low, high = 4 * _SHORTEST, max(self._longest, 5 * _SHORTEST)
        return sorted({round(low * (high / low) ** (i / (_CONTEXTS - 1))) for i in range(_CONTEXTS)})

    def _lengths(self) -> list[int]:
        """Return the prompt lengths of lone requests: within one step, and whole steps beyond, whose differences are steps too."""
        budget = self._budget_tokens
        high = min(self._longest, budget or self._longest)
        found = {round(_SHORTEST * (high / _SHORTEST) ** (i / (_LENGTHS - 1))) for i in range(_LENGTHS)}
        return sorted(found | ({budget * k for k in range(1, 5) if budget * k <= self._longest} if budget else set()))

    def fitted(self, layout: Layout) -> Probed:
        """Return the profile of what was measured.  Raises MeasurementFailed where nothing was answered."""
        if not self._outcomes["ok"]:
            budget_s = self._options.budget_s
            counts = self._cut or _counts(self._failed) or f"nothing came within --budget {units.show_s(budget_s)}"
            now = "does the server answer other requests?"
            if not (self._cut or self._failed) and budget_s < _PATIENCE_S:
                now = "give it minutes: a probe measures many cells"
            raise MeasurementFailed(f"{self._options.url}: the probe got no answer to fit: {counts}; {now}")
        self._check_told()
        took_s = time.monotonic() - self._began_s
        notes = [self._cut] if self._cut else []
        notes += [
            f"{count(sum(self._outcomes.values()), 'request')} in {units.show_s(took_s)}",
            *dict.fromkeys(self._notes),
            *self._target.notes,
        ]
        notes += [f"turned away and asked again after a pause {count(self._pauses, 'time')}"] if self._pauses else []
        notes += [f"failed: {_counts(self._failed)}"] if self._failed else []
        notes += [] if self._budget_tokens else ["step budget not known: every prompt was taken to be one step (--max-step-tokens)"]
        try:
            profile, seen = outside.fit(
                self._decodes,
                outside.prefilling(self._lone),
                layout=layout,
                max_step_tokens=self._budget_tokens,
                limits=self._served_limits(),
                notes=notes,
            )
        except BadInput as error:
            if self._cut is None and not self._failed:
                raise
            why = f"{self._cut}; too early for a profile" if self._cut else f"{_counts(self._failed)}; too little is left for a profile"
            raise MeasurementFailed(f"{self._options.url}: {why}: {error}") from error
        return Probed(
            profile=profile,
            residuals=latency.residuals(profile, seen),
            requests=sum(self._outcomes.values()),
            outcomes=dict(self._outcomes),
            rounds=self._rounds,
            took_s=took_s,
            exit_status=self._status,
        )

    def _check_told(self) -> None:
        """Raise MeasurementFailed where the answers came and do not tell what a profile is made of."""
        if self._cut:
            return
        if self._lone and not any(record.prompt_tokens for records in self._lone for record in records):
            raise MeasurementFailed(
                f"{self._options.url}: its streams count no prompt tokens (stream_options.include_usage gives no `usage`): "
                "how long the prompts were is not known; let it count them, or fit a load test instead"
            )
        if not self._decodes:
            why = "; ".join([*dict.fromkeys(self._notes), *([_counts(self._failed)] if self._failed else [])]) or "its answers end early"
            raise MeasurementFailed(f"{self._options.url}: no request decoded long enough to time a step: {why}")

    def _served_limits(self) -> dict[str, float]:
        limits = self._limits
        if not limits:
            return {"max_step_tokens": float(self._budget_tokens)} if self._budget_tokens else {}
        found = {"max_batch": limits["max_seqs"]} if "max_seqs" in limits else {}
        found |= {"kv_tokens": limits["blocks"] * limits["block_tokens"]} if {"blocks", "block_tokens"} <= limits.keys() else {}
        found |= {n: limits[n] for n in ("max_step_tokens", "block_tokens", "max_context") if n in limits}
        return {k: float(v) for k, v in found.items()}


def batches(most: int) -> list[int]:
    """Return batch sizes up to the most: powers of two, and the middle of each two, since kernels change somewhere between."""
    powers = [2**i for i in range(int(math.log2(most)) + 1)]
    return sorted({*powers, *(3 * p // 2 for p in powers[1:] if 3 * p // 2 < most), most})


def _took_turns(records: tuple[RequestRecord, ...]) -> bool:
    """Say whether one request began to decode only after another had ended."""
    return max(r.token_s[0] for r in records) > min(r.token_s[-1] for r in records)


def _failure(record: RequestRecord) -> str:
    return f"{record.outcome} (HTTP {record.http_status})" if record.http_status not in (None, 200) else record.outcome


def _counts(failed: Counter[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(failed.items()))


def _limits(said: dict[str, Any]) -> dict[str, int]:
    """Return the limits a server declares, without what cannot be one."""
    limits = said.get("limits")
    found = limits if isinstance(limits, dict) else {}
    return {k: v for k, v in found.items() if isinstance(v, int) and not isinstance(v, bool) and v >= 1}


def _api_key() -> str | None:
    return os.environ.get("OPENAI_API_KEY") or None


def _layout(said: dict[str, Any], url: str) -> Layout:
    """Return the layout a server of ours declares.  Raises BadInput for one that does not."""
    import msgspec

    if not isinstance(said.get("layout"), dict):
        raise BadInput(f"{url}: does not say what it runs on; give --model NAME and --gpu NAME (and --tp, --precision where they differ)")
    try:
        return msgspec.convert(said["layout"], Layout)
    except msgspec.ValidationError as error:
        raise BadInput(f"{url}: what it says it runs on cannot be read ({error}); give --model NAME and --gpu NAME") from error


def _health(found: Target) -> dict[str, Any]:
    """Return what `GET /health` says in JSON; nothing for the servers that answer it with an empty page."""
    return _get(found, "/health")


def _context(found: Target) -> int | None:
    """Return the longest prompt plus answer that `GET /v1/models` gives for the model, as vLLM, SGLang and ours do."""
    base = found.path.removesuffix("/chat/completions").removesuffix("/completions")
    cards = _get(found, f"{base}/models").get("data") or []
    lengths = [card.get("max_model_len") for card in cards if isinstance(card, dict) and card.get("id") == found.model]
    return int(lengths[0]) if lengths and isinstance(lengths[0], int) and lengths[0] >= 1 else None


def _get(found: Target, path: str) -> dict[str, Any]:
    kind = http.client.HTTPSConnection if found.scheme == "https" else http.client.HTTPConnection
    connection = kind(found.host, found.port, timeout=10)
    key = _api_key()
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
        document = json.loads(connection.getresponse().read() or b"{}")
    except (OSError, http.client.HTTPException, ValueError, RecursionError):
        return {}  # a courtesy of the server, not needed
    finally:
        connection.close()
    return document if isinstance(document, dict) else {}
