"""loadtest --dry-run: the schedule as a table, as figures, and as a file that `--trace` replays."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlsys_bench import loadtest, record, stats, units
from mlsys_bench.units import count
from mlsys_bench.workload import Schedule, prefix, trace
from mlsys_bench.workload.schedule import Ints, nominal_s

_FIRST, _LAST = 20, 5  # rows that a terminal shows


def text(plan: loadtest.Options, drawn: Schedule, *, in_full: bool) -> str:
    """Return the schedule as a table, with what it adds up to below it."""
    columns = _columns(plan, drawn)
    shown = list(range(len(drawn)))
    hidden = 0 if in_full else max(0, len(drawn) - _FIRST - _LAST)
    if hidden:
        shown = [*shown[:_FIRST], *shown[-_LAST:]]
    cells = [list(columns), *([column[row] for column in columns.values()] for row in shown)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    if hidden:
        lines.insert(1 + _FIRST, f"… {hidden:,} more: -o FILE.csv, -o FILE.json or --json give them all")
    return "\n".join([*lines, "", *_sentences(plan, drawn)])


def write(plan: loadtest.Options, drawn: Schedule, path: Path) -> Path:
    """Write the schedule: JSON where the name ends so, else a CSV that `--trace` replays."""
    if path.suffix.lower() == ".json":
        return record.write_text(path, as_json(plan, drawn) + "\n")
    return trace.write(drawn, path)


def as_json(plan: loadtest.Options, drawn: Schedule) -> str:
    """Return the schedule and its figures as JSON."""
    rows = [dict(zip(_FIELDS, values, strict=True)) for values in zip(*_values(drawn).values(), strict=True)]
    requests = [{name: value for name, value in row.items() if value is not None} for row in rows]
    return json.dumps({"summary": figures(plan, drawn), "requests": requests}, allow_nan=False, indent=1)


def figures(plan: loadtest.Options, drawn: Schedule) -> dict[str, Any]:
    """Return what a schedule adds up to.  Rates and gaps are of the requests that have a time; there are none in a closed loop."""
    times = np.sort(drawn.scheduled_s[~np.isnan(drawn.scheduled_s)])
    lasts_s = loadtest.sends_for_s(plan)
    found: dict[str, Any] = {
        "requests": len(drawn),
        "prompt_tokens": int(drawn.prompt_tokens.sum()),
        "output_tokens": int(drawn.output_tokens.sum()),
    }
    if plan.users is None and plan.offline is None:
        gaps = np.diff(times)
        found |= {
            "arrivals": len(times),
            "lasts_s": lasts_s,
            "rate_per_s": len(times) / lasts_s,
            "gap_scv": round(float(stats.scv(gaps)), 9) if len(gaps) > 1 and gaps.mean() > 0 else None,
            "peak_1s": int(np.bincount(times.astype(np.int64)).max()) if len(times) else 0,
        }
    if drawn.prefix_hashes is not None:
        found["shared_prefix"] = prefix.hit_share(_in_order(drawn))
    if drawn.session is not None:
        found["sessions"] = len(np.unique(drawn.session))
    if drawn.tenant is not None:
        found["tenants"] = {name: float(np.mean(drawn.tenant == i)) for i, name in enumerate(drawn.tenants)}
    return found


def _in_order(drawn: Schedule) -> Schedule:
    from mlsys_bench.workload import take

    return take(drawn, np.argsort(nominal_s(drawn), kind="stable"))


def _sentences(plan: loadtest.Options, drawn: Schedule) -> list[str]:
    found = figures(plan, drawn)
    lines = [_how_many(plan, drawn, found)]
    for what, tokens in (("prompt", drawn.prompt_tokens), ("output", drawn.output_tokens)):
        if len(tokens):
            lines.append(f"{what} tokens: {_spread(tokens)}, {int(tokens.sum()):,} in all{_about(plan, what)}")
    if "shared_prefix" in found:
        lines.append(f"shared prefixes: an endless cache would have {units.show_share(found['shared_prefix'])} of the prompt tokens")
    if "sessions" in found:
        waiting = int(np.isnan(drawn.scheduled_s).sum())
        how = f"; {waiting:,} turns wait for the answer before them" if waiting else ", at times of their own"
        lines.append(f"sessions: {found['sessions']:,}{how}")
    if "tenants" in found:
        lines.append("tenants: " + ", ".join(f"{name} {units.show_share(share)}" for name, share in found["tenants"].items()))
    data = plan.content.dataset
    if data is not None:
        lines += [f"data set: {data.name}, {len(data.rows):,} rows, used {len(drawn) / len(data.rows):.2g} times", *data.notes]
    if plan.preset is not None:
        lines.append(f"preset: MLPerf {plan.preset.name}")
    return lines


def _how_many(plan: loadtest.Options, drawn: Schedule, found: dict[str, Any]) -> str:
    if plan.users is not None:
        users = f"{plan.users} users walk" if plan.users > 1 else "1 user walks"
        together = f", {plan.at_once} requests at once" if plan.at_once > 1 else ""
        mean_s = plan.think.mean_s if plan.think is not None else 0.0
        pace = f"with pauses of {units.show_s(mean_s)} on average" if mean_s else "as fast as answers come"
        return f"closed loop: {users} through these {len(drawn):,} lengths for {units.show_s(plan.duration_s)}{together}, {pace}"
    if plan.offline is not None:
        return f"{count(len(drawn), 'request')}, all of them at once"
    scv = "" if found["gap_scv"] is None else f", SCV of the gaps {found['gap_scv']:.3g}"
    return (
        f"{found['arrivals']:,} arrivals in {units.show_s(found['lasts_s'])}: {found['rate_per_s']:.4g}/s{scv}, "
        f"{found['peak_1s']:,} in the busiest second"
    )


def _spread(tokens: Ints) -> str:
    low, mean, high = int(tokens.min()), float(tokens.mean()), int(tokens.max())
    return f"{low:,} each" if low == high else f"mean {mean:,.4g}, {low:,} to {high:,}"


def _about(plan: loadtest.Options, what: str) -> str:
    return " (about, by their characters)" if plan.content.dataset is not None and what == "prompt" else ""


# ---------------------------------------------------------------- columns

_FIELDS = ("index", "scheduled_s", "gap_s", "prompt_tokens", "output_tokens", "shared_tokens", "tenant", "session", "turn")


def _values(drawn: Schedule) -> dict[str, Sequence[Any]]:
    """Return a list by field; a value is None where a request has none."""
    n = len(drawn)
    none: list[Any] = [None] * n
    waits = np.isnan(drawn.scheduled_s)
    gaps = none if drawn.gap_s is None else [g if w else None for g, w in zip(drawn.gap_s.tolist(), waits.tolist(), strict=True)]
    return {
        "index": range(n),
        "scheduled_s": [None if math.isnan(t) else t for t in drawn.scheduled_s.tolist()],
        "gap_s": gaps,
        "prompt_tokens": drawn.prompt_tokens.tolist(),
        "output_tokens": drawn.output_tokens.tolist(),
        "shared_tokens": none if drawn.prefix_hashes is None else _shared(drawn).tolist(),
        "tenant": none if drawn.tenant is None else [drawn.tenants[i] for i in drawn.tenant.tolist()],
        "session": none if drawn.session is None else drawn.session.tolist(),
        "turn": none if drawn.turn is None else drawn.turn.tolist(),
    }


def _shared(drawn: Schedule) -> Ints:
    """Return the tokens of each prompt that lie in blocks which another prompt has, too."""
    assert drawn.prefix_offsets is not None
    assert drawn.prefix_hashes is not None
    _, which, counts = np.unique(drawn.prefix_hashes, return_inverse=True, return_counts=True)
    row = np.repeat(np.arange(len(drawn)), np.diff(drawn.prefix_offsets))
    blocks = np.bincount(row[counts[which] > 1], minlength=len(drawn))
    return np.minimum(blocks * drawn.prefix_block_tokens, drawn.prompt_tokens)


def _columns(plan: loadtest.Options, drawn: Schedule) -> dict[str, list[str]]:
    values = _values(drawn)
    kept = [name for name in _FIELDS[1:] if any(value is not None for value in values[name])]
    columns = {name: [_cell(name, value) for value in values[name]] for name in kept}
    if plan.users is not None:
        del columns["scheduled_s"]
        return {"index": [str(i) for i in range(len(drawn))], **columns}
    return columns


def _cell(name: str, value: Any) -> str:
    if name == "scheduled_s" and value is None:
        return "waits"
    if value is None:
        return ""
    return f"{value:.6f}" if isinstance(value, float) else str(value)
