"""Traces are read as they are, cut and stretched without loss, and described in numbers that are counted here a second way."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as reference

from mlsys_bench import record, workload
from mlsys_bench.errors import BadInput
from mlsys_bench.hardware import machine
from mlsys_bench.report import content
from mlsys_bench.types import Lengths, Provenance, RequestRecord, Requests, Workload
from mlsys_bench.workload import burstiness, observe, prefix, trace

TRACES = Path(__file__).parent.parent.parent / "shared" / "data" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason=f"the traces are not beside this checkout ({TRACES.name}/)")
AZURE, MOONCAKE = TRACES / "azure_llm_2023_conv.csv", TRACES / "mooncake_conversation.csv"
CHAT = workload.synthetic(20, arrivals="gamma:1.5", prompt="lognormal:900:1.2:8192", output="lognormal:250:1.0:1024")


def written(folder: Path, text: str, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def described(path: Path, **given_: Any) -> Workload:
    return observe.of_trace(trace.read(path, **given_), path)


# ---------------------------------------------------------------- published traces


@needs_traces
def test_the_azure_trace_is_as_published() -> None:
    """Gap SCV 1.2; dispersion 1.39, 3.87, 16.4 in full windows of 1, 10, 60 s, counted here a second way."""
    traffic = described(AZURE)
    seen, times_s = traffic.observed, trace.from_trace(AZURE).scheduled_s
    assert seen is not None
    assert (seen.requests, round(seen.rate_per_s, 2), round(seen.gap_scv or 0, 2)) == (19366, 5.53, 1.2)
    assert [round(seen.dispersion[w], 2) for w in ("1s", "10s", "60s")] == [1.39, 3.87, 16.41]
    for window_s in (1, 10, 60):
        counts, _ = np.histogram(times_s, np.arange(0, times_s[-1] // window_s + 1) * window_s)
        assert seen.dispersion[f"{window_s}s"] == pytest.approx(counts.var(ddof=1) / counts.mean())
    assert seen.prompt_tokens is not None
    assert seen.output_tokens is not None
    assert (round(seen.prompt_tokens.mean), round(seen.output_tokens.mean)) == (1155, 211)
    assert (seen.prompt_tokens.max, seen.output_tokens.max) == (14050, 1000)
    assert traffic.provenance is Provenance.MEASURED
    assert traffic.source == "azure_llm_2023_conv.csv: 19,366 requests in 3,502 s"


@needs_traces
def test_the_last_window_that_is_not_full_would_add_dispersion() -> None:
    """With it the Azure trace has 4.0 and 20.6 at 10 and 60 s (population variance), as it is sometimes quoted."""
    times_s = trace.from_trace(AZURE).scheduled_s
    for window_s, quoted in ((10, 4.0), (60, 20.6)):
        counts = np.bincount((times_s // window_s).astype(int))
        assert round(float(counts.var() / counts.mean()), 1) == quoted


@needs_traces
def test_the_law_found_for_the_azure_trace_is_as_bursty_at_every_window() -> None:
    """Its formula lies in the 90 % interval of each window from 1 s to 10 min; so does what is drawn from it, at 1, 10 and 60 s."""
    traffic = described(AZURE)
    law = workload.parse_arrivals(traffic.arrivals)
    assert law.bursts
    assert traffic.observed is not None
    drawn = workload.arrival_times(traffic.rate_per_s, traffic.arrivals, duration_s=100_000, seed=1)
    for name, (low, high) in traffic.observed.dispersion_intervals.items():
        window_s = float(name.removesuffix("s"))
        again = burstiness.dispersion(burstiness.counts_of(drawn, window_s), window_s)
        assert again is not None
        assert low <= 1 + burstiness.excess(law.bursts, traffic.rate_per_s, window_s) <= high
        assert low <= again.index <= high


@needs_traces
def test_the_mooncake_trace_is_read_with_its_blocks_of_512_tokens() -> None:
    traffic = described(MOONCAKE)
    seen, plan = traffic.observed, trace.from_trace(MOONCAKE)
    assert seen is not None
    assert (seen.requests, round(seen.duration_s)) == (12031, 3537)
    assert seen.prompt_tokens is not None
    assert seen.output_tokens is not None
    assert (round(seen.prompt_tokens.mean), round(seen.output_tokens.mean)) == (12035, 343)
    assert plan.prefix_block_tokens == 512
    assert plan.prefix_offsets is not None
    assert (np.diff(plan.prefix_offsets) == -(-plan.prompt_tokens // 512)).all()
    assert seen.gap_scv is None
    assert "1s" not in seen.dispersion
    assert seen.notes == ("arrival times stand on a grid of about 3 s; what happens within it is not known",)


@needs_traces
def test_prefix_hits_of_the_mooncake_trace_are_counted_a_second_way() -> None:
    """An endless cache by sets of whole prefixes, from the file itself; smaller caches never hit more."""
    seen: set[str] = set()
    hits = total = 0
    with MOONCAKE.open(newline="") as file:
        for row in csv.DictReader(file):
            blocks, length = row["hash_ids"].split(), int(row["input_length"])
            found = 0
            while found < len(blocks) and blocks[found] in seen:
                found += 1
            hits, total = hits + min(512 * found, length), total + length
            seen |= set(blocks)
    plan = trace.from_trace(MOONCAKE)
    assert prefix.hit_share(plan) == pytest.approx(hits / total)
    shares = [prefix.hit_share(plan, tokens) for tokens in (1e5, 1e7, 1e9)]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(hits / total)


# ---------------------------------------------------------------- formats


def test_a_small_trace_by_hand(tmp_path: Path) -> None:
    """Gaps 1, 3: mean 2, variance 2, SCV 0.5; three requests in 4 s are two gaps, 0.5 per second; the file is not in order."""
    traffic = described(written(tmp_path, "timestamp,prompt_tokens,output_tokens\n14,30,5\n10,10,5\n11,20,5\n"))
    seen = traffic.observed
    assert seen is not None
    assert [seen.rate_per_s, seen.gap_scv, seen.duration_s] == pytest.approx([0.5, 0.5, 4.0])
    assert seen.prompt_tokens is not None
    assert (seen.prompt_tokens.mean, seen.prompt_tokens.cv, seen.prompt_tokens.p50, seen.prompt_tokens.max) == (20, 0.5, 20, 30)
    assert seen.dispersion == {"1s": pytest.approx((0.25 * 2 + 0.25 * 2) / 3 / 0.5)}
    assert dataclasses.replace(traffic, observed=None) == Workload(
        rate_per_s=0.5,
        arrivals="poisson",  # two gaps tell nothing else
        prompt_tokens=Lengths(dist="lognormal", mean=20, cv=0.5, max=30),
        output_tokens=Lengths(mean=5, max=5),
        provenance=Provenance.MEASURED,
        source="trace.csv: 3 requests in 4 s",
    )


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = written(tmp_path, "when_ms,in,out,who\n0,1,2,b\n500,3,4,a\n")
    plan = trace.from_trace(path, columns={"time": "when_ms", "prompt": "in", "output": "OUT", "tenant": "who"})
    assert (plan.scheduled_s.tolist(), plan.prompt_tokens.tolist(), plan.output_tokens.tolist()) == ([0, 0.5], [1, 3], [2, 4])
    assert plan.tenant is not None
    assert [plan.tenants[t] for t in plan.tenant] == ["b", "a"]


def test_a_key_that_the_first_object_leaves_out_is_a_column_all_the_same(tmp_path: Path) -> None:
    """Writers of JSON lines leave out what is null: a first request of no session hid the sessions of all others."""
    lines = [{"time_s": 0.0, "input_tokens": 8, "output_tokens": 2}]
    lines += [{"time_s": float(i), "input_tokens": 8, "output_tokens": 2, "session_id": "a"} for i in (1, 2, 3)]
    plan = trace.from_trace(written(tmp_path, "\n".join(map(json.dumps, lines)), "chats.jsonl"))
    assert plan.session is not None
    assert plan.turn is not None
    assert (plan.session.tolist(), plan.turn.tolist()) == ([0, 1, 1, 1], [0, 0, 1, 2])


def test_mooncake_lines_are_milliseconds_and_bailian_lines_are_seconds(tmp_path: Path) -> None:
    moon = [{"timestamp": 2000 * i, "input_length": 700, "output_length": 5, "hash_ids": [0, i]} for i in range(3)]
    bai = [
        {"chat_id": i, "parent_chat_id": i - 2 if i > 1 else -1, "timestamp": 2.0 * i, "input_length": 33, "output_length": 5,
         "turn": 1, "hash_ids": [7, i, i]} for i in range(4)
    ]  # fmt: skip
    one = trace.from_trace(written(tmp_path, "\n".join(map(json.dumps, moon)), "moon.jsonl"))
    two = trace.from_trace(written(tmp_path, "\n".join(map(json.dumps, bai)), "bai.jsonl"))
    assert one.scheduled_s.tolist() == [0, 2, 4]
    assert two.scheduled_s.tolist() == [0, 2, 4, 6]
    assert (one.prefix_block_tokens, two.prefix_block_tokens) == (512, 16)
    assert two.session is not None
    assert two.turn is not None
    assert (two.session.tolist(), two.turn.tolist()) == ([0, 1, 0, 1], [0, 0, 1, 1])
    assert prefix.hit_share(two) == pytest.approx(3 * 16 / (4 * 33))


def test_mooncake_without_its_hashes_is_still_in_milliseconds(tmp_path: Path) -> None:
    """Its three columns say so, and a note says that it was assumed; fractions and dates are no such milliseconds, and options win."""
    path = written(tmp_path, "timestamp,input_length,output_length\n0,700,5\n500,700,5\n4000,700,5\n")
    plan = trace.from_trace(path)
    assert plan.scheduled_s.tolist() == [0, 0.5, 4]
    assert plan.notes == ("timestamp was taken to count ms, as in Mooncake's traces, whose columns these are",)
    told = trace.from_trace(path, columns={}, time_unit="s")
    assert (told.scheduled_s.tolist(), told.notes) == ([0, 500, 4000], ())
    for first, last, seconds in (("0", "4.5", 4.5), ("1700000000", "1700000004", 4.0), ("2024-01-01 00:00:00", "2024-01-01 00:00:04", 4.0)):
        plan = trace.from_trace(written(tmp_path, f"timestamp,input_length,output_length\n{first},700,5\n{last},700,5\n"))
        assert (plan.scheduled_s.tolist(), plan.notes) == ([0, seconds], ())


def test_burstgpt_columns_are_known_and_failures_left_out(tmp_path: Path) -> None:
    text = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    text += "5,GPT-4,10,4,14,API log\n6,GPT-4,10,0,10,API log\n9,GPT-4,8,3,11,API log\n"
    found = trace.read(written(tmp_path, text))
    assert found.schedule.scheduled_s.tolist() == [0, 4]
    assert found.schedule.notes == ("1 request without prompt or output tokens (failed) left out, also of the rate",)


def test_hashes_written_as_text_stay_apart(tmp_path: Path) -> None:
    text = 'time,input_tokens,output_tokens,hash_ids\n0,64,1,"[""a1"",""b""]"\n1,64,1,"a1 c"\n2,64,1,a1 c\n'
    plan = trace.from_trace(written(tmp_path, text.replace('""', "")), block_tokens=32)
    assert prefix.hit_share(plan) == pytest.approx((32 + 64) / (3 * 64))


def test_our_own_requests_are_a_trace_without_their_retries(tmp_path: Path) -> None:
    rows = [
        RequestRecord(
            index=i, scheduled_s=0.5 * i, prompt_tokens=10 + i, output_tokens=None if i == 3 else 4, attempt=1 + (i == 2), tenant="t"
        )
        for i in range(6)
    ]
    record.write(tmp_path / "run.parquet", Requests(t0_unix_s=1e9, requests=tuple(rows)), machine())
    found = trace.read(tmp_path / "run.parquet")
    assert found.schedule.prompt_tokens.tolist() == [10, 11, 14, 15]
    assert found.schedule.scheduled_s.tolist() == [0, 0.5, 2, 2.5]
    assert (found.schedule.tenants, found.schedule.session) == (("t",), None)
    assert len(found.schedule.notes) == 2


def test_a_drawn_trace_comes_back_as_its_workload(tmp_path: Path) -> None:
    """Write what a workload draws, read it again: rate, burstiness, lengths and their correlation within sampling error (20,000)."""
    drawn = workload.schedule(dataclasses.replace(CHAT, length_correlation=0.4), n=20_000, seed=9)
    rows = zip(drawn.scheduled_s.tolist(), drawn.prompt_tokens.tolist(), drawn.output_tokens.tolist(), strict=True)
    back = described(written(tmp_path, "time_s,prompt_tokens,output_tokens\n" + "".join(f"{t!r},{p},{o}\n" for t, p, o in rows)))
    seen = back.observed
    assert seen is not None
    assert seen.rate_per_s == pytest.approx(20, rel=4 * 1.5 / math.sqrt(20_000))
    assert workload.parse_arrivals(back.arrivals).cv == pytest.approx(1.5, rel=0.06)
    assert back.length_correlation == pytest.approx(0.4, abs=4 / math.sqrt(20_000))
    assert seen.length_correlation == pytest.approx(reference.spearmanr(drawn.prompt_tokens, drawn.output_tokens).statistic)
    for summary, law in ((seen.prompt_tokens, CHAT.prompt_tokens), (seen.output_tokens, CHAT.output_tokens)):
        assert summary is not None
        assert summary.mean == pytest.approx(workload.mean_tokens(law), rel=4 * summary.cv / math.sqrt(20_000))


def test_a_million_requests_are_read_within_a_few_hundred_megabytes(tmp_path: Path) -> None:
    """20,000 rows take at most 100 bytes each above the file's own buffers: a million stay below 150 MB."""
    path = tmp_path / "long.csv"
    with path.open("w") as file:
        file.write("time_s,prompt_tokens,output_tokens\n")
        file.writelines(f"{i / 7},{100 + i % 900},{1 + i % 300}\n" for i in range(20_000))
    tracemalloc.start()
    try:
        plan = trace.from_trace(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(plan) == 20_000
    assert peak < 20_000 * 100 + 1e6


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty; a trace has a header line"),
        ("time,prompt_tokens,output_tokens\n", "0 request"),
        ("time,prompt_tokens,output_tokens\n1,2,3\n", "1 request"),
        ("time,prompt_tokens,output_tokens\n1,2,3\n1,2,0\n", "1 request(s) (1 without tokens left out)"),
        ("time,prompt_tokens\n1,2\n2,2\n", "no column of output that is known"),
        ('[{"time": 1, "prompt_tokens": 2, "output_tokens": 2}]', "is one JSON array; a trace has one JSON object per line: jq -c '.[]'"),
        ("a,b\n1,2\n", "it has a, b; call it TIMESTAMP in the file's header"),
        ("time,prompt_tokens,output_tokens,Prompt_Tokens\n1,2,3,4\n5,2,3,4\n", "2 columns are called Prompt_Tokens; leave one of them"),
        ("time,prompt_tokens,output_tokens\n1,2,3\n1.5,2,3\n", "come within 0.5 s, and rates are counted by the second"),
        ("time,prompt_tokens,output_tokens\n1,2,3\nnoon,2,3\n", "line 3: time is 'noon'"),
        ("time,prompt_tokens,output_tokens\n1,2,3\nnan,2,3\n", "line 3: time is 'nan'"),
        ("time,prompt_tokens,output_tokens\n2024-01-01 00:00:00,2,3\n5,2,3\n", "line 3: time is '5', a number, and above it stand dates"),
        ("time,prompt_tokens,output_tokens\n5,2,3\n2024-01-01,2,3\n", "line 3: time is '2024-01-01', a date, and above it stand numbers"),
        (
            "time,prompt_tokens,output_tokens,session_id,gap_s\n0,2,3,a,\n,2,3,a,-5\n9,2,3,b,\n",
            "line 3: gap_s is '-5'; write the seconds waited after the answer, from 0 up",
        ),
        ("time,prompt_tokens,output_tokens\n1,2,3\n2,-2,3\n", "line 3: prompt_tokens is '-2'"),
        ("time,prompt_tokens,output_tokens\n1,2,3\n2,2,3.5\n", "line 3: output_tokens is '3.5'"),
        ("time,prompt_tokens,output_tokens\n1,2,3\n2,2\n", "line 3: has 2 fields where the header has 3; was the file cut off?"),
        ("time,prompt_tokens,output_tokens\n1,2,3\n1,2,3\n", "all requests arrive at the same time"),
        ("time,prompt_tokens,output_tokens\n0,2,3\n1e15,2,3\n", "come over 11,574,074,074 days, at most 366 are read; are its times in"),
        (
            "time,prompt_tokens,output_tokens,hash_ids\n1,50,3,1 2 3 4 5 6 7\n2,900,3,1\n",
            "hash_ids fits no block size of 16, 32, 64, 128, 256, 512, 1024 tokens; leave that column out, or ask a command that takes",
        ),
        ('{"time": 1, "prompt_tokens": 2, "output_tokens": 3}\n{"time":', "line 2: is not JSON"),
        ('{"time": 1, "prompt_tokens": 2, "output_tokens": 3}\n[1]', "line 2: holds no object"),
        ('{\n"kind": "plan"}', "one JSON object per line, with columns of time"),
    ],
)
def test_a_broken_trace_says_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(BadInput) as caught:
        described(written(tmp_path, text))
    assert says in str(caught.value)
    assert "trace.csv: " in str(caught.value)


