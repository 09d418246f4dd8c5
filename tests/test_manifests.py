"""The files that put the project on Kubernetes agree with each other, with the code and with the operator's schemas."""

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import render
from cluster.local import PROXY
from deployments import app
from pipeline.settings import Settings
from tests import manifests

ROOT = Path(__file__).parent.parent
KUBERAY = ROOT / "cluster" / "kuberay"
DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()
README = (ROOT / "cluster" / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONFIG = yaml.safe_load((ROOT / "serve_config.yaml").read_text())


def _service() -> dict[str, Any]:
    return next(d for d in manifests.documents(KUBERAY / "rayservice.yaml") if d["kind"] == "RayService")


def _groups() -> list[dict[str, Any]]:
    cluster = _service()["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def _containers(template: dict[str, Any]) -> list[dict[str, Any]]:
    return [*template["spec"].get("initContainers", ()), *template["spec"]["containers"]]


def _deployments() -> list[dict[str, Any]]:
    return [deployment for application in CONFIG["applications"] for deployment in application["deployments"]]


@pytest.mark.parametrize("path", sorted(KUBERAY.glob("*.yaml")), ids=lambda path: path.name)
def test_every_manifest_is_clean(path: Path) -> None:
    """Every object is what the operator's and Ray's schemas allow, and holds no key that they would ignore."""
    found = manifests.documents(path)
    assert found
    assert [error for document in found for error in manifests.errors(document)] == []


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("rayClusterConfig", "enableInTreeAutoScaling", True),
        ("rayClusterConfig.headGroupSpec.template.spec", "serviceAccount_name", "pulid"),
        ("rayClusterConfig.workerGroupSpecs.1", "maxReplicas", "four"),
        ("rayClusterConfig.workerGroupSpecs.0", "replicas", 100),
        ("rayClusterConfig.workerGroupSpecs.0.rayStartParams", "labels", "pool=cpu"),
        ("rayClusterConfig.authOptions", "mode", "on"),
        ("rayClusterConfig", "rayVersion", "2.51.0"),
        ("upgradeStrategy", "type", "Rolling"),
    ],
)
def test_a_planted_mistake_is_found(where: str, key: str, value: Any) -> None:
    """A misspelt key, a wrong type or a combination that the operator refuses gives exactly one complaint."""
    document = copy.deepcopy(_service())
    inside = document["spec"]
    for part in where.split("."):
        inside = inside[int(part)] if part.isdigit() else inside[part]
    inside[key] = value
    assert len(list(manifests.errors(document))) == 1


@pytest.mark.parametrize("path", ["max_ongoing_request", "ray_actor_options.num_gpu", "autoscaling_config.min_replica"])
def test_a_planted_typo_in_the_serve_configuration_is_found(path: str) -> None:
    """Ray ignores a misspelt option of a deployment without a word; this check names it."""
    config = copy.deepcopy(CONFIG)
    *groups, key = path.split(".")
    inside = config["applications"][0]["deployments"][0]
    for part in groups:
        inside = inside.setdefault(part, {})
    inside[key] = 1
    assert any(key in error for error in manifests.serve_errors(yaml.safe_dump(config)))


def test_the_manifest_is_rendered_from_serve_config() -> None:
    """serveConfigV2 is serve_config.yaml, word for word: `make render` would change nothing."""
    assert render.main(["--check"]) == 0
    assert yaml.safe_load(_service()["spec"]["serveConfigV2"]) == CONFIG


def test_render_replaces_only_the_configuration() -> None:
    """Rendering puts the new text in, takes the old one out, and leaves every other line as it is."""
    manifest = "spec:\n  serveConfigV2: |\n    old: 1\n\n    # gone\n  rest: 2\n"
    rendered = render.render(manifest, "new:\n  deep: 1\n")
    assert rendered == "spec:\n  serveConfigV2: |\n    new:\n      deep: 1\n  rest: 2\n"
    with pytest.raises(ValueError, match="exactly one"):
        render.render("spec:\n", "new: 1\n")


