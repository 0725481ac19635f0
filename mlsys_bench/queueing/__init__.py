"""Queueing theory as pure functions: each formula with its source and where it holds.

`mmc.mmc` is one queue before c equal servers; `Batching` is one replica that serves a batch whose speed depends on its size.
"""

from mlsys_bench.queueing.chain import Batching
from mlsys_bench.queueing.mmc import erlang_b, erlang_c, servers_for

__all__ = ["Batching", "erlang_b", "erlang_c", "servers_for"]
