"""Manifests of a plan: Kubernetes, KEDA, KServe, OpenSLO, Prometheus rules.  Each is a list of documents, written as YAML.

What a manifest cannot know (namespace, storage of weights, ingress) is left to whoever applies it; what the plan does not say is a default
of the target and left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mlsys_bench.errors import BadInput, unknown
from mlsys_bench.plan.export import keda, kserve, kubernetes, openslo, prometheus
from mlsys_bench.plan.export.files import Document, save, yaml_of
from mlsys_bench.plan.export.release import Release, checked_name, pools, release

__all__ = ["KINDS", "Release", "documents", "pools", "release", "text", "write"]

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


def text(kind: str, *releases: Release) -> str:
    """Return the manifest as YAML, with where it comes from on top; of several releases, such as two pools, one after another."""
    lines = (line for of in releases for line in of.heading())
    return yaml_of([document for of in releases for document in documents(kind, of)], lines)


def write(asked: str, *releases: Release) -> Path:
    """Write what `--export KIND[:DIR]` asks for, as NAME-KIND.yaml in DIR, else here, and return the file.

    Raises BadInput for two pools as anything but Kubernetes objects: what else there is describes one kind of replica.
    """
    kind, _, folder = asked.partition(":")
    if len(releases) > 1 and kind in KINDS and kind != "k8s":
        raise BadInput(f"--export {kind}: prefill and decode are two deployments, and {kind} describes one; export k8s instead")
    name = releases[0].name if len(releases) == 1 else checked_name(releases[0].plan.model)
    return save(asked, folder, f"{name}-{kind}.yaml", text(kind, *releases))
