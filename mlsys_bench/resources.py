"""Find what ships with the package: scenarios, report templates, catalogues."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent
_IN_CHECKOUT = {"scenarios": "scenarios", "templates": "reports/templates"}


def folder(name: str) -> Path:
    """Return the shipped 'scenarios' or 'templates': inside an installed package, beside it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / _IN_CHECKOUT[name]


def catalogue(name: str) -> Path:
    """Return a shipped catalogue, e.g. 'models.csv'."""
    return _PACKAGE / "data" / name
