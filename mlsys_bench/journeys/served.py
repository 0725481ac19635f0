"""A profile from the served engine itself: calibrate under load, fit, and replay a load test in the simulator.

A bench process times steps of an engine that has the machine for itself.  A served engine shares it with the process that speaks HTTP and
with whoever sends requests, loops around its steps, and was started at another moment: together that is 5 to 20 % on a small machine.  So
the engine logs its own steps (`serve.steplog`) while calibration traffic runs, and the profile is fitted to those.

    window = calibrate(url, log, traffic, …)     one user, a flood for the full batch, a ramp from nothing to saturation
    profile = fit(health, windows, ceilings)     cells of steps -> `latency.fit`; then held to the total time of all steps
    around(profile, windows[1:3])                the same as fast as the machine was between two of them
    replayed(requests, profile, limits)          the same arrivals and lengths, simulated

Others may have the core of an engine of one thread meanwhile; the log's CPU times tell.  The shape of the profile is then that of the steps
alone, what others took of every calibration counts as the machine's way, and what they took of one alone as an accident of it.

Nothing of a load test enters the profile it is compared with.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsys_bench import latency, loadtest, simulate, workload
from mlsys_bench.batching import Limits, StepFeatures
from mlsys_bench.errors import MeasurementFailed
from mlsys_bench.serve import steplog
from mlsys_bench.types import Bench, LatencyProfile, Launch, Measurement, RequestRecord, Requests, Round, Scalar, Workload
from mlsys_bench.workload import Schedule

Floats = npt.NDArray[np.float64]
ALONE_S, FLOOD_S, RAMP_S = 6.0, 5.0, 20.0  # of one calibration
SHORT_S = 12.0  # of one that only tells how fast the machine is now
_BEYOND = 4  # users more than seats, so that some always wait
_PEAK = 1.05  # of the flood's rate, at the end of the ramp
_FEWEST, _FEWEST_ALONE = 4, 2  # steps that make a cell; the second where nobody decodes, which is rare in a busy server
_DECODE_PARTS, _PREFILL_PARTS = 4, 6  # cells by context, by prompt tokens
_SEATS = (0, 1, 3, 6, 12, 24, 48, 96, 192)  # decodes beside a prefill: groups from each of these on
_STALL = 10.0  # times the median of its kind: a step that the machine, not the engine, held up
_OWNED = 0.95  # share of its time that a step which has its core to itself computes
_LOOP = 3.0  # times its median: the time between two steps, beyond which others had the core
_DRIFT = 0.03  # sd of a calibration's speed beside the next, counted as one difference more: two that agree by chance prove no steadiness


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One calibration: its steps with their whole periods, and what HTTP adds.

    `request_s`: from the scheduled send until the idle engine has the request.  `token_s`: from the end of a step until its tokens are
    with the client.
    """

    begun_unix_s: float
    features: Floats  # [steps, 5]
    period_s: Floats
    own_s: Floats  # the periods without the time in which others had the core of the engine's one thread
    request_s: float
    token_s: float
    flood_per_s: float


def calibrate(url: str, log: Path, traffic: Workload, *, users: int, seed: int, flood_s: float = FLOOD_S, ramp_s: float = RAMP_S) -> Window:
    """Load a server that logs its steps, and return what it logged: one user, more than have seats, a ramp of open-loop traffic."""
    _, alone = loadtest.run(_options(url, traffic, seed, users=1, duration_s=ALONE_S))
    flood, flooded = loadtest.run(_options(url, traffic, seed + 1, users=users + _BEYOND, duration_s=flood_s))
    return logged(log, (alone, flooded, _ramped(url, traffic, flood.request_rate_per_s, seed, ramp_s)), flood.request_rate_per_s)


def recalibrate(url: str, log: Path, traffic: Workload, *, flood_per_s: float, seed: int, ramp_s: float = SHORT_S) -> Window:
    """Return what a short ramp logs to the rate of an earlier flood: every batch size, to tell how fast the machine is now."""
    return logged(log, [_ramped(url, traffic, flood_per_s, seed, ramp_s)], flood_per_s)


def _ramped(url: str, traffic: Workload, flood_per_s: float, seed: int, ramp_s: float) -> Requests:
    return loadtest.run(_options(url, traffic, seed + 2, trace=ramp(traffic, _PEAK * flood_per_s, ramp_s, seed)))[1]


