"""Scenarios of several stages: every construct is read, every mistake is one line with key and cure, visits follow the equations."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import resources, scenario
from mlsys_bench.errors import BadInput, MlsysError, ScenarioError
from mlsys_bench.stages import Popularity, Stage, StageGraph
from tests.stage_graphs import ON, graph, law, written

FULL = f"""
a:
  component: http.starlette
  {law("2ms", "gamma", 0.5).replace(", resources", chr(10) + "  resources")}
  concurrency: 4
  queue: {{limit: 64}}
  timeout: 50ms
  retries: {{max: 2, backoff: 10ms, budget: 20%}}
  failure: {{p: 0.1%, source: assumed}}
  fallback: {{to: z}}
  next: b
b: {{{law("1ms", "constant")}, cache: {{popularity: {{zipf: 1.1, items: 1000, size: 100}}, on_hit: done, on_miss: c, source: assumed}}}}
c: {{route: {{to: {{d: 70%, e: 0.3}}, source: assumed}}}}
d: {{parallel: [f, g], join: {{k: 1, of: 2, by: 25ms}}, next: z}}
e: {{{law("3ms", "lognormal", 1.2)}, batching: {{max: 8, wait: 5ms}}, shards: 2, escalate: {{to: d, p: 8%, source: assumed}}, next: z}}
f: {{{law("4ms")}, hedge: {{after: 10ms}}, slo: {{e2e_p99: 20ms}}}}
g: {{{law("5ms", "uniform")}}}
z: {{{law("30us")}, async: true}}
"""


def refusal(stages: str, **head: object) -> str:
    with pytest.raises(BadInput) as caught:
        graph(stages, **head)  # type: ignore[arg-type]
    said = str(caught.value)
    assert said.startswith("here: ")
    assert "\n" not in said
    return said.removeprefix("here: ")


def test_every_construct_is_read_into_si() -> None:
    read = graph(FULL)
    a, b, c, d, e = (read.stage(name) for name in "abcde")
    assert a.service is not None
    assert a.service.assumed is not None
    assert (a.service.assumed.mean_s, a.service.assumed.cv, a.concurrency, a.timeout_s) == (0.002, 0.5, 4, 0.05)
    assert a.retries is not None
    assert (a.retries.max, a.retries.backoff_s, a.retries.budget) == (2, 0.01, 0.2)
    assert a.failure is not None
    assert a.failure.p == pytest.approx(0.001)
    assert b.cache is not None
    assert b.cache.popularity == Popularity(zipf=1.1, items=1000, size=100)
    assert c.route is not None
    assert c.route.to == {"d": pytest.approx(0.7), "e": 0.3}
    assert d.join is not None
    assert (d.parallel, d.join.k, d.join.by_s) == (("f", "g"), 1, 0.025)
    assert (e.shards, e.batching.wait_s if e.batching else None) == (2, 0.005)
    assert read.stage("z").is_async
    assert [limit.limit for limit in read.stage("f").slo] == [0.02]
    assert (read.cost.usd_per_vcpu_h if read.cost else None) == 0.1
    assert read.workload.prompt_tokens.mean == 0


def test_a_model_takes_the_lengths_of_the_traffic_unless_it_has_its_own() -> None:
    model = "service: {roofline: {model: llama-3-8b, precision: bf16, max_batch: 8%s, source: assumed}}, resources: {gpu: l4}"
    assert "traffic: misses prompt, output" in refusal(f"a: {{{model % ''}}}")
    own = graph(f"a: {{{model % ', prompt: 100, output: {dist: lognormal, mean: 20, cv: 0.5}'}}}")
    assert own.engines[0].engine is not None
    assert own.engines[0].engine.output is not None
    assert (own.engines[0].engine.output.cv, own.stage("a").resources.gpu) == (0.5, ("L4",))  # type: ignore[union-attr]


WORK = law("1ms", "constant")


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        (f"a: {{{WORK}, nxet: b}}", "unknown key stages.a.nxet; did you mean next?"),
        (f"a: {{{WORK}, next: bb}}\nb: {{{WORK}}}", "stages.a.next: no stage is called 'bb'; did you mean b?"),
        (f"b: {{{WORK}}}", "entry: no stage is called 'a'"),
        (f"done: {{{WORK}}}", "stages.done: 'done' is where requests end"),
        (f"a: {{{WORK}}}\nb: {{{WORK}}}", "stages.b: no request comes here from a; lead to it, or drop it"),
        (f"a: {{{WORK}, next: b}}\nb: {{{WORK}, next: a}}", "stages.b: goes back to a (a -> b -> a); only escalate may go back"),
        (f"a: {{{WORK}, timeout: 1s, fallback: {{to: a}}}}", "stages.a: goes back to a (a -> a); only escalate"),
        (f"a: {{route: {{to: {{b: 70%, done: 29%}}, source: x}}}}\nb: {{{WORK}}}", "stages.a.route.to: the shares add up to 0.99"),
        (f"a: {{route: {{to: {{b: 1.2}}, source: x}}}}\nb: {{{WORK}}}", "stages.a.route.to.b: 1.2 is no share"),
        (f"a: {{route: {{to: {{b: 1}}}}}}\nb: {{{WORK}}}", "stages.a.route: misses source"),
        (f"a: {{{WORK}, next: b, route: {{to: {{b: 1}}, source: x}}}}\nb: {{{WORK}}}", "stages.a: has route and next"),
        (f"a: {{parallel: [b]}}\nb: {{{WORK}}}", "stages.a.parallel: one branch is not parallel; write next"),
        (f"a: {{parallel: [b, b]}}\nb: {{{WORK}}}", "stages.a.parallel: lists b twice"),
        (f"a: {{parallel: [b, c], join: {{k: 2, of: 3}}}}\nb: {{{WORK}}}\nc: {{{WORK}}}", "stages.a.join.of: 3, but parallel lists 2"),
        (f"a: {{parallel: [b, c], join: {{k: 3, of: 2}}}}\nb: {{{WORK}}}\nc: {{{WORK}}}", "stages.a.join.k: 3 of 2 can never answer"),
        (f"a: {{{WORK}, join: all, next: done}}", ""),
        (f"a: {{{WORK}, join: {{k: 1, of: 1}}}}", "stages.a.join: there is nothing to join"),
        (
            f"a: {{parallel: [b, c], next: d}}\nb: {{{WORK}, next: d}}\nc: {{{WORK}}}\nd: {{{WORK}}}",
            "stages.a.parallel: the branch b leads to d, which comes after the join",
        ),
        ("a: {next: done}", "stages.a: does nothing; give it a service, a route, parallel branches or a cache"),
        (f"a: {{{WORK}, cache: {{source: x}}}}", "stages.a.cache: needs hit or popularity, one of the two"),
        ("a: {cache: {hit: 10%, source: x}}", "stages.a.cache: stands before the stage's own work, and there is none"),
        (f"a: {{{WORK}, next: done, cache: {{hit: 10%, on_miss: b, source: x}}}}\nb: {{{WORK}}}", "stages.a: has cache.on_miss"),
        ("a: {service: {}, resources: {vcpu: 1}}", "stages.a.service: has nothing; exactly one of assumed, measured and roofline"),
        (f"a: {{service: {{assumed: {{dist: gamma, mean: 1ms, source: x}}}}, {ON}}}", "stages.a.service.assumed: the gamma law"),
        (f"a: {{{law('1ms', 'constant', 0.5)}}}", "stages.a.service.assumed: the constant law has no cv to choose"),
        (f"a: {{service: {{assumed: {{dist: constant, mean: 1ms}}}}, {ON}}}", "stages.a.service.assumed: misses source"),
        (f"a: {{service: {{assumed: {{dist: constant, mean: 0.001, source: x}}}}, {ON}}}", "stages.a.service.assumed.mean: 0.001 has no"),
        (f"a: {{service: {{assumed: {{dist: normal, mean: 1ms, source: x}}}}, {ON}}}", "stages.a.service.assumed.dist: unknown name"),
        (f"a: {{{law('-1ms', 'constant')}}}", "stages.a.service.assumed.mean: -1ms is below zero"),
        (f"a: {{{law('0ms', 'constant')}}}", "stages.a.service.assumed.mean: a visit takes no time at all"),
        (f"a: {{{law('1ms', 'constant', per_item='1ms')}}}", "stages.a.service.assumed.per_item: is the time of one more in a batch"),
        (f"a: {{service: {{measured: {{file: gone.json}}}}, {ON}}}", "stages.a.service.measured.file: gone.json is not there; `mlsys fit`"),
        (f"a: {{{WORK}, queue: {{limit: 1e5}}}}", "stages.a.queue.limit: '1e5' where a number is needed; YAML"),
        (f"a: {{{WORK}, on: done}}", "stages.a: YAML reads on, off, yes and no as truth values; the key True is no text"),
        (f"a: {{{WORK}, async: 1}}", "stages.a.async: 1 where true or false is needed"),
        (f"a: {{{WORK}, retries: {{max: 2}}}}", "stages.a.retries: is never needed, as nothing goes wrong here"),
        (
            f"a: {{{WORK}, cache: {{popularity: {{zipf: 1, items: {2**64}, size: 9}}, source: x}}}}",
            "stages.a.cache.popularity.items: 18,446,744,073,709,551,616 are more than anybody asks for",
        ),
        (f"a: {{{WORK}, shards: 100000}}", "stages.a.shards: 100,000; a plan follows each visit to all of them, 1,000 at most"),
        (f"a: {{{WORK}, timeout: 0s}}", "stages.a.timeout: 0 s is no time for an answer"),
        (f"a: {{{WORK}, escalate: {{to: a, p: 100%, source: x}}}}", "stages.a.escalate.p: all requests escalate; write next"),
        ("a: {parallel: [b, c], timeout: 1s}\nb: {}\nc: {}", "stages.a.timeout: belongs to a stage that does work"),
        ("a: {service: {assumed: {dist: constant, mean: 1ms, source: x}}}", "stages.a.resources: has neither of vcpu and gpu"),
        (f"a: {{{WORK.replace('vcpu: 1', 'vcpu: 1, gpu: l4')}}}", "stages.a.resources: has both of vcpu and gpu"),
        (f"a: {{{WORK.replace('vcpu: 1', 'gpu: l5')}}}", "stages.a.resources.gpu: unknown GPU or CPU 'l5'"),
        (f"a: {{{WORK.replace('vcpu: 1', 'gpu: [l4, t4]')}}}", "stages.a.resources.gpu: the service time is that of one device"),
        (f"a: {{{WORK}, slo: {{ttft_p95: 1s}}}}", "stages.a.slo: ttft is for stages that write tokens"),
        (f"a: {{{WORK}, slo: {{goodput: 99%}}}}", "stages.a.slo: goodput is a promise of the whole; put it into the scenario's slo"),
        (f"a: {{{WORK}, timeout: 1s, hedge: {{after: 1s}}}}", "stages.a.hedge.after: 1.00 s, and an attempt is given up after 1.00 s"),
        (f"a: {{{WORK.replace('vcpu: 1', 'vcpu: 1, gpus: 4')}}}", "stages.a.resources.gpus: 4 of no gpu; say which"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_key_and_cure(stages: str, says: str) -> None:
    if not says:
        assert graph(stages).stages[0].join is None
    else:
        assert refusal(stages).startswith(says)


def test_promises_that_no_stage_could_keep_are_refused() -> None:
    assert "slo: ttft needs a stage that writes tokens" in refusal(f"a: {{{WORK}}}", slo="{ttft_p95: 1s}")
    assert "slo: itl_p95 is a promise of the stage that writes the tokens" in refusal(f"a: {{{WORK}}}", slo="{itl_p95: 1s}")


def test_an_anchor_is_written_once_and_merged() -> None:
    """YAML's own way to say a thing once works: &name and <<."""
    read = graph(f"a: &work\n  {WORK.replace(', res', chr(10) + '  res')}\n  next: b\nb:\n  <<: *work\n  next: done")
    assert read.stage("b").service == read.stage("a").service


