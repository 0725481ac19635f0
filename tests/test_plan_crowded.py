"""A replica whose memory is full, by hand and against the scheduler itself."""

from __future__ import annotations

import numpy as np
import pytest

from mlsys_bench import hardware, latency, models, workload
from mlsys_bench.batching import Limits
from mlsys_bench.plan import crowded, demand
from mlsys_bench.plan.demand import Demand
from mlsys_bench.simulate import core

L4 = latency.roofline(models.find("llama-3-8b"), hardware.find("l4"), precision="bf16")
LIMITS = Limits(max_seqs=64, max_step_tokens=2048, block_tokens=16, blocks=2500, max_context=8192)


def alike(prompt: float, output: float) -> Demand:
    return Demand(prompt=np.full(64, prompt), output=np.full(64, output))


def test_where_memory_is_ample_all_seats_are_taken_and_nothing_is_read_twice() -> None:
    crowd = crowded.of(LIMITS._replace(max_seqs=8, blocks=10_000), alike(100.0, 50.0))
    assert crowd.seats == pytest.approx(8)
    assert crowd.answered_per_step == pytest.approx(8 / 50), "eight at a time, fifty steps each"
    assert crowd.again_tokens == 0
    assert crowd.preemptions == 0


def test_one_that_never_fits_beside_another_is_served_alone() -> None:
    crowd = crowded.of(LIMITS._replace(blocks=20), alike(300.0, 10.0))  # 320 tokens of memory
    assert crowd.seats == pytest.approx(1)
    assert crowd.answered_per_step == pytest.approx(1 / 10)


@pytest.mark.parametrize(
    ("prompt", "output"),
    [("lognormal:300:0.6:2000", "lognormal:500:0.7:2000"), ("lognormal:1155:0.96:8192", "lognormal:211:0.77:1024"),
     ("lognormal:2500:0.7:8000", "lognormal:350:0.8:1500")],
)  # fmt: skip
def test_the_scheduler_itself_seats_and_sends_back_as_many(prompt: str, output: str) -> None:
    """Short prompts grow until one must go; long ones are read in parts, and sent back between two parts more than once."""
    traffic = workload.synthetic(1e4, prompt=prompt, output=output)
    crowd = crowded.of(LIMITS, demand.of(traffic).fitting(LIMITS))
    n = 700
    tracks = core.play(workload.schedule(traffic, n=n, seed=3), LIMITS, profile=L4, seed=3)
    while_full = tracks.sequence_s / tracks.busy_s
    assert 0.98 * while_full < crowd.seats < 1.2 * while_full, "the last answers leave seats empty"
    assert 0.6 * crowd.preemptions < tracks.preemptions / n < 1.3 * crowd.preemptions, "nor is it crowded at first and at last"


def test_requests_that_are_sent_back_without_end_are_counted_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of 20,000 tokens in a memory of 320,000: each is sent back some 80 times, so few answers say what all of them would."""
    limits = LIMITS._replace(blocks=20_000, max_context=131_072)
    crowd_of = demand.of(workload.synthetic(10, prompt="lognormal:512:1:8192", output="20000")).fitting(limits)
    whole = crowded._of.__wrapped__(limits, crowded._Rows(crowd_of))
    monkeypatch.setattr(crowded, "_MOST_PREEMPTED", 4000)
    some = crowded._of.__wrapped__(limits, crowded._Rows(crowd_of))
    assert whole.preemptions > 50
    assert some != whole
    assert some.answered_per_step == pytest.approx(whole.answered_per_step, rel=0.1)
    assert some.seats == pytest.approx(whole.seats, rel=0.1)
