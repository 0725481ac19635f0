"""Rounding a matrix so that its outputs stay close, rather than its weights: GPTQ.

Columns are rounded one after the other; what rounding one does to the outputs, on average over given inputs, is made good by changing the
columns that are not rounded yet.  With H = X^T X of the inputs X and U the upper Cholesky factor of H^-1, rounding column j with error e
changes each later column k by - e U_jk / U_jj.

Source: Frantar, Ashkboos, Hoefler and Alistarh (2023), GPTQ, ICLR, algorithm 1 and section 3.  Here the scales of all groups are fixed
beforehand, so that columns may be taken in any order: those with the largest inputs first, while most others can still make good for them
("act-order" with "static groups" in the authors' code); a group stays a group of neighbours, and nothing about the order is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from mlsys_bench.engine import formats, weights
from mlsys_bench.engine.formats import Dense, Groups4, Logical
from mlsys_bench.engine.spec import Decoder
from mlsys_bench.engine.weights import Weights

DAMPING = 0.01  # of the mean of H's diagonal, added to it: inputs that never vary have no inverse
BLOCK = 64  # columns whose errors reach those after the block in one product


def quantise(weight: Tensor, second_moments: Tensor, group: int, *, search: bool = True) -> Groups4:
    """Return a matrix in 4 bit.  weight: [N, K] fp32; second_moments: X^T X of inputs like those it will see, [K, K].

    search: scales are those of the least squared error, each input counting with its mean square, not the largest / -8.
    Without search, and where inputs are not correlated (X^T X is diagonal), this is round-to-nearest, bit for bit.
    """
    size = second_moments.diagonal()
    scale = formats.searched_scales4(weight, group, size) if search else formats.scales4(weight, group)
    order = size.argsort(descending=True, stable=True)
    step = formats.spread(scale.float(), group, weight.shape[1])[:, order]
    integers = torch.empty_like(weight, dtype=torch.int8)
    integers[:, order] = _rounded(weight[:, order], step, _factor(second_moments[order][:, order]))
    return Groups4(weight=formats.pack_nibbles(integers), scale=scale, zero=None, group=group)


def _factor(moments: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of X^T X, damped, its rows divided by their diagonal.  fp32 [K, K]"""
    h = moments.double()
    h.diagonal().add_(DAMPING * h.diagonal().mean().clamp(min=1e-12))
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    return (upper / upper.diagonal()[:, None]).float()


def _rounded(weight: Tensor, step: Tensor, factor: Tensor) -> Tensor:
    """Return integers -8 .. 7, column by column from the first.  weight, step: [N, K]"""
    left, integers = weight.clone(), torch.empty_like(weight, dtype=torch.int8)
    for first in range(0, weight.shape[1], BLOCK):
        last = min(first + BLOCK, weight.shape[1])
        errors = torch.empty_like(left[:, first:last])
        for j in range(first, last):
            integers[:, j] = formats.nearest4(left[:, j], step[:, j])
            errors[:, j - first] = left[:, j] - integers[:, j] * step[:, j]
            left[:, j + 1 : last] -= torch.outer(errors[:, j - first], factor[j, j + 1 : last])
        left[:, last:] -= errors @ factor[first:last, last:]
    return integers


# ---------------------------------------------------------------- a whole decoder


class Watched:
    """An fp32 matrix that adds up X^T X of what it is multiplied with, while `moments` is set."""

    __slots__ = ("moments", "weight")

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.moments: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T."""
        if self.moments is not None:
            self.moments.addmm_(x.t(), x)
        return functional.linear(x, self.weight)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the weight."""
        return (self.weight,)


def decoder(
    d: Decoder, tensors: Mapping[str, Tensor], run: Callable[[Weights], None], *, group: int, search: bool = True
) -> dict[str, Logical]:
    """Return all matrices of a dense decoder in 4 bit, by the names that `weights.build` gives them.

    run: sends the calibration text through a model with these weights.  Layer by layer: those before it are rounded already when a layer's
    inputs are taken, so that it makes good for them, too.
    """
    watched: dict[str, Watched] = {}

    def watch(name: str, weight: Tensor) -> Logical:
        watched[name] = Watched(weight)
        return Dense(weight=weight)

    def last_watched(_: Logical) -> Watched:
        return next(reversed(watched.values()))

    held = weights.from_state_dict(d, tensors, precision="fp32", device=torch.device("cpu"), pack=last_watched, quantise=watch)
    found: dict[str, Logical] = {}
    for names in _stages(list(watched)):
        for name in names:
            watched[name].moments = torch.zeros(watched[name].weight.shape[1], watched[name].weight.shape[1])
        run(held)
        for name in names:
            at = watched[name]
            moments, at.moments = at.moments, None
            assert moments is not None, "set above"
            found[name] = quantise(at.weight, moments, group, search=search)
            at.weight = found[name].dequantise()
    return found


def _stages(names: list[str]) -> list[list[str]]:
    """Return names layer by layer, in the order of computing; the head last."""
    layers: dict[str, list[str]] = {}
    for name in names:
        if name.startswith("model.layers."):
            layers.setdefault(name.split(".")[2], []).append(name)
    return [*layers.values(), [name for name in names if not name.startswith("model.layers.")]]
