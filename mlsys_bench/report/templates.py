"""The templates that ship with the package, read strictly: a name nobody gave is an error, not an empty place."""

from __future__ import annotations

import re

import jinja2

from mlsys_bench import resources

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~$])")


def environment(*, escape: bool) -> jinja2.Environment:
    """Return the template environment; `escape` for HTML."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(resources.folder("templates")),
        autoescape=escape,  # noqa: S701  # off for Markdown only, whose filter `md` escapes
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["md"] = markdown_text
    return made


def markdown_text(text: str) -> str:
    """Escape what Markdown would read as markup, so that names stay names and a table keeps its columns."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(text).split()))
