"""Scenarios: a system, its traffic and its promises, read from YAML.

    mlsys: 1                   version of this format
    name, description          text
    source                     where the numbers below come from (those of the traffic: traffic.source)
    model                      a name of the model catalogue
    precision, gpus            lists of names to choose from
    max_batch, headroom        sequences a replica runs at once, share of its capacity that stays free
    traffic                    rate, arrivals, prompt, output (tokens: a number, or dist, mean, cv and max), source
    slo                        limits, e.g. ttft_p95: 500ms

Every key is required, nothing has a hidden default, and unknown keys are errors.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mlsys_bench import hardware, models, resources, slo, units, workload
from mlsys_bench.errors import BadInput, ScenarioError, did_you_mean, unknown
from mlsys_bench.types import SLO, Lengths, Scenario, Workload

VERSION = 1
_KEYS = ("mlsys", "name", "description", "source", "model", "precision", "gpus", "max_batch", "headroom", "traffic", "slo")
_TRAFFIC_KEYS = ("rate", "arrivals", "prompt", "output", "source")
_LENGTH_KEYS = ("dist", "mean", "cv", "max")
_DISTS = ("constant", "lognormal", "uniform")


def names() -> tuple[str, ...]:
    """Return the names of the scenarios that ship with mlsys."""
    return tuple(sorted(path.stem for path in resources.folder("scenarios").glob("*.yaml")))


def load(name_or_path: str | Path) -> Scenario:
    """Return a scenario: a path with a suffix is a file, anything else a shipped name.  Raises BadInput."""
    path = Path(name_or_path)
    if path.suffix:
        return check(path)
    if str(name_or_path) not in names():
        raise unknown("scenario", str(name_or_path), names())
    return check(resources.folder("scenarios") / f"{name_or_path}.yaml")


def check(path: Path) -> Scenario:
    """Return the scenario of a file whose every key, unit and name holds.  Raises BadInput naming file and key."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return parse(text, str(path))


def parse(text: str, where: str) -> Scenario:
    """Return the scenario of YAML text."""
    top = _section(_yaml(text, where), _KEYS, where, "")
    if top["mlsys"] != VERSION:
        raise ScenarioError(f"{where}: mlsys: {top['mlsys']!r} is a version this mlsys cannot read; it reads {VERSION}")
    precision = _names_of(top["precision"], f"{where}: precision")
    gpus = tuple(_named(hardware.find, name, f"{where}: gpus").id for name in _names_of(top["gpus"], f"{where}: gpus"))
    _check_precisions(precision, gpus, where)
    return Scenario(
        name=_text(top["name"], f"{where}: name"),
        description=_text(top["description"], f"{where}: description"),
        model=_named(models.find, _text(top["model"], f"{where}: model"), f"{where}: model").id,
        precision=precision,
        gpus=_unique(gpus, f"{where}: gpus"),
        workload=_workload(top["traffic"], where),
        slo=_slo(top["slo"], f"{where}: slo"),
        max_batch=_whole(top["max_batch"], f"{where}: max_batch"),
        headroom=_headroom(top["headroom"], f"{where}: headroom"),
        source=_text(top["source"], f"{where}: source"),
    )


# ---------------------------------------------------------------- sections


def _workload(value: object, where: str) -> Workload:
    traffic = _section(value, _TRAFFIC_KEYS, where, "traffic")
    arrivals = _text(traffic["arrivals"], f"{where}: traffic.arrivals")
    _named(workload.parse_arrivals, arrivals, f"{where}: traffic.arrivals")
    return Workload(
        rate_per_s=workload.checked_rate(units.per_s(traffic["rate"], f"{where}: traffic.rate"), f"{where}: traffic.rate"),
        arrivals=arrivals,
        prompt_tokens=_lengths(traffic["prompt"], where, "traffic.prompt"),
        output_tokens=_lengths(traffic["output"], where, "traffic.output"),
        source=_text(traffic["source"], f"{where}: traffic.source"),
    )


def _lengths(value: object, where: str, path: str) -> Lengths:
    """Return token counts: 128, or {dist: lognormal, mean: 900, cv: 1.2, max: 8192}; cv and max as the law needs them."""
    here = f"{where}: {path}"
    if not isinstance(value, dict):
        return workload.checked_lengths(Lengths(mean=_number(value, here)), here)
    law = _section(value, _LENGTH_KEYS, where, path, optional=("cv", "max"))
    if law["dist"] not in _DISTS:
        raise ScenarioError(f"{here}.dist: unknown law {law['dist']!r}{did_you_mean(str(law['dist']), _DISTS)}")
    if (law["dist"] == "constant") == ("cv" in law):
        raise ScenarioError(f"{here}: a {law['dist']} law {'has no' if 'cv' in law else 'needs a'} cv (coefficient of variation)")
    lengths = Lengths(
        dist=law["dist"],
        mean=_number(law["mean"], f"{here}.mean"),
        cv=_number(law["cv"], f"{here}.cv") if "cv" in law else 0.0,
        max=_whole(law["max"], f"{here}.max") if "max" in law else None,
    )
    return workload.checked_lengths(lengths, here)


