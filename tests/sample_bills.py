"""Sample records about money: quoted numbers recomputed, and a bill with all that may stand beside it."""

from __future__ import annotations

import dataclasses

from mlsys_bench.billing import Bill, BreakEven, Comparison, Costs, Energy, Line, Mix, Sensitivity
from mlsys_bench.claims import Claim, Claims
from mlsys_bench.types import Provenance


def claims() -> Claims:
    wrong = Claim(
        key="20-shards",
        topic="queueing",
        claim="20 shards with a p95 of 100 ms answer with a p95 of 100 ms",
        quoted="1x",
        recomputed="1.92x at half load; the median is a shard's p96.6",
        value=1.92,
        unit="x",
        low=1.0,
        high=1.92,
        verdict="wrong",
        because="the slowest of 20 decides: a p95 takes each shard's p99.74",
        formula="P(all <= t) = F(t)^20",
        provenance=Provenance.ASSUMED,
    )
    fits = dataclasses.replace(
        wrong, key="70b-fp16", topic="memory", claim="70B in FP16 needs 140 GB", verdict="holds", low=None, high=None
    )
    return Claims(claims=(wrong, fits, dataclasses.replace(wrong, key="other", verdict="holds only if")))


def costs() -> Costs:
    line = Line(what="1 x aws p5.48xlarge (llm)", usd_per_h=55.04, source="a list", date="2026-11-20", provenance=Provenance.MEASURED)
    bill = Bill(
        lines=(line,),
        usd_per_h=55.04,
        usd_per_month=40_179.2,
        usd_per_year=482_150.4,
        usd_per_request=0.0000764,
        usd_per_million_tokens=0.0995,
        usd_per_million_input_tokens=0.0421,
        usd_per_million_output_tokens=0.214,
        unpriced=("network egress",),
        provenance=Provenance.ROOFLINE,
    )
    energy = Energy(
        watts=4095.0,
        kwh_per_month=2989.35,
        kwh_per_year=35_872.2,
        wh_per_request=0.0057,
        usd_per_month=239.15,
        co2_kg_per_month=1195.74,
        provenance=Provenance.ASSUMED,
        assumed=("a busy device draws its TDP", "PUE 1.25 (own hall)"),
    )
    even = BreakEven(
        from_per_day=262_222.0,
        for_good_per_day=524_444.0,
        replicas=1,
        api_usd_per_request=270e-6,
        idle_usd_per_day=70.8,
        model="gpt-4o-mini",
    )
    mix = Mix(
        reserved=4, firm=6, spot=12, spot_spares=6, reserved_usd_per_h=24.0, on_demand_usd_per_h=5.0, spot_usd_per_h=7.78,
        all_on_demand_usd_per_h=53.33, notes=("spot: lives of 6 h over 3 pools",),
    )  # fmt: skip
    change = Sensitivity(
        what="10 % more traffic", replicas=9, usd_per_hour=61.92, change_usd_per_month=5022.4, change=0.125, clear=False,
        binding_constraint="ttft_p95 < 500 ms",
    )  # fmt: skip
    impossible = Sensitivity(
        what="INT8 weights", replicas=None, usd_per_hour=None, change_usd_per_month=None, change=None, clear=None, binding_constraint=None,
        why_not="a V100 does not compute in int8",
    )  # fmt: skip
    return Costs(
        plan="llama-3-8b, 8 x H100-SXM for llm",
        requests_per_s=200.0,
        bill=bill,
        energy=energy,
        apis=(even, dataclasses.replace(even, from_per_day=None, for_good_per_day=None, replicas=None)),
        mix=mix,
        comparison=(Comparison(what="usd_per_hour", baseline=110.08, plan=55.04, change=-0.5),),
        saving_usd_per_month=40_179.2,
        differences=("the limits differ: ttft_p95<1s and ttft_p95<500ms",),
        sensitivity=(change, dataclasses.replace(change, clear=True, change_usd_per_month=-5022.4), impossible),
        notes=("prices.yaml: its prices are of 2024-01-01, more than 18 months old",),
    )