def test_only_who_can_name_columns_is_told_to(tmp_path: Path) -> None:
    """`plan` and `simulate` have no --time-column, `workload` and `loadtest` do."""
    path = written(tmp_path, "a,b\n1,2\n")
    with pytest.raises(BadInput, match="name one with --time-column"):
        trace.read(path, columns={})
    with pytest.raises(BadInput, match="call it TIMESTAMP"):
        trace.read(path)
    path = written(tmp_path, "time,prompt_tokens,output_tokens,hash_ids\n1,50,3,1 2 3 4 5 6 7\n2,900,3,1\n")
    with pytest.raises(BadInput, match="give --block-tokens"):
        trace.read(path, columns={})


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = written(tmp_path, "time,prompt_tokens,output_tokens\n1,2,3\n2,2,3\n")
    with pytest.raises(BadInput, match=r"no column 'tokens_in'; it has time, prompt_tokens, output_tokens; name one with --prompt-column"):
        trace.read(path, columns={"prompt": "tokens_in"})
    with pytest.raises(BadInput, match="write s, ms, us or ns"):
        trace.read(path, time_unit="min")


@pytest.mark.parametrize(("unit", "per_s"), [("ms", 1e3), ("us", 1e6), ("ns", 1e9)])
def test_times_from_1970_on_are_known_by_their_size(tmp_path: Path, unit: str, per_s: float) -> None:
    """Read as seconds, three requests within a second would be a trace of eleven days, or of 32 years."""
    path = tmp_path / "trace.csv"
    rows = "".join(f"{int((1_700_000_000 + t) * per_s)},100,10\n" for t in (0.0, 0.25, 1.0))
    path.write_text(f"time,prompt_tokens,output_tokens\n{rows}")
    found = trace.read(path, columns={})
    assert found.schedule.scheduled_s.tolist() == pytest.approx([0, 0.25, 1.0], abs=1e-5)
    assert found.start_unix_s == 1_700_000_000
    assert found.schedule.notes == (f"time was taken to count {unit} from 1970 on",)
    told = trace.read(path, columns={}, time_unit="s")
    assert told.schedule.scheduled_s[-1] == pytest.approx(per_s)  # who says what it is in is believed
    path.write_text("time,prompt_tokens,output_tokens\n1700000000,100,10\n1700000001,100,10\n")
    assert trace.read(path, columns={}).schedule.notes == ()


