"""The server's side of a load test: what is read from its metrics is what they say, whatever the server and however it misbehaves."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from mlsys_bench.loadtest import serverside
from mlsys_bench.loadtest.serverside import devices, names, page, text
from mlsys_bench.loadtest.serverside.watch import Looks
from mlsys_bench.report import serversides
from mlsys_bench.report.server_pictures import over_time
from mlsys_bench.serversides import ServerSide
from mlsys_bench.types import RequestRecord
from tests import metric_pages as pages

T0 = 1_800_000_000.0  # second 0 of the made-up runs, in Unix seconds


def looked(at: Callable[[float], str], *, until_s: int = 21, every_s: float = 1.0, late_s: float = 0.25) -> Looks:
    """Look at a page that is a function of the run's second: first before the run, then once every so many seconds."""
    looks = Looks(where="http://here/metrics")
    for i in range(int(until_s / every_s) + 2):
        moment = (i - 1) * every_s + late_s
        looks.add(T0 + moment, 0.002, text.samples(at(moment), names.WANTED), 1000)
    return looks


def answered(start_s: float, *, ttft_s: float = 0.041, tokens: int = 10, gap_s: float = 0.005) -> RequestRecord:
    token_s = tuple(start_s + ttft_s + i * gap_s for i in range(tokens))
    counts = (1,) * tokens
    return RequestRecord(
        index=0, scheduled_s=start_s, sent_s=start_s, token_s=token_s, tokens_per_event=counts, done_s=token_s[-1], output_tokens=tokens
    )


def traffic(per_s: float = 10, *, until_s: int = 20, **how: float) -> list[RequestRecord]:
    return [answered(i / per_s, **how) for i in range(int(until_s * per_s))]  # type: ignore[arg-type]


def side(*all_looked: Looks, records: list[RequestRecord] | None = None, window: tuple[float, float] = (5.0, 20.0)) -> ServerSide:
    return serverside.read(all_looked, traffic() if records is None else records, t0_unix_s=T0, window=window, model="tiny")


def means(found: ServerSide) -> dict[str, float | None]:
    return {s.name if s.device is None else f"{s.name} {s.device}": s.mean for s in found.series}


# ---------------------------------------------------------------- the text


@given(
    st.dictionaries(st.text(max_size=12), st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4),
    st.floats(0, 1e9),
    st.lists(st.floats(0, 100), max_size=5),
)
def test_samples_are_those_of_prometheus_own_parser(gauges: dict[str, float], total: float, times: list[float]) -> None:
    """Labels of any text, with quotes, braces, backslashes and line breaks in them."""
    registry = CollectorRegistry()
    gauge = Gauge("vllm:num_requests_running", "Running\nnow", ["model_name"], registry=registry)
    for label, value in gauges.items():
        gauge.labels(label).set(value)
    Counter("vllm:generation_tokens", "Tokens", registry=registry).inc(total)
    histogram = Histogram("vllm:time_to_first_token_seconds", "TTFT", registry=registry)
    for one in times:
        histogram.observe(one)
    written = generate_latest(registry).decode()
    theirs = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(written)
        for sample in family.samples
        if sample.name in names.WANTED
    }
    ours = {(name, tuple(sorted(text.labels(spelled).items()))): v for (name, spelled), v in text.samples(written, names.WANTED).items()}
    assert ours == theirs


def test_openmetrics_timestamps_and_exemplars_are_read_past() -> None:
    written = (
        'vllm:kv_cache_usage_perc{a="x} 9",b="\\"1"} 0.5 1700000000.1 # {trace_id="k"} 0.7 1.0\nvllm:num_requests_waiting NaN\n# EOF\n'
    )
    assert text.samples(written, names.WANTED) == {("vllm:kv_cache_usage_perc", 'a="x} 9",b="\\"1"'): 0.5}
    assert text.labels('a="x} 9",b="\\"1"') == {"a": "x} 9", "b": '"1'}


