"""kill -9 in the middle of precompute, then the same command again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from dafm_ray.config import PrecomputeConfig, load_config
from dafm_ray.tiles.precompute import precompute
from dafm_ray.tiles.store import TileStore
from tests.samples import image_folder

pytestmark = pytest.mark.timeout(170)


def start(config: Path, store: Path) -> subprocess.Popen[str]:
    job = ["precompute", "--config", str(config), "--set", f"store={store}"]
    return subprocess.Popen(
        [sys.executable, "-m", "dafm_ray", *job],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """End the driver and every Ray process it started, as a lost machine would."""
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=20)
    process.wait()


def run(config: Path, store: Path) -> str:
    process = start(config, store)
    out, error = process.communicate()
    assert process.returncode == 0, error
    return out


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("kill")
    images = image_folder(root / "images", images=32, queries=20)
    file = root / "job.yaml"
    file.write_text(
        f"dataset: {{name: folder, root: {images}}}\n"
        "models: [{name: sum, id: 'clip4cir:sum@random-tiny'}]\n"
        "store: unused\n"
        "encode_block: 4\ntile_queries: 4\ntile_candidates: 8\n"
    )
    return file


@pytest.fixture(scope="module")
def unbroken(config, local_ray):
    store = config.parent / "unbroken"
    return precompute(load_config(PrecomputeConfig, config, [f"store={store}"])).store


@pytest.mark.slow
@pytest.mark.parametrize("part", ["features", "scores"])
def test_finished_blocks_are_kept_and_the_store_equals_an_unbroken_one(
    tmp_path, config, unbroken, part
):
    broken = tmp_path / "broken"
    process = start(config, broken)
    while len(list((broken / "records" / part).rglob("*.json"))) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    kill(process)
    store = TileStore(str(broken))
    kept = {path: (broken / path).stat().st_mtime_ns for path in store.storage.list("records")}
    assert len(kept) >= 5
    assert store.missing()

    out = run(config, broken)
    assert all(problem == "" for _, problem in store.verify())
    assert {path: (broken / path).stat().st_mtime_ns for path in kept} == kept
    total = len(store.storage.list("records"))
    assert f"{total - len(kept)} blocks computed now" in out
    assert store.storage.list("records") == unbroken.storage.list("records")
    for name in store.models:
        for block in range(len(store.tile_rows)):
            assert np.array_equal(store.scores(name, block), unbroken.scores(name, block))


def test_two_runs_on_one_store(tmp_path, config):
    first = start(config, tmp_path / "store")
    while not (tmp_path / "store" / "manifest.json").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    second = start(config, tmp_path / "store")
    _, error = second.communicate()
    assert second.returncode == 5
    assert "another run is writing" in error
    kill(first)