def logged(log: Path, runs: Sequence[Requests], rate_per_s: float) -> Window:
    """Return what a server logged of load tests; what HTTP adds is that of the last one."""
    steps = steplog.read(log)
    each = [_within(steps, run) for run in runs]
    request_s, token_s = overheads(each[-1], runs[-1])
    return Window(
        begun_unix_s=runs[0].t0_unix_s,
        features=np.concatenate([s.features for s in each]),
        period_s=np.concatenate([_periods(s) for s in each]),
        own_s=np.concatenate([_own(s) for s in each]),
        request_s=request_s,
        token_s=token_s,
        flood_per_s=rate_per_s,
    )


def _options(
    url: str, traffic: Workload, seed: int, *, users: int | None = None, trace: Schedule | None = None, duration_s: float = 60.0
) -> loadtest.Options:
    return loadtest.Options(
        url=url,
        users=users,
        trace=trace,
        prompt_tokens=traffic.prompt_tokens,
        output_tokens=traffic.output_tokens,
        duration_s=duration_s,
        warmup_s=min(1.0, duration_s / 4),
        seed=seed,
    )


def ramp(traffic: Workload, peak_per_s: float, duration_s: float, seed: int) -> Schedule:
    """Return Poisson arrivals whose rate grows from 0 to a peak, with the lengths of the traffic."""
    n = max(8, round(peak_per_s * duration_s / 2))
    drawn = workload.schedule(dataclasses.replace(traffic, rate_per_s=1.0, arrivals="poisson"), n=n, seed=seed)
    # a Poisson process in operational time: the expected number so far, peak t^2 / (2 duration)
    times_s = np.sqrt(2 * duration_s * drawn.scheduled_s / peak_per_s)
    return dataclasses.replace(drawn, scheduled_s=times_s)


def _within(steps: steplog.Steps, run: Requests) -> steplog.Steps:
    """Return the steps of one load test; those of its probe came before."""
    ends_s = [r.done_s for r in run.requests if r.done_s is not None]
    if not ends_s:
        raise MeasurementFailed("calibration: no request was answered; is the server up, and its log the one it writes now?")
    found = steps.between(run.t0_unix_s, run.t0_unix_s + max(ends_s) + 0.05)
    if len(found.step_s) < _FEWEST:
        raise MeasurementFailed(
            f"calibration: the log has {len(found.step_s)} steps of it; start the server with --step-log on this machine"
        )
    return found


def _periods(steps: steplog.Steps) -> Floats:
    """Return periods: from the begin of a step to that of the next, where that followed at once; else its own time."""
    follows = np.append(steps.was_busy[1:] > 0, False)
    return np.where(follows, np.append(np.diff(steps.begun_unix_s), 0.0), steps.step_s)


def _own(steps: steplog.Steps) -> Floats:
    """Return the periods without what others took of them: a step that did not have its core to itself counts by its CPU time."""
    after_s = _periods(steps) - steps.step_s  # the loop around a step
    own_s = np.where(steps.cpu_s >= _OWNED * steps.step_s, steps.step_s, np.minimum(steps.cpu_s, steps.step_s))
    return own_s + np.minimum(after_s, _LOOP * np.median(after_s[after_s > 0])) if (after_s > 0).any() else own_s


def overheads(steps: steplog.Steps, run: Requests) -> tuple[float, float]:
    """Return what HTTP adds on the way to an idle engine, and on the way back of a token, in seconds.

    The engine takes requests in the order they were sent, so the k-th of one is the k-th of the other.  The way back is the mean time of
    all tokens at the client less that of all tokens at the engine: who is who does not matter.
    """
    sent = sorted(r.scheduled_s + run.t0_unix_s for r in run.requests if r.sent_s is not None)
    taken = np.repeat(steps.begun_unix_s, steps.added.astype(np.int64))
    idle = np.repeat(steps.was_busy == 0, steps.added.astype(np.int64))
    came = np.array([t + run.t0_unix_s for r in run.requests for t in r.token_s])
    made = np.repeat(steps.ended_unix_s, steps.features[:, 4].astype(np.int64))
    if len(sent) != len(taken) or len(came) != len(made) or not idle.any():
        raise MeasurementFailed(
            f"calibration: {len(sent)} requests and {len(came)} tokens at the client, {len(taken)} and {len(made)} in the engine's log; "
            "is anybody else using this server?"
        )
    return float(np.median((taken - np.array(sent))[idle])), float((came - came[0]).mean() - (made - came[0]).mean())


# ---------------------------------------------------------------- from steps to a profile


