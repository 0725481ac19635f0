"""A table of measured runs as rows of text, and each row as the experiments it is about."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mlsys_bench import hardware, models
from mlsys_bench.errors import BadInput, UnknownName, did_you_mean
from mlsys_bench.predict.experiment import Experiment

Figure = tuple[float, float, float]  # point, low, high
MS = 1000.0
MOST = 1e7  # of tokens, requests in flight, GPUs or requests per second: what is beyond is a slip of the pen
_NOTHING = ("", "n/a", "na", "nan", "-", "--", "none", "null")  # as spreadsheets and data frames write an empty cell
_THOUSANDS = re.compile(r"\d{1,3}(,\d{3})+")
_ENGINES = {
    "vllm": "vllm", "sglang": "sglang", "sgl": "sglang", "atom": "atom", "mlsys": "mlsys",
    **dict.fromkeys(("trtllm", "trt", "tensorrtllm", "tensorrt"), "trtllm"),
}  # fmt: skip
_ROUTED = re.compile(r"^(dynamo|mori)[-_ ]")  # what stands before the engine and spreads requests over its workers
_VERSION = re.compile(r"[-_ :]*v?(\d[\w.+-]*)$")
_PRECISIONS = {
    **dict.fromkeys(("bfloat16", "bfloat"), "bf16"), **dict.fromkeys(("float16", "half"), "fp16"),
    **dict.fromkeys(("float32", "float"), "fp32"), **dict.fromkeys(("float8", "fp8_e4m3", "fp8_block"), "fp8"),
    **dict.fromkeys(("int8_wo", "w8a16"), "int8"), **dict.fromkeys(("int4_wo", "w4a16", "w4a16_awq", "awq"), "int4"),
    **dict.fromkeys(("nvfp4", "mxfp4"), "fp4"),
}  # fmt: skip
_SEVERAL = {"auto": "is whatever the checkpoint holds", "gptq": "does not say of how many bits"}
_COUNTED = re.compile(r"(?:(\d{1,3})\s*x\s*)?(.+?)(?:(?:\s+x\s*|x)(\d{1,2}))?", re.IGNORECASE)  # RTX 4090 and RTX4090 are no 4090 RTs


@dataclass(frozen=True, slots=True)
class Column:
    """A result column: the figure it holds, and how many of the column's units one SI unit is."""

    figure: str
    per_unit: float = MS


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table: its text, the experiments it is about with each one's share of the requests, and what was measured.

    A row that cannot be understood has no parts and a problem.  `measured` is by column, in the column's own unit.
    """

    line: int
    cells: dict[str, str]
    parts: tuple[tuple[Experiment, float], ...] = ()
    measured: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def group(self) -> str:
        """What the row was measured together with."""
        return self.parts[0][0].group if self.parts else f"line {self.line}"


class Unclear(BadInput):
    """A row that is well-formed and still says too little, or names what no catalogue knows.  It is listed, not predicted."""


@dataclass(frozen=True, slots=True)
class Cells:
    """The text of one row, asked for by column.  A number that is none names its line and column."""

    line: int
    text: Mapping[str, str]

    def get(self, column: str) -> str:
        """Return the text of a column, empty where the table has no such column."""
        return self.text.get(column, "").strip()

    def number(self, column: str) -> float | None:
        """Return a number, None where the cell is empty or says that there is none.  Raises Unclear for a comma that groups no digits."""
        text = self.get(column)
        if text.lower() in _NOTHING:
            return None
        if "," in text:
            if not _THOUSANDS.fullmatch(text):
                raise Unclear(f"{column} is {text!r}; write it with a decimal point and without commas")
            text = text.replace(",", "")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise BadInput(f"line {self.line}, column {column}: {text!r} is no finite number")
        return value

    def positive(self, column: str) -> float:
        """Return a number above 0 that the row cannot be understood without."""
        value = self.number(column)
        if value is None or value <= 0:
            raise Unclear(f"{column} is {self.get(column) or 'empty'}; it must be above 0")
        if value > MOST:
            raise Unclear(f"{column} is {self.get(column)}; no run had more than {MOST:,.0f}")
        return value

    def whole(self, column: str, default: int | None = None) -> int:
        """Return a whole number of at least 1; the default where the cell is empty or 0."""
        value = self.number(column)
        if not value and default is not None:
            return default
        value = self.positive(column)
        if value != int(value):
            raise BadInput(f"line {self.line}, column {column}: {self.get(column)!r} is no whole number")
        return int(value)

    def flag(self, column: str) -> bool:
        """Return a yes or no; an empty cell is no."""
        return self.get(column).lower() in ("true", "1", "yes")

    def measured(self, columns: Mapping[str, Column]) -> dict[str, float]:
        """Return the results the row gives, by column; a result of 0 is none.  Raises BadInput for one below 0."""
        found = {column: self._result(column) for column in columns}
        below = [column for column, value in found.items() if value is not None and value < 0]
        if below:
            raise BadInput(f"line {self.line}, column {below[0]}: {self.get(below[0])!r} is below 0; no time and no rate is")
        return {column: value for column, value in found.items() if value}

    def _result(self, column: str) -> float | None:
        """Return a measured number.  Raises Unclear for one with a comma: 1,024 ms are a second to some, a millisecond to others."""
        if "," in self.get(column):
            raise Unclear(f"{column} is {self.get(column)!r}; write it with a decimal point and without commas")
        return self.number(column)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One kind of table: the columns that tell it from others, its results, and how a row is read.

    `derive` adds figures that follow from the others, such as throughput from latency in a closed loop.
    """

    name: str
    tells: tuple[str, ...]
    results: Mapping[str, Column]
    read: Callable[[Cells, str], Row]
    derive: Callable[[Experiment, dict[str, Figure]], dict[str, Figure]] = lambda experiment, figures: figures
    device: str = "gpu"  # the column that names the device


