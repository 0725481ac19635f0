"""Commands whose plain options need no validator: typer builds one of pydantic for every option, 0.15 s of CPU for those of `plan`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_NUMBER = re.compile(r"\d+(\.\d*)?")  # any other is left to the validator, which says what is wrong with it


class _Helped:
    """What asks for help only when help is asked for."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option --help, which is most often left out."""
        option: Any = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None and "process_value" not in vars(option):
            asked = option.process_value
            option.process_value = lambda ctx, value: asked(ctx, value) if value else value
        return option


class Lean(_Helped, TyperCommand):
    """A command that validates what was given: an option left out has nothing to validate, and text is text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for param in self.params:
            if not param.required and param.callback is None:
                setattr(param, "process_value", _plainly(param, param.process_value))  # noqa: B010  a method to mypy


class Group(_Helped, TyperGroup):
    """A group of such commands."""


class Door(typer.Typer):
    """A command line of such commands."""

    def command(self, name: str | None = None, *, cls: type[TyperCommand] | None = None, **kwargs: Any) -> Any:
        """Return what adds a command, as typer does."""
        return super().command(name, cls=cls or Lean, **kwargs)


def _plainly(param: Any, validated: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return how the values of an option are read."""
    is_many, descriptor = param.multiple or param.nargs == -1, getattr(param, "type_descriptor", None)
    kind = None if is_many else getattr(descriptor, "annotation", None)
    is_number = kind is float and not getattr(descriptor, "is_ranged", True)

    def process_value(ctx: Any, value: Any) -> Any:
        if value is None:
            return () if is_many else None
        if value is param.default or (kind is str and isinstance(value, str)):
            return value
        return float(value) if is_number and _NUMBER.fullmatch(str(value)) else validated(ctx, value)

    return process_value
