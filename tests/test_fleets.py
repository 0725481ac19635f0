"""Several scenarios on one pool of GPUs: the file, the plan, and what people read of it."""

from __future__ import annotations

import dataclasses
import functools
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from mlsys_bench import pricing, record, scenario, slo, workload
from mlsys_bench.errors import BadInput, ScenarioError
from mlsys_bench.fleets import Fleet, FleetPlan
from mlsys_bench.journeys import planning
from mlsys_bench.plan import Request, fleets, plan
from mlsys_bench.plan.fleets import Entry, FleetRequest
from mlsys_bench.report import content, stacks
from mlsys_bench.report import fleets as words
from mlsys_bench.types import Workload
from tests.sample_records import machine

FILE = """\
mlsys: 1
name: two
description: Two services.
source: assumed for this test
pool: {h100-sxm: 4, L40S: 2}
scenarios:
  - {scenario: llm-chat, priority: 1, rate: 30/s}
  - {scenario: mine.yaml, name: other, priority: 2, arrivals: "diurnal:24h:1,3", slo: {ttft_p95: 2s}}
"""


def asked(pool: dict[str, int], first: str = "poisson", second: str = "poisson") -> FleetRequest:
    """Return a chat service and a batch service on both kinds of GPU."""
    chat = workload.synthetic(12.0, arrivals=first, prompt="lognormal:300:0.5:2000", output="lognormal:100:0.5:400")
    batch = workload.synthetic(6.0, arrivals=second, prompt="lognormal:1500:0.4:6000", output="lognormal:200:0.3:500")
    return FleetRequest(
        name="test",
        pool=pool,
        entries=(
            Entry(name="chat", scenario="chat", priority=1, request=request(chat, "ttft_p95<500ms,tpot_p99<100ms"), gpus=tuple(pool)),
            Entry(name="batch", scenario="batch", priority=2, request=request(batch, "e2e_p95<60s"), gpus=tuple(pool)),
        ),
    )


def request(traffic: Workload, limits: str) -> Request:
    return Request(
        model="llama-3.1-8b", workload=traffic, slo=slo.parse(limits), gpus=("H100-SXM", "L40S"), precisions=("bf16",), max_batch=64,
        max_step_tokens=2048,
    )  # fmt: skip


@functools.cache
def enough() -> FleetPlan:
    return fleets.plan_fleet(asked({"H100-SXM": 8, "L40S": 8}))


@functools.cache
def too_small() -> FleetPlan:
    return fleets.plan_fleet(asked({"L40S": 2}))


@functools.cache
def by_hour() -> FleetPlan:
    """Chat peaks in the third quarter of the day, batch in the first."""
    return fleets.plan_fleet(asked({"L40S": 5}, "diurnal:24h:1,1,3,1", "diurnal:24h:3,1,1,1"))


# ---------------------------------------------------------------- the plan


def test_each_option_is_the_plan_of_that_scenario_on_that_gpu_alone() -> None:
    option = enough().served[0].options[1]
    alone = plan(dataclasses.replace(asked({"L40S": 1}).entries[0].request, gpus=("L40S",), disaggregate="never"))
    assert (option.gpu, option.replicas, option.replicas_interval) == ("L40S", alone.replicas, alone.intervals["replicas"])
    assert option.predicted == alone.predicted
    assert option.each_per_s is not None
    assert alone.replicas - 1 < 12 / option.each_per_s <= alone.replicas


def test_a_pool_that_is_large_enough_serves_all_with_the_cheapest_gpus() -> None:
    """The cost is that of the GPUs in use, at the lowest price of one, and no other split of the scenarios over kinds is cheaper."""
    found = enough()
    assert found.is_whole
    assert [each.share for each in found.served] == [1.0, 1.0]
    assert found.needs == {}
    price = {option.gpu: option.usd_per_replica_h for each in found.served for option in each.options}
    used = {gpu: sum(by.values()) for gpu, by in found.hours[0].gpus.items()}
    assert found.usd_per_hour == pytest.approx(sum(n * (price[gpu] or 0.0) for gpu, n in used.items()), abs=0.005)
    assert found.pool_usd_per_hour == pytest.approx(8 * sum(usd or 0.0 for usd in price.values()), abs=0.005)
    for each in found.served:
        alone = min((option.replicas or 0) * (option.usd_per_replica_h or 0.0) for option in each.options)
        assert sum(part.usd_per_hour or 0.0 for part in each.placed) <= alone + 1e-9
        assert sum(part.rate_per_s for part in each.placed) == pytest.approx(each.rate_per_s)


