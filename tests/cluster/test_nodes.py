"""A cluster of several Ray nodes on this machine: jobs are submitted to it, and nodes die."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dafm_ray.config import PrecomputeConfig, load_config
from dafm_ray.storage import open_storage
from dafm_ray.tiles.precompute import precompute
from dafm_ray.tiles.store import TileStore
from tests.cluster.heads import free_port
from tests.object_store import ObjectStore, every
from tests.samples import image_folder

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
PORT = free_port()
KILLS = 5

SOON_NOTICED = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}
"""A node that dies is noticed after 15 to 20 s by default."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MODELS = """
models:
  - {name: a, id: "clip4cir:sum@package://dafm_ray.demo/weights/clip4cir_sum.safetensors",
     batch: 16, actors: 2}
  - {name: b, id: "sprc:base@package://dafm_ray.demo/weights/sprc.safetensors", batch: 16}
"""


class Nodes:
    """A head without work, and workers that come and go."""

    def __init__(self, store_bytes: int, workers: list[dict[str, float]]) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": True,
                "dashboard_host": "127.0.0.1",
                "dashboard_port": PORT,
                "dashboard_agent_listen_port": free_port(),
                "object_store_memory": 100_000_000,
                "_system_config": SOON_NOTICED,
            },
        )
        self._store_bytes = store_bytes
        self._workers = [self._start(resources) for resources in workers]

    def _start(self, resources: dict[str, float]):
        node = self._cluster.add_node(
            num_cpus=2, object_store_memory=self._store_bytes, resources=resources
        )
        return node, resources

    def lose_one(self) -> dict[str, float]:
        """End the oldest worker as a lost machine would; returns its resources."""
        node, resources = self._workers.pop(0)
        self._cluster.remove_node(node, allow_graceful=False)
        return resources

    def add_one(self, resources: dict[str, float]) -> None:
        self._workers.append(self._start(resources))

    def kill_one(self) -> None:
        """Lose a worker, and give the cluster another one."""
        self.add_one(self.lose_one())

    def end(self) -> None:
        self._cluster.shutdown()


@pytest.fixture
def nodes(request, monkeypatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    settings = getattr(request, "param", {})
    found = Nodes(settings.get("store_bytes", 100_000_000), settings.get("workers", [{}, {}]))
    yield found
    found.end()


def submitted(*job: str, sent: bool = True, **environment: str) -> subprocess.Popen[str]:
    command = [str(RAY), "job", "submit", "--address", f"http://127.0.0.1:{PORT}"]
    command += ["--working-dir", str(ROOT)] if sent else []
    if environment:
        command += ["--runtime-env-json", json.dumps({"env_vars": environment})]
    return subprocess.Popen(
        [*command, "--", sys.executable, *job],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def done(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out[-4000:]
    return out


def status_of(store: str) -> dict[str, Any]:
    try:
        return json.loads(open_storage(store).read("status.json").to_pybytes())
    except (FileNotFoundError, ValueError):
        return {}


def share_done(store: str) -> float:
    """Of both stages, from what the job says of itself."""
    status = status_of(store)
    if not status:
        return 0.0
    begun = {"encode": 0.0, "similarity": 1.0}.get(status["stage"], -1.0)
    return max(0.0, begun + status["done"] / max(1, status["total"]))


def busy(server: ObjectStore) -> None:
    """One request in 11 is answered with 500, another one is late."""
    refused, late = every(11, 500), every(11, "slow")
    server.fault = lambda method, path: refused(method, path) or late(method, f"{path} late")


@pytest.mark.parametrize(("where", "shortlist"), [("disk", 0), ("disk", 20), ("s3", 0)])
def test_a_node_that_dies_five_times_changes_nothing(
    nodes, object_store, tmp_path, where, shortlist
):
    config = tmp_path / "job.yaml"
    config.write_text(
        "dataset: {name: icons, split: val}\nstore: x\nencode_block: 16\ntile_queries: 128\n"
        f"tile_candidates: 256\nshortlist: {shortlist}\n{MODELS}"
    )

    def place(name: str) -> str:
        return object_store.uri(name) if where == "s3" else str(tmp_path / name)

    store = place("killed")
    if where == "s3":
        busy(object_store)
    job = submitted("jobs/precompute.py", "--config", str(config), "--set", f"store={store}")
    killed = 0
    while job.poll() is None:
        if killed < KILLS and share_done(store) > 0.3 * (killed + 1):
            nodes.kill_one()
            killed += 1
        time.sleep(0.2)
    assert "2 models, 1673 queries, 1382 images" in done(job)
    assert killed == KILLS
    unbroken = precompute(
        load_config(PrecomputeConfig, config, [f"store={tmp_path / 'unbroken'}"])
    ).store
    found = TileStore(store)
    assert not found.missing()
    assert found.scores_digest == unbroken.scores_digest
    assert found.finished() == unbroken.finished()

    trained = tmp_path / "train.yaml"
    plain = "bank_t: 0\nprofiles: false\n" if shortlist else ""
    trained.write_text(
        f"store: {store}\nout: {place('fusion')}\nfolds: 3\nrecipe: {{epochs: 1}}\n{plain}"
    )
    assert "lightfusion" in done(submitted("jobs/train_fusion.py", "--config", str(trained)))
    tuned = tmp_path / "tune.yaml"
    tuned.write_text(
        f'kind: static\nfusion: {{store: "{store}"}}\nout: {place("study")}\n'
        "spaces: [{system: [mean@zscore, rrf]}]\n"
    )
    assert "study:" in done(submitted("jobs/tune_fusion.py", "--config", str(tuned)))
    evaluated = tmp_path / "evaluate.yaml"
    evaluated.write_text(f"store: {store}\nout: {place('report')}\ncases: 2\n")
    assert "mean@zscore" in done(submitted("jobs/evaluate.py", "--config", str(evaluated)))
    assert open_storage(place("report")).exists("report.html")
    assert where == "disk" or object_store.faults > KILLS


@pytest.mark.parametrize("nodes", [{"store_bytes": 100_000_000}], indirect=True)
def test_an_object_store_of_300_mb_in_all_is_enough_for_photographs(nodes, tmp_path):
    images = image_folder(tmp_path / "images", images=200, queries=60, size=(1200, 900))
    config = tmp_path / "job.yaml"
    config.write_text(
        f"dataset: {{name: folder, root: {images}}}\nstore: {tmp_path / 'store'}\n"
        f"encode_block: 64\n{MODELS}"
    )
    assert "2 models, 60 queries, 200 images" in done(
        submitted("jobs/precompute.py", "--config", str(config))
    )
    assert not TileStore(str(tmp_path / "store")).missing()


def test_what_waits_for_a_lost_node_says_so_and_goes_on_with_another(nodes, tmp_path):
    store = str(tmp_path / "store")
    config = tmp_path / "job.yaml"
    config.write_text(f"dataset: {{name: icons, split: val}}\nstore: {store}\n{MODELS}")
    # Nodes of one machine share a folder: a new one would replace the copy that is sent.
    job = submitted(str(ROOT / "jobs/precompute.py"), "--config", str(config), sent=False)
    while not share_done(store):
        time.sleep(0.2)
    resources = nodes.lose_one()
    deadline = time.monotonic() + 300
    while "2 and 0 are left" not in status_of(store).get("waiting", ""):
        assert time.monotonic() < deadline
        assert job.poll() is None
        time.sleep(1)
    nodes.add_one(resources)
    assert "waiting: nothing was finished for 60 s, and of 4 CPUs" in done(job)
    assert status_of(store)["waiting"] == ""


@pytest.mark.parametrize("nodes", [{"workers": [{"cpu_node": 1}, {}]}], indirect=True)
def test_work_without_a_gpu_stays_on_the_nodes_it_names(nodes, tmp_path):
    from ray.util.state import list_actors

    images = image_folder(tmp_path / "images", images=20, queries=9)
    config = tmp_path / "job.yaml"
    config.write_text(
        f"dataset: {{name: folder, root: {images}}}\nstore: {tmp_path / 'store'}\n{MODELS}"
    )
    job = ("jobs/precompute.py", "--config", str(config))
    done(submitted(*job, DAFM_CPU_RESOURCE="cpu_node"))
    actors = list_actors(address=f"http://127.0.0.1:{PORT}", limit=1000)
    at_work = {actor.node_id for actor in actors if re.search("Decoder|Encoder", actor.class_name)}
    assert len(at_work) == 1