# ---------------------------------------------------------------- visits


def test_visits_follow_by_hand() -> None:
    """Cache 20 %, cascade 70/30 with 8 % of the small handed on: 0.8, 0.56, 0.24 + 0.0448."""
    found = scenario.flows(*_parts(graph(f"""
        a: {{{WORK}, cache: {{hit: 20%, on_miss: r, source: x}}}}
        r: {{route: {{to: {{s: 70%, l: 30%}}, source: x}}}}
        s: {{{WORK}, escalate: {{to: l, p: 8%, source: x}}}}
        l: {{{WORK}}}
    """)))  # fmt: skip
    assert {name: flow.visits for name, flow in found.items()} == pytest.approx({"a": 1, "r": 0.8, "s": 0.56, "l": 0.2848})


def test_retries_work_again_and_a_fallback_takes_what_is_left() -> None:
    """With f = 0.2 and two retries 1.24 calls, and 0.008 fall back.  A budget of 10 % makes 1.1 calls and loses 1 - 1.1 x 0.8."""
    failing = "a: {{{work}, failure: {{p: 20%, source: x}}, retries: {{max: 2{more}}}, fallback: {{to: b}}, next: c}}"
    text = failing + "\nb: {{{work}}}\nc: {{{work}}}"
    free = scenario.flows(*_parts(graph(text.format(work=WORK, more=""))))
    assert (free["a"].calls, free["b"].visits, free["c"].visits) == pytest.approx((1.24, 0.008, 0.992))
    tight = scenario.flows(*_parts(graph(text.format(work=WORK, more=", budget: 10%"))))
    assert (tight["a"].calls, tight["b"].visits, tight["c"].visits) == pytest.approx((1.1, 0.12, 0.88))


