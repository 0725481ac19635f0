"""Traffic, promises and prices -> the cheapest fleet: queueing theory guesses, a step-by-step simulation confirms."""

from mlsys_bench.plan.candidates import Candidate
from mlsys_bench.plan.candidates import every as every_candidate
from mlsys_bench.plan.planner import plan
from mlsys_bench.plan.request import MAX_BATCH, Request, check

__all__ = ["MAX_BATCH", "Candidate", "Request", "check", "every_candidate", "plan"]
