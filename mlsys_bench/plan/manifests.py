"""A deployment that runs today, from its command line or from the Kubernetes manifest that starts it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlsys_bench.errors import BadInput
from mlsys_bench.plan import command
from mlsys_bench.plan.command import Deployment
from mlsys_bench.plan.flags import Engine

_SUFFIXES = (".yaml", ".yml", ".json")
_WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Pod", "Job", "InferenceService")
_GPUS = ("nvidia.com/gpu", "amd.com/gpu")
_GPU_LABELS = ("nvidia.com/gpu.product", "cloud.google.com/gke-accelerator", "karpenter.k8s.aws/instance-gpu-name")
_IMAGES: tuple[tuple[str, Engine], ...] = (
    ("vllm", "vllm"),
    ("sglang", "sglang"),
    ("tensorrt-llm", "trtllm"),
    ("huggingfaceserver", "vllm"),
)


def read(text: str) -> tuple[Deployment, ...]:
    """Return what `--from-deployment` names: the engines of a manifest, or the one that a command line starts."""
    path = Path(text)
    if path.suffix in _SUFFIXES and " " not in text.strip():
        return from_manifest(path)
    return (command.parse(text),)


def from_manifest(path: Path) -> tuple[Deployment, ...]:
    """Return every engine a manifest starts, in its order.  Raises BadInput where there is none."""
    import yaml

    try:
        documents = [d for d in yaml.safe_load_all(path.read_text(encoding="utf-8")) if isinstance(d, dict)]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: is no YAML: {' '.join(str(error).split())}") from None
    try:
        listed = [item for d in documents for item in (d.get("items", []) if d.get("kind") == "List" else [d])]
        found = tuple(deployment for document in listed for deployment in _engines(document, path))
    except (TypeError, ValueError, AttributeError) as error:  # a list or a word where Kubernetes has keys, a word where it has a number
        raise BadInput(f"{path}: is no manifest that Kubernetes would take ({error}); mend it: kubectl apply --dry-run=client") from None
    if not found:
        kinds = ", ".join(sorted({str(d.get("kind")) for d in listed})) or "nothing"
        raise BadInput(f"{path}: starts no engine known here (found {kinds}); give a Deployment of vLLM, SGLang or TensorRT-LLM")
    return found


def _engines(document: Mapping[str, Any], path: Path) -> Iterator[Deployment]:
    """Yield the engines of one workload, each with its replicas, GPUs and image."""
    if document.get("kind") not in _WORKLOADS:
        return
    spec = document.get("spec") or {}
    replicas, pod = (_predictor if document["kind"] == "InferenceService" else _pod)(spec)
    for container in pod.get("containers") or []:
        started = _started(container)
        if started is not None:
            limits = (container.get("resources") or {}).get("limits") or {}
            gpus = next((int(limits[name]) for name in _GPUS if name in limits), None)
            yield dataclasses.replace(started, replicas=replicas, gpus=gpus, gpu=_gpu(pod), image=container.get("image"))


def _pod(spec: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]]:
    if "containers" in spec:
        return 1, spec
    return _count(spec, "replicas"), ((spec.get("template") or {}).get("spec") or {})


def _count(spec: Mapping[str, Any], key: str) -> int:
    """Return a number of replicas, one where none is given.  Raises ValueError below zero; none at all is a fleet switched off."""
    count = int(spec.get(key, 1))
    if count < 0:
        raise ValueError(f"{key}: {count} is below zero")
    return count


def _predictor(spec: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]]:
    """Return the pod of a KServe predictor; its `model` block stands for a container whose model is the storage address."""
    predictor = spec.get("predictor") or {}
    replicas = _count(predictor, "minReplicas")
    model = predictor.get("model")
    if not model:
        return replicas, predictor
    args = [str(word) for word in model.get("args") or []]
    address = str(model.get("storageUri", "")).removeprefix("hf://")
    if address and not any(word.split("=")[0] in ("--model", "--model_id", "--model-path") for word in args):
        args = [f"--model={address}", *args]
    return replicas, {**predictor, "containers": [{**model, "image": model.get("image", "kserve/huggingfaceserver"), "args": args}]}


def _started(container: Mapping[str, Any]) -> Deployment | None:
    """Return the engine a container starts: by its command, a command line given to a shell, or arguments for its image's own."""
    words = [str(word) for word in (*(container.get("command") or ()), *(container.get("args") or ()))]
    if len(words) >= 3 and words[0].rsplit("/", 1)[-1] in ("sh", "bash") and words[1].endswith("c"):
        return _in_shell(words[2])
    engine, rest = command.start_of(words)
    if engine is not None:
        return command.from_words(engine, rest)
    image = str(container.get("image", ""))
    engine = next((name for part, name in _IMAGES if part in image), None)
    if engine is None or container.get("command"):
        return None
    rest = [word.replace("--model_id", "--model", 1) for word in words if not word.startswith("--model_name")]
    return command.from_words(engine, rest)


def _in_shell(script: str) -> Deployment | None:
    """Return the engine that one of a script's commands starts."""
    lines = script.replace("\\\n", " ").replace("&&", "\n").replace(";", "\n").split("\n")
    starting = next((line for line in lines if command.start_of(line.split())[0] is not None), None)
    return None if starting is None else command.parse(starting.strip())


def _gpu(pod: Mapping[str, Any]) -> str | None:
    """Return the GPU a pod asks for by a label of its nodes."""
    selector = pod.get("nodeSelector") or {}
    return next((str(selector[label]) for label in _GPU_LABELS if label in selector), None)
