"""Records: what goes into a file comes out of it, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlsys_bench import record
from mlsys_bench.errors import RecordError
from mlsys_bench.types import Bench, Launch, LoadTest, Machine, Measurement, RequestRecord, Requests, Round, Workload
from tests import strategies

MACHINE = Machine(hard={"cores": 2, "cpu_vendor": "GenuineIntel", "torch": None}, soft={"load_1min": 0.25, "turbo": True})
BENCH = Bench(
    measurements=(
        Measurement(
            name="engine.step",
            unit="s",
            better="lower",
            parameters={"decode_seqs": 4, "precision": "bf16"},
            launches=(Launch(started_s=1.5, rounds=(Round(values=(0.25, 0.5), cpu_s=(0.25, 0.5), involuntary=(0, 3)),)),),
        ),
    )
)
REQUESTS = Requests(
    t0_unix_s=1.7e9,
    requests=(
        RequestRecord(index=0, scheduled_s=0.0, sent_s=0.01, token_s=(0.1, 0.2), tokens_per_event=(1, 2), stage_s={"engine": 0.1}),
        RequestRecord(index=1, scheduled_s=0.5, outcome="connect", in_window=False),
    ),
)
JSON_KINDS = sorted(set(record.KINDS) - {"requests"})


def stored(folder: Path, **changes: Any) -> Path:
    """Write a bench record with some of its keys replaced."""
    path = folder / "bench.json"
    path.write_text(json.dumps(json.loads(record.dumps(BENCH, MACHINE)) | changes))
    return path


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("kind", JSON_KINDS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_json_record_reads_back_as_it_was_written(kind: str, data: st.DataObject) -> None:
    value = data.draw(strategies.of(record.KINDS[kind]))
    machine = data.draw(strategies.of(Machine))
    head, back = record.loads(record.dumps(value, machine), "here")
    assert back == value
    assert repr(back) == repr(value), "equal, but of other types (True for 1, 1 for 1.0)"
    assert (head.schema, head.kind, head.machine, head.inputs) == (record.SCHEMA, kind, machine, {})


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(requests=strategies.of(Requests))
def test_requests_read_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, requests: Requests) -> None:
    path = record.write(tmp_path_factory.mktemp("requests") / "r.parquet", requests, MACHINE)
    head, back = record.load(path)
    assert back == requests
    assert (head.kind, head.machine) == ("requests", MACHINE)


def test_no_field_of_a_record_hides_one_of_the_envelope() -> None:
    envelope = {f.name for f in dataclasses.fields(record.Envelope)}
    for kind, cls in record.KINDS.items():
        assert not envelope & {f.name for f in dataclasses.fields(cls)}, kind


def test_a_file_remembers_the_files_it_was_made_from(tmp_path: Path) -> None:
    """The digest is SHA-256; that of 'abc' stands in FIPS 180."""
    source = tmp_path / "source.json"
    source.write_bytes(b"abc")
    head, _ = record.load(record.write(tmp_path / "bench.json", BENCH, MACHINE, inputs=[source]))
    assert head.inputs == {"source.json": "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}


def test_writing_makes_the_folder_and_replaces_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.json"
    record.write(path, Bench(measurements=()), MACHINE)
    record.write(path, BENCH, MACHINE)
    assert record.read(path, Bench) == BENCH
    assert [p.name for p in path.parent.iterdir()] == ["bench.json"], "no temporary file stays"


# ---------------------------------------------------------------- refusals


def test_a_record_of_another_kind_says_what_it_is(tmp_path: Path) -> None:
    path = record.write(tmp_path / "bench.json", BENCH, MACHINE)
    with pytest.raises(RecordError, match=r"bench\.json: holds a 'bench' record; a 'workload' record is needed here"):
        record.read(path, Workload)


def test_requests_where_a_summary_is_wanted_are_refused(tmp_path: Path) -> None:
    path = record.write(tmp_path / "r.parquet", REQUESTS, MACHINE)
    with pytest.raises(RecordError, match="holds a 'requests' record; a 'loadtest' record"):
        record.read(path, LoadTest)


@pytest.mark.parametrize("keep", [0, 1, 40, 0.5, 0.99])
def test_a_truncated_json_file_is_refused(tmp_path: Path, keep: float) -> None:
    path = record.write(tmp_path / "bench.json", BENCH, MACHINE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep >= 1 or keep == 0 else keep * len(whole))])
    with pytest.raises(RecordError, match=r"bench\.json: is not JSON, or was cut off"):
        record.load(path)


@pytest.mark.parametrize("keep", [4, 100, -1, -20])
def test_a_truncated_parquet_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = record.write(tmp_path / "r.parquet", REQUESTS, MACHINE)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RecordError, match=r"r\.parquet: is not Parquet, or was cut off"):
        record.load(path)


@pytest.mark.parametrize("schema", ["mlsys/2", "mlsys/0", 1, None])
def test_another_schema_version_is_refused(tmp_path: Path, schema: object) -> None:
    with pytest.raises(RecordError, match=r"has schema .*, this version reads 'mlsys/1'; make the file again"):
        record.load(stored(tmp_path, schema=schema))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_none_is_refused_with_its_place(tmp_path: Path, number: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(record.dumps(BENCH, MACHINE).replace("0.5", number, 1))
    with pytest.raises(RecordError, match=r"measurements\[0\]\.launches\[0\]\.rounds\[0\]\.values\[1\] is .* a finite number"):
        record.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_but_finite_numbers_is_written(tmp_path: Path, value: float) -> None:
    broken = Bench(
        measurements=(dataclasses.replace(BENCH.measurements[0], launches=(Launch(started_s=0.0, rounds=(Round(values=(value,)),)),)),)
    )
    for record_, name in (
        (broken, "b.json"),
        (dataclasses.replace(REQUESTS, requests=(RequestRecord(index=0, scheduled_s=value),)), "r.parquet"),
    ):
        with pytest.raises(RecordError, match="a measurement must be a finite number"):
            record.write(tmp_path / name, record_, MACHINE)
        assert not (tmp_path / name).exists()


def test_an_unknown_key_names_its_neighbour(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"unknown key measurments; did you mean measurements\?"):
        record.load(stored(tmp_path, measurments=[]))


def test_an_unknown_key_deep_inside_is_found(tmp_path: Path) -> None:
    document = json.loads(record.dumps(BENCH, MACHINE))
    document["measurements"][0]["launches"][0]["began"] = 3
    with pytest.raises(RecordError, match=r"unknown key measurements\[0\]\.launches\[0\]\.began"):
        record.load(stored(tmp_path, **document))


def test_an_unknown_kind_names_its_neighbour(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"unknown kind 'benches'; did you mean bench or backtest\?"):
        record.load(stored(tmp_path, kind="benches"))


def test_a_value_of_the_wrong_type_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"Expected `array`, got `int`.*measurements"):
        record.load(stored(tmp_path, measurements=3))


@pytest.mark.parametrize("text", ["[]", "3", "null", '"mlsys/1"', "{}", '{"kind": "bench"}'])
def test_json_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"x\.json: is no mlsys record"):
        record.load(path)


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"\x00\x01\x02", b"<html></html>", b"PK\x03\x04zip"])
def test_bytes_that_are_no_json_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(RecordError, match=r"x\.json: is not JSON"):
        record.load(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"gone\.json: cannot be read: No such file or directory"):
        record.load(tmp_path / "gone.json")
    with pytest.raises(RecordError, match="cannot be read: Is a directory"):
        record.load(tmp_path)


def test_a_place_is_tried_before_minutes_are_spent_on_what_goes_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    record.check_writable(tmp_path / "new" / "bench.json")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(RecordError, match=r"bench\.json: cannot be written"):
        record.check_writable(tmp_path / "file" / "bench.json")
    with pytest.raises(RecordError, match="it is a folder"):
        record.check_writable(tmp_path)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecordError, match="cannot be written"):
        record.write(tmp_path / "bench.json" / "..", BENCH, MACHINE)


def test_parquet_of_somebody_else_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(RecordError, match="is Parquet, but no mlsys record"):
        record.load(tmp_path / "a.parquet")


def rewritten(folder: Path, change: Any) -> Path:
    """Write a requests file whose table went through `change`."""
    import pyarrow.parquet as pq

    path = record.write(folder / "r.parquet", REQUESTS, MACHINE)
    pq.write_table(change(pq.read_table(path)), path)
    return path


def test_parquet_of_another_schema_version_is_refused(tmp_path: Path) -> None:
    def other(table: Any) -> Any:
        head = json.loads(table.schema.metadata[b"mlsys"]) | {"schema": "mlsys/2"}
        return table.replace_schema_metadata({"mlsys": json.dumps(head)})

    with pytest.raises(RecordError, match="has schema 'mlsys/2'"):
        record.load(rewritten(tmp_path, other))


def test_parquet_with_nan_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    with pytest.raises(RecordError, match=r"\[1\]\.scheduled_s is nan"):
        record.load(rewritten(tmp_path, lambda t: t.set_column(1, "scheduled_s", pa.array([0.0, float("nan")]))))


def test_parquet_with_a_column_too_many_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    with pytest.raises(RecordError, match="unknown key colour"):
        record.load(rewritten(tmp_path, lambda t: t.append_column("colour", pa.array(["red", "blue"]))))


def test_parquet_with_a_column_too_few_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="scheduled_s"):
        record.load(rewritten(tmp_path, lambda t: t.drop_columns(["scheduled_s"])))


@pytest.mark.parametrize("metadata", ["{}", "[]", "no json", '{"schema": "mlsys/1"}'])
def test_parquet_with_broken_metadata_is_refused(tmp_path: Path, metadata: str) -> None:
    with pytest.raises(RecordError, match=r"r\.parquet"):
        record.load(rewritten(tmp_path, lambda t: t.replace_schema_metadata({"mlsys": metadata})))


JSON = st.recursive(
    st.none() | st.booleans() | strategies.INTS | strategies.FLOATS | strategies.TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(strategies.TEXTS, inner, max_size=2),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, child in children for p in places(child, (*path, key)))]


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_record_is_refused_or_read_but_never_crashes(data: st.DataObject) -> None:
    """Any JSON in any place: the answer is a record that writes back, or RecordError."""
    document = json.loads(record.dumps(BENCH, MACHINE))
    place = data.draw(st.sampled_from(places(document)[1:]))
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = data.draw(JSON)
    try:
        _, back = record.loads(json.dumps(document), "here")
    except RecordError as error:
        said = str(error)
    else:
        assert record.loads(record.dumps(back, MACHINE), "there")[1] == back
        return
    assert said.startswith("here: ")


def test_json_nested_without_end_is_refused() -> None:
    with pytest.raises(RecordError, match="here"):
        record.loads("[" * 100_000, "here")