def test_one_ray_version_everywhere() -> None:
    """Ray is equal in pyproject.toml, the lock, the manifest and the image: nodes of two versions do not join."""
    (wanted,) = (re.search(r"==([\d.]+)$", line) for line in PROJECT["dependencies"] if line.startswith("ray["))
    assert wanted
    locked = re.search(r"^ray==([\d.]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    built = re.search(r"^ARG RAY_VERSION=([\d.]+)$", DOCKERFILE, re.MULTILINE)
    assert locked
    assert built
    assert {_service()["spec"]["rayClusterConfig"]["rayVersion"], locked[1], built[1]} == {wanted[1]}


def test_one_project_version_and_a_python_the_project_supports() -> None:
    """The image is labelled and tagged with the project's version, and runs a Python that it says it supports."""
    built = re.search(r"^ARG VERSION=([\d.]+)$", DOCKERFILE, re.MULTILINE)
    python = re.search(r"^ARG PYTHON_VERSION=3\.(\d+)$", DOCKERFILE, re.MULTILINE)
    bounds = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"])
    assert built
    assert python
    assert bounds
    assert built[1] == PROJECT["version"]
    assert int(bounds[1]) <= int(python[1]) < int(bounds[2])
    images = re.findall(r"image: \S+:(\S+)", "".join(path.read_text() for path in KUBERAY.glob("*.yaml")))
    assert set(images) == {f"{PROJECT['version']}-cpu", f"{PROJECT['version']}-gpu"}


def test_the_dockerfile_copies_what_exists_and_ends_unprivileged() -> None:
    """Every COPY source is in the repository, both targets are there, and nothing after USER is run as root."""
    sources = [
        source for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M) for source in line.split()[:-1]
    ]
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert {"cpu", "gpu"} <= set(re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.MULTILINE))
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE) == ["1000:1000"]
    assert "RUN" not in DOCKERFILE.split("\nUSER ", 1)[1]
    assert "--require-hashes" in DOCKERFILE
    assert ":latest" not in DOCKERFILE


def test_the_image_has_what_the_readiness_probe_runs() -> None:
    """KubeRay's probe of a worker is a bash line with wget and grep; without them no worker is ever ready."""
    installed = re.search(r"apt-get install .*?&&", DOCKERFILE, re.DOTALL)
    assert installed
    assert {"bash", "wget", "grep"} <= set(installed[0].split())


def test_every_deployment_finds_a_group() -> None:
    """Every label selector of a deployment is met by a worker group, and only groups with GPUs are asked for some."""
    for deployment in _deployments():
        options = deployment.get("ray_actor_options", {})
        wanted = options.get("label_selector", {})
        assert wanted, f"{deployment['name']} would drift onto any node"
        fitting = [g for g in _groups()[1:] if all(g["labels"].get(key) == value for key, value in wanted.items())]
        assert fitting, deployment["name"]
        limits = [_containers(group["template"])[-1]["resources"]["limits"] for group in fitting]
        assert all(("nvidia.com/gpu" in limit) == bool(options.get("num_gpus")) for limit in limits), deployment["name"]


def test_the_deployments_are_those_of_the_application() -> None:
    """Ray refuses an unknown deployment name only at deploy time; here it is refused before."""
    (application,) = CONFIG["applications"]
    assert application["import_path"] == "deployments.app:build"
    args = app.AppArgs.model_validate(application.get("args", {}))
    assert {deployment["name"] for deployment in _deployments()} == set(app.defaults(args))


def test_the_proxy_is_reachable_from_other_pods() -> None:
    """A proxy that listens on the loopback only would make the Service answer nobody."""
    assert CONFIG.get("http_options", {}).get("host", "0.0.0.0") == "0.0.0.0"
    assert CONFIG.get("http_options", {}).get("port", 8000) == 8000


def test_jobs_and_the_service_are_set_alike() -> None:
    """The pods' environment, which batch jobs and the weights' check read, says what serve_config.yaml says."""
    args = app.AppArgs.model_validate(CONFIG["applications"][0]["args"])
    (fetching,) = (d for d in manifests.documents(KUBERAY / "weights.yaml") if d["kind"] == "Job")
    for template in [*(group["template"] for group in _groups()), fetching["spec"]["template"]]:
        for container in _containers(template):
            values = {entry["name"]: entry.get("value") for entry in container["env"]}
            settings = Settings.from_environment({name: text for name, text in values.items() if text is not None})
            assert (settings.preset, settings.weights_dir) == (args.preset, args.weights_dir)
            assert settings.store == args.store or template is fetching["spec"]["template"]
            assert str(args.weights_dir) in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_pods_outlive_what_runs_in_them() -> None:
    """A pod and an old cluster wait longer than the longest graceful shutdown, so no picture is lost to a rollout."""
    args = app.AppArgs.model_validate(CONFIG["applications"][0]["args"])
    defaults = app.defaults(args)
    options = [{**defaults[deployment["name"]], **deployment} for deployment in _deployments()]
    longest = max(option["graceful_shutdown_timeout_s"] for option in options)
    for group in _groups()[1:]:
        environment = {entry["name"]: entry["value"] for entry in _containers(group["template"])[-1]["env"]}
        drain = int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])  # Ray's own wait on SIGTERM; 30 by default
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > drain > longest
    assert _service()["spec"]["rayClusterDeletionDelaySeconds"] > max(longest, args.limits.request_seconds)


