"""Kubernetes objects of a load test over several pods: a Job for the master, one for the workers, a Service between them, the options.

Options lie in a ConfigMap, one entry each, so that a run can be changed there and applied again.  Secrets are only ever referred to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest.words import PORT

Document = dict[str, Any]

SECRET_FILE = "headers"  # noqa: S105  key in the Secret
_FILES, _SECRETS = "/etc/mlsys/files", "/etc/mlsys/auth"
_MOST_BYTES = 900_000  # a ConfigMap holds 1 MiB with its names
_GRACE_S = 90  # for answers on their way and for the records to reach the master
_START_S = 900  # for images to be pulled and pods to start
_PATHS = ("--trace", "--dataset", "--lengths-from", "--body-template", "--tokenizer", "--images", "--locustfile", "--ca-file")
_REFUSED = {"--header": "--auth-file"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One load test to run in a cluster."""

    name: str
    image: str
    workers: int
    words: Sequence[str]  # what `mlsys loadtest` is given, target first
    lasts_s: float  # sending and waiting for the last answers
    key_variable: str | None = None
    auth_file: bool = False
    files: Mapping[str, str] = field(default_factory=dict)  # name to text

    @property
    def secret(self) -> str:
        """Return the name of the Secret it refers to."""
        return f"{self.name}-auth"


def run(
    words: Sequence[str], *, target: str, name: str | None, image: str, workers: int, lasts_s: float, is_secret_url: bool = False
) -> Run:
    """Return a run made of the words of a command line.  Raises BadInput for what cannot go into a manifest."""
    if is_secret_url:
        raise BadInput("--export k8s: the URL holds a password, which must not stand in a manifest; put it in a file for --auth-file")
    kept: list[str] = []
    files: dict[str, str] = {}
    found = {"--api-key-env": "", "--auth-file": ""}
    pending = list(words)
    while pending:
        word = pending.pop(0)
        if word in _REFUSED:
            raise BadInput(f"--export k8s: the value of {word} would stand in a manifest; put it in a file for {_REFUSED[word]}")
        if word in found:
            found[word] = pending.pop(0)
        elif word in _PATHS:
            path = Path(pending.pop(0))
            files[path.name] = _content(word, path)
            kept += [word, f"{_FILES}/{path.name}"]
        else:
            kept.append(word)
    return Run(
        name=_name(name or target),
        image=image,
        workers=workers,
        words=kept,
        lasts_s=lasts_s,
        key_variable=found["--api-key-env"] or None,
        auth_file=bool(found["--auth-file"]),
        files=files,
    )


def documents(of: Run) -> list[Document]:
    """Return ConfigMaps, Service and the two Jobs."""
    files = [_config_map(f"{of.name}-files", of, of.files)] if of.files else []
    return [_config_map(f"{of.name}-options", of, _options(of)), *files, _service(of), _master(of), _workers(of)]


def heading(of: Run) -> list[str]:
    """Return what whoever applies it must know."""
    secret = []
    if of.key_variable:
        secret = [f"kubectl create secret generic {of.secret} --from-literal={of.key_variable}=…"]
    elif of.auth_file:
        secret = [f"kubectl create secret generic {of.secret} --from-file={SECRET_FILE}=FILE"]
    return [
        "A load test over several pods: `mlsys loadtest --master` and its workers.",
        *(f"First: {line}" for line in secret),
        f"The result: kubectl wait --for=condition=complete job/{of.name}-master --timeout={_deadline_s(of)}s && "
        f"kubectl logs job/{of.name}-master > loadtest.json",
        f"Again: kubectl delete job {of.name}-master {of.name}-workers, then apply once more.",
    ]


def _options(of: Run) -> dict[str, str]:
    """Return each option and its value, the target first; one that is given twice has a number."""
    found = {"target": of.words[0]}
    for option, value in _pairs(of.words):
        if value is not None:
            found[_key(option, found)] = value
    return found


def _arguments(of: Run) -> list[str]:
    """Return the words of the command, values as references to the ConfigMap."""
    keys = {"target": ""}
    words = [f"$({_variable('target')})"]
    for option, value in _pairs(of.words):
        words.append(option)
        if value is not None:
            key = _key(option, keys)
            keys[key] = value
            words.append(f"$({_variable(key)})")
    return words


