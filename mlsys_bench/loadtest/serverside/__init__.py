"""The server's side of a load test: its own metrics and its devices, looked at once a second beside the run, on the run's clock.

`begin` starts the threads that look; `Watch.stop` ends them; `reading.read` makes the record.  Runs in the parent process.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence

from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest.client import Client, authority
from mlsys_bench.loadtest.serverside import devices, page
from mlsys_bench.loadtest.serverside.reading import read as read
from mlsys_bench.loadtest.serverside.watch import Looks, Source, Watch
from mlsys_bench.timelines import Series
from mlsys_bench.types import LoadTest, Requests

_FIRST_LOOK_S = 3.0
_ON_THE_TIMELINE = ("running", "waiting", "kv_cache", "generation_tokens")


def base_url(scheme: str, host: str, port: int) -> str:
    """Return the root of a server, as `begin` wants it."""
    return f"{scheme}://{authority(host, port)}"


def begin(
    asked: Sequence[str],
    *,
    base_url: str,
    address: str,
    headers: page.Headers = (),
    client: Client | None = None,
    avoid_cores: Collection[int] = (),
) -> Watch | None:
    """Start to look at what `--metrics` asks for; None for `off`.

    asked: `auto` (BASE/metrics, tried once), `off`, addresses of pages.  The devices of this machine are looked at where the server is
    here.  The run's own headers go to pages of the target only.  Raises BadInput for an address that has no metrics: a typing mistake
    is better found before the run than after it.
    """
    if "off" in asked:
        if len(set(asked)) > 1:
            raise BadInput("--metrics off: goes with no other --metrics")
        return None
    sources: list[tuple[Source, bool]] = []
    for word in dict.fromkeys(asked):
        if word == "auto":
            sources.append((page.Page(f"{base_url}/metrics", headers=headers, client=client), True))
        else:
            own = headers if word.startswith(f"{base_url}/") else ()
            sources.append((_checked(page.Page(word, headers=own, client=client), word), False))
    if devices.is_local(address):
        sources += [(devices.Nvml(), True), (devices.Rapl(), True)]
    return Watch(sources, avoid_cores=avoid_cores)


def _checked(source: page.Page, word: str) -> page.Page:
    try:
        source.look(_FIRST_LOOK_S)
    except page.MissedError as missed:
        source.release()
        raise BadInput(f"--metrics {word.rpartition('@')[2]}: {missed}; is it the address of a metrics page?") from None
    return source


@contextlib.contextmanager
def watching(watch: Watch | None) -> Iterator[list[Looks]]:
    """Look at the server while the body runs, if somebody does (see `begin`); the list is filled when it ends."""
    seen: list[Looks] = []
    try:
        yield seen
    finally:
        if watch is not None:
            seen += watch.stop()


def attach(result: LoadTest, seen: Sequence[Looks], requests: Requests, *, warmup_s: float, model: str) -> LoadTest:
    """Return a load test with its server's side, on the steps of its timeline, and what of that casts doubt on its figures."""
    if not seen:
        return result
    line = result.timeline
    window = (warmup_s, warmup_s + result.duration_s) if line is None else line.window_s
    step_s, steps = (None, None) if line is None else (line.step_s, len(line.offered))
    side = read(seen, requests.requests, t0_unix_s=requests.t0_unix_s, window=window, model=model, step_s=step_s, steps=steps)
    validity = dataclasses.replace(result.validity, reasons=(*result.validity.reasons, *side.doubts))
    if line is not None:
        shown = [Series(name=s.name.replace("_", " "), unit=s.unit, values=s.values) for s in side.series if s.name in _ON_THE_TIMELINE]
        line = dataclasses.replace(line, extra=(*line.extra, *shown))
    return dataclasses.replace(result, server=side, validity=validity, timeline=line)
