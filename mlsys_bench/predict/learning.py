"""Coefficients from measured rows, and figures from coefficients: one path for no measured point, one, or a whole sweep."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mlsys_bench import hardware, latency, models, workers
from mlsys_bench.errors import BadInput
from mlsys_bench.latency import coefficients as names
from mlsys_bench.latency import physics, ways
from mlsys_bench.latency.coefficients import CLOSED, OPEN
from mlsys_bench.predict import field, ratios, saturation
from mlsys_bench.predict.experiment import Experiment, Prediction
from mlsys_bench.predict.figures import Design, constants, design, figures, precision_of, settled, slopes
from mlsys_bench.types import LatencyProfile, Layout, Provenance

Array = npt.NDArray[np.float64]
Found = TypeVar("Found")
_MISFIT_SD = (0.12, 0.3, 0.8)  # of a row in the fit of the coefficients of all: time per token, TTFT, TTFT of a closed loop
_FIT_ROWS = 300  # rows that the coefficients of all are fitted to, taken evenly over models, GPUs and engines
_FULL_WEIGHT = 12  # rows of one model, GPU and engine that count in full there; more count together as so many
_RESIDUAL = 0.05  # least sd of log(time) that neither coefficients explain nor a layout's own mean
_NONE = np.zeros(0, dtype=np.int64)
_RELINEARISED = 3
_FITTED = {"all": 1e-3, "client": 1e-3}  # scales of what the coefficients of all hold, where these were fitted: nothing is left to deviate
_KEPT = (*_FITTED, "ttft", "noise tpot", "noise ttft")  # not learned from many rows: TTFT is not asked, and noise is what repeats say
_STEPS = 60  # of the search for scales at most: from two starts all end within 11 % of each other
_LEARNED_ALL = 0.2  # scale of what the coefficients of all may still be off at most, where rows have said them
_LEFT_OUT = ("layout", "served", "device", "model")  # groups left out in turn, to see how far the field reaches
_BENT_DRAWS = 256  # of coefficients, by which a time that bends is known
_MANY = 200  # rows from which on the coefficients of all are fitted first, and figures taken as linear around them


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """What is known before rows are seen, by load (`OPEN`, `CLOSED`): log-coefficients, and the scales of `field`."""

    mean: dict[str, Array]
    scales: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What rows of one kind of load taught."""

    mean: Array
    linear: bool  # many rows: figures are linear around `mean`, which was fitted to them; few: around the coefficients of each row
    scales: dict[str, float]
    known: dict[str, dict[Hashable, int]]
    given: field.Posterior
    further: field.Posterior  # what says the time per token: of many rows that of itself alone, for TTFT rests on coarser physics
    heavier: Array  # variance of a new row's noise, of time per token and TTFT, over that of trusted rows
    reach: tuple[field.Reach, ...]  # of time per token and TTFT, where rows are many


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """What was learned.  Open and closed loops are kept apart: their clients differ in more than a coefficient can say."""

    parts: dict[str, Part]
    rows: tuple[Experiment, ...]
    ratios: ratios.Ratios
    rates: saturation.Rates = dataclasses.field(default_factory=saturation.Rates)


def shipped() -> Prior:
    """Return the coefficients learned from published measurements, `data/coefficients.json`.

    What all share is known from all those rows: at most `_LEARNED_ALL` of its assumed spread is left open, not the stored scale, which
    says how far it was from what was assumed.  With that, 190 rows bent every coefficient for the sake of a few: TTFT came out at seven
    times what was measured.
    """
    found = names.stored()
    scales = {load: found[load]["scales"] | {"all": min(found[load]["scales"]["all"], _LEARNED_ALL)} for load in found}
    return Prior(mean={load: names.learned_log(load) for load in found}, scales=scales)


def assumed() -> Prior:
    """Return the coefficients that were assumed before anything was measured, with the spreads of the learned ones."""
    found = names.stored()
    return Prior(mean=dict.fromkeys((OPEN, CLOSED), names.ASSUMED_LOG), scales={load: dict(found[load]["scales"]) for load in found})


