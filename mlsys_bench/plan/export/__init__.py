"""Manifests of a plan: Kubernetes, KEDA, KServe, OpenSLO, Prometheus rules.  Each is a list of documents, written as YAML.

What a manifest cannot know (namespace, storage of weights, ingress) is left to whoever applies it; what the plan does not say is a default
of the target and left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlsys_bench import record
from mlsys_bench.errors import BadInput, unknown
from mlsys_bench.plan.export import keda, kserve, kubernetes, openslo, prometheus
from mlsys_bench.plan.export.release import Release, release

__all__ = ["KINDS", "Release", "documents", "release", "text", "write"]

Document = dict[str, Any]
KINDS: dict[str, Callable[[Release], list[Document]]] = {
    "k8s": kubernetes.documents,
    "keda": keda.documents,
    "kserve": kserve.documents,
    "openslo": openslo.documents,
    "prometheus-rules": prometheus.documents,
}


def documents(kind: str, of: Release) -> list[Document]:
    """Return the documents of one kind.  Raises UnknownName for another."""
    if kind not in KINDS:
        raise unknown("export", kind, KINDS)
    return KINDS[kind](of)


def text(kind: str, of: Release) -> str:
    """Return the manifest as YAML, with where it comes from on top."""
    import yaml

    class Plain(yaml.SafeDumper):
        """What stands twice is written twice: anchors puzzle readers and some tools."""

        def ignore_aliases(self, data: object) -> bool:
            """Say that nothing is an alias."""
            return True

    found = documents(kind, of)
    notes = "".join(f"# {line}\n" for line in of.heading())
    body: str = yaml.dump_all(found, Dumper=Plain, sort_keys=False, allow_unicode=True, width=140, explicit_start=len(found) > 1)
    return notes + body


def write(asked: str, of: Release) -> Path:
    """Write what `--export KIND[:DIR]` asks for, as NAME-KIND.yaml in DIR, else here, and return the file."""
    kind, _, folder = asked.partition(":")
    content = text(kind, of)
    path = Path(folder or ".") / f"{of.name}-{kind}.yaml"
    if path.parent.exists() and not path.parent.is_dir():
        raise BadInput(f"--export {asked}: {path.parent} is no folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    return record.write_text(path, content)
