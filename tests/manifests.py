"""An offline check of our Kubernetes manifests, as strict as the API server is not.

The API server drops unknown keys of a RayService without a word, and Ray does the same in serveConfigV2; here an
unknown key is an error. tests/data/crd-schemas-v1.7.0.json is the RayService schema of KubeRay v1.7.0 (Apache-2.0,
ray.io_rayservices.yaml, descriptions left out). Kubernetes' own kinds are closed lists of the keys that we use.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

DATA = Path(__file__).parent / "data" / "crd-schemas-v1.7.0.json"
RAY_SERVICE = json.loads(DATA.read_text())["ray.io/v1/RayService"]
TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def _closed(required: str = "", **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split()}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


METADATA = _closed("name", name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
HEADER = {"apiVersion": TEXT, "kind": TEXT, "metadata": METADATA}
SELECTOR = _closed(matchLabels=TEXTS)
PEER = _closed(
    podSelector=SELECTOR, namespaceSelector=SELECTOR, ipBlock=_closed("cidr", **{"cidr": TEXT, "except": _list(TEXT)})
)
PORTS = _list(_closed("port protocol", port=NUMBER, protocol={"enum": ["TCP", "UDP"]}))
WORKERS = RAY_SERVICE["properties"]["spec"]["properties"]["rayClusterConfig"]["properties"]["workerGroupSpecs"]
JOB = _closed(
    "template",
    backoffLimit=NUMBER,
    activeDeadlineSeconds=NUMBER,
    ttlSecondsAfterFinished=NUMBER,
    template=WORKERS["items"]["properties"]["template"],
)
CLAIM = _closed(
    "accessModes resources",
    accessModes=_list({"enum": ["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"]}),
    resources=_closed("requests", requests=TEXTS),
    storageClassName=TEXT,
)
POLICY = _closed(
    "podSelector policyTypes",
    podSelector=SELECTOR,
    policyTypes=_list({"enum": ["Ingress", "Egress"]}),
    ingress=_list(_closed(**{"from": _list(PEER), "ports": PORTS})),
    egress=_list(_closed(to=_list(PEER), ports=PORTS)),
)
DEPLOYMENT = _closed(
    "selector template",
    replicas=NUMBER,
    strategy=_closed("type", type={"enum": ["Recreate", "RollingUpdate"]}),
    selector=SELECTOR,
    template=WORKERS["items"]["properties"]["template"],
)
SERVICE = _closed(
    "selector ports", selector=TEXTS, ports=_list(_closed("port", name=TEXT, port=NUMBER, targetPort=TEXT))
)
KINDS: dict[str, dict[str, Any]] = {
    "apps/v1 Deployment": _closed("spec", **HEADER, spec=DEPLOYMENT),
    "v1 Service": _closed("spec", **HEADER, spec=SERVICE),
    "ray.io/v1 RayService": _closed("spec", **HEADER, spec=RAY_SERVICE["properties"]["spec"]),
    "v1 ServiceAccount": _closed(**HEADER),
    "v1 PersistentVolumeClaim": _closed("spec", **HEADER, spec=CLAIM),
    "batch/v1 Job": _closed("spec", **HEADER, spec=JOB),
    "networking.k8s.io/v1 NetworkPolicy": _closed("spec", **HEADER, spec=POLICY),
}


def documents(path: Path) -> list[dict[str, Any]]:
    """The objects in a YAML file, empty documents left out."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def errors(document: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with one object, a sentence each; nothing where it is clean."""
    kind = f"{document.get('apiVersion')} {document.get('kind')}"
    if kind not in KINDS:
        yield f"{kind}: of a kind that this check does not know"
        return
    wrong = list(_violations(strict(KINDS[kind]), document))
    yield from (f"{kind}: {line}" for line in wrong)
    if document["kind"] == "RayService" and not wrong:
        yield from (f"{kind}: {line}" for line in operator_errors(document["spec"]))
        yield from (f"serveConfigV2: {line}" for line in serve_errors(document["spec"].get("serveConfigV2", "")))


def strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as a JSON schema in which no unknown key passes."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-") and key != "format"}
    for key in {"items", "additionalProperties", "not", "anyOf", "oneOf", "allOf"} & result.keys():
        result[key] = strict(result[key])
    if "properties" in schema:
        fields = schema["properties"]
        result["properties"] = {name: strict(field) for name, field in fields.items()}
        # the API server fills defaults in before it looks for what is missing
        result["required"] = [name for name in schema.get("required", ()) if "default" not in fields.get(name, {})]
        if not _open(schema):
            result.setdefault("additionalProperties", False)
    if schema.get("format") == "int32":
        result |= {"minimum": max(-(2**31), result.get("minimum", -(2**31))), "maximum": 2**31 - 1}
    if result.pop("nullable", False) and "type" in result:
        result["type"] = [result["type"], "null"]
    return result


def _open(schema: Mapping[str, Any]) -> bool:
    return bool(schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource"))


def _violations(schema: Any, value: Any) -> Iterator[str]:
    for error in Draft202012Validator(schema).iter_errors(value):
        cause = error
        while cause.context:  # of alternatives, the one that came furthest says most
            cause = max(cause.context, key=lambda inner: len(inner.absolute_path))
        yield f"{'/'.join(map(str, cause.absolute_path))}: {cause.message[:200]}"


def operator_errors(spec: Mapping[str, Any]) -> Iterator[str]:
    """The rules that the operator checks in code, not in its schema, as far as they touch us (utils/validation.go)."""
    cluster = spec["rayClusterConfig"]
    version = tuple(int(part) for part in cluster.get("rayVersion", "0").split(".")[:2])
    if cluster.get("authOptions", {}).get("mode") == "token" and version < (2, 52):
        yield "token authentication needs rayVersion 2.52 or newer"
    if cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth is refused for a RayService"
    upgrade = spec.get("upgradeStrategy", {})
    if upgrade.get("type") not in (None, "None", "NewCluster", "NewClusterWithIncrementalUpgrade"):
        yield f"upgradeStrategy.type {upgrade['type']} does not exist"
    if upgrade.get("type") == "NewClusterWithIncrementalUpgrade" and not (
        cluster.get("enableInTreeAutoscaling") and "clusterUpgradeOptions" in upgrade
    ):
        yield "an incremental upgrade needs enableInTreeAutoscaling and clusterUpgradeOptions"
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        name = group.get("groupName", "head")
        parameters = group.get("rayStartParams", {})
        if "labels" in parameters:
            yield f"{name}: labels belong to the group, not into rayStartParams"
        if group.get("resources") and parameters.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
            yield f"{name}: resources are given twice, in the group and in rayStartParams"
        if not group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get("maxReplicas", 2**31):
            yield f"{name}: replicas are not between minReplicas and maxReplicas"
        policy = group["template"]["spec"].get("restartPolicy", "Never")
        if cluster.get("autoscalerOptions", {}).get("version") == "v2" and policy != "Never":
            yield f"{name}: autoscaler v2 wants restartPolicy Never, or none"


def serve_errors(text: str) -> Iterator[str]:
    """What Ray would refuse in a Serve configuration, and the unknown keys that it would ignore."""
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(text)
    if not isinstance(config, dict):
        yield "it is not a mapping"
        return
    try:
        ServeDeploySchema(**config)
    except ValueError as error:
        yield str(error)
    schema = ServeDeploySchema.model_json_schema()
    closed = strict(_without_open_alternatives(schema))
    closed["$defs"] = {name: strict(_without_open_alternatives(part)) for name, part in schema["$defs"].items()}
    yield from _violations(closed, config)


def _without_open_alternatives(schema: Any) -> Any:
    # Ray describes autoscaling_config and others as "this model, or any mapping"; only the model names the keys.
    if isinstance(schema, list):
        return [_without_open_alternatives(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _without_open_alternatives(value) for key, value in schema.items()}
    choices = result.get("anyOf", [])
    if any("$ref" in choice for choice in choices):
        result["anyOf"] = [choice for choice in choices if choice.get("additionalProperties") is not True]
    return result