def test_a_pool_that_is_too_small_serves_the_first_priority_and_says_what_is_missing() -> None:
    found = too_small()
    chat, batch = found.served
    assert not found.is_whole
    assert chat.share == 1.0
    assert 0 < batch.share < 1
    assert planning.exit_status(found) == 1
    missing = batch.needs["L40S"]
    assert missing is not None
    asks = [fleets.Ask(name=e.name, priority=e.priority, rate_per_s=e.rate_per_s) for e in found.served]
    kinds = [
        fleets.Kind(name=e.name, gpu=o.gpu, devices=o.devices_per_replica or 0, each_per_s=o.each_per_s or 0.0, usd_per_h=1.0)
        for e in found.served
        for o in e.options
    ]
    enough_, less = (fleets.shares(asks, kinds, fleets.allocate(asks, kinds, {"L40S": 2 + n})) for n in (missing, missing - 1))
    assert enough_["batch"] == 1.0
    assert less["batch"] < 1.0
    assert batch.share_interval[0] <= batch.share <= batch.share_interval[1]
    assert any(fact.label == "Cut" and f"{missing} more L40S" in fact.detail for fact in words.plan(found).facts)


def test_peaks_at_different_hours_use_the_same_gpus() -> None:
    found = by_hour()
    assert len(found.hours) == 24
    assert found.is_whole
    most = max(sum(hour.gpus["L40S"].values()) for hour in found.hours)
    peaks = sum(max(hour.gpus["L40S"].get(each.name, 0) for hour in found.hours) for each in found.served)
    assert most < peaks
    assert found.peaks_together is None, "six are not there"
    assert peaks == 6
    assert found.hours[found.busiest].gpus["L40S"]
    mean = sum(sum(hour.gpus["L40S"].values()) for hour in found.hours) / 24 * (found.served[0].options[0].usd_per_replica_h or 0.0)
    assert found.usd_per_hour == pytest.approx(mean)


def test_hours_are_planned_until_all_courses_repeat_together() -> None:
    """A day that peaks from 12 to 24 and a day and a half that peaks from 3 to 9: both do so at hour 39 for the first time."""
    entries = asked({"L40S": 5}, "diurnal:24h:0,1", "diurnal:36h:0,1,1,0,0,0,0,0,0,0,0,0").entries
    hours = fleets._hours(entries, 0.0)
    assert len(hours) == 72
    assert [hour for hour, (chat, batch) in enumerate(hours) if chat > 1 and batch > 1] == [39, 40, 41, 42, 43, 44]
    assert len(fleets._hours(asked({"L40S": 5}, "diurnal:5h:0,1").entries, 0.0)) == 24, "a day at least"
    long = dataclasses.replace(asked({"L40S": 5}, "diurnal:24h:1,2", "diurnal:25h:1,2"))
    assert len(fleets._hours(long.entries, 0.0)) == 168
    assert [note for note in fleets._notes(long, {}) if note.startswith("the courses repeat together after 600 hours; planned are")]
    assert not fleets._notes(asked({"L40S": 5}, "diurnal:24h:1,2"), {})


def test_whoever_grows_has_its_gpus_before_the_hour() -> None:
    """Chat's rate rises at noon: a replica takes minutes to start, so the hour before noon asks for the higher rate already."""
    found = by_hour()
    assert 60 < found.lead_s < 3600
    rates = [hour.rates_per_s["chat"] for hour in found.hours]
    assert rates[10] == pytest.approx(8.0)
    assert rates[11] == rates[12] == pytest.approx(24.0)
    assert found.hours[11].gpus == fleets_gpus(found, 11)
    assert found.hours[10].gpus["L40S"]["chat"] < found.hours[11].gpus["L40S"]["chat"] == found.hours[12].gpus["L40S"]["chat"]


def fleets_gpus(found: FleetPlan, hour: int) -> dict[str, dict[str, int]]:
    """Return the GPUs of an hour, none of them more than there are."""
    assert all(sum(by.values()) <= found.pool[gpu] for gpu, by in found.hours[hour].gpus.items())
    return found.hours[hour].gpus


def test_a_limit_below_every_floor_is_refused_and_one_below_some_leaves_the_others() -> None:
    base = asked({"H100-SXM": 4, "L40S": 4})
    hopeless = dataclasses.replace(base.entries[0], request=dataclasses.replace(base.entries[0].request, slo=slo.parse("tpot_p50<1us")))
    with pytest.raises(BadInput, match=r"chat: SLO tpot_p50<0\.001ms is below the physics floor"):
        fleets.plan_fleet(dataclasses.replace(base, entries=(hopeless,)))
    fast = dataclasses.replace(base.entries[0], request=dataclasses.replace(base.entries[0].request, slo=slo.parse("tpot_p50<12ms")))
    found = fleets.plan_fleet(dataclasses.replace(base, pool={"H100-SXM": 4, "L40S": 4}, entries=(fast,)))
    assert found.is_whole
    assert all(part.gpu == "H100-SXM" or part.gpus > part.replicas for part in found.served[0].placed)