@pytest.mark.parametrize("data", [b"\xff\xfe\x00\x01", b"\x1f\x8b\x08\x00", b"PAR1\x00\xff", b'{"time": "\xff"}'])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=r"trace\.csv: "):
        trace.read(path)


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"gone\.csv: cannot be read: No such file or directory"):
        trace.read(tmp_path / "gone.csv")


def test_a_day_of_silence_leaves_an_interval_of_dispersion() -> None:
    """60 and 90 in two windows, then nothing: each pair against its own mean, 2 x 15^2 x 8 / 4 over 150 is 6.

    A draw of silent blocks alone is 0 / 0, which numpy warns of; every other one has the first block alone, so 6.
    """
    found = burstiness.dispersion(np.array([60.0, 90, 0, 0, 0, 0, 0, 0]), 1.0, level_s=2.0)
    assert found is not None
    assert (found.index, found.low, found.high) == pytest.approx((6, 6, 6))


def test_what_was_seen_is_shown(tmp_path: Path) -> None:
    """One section: the law in words, what was seen, burstiness and lengths as tables, and what is not known."""
    tenants = workload.merged({"chat": workload.schedule(CHAT, n=3000, seed=1), "batch": workload.schedule(CHAT, n=1000, seed=2)})
    (section,) = content.describe(described(trace.write(tenants, tmp_path / "seen.csv")))
    facts = {fact.label: fact.text for fact in section.facts}
    assert facts["Seen"].startswith("4,000 requests in")
    assert facts["Tenants"] == "chat 75.0 %, batch 25.0 %"
    assert [table.title for table in section.tables] == ["Burstiness", "Lengths"]
    assert [row[0].text for row in section.tables[0].rows] == ["1 s", "10 s", "60 s"]
    assert "gamma gaps" in section.lead or "bursts" in section.lead
    (plain,) = content.describe(CHAT)
    assert plain.tables == ()
    assert plain.tag == "assumed"


