"""Learning from measured rows: none, one, a sweep, wrong ones, and whole worlds whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mlsys_bench import hardware, latency, models, predict, stats
from mlsys_bench.errors import BadInput
from mlsys_bench.latency import coefficients as names
from mlsys_bench.predict import field, figures, holdout, learning, ratios, tables
from mlsys_bench.predict.experiment import Experiment, Prediction
from mlsys_bench.types import Lengths, Provenance

Array = npt.NDArray[np.float64]
DATA = Path(__file__).parents[2] / "shared" / "data" / "llm"
ITL, TTFT = "itl_mean_s", "ttft_mean_s"
ASKED = Experiment(
    key="asked", group="asked", model="llama-3-8b", device="H100-SXM", prompt_tokens=Lengths(mean=1000), output_tokens=Lengths(mean=200),
    concurrency=16,
)  # fmt: skip
OTHER_MODEL = replace(ASKED, key="other model", model="qwen3-14b")
UNRELATED = replace(ASKED, key="unrelated", model="mixtral-8x7b", device="A100-80GB-SXM", engine="sglang", tp=2)


def said(asked: Sequence[Experiment], knowledge: predict.Knowledge) -> tuple[Prediction, ...]:
    return predict.predict(asked, knowledge)


def slower(e: Experiment, factor: float, than: predict.Knowledge, **changes: object) -> Experiment:
    """Return an experiment in which both figures were measured at so many times what was predicted."""
    e = replace(e, **changes)  # type: ignore[arg-type]
    (found,) = said([e], than)
    measured = {name: factor * found.figures[name][0] for name in (ITL, TTFT)}
    return replace(e, key=f"{e.key} measured", group=e.key, measured=measured)


def width(found: Prediction, name: str = ITL) -> float:
    _, low, high = found.figures[name]
    return math.log(high / low)


@pytest.fixture(scope="module")
def nothing() -> predict.Knowledge:
    return predict.learn([])


@pytest.fixture(scope="module")
def one_point(nothing: predict.Knowledge) -> predict.Knowledge:
    return predict.learn([slower(ASKED, 1.3, nothing)])


# ---------------------------------------------------------------- three states of knowledge


def test_with_no_rows_there_is_the_prior_and_a_wide_interval(nothing: predict.Knowledge) -> None:
    (found,) = said([ASKED], nothing)
    further, first = figures.figures(figures.design([ASKED]), predict.shipped().mean["closed"])
    assert found.figures[ITL][0] == pytest.approx(math.exp(further[0]))
    assert found.figures[TTFT][0] == pytest.approx(math.exp(first[0]))
    assert found.provenance is Provenance.ROOFLINE
    point, low, high = found.figures[ITL]
    assert low < 0.85 * point < point < high
    assert high > 1.18 * point


def test_one_measured_point_moves_its_layout_most_and_what_is_unrelated_least(
    nothing: predict.Knowledge, one_point: predict.Knowledge
) -> None:
    """Measured 30 % slower than predicted."""
    asked = [ASKED, replace(ASKED, key="x4", concurrency=64), OTHER_MODEL, UNRELATED]
    moved = [b.figures[ITL][0] / a.figures[ITL][0] for a, b in zip(said(asked, nothing), said(asked, one_point), strict=True)]
    itself, same_layout, same_gpu, unrelated = moved
    assert itself == pytest.approx(1.3, abs=0.03)
    assert itself > same_layout > same_gpu > unrelated
    assert same_layout > 1.15
    assert 0.99 < unrelated < 1.2  # what all share is itself unsure
    assert [p.provenance for p in said(asked, one_point)] == [Provenance.CALIBRATED] * 2 + [Provenance.ROOFLINE] * 2


def test_intervals_shrink_with_every_point(nothing: predict.Knowledge, one_point: predict.Knowledge) -> None:
    sweep = [slower(ASKED, 1.3, nothing, key=f"at {n}", concurrency=n) for n in (1, 4, 64, 256)]
    several = predict.learn([slower(ASKED, 1.3, nothing), *sweep])
    between = replace(ASKED, key="between", concurrency=32)
    none, one, many = (width(said([between], knowledge)[0]) for knowledge in (nothing, one_point, several))
    assert many < one < none
    assert one < 0.6 * none
    (there,) = said([between], several)
    point, low, high = there.figures[ITL]
    assert low < 1.3 * said([between], nothing)[0].figures[ITL][0] < high
    assert point == pytest.approx(1.3 * said([between], nothing)[0].figures[ITL][0], rel=0.03)


def test_an_open_loop_learns_nothing_from_a_closed_one(nothing: predict.Knowledge, one_point: predict.Knowledge) -> None:
    e = replace(ASKED, concurrency=None, rate_per_s=2.0)
    (before,), (after,) = said([e], nothing), said([e], one_point)
    assert [after.figures[name][0] for name in (ITL, TTFT)] == [before.figures[name][0] for name in (ITL, TTFT)]


# ---------------------------------------------------------------- rows as they come


def sweep_of(knowledge: predict.Knowledge, factor: float = 1.1) -> list[Experiment]:
    return [
        slower(e, factor * (1 + 0.01 * (-1) ** i), knowledge, key=f"{e.model} {n}", concurrency=n)
        for e in (ASKED, OTHER_MODEL)
        for i, n in enumerate((1, 2, 4, 8, 16, 32, 64))
    ]


def test_the_order_of_rows_does_not_matter(nothing: predict.Knowledge) -> None:
    rows = sweep_of(nothing)
    forth, back = (said([ASKED, UNRELATED], predict.learn(order)) for order in (rows, rows[::-1]))
    for a, b in zip(forth, back, strict=True):
        assert a.figures.keys() == b.figures.keys()
        assert all(a.figures[name] == pytest.approx(b.figures[name], rel=1e-6) for name in a.figures)


def test_a_row_that_is_three_times_off_is_distrusted(nothing: predict.Knowledge) -> None:
    rows = sweep_of(nothing)
    wrong = [replace(e, measured={name: 3 * v for name, v in e.measured.items()}) if i == 3 else e for i, e in enumerate(rows)]
    asked = [ASKED, replace(ASKED, key="8", concurrency=8), OTHER_MODEL]
    right, doubted = (said(asked, predict.learn(found)) for found in (rows, wrong))
    for a, b in zip(right, doubted, strict=True):
        assert b.figures[ITL][0] == pytest.approx(a.figures[ITL][0], rel=0.05)


def test_runs_of_one_question_that_contradict_each_other_are_known_as_badly_as_they_differ(nothing: predict.Knowledge) -> None:
    """1.0 and 1.6 times what was predicted: the mean of two such is known to log(1.6) / 2, one sd; of 1.29 and 1.31 to the usual noise."""
    apart, near = (predict.learn([replace(slower(ASKED, x, nothing), key=f"{x}") for x in pair]) for pair in ((1.0, 1.6), (1.29, 1.31)))
    unsure, sure = (said([ASKED], known)[0] for known in (apart, near))
    assert width(sure) < 0.15
    assert 0.4 < width(unsure) < 2 * 1.645 * math.log(1.6) / 2 + 0.1
    assert unsure.figures[ITL][1] < nothing_said(nothing) < unsure.figures[ITL][2]


def nothing_said(nothing: predict.Knowledge) -> float:
    return said([ASKED], nothing)[0].figures[ITL][0]


def test_rows_may_lack_either_figure_and_without_both_are_passed_over(nothing: predict.Knowledge) -> None:
    whole = slower(ASKED, 1.3, nothing)
    further, first, neither = (replace(whole, measured={name: whole.measured[name] for name in kept}) for kept in ((ITL,), (TTFT,), ()))
    assert said([ASKED], predict.learn([further]))[0].figures[ITL][0] == pytest.approx(whole.measured[ITL], rel=0.03)
    assert said([ASKED], predict.learn([first]))[0].figures[TTFT][0] == pytest.approx(whole.measured[TTFT], rel=0.1)
    ignored = predict.learn([replace(neither, measured={"max_rate_per_s": 3.0})])
    assert ignored.rows == ()
    assert said([ASKED], ignored)[0].figures == said([ASKED], nothing)[0].figures


def test_a_negative_time_is_refused_by_its_row() -> None:
    with pytest.raises(BadInput, match="asked: a measured time is not above 0 s"):
        predict.learn([replace(ASKED, measured={ITL: -0.01})])


# ---------------------------------------------------------------- profiles


@pytest.mark.parametrize("e", [ASKED, UNRELATED, replace(ASKED, model="deepseek-r1", device="H200", precision="fp8", tp=8, ep=8)])
def test_a_profile_gives_the_times_that_are_predicted(e: Experiment, nothing: predict.Knowledge, one_point: predict.Knowledge) -> None:
    """The steps of the closed loop, timed by the profile; half of what one point says is learned along the curve, and stretches them."""
    steps = figures._mix(e)
    assert steps is not None
    for knowledge, rel in ((nothing, 1e-6), (one_point, 0.01)):
        profile = latency.check(predict.profile(e, knowledge))
        itl_s = float(steps.further @ latency.step_s(profile, list(steps.features.T)))
        assert itl_s == pytest.approx(said([e], knowledge)[0].figures[ITL][0], rel=rel)


def test_a_profile_narrows_as_its_layout_is_measured(nothing: predict.Knowledge, one_point: predict.Knowledge) -> None:
    before, after = (predict.profile(ASKED, knowledge) for knowledge in (nothing, one_point))
    assert before.provenance is Provenance.ROOFLINE
    assert after.provenance is Provenance.CALIBRATED
    sds = [np.sqrt(np.diag(np.asarray(p.covariance))) for p in (before, after)]
    free = sds[0] > 0  # what stands at its physical floor, here the experts of a dense model, has no spread to narrow
    assert (sds[1] <= sds[0] + 1e-9)[free].all()
    assert sds[1][before.terms.index("weights")] < sds[0][before.terms.index("weights")]


def test_no_profile_is_faster_than_physics_whatever_was_measured(nothing: predict.Knowledge) -> None:
    """All rows at a quarter of the predicted times: coefficients stop at the floor."""
    profile = latency.check(predict.profile(ASKED, predict.learn(sweep_of(nothing, 0.25))))
    for features in ((1, 1000, 0, 0, 1), (64, 64000, 0, 0, 64), (0, 0, 4096, 4096**2 / 2, 1), (8, 9000, 512, 2e5, 9)):
        assert latency.step_s(profile, features) >= latency.floor_s(profile, features)


def test_the_roofline_is_the_profile_of_open_loops_with_nothing_measured(nothing: predict.Knowledge) -> None:
    e = replace(ASKED, concurrency=None, rate_per_s=1.0)
    roofline = latency.roofline(models.find(e.model), hardware.find(e.device), precision="bf16")
    found = predict.profile(e, nothing)
    assert found.coefficients == pytest.approx(roofline.coefficients)
    assert found.constants == pytest.approx(roofline.constants)


# ---------------------------------------------------------------- a world whose truth is known

DEVICES = ("H100-SXM", "A100-80GB-SXM", "L40S")
MODELS = ("llama-3-8b", "qwen3-14b", "llama-2-7b", "mistral-nemo-12b")


def world(seed: int) -> list[Experiment]:
    """Return a sweep of every model on every GPU, with coefficients, curves and noise drawn as the field assumes."""
    rows = [
        replace(ASKED, key=f"{seed} {m} {d} {n}", group=f"{m} {d}", model=m, device=d, concurrency=n)
        for m in MODELS
        for d in DEVICES
        for n in (1, 8, 32)
    ]
    rng, prior = np.random.default_rng(seed), predict.shipped()
    mean, scales = prior.mean["closed"], prior.scales["closed"]
    codes, place = field.codes(rows, {}), field.place(rows)
    x = np.tile(mean, (len(rows), 1))
    for name, code in codes.items():
        drawn = rng.normal(0, scales[name], (code.max() + 1, len(mean))) * names.ASSUMED_SD
        x += drawn[code]
    everyone = np.tile(np.arange(len(rows)), 2)
    p = field.Points(row=everyone, kind=np.repeat([0, 1], len(rows)), slope=np.zeros((len(everyone), 0)), groups=codes, place=place)
    covariance = field.smooth(p, p, scales) + np.diag(field.noise(p, scales))
    y = np.concatenate(figures.figures(figures.design(rows), x)) + np.linalg.cholesky(covariance) @ rng.normal(size=len(everyone))
    itl, ttft = np.exp(y).reshape(2, -1)
    return [replace(e, measured={ITL: float(a), TTFT: float(b)}) for e, a, b in zip(rows, itl, ttft, strict=True)]


def test_nine_of_ten_measurements_of_a_drawn_world_lie_in_their_intervals() -> None:
    """Each time one model on one GPU is left out; worlds are the trials, as rows of one world hang together."""
    inside = []
    for seed in range(16):
        rows = world(seed)
        gone = rows[3 * (seed % 12)].group
        train, test = [e for e in rows if e.group != gone], [e for e in rows if e.group == gone]
        part = learning.learn_part(train, predict.shipped().mean["closed"], predict.shipped().scales["closed"])
        further, first, sd = learning.predicted(test, part)
        z = [(math.log(e.measured[ITL]) - further[i]) / sd[i, 0] for i, e in enumerate(test)]
        z += [(math.log(e.measured[TTFT]) - first[i]) / sd[i, 1] for i, e in enumerate(test)]
        inside.append(float(np.mean(np.abs(z) < 1.645)))
    interval = stats.wilson(sum(inside), len(inside), 0.99)
    assert interval is not None
    assert interval[0] < 0.9 < interval[1]
    assert np.mean(inside) > 0.75


# ---------------------------------------------------------------- measured tables


@pytest.mark.skipif(not DATA.exists(), reason="the measured tables are not beside this checkout")
def test_a_model_nobody_measured_is_predicted_on_a_gpu_that_others_were_measured_on() -> None:
    """VLLM on H100, one model left out at a time, from the assumed coefficients: the scores `proofs/learn.py` prints, with some slack."""
    rows = [e for e in tables.calibration(tables.read(DATA / "blis_measured.csv")) if any(n in e.measured for n in ratios.FURTHER)]
    errors: dict[str, list[float]] = {ITL: [], TTFT: []}
    for train, test in holdout.leave_one_out(rows, lambda e: e.model).values():
        asked = [e for e in test if e.device == "H100-SXM"]
        knowledge = predict.learn(train, prior=predict.assumed())
        for e, found in zip(asked, said(asked, knowledge), strict=True):
            for name, values in errors.items():
                values.append(abs(found.figures[name][0] / e.measured[name] - 1))
    assert len(errors[ITL]) >= 25
    assert np.mean(errors[ITL]) <= 0.06
    assert np.mean(errors[TTFT]) <= 0.09


@pytest.mark.skipif(not DATA.exists(), reason="the measured tables are not beside this checkout")
@pytest.mark.parametrize(("seed", "rows"), [(0, 40), (4, 150), (8, 190)])
def test_rows_of_many_models_do_not_make_others_worse_than_knowing_nothing(seed: int, rows: int, nothing: predict.Knowledge) -> None:
    """The median errors of rows that were not learned from stay within a fifth of what they were, and none is of another magnitude."""
    found = [e for e in tables.calibration(tables.read(DATA / "closed_loop_measured.csv")) if e.measured]
    order = np.random.default_rng(seed).permutation(len(found))
    taught, asked = ([found[i] for i in at] for at in (order[:rows], order[rows : rows + 60]))

    def median_errors(knowledge: predict.Knowledge) -> list[float]:
        pairs = list(zip(asked, said([replace(e, measured={}) for e in asked], knowledge), strict=True))
        figures_of = ("tpot_mean_s", TTFT)
        off = [[abs(math.log(p.figures[name][0] / e.measured[name])) for e, p in pairs if name in e.measured] for name in figures_of]
        return [float(np.median(errors)) for errors in off]

    before, after = median_errors(nothing), median_errors(predict.learn(taught))
    for without, with_rows in zip(before, after, strict=True):
        assert with_rows <= 1.2 * without + 0.02
