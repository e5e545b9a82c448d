"""A store on a real S3-protocol server."""

import itertools
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from dafm_ray import remote
from dafm_ray.cli import main
from dafm_ray.config import (
    DatasetConfig,
    FusionConfig,
    ModelConfig,
    NetworkConfig,
    PrecomputeConfig,
    Recipe,
    to_yaml,
)
from dafm_ray.datasets.shards import open_shards
from dafm_ray.errors import DataError, MachineError
from dafm_ray.fusion.fit import Share, fit
from dafm_ray.fusion.train import build, folds_of, open_inputs, open_stores, prepare
from dafm_ray.lease import writing
from dafm_ray.remote import Backoff
from dafm_ray.storage import open_storage
from dafm_ray.tiles.manifest import Grid, ModelEntry
from dafm_ray.tiles.precompute import precompute
from dafm_ray.tiles.store import TileStore, score_key
from tests.object_store import every
from tests.samples import (
    image_folder,
    labelled_dataset,
    parquet_shard,
    score_store,
    tar_shard,
    upload,
)


def test_a_store_on_s3_is_the_store_on_disk(bucket, tmp_path):
    dataset = labelled_dataset(23, 17)
    local, there = score_store(tmp_path, dataset), score_store(bucket, dataset)
    assert there.manifest == local.manifest
    assert there.finished() == local.finished()
    assert np.array_equal(there.scores("b", 2), local.scores("b", 2))
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


def test_shards_on_s3_are_read_in_place(bucket, object_store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", Backoff(sleep=lambda seconds: None))
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
        object_store.fault = every(3, 503) if pattern == "*.tar" else object_store.fault
        for name, data in members:
            assert source.read(places[name]) == data
        object_store.fault = lambda method, path: None
    source, places = open_shards(f"{place}/*.tar?{options}")
    object_store.fault = every(1, 503)  # the images are sound: nothing goes into quarantine
    with pytest.raises(MachineError, match="failed 7 times"):
        source.read(places[members[0][0]])


def test_the_lease_on_s3(bucket):
    with writing(open_storage(bucket)):
        assert "lease.json" in open_storage(bucket).list("")
    assert "lease.json" not in open_storage(bucket).list("")


def test_of_two_writers_on_s3_the_second_stops(object_store):
    uri = object_store.uri("lease")
    with writing(open_storage(uri)):
        with (
            pytest.raises(MachineError, match=r"another run is writing s3://stores/lease\?"),
            writing(open_storage(uri)),
        ):
            pass
        assert "lease.json" in open_storage(uri).list("")


def job_of(tmp_path, store):
    root = image_folder(tmp_path / "images", images=10, queries=6)
    model = ModelConfig("sum", "clip4cir:sum@random-tiny")
    return PrecomputeConfig(
        DatasetConfig("folder", root=str(root)),
        (model,),
        str(store),
        encode_block=4,
        tile_queries=3,
        tile_candidates=5,
    )


@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(170)
def test_a_store_made_on_a_failing_server_is_the_store_on_disk(object_store, tmp_path):
    """Its images lie there, too, but for one. One request of seven fails, in one of four ways, or
    is late.
    """
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "gallery.txt").write_text("".join(f"{n:03d}.png\n" for n in range(11)))
    local = precompute(job_of(tmp_path, tmp_path / "store")).store
    images = upload(tmp_path / "images", object_store.uri("images"))
    ways = itertools.cycle([500, "cut", 503, "slow", 429])
    is_due = every(7, True)
    object_store.fault = lambda method, path: next(ways) if is_due(method, path) else None
    job = job_of(tmp_path, object_store.uri("store"))
    there = precompute(replace(job, dataset=DatasetConfig("folder", root=images))).store
    assert object_store.faults > len(object_store.requests) / 15
    assert there.scores_digest == local.scores_digest
    listed = there.storage.read("quarantine.csv").to_pybytes()
    assert listed == local.storage.read("quarantine.csv").to_pybytes()
    assert listed.count(b"the file is missing") == 1
    assert all(problem == "" for _, problem in there.verify())


def job_file(tmp_path, uri):
    file = tmp_path / "job.yaml"
    file.write_text(to_yaml(job_of(tmp_path, uri)), encoding="utf-8")
    return str(file)


def test_a_server_that_only_fails_ends_a_run_in_one_line(
    object_store, tmp_path, monkeypatch, capsys
):
    waits = []
    monkeypatch.setattr(remote, "BACKOFF", Backoff(sleep=waits.append))
    object_store.fault = every(1, 503)
    assert main(["precompute", "--config", job_file(tmp_path, object_store.uri("store"))]) == 5
    said = capsys.readouterr().err
    assert "error: cannot read s3://stores/store/lease.json" in said
    assert "failed 7 times" in said
    assert "Traceback" not in said
    assert len(waits) == 6


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(300)
def test_a_server_that_fails_in_the_middle_ends_a_run_in_one_line(object_store, tmp_path, capsys):
    """What a worker could not write; the same command goes on once the server is well."""
    object_store.fault = lambda method, path: (
        503 if method == "PUT" and "/scores/" in path else None
    )
    file = job_file(tmp_path, object_store.uri("store"))
    assert main(["precompute", "--config", file]) == 5
    said = capsys.readouterr().err
    assert "error: cannot write s3://stores/store/scores/sum/" in said
    assert "Traceback" not in said
    object_store.fault = lambda method, path: None
    before = object_store.count("PUT", "/features/")
    assert main(["precompute", "--config", file]) == 0
    assert object_store.count("PUT", "/features/") == before


@pytest.mark.parametrize("gigabytes", ["1", "0"])
def test_training_fetches_a_tile_of_s3_once(object_store, tmp_path, monkeypatch, gigabytes):
    monkeypatch.setenv("DAFM_CACHE", str(tmp_path))
    monkeypatch.setenv("DAFM_CACHE_GB", gigabytes)
    uri = object_store.uri("tiles")
    store = score_store(uri, labelled_dataset(40, 30), ("a", "b"), Grid(64, 10, 20))
    recipe = Recipe(epochs=3, batch=16)
    config = FusionConfig(uri, "", folds=3, network=NetworkConfig(width=4), recipe=recipe)
    stores = open_stores(config)
    members = build(config, prepare(config, stores))
    inputs, folds = open_inputs(config, stores), folds_of(config, stores)
    fetched = []

    def after_epoch(epoch):
        fetched.append(object_store.count("GET", "/scores/"))

    fit(members, inputs, folds, recipe, Share(), after_epoch)
    tiles = sum(len(store.score_keys(model)) for model in store.models)
    if gigabytes == "1":
        assert fetched == [tiles, tiles, tiles]
    else:
        assert tiles < fetched[0] < fetched[1] < fetched[2]


def test_an_empty_bucket_is_no_store(bucket):
    with pytest.raises(DataError, match="not a tile store"):
        TileStore(bucket)
    created = TileStore.create(
        bucket, labelled_dataset(3, 1), {}, {"a": ModelEntry("x", "y")}, Grid(1, 1, 1), "float16"
    )
    assert created.missing() != []
