"""How long one engine step takes: a profile of few positive coefficients, from physics or from measurements.

The features of a step, always in this order, as `batching.StepFeatures` holds them (`FEATURES`):

    decode_seqs D, decode_kv_tokens K, prefill_tokens P, prefill_pairs Q = sum of chunk (past + chunk / 2), sampled_tokens S

With n = D + P tokens in the step,

    step_s = step_s + sequence_s S                                                host: per step, per sampled sequence
           + roof(weights W(n) / bandwidth + pack_s g(n) + pass_s h(n), linear F(n, S) / peak)  matrices and output head
           + kv K k                                                               decode attention, k seconds per cached token at best
           + attention Q a / peak                                                 prefill attention, a FLOPs per (query, key) pair
           + link_s + link n b / link_bandwidth                                   all-reduce, only with tensor parallelism

W(n) = dense + expert bytes (1 - (1 - k/E)^n): a mixture of experts reads the experts that are hit.  F = n f + S h FLOPs.
g(n) is 1 beyond `pack_tokens`, else 0: for more than a few tokens libraries change to kernels that first copy the weights (on the CPUs
measured: MKL from 4 tokens on, +40 % from one to the next; int8 weights widened from 17 on); only fitted profiles have that term.
h(n) is 1 beyond `pass_tokens`, else 0: rows that do not fit into registers at once, for which weights pass again (the built-in C kernels:
from 13 tokens on, beside a first stair from one token to two); only fitted profiles whose cells show a second stair have it.
`roof(x, y)` is max(x, y), or the smooth (x^p + y^p)^(1/p) where the constant `roof_norm` = p says so.

Coefficients (`TERMS`): `step_s`, `sequence_s`, `pack_s`, `pass_s` and `link_s` are seconds; `weights`, `linear`, `kv`, `attention` and
`link` multiply the time at full speed, so that 1 is the physics floor and 1.33 is 75 % of the bandwidth.

`roofline` builds a profile for hardware nobody measured, `fit` one from the `engine.step` cells of a bench file.
"""

from __future__ import annotations

from mlsys_bench.latency.calibrate import Residual, fit, layouts, residuals
from mlsys_bench.latency.kernel import seconds
from mlsys_bench.latency.physics import Spread, roofline, rooflines
from mlsys_bench.latency.shares import formats, kv_format, shares
from mlsys_bench.latency.step import (
    FEATURES,
    MULTIPLIERS,
    TERMS,
    Features,
    check,
    check_layout,
    clock,
    draw,
    entries,
    floor_s,
    many,
    outside,
    step_s,
    table,
    tables,
)
from mlsys_bench.latency.ways import Overhead, engine_only, overhead

__all__ = [
    "FEATURES", "MULTIPLIERS", "TERMS", "Features", "Overhead", "Residual", "Spread", "check", "check_layout", "clock", "draw",
    "engine_only", "entries", "fit", "floor_s", "formats", "kv_format", "layouts", "many", "outside", "overhead", "residuals", "roofline",
    "rooflines", "seconds", "shares", "step_s", "table", "tables",
]  # fmt: skip
