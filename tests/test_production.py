"""A plan held against production's metrics: what histograms tell, and whether the verdict is right where the truth is known."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mlsys_bench import hardware, record, slo
from mlsys_bench import plan as planner
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys import production
from mlsys_bench.plan import again
from mlsys_bench.productions import Production
from mlsys_bench.report import productions as words
from mlsys_bench.types import Lengths, Plan, StagePlan, Workload
from mlsys_bench.workload import metrics, served
from mlsys_bench.workload.counters import Series
from mlsys_bench.workload.served import Histogram
from mlsys_cli.main import app
from tests import production_series as fleet
from tests import test_prometheus as servers
from tests.test_prometheus import Start, needs_prometheus, now, until

ENGINE = metrics.ENGINES[0]
real = servers.real  # the fixture that starts a real Prometheus


def histogram(edges: list[float], *blocks: list[int], sum_s: float = 1.0) -> Histogram:
    """Return a histogram by tenths of its range, those not given empty."""
    up_to = np.zeros((served.BLOCKS, len(edges)))
    up_to[: len(blocks)] = blocks
    return Histogram(edges=np.array(edges), up_to=up_to, sum_s=up_to[:, -1] / up_to[:, -1].sum() * sum_s)


# ---------------------------------------------------------------- what a histogram tells


def test_a_quantile_lies_between_the_edges_of_its_bucket_and_is_put_where_prometheus_puts_it() -> None:
    """900 of 1,000 requests up to 0.2 s, 600 up to 0.1: the 80th percentile is two thirds of the way between."""
    found = served.quantile(histogram([0.1, 0.2, math.inf], *[[60, 90, 100]] * 10), 0.8)
    assert (found.low, found.high) == (0.1, 0.2)
    assert found.value == pytest.approx(0.1 + 0.1 * (800 - 600) / 300)


def test_a_quantile_near_an_edge_may_lie_on_either_side_of_it() -> None:
    """601 of 1,000 up to 0.1 s: Wilson's interval of that share, 57.5 to 62.6 %, holds 60 %."""
    found = served.quantile(histogram([0.05, 0.1, 0.2, math.inf], *[[10, 60, 90, 100]] * 9, [10, 61, 90, 100]), 0.6)
    assert (found.low, found.high) == (0.05, 0.2)


def test_a_quantile_beyond_the_last_edge_is_only_known_from_below() -> None:
    found = served.quantile(histogram([0.1, 0.2, math.inf], *[[10, 20, 100]] * 10), 0.5)
    assert (found.value, found.low, found.high) == (None, 0.2, None)


def test_few_requests_leave_a_high_percentile_open() -> None:
    """That all of 50 requests took less than 0.1 s says nothing of one in a hundred."""
    found = served.quantile(histogram([0.1, math.inf], [50, 50]), 0.99)
    assert found.high is None
    assert served.quantile(histogram([0.1, math.inf], [50, 50]), 0.5).high == 0.1


def test_requests_that_share_a_queue_are_fewer_than_they_look() -> None:
    """The same 70 % up to 0.1 s: spread evenly they put the 65th percentile below it, all bad tenths together they do not."""
    even = histogram([0.05, 0.1, 0.2, math.inf], *[[1, 70, 100, 100]] * 10)
    uneven = histogram([0.05, 0.1, 0.2, math.inf], *[[1, 100, 100, 100]] * 7, *[[1, 0, 100, 100]] * 3)
    assert served.quantile(even, 0.65).high == 0.1
    assert served.quantile(uneven, 0.65).high == 0.2


