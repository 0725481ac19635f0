"""Records of fleets with realistic numbers, for tests of what people read."""

from __future__ import annotations

from mlsys_bench import slo
from mlsys_bench.fleets import Fleet, FleetPlan, Hour, Option, Placed, Served, Want
from mlsys_bench.types import Provenance


def fleet() -> Fleet:
    return Fleet(
        name="chat-fleet",
        description="Two services on one pool.",
        source="assumed for tests",
        pool={"H100-SXM": 8, "L40S": 4},
        wants=(
            Want(name="llm-chat", scenario="llm-chat", priority=1, rate_per_s=50.0, arrivals="diurnal:24h:1,3"),
            Want(name="documents", scenario="docs.yaml", priority=2, slo=slo.parse("e2e_p95<60s")),
        ),
    )


def option(gpu: str, replicas: int, each_per_s: float, usd: float) -> Option:
    return Option(
        gpu=gpu, precision="fp8", devices_per_replica=1, replicas=replicas, replicas_interval=(replicas - 1.0, replicas + 2.0),
        each_per_s=each_per_s, usd_per_replica_h=usd, predicted={"ttft_p95_s": 0.31}, binds="20 % headroom over bandwidth",
        provenance=Provenance.ROOFLINE,
    )  # fmt: skip


def fleet_plan() -> FleetPlan:
    """Chat is whole; documents are cut in the second hour, and L40S are too small for them."""
    return FleetPlan(
        name="chat-fleet",
        pool={"H100-SXM": 8, "L40S": 4},
        served=(
            Served(
                name="llm-chat", scenario="llm-chat", model="llama-3.1-8b", priority=1, slo="ttft_p95<500ms,tpot_p99<80ms", rate_per_s=96.0,
                share=1.0, share_interval=(0.91, 1.0), share_of_requests=1.0,
                placed=(
                    Placed(gpu="H100-SXM", replicas=4, gpus=4, rate_per_s=76.8, usd_per_hour=11.8),
                    Placed(gpu="L40S", replicas=4, gpus=4, rate_per_s=19.2, usd_per_hour=6.19),
                ),
                options=(option("H100-SXM", 6, 19.2, 2.95), option("L40S", 18, 5.6, 1.5484)),
            ),
            Served(
                name="documents", scenario="docs.yaml", model="llama-3.3-70b", priority=2, slo="e2e_p95<60s", rate_per_s=52.0, share=0.6,
                share_interval=(0.5, 0.7), share_of_requests=0.8,
                placed=(Placed(gpu="H100-SXM", replicas=2, gpus=4, rate_per_s=31.2, usd_per_hour=11.8),),
                options=(
                    option("H100-SXM", 4, 15.6, 5.9),
                    Option(gpu="L40S", why_not="llama-3.3-70b runs on no device considered: L40S fp8 tp 1: 70.6 GB of weights"),
                ),
                needs={"H100-SXM": 4, "L40S": None},
            ),
        ),
        hours=(
            Hour(
                start_s=0.0, rates_per_s={"llm-chat": 48.0, "documents": 20.0}, shares={"llm-chat": 1.0, "documents": 1.0},
                gpus={"H100-SXM": {"llm-chat": 3, "documents": 4}, "L40S": {}},
            ),
            Hour(
                start_s=3600.0, rates_per_s={"llm-chat": 96.0, "documents": 52.0}, shares={"llm-chat": 1.0, "documents": 0.6},
                gpus={"H100-SXM": {"llm-chat": 4, "documents": 4}, "L40S": {"llm-chat": 4}},
            ),
        ),
        busiest=1,
        is_whole=False,
        needs={"H100-SXM": 4, "L40S": None},
        peaks_together=None,
        usd_per_hour=25.2,
        busiest_usd_per_hour=29.79,
        busiest_usd_interval=(27.0, 29.79),
        pool_usd_per_hour=29.79,
        lead_s=334.0,
        provenance=Provenance.ROOFLINE,
        assumptions=("each replica has its own queue",),
        notes=("documents on L40S: no room",),
    )  # fmt: skip
