"""Choose tokens from logits: greedy, or by temperature and nucleus, each request with its own random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlsys_bench.errors import BadInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How a request wants its tokens chosen.  Its generator advances by one draw per token, whatever else is in the batch."""

    temperature: float
    top_p: float
    generator: torch.Generator | None  # None when greedy


def choice(*, temperature: float, top_p: float, seed: int) -> Choice:
    """Return a checked choice.  Raises BadInput."""
    if not 0.0 <= temperature < float("inf"):
        raise BadInput(f"temperature is {temperature}: it is 0 (greedy) or a positive number")
    if not 0.0 < top_p <= 1.0:
        raise BadInput(f"top_p is {top_p}: it is a share above 0 and at most 1")
    generator = torch.Generator().manual_seed(seed % 2**63) if temperature else None
    return Choice(temperature=temperature, top_p=top_p, generator=generator)


def sample(logits: Tensor, choices: Sequence[Choice]) -> list[int]:
    """Return one token per row.  logits: [S, vocab], fp32."""
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    drawn = [i for i, c in enumerate(choices) if c.generator is not None]
    if drawn:
        picked = _draw(logits[drawn], [choices[i] for i in drawn])
        for i, token in zip(drawn, picked, strict=True):
            tokens[i] = token
    return tokens


def _draw(logits: Tensor, choices: Sequence[Choice]) -> list[int]:
    """Draw from the smallest set of tokens whose probability reaches top_p, by inverting its distribution function."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    p = (logits.double() / column([c.temperature for c in choices])).softmax(dim=-1)
    p, order = p.sort(dim=-1, descending=True, stable=True)
    before = p.cumsum(dim=-1) - p
    top_p = column([c.top_p for c in choices])
    p = torch.where((before < top_p) | (top_p == 1.0), p, 0.0)
    p[:, 0].clamp_(min=torch.finfo(p.dtype).tiny)  # the best token always stays
    below = p.cumsum(dim=-1)
    u = column([float(torch.rand((), generator=c.generator, dtype=torch.float64)) for c in choices])
    last = (p > 0).sum(dim=-1, keepdim=True) - 1
    place = torch.searchsorted(below, u * below[:, -1:], right=True).minimum(last)
    picked: list[int] = order.gather(1, place)[:, 0].tolist()
    return picked
