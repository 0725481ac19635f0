"""The byte model: its text, its training, and losses computed by the engine."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from mlsys_bench.engine import Engine, build, default_limits, quality, train
from mlsys_bench.engine import corpus as corpora
from mlsys_bench.engine.corpus import Corpus, corpus
from mlsys_bench.engine.quality import Quality, Way, way
from mlsys_bench.engine.runner import Step
from mlsys_bench.engine.train import CONTEXT, ByteModel, Recipe, byte_model, byte_shape
from mlsys_bench.errors import BadInput, UnknownName

SHORT = Recipe(steps=20, batch=2, warmup=4)
TEXT = Corpus(
    train=b"def add(one, other):\n    return one + other\n\n\n" * 100, held_out=b"return one + other\n" * 60, files=2, digest="here"
)
SMALL = dataclasses.replace(byte_shape(), layers=2, hidden=64, heads=2, kv_heads=1, ffn=128)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ByteModel:
    return byte_model(SHORT, shape=SMALL, text=TEXT, folder=tmp_path_factory.mktemp("cache"))


def test_no_file_is_both_learnt_and_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "LEAST_BYTES", 1000)
    for i in range(100):
        (tmp_path / f"m{i:02}.py").write_text(f"<{i:02}>" * 25)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text("x" * 1000)
    found = corpus(tmp_path)
    pieces = [{text[i : i + 4] for i in range(0, len(text), 4)} for text in (found.train, found.held_out)]
    assert not pieces[0] & pieces[1]
    assert len(found.held_out) == pytest.approx(0.05 * 100 * 100, abs=100)
    assert len(found.train) + len(found.held_out) == 100 * 100, "tests are left out"
    assert found.files == 100
    assert corpus(tmp_path) == found
    (tmp_path / "m00.py").write_text("<--->" * 25)
    assert corpus(tmp_path).digest != found.digest


def test_a_python_without_its_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="too few to learn from"):
        corpus(tmp_path)


def test_the_library_of_this_python_is_enough_text() -> None:
    found = corpus()
    assert len(found.train) > 4_000_000
    assert 0.03 < len(found.held_out) / (len(found.train) + len(found.held_out)) <= corpora.HELD_OUT


def test_training_learns_and_a_seed_gives_the_same_bits(model: ByteModel) -> None:
    seen: list[float] = []
    tensors = train.train(SMALL, TEXT.train, SHORT, lambda done, of, loss: seen.append(loss))
    assert len(seen) == SHORT.steps
    assert seen[0] == pytest.approx(math.log2(320), abs=0.5), "it begins knowing nothing"
    assert seen[-1] < 4.5, "a text of so few letters"
    assert all(torch.equal(tensor, model.tensors[name]) for name, tensor in tensors.items())
    other = train.train(SMALL, TEXT.train, dataclasses.replace(SHORT, seed=1, steps=1))
    assert not torch.equal(tensors["lm_head.weight"], other["lm_head.weight"])


def test_the_rate_rises_and_then_falls_to_zero() -> None:
    shares = [train._share_of_rate(step, Recipe(steps=100, warmup=10)) for step in range(100)]
    assert shares[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert max(shares) == pytest.approx(1.0)
    assert shares[-1] == pytest.approx(1 / 90)
    assert all(later < earlier for earlier, later in pairwise(shares[10:]))


def test_it_is_trained_once(model: ByteModel) -> None:
    def refuse(done: int, of: int, loss: float) -> None:
        raise AssertionError("trained again")

    again = byte_model(SHORT, shape=SMALL, text=TEXT, folder=model.folder.parent, progress=refuse)
    assert again.folder == model.folder
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in model.tensors.items())


@pytest.mark.parametrize("changed", [{"steps": 19}, {"rate": 1e-3}, {"seed": 2}])
def test_another_recipe_or_text_is_another_model(changed: dict[str, float]) -> None:
    recipe = dataclasses.replace(SHORT, **changed)  # type: ignore[arg-type]
    elsewhere = dataclasses.replace(TEXT, digest="there")
    kept = [train.cached(SHORT, SMALL, TEXT), train.cached(recipe, SMALL, TEXT), train.cached(SHORT, SMALL, elsewhere)]
    assert len({*kept, train.cached(SHORT, byte_shape(), TEXT)}) == 4


def test_who_interrupts_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(done: int, of: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        byte_model(SHORT, shape=SMALL, text=TEXT, folder=tmp_path, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_says_so_before_training(tmp_path: Path) -> None:
    steps: list[int] = []
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        byte_model(SHORT, shape=SMALL, text=TEXT, folder=tmp_path / "file" / "cache", progress=lambda done, of, loss: steps.append(done))
    assert steps == []


def test_the_engine_computes_what_was_trained(model: ByteModel) -> None:
    """Two independent ways: the textbook's forward that gradients went through, and the engine's over paged KV."""
    seen = quality.windows(TEXT.held_out, 3)
    with torch.no_grad():
        logits = train.logits(model.shape, model.tensors, torch.from_numpy(seen[:, :-1]).long())
    p = torch.log_softmax(logits.double(), -1).gather(2, torch.from_numpy(seen[:, 1:]).long()[:, :, None])
    wanted = -(p[:, :, 0].mean(1) / math.log(2)).numpy()
    for backend in ("auto", "torch"):
        found = Quality(model, count=3, backend=backend, threads=1).losses(way("fp32"))
        assert found == pytest.approx(wanted, abs=1e-5), backend


def test_the_folder_is_a_checkpoint_that_the_engine_opens(model: ByteModel) -> None:
    limits = default_limits(model.shape, max_batch=1, max_context=64)
    engine = Engine(model.shape, precision="fp32", limits=limits, checkpoint=model.folder, threads=1)
    prompt = list(b"return one")
    engine.add(prompt, max_tokens=3, ignore_eos=True)
    tokens = [token for _ in range(3) for _, token in engine.step().tokens]
    with torch.no_grad():
        logits = train.logits(model.shape, model.tensors, torch.tensor([prompt + tokens[:2]]))[0, -3:, :256]
    assert tokens == logits.argmax(-1).tolist()


def test_windows_lie_evenly_and_each_has_the_byte_that_follows() -> None:
    seen = quality.windows(bytes(range(256)) * 4, 3)
    assert seen.shape == (3, CONTEXT + 1)
    assert seen[:, 0].tolist() == [0, (1024 - 257) // 2 % 256, (1024 - 257) % 256]
    assert (np.diff(seen, axis=1) % 256 == 1).all()


def test_a_model_that_knows_nothing_loses_the_logarithm_of_its_vocabulary(model: ByteModel) -> None:
    blank = dataclasses.replace(model, tensors=model.tensors | {"lm_head.weight": torch.zeros(320, model.shape.hidden)})
    assert Quality(blank, count=2, threads=1).losses(way("fp32")) == pytest.approx([math.log2(320)] * 2, rel=1e-6)


def test_a_window_s_loss_does_not_depend_on_those_beside_it(model: ByteModel) -> None:
    seen = quality.windows(TEXT.held_out, 5)
    limits = build.default_limits(model.shape, max_batch=8, max_context=CONTEXT, max_step_tokens=8 * CONTEXT)
    loaded = build.load(model.shape, precision="fp32", device="cpu", limits=limits, seed=0, state_dict=model.tensors, threads=1)

    def forward(step: Step) -> torch.Tensor:
        return loaded.model.forward(step, loaded.cache)

    alone = np.concatenate([quality.losses(forward, seen[i : i + 1]) for i in range(5)])
    assert quality.losses(forward, seen) == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize(
    ("how", "most"),
    [(way("bf16"), 1e-3), (way("int8"), 3e-3), (way("w8a8"), 5e-3), (way("int4g32"), 0.1), (way("w4a8g64"), 0.1),
     (way("fp32", kv="int8"), 3e-3)],
)  # fmt: skip
def test_precisions_cost_little_even_of_a_model_that_hardly_learnt(model: ByteModel, how: Way, most: float) -> None:
    """Allowed is a multiple of what the fully trained model loses; a broken format loses whole bits."""
    measured = Quality(model, count=4, threads=1)
    above = measured.losses(how) - measured.losses(way("fp32"))
    assert abs(above.mean()) < most
    assert above.any(), "it is not fp32 that was measured"


def test_quantizers_give_models_of_their_own(model: ByteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "CALIBRATION", 2)
    measured = Quality(model, count=2, threads=1)
    found = [measured.losses(way("int4g64", quantizer)).tolist() for quantizer in quality.QUANTIZERS]
    assert len({tuple(losses) for losses in found}) == 3
    assert measured.losses(way("int4g64", "gptq")).tolist() == found[2], "calibrated once, the same again"


def test_a_quantizer_needs_4_bit_and_a_name() -> None:
    with pytest.raises(BadInput, match="for 4 bit"):
        way("int8", "gptq")
    with pytest.raises(UnknownName, match="gptq"):
        way("int4g32", "gtpq")
    with pytest.raises(UnknownName, match="int8"):
        way("fp32", kv="int9")