def test_the_range_of_a_quantile_holds_the_true_one_nine_times_in_ten() -> None:
    """Exponential times in vLLM's buckets, 200 samples of 400: the law's own p95, 3.0 s, lies in the range at least as often as said."""
    rng, edges = np.random.default_rng(3), np.array([*np.arange(0.2, 6.0, 0.2), math.inf])
    truth = -math.log(0.05)
    inside = 0
    for _ in range(200):
        samples = rng.exponential(1.0, 400).reshape(served.BLOCKS, -1)
        up_to = (samples[:, :, None] <= edges).sum(axis=1).astype(float)
        found = served.quantile(Histogram(edges=edges, up_to=up_to, sum_s=samples.sum(axis=1)), 0.95)
        inside += found.low is not None and found.low <= truth and (found.high is None or truth <= found.high)
    assert inside >= 180


def test_the_mean_is_exact_whatever_the_buckets() -> None:
    found = served.mean(histogram([10.0, math.inf], *[[100, 100]] * 10, sum_s=250.0))
    assert found.value == pytest.approx(0.25)
    assert (found.low, found.high) == pytest.approx((0.25, 0.25))  # all tenths alike


def test_replicas_count_for_as_long_as_they_are_there() -> None:
    """One server for ten minutes, one for the last five: 1.5 on average; the second served twice as fast."""
    long, short = (
        fleet._series("vllm:request_success_total", v, {"instance": i}) for v, i in ((np.arange(41.0), "a"), (2 * np.arange(21.0), "b"))
    )
    late = dataclasses.replace(short, times_s=short.times_s + 300.0)
    seen = metrics.Metrics(
        engine=ENGINE, start_s=fleet.T0, end_s=fleet.T0 + 600, arrived_name="", arrived_at="", arrived=(long, late), others={}
    )
    found = served.members(seen)
    assert found.mean == pytest.approx(1.5, rel=0.02)
    assert found.is_told
    assert found.busiest_share == pytest.approx((40 / 315) / (80 / 930), rel=0.02)


def test_servers_of_two_versions_are_read_at_the_edges_they_share() -> None:
    """One counts up to 0.1 and 0.2 s, the other up to 0.1 and 0.5: of both together only 0.1 s is known."""
    scrapes_s, at_s = np.arange(41) * 15.0, np.linspace(1, 599, 200)
    held = [
        *fleet.histogram(ENGINE.ttft, (0.1, 0.2), at_s, np.full(200, 0.05), scrapes_s, {"instance": "a"}),
        *fleet.histogram(ENGINE.ttft, (0.1, 0.5), at_s, np.full(200, 0.3), scrapes_s, {"instance": "b"}),
    ]
    names = {s.name: tuple(o for o in held if o.name == s.name) for s in held}
    arrived = names[f"{ENGINE.ttft}_count"]
    seen = metrics.Metrics(
        engine=ENGINE, start_s=fleet.T0, end_s=fleet.T0 + 600, arrived_name="", arrived_at="", arrived=arrived, others=names
    )
    found = served.histograms(seen)["ttft"]
    assert found.edges.tolist() == [0.1, math.inf]
    assert (found.count, served.quantile(found, 0.25).high, served.quantile(found, 0.75).high) == (400, 0.1, None)


