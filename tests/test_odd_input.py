"""Input that used to end in a traceback, in a lost file or in an answer to something else: each is refused in one line now."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mlsys_bench import hardware, record, slo, stats, workload
from mlsys_bench.errors import BadInput, MlsysError, RecordError
from mlsys_bench.journeys import costing, fitting, simulation
from mlsys_bench.journeys.simulation import Asked
from mlsys_bench.predict import readers, tables
from mlsys_bench.predict.readers import Design
from mlsys_bench.types import Bench, LoadTest, Requests
from mlsys_bench.workload import trace
from mlsys_cli import lean, main

DESIGN: dict[str, Any] = {"model": "llama-3.1-8b", "gpu": "h100", "prompt_tokens": "200", "output_tokens": "20", "qps": 2.0}


def simulated(**options: Any) -> LoadTest:
    return simulation.simulate(Asked(**(DESIGN | options)))


# ---------------------------------------------------------------- simulate


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"duration": "0s"}, "--duration 0s: it must be above zero"),
        ({"duration": "30s", "warmup": "40s"}, "leave out less"),
        ({"duration": "30s", "warmup": "-4s"}, "from 0s up"),
        ({"requests": 20, "preemption": "swap,link=0GB/s"}, "above zero"),
        ({"requests": 20, "speculate": "0,acceptance=70%"}, "0 drafts"),
        ({"requests": 20, "retries": "2,first=1s,first=2s"}, "given twice"),
        ({"requests": 20, "retries": "2,first=9s,most=1s"}, "above the longest"),
        ({"requests": 20, "retries": "2,jitter=300%"}, "a jitter of 3: "),
        ({"requests": 20, "failures": "mtbf=1h,mtbf=2h,repair=1s"}, "given twice"),
        ({"requests": 20, "failures": "at=1s:3,repair=1s", "replicas": 2}, "no replica 3"),
        ({"requests": 20, "autoscale": "in_flight=3,max=1,cold-start=1s", "replicas": 4}, "begins with the 4"),
        ({"requests": 20, "autoscale": "kv=180%,max=3,cold-start=1s"}, "share of the KV memory"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(MlsysError, match=why):
        simulated(**options)


def test_a_limit_that_was_given_decides_the_exit_status() -> None:
    """Limits assumed by default promise nothing."""
    missed = Asked(**DESIGN, requests=60, slo="ttft_p50<1us")
    assert simulation.exit_status(missed, simulation.simulate(missed)) == 1
    kept = Asked(**DESIGN, requests=60, slo="ttft_p50<10s")
    assert simulation.exit_status(kept, simulation.simulate(kept)) == 0
    few = Asked(**DESIGN, requests=60, slo="ttft_p99.9<10s")
    assert simulation.exit_status(few, simulation.simulate(few)) == 3
    nothing = Asked(**DESIGN, requests=60)
    assert simulation.exit_status(nothing, dataclasses.replace(simulation.simulate(nothing), slo_met={"ttft_p50<1us": False})) == 0


def test_replicas_that_nothing_reached_computed_for_no_time() -> None:
    """Every client has given up before a replica began."""
    use = simulated(requests=20, timeout="1us").fleet
    assert use is not None
    assert (use.replica_s, use.utilisation, use.batch_mean, use.waiting_mean) == (0.0, 0.0, 0.0, 0.0)


def test_a_share_of_none_or_of_all_has_an_exact_end() -> None:
    for n in (1, 3, 88, 1365):
        none, every = stats.wilson(0, n), stats.wilson(n, n)
        assert none is not None
        assert every is not None
        assert (none[0], every[1]) == (0.0, 1.0)


# ---------------------------------------------------------------- files


def test_a_summary_is_not_written_over_its_requests(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"name the summary, e\.g\. .*run\.json"):
        simulated(requests=20, out=tmp_path / "run.parquet")
    (tmp_path / "run.parquet").mkdir()
    with pytest.raises(RecordError, match="it is a folder"):
        simulated(requests=20, out=tmp_path / "run.json")
    with pytest.raises(RecordError, match="it is a folder"):
        simulated(requests=20, out=Path())


def test_what_goes_to_a_pipe_does_not_take_its_place(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        record.check_writable(pipe)
        record.write(pipe, Bench(measurements=()), hardware.machine())
        assert json.loads(os.read(reader, 1 << 16))["kind"] == "bench"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert record.requests_beside(pipe) is None
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_command_overwrites_neither_what_it_reads_nor_what_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    both = str(tmp_path / "both")
    for words, why in (
        (["cost", str(plan), "-o", str(plan)], "--out plan.json: this file is read by this command"),
        (["backtest", "llm", str(plan), "-o", str(plan)], "--out plan.json: this file is read by this command"),
        (["claims", "-o", both, "--html", both], "--html both: this file is written by --out too"),
    ):
        monkeypatch.setattr("sys.argv", ["mlsys", *words])
        with pytest.raises(SystemExit) as ended:
            main.run()
        assert ended.value.code == 2
        assert why in capsys.readouterr().err
    assert plan.read_text() == "{}"
    assert not Path(both).exists()


def test_many_files_may_go_to_one_device_and_not_to_one_file(tmp_path: Path) -> None:
    options = [_Option("out"), _Option("html")]
    lean.keep_apart(options, dict.fromkeys(("out", "html"), Path(os.devnull)))
    with pytest.raises(BadInput, match="is written by --x too"):
        lean.keep_apart(options, dict.fromkeys(("out", "html"), tmp_path / "same"))


@dataclasses.dataclass(frozen=True)
class _Option:
    name: str
    param_type_name: str = "option"
    opts: tuple[str, ...] = ("--x",)


# ---------------------------------------------------------------- workload, fit, cost, backtest


@pytest.mark.parametrize(
    ("row", "why"),
    [("1,1e30,5", "a number of tokens"), ("1,10,5,7", "4 fields where the header has 3"), ("1,10", "cut off")],
)
def test_a_row_of_a_trace_that_cannot_be_names_its_line(tmp_path: Path, row: str, why: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(f"time_s,input_tokens,output_tokens\n0,10,5\n{row}\n2,10,5,\n")
    with pytest.raises(BadInput, match=f"line 3: .*{why}"):
        trace.read(file)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    whole = tmp_path / "run.json"
    simulated(requests=200, out=whole)
    data = whole.with_suffix(".parquet").read_bytes()
    assert record.read(whole.with_suffix(".parquet"), Requests).requests
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1" + data[100:])
    with pytest.raises(BadInput, match=r"damaged\.parquet: "):
        trace.read(damaged)


def test_a_trace_is_cut_forwards_from_its_start() -> None:
    plan = workload.schedule(workload.synthetic(2.0, arrivals="constant", prompt="10", output="5"), n=20, seed=0)
    for start_s, end_s in ((-5.0, None), (5.0, 1.0)):
        with pytest.raises(BadInput, match="nothing of a trace lies from"):
            trace.cut(plan, "trace.csv", start_s=start_s, end_s=end_s)


def test_an_empty_result_of_another_tool_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "aiperf.csv").write_text("\n")
    with pytest.raises(BadInput, match="is empty"):
        readers.read([tmp_path / "aiperf.csv"])


def test_a_bench_record_is_not_told_what_it_was_measured_on(tmp_path: Path) -> None:
    file = record.write(tmp_path / "bench.json", Bench(measurements=()), hardware.machine())
    with pytest.raises(BadInput, match="leave out --gpu"):
        fitting.fit([file], Design(device="H100"))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"requests_per_s": 30.0}, "the plan is for 20 requests/s and no more"),
        ({"egress": "-50kB"}, "less than nothing"),
        ({"vcpus": float("inf")}, "a finite number"),
    ],
)
def test_a_price_that_cannot_be_is_refused(tmp_path: Path, options: dict[str, Any], why: str) -> None:
    from mlsys_bench import plan as planner

    workload_of = workload.synthetic(20.0, arrivals="poisson", prompt="200", output="20")
    made = planner.plan(planner.Request(model="llama-3.1-8b", workload=workload_of, slo=slo.parse("ttft_p95<1s"), gpus=("H100-SXM",)))
    file = record.write(tmp_path / "plan.json", made, hardware.machine())
    with pytest.raises(BadInput, match=why):
        costing.cost(file, **options)


CLOSED = "model,system,backend,precision,isl,osl,tp,moe_ep_size,concurrency,ttft_ms,tpot_ms\n"


def test_a_result_below_zero_is_refused_and_an_odd_row_is_listed(tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    good = "Qwen/Qwen3-32B,h100_sxm,vllm,fp8,1024,128,1,1,4,50,10\n"
    file.write_text(CLOSED + good.replace(",50,", ",-50,"))
    with pytest.raises(BadInput, match="line 2, column ttft_ms: '-50' is below 0"):
        tables.read(file)
    file.write_text(CLOSED + good + good.replace("fp8", "fp9") + good.replace(",4,50", ",1e30,50") + good.replace(",1024,", ",1e30,"))
    rows = tables.read(file).rows
    assert rows[0].problem is None
    assert [row.problem is not None for row in rows[1:]] == [True, True, True]
    assert "fp9" in (rows[1].problem or "")