# ---------------------------------------------------------------- what people read


def test_plans_of_fleets_are_kept_shown_and_drawn(tmp_path: Path) -> None:
    for made in (enough(), too_small(), by_hour()):
        kept = record.read(record.write(tmp_path / "fleet.json", made, machine()), FleetPlan)
        assert kept == made
        (section,) = content.describe(kept)
        assert section.tone == ("good" if made.is_whole else "bad")
        assert {fact.label for fact in section.facts} >= {"Pool", "In use", "Cost"}
        picture = ET.fromstring(stacks.svg(kept))
        titles = [node.text for node in picture.iter("{http://www.w3.org/2000/svg}title")]
        assert sum(title != "cut" for title in titles) == sum(len(by) for hour in kept.hours for by in hour.gpus.values())
        assert ("cut" in titles) == (not made.is_whole)


def test_one_scenario_is_not_called_all() -> None:
    alone = dataclasses.replace(enough(), served=enough().served[:1])
    assert words.lead(alone).startswith("The scenario is served in full. It takes ")
    assert words.lead(enough()).startswith("All 2 scenarios are served in full. It takes ")


def test_bars_in_letters_have_a_letter_for_each_gpu() -> None:
    rows = {line.split()[0]: line.split()[1] for line in words.drawing(too_small()) if line.strip().endswith("of 2")}
    used = too_small().hours[0].gpus["L40S"]
    assert rows["L40S"] == "a" * used["chat"] + "b" * used["batch"] + "." * (2 - sum(used.values()))


# ---------------------------------------------------------------- the file


def written(folder: Path, text: str = FILE) -> Path:
    mine = (Path(__file__).parent.parent / "scenarios" / "llm-chat.yaml").read_text().replace("name: llm-chat", "name: mine")
    (folder / "mine.yaml").write_text(mine)
    (folder / "fleet.yaml").write_text(text)
    return folder / "fleet.yaml"


