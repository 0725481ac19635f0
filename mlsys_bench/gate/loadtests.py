"""Two load tests of the same load -> a Verdict: what differs, by how much, and whether that is more than chance.

Six runs a side (`mlsys loadtest --repeats 6`) are decided run by run, as launches of a benchmark are.  Fewer are decided by what is in
them: blocks of neighbouring requests are resampled where the files of requests are there, else the summaries' own intervals are used.
How much two runs of the same differ is then unknown, so a difference that two runs may well have by themselves is at most suspect, and
so is any difference where a run is degraded: its client may be what differs.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlsys_bench import stats, summary
from mlsys_bench.errors import BadInput
from mlsys_bench.gate import decide as arithmetic
from mlsys_bench.gate import load_limits
from mlsys_bench.gate import policy as rules
from mlsys_bench.gate.words import counted, overall, ruled, together
from mlsys_bench.loadtests import LoadTests
from mlsys_bench.record import Envelope
from mlsys_bench.summary import promises
from mlsys_bench.summary.intervals import Z_90, resampled
from mlsys_bench.types import LoadTest, Machine
from mlsys_bench.verdicts import Finding, Policy, Verdict, Word

METRICS = ("ttft", "tpot", "itl", "e2e")
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
SAME_RATE = 0.01  # of the asked rate
SAME_LENGTHS = 0.05  # of the mean tokens
BETWEEN_RUNS_SD = 0.025  # of logarithms: what runs of one program differ by on a noisy machine, see `gate.decide`
_ALONE = 2.326 * math.sqrt(2) * BETWEEN_RUNS_SD  # what one run a side must differ by beyond chance inside it: 1 %, one-sided
_RESAMPLES = 400
# of the fingerprint: what a load client is made of
CLIENT = ("architecture", "os", "cpu_vendor", "cpu_family", "cpu_model", "cpu_name", "cores", "cpu_quota")


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side: the record, and the requests of its runs where their files are at hand, in the order of the runs."""

    envelope: Envelope
    record: LoadTest | LoadTests
    requests: tuple[summary.Columns, ...] = ()

    @property
    def runs(self) -> tuple[LoadTest, ...]:
        """The runs, one or several."""
        return self.record.runs if isinstance(self.record, LoadTests) else (self.record,)


def compare(base: Side, cand: Side, *, tolerance: float = 0.05, policy: Policy | None = None) -> Verdict:
    """Return what can be said of the candidate against the baseline.  `tolerance` is the slowdown that may pass where no policy says it."""
    policy = policy or Policy(tolerance=tolerance)
    tolerance = policy.tolerance
    if not 0 < tolerance < 1:
        raise BadInput(f"a tolerance of {tolerance:g} cannot be used; give a share between 0 and 1, e.g. 0.05")
    different = (*_machines(base.envelope.machine, cand.envelope.machine), *_loads(base.runs[0], cand.runs[0]), *_beliefs(base, cand))
    if different:
        reason = "the two runs are not of the same load: what differs between them is not the server alone"
        return Verdict(verdict="not_comparable", findings=(), tolerance=tolerance, reasons=(reason,), fingerprint_differences=different)
    compared = [(ruled(f, policy), chance) for f, chance in (*_latencies(base, cand, policy), *_rates(base, cand, policy))]
    findings = (*together(compared), *(ruled(f, policy) for f in (_failures(base, cand), *_limits(base, cand, policy))))
    return Verdict(verdict=overall(findings), findings=findings, tolerance=tolerance, reasons=(*counted(findings), *_remarks(base, cand)))


# ---------------------------------------------------------------- may they be compared?


def _machines(base: Machine, cand: Machine) -> tuple[str, ...]:
    pairs = ((name, base.hard.get(name), cand.hard.get(name)) for name in CLIENT)
    return tuple(f"client's {name}: {a} -> {b}" for name, a, b in pairs if a != b)


def _loads(base: LoadTest, cand: LoadTest) -> Iterator[str]:
    """Yield what was asked of one server and not of the other."""
    if _model(base) != _model(cand):
        yield f"model: {_model(base)} -> {_model(cand)}"
    if base.arrivals != cand.arrivals:
        yield f"arrivals: {base.arrivals} -> {cand.arrivals}"
    for name, a, b, same in (
        ("offered rate per second", base.offered_rate_per_s, cand.offered_rate_per_s, SAME_RATE),
        ("prompt tokens", base.mean_prompt_tokens, cand.mean_prompt_tokens, SAME_LENGTHS),
        ("output tokens", base.mean_output_tokens, cand.mean_output_tokens, SAME_LENGTHS),
    ):
        if (a is None) != (b is None) or (a and b and abs(b / a - 1) > same):
            yield f"{name}: {_number(a)} -> {_number(b)}"


