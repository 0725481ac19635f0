"""Chats as the text that a model continues: Jinja templates as Hugging Face tokenizers carry them, in a sandbox."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlsys_bench.errors import BadInput


class Template:
    """A chat template.  `names` are the special tokens it may use: bos_token, eos_token ..."""

    def __init__(self, source: str, names: Mapping[str, str] | None = None) -> None:
        self._source, self._names = source, dict(names or {})

    def render(self, messages: Sequence[Mapping[str, Any]], /, **settings: Any) -> str:
        """Return the text, open for the assistant's answer.  Raises BadInput with what the template, or its author, has to say."""
        import jinja2

        given = {"add_generation_prompt": True, "tools": None, "documents": None, **self._names, **settings}
        try:
            return str(self._template.render({**given, "messages": [dict(m) for m in messages]}))
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise BadInput(f"the model's chat template does not take these messages: {error}") from None

    @functools.cached_property
    def _template(self) -> Any:
        """The compiled source, read when the first chat comes."""
        return _environment().from_string(self._source)


@functools.cache
def _environment() -> Any:
    """Return where templates run, with what those of Hugging Face expect (transformers' `render_jinja_template`), and nothing else.

    A template is a program that came with the weights: it may neither reach Python's insides nor change what it is given.
    """
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks for trainers what the assistant says; the text is what stands in it."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    extensions = ["jinja2.ext.loopcontrols", Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().astimezone().strftime(form)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Return JSON as it is: Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> str:
    """End a template that does not like what it was given."""
    raise ValueError(message)


# for models that were never taught a form of chat
PLAIN = Template(
    "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
