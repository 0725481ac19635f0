"""JSON Schemas of the parts of other people's formats that we write, and a small checker for the keywords they use.

Written from: Kubernetes API reference 1.30 (apps/v1 Deployment, batch/v1 Job, v1 Service and ConfigMap, policy/v1 PodDisruptionBudget,
autoscaling/v2 HorizontalPodAutoscaler); kedacore/keda
config/crd/bases/keda.sh_scaledobjects.yaml and keda.sh ScaledObject specification; KServe v1beta1 API reference; OpenSLO/OpenSLO README.md
(v1); Prometheus documentation, recording and alerting rules.  All read 2026-11-21.  Nothing unknown is allowed: a misspelt key fails.
"""

from __future__ import annotations

import re
from typing import Any

Schema = dict[str, Any]

NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer", "minimum": 0}
POSITIVE: Schema = {"type": "integer", "minimum": 1}
STRINGS: Schema = {"type": "object", "additionalProperties": TEXT}


def obj(required: dict[str, Schema], **optional: Schema) -> Schema:
    """Return an object of these keys and no others."""
    return {"type": "object", "required": list(required), "properties": {**required, **optional}, "additionalProperties": False}


def many(items: Schema, least: int = 1) -> Schema:
    return {"type": "array", "items": items, "minItems": least}