@pytest.mark.parametrize("garbage", ["", "<html>503</html>", '{"data": [{"id": "tiny"}]}', "vllm:num_requests_running", "\x00\xff{{{"])
def test_what_is_no_page_of_metrics_is_not_taken_for_one(garbage: str) -> None:
    assert not text.is_page(garbage)
    assert text.samples(garbage, names.WANTED) == {}


# ---------------------------------------------------------------- names of each server


def test_vllm_is_read_in_common_words() -> None:
    """100 tokens/s, 10 requests/s, hits 5 of 20 tokens."""
    found = side(looked(lambda s: pages.vllm(1000 + 100 * s, hits=5)))
    assert [s.kind for s in found.sources] == ["vllm"]
    assert means(found) == pytest.approx({
        "running": 3, "waiting": 1, "kv_cache": 0.25, "prefix_hits": 0.25, "prompt_tokens": 200, "generation_tokens": 100,
        "preemptions": 0.1, "ttft": 0.04, "tpot": 0.005, "queue": 0.01,
    })  # fmt: skip
    assert found.doubts == ()
    assert found.notes == ()


def test_a_relay_that_allows_no_colons_is_understood() -> None:
    looks = Looks(where="http://relay")
    for i in range(22):
        looks.add(T0 + i, 0.0, text.samples(pages.vllm(100 * i).replace("vllm:", "vllm_"), page._SPELLED), 0)
    assert means(side(looks))["generation_tokens"] == pytest.approx(100)


def test_ranks_of_sglang_count_the_same_requests_once() -> None:
    found = means(side(looked(lambda s: pages.sglang(1000 + 100 * s))))
    assert found == pytest.approx({
        "running": 4, "waiting": 2, "kv_cache": 0.28, "prefix_hits": 0.25, "prompt_tokens": 200, "generation_tokens": 100,
        "preemptions": 0.2, "ttft": 0.03, "itl": 0.004, "queue": 0.02,
    })  # fmt: skip


def test_tgi_has_no_ttft_and_its_time_per_token_is_no_tpot() -> None:
    found = side(looked(lambda s: pages.tgi(1000 + 100 * s)))
    assert means(found) == pytest.approx({
        "running": 8, "waiting": 6, "prompt_tokens": 200, "generation_tokens": 100, "e2e": 0.5, "queue": 0.1, "time_per_token": 0.02,
    })  # fmt: skip
    assert found.two_sides == ()


def test_triton_is_read_for_the_model_under_test_only() -> None:
    found = side(looked(lambda s: pages.triton(50 + 10 * s)))
    seen = means(found)
    assert seen["requests"] == pytest.approx(10)
    assert (seen["ttft"], seen["e2e"], seen["queue"]) == pytest.approx((0.06, 0.25, 0.05))
    assert (seen["running"], seen["waiting"], seen["kv_cache"], seen["batch"]) == pytest.approx((7, 5, 0.5, 4))
    assert seen["power GPU-1f"] == pytest.approx(300)
    (energy,) = found.energy
    assert energy.joules == pytest.approx(100 * 10 * 15, rel=1e-6)
    assert energy.joules_per_request == pytest.approx(100, rel=0.02)


def test_replicas_with_a_page_each_add_up() -> None:
    found = side(looked(lambda s: pages.vllm(1000 + 60 * s)), looked(lambda s: pages.vllm(40 * s + 500, kv=0.75), late_s=0.6))
    seen = means(found)
    assert (seen["running"], seen["generation_tokens"], seen["kv_cache"]) == pytest.approx((6, 100, 0.5))


# ---------------------------------------------------------------- on the run's clock


def test_a_change_is_shown_in_the_second_in_which_it_happened() -> None:
    """Waiting rises from 0 to 8 at second 10 and tokens come twice as fast from there, whenever in a second the looks fall."""
    for late_s in (0.0, 0.25, 0.9):
        looks = looked(lambda s: pages.vllm(1000 + 100 * s + 100 * max(s - 10, 0), waiting=8 * (s >= 10)), late_s=late_s)
        series = {s.name: s.values for s in side(looks).series}
        assert series["waiting"][9:11] == (0, 8)
        rates = series["generation_tokens"]
        assert rates[8] == pytest.approx(100)
        assert rates[11] == pytest.approx(200)
        assert sum(r for r in rates[5:15] if r is not None) == pytest.approx(1500, abs=100 * late_s + 1e-6)