def _check_precisions(precisions: tuple[str, ...], gpus: tuple[str, ...], where: str) -> None:
    """Raise when a precision is unknown, or when no device listed computes in any of them."""
    for name in precisions:
        if name not in models.PRECISIONS:
            raise ScenarioError(f"{where}: precision: unknown precision {name!r}{did_you_mean(name, models.PRECISIONS)}")
    _unique(precisions, f"{where}: precision")
    if not any(hardware.supports(hardware.find(gpu), name) for gpu in gpus for name in precisions):
        raise ScenarioError(f"{where}: none of {', '.join(gpus)} computes in {' or '.join(precisions)}; add another precision, e.g. fp16")


def _slo(value: object, where: str) -> SLO:
    limits = _mapping(value, where)
    if not limits:
        raise ScenarioError(f"{where}: holds no limit; write it like ttft_p95: 500ms")
    return slo.from_mapping(limits, where)


def _headroom(value: Any, where: str) -> float:
    share = units.fraction(value, where)
    if not 0 <= share < 1:
        raise ScenarioError(f"{where}: {value} must lie between 0% and 100%")
    return share


# ---------------------------------------------------------------- values


def _section(value: object, keys: tuple[str, ...], where: str, path: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a mapping that has these keys and no others."""
    here = f"{where}: {path}" if path else where
    found = _mapping(value, here)
    for key in found:
        if key not in keys:
            raise ScenarioError(f"{where}: unknown key {f'{path}.{key}'.lstrip('.')}{did_you_mean(key, keys)}")
    missing = [key for key in keys if key not in found and key not in optional]
    if missing:
        raise ScenarioError(f"{here}: misses {', '.join(missing)}")
    return found


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ScenarioError(f"{where}: {_shown(value)} where keys and values are needed")
    for key in value:
        if not isinstance(key, str):
            hint = "YAML reads on, off, yes and no as truth values; " if isinstance(key, bool) else ""
            raise ScenarioError(f"{where}: {hint}the key {key!r} is no text, put it in quotes")
    return value


def _names_of(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ScenarioError(f"{where}: {_shown(value)} where a list is needed, e.g. [bf16]")
    return tuple(_text(item, f"{where}[{i}]") for i, item in enumerate(value))


def _unique(values: tuple[str, ...], where: str) -> tuple[str, ...]:
    twice = sorted({v for v in values if values.count(v) > 1})
    if twice:
        raise ScenarioError(f"{where}: lists {', '.join(twice)} twice")
    return values


def _text(value: object, where: str) -> str:
    if isinstance(value, bool):
        raise ScenarioError(f"{where}: YAML reads this as {value}; put it in quotes")
    if not isinstance(value, str) or not value.strip():
        raise ScenarioError(f"{where}: {_shown(value)} where text is needed")
    return value.strip()


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ScenarioError(f"{where}: {_shown(value)} where a number is needed{_meant(value)}")
    return float(value)


def _whole(value: object, where: str) -> int:
    number = _number(value, where)
    if not number.is_integer() or number < 1:
        raise ScenarioError(f"{where}: {value} where a whole number above zero is needed")
    return int(number)


def _meant(value: object) -> str:
    """Return the number behind a text such as 1e5, which YAML 1.1 does not take for a number."""
    try:
        return f"; YAML reads it as text, write {float(str(value)):.12g}" if isinstance(value, str) else ""
    except ValueError:
        return ""


def _shown(value: object) -> str:
    if value is None or value == []:
        return "nothing" if value is None else "an empty list"
    return repr(value) if isinstance(value, str | int | float | bool) else f"a {type(value).__name__}"


def _named(find: Any, name: str, where: str) -> Any:
    """Return what a catalogue has under a name, with the place in front of its complaint."""
    try:
        return find(name)
    except BadInput as error:
        raise type(error)(f"{where}: {error}") from error


# ---------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping, or raise on a key that comes twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if isinstance(key, Hashable) and key in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands there twice", node.value[i][0].start_mark)
        return super().construct_mapping(node, deep)


def _yaml(text: str, where: str) -> Mapping[str, Any]:
    try:
        document = yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ScenarioError(f"{where}: {line}is not YAML: {_one_line(filter(None, (error.context, error.problem)))}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ScenarioError(f"{where}: is not YAML: {_one_line([str(error)])}") from error
    return _mapping(document, where)


def _one_line(parts: Iterable[str]) -> str:
    return ", ".join(" ".join(part.split()) for part in parts)