def _model(run: LoadTest) -> str:
    """Return the model of 'http://host:port (model)': the same one behind another address is what people compare."""
    return run.target.partition(" (")[2].removesuffix(")") or run.target


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _beliefs(base: Side, cand: Side) -> Iterator[str]:
    for name, side in (("baseline", base), ("candidate", cand)):
        broken = next((run.validity for run in side.runs if run.validity.verdict == "invalid"), None)
        if broken is not None:
            yield f"the {name} is invalid: {next(iter(broken.reasons), 'it does not say why')}"


def _remarks(base: Side, cand: Side) -> Iterator[str]:
    addresses = [side.runs[0].target.partition(" (")[0] for side in (base, cand)]
    if addresses[0] != addresses[1]:
        yield f"address: {addresses[0]} -> {addresses[1]}"
    if min(len(base.runs), len(cand.runs)) < arithmetic.ENOUGH_LAUNCHES:
        yield (
            f"{len(base.runs)} against {len(cand.runs)} runs: what runs differ by from one to the next is not measured; "
            f"--repeats {arithmetic.ENOUGH_LAUNCHES} measures it"
        )


# ---------------------------------------------------------------- figures


def _limits(base: Side, cand: Side, policy: Policy) -> Iterator[Finding]:
    """Yield the absolute limits.  A degraded run decides none: its client may be what was slow."""
    enough = min(len(base.runs), len(cand.runs)) >= arithmetic.ENOUGH_LAUNCHES
    believed = all(run.validity.verdict == "valid" for run in cand.runs)
    requests = cand.requests if len(cand.requests) == len(cand.runs) else ()
    for found in load_limits.findings(base.runs, cand.runs, requests, policy, enough=enough, slack=_ALONE):
        doubtful = found.verdict == "regression" and not believed
        yield dataclasses.replace(found, verdict="suspect", reason=f"{found.reason}; but a run is degraded") if doubtful else found


def _latencies(base: Side, cand: Side, policy: Policy) -> Iterator[tuple[Finding, float | None]]:
    known = [_spreads(side) for side in (base, cand)]
    for metric in METRICS:
        for stat in QUANTILES:
            yield from _finding(f"{metric}_{stat}", "s", "lower", _figure(f"{metric}_s", stat), base, cand, known, policy)


def _rates(base: Side, cand: Side, policy: Policy) -> Iterator[tuple[Finding, float | None]]:
    """Yield what a closed loop is about; in an open loop the rate is the client's."""
    if base.runs[0].offered_rate_per_s is None:
        for name, unit in (("request_rate_per_s", "requests/s"), ("output_tokens_per_s", "tokens/s")):
            yield from _finding(name, unit, "higher", operator.attrgetter(name), base, cand, [{}, {}], policy)


def _figure(metric: str, stat: str) -> Callable[[LoadTest], float | None]:
    return lambda run: getattr(getattr(run, metric), stat)


def _finding(
    name: str,
    unit: str,
    better: Literal["lower", "higher"],
    of: Callable[[LoadTest], float | None],
    base: Side,
    cand: Side,
    known: Sequence[Mapping[str, float]],
    policy: Policy,
) -> Iterator[tuple[Finding, float | None]]:
    """Yield a figure's finding with its chance, None where runs are not compared with runs; nothing where a side has no such figure."""
    tolerance = rules.tolerance_of(policy, name)
    before, after = ([value for run in side.runs if (value := of(run)) is not None and value > 0] for side in (base, cand))
    if not before or not after:
        return
    chance = None
    sign = 1 if better == "lower" else -1
    logs = [[sign * math.log(v) for v in side] for side in (before, after)]
    if min(map(len, logs)) >= arithmetic.ENOUGH_LAUNCHES:
        bounds = arithmetic.welch(logs[0], logs[1], tolerance)
        estimate, low, high, chance = bounds.estimate, bounds.low, bounds.high, bounds.chance
        verdict: Word = arithmetic.decide(low, high, tolerance)
        reason = f"{len(before)} against {len(after)} runs, sd between runs {100 * bounds.sd:.1f} %"
    else:
        estimate = float(np.mean(logs[1]) - np.mean(logs[0]))
        sds = [errors_of.get(name) for errors_of in known]
        if sds[0] is None or sds[1] is None:
            yield (
                _said(name, unit, better, before, after, sign * estimate, None, "inconclusive", "no interval on one side: a longer run"),
                None,
            )
            return
        half = 2.576 * math.hypot(sds[0], sds[1])  # each bound at 99.5 %
        low, high = estimate - half, estimate + half
        believed = all(run.validity.verdict == "valid" for run in (*base.runs, *cand.runs))
        verdict, reason = _alone(arithmetic.decide(low, high, tolerance), low, high, tolerance, believed)
    yield _said(name, unit, better, before, after, sign * estimate, (sign * low, sign * high), verdict, reason), chance