def fit(health: Mapping[str, Any], windows: Sequence[Window], ceilings: Bench | None = None) -> LatencyProfile:
    """Return the profile of the served layout.  `ceilings`: `memory.read` and `gemm` of this machine, for the physics floor.

    The cells' medians give its shape; then all times are stretched so that the steps of all windows take, in total, as long as they did:
    a queue feels the mean, hiccups included.  How the windows differ in that is drift of the machine, and joins the covariance.
    """
    measured = tuple(m for m in ceilings.measurements if m.name in ("memory.read", "gemm")) if ceilings else ()
    profile = latency.fit(Bench(measurements=(*measured, *cells(health, windows))))
    logs = np.log([stretch(profile, window) * taken(profile, window) for window in windows])
    drift = float(logs.std(ddof=1)) if len(logs) > 1 else 0.0
    covariance = np.asarray(profile.covariance) + _drift_variance(drift, len(windows))
    note = f"{profile.note}; served: {len(windows)} calibration(s), drift {100 * drift:.1f} % between them{_shared(profile, windows)}"
    return around(dataclasses.replace(profile, covariance=tuple(map(tuple, covariance.tolist())), note=note), windows)


def around(profile: LatencyProfile, windows: Sequence[Window]) -> LatencyProfile:
    """Return the profile as fast as the machine was in these calibrations, and with what HTTP added then.

    A machine whose speed drifts is best told for a moment by the calibrations before and after it.
    """
    beside = min(taken(profile, window) for window in windows)
    logs = [np.log(stretch(profile, window)) for window in windows]
    there_s, back_s = (float(np.mean([getattr(w, name) for w in windows])) for name in ("request_s", "token_s"))
    constants = {**profile.constants, "request_overhead_s": there_s, "token_overhead_s": back_s}
    return stretched(dataclasses.replace(profile, constants=constants), beside * float(np.exp(np.mean(logs))))


def stretch(profile: LatencyProfile, window: Window) -> float:
    """Return the total time of a window's steps, without what others took, over what the profile says of them; stalls are left out."""
    predicted = np.asarray(latency.step_s(profile, list(window.features.T)))
    taken_s = _counted(dataclasses.asdict(profile.layout), window)
    counted = taken_s < _STALL * predicted
    return float(taken_s[counted].sum() / predicted[counted].sum())


def taken(profile: LatencyProfile, window: Window) -> float:
    """Return the total time of a window's steps over that without what others took of it: 1 where nobody did."""
    return float(window.period_s.sum() / _counted(dataclasses.asdict(profile.layout), window).sum())


def of_run(log: Path, run: Requests) -> Window:
    """Return what a server logged of one load test, without what HTTP added."""
    steps = _within(steplog.read(log), run)
    times: dict[str, Any] = {"features": steps.features, "period_s": _periods(steps), "own_s": _own(steps)}
    return Window(begun_unix_s=run.t0_unix_s, **times, request_s=0.0, token_s=0.0, flood_per_s=0.0)


def waited(profile: LatencyProfile, seen: Window) -> float:
    """Return the share of a window's steps' time in which others had the engine's core; 0 where the log cannot tell."""
    return 1 - 1 / taken(profile, seen)


def _drift_variance(drift: float, windows: int) -> float:
    """Return the variance of the logarithm of another minute's speed beside the mean of these calibrations, drift being their own sd."""
    return (_DRIFT**2 + (windows - 1) * drift**2) / windows * (1 + 1 / windows)


def _counted(layout: Mapping[str, Any], window: Window) -> Floats:
    """Return the times that count: of one thread on a CPU its own, else (threads wait for each other, and for a GPU) the periods."""
    return window.own_s if layout["device"] == "cpu" and layout["threads"] == 1 else window.period_s


def _shared(profile: LatencyProfile, windows: Sequence[Window]) -> str:
    """Return in words how much of the steps' time the core was others', where that is worth a word."""
    shares = [1 - 1 / taken(profile, w) for w in windows]
    low, high = (f"{100 * share:.0f} %" for share in (min(shares), max(shares)))
    if max(shares) < 1 - _OWNED:
        return ""
    return f"; others had the engine's core for {low} to {high} of its steps' time: the least counts as this machine's way"


def stretched(profile: LatencyProfile, factor: float) -> LatencyProfile:
    """Return the profile with all times multiplied; multipliers of full speed stay at or above the physics floor of 1."""
    values = [
        v * factor if name.endswith("_s") else max(1.0, v * factor) for name, v in zip(profile.terms, profile.coefficients, strict=True)
    ]
    return dataclasses.replace(profile, coefficients=tuple(values))