def figures_of(measured: Mapping[str, float], columns: Mapping[str, Column]) -> dict[str, float]:
    """Return results by figure, in SI units."""
    return {columns[column].figure: value / columns[column].per_unit for column, value in measured.items()}


def precision_id(name: str, model: str, plain: str = "bf16") -> str:
    """Return the precision a cell names; where it is empty, that of the model's own checkpoint, `plain` standing for 16 bit.

    Raises Unclear for one nobody knows.
    """
    if not name:
        own = models.find(model).native_precision
        return plain if own == "bf16" else own
    found = name.lower()
    found = _PRECISIONS.get(found.replace("-", "_").removeprefix("torch."), found)
    if found in _SEVERAL:
        raise Unclear(f"precision {name!r} {_SEVERAL[found]}; name the format of the weights, such as bf16, fp8 or int4")
    if found not in models.PRECISIONS:
        raise Unclear(f"unknown precision {name!r}{did_you_mean(found, models.PRECISIONS)}")
    return found


def engine_id(name: str, default: str = "") -> str:
    """Return the engine a cell names, however it spells it and with or without its version; the default where it is empty.

    Raises Unclear for one nobody knows: its times are those of no other.
    """
    plain = _ROUTED.sub("", _VERSION.sub("", name.lower()))
    found = _ENGINES.get(re.sub(r"[-_ ]", "", plain)) if name else default
    if not found:
        raise Unclear(f"unknown engine {name!r}{did_you_mean(plain, sorted(set(_ENGINES.values())))}" if name else "names no engine")
    return found


def engine_version(name: str) -> str:
    """Return the version after an engine's name: '0.15.1' of 'vllm-0.15.1', empty where there is none."""
    found = _VERSION.search(name)
    return found[1] if found else ""


def model_id(name: str) -> str:
    """Return the catalogue id of a model's name.  Raises Unclear for a model nobody knows."""
    try:
        return models.find(name).id
    except UnknownName as error:
        raise Unclear(str(error)) from error


def device_id(name: str) -> str:
    """Return the catalogue id of a device's name, with or without how many: 'H100', '8xH100'.  Raises Unclear for one nobody knows."""
    try:
        return hardware.find(counted(name)[1]).id
    except UnknownName as error:
        raise Unclear(str(error)) from error


def counted(name: str) -> tuple[int | None, str]:
    """Return how many devices a name says there are, None where it does not, and the name of one: '8xH100' and 'H100x8'."""
    found = _COUNTED.fullmatch(name.strip())
    before, rest, after = found.groups() if found else (None, name, None)
    count = before or after
    return (int(count), rest) if count else (None, name)