def load_of(e: Experiment) -> str:
    """Return the kind of load."""
    return OPEN if e.concurrency is None else CLOSED


def learn(
    experiments: Sequence[Experiment],
    *,
    prior: Prior | None = None,
    executor: Executor | workers.Local | None = None,
    told: workers.Told | None = None,
) -> Knowledge:
    """Return what measured experiments teach beyond the prior, by default the shipped one.

    Those without a time per token, a TTFT or, where they have no load of their own, a highest rate are passed over.  Highest rates are
    simulated, by the executor where one is given.
    """
    prior = prior or shipped()
    rows = tuple(e for e in experiments if any(e.measured.get(name) for name in (*ratios.FURTHER, *ratios.FIRST)))
    parts = {load: learn_part([e for e in rows if load_of(e) == load], prior.mean[load], prior.scales[load]) for load in (OPEN, CLOSED)}
    knowledge = Knowledge(parts=parts, rows=rows, ratios=ratios.learn(rows))
    saturated = [e for e in experiments if saturation.asks_for_rate(e)]
    taught = [rates for _, rates in sorted(_in_pieces(_taught, saturated, knowledge, executor, told), key=lambda found: found[0])]
    rates = saturation.Rates(keys=tuple(k for rates in taught for k in rates.keys), away=tuple(a for rates in taught for a in rates.away))
    return dataclasses.replace(knowledge, rates=rates)


def learn_part(rows: Sequence[Experiment], mean: Array, scales: dict[str, float], fit: Sequence[Experiment] | None = None) -> Part:
    """Return what rows of one kind of load teach beyond coefficients, which are fitted to `fit`, by default to the rows."""
    d, target = design(rows), _targets(rows)
    known: dict[str, dict[Hashable, int]] = {}
    groups, places = field.codes(rows, known), field.place(rows)
    repeats = _repeats(rows)
    linear = len(rows) >= _MANY
    if linear:
        mean, scales = fitted(rows if fit is None else fit, mean), scales | _FITTED
    at = np.tile(mean, (len(rows), 1))
    for _ in range(1 if linear else _RELINEARISED):
        points, misfit = _observed(d, at, mean, target, groups, places)
        clean = field.kernel(points, points, scales)
        trust = field.trusted(points, misfit, scales, repeats[points.row], clean)
        if not linear:  # of many rows, others say how noisy they are
            trust = trust * field.agreeing(points, misfit, scales, repeats[points.row])
        given = field.posterior(points, misfit, scales, trust, clean)
        at = at if linear else mean + field.deviations(given, points, len(rows))
    if not linear:
        points, misfit = _observed(d, at, mean, target, groups, places)
        given = field.posterior(points, misfit, scales, trust)
    further = _alone(given, repeats, clean) if linear else given
    heavier = np.array([field.heavier(which, repeats[which.points.row])[kind] for kind, which in enumerate((further, given))])
    reach = tuple(_reach(which, kind, float(heavier[kind]), repeats) for kind, which in enumerate((further, given)) if linear)
    return Part(mean=mean, linear=linear, scales=scales, known=known, given=given, further=further, heavier=heavier, reach=reach)


def _alone(given: field.Posterior, repeats: field.Ints, clean: Array) -> field.Posterior:
    """Return what times per token alone say: TTFT, which the physics explains worse, does not bend them.

    A cut between a module one trusts and one that may be wrong: Plummer 2015, Cuts in Bayesian graphical models, Stat. Comput. 25.
    """
    points, at = given.points, np.flatnonzero(given.points.kind == 0)
    own = dataclasses.replace(points, row=points.row[at], kind=points.kind[at], slope=points.slope[at])
    misfit, clean = given.misfit[at], clean[np.ix_(at, at)]
    trust = field.trusted(own, misfit, given.scales, repeats[own.row], clean)
    return field.posterior(own, misfit, given.scales, trust, clean)


def _reach(given: field.Posterior, kind: int, heavier: float, repeats: field.Ints) -> field.Reach:
    """Return how far a figure's field is to be believed, by leaving out each layout, …, GPU and model of the rows at hand."""
    row = given.points.row
    return field.reach(given, kind, heavier, repeats[row], [given.points.groups[name][row] for name in _LEFT_OUT])


