"""bench gpu, bench quality and serve: from options as typed to processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlsys_bench import bench, hardware, readings, record, units
from mlsys_bench.bench import quality as losses
from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.journeys.progress import Line
from mlsys_bench.types import Bench, Machine


def gpu(
    *,
    device: str,
    suite: str,
    only: str | None,
    model: str,
    precision: str,
    launches: int,
    budget: str | None,
    threads: int | None,
    max_batch: int,
    max_step_tokens: int,
    max_context: int,
    seed: int,
    out: Path | None,
    backend: str = "auto",
    kv: str = "auto",
    deterministic: bool = False,
    quiet: bool = False,
) -> tuple[Bench, list[readings.Row]]:
    """Measure, write the record when asked, and return it with the rows a person reads."""
    options = bench.Options(
        device=device,
        suite=suite,
        only=tuple(part.strip() for part in only.split(",") if part.strip()) if only else (),
        model=model,
        precisions=tuple(part.strip() for part in precision.split(",")),
        launches=launches,
        budget_s=units.seconds(budget, "--budget") if budget else None,
        threads=threads or 1,
        max_batch=max_batch,
        max_step_tokens=max_step_tokens,
        max_context=max_context,
        backend=backend,
        kv=kv,
        deterministic=deterministic,
        seed=seed,
    )
    return measure(options, out, quiet)


def measure(options: bench.Options, out: Path | None, quiet: bool = False) -> tuple[Bench, list[readings.Row]]:
    """Run the benchmarks with a live line; what was measured before a Ctrl-C is kept.  Raises MeasurementFailed when nothing was."""
    if out is not None:
        record.check_writable(out)
    line = Line(quiet)
    try:
        result = bench.run(options, lambda progress: line.show(str(progress.text)))
    finally:
        line.clear()
    machine = hardware.machine()
    rows = readings.table(result, machine, losses.known())
    if out is not None:
        _write(out, result, machine, rows)
    if all(m.skipped is not None for m in result.measurements):
        reasons = sorted({m.skipped for m in result.measurements if m.skipped})
        raise MeasurementFailed(f"nothing was measured: {reasons[0] if reasons else 'no benchmark matched'}")
    return result, list(rows)


def _write(out: Path, result: Bench, machine: Machine, rows: Sequence[readings.Row]) -> Path:
    """Write the record, or where the file is named *.csv the rows as a table."""
    return readings.write_csv(out, rows) if out.suffix == ".csv" else record.write(out, result, machine)


def quality(
    *,
    precision: str,
    quantizer: str,
    kv: str,
    steps: int | None,
    windows: int,
    backend: str,
    threads: int | None,
    out: Path | None,
    quiet: bool = False,
) -> Bench:
    """Measure what number formats cost on the trained byte model, and write the record when asked."""
    if out is not None:
        record.check_writable(out)
    options = losses.Options(
        precisions=_names(precision), quantizers=_names(quantizer), kvs=_names(kv), steps=steps, windows=windows, backend=backend,
        threads=threads,
    )  # fmt: skip
    line = Line(quiet)
    try:
        result = losses.run(options, line.counted)
    finally:
        line.clear()
    if out is not None:
        record.write(out, result, hardware.machine())
    if all(m.skipped for m in result.measurements):
        raise MeasurementFailed("nothing was measured: stopped before the first loss")
    return result


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def serve(
    *,
    model: str,
    precision: str,
    device: str,
    host: str,
    port: int,
    max_batch: int,
    max_step_tokens: int,
    max_context: int,
    kv_tokens: int | None,
    queue_limit: int,
    threads: int | None,
    backend: str,
    kv: str,
    deterministic: bool,
    prefix_cache: bool,
    swap: bool,
    speculate: str | None,
    step_log: Path | None,
    seed: int,
) -> None:
    """Serve until a signal ends it.  Raises BadInput for a scenario, saying which model of it can be served."""
    from mlsys_bench import serve as server

    _check_is_model(model)
    server.run(
        server.Options(
            model=model,
            precision=precision,
            device=device,
            host=host,
            port=port,
            max_batch=max_batch,
            max_step_tokens=max_step_tokens,
            max_context=max_context,
            kv_tokens=kv_tokens,
            queue_limit=queue_limit,
            threads=threads,
            backend=backend,
            kv=kv,
            deterministic=deterministic,
            prefix_cache=prefix_cache,
            preempt="swap" if swap else "recompute",
            speculate=speculate,
            step_log=None if step_log is None else str(step_log),
            seed=seed,
        )
    )


def _check_is_model(name: str) -> None:
    """Raise BadInput for a scenario: its limits and its fleet are a plan's, one server has a model."""
    from mlsys_bench import scenario

    is_one = name in scenario.names() or Path(name).suffix in (".yaml", ".yml")
    if not is_one or Path(name).is_dir():  # a folder is a checkpoint
        return
    model = getattr(scenario.load(name), "model", None)
    one = f"`mlsys serve {model}`" if model else "name the model of one of its stages"
    raise BadInput(
        f"mlsys serve {name}: is a scenario, and a server has a model: {one}, or the folder of its checkpoint; "
        f"`mlsys plan {name}` says how many it needs"
    )