# ---------------------------------------------------------------- cut and stretch


def marked(n: int, seed: int = 0, name: int = 0) -> workload.Schedule:
    """Return n requests that carry everything a schedule can; request i has i blocks of hashes 100 i, 100 i + 1, …"""
    rng = np.random.default_rng(seed)
    counts = np.arange(n) % 4
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return workload.Schedule(
        scheduled_s=np.cumsum(rng.exponential(1.0, n)),
        prompt_tokens=16 * counts + 1,
        output_tokens=np.arange(n) + 1,
        prefix_offsets=offsets,
        prefix_hashes=np.concatenate([100 * i + np.arange(c) for i, c in enumerate(counts)]).astype(np.int64) + name,
        prefix_block_tokens=16,
        session=(np.arange(n) // 2).astype(np.int32),
        turn=(np.arange(n) % 2).astype(np.int32),
    )


def blocks(plan: workload.Schedule, row: int) -> list[int]:
    assert plan.prefix_offsets is not None
    assert plan.prefix_hashes is not None
    return plan.prefix_hashes[plan.prefix_offsets[row] : plan.prefix_offsets[row + 1]].tolist()


@given(st.lists(st.integers(0, 11), max_size=20))
def test_rows_that_are_taken_keep_what_is_theirs(rows: list[int]) -> None:
    plan = marked(12)
    taken = workload.take(plan, np.array(rows, dtype=np.int64))
    assert len(taken) == len(rows)
    for new, old in enumerate(rows):
        assert taken.output_tokens[new] == old + 1
        assert blocks(taken, new) == blocks(plan, old)
        assert taken.session is not None
        assert taken.session[new] == old // 2


def test_a_slice_begins_at_its_own_zero_and_a_session_cut_in_two_begins_anew() -> None:
    plan = marked(12)
    start_s = float(plan.scheduled_s[3])
    part = workload.sliced(plan, start_s, float(plan.scheduled_s[8]))
    assert part.scheduled_s[0] == 0
    assert part.output_tokens.tolist() == [4, 5, 6, 7, 8]
    assert part.turn is not None
    assert part.turn.tolist() == [0, 0, 1, 0, 1]


@given(st.floats(0.01, 1000), st.integers(0, 99))
def test_a_trace_scaled_to_a_rate_has_it_and_keeps_its_shape(rate: float, seed: int) -> None:
    plan = marked(40, seed)
    scaled = workload.scaled_to_rate(plan, rate)
    assert workload.rate_per_s(scaled) == pytest.approx(rate)
    gaps, before = np.diff(scaled.scheduled_s), np.diff(plan.scheduled_s)
    assert (gaps / gaps.mean()).tolist() == pytest.approx((before / before.mean()).tolist())


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_or_speed_that_is_none_is_refused(bad: float) -> None:
    for stretch in (workload.scaled_to_rate, workload.sped_up):
        with pytest.raises(BadInput, match="above zero"):
            stretch(marked(4), bad)


def test_tenants_are_merged_in_order_and_share_nothing() -> None:
    one, two = marked(6, 1), marked(8, 2)
    both = workload.merged({"one": one, "two": dataclasses.replace(two, session=None, turn=None)})
    assert (np.diff(both.scheduled_s) >= 0).all()
    assert both.tenant is not None
    assert both.session is not None
    for which, plan in ((0, one), (1, two)):
        rows = np.flatnonzero(both.tenant == which)
        assert both.output_tokens[rows].tolist() == plan.output_tokens.tolist()
        assert [len(blocks(both, int(r))) for r in rows] == [len(blocks(plan, i)) for i in range(len(plan))]
    mine, theirs = ({h for r in np.flatnonzero(both.tenant == t) for h in blocks(both, int(r))} for t in (0, 1))
    assert not mine & theirs
    assert len(set(both.session.tolist())) == 3 + 8  # sessions of two, and lonely requests


def test_tenants_written_as_a_trace_are_read_back(tmp_path: Path) -> None:
    plan = workload.merged({"one": workload.schedule(CHAT, n=30, seed=1), "two": workload.schedule(CHAT, n=20, seed=2)})
    back = trace.from_trace(trace.write(plan, tmp_path / "tenants.csv"))
    assert back.tenant is not None
    assert plan.tenant is not None
    assert [back.tenants[t] for t in back.tenant] == [plan.tenants[t] for t in plan.tenant]


def test_tenants_that_cannot_be_merged_are_refused() -> None:
    other = dataclasses.replace(marked(4), prefix_block_tokens=32)
    with pytest.raises(BadInput, match="one prefix block size"):
        workload.merged({"a": marked(4), "b": other})
    with pytest.raises(BadInput, match="no tenants"):
        workload.merged({})


def test_lengths_resampled_from_a_trace_keep_their_joint_law() -> None:
    """Output is prompt // 16 + 1 modulo the row in `marked`: every drawn pair must be one of the trace's."""
    plan = marked(50)
    drawn = workload.resampled(plan, CHAT, n=500, seed=3)
    pairs = set(zip(plan.prompt_tokens.tolist(), plan.output_tokens.tolist(), strict=True))
    assert set(zip(drawn.prompt_tokens.tolist(), drawn.output_tokens.tolist(), strict=True)) <= pairs
    assert drawn.scheduled_s.tolist() == workload.schedule(CHAT, n=500, seed=3).scheduled_s.tolist()


def test_times_on_a_grid_are_spread_over_it() -> None:
    """Batches of 20 every 3 s: 60 s hold 400 either way, but no longer 20 at once."""
    at_s = np.repeat(np.arange(200) * 3.0, 20)
    plan = workload.Schedule(scheduled_s=at_s, prompt_tokens=np.ones(4000, dtype=np.int64), output_tokens=np.ones(4000, dtype=np.int64))
    assert workload.resolution_s(at_s) == 3
    spread = workload.spread(plan, 3.0)
    assert (np.diff(spread.scheduled_s) > 0).all()
    assert (np.histogram(spread.scheduled_s, np.arange(0, 601, 60))[0] == 400).all()


# ---------------------------------------------------------------- prefixes


def cached(rows: list[list[int]], tokens: float | None, block: int = 10) -> float:
    counts = [len(r) for r in rows]
    plan = workload.Schedule(
        scheduled_s=np.arange(len(rows), dtype=float),
        prompt_tokens=np.array(counts) * block,
        output_tokens=np.ones(len(rows), dtype=np.int64),
        prefix_offsets=np.concatenate([[0], np.cumsum(counts)]),
        prefix_hashes=np.array([h for r in rows for h in r], dtype=np.int64),
        prefix_block_tokens=block,
    )
    return prefix.hit_share(plan, tokens)


def test_prefix_hits_by_hand() -> None:
    """1 2 | 1 2 3 | 4 | 1 5: endless 0 + 2 + 0 + 1 of 8 blocks.  With room for three, 4 pushes out 3, the tail used least recently."""
    rows = [[1, 2], [1, 2, 3], [4], [1, 5]]
    assert cached(rows, None) == pytest.approx(3 / 8)
    assert cached(rows, 30) == pytest.approx(3 / 8)
    assert cached(rows, 10) == pytest.approx((1 + 0 + 0) / 8)  # only the head of the last prompt stays
    assert cached(rows, 0) == 0


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=20), st.integers(0, 12))
def test_a_larger_cache_never_hits_less(tails: list[list[int]], room: int) -> None:
    """Prefix hashes: a block's hash covers its whole beginning."""
    rows = [[hash(tuple(tail[: i + 1])) for i in range(len(tail))] for tail in tails]
    assert cached(rows, 10.0 * room) <= cached(rows, 10.0 * (room + 1)) <= cached(rows, None)


def test_traffic_without_hashes_has_no_prefixes() -> None:
    with pytest.raises(BadInput, match="says nothing of prefixes"):
        prefix.hit_share(workload.schedule(CHAT, n=3))
