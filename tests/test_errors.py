"""Errors: one line each, and the exit status of the kind of trouble."""

from __future__ import annotations

import pytest

from mlsys_bench import errors


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (errors.BadInput, 2),
        (errors.UnitError, 2),
        (errors.RecordError, 2),
        (errors.ScenarioError, 2),
        (errors.UnknownName, 2),
        (errors.NotBuilt, 2),
        (errors.Infeasible, 1),
        (errors.Overload, 1),
        (errors.NotComparable, 4),
        (errors.MeasurementFailed, 5),
        (errors.NothingYet, 5),
    ],
)
def test_an_error_ends_with_the_status_of_the_contract(kind: type[errors.MlsysError], status: int) -> None:
    assert kind.exit_status == status
    assert issubclass(kind, errors.MlsysError)


def test_every_error_stands_in_the_tree_of_the_docstring() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.MlsysError)]
    assert len(classes) == 12
    assert all(c.__name__ in (errors.__doc__ or "") for c in classes)


def test_overload_says_what_would_do() -> None:
    error = errors.Overload(1.234, 3, enough=4)
    assert str(error) == "utilisation is 1.23 with 3 server(s): the queue never settles at or above 1.00; 4 would do"
    assert (error.utilisation, error.servers, error.enough) == (1.234, 3, 4)
    assert str(errors.Overload(1.0, 1)).endswith("above 1.00")


def test_an_unknown_name_names_its_neighbours() -> None:
    error = errors.unknown("model", "lama-3-8b", ["llama-3-8b", "llama-2-7b", "gemma-2b"])
    assert isinstance(error, errors.UnknownName)
    assert str(error).startswith("unknown model 'lama-3-8b'; did you mean llama-3-8b")


def test_an_unknown_name_like_nothing_lists_what_is_known() -> None:
    assert str(errors.unknown("GPU", "zzz", ["T4", "L4"], "chat.yaml")) == "chat.yaml: unknown GPU 'zzz'; known: L4, T4"
    assert errors.did_you_mean("h1000", ["H100-SXM", "L4"]) == "; did you mean H100-SXM?", "case does not matter"
    many = errors.did_you_mean("zzz", [f"name{i:02}" for i in range(20)])
    assert many.endswith("name11, …")