def predict(
    experiments: Sequence[Experiment],
    knowledge: Knowledge,
    *,
    executor: Executor | workers.Local | None = None,
    told: workers.Told | None = None,
) -> tuple[Prediction, ...]:
    """Return the figures of experiments, in their order, each with its 90 % interval; highest rates by the executor, if there is one."""
    found = {p.key: p for p in as_found(experiments, knowledge, executor=executor, told=told)}
    return tuple(found[e.key] for e in experiments)


def as_found(
    experiments: Sequence[Experiment],
    knowledge: Knowledge,
    *,
    executor: Executor | workers.Local | None = None,
    told: workers.Told | None = None,
) -> Iterator[Prediction]:
    """Yield the same as they are found: those of a load first, then highest rates, each after a simulation of its own."""
    for load, part in knowledge.parts.items():
        asked = [e for e in experiments if load_of(e) == load and not saturation.asks_for_rate(e)]
        if not asked:
            continue
        for e, further, first, (sd_further, sd_first), median in zip(asked, *predicted(asked, part), settled(asked), strict=True):
            times = (float(further), float(sd_further)), (float(first), float(sd_first))
            yield ratios.complete(e, knowledge.ratios, *times, _provenance(e, part), float(median))
    saturated = [e for e in experiments if saturation.asks_for_rate(e)]
    for _, rate in _in_pieces(_rates, saturated, knowledge, executor, told):
        yield rate


def predicted(experiments: Sequence[Experiment], part: Part) -> tuple[Array, Array, Array]:
    """Return log(time per token), log(TTFT), and the sd [n, 2] of what would be measured, of experiments of the part's load."""
    if part.linear:
        return _linear(experiments, part)
    d, n = design(experiments), len(experiments)
    at, groups, places = _coefficients(experiments, part)
    further, first = figures(d, at)
    by_further, by_first = slopes(d, at)
    points = field.Points(
        row=np.tile(np.arange(n), 2), kind=np.repeat([0, 1], n), slope=np.concatenate([by_further, by_first]), groups=groups, place=places
    )
    extra, variance = field.kriged(part.given, points, whole=False)
    sd = np.sqrt(variance + field.noise(points, part.scales) * part.heavier[points.kind])
    return further + extra[:n], first + extra[n:], sd.reshape(2, n).T


def _linear(experiments: Sequence[Experiment], part: Part) -> tuple[Array, Array, Array]:
    """Return the same of a part of many rows: each figure from its own posterior, believed as far as the rows showed it reaches."""
    d, n = design(experiments), len(experiments)
    _, groups, places = _coefficients(experiments, part)
    at = np.tile(part.mean, (n, 1))
    centre, by = figures(d, at), slopes(d, at)
    found, sd = [], []
    for kind, (given, reach) in enumerate(zip((part.further, part.given), part.reach, strict=True)):
        points = field.Points(row=np.arange(n), kind=np.full(n, kind, dtype=np.int64), slope=by[kind], groups=groups, place=places)
        extra, variance = field.kriged(given, points, whole=True)
        shift, wide = reach.of(extra, np.sqrt(variance + field.noise(points, given.scales) * part.heavier[kind]))
        found.append(centre[kind] + shift)
        sd.append(wide)
    if (apart := np.flatnonzero(d.disaggregated > 0)).size:
        there = {name: codes[apart] for name, codes in groups.items()}, places[apart]
        sd[1][apart] = _bent([experiments[int(i)] for i in apart], part, by[1][apart], sd[1][apart], *there)
    return found[0], found[1], np.stack(sd, axis=1)


