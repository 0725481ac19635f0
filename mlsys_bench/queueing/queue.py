"""What customers of a station meet in steady state: the one shape every model answers in."""

from __future__ import annotations

from dataclasses import dataclass

from mlsys_bench.queueing.times import Time


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """A station in steady state, seen by the customers it accepts (and, where some give up, serves)."""

    utilisation: float  # offered load over capacity; where customers are lost it may exceed 1
    p_wait: float  # probability that a customer has to wait
    wait: Time  # in queue, 0 for those who do not wait
    sojourn: Time  # wait + service
    throughput_per_s: float  # served to the end
    p_blocked: float = 0.0  # share of arrivals turned away at the door
    p_abandoned: float = 0.0  # share of arrivals that give up waiting

    @property
    def wait_s(self) -> float:
        """Mean wait."""
        return self.wait.mean_s

    @property
    def sojourn_s(self) -> float:
        """Mean wait + service."""
        return self.sojourn.mean_s

    @property
    def mean_waiting(self) -> float:
        """Mean number waiting among those that get served, by Little's law."""
        return self.throughput_per_s * self.wait.mean_s

    @property
    def mean_requests(self) -> float:
        """Mean number waiting or in service among those that get served, by Little's law."""
        return self.throughput_per_s * self.sojourn.mean_s

    def wait_p(self, t_s: float) -> float:
        """Return P(wait > t)."""
        return self.wait.p_over(t_s)

    def sojourn_p(self, t_s: float) -> float:
        """Return P(wait + service > t)."""
        return self.sojourn.p_over(t_s)

    def wait_quantile_s(self, p: float) -> float:
        """Return the p-quantile of the wait over all served customers: 0 when P(no wait) >= p."""
        return self.wait.quantile_s(p)

    def sojourn_quantile_s(self, p: float) -> float:
        """Return the p-quantile of wait + service."""
        return self.sojourn.quantile_s(p)
