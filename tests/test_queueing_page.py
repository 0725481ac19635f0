"""The examples of docs/queueing.md are run, and print what the page says they print."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "queueing.md"
EXAMPLE = re.compile(r"```python\n(?P<code>.*?)```\n\n```\n(?P<output>.*?)```\n", re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
SIMULATED = "# simulated"  # such figures move with the seed and the machine: a few percent are allowed


def examples() -> list[re.Match[str]]:
    return list(EXAMPLE.finditer(PAGE.read_text()))


def printed(code: str, names: dict[str, object]) -> str:
    """Return what a piece of the page prints, run after the pieces before it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, str(PAGE), "exec"), names)
    return out.getvalue()


def numbers(text: str) -> list[float]:
    return [float(n.replace(",", "")) for n in NUMBER.findall(text)]


def test_the_examples_print_what_the_page_says() -> None:
    """Words to the letter, numbers within 1 % (the last digit may round either way), simulated ones within 12 %."""
    page, names = PAGE.read_text(), dict[str, object]()
    found = examples()
    assert len(found) >= 12
    for example in found:
        code, said = example["code"], printed(example["code"], names)
        if os.environ.get("MLSYS_UPDATE_GOLDEN"):
            page = page.replace(example[0], f"```python\n{code}```\n\n```\n{said}```\n")
            continue
        stale = f"{PAGE.name} is stale: MLSYS_UPDATE_GOLDEN=1 python -m pytest {Path(__file__).name}\n{code}\n{said}"
        assert NUMBER.sub("#", said) == NUMBER.sub("#", example["output"]), stale
        assert numbers(said) == pytest.approx(numbers(example["output"]), rel=0.12 if SIMULATED in code else 0.01), stale
    if os.environ.get("MLSYS_UPDATE_GOLDEN"):
        PAGE.write_text(page)


def test_every_picture_is_on_the_page_and_every_picture_on_the_page_exists() -> None:
    shown = set(re.findall(r"\(images/(queueing-[a-z-]+\.svg)\)", PAGE.read_text()))
    assert shown == {path.name for path in (PAGE.parent / "images").glob("queueing-*.svg")}
    assert shown
