"""What a server said of itself while a load test ran: the record that lies inside a `LoadTest`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSource:
    """One place that was looked at during the run, and what that cost."""

    kind: str  # whose names were found there: vllm, dcgm, nvml, rapl …; 'none' where nothing was
    where: str
    looks: int
    failed: int
    interval_s: float | None  # median between looks
    answer_s: float | None  # mean time until the answer was whole
    longest_s: float | None
    bytes_per_look: float
    cpu_share: float  # of one core, of the thread that looked
    skipped: str | None = None  # why nothing came of it


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSeries:
    """One quantity in steps of `ServerSide.step_s` from second 0 of the run; None where nothing is known.

    `mean` and `most` are those of the window.  A mean of times is over the requests counted in it, a rate is the counter's difference.
    """

    name: str
    unit: str  # as in the names of fields: requests, per_s, tokens_per_s, s, share, w, hz, bytes, celsius
    device: str | None
    values: tuple[float | None, ...]
    mean: float | None
    most: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoSides:
    """The mean of one latency as the server counted it and as the client saw it from its own sends, in the same seconds."""

    metric: str
    server_s: float
    server_count: float
    client_s: float
    client_count: int

    @property
    def between_s(self) -> float:
        """What lies between the two: network, proxies and the client itself."""
        return self.client_s - self.server_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """Energy of the devices over `duration_s` of the window, all that they drew: idle power and prompts included."""

    devices: tuple[str, ...]
    source: str
    joules: float
    duration_s: float
    output_tokens: int  # that the client received meanwhile
    requests: int  # answered meanwhile

    @property
    def mean_w(self) -> float:
        """Mean power."""
        return self.joules / self.duration_s

    @property
    def joules_per_output_token(self) -> float | None:
        """Energy per output token."""
        return self.joules / self.output_tokens if self.output_tokens else None

    @property
    def joules_per_request(self) -> float | None:
        """Energy per answered request."""
        return self.joules / self.requests if self.requests else None

    @property
    def output_tokens_per_s_per_w(self) -> float | None:
        """Output tokens a second for each watt, which is tokens per joule."""
        return self.output_tokens / self.joules if self.joules else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSide:
    """Everything the servers and their devices said, on the clock of the run."""

    sources: tuple[ServerSource, ...]
    step_s: float
    series: tuple[ServerSeries, ...] = ()
    two_sides: tuple[TwoSides, ...] = ()
    energy: tuple[Energy, ...] = ()
    doubts: tuple[str, ...] = ()  # what a reader of the run's latencies should know; they go into its verdict
    notes: tuple[str, ...] = ()