LABELS: Schema = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"},
}
META = obj({"name": NAME}, namespace=NAME, labels=LABELS, annotations=STRINGS)
SELECTOR = obj({"matchLabels": LABELS})
PORT: Schema = {"anyOf": [TEXT, {"type": "integer", "minimum": 1}]}
PROBE = obj(
    {"httpGet": obj({"path": {"type": "string", "pattern": "^/"}, "port": PORT})},
    periodSeconds={"type": "integer", "minimum": 1}, failureThreshold={"type": "integer", "minimum": 1}, timeoutSeconds=WHOLE,
)  # fmt: skip
GPUS = {"type": "object", "additionalProperties": {"type": "string", "pattern": r"^[1-9][0-9]*$"}}
QUANTITY: Schema = {"type": "string", "pattern": r"^[1-9][0-9]*(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}
AMOUNTS = obj({}, cpu=QUANTITY, memory=QUANTITY, **{"nvidia.com/gpu": QUANTITY, "amd.com/gpu": QUANTITY})
RESOURCES = obj({"requests": AMOUNTS}, limits=AMOUNTS)
SECRET = obj({"name": TEXT, "key": TEXT}, optional={"type": "boolean"})
CONTAINER = obj(
    {"name": NAME, "image": {"type": "string", "pattern": r"^\S+:\S+$"}},
    command=many(TEXT), args=many(TEXT), resources=RESOURCES, startupProbe=PROBE, readinessProbe=PROBE, livenessProbe=PROBE,
    env=many(obj({"name": TEXT}, value=TEXT, valueFrom=obj({}, secretKeyRef=SECRET, configMapKeyRef=SECRET))),
    ports=many(obj({"containerPort": {"type": "integer", "minimum": 1}}, name={"type": "string", "pattern": "^[a-z0-9-]{1,15}$"})),
    volumeMounts=many(obj({"name": NAME, "mountPath": TEXT})),
)  # fmt: skip
SPREAD = many(
    obj(
        {"maxSkew": POSITIVE, "topologyKey": TEXT, "whenUnsatisfiable": {"enum": ["DoNotSchedule", "ScheduleAnyway"]}},
        labelSelector=SELECTOR, minDomains=POSITIVE,
    )
)  # fmt: skip
TOLERATIONS = many(
    obj({}, key=TEXT, operator={"enum": ["Exists", "Equal"]}, effect={"enum": ["NoSchedule", "NoExecute", "PreferNoSchedule"]})
)
VOLUMES = many(
    obj(
        {"name": NAME}, emptyDir=obj({}, medium={"enum": ["", "Memory"]}, sizeLimit=TEXT), configMap=obj({"name": NAME}),
        secret=obj({"secretName": NAME}),
    )
)  # fmt: skip
POD = obj(
    {"containers": many(CONTAINER)},
    terminationGracePeriodSeconds=WHOLE, nodeSelector=LABELS, tolerations=TOLERATIONS, topologySpreadConstraints=SPREAD, volumes=VOLUMES,
    restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
)  # fmt: skip
COUNT_OR_SHARE: Schema = {"anyOf": [WHOLE, {"type": "string", "pattern": r"^\d+%$"}]}

ROLLING = obj({}, maxUnavailable=COUNT_OR_SHARE, maxSurge=COUNT_OR_SHARE)
QUERY = obj({"serverAddress": TEXT, "query": TEXT, "threshold": TEXT}, ignoreNullValues=TEXT)


def document(version: str, kind: str, spec: Schema, meta: Schema = META) -> Schema:
    return obj({"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": meta, "spec": spec})


SOURCE = obj({"metricSource": obj({"spec": obj({"query": TEXT})}, type=TEXT, metricSourceRef=TEXT)})
OPENSLO_META = obj({"name": NAME}, displayName=TEXT)
HUB: Schema = {"type": "string", "pattern": "^hf://"}
DURATION: Schema = {"type": "string", "pattern": r"^[1-9][0-9]*[mhdwMQY]$"}
RATIO: Schema = {
    "anyOf": [
        obj({"counter": {"type": "boolean"}, "good": SOURCE, "total": SOURCE}),
        obj({"rawType": {"enum": ["success", "failure"]}, "raw": SOURCE}),
    ]
}
BEHAVIOR = obj(
    {"stabilizationWindowSeconds": {"type": "integer", "minimum": 0, "maximum": 3600}},
    policies=many(
        obj({
            "type": {"enum": ["Percent", "Pods"]}, "value": {"type": "integer", "minimum": 1},
            "periodSeconds": {"type": "integer", "minimum": 1, "maximum": 1800},
        })
    ),
)  # fmt: skip
RULE: Schema = {
    "anyOf": [
        obj({"record": {"type": "string", "pattern": r"^[a-zA-Z_:][a-zA-Z0-9_:]*$"}, "expr": TEXT}, labels=STRINGS),
        obj({"alert": TEXT, "expr": TEXT}, **{"for": TEXT}, labels=STRINGS, annotations=STRINGS),
    ]
}

DOCUMENTS: dict[str, Schema] = {
    "Deployment": document(
        "apps/v1",
        "Deployment",
        obj(
            {"selector": SELECTOR, "template": obj({"metadata": obj({"labels": LABELS}), "spec": POD})},
            replicas={"type": "integer", "minimum": 1}, progressDeadlineSeconds=WHOLE,
            strategy=obj({"type": {"enum": ["RollingUpdate"]}}, rollingUpdate=ROLLING),
        ),
    ),
    "Service": document(
        "v1",
        "Service",
        obj(
            {"selector": LABELS, "ports": many(obj({"port": {"type": "integer"}}, name=TEXT, targetPort=PORT))},
            clusterIP={"const": "None"}, publishNotReadyAddresses={"type": "boolean"},
        ),
    ),
    "Job": document(
        "batch/v1",
        "Job",
        obj(
            {"template": obj({"metadata": obj({"labels": LABELS}), "spec": POD})},
            completionMode={"enum": ["Indexed", "NonIndexed"]}, completions=POSITIVE, parallelism=POSITIVE, backoffLimit=WHOLE,
            activeDeadlineSeconds=POSITIVE,
        ),
    ),
    "ConfigMap": obj(
        {"apiVersion": {"const": "v1"}, "kind": {"const": "ConfigMap"}, "metadata": META},
        data={"type": "object", "additionalProperties": TEXT},
    ),
    "PodDisruptionBudget": document(
        "policy/v1", "PodDisruptionBudget", obj({"selector": SELECTOR}, minAvailable=COUNT_OR_SHARE, maxUnavailable=COUNT_OR_SHARE)
    ),
    "ScaledObject": document(
        "keda.sh/v1alpha1",
        "ScaledObject",
        obj(
            {
                "scaleTargetRef": obj({"name": NAME}, apiVersion=TEXT, kind=TEXT),
                "triggers": many(
                    obj(
                        {"type": {"const": "prometheus"}, "metadata": QUERY},
                        name=TEXT, metricType={"enum": ["AverageValue", "Value", "Utilization"]},
                    )
                ),
            },
            pollingInterval=WHOLE, cooldownPeriod=WHOLE, minReplicaCount=WHOLE, maxReplicaCount=WHOLE,
            fallback=obj({"failureThreshold": WHOLE, "replicas": WHOLE}),
            advanced=obj({}, horizontalPodAutoscalerConfig=obj({}, behavior=obj({}, scaleUp=BEHAVIOR, scaleDown=BEHAVIOR))),
        ),
    ),
    "HorizontalPodAutoscaler": document(
        "autoscaling/v2",
        "HorizontalPodAutoscaler",
        obj(
            {"scaleTargetRef": obj({"name": NAME, "kind": {"enum": ["Deployment"]}}, apiVersion=TEXT), "maxReplicas": POSITIVE},
            minReplicas=POSITIVE, behavior=obj({}, scaleUp=BEHAVIOR, scaleDown=BEHAVIOR),
            metrics=many(
                obj({
                    "type": {"const": "Resource"},
                    "resource": obj({
                        "name": {"enum": ["cpu", "memory"]},
                        "target": obj({"type": {"const": "Utilization"}, "averageUtilization": {"type": "integer", "minimum": 1}}),
                    }),
                })
            ),
        ),
    ),
    "InferenceService": document(
        "serving.kserve.io/v1beta1",
        "InferenceService",
        obj({
            "predictor": obj(
                {}, minReplicas=WHOLE, maxReplicas=WHOLE, nodeSelector=LABELS, tolerations=TOLERATIONS, topologySpreadConstraints=SPREAD,
                model=obj({"modelFormat": obj({"name": TEXT})}, storageUri=HUB, args=many(TEXT), resources=RESOURCES),
                containers=many(CONTAINER), volumes=VOLUMES,
            )
        }),
    ),
    "SLO": document(
        "openslo/v1",
        "SLO",
        obj(
            {
                "service": NAME,
                "budgetingMethod": {"enum": ["Occurrences", "Timeslices"]},
                "indicator": obj({"metadata": obj({"name": NAME}), "spec": obj({"ratioMetric": RATIO})}),
                "objectives": many(obj({"target": {"type": "number", "minimum": 0, "exclusiveMaximum": 1}}, displayName=TEXT)),
            },
            description={"type": "string", "maxLength": 1050},
            timeWindow={**many(obj({"duration": DURATION, "isRolling": {"type": "boolean"}})), "maxItems": 1},
        ),
        OPENSLO_META,
    ),
}  # fmt: skip
OPENSLO_SERVICE = document("openslo/v1", "Service", obj({}, description={"type": "string", "maxLength": 1050}), OPENSLO_META)
RULES = obj({"groups": many(obj({"name": TEXT, "rules": many(RULE)}, interval=TEXT))})


def schema_of(found: dict[str, Any]) -> Schema:
    """Return the schema of a document."""
    if "groups" in found:
        return RULES
    if found.get("kind") == "Service" and found.get("apiVersion") == "openslo/v1":
        return OPENSLO_SERVICE
    return DOCUMENTS[found["kind"]]


_TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}