def test_a_fleet_file_names_scenarios_and_files_beside_it(tmp_path: Path) -> None:
    found = scenario.load(written(tmp_path))
    assert isinstance(found, Fleet)
    assert found.pool == {"H100-SXM": 4, "L40S": 2}
    chat, other = found.wants
    assert (chat.name, chat.priority, chat.rate_per_s, chat.slo) == ("llm-chat", 1, 30.0, ())
    assert (other.name, other.scenario, slo.show(other.slo)) == ("other", str(tmp_path / "mine.yaml"), "ttft_p95<2s")
    asked_for = planning.asked(scenario=str(tmp_path / "fleet.yaml"), term="on-demand", seed=0)
    assert isinstance(asked_for, FleetRequest)
    first, second = asked_for.entries
    assert (first.request.workload.rate_per_s, first.gpus) == (30.0, ("H100-SXM", "L40S"))
    assert (second.request.workload.arrivals, slo.show(second.request.slo), second.scenario) == (
        "diurnal:24h:1,3",
        "ttft_p95<2s",
        "mine.yaml",
    )


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("h100-sxm: 4", "h100-sxn: 4", r"fleet.yaml: pool: .*did you mean"),
        ("h100-sxm: 4", "h100-sxm: 4.5", r"pool.h100-sxm: 4.5 where a whole number"),
        ("h100-sxm: 4, L40S: 2", "H100: 4, h100-sxm: 2", r"H100-SXM stands there twice"),
        ("priority: 1", "prio: 1", r"unknown key scenarios\[0\].prio; did you mean priority"),
        ("scenario: llm-chat", "scenario: llm-chet", r"scenarios\[0\].scenario: unknown scenario 'llm-chet'; did you mean llm-chat"),
        ("scenario: llm-chat", "scenario: llm-cascade", r"llm-cascade is not of one model"),
        ("scenario: llm-chat", "scenario: embed-service", r"embed-service is not of one model"),
        ("scenario: mine.yaml", "scenario: gone.yaml", r"gone.yaml: cannot be read"),
        ("name: other, ", "name: llm-chat, ", r"llm-chat stands there twice; give each a name"),
        ("rate: 30/s", "rate: 30", r"scenarios\[0\].rate: 30 has no unit"),
        ("h100-sxm: 4, L40S: 2", "T4: 4", r"runs on H100-SXM, .*, and the pool has T4"),
        ("pool: {h100-sxm: 4, L40S: 2}\n", "", r"misses pool"),
        ("diurnal:24h:1,3", "diurnal:24h", r"scenarios\[1\].arrivals"),
    ],
)
def test_mistakes_in_a_fleet_file_are_told_with_their_place(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in FILE
    with pytest.raises(BadInput, match=says) as caught:
        scenario.check(written(tmp_path, FILE.replace(old, new, 1)))
    assert str(caught.value).startswith(str(tmp_path / "fleet.yaml"))
    assert "\n" not in str(caught.value)


def test_options_of_one_scenario_are_refused_for_a_fleet(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--gpu: two is a fleet of several scenarios; say it in"):
        planning.asked(scenario=str(written(tmp_path)), gpu="l4", term="on-demand", seed=0)

    for option in ("mixed", "autoscale"):
        with pytest.raises(BadInput, match=rf"--{option}: two is a fleet of several scenarios; plan the one that is meant alone"):
            planning.asked(scenario=str(written(tmp_path)), term="on-demand", seed=0, **{option: True})


def test_limits_of_a_fleet_file_that_would_bind_nobody_are_refused(tmp_path: Path) -> None:
    text = FILE.replace("scenario: mine.yaml", "scenario: chat-and-batch")
    with pytest.raises(BadInput, match=r"other: slo ttft_p95<2s would bind nobody, every tenant of chat-and-batch has limits of its own"):
        planning.asked(scenario=str(written(tmp_path, text)), term="on-demand", seed=0)


def test_prices_of_a_contract_are_called_so() -> None:
    base = asked({"L40S": 1})
    offers = pricing.published().of("L40S")
    mine = dataclasses.replace(base.entries[0], request=dataclasses.replace(base.entries[0].request, market=pricing.Market(offers=offers)))
    told = [fleets._assumptions(each, False, 0.0, {}) for each in (base, dataclasses.replace(base, entries=(mine,)))]
    assert [line.split(":")[0] for lines in told for line in lines if "one by one" in line] == [
        "GPUs are priced one by one at the lowest published",
        "GPUs are priced one by one at the lowest of your prices, without what is committed",
    ]


def test_a_fleet_is_no_scenario_of_a_fleet(tmp_path: Path) -> None:
    outer = FILE.replace("scenario: llm-chat", "scenario: chat-fleet")
    with pytest.raises(ScenarioError, match="chat-fleet is not of one model"):
        scenario.check(written(tmp_path, outer))


STAGED = """\
mlsys: 1
name: staged
description: A gateway before a small model.
source: assumed for this test
entry: gateway
headroom: 20%
stages:
  gateway:
    service: {assumed: {dist: constant, mean: 1ms, source: assumed for this test}}
    resources: {vcpu: 1}
    next: llm
  llm:
    service: {roofline: {model: llama-3.1-8b, precision: [bf16], max_batch: 16, source: assumed for this test}}
    resources: {gpu: [l40s, l4]}
traffic: {rate: 2/s, arrivals: poisson, prompt: 200, output: 30, source: assumed for this test}
slo: {e2e_p95: 5s}
cost: {vcpu: $0.02/h, source: assumed for this test}
"""


def test_a_scenario_of_several_stages_shares_the_pool_with_its_model(tmp_path: Path) -> None:
    """Its replicas of the model are those of its own plan on that GPU; its other stages are rented beside the pool."""
    file = written(tmp_path, FILE.replace("scenario: mine.yaml, name: other", "scenario: staged.yaml").replace(", slo: {ttft_p95: 2s}", ""))
    (tmp_path / "staged.yaml").write_text(STAGED)
    asked_for = planning.asked(scenario=str(file), term="on-demand", seed=0)
    assert isinstance(asked_for, FleetRequest)
    staged = asked_for.entries[1]
    assert (staged.name, staged.model, staged.gpus) == ("staged", "llama-3.1-8b", ("L40S",))
    found = fleets.plan_fleet(dataclasses.replace(asked_for, entries=(staged,)))
    (option,) = found.served[0].options
    assert (option.gpu, option.replicas, option.each_per_s) == ("L40S", 1, pytest.approx(3.0))
    assert option.replicas_interval is not None
    assert option.replicas_interval[0] <= 1 <= option.replicas_interval[1]
    assert found.hours[12].gpus["L40S"] == {"staged": 1}
    assert any("rented beside the pool" in note for note in found.notes)


def test_a_stage_on_the_same_kind_of_gpu_is_not_taken_for_the_model(tmp_path: Path) -> None:
    """An encoder that takes two L40S stands before a language model that takes one."""
    file = written(tmp_path, FILE.replace("scenario: mine.yaml, name: other", "scenario: staged.yaml").replace(", slo: {ttft_p95: 2s}", ""))
    encoder = STAGED.replace("mean: 1ms", "mean: 400ms").replace("resources: {vcpu: 1}", "resources: {gpu: l40s}")
    (tmp_path / "staged.yaml").write_text(encoder)
    asked_for = planning.asked(scenario=str(file), term="on-demand", seed=0)
    assert isinstance(asked_for, FleetRequest)
    (option,) = fleets.plan_fleet(dataclasses.replace(asked_for, entries=asked_for.entries[1:])).served[0].options
    assert (option.replicas, option.precision, option.each_per_s) == (1, "bf16", pytest.approx(3.0))
