"""The `gate:` section of a YAML file, options above it, and which rule a metric has."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from mlsys_bench.errors import BadInput, UnitError
from mlsys_bench.gate import policy
from mlsys_bench.verdicts import Policy

WHOLE = """
gate:
  tolerance: 4%
  metrics: {engine.step: 3%, 'memory.*': 10%, loss: report, 'planner.*': 8% report}
  budgets: ["ttft_p95<500ms", memory.peak<2GB]
  tails: fail
  counters: 2%
"""


def read(tmp_path: Path, text: str) -> Policy:
    path = tmp_path / "gate.yaml"
    path.write_text(text, encoding="utf-8")
    return policy.load(path)


def test_every_key_of_the_section_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, WHOLE) == Policy(
        tolerance=0.04, tolerances={"engine.step": 0.03, "memory.*": 0.1, "planner.*": 0.08}, reported=("loss", "planner.*"),
        budgets=("ttft_p95<500ms", "memory.peak<2GB"), tails="fail", counter_tolerance=0.02,
    )  # fmt: skip


def test_an_empty_section_is_the_default_and_other_sections_are_not_the_gates(tmp_path: Path) -> None:
    assert read(tmp_path, "gate: {}\nsomething: [else]\n") == Policy()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gate: {tolerence: 5%}", "unknown key gate.tolerence; did you mean tolerance?"),
        ("gate: {tolerance: 5}", "gate.tolerance: 5 has no unit"),
        ("gate: {tolerance: 120%}", "gate.tolerance: a tolerance of 120% cannot be used"),
        ("gate: {tolerance: 0%}", "cannot be used; give a share between 0% and 100%"),
        ("gate: {tails: fial}", "gate.tails: unknown word 'fial'; did you mean fail?"),
        ("gate: {metrics: {'a.*.b': 3%}}", "gate.metrics.a.*.b: 'a.*.b' is no name of a metric; a * may only stand at its end"),
        ("gate: {metrics: {engine.step: 3}}", "gate.metrics.engine.step: 3 has no unit"),
        ("gate: {metrics: {engine.step: 3% repot}}", "gate.metrics.engine.step"),
        ("gate: {metrics: [engine.step]}", "where metrics and their tolerances are needed"),
        ("gate: {metrics: {}}", "where metrics and their tolerances are needed"),
        ("gate: {budgets: [ttft_p95]}", "gate.budgets[0]: budget 'ttft_p95' is not NAME<LIMIT"),
        ("gate: {budgets: ['ttft_p95<500ms', 'ttft_p95<600ms']}", "gate.budgets[1]: limits ttft_p95 twice"),
        ("gate: {budgets: ttft_p95<500ms}", "where a list is needed"),
        ("gate: 5%", "gate: '5%' where keys and values are needed"),
        ("gates: {tolerance: 5%}", "has no section `gate:`; did you mean gate for gates?"),
        ("[1]", "where a section `gate:` is needed"),
        ("gate: {tolerance: 5%}\ngate: {tolerance: 6%}", "the key 'gate' stands there twice"),
    ],
)
def test_each_mistake_names_file_key_and_cure(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        read(tmp_path, text)
    assert said in str(caught.value)
    assert "gate.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_line_stands_above_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(WHOLE, encoding="utf-8")
    found = policy.given(
        path, tolerance="2%", metrics=("engine.step=report", "new=7%"), budgets=("e2e_p99<2s,goodput>99%",), tails="report"
    )
    assert (found.tolerance, found.tails, found.counter_tolerance) == (0.02, "report", 0.02)
    assert found.budgets == ("e2e_p99<2s", "goodput>99%")
    assert found.tolerances == {"memory.*": 0.1, "planner.*": 0.08, "new": pytest.approx(0.07)}
    assert set(found.reported) == {"loss", "planner.*", "engine.step"}


def test_a_rule_about_nothing_that_was_measured_is_named() -> None:
    rules = Policy(tolerances={"command.wal": 0.03, "command.*": 0.1}, reported=("planner.*", "command.wall"))
    assert policy.idle(rules, ("command.wall", "command.wall.cpu")) == ("command.wal", "planner.*")
    assert policy.idle(Policy(), ("command.wall",)) == ()


def test_without_a_file_options_stand_above_the_defaults() -> None:
    assert policy.given() == Policy()
    assert policy.given(counters="3%") == Policy(counter_tolerance=0.03)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tolerance": "5"}, "--tolerance: '5' has no unit"),
        ({"metrics": ("engine.step",)}, "--metric: 'engine.step' is not NAME=TOLERANCE"),
        ({"metrics": ("engine.step=x",)}, "--metric engine.step: 'x' is no share"),
        ({"tails": "never"}, "--tails: unknown word 'never'"),
        ({"counters": "200%"}, "--counters: a tolerance of 200% cannot be used"),
        ({"budgets": ("ttft_p95",)}, "--slo: budget 'ttft_p95' is not NAME<LIMIT"),
    ],
)
def test_a_mistaken_option_is_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput) as caught:
        policy.given(**options)  # type: ignore[arg-type]  # as the command line hands them on
    assert said in str(caught.value)


def test_a_share_without_a_unit_is_an_error_of_units() -> None:
    with pytest.raises(UnitError):
        policy.given(metrics=("a=3",))


# ---------------------------------------------------------------- which rule


RULES = Policy(
    tolerance=0.05, tolerances={"memory.*": 0.1, "memory.peak": 0.02, "memory.peak.*": 0.3, "*": 0.06}, reported=("memory.*", "serve.*")
)


@pytest.mark.parametrize(
    ("name", "tolerance", "may_fail"),
    [
        ("memory.peak", 0.02, True),  # a whole name beats any beginning, also one that only reports
        ("memory.rss", 0.1, False),
        ("memory.peak.gpu", 0.3, True),  # the longest beginning
        ("serve.ttft", 0.06, False),  # reported by one rule, tolerated by another
        ("engine.step", 0.06, True),
    ],
)
def test_the_longest_match_decides(name: str, tolerance: float, may_fail: bool) -> None:
    assert policy.tolerance_of(RULES, name) == tolerance
    assert policy.may_fail(RULES, name) is may_fail


def test_what_no_rule_is_about_has_the_tolerance_of_all() -> None:
    assert policy.tolerance_of(Policy(tolerance=0.03), "anything") == 0.03
    assert policy.may_fail(Policy(), "anything")


def test_cpu_time_and_tail_go_by_the_rule_of_their_metric_unless_they_have_one() -> None:
    rules = Policy(tolerances={"engine.step": 0.02, "engine.step.p99": 0.4}, reported=("engine.step.cpu",))
    assert policy.tolerance_of(rules, "engine.step.cpu") == 0.02
    assert policy.tolerance_of(rules, "engine.step.p99") == 0.4
    assert not policy.may_fail(rules, "engine.step.cpu")
    assert policy.may_fail(rules, "engine.step")


names = st.text("ab.", min_size=1, max_size=5)
patterns = st.one_of(names, names.map(lambda n: f"{n}*"), st.just("*"))


@given(st.dictionaries(patterns, st.floats(0.01, 0.5), max_size=6), names)
def test_the_order_of_rules_does_not_matter_and_a_whole_name_always_wins(tolerances: dict[str, float], name: str) -> None:
    backwards = dict(reversed(tolerances.items()))
    found = policy.tolerance_of(Policy(tolerances=tolerances), name)
    assert found == policy.tolerance_of(Policy(tolerances=backwards), name)
    if name in tolerances:
        assert found == tolerances[name]
    assert policy.tolerance_of(Policy(tolerances=tolerances | {name: 0.9}), name) == 0.9


# ---------------------------------------------------------------- the schema


def test_the_schema_accepts_what_is_read_and_refuses_what_is_not() -> None:
    schema = policy.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(WHOLE), schema)
    for wrong in (
        {},
        {"gate": {"tolerence": "5%"}},
        {"gate": {"tolerance": 5}},
        {"gate": {"metrics": {"a*b": "3%"}}},
        {"gate": {"tails": "x"}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_the_schema_knows_every_key_that_is_read() -> None:
    assert set(policy.schema()["properties"]["gate"]["properties"]) == set(policy.KEYS)


def test_a_checked_file_is_told_in_a_line(tmp_path: Path) -> None:
    assert policy.told(read(tmp_path, WHOLE)) == (
        "tolerance 4%, engine.step 3%, memory.* 10%, planner.* 8%, loss only reported, planner.* only reported, ttft_p95<500ms, "
        "memory.peak<2GB, tails may fail the build, counters 2%"
    )


def test_the_command_checks_a_file_and_prints_the_format(tmp_path: Path) -> None:
    from mlsys_cli.main import app

    path = tmp_path / "gate.yaml"
    path.write_text("gate: {tolerance: 2%}", encoding="utf-8")
    checked, schema = (CliRunner().invoke(app, ["gate", "policy", *more]) for more in ([str(path)], []))
    assert (checked.exit_code, schema.exit_code) == (0, 0)
    assert checked.stdout.strip().endswith("gate.yaml: tolerance 2%, tails are reported, counters 1%")
    assert json.loads(schema.stdout) == policy.schema()
