"""cluster.yaml, read by Ray's own code; nothing here asks AWS."""

import copy
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from moto.ec2.models.instance_types import INSTANCE_TYPES
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.scripts.scripts import start

ROOT = Path(__file__).parents[2]


@pytest.fixture
def written() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def prepared(written, monkeypatch) -> dict[str, Any]:
    """With Ray's defaults, as the head's autoscaler reads it."""
    monkeypatch.chdir(ROOT)
    config = prepare_config(written)
    validate_config(config)
    return config


def workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    types = config["available_node_types"]
    return {name: of for name, of in types.items() if name != config["head_node_type"]}


def start_options(commands: list[str]) -> tuple[str, dict[str, Any]]:
    """What comes before `ray start` in a list of commands, and its options as Ray reads them."""
    before, _, arguments = commands[-1].partition("ray start ")
    return before, start.make_context("start", shlex.split(arguments)).params


def test_ray_refuses_what_it_does_not_know(prepared):
    for wrong in ({"max_worker": 3}, {"auth": {"user": "ubuntu"}}):
        with pytest.raises(jsonschema.ValidationError):
            validate_config({**prepared, **wrong})


def test_nothing_is_left_to_the_defaults_of_ray(written, prepared):
    """They name an old machine image and open the dashboard to everybody."""
    assert prepared["setup_commands"] == written["setup_commands"]
    assert "0.0.0.0" not in str(prepared)
    assert all("ImageId" in of["node_config"] for of in prepared["available_node_types"].values())


def test_the_head_does_no_work(prepared):
    head = prepared["available_node_types"][prepared["head_node_type"]]
    assert head["resources"]["CPU"] == head["resources"]["GPU"] == 0
    assert head["max_workers"] == 0
    _, options = start_options(prepared["head_start_ray_commands"])
    assert options["num_cpus"] == options["num_gpus"] == 0
    assert options["autoscaling_config"].endswith("ray_bootstrap_config.yaml")


def test_workers_start_from_zero(prepared):
    for of in workers(prepared).values():
        assert of["min_workers"] == 0
        assert 0 < of["max_workers"] <= prepared["max_workers"]
    read = AutoscalingConfig(copy.deepcopy(prepared), skip_content_hash=True)
    limits = {name: of.max_worker_nodes for name, of in read.get_node_type_configs().items()}
    assert limits == {"head": 1, "gpu": 4, "cpu": 4}
    assert "--gpus all" in read.get_docker_config("gpu")["worker_run_options"]
    assert "--gpus all" not in str(read.get_docker_config("cpu"))


def test_gpus_for_encoding_may_be_spot_and_cpus_are_not(prepared):
    assert set(workers(prepared)) == {"gpu", "cpu"}
    market = {
        name: of["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        for name, of in prepared["available_node_types"].items()
    }
    assert market == {"head": None, "gpu": "spot", "cpu": None}


def test_resources_are_those_of_the_machines(prepared):
    for of in workers(prepared).values():
        machine = INSTANCE_TYPES[of["node_config"]["InstanceType"]]
        gpus = sum(gpu["Count"] for gpu in machine.get("GpuInfo", {}).get("Gpus", []))
        assert of["resources"]["CPU"] == machine["VCpuInfo"]["DefaultVCpus"]
        assert of["resources"].get("GPU", 0) == gpus


def test_work_without_a_gpu_stays_off_gpus_and_jobs_know_how_far_the_cluster_grows(prepared):
    given = dict(re.findall(r"--env (DAFM_\w+)=(\S+)", " ".join(prepared["docker"]["run_options"])))
    offers = [
        of for of in workers(prepared).values() if given["DAFM_CPU_RESOURCE"] in of["resources"]
    ]
    assert not any("GPU" in of["resources"] for of in offers)
    gpus = [of for of in workers(prepared).values() if "GPU" in of["resources"]]
    for name, types in (("CPU", offers), ("GPU", gpus)):
        limit = sum(of["max_workers"] * of["resources"][name] for of in types)
        assert given[f"DAFM_MAX_{name}S"] == str(limit) != "0"


def test_ec2_accepts_the_machines(prepared):
    service = botocore.session.get_session().get_service_model("ec2")
    shape = service.operation_model("RunInstances").input_shape
    for of in prepared["available_node_types"].values():
        request = {**of["node_config"], "MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(request, shape).has_errors()
        assert ParamValidator().validate({**request, "Spot": True}, shape).has_errors()


@pytest.mark.parametrize("of", ["head", "worker"])
def test_every_ray_asks_for_the_token_and_may_open_files_and_spill(prepared, of):
    before, options = start_options(prepared[f"{of}_start_ray_commands"])
    assert "export RAY_AUTH_MODE=token;" in before
    assert "ulimit -n 65536;" in before
    assert options["object_spilling_directory"]


def test_the_dashboard_listens_on_loopback_alone(prepared):
    _, options = start_options(prepared["head_start_ray_commands"])
    assert options["dashboard_host"] == "127.0.0.1"


def test_all_nodes_share_the_token(prepared):
    assert prepared["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--env RAY_AUTH_MODE=token" in prepared["docker"]["run_options"]


def test_only_single_files_are_mounted_and_they_exist(prepared):
    for local in prepared["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).is_file()


def test_versions_are_those_of_the_constraints(prepared):
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert prepared["docker"]["image"] == f"rayproject/ray:{pins['ray']}-py311"
    for of in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        for command in prepared[of]:
            assert "pip install" not in command or "--constraint ~/dafm/constraints.txt" in command


def test_setup_installs_what_the_package_depends_on(prepared, tmp_path):
    """Runs the command that lists it."""
    (tmp_path / "dafm").mkdir()
    for remote, local in prepared["file_mounts"].items():
        if remote.startswith("~/dafm/"):
            (tmp_path / remote.removeprefix("~/")).write_bytes((ROOT / local).read_bytes())
    listed = tmp_path / "listed.txt"
    command = prepared["setup_commands"][0].replace("/tmp/dependencies.txt", str(listed))
    subprocess.run(
        ["bash", "-c", command.replace("python", sys.executable, 1)],
        env={"HOME": str(tmp_path)},
        check=True,
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert listed.read_text().splitlines() == project["dependencies"]
    assert "--requirement /tmp/dependencies.txt" in prepared["setup_commands"][1]
