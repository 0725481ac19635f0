"""Scenarios: what ships loads; every mistake is one line with file, key and cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import scenario, slo
from mlsys_bench.errors import BadInput, MlsysError, ScenarioError, UnknownName
from mlsys_bench.fleets import Fleet
from mlsys_bench.types import Lengths, Provenance

GOOD = """\
mlsys: 1
name: chat
description: People chat.
source: assumed for this test
model: llama-3-8b
precision: [bf16, fp8]
gpus: [h100-sxm, L4]
max_batch: 64
headroom: 20%
traffic:
  rate: 20/s
  arrivals: poisson
  prompt: {dist: lognormal, mean: 900, cv: 1.2, max: 8192}
  output: 250
  source: assumed for this test
slo: {ttft_p95: 500ms, tpot_p99: 80ms}
"""


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def written(folder: Path, text: str) -> Path:
    path = folder / "chat.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str) -> str:
    """Return the line that refuses this text, without the path in front."""
    path = written(folder, text)
    with pytest.raises(BadInput) as caught:
        scenario.check(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    return said.removeprefix(f"{path}: ")


def test_a_scenario_is_read_into_si(tmp_path: Path) -> None:
    read = scenario.check(written(tmp_path, GOOD))
    assert (read.name, read.model, read.precision, read.gpus) == ("chat", "llama-3-8b", ("bf16", "fp8"), ("H100-SXM", "L4"))
    assert (read.max_batch, read.headroom, read.workload.rate_per_s, read.workload.arrivals) == (64, 0.2, 20.0, "poisson")
    assert read.workload.prompt_tokens == Lengths(dist="lognormal", mean=900, cv=1.2, max=8192)
    assert read.workload.output_tokens == Lengths(mean=250)
    assert read.workload.provenance is Provenance.ASSUMED
    assert slo.show(read.slo) == "ttft_p95<500ms,tpot_p99<80ms"


def test_every_shipped_scenario_loads_and_states_its_sources() -> None:
    assert "llm-chat" in scenario.names()
    for name in scenario.names():
        read = scenario.load(name)
        assert read.name == name
        assert len(read.source) > 40
        assert isinstance(read, Fleet) or len(read.workload.source or "") > 40


def test_a_path_with_a_suffix_is_a_file_and_anything_else_a_name(tmp_path: Path) -> None:
    assert scenario.load(written(tmp_path, GOOD)).name == "chat"
    assert scenario.load("llm-chat").name == "llm-chat"
    with pytest.raises(ScenarioError, match=r"gone\.yaml: cannot be read: No such file or directory"):
        scenario.load(str(tmp_path / "gone.yaml"))
    with pytest.raises(UnknownName, match=r"unknown scenario 'lm-chat'; did you mean llm-chat or llm-cascade\?"):
        scenario.load("lm-chat")
    with pytest.raises(UnknownName, match="unknown scenario"):
        scenario.load("../scenarios/llm-chat")


@pytest.mark.parametrize(
    "key", ["mlsys", "name", "description", "source", "model", "precision", "gpus", "max_batch", "headroom", "traffic", "slo"]
)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    document = yaml.safe_load(GOOD)
    del document[key]
    assert refusal(tmp_path, yaml.safe_dump(document)) == f"misses {key}"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("max_batch: 64", "max_batsh: 64", "unknown key max_batsh; did you mean max_batch?"),
        ("  rate: 20/s", "  rait: 20/s", "unknown key traffic.rait; did you mean rate?"),
        ("cv: 1.2", "scv: 1.2", "unknown key traffic.prompt.scv; did you mean cv?"),
        ("ttft_p95", "tfft_p95", "slo.tfft_p95: unknown metric 'tfft'; did you mean ttft"),
        ("ttft_p95: 500ms", "ttft_p95: 500", "slo.ttft_p95: 500 has no unit; did you mean 500ms?"),
        ("ttft_p95: 500ms", "ttft_p95: 500 m/s", "slo.ttft_p95: '500 m/s' has the unit 'm/s'"),
        ("rate: 20/s", "rate: 20", "traffic.rate: 20 has no unit; a rate needs one, did you mean 20/s?"),
        ("rate: 20/s", "rate: 0/s", "traffic.rate 0: a rate must be above zero"),
        ("rate: 20/s", "rate: [20/s]", "traffic.rate: ['20/s'] has no unit"),
        ("headroom: 20%", "headroom: 0.2", "headroom: 0.2 has no unit; a share needs one"),
        ("headroom: 20%", "headroom: 100%", "headroom: 100% must lie between 0% and 100%"),
        ("llama-3-8b", "lama-3-8b", "model: unknown model 'lama-3-8b'; did you mean llama-3"),
        ("[h100-sxm, L4]", "[h100-smx]", "gpus: unknown GPU or CPU 'h100-smx'; did you mean"),
        ("[h100-sxm, L4]", "[h100-sxm, H100]", "gpus: lists H100-SXM twice"),
        ("[h100-sxm, L4]", "h100", "gpus: 'h100' where a list is needed, e.g. [bf16]"),
        ("[h100-sxm, L4]", "[]", "gpus: an empty list where a list is needed"),
        ("[h100-sxm, L4]", "[t4]", "none of T4 computes in bf16"),
        ("[bf16, fp8]", "[bf61]", "precision: unknown precision 'bf61'; did you mean bf16"),
        ("[bf16, fp8]", "[bf16, bf16]", "precision: lists bf16 twice"),
        ("[bf16, fp8]", "[16]", "precision[0]: 16 where text is needed"),
        ("arrivals: poisson", "arrivals: poison", "traffic.arrivals: arrivals 'poison': write poisson, constant, gamma:CV, "),
        ("dist: lognormal", "dist: lognorm", "traffic.prompt.dist: unknown law 'lognorm'; did you mean lognormal"),
        ("dist: lognormal", "dist: constant", "traffic.prompt: a constant law has no cv"),
        ("cv: 1.2, ", "", "traffic.prompt: a lognormal law needs a cv"),
        ("mean: 900", "mean: .nan", "traffic.prompt: a mean of nan tokens"),
        ("mean: 900", "mean: 0", "traffic.prompt: a mean of 0 tokens"),
        ("mean: 900", "mean: 1e5", "traffic.prompt.mean: '1e5' where a number is needed; YAML reads it as text, write 100000"),
        ("max: 8192", "max: 0.5", "traffic.prompt.max: 0.5 where a whole number above zero is needed"),
        ("max_batch: 64", "max_batch: 1e5", "max_batch: '1e5' where a number is needed; YAML reads it as text, write 100000"),
        ("max_batch: 64", "max_batch: -3", "max_batch: -3 where a whole number above zero is needed"),
        ("max_batch: 64", "max_batch: yes", "max_batch: True where a number is needed"),
        ("max_batch: 64", "max_batch: .inf", "max_batch: inf where a whole number"),
        ("name: chat", "name: on", "name: YAML reads this as True; put it in quotes"),
        ("name: chat", "name:", "name: nothing where text is needed"),
        ("name: chat", "on: chat", "YAML reads on, off, yes and no as truth values; the key True is no text, put it in quotes"),
        ("name: chat", "name: chat\n7: seven", "the key 7 is no text, put it in quotes"),
        ("name: chat", "name: chat\nname: talk", "line 3: is not YAML: the key 'name' stands there twice"),
        ("cv: 1.2", "cv: 1.2, cv: 1.3", "line 13: is not YAML: the key 'cv' stands there twice"),
        ("mlsys: 1", "mlsys: 2", "mlsys: 2 is a version this mlsys cannot read; it reads 1"),
        ("slo: {ttft_p95: 500ms, tpot_p99: 80ms}", "slo: {}", "holds no limit"),
        ("slo: {ttft_p95: 500ms, tpot_p99: 80ms}", "slo: fast", "slo: 'fast' where keys and values are needed"),
        ("name: chat", "name: {", "line 4: is not YAML: while parsing a flow mapping"),
        ("name: chat", "\tname: chat", "line 2: is not YAML: "),
        ("name: chat", "name: !!python/object/apply:os.getcwd []", "line 2: is not YAML: could not determine a constructor"),
        ("name: chat", "? [a]\n: chat", "line 2: is not YAML: "),
        ("name: chat", "name: 2026-13-45", "is not YAML: month must be in 1..12"),
        ("name: chat", "name: \x07", "is not YAML: "),
    ],
)
def test_a_mistake_is_one_line_with_key_and_cure(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert says in refusal(tmp_path, changed(old, new))


@pytest.mark.parametrize(
    ("text", "says"), [("", "nothing where keys"), ("- a", "a list where keys"), ("just text", "'just text' where keys")]
)
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str, says: str) -> None:
    assert says in refusal(tmp_path, text)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "chat.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ScenarioError, match=r"chat\.yaml: is not UTF-8 text"):
        scenario.check(path)


def test_braces_without_end_are_refused() -> None:
    with pytest.raises(ScenarioError, match=r"^here: "):
        scenario.parse("[" * 3000, "here")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return every place in a document."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, child in children for p in places(child, (*path, key)))]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="ascii"), max_size=6) | st.dates(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(st.characters(codec="ascii"), max_size=4), inner, max_size=2),
    max_leaves=3,
)


@settings(max_examples=200)
@given(st.data())
def test_any_value_in_any_place_is_a_scenario_or_refused(data: st.DataObject) -> None:
    document = yaml.safe_load(GOOD)
    place = data.draw(st.sampled_from(places(document)[1:]))
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = data.draw(VALUES)
    try:
        read = scenario.parse(yaml.safe_dump(document), "here")
    except MlsysError as error:
        said = str(error)
    else:
        assert read.workload.rate_per_s > 0
        return
    assert said.startswith("here: ")
