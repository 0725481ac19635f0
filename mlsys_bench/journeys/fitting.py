"""fit: whatever a team has measured -> a latency profile, and the rows it was fitted to beside it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from mlsys_bench import hardware, latency, models, predict, record, units
from mlsys_bench.checked import Check
from mlsys_bench.errors import BadInput
from mlsys_bench.latency import service
from mlsys_bench.loadlimits import LoadSweep
from mlsys_bench.predict import beside, floor, opaque, readers
from mlsys_bench.predict.experiment import Experiment
from mlsys_bench.predict.readers import Design, loadtests
from mlsys_bench.types import Bench, LatencyProfile, Layout, LoadTest
from mlsys_bench.units import count

NOTHING = (
    "mlsys fit: name bench files (`mlsys bench gpu -o bench.json` makes one), load tests or results of other tools "
    f"({', '.join(readers.KNOWN)}), or give --probe URL"
)


_IMPLAUSIBLE = 5.0  # times off in the median: engines do not differ so much on the same GPUs
_APART = 2.0  # between the least and the highest load measured, below which one says nothing of the other
_CAUSES = "are --gpu, --model, --precision and the units of the file right?"
_OPTIONS = {"device": "gpu"}  # options that are not called what they set


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A profile and every row it was fitted to, measured beside predicted."""

    profile: LatencyProfile
    checks: tuple[Check, ...]
    exit_status: int = 0  # not 0: a profile of less than was asked for


def fit(files: Sequence[Path], design: Design | None = None, *, stage: str | None = None) -> Fitted:
    """Return the profile of what these files hold: bench records, load tests of one endpoint, or results of other tools."""
    if not files:
        raise BadInput(NOTHING)
    twice = [str(path) for i, path in enumerate(files) if path in files[:i]]
    if twice:
        raise BadInput(f"mlsys fit: {twice[0]} is named twice; its samples would count double")
    kinds = {_kind(path) for path in files}
    if design is not None and design != Design() and "unread" in kinds:
        kinds = {"other" if kind == "unread" else kind for kind in kinds}  # records of ours need no options: it was to be another tool's
    kinds = {"bench" if kind == "unread" else kind for kind in kinds}
    named = [option for option, value in dataclasses.asdict(design or Design()).items() if value is not None]
    if kinds == {"bench"} and named:
        raise BadInput(f"mlsys fit: bench records say what they were measured on; leave out --{_OPTIONS.get(named[0], named[0])}")
    if kinds == {"bench"}:
        return _benches(files, stage)
    if kinds == {"loadtest"} and (design is None or design.model is None):
        return _endpoint(files, stage)
    if "bench" in kinds:
        raise BadInput("mlsys fit: bench records beside results of load tests; fit them one after another")
    return _results(files, design or Design())


def probe(
    url: str,
    *,
    design: Design,
    served_model: str | None,
    endpoint: str,
    concurrency: int,
    max_step_tokens: int | None,
    budget: str,
    seed: int,
    quiet: bool = False,
) -> Fitted:
    """Return the profile of a live server, measured from outside."""
    from mlsys_bench.journeys import probe as probing

    if endpoint not in ("completions", "chat"):
        raise BadInput(f"--endpoint {endpoint}: it is completions or chat")
    options = probing.Options(
        url=url,
        layout=_layout(design),
        served_model=served_model,
        endpoint="chat" if endpoint == "chat" else "completions",
        concurrency=concurrency,
        max_step_tokens=max_step_tokens,
        budget_s=units.seconds(budget, "--budget"),
        seed=seed,
    )
    found = probing.probe(options, quiet=quiet)
    return Fitted(profile=found.profile, checks=beside.steps(found.profile, found.residuals), exit_status=found.exit_status)


def _layout(design: Design) -> Layout | None:
    """Return the layout a person names, None where the server is to say it."""
    if design.model is None and design.device is None:
        return None
    if design.model is None or design.device is None:
        raise BadInput("--probe: give both --model and --gpu, or neither where the server says what it is (`mlsys serve` does)")
    device = design.device if design.device == "cpu" else hardware.find(design.device).id
    return Layout(
        model=models.find(design.model).id,
        precision=design.precision or "bf16",
        device=device,
        tp=design.tp or 1,
        pp=design.pp or 1,
        ep=design.ep or 1,
    )


