"""Repeated load tests in words: each figure over the runs, every run a dot."""

from __future__ import annotations

from collections.abc import Iterator

from mlsys_bench.loadtests import LoadTests, Spread
from mlsys_bench.report import latencies
from mlsys_bench.report.parts import NONE, Cell, Column, Fact, Section, Table, Tone, percent, time
from mlsys_bench.units import count

SHOWN = tuple(f"{metric}_{stat}_s" for metric in ("ttft", "tpot", "itl", "e2e") for stat in ("p50", "p95", "p99"))
RATES = ("request_rate_per_s", "output_tokens_per_s", "goodput_ratio")
_STRIP = 24  # characters of a strip of dots
_TONE: dict[str, Tone] = {"valid": "good", "degraded": "unsure", "invalid": "bad"}


def repeats(record: LoadTests) -> Section:
    """Return how far the runs of one load test lie apart."""
    first, verdicts = record.runs[0], [run.validity.verdict for run in record.runs]
    rows = tuple(_row(key, record.spread[key]) for key in (*RATES, *SHOWN) if key in record.spread and record.spread[key].mean is not None)
    columns = (
        Column("figure"), Column("mean of runs", right=True), Column("sd between runs", right=True), Column("each run, lowest to highest"),
    )  # fmt: skip
    return Section(
        kind="loadtests",
        title=f"Load test of {first.target}, {count(len(record.runs), 'run')}",
        lead=_lead(record),
        tag="measured",
        tone=_TONE[record.validity.verdict],
        tiles=tuple(_tiles(record)),
        facts=(
            Fact("Runs", f"{len(record.runs)} of {time(first.duration_s)}", f"seeds {', '.join(map(str, record.seeds))}", "measured"),
            Fact("Requests", f"{sum(r.ok for r in record.runs):,} of {sum(r.requests for r in record.runs):,} ok", _errors(record),
                 "measured", "bad" if _errors(record) else ""),
            Fact("Validity", record.validity.verdict, ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)), "",
                 _TONE[record.validity.verdict]),
        ),
        tables=(Table(title="", columns=columns, rows=rows, note=_NOTE),),
        notes=(("Good to know", record.validity.reasons),) if record.validity.reasons else (),
    )  # fmt: skip


def _tiles(record: LoadTests) -> Iterator[Fact]:
    """Yield the means of runs for the top of a page: of each latency the highest percentile that every run allows."""
    for label, keys in _TOP:
        key = next((key for key in keys if (s := record.spread.get(key)) is not None and None not in s.values), None)
        if key is not None:
            spread = record.spread[key]
            cell = latencies.figure(key, spread.mean, spread.interval)
            yield Fact(label or f"{latencies.name(key)}, mean of runs", cell.text, cell.sub, "measured")


_TOP = (
    ("Throughput, mean of runs", ("request_rate_per_s",)),
    *(("", tuple(f"{m}_{s}_s" for s in ("p99", "p95", "p50"))) for m in ("ttft", "tpot", "e2e")),
)
_NOTE = "below each mean its 90 % interval, Student's over the runs"


def _lead(record: LoadTests) -> str:
    worst = max((s for key, s in record.spread.items() if key in SHOWN), key=_relative, default=None)
    if worst is None or not _relative(worst):
        return f"{count(len(record.runs), 'run')}: too few figures to say how far they lie apart."
    key = next(key for key, s in record.spread.items() if s is worst)
    return f"Runs differ most in {latencies.name(key)}: {percent(100 * _relative(worst))} standard deviation between runs."


def _relative(spread: Spread) -> float:
    return spread.sd / spread.mean if spread.sd is not None and spread.mean else 0.0


def _errors(record: LoadTests) -> str:
    kinds = sorted({kind for run in record.runs for kind in run.errors})
    return ", ".join(f"{sum(run.errors.get(kind, 0) for run in record.runs):,} {kind}" for kind in kinds)


def _row(key: str, spread: Spread) -> tuple[Cell, ...]:
    known = [v for v in spread.values if v is not None]
    return (
        Cell(latencies.name(key), "strong", "" if len(known) == len(spread.values) else f"{len(known)} of {len(spread.values)} runs"),
        latencies.figure(key, spread.mean, spread.interval),
        Cell(NONE if spread.sd is None or not spread.mean else percent(100 * spread.sd / abs(spread.mean))),
        Cell(strip(known), "", f"{_plain(key, min(known))} to {_plain(key, max(known))}"),
    )


def strip(values: list[float]) -> str:
    """Return values as dots on a line from the lowest to the highest; a digit where several fall together."""
    low, high = min(values), max(values)
    at = [0 if high == low else round((v - low) / (high - low) * (_STRIP - 1)) for v in values]
    return "".join("·" if not (n := at.count(i)) else "●" if n == 1 else str(min(n, 9)) for i in range(_STRIP))


def _plain(key: str, value: float) -> str:
    return latencies.figure(key, value, None).text
