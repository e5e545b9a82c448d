from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dafm_ray.cli import main
from dafm_ray.config import DatasetConfig, ModelConfig, PrecomputeConfig
from dafm_ray.errors import ConfigError
from dafm_ray.models.registry import load_model
from dafm_ray.progress import progress
from dafm_ray.tiles import preflight
from dafm_ray.tiles.manifest import Grid, ModelEntry
from dafm_ray.tiles.precompute import precompute
from dafm_ray.tiles.preflight import (
    UNMEASURED_BATCH,
    Measured,
    check_gpus,
    chosen,
    gpu_share,
    growing,
    measure,
    settle,
)
from dafm_ray.tiles.store import TileStore
from tests.samples import image_folder, open_folder

POOL = ModelConfig("sum", "clip4cir:sum@random-tiny")


@given(st.integers(1, 5000))
def test_batches_grow_to_the_whole_block(block):
    sizes = growing(block)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, block)
    assert all(later <= 4 * size for size, later in pairwise(sizes))


def test_the_smallest_of_nearly_equal_batches_is_taken():
    assert chosen({1: 10.0, 4: 30.0, 16: 39.0, 64: 40.0}) == 16
    assert chosen({1: 10.0, 4: 9.0}) == 1
    assert chosen({1: 10.0, 4: 20.0}) == 4


def test_a_share_of_a_gpu_holds_what_was_measured_and_context():
    gb = 10**9
    assert gpu_share(1 * gb, 80 * gb) == 0.05
    assert gpu_share(10 * gb, 80 * gb) == 0.2
    assert gpu_share(79 * gb, 80 * gb) == 1.0


def test_pools_that_would_wait_for_a_gpu_for_ever_are_refused():
    pools = [replace(POOL, num_gpus=0.25, actors=3), replace(POOL, name="b", num_gpus=0.25)]
    check_gpus(pools, 1.0)
    check_gpus([replace(POOL, num_gpus=0.6, actors=2)], 2.0)
    check_gpus([replace(POOL, num_gpus=2.0), replace(POOL, num_gpus=0.0, actors=9)], 2.0)
    for share, actors, gpus in ((0.25, 4, 0.0), (0.6, 3, 2.0), (2.0, 1, 1.0), (0.5, 3, 1.0)):
        with pytest.raises(ConfigError, match=f"the cluster has {gpus:g}"):
            check_gpus([replace(POOL, num_gpus=share, actors=actors)], gpus)


def test_a_measured_share_counts_and_is_kept_from_the_manifest(config, monkeypatch):
    monkeypatch.setattr(
        preflight, "_measured_remotely", lambda pool, block, gpus: Measured(4, "bf16", 0.35)
    )
    entry = ModelEntry(POOL.id, "random-tiny")
    dataset = open_folder(config.dataset.root)
    grid = Grid(5, 5, 5)
    store = TileStore.create(config.store, dataset, {}, {"sum": entry}, grid, "float32")
    auto = replace(POOL, num_gpus="auto", actors=2)
    with progress("test", 1) as shown:
        [settled] = settle(store, [auto], 1.0, shown)
        assert settled.num_gpus == 0.35
        assert encoding(store) == (4, "bf16")
        with pytest.raises(ConfigError, match=r"need 1\.05 GPUs"):
            settle(store, [replace(auto, actors=3)], 1.0, shown)
        fixed = replace(POOL, num_gpus=0.5)
        assert settle(store, [fixed], 1.0, shown) == [fixed]


def test_a_model_of_another_process_takes_no_gpu_itself(config, monkeypatch):
    weights = "lavis:sum@x.pth"
    dataset = open_folder(config.dataset.root)
    models = {"sum": ModelEntry(weights, "x")}
    store = TileStore.create(config.store, dataset, {}, models, Grid(5, 5, 5), "float32")
    pool = replace(POOL, id=weights, num_gpus="auto")
    with progress("test", 1) as shown:
        assert settle(store, [pool], 1.0, shown) == [replace(pool, num_gpus=0.0)]
        monkeypatch.setenv("DAFM_LAVIS_GPUS", "2")
        with pytest.raises(ConfigError, match="the cluster has 1"):
            settle(store, [pool], 1.0, shown)
        with pytest.raises(ConfigError, match="another process"):
            settle(store, [replace(pool, num_gpus=1.0)], 1.0, shown)


def test_a_measurement_gives_a_batch_within_the_block():
    found = measure(load_model(POOL.id), POOL, 8, "cpu")
    assert found.batch in growing(8)
    assert (found.precision, found.num_gpus) == ("fp32", 0.0)
    assert found.rate > 0
    given = measure(load_model(POOL.id), replace(POOL, batch=99, precision="bf16"), 8, "cpu")
    assert given == Measured(8, "bf16", rate=given.rate)


@pytest.mark.gpu
def test_a_measurement_on_a_gpu_gives_a_share():
    found = measure(load_model(POOL.id), POOL, 64, "cuda")
    assert found.batch in growing(32)
    assert found.precision in ("bf16", "fp16")
    assert 0 < found.num_gpus <= 1


@pytest.fixture
def config(tmp_path):
    root = image_folder(tmp_path / "images", images=9, queries=3)
    return PrecomputeConfig(
        DatasetConfig("folder", root=str(root)), (POOL,), str(tmp_path / "store"), encode_block=5
    )


def encoding(store: TileStore) -> tuple[int, str]:
    entry = TileStore(store.uri).manifest.models["sum"]
    return entry.batch, entry.precision


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(150)
def test_batch_and_precision_are_fixed_at_the_first_run(config, tmp_path, capsys):
    store = precompute(config).store
    assert encoding(store) == (min(UNMEASURED_BATCH, 5), "fp32")
    asked = replace(POOL, num_gpus="auto", batch=2, precision="bf16")
    other = replace(config, models=(asked,), store=str(tmp_path / "other"))
    bf16 = precompute(other).store
    assert encoding(bf16) == (2, "bf16")
    assert main(["tiles", "info", bf16.uri]) == 0
    assert "sum@random-tiny, bf16, batches of 2" in capsys.readouterr().out
    lost = next(path for path in store.storage.list("records") if "gallery" in path)
    store.storage.delete(lost)
    precompute(replace(config, models=(asked,)))
    assert encoding(store) == (5, "fp32")
    assert lost in store.storage.list("records")  # the digest in its name is as before


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_batch_is_measured_where_it_is_worth_it(config, monkeypatch):
    monkeypatch.setattr(preflight, "WORTH_IT", 0)
    batch, precision = encoding(precompute(config).store)
    assert batch in growing(5)
    assert precision == "fp32"


@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(60)
def test_a_pool_asking_for_a_gpu_the_cluster_lacks_is_refused_at_once(config):
    with pytest.raises(ConfigError, match="the cluster has 0"):
        precompute(replace(config, models=(replace(POOL, num_gpus=1.0),)))
