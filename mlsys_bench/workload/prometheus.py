"""Metrics from a Prometheus server over HTTP, or from an exported file of what one answered."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import math
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mlsys_bench import units
from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.workload import counters
from mlsys_bench.workload.counters import Series
from mlsys_bench.workload.metrics import Engine, Metrics, canonical, engine_of, wanted_names

if TYPE_CHECKING:
    from http.client import HTTPResponse
    from urllib.error import HTTPError

MAX_POINTS = 11_000  # of one series in one answer: Prometheus refuses more
_CHUNK_SAMPLES = 1_000_000  # of all series in one answer: what it takes in memory here and there
_COARSE_STEPS = 1_000  # histograms need no more
_TIMEOUT_S, _WHOLE_S = 60.0, 300.0  # for the next piece of an answer; for all of one
_PIECE_BYTES = 2**20
_LONGEST_S = 2 * 365 * 86_400.0  # of one series: beyond it a time is in the wrong unit, and steps of a second would fill the memory
_MOST_STEPS = 20_000_000  # of one series in a range: two weeks of ten a second are fewer
_ROUNDED_S = 60.0  # by which a proxy may round the ends of a range
_TICK_S = 1e-3  # Prometheus keeps milliseconds
_MOST_COUNTED = 1e18  # no server has answered so many requests, or tokens
_FAMILIES = '{__name__=~"(vllm|sglang)[:_].+|mlsys_.+"'
_FOR_EXCEL = re.compile(r"\Asep=.\r?\n")  # Grafana's first line of a CSV for Excel
_LABEL = re.compile(r'\s*([A-Za-z_]\w*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*,?')


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A Prometheus server, or anything that answers its HTTP API.  `authorization` is the header's value and is never printed."""

    url: str
    authorization: str | None = None

    @property
    def shown(self) -> str:
        """The address without user and password."""
        parts = urllib.parse.urlsplit(self.url)
        return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    def get(self, path: str, **parameters: str | float | None) -> Any:
        """Return `data` of an answer.  Raises BadInput where there is no Prometheus or it refuses, MeasurementFailed where it fails."""
        import http.client
        import urllib.error
        import urllib.request

        query = urllib.parse.urlencode({"match[]" if k == "match" else k: v for k, v in parameters.items() if v is not None})
        request = urllib.request.Request(f"{_bare(self.url)}/api/v1/{path}?{query}")  # noqa: S310  (scheme checked by `server`)
        if self.authorization:
            request.add_unredirected_header("Authorization", self.authorization)  # a redirect must not carry it elsewhere
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
                text = self._whole(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise BadInput(f"{self.shown}: cannot be reached: {reason}; is it the address of a Prometheus server?") from None
        except http.client.HTTPException as error:
            raise BadInput(f"{self.shown}: gives no whole HTTP answer: {error!r}; is it the address of a Prometheus server?") from None
        document = _json(text, self.shown)
        if not isinstance(document, dict) or document.get("status") != "success" or "data" not in document:
            raise self._strange()
        return document["data"]

    def _whole(self, answer: HTTPResponse) -> bytes:
        """Return a body.  Raises MeasurementFailed for one that drips, each piece in time and no end; IncompleteRead for one cut off."""
        import http.client

        end_s, pieces = time.monotonic() + _WHOLE_S, list[bytes]()
        while piece := answer.read1(_PIECE_BYTES):
            pieces.append(piece)
            if time.monotonic() > end_s:
                came = units.show_bytes(sum(map(len, pieces)))
                raise MeasurementFailed(f"{self.shown}: an answer had not ended after {units.show_s(_WHOLE_S)}, {came} of it came")
        if answer.length:
            raise http.client.IncompleteRead(b"".join(pieces), answer.length)
        return b"".join(pieces)

    def names(self, label: str, **parameters: str | float | None) -> list[str]:
        """Return the values of a label."""
        found = self.get(f"label/{label}/values", **parameters)
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise self._strange()
        return found

    def _strange(self) -> BadInput:
        return BadInput(f"{self.shown}: answers, but not as Prometheus does; give the address without /graph or /api/v1")

    def _refused(self, error: HTTPError) -> BadInput | MeasurementFailed:
        import http.client

        status = error.code
        if status in (401, 403):
            return BadInput(f"{self.shown}: HTTP {status}: it wants credentials; put a token into MLSYS_PROMETHEUS_TOKEN or --auth-file")
        try:
            said = str(json.loads(error.read(100_000))["error"])
        except (OSError, http.client.HTTPException, ValueError, RecursionError, KeyError, TypeError):
            said = "no reason given"
        if status in (400, 422):
            return BadInput(f"{self.shown}: refuses the query: {said}")
        return MeasurementFailed(f"{self.shown}: HTTP {status}: {said}; is it the address of a Prometheus server?")


def server(url: str, authorization: str | None = None) -> Server:
    """Return a server by its address; user and password in it become a header.  Raises BadInput."""
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port
    except ValueError:
        parts = urllib.parse.urlsplit("")
    is_odd = parts.query or parts.fragment or not url.isascii() or not url.isprintable() or " " in url
    if parts.scheme not in ("http", "https") or not parts.hostname or is_odd:
        raise BadInput(
            f"--prometheus {url.rpartition('@')[2]}: write an address like http://prometheus:9090, or the name of an exported file"
        )
    if parts.username and not authorization:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        authorization = "Basic " + base64.b64encode(pair.encode()).decode()
    return Server(url=url.rstrip("/"), authorization=authorization)


def fetched(
    source: Server,
    *,
    end_s: float,
    range_s: float,
    step_s: float | None,
    engine: str | None,
    model: str | None,
    selector: str | None,
    wanted: Callable[[Engine], tuple[str, ...]] = wanted_names,
) -> Metrics:
    """Return the metrics of a range of time: requests at every scrape, or every `step_s`; those `wanted` beside in a thousand steps."""
    _check_range(range_s, step_s)
    start_s = end_s - range_s
    given = [*([f'model_name="{model}"'] if model else []), *([selector] if selector else [])]
    everything = f"{_FAMILIES}{''.join(f',{g}' for g in given)}}}"
    names = source.names("__name__", start=start_s, end=end_s, match=everything)
    if not names and model:
        raise MeasurementFailed(f"{source.shown}: no metrics of model {model!r} in the range{_models(source, start_s, end_s)}")
    kind, arrived_name, arrived_at = engine_of(names, engine, source.shown)
    spelled = {canonical(name): name for name in names}
    labels = [*given, *(f'{label}=~"{values}"' for label, values in kind.selector.items())]
    query = f"{spelled[arrived_name]}{{{','.join(labels)}}}"
    if step_s is None:
        arrived = counters.merged(list(_raw(source, query, start_s, end_s)))
    else:
        arrived = counters.merged(list(_stepped(source, query, start_s, end_s, step_s)))
    coarse_s = max(range_s / _COARSE_STEPS, step_s or counters.scrape_s(arrived) or 1.0)
    others: dict[str, tuple[Series, ...]] = {}
    for name in wanted(kind):
        if name in spelled:
            found = list(_stepped(source, f"{spelled[name]}{{{','.join(labels)}}}", start_s, end_s, coarse_s))
            others[name] = tuple(counters.merged(found))
    return Metrics(
        engine=kind,
        start_s=start_s,
        end_s=end_s,
        arrived_name=arrived_name,
        arrived_at=arrived_at,
        arrived=tuple(arrived),
        others=others,
    )


def exported(path: Path, *, engine: str | None, model: str | None, wanted: Callable[[Engine], tuple[str, ...]] = wanted_names) -> Metrics:
    """Return the metrics of a file: answers of query_range as JSON (one, a list, or one a line), or a CSV with one series per column."""
    series = [s for s in _read(path) if model is None or s.labels.get("model_name") in (model, None)]
    kind, arrived_name, arrived_at = engine_of([s.name for s in series], engine, str(path))
    by_name: dict[str, list[Series]] = {}
    for one in series:
        if _selected(one, kind):
            by_name.setdefault(canonical(one.name), []).append(one)
    arrived = counters.merged(by_name.get(arrived_name, []))
    if not arrived:
        raise MeasurementFailed(f"{path}: {arrived_name} has no samples of requests that were served")
    return Metrics(
        engine=kind,
        start_s=min(float(s.times_s[0]) for s in arrived),
        end_s=max(float(s.times_s[-1]) for s in arrived),
        arrived_name=arrived_name,
        arrived_at=arrived_at,
        arrived=tuple(arrived),
        others={name: tuple(counters.merged(found)) for name, found in by_name.items() if name in wanted(kind)},
    )


# ---------------------------------------------------------------- queries


def _raw(source: Server, query: str, start_s: float, end_s: float) -> Iterator[Series]:
    """Yield every sample of a range, piece by piece: as many seconds at a time as the answer may hold."""
    spacing_s, series = _density(source, query, start_s, end_s)
    piece_s = spacing_s * max(2.0, min(MAX_POINTS - 10, _CHUNK_SAMPLES / max(series, 1)))
    at_s = start_s
    while at_s < end_s:
        until_s = min(at_s + piece_s, end_s)
        seconds = max(1, math.ceil(until_s - at_s))  # the piece may begin a little early: what two pieces hold counts once
        found = _matrix(source.get("query", query=f"{query}[{seconds}s]", time=until_s), source.shown)
        yield from _within(found, at_s, until_s, _ROUNDED_S, source.shown)
        at_s = until_s


def _density(source: Server, query: str, start_s: float, end_s: float) -> tuple[float, int]:
    """Return the least time between samples and the number of series, from the last, the middle and the first ten minutes of a range."""
    look_s = min(600.0, end_s - start_s)
    for at_s in (end_s, (start_s + end_s + look_s) / 2, start_s + look_s):
        found = list(_matrix(source.get("query", query=f"{query}[{max(1, math.ceil(look_s))}s]", time=at_s), source.shown))
        steps = [float(np.median(np.diff(s.times_s))) for s in found if len(s.times_s) > 1]
        if steps:
            return max(min(steps), 0.1), len(found)
    return 1.0, 1


def _stepped(source: Server, query: str, start_s: float, end_s: float, step_s: float) -> Iterator[Series]:
    """Yield the samples of a range every `step_s`, piece by piece within the limit of points."""
    at_s, last = start_s, math.floor((end_s - start_s) / step_s)
    for first in range(0, last + 1, MAX_POINTS - 10):
        at_s = start_s + first * step_s
        until_s = start_s + min(first + MAX_POINTS - 11, last) * step_s
        found = _matrix(source.get("query_range", query=query, start=at_s, end=until_s, step=step_s), source.shown)
        yield from _within(found, at_s, until_s, max(_ROUNDED_S, step_s), source.shown)


def _within(found: Iterator[Series], start_s: float, end_s: float, slack_s: float, where: str) -> Iterator[Series]:
    """Yield what an answer holds of the time asked for, whose ends a proxy may round.  Raises BadInput for an answer to another."""
    for one in found:
        if one.times_s.min() < start_s - slack_s or one.times_s.max() > end_s + slack_s:
            raise BadInput(
                f"{where}: {one.name}: answers with samples of another time than it was asked for; "
                "is it a Prometheus server, and are its times Unix seconds?"
            )
        kept = (one.times_s >= start_s - _TICK_S) & (one.times_s <= end_s + _TICK_S)
        if kept.any():
            yield dataclasses.replace(one, times_s=one.times_s[kept], values=one.values[kept])


def _check_range(range_s: float, step_s: float | None) -> None:
    """Raise BadInput for a range without time, and for one with more steps than a person would wait for."""
    if not 0 < range_s <= _LONGEST_S:
        raise BadInput(f"--range: {units.show_s(range_s)} of metrics cannot be asked for; give from above 0s to 730d")
    if step_s is not None and not step_s > 0:
        raise BadInput(f"--step: {units.show_s(step_s)} is no step; give a time above zero, e.g. 60s")
    if step_s is not None and step_s > range_s:
        raise BadInput(f"--step: {units.show_s(step_s)} is longer than the range of {units.show_s(range_s)}; give a shorter one, or auto")
    if step_s is not None and range_s / step_s > _MOST_STEPS:
        raise BadInput(f"--step: {range_s / step_s:.2g} steps in a range are more than {_MOST_STEPS:,}; give a longer --step")


def _models(source: Server, start_s: float, end_s: float) -> str:
    names = source.names("model_name", start=start_s, end=end_s, match=f"{_FAMILIES}}}")
    return f"; it has {', '.join(map(repr, names))}" if names else ""


def _matrix(data: Any, where: str) -> Iterator[Series]:
    """Yield the series of an answer."""
    if not isinstance(data, dict) or data.get("resultType") != "matrix":
        raise BadInput(f"{where}: the answer is no matrix: export the result of query_range, or of a range such as NAME[1h]")
    try:
        rows = [
            ({k: str(v) for k, v in row["metric"].items()}, [(float(t), float(v)) for t, v in row.get("values", ()) if v != "NaN"])
            for row in data["result"]
        ]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise BadInput(f"{where}: is not the answer of query_range: {error!r}") from error
    for labels, samples in rows:
        if samples:
            times, values = np.array(samples).T
            _check_samples(times, values, f"{where}: {labels.get('__name__', 'a series')}")
            _check_edge(labels.get("__name__", ""), labels, where)
            yield Series(name=labels.pop("__name__", ""), labels=labels, times_s=times.copy(), values=values.copy())


def _check_samples(times_s: npt.NDArray[np.float64], values: npt.NDArray[np.float64], where: str) -> None:
    """Raise BadInput for what no counter can have shown, and for times so far apart that one of them must be wrong."""
    if not (np.isfinite(times_s).all() and np.isfinite(values).all()):
        raise BadInput(f"{where}: has a sample that is no finite number; export the raw counters")
    if len(values) and np.abs(values).max() > _MOST_COUNTED:
        raise BadInput(f"{where}: has a sample of {np.abs(values).max():.3g}, which no server counted; export the raw counters")
    if len(times_s) and times_s.max() - times_s.min() > _LONGEST_S:
        raise BadInput(f"{where}: its samples lie more than two years apart; is one of the times in another unit?")


def _check_edge(name: str, labels: dict[str, str], where: str) -> None:
    """Raise BadInput for a bucket of a histogram that does not say up to where it counts."""
    try:
        is_known = not name.endswith("_bucket") or not math.isnan(float(labels["le"]))
    except (KeyError, ValueError):
        is_known = False
    if not is_known:
        raise BadInput(f"{where}: {name}: le={labels.get('le')!r} is no edge of a bucket; export the raw counters, not a sum of them")


# ---------------------------------------------------------------- files


def _read(path: Path) -> list[Series]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    found = list(_from_json(text, path) if text.lstrip()[:1] in ("{", "[") else _from_csv(text, path))
    if found and not any(s.name for s in found):
        raise BadInput(f"{path}: its series have no names; export the counters themselves (vllm:request_success_total), not a rate of them")
    return found


def _from_json(text: str, path: Path) -> Iterator[Series]:
    try:
        documents = [json.loads(text)]
    except (ValueError, RecursionError):
        documents = [_json(line.encode(), str(path)) for line in text.splitlines() if line.strip()]
    for document in documents:
        for answer in document if isinstance(document, list) else [document]:
            data = answer.get("data", answer) if isinstance(answer, dict) else answer
            yield from _matrix(data, str(path))


def _from_csv(text: str, path: Path) -> Iterator[Series]:
    """Yield the series of a table: a column of times, then one column per series, headed by its name and labels."""
    rows = [row for row in csv.reader(io.StringIO(_FOR_EXCEL.sub("", text))) if row]
    if len(rows) < 2 or rows[0][0].strip().lower() not in ("time", "timestamp"):
        raise BadInput(f"{path}: is no export of metrics: a JSON answer of query_range, or a CSV that begins with a column Time")
    times = np.array([_time_s(row[0], path) for row in rows[1:]])
    for column, head in enumerate(rows[0][1:], 1):
        cells = [row[column].strip() if column < len(row) else "" for row in rows[1:]]
        given = np.array([cell.lower() not in ("", "nan", "null", "undefined") for cell in cells])
        if given.any():
            name, labels = _head(head, path)
            values = np.array([_value(cell, path) for cell, known in zip(cells, given, strict=True) if known])
            _check_samples(times[given], values, f"{path}: {name}")
            _check_edge(name, labels, str(path))
            yield Series(name=name, labels=labels, times_s=times[given], values=values)


def _head(text: str, path: Path) -> tuple[str, dict[str, str]]:
    name, brace, rest = text.strip().partition("{")
    if not brace:
        return name.strip(), {}
    labels = dict(_LABEL.findall(rest))
    if not rest.rstrip().endswith("}"):
        raise BadInput(f'{path}: the column {text!r} is no series; write NAME{{label="value"}}')
    return (labels.pop("__name__", "") or name).strip(), labels


def _time_s(text: str, path: Path) -> float:
    import datetime

    try:
        value = float(text)
    except ValueError:
        try:
            moment = datetime.datetime.fromisoformat(text.strip())
        except ValueError:
            raise BadInput(f"{path}: {text!r} is no time; write Unix seconds, milliseconds or a date") from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
    if not math.isfinite(value):
        raise BadInput(f"{path}: {text!r} is no time; write Unix seconds, milliseconds or a date")
    return value / 1000 if value > 1e11 else value


def _value(text: str, path: Path) -> float:
    try:
        return units.plain(text)
    except ValueError:
        raise BadInput(f"{path}: {text!r} is no number; export raw values without units") from None


def _selected(series: Series, engine: Engine) -> bool:
    return all(re.fullmatch(values, series.labels.get(label, "")) for label, values in engine.selector.items())


def _bare(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadInput(f"{where}: what came is not JSON; is it the address of a Prometheus server?") from None


def is_export(path: Path) -> bool:
    """Whether a file looks like an export of metrics and not like a trace."""
    with path.open("rb") as file:
        start = file.read(4096)
    named = b'"resultType"' in start or b'"__name__"' in start
    return named or bool(re.match(rb"(?i)\W*(sep=.\s+\W*)?(Time|Timestamp)\W+.*(vllm|sglang|mlsys)[:_]", start))
