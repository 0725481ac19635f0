"""Planning of stage graphs: replicas of all stages chosen together for what users see at the end."""

from mlsys_bench.plan.graph.allocation import Allocation, Problem, allocate, problem
from mlsys_bench.plan.graph.answer import GraphRequest, plan_graph, works

__all__ = ["Allocation", "GraphRequest", "Problem", "allocate", "plan_graph", "problem", "works"]