# ---------------------------------------------------------------- whole plans


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Return a plan for llama-3-8b, sized in this process."""
    traffic = Workload(
        rate_per_s=8.0,
        arrivals="poisson",
        prompt_tokens=Lengths(dist="lognormal", mean=300, cv=0.5, max=2000),
        output_tokens=Lengths(dist="lognormal", mean=40, cv=0.5, max=400),
    )
    asked = planner.Request(
        model="llama-3-8b", workload=traffic, slo=slo.parse("ttft_p95<500ms,tpot_p95<50ms"), gpus=("l4",), precisions=("fp8",),
        max_batch=32, max_step_tokens=512,
    )  # fmt: skip
    return planner.plan(asked)


def verified(tmp_path: Path, plan: Plan, held: list[Series]) -> Production:
    record.write(tmp_path / "plan.json", plan, hardware.machine())
    path = fleet.write(tmp_path / "metrics.json", held)
    return production.production(tmp_path / "plan.json", production.Source(where=str(path)), seed=0, out=None)


def test_a_fleet_that_does_what_the_plan_says_verifies_it(plan: Plan, tmp_path: Path) -> None:
    """The plan's own traffic on its own replicas, in simulation with other arrivals: every figure holds, by the command too."""
    record.write(tmp_path / "plan.json", plan, hardware.machine())
    path = fleet.write(tmp_path / "metrics.json", fleet.fleet(plan, fleet.each(plan), replicas=plan.replicas, seconds=600))
    out, page = tmp_path / "seen.json", tmp_path / "seen.html"
    said = CliRunner().invoke(app, ["verify", str(tmp_path / "plan.json"), "--prometheus", str(path), "-o", str(out), "--html", str(page)])
    assert said.exit_code == 0, said.output
    found = record.read(out, Production)
    assert (found.as_planned, found.replicas, found.verdict) == (True, plan.replicas, "holds")
    judged = [c for c in words.deciding(found) if c.measured is not None]
    assert {"ttft_p95_s", "tpot_p95_s", "e2e_p95_s", "ttft_mean_s", "e2e_mean_s", "requests_in_flight"} <= {c.key for c in judged}
    assert [c.key for c in judged if c.inside is not True] == ["ttft_p99_s"]  # beside an edge of its histogram: nobody can tell
    assert [c.key for c in judged if c.inside is False] == []
    assert all(limit.kept is not False for limit in found.limits)
    assert "TTFT mean" in said.output
    assert set(json.loads(out.read_text())["inputs"]) == {"plan.json", "metrics.json"}
    assert "data:image/svg+xml" in page.read_text()


def test_a_fleet_that_is_slower_than_planned_refutes_the_plan(plan: Plan, tmp_path: Path) -> None:
    slow = fleet.fleet(plan, fleet.each(plan), replicas=plan.replicas, seconds=600, slower=1.8)
    found = verified(tmp_path, plan, slow)
    assert (found.as_planned, found.verdict, production.exit_status(found)) == (True, "does not hold", 1)
    assert {c.key: c.inside for c in words.deciding(found)}["ttft_mean_s"] is False


def test_other_traffic_is_told_from_a_wrong_model(plan: Plan, tmp_path: Path) -> None:
    """Half the rate: the traffic is not the plan's and the plan's own tokens per second are out, but what is foreseen for it comes true."""
    found = verified(tmp_path, plan, fleet.fleet(plan, fleet.each(plan, 0.5), replicas=plan.replicas, seconds=600))
    assert not found.as_planned
    assert [figure.name for figure in found.traffic if not figure.alike] == ["rate per replica"]
    assert found.utilisation_seen == pytest.approx(plan.utilisation / 2, rel=0.05)
    assert {c.key: c.inside for c in found.checks}["throughput_tokens_per_s"] is False
    assert found.verdict == "holds"
    assert any("plan for this traffic" in note for note in found.notes)


def test_longer_answers_than_planned_are_seen_and_foreseen(plan: Plan, tmp_path: Path) -> None:
    longer = dataclasses.replace(fleet.each(plan, 0.6), output_tokens=Lengths(dist="lognormal", mean=70, cv=0.5, max=400))
    found = verified(tmp_path, plan, fleet.fleet(plan, longer, replicas=plan.replicas, seconds=600))
    assert "output length, mean" in {figure.name for figure in found.traffic if not figure.alike}
    assert {c.key: c.inside for c in found.remade}["e2e_mean_s"] is True
    assert {c.key: c.inside for c in found.checks}["e2e_p50_s"] is not True


def test_a_load_beyond_the_predicted_capacity_is_said_to_be_one(plan: Plan, tmp_path: Path) -> None:
    """Nothing is predicted for a queue that never settles; that a fleet carries twice its predicted capacity refutes the plan."""
    beyond = 2.5 / plan.utilisation
    quick = dataclasses.replace(
        plan, profile=dataclasses.replace(plan.profile, coefficients=tuple(c / 4 for c in plan.profile.coefficients))
    )
    found = verified(tmp_path, plan, fleet.fleet(quick, fleet.each(plan, beyond), replicas=plan.replicas, seconds=300))
    assert [c.key for c in found.remade] == ["capacity_per_s"]
    assert found.remade[0].inside is False
    assert found.verdict == "does not hold"
    assert "nothing else is predicted" in words.production(found).lead


