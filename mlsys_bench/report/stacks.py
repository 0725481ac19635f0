"""A pool of GPUs as a picture: a stacked column for each hour, coloured by scenario, white for what is free; plain SVG."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator

from mlsys_bench.fleets import FleetPlan

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#5a616c")  # Okabe and Ito (2008)
WIDTH, HEIGHT, LEFT, TOP, GAP = 900.0, 150.0, 70.0, 46.0, 56.0  # of the page, of a panel, and around it, in pixels
FONT = 'font-family="system-ui, DejaVu Sans, sans-serif" font-size="13"'


def uri(record: FleetPlan) -> str:
    """Return the picture as a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg(record).encode()).decode()


def svg(record: FleetPlan) -> str:
    """Return a panel for each kind of GPU, one above the other, with one legend."""
    height = TOP + len(record.pool) * (HEIGHT + GAP)
    parts = [*_legend(record), *(line for i, gpu in enumerate(record.pool) for line in _panel(record, gpu, TOP + i * (HEIGHT + GAP) + 14))]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {height:g}" {FONT}>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>'
    )


def colours(record: FleetPlan) -> dict[str, str]:
    """Return the colour of each scenario."""
    return {each.name: COLOURS[i % len(COLOURS)] for i, each in enumerate(record.served)}


def _legend(record: FleetPlan) -> Iterator[str]:
    x = LEFT
    for name, colour in colours(record).items():
        yield f'<rect x="{x:g}" y="12" width="14" height="14" fill="{colour}"/>{_text(x + 20, 24, name)}'
        x += 44 + 8 * len(name)


def _panel(record: FleetPlan, gpu: str, top: float) -> Iterator[str]:
    """Yield one kind of GPU: its frame is what there is, its columns what is in use."""
    there, each = record.pool[gpu], (WIDTH - LEFT - 20) / len(record.hours)
    yield _text(LEFT, top - 5, f"{gpu}: {there} GPUs", "bold")
    yield f'<rect x="{LEFT:g}" y="{top:g}" width="{WIDTH - LEFT - 20:g}" height="{HEIGHT:g}" fill="#f4f6f8" stroke="#9aa3af"/>'
    for share in (0.0, 0.5, 1.0):
        yield _text(LEFT - 8, top + HEIGHT * (1 - share) + 4, f"{there * share:g}", anchor="end")
    for i, hour in enumerate(record.hours):
        base, x = top + HEIGHT, LEFT + i * each + 0.06 * each
        for name, n in hour.gpus[gpu].items():
            tall = HEIGHT * n / max(there, 1)
            base -= tall
            title = f"{name}: {n} of {there} {gpu}"
            yield (
                f'<rect x="{x:.1f}" y="{base:.1f}" width="{0.88 * each:.1f}" height="{tall:.1f}" fill="{colours(record)[name]}">'
                f"<title>{html.escape(title)}</title></rect>"
            )
        if any(share < 1 for share in hour.shares.values()):
            yield f'<rect x="{x:.1f}" y="{top - 3:.1f}" width="{0.88 * each:.1f}" height="5" fill="#b3470b"><title>cut</title></rect>'
        if len(record.hours) > 1 and i % max(1, len(record.hours) // 24 * 3 or 3) == 0:
            yield _text(x, top + HEIGHT + 16, f"{int(hour.start_s // 3600) % 24:02}:00")


def _text(x: float, y: float, words: str, weight: str = "normal", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-weight="{weight}" text-anchor="{anchor}" fill="#1f2430">{html.escape(words)}</text>'