def _pairs(words: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return options with their values; None for one that is a flag."""
    found: list[tuple[str, str | None]] = []
    for word in words[1:]:
        if found and found[-1][1] is None and not word.startswith("--"):
            found[-1] = found[-1][0], word
        else:
            found.append((word, None))
    return found


def _key(option: str, taken: Mapping[str, str]) -> str:
    name = option.lstrip("-")
    return name if name not in taken else next(f"{name}-{i}" for i in range(2, 1000) if f"{name}-{i}" not in taken)


def _variable(key: str) -> str:
    return f"OPTION_{key.upper().replace('-', '_')}"  # a bare PATH would hide the container's own


def _master(of: Run) -> Document:
    lead = ["--master", "--expect-workers", str(of.workers), "--port", str(PORT), "--json"]
    env = [{"name": _variable(key), "valueFrom": {"configMapKeyRef": {"name": f"{of.name}-options", "key": key}}} for key in _options(of)]
    container = {
        **_container(of, "master", ["loadtest", *_arguments(of), *_auth_words(of), *lead], env),
        "ports": [{"name": "locust", "containerPort": PORT}],
    }
    return _job(of, "master", container, {"backoffLimit": 0})


def _workers(of: Run) -> Document:
    container = _container(of, "worker", ["loadtest", "--worker", f"{of.name}-master:{PORT}", *_auth_words(of)], [])
    indexed = {"completionMode": "Indexed", "completions": of.workers, "parallelism": of.workers, "backoffLimit": 0}
    return _job(of, "workers", container, indexed)


def _job(of: Run, part: str, container: Document, spec: Document) -> Document:
    labels = {"app.kubernetes.io/name": of.name, "app.kubernetes.io/component": part}
    volumes = [
        *([{"name": "files", "configMap": {"name": f"{of.name}-files"}}] if of.files else []),
        *([{"name": "auth", "secret": {"secretName": of.secret}}] if of.auth_file else []),
        {"name": "records", "emptyDir": {}},
    ]
    apart = {
        "maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": labels},
    }  # fmt: skip
    pod = {
        "restartPolicy": "Never",  # a worker that starts again has lost its part of the schedule
        "terminationGracePeriodSeconds": _GRACE_S,
        **({"topologySpreadConstraints": [apart]} if part == "workers" else {}),
        "containers": [container],
        "volumes": volumes,
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"{of.name}-{part}", "labels": labels},
        "spec": {**spec, "activeDeadlineSeconds": _deadline_s(of), "template": {"metadata": {"labels": labels}, "spec": pod}},
    }


def _container(of: Run, name: str, args: list[str], env: list[Document]) -> Document:
    key = of.key_variable
    secret = [{"name": key, "valueFrom": {"secretKeyRef": {"name": of.secret, "key": key}}}] if key else []
    mounts = [
        *([{"name": "files", "mountPath": _FILES}] if of.files else []),
        *([{"name": "auth", "mountPath": _SECRETS}] if of.auth_file else []),
        {"name": "records", "mountPath": "/tmp"},  # noqa: S108  of this pod alone
    ]
    amounts = {"cpu": "1", "memory": "1Gi"}  # one core each: a whole one, where the kubelet's CPU manager is static
    return {
        "name": name,
        "image": of.image,
        "command": ["mlsys"],
        "args": args,
        **({"env": [*env, *secret]} if env or secret else {}),
        "resources": {"requests": amounts, "limits": amounts},
        "volumeMounts": mounts,
    }


def _auth_words(of: Run) -> list[str]:
    """Return how a pod gets its own way in: so no secret travels between them."""
    if of.key_variable:
        return ["--api-key-env", of.key_variable]
    return ["--auth-file", f"{_SECRETS}/{SECRET_FILE}"] if of.auth_file else []


def _service(of: Run) -> Document:
    """Return the name that workers find the master by.  Headless: one pod, no proxy on the way."""
    labels = {"app.kubernetes.io/name": of.name, "app.kubernetes.io/component": "master"}
    ports = [{"name": "locust", "port": PORT, "targetPort": "locust"}]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"{of.name}-master", "labels": labels},
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": labels, "ports": ports},
    }


def _config_map(name: str, of: Run, data: Mapping[str, str]) -> Document:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": of.name}},
        "data": dict(data),
    }


def _deadline_s(of: Run) -> int:
    return int(_START_S + of.lasts_s + 2 * _GRACE_S)


def _content(option: str, path: Path) -> str:
    """Return a file's text.  Raises BadInput where a ConfigMap cannot hold it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise BadInput(f"--export k8s: {option} {path} cannot go into a ConfigMap: {why}; put it into the image instead") from error
    if len(text.encode()) > _MOST_BYTES:
        raise BadInput(f"--export k8s: {option} {path} is too large for a ConfigMap (1 MiB); put it into the image instead")
    return text


def _name(text: str) -> str:
    """Return a name as RFC 1123 wants it, short enough for the suffixes."""
    plain = re.sub(r"^https?://", "", text.lower())
    name = re.sub(r"[^a-z0-9]+", "-", f"loadtest-{plain}").strip("-")[:45].strip("-")
    return name if name != "loadtest" else "loadtest-run"
