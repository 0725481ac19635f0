"""A KServe InferenceService (serving.kserve.io/v1beta1) of a plan.

Source: kserve.github.io, Hugging Face runtime with its vLLM backend and `storageUri: hf://…` (0.15, 0.16), read 2026-11-21.  vLLM runs in
KServe's own runtime, which passes the engine's flags on; other engines as a container of their own.
"""

from __future__ import annotations

from typing import Any

from mlsys_bench.plan import command
from mlsys_bench.plan.export import kubernetes
from mlsys_bench.plan.export.release import Release, one_node
from mlsys_bench.plan.flags import STARTS

Document = dict[str, Any]


def documents(of: Release) -> list[Document]:
    """Return the InferenceService, in the mode that makes plain Deployments: replicas of GPUs do not start on demand."""
    one_node(of)
    least = of.scaled.rule.least if of.scaled and not of.secured else of.replicas  # an availability is of all replicas, all day
    most = max(of.scaled.rule.most, of.replicas) if of.scaled else of.replicas
    placed = {
        key: value for key, value in kubernetes.pod(of).items() if key in ("nodeSelector", "tolerations", "topologySpreadConstraints")
    }
    predictor = {"minReplicas": least, "maxReplicas": most, **placed, **_engine(of)}
    meta = of.metadata()
    return [
        {
            "apiVersion": "serving.kserve.io/v1beta1",
            "kind": "InferenceService",
            "metadata": {**meta, "annotations": {"serving.kserve.io/deploymentMode": "RawDeployment"}},
            "spec": {"predictor": predictor},
        }
    ]


def _engine(of: Release) -> Document:
    if of.deployment.engine != "vllm":
        return {"containers": [kubernetes.container(of, "kserve-container")], "volumes": kubernetes.pod(of)["volumes"]}
    words = command.arguments(of.deployment)[len(STARTS["vllm"]) + 1 :]
    gpus = {of.gpu_resource: str(of.plan.devices_per_replica)}
    args = [f"--model_name={of.name}", *_without(words, ("--host", "--port"))]
    return {
        "model": {
            "modelFormat": {"name": "huggingface"},
            "storageUri": f"hf://{of.deployment.model}",
            "args": args,
            "resources": {"limits": gpus, "requests": gpus},
        }
    }


def _without(words: list[str], names: tuple[str, ...]) -> list[str]:
    """Return the words without these flags and their values: the runtime sets them."""
    return [word for k, word in enumerate(words) if word not in names and (k == 0 or words[k - 1] not in names)]
