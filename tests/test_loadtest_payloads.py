"""What requests carry: made-up words that share what they must and nothing else, conversations, data sets, images."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import workload
from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest import content, endpoints, payloads, prompts, schedule
from mlsys_bench.loadtest.payloads import dataset, images, think, written
from mlsys_bench.types import Lengths
from mlsys_bench.workload import Schedule, prefix


def spec_of(plan: Schedule, chars_per_token: float = 1.0, **more: Any) -> payloads.Spec:
    """Return what a server of so many characters a token would get."""
    return written.spec(
        written.waiting_last(plan), chars=lambda n: max(1, round(n * chars_per_token)), chars_per_token=chars_per_token, seed=3, **more
    )


def plain(n: int, tokens: int = 100) -> Schedule:
    return Schedule(
        scheduled_s=np.arange(n, dtype=float), prompt_tokens=np.full(n, tokens, dtype=np.int64), output_tokens=np.full(n, 7, dtype=np.int64)
    )


def common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return how far two begin alike."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---------------------------------------------------------------- made-up words


@given(st.integers(0, 10**6), st.integers(1, 400_000), st.integers(0, 99))
@settings(max_examples=20)
def test_a_text_is_as_long_as_asked_and_always_the_same(index: int, chars: int, seed: int) -> None:
    text = prompts.Text(seed)
    one = text.prompt(index, chars)
    assert len(one) == chars == len(text.block(index, chars))
    assert one == prompts.Text(seed).prompt(index, chars)
    assert set(one) <= set("abcdefghijklmnopqrstuvwxyz ")


def test_every_stretch_of_text_is_made_of_the_same_words() -> None:
    """So that it has as many tokens as any other, on any tokenizer: of 24 words each comes as often, give or take one at either end."""
    text = prompts.Text(9)
    for index in range(20):
        words = text.prompt(index, 2000).split()[2:-1]
        often = Counter(words)
        assert len(often) == 24
        assert max(often.values()) - min(often.values()) <= 2
    assert text.prompt(3, 500) != prompts.Text(10).prompt(3, 500)
    two, five = (Counter(text.rounds(count).split()[1:]) for count in (2, 5))
    assert set((five - two).values()) == {3}
    assert len(text.rounds(5)) - len(text.rounds(2)) == 3 * prompts.ROUND_CHARS


def test_no_two_prompts_begin_alike_without_shared_blocks() -> None:
    source = payloads.make(spec_of(plain(500)))
    texts = [source.ask(i).text for i in range(2000)]  # four times through the rows: new words each time
    assert {len(text) for text in texts} == {100}
    assert len({text[:12] for text in texts}) == 2000


# ---------------------------------------------------------------- shared blocks

CHAINS = st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=2, max_size=12)


def with_chains(chains: list[list[int]], block: int, extra: int) -> Schedule:
    """Return a trace whose hashes cover their block and all before it: a chain is a path down a tree."""
    names: dict[tuple[int, ...], int] = {}
    hashes = [[names.setdefault(tuple(chain[: k + 1]), len(names)) for k in range(len(chain))] for chain in chains]
    tokens = [block * len(chain) + extra for chain in chains]
    return Schedule(
        scheduled_s=np.arange(len(chains), dtype=float),
        prompt_tokens=np.array(tokens, dtype=np.int64),
        output_tokens=np.ones(len(chains), dtype=np.int64),
        prefix_offsets=np.concatenate([[0], np.cumsum([len(c) for c in chains])]).astype(np.int64),
        prefix_hashes=np.array([h for row in hashes for h in row], dtype=np.int64),
        prefix_block_tokens=block,
    )


@given(CHAINS, st.sampled_from([16, 512]), st.sampled_from([1.0, 3.7]))
@settings(max_examples=40)
def test_equal_chains_of_hashes_are_equal_text_and_nothing_more(chains: list[list[int]], block: int, ratio: float) -> None:
    """For every pair: as many tokens' worth of characters in common as blocks, and not another block's worth."""
    source = payloads.make(spec_of(with_chains(chains, block, extra=9), ratio))
    texts = [source.ask(i).text for i in range(len(chains))]
    for a in range(len(chains)):
        for b in range(a):
            blocks = common(chains[a], chains[b])
            assert round(blocks * block * ratio) <= common(texts[a], texts[b]) < round(blocks * block * ratio) + 12


def test_mooncake_prompts_share_what_their_hashes_say_as_text(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 1, "hash_ids": [1, 2, 3]},
        {"timestamp": 1, "input_length": 1300, "output_length": 1, "hash_ids": [1, 2, 4]},
        {"timestamp": 2, "input_length": 600, "output_length": 1, "hash_ids": [1, 9]},
        {"timestamp": 3, "input_length": 1300, "output_length": 1, "hash_ids": [1, 2, 4]},
    ]
    path = tmp_path / "moon.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = payloads.make(spec_of(workload.from_trace(path), 4.0))
    a, b, c, d = (source.ask(i).text for i in range(4))
    assert [len(t) for t in (a, b, c, d)] == [4400, 5200, 2400, 5200]
    assert 4096 <= common(a, b) < 4108
    assert 2048 <= common(a, c) < 2060
    assert b == d  # the last block, part-filled, is the same too
    again = source.ask(4).text  # the trace once more: what was this request's alone is other text, what was shared is shared
    assert 4096 <= common(a, again) < 4108


def test_a_shared_prefix_is_put_before_a_share_of_the_prompts() -> None:
    shared = content.parse_shared_prefix("1000:4:80%")
    plan = schedule.with_shared_prefix(plain(2000), shared, seed=1)
    has = plan.prompt_tokens == 1100
    assert abs(has.mean() - 0.8) < 4 * (0.8 * 0.2 / 2000) ** 0.5
    assert set(plan.prompt_tokens.tolist()) == {100, 1100}
    source = payloads.make(spec_of(plan))
    begins = [source.ask(i).text[:1000] for i in np.flatnonzero(has).tolist()]
    assert len(set(begins)) == 4
    assert prefix.hit_share(plan) == pytest.approx((has.sum() - 4) * 1000 / plan.prompt_tokens.sum())
    for text in ("0", "10:0", "10:2:80", "10:2:150%", "1:2:3%:4", "ten"):
        with pytest.raises(BadInput, match="--shared-prefix"):
            content.parse_shared_prefix(text)


# ---------------------------------------------------------------- sessions


def talks(n: int = 6, turns: int = 3, shared: int = 0) -> Schedule:
    law = workload.Sessions(
        turns=Lengths(mean=turns), new_tokens=Lengths(mean=50), output_tokens=Lengths(mean=10), gap_mean_s=2.0, shared_tokens=shared
    )
    return workload.sessions(law, rate_per_s=5.0, n=n, seed=2)


def test_arrivals_come_first_and_every_turn_has_one_that_waits_for_it() -> None:
    spec = spec_of(talks())
    order = payloads.Order(spec)
    assert (spec.arrivals, order.waits, len(spec.prompt_chars)) == (6, True, 18)
    seen = []
    for number in range(6):
        index: int | None = order.first(number)
        chain = []
        while index is not None:
            chain.append(index)
            following = order.after(index)
            index = following[0] if following else None
            assert following is None or following[1] > 0
        assert len(chain) == 3
        assert len({order.session(i) for i in chain}) == 1
        seen += chain
    assert sorted(seen) == list(range(18))
    assert order.first(6) == 18  # walked through again, it is another session
    assert (order.session(0), order.session(18)) == ("0", "0.1")
    again = order.after(18)
    assert again is not None
    assert again[0] == 18 + (order.after(0) or (0, 0.0))[0]


def test_without_sessions_nobody_waits_and_numbers_are_indices() -> None:
    order = payloads.Order(spec_of(plain(5)))
    assert [order.first(n) for n in (0, 4, 5, 11)] == [0, 4, 5, 11]
    assert (order.after(3), order.tenant(3), order.session(3), order.waits) == (None, None, None, False)


def test_a_turn_carries_what_was_asked_and_really_answered() -> None:
    spec = spec_of(talks())
    source, order = payloads.make(spec), payloads.Order(spec)
    first = source.ask(0)
    second_index = (order.after(0) or (0, 0.0))[0]
    second = source.ask(second_index, ("Paris.",))
    third = source.ask((order.after(second_index) or (0, 0.0))[0], ("Paris.", "In France."))
    assert [len(first.text), first.output_tokens, len(first.messages)] == [50, 10, 1]
    assert [m["role"] for m in third.messages] == ["user", "assistant", "user", "assistant", "user"]
    assert [m["content"] for m in third.messages][1::2] == ["Paris.", "In France."]
    assert second.messages == third.messages[:3]
    assert second.text.startswith(first.text + "Paris.")
    assert third.text.startswith(second.text + "In France.")
    assert len(second.text) == 50 + 6 + 50
    assert source.ask(second_index, ("Paris.",)) == payloads.make(spec).ask(second_index, ("Paris.",))  # pure


def test_sessions_share_their_beginning_by_group_in_text() -> None:
    options_plan = talks(n=40, turns=2, shared=160)
    source = payloads.make(spec_of(options_plan))
    begins = {source.ask(i).text[:160] for i in range(40)}
    assert len(begins) == 1
    assert len({source.ask(i).text[160:180] for i in range(40)}) == 40


def test_a_session_that_was_cut_is_refused() -> None:
    plan = talks()
    headless = workload.take(plan, np.arange(1, len(plan)))
    with pytest.raises(BadInput, match="follows no request"):
        spec_of(headless)


# ---------------------------------------------------------------- tenants, large specs


def test_tenants_reach_their_requests() -> None:
    given = content.parse_tenants(["chat=70%@300/200", "batch=30%@4000/50"])
    traffic = workload.with_tenants(workload.synthetic(50.0, prompt="1", output="1"), given)
    plan = workload.schedule(traffic, n=400, seed=5)
    spec = spec_of(plan)
    order = payloads.Order(spec)
    lengths = {"chat": 300, "batch": 4000}
    assert all(spec.prompt_chars[i] == lengths[order.tenant(i) or ""] for i in range(400))
    for text in ("chat", "chat=70%", "chat=70%@300", "=70%@300/2"):
        with pytest.raises(BadInput, match="--tenant"):
            content.parse_tenants([text])
    with pytest.raises(BadInput, match="name of its own"):
        content.parse_tenants(["a=50%@1/1", "a=50%@1/1"])


def test_requests_say_the_priority_of_their_tenant() -> None:
    """As vLLM has it: 0 goes first.  Where all tenants have one priority nothing is said, and a server need not know the word."""
    given = content.parse_tenants(["batch:7=50%@40/20", "chat:2=50%@30/20"])
    traffic = workload.with_tenants(workload.synthetic(50.0, prompt="1", output="1"), given)
    spec = spec_of(workload.schedule(traffic, n=50, seed=5))
    source, order = payloads.make(spec), payloads.Order(spec)
    for name, path in (("completions", "/v1/completions"), ("chat", "/v1/chat/completions")):
        endpoint = endpoints.make(endpoints.Spec(name=name, path=path, model="m"))
        said = [msgspec.json.decode(endpoint.body(source.ask(i))).get("priority") for i in range(100)]
        assert said == [{"chat": 0, "batch": 1}[order.tenant(i) or ""] for i in range(100)]
    alike = workload.with_tenants(traffic, [dataclasses.replace(tenant, priority=3) for tenant in given])
    assert payloads.make(spec_of(workload.schedule(alike, n=5, seed=5))).ask(0).priority is None
    for text in ("chat:=70%@3/2", "chat:0=70%@3/2", "chat:first=70%@3/2"):
        with pytest.raises(BadInput, match="priority"):
            content.parse_tenants([text])


def test_a_large_spec_travels_in_a_file_that_is_gone_afterwards() -> None:
    small, large = spec_of(plain(10)), spec_of(plain(5000))
    with payloads.stowed(small) as given:
        assert given is small
    with payloads.stowed(large) as given:
        assert given.bulk is not None
        assert len(msgspec.json.encode(given)) < 1000
        read_back = payloads.loaded(msgspec.json.decode(msgspec.json.encode(given), type=payloads.Spec))
        assert read_back == large == payloads.loaded(given)
        assert payloads.make(given).ask(4321) == payloads.make(large).ask(4321)
    assert not Path(given.bulk).exists()
    with pytest.raises(BadInput, match="cannot be read"):
        payloads.loaded(given)


# ---------------------------------------------------------------- data sets

SHAREGPT = [
    {"id": "a", "conversations": [{"from": "human", "value": "Hello there"}, {"from": "gpt", "value": "I am fine, thanks."}]},
    {"id": "b", "conversations": [{"from": "gpt", "value": "nobody asked"}]},
    {"id": "c", "conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "A poem"}]},
]
OPENAI = {
    "messages": [
        {"role": "system", "content": "S"}, {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
        {"role": "user", "content": [{"type": "text", "text": "three"}]}, {"role": "assistant", "content": "a longer answer!"},
    ],
    "max_tokens": 77,
}  # fmt: skip


def test_sharegpt_gives_the_first_turn_and_the_length_of_its_answer(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(SHAREGPT))
    data = dataset.read(path)
    assert [row.text for row in data.rows] == ["Hello there", "Be kind.\nA poem"]
    assert [m["role"] for m in data.rows[1].messages] == ["system", "user"]
    assert [row.output_tokens for row in data.rows] == [round(18 / 4), None]
    assert data.notes == ("1 rows of sharegpt.json without a prompt are left out",)


def test_openai_messages_go_up_to_the_last_of_the_user_in_lines_batches_and_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = tmp_path / "chat.jsonl"
    lines.write_text(json.dumps(OPENAI) + "\n\n" + json.dumps({"custom_id": "x", "body": OPENAI}) + "\n")
    table = tmp_path / "chat.parquet"
    texts = [{**m, "content": m["content"] if isinstance(m["content"], str) else "three"} for m in OPENAI["messages"]]  # type: ignore[attr-defined]
    pq.write_table(pa.Table.from_pylist([{"messages": texts, "max_tokens": 77}]), table)
    for path in (lines, table):
        for row in dataset.read(path).rows:
            assert [m["role"] for m in row.messages] == ["system", "user", "assistant", "user"]
            assert row.output_tokens == 77
            assert row.text == "S\none\ntwo\nthree"


@pytest.mark.parametrize(
    "text", ['{"prompt": "one"}\r\n{"prompt": "two"}\r\n', '[{"prompt": "one"}, {"prompt": "two"}]', "one\r\ntwo\r\n", "prompt\none\ntwo\n"]
)
def test_a_file_that_begins_with_a_byte_order_mark_is_read_as_the_others(tmp_path: Path, text: str) -> None:
    """As programs of Windows write UTF-8; the mark is no part of the first prompt."""
    file = tmp_path / ("p.csv" if text.startswith("prompt") else "p.data")
    file.write_text(text, encoding="utf-8-sig", newline="")
    assert [row.text for row in dataset.read(file).rows] == ["one", "two"]


def test_plain_lines_csv_and_a_named_field_are_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("first prompt\n\nsecond, prompt\n")
    (tmp_path / "p.csv").write_text('question,mine,output\nq1,"m,1",answer text\nq2,m2,\n')
    (tmp_path / "i.jsonl").write_text('{"instruction": "Sum up", "input": "the text", "output": "ok"}\n')
    assert [row.text for row in dataset.read(tmp_path / "p.txt").rows] == ["first prompt", "second, prompt"]
    assert [row.text for row in dataset.read(tmp_path / "p.csv").rows] == ["q1", "q2"]
    named = dataset.read(tmp_path / "p.csv", "mine")
    assert [row.text for row in named.rows] == ["m,1", "m2"]
    assert named.rows[0].fields["question"] == "q1"
    assert dataset.read(tmp_path / "i.jsonl").rows[0].text == "Sum up\n\nthe text"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("d.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: is not JSON"),
        ("d.jsonl", '{"title": "a"}\n', "no field that is known to hold a prompt; it has title"),
        ("d.json", '[{"prompt": "a"}, 3]', "row 2: is no JSON object"),
        ("d.json", "[1", "is no list of JSON objects"),
        ("d.jsonl", '{"messages": [{"role": "user"}]}\n', "needs role and content"),
        ("d.txt", "\n\n", "holds no prompt"),
    ],
)
def test_a_data_set_that_cannot_be_names_its_line(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=says) as caught:
        dataset.read(tmp_path / name)
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="cannot be read"):
        dataset.read(tmp_path / "nowhere.jsonl")


def test_rows_are_sent_in_order_and_again_or_in_a_seeded_order(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("".join(f"prompt {i}\n" for i in range(5)))
    data = dataset.read(path)
    source = payloads.make(spec_of(plain(8), data=data))
    assert [source.ask(i).text for i in range(8)] == [f"prompt {i % 5}" for i in range(8)]
    mixed = dataset.shuffled(data, seed=1)
    assert mixed != data
    assert mixed == dataset.shuffled(data, seed=1)
    assert sorted(row.text for row in mixed.rows) == [f"prompt {i}" for i in range(5)]
    first_two = dataset.read(path, most=2)
    assert len(first_two.rows) == 2
    assert "more than 2 rows" in first_two.notes[0]
    with pytest.raises(BadInput, match="did you mean prompt"):
        dataset.read(path, "promt")


# ---------------------------------------------------------------- images


def test_made_up_images_are_valid_and_all_different() -> None:
    from PIL import Image

    made = images.MadeUp(67, 45, seed=1)
    pixels = set()
    for number in range(5):
        head, _, data = made.url(number).partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            image.load()
            assert (image.format, image.size) == ("PNG", (67, 45))
            pixels.add(image.convert("RGB").tobytes())
    assert len(pixels) == 5
    assert made.url(3) == images.MadeUp(67, 45, seed=1).url(3)


def test_images_of_a_folder_go_round_beside_the_words(tmp_path: Path) -> None:
    for name, data in (("b.png", b"bbb"), ("a.jpg", b"aaa"), ("notes.txt", b"no image")):
        (tmp_path / name).write_bytes(data)
    urls = images.read(tmp_path)
    assert urls == ["data:image/jpeg;base64,YWFh", "data:image/png;base64,YmJi"]
    source = payloads.make(spec_of(plain(4), images=content.Images(urls=(*urls, "third"), each=2)))
    assert [source.ask(i).images for i in range(3)] == [(urls[0], urls[1]), ("third", urls[0]), (urls[1], "third")]
    assert len(source.ask(0).text) == 100
    for size, says in (("512", "WIDTHxHEIGHT"), ("0x5", "WIDTHxHEIGHT"), ("99999x99999", "at most")):
        with pytest.raises(BadInput, match=says):
            images.parse_size(size)
    with pytest.raises(BadInput, match="no image there"):
        images.read(tmp_path / "notes.txt")


# ---------------------------------------------------------------- thinking


@pytest.mark.parametrize(
    ("text", "mean_s", "sd_s"),
    [("2s", 2.0, 0.0), ("exponential:2s", 2.0, 2.0), ("lognormal:500ms:1.5", 0.5, 0.75), ("uniform:4s:0.5", 4.0, 2.0)],
)
def test_pauses_have_the_mean_and_spread_of_their_law(text: str, mean_s: float, sd_s: float) -> None:
    law = think.parse(text)
    drawn = np.array([law.after(7, index) for index in range(4000)])
    assert abs(drawn.mean() - mean_s) <= 4 * sd_s / 4000**0.5
    assert drawn.std() == pytest.approx(sd_s, rel=0.25)
    assert drawn.min() >= 0
    assert law.after(7, 12) == law.after(7, 12)


def test_a_law_of_pauses_that_cannot_be_is_refused() -> None:
    for text in ("2", "-1s", "exponential:2s:1", "lognormal:2s", "uniform:2s:0.9", "normal:2s:1", "lognormal:2s:x"):
        with pytest.raises(BadInput):
            think.parse(text)
