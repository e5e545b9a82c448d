from dataclasses import replace

import pytest

from dafm_ray.config import DatasetConfig, ModelConfig, PrecomputeConfig
from dafm_ray.errors import ConfigError
from dafm_ray.tiles.plan import ModelPlan, Plan, amount, duration, plan
from dafm_ray.tiles.precompute import precompute
from dafm_ray.tiles.store import TileStore
from tests.samples import image_folder, open_folder

pytestmark = pytest.mark.timeout(150)

POOL = ModelConfig("a", "clip4cir:sum@random", actors=2, num_gpus=0.5, batch=64, precision="bf16")


def planned(images, queries, **changes):
    config = PrecomputeConfig(DatasetConfig("cirr"), (POOL,), "s3://bucket/store", **changes)
    model = ModelPlan(POOL, 100.0, 1024, 1024, 1e-9, 3e-9)
    return Plan(config, images, queries, queries, 16, 1, 0.004, (model,), None)


def test_bytes_and_seconds_are_multiplied_out():
    small = planned(2_000, 4_000)
    assert small.feature_bytes == 6_000 * 1024
    assert small.tile_bytes == 2_000 * 4_000 * 4
    assert small.stages["decoding"] == pytest.approx(6_000 * 0.004 / 4)
    assert small.encode_s == small.stages["encoding with a"] == pytest.approx(6_000 / 200)
    assert small.score_s == pytest.approx(8e6 * 1e-9 / 16)
    assert small.limit == "encoding with a (30.0 s)"
    assert not small.advice
    assert replace(small, decode_s=0.4).limit.startswith("decoding")


def test_all_scores_of_a_large_gallery_are_advised_against():
    large = planned(1_000_000, 50_000)
    [advice] = large.advice
    assert "200 GB" in advice
    assert "Set shortlist: 200, which keeps at most 121 MB" in advice
    short = planned(1_000_000, 50_000, shortlist=200)
    assert not short.advice
    assert short.store_bytes < large.store_bytes / 100
    assert short.score_s == pytest.approx(5e10 * 3e-9 / 16)


def test_a_full_disk_is_seen_before_the_job_starts():
    tight = replace(planned(2_000, 4_000), free_bytes=1_000_000)
    assert tight.advice[0].startswith("It does not fit: 38.1 MB are needed and 1 MB are free")


def test_scores_on_gpus_share_the_gpus():
    assert planned(2_000, 4_000, scoring_gpus=0.5).score_s == pytest.approx(8e6 * 1e-9 / 2)


def test_units():
    assert [amount(n) for n in (512, 1_500, 2.5e9, 4e15)] == [
        "512 B",
        "1.5 kB",
        "2.5 GB",
        "4,000 TB",
    ]
    assert [duration(s) for s in (3, 130, 8000, 200_000)] == [
        "3.0 s",
        "2.2 min",
        "2.2 hours",
        "2.3 days",
    ]


@pytest.mark.usefixtures("local_ray")
def test_a_plan_is_measured_and_writes_nothing(tmp_path):
    root = image_folder(tmp_path / "images", images=22, queries=13)
    config = PrecomputeConfig(
        DatasetConfig("folder", root=str(root)),
        (
            ModelConfig("sum", "clip4cir:sum@random-tiny"),
            ModelConfig("text", "zeroshot:text@random-tiny", batch=4),
        ),
        str(tmp_path / "store"),
    )
    found = plan(config, open_folder(root))
    assert not (tmp_path / "store").exists()
    assert (found.images, found.queries, found.cpus) == (22, 13, 4)
    assert found.models[1].pool.batch == 4
    assert all(model.rate > 0 and model.pair_s > 0 for model in found.models)
    assert found.decode_s > 0
    store = precompute(config).store
    keys = [key for key in TileStore(store.uri).finished() if key.startswith("features/")]
    stored = sum(store.read(key).nbytes for key in keys)
    assert found.feature_bytes == stored
    text = "\n".join(found.lines())
    assert "22 images, 13 queries" in text
    assert "most of it waits for" in text
    with pytest.raises(ConfigError, match="GPUs"):
        plan(replace(config, models=(replace(config.models[0], num_gpus=1.0),)), open_folder(root))