def test_a_fan_out_visits_all_branches_and_goes_on_once() -> None:
    found = scenario.flows(*_parts(graph(f"a: {{parallel: [b, c], next: d}}\nb: {{{WORK}}}\nc: {{{WORK}, shards: 5}}\nd: {{{WORK}}}")))
    assert {flow.visits for flow in found.values()} == {1.0}


def test_an_escalation_that_goes_back_visits_geometrically_often() -> None:
    found = scenario.flows(*_parts(graph(f"a: {{{WORK}, next: b}}\nb: {{{WORK}, escalate: {{to: a, p: 25%, source: x}}}}")))
    assert found["a"].visits == pytest.approx(1 / 0.75)


def test_a_loop_that_nobody_leaves_is_refused() -> None:
    """Both ways out of b lead back: its escalation, and the cache that never hits before it."""
    said = refusal(f"a: {{{WORK}, escalate: {{to: a, p: 99.99999999999999%, source: x}}}}")
    assert "requests go round for ever" in said


def _parts(read: StageGraph) -> tuple[tuple[Stage, ...], str]:
    return read.stages, read.entry


@settings(max_examples=25)
@given(st.lists(st.floats(0, 1), min_size=5, max_size=5), st.floats(0, 0.9))
def test_in_a_line_of_caches_visits_are_products(hits: list[float], back: float) -> None:
    """v_i is the product of the misses before it, over 1 - what the escalation at the end sends back."""
    names = "abcdef"
    lines = [f"{names[i]}: {{{WORK}, cache: {{hit: {h:.6f}, on_miss: {names[i + 1]}, source: x}}}}" for i, h in enumerate(hits)]
    read = graph("\n".join([*lines, f"f: {{{WORK}, escalate: {{to: a, p: {back:.6f}, source: x}}}}"]))
    found = scenario.flows(*_parts(read))
    misses = np.cumprod([1.0, *(1 - h for h in hits)])
    expected = misses / (1 - back * misses[-1])
    assert [found[name].visits for name in names] == pytest.approx(expected.tolist(), abs=1e-4)


