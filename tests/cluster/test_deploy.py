"""Dockerfile, the files for KubeRay and the runtime environment; nothing is built or applied."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.runtime_env import RuntimeEnv

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def pinned(package: str) -> str:
    pins = (ROOT / "constraints.txt").read_text()
    return re.search(rf"^{package}==(\S+)$", pins, re.M)[1]


def as_ray_reads(cluster: dict[str, Any]) -> dict[str, Any]:
    """The autoscaler's configuration; Ray's own check of it is part of the call."""
    cluster["metadata"]["namespace"] = "default"
    return _derive_autoscaling_config_from_ray_cr(cluster)


@pytest.fixture
def cluster() -> dict[str, Any]:
    return read(KUBERAY / "cluster.yaml")


@pytest.fixture
def job() -> dict[str, Any]:
    return read(KUBERAY / "precompute.yaml")


@pytest.fixture
def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line]


def test_pods_start_from_zero_beside_a_head_that_does_no_work(cluster):
    types = as_ray_reads(cluster)["available_node_types"]
    head = types.pop("headgroup")
    assert head["resources"]["CPU"] == head["resources"]["GPU"] == 0
    assert {name: (of["min_workers"], of["max_workers"]) for name, of in types.items()} == {
        "gpu": (0, 4),
        "cpu": (0, 4),
    }
    assert types["gpu"]["resources"]["GPU"] == 1
    assert "GPU" not in types["cpu"]["resources"]
    assert cluster["spec"]["enableInTreeAutoscaling"] is True


def test_ray_refuses_a_cluster_it_cannot_read(cluster):
    cluster["spec"]["workerGroupSpecs"][0]["minReplicas"] = "none"
    with pytest.raises((jsonschema.ValidationError, TypeError)):
        as_ray_reads(cluster)


def test_work_without_a_gpu_stays_off_gpus_and_jobs_know_how_far_the_pods_grow(cluster):
    types = as_ray_reads(cluster)["available_node_types"]
    cpu, gpu = types["cpu"], types["gpu"]
    assert "dafm_cpu" in cpu["resources"]
    assert "dafm_cpu" not in gpu["resources"]
    expected = {
        "DAFM_CPU_RESOURCE": "dafm_cpu",
        "DAFM_MAX_CPUS": str(cpu["max_workers"] * cpu["resources"]["CPU"]),
        "DAFM_MAX_GPUS": str(gpu["max_workers"] * gpu["resources"]["GPU"]),
    }
    for container in containers(cluster):
        assert {one["name"]: one["value"] for one in container["env"]} == expected


def test_the_token_is_a_secret_and_everybody_has_it(cluster):
    assert cluster["spec"]["authOptions"] == {"mode": "token", "secretName": "dafm-token"}
    written = (KUBERAY / "cluster.yaml").read_text() + (KUBERAY / "precompute.yaml").read_text()
    assert "RAY_AUTH_TOKEN" not in written
    assert "kind: Secret" not in written


def containers(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    return [group["template"]["spec"]["containers"][0] for group in groups]


def test_every_pod_spills_to_a_volume_and_sees_the_shared_folder(cluster):
    for group in [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        mounts = {of["mountPath"]: of["name"] for of in pod["containers"][0]["volumeMounts"]}
        volumes = {of["name"]: of for of in pod["volumes"]}
        assert "emptyDir" in volumes[mounts[group["rayStartParams"]["object-spilling-directory"]]]
        assert "persistentVolumeClaim" in volumes[mounts["/shared"]]


def test_versions_and_images_are_one(cluster):
    assert cluster["spec"]["rayVersion"] == pinned("ray")
    (image,) = {container["image"] for container in containers(cluster)}
    assert f"--tag {image} " in (ROOT / "Dockerfile").read_text()


def test_no_pod_runs_as_root(cluster, instructions):
    (user,) = [value for name, value in instructions if name == "USER"]
    for group in [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]:
        context = group["template"]["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True
        assert f"{context['runAsUser']}:{context['runAsGroup']}" == user


def test_the_job_runs_on_such_a_cluster_once_and_ends_it(cluster, job):
    spec = job["spec"]
    assert spec["rayClusterSpec"] == cluster["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] == spec["submitterConfig"]["backoffLimit"] == 0
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == read(ROOT / "deploy" / "runtime_env.yaml")


def test_the_job_finds_its_files_in_the_image(job, instructions):
    assert ("WORKDIR", "/app") in instructions
    named = re.findall(r"/app/(\S+)", job["spec"]["entrypoint"])
    assert named == ["jobs/precompute.py", "configs/icons.yaml"]
    copied = copies(instructions)
    for path in named:
        assert (ROOT / path).is_file()
        assert path.split("/")[0] in copied


def copies(instructions: list[tuple[str, str]]) -> set[str]:
    return {
        source for name, value in instructions if name == "COPY" for source in value.split()[:-1]
    }


def test_everything_that_is_copied_exists_and_reaches_the_build(instructions):
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert copies(instructions) == kept
    for source in kept:
        assert (ROOT / source).exists()


def test_the_image_is_built_from_pins(instructions):
    assert instructions[0] == ("FROM", "python:3.11-slim-bookworm")
    installs = [
        part
        for name, value in instructions
        if name == "RUN"
        for part in re.split(r"&&|;", value)
        if "pip install" in part
    ]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in install for install in installs)


def test_the_image_has_what_clusters_ask_of_it(instructions):
    text = "\n".join(f"{name} {value}" for name, value in instructions)
    for tool in ("openssh-client", "rsync", "wget"):
        assert tool in text
    assert re.search(r"^ENV HOME=/home/dafm ", text, re.M)
    assert "--uid 1000 --create-home" in text
    names = [name for name, _ in instructions]
    assert names.index("USER") > max(n for n, name in enumerate(names) if name == "RUN")


def test_the_runtime_environment_is_one_and_clones_nothing():
    values = read(ROOT / "deploy" / "runtime_env.yaml")
    assert RuntimeEnv(**values).env_vars() == values["env_vars"]
    assert not {"pip", "uv", "conda", "container", "image_uri"} & values.keys()
    assert not {name for name in values["env_vars"] if name.startswith("RAY_AUTH")}
