"""What a person typed, put together again: for commands that pass a run on to another machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer


def words(context: typer.Context, *leave_out: str) -> list[str]:
    """Return the arguments and options that were typed, as words for a shell, save those left out by name."""
    found: list[str] = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE" and parameter.name not in leave_out:
            found += _words(parameter, context.params[parameter.name or ""])
    return found


def _words(parameter: Any, value: Any) -> list[str]:
    if parameter.param_type_name == "argument":
        return [str(value)]
    if getattr(parameter, "is_flag", False):
        return [parameter.opts[0] if value else parameter.secondary_opts[0]]
    many = value if isinstance(value, (list, tuple)) else [value]
    return [word for each in many for word in (parameter.opts[0], _text(each))]


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value.as_posix() if isinstance(value, Path) else str(value)