def _bent(
    experiments: Sequence[Experiment], part: Part, slope: Array, claimed: Array, groups: dict[str, field.Ints], places: Array
) -> Array:
    """Return the sd [n] that intervals of log(TTFT) need where prompts have a pool of their own: at least what slopes claim.

    Whether they queue there depends on which pool is the slower one: where that is close, a coefficient a little off makes a wait of
    nothing or of seconds, and no slope at one point tells.  So coefficients are drawn from what is known of them, no farther than what is
    claimed of this very figure lets them go.
    """
    d, n = design(experiments), len(experiments)
    kinds: dict[tuple[int, ...], Array] = {}
    across = []
    for i in range(n):
        one = {name: codes[i : i + 1] for name, codes in groups.items()}
        kind = tuple(int(codes[0]) for codes in one.values())
        if kind not in kinds:
            nobody = _nobody(one, places[i : i + 1])
            variance, axes = np.linalg.eigh(field.spread(part.given, nobody))
            kinds[kind] = axes * np.sqrt(np.maximum(variance, 0.0))
        along = float(np.linalg.norm(slope[i] @ kinds[kind]))
        across.append(kinds[kind] * min(1.0, float(claimed[i]) / max(along, 1e-9)))
    normal = np.random.default_rng(0).standard_normal((_BENT_DRAWS // 2, len(part.mean)))
    centre, half = figures(d, part.mean)[1], np.stack(across)
    off = np.abs([figures(d, part.mean + half @ z)[1] - centre for z in (*normal, *-normal)])
    return np.asarray(np.maximum(claimed, np.quantile(off, 0.9, axis=0) / field.Z90))


def _nobody(groups: dict[str, field.Ints], places: Array) -> field.Points:
    """Return where experiments stand, with nothing observed of them."""
    return field.Points(row=_NONE, kind=_NONE, slope=np.zeros((0, 0)), groups=groups, place=places)


def _coefficients(experiments: Sequence[Experiment], part: Part) -> tuple[Array, dict[str, field.Ints], Array]:
    """Return the expected log-coefficients [n, p] of experiments, their groups and places."""
    known = {name: dict(seen) for name, seen in part.known.items()}
    groups, places = field.codes(experiments, known), field.place(experiments)
    nobody = _nobody(groups, places)
    return part.mean + field.deviations(part.given, nobody, len(experiments)), groups, places


def profile(e: Experiment, knowledge: Knowledge) -> LatencyProfile:
    """Return the step profile of an experiment's layout: coefficients with their covariance, no load assumed.

    What rows of the layout showed beyond coefficients stretches every step alike, by its mean; what rows differ by is the residual.
    """
    part = knowledge.parts[load_of(e)]
    (x,), groups, places = _coefficients([e], part)
    beyond = _beyond(e, knowledge, part)
    covariance = field.spread(part.given, _nobody(groups, places))
    k = constants(e)
    found, jacobian = physics.terms_of(x, k)
    terms = names.floored({name: value * math.exp(float(beyond.mean())) for name, value in found.items()}, latency.MULTIPLIERS)
    return LatencyProfile(
        form="step",
        layout=Layout(
            model=models.find(e.model).id, precision=precision_of(e), device=hardware.find(e.device).id, tp=e.tp, pp=e.pp, ep=e.ep
        ),
        stage=None,
        terms=tuple(terms),
        coefficients=tuple(map(float, terms.values())),
        covariance=tuple(tuple(row) for row in (jacobian @ covariance @ jacobian.T).tolist()),
        constants=k | _outside(e, x, np.sqrt(np.diag(covariance))),
        residual_log_sd=max(_RESIDUAL, float(beyond.std())),
        valid={},
        provenance=_provenance(e, part),
        note=f"{len(knowledge.rows)} measured rows; coefficients of `latency.coefficients`",
    )


def _beyond(e: Experiment, knowledge: Knowledge, part: Part) -> Array:
    """Return the smooth deviation of times per token where rows of this layout were learned from; where none was, at this experiment."""
    layout = field.GROUPS["layout"]
    there = [known for known in knowledge.rows if load_of(known) == load_of(e) and layout(known) == layout(e)] or [e]
    groups, places = field.codes(there, {name: dict(seen) for name, seen in part.known.items()}), field.place(there)
    n = len(there)
    slope = np.zeros((n, len(names.NAMES)))
    points = field.Points(row=np.arange(n), kind=np.zeros(n, dtype=np.int64), slope=slope, groups=groups, place=places)
    return field.kriged(part.given, points, whole=False)[0]


def _outside(e: Experiment, x: Array, log_sd: Array) -> dict[str, float]:
    """Return what a profile says of the time outside the engine.  Who waits how long in an open loop, closed ones do not show."""
    wait = names.NAMES.index("wait_steps")
    logs, sds = x.copy(), log_sd.copy()
    if load_of(e) == CLOSED:
        logs[wait], sds[wait] = names.learned_log(OPEN)[wait], names.spread_log(OPEN)[wait]
    return ways.constants(logs, sds)


# ---------------------------------------------------------------- highest rates, each a piece of work of its own


def _in_pieces(
    function: Callable[[Knowledge, Sequence[Experiment]], Sequence[Found]],
    rows: Sequence[Experiment],
    knowledge: Knowledge,
    executor: Executor | workers.Local | None,
    told: workers.Told | None,
) -> Iterator[tuple[int, Found]]:
    """Yield what a function makes of each row, with the row's place.  Rows that share simulations, all but equal, are one piece."""
    alike: dict[str, list[int]] = {}
    for i, e in enumerate(rows):
        alike.setdefault(str(dataclasses.replace(e, key="", group="", measured={}, requests=None, replicas=1)), []).append(i)
    places = list(alike.values())
    pieces = [[rows[i] for i in at] for at in places]
    for piece, some in workers.as_done(function, pieces, shared=knowledge, executor=executor, told=told):
        yield from zip(places[piece], some, strict=True)


def _taught(knowledge: Knowledge, rows: Sequence[Experiment]) -> list[saturation.Rates]:
    return [saturation.learn([e], _full(knowledge)) for e in rows]


def _rates(knowledge: Knowledge, rows: Sequence[Experiment]) -> tuple[Prediction, ...]:
    return saturation.predict(rows, _full(knowledge), knowledge.rates)


# ---------------------------------------------------------------- parts


def _full(knowledge: Knowledge) -> saturation.Profiles:
    """Return what gives the profile of an experiment at its highest rate: that of closed loops, in which batches are as full."""
    found: dict[str, LatencyProfile] = {}

    def full(e: Experiment) -> LatencyProfile:
        asked = dataclasses.replace(e, key="", group="", measured={}, slo=(), requests=None, replicas=1, concurrency=saturation.FEWER_SLOTS)
        question = str(asked)
        if question not in found:
            found[question] = profile(asked, knowledge)
        return found[question]

    return full


def _targets(rows: Sequence[Experiment]) -> Array:
    """Return [rows, 2] the logarithms of what was measured, nan where it was not."""
    found = ratios.warm_times(rows)
    for e, (a, b) in zip(rows, found, strict=True):
        if (a is not None and not a > 0) or (b is not None and not b > 0):
            raise BadInput(f"{e.key}: a measured time is not above 0 s")
    return np.asarray(np.log(np.array([[a or np.nan, b or np.nan] for a, b in found], dtype=float).reshape(-1, 2)))


def fitted(rows: Sequence[Experiment], start: Array, tightness: float = 1.0) -> Array:
    """Return the log-coefficients of all that explain the rows best, held by `start` within the assumed spreads times `tightness`."""
    from scipy.optimize import least_squares

    taken, weight = _spread(rows)
    d, target = design(taken), _targets(taken)
    misfit_sd = np.stack([np.full(len(d), _MISFIT_SD[0]), np.where(d.is_open, _MISFIT_SD[1], _MISFIT_SD[2])], axis=1)
    share = np.where(np.isnan(target), 0.0, weight[:, None] / misfit_sd)
    wanted, sd = np.nan_to_num(target), names.ASSUMED_SD * tightness

    def misfit(x: Array) -> Array:
        return np.concatenate([((wanted - np.stack(figures(d, x), axis=1)) * share).T.ravel(), (x - start) / sd])

    def slope(x: Array) -> Array:
        by = slopes(d, x)
        return np.concatenate([*(-share[:, i][:, None] * by[i] for i in (0, 1)), np.diag(1 / sd)])

    solved = least_squares(misfit, start, jac=slope, loss="soft_l1", xtol=1e-4, ftol=1e-5, max_nfev=30)
    return np.asarray(solved.x, dtype=float)


def _spread(rows: Sequence[Experiment]) -> tuple[list[Experiment], Array]:
    """Return at most about `_FIT_ROWS` rows, evenly over what was served, and the weight of each."""
    by: dict[Hashable, list[Experiment]] = {}
    for e in rows:
        by.setdefault((e.model, e.device, e.engine, e.concurrency is None), []).append(e)
    each = max(4, _FIT_ROWS // len(by)) if len(rows) > _FIT_ROWS else len(rows)
    taken = [(group[:: max(1, -(-len(group) // each))], len(group)) for group in by.values()]
    weight = [min(1.0, (_FULL_WEIGHT / len(group)) ** 0.5) for group, _ in taken for _ in group]
    return [e for group, _ in taken for e in group], np.array(weight)


def _observed(d: Design, at: Array, mean: Array, target: Array, groups: dict[str, field.Ints], places: Array) -> tuple[field.Points, Array]:
    """Return the observations linearised at each row's own coefficients, with the misfit that deviations from the mean have to explain."""
    if not len(d):
        return field.Points(row=_NONE, kind=_NONE, slope=np.zeros((0, len(mean))), groups=groups, place=places), np.zeros(0)
    found, by = figures(d, at), slopes(d, at)
    row = [np.flatnonzero(~np.isnan(target[:, i])) for i in (0, 1)]
    kind = np.concatenate([np.full(len(row[i]), i, dtype=np.int64) for i in (0, 1)])
    slope = np.concatenate([by[i][row[i]] for i in (0, 1)])
    away = [np.einsum("ij,ij->i", by[i][row[i]], (at - mean)[row[i]]) for i in (0, 1)]
    misfit = np.concatenate([target[row[i], i] - found[i][row[i]] + away[i] for i in (0, 1)])
    return field.Points(row=np.concatenate(row), kind=kind, slope=slope, groups=groups, place=places), misfit


def _repeats(rows: Sequence[Experiment]) -> field.Ints:
    """Return a number for each row, the same for repeats of one question."""
    seen: dict[str, int] = {}
    asked = [str(dataclasses.replace(e, key="", group="", measured={})) for e in rows]
    return np.array([seen.setdefault(a, len(seen)) for a in asked], dtype=np.int64)


def _provenance(e: Experiment, part: Part) -> Provenance:
    """Return calibrated where rows of this model on this device were learned from, else roofline."""
    key = field.GROUPS["model device"]
    return Provenance.CALIBRATED if key(e) in part.known.get("model device", {}) else Provenance.ROOFLINE


def scaled(rows: Sequence[Experiment], mean: Array, scales: dict[str, float], rounds: int = 2) -> dict[str, float]:
    """Return the scales that make the rows most likely, each held within about a factor of e of `field.SCALES`.

    Many rows say so by their times per token; what only TTFT could say, and what the coefficients of all hold there, is kept as given.
    """
    from scipy.optimize import minimize

    start = np.log(list(field.SCALES.values()))
    for _ in range(rounds):
        part = learn_part(rows, mean, scales)
        points, misfit, trust = part.further.points, part.further.misfit, part.further.trust
        held = np.array([part.linear and name in _KEPT for name in field.SCALES])
        fixed = np.log([part.scales[name] for name in field.SCALES])

        def cost(
            logs: Array,
            points: field.Points = points,
            misfit: Array = misfit,
            trust: Array = trust,
            held: Array = held,
            fixed: Array = fixed,
        ) -> tuple[float, Array]:
            value, gradient = field.likelihood(np.where(held, fixed, logs), points, misfit, trust)
            away = np.where(held, 0.0, logs - start)
            return value + 0.5 * float(np.sum(away**2)), np.where(held, 0.0, gradient) + away

        begin = np.log([scales[name] for name in field.SCALES])
        found = np.exp(minimize(cost, begin, jac=True, method="L-BFGS-B", options={"maxiter": _STEPS}).x)
        scales = {name: scales[name] if keep else float(value) for name, keep, value in zip(field.SCALES, held, found, strict=True)}
    return scales