def test_a_server_that_restarts_loses_no_count() -> None:
    looks = looked(lambda s: pages.vllm(5000 + 100 * s if s < 10.25 else 100 * (s - 10.25)))
    rate = means(side(looks))["generation_tokens"]
    assert rate == pytest.approx(100, rel=0.08)  # what it counted between its last look and its end is gone


def test_seconds_without_looks_stay_empty() -> None:
    whole = looked(lambda s: pages.vllm(1000 + 100 * s))
    cut = Looks(where=whole.where, times_s=whole.times_s, took_s=whole.took_s)
    for key, (times, values) in whole.samples.items():
        kept = [(t, v) for t, v in zip(times, values, strict=True) if not 8 < t - T0 < 16]
        cut.samples[key] = (array("d", (t for t, _ in kept)), array("d", (v for _, v in kept)))
    series = {s.name: s.values for s in side(cut).series}
    assert series["running"][9:15] == (None,) * 6
    assert series["generation_tokens"][9:15] == (None,) * 6
    assert series["running"][5] == 3


def test_a_long_run_is_kept_in_few_steps() -> None:
    records = [answered(0.0), answered(7200.0)]
    found = side(looked(lambda s: pages.vllm(10 * s), until_s=7201, every_s=9.0), records=records, window=(100.0, 7000.0))
    assert found.step_s == 13.0
    assert {len(s.values) for s in found.series} == {554}
    assert means(found)["generation_tokens"] == pytest.approx(10)


# ---------------------------------------------------------------- beside the client's own figures


def test_the_servers_ttft_stands_beside_the_clients() -> None:
    found = side(looked(lambda s: pages.vllm(1000 + 100 * s)))
    ttft, tpot = found.two_sides
    assert (ttft.metric, tpot.metric) == ("ttft", "tpot")
    assert (ttft.server_s, ttft.client_s, ttft.between_s) == pytest.approx((0.04, 0.041, 0.001))
    assert ttft.server_count == pytest.approx(150)
    assert ttft.client_count == 150
    assert found.doubts == ()


def test_a_large_disagreement_is_said() -> None:
    (doubt,) = side(looked(lambda s: pages.vllm(1000 + 100 * s)), records=traffic(ttft_s=0.3)).doubts
    assert doubt.startswith("TTFT is 300 ms here and 40.0 ms by the server's own count")
    assert "a proxy, the network or this client" in doubt


def test_requests_of_others_and_replicas_unseen_are_said() -> None:
    others = side(looked(lambda s: pages.vllm(1000 + 300 * s))).doubts
    assert any("others use it too" in doubt for doubt in others)
    assert any("energy per token is too high" in doubt for doubt in others)
    unseen = side(looked(lambda s: pages.vllm(1000 + 50 * s))).doubts
    assert any("a part of the fleet" in doubt for doubt in unseen)


# ---------------------------------------------------------------- energy


def test_energy_per_token_is_the_counters_difference_over_the_tokens_of_the_same_seconds() -> None:
    """A busy GPU at 400 W, an idle one beside it, 100 tokens/s: 4 J a token, 40 J a request, 0.25 tokens/s for each watt."""
    found = side(looked(lambda s: pages.dcgm(400 * s)))
    (energy,) = found.energy
    assert energy.devices == ("gpu 0",)
    assert energy.source == "DCGM's energy counter"
    assert (energy.duration_s, energy.mean_w) == pytest.approx((15, 400))
    assert (energy.joules_per_output_token, energy.joules_per_request) == pytest.approx((4, 40), rel=0.01)
    assert energy.output_tokens_per_s_per_w == pytest.approx(0.25, rel=0.01)
    assert found.notes == ("gpu 1 did nothing in the window: their energy is left out",)
    assert means(found)["sm_clock gpu 0"] == 1755e6
    assert means(found)["memory gpu 0"] == 70000 * 2**20


