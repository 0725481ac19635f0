"""workload: from a trace, from production metrics or from laws to a record."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from collections.abc import Mapping
from pathlib import Path

from mlsys_bench import record, units, workload
from mlsys_bench.errors import BadInput
from mlsys_bench.types import Workload

TOKEN_VARIABLE = "MLSYS_PROMETHEUS_TOKEN"  # noqa: S105  (its name, not its value)


def check(file: Path | None, prometheus: str | None, is_synthetic: bool, out: Path | None) -> None:
    """Raise BadInput unless exactly one source is named, and what it gives can be written."""
    sources = (("a FILE", file is not None), ("--prometheus", prometheus is not None), ("--synthetic", is_synthetic))
    named = [name for name, given in sources if given]
    if len(named) != 1:
        found = f", not {' and '.join(named)}" if named else ""
        raise BadInput(f"mlsys workload: name one of a FILE (a trace or exported metrics), --prometheus URL and --synthetic{found}")
    if out is not None:
        record.check_writable(out)


def is_metrics(path: Path) -> bool:
    """Say whether a file holds exported metrics; any other is read as a trace."""
    from mlsys_bench.workload import prometheus

    return path.is_file() and prometheus.is_export(path)


def from_file(
    path: Path,
    *,
    columns: Mapping[str, str | None],
    time_unit: str | None,
    block_tokens: int | None,
    start: str | None,
    end: str | None,
    speed: float | None,
    qps: float | None,
    engine: str | None,
    model: str | None,
) -> Workload:
    """Return the workload of a trace, cut and stretched as asked, or of exported metrics."""
    from mlsys_bench.workload import metrics, observe, prometheus, trace

    if is_metrics(path):
        seen = metrics.workload(prometheus.exported(path, engine=engine, model=model), path.name)
        return seen if qps is None else dataclasses.replace(seen, rate_per_s=workload.checked_rate(qps))
    read = trace.read(path, columns={k: v for k, v in columns.items() if v}, time_unit=time_unit, block_tokens=block_tokens)
    plan = trace.cut(
        read.schedule,
        str(path),
        start_s=units.seconds(start, "--start") if start else 0.0,
        end_s=units.seconds(end, "--end") if end else None,
        speed=1.0 if speed is None else speed,
        rate_per_s=qps,
    )
    return observe.of_trace(dataclasses.replace(read, schedule=plan), path)


def from_prometheus(
    url: str,
    *,
    range_: str,
    step: str,
    until: str | None,
    engine: str | None,
    model: str | None,
    selector: str | None,
    auth_file: Path | None,
) -> Workload:
    """Return the workload that a Prometheus server has seen."""
    from mlsys_bench.workload import metrics, prometheus

    if Path(url).is_file():
        raise BadInput(f"--prometheus {url}: is a file, and read whole; give it as the argument: mlsys workload {url}")
    source = prometheus.server(url, authorization(auth_file))
    seen = prometheus.fetched(
        source,
        end_s=time.time() if until is None else unix_s(until),
        range_s=units.seconds(range_, "--range"),
        step_s=None if step == "auto" else units.seconds(step, "--step"),
        engine=engine,
        model=model,
        selector=selector,
    )
    return metrics.workload(seen, source.shown)


def authorization(auth_file: Path | None) -> str | None:
    """Return the Authorization header's value from a file or the environment: a bare token is a bearer's.  It is never printed."""
    if auth_file is None:
        text = os.environ.get(TOKEN_VARIABLE, "")
    else:
        try:
            text = auth_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"--auth-file {auth_file}: cannot be read: {getattr(error, 'strerror', None) or 'no text'}") from None
        if not text.strip():
            raise BadInput(f"--auth-file {auth_file}: is empty; write a token, or a line like Authorization: Bearer TOKEN")
    value = text.strip().splitlines()[0].strip() if text.strip() else ""
    value = value.partition(":")[2].strip() if value.lower().startswith("authorization:") else value
    return None if not value else value if " " in value else f"Bearer {value}"


def synthetic(*, qps: float | None, arrivals: str | None, prompt_tokens: str | None, output_tokens: str | None) -> Workload:
    """Return an assumed workload from its laws.  Raises BadInput for what is missing: a guess would be planned for."""
    if qps is None or prompt_tokens is None or output_tokens is None:
        missing = [n for n, v in (("--qps", qps), ("--prompt-tokens", prompt_tokens), ("--output-tokens", output_tokens)) if v is None]
        raise BadInput(f"mlsys workload --synthetic: also needs {', '.join(missing)}")
    made = workload.synthetic(qps, arrivals=arrivals or "poisson", prompt=prompt_tokens, output=output_tokens)
    return dataclasses.replace(made, source="given on the command line")


def draw(described: Workload, path: Path, *, requests: int, seed: int, turns: str | None, gap: str | None, shared_prefix: int) -> None:
    """Write requests of a workload as a trace: alone, or in sessions whose later turns wait for the answer before."""
    from mlsys_bench.workload import trace

    if turns is None:
        if gap is not None or shared_prefix:
            raise BadInput("--gap and --shared-prefix belong to sessions; give --turns, e.g. --turns uniform:5:0.3")
        trace.write(workload.schedule(described, n=requests, seed=seed), path)
        return
    law = workload.Sessions(
        turns=workload.parse_lengths(turns),
        new_tokens=described.prompt_tokens,
        output_tokens=described.output_tokens,
        gap_mean_s=units.seconds(gap or "0s", "--gap"),
        shared_tokens=shared_prefix,
    )
    n = max(1, round(requests / workload.mean_tokens(law.turns)))
    trace.write(workload.sessions(law, rate_per_s=described.rate_per_s, arrivals=described.arrivals, n=n, seed=seed), path)


def unix_s(text: str) -> float:
    """Return the moment that a date names."""
    try:
        moment = datetime.datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.astimezone()).timestamp()
    except (ValueError, OverflowError):  # the first and the last year have no local time
        raise BadInput(f"--until {text}: is no date; write it like 2026-11-20T18:00") from None
