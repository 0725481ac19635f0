"""What number formats cost: the loss of the trained byte model in each, `quality.loss` in bit per byte, window by window of held-out text.

All ways see the same windows, so that a difference is taken pair by pair and is known far better than the losses themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlsys_bench import hardware, record
from mlsys_bench.engine.native.build import cache_folder
from mlsys_bench.errors import BadInput, MeasurementFailed, MlsysError
from mlsys_bench.types import Bench, Launch, Measurement, Round, Scalar

if TYPE_CHECKING:
    from mlsys_bench.engine.quality import Quality, Way
    from mlsys_bench.engine.train import ByteModel

NAME, UNIT = "quality.loss", "bit/byte"
WINDOWS = 512
DEFAULT_PRECISIONS = ("fp32", "bf16", "int8", "w8a8", "int4g32", "int4g64", "int4g128", "w4a8g32")
Told = Callable[[str], Callable[[int, int], None]]  # (of what) -> (how many are done, of how many)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One `mlsys bench quality` run."""

    precisions: tuple[str, ...] = DEFAULT_PRECISIONS
    quantizers: tuple[str, ...] = ("rtn", "gptq")  # of those in 4 bit
    kvs: tuple[str, ...] = ("int8",)  # KV caches, each beside fp32 weights
    steps: int | None = None  # of training; None: the recipe's own
    windows: int = WINDOWS
    backend: str = "auto"
    threads: int | None = None


def run(options: Options, told: Told) -> Bench:
    """Train the byte model unless it is in the cache, and return its losses.  Ctrl-C ends it: what was measured by then is returned.

    Raises BadInput for names nobody knows, MeasurementFailed where nothing was measured.
    """
    if importlib.util.find_spec("torch") is None:
        raise MeasurementFailed("measuring needs torch, which is not installed; pip install 'mlsys-bench[engine]'")
    if options.windows < 2:
        raise BadInput(f"windows is {options.windows}; an interval needs at least 2")
    if options.steps is not None and options.steps < 1:
        raise BadInput(f"steps is {options.steps}; the model learns in at least 1")
    ways = ways_of(options)  # what is wrong with them is said before minutes of training
    try:
        model = trained(options.steps, told)
    except KeyboardInterrupt:
        raise MeasurementFailed("stopped before the byte model had learnt: nothing was kept; it takes a few minutes, once") from None
    measured = tuple(_measured(model, ways, options, told))
    lost = sum(m.skipped is not None for m in measured)
    result = Bench(
        measurements=measured, stopped=f"stopped by hand after {len(measured) - lost} of {len(measured)} losses" if lost else None
    )
    if not lost and _is_worth_keeping(options, result):
        with contextlib.suppress(OSError):  # a cache that cannot be written is done without
            record.write(_kept(), result, hardware.machine())
    return result


def known() -> dict[str, float]:
    """Return what each precision, rounded to nearest, was found to cost on this machine: bit per byte above fp32.  {} before the first run.

    It is shown beside speeds, which are worth nothing without it; a file that is broken is as none.
    """
    try:
        return _costs(record.read(_kept(), Bench)) if _kept().exists() else {}
    except (MlsysError, OSError, LookupError):
        return {}


def _is_worth_keeping(options: Options, result: Bench) -> bool:
    """Whether these costs may stand beside speeds: of the recipe's model, over windows enough, and none that is known is lost."""
    is_whole = options.steps is None and options.windows >= WINDOWS and options.backend == "auto"
    return is_whole and known().keys() <= _costs(result).keys()


def _costs(result: Bench) -> dict[str, float]:
    means = {
        str(m.parameters["precision"]): float(np.mean(m.launches[0].rounds[0].values))
        for m in result.measurements
        if m.parameters["quantizer"] == "rtn" and m.parameters["kv"] == "auto"
    }
    return {precision: loss - means["fp32"] for precision, loss in means.items()}


def _kept() -> Path:
    return cache_folder() / "byte-llama-losses.json"


def ways_of(options: Options) -> tuple[Way, ...]:
    """Return the ways to keep a model that are asked for, fp32 first: what all others are compared with."""
    from mlsys_bench.engine.quality import way

    ways = [way("fp32")]
    for precision in options.precisions:
        is_four_bit = way(precision).precision.startswith(("int4", "w4a8"))
        ways += [way(precision, quantizer) for quantizer in (options.quantizers if is_four_bit else ("rtn",))]
    return tuple(dict.fromkeys([*ways, *(way("fp32", kv=kv) for kv in options.kvs)]))


def trained(steps: int | None, told: Told) -> ByteModel:
    """Return the byte model, trained with a count of its steps if it is not there yet."""
    from mlsys_bench.engine import train

    recipe = train.Recipe() if steps is None else train.Recipe(steps=steps)
    tell = told("steps of training the byte model")
    return train.byte_model(recipe, progress=lambda done, of, _: tell(done, of))


def _measured(model: ByteModel, ways: tuple[Way, ...], options: Options, told: Told) -> Iterator[Measurement]:
    from mlsys_bench.engine.quality import Quality

    quality = Quality(model, count=options.windows, backend=options.backend, threads=options.threads)
    tell, is_stopped = told("losses"), False
    for done, way in enumerate(ways):
        tell(done, len(ways))
        try:
            launches = () if is_stopped else (_launch(quality, way),)
        except KeyboardInterrupt:
            launches, is_stopped = (), True
        yield Measurement(
            name=NAME, unit=UNIT, better="lower", parameters=_parameters(model, way, options), launches=launches,
            skipped="interrupted" if is_stopped else None, deterministic=True,
        )  # fmt: skip


def _launch(quality: Quality, way: Way) -> Launch:
    started_s = time.time()
    return Launch(started_s=started_s, rounds=(Round(values=tuple(quality.losses(way).tolist())),))


def _parameters(model: ByteModel, way: Way, options: Options) -> dict[str, Scalar]:
    return {
        "model": model.shape.id, "precision": way.precision, "quantizer": way.quantizer, "kv": way.kv, "backend": options.backend,
        "steps": model.recipe.steps, "corpus": model.corpus.digest,
    }  # fmt: skip