def _alone(verdict: Word, low: float, high: float, tolerance: float, believed: bool) -> tuple[Word, str]:
    """Take back what single runs, or degraded ones, cannot carry."""
    clear = math.log1p(tolerance) / 5 + _ALONE
    if verdict in ("regression", "improved") and not believed:
        said: Word = "suspect" if verdict == "regression" else "inconclusive"
        return said, "beyond the chance within the runs, but a run is degraded: its client may be what differs"
    if verdict == "regression" and low <= clear:
        return "suspect", "beyond the chance within the runs, not beyond what two runs may differ by"
    if verdict == "improved" and high >= -clear:
        return "inconclusive", "better beyond the chance within the runs, not beyond what two runs may differ by"
    return verdict, "from what is in the runs"


def _said(
    name: str, unit: str, better: Literal["lower", "higher"], before: Sequence[float], after: Sequence[float], log_ratio: float,
    bounds: tuple[float, float] | None, verdict: Word, reason: str,
) -> Finding:  # fmt: skip
    interval = None if bounds is None else (math.exp(min(bounds)), math.exp(max(bounds)))
    return Finding(
        name=name, parameters={}, unit=unit, better=better, baseline=_centre(before), candidate=_centre(after), ratio=math.exp(log_ratio),
        interval=interval, verdict=verdict, reason=reason,
    )  # fmt: skip


def _centre(values: Sequence[float]) -> float:
    return math.exp(float(np.mean(np.log(values))))


# ---------------------------------------------------------------- how sure one run is of a figure


def _spreads(side: Side) -> dict[str, float]:
    """Return the standard error of the logarithm of each figure, of the mean of the runs."""
    runs = [errors(rows) for rows in side.requests] if len(side.requests) == len(side.runs) else [_of_summary(r) for r in side.runs]
    names = set(runs[0]).intersection(*runs[1:])
    return {name: math.sqrt(sum(run[name] ** 2 for run in runs)) / len(runs) for name in names}


def errors(rows: summary.Columns) -> dict[str, float]:
    """Return the standard error of the logarithm of each figure of a run, by resampling blocks of neighbouring requests."""
    inside = rows.where(rows.in_window)
    ok, timed = inside.where(inside.ok), inside.where(inside.told)  # as the figures themselves are made
    single = np.ones(len(timed), dtype=np.int64)
    samples = {"ttft": (timed.ttft_s, single), "tpot": (ok.tpot_s, single), "e2e": (timed.e2e_s, single), "itl": ok.gaps_s}
    found: dict[str, float] = {}
    for metric, (values, sizes) in samples.items():
        known = values[~np.isnan(values)]
        sizes = sizes[sizes > 0] if metric == "itl" else single[: len(known)]
        if len(sizes) >= 2:
            drawn, _ = resampled(known, sizes, QUANTILES, resamples=_RESAMPLES)
            found |= {f"{metric}_{stat}": float(np.log(np.maximum(drawn[stat], 1e-9)).std(ddof=1)) for stat in QUANTILES}
    return found


def _of_summary(run: LoadTest) -> dict[str, float]:
    """Take the standard errors from the 90 % intervals."""
    found = {}
    for metric in METRICS:
        for stat, (low, high) in getattr(run, f"{metric}_s").intervals.items():
            if 0 < low <= high:
                found[f"{metric}_{stat}"] = math.log(high / low) / (2 * Z_90)
    return found


# ---------------------------------------------------------------- failures


def _failures(base: Side, cand: Side) -> Finding:
    """Return the share of requests that failed, of those not given up on purpose: worse where Wilson's intervals lie apart."""
    asked = [[promises.asked(run) for run in side.runs] for side in (base, cand)]
    counts = [(sum(each) - sum(run.ok for run in side.runs), sum(each)) for each, side in zip(asked, (base, cand), strict=True)]
    spans = [stats.wilson(failed, requests, level=0.99) or (0.0, 1.0) for failed, requests in counts]
    shares = [failed / requests if requests else 0.0 for failed, requests in counts]
    apart: Word = "regression" if spans[1][0] > spans[0][1] else "improved" if spans[1][1] < spans[0][0] else "pass"
    reason = f"{counts[0][0]:,} of {counts[0][1]:,} against {counts[1][0]:,} of {counts[1][1]:,} requests; Wilson, 99 %"
    return Finding(
        name="failed", parameters={}, unit="share", better="lower", baseline=shares[0], candidate=shares[1], ratio=None, interval=None,
        verdict=apart, reason=reason,
    )  # fmt: skip
