"""A plan held against production with realistic numbers, for tests of what people read."""

from __future__ import annotations

from mlsys_bench.checked import Check
from mlsys_bench.productions import Kept, Production, Seen


def check(key: str, predicted: float, low: float, high: float, seen: float | None, ends: tuple[float | None, float | None]) -> Check:
    """Return a prediction beside what was seen of it."""
    inside = None if ends[1] is None or ends[0] is None else ends[0] <= high and ends[1] >= low
    return Check(
        key=key, predicted=predicted, low=low, high=high, measured=seen, measured_low=ends[0], measured_high=ends[1],
        error_percent=None if not seen else 100 * (predicted / seen - 1), inside=inside,
    )  # fmt: skip


def production() -> Production:
    """Return 15 replicas that each get 15 % more than planned, with a tail nobody foresaw."""
    return Production(
        plan_file="plan.json",
        source="http://prometheus:9090",
        engine="vllm",
        start_unix_s=1.7e9,
        duration_s=21_600.0,
        requests=1_486_512,
        replicas=14.97,
        replicas_planned=16,
        replicas_counted=True,
        rate_per_s=68.8,
        busiest_share=1.31,
        traffic=(
            Seen(name="rate per replica", unit="/s", planned=4.0, seen=4.6, low=4.58, high=4.61, alike=False),
            Seen(name="prompt length, mean", unit=" tokens", planned=599, seen=601, low=598, high=604, alike=True),
            Seen(name="output length, cv", unit="", planned=0.6, seen=0.64, low=0.34, high=None, alike=True),
        ),
        as_planned=False,
        utilisation=0.39,
        utilisation_seen=0.45,
        kv_share=(0.28, 0.67),
        checks=(check("ttft_p99_s", 0.364, 0.286, 0.422, 0.605, (0.5, 0.75)),),
        remade=(
            check("ttft_p50_s", 0.089, 0.077, 0.105, 0.0856, (0.08, 0.1)),
            check("ttft_p99_s", 0.297, 0.246, 0.388, 0.605, (0.5, 0.75)),
            check("e2e_p99_s", 11.5, 10.8, 14.2, None, (80.0, None)),
            check("ttft_mean_s", 0.101, 0.0888, 0.122, 0.103, (0.102, 0.104)),
            check("throughput_tokens_per_s", 619, 600, 639, 643, (615, 671)),
            check("requests_in_flight", 17.2, 16.1, 20.5, 17.9, (17.4, 18.4)),
        ),
        limits=(
            Kept(limit="ttft_p95<500ms", low=0.1, high=0.25, kept=True),
            Kept(limit="tpot_p95<30ms", low=0.025, high=0.05, kept=None),
            Kept(limit="e2e_p99<60s", low=80.0, high=None, kept=False),
        ),
        verdict="does not hold",
        notes=("the busiest replica carries 1.31 times the mean; predictions are for an even share",),
    )