def test_a_handful_of_requests_decides_nothing(plan: Plan, tmp_path: Path) -> None:
    short = fleet.fleet(plan, fleet.each(plan), replicas=plan.replicas, seconds=8)
    found = verified(tmp_path, plan, [dataclasses.replace(s, times_s=s.times_s, values=s.values) for s in short])
    assert (found.verdict, production.exit_status(found)) == ("undecided", 3)


def test_no_traffic_at_all_decides_nothing(plan: Plan, tmp_path: Path) -> None:
    still = [dataclasses.replace(s, values=0 * s.values) for s in fleet.fleet(plan, fleet.each(plan), replicas=1, seconds=60)]
    found = verified(tmp_path, plan, still)
    assert (found.verdict, found.requests) == ("undecided", 0)
    assert "did not grow" in found.notes[0]


def test_servers_that_no_label_tells_apart_are_taken_to_be_those_planned(plan: Plan, tmp_path: Path) -> None:
    held = fleet.fleet(plan, fleet.each(plan, plan.replicas), replicas=1, seconds=300, slower=1.0)
    bare = [dataclasses.replace(s, labels={k: v for k, v in s.labels.items() if k != "instance"}) for s in held]
    found = verified(tmp_path, plan, bare)
    assert (found.replicas_counted, found.replicas) == (False, plan.replicas)
    assert any("no label tells servers apart" in note for note in found.notes)


def test_predictions_made_anew_at_the_planned_traffic_are_the_plans_own(plan: Plan) -> None:
    """The same engine and traffic, simulated for another length: every figure is inside the plan's interval."""
    found = again.foresee(plan, plan.workload, plan.replicas)
    assert found.predicted.keys() >= plan.predicted.keys()
    for key, (low, high) in plan.intervals.items():
        if key in plan.predicted:
            assert low <= found.predicted[key] <= high, key
    assert found.capacity_per_s == pytest.approx(plan.capacity_per_replica_per_s)


# ---------------------------------------------------------------- what cannot be verified


def test_plans_that_no_replica_alone_can_show_are_refused(plan: Plan, tmp_path: Path) -> None:
    other = dataclasses.replace(plan.fleet[0], gpu="a100")
    apart = tuple(dataclasses.replace(plan.fleet[0], stage=stage) for stage in ("prefill", "decode"))
    stage = StagePlan(
        stage="rank", visits=1, calls=1, replicas=1, shards=1, servers=1, service_s=0.01, utilisation=0.5, latencies_s={},
        usd_per_hour=None, binds="", provenance=plan.provenance, source="", profile=plan.profile,
    )  # fmt: skip
    for unfit, says in (
        (dataclasses.replace(plan, fleet=(plan.fleet[0], other), gpu=None), "replicas differ"),
        (dataclasses.replace(plan, fleet=apart), r"\d+ x prefill on L4, \d+ x decode on L4"),
        (dataclasses.replace(plan, stages=(stage,)), r"stage graph \(rank\)"),
    ):
        with pytest.raises(BadInput, match=says) as caught:
            verified(tmp_path, unfit, [])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["http://127.0.0.1:1", "--prometheus", "http://127.0.0.1:1"], "name one of them"),
        (["--prometheus", "http://127.0.0.1:1"], "cannot be reached"),
        (["--prometheus", "http://127.0.0.1:1", "--duration", "1min"], "--duration 1min: is how long a load test lasts"),
        (["--prometheus", "nowhere"], "write an address like"),
        (["--range", "1h"], "--range belongs to --prometheus"),
        (["--prometheus", "FILE"], "looked for vllm:time_to_first_token_seconds_count"),
        (["--prometheus", "FILE", "--range", "1h"], "belong to a server"),
    ],
)
def test_what_cannot_be_read_is_bad_input_in_one_line(plan: Plan, tmp_path: Path, options: list[str], says: str) -> None:
    record.write(tmp_path / "plan.json", plan, hardware.machine())
    path = fleet.write(tmp_path / "metrics.json", [Series(name="up", labels={}, times_s=np.array([1.0, 2.0]), values=np.array([1.0, 1.0]))])
    given = [str(path) if option == "FILE" else option for option in options]
    said = CliRunner().invoke(app, ["verify", str(tmp_path / "plan.json"), *given])
    assert isinstance(said.exception, BadInput)
    assert says in str(said.exception)