def test_popularity_gives_the_hits_of_a_simulated_cache() -> None:
    """Che's approximation lies within 1 % of a cache of 100 out of 1,000 items under Zipf's law, least recently used out."""
    popularity = Popularity(zipf=0.9, items=1000, size=100)
    rng = np.random.default_rng(0)
    p = np.arange(1, 1001.0) ** -0.9
    asked, cache, hits = rng.choice(1000, size=40_000, p=p / p.sum()), dict[int, None](), 0
    for i, item in enumerate(asked.tolist()):
        hits += i >= 5000 and item in cache
        cache.pop(item, None)
        cache[item] = None
        if len(cache) > 100:
            del cache[next(iter(cache))]
    assert abs(hits / 35_000 - scenario.hit_share(popularity)) < 0.01
    assert scenario.hit_share(Popularity(zipf=0.9, items=10, size=10)) == 1.0


# ---------------------------------------------------------------- JSON Schema


@functools.cache
def validator() -> jsonschema.Draft202012Validator:
    schema = scenario.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_schema_accepts_every_shipped_scenario_and_every_construct() -> None:
    check = validator()
    for name in scenario.names():
        text = (resources.folder("scenarios") / f"{name}.yaml").read_text(encoding="utf-8")
        assert [error.message for error in check.iter_errors(yaml.safe_load(text))] == []
    assert [error.message for error in check.iter_errors(yaml.safe_load(written(FULL)))] == []


