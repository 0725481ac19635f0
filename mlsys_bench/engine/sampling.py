"""What a request may ask of the choice of its tokens.  Loads no torch: servers check requests where no engine is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mlsys_bench.errors import BadInput

SEEDS = 2**64
PENALTIES = (1e-3, 1e3)  # of repetition: beyond them logits would leave fp32, and no probabilities would be left


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen.  The defaults take the likeliest token, always.  Build it with `sampling`, which checks.

    The order is that of vLLM V1 (docs.vllm.ai, `vllm.v1.sample.sampler`): bias, penalties, temperature, min-p, top-k, top-p.
    """

    temperature: float = 0.0  # 0: the likeliest; else logits are divided by it
    top_p: float = 1.0  # keep the likeliest tokens that together reach this share
    top_k: int = 0  # keep so many of the likeliest; 0: all
    min_p: float = 0.0  # keep those at least so likely as this share of the likeliest
    repetition_penalty: float = 1.0  # of prompt and answer: positive logits are divided by it, negative ones multiplied
    presence_penalty: float = 0.0  # taken from the logit of every token that is in the answer
    frequency_penalty: float = 0.0  # taken from the logit of a token as often as it is in the answer
    seed: int | None = None  # None: the engine's own, another for each request
    logprobs: int | None = None  # of the chosen token and so many of the likeliest; None: of none
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    stop: tuple[str, ...] = ()  # the answer ends when one of these is in its text
    is_plain: bool = field(init=False, repr=False, compare=False)  # the argmax of the model's own logits and nothing else is wanted

    def __post_init__(self) -> None:
        """Say once what every step asks."""
        object.__setattr__(self, "is_plain", self.temperature == 0.0 and self.logprobs is None and not self.changes_logits)

    @property
    def changes_logits(self) -> bool:
        """Whether the likeliest token may become another one."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias)

    @property
    def has_filter(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def is_nucleus(self) -> bool:
        """Whether top-p alone says which."""
        return self.top_p < 1.0 and self.top_k == 0 and self.min_p == 0.0


GREEDY = Sampling()


class Logprobs(NamedTuple):
    """Of one token, natural logarithms of the model's own probabilities: before bias, penalties and temperature, as vLLM gives them."""

    chosen: float
    top: tuple[tuple[int, float], ...]  # (token, log-probability), likeliest first


def sampling(
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int | None = None,
    logprobs: int | None = None,
    logit_bias: Mapping[int, float] | None = None,
    stop: tuple[str, ...] = (),
) -> Sampling:
    """Return checked settings.  Raises BadInput, naming the first that means nothing.  `top_k` -1 is all, as 0 is."""
    bias, (low, high) = tuple(sorted((logit_bias or {}).items())), PENALTIES
    for name, value, is_right, rule in (
        ("temperature", temperature, 0.0 <= temperature < math.inf, "is 0 (the likeliest token) or a positive number"),
        ("top_p", top_p, 0.0 < top_p <= 1.0, "is a share above 0 and at most 1"),
        ("top_k", top_k, top_k >= -1, "is a number of tokens, or 0 for all of them"),
        ("min_p", min_p, 0.0 <= min_p <= 1.0, "is a share from 0 to 1"),
        ("repetition_penalty", repetition_penalty, low <= repetition_penalty <= high, f"is a factor from {low:g} to {high:g}, 1 for none"),
        ("presence_penalty", presence_penalty, math.isfinite(presence_penalty), "is a finite number, 0 for none"),
        ("frequency_penalty", frequency_penalty, math.isfinite(frequency_penalty), "is a finite number, 0 for none"),
        ("logprobs", logprobs, logprobs is None or logprobs >= 0, "is a number of tokens, 0 for the chosen one alone"),
        ("logit_bias", dict(bias), all(t >= 0 and math.isfinite(b) for t, b in bias), "maps tokens to finite numbers"),
        ("stop", stop, "" not in stop, "is no empty string"),
    ):
        if not is_right:
            raise BadInput(f"{name} is {value!r}: it {rule}")
    return Sampling(
        temperature=temperature, top_p=top_p, top_k=max(top_k, 0), min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, seed=seed, logprobs=logprobs, logit_bias=bias, stop=stop,
    )  # fmt: skip
