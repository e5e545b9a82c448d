"""Jobs on a cluster whose head does no work and that starts without a node, as cluster.yaml's.

Ray's own stand-in for a cloud starts further raylets on this machine.
"""

import json

import pytest
import torch
from ray.autoscaler._private.fake_multi_node import node_provider

from tests.cluster.heads import ended, free_port, running_head
from tests.samples import image_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

OBJECT_STORE = 150_000_000
COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    port = free_port()
    provider = {
        "type": "external",
        "module": f"{node_provider.__name__}.FakeMultiNodeProvider",
        "gcs_address": f"127.0.0.1:{port}",
        "launch_multiple": True,
        "head_node_id": node_provider.FAKE_HEAD_NODE_ID,
    }
    resources = {"cpu": {"CPU": 2, "dafm_cpu": 1}, "gpu": {"CPU": 1, "GPU": 1}}
    workers = {
        name: {
            "resources": {**of, "object_store_memory": OBJECT_STORE},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 1,
        }
        for name, of in resources.items()
    }
    name = "ray.head.default"
    config = {
        "cluster_name": "from-zero",
        "provider": provider,
        "max_workers": 2,
        "upscaling_speed": 1,
        "idle_timeout_minutes": 5,
        "head_node_type": name,
        "available_node_types": {
            name: {"resources": {}, "node_config": {}, "max_workers": 0},
            **workers,
        },
        **{key: [] for key in COMMANDS},
        "cluster_synced_files": [],
        "file_mounts": {},
        "auth": {},
    }
    file = tmp_path_factory.mktemp("cluster") / "autoscaling.json"
    file.write_text(json.dumps(config))
    options = ["--num-cpus=0", "--num-gpus=0", f"--object-store-memory={OBJECT_STORE}"]
    with running_head(
        [*options, f"--autoscaling-config={file}"],
        port,
        RAY_FAKE_CLUSTER="1",
        AUTOSCALER_UPDATE_INTERVAL_S="1",
        RAY_enable_autoscaler_v2="1",
        RAY_CLOUD_INSTANCE_ID=node_provider.FAKE_HEAD_NODE_ID,
        RAY_OVERRIDE_NODE_ID_FOR_TESTING=node_provider.FAKE_HEAD_NODE_ID,
        DAFM_CPU_RESOURCE="dafm_cpu",
        DAFM_MAX_CPUS="2",
        DAFM_MAX_GPUS="1",
    ) as head:
        yield head


@pytest.fixture
def config(tmp_path):
    images = image_folder(tmp_path / "images", images=20, queries=9)
    file = tmp_path / "job.yaml"
    file.write_text(
        f"dataset: {{name: folder, root: {images}}}\n"
        "models: [{name: sum, id: 'clip4cir:sum@random-tiny', num_gpus: 0}]\n"
        f"store: {tmp_path / 'store'}\n"
    )
    return file


def test_a_job_brings_up_the_node_it_needs(head, config):
    code, out, err = ended(head.dafm_submit("precompute", "--config", config), 390)
    assert code == 0, out + err
    assert "1 models, 9 queries, 20 images" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in's GPU would be a real one")
def test_a_measured_share_waits_for_a_gpu_instead_of_going_to_cpus(head, config):
    config.write_text(config.read_text().replace("num_gpus: 0", "num_gpus: auto"))
    code, out, err = ended(head.dafm_submit("precompute", "--config", config), 390)
    assert code == 5, out + err
    assert "torch" in out
    assert "GPU" in out
