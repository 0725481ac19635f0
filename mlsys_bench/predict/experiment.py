"""One served design under one load, with what was measured of it if anything was; and what is predicted of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlsys_bench.types import Lengths, Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A model on GPUs under a load.  Exactly one of `rate_per_s` (open loop), `concurrency` (closed loop) or neither (offline) is given.

    `group` names what was measured together: experiments of one group are not independent evidence.
    """

    key: str
    group: str
    model: str
    device: str
    engine: str = "vllm"  # vllm, sglang, trtllm, mlsys, or as the table says
    engine_version: str = ""
    precision: str = "bf16"
    tp: int = 1  # of the attention, or of all where nothing else is said
    pp: int = 1
    ep: int = 1
    moe_tp: int = 1
    attention_dp: int = 1
    replicas: int = 1
    max_seqs: int | None = None
    max_step_tokens: int | None = None
    memory_share: float = 0.9
    held_steps: int = 0  # steps between two looks of the scheduler at new requests; 0: at every one
    prompt_tokens: Lengths
    output_tokens: Lengths
    shared_prefix_tokens: int = 0  # the same for all requests
    turns: int = 1  # questions of one conversation, each sent with all before it
    sessions: int = 0  # conversations at a time; 0: each request is one of its own
    rate_per_s: float | None = None
    arrivals: str = "poisson"
    concurrency: int | None = None
    speculative: str | None = None  # such as mtp
    draft_tokens: int = 0  # proposed in a step beside the one that is sure; 0: not said
    disaggregated: bool = False
    prefill_gpus: int = 0
    decode_gpus: int = 0
    prefill_tp: int = 0  # devices of one prefill worker; tp, ep, moe_tp, attention_dp and replicas are those of decode workers
    prefill_ep: int = 1
    greedy: bool = True  # False: the client leaves sampling to the server's default, that of the model
    cold_start: bool = False  # the run begins with a server that has just been started: its first requests are slow
    beams: int = 1  # sequences that one request decodes at a time
    requests: int | None = None  # sent in all, where the run was that short: it starts from an empty system
    slo: tuple[tuple[str, float], ...] = ()  # figure and limit that a highest rate is asked under, e.g. ("ttft_p99_s", 2.0)
    measured: dict[str, float] = field(default_factory=dict)  # ttft_mean_s, tpot_p50_s, e2e_p99_s, max_rate_per_s, …

    @property
    def gpus(self) -> int:
        """Devices of the whole system."""
        if self.disaggregated:
            return self.prefill_gpus + self.decode_gpus
        return self.stage_gpus * self.pp * self.replicas

    @property
    def stage_gpus(self) -> int:
        """Devices of one pipeline stage of a replica: those of its attention, or those that experts are spread over."""
        return max(self.tp * self.attention_dp, self.moe_tp * self.ep)

    @property
    def layout(self) -> tuple[str, str, str, int, int, int, int, int]:
        """What a measured point says something about: model, device, precision and how it is spread."""
        return (self.model, self.device, self.precision, self.tp, self.pp, self.ep, self.moe_tp, self.attention_dp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Figures of one experiment: (point, low, high) of the 90 % interval, by name as in `Experiment.measured`."""

    key: str
    figures: dict[str, tuple[float, float, float]]
    provenance: Provenance
    notes: tuple[str, ...] = ()