def _kind(path: Path) -> str:
    """Return what a file is: 'loadtest', 'bench' for any other record of ours, 'other' for the result of another tool, or 'unread'."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    if text.startswith(b"PAR1"):
        raise BadInput(f"{path}: holds the requests of a load test; name its record, the .json beside it")
    for part in (text, text.partition(b"\n")[0]):  # one document, or one a line
        try:
            document = json.loads(part)
        except (ValueError, RecursionError):
            continue
        kind = document.get("kind") if isinstance(document, dict) and "schema" in document else None
        return "other" if kind is None else "loadtest" if kind in ("loadtest", "loadsweep") else "bench"
    return "unread" if path.suffix == ".json" else "other"  # what is wrong with it is best said by the reader of what it should be


def _benches(files: Sequence[Path], stage: str | None) -> Fitted:
    measurements = [m for path in files for m in record.read(path, Bench).measurements]
    bench = Bench(measurements=tuple(measurements))
    if stage is not None or (service.stages(bench) and not any(m.name == "engine.step" for m in measurements)):
        return Fitted(profile=service.fit(bench, stage=stage), checks=())
    profile = latency.fit(bench)
    return Fitted(profile=profile, checks=beside.steps(profile, latency.residuals(profile, bench)))


def _endpoint(files: Sequence[Path], stage: str | None) -> Fitted:
    """Return the service profile of an endpoint by its load tests: rising rates, or rising numbers of users."""
    tests = [found for path in files for found in _tests(path)]
    name = stage or tests[0][1].target
    users = [loadtests.concurrency(test) for _, test in tests]
    if all(users):
        cells = [
            service.Cell(concurrency=k or 1, values_s=loadtests.sojourns_s(test, path))
            for k, (path, test) in zip(users, tests, strict=True)
        ]
        return Fitted(profile=_of_targets(service.fit_cells(cells, stage=name), tests), checks=())
    levels = [opaque.level_of(test, loadtests.requests(test, path)) for path, test in tests]
    endpoint = opaque.fit(levels)
    return Fitted(profile=_of_targets(opaque.profile(endpoint, stage=name), tests), checks=beside.levels(endpoint, levels))


def _of_targets(profile: LatencyProfile, tests: Sequence[tuple[Path, LoadTest]]) -> LatencyProfile:
    """Return the profile; where the load tests were of several addresses, its note says what was taken for one endpoint."""
    targets = sorted({test.target for _, test in tests})
    if len(targets) < 2:
        return profile
    said = f"load tests of {len(targets)} addresses ({', '.join(targets)}) were taken for one endpoint"
    return dataclasses.replace(profile, note="; ".join([said, *([profile.note] if profile.note else [])]))


def _tests(path: Path) -> list[tuple[Path, LoadTest]]:
    """Return the load test of a file, or those of a sweep's levels at which the server kept up."""
    _, found = record.load(path)
    if not isinstance(found, LoadSweep):
        return [(path, record.read(path, LoadTest))]
    kept = [level.test for level in found.levels if not level.over and level.test.validity.verdict != "invalid"]
    if any(test.requests_file is None for test in kept):
        raise BadInput(f"{path}: was swept without -o, so its requests are gone; sweep again with -o")
    return [(path, test) for test in kept if test.ok >= opaque.LEAST_REQUESTS]


def _check(reading: readers.Reading) -> None:
    """Raise BadInput for what a step profile cannot hold: drafted tokens, and times that no such GPUs take."""
    if reading.experiment.speculative is not None:
        raise BadInput(f"{reading.where}: was measured with speculative decoding, which a step profile cannot hold; measure without it")
    problem = floor.problem(reading.experiment)
    if problem is not None:
        raise BadInput(f"{reading.where}: {problem}: {_CAUSES} Speculative decoding cannot be fitted so: measure without it")


def _near_one_load(measured: Sequence[Experiment]) -> list[str]:
    """Return what measurements that are all near one load leave open: what a step takes beside its bytes, or how fast these are read."""
    loads = [e.concurrency or e.rate_per_s or 0.0 for e in measured]
    if len({e.concurrency is None for e in measured}) > 1 or max(loads) >= _APART * min(loads):
        return []
    return ["all near one load: times at others are less sure; add a run with four times the load, or a quarter of it"]


def _results(files: Sequence[Path], design: Design) -> Fitted:
    found = readers.read(files, design)
    layouts = {reading.experiment.layout for reading in found}
    if len(layouts) > 1:
        listed = "; ".join(f"{layout[0]} {layout[2]} on {layout[3]} x {layout[1]}" for layout in sorted(layouts))
        raise BadInput(f"the files hold {len(layouts)} layouts ({listed}); a profile belongs to one")
    for reading in found:
        _check(reading)
    measured = [reading.experiment for reading in found if reading.experiment.measured]
    if not measured:
        notes = "; ".join(note for reading in found for note in reading.notes)
        raise BadInput(f"no load level with usable latencies: {notes or 'the files give none'}")
    knowledge = predict.learn(measured)
    profile = predict.profile(measured[0], knowledge)
    warned = [f"{r.where} ({r.tool}, {count(r.requests, 'request')}): {'; '.join(r.notes)}" for r in found if r.notes]
    off = beside.misfit(beside.readings(found, predict.predict(measured, predict.learn([]))))
    if off > math.log(_IMPLAUSIBLE):
        warned.insert(
            0, f"measured times are {math.exp(off):,.0f} times off what other engines take for this model on such GPUs: {_CAUSES}"
        )
    learned = [f"learned from {count(len(measured), 'load level')}", *_near_one_load(measured)]
    said = "; ".join([*learned, *warned, *([profile.note] if profile.note else [])])
    return Fitted(profile=dataclasses.replace(profile, note=said), checks=beside.readings(found, predict.predict(measured, knowledge)))
