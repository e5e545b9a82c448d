from dataclasses import replace

import pytest

from dafm_ray import remote
from dafm_ray.config import DatasetConfig, ModelConfig, PrecomputeConfig
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.errors import ConfigError, DataError, MachineError
from dafm_ray.tiles.manifest import Grid
from dafm_ray.tiles.plan import plan
from dafm_ray.tiles.precompute import entries, precompute
from dafm_ray.tiles.store import TileStore
from tests.samples import image_folder, labelled_dataset, parquet_shard

pytestmark = pytest.mark.timeout(150)

TINY = ModelConfig("sum", "clip4cir:sum@random-tiny")


def test_a_plan_is_refused_as_the_job_is(tmp_path):
    dataset = labelled_dataset(20, 4)
    models = entries([TINY])
    grid = Grid(8, 8, 8)
    TileStore.create(str(tmp_path), dataset, {}, models, grid, "float32", shortlist=10)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    config = PrecomputeConfig(DatasetConfig("folder"), (TINY,), str(tmp_path), shortlist=5)
    with pytest.raises(DataError, match=r"keeps the first 10 .* not the first 5"):
        plan(config, dataset)
    with pytest.raises(DataError, match="made for another gallery"):
        plan(replace(config, shortlist=10), labelled_dataset(21, 4))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_store_that_cannot_be_reached_has_no_plan(bucket, monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", remote.Backoff(tries=2, sleep=lambda seconds: None))
    away = "s3://key:secret@bucket/store?endpoint_override=127.0.0.1:9&scheme=http&region=x"
    for store, why in ((away, "cannot read s3://bucket"), (bucket.replace("stores", "no"), "no s")):
        config = PrecomputeConfig(DatasetConfig("folder"), (TINY,), store)
        with pytest.raises(MachineError, match=why):
            plan(config, labelled_dataset(20, 4))


@pytest.mark.usefixtures("local_ray")
def test_a_plan_is_measured_and_writes_nothing(tmp_path):
    root = image_folder(tmp_path / "images", images=22, queries=13)
    shard = tmp_path / "images.parquet"
    parquet_shard(shard, [(path.name, path.read_bytes()) for path in sorted(root.glob("*.png"))])
    config = PrecomputeConfig(
        DatasetConfig("folder", root=str(root), images=str(shard)),
        (TINY, ModelConfig("text", "zeroshot:text@random-tiny", batch=4)),
        str(tmp_path / "store"),
    )
    dataset = load_dataset(config.dataset)
    found = plan(config, dataset)
    assert not (tmp_path / "store").exists()
    assert (found.images, found.queries, found.cpus) == (22, 13, 4)
    assert found.models[1].pool.batch == 4
    assert all(model.rate > 0 and model.pair_s > 0 for model in found.models)
    assert found.decode_s > 0
    store = precompute(config).store
    keys = [key for key in TileStore(store.uri).finished() if key.startswith("features/")]
    stored = sum(store.read(key).nbytes for key in keys)
    assert found.feature_bytes == stored
    tars = (tmp_path / "store" / "images").glob("*.tar")
    assert found.unpacked_bytes == pytest.approx(sum(tar.stat().st_size for tar in tars), rel=0.25)
    text = "\n".join(found.lines())
    assert "22 images, 13 queries" in text
    assert "most of it waits for" in text

    for path in store.storage.list("records"):
        if path.startswith(("records/scores/text/", "records/features/text/queries/")):
            store.storage.delete(path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    again = plan(replace(config, encode_block=8, score_type="float16"), dataset)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before
    assert [(m.features_left, m.scores_left) for m in again.models] == [(0, 0), (0.5, 1)]
    assert (again.blocks, again.blocks_there, again.unpacked_bytes) == (6, 4, 0)
    assert again.tile_bytes == 22 * 13 * 4, "a store keeps its score type"
    assert again.config.encode_block == config.encode_block
    whole = replace(config, models=(replace(TINY, num_gpus=1.0),))
    assert plan(whole, dataset).store_bytes == 0, "what is there needs no GPU"
    new = replace(whole, store=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="GPUs"):
        plan(new, dataset)
