"""Values of a scenario file, each checked where it stands: every mistake is one line with file, key and cure."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import yaml

from mlsys_bench.errors import BadInput, ScenarioError, did_you_mean


def section(value: object, keys: tuple[str, ...], where: str, path: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a mapping that has these keys and no others."""
    here = f"{where}: {path}" if path else where
    found = mapping(value, here)
    for key in found:
        if key not in keys:
            raise ScenarioError(f"{where}: unknown key {f'{path}.{key}'.lstrip('.')}{did_you_mean(key, keys)}")
    missing = [key for key in keys if key not in found and key not in optional]
    if missing:
        raise ScenarioError(f"{here}: misses {', '.join(missing)}")
    return found


def mapping(value: object, where: str) -> dict[str, Any]:
    """Return a mapping whose keys are text."""
    if not isinstance(value, dict):
        raise ScenarioError(f"{where}: {shown(value)} where keys and values are needed")
    for key in value:
        if not isinstance(key, str):
            hint = "YAML reads on, off, yes and no as truth values; " if isinstance(key, bool) else ""
            raise ScenarioError(f"{where}: {hint}the key {key!r} is no text, put it in quotes")
    return value


def names_of(value: object, where: str) -> tuple[str, ...]:
    """Return a list of texts that holds at least one."""
    if not isinstance(value, list) or not value:
        raise ScenarioError(f"{where}: {shown(value)} where a list is needed, e.g. [bf16]")
    return tuple(text(item, f"{where}[{i}]") for i, item in enumerate(value))


def unique(values: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Return the values, or raise where one stands twice."""
    twice = sorted({v for v in values if values.count(v) > 1})
    if twice:
        raise ScenarioError(f"{where}: lists {', '.join(twice)} twice")
    return values


def text(value: object, where: str) -> str:
    """Return text that says something."""
    if isinstance(value, bool):
        raise ScenarioError(f"{where}: YAML reads this as {value}; put it in quotes")
    if not isinstance(value, str) or not value.strip():
        raise ScenarioError(f"{where}: {shown(value)} where text is needed")
    return value.strip()


def number(value: object, where: str) -> float:
    """Return a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ScenarioError(f"{where}: {shown(value)} where a number is needed{_meant(value)}")
    return float(value)


def whole(value: object, where: str) -> int:
    """Return a whole number above zero."""
    found = number(value, where)
    if not found.is_integer() or found < 1:
        raise ScenarioError(f"{where}: {value} where a whole number above zero is needed")
    return int(found)


def _meant(value: object) -> str:
    """Return the number behind a text such as 1e5, which YAML 1.1 does not take for a number."""
    try:
        return f"; YAML reads it as text, write {float(str(value)):.12g}" if isinstance(value, str) else ""
    except ValueError:
        return ""


def shown(value: object) -> str:
    """Return what a person reads of a value that does not belong there."""
    if value is None or value == []:
        return "nothing" if value is None else "an empty list"
    return repr(value) if isinstance(value, str | int | float | bool) else f"a {type(value).__name__}"


def named(find: Any, name: str, where: str) -> Any:
    """Return what a catalogue has under a name, with the place in front of its complaint."""
    try:
        return find(name)
    except BadInput as error:
        raise type(error)(f"{where}: {error}") from error


# ---------------------------------------------------------------- YAML


MERGE = "tag:yaml.org,2002:merge"  # <<: what it brings may be said again


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping, or raise on a key that comes twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != MERGE]
        for i, key in enumerate(keys):
            if isinstance(key, Hashable) and key in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands there twice", node.value[i][0].start_mark)
        return super().construct_mapping(node, deep)


def document(text: str, where: str) -> Mapping[str, Any]:
    """Return the mapping that YAML text holds, every key once."""
    try:
        read = yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ScenarioError(f"{where}: {line}is not YAML: {_one_line(filter(None, (error.context, error.problem)))}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ScenarioError(f"{where}: is not YAML: {_one_line([str(error)])}") from error
    return mapping(read, where)


def _one_line(parts: Iterable[str]) -> str:
    return ", ".join(" ".join(part.split()) for part in parts)