def test_the_ingress_finds_its_keys() -> None:
    """The key file lies in a secret that is mounted, as a whole, into the nodes that the Ingress may run on."""
    file = app.AppArgs.model_validate(CONFIG["applications"][0]["args"]).keys.file
    assert file
    (wanted,) = (d["ray_actor_options"]["label_selector"] for d in _deployments() if d["name"] == "Ingress")
    for group in (g for g in _groups() if wanted.items() <= g["labels"].items()):
        spec = group["template"]["spec"]
        (mount,) = (m for m in spec["containers"][0]["volumeMounts"] if m["mountPath"] == str(file.parent))
        (volume,) = (volume for volume in spec["volumes"] if volume["name"] == mount["name"])
        assert mount["readOnly"] is True
        assert "subPath" not in mount  # such a file is never brought up to date
        assert not {"items", "optional"} & volume["secret"].keys()
        assert f"generic {volume['secret']['secretName']} --from-file={file.name}" in README


def test_the_secret_of_webhooks_can_be_given() -> None:
    """What the configuration proposes lies in a secret that may be missing, and that the README makes."""
    file = Path(re.search(r"# webhooks: {secret_file: (\S+)}", (ROOT / "serve_config.yaml").read_text())[1])
    (group,) = (group for group in _groups() if group["labels"] == {"pool": "cpu"})
    spec = group["template"]["spec"]
    (mount,) = (m for m in spec["containers"][0]["volumeMounts"] if m["mountPath"] == str(file.parent))
    (volume,) = (volume for volume in spec["volumes"] if volume["name"] == mount["name"])
    assert volume["secret"]["optional"] is True
    assert f"generic {volume['secret']['secretName']} --from-file={file.name}=" in README


def test_the_proxy_obeys_no_header_of_a_client() -> None:
    """Image and pods set what `pulid serve` sets, so that Serve's proxy strips the headers it would obey."""
    for name, value in PROXY.items():
        assert f"ENV {name}={value}\n" in DOCKERFILE
        for group in _groups():
            assert {"name": name, "value": value} in _containers(group["template"])[-1]["env"]


def test_nothing_runs_on_the_head() -> None:
    """The head offers no CPUs and gets no requests: its death takes no picture with it."""
    assert _groups()[0]["rayStartParams"]["num-cpus"] == "0"
    assert _service()["spec"]["excludeHeadPodFromServeSvc"] is True


def test_every_pod_is_locked_down() -> None:
    """No root, no new privileges, no capabilities, weights read-only, no downloads: in every container."""
    for group in _groups():
        template = group["template"]
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in _containers(template):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"name": "HF_HUB_OFFLINE", "value": "1"} in container["env"]
            (weights,) = (mount for mount in container["volumeMounts"] if mount["name"] == "weights")
            assert weights["readOnly"] is True


def test_only_http_is_open_to_everybody() -> None:
    """The network policy covers every pod of the service, and opens port 8000 alone to those outside."""
    (policy,) = manifests.documents(KUBERAY / "network.yaml")
    ours = policy["spec"]["podSelector"]["matchLabels"]
    assert all(ours.items() <= group["template"]["metadata"]["labels"].items() for group in _groups())
    public = [rule for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert [port["port"] for rule in public for port in rule["ports"]] == [8000]
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}


def test_no_secret_is_written_down() -> None:
    """Tokens and keys come from secrets by reference; no manifest holds a value for one."""
    for path in KUBERAY.glob("*.yaml"):
        text = path.read_text()
        assert "kind: Secret" not in text
        assert not re.search(r"name: \S*(TOKEN|SECRET|KEY|PASSWORD)\S*.*\n\s*value:", text)
