"""The manifests in clusters/kuberay have fields of KubeRay's API, and pods that Kubernetes accepts.

KubeRay's custom resource definitions are a megabyte that is made from its API types. The schema here has the
fields of those types that a job or a service can set (apis/ray/v1 of KubeRay 1.5), without the pods: these
are checked against Kubernetes' own schema.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from rayft.config import parse
from rayft.serving.config import ServeConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "clusters" / "kuberay"
MANIFESTS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*.yaml"))}
KUBERNETES = "1.33"


def fields(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": [*required], "additionalProperties": False,
    }  # fmt: skip


TEXT, NUMBER, FLAG, ANY = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {"type": "object"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
GROUP = {"rayStartParams": TEXTS, "template": ANY, "resources": TEXTS, "labels": TEXTS}
CLUSTER = fields(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=fields(mode={"enum": ["token", "disabled"]}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(
        idleTimeoutSeconds=NUMBER, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        version={"enum": ["v1", "v2"]}, resources=ANY, env={"type": "array"},
    ),
    headGroupSpec=fields(("template",), **GROUP, serviceType=TEXT, headService=ANY, enableIngress=FLAG),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            ("groupName", "template"), **GROUP, groupName=TEXT, replicas=NUMBER, minReplicas=NUMBER,
            maxReplicas=NUMBER, numOfHosts=NUMBER, idleTimeoutSeconds=NUMBER, suspend=FLAG,
        ),
    },
    suspend=FLAG,
    headServiceAnnotations=TEXTS,
    gcsFaultToleranceOptions=ANY,
)  # fmt: skip
SPECS = {
    "RayJob": fields(
        entrypoint=TEXT, backoffLimit=NUMBER, activeDeadlineSeconds=NUMBER, shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=NUMBER,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        runtimeEnvYAML=TEXT, jobId=TEXT, metadata=TEXTS, suspend=FLAG, rayClusterSpec=CLUSTER,
        submitterPodTemplate=ANY, submitterConfig=ANY, clusterSelector=TEXTS, deletionStrategy=ANY,
        entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"}, entrypointResources=TEXT,
    ),
    "RayService": fields(
        ("rayClusterConfig",), serveConfigV2=TEXT, rayClusterConfig=CLUSTER, serveService=ANY,
        upgradeStrategy=ANY,
        rayClusterDeletionDelaySeconds=NUMBER, excludeHeadPodFromServeSvc=FLAG,
    ),
}  # fmt: skip


def check(manifest: Mapping[str, Any]) -> None:
    """Raise an error for a field that KubeRay or Kubernetes does not know."""
    schema = fields(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"}, kind=TEXT, metadata=ANY, spec=SPECS[manifest["kind"]],
    )  # fmt: skip
    jsonschema.validate(manifest, schema)
    for name, template in pods(manifest):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def cluster(manifest: Mapping[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return spec["rayClusterSpec"] if manifest["kind"] == "RayJob" else spec["rayClusterConfig"]


def pods(manifest: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "head", cluster(manifest)["headGroupSpec"]["template"]
    for group in cluster(manifest)["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_field_is_known(name: str) -> None:
    check(MANIFESTS[name])


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_misspelt_field_is_found(name: str) -> None:
    broken = copy.deepcopy(MANIFESTS[name])
    cluster(broken)["headGroupSpec"]["rayStartParam"] = {}
    with pytest.raises(jsonschema.ValidationError, match="rayStartParam"):
        check(broken)
    broken = copy.deepcopy(MANIFESTS[name])
    next(pods(broken))[1]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        check(broken)


@pytest.mark.parametrize("name", MANIFESTS)
def test_it_uses_the_version_of_ray_that_is_tested(name: str) -> None:
    assert cluster(MANIFESTS[name])["rayVersion"] == ray.__version__
    assert f"FROM rayproject/ray:{ray.__version__}-py311-gpu" in (FOLDER / "Dockerfile").read_text()
    assert cluster(MANIFESTS[name])["authOptions"] == {"mode": "token"}


def test_the_image_leaves_out_what_the_launcher_leaves_out() -> None:
    excluded = yaml.safe_load((ROOT / "cluster.yaml").read_text())["rsync_exclude"]
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line for line in lines if not line.startswith("#")} == {
        one.removesuffix("/**") for one in excluded
    }


def test_the_job_runs_a_script_that_exists() -> None:
    words = MANIFESTS["rayjob"]["spec"]["entrypoint"].split()
    assert words[0] == "python"
    assert (ROOT / words[1]).is_file()


def test_the_service_serves_an_application_of_rayft() -> None:
    deployed = ServeDeploySchema.model_validate(
        yaml.safe_load(MANIFESTS["rayservice"]["spec"]["serveConfigV2"])
    )
    (application,) = deployed.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    config = parse(ServeConfig, application.args)
    key = config.keys[0]
    assert key.role == "admin"
    assert config.host == "0.0.0.0"  # noqa: S104
    assert deployed.proxy_location == "Disabled"
    for _, template in pods(MANIFESTS["rayservice"]):
        assert key.env in {one["name"] for one in template["spec"]["containers"][0]["env"]}
