"""The Kubernetes manifest of the documentation, as far as it can be checked without a cluster."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "docs" / "scale-out" / "kuberay.yaml"


@pytest.fixture(scope="module")
def documents():
    return {one["kind"]: one for one in yaml.safe_load_all(MANIFEST.read_text())}


def _pods(cluster):
    spec = cluster["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_ray_is_the_version_that_is_pinned_and_wants_a_token(documents):
    spec = documents["RayCluster"]["spec"]
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert spec["rayVersion"] == pins["ray"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"


def test_every_pod_runs_one_image_within_limits_and_mounts_a_claim_that_exists(documents):
    claims = {documents["PersistentVolumeClaim"]["metadata"]["name"]}
    pods = _pods(documents["RayCluster"])
    assert len({c["image"] for pod in pods for c in pod["containers"]}) == 1
    for pod in pods:
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        volumes = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"]}
        assert set(volumes.values()) <= claims
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert documents["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert "'/src[ray,hub]'" in (MANIFEST.parent / "kubernetes.md").read_text()


def test_workers_stay_within_their_bounds(documents):
    for group in documents["RayCluster"]["spec"]["workerGroupSpecs"]:
        assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
