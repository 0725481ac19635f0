"""Discrete-event simulation of last resort: for what has no numerics, and to confirm what has.

`recursion` simulates first come first served stations; `replicate` runs a simulator to a precision; `control` confirms a station
against one whose answer is known.  The other modules simulate what needs events; `events.simulator` finds the one for a system.
"""

from mlsys_bench.queueing.des.replicate import Kind, Simulated, Simulator, Visits

__all__ = ["Kind", "Simulated", "Simulator", "Visits"]
