import pytest

from dafm_ray.config import DatasetConfig, EvaluateConfig, ModelConfig, PrecomputeConfig
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.datasets.shards import ParquetImages, TarImages
from dafm_ray.report.evaluate import evaluate
from dafm_ray.tiles import unpack as module
from dafm_ray.tiles.precompute import precompute, precompute_together
from dafm_ray.tiles.store import TileStore
from dafm_ray.tiles.unpack import unpack_part, unpacked
from tests.samples import image_folder, parquet_shard, picture, tar_shard

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(150)]

MODELS = (ModelConfig("sum", "clip4cir:sum@random-tiny"),)


@pytest.fixture
def root(tmp_path):
    root = image_folder(tmp_path / "own", images=22, queries=13)
    (root / "broken.png").write_bytes(b"<html>")
    return root


def members(root):
    return [(path.name, path.read_bytes()) for path in sorted(root.glob("*.png"))]


def config(tmp_path, name, dataset):
    return PrecomputeConfig(dataset, MODELS, str(tmp_path / name), encode_block=8)


def test_files_tars_and_parquet_give_the_same_tiles(tmp_path, root):
    queries = tmp_path / "queries"
    queries.mkdir()
    (queries / "queries.jsonl").write_bytes((root / "queries.jsonl").read_bytes())
    tar_shard(tmp_path / "a.tar", members(root)[::-1])
    parquet_shard(tmp_path / "a.parquet", members(root)[3:], row_group_size=6)
    parquet_shard(tmp_path / "b.parquet", members(root)[:3])
    sources = {
        "files": DatasetConfig("folder", root=str(root)),
        "tar": DatasetConfig("folder", root=str(queries), images=str(tmp_path / "a.tar")),
        "parquet": DatasetConfig("folder", root=str(queries), images=f"{tmp_path}/*.parquet"),
    }
    configs = [config(tmp_path, *source) for source in sources.items()]
    outcomes = precompute_together(configs, [load_dataset(one.dataset) for one in configs])
    records = []
    for outcome in outcomes:
        assert [failure.id for failure in outcome.failures] == ["broken.png"]
        records.append(outcome.store.finished() and outcome.store._records)
    assert records[0] == records[1] == records[2]
    assert precompute(configs[-1]).blocks == 0
    assert list((tmp_path / "parquet" / "images").glob("*.tar"))
    assert not (tmp_path / "tar" / "images").exists()
    page = evaluate(EvaluateConfig(store=str(tmp_path / "parquet"), out=str(tmp_path / "r")))
    assert "data:image/" in page.report.read_text()


@pytest.mark.slow
def test_shards_that_changed_are_unpacked_again(tmp_path, root):
    shard = tmp_path / "a.parquet"
    parquet_shard(shard, members(root))
    dataset = DatasetConfig("folder", root=str(root), images=str(shard))
    store = precompute(config(tmp_path, "s", dataset)).store
    loaded = load_dataset(dataset)
    assert isinstance(loaded.source, ParquetImages)
    assert isinstance(unpacked(store, loaded).source, TarImages)
    picture(99).save(root / "broken.png")
    parquet_shard(shard, members(root))
    assert isinstance(unpacked(store, load_dataset(dataset)).source, ParquetImages)
    outcome = precompute(config(tmp_path, "s", dataset))
    assert outcome.blocks > 0
    assert outcome.failures == []


@pytest.mark.slow
def test_a_large_row_group_becomes_several_tars(tmp_path, root, monkeypatch):
    monkeypatch.setattr(module, "PART_BYTES", 10_000)
    parquet_shard(tmp_path / "a.parquet", members(root))
    dataset = DatasetConfig("folder", root=str(root), images=str(tmp_path / "a.parquet"))
    store = TileStore(precompute(config(tmp_path, "s", dataset)).store.uri)
    source = load_dataset(dataset).source
    assert isinstance(source, ParquetImages)
    import pickle

    row = unpack_part({"part": pickle.dumps(source.row_groups()[0])}, source, store)
    assert len({place.partition("|")[0] for place in pickle.loads(row["places"]).values()}) > 3
