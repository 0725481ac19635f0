"""Documents in YAML that people write: each value knows its file and key, so that every complaint names both.

A `Node` is a value with its place.  Its methods return what is wanted of it or raise BadInput: unknown keys are errors that name the
nearest known one, quantities carry units, and nothing has a hidden default.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mlsys_bench.errors import BadInput, did_you_mean

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Node:
    """A value of a document and its place: 'prices.yaml: offers[0].on_demand'."""

    value: Any
    file: str
    path: str = ""

    @property
    def where(self) -> str:
        """File and key, as every complaint begins."""
        return f"{self.file}: {self.path}" if self.path else self.file

    def section(self, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Node]:
        """Return a mapping that has the required keys, perhaps the optional ones, and no others."""
        if not isinstance(self.value, dict):
            raise self.complaint("where keys and values are needed")
        known = (*required, *optional)
        for key in self.value:
            if not isinstance(key, str):
                raise BadInput(f"{self.where}: the key {key!r} is no text, put it in quotes")
            if key not in known:
                raise BadInput(f"{self.file}: unknown key {self._below(key)}{did_you_mean(key, known)}")
        missing = [key for key in required if key not in self.value]
        if missing:
            raise BadInput(f"{self.where}: misses {', '.join(missing)}")
        return {key: Node(value, self.file, self._below(key)) for key, value in self.value.items()}

    def items(self) -> list[Node]:
        """Return the entries of a list."""
        if not isinstance(self.value, list) or not self.value:
            raise self.complaint("where a list of at least one entry is needed" if self.value == [] else "where a list is needed")
        return [Node(value, self.file, f"{self.path}[{i}]") for i, value in enumerate(self.value)]

    def text(self) -> str:
        """Return a text that is not empty; a day may stand without quotes."""
        if isinstance(self.value, datetime.date):
            return self.value.isoformat()
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.complaint("where text is needed")
        if not self.value.strip().isprintable():
            raise self.complaint("where text is needed that prints on one line")
        return self.value.strip()

    def choice(self, known: Iterable[str]) -> str:
        """Return one of some words."""
        word, words = self.text(), tuple(known)
        if word not in words:
            raise BadInput(f"{self.where}: unknown word {word!r}{did_you_mean(word, words)}")
        return word

    def whole(self, least: int = 0) -> int:
        """Return a whole number from `least` up."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value < least:
            raise self.complaint(f"where a whole number from {least} up is needed")
        return self.value

    def number(self, least: float = -math.inf) -> float:
        """Return a finite number from `least` up."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not least <= self.value < math.inf:
            raise self.complaint("where a number is needed" if least == -math.inf else f"where a number from {least:g} up is needed")
        return float(self.value)

    def quantity(self, parse: Callable[[Any, str], float], least: float = 0.0, most: float = math.inf, why: str = "") -> float:
        """Return what a function of `units` reads, from `least` to `most`; `why` follows the complaint about anything else."""
        value = parse(self.value, self.where)
        if not least <= value <= most:
            raise BadInput(f"{self.where}: {self.value} is out of bounds{why}")
        return value

    def named(self, find: Callable[[str], T]) -> T:
        """Return what a catalogue has under a name, with the place in front of its complaint."""
        text = self.text()
        try:
            return find(text)
        except BadInput as error:
            raise BadInput(f"{self.where}: {error}") from error

    def complaint(self, rule: str) -> BadInput:
        """Return the error for a value that is none of what is needed."""
        kinds = {dict: "keys and values", list: "a list" if self.value else "an empty list", type(None): "nothing"}
        kind = repr(self.value) if isinstance(self.value, str | int | float) else kinds.get(type(self.value), "something else")
        return BadInput(f"{self.where}: {kind} {rule}")

    def _below(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key


def read(path: Path) -> Node:
    """Return the document of a YAML file in which no key stands twice.  Raises BadInput."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return parse(text, str(path))


def parse(text: str, where: str) -> Node:
    """Return the document of YAML text."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            """Return the mapping, or raise on a key that comes twice."""
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for i, key in enumerate(keys):
                if key in keys[:i]:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands there twice", node.value[i][0].start_mark)
            return super().construct_mapping(node, deep)

    try:
        return Node(yaml.load(text, Loader), where)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise BadInput(f"{where}: {line}is not YAML: {', '.join(filter(None, (error.context, error.problem)))}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInput(f"{where}: is not YAML: {' '.join(str(error).split())}") from error
