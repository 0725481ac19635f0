"""Commands whose plain options need no validator: typer builds one of pydantic for every option, 0.15 s of CPU for those of `plan`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from mlsys_bench import units
from mlsys_bench.errors import BadInput

Function = TypeVar("Function", bound=Callable[..., Any])
_NUMBER = re.compile(r"\d+(\.\d*)?", re.ASCII)  # any other is left to the validator, which says what is wrong with it
WRITTEN = frozenset({"out", "html", "md", "csv", "png", "draw", "junit", "comment", "bmf", "smaller_is_better", "bigger_is_better"})
READ = frozenset({"trace", "measured", "lengths_from", "dataset"})  # beside arguments: what cannot be made again once it is overwritten


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

    def make_parser(self, ctx: Any) -> Any:
        """Return what reads the words of the command line, and refuses an option that takes one value and is given several times."""
        parser: Any = super().make_parser(ctx)
        parse: Callable[..., tuple[dict[str, Any], list[str], list[Any]]] = parser.parse_args

        def parse_args(args: list[str]) -> tuple[dict[str, Any], list[str], list[Any]]:
            found = parse(args)
            for param, times in Counter(found[2]).items():
                if times > 1 and not (param.multiple or param.is_flag or param.nargs == -1):
                    many = f"{param.opts[0]} is given {times} times, and would count once"
                    raise BadInput(f"{many}; give it once, with commas between several values where it takes them")
            return found

        parser.parse_args = parse_args
        return parser

    def invoke(self, ctx: Any) -> Any:
        """Run the command, unless one of its files would overwrite another or what it reads."""
        keep_apart(self.params, ctx.params)
        return super().invoke(ctx)


class Group(_Helped, TyperGroup):
    """A group of such commands."""


class Door(typer.Typer):
    """A command line of such commands."""

    def command(self, name: str | None = None, *, cls: type[TyperCommand] | None = None, **kwargs: Any) -> Callable[[Function], Function]:
        """Return what adds a command, as typer does."""
        return super().command(name, cls=cls or Lean, **kwargs)


def keep_apart(params: list[Any], given: dict[str, Any]) -> None:
    """Raise BadInput where a file would be written twice, or over one that is read: what was there would be lost."""
    taken = {path: "" for param in params for path in _files(param, given) if param.param_type_name == "argument" or param.name in READ}
    for param in params:
        for path in _files(param, given) if param.name in WRITTEN else ():
            if path in taken:
                why = f"is written by {taken[path]} too" if taken[path] else "is read by this command, and would be lost"
                raise BadInput(f"{param.opts[0]} {path.name}: this file {why}; name another one")
            taken[path] = param.opts[0]


def _files(param: Any, given: dict[str, Any]) -> Iterator[Path]:
    """Give the files that an option or argument names; no device or pipe, which many may write to."""
    value = given.get(param.name or "")
    for path in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(path, Path) and (path.is_file() or not path.exists()):
            yield path.resolve()


def _check_plain(text: str, option: str) -> None:
    """Raise BadInput for what Python takes for a number and no person writes: 1_000, ' 24 ', infinity."""
    try:
        units.plain(text)
    except ValueError:
        raise BadInput(f"Invalid value for '{option}': {text!r} is no plain number; write it like 24 or 0.5") from None


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
        if kind in (int, float) and isinstance(value, str):
            _check_plain(value, param.opts[0])
        return float(value) if is_number and _NUMBER.fullmatch(str(value)) else validated(ctx, value)

    return process_value
