"""Documents as YAML files, with where they come from on top."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mlsys_bench import record
from mlsys_bench.errors import BadInput

Document = dict[str, Any]


def yaml_of(found: Sequence[Document], heading: Iterable[str]) -> str:
    """Return documents as YAML under lines of comment."""
    import yaml

    class Plain(yaml.SafeDumper):
        """What stands twice is written twice: anchors puzzle readers and some tools."""

        def ignore_aliases(self, data: object) -> bool:
            """Say that nothing is an alias."""
            return True

    notes = "".join(f"# {line}\n" for line in heading)
    body: str = yaml.dump_all(found, Dumper=Plain, sort_keys=False, allow_unicode=True, width=140, explicit_start=len(found) > 1)
    return notes + body


def save(asked: str, folder: str, name: str, content: str) -> Path:
    """Write a manifest into a folder, here where none is named, and return the file.  Raises BadInput where that cannot be."""
    return record.write_text(writable(asked, folder) / name, content)


def writable(asked: str, folder: str) -> Path:
    """Return the folder of manifests, made where it is missing, here where none is named.  Raises BadInput where none can be put there."""
    path = Path(folder or ".")
    if path.exists() and not path.is_dir():
        raise BadInput(f"--export {asked}: {path} is no folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--export {asked}: {path} cannot be made: {error.strerror or error}; name another folder") from error
    if not os.access(path, os.W_OK):
        raise BadInput(f"--export {asked}: {path} cannot be written to; name another folder")
    return path
