"""loadtest: what is sent when, from options as typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mlsys_bench import units, workload
from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest import content, mlperf
from mlsys_bench.loadtest.content import Content

if TYPE_CHECKING:
    from mlsys_bench.loadtest.payloads.dataset import DataSet

USUAL_S, GAP = 60.0, "0s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """Which requests of a trace are replayed, and how, as typed."""

    file: Path | None = None
    start: str | None = None
    end: str | None = None
    speed: float | None = None
    columns: Mapping[str, str | None] = field(default_factory=dict)
    time_unit: str | None = None
    block_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """What requests carry, as typed."""

    lengths_from: Path | None = None
    shared_prefix: str | None = None
    turns: str | None = None
    gap: str | None = None
    tenants: Sequence[str] = ()
    dataset: Path | None = None
    field: str | None = None
    shuffle: bool = False
    images: Path | None = None
    image_size: str | None = None
    images_per_request: int = 1
    same_words: bool = False


def check(
    traced: Traced, carried: Carried, users: int | None, *, arrivals: str | None, prompt_tokens: str | None, output_tokens: str | None
) -> None:
    """Raise BadInput for options that would do nothing beside others."""
    own: dict[str, object] = {"--prompt-tokens": prompt_tokens, "--output-tokens": output_tokens, "--lengths-from": carried.lengths_from}
    own |= {"--turns": carried.turns, "--tenant": carried.tenants}
    if traced.file is not None:
        _beside("--trace, which has lengths, sessions and times of its own", {"--arrivals": arrivals, **own})
    if users is not None:
        _beside("--users, who send when they have an answer", {"--arrivals": arrivals})


def replayed(traced: Traced, qps: float | None, duration: str | None = None) -> workload.Schedule | None:
    """Return a trace cut and stretched as asked, to a rate and a duration where they were given; None where there is no trace."""
    cut = {"--start": traced.start, "--end": traced.end, "--speed": traced.speed, "--time-unit": traced.time_unit}
    named = {f"--{what}-column": name for what, name in traced.columns.items()}
    if traced.file is None:
        _need("--trace FILE", {**cut, **named, "--block-tokens": traced.block_tokens})
        return None
    if qps is not None and traced.speed is not None:
        raise BadInput("--qps and --speed both stretch a trace; give one of them")
    plan = workload.from_trace(
        traced.file,
        columns={what: name for what, name in traced.columns.items() if name},
        time_unit=traced.time_unit,
        block_tokens=traced.block_tokens,
        start_s=units.seconds(traced.start, "--start") if traced.start else 0.0,
        end_s=units.seconds(traced.end, "--end") if traced.end else None,
        speed=1.0 if traced.speed is None else traced.speed,
        rate_per_s=None if qps is None else workload.checked_rate(qps),
    )
    if duration is None or plan.gap_s is not None:  # turns of sessions come when they come, as long as the run lasts
        return plan
    return workload.sliced(plan, 0.0, units.seconds(duration, "--duration"))


def preset(
    name: str | None, *, qps: float | None, users: int | None, trace: Path | None, arrivals: str | None, slo: str | None
) -> mlperf.Scenario | None:
    """Return one of MLPerf's scenarios.  Raises BadInput for what it settles itself, or needs."""
    if name is None:
        return None
    found = mlperf.named(name)
    if users is not None or trace is not None or arrivals not in (None, "poisson"):
        raise BadInput(f"--preset {name} says itself how requests arrive: leave --users, --trace and --arrivals out")
    if (qps is None) == (name == "server"):
        raise BadInput("--preset server needs --qps, the rate to hold" if qps is None else f"--preset {name} has no rate: leave --qps out")
    if name == "server" and slo is None:
        raise BadInput(f"--preset server needs the limits of its latencies: {mlperf.SERVER_NEEDS}")
    return found


def duration_s(text: str | None, arrivals: str | None, scenario: mlperf.Scenario | None) -> float:
    """Return how long requests are sent: as said, else as a preset, a series or stages say, else a minute."""
    if text is not None:
        return units.seconds(text, "--duration")
    if scenario is not None:
        return mlperf.LEAST_S
    return (arrivals and workload.written_duration_s(arrivals)) or USUAL_S


def carried(given: Carried, *, output_given: bool, seed: int, prompt: str | None, output: str | None) -> Content:
    """Return what requests carry."""
    if given.tenants and (prompt is not None or output_given):
        raise BadInput("--tenant brings lengths of its own: leave --prompt-tokens and --output-tokens out")
    if given.lengths_from is not None and (prompt is not None or output_given or given.tenants):
        raise BadInput("--lengths-from brings both lengths: leave --prompt-tokens, --output-tokens and --tenant out")
    return Content(
        pairs=None if given.lengths_from is None else workload.from_trace(given.lengths_from),
        shared_prefix=content.parse_shared_prefix(given.shared_prefix) if given.shared_prefix else None,
        sessions=_sessions(given, prompt, output),
        dataset=_dataset(given, seed),
        dataset_lengths=not output_given,
        images=_images(given),
        tenants=content.parse_tenants(given.tenants),
        same_words=given.same_words,
    )


def _sessions(given: Carried, prompt: str | None, output: str | None) -> workload.Sessions | None:
    if given.turns is None:
        _need("--turns, e.g. --turns 5", {"--gap": given.gap})
        return None
    if given.tenants or given.lengths_from is not None:
        raise BadInput("--turns: sessions take their lengths from --prompt-tokens and --output-tokens alone")
    gap = units.seconds(given.gap or GAP, "--gap")
    return workload.Sessions(
        turns=workload.parse_lengths(given.turns),
        new_tokens=workload.parse_lengths(prompt or "128"),
        output_tokens=workload.parse_lengths(output or "32"),
        gap_mean_s=gap,
        gap_cv=1.0 if gap else 0.0,
    )


def _dataset(given: Carried, seed: int) -> DataSet | None:
    from mlsys_bench.loadtest.payloads import dataset

    if given.dataset is None:
        _need("--dataset FILE", {"--field": given.field, "--shuffle": given.shuffle})
        return None
    data = dataset.read(given.dataset, given.field)
    return dataset.shuffled(data, seed) if given.shuffle else data


def _images(given: Carried) -> content.Images | None:
    from mlsys_bench.loadtest.payloads import images

    if given.images is None and given.image_size is None:
        _need("--images or --image-size", {"--images-per-request": given.images_per_request != 1})
        return None
    if given.images is not None and given.image_size is not None:
        raise BadInput("--images are what they are: leave --image-size out, which makes images up")
    if given.image_size is not None:
        return content.Images(pixels=images.parse_size(given.image_size), each=given.images_per_request)
    assert given.images is not None
    return content.Images(urls=tuple(images.read(given.images)), each=given.images_per_request)


def _need(needed: str, given: Mapping[str, object]) -> None:
    for option, value in given.items():
        if value:
            raise BadInput(f"{option} belongs to {needed}; give both")


def _beside(other: str, given: Mapping[str, object]) -> None:
    for option, value in given.items():
        if value:
            raise BadInput(f"{option} does nothing beside {other}; leave it out")
