"""What a first token waits for beside the steps that a scheduler makes of its request, from the constants of a profile.

    request_overhead_s   per request, on its way to the engine: HTTP, its place in a queue of the host
    prompt_token_s       per prompt token: the body of the request, the tokenizer
    token_overhead_s     per token, on its way back
    planned_steps        steps that are planned already when a request finds the engine busy: an engine that schedules ahead of its device
                         puts it into none of them.  The rest of the step in progress is not among them: queues give it by themselves

`*_log_sd` beside each is the sd of its logarithm.  Profiles measured on a server hold what was seen of these, others what was learned on
other hardware (`rooflines`); where nothing is known of one it is 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from mlsys_bench.latency import coefficients
from mlsys_bench.types import LatencyProfile

Array = npt.NDArray[np.float64]
THERE, PROMPT, BACK, PLANNED = "request_overhead_s", "prompt_token_s", "token_overhead_s", "planned_steps"
_SD = "_log_sd"
_REST = 0.5  # of the learned `wait_steps`: the mean rest of a step in progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Seconds there per request, per prompt token, back per token; steps planned ahead; and the sd of the logarithm of each."""

    there_s: float
    prompt_token_s: float
    back_s: float
    planned_steps: float
    log_sd: tuple[float, float, float, float]  # in this order

    @overload
    def seconds(self, prompt_tokens: float) -> float: ...
    @overload
    def seconds(self, prompt_tokens: npt.NDArray[Any]) -> Array: ...
    def seconds(self, prompt_tokens: Any) -> Any:
        """Return the time outside the engine of requests with so many prompt tokens."""
        return self.there_s + self.back_s + self.prompt_token_s * prompt_tokens

    def spread_s(self, prompt_tokens: float, step_s: float) -> float:
        """Return the sd of the whole of a request's overhead, a step taking so long."""
        parts = self.there_s, self.prompt_token_s * prompt_tokens, self.back_s, self.planned_steps * step_s
        return math.hypot(*(part * sd for part, sd in zip(parts, self.log_sd, strict=True)))


def overhead(profile: LatencyProfile) -> Overhead:
    """Return what a profile says of a request's time beside its own steps."""
    k = profile.constants
    there_s, prompt_token_s, back_s, planned = (k.get(name, 0.0) for name in (THERE, PROMPT, BACK, PLANNED))
    sds = tuple(k.get(name + _SD, 0.0) for name in (THERE, PROMPT, BACK, PLANNED))
    return Overhead(there_s=there_s, prompt_token_s=prompt_token_s, back_s=back_s, planned_steps=planned, log_sd=sds)  # type: ignore[arg-type]


def engine_only(profile: LatencyProfile) -> LatencyProfile:
    """Return the profile of the steps alone, nothing being outside."""
    outside = {name + end for name in (THERE, PROMPT, BACK, PLANNED) for end in ("", _SD)}
    return dataclasses.replace(profile, constants={name: value for name, value in profile.constants.items() if name not in outside})


def constants(logs: Array, log_sd: Sequence[float] | Array) -> dict[str, float]:
    """Return the constants that log-coefficients of open loops, in the order of `coefficients.NAMES`, give a profile."""
    first, prompt, wait = (coefficients.NAMES.index(name) for name in ("first_s", "prompt_token_s", "wait_steps"))
    waited = math.exp(logs[wait])
    planned = max(waited - _REST, 0.0)
    return {
        THERE: math.exp(logs[first]),
        PROMPT: math.exp(logs[prompt]),
        PLANNED: planned,
        THERE + _SD: float(log_sd[first]),
        PROMPT + _SD: float(log_sd[prompt]),
        PLANNED + _SD: float(log_sd[wait]) * waited / planned if planned > 0 else 0.0,
    }
