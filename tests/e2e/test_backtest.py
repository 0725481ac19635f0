"""`mlsys backtest queueing` as a process: what it prints, what it writes, and what a Ctrl-C leaves."""

from __future__ import annotations

import csv
import json
import os
import pty
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mlsys_bench import record
from mlsys_bench.backtests import Backtest

if TYPE_CHECKING:
    from conftest import Cli

pytestmark = pytest.mark.e2e

TABLE = """model,parameters,quantity,value,precision_abs,source
M/M/c,c=1;rho=0.9;mean_service=1,wait_mean,9.0,1e-9,exact closed form
M/M/c,c=4;rho=1.1;mean_service=1,wait_mean,,,
M/M/c,c=4;rho=1.1;mean_service=1,stable,0,0,
M/Q/c,c=4;rho=0.5,wait_mean,,,
"M/M/c/c","c=5;a=3;mean_service=1",blocking,0.11005434782608696,1e-12,"exact, Erlang B"
"""
SLOW = "".join(f"LB,N=16;rho=0.9{i};policy=jsq;mean_service=1;arrival=exp;service=logn:4,sojourn_p99,,,\n" for i in range(9))
PATIENCE_S = 120.0


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_is_answered_row_by_row(mlsys: Cli) -> None:
    (mlsys.folder / "t.csv").write_text(TABLE)
    said = mlsys("backtest", "queueing", "t.csv", "-o", "out/predictions.csv")
    assert (said.returncode, said.stderr) == (0, "")
    assert "3 of 5 rows answered; 3 of 3 with a value are within their bar (100.0 %)." in said.stdout
    given, written = rows(mlsys.folder / "t.csv"), rows(mlsys.folder / "out/predictions.csv")
    assert [{k: row[k] for k in given[0]} for row in written] == given
    assert [row["predicted"] != "" for row in written] == [True, False, True, False, True]
    assert [float(written[i]["predicted"]) for i in (0, 2, 4)] == pytest.approx([9.0, 0.0, 0.11005434782608696])
    assert "utilisation is 1.10" in written[1]["method"]
    assert "unknown model 'M/Q/c'" in written[3]["method"]
    assert all(0 <= float(written[i]["expected_error"]) <= 1e-6 for i in (0, 2, 4))


def test_json_is_the_record_and_nothing_else(mlsys: Cli) -> None:
    (mlsys.folder / "t.csv").write_text(TABLE)
    said = mlsys("backtest", "queueing", "t.csv", "--json", "--html", "t.html", "--md", "t.md")
    assert (said.returncode, said.stderr) == (0, "")
    envelope, value = record.loads(said.stdout, "standard output")
    assert isinstance(value, Backtest)
    assert (value.rows, value.answered) == (5, 3)
    assert json.loads(said.stdout)["kind"] == "backtest"
    assert envelope.inputs == {"t.csv": record.digest(mlsys.folder / "t.csv")}
    assert all("M/M/c" in (mlsys.folder / name).read_text() for name in ("t.html", "t.md"))


def test_ctrl_c_keeps_what_is_done(mlsys: Cli) -> None:
    """The interrupt comes when the live line has counted what formulas solve: the nine simulations left are called off."""
    (mlsys.folder / "t.csv").write_text(TABLE + SLOW)
    ours, its = pty.openpty()
    with mlsys.start("backtest", "queueing", "t.csv", "-o", "out.csv", "--budget", "60s", stderr=its) as process:
        os.close(its)
        seen = b""
        while b"4 of 13 systems" not in seen:
            seen += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=PATIENCE_S)
    os.close(ours)
    assert (process.returncode, out) == (130, "")
    written = rows(mlsys.folder / "out.csv")
    assert len(written) == 14
    assert float(written[0]["predicted"]) == pytest.approx(9.0)
    assert written[-1]["predicted"] == ""
    assert "interrupted before this row" in written[-1]["method"]