def cells(health: Mapping[str, Any], windows: Sequence[Window]) -> Iterator[Measurement]:
    """Return the steps of all windows as `engine.step` cells: alike in decodes and prompt tokens, and in context where many are."""
    features = np.concatenate([w.features for w in windows])
    own_s = np.concatenate([_counted(health["layout"], w) for w in windows])
    layout, limits = health["layout"], health["limits"]
    cores = layout["pinned_cores"]
    common: dict[str, Scalar] = {
        "device": layout["device"], "threads": layout["threads"], "pinned_cores": None if cores is None else ",".join(map(str, cores)),
        "model": layout["model"], "precision": layout["precision"], "max_batch": limits["max_seqs"],
        "max_step_tokens": limits["max_step_tokens"], "block_tokens": limits["block_tokens"],
        "kv_tokens": limits["blocks"] * limits["block_tokens"], "max_context": limits["max_context"],
    }  # fmt: skip
    for rows in _alike(features):
        usual = np.median(own_s[rows])
        kept = rows[own_s[rows] < _STALL * usual]
        parameters = common | {n: round(float(v), 3) for n, v in zip(latency.FEATURES, features[kept].mean(axis=0), strict=True)}
        launch = Launch(started_s=windows[0].begun_unix_s, rounds=(Round(values=tuple(own_s[kept].tolist())),))
        yield Measurement(name="engine.step", unit="s", better="lower", parameters=parameters, launches=(launch,))


def _alike(features: Floats) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the rows of steps that are alike."""
    decodes, kv, prompt = features[:, 0], features[:, 1], features[:, 2]
    for d in np.unique(decodes[prompt == 0]):
        yield from _parts(np.flatnonzero((prompt == 0) & (decodes == d)), kv, _DECODE_PARTS)
    for low, high in itertools.pairwise((*_SEATS, np.inf)):
        rows = np.flatnonzero((prompt > 0) & (decodes >= low) & (decodes < high))
        yield from _parts(rows, prompt, _PREFILL_PARTS, _FEWEST_ALONE if low == 0 else _FEWEST)


def _parts(rows: npt.NDArray[np.int64], by: Floats, parts: int, fewest: int = _FEWEST) -> Iterator[npt.NDArray[np.int64]]:
    """Yield rows in parts of equal number in order of a feature, as many parts as have enough."""
    count = min(parts, len(rows) // fewest)
    if count:
        yield from np.array_split(rows[np.argsort(by[rows], kind="stable")], count)


# ---------------------------------------------------------------- replay


def schedule_of(requests: Requests) -> Schedule:
    """Return the arrivals and lengths of a load test as they were."""
    sent = sorted((r for r in requests.requests if r.prompt_tokens is not None and r.output_tokens), key=lambda r: r.scheduled_s)
    return Schedule(
        scheduled_s=np.array([r.scheduled_s for r in sent], dtype=np.float64),
        prompt_tokens=np.array([r.prompt_tokens for r in sent], dtype=np.int64),
        output_tokens=np.array([r.output_tokens for r in sent], dtype=np.int64),
    )


def replayed(
    requests: Requests, profile: LatencyProfile, limits: Limits, clock: Callable[[StepFeatures], float] | None = None
) -> tuple[RequestRecord, ...]:
    """Return the same requests as the simulator sees them, in order of time, each counted where the measured one was.

    `clock`: how long each step takes, one after the other, if not what the profile says.
    """
    sent = sorted((r for r in requests.requests if r.prompt_tokens is not None and r.output_tokens), key=lambda r: r.scheduled_s)
    found = simulate.run(schedule_of(requests), profile, limits, clock=clock, steady_clock=clock is None).requests
    return tuple(dataclasses.replace(r, in_window=real.in_window) for r, real in zip(found, sent, strict=True))


def saturation_per_s(traffic: Workload, profile: LatencyProfile, limits: Limits, *, n: int = 1500, seed: int = 0) -> float:
    """Return the rate at which the simulated engine answers when requests always wait: completions of the middle of a flood."""
    drawn = workload.schedule(dataclasses.replace(traffic, rate_per_s=1.0, arrivals="poisson"), n=n, seed=seed)
    flood = simulate.run(dataclasses.replace(drawn, scheduled_s=np.zeros(n)), profile, limits)
    done = np.sort([r.done_s for r in flood.requests if r.done_s is not None])
    first, last = n // 5, n - n // 5
    return float((last - first) / (done[last] - done[first]))
