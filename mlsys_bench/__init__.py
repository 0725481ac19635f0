"""Measure, model, plan, verify and guard ML serving systems.  The floors of the house are in docs/architecture.md."""

__version__ = "0.1.0"
