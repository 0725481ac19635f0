"""How sure a number is."""

from __future__ import annotations

import enum


class Provenance(enum.StrEnum):
    """Where a number comes from, strongest first.  A result is as weak as its weakest input: `Provenance.weakest`."""

    MEASURED = "measured"  # here, on this machine
    CALIBRATED = "calibrated"  # fitted to measurements
    ROOFLINE = "roofline"  # physics of a catalogue entry
    ASSUMED = "assumed"  # a scenario or a default says so

    @staticmethod
    def weakest(*inputs: Provenance) -> Provenance:
        """Return the weakest of the inputs."""
        order = list(Provenance)
        return max(inputs, key=order.index)