def test_an_energy_counter_renewed_every_4_s_is_read_between_its_changes() -> None:
    """The exporter shows old values between; 400 W all along."""
    (energy,) = side(looked(lambda s: pages.dcgm(400 * 4 * (s // 4)), until_s=30), window=(4.0, 24.0)).energy
    assert energy.mean_w == pytest.approx(400, rel=1e-6)
    assert energy.source == "DCGM's energy counter"


def test_a_counter_that_is_too_slow_for_the_window_gives_way_to_the_power() -> None:
    (energy,) = side(looked(lambda s: pages.dcgm(400 * 30 * (s // 30)))).energy
    assert energy.source == "power of DCGM, summed over time"
    assert energy.joules == pytest.approx(400 * 15)


def test_gpus_of_two_hosts_add_up_and_one_that_pods_share_counts_once() -> None:
    shared = looked(lambda s: pages.dcgm(400 * s) + pages.dcgm(400 * s).replace('Hostname="node"', 'Hostname="node",pod="b"'))
    other = looked(lambda s: pages.dcgm(100 * s).replace('"node"', '"far"'))
    (energy,) = side(shared, other).energy
    assert energy.devices == ("far gpu 0", "node gpu 0")
    assert energy.mean_w == pytest.approx(500)


def test_a_gpu_that_was_slowed_down_is_named_with_the_cause() -> None:
    (doubt,) = side(looked(lambda s: pages.dcgm(400 * s, throttle=0x4 if s >= 10 else 0x1))).doubts
    assert doubt == "gpu 0 was slowed down in 66.7 % of the looks: power cap"


def test_energy_that_nobody_counts_is_not_invented() -> None:
    assert side(looked(lambda s: pages.vllm(100 * s))).energy == ()


def powercap(root: Path, joules: float, *, most: float = 262143.0) -> None:
    for domain, name, share in (("0", "package-0", 1.0), ("0:0", "core", 0.6), ("0:1", "dram", 0.1), ("1", "psys", 2.0)):
        folder = root / f"intel-rapl:{domain}"
        folder.mkdir(exist_ok=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{most * 1e6:.0f}\n")
        (folder / "energy_uj").write_text(f"{share * joules * 1e6 % (most * 1e6):.0f}\n")


def test_rapl_counts_packages_and_memory_once_and_knows_that_counters_wrap(tmp_path: Path) -> None:
    source = devices.Rapl(tmp_path)
    looks = Looks(where=source.where)
    for i in range(22):
        powercap(tmp_path, 90.0 + 50.0 * i, most=100.0)  # wraps every other second
        looks.add(T0 + i, 0.0, source.look(1.0), 0)
    (energy,) = side(looks).energy
    assert energy.devices == ("dram-0", "package-0")
    assert energy.joules == pytest.approx(15 * 50 * 1.1)


def test_a_machine_without_rapl_says_so(tmp_path: Path) -> None:
    with pytest.raises(page.MissedError, match="is not there"):
        devices.Rapl(tmp_path / "nowhere").look(1.0)
    with pytest.raises(page.MissedError, match="lists no CPU package"):
        devices.Rapl(tmp_path).look(1.0)


def test_a_machine_without_nvml_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(page.MissedError, match="there is no NVIDIA driver"):
        devices.Nvml([tmp_path / "nowhere"]).look(1.0)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(page.MissedError, match="nvidia-ml-py is not installed"):
        devices.Nvml([tmp_path]).look(1.0)


DRIVER = """
#include <stdint.h>
typedef void *Card;
int nvmlInitWithFlags(unsigned f) { (void)f; return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, Card *card) { *card = (Card)(uintptr_t)(i + 1); return 0; }
int nvmlDeviceGetPowerUsage(Card c, unsigned *mw) { *mw = 350000; return c == (Card)1 ? 0 : 3; }
int nvmlDeviceGetTotalEnergyConsumption(Card c, unsigned long long *mj) { *mj = 7000000ull; return c == (Card)1 ? 0 : 3; }
int nvmlDeviceGetUtilizationRates(Card c, unsigned *two) { (void)c; two[0] = 93; two[1] = 40; return 0; }
int nvmlDeviceGetClockInfo(Card c, unsigned kind, unsigned *mhz) { (void)c; *mhz = kind == 1 ? 1755 : kind == 2 ? 2619 : 0; return 0; }
int nvmlDeviceGetMemoryInfo(Card c, uint64_t *m) { (void)c; m[0] = 80ull << 30; m[1] = 50ull << 30; m[2] = 30ull << 30; return 0; }
int nvmlDeviceGetTemperature(Card c, unsigned sensor, unsigned *t) { (void)c; *t = sensor == 0 ? 61 : 0; return 0; }
int nvmlDeviceGetCurrentClocksThrottleReasons(Card c, unsigned long long *bits) { (void)c; *bits = 4; return 0; }
"""


@pytest.mark.skipif(shutil.which("gcc") is None or sys.platform != "linux", reason="needs gcc and Linux's loader")
def test_nvml_is_asked_through_nvidias_own_binding_in_its_own_units(tmp_path: Path) -> None:
    """A driver library with two cards, one of which tells neither power nor energy; no GPU has been asked yet."""
    pytest.importorskip("pynvml")
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True)
    code = (
        "import json, pathlib; from mlsys_bench.loadtest.serverside.devices import Nvml\n"
        f"source = Nvml([pathlib.Path({str(library)!r})]); found = source.look(1.0); source.release()\n"
        "print(json.dumps({f'{name} {label}': value for (name, label), value in found.items()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    first, second = '"0"', '"1"'
    told = {"utilisation": 0.93, "sm_clock": 1755e6, "memory_clock": 2619e6, "memory": 30 * 2**30, "temperature": 61, "throttle": 4}
    expected = {f"nvml_{name} gpu={card}": value for card in (first, second) for name, value in told.items()}
    assert json.loads(done.stdout) == {**expected, f"nvml_power gpu={first}": 350.0, f"nvml_energy gpu={first}": 7000.0}


# ---------------------------------------------------------------- what a person reads


def test_the_report_tells_load_latencies_and_energy() -> None:
    found = side(looked(lambda s: pages.vllm(1000 + 100 * s, hits=5)), looked(lambda s: pages.dcgm(400 * s)))
    told = {fact.label: (fact.text, fact.detail) for fact in serversides.facts(found)}
    assert told["Server"] == ("3.00 running, 1.00 waiting, KV cache 25.0 % full, prefix hits 25.0 %", "means; at most 1.00 waiting")
    assert told["TTFT there, here"] == ("40.0 ms by the server, 41.0 ms from the send", "1.00 ms between: network, proxies and client")
    assert told["Energy"][0] == "4.00 J per output token, 40.0 J per request, 0.250 tokens/s per W"
    assert told["Energy"][1] == "gpu 0: 400 W over 15.0 s by DCGM's energy counter"
    (table,) = serversides.tables(found)
    rows = {row[0].text: (row[1].text, row[2].text) for row in table.rows}
    assert rows["gpu 0, sm clock"] == ("1,755 MHz", "1,755 MHz")
    assert rows["generation tokens"] == ("100 tokens/s", "100 tokens/s")


def test_a_server_that_tells_nothing_is_one_line() -> None:
    nothing = Looks(where="http://here/metrics", failed=1, missed="HTTP 404")
    (fact,) = serversides.facts(side(nothing))
    assert (fact.text, fact.detail) == ("tells nothing of itself", "http://here/metrics: HTTP 404")
    assert serversides.tables(side(nothing)) == ()
    assert over_time(side(nothing), None, "") is None


def test_the_picture_has_a_panel_for_each_unit() -> None:
    found = side(looked(lambda s: pages.vllm(1000 + 100 * s)), looked(lambda s: pages.dcgm(400 * s)))
    drawn = over_time(found, (5.0, 20.0), "vllm")
    assert drawn is not None
    assert [axis.get_ylabel() for axis in drawn.axes] == ["requests", "tokens/s", "share, %", "mean, ms", "power, W"]
    drawn.savefig(io.BytesIO(), format="png")