def wrong(value: Any, schema: Schema, at: str = "$") -> list[str]:
    """Return what a value has against a schema, each with its place; nothing when it fits."""
    if "anyOf" in schema:
        tries = [wrong(value, each, at) for each in schema["anyOf"]]
        return [] if [] in tries else min(tries, key=len)
    if "const" in schema:
        return [] if value == schema["const"] else [f"{at}: {value!r} is not {schema['const']!r}"]
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{at}: {value!r} is none of {schema['enum']}"]
    wanted = _TYPES[schema["type"]]
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        return [f"{at}: {value!r} is no {schema['type']}"]
    return [*_bounds(value, schema, at), *_parts(value, schema, at)]


def _bounds(value: Any, schema: Schema, at: str) -> list[str]:
    checks = (
        ("pattern", lambda limit: re.search(limit, value) is not None),
        ("minimum", lambda limit: value >= limit),
        ("maximum", lambda limit: value <= limit),
        ("exclusiveMaximum", lambda limit: value < limit),
        ("maxLength", lambda limit: len(value) <= limit),
        ("minItems", lambda limit: len(value) >= limit),
        ("maxItems", lambda limit: len(value) <= limit),
    )
    return [f"{at}: {value!r} breaks {word} {schema[word]}" for word, holds in checks if word in schema and not holds(schema[word])]


def _parts(value: Any, schema: Schema, at: str) -> list[str]:
    if isinstance(value, list):
        return [line for k, item in enumerate(value) for line in wrong(item, schema["items"], f"{at}[{k}]")]
    if not isinstance(value, dict):
        return []
    own, more = schema.get("properties", {}), schema.get("additionalProperties", True)
    lines = [f"{at}: lacks {key}" for key in schema.get("required", []) if key not in value]
    for key, item in value.items():
        if key in own:
            lines += wrong(item, own[key], f"{at}.{key}")
        elif more is False:
            lines.append(f"{at}: unknown key {key}")
        elif isinstance(more, dict):
            lines += wrong(item, more, f"{at}.{key}")
    return lines
