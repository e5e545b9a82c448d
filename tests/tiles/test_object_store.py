"""A store on a real S3-protocol server."""

import numpy as np
import pyarrow as pa
import pytest

from dafm_ray.datasets.shards import open_shards
from dafm_ray.errors import DataError
from dafm_ray.tiles.lease import writing
from dafm_ray.tiles.manifest import Grid, ModelEntry
from dafm_ray.tiles.storage import open_storage
from dafm_ray.tiles.store import TileStore, score_key
from tests.samples import (
    image_folder,
    labelled_dataset,
    parquet_shard,
    score_store,
    tar_shard,
)


def test_a_store_on_s3_is_the_store_on_disk(bucket, tmp_path):
    dataset = labelled_dataset(23, 17)
    local, remote = score_store(tmp_path, dataset), score_store(bucket, dataset)
    assert remote.manifest == local.manifest
    assert remote.finished() == local.finished()
    assert np.array_equal(remote.scores("b", 2), local.scores("b", 2))
    assert all(problem == "" for _, problem in TileStore(bucket).verify())


def test_damage_on_s3_is_found(bucket):
    dataset = labelled_dataset(9, 5)
    store = score_store(bucket, dataset, models=("a",))
    key = score_key("a", 0, 0)
    [path] = [path for path in store.storage.list("scores") if path.startswith(key)]
    data = bytearray(store.storage.read(path))
    data[100] ^= 1
    store.storage.write(path, memoryview(bytes(data)))
    with pytest.raises(DataError, match="damaged"):
        TileStore(bucket).read(key)


def test_shards_on_s3_are_read_in_place(bucket, tmp_path):
    root = image_folder(tmp_path / "own", images=6, queries=2)
    members = [(path.name, path.read_bytes()) for path in sorted(root.glob("*.png"))]
    tar_shard(tmp_path / "0.tar", members[:4])
    tar_shard(tmp_path / "1.tar", members[4:])
    parquet_shard(tmp_path / "x.parquet", members)
    storage = open_storage(bucket)
    for name in ("0.tar", "1.tar", "x.parquet"):
        storage.write(name, pa.py_buffer((tmp_path / name).read_bytes()))
    place, _, options = bucket.partition("?")
    for pattern in ("*.tar", "x.parquet"):
        source, places = open_shards(f"{place}/{pattern}?{options}")
        for name, data in members:
            assert source.read(places[name]) == data


def test_the_lease_on_s3(bucket):
    with writing(open_storage(bucket)):
        assert "lease.json" in open_storage(bucket).list("")
    assert "lease.json" not in open_storage(bucket).list("")


def test_an_empty_bucket_is_no_store(bucket):
    with pytest.raises(DataError, match="not a tile store"):
        TileStore(bucket)
    created = TileStore.create(
        bucket, labelled_dataset(3, 1), {}, {"a": ModelEntry("x", "y")}, Grid(1, 1, 1), "float16"
    )
    assert created.missing() != []