# ---------------------------------------------------------------- a real Prometheus that scrapes real exporters


@dataclasses.dataclass
class Clock:
    """Stands still until two scrapes have come; then it runs."""

    scrapes: int = 0
    began_s: float | None = None

    def read_s(self) -> float:
        """Return the seconds it has run."""
        self.scrapes += 1
        if self.scrapes == 2:
            self.began_s = time.monotonic()
        return 0.0 if self.began_s is None else time.monotonic() - self.began_s


@pytest.fixture
def exporter() -> Iterator[object]:
    """Serve the history of a simulated replica as it happens, on /metrics."""
    running = []

    def start(held: list[Series]) -> str:
        clock = Clock()

        class Page(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                """Give what has been counted until now."""
                at = min(int(clock.read_s() / fleet.SCRAPE_S * 100), len(held[0].values) - 1)
                lines = [
                    f"{s.name}{{{','.join(f'{k}={json.dumps(v)}' for k, v in s.labels.items() if k != 'instance')}}} {s.values[at]}"
                    for s in held
                ]
                data = ("\n".join(lines) + "\n").encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        running.append((server, thread))
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


@needs_prometheus
@pytest.mark.e2e
def test_a_real_prometheus_gives_the_latencies_that_were_exported(
    plan: Plan,
    real: Start,
    exporter: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two exporters play 200 s of history in 2 s, a hundred times as fast: counts and mean latencies come back exactly, per replica.

    The rate is a hundred times that of the simulation, which the plan's capacity does not reach: that must be what the verdict says.
    """
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    held = [fleet.fleet(plan, fleet.each(plan), replicas=1, seconds=200, seed=seed) for seed in (1, 2)]
    targets = [exporter(h) for h in held]  # type: ignore[operator]
    url = real({"global": {"scrape_interval": "250ms"}, "scrape_configs": [{"job_name": "llm", "static_configs": [{"targets": targets}]}]})
    counts = sorted(h.values[-1] for some in held for h in some if h.name == "vllm:time_to_first_token_seconds_count")
    until(lambda: sorted(now(url, "vllm:time_to_first_token_seconds_count")) == counts)
    record.write(tmp_path / "plan.json", plan, hardware.machine())
    found = production.production(tmp_path / "plan.json", production.Source(where=url, range_="10min"), seed=0, out=None)
    assert found.requests == sum(counts)
    assert round(found.replicas or 0) == 2, "a mean over looks, and one of the first may have missed one of them"
    assert found.engine == "vllm"
    seen = prometheus_mean(held, "vllm:time_to_first_token_seconds")
    where, read = production._metrics(production.Source(where=url, range_="10min"))
    assert served.mean(served.histograms(read)["ttft"]).value == pytest.approx(seen)
    assert where == url
    assert not found.as_planned
    assert found.remade[0].key == "capacity_per_s"
    assert found.verdict == "does not hold"


def prometheus_mean(held: list[list[Series]], base: str) -> float:
    """Return the mean of what all exporters counted."""
    ends = {name: sum(float(s.values[-1]) for some in held for s in some if s.name == name) for name in (f"{base}_sum", f"{base}_count")}
    return ends[f"{base}_sum"] / ends[f"{base}_count"]
