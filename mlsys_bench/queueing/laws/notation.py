"""Laws by name: `logn:4`, `erl:3`, `mix:0.9:1:10` …"""

from __future__ import annotations

from collections.abc import Callable

from mlsys_bench.errors import BadInput
from mlsys_bench.queueing.laws.base import Law
from mlsys_bench.queueing.laws.curves import BoundedPareto, Erlang, Gamma, Lognormal, Uniform
from mlsys_bench.queueing.laws.phases import Exponential, Hyperexponential, balanced, marie
from mlsys_bench.queueing.laws.points import Deterministic, TwoPoint


def parse_law(text: str, mean_s: float = 1.0) -> Law:
    """Return the law a name stands for, with this mean; `bp:alpha:low:high` has the mean its ends give.

    `exp`, `det`, `unif`, `erl:k` (or `erlk`), `gamma:v`, `logn:v`, `h2:v`, `cox2:v`, `mix:p:a:b`, `hyper:p1:m1:p2:m2…`.
    """
    kind, *parts = text.strip().lower().split(":")
    if kind.startswith("erl") and kind[3:].isdecimal():
        kind, parts = "erl", [kind[3:], *parts]
    try:
        numbers = [float(part) for part in parts]
    except ValueError as error:
        raise BadInput(f"law {text!r}: {error}; write for example gamma:2.5") from error
    if kind not in _KINDS:
        raise BadInput(f"law {text!r}: unknown kind; known: {', '.join(sorted(_KINDS))}")
    count, build = _KINDS[kind]
    if len(numbers) != count and not (kind == "hyper" and len(numbers) >= 2 and len(numbers) % 2 == 0):
        raise BadInput(f"law {text!r}: {kind} takes {count} number(s) after colons, not {len(numbers)}")
    return build(mean_s, *numbers)


_KINDS: dict[str, tuple[int, Callable[..., Law]]] = {
    "exp": (0, lambda m: Exponential(m)),
    "det": (0, lambda m: Deterministic(m)),
    "unif": (0, lambda m: Uniform(0.0, 2 * m)),
    "erl": (1, lambda m, k: Erlang(k, m)),
    "gamma": (1, lambda m, v: Gamma(v, m)),
    "logn": (1, lambda m, v: Lognormal(v, m)),
    "h2": (1, lambda m, v: balanced(v, m)),
    "cox2": (1, lambda m, v: marie(v, m)),
    "mix": (3, lambda m, p, a, b: TwoPoint(p, a, b).scaled(m)),
    "bp": (3, lambda m, alpha, low, high: BoundedPareto(alpha, low, high)),
    "hyper": (4, lambda m, *numbers: Hyperexponential(numbers[::2], numbers[1::2]).scaled(m)),
}
