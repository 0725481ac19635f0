"""May two machines' results be set side by side?"""

from __future__ import annotations

from mlsys_bench.types import Machine, Scalar


def differences(base: Machine, cand: Machine) -> tuple[str, ...]:
    """Return one line per hard field that differs, or that only one side knows.  Any line forbids a verdict."""
    return tuple(
        f"{name}: {_show(base.hard.get(name))} -> {_show(cand.hard.get(name))}"
        for name in sorted({*base.hard, *cand.hard})
        if base.hard.get(name) != cand.hard.get(name)
    )


def remarks(base: Machine, cand: Machine) -> tuple[str, ...]:
    """Return what does not forbid a verdict but belongs beside it: fields nobody knows, soft fields that changed.

    Soft figures (load, temperature) always move; only settings (text, switches, whole numbers) are worth a line.
    """
    unknown = [n for n in sorted({*base.hard, *cand.hard}) if base.hard.get(n) is None and cand.hard.get(n) is None]
    changed = [
        f"{name} {_show(base.soft.get(name))} -> {_show(cand.soft.get(name))}"
        for name in sorted({*base.soft, *cand.soft})
        if base.soft.get(name) != cand.soft.get(name) and not isinstance(base.soft.get(name, cand.soft.get(name)), float)
    ]
    lines = []
    if unknown:
        lines.append(f"unknown on both sides, so not checked: {', '.join(unknown)}")
    if changed:
        lines.append(f"soft fields changed: {'; '.join(changed)}")
    return tuple(lines)


def _show(value: Scalar) -> str:
    return "unknown" if value is None else str(value)
