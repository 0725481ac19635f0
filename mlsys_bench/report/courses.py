"""The course of a load test in words and in characters: what counts, whether it settled, how it went."""

from __future__ import annotations

from collections.abc import Sequence

from mlsys_bench.report.parts import Fact, Tone, digits, time
from mlsys_bench.timelines import Timeline
from mlsys_bench.types import LoadTest

BARS = " ▁▂▃▄▅▆▇█"
WIDE = 56  # characters of a line over time
_LABEL = 14
_SAID: dict[str, tuple[str, Tone]] = {
    "steady": ("steady", "good"),
    "not_steady": ("not steady", "unsure"),
    "over_saturated": ("over-saturated", "bad"),
    "too_short": ("too few answers to say whether it is steady", ""),
}


def facts(run: LoadTest) -> list[Fact]:
    """Return what of the run counts and whether it settled, nothing for a simulation."""
    found, course = run.steadiness, run.timeline
    if found is None or course is None:
        return []
    said, tone = _SAID[found.verdict]
    start, end = course.window_s
    return [Fact("Window", f"{time(start, end)} to {time(end)}, {said}", _warmup(found.warmup_s, found.decided_by), "measured", tone)]


def _warmup(warmup_s: float, decided_by: str) -> str:
    if decided_by == "given":
        return f"warm-up of {time(warmup_s)} given"
    if not warmup_s:
        return "no warm-up to leave out"
    return f"warm-up of {time(warmup_s)} left out, found in {decided_by}" if not decided_by.startswith("the first") else decided_by


def tokens(run: LoadTest) -> str:
    """Return who counted the tokens, and how fast one user reads."""
    words = {"usage": "the server (usage)", "chunks": "events", "tokenizer": "a tokenizer", "simulated": "the simulation"}
    sources = " and ".join(words[name] for name in run.token_sources)
    user = f"{digits(1 / run.tpot_s.p50)}/s for each user (1 / TPOT p50)" if run.tpot_s.p50 else ""
    return "; ".join(part for part in (user, f"counted by {sources}" if sources else "") if part)


def drawing(run: LoadTest) -> tuple[str, ...]:
    """Return the course as lines of bars, each scaled to its own largest value, the window marked below."""
    course = run.timeline
    if course is None or len(course.offered) < 4:
        return ()
    failed = [sum(each) for each in zip(*course.failed.values(), strict=True)] if course.failed else []
    per_s = 1 / course.step_s
    rows = [
        _row("offered", [n * per_s for n in course.offered], "/s"),
        _row("completed", [n * per_s for n in course.completed], "/s"),
        _row("failed", [n * per_s for n in failed], "/s") if any(failed) else "",
        _row("in flight", course.in_flight, ""),
        _row("TTFT p95", course.ttft_p95_s, "s"),
        _row("E2E p95", course.e2e_p95_s, "s"),
    ]
    return (*(row for row in rows if row), _window(course))


def _row(name: str, values: Sequence[float | None], unit: str) -> str:
    """Return a line: name, bars, its largest value."""
    seen = folded(values, WIDE)
    most = max((v for v in seen if v is not None), default=0.0)
    each = WIDE // len(seen)
    bars = "".join(each * (" " if v is None else BARS[0 if v <= 0 else max(1, round(v / most * 8))]) for v in seen)
    return f"{name:<{_LABEL}}{bars:<{WIDE}} {time(most) if unit == 's' else f'{digits(most)}{unit}'}" if most > 0 else ""


def folded(values: Sequence[float | None], most: int) -> list[float | None]:
    """Return values in at most so many steps, the mean of neighbours where there are more."""
    size = -(-len(values) // most)
    groups = [[v for v in values[i : i + size] if v is not None] for i in range(0, len(values), size)]
    return [sum(group) / len(group) if group else None for group in groups]


def _window(course: Timeline) -> str:
    steps = len(course.offered)
    folds = -(-steps // WIDE)
    characters = WIDE // -(-steps // folds) / (folds * course.step_s)  # a second
    start, end = (round(edge * characters) for edge in course.window_s)
    end = max(end, start + 2)
    return " " * (_LABEL + start) + "└" + " what counts ".center(end - start - 2, "─")[: end - start - 2] + "┘"
