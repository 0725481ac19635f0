"""What the documents say of the commands is what the commands say of themselves."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from mlsys_cli.main import app

ROOT = Path(__file__).parent.parent
COMMANDS = ROOT / "docs" / "commands.md"
STATUSES = """\
Exit status: 0 done · 1 the answer is no (SLO missed, infeasible plan, regression) · 2 bad input or usage · 3 inconclusive or only
suspect · 4 not comparable · 5 the measurement failed, or nothing was measured · 130 interrupted · 70 a bug.

Text for people goes to stdout, trouble to stderr, progress only to a terminal. `--json` prints the record and nothing else.
"""


def commands() -> Iterator[tuple[str, str]]:
    """Every command with its help, as a terminal of 100 columns shows it."""

    def walk(command: object, path: list[str], parent: object) -> Iterator[tuple[str, str]]:
        context = command.make_context(" ".join(path), [], parent=parent, resilient_parsing=True)  # type: ignore[attr-defined]
        if hasattr(command, "commands"):
            for name, child in command.commands.items():
                yield from walk(child, [name], context)
        else:
            yield context.command_path, "\n".join(line.rstrip() for line in context.get_help().splitlines())

    yield from walk(typer.main.get_command(app), ["mlsys"], None)


def document() -> str:
    parts = ["# Commands\n", "Made from `--help` by `MLSYS_UPDATE_GOLDEN=1 python -m pytest tests/test_docs.py`.\n", STATUSES]
    parts += [f"## `{path}`\n\n```\n{text}\n```\n" for path, text in commands()]
    return "\n".join(parts)


def test_the_command_page_is_what_help_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = document()
    if os.environ.get("MLSYS_UPDATE_GOLDEN"):
        COMMANDS.write_text(text)
    assert COMMANDS.read_text() == text, "docs/commands.md is stale: MLSYS_UPDATE_GOLDEN=1 python -m pytest tests/test_docs.py"


@pytest.mark.parametrize("path", [path for path, _ in commands()])
def test_every_command_explains_itself(path: str) -> None:
    text = dict(commands())[path]
    assert len(text.splitlines()[2].strip()) > 10


PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_in_documents_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert missing == []


def test_the_paths_that_the_house_names_exist() -> None:
    """A newcomer follows docs/architecture.md to the formula: every file it names is there, and so is the function."""
    table = re.findall(r"`((?:cli/)?[a-z_/]+\.py): (\w+(?:\.\w+)?)", (ROOT / "docs/architecture.md").read_text())
    assert len(table) >= 10
    for file, name in table:
        path = ROOT / file if file.startswith("cli/") else ROOT / "mlsys_bench" / file
        assert path.exists(), file
        assert re.search(rf"(def|class) {name.split('.')[-1]}\b", path.read_text()), f"{file}: {name}"


def test_every_decision_says_what_would_change_it() -> None:
    pages = sorted((ROOT / "docs/adr").glob("[0-9]*.md"))
    assert pages
    for page in pages:
        assert "What would change our mind" in page.read_text(), page.name
