"""What a load test asked, and the figure of an MLPerf scenario, in words."""

from __future__ import annotations

from mlsys_bench.askings import Asked, ScenarioResult
from mlsys_bench.report.parts import Fact, digits, percent, time
from mlsys_bench.types import LoadTest
from mlsys_bench.units import count


def facts(r: LoadTest) -> list[Fact]:
    """Return what requests asked beside what the server counted, and the scenario where it was one."""
    found = [_asked(r.asked)] if r.asked is not None else []
    return [*found, _scenario(r.scenario)] if r.scenario is not None else found


def _asked(a: Asked) -> Fact:
    lengths = [
        _beside("prompt", a.prompt_tokens, a.prompt_tokens_counted),
        _beside("output", a.output_tokens, a.output_tokens_counted),
    ]
    shared = f"an endless prefix cache would have {percent(100 * a.shared_prefix)} of the prompts" if a.shared_prefix else ""
    sessions = count(a.sessions, "session") if a.sessions is not None else ""
    images = f"{a.images} image{'s' * (a.images > 1)} each" if a.images else ""
    details = [part for part in (a.what, images, sessions, shared, *a.notes) if part]
    return Fact("Asked", ", ".join(length for length in lengths if length), "; ".join(details), "measured")


def _beside(what: str, asked: float | None, counted: float | None) -> str:
    if asked is None:
        return f"{digits(counted)} {what} tokens counted" if counted is not None else ""
    seen = "not counted by the server" if counted is None else f"counted {digits(counted)}"
    return f"{digits(asked)} {what} tokens ({seen})"


def _scenario(s: ScenarioResult) -> Fact:
    value = "no figure" if s.value is None else time(s.value) if s.unit == "s" else f"{digits(s.value)} {s.unit}"
    plain = "" if s.plain_value is None else f"plain percentile {time(s.plain_value)}; "
    many = f" of {s.samples_per_query:,} samples" if s.samples_per_query > 1 else ""
    queries = f"{s.queries:,} quer{'ies' if s.queries != 1 else 'y'}{many}"
    return Fact(
        f"MLPerf {s.scenario}",
        f"{s.metric}: {value}",
        f"{plain}{queries}; {'; '.join([*s.shortfalls, s.source])}",
        "measured",
        "" if not s.shortfalls else "unsure",
    )
