"""backtest gate: recorded sessions replayed through the looks of the gate, and how often they decide rightly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlsys_bench import hardware, record, units
from mlsys_bench.backtests import Backtest, Deciding
from mlsys_bench.errors import BadInput
from mlsys_bench.gate import backtest, sessions
from mlsys_bench.journeys.progress import Line
from mlsys_bench.types import Scalar
from mlsys_bench.verdicts import Policy

COLUMNS = ("source", "session", "arm", "metric", "ratio")


def gate(files: Sequence[Path], *, tolerances: Sequence[str], out: Path | None = None, seed: int = 0, quiet: bool = False) -> Backtest:
    """Decide jobs drawn from recorded sessions at each tolerance; write the ratio of every launch pair when asked."""
    policies = [Policy(tolerance=_tolerance(text)) for text in tolerances]
    if out is not None:
        record.check_writable(out)
    found = [sessions.read(path) for path in files]
    line = Line(quiet)
    try:
        deciding: list[Deciding] = []
        for one in found:
            for policy in policies:
                line.show(f"{one.source} at {100 * policy.tolerance:g} %")
                deciding += backtest.replay(one, policy, seed)
    finally:
        line.clear()
    predictions: tuple[dict[str, Scalar], ...] = tuple(
        dict(zip(COLUMNS, (one.source, *row), strict=True)) for one in found for row in backtest.ratios(one, policies[0])
    )
    result = Backtest(
        table="gate", source=", ".join(one.source for one in found), rows=sum(one.lines for one in found),
        answered=sum(one.lines for one in found), methods={}, unanswered={}, predictions=predictions, deciding=tuple(deciding),
        notes=tuple(_note(one) for one in found),
    )  # fmt: skip
    if out is not None:
        _write(out, files, result)
    return result


def _tolerance(text: str) -> float:
    share = units.fraction(text, "--tolerance")
    if not 0 < share < 1:
        raise BadInput(f"--tolerance {text}: cannot be used; give a share between 0% and 100%, e.g. 5%")
    return share


def _note(found: sessions.Sessions) -> str:
    without = f"; left out, in fewer than {sessions.FEWEST} sessions beside it: {', '.join(found.left_out)}" if found.left_out else ""
    return (
        f"{found.source}: {len(found.sessions)} sessions, {len(found.disturbed)} of them disturbed; "
        f"{', '.join(arm.name for arm in found.arms)} beside {sessions.BASELINE}{without}"
    )


def _write(out: Path, sources: Sequence[Path], result: Backtest) -> None:
    """Write the ratios as a table; all as a record where the file is named .json."""
    if out.suffix == ".json":
        record.write(out, result, hardware.machine(), sources)
    else:
        record.write_csv(out, COLUMNS, (list(row.values()) for row in result.predictions))
