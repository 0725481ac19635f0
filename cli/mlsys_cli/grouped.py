"""Help of a command with many options, under headings."""

from __future__ import annotations

from typing import Any

from mlsys_cli.lean import Lean


def grouped(groups: dict[str, tuple[str, ...]]) -> type[Lean]:
    """Return a kind of command whose help lists its options under these headings, by parameter name; the others come last."""

    class Grouped(Lean):
        def format_options(self, ctx: Any, formatter: Any) -> None:
            """Write arguments, then each group."""
            heading = {name: title for title, names in groups.items() for name in names}
            sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{title: [] for title in groups}, "Other options": []}
            for param in self.get_params(ctx):
                found = param.get_help_record(ctx)
                if found is not None:
                    is_option = param.param_type_name == "option"
                    sections[heading.get(param.name or "", "Other options") if is_option else "Arguments"].append(found)
            for title, rows in sections.items():
                if rows:
                    with formatter.section(title):
                        formatter.write_dl(rows)

    return Grouped