def test_every_key_of_a_stage_is_in_the_schema_with_what_it_means() -> None:
    stage = scenario.schema()["$defs"]["Stage"]
    assert set(yaml.safe_load(written(FULL))["stages"]["a"]) <= set(stage["properties"])
    assert stage["additionalProperties"] is False
    assert "timeout" in stage["description"]


@settings(max_examples=30)
@given(st.data())
def test_what_the_schema_refuses_is_no_scenario(data: st.DataObject) -> None:
    """Whatever is put anywhere: a document that the schema refuses is refused by mlsys too, in one line."""
    document = yaml.safe_load(written(FULL))
    place = data.draw(st.sampled_from(_places(document)[1:]))
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = data.draw(
        st.none() | st.booleans() | st.integers() | st.sampled_from(["", "5", "10ms", "x", "30%", "$1/h"]) | st.just({}) | st.just([])
    )
    is_valid = validator().is_valid(document)
    try:
        scenario.parse(yaml.safe_dump(document), "here")
    except MlsysError as error:
        said = str(error)
    else:
        assert is_valid, (place, document)
        return
    assert said.startswith("here: ")
    assert "\n" not in said


def _places(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, child in children for p in _places(child, (*path, key)))]


# ---------------------------------------------------------------- what ships


def test_every_shipped_number_has_its_source() -> None:
    """Every assumed law, cache, route and escalation of what ships says where it is from; none names a path of some machine."""
    staged = [read for name in scenario.names() if isinstance(read := scenario.load(name), StageGraph)]
    assert {read.name for read in staged} >= {"rag-support-bot", "embed-service", "recsys-feed"}
    for read in staged:
        for stage in read.stages:
            service = stage.service.assumed or stage.service.roofline if stage.service else None
            for part in (service, stage.cache, stage.route, stage.escalate, stage.failure):
                assert part is None or len(part.source) > 20
        text = (resources.folder("scenarios") / f"{read.name}.yaml").read_text(encoding="utf-8")
        assert "/home" not in text
        assert "/work" not in text


def test_a_file_beside_the_scenario_is_found(tmp_path: Path) -> None:
    (tmp_path / "rank.json").write_text("{}")
    path = tmp_path / "s.yaml"
    path.write_text(written(f"a: {{service: {{measured: {{file: rank.json}}}}, {ON}}}"))
    read = scenario.check(path)
    assert isinstance(read, StageGraph)
    assert read.stage("a").service is not None
    assert Path(read.stage("a").service.measured.file) == tmp_path / "rank.json"  # type: ignore[union-attr]
    path.write_text(written(f"a: {{{WORK}}}").replace("mlsys: 1", "mlsys: 2"))
    with pytest.raises(ScenarioError, match="version"):
        scenario.check(path)
    assert math.isfinite(read.headroom)


def test_the_examples_of_the_documentation_hold_together(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "scenarios.md").read_text(encoding="utf-8")
    examples = [block.partition("```")[0] for block in page.split("```yaml\n")[1:]]
    assert len(examples) == 2
    for text in examples:
        (tmp_path / "x.yaml").write_text(text)
        validator().validate(yaml.safe_load(text))
        assert scenario.check(tmp_path / "x.yaml").headroom == pytest.approx(0.2)
    stage = scenario.schema()["$defs"]["Stage"]["properties"]
    assert all(f"`{key}" in page for key in stage), [key for key in stage if f"`{key}" not in page]
